"""The selective scan, the recurrence at the heart of Mamba: as a definition, fast in chunks, and one token at a time.

    y, state = selective_scan(u, dt, A, B, C, D, state)   # a whole sequence, in training
    y, state = scan_step(u, dt, A, B, C, D, state)        # one token, in generation and in a control loop

    python selective_scan.py [--quick] [--out FILE]       # errors, times, memory, the classic failures, the floor

Sources: Mamba, arXiv 2312.00752 ("the paper" below): equations 1, 2 and 4, Algorithm 2, section 3.3.2 (recompute in the
backward pass) and the appendix on the scan; the formulas of `selective_scan_ref` in github.com/state-spaces/mamba.

Symbols, for all files of this project
    B, L      batch size, sequence length                 N   d_state: numbers remembered per channel
    D         d_model: width of the model                 R   dt_rank: rank of the map that makes dt
    E         d_inner = expand * d_model: channels of     K   d_conv: taps of the short convolution
              the scan (the paper's Algorithm 2 calls     P   image patches
              this one D)                                 T   time steps of one chunk (in this file)
    u, dt     (B, L, E)  the input; the step size, > 0 and without unit
    A         (E, N)     decay rates, < 0, the same for every token; diagonal, so E * N separate numbers
    B, C      (B, L, N)  what each token writes into the state, and what it reads from it ("selective": from the token)
    D         (E,)       skip connection (only as the argument D; the width is never passed around here)
    state, h  (B, E, N)  everything remembered of the tokens so far
A name such as `decay_BEN` lists its axes. Working buffers are (T, b, N, E): time first makes a step one contiguous
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
    which is the same recurrence from the other end. All gradients are products with G_t:
        dLoss/dC_t = sum_e gy_t h_t          dLoss/dB_t = sum_e G_t dt_t u_t         s_t = sum_n G_t B_t
        dLoss/du_t = s_t dt_t + D gy_t       W_t = G_t decay_t h_{t-1} = dLoss/d(dt_t A)
        dLoss/d(dt_t) = s_t u_t + sum_n W_t A                  dLoss/dA = sum over B and L of W_t dt_t

Ways this goes wrong (`python selective_scan.py` shows the first two, tests/test_scan.py plants most of the others)
  * Divide by the cumulative product of decays to get rid of the loop: the product underflows and 0 / 0 follows.
  * Index a tensor that needs a gradient inside the loop, `dA[:, t]`: each step's backward fills a zero tensor as long
    as the whole sequence, so time is quadratic in L. `unbind` once before the loop.
  * Swap B and C: same shape, no error, and training even works a little. Only a comparison with the definition tells.
  * Run it in bfloat16: 8 bits of mantissa cannot hold 0.999 ** 1000. Here everything is computed in float32 or float64.
  * Pad on the left, or forget that padding moves the state: a padded token must have dt = 0. Then the state stays.
  * Drop the state between two calls, or let `step` and `forward` differ: a model that trains well and generates noise.
  * Forget the minus in A = -exp(A_log), or the softplus that keeps dt > 0: the state grows until it is inf.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time

import torch

LOG2_E = math.log2(math.e)  # exp(x) = 2 ** (x * LOG2_E): on a CPU torch.exp2 takes a third of the time of torch.exp
EXP2_TAYLOR = [math.log(2) ** k / math.factorial(k) for k in range(6, -1, -1)]  # 2 ** x for |x| <= 0.5, to 1.2e-7
SLAB = 512 * 1024  # elements of a working buffer, 2 MiB in float32: three of them stay in a usual last-level cache
MIN_CHUNK, MAX_CHUNK = 16, 128  # time steps: with fewer the kept states are many, with more only memory is spent
FUSED_CHUNK = 8  # the same under torch.compile, which writes every step out and so takes long to compile
FUSED_MIN = 32 * 1024  # elements of one step, under which the cost of the compiled call is more than it saves


def selective_scan(u, dt, A, B, C, D=None, state=None, *, method="chunked", chunk=None, compile=False):
    """Run the recurrence over a whole sequence.

    Args: u, dt (B, L, E), L >= 1; A (E, N); B, C (B, L, N); D (E,) or None: no skip; state (B, E, N) or None: zeros.
        All float64, or any mix of float32, bfloat16 and float16, which is computed in float32; all on one device.
        method: "chunked" (fast, the default) or "reference" (the definition).
        chunk: time steps per chunk; None chooses. The result does not depend on it. compile: see `scan_chunked`.
    Returns: y (B, L, E) in u's dtype; the state after the last token (B, E, N) in float32 (float64 for float64).
        Both are differentiable in every argument. A sequence may be split anywhere, handing the state on.
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    Source: paper, Algorithm 2, lines 5 and 6. Differs: takes and returns a state; time before channels, as in the paper
        (the CUDA kernel has (B, E, L)); dt comes after its bias and softplus, the gate with z is the caller's.
    """
    if method == "chunked":
        return scan_chunked(u, dt, A, B, C, D, state, chunk=chunk, compile=compile)
    if method == "reference":
        return scan_reference(u, dt, A, B, C, D, state)
    raise ValueError(f"method: got {method!r}, expected 'chunked' or 'reference'")


def discretise(u, dt, A, B):
    """What a token leaves of the state and what it writes into it (step 3 above), so that h_t = decay h_{t-1} + write.

    Args: u, dt (.., E), dt >= 0; A (E, N); B (.., N); the leading axes (B) or (B, L) are the same for u, dt and B.
    Returns: decay = exp(dt A) and write = dt B u, both (.., E, N).
    """
    # exercise 1: discretisation
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
        decay, write = discretise(u_t, dt_t, A, B_t)
        state = decay * state + write
        ys.append((state * C_t[:, None, :]).sum(-1) + D * u_t)
    return torch.stack(ys, 1).to(y_dtype), state
    # end of exercise 2


def scan_step(u, dt, A, B, C, D=None, state=None):
    """One token: u, dt (B, E); B, C (B, N); the rest as in `selective_scan`. Returns y (B, E), state (B, E, N)."""
    y_dtype = u.dtype
    u, dt, A, B, C, D, state = _prepare(u, dt, A, B, C, D, state, step=True)
    # exercise 4: step
    decay, write = discretise(u, dt, A, B)
    after = decay * state + write
    return ((after * C[:, None, :]).sum(-1) + D * u).to(y_dtype), after
    # end of exercise 4


def scan_chunked(u, dt, A, B, C, D=None, state=None, *, chunk=None, compile=False):
    """The fast form (see "The chunked form" above). Same contract as `selective_scan`.

    compile: build the inner loops of full chunks with torch.compile, in float32 and where a step is large enough to
        gain by it. On a CPU this needs a C++ compiler and half a minute for each new set of shapes, and gains little.
    Raises: RuntimeError where gradients of gradients are asked for (create_graph=True); `scan_reference` gives them.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected None or at least 1")
    y_dtype = u.dtype
    tensors = _prepare(u, dt, A, B, C, D, state)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)  # states for a backward pass
    u, dt, A, B, C, D, state = tensors
    compile = compile and u.dtype == torch.float32 and state.numel() >= FUSED_MIN
    with torch.autocast(u.device.type, enabled=False):
        y, state = _ChunkedScan.apply(u, dt, A.t().contiguous(), B, C, D, state.transpose(1, 2), keep, chunk, compile)
    return y.to(y_dtype), state.transpose(1, 2)


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
    return [x.to(dtype) for x in (u, dt, A, B, C, D, state)]


# --- one chunk: u, dt, gy (T, b, E); A (N, E), and A2 = A * LOG2_E; B, C (T, b, N); states (b, N, E) ---


def _sum_states(w, x):
    """sum_n w[t, b, n] x[t, b, n, e] -> (T, b, E)"""
    T, b, N, E = x.shape
    return torch.bmm(w.reshape(T * b, 1, N), x.view(T * b, N, E)).view(T, b, E)


def _sum_channels(w, x):
    """sum_e w[t, b, e] x[t, b, n, e] -> (T, b, N); as row times matrix, 10 times as fast as matrix times column"""
    T, b, N, E = x.shape
    return torch.bmm(w.reshape(T * b, 1, E), x.view(T * b, N, E).transpose(1, 2)).view(T, b, N)


def _states(dt, dtu, A2, B, h, decay, hs):
    """The chunk's states from h, the one before it. Fills the buffers `decay` and `hs` (T, b, N, E)."""
    torch.mul(dt.unsqueeze(2), A2, out=decay).exp2_()
    torch.mul(dtu.unsqueeze(2), B.unsqueeze(3), out=hs)
    for decay_t, h_t in zip(decay, hs, strict=True):
        h = h_t.addcmul_(decay_t, h)


def _forward_chunk(dt, dtu, A2, B, C, h, buffers):
    """-> C h (T, b, E), the state after the chunk"""
    decay, hs = buffers[:2]
    _states(dt, dtu, A2, B, h, decay, hs)
    return _sum_states(C, hs), hs[-1].clone()  # a clone, as the next chunk overwrites the buffers


def _backward_chunk(dt, dtu, A, A2, B, C, gy, h, carry, buffers):
    """-> gB, gC (T, b, N); s and sum_n W A (T, b, E); gA (N, E); dLoss/d(state before the chunk). `carry`: after it."""
    decay, hs, G = buffers
    _states(dt, dtu, A2, B, h, decay, hs)
    gC = _sum_channels(gy, hs)
    torch.mul(gy.unsqueeze(2), C.unsqueeze(3), out=G)
    G_t, decay_t = G.unbind(0), decay.unbind(0)
    G_t[-1].add_(carry)
    for t in range(len(G) - 1, 0, -1):
        G_t[t - 1].addcmul_(decay_t[t], G_t[t])
    gB, s = _sum_channels(dtu, G), _sum_states(B, G)
    W = G.mul_(decay)
    carry = W[0].clone()
    W[1:].mul_(hs[:-1])
    W[0].mul_(h)
    WA = torch.zeros_like(s)
    for W_n, A_n in zip(W.unbind(2), A, strict=True):
        WA.addcmul_(W_n, A_n)
    W.mul_(dt.unsqueeze(2))
    gA = torch.mm(W.new_ones(1, W.shape[0] * W.shape[1]), W.view(-1, A.numel())).view_as(A)
    return gB, gC, s, WA, gA, carry


# --- the same two functions for torch.compile: each step written out, no buffers, all of it fused into one loop ---


def _exp2(z):
    """2 ** z by Taylor's series, relative error 3e-7: unlike exp2, a library call, it can be fused."""
    z = z.clamp(-126.0, 128.0)  # the smallest normal float32, and infinity
    k = z.round()
    p = 0.0
    for c in EXP2_TAYLOR:
        p = p * (z - k) + c
    return p * ((k.to(torch.int32) + 127) * 2**23).view(torch.float32)  # float32 keeps its exponent above 23 bits


def _states_fused(dt, dtu, A2, B, h):
    hs, decay = [h], []
    for t in range(dt.shape[0]):
        decay.append(_exp2(dt[t, :, None] * A2))
        hs.append(decay[t] * hs[t] + dtu[t, :, None] * B[t, :, :, None])
    return hs, decay


def _forward_lanes(dt, dtu, A2, B, h):
    return torch.stack(_states_fused(dt, dtu, A2, B, h)[0][1:])


def _backward_lanes(dt, dtu, A, A2, B, C, gy, h, carry):
    hs, decay = _states_fused(dt, dtu, A2, B, h)
    Gs, WA, gA = [], [], torch.zeros_like(h)
    for t in reversed(range(dt.shape[0])):
        G = carry + gy[t, :, None] * C[t, :, :, None]
        carry = decay[t] * G
        W = carry * hs[t]
        gA = gA + W * dt[t, :, None]
        Gs.append(G)
        WA.append(W * A)
    return torch.stack(hs[1:]), torch.stack(Gs[::-1]), torch.stack(WA[::-1]), gA, carry


@functools.cache
def _compiled(function):
    options = dict.fromkeys(("max_fusion_size", "realize_opcount_threshold", "realize_reads_threshold"), 10**6)
    options["cpp.enable_floating_point_contract_flag"] = "fast"  # a * b + c in one instruction
    return torch.compile(function, dynamic=False, options=options)  # 10**6: never cut the long expression in pieces


def _forward_chunk_fused(dt, dtu, A2, B, C, h, buffers):
    hs = _compiled(_forward_lanes)(dt, dtu, A2, B, h)
    return _sum_states(C, hs), hs[-1].clone()


def _backward_chunk_fused(dt, dtu, A, A2, B, C, gy, h, carry, buffers):
    hs, G, WA, gA, carry = _compiled(_backward_lanes)(dt, dtu, A, A2, B, C, gy, h, carry)
    WA = _sum_states(torch.ones_like(B), WA)
    return _sum_channels(dtu, G), _sum_channels(gy, hs), _sum_states(B, G), WA, gA.sum(0), carry


# --- the whole sequence ---


def _block_sizes(batch, L, N, E, chunk, compile):
    """-> T, rows: time steps of a chunk, and batch rows worked on at once, for buffers of about SLAB elements."""
    T = min(L, chunk or (FUSED_CHUNK if compile else min(max(SLAB // (batch * N * E), MIN_CHUNK), MAX_CHUNK)))
    if chunk is None and not compile:
        T = math.ceil(L / math.ceil(L / T))  # even: a last chunk of one step would cost nearly as much as a full one
    rows = min(batch, max(1, SLAB // (T * N * E)))
    return T, math.ceil(batch / math.ceil(batch / rows))


def _blocks(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


class _ChunkedScan(torch.autograd.Function):
    """Arguments as in `scan_chunked`, but A (N, E) and states (B, N, E)."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, state, keep, chunk, compile):
        """Fill y, `last` (the state after the last token) and, where `keep`, bounds: the state BEFORE each chunk.

        Batch rows are worked on in blocks of `n_rows`, time in chunks of T (the last of either may be smaller). The
        state after a chunk is the state before the next; a chunk is run by `_forward_chunk`, in (T, b, ..) layout.
        """
        (batch, L, E), N = u.shape, A.shape[0]
        T, n_rows = _block_sizes(batch, L, N, E, chunk, compile)
        A2 = A * LOG2_E
        buffers = u.new_empty(2, T * n_rows * N * E)
        y, last = u.new_empty(batch, L, E), u.new_empty(batch, N, E)
        bounds = u.new_empty(math.ceil(L / T) if keep else 0, batch, N, E)  # the state before each chunk
        # exercise 3: the chunked scan
        for rows in _blocks(batch, n_rows):
            h = state[rows].contiguous()
            for i, steps in enumerate(_blocks(L, T)):
                u_, dt_, B_, C_ = (x[rows, steps].transpose(0, 1) for x in (u, dt, B, C))
                size = (*dt_.shape[:2], N, E)
                if keep:
                    bounds[i, rows] = h
                run = _forward_chunk_fused if compile and size[:2] == (T, n_rows) else _forward_chunk
                dtu = torch.mul(dt_, u_, out=u.new_empty(dt_.shape))
                y_, h = run(dt_, dtu, A2, B_, C_, h, [x[: math.prod(size)].view(size) for x in buffers])
                y[rows, steps] = y_.addcmul_(u_, D).transpose(0, 1)
            last[rows] = h
        # end of exercise 3
        ctx.save_for_backward(u, dt, A, B, C, D, bounds)
        ctx.sizes = T, n_rows, compile
        return y, last

    @staticmethod
    def backward(ctx, gy, g_last):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("scan_chunked gives no gradients of gradients; use method='reference' for those")
        u, dt, A, B, C, D, bounds = ctx.saved_tensors
        (batch, L, E), N = u.shape, A.shape[0]
        T, n_rows, compile = ctx.sizes
        A2 = A * LOG2_E
        buffers = u.new_empty(3, T * n_rows * N * E)
        gu, gdt, gB, gC = (x.new_empty(x.shape) for x in (u, dt, B, C))
        gA, gD, g_first = torch.zeros_like(A), torch.zeros_like(D), u.new_empty(batch, N, E)
        with torch.autocast(u.device.type, enabled=False):
            for rows in _blocks(batch, n_rows):
                carry = g_last[rows].contiguous()
                for i, steps in reversed(list(enumerate(_blocks(L, T)))):
                    u_, dt_, B_, C_, gy_ = (x[rows, steps].transpose(0, 1) for x in (u, dt, B, C, gy))
                    gy_, size = gy_.contiguous(), (*dt_.shape[:2], N, E)
                    run = _backward_chunk_fused if compile and size[:2] == (T, n_rows) else _backward_chunk
                    dtu = torch.mul(dt_, u_, out=u.new_empty(dt_.shape))
                    views = [x[: math.prod(size)].view(size) for x in buffers]
                    gB_, gC_, s, WA, gA_, carry = run(dt_, dtu, A, A2, B_, C_, gy_, bounds[i, rows], carry, views)
                    gA += gA_
                    gD += (gy_ * u_).sum((0, 1))
                    gB[rows, steps], gC[rows, steps] = gB_.transpose(0, 1), gC_.transpose(0, 1)
                    gdt[rows, steps] = WA.addcmul_(s, u_).transpose(0, 1)
                    gu[rows, steps] = s.mul_(dt_).addcmul_(gy_, D).transpose(0, 1)
                g_first[rows] = carry
        return gu, gdt, gA, gB, gC, gD, g_first, None, None, None


# --- the benchmark: `python selective_scan.py` ---

SHAPES = [(4, 256, 512, 16), (8, 128, 512, 16), (1, 1024, 1024, 16), (1, 4096, 256, 16)]  # (B, L, E, N)
TRAINING_SHAPES = [(64, 65, 384, 8), (256, 24, 384, 8)]  # those of this project's own training
DT_RANGE, LARGE_DT_RANGE = (1e-3, 1e-1), (1e-1, 1.0)  # the first: Mamba's initialisation (paper, 3.6)


def example_inputs(B, L, E, N, dt_range=DT_RANGE, dtype=torch.float32, seed=0):
    """Random u, dt, A, B, C, D, state that ask for gradients; A = -1 .. -N as Mamba is initialised."""
    source = torch.Generator().manual_seed(seed)
    low, high = (math.log(x) for x in dt_range)
    dt = torch.exp(low + (high - low) * torch.rand(B, L, E, generator=source))
    u, B_, C, D, state = (torch.randn(s, generator=source) for s in ((B, L, E), (B, L, N), (B, L, N), E, (B, E, N)))
    A = -torch.arange(1.0, N + 1).repeat(E, 1)
    return [x.to(dtype).requires_grad_() for x in (u, dt, A, B_, C, D, state)]


def scan_indexed(u, dt, A, B, C, D, state):
    """CLASSIC FAILURE, for show: right, but `decay[:, t]` under autograd makes the backward pass quadratic in L."""
    decay, ys = torch.exp(dt[..., None] * A), []  # (B, L, E, N)
    dBu = (dt * u)[..., None] * B[:, :, None]
    for t in range(u.shape[1]):
        state = decay[:, t] * state + dBu[:, t]
        ys.append((state * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1) + D * u, state


def scan_cumprod(u, dt, A, B, C, D, state):
    """CLASSIC FAILURE, for show: no loop, but the product of decays underflows, and 0 / 0 or x / 0 follows."""
    product = torch.exp(torch.cumsum(dt, 1)[..., None] * A)  # (B, L, E, N)
    h = product * (state[:, None] + torch.cumsum((dt * u)[..., None] * B[:, :, None] / product, 1))
    return (h * C[:, :, None]).sum(-1) + D * u, h[:, -1]


def scan_mambapy(u, dt, A, B, C, D, state):
    """The parallel scan of the package mambapy, as its own block calls it. It starts at zero and returns no state."""
    from mambapy.pscan import pscan

    h = pscan(torch.exp(dt[..., None] * A), (dt[..., None] * B[:, :, None]) * u[..., None])
    return (h @ C[..., None]).squeeze(3) + D * u, state


def _train(scan, inputs):
    """y and all gradients: forward and backward"""
    y, _ = scan(*inputs)
    return [y, *torch.autograd.grad(y.sum(), inputs, allow_unused=True)]


def _milliseconds(function, *args, seconds=1.0):
    """Median over at least 3 calls, after one that is not counted."""
    times = []
    while len(times) < 4 or sum(times[1:]) < seconds:
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def _peak_mib(function, *args):
    """Most bytes that tensors made by the call held at once, from the allocations that PyTorch's profiler records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*args)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2**20


def _table(title, rows):
    """Print rows (dicts with the same keys) and return them."""
    print(f"\n{title}\n" + "".join(f"{key:>14}" for key in rows[0]))
    for row in rows:
        print("".join(f"{x:>14}" if isinstance(x, (str, int)) else f"{x:14.3g}" for x in row.values()), flush=True)
    return rows


def _ladder(shape, methods, seconds):
    """One row per method: errors against the definition in float64, times, memory."""
    inputs = example_inputs(*shape)
    inputs[-1] = torch.zeros_like(inputs[-1], requires_grad=True)  # mambapy cannot start anywhere else
    exact = _train(scan_reference, [x.detach().double().requires_grad_() for x in inputs])
    rows = []
    for name, scan in methods.items():
        pairs = list(zip(_train(scan, inputs), exact, strict=True))[:-1]  # without the gradient of the state
        errors = [((got.double() - y).abs().max() / y.abs().max()).item() for got, y in pairs]
        with torch.no_grad():
            forward_ms = _milliseconds(scan, *inputs, seconds=seconds / 3)
        train_ms = _milliseconds(_train, scan, inputs, seconds=seconds)
        times = train_ms / rows[0]["train_ms"] if rows else 1.0
        row = {"method": name, "error": errors[0], "grad_error": max(errors[1:]), "forward_ms": forward_ms}
        rows.append(row | {"train_ms": train_ms, "x_chunked": times, "peak_mib": _peak_mib(_train, scan, inputs)})
    return {"shape": shape, "methods": _table(f"(B, L, E, N) = {shape}; train: forward + backward", rows)}


def _floor(shape, train_ms):
    """The time under which no scan of this design can go: each number in and out of memory once, two exponentials."""
    B, L, E, N = shape
    big, slab = torch.rand(2, 32 * 2**20), -torch.rand(SLAB)
    copy_rate = 2 * big[0].nbytes / _milliseconds(big[0].copy_, big[1], seconds=0.2)  # bytes read and written per ms
    exp_rate = SLAB / _milliseconds(torch.exp2, slab, seconds=0.2)  # per ms
    moved = 4 * B * L * (3 * E + 2 * N + 5 * E + 4 * N)  # forward u dt B C y; backward u dt B C gy gu gdt gB gC
    row = {"copy GB/s": copy_rate / 1e6, "copy ms": moved / copy_rate, "exp2 G/s": exp_rate / 1e6}
    row["exp2 ms"] = 2 * B * L * E * N / exp_rate
    row["chunked ms"] = train_ms
    row["x floor"] = train_ms / (row["copy ms"] + row["exp2 ms"])
    _table(f"Floor at {shape}: each input and output moved once, two exponentials per number of state", [row])
    print("The rest: some 20 passes over buffers in cache, which a fused kernel would keep in registers.")
    return row


def main():
    parser = argparse.ArgumentParser(description="Errors, speed and memory of the scans; see the top of the file.")
    parser.add_argument("--quick", action="store_true", help="one small shape, short runs, no compile: under 20 s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of PyTorch")
    parser.add_argument("--out", metavar="FILE", help="write the numbers to this JSON file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's notes out of the tables
    seconds, longest = (0.2, 1024) if args.quick else (1.0, 16384)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    methods = {"chunked": scan_chunked, "reference": scan_reference}
    if not args.quick:
        methods["compile=True"] = functools.partial(scan_chunked, compile=True)
    if importlib.util.find_spec("mambapy"):
        versions["mambapy"] = importlib.metadata.version("mambapy")
        methods["mambapy"] = scan_mambapy
    cpu = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    hardware = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("OMP_")]
    result = {"command": " ".join([*settings, "python", *sys.argv]), "versions": versions, "hardware": hardware}
    print(hardware, versions, "float32; times are medians; peak_mib: tensors made by forward + backward", sep="\n")
    shapes = [(2, 128, 256, 16)] if args.quick else SHAPES + TRAINING_SHAPES
    result["shapes"] = [_ladder(shape, methods, seconds) for shape in shapes]

    rows = []
    for L in (L for L in (256, 1024, 4096, 16384) if L <= longest):
        ms = _milliseconds(_train, scan_chunked, example_inputs(1, L, 256, 16), seconds=seconds)
        rows.append({"L": L, "train_ms": ms, "ns per L*E*N": ms * 1e6 / (L * 256 * 16)})
    result["linear"] = _table("Linear in L: chunked at (1, L, 256, 16)", rows)
    rows = []
    for L in (L for L in (64, 256, 1024) if L < longest):
        inputs = example_inputs(1, L, 128, 16)
        ms = [_milliseconds(_train, scan, inputs, seconds=seconds / 4) for scan in (scan_indexed, scan_reference)]
        rows.append({"L": L, "indexed_ms": ms[0], "unbind_ms": ms[1]})
    result["indexed"] = _table("Classic failure: indexing inside the loop is quadratic; (1, L, 128, 16)", rows)
    rows = []
    for L in (16, 64, 256, 1024):
        ys = [scan_cumprod(*example_inputs(1, L, 64, 16, dt_range))[0] for dt_range in (DT_RANGE, LARGE_DT_RANGE)]
        shares = [1 - y.isfinite().float().mean().item() for y in ys]
        rows.append({"L": L, "dt .001 to .1": shares[0], "dt .1 to 1": shares[1]})
    result["cumprod"] = _table("Classic failure: dividing by the cumulative product; share of y inf or nan", rows)
    result["floor"] = _floor(shapes[0], result["shapes"][0]["methods"][0]["train_ms"])
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
