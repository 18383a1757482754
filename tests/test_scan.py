"""The selective scan: equal to its definition in value and gradient, whatever the length, split, chunk and dtype.

pytest tests/test_scan.py

The checks are functions of the scan under test, so that each classic bug can be planted in a scan and the check that
finds it be named; `test_planted_bug` does that. Gaps are max|difference| / max|wanted|. Measured: 1e-15 in float64,
1e-7 to 1e-6 in float32; the tolerances leave a factor of ten or more and are far below what an off-by-one gives.
"""

import math
import re
from functools import cache, partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import selective_scan as module
from selective_scan import example_inputs, scan_chunked, scan_parallel, scan_reference, scan_step, selective_scan

NAMES = ("u", "dt", "A", "B", "C", "D", "state")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
FOUR_DECADES = (1e-4, 1.0)  # of dt; with A = -1 .. -N the decays go from 0.9999 to 0.02
LENGTHS = (1, 2, 3, 17, 64, 65, 257, 600)


def gap(got, wanted):
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    assert got.isfinite().all(), "not finite"
    return ((got.double() - wanted.double()).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def close(got, wanted, tolerance, what=""):
    assert (size := gap(got, wanted)) <= tolerance, f"{what}: gap {size:.1e}, allowed {tolerance:.0e}"


def definition(u, dt, A, B, C, D, state):
    """Equation 2 and Algorithm 2 of the paper with the shortened B, one number of the state after the other."""
    ys = []
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        columns = []
        for n in range(A.shape[1]):
            decay = torch.exp(dt_t * A[:, n])  # (B, E)
            columns.append(decay * state[:, :, n] + dt_t * B_t[:, n : n + 1] * u_t)
        state = torch.stack(columns, -1)
        ys.append(torch.einsum("ben,bn->be", state, C_t) + D * u_t)
    return torch.stack(ys, 1), state


def official(u, delta, A, B, C, D):
    """`selective_scan_ref` of state-spaces/mamba for variable B and C, written from its formulas: (B, E, L) layout."""
    u, delta, B, C = (x.transpose(1, 2).float() for x in (u, delta, B, C))
    x = A.new_zeros(u.shape[0], A.shape[0], A.shape[1])
    deltaA = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    deltaB_u = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    ys = []
    for i in range(u.shape[2]):
        x = deltaA[:, :, i] * x + deltaB_u[:, :, i]
        ys.append(torch.einsum("bdn,bn->bd", x, C[:, :, i]))
    y = torch.stack(ys, dim=2)
    return (y + u * D[:, None]).transpose(1, 2), x


def inputs_of(B=2, L=40, E=6, N=3, dtype=torch.float32, dt_range=FOUR_DECADES, seed=0):
    return example_inputs(B, L, E, N, dt_range, dtype, seed)


def with_gradients(scan, inputs, seed=1):
    """y, last state, then the gradient of every input, for random gradients of y and of the last state."""
    y, state = scan(*inputs)
    draw = torch.Generator().manual_seed(seed)
    gy, gs = (torch.randn(x.shape, generator=draw).to(x.dtype) for x in (y, state))
    return y, state, *torch.autograd.grad((y, state), inputs, (gy, gs))


# --- the checks ---


@cache
def exact(L, zero_state, **sizes):
    """y, last state and all gradients of the definition in float64."""
    return with_gradients(definition, start(L, torch.float64, zero_state, **sizes))


def start(L, dtype, zero_state, **sizes):
    inputs = inputs_of(L=L, dtype=dtype, **sizes)
    if zero_state:
        inputs[-1] = torch.zeros_like(inputs[-1], requires_grad=True)
    return inputs


def check_definition(scan, L=40, dtype=torch.float32, zero_state=False, **sizes):
    """Values and all gradients against the definition in float64; the inputs are float32 numbers in either dtype."""
    got = with_gradients(scan, start(L, dtype, zero_state, **sizes))
    for name, x, wanted in zip(("y", "last state", *NAMES), got, exact(L, zero_state, **sizes), strict=True):
        close(x, wanted, TOLERANCE[dtype] * (1 if name in ("y", "last state") else 10), name)


def check_split(scan):
    """Two or three pieces, the state handed on, are the whole: values, and gradients through the state."""
    inputs = inputs_of(L=45, dtype=torch.float64)

    def pieces(u, dt, A, B, C, D, state):
        ys = []
        for a, b in ((0, 1), (1, 30), (30, 45)):
            y, state = scan(u[:, a:b], dt[:, a:b], A, B[:, a:b], C[:, a:b], D, state)
            ys.append(y)
        return torch.cat(ys, 1), state

    for name, x, wanted in zip(
        ("y", "last state", *NAMES), with_gradients(pieces, inputs), with_gradients(definition, inputs), strict=True
    ):
        close(x, wanted, 1e-11, name)


def check_causal(scan):
    """A change of token t moves no output before it, not by one bit, and does move those from t on."""
    t = 20
    inputs = inputs_of()
    y, _ = scan(*inputs)
    for name in ("u", "dt", "B", "C"):
        changed = list(inputs)
        i = NAMES.index(name)
        changed[i] = inputs[i].detach().clone()
        changed[i][:, t] += 0.5
        other, _ = scan(*changed)
        assert torch.equal(other[:, :t], y[:, :t]), f"{name}[{t}] changed an earlier output"
        assert not torch.equal(other[:, t], y[:, t]), f"{name}[{t}] changed nothing"


def check_bfloat16(scan):
    """bfloat16 in, computed in float32: finite, and as near to the definition as the rounding of y allows."""
    inputs = inputs_of(L=1000, dtype=torch.bfloat16, dt_range=(1e-4, 1e-2))  # a slow decay: rounding adds up
    y, state = scan(*inputs)
    wanted_y, wanted_state = definition(*(x.detach().double() for x in inputs))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    close(y, wanted_y, TOLERANCE[torch.bfloat16], "y")
    close(state, wanted_state, TOLERANCE[torch.float32], "state, which is never rounded")


def check_finite(scan):
    """Strong decay over a long sequence: the product of all decays underflows, no output may."""
    inputs = inputs_of(L=1000, N=4, dt_range=(1e-1, 1.0))
    y, _ = scan(*inputs)
    close(y, definition(*(x.detach().double() for x in inputs))[0], TOLERANCE[torch.float32], "y")


def check_padding(scan):
    """Tokens padded on the right with dt = 0 leave the outputs before them and the state as they are."""
    u, dt, A, B, C, D, state = inputs_of(L=30)
    padded_dt = torch.cat([dt, torch.zeros_like(dt[:, :5])], 1)
    padded = [torch.cat([x, torch.ones_like(x[:, :5])], 1) for x in (u, B, C)]
    y, last = scan(u, dt, A, B, C, D, state)
    padded_y, padded_last = scan(padded[0], padded_dt, A, padded[1], padded[2], D, state)
    close(padded_y[:, :30], y, TOLERANCE[torch.float32], "y")
    close(padded_last, last, TOLERANCE[torch.float32], "state")


def check_linear(scan):
    """No step of the backward pass may fill a tensor as long as the sequence, which is what indexing (Select) does."""
    y, _ = scan(*inputs_of(L=8))
    names, todo = {}, [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names[node] = node.name()
            todo += [parent for parent, _ in node.next_functions]
    assert not any("Select" in name or "Slice" in name for name in names.values()), sorted(set(names.values()))


# --- the scans pass them ---

METHODS = {
    "chunked": scan_chunked,
    "chunk of 1": partial(scan_chunked, chunk=1),
    "chunk of 7": partial(scan_chunked, chunk=7),
    "parallel": scan_parallel,
    "reference": scan_reference,
}
each_method = pytest.mark.parametrize("scan", METHODS.values(), ids=METHODS.keys())
CHECKS = (check_definition, check_split, check_causal, check_bfloat16, check_finite, check_padding)


@pytest.mark.parametrize("check", CHECKS)
@each_method
def test_scan_passes(scan, check):
    check(scan)


@pytest.mark.parametrize("zero_state", (True, False), ids=("zero state", "random state"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("scan", (scan_chunked, scan_parallel))
def test_lengths(scan, L, dtype, zero_state):
    check_definition(scan, L, dtype, zero_state)


@pytest.mark.parametrize("sizes", ({"B": 1}, {"E": 1}, {"N": 1}, {"B": 7, "E": 33, "N": 5}))
@pytest.mark.parametrize("steps", (1, 7, 100))
def test_slabs_of_the_parallel_form(monkeypatch, sizes, steps):
    """However many steps a slab holds, a short last slab and a short last chunk included."""
    monkeypatch.setattr(module, "MIN_CHUNK", steps)
    monkeypatch.setattr(module, "SLAB", 1)
    check_definition(scan_parallel, 25, torch.float64, **sizes)


@pytest.mark.parametrize("sizes", ({"B": 1}, {"E": 1}, {"N": 1}, {"B": 7, "E": 33, "N": 5}))
@pytest.mark.parametrize("rows", (1, 3, 100))
def test_blocks_of_batch_rows(monkeypatch, sizes, rows):
    """However many batch rows fit a buffer, the remainder included."""
    monkeypatch.setattr(module, "_block_sizes", lambda B, L, N, E, chunk: (9, min(rows, B)))
    check_definition(scan_chunked, 25, torch.float64, **sizes)


@pytest.mark.parametrize("threads", (1, 2, 64))
def test_a_buffer_holds_about_a_slab_a_thread(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for B, L, E, N in ((8, 128, 512, 16), (1, 4096, 256, 16), (64, 65, 384, 8), (1, 1, 1, 1), (1000, 3, 5120, 16)):
        T, rows = module._block_sizes(B, L, N, E, None)
        assert 1 <= T <= min(L, module.MAX_CHUNK) and 1 <= rows <= B
        assert rows == 1 or T * rows * N * E <= 1.1 * module.SLAB * min(threads, 4)


def test_backward_with_another_number_of_threads(monkeypatch):
    """It needs the chunks of the forward pass, whose states were kept."""
    args = example_inputs(8, 40, 512, 16)
    wanted = torch.autograd.grad(scan_reference(*args)[0].sum(), args)
    sizes = []
    for forward, backward in ((1, 4), (4, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=forward: n)
        y, _ = scan_chunked(*args)
        sizes.append(module._block_sizes(8, 40, 16, 512, None)[0])
        monkeypatch.setattr(torch, "get_num_threads", lambda n=backward: n)
        for got, want in zip(torch.autograd.grad(y.sum(), args), wanted, strict=True):
            close(got, want, 1e-5)
    assert sizes[0] != sizes[1]


def test_linear_graph_of_the_reference():
    check_linear(scan_reference)


def test_step_is_scan():
    inputs = inputs_of(L=20, dtype=torch.float64)
    u, dt, A, B, C, D, state = inputs
    ys = []
    for t in range(20):
        now = (u[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        y, state = scan_step(*now)
        ys.append(y)
    wanted_y, wanted_state = scan_chunked(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(scan_step(*now), module._step(*now), strict=True))
    close(torch.stack(ys, 1), wanted_y, 1e-12)
    close(state, wanted_state, 1e-12)


def test_official_formulas():
    u, dt, A, B, C, D, state = (x.detach() for x in inputs_of(L=33))
    wanted_y, wanted_state = official(u, dt, A, B, C, D)
    for method in ("chunked", "parallel", "reference"):
        y, state = selective_scan(u, dt, A, B, C, D, method=method)
        close(y, wanted_y, 1e-5)
        close(state, wanted_state, 1e-5)


@pytest.mark.parametrize("method", ("chunked", "parallel", "reference"))
def test_gradcheck(method):
    inputs = inputs_of(1, 5, 2, 2, torch.float64)
    scan = partial(selective_scan, method=method, **({"chunk": 2} if method == "chunked" else {}))
    assert torch.autograd.gradcheck(scan, inputs)
    assert torch.autograd.gradcheck(scan, inputs[:5], fast_mode=True)  # neither D nor state


def test_without_d_and_state():
    u, dt, A, B, C, D, state = inputs_of()
    for scan in (scan_chunked, scan_parallel, scan_reference):
        y, last = scan(u, dt, A, B, C)
        wanted_y, wanted_last = scan(u, dt, A, B, C, torch.zeros_like(D), torch.zeros_like(state))
        assert torch.equal(y, wanted_y) and torch.equal(last, wanted_last)


@pytest.mark.parametrize("scan", (scan_chunked, scan_parallel))
def test_any_memory_layout(scan):
    inputs = inputs_of(B=3, L=20)
    wanted = with_gradients(scan, inputs)
    for strides in ("reversed", "expanded"):
        views = []
        for x in inputs:
            if strides == "reversed":  # last axis outermost in memory
                views.append(x.detach().permute(*reversed(range(x.dim()))).contiguous())
                views[-1] = views[-1].permute(*reversed(range(x.dim()))).requires_grad_()
            else:
                views.append(x.detach().clone().requires_grad_())
        got = with_gradients(scan, views)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    y, _ = scan(*inputs)  # y.sum() sends back one expanded number
    summed = torch.autograd.grad(y.sum(), inputs[0])[0]
    close(summed, torch.autograd.grad(scan_reference(*inputs)[0].sum(), inputs[0])[0], 1e-4)


@pytest.mark.parametrize("scan", (scan_chunked, scan_parallel))
def test_mixed_precision_and_autocast(scan):
    u, dt, A, B, C, D, state = inputs_of()
    half = [x.detach().bfloat16().requires_grad_() for x in (u, B, C)]
    y, last = scan(half[0], dt, A, half[1], half[2], D, state)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    grads = torch.autograd.grad(y.float().sum(), [half[0], dt, A])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    inputs = [u, dt, A, B, C, D, state]
    wanted = with_gradients(scan, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(scan, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_extreme_steps():
    """dt = 0 keeps the state, a very large dt leaves only the new token; nothing is nan."""
    u, dt, A, B, C, D, state = (x.detach() for x in inputs_of(L=4))
    for scan in (scan_chunked, scan_parallel, scan_reference):
        _, last = scan(u, torch.zeros_like(dt), A, B, C, D, state)
        assert torch.equal(last, state)
        _, last = scan(u, torch.full_like(dt, 1e4), A, B, C, D, state)
        close(last, 1e4 * u[:, -1, :, None] * B[:, -1, None], 1e-6)


def test_keeps_only_the_states_between_chunks():
    """What the backward pass holds: the inputs, and 1/T of all states. Autograd through the loop holds them all."""
    B, L, E, N, T = 2, 128, 16, 8, 16
    inputs = inputs_of(B, L, E, N)
    known = {x.data_ptr() for x in inputs}

    def kept(scan):
        total = 0

        def pack(x):
            nonlocal total
            total += 0 if x.data_ptr() in known else x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            scan(*inputs)
        return total

    assert kept(partial(scan_chunked, chunk=T)) <= L // T * B * E * N + E * N  # and A, transposed
    assert kept(scan_reference) >= L * B * E * N
    with torch.no_grad():
        assert not scan_chunked(*inputs)[0].requires_grad


@pytest.mark.parametrize("scan", (scan_chunked, scan_parallel))
def test_gradients_of_gradients_are_refused(scan):
    inputs = inputs_of(1, 3, 2, 2)
    with pytest.raises(RuntimeError, match="no gradients under create_graph=True and torch.func; method='reference'"):
        torch.autograd.grad(scan(*inputs)[0].sum(), inputs[0], create_graph=True)


# --- operators, devices, transforms ---


class Watch(TorchDispatchMode):
    """Counts the operator calls, and notes the device of every tensor that they return."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.devices = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        self.devices |= {x.device.type for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("L", (200, 256, 1024, 4096))
def test_the_parallel_form_calls_few_operators(L):
    inputs = example_inputs(1, L, 4, 2)
    with Watch() as parallel:
        with_gradients(scan_parallel, inputs)
    assert 4 * math.isqrt(L) - 4 <= parallel.calls <= 12 * math.sqrt(L) + 60


def test_the_chunked_form_calls_three_operators_a_token():
    with Watch() as chunked:
        with_gradients(scan_chunked, example_inputs(1, 256, 4, 2))
    assert 3 * 256 <= chunked.calls <= 5 * 256


@pytest.mark.parametrize("D_and_state", (True, False))
@pytest.mark.parametrize("method", ("auto", "chunked", "parallel", "reference"))
def test_every_tensor_is_made_on_the_device_of_the_inputs(method, D_and_state):
    inputs = [x.detach().to("meta").requires_grad_() for x in inputs_of()]
    inputs = inputs if D_and_state else inputs[:5]
    step = [x[:, 0] if name in ("u", "dt", "B", "C") else x for name, x in zip(NAMES, inputs, strict=False)]
    with Watch() as watch:
        y, state = selective_scan(*inputs, method=method)
        torch.autograd.grad((y, state), inputs, (torch.empty_like(y), torch.empty_like(state)))
        scan_step(*step)
    assert watch.devices == {"meta"} and watch.calls > 100


def test_auto_goes_by_the_device(monkeypatch):
    used = []
    for name in ("chunked", "parallel", "reference"):
        monkeypatch.setattr(module, f"scan_{name}", lambda *_, name=name, **__: used.append(name))
    inputs = inputs_of()
    selective_scan(*inputs)
    selective_scan(*(x.detach().to("meta") for x in inputs))
    assert used == ["chunked", "parallel"]


def test_torch_func_and_compile():
    """torch.func has the definition, and a fast form says so in one line; torch.compile has "auto"."""
    inputs = [x.detach() for x in inputs_of(L=5, dtype=torch.float64)]
    u, *rest = inputs
    leaf = u.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(scan_chunked(leaf, *rest)[0].sum(), leaf)
    close(torch.func.grad(lambda x: scan_reference(x, *rest)[0].sum())(u), wanted, 1e-12)
    for scan in (scan_chunked, scan_parallel):
        with pytest.raises(RuntimeError, match="no gradients under create_graph=True and torch.func"):
            torch.func.grad(lambda x, scan=scan: scan(x, *rest)[0].sum())(u)
        with pytest.raises(RuntimeError, match="tried to vmap over _.*Scan, but it does not have vmap support"):
            torch.func.vmap(lambda x, scan=scan: scan(x, *rest)[0])(torch.stack([u, u]))
    compiled = torch.compile(lambda *x: selective_scan(*x)[0], backend="eager", fullgraph=True)
    close(compiled(*inputs), scan_reference(*inputs)[0], 1e-12)


# --- errors ---


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("u", lambda x: x[0], r"u, A: got shapes \(40, 6\).*expected \(B, L, E\)"),
        ("u", lambda x: x[:, :0], r"u, A: got shapes \(2, 0, 6\).*none of them 0"),
        ("dt", lambda x: x[:, :-1], r"dt: got shape \(2, 39, 6\), expected \(2, 40, 6\)"),
        ("A", lambda x: x.T, r"A: got shape \(3, 6\), expected \(6, 6\)"),
        ("A", lambda x: x[0], r"u, A: got shapes .* and \(3,\)"),
        ("B", lambda x: x.transpose(1, 2), r"B: got shape \(2, 3, 40\), expected \(2, 40, 3\)"),
        ("C", lambda x: x[:1], r"C: got shape \(1, 40, 3\), expected \(2, 40, 3\)"),
        ("D", lambda x: x[:1], r"D: got shape \(1,\), expected \(6,\)"),
        ("state", lambda x: x.transpose(1, 2), r"state: got shape \(2, 3, 6\), expected \(2, 6, 3\)"),
        ("B", lambda x: x.long(), r"B: got dtype torch.int64, expected torch.float32"),
        ("A", lambda x: x.double(), r"A: got dtype torch.float64, expected torch.float32"),
        ("u", lambda x: x.double(), r"dt: got dtype torch.float32, expected torch.float64, as u is"),
        ("C", lambda x: x.to("meta"), r"C: got device meta, expected cpu"),
    ],
)
@pytest.mark.parametrize("method", ("chunked", "parallel", "reference"))
def test_bad_input_is_named(method, name, change, message):
    inputs = [change(x.detach()) if n == name else x.detach() for n, x in zip(NAMES, inputs_of(), strict=True)]
    with pytest.raises(ValueError, match=message):
        selective_scan(*inputs, method=method)


def test_bad_options_are_named():
    inputs = inputs_of()
    with pytest.raises(ValueError, match="method: got 'fast', expected 'auto', 'chunked', 'parallel' or 'reference'"):
        selective_scan(*inputs, method="fast")
    for chunk in (0, -3, 1.5, "7"):
        with pytest.raises(ValueError, match=f"chunk: got {chunk!r}, expected None or an integer"):
            scan_chunked(*inputs, chunk=chunk)
    with pytest.raises(ValueError, match=r"u, A: got shapes \(2, 40, 6\).*expected \(B, E\)"):
        scan_step(*inputs)


# --- planted bugs: each classic one must fail the check that is named beside it ---


def swapped_b_and_c(u, dt, A, B, C, D, state):
    return scan_chunked(u, dt, A, C, B, D, state)


def no_float32(u, dt, A, B, C, D, state):
    ys = []
    for t in range(u.shape[1]):
        decay, write = module.discretise(u[:, t], dt[:, t], A, B[:, t])
        state = decay * state + write
        ys.append((state * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1), state.float()


def padded_on_both_sides(u, dt, A, B, C, D, state):
    """As a convolution with symmetric padding before the scan would do: token t sees token t + 1."""
    return scan_chunked(u + torch.roll(u, -1, 1) * 0.1, dt, A, B, C, D, state)


def state_dropped_between_chunks(u, dt, A, B, C, D, state, chunk=16):
    ys = []
    for i in range(0, u.shape[1], chunk):
        now = slice(i, i + chunk)
        y, last = scan_chunked(u[:, now], dt[:, now], A, B[:, now], C[:, now], D, state * (i == 0))
        ys.append(y)
    return torch.cat(ys, 1), last


def gradient_dropped_between_chunks(u, dt, A, B, C, D, state, chunk=16):
    ys = []
    for i in range(0, u.shape[1], chunk):
        now = slice(i, i + chunk)
        y, state = scan_chunked(u[:, now], dt[:, now], A, B[:, now], C[:, now], D, state if i == 0 else state.detach())
        ys.append(y)
    return torch.cat(ys, 1), state


def state_not_returned(u, dt, A, B, C, D, state):
    return scan_chunked(u, dt, A, B, C, D, state)[0], state + 0


def padding_moves_the_state(u, dt, A, B, C, D, state):
    return scan_chunked(u, dt.clamp(min=1e-3), A, B, C, D, state)


def zero_order_hold_for_b(u, dt, A, B, C, D, state):
    """Equation 4 to the letter, which is not what the published weights were trained with."""
    zoh = torch.expm1(dt[..., None] * A) / (dt[..., None] * A)  # (B, L, E, N)
    ys = []
    for t in range(u.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + zoh[:, t] * (dt * u)[:, t, :, None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1), state


@pytest.mark.parametrize(
    "bug, check",
    [
        (swapped_b_and_c, check_definition),
        (zero_order_hold_for_b, check_definition),
        (gradient_dropped_between_chunks, check_definition),
        (state_dropped_between_chunks, check_definition),
        (state_not_returned, check_split),
        (padded_on_both_sides, check_causal),
        (no_float32, check_bfloat16),
        (padding_moves_the_state, check_padding),
    ],
)
def test_planted_bug(bug, check):
    bug(*inputs_of(L=20))  # it runs: only the check tells it from a right one
    with pytest.raises(AssertionError):
        check(bug)


def test_bug_inside_the_chunks_is_found(monkeypatch):
    """The state after a chunk is lost inside `scan_chunked` itself."""
    right = module._forward_chunk
    monkeypatch.setattr(module, "_forward_chunk", lambda *a: (right(*a)[0], torch.zeros_like(right(*a)[1])))
    with pytest.raises(AssertionError, match="y: gap"):
        check_definition(partial(scan_chunked, chunk=7))


# --- what the file says ---


def test_the_four_tokens_of_the_docstring():
    rows = re.findall(
        r"^ +([1-4]) +(-?\d\.\d) +([124]) +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+) +(\d\.\d) +(-?[\d.]+)",
        module.__doc__,
        re.M,
    )
    assert [row[0] for row in rows] == list("1234")
    u, ratio, decay, written, h, C, y = torch.tensor([[float(x) for x in row[1:]] for row in rows]).double().T
    dt = ratio.log()
    A, one = torch.tensor([[-1.0]]).double(), torch.ones(1, 4, 1).double()
    digits = {"decay": (decay, torch.exp(-dt)), "dt B u": (written, dt * u)}
    for name, scan in (("chunked", partial(scan_chunked, chunk=2)), ("reference", scan_reference)):
        digits[f"y, {name}"] = y, scan(u.view(1, 4, 1), dt.view(1, 4, 1), A, one, C.view(1, 4, 1))[0].flatten()
        digits[f"h, {name}"] = h, scan(u.view(1, 4, 1), dt.view(1, 4, 1), A, one, one)[0].flatten()
    for name, (printed, computed) in digits.items():
        assert [f"{x:.4f}" for x in printed] == [f"{x:.4f}".replace("-0.0000", "0.0000") for x in computed], name


def test_the_gap_between_zero_order_hold_and_euler_in_the_docstring():
    said = re.search(
        r"is (0\.\d+) at dt = (0\.\d+), A = (-\d+), but (0\.\d+) at dt = (0\.\d+), A = (-\d+)", module.__doc__
    )
    for ratio, dt, A in (said.groups()[:3], said.groups()[3:]):
        x = float(dt) * float(A)
        assert f"{math.expm1(x) / x:.{len(ratio) - 2}f}" == ratio
