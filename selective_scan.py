"""The selective scan of Mamba, three ways: the definition, a fast chunked scan with its own backward, one token at a time.

(Derivation, worked example and benchmark follow.)
"""

import math

import torch

LOG2_E = math.log2(
    math.e
)  # exp(x) = 2**(x * LOG2_E); torch's vectorised exp2 is 2 to 4 times as fast as its exp on a CPU
SLAB = (
    768 * 1024
)  # elements of one (T, b, N, E) working buffer: 3 MiB in float32, so that the three in use stay in cache
MIN_CHUNK, MAX_CHUNK = 16, 128  # time steps per chunk: fewer keep too many boundary states, more only cost memory


def selective_scan(u, dt, A, B, C, D=None, state=None, *, method="chunked", chunk=None, compile=False):
    """Run the selective scan over a whole sequence. Returns `(y, state)`."""
    if method == "chunked":
        return scan_chunked(u, dt, A, B, C, D, state, chunk=chunk, compile=compile)
    if method == "reference":
        return scan_reference(u, dt, A, B, C, D, state)
    raise ValueError(f"method: got {method!r}, expected 'chunked' or 'reference'")


def scan_reference(u, dt, A, B, C, D=None, state=None):
    """The definition: one step after the other."""
    y_dtype = u.dtype
    u, dt, A, B, C, D, state = _prepare(u, dt, A, B, C, D, state)
    ys = []
    for u_t, dt_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, dt, B, C)), strict=True):
        y_t, state = _step(u_t, dt_t, A, B_t, C_t, D, state)
        ys.append(y_t)
    return torch.stack(ys, 1).to(y_dtype), state


def scan_step(u, dt, A, B, C, D=None, state=None):
    """One token: `u, dt (B, E)`, `B, C (B, N)`. Returns `(y (B, E), state (B, E, N))`."""
    y_dtype = u.dtype
    y, state = _step(*_prepare(u, dt, A, B, C, D, state, step=True))
    return y.to(y_dtype), state


def _step(u, dt, A, B, C, D, state):
    state = torch.exp(dt[:, :, None] * A) * state + (dt * u)[:, :, None] * B[:, None, :]  # (B, E, N)
    y = (state * C[:, None, :]).sum(-1)  # (B, E)
    return (y if D is None else y + D * u), state


def scan_chunked(u, dt, A, B, C, D=None, state=None, *, chunk=None, compile=False):
    """The same function, chunk by chunk, with a backward that recomputes the states of a chunk from its boundary."""
    y_dtype = u.dtype
    u, dt, A, B, C, D, state = _prepare(u, dt, A, B, C, D, state)
    y, state = _ChunkedScan.apply(u, dt, A.t().contiguous(), B, C, D, state.transpose(1, 2), chunk)
    return y.to(y_dtype), state.transpose(1, 2)


def _prepare(u, dt, A, B, C, D, state, step=False):
    """Check what came in against the contract and cast it to the dtype the scan computes in."""
    tensors = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "state": state}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    if u.dim() != (2 if step else 3):
        raise ValueError(f"u: got shape {tuple(u.shape)}, expected {'(B, E)' if step else '(B, L, E)'}")
    if A.dim() != 2:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected (E, N)")
    batch, E, N = u.shape[0], u.shape[-1], A.shape[1]
    time = () if step else (u.shape[1],)
    if u.numel() == 0 or N == 0:
        raise ValueError(f"u, A: got shapes {tuple(u.shape)}, {tuple(A.shape)}, expected no empty dimension")
    expected = {
        "u": (batch, *time, E), "dt": (batch, *time, E), "A": (E, N), "B": (batch, *time, N),
        "C": (batch, *time, N), "D": (E,), "state": (batch, E, N),
    }  # fmt: skip
    for name, x in tensors.items():
        if tuple(x.shape) != expected[name]:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected[name]} from u and A")
        if x.device != u.device:
            raise ValueError(f"{name}: got device {x.device}, expected {u.device} as u")
        if not x.is_floating_point():
            raise ValueError(f"{name}: got dtype {x.dtype}, expected a floating-point dtype")
        if (x.dtype == torch.float64) != (u.dtype == torch.float64):
            raise ValueError(f"{name}: got dtype {x.dtype} beside u's {u.dtype}, expected all float64 or none")
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    if state is None:
        state = torch.zeros(batch, E, N, dtype=dtype, device=u.device)
    return tuple(None if x is None else x.to(dtype) for x in (u, dt, A, B, C, D, state))


def _block_sizes(batch, L, N, E, chunk=None):
    """Batch rows and time steps worked on at once, such that one buffer holds about SLAB elements."""
    T = min(L, chunk or max(MIN_CHUNK, min(MAX_CHUNK, SLAB // (batch * N * E))))
    rows = min(batch, max(1, SLAB // (T * N * E)))
    even = [math.ceil(total / math.ceil(total / size)) for total, size in ((batch, rows), (L, T))]
    return even[0], chunk or even[1]  # blocks of equal size: a last block of one step would cost as much as a full one


def _time_major(x, rows, steps):
    return x[rows, steps].transpose(0, 1).contiguous()  # (T, b, .)


def _states(dt, dtu, A2, B, h, decay, hs):
    """Fill `decay` and `hs` (T, b, N, E) from the state before the chunk; return the state after it."""
    torch.mul(dt.unsqueeze(2), A2, out=decay).exp2_()
    torch.mul(dtu.unsqueeze(2), B.unsqueeze(3), out=hs)
    for decay_t, h_t in zip(decay.unbind(0), hs.unbind(0), strict=True):
        h = h_t.addcmul_(decay_t, h)
    return h


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, state, chunk):
        batch, L, E = u.shape
        N = A.shape[0]
        n_rows, T = _block_sizes(batch, L, N, E, chunk)
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        bounds = state.new_empty(-(-L // T) if keep else 1, batch, N, E)  # the state before each chunk
        last = state.new_empty(batch, N, E)
        buffers = u.new_empty(2, T * n_rows * N * E)
        A2 = A * LOG2_E
        with torch.autocast(u.device.type, enabled=False):
            for b0 in range(0, batch, n_rows):
                rows = slice(b0, min(b0 + n_rows, batch))
                h = state[rows].contiguous()
                for i, t0 in enumerate(range(0, L, T)):
                    steps = slice(t0, min(t0 + T, L))
                    u_, dt_, B_, C_ = (_time_major(x, rows, steps) for x in (u, dt, B, C))
                    shape = (*dt_.shape[:2], N, E)
                    decay, hs = (x[: math.prod(shape)].view(shape) for x in buffers)
                    if keep:
                        bounds[i, rows] = h
                    h = _states(dt_, dt_ * u_, A2, B_, h, decay, hs)
                    y_ = torch.bmm(C_.view(-1, 1, N), hs.view(-1, N, E)).view_as(u_)
                    if D is not None:
                        y_.addcmul_(u_, D)
                    y[rows, steps] = y_.transpose(0, 1)
                    h = h.clone()  # the buffers are about to be overwritten
                last[rows] = h
        ctx.save_for_backward(u, dt, A, B, C, D, bounds)
        ctx.blocks = n_rows, T
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, g_state):
        u, dt, A, B, C, D, bounds = ctx.saved_tensors
        batch, L, E = u.shape
        N = A.shape[0]
        n_rows, T = ctx.blocks
        gu, gdt, gB, gC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, B, C))
        gA = torch.zeros(N * E, dtype=u.dtype, device=u.device)
        gD = None if D is None else torch.zeros_like(D)
        g_first = torch.empty_like(bounds[0])
        buffers = u.new_empty(3, T * n_rows * N * E)
        A2 = A * LOG2_E
        ones = u.new_ones(1, max(N, T * n_rows))
        with torch.autocast(u.device.type, enabled=False):
            for b0 in range(0, batch, n_rows):
                rows = slice(b0, min(b0 + n_rows, batch))
                carry = g_state[rows].contiguous()
                for i in reversed(range(len(bounds))):
                    steps = slice(i * T, min(i * T + T, L))
                    u_, dt_, B_, C_, gy_ = (_time_major(x, rows, steps) for x in (u, dt, B, C, gy))
                    k, b = dt_.shape[:2]
                    decay, hs, G = (x[: k * b * N * E].view(k, b, N, E) for x in buffers)
                    dtu = dt_ * u_
                    h0 = bounds[i, rows]
                    _states(dt_, dtu, A2, B_, h0, decay, hs)
                    gC_ = torch.bmm(gy_.view(-1, 1, E), hs.view(-1, N, E).transpose(1, 2)).view(k, b, N)
                    gC[rows, steps] = gC_.transpose(0, 1)
                    # G_t = dLoss / dh_t: what y_t asks for, plus what the next state asks for
                    torch.mul(gy_.unsqueeze(2), C_.unsqueeze(3), out=G)
                    G_, decay_ = G.unbind(0), decay.unbind(0)
                    G_[-1].add_(carry)
                    for t in range(k - 1, 0, -1):
                        G_[t - 1].addcmul_(decay_[t], G_[t])
                    gB_ = torch.bmm(dtu.view(-1, 1, E), G.view(-1, N, E).transpose(1, 2)).view(k, b, N)
                    gB[rows, steps] = gB_.transpose(0, 1)
                    s = torch.bmm(B_.view(-1, 1, N), G.view(-1, N, E)).view(k, b, E)  # dLoss / d(dt * u)
                    W = G.mul_(decay)  # becomes dLoss / d(dt * A)
                    carry = W[0].clone()
                    W[1:].mul_(hs[:-1])
                    W[0].mul_(h0)
                    gdt_ = s * u_
                    for W_n, A_n in zip(W.unbind(2), A, strict=True):
                        gdt_.addcmul_(W_n, A_n)
                    gdt[rows, steps] = gdt_.transpose(0, 1)
                    gu_ = s.mul_(dt_)
                    if D is not None:
                        gu_.addcmul_(gy_, D)
                        gD += torch.mv((gy_ * u_).view(k * b, E).t(), ones[0, : k * b])
                    gu[rows, steps] = gu_.transpose(0, 1)
                    gA += torch.mv(W.mul_(dt_.unsqueeze(2)).view(k * b, N * E).t(), ones[0, : k * b])
                g_first[rows] = carry
        return gu, gdt, gA.view(N, E), gB, gC, gD, g_first, None
