"""The selective scan, the recurrence at the heart of Mamba: the definition, two fast forms, and one token at a time.

    y, state = selective_scan(u, dt, A, B, C, D, state)   # a whole sequence, in training
    y, state = scan_step(u, dt, A, B, C, D, state)        # one token, in generation and in a control loop

    python selective_scan.py            # errors, times and memory of all forms at one shape
    python -m extras.scan_bench         # at more shapes, with the classic failures and a figure

Sources: Mamba, arXiv 2312.00752 ("the paper" below): equations 1, 2 and 4, Algorithm 2, section 3.3.2 (recompute in the
backward pass) and the appendix on the scan; the formulas of `selective_scan_ref` in github.com/state-spaces/mamba.

Symbols, for all files of this project
    B, L      batch size, sequence length                 N   d_state: numbers remembered per channel
    D         d_model: width of the model                 R   dt_rank: rank of the map that makes dt
    E         d_inner = expand * d_model: channels of     K   d_conv: taps of the short convolution
              the scan (the paper's Algorithm 2 calls     P   image patches
              this one D)                                 T   time steps of one chunk, S chunks (in this file)
    u, dt     (B, L, E)  the input; the step size, >= 0 and without unit
    A         (E, N)     decay rates, < 0, the same for every token; diagonal, so E * N separate numbers
    B, C      (B, L, N)  what each token writes into the state, and what it reads from it ("selective": from the token)
    D         (E,)       skip connection (only as the argument D; the width is never passed around here)
    state, h  (B, E, N)  everything remembered of the tokens so far
Working buffers of the fast forms are (T, b, N, E), for b rows of the batch: time first makes a step one contiguous
block, E last makes every inner loop hundreds of floats long. With N last, 8 or 16 long, products take 5 times as long.

From the continuous equation to the loop
 1. One channel, one state, in continuous time (Eq. 1):           h'(t) = A h(t) + B u(t),   y(t) = C h(t)
 2. Hold u constant for a step of length dt and solve exactly; this is the zero-order hold (Eq. 4):
        h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / (dt A) * dt B u_t
 3. Mamba's code keeps the exact decay and shortens the second factor to dt * B, its limit for small dt A (Euler):
        h_t = exp(dt A) h_{t-1} + dt B u_t,     y_t = C h_t + D u_t                                (Eq. 2, Algorithm 2)
    The ratio exact / Euler is 0.995 at dt = 0.01, A = -1, but 0.50 at dt = 0.1, A = -16. It is only a factor on B,
    which is learned, so training absorbs it; but weights trained with one rule do not run with the other.
 4. dt is a gate made from the token (3.5): dt -> 0 ignores it and keeps the state, a large dt forgets the past for it.

Four tokens by hand (E = N = 1, A = -1, B = 1, D = 0, start at 0)
     t    u      dt = ln   exp(dt A)   dt B u      h          C     y
     1    1.0    2         0.5000       0.6931     0.6931     1.0    0.6931
     2    5.0    1         1.0000       0.0000     0.6931     1.0    0.6931     dt = 0: token 2 is not seen at all
     3    0.0    4         0.2500       0.0000     0.1733     2.0    0.3466
     4   -1.0    2         0.5000      -0.6931    -0.6065     1.0   -0.6065
In two chunks: tokens 1, 2 from h = 0 end at 0.6931. Tokens 3, 4 need only that number; the rest of the past is gone.

The chunked form
    Within a chunk, all that needs no past (decay_t, dt_t B_t u_t) is made in a few large operations; then T steps of
    one multiply-add each; then all y_t in one batched matrix product. Kept for the backward pass: the state *before*
    each chunk, 1/T of all states. The backward pass begins at the last chunk, makes its states again (paper, 3.3.2),
    and runs the adjoint
        G_t = dLoss/dh_t = C_t gy_t + decay_{t+1} G_{t+1}
    which is the same recurrence from the other end (dLoss/d(last state) is added to G_L). The gradients:
        dLoss/dC_t = sum_e gy_t h_t          dLoss/dB_t = sum_e G_t dt_t u_t         s_t = sum_n G_t B_t
        dLoss/du_t = s_t dt_t + D gy_t       W_t = G_t decay_t h_{t-1} = dLoss/d(dt_t A)
        dLoss/d(dt_t) = s_t u_t + sum_n W_t A                  dLoss/dA = sum over B and L of W_t dt_t

The parallel form
    On a GPU the 3 L dependent calls of the chunked form each end before the next is launched. Here S chunks of T steps,
    T near sqrt(L), run side by side from a zero state. What enters a chunk only adds to its states:
        h_t = local_t + P_t h_before,     P_t = decay_1 .. decay_t = exp((dt_1 + .. + dt_t) A)
    With t = T this carries the S boundary states in S steps; then one operation adds P_t h_before to all. The backward
    pass runs h and, reversed in time, G at once: about 4 sqrt(L) calls, for a second exponential per state.

Ways this goes wrong (`python -m extras.scan_bench` shows the first two, tests/test_scan.py plants most of the others)
  * Divide by the cumulative product of decays to get rid of the loop: the product underflows and 0 / 0 follows.
  * Index a tensor that needs a gradient inside the loop, `dA[:, t]`: each step's backward fills a zero tensor as long
    as the whole sequence, so time is quadratic in L. `unbind` once before the loop.
  * Swap B and C: same shape, no error, and training even works a little. Only a comparison with the definition tells.
  * Run it in bfloat16: 0.999 rounds to 1, so that no token is ever forgotten. Here all is float32 or float64.
  * Pad on the left, or forget that padding moves the state: a padded token must have dt = 0. Then the state stays.
  * Drop the state between two calls, or let `step` and `forward` differ: a model that trains well and generates noise.
  * Forget the minus in A = -exp(A_log), or the softplus that keeps dt > 0: the state grows until it is inf.
"""

import math

import torch
from torch.nn import functional as F

# --- the definition ---


def discretise(u, dt, A, B):
    """What a token leaves of the state and what it writes into it (step 3 above), so that h_t = decay h_{t-1} + write.

    Args: u, dt (.., E), dt >= 0; A (E, N); B (.., N); leading axes (batch,) or (batch, L), the same for u, dt and B.
    Returns: decay = exp(dt A) and write = dt B u, both (.., E, N).
    """
    # exercise 1: discretisation
    # decay_t = exp(dt_t A),  write_t = dt_t B_t u_t
    decay = torch.exp(dt[..., None] * A)
    return decay, (dt * u)[..., None] * B[..., None, :]
    # end of exercise 1


def scan_reference(u, dt, A, B, C, D=None, state=None):
    """The definition, one step after the other, differentiated by autograd. Same contract as `selective_scan`."""
    y_dtype = u.dtype
    u, dt, A, B, C, D, state = _prepare(u, dt, A, B, C, D, state)
    # exercise 2: the reference scan
    ys = []
    for u_t, dt_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, dt, B, C)), strict=True):
        # h_t = decay_t h_{t-1} + write_t
        decay, write = discretise(u_t, dt_t, A, B_t)
        state = decay * state + write
        # y_t = C_t h_t + D u_t
        ys.append((state * C_t[:, None, :]).sum(-1) + D * u_t)
    return torch.stack(ys, 1).to(y_dtype), state
    # end of exercise 2


def scan_step(u, dt, A, B, C, D=None, state=None):
    """One token: u, dt (B, E); B, C (B, N); the rest as in `selective_scan`. Returns y (B, E), state (B, E, N)."""
    y, state = _step(*_prepare(u, dt, A, B, C, D, state, step=True))
    return y.to(u.dtype), state


def _step(u, dt, A, B, C, D, state):
    """`scan_step` for arguments known to fit: all float32 or all float64, none of them None. y in the same dtype."""
    # exercise 4: step
    decay, write = discretise(u, dt, A, B)
    after = decay * state + write
    return (after * C[:, None, :]).sum(-1) + D * u, after
    # end of exercise 4


def selective_scan(u, dt, A, B, C, D=None, state=None, *, method="auto", chunk=None):
    """Run the recurrence over a whole sequence.

    Args: u, dt (B, L, E), L >= 1, dt >= 0; A (E, N) < 0; B, C (B, L, N); D (E,) or None: no skip; state (B, E, N) or
        None: zeros. All float64, or any mix of float32, bfloat16 and float16, which is computed in float32; all on one
        device.
        method: "reference" (the definition), "chunked", "parallel", or "auto": chunked on a CPU, where it is faster;
        parallel elsewhere, as it launches fewer kernels; the definition under torch.compile, which fuses it itself.
        chunk: time steps per chunk of the chunked form; None chooses. The result does not depend on it.
    Returns: y (B, L, E) in u's dtype; the state after the last token (B, E, N) in float32 (float64 for float64).
        Both are differentiable in every argument. A sequence may be split anywhere, handing the state on.
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    Source: paper, Algorithm 2, lines 5 and 6. Differs: takes and returns a state; time before channels, as in the paper
        (the CUDA kernel has (B, E, L)); dt comes after its bias and softplus, the gate with z is the caller's.
    """
    if method == "auto" and torch.compiler.is_compiling():
        method = "reference"
    elif method == "auto":
        method = "chunked" if u.device.type == "cpu" else "parallel"
    if method == "chunked":
        return scan_chunked(u, dt, A, B, C, D, state, chunk=chunk)
    if method == "parallel":
        return scan_parallel(u, dt, A, B, C, D, state)
    if method == "reference":
        return scan_reference(u, dt, A, B, C, D, state)
    raise ValueError(f"method: got {method!r}, expected 'auto', 'chunked', 'parallel' or 'reference'")


# --- the contract ---


def _prepare(u, dt, A, B, C, D, state, step=False):
    """Check the arguments against the contract; cast them to the dtype of the computation; fill in D and state."""
    if u.dim() != (2 if step else 3) or A.dim() != 2 or u.numel() == 0 or A.shape[1] == 0:
        expected = f"{'(B, E)' if step else '(B, L, E)'} and (E, N), none of them 0"
        raise ValueError(f"u, A: got shapes {tuple(u.shape)} and {tuple(A.shape)}, expected {expected}")
    *rows, E = u.shape  # rows: (B,) or (B, L)
    N = A.shape[1]
    double = u.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    D = torch.zeros(E, dtype=dtype, device=u.device) if D is None else D
    state = torch.zeros(rows[0], E, N, dtype=dtype, device=u.device) if state is None else state
    shapes = {"dt": (*rows, E), "A": (E, N), "B": (*rows, N), "C": (*rows, N), "D": (E,), "state": (rows[0], E, N)}
    for (name, shape), x in zip([("u", u.shape), *shapes.items()], (u, dt, A, B, C, D, state), strict=True):
        if x.shape != torch.Size(shape):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {shape} (u is {tuple(u.shape)}, N is {N})")
        if x.device != u.device:
            raise ValueError(f"{name}: got device {x.device}, expected {u.device}, where u is")
        if not x.is_floating_point() or (x.dtype == torch.float64) != double:
            expected = "torch.float64, as u is" if double else "torch.float32, bfloat16 or float16, as u is not float64"
            raise ValueError(f"{name}: got dtype {x.dtype}, expected {expected}")
    return [x if x.dtype == dtype else x.to(dtype) for x in (u, dt, A, B, C, D, state)]


class _Scan(torch.autograd.Function):
    """What the two fast forms share. Arguments as in `selective_scan`, of one dtype, but A (N, E), states (B, N, E).

    forward returns y, the state after the last token, and bounds: where `keep`, states to make the others from again.
    """

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, dt, A, B, C, D, _, _, *ctx.options = inputs
        bounds = output[2]
        ctx.mark_non_differentiable(bounds)
        ctx.save_for_backward(u, dt, A, B, C, D, bounds)


def _fast(form, u, dt, A, B, C, D, state, *options):
    """Check and cast the arguments, apply one of the two fast forms, and lay the states out as the caller's."""
    y_dtype = u.dtype
    tensors = _prepare(u, dt, A, B, C, D, state)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    u, dt, A, B, C, D, state = tensors
    run = form.forward if torch.is_inference_mode_enabled() else form.apply  # without autograd's bookkeeping, or with
    with _no_autocast(u):
        y, state, _ = run(u, dt, A.t().contiguous(), B, C, D, state.transpose(1, 2), keep, *options)
    return y.to(y_dtype), state.transpose(1, 2)


def _no_autocast(u):
    return torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False)  # autocast knows no meta device


def _refuse_graph():
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fast scans give no gradients under create_graph=True and torch.func; method='reference' does"
        )


# --- the chunked form: u, dt, gy (T, b, E); A (N, E), and A2 = A * LOG2_E; B, C (T, b, N); states (b, N, E) ---

LOG2_E = math.log2(math.e)  # exp(x) = 2 ** (x * LOG2_E): on a CPU torch.exp2 takes at most half of torch.exp's time
# Elements of a working buffer per thread, 2 MiB in float32: three stay in a usual last-level cache; for up to 4 threads
SLAB, MAX_THREADS = 512 * 1024, 4
# Time steps: with fewer the kept states are many; with more a short sequence of one row leaves the second-level cache
MIN_CHUNK, MAX_CHUNK = 16, 64


def scan_chunked(u, dt, A, B, C, D=None, state=None, *, chunk=None):
    """Chunk after chunk (see "The chunked form" above). Same contract as `selective_scan`.

    Raises: RuntimeError under torch.func and for gradients of gradients, which `scan_reference` has.
    """
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise ValueError(f"chunk: got {chunk!r}, expected None or an integer of at least 1")
    return _fast(_ChunkedScan, u, dt, A, B, C, D, state, chunk)


def _sum_states(w, x):
    """sum_n w[.., n] x[.., n, e] -> (.., E)"""
    N, E = x.shape[-2:]
    return torch.bmm(w.reshape(-1, 1, N), x.reshape(-1, N, E)).view(*x.shape[:-2], E)


def _sum_channels(w, x):
    """sum_e w[.., e] x[.., n, e] -> (.., N); as row times matrix, 10 times as fast as matrix times column"""
    N, E = x.shape[-2:]
    return torch.bmm(w.reshape(-1, 1, E), x.reshape(-1, N, E).transpose(1, 2)).view(x.shape[:-1])


def _states(dt, dtu, A2, B, h, decay, hs):
    """The chunk's states from h, the one before it. Fills the buffers `decay` and `hs` (T, b, N, E)."""
    torch.mul(dt.unsqueeze(2), A2, out=decay).exp2_()
    torch.mul(dtu.unsqueeze(2), B.unsqueeze(3), out=hs)
    for decay_t, h_t in zip(decay, hs, strict=True):
        h = h_t.addcmul_(decay_t, h)


def _forward_chunk(dt, dtu, A2, B, C, h, buffers):
    """-> C h (T, b, E), the state after the chunk"""
    _states(dt, dtu, A2, B, h, *buffers)
    hs = buffers[1]
    return _sum_states(C, hs), hs[-1].clone()  # a clone, as the next chunk overwrites the buffers


def _backward_chunk(u, dt, A, B, C, gy, h, carry, buffers):
    """-> gu without D gy, gdt, gB, gC; gA; dLoss/d(the state before the chunk, h). carry: dLoss/d(the one after it)."""
    decay, hs, G = buffers
    dtu = torch.mul(dt, u, out=u.new_empty(u.shape))
    _states(dt, dtu, A * LOG2_E, B, h, decay, hs)
    torch.mul(gy.unsqueeze(2), C.unsqueeze(3), out=G)
    G[-1].add_(carry)
    G_t, decay_t = G.unbind(0), decay.unbind(0)
    for t in range(len(G) - 1, 0, -1):
        G_t[t - 1].addcmul_(decay_t[t], G_t[t])
    s, gB, gC = _sum_states(B, G), _sum_channels(dtu, G), _sum_channels(gy, hs)
    W = G.mul_(decay)
    carry = W[0].clone()
    W[1:].mul_(hs[:-1])
    W[0].mul_(h)
    gdt = s * u
    for W_n, A_n in zip(W.unbind(2), A, strict=True):
        gdt.addcmul_(W_n, A_n)
    W.mul_(dt.unsqueeze(2))
    gA = torch.mm(W.new_ones(1, W.shape[0] * W.shape[1]), W.view(-1, A.numel())).view_as(A)
    return (s.mul_(dt), gdt, gB, gC), gA, carry


def _block_sizes(batch, L, N, E, chunk):
    """-> T, rows: time steps of a chunk, and batch rows worked on at once, for buffers of about SLAB elements a thread.

    PyTorch splits an operation among threads only above 32,768 elements; enough rows bring a time step above that.
    """
    room = SLAB * min(torch.get_num_threads(), MAX_THREADS)
    T = min(L, chunk or min(max(room // (batch * N * E), MIN_CHUNK), MAX_CHUNK))
    if chunk is None:
        T = math.ceil(L / math.ceil(L / T))  # even: a last chunk of one step would cost nearly as much as a full one
    rows = min(batch, max(1, room // (T * N * E)))
    return T, math.ceil(batch / math.ceil(batch / rows))


def _blocks(total, size):
    return [slice(start, start + size) for start in range(0, total, size)]


class _ChunkedScan(_Scan):
    @staticmethod
    def forward(u, dt, A, B, C, D, state, keep, chunk):
        """Fill y, `last` (the state after the last token) and, where `keep`, bounds: the state BEFORE each chunk.

        Batch rows are worked on in blocks of `n_rows`, time in chunks of T (the last of either may be smaller). The
        state after a chunk is the state before the next; a chunk is run by `_forward_chunk`, in (T, b, ..) layout.
        """
        (batch, L, E), N = u.shape, A.shape[0]
        T, n_rows = _block_sizes(batch, L, N, E, chunk)
        A2 = A * LOG2_E
        buffers = u.new_empty(2, T * n_rows * N * E)
        y, last = u.new_empty(batch, L, E), u.new_empty(batch, N, E)
        bounds = u.new_empty(math.ceil(L / T) if keep else 0, batch, N, E)
        # exercise 3: the chunked scan
        for rows in _blocks(batch, n_rows):
            h = state[rows].contiguous()
            for i, steps in enumerate(_blocks(L, T)):
                u_, dt_, B_, C_ = (x[rows, steps].transpose(0, 1) for x in (u, dt, B, C))
                views = buffers[:, : dt_.numel() * N].view(2, *dt_.shape[:2], N, E)
                if keep:
                    bounds[i, rows] = h
                dtu = torch.mul(dt_, u_, out=u.new_empty(dt_.shape))
                y_, h = _forward_chunk(dt_, dtu, A2, B_, C_, h, views)
                y[rows, steps] = y_.addcmul_(u_, D).transpose(0, 1)
            last[rows] = h
        # end of exercise 3
        return y, last, bounds

    @staticmethod
    def backward(ctx, gy, g_last, _):
        _refuse_graph()
        u, dt, A, B, C, D, bounds = ctx.saved_tensors
        (batch, L, E), N = u.shape, A.shape[0]
        T, n_rows = _block_sizes(batch, L, N, E, ctx.options[0] or math.ceil(L / len(bounds)))
        buffers = u.new_empty(3, T * n_rows * N * E)
        grads = [x.new_empty(x.shape) for x in (u, dt, B, C)]
        gA, g_first = torch.zeros_like(A), u.new_empty(batch, N, E)
        with _no_autocast(u):
            for rows in _blocks(batch, n_rows):
                carry = g_last[rows].contiguous()
                for i, steps in reversed(list(enumerate(_blocks(L, T)))):
                    u_, dt_, B_, C_, gy_ = (x[rows, steps].transpose(0, 1) for x in (u, dt, B, C, gy))
                    views = buffers[:, : dt_.numel() * N].view(3, *dt_.shape[:2], N, E)
                    found, gA_, carry = _backward_chunk(u_, dt_, A, B_, C_, gy_, bounds[i, rows], carry, views)
                    gA += gA_
                    for whole, part in zip(grads, found, strict=True):
                        whole[rows, steps] = part.transpose(0, 1)
                g_first[rows] = carry
        gu, gdt, gB, gC = grads
        return gu.addcmul_(gy, D), gdt, gA, gB, gC, (gy * u).sum((0, 1)), g_first, None, None


# --- the parallel form: tokens in (T, S, b, ..) layout, token s T + t at [t, s] ---

PARALLEL_SLAB = 64 * SLAB  # elements of a buffer, 128 MiB in float32: a GPU wants large operations; on a CPU one SLAB


def scan_parallel(u, dt, A, B, C, D=None, state=None):
    """Chunks side by side (see "The parallel form" above), through one slab of the sequence after the other.

    Forward and backward issue about 4 sqrt(L) + 140 tensor operators a slab of L tokens (at most 12 sqrt(L) + 60 from
    L = 200 on). Same contract as `selective_scan`. Raises: RuntimeError as `scan_chunked` does.
    """
    return _fast(_ParallelScan, u, dt, A, B, C, D, state)


def _slabs(A, *tensors):
    """For each slab, every tensor (b, L, k) as (T, S, b, k). Zeros follow the last token: dt = 0 keeps the state."""
    x = torch.cat(tensors, 2)
    batch, L, _ = x.shape
    room = SLAB if x.device.type == "cpu" else PARALLEL_SLAB
    tokens = min(L, max(room // (batch * A.numel()), MIN_CHUNK))
    T = math.isqrt(tokens)
    x = F.pad(x, (0, 0, 0, -L % T)).unflatten(1, (-1, T)).permute(2, 1, 0, 3).contiguous()
    return [slab.split([tensor.shape[2] for tensor in tensors], 3) for slab in x.split(math.ceil(tokens / T), 1)]


def _join(slabs, L):
    """(T, S, b, k) of every slab -> (b, L, k)"""
    return torch.cat(slabs, 1).permute(2, 1, 0, 3).flatten(1, 2)[:, :L]


def _side_by_side(dt, x, w, A, h):
    """h_t = exp(dt_t A) h_{t-1} + w_t x_t over a slab; dt, x (T, S, b, E), w (T, S, b, N), h (b, N, E) at its start.

    Returns: decays and states (T, S, b, N, E); the state before each chunk (S, b, N, E); the one after the slab.
    """
    A2 = A * LOG2_E
    decay = (dt.unsqueeze(3) * A2).exp2_()
    product = (dt.cumsum(0).unsqueeze(3) * A2).exp2_()  # P_t
    hs = x.unsqueeze(3) * w.unsqueeze(4)
    # T steps, all chunks at once and from zero: local_t = decay_t local_{t-1} + w_t x_t
    local, *rest = hs.unbind(0)
    for decay_t, h_t in zip(decay.unbind(0)[1:], rest, strict=True):
        local = h_t.addcmul_(decay_t, local)
    # S steps, from chunk to chunk: the next one begins at local_T + P_T h
    before = []
    for product_s, local_s in zip(product[-1].unbind(0), local.unbind(0), strict=True):
        before.append(h)
        h = torch.addcmul(local_s, product_s, h)
    before = torch.stack(before)
    return decay, hs.addcmul_(product, before), before, h  # h_t = local_t + P_t h_before


class _ParallelScan(_Scan):
    @staticmethod
    def forward(u, dt, A, B, C, D, state, keep):
        """`bounds`: the state before each slab."""
        ys, bounds = [], []
        for dt_, dtu, B_, C_ in _slabs(A, dt, dt * u, B, C):
            bounds.append(state)
            _, hs, _, state = _side_by_side(dt_, dtu, B_, A, state)
            ys.append(_sum_states(C_, hs))
        y = torch.addcmul(_join(ys, u.shape[1]), u, D)
        return y, state.contiguous(), torch.stack(bounds) if keep else state.new_empty(0)

    @staticmethod
    def backward(ctx, gy, carry, _):
        _refuse_graph()
        u, dt, A, B, C, D, bounds = ctx.saved_tensors
        gA = torch.zeros_like(A)
        grads = []
        with _no_autocast(u):
            slabs = _slabs(A, dt, F.pad(dt[:, 1:], (0, 0, 0, 1)), dt * u, gy, B, C)
            for (dt_, next_dt, dtu, gy_, B_, C_), state in zip(reversed(slabs), reversed(bounds.unbind()), strict=True):
                # G_t = C_t gy_t + decay_{t+1} G_{t+1} is the same recurrence from the last token to the first; both run
                # at once, G in further rows of the batch
                pairs = (dt_, next_dt), (dtu, gy_), (B_, C_)
                both = [torch.cat([x, back.flip(0, 1)], 2) for x, back in pairs]
                found = _side_by_side(*both, A, torch.cat([state, carry]))
                (decay, _), (hs, G), (before, _), (_, carry) = (x.chunk(2, -3) for x in found)
                G = G.flip(0, 1)
                s, gB, gC = _sum_states(B_, G), _sum_channels(dtu, G), _sum_channels(gy_, hs)
                W = G.mul_(decay)
                W[1:].mul_(hs[:-1])
                W[0].mul_(before)
                gA += (W * dt_.unsqueeze(3)).sum((0, 1, 2))
                grads.insert(0, torch.cat([s, (W * A).sum(3), gB, gC], 3))
        s, WA, gB, gC = _join(grads, u.shape[1]).split([*u.shape[2:] * 2, *B.shape[2:] * 2], 2)
        gu, gdt = torch.addcmul(s * dt, gy, D), torch.addcmul(WA, s, u)
        g_first = torch.exp(dt[:, 0].unsqueeze(1) * A) * carry
        return gu, gdt, gA, gB, gC, (gy * u).sum((0, 1)), g_first, None


# --- inputs to try it on, and the comparison of all forms ---

DT_RANGE, LARGE_DT_RANGE = (1e-3, 1e-1), (1e-1, 1.0)  # the first: Mamba's initialisation (paper, 3.6)


def example_inputs(B, L, E, N, dt_range=DT_RANGE, dtype=torch.float32, seed=0):
    """Random u, dt, A, B, C, D, state that ask for gradients; A = -1 .. -N as Mamba is initialised."""
    source = torch.Generator().manual_seed(seed)
    low, high = (math.log(x) for x in dt_range)
    dt = torch.exp(low + (high - low) * torch.rand(B, L, E, generator=source))
    u, B_, C, D, state = (torch.randn(s, generator=source) for s in ((B, L, E), (B, L, N), (B, L, N), E, (B, E, N)))
    A = -torch.arange(1.0, N + 1).repeat(E, 1)
    return [x.to(dtype).requires_grad_() for x in (u, dt, A, B_, C, D, state)]


def main():
    try:
        from extras.scan_bench import main as bench
    except ModuleNotFoundError as error:
        print(f"the comparison is printed by extras/scan_bench.py, which cannot be loaded: {error}")
    else:
        bench(short=True)


if __name__ == "__main__":
    main()
