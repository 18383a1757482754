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
A name such as `decay_BEN` lists its axes. Working buffers are (T, b, N, E): time first makes a step one contiguous block,
E last makes every inner loop hundreds of floats long. With N last, 8 or 16 long, the same products take 6 times as long.

From the continuous equation to the loop
 1. One channel, one state, in continuous time (Eq. 1):           h'(t) = A h(t) + B u(t),   y(t) = C h(t)
 2. Hold u constant for a step of length dt and solve exactly; this is the zero-order hold (Eq. 4):
        h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / (dt A) * dt B u_t
 3. Mamba's code keeps the exact decay and shortens the second factor to dt * B, its limit for small dt A (Euler):
        h_t = exp(dt A) h_{t-1} + dt B u_t,     y_t = C h_t + D u_t                                (Eq. 2, Algorithm 2)
    The ratio exact / Euler is 0.995 at dt = 0.01, A = -1, but 0.50 at dt = 0.1, A = -16. It is only a factor on B, which
    is learned, so training absorbs it; weights trained with one rule do not run with the other. We follow the code.
 4. dt is a gate made from the token: dt -> 0 ignores it and keeps the state, a large dt forgets the past for it.

Four tokens by hand (E = N = 1, A = -1, B = 1, D = 0, start at 0)
     t    u      dt = ln   exp(dt A)   dt B u      h          C     y
     1    1.0    2         0.5000       0.6931     0.6931     1.0    0.6931
     2    5.0    1         1.0000       0.0000     0.6931     1.0    0.6931     dt = 0: token 2 is not seen at all
     3    0.0    4         0.2500       0.0000     0.1733     2.0    0.3466
     4   -1.0    2         0.5000      -0.6931    -0.6065     1.0   -0.6065
In two chunks: tokens 1, 2 from h = 0 end at 0.6931. Tokens 3, 4 need only that number; the rest of the past is gone.

The chunked form
    Within a chunk, all that needs no past (decay_t, dt_t B_t u_t) is made in a few large operations; then T steps of one
    fused multiply-add; then all y_t in one batched matrix product. Kept for the backward pass: the state *before* each
    chunk, 1/T of all states. The backward pass starts at the last chunk, makes its states again, and runs the adjoint
        G_t = dLoss/dh_t = C_t gy_t + decay_{t+1} G_{t+1}
    which is the same recurrence from the other end. All gradients are products with G_t:
        dLoss/dC_t = sum_e gy_t h_t          dLoss/dB_t = sum_e G_t dt_t u_t         s_t = sum_n G_t B_t
        dLoss/du_t = s_t dt_t + D gy_t       W_t = G_t decay_t h_{t-1} = dLoss/d(dt_t A)
        dLoss/d(dt_t) = s_t u_t + sum_n W_t A                  dLoss/dA = sum over B and L of W_t dt_t

Ways this goes wrong (the first two are shown by `python selective_scan.py`; tests/test_scan.py plants most of the rest)
  * Divide by the cumulative product of decays to get rid of the loop: the product underflows and 0 / 0 follows.
  * Index a tensor that needs a gradient inside the loop, `dA[:, t]`: each step's backward fills a zero tensor as long as
    the whole sequence, so time is quadratic in L. `unbind` once before the loop.
  * Swap B and C: same shape, no error, and training even works a little. Only a comparison with the definition tells.
  * Run it in bfloat16: 8 bits of mantissa cannot hold 0.999 ** 1000. Here everything is computed in float32 or float64.
  * Pad on the left, or forget that padding moves the state: a padded token must have dt = 0. Then the state stays.
  * Drop the state between two calls, or let `step` and `forward` differ: a model that trains well and generates noise.
  * Forget the minus in A = -exp(A_log), or the softplus that keeps dt > 0: the state grows until it is inf.
"""

import argparse
import functools
import json
import math
import os
import platform
import sys
import time

import torch

LOG2_E = math.log2(math.e)  # exp(x) = 2 ** (x * LOG2_E): on a CPU torch.exp2 takes a third of the time of torch.exp
EXP2_TAYLOR = [math.log(2) ** k / math.factorial(k) for k in range(7, -1, -1)]  # 2 ** x for |x| <= 0.5, to 1e-8
SLAB = 768 * 1024  # elements of a working buffer, 3 MiB in float32: three of them stay in a usual last-level cache
MIN_CHUNK, MAX_CHUNK = 16, 128  # time steps: with fewer the kept states are many, with more only memory is spent
FUSED_CHUNK, FUSED_SLAB = 8, SLAB // 2  # the same under torch.compile, which writes every step out


def selective_scan(u, dt, A, B, C, D=None, state=None, *, method="chunked", chunk=None, compile=False):
    """Run the recurrence over a whole sequence.

    Args: u, dt (B, L, E), L >= 1; A (E, N); B, C (B, L, N); D (E,) or None for no skip; state (B, E, N) or None for zeros.
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


def scan_reference(u, dt, A, B, C, D=None, state=None):
    """The definition, one step after the other, differentiated by autograd. Same contract as `selective_scan`."""
    y_dtype = u.dtype
    u, dt, A, B, C, D, state = _prepare(u, dt, A, B, C, D, state)
    ys = []
    for u_t, dt_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, dt, B, C)), strict=True):
        y_t, state = _step(u_t, dt_t, A, B_t, C_t, D, state)
        ys.append(y_t)
    return torch.stack(ys, 1).to(y_dtype), state


def scan_step(u, dt, A, B, C, D=None, state=None):
    """One token: u, dt (B, E); B, C (B, N); the rest as in `selective_scan`. Returns y (B, E), state (B, E, N)."""
    y_dtype = u.dtype
    y, state = _step(*_prepare(u, dt, A, B, C, D, state, step=True))
    return y.to(y_dtype), state


def _step(u_BE, dt_BE, A_EN, B_BN, C_BN, D_E, state_BEN):
    decay_BEN = torch.exp(dt_BE[:, :, None] * A_EN)
    state_BEN = decay_BEN * state_BEN + (dt_BE * u_BE)[:, :, None] * B_BN[:, None, :]
    return (state_BEN * C_BN[:, None, :]).sum(-1) + D_E * u_BE, state_BEN


def scan_chunked(u, dt, A, B, C, D=None, state=None, *, chunk=None, compile=False):
    """The fast form (see "The chunked form" above). Same contract as `selective_scan`.

    compile: build the inner loops with torch.compile (on a CPU this needs a C++ compiler and some ten seconds for each
        new set of shapes). Only full chunks use it. Gradients of gradients are not provided.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected None or at least 1")
    y_dtype = u.dtype
    tensors = _prepare(u, dt, A, B, C, D, state)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)  # states for a backward pass
    u, dt, A, B, C, D, state = tensors
    with torch.autocast(u.device.type, enabled=False):
        y, state = _ChunkedScan.apply(
            u, dt, A.t().contiguous(), B, C, D, state.transpose(1, 2), keep, chunk, compile and u.dtype == torch.float32
        )
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
    """sum_e w[t, b, e] x[t, b, n, e] -> (T, b, N); a row times a matrix, 10 times as fast as the matrix times a column"""
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
    """2 ** z by Taylor's series, relative error 2e-7: unlike exp2, a library call, it can be fused."""
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
    """-> T, rows: time steps of a chunk, and batch rows worked on at once so that a buffer holds about a slab."""
    slab = FUSED_SLAB if compile else SLAB
    T = min(L, chunk or (FUSED_CHUNK if compile else min(max(slab // (batch * N * E), MIN_CHUNK), MAX_CHUNK)))
    if chunk is None and not compile:
        T = math.ceil(L / math.ceil(L / T))  # even: a last chunk of one step would cost nearly as much as a full one
    rows = min(batch, max(1, slab // (T * N * E)))
    return T, math.ceil(batch / math.ceil(batch / rows))


def _blocks(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


class _ChunkedScan(torch.autograd.Function):
    """Arguments as in `scan_chunked`, but A (N, E) and states (B, N, E)."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, state, keep, chunk, compile):
        (batch, L, E), N = u.shape, A.shape[0]
        T, n_rows = _block_sizes(batch, L, N, E, chunk, compile)
        A2 = A * LOG2_E
        buffers = u.new_empty(2, T * n_rows * N * E)
        y, last = u.new_empty(batch, L, E), u.new_empty(batch, N, E)
        bounds = u.new_empty(math.ceil(L / T) if keep else 0, batch, N, E)  # the state before each chunk
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
        ctx.save_for_backward(u, dt, A, B, C, D, bounds)
        ctx.sizes = T, n_rows, compile
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, g_last):
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
