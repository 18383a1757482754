"""The eight exercises: each test draws its data from a seed, and names the mistake it recognises.

pytest -m ex1    (ex1 .. ex8, in teaching order; EXERCISE_SEED=7 draws other data)

What is right is computed in another form than the exercise asks for: the scan as one sum over all pairs of tokens,
rotations from an axis and an angle. A wrong answer is compared with what well-known mistakes give.
"""

import os

import adapters
import numpy as np
import pytest
import torch

SEED = int(os.environ.get("EXERCISE_SEED", 0))
SCALE = 1e-4  # largest gap allowed, as a share of the largest number: float32 leaves 1e-6, a mistake 1e-2 or more
READ = {
    1: "selective_scan.py, 'From the continuous equation to the loop', steps 2 and 3",
    2: "selective_scan.py, 'From the continuous equation to the loop' and the four tokens by hand",
    3: "selective_scan.py, 'The chunked form'",
    4: "selective_scan.py, the four tokens by hand; the state returned is the one that y was read from",
    5: "Mamba paper, Fig. 3 and Algorithm 2; robomamba.py, LayerState",
    6: "data/dataset.py, `pack` and `pad`; robomamba.py, RoboMamba.forward and .pooled, which use them",
    7: "Zhou et al. 2019, section 4; RoboMamba paper, Eq. 6",
    8: "sim/scene.py, Scene.intrinsics and Scene.project",
}


def compare(exercise: int, name: str, got, wanted, mistakes: dict | None = None, scale: float = SCALE) -> None:
    """Fail unless `got` equals `wanted`; the message names the one of `mistakes` (text: its result) that `got` is."""
    got, wanted = (np.asarray(torch.as_tensor(x).detach(), float) for x in (got, wanted))
    advice = f"Read again: {READ[exercise]}."
    if got.shape != wanted.shape:
        raise AssertionError(f"{name}: shape {got.shape}, expected {wanted.shape}. {advice}")
    size = max(np.abs(wanted).max(), 1e-6)
    if np.isfinite(got).all() and np.abs(got - wanted).max() <= scale * size:
        return
    for mistake, result in (mistakes or {}).items():
        with np.errstate(invalid="ignore"):
            if np.shape(result) == got.shape and np.abs(got - result).max() <= 10 * scale * size:
                raise AssertionError(f"{name}: likely mistake: {mistake}. {advice}")
    off = f"off by up to {np.abs(got - wanted).max():.2g}" if np.isfinite(got).all() else "not finite"
    raise AssertionError(
        f"{name}: {off}, where the numbers go up to {size:.2g}; not one of the known mistakes. {advice}"
    )


def random_source(exercise: int, *more: int) -> np.random.Generator:
    return np.random.default_rng([SEED, exercise, *more])


def tensors(*arrays):
    return [torch.tensor(x, dtype=torch.float32) for x in arrays]


# ---- the scan


def scan_inputs(rng, B=2, L=13, E=5, N=3):
    """u, dt, A, B, C, D, state, whose numbers are exact in float32."""
    u, B_, C, D, state = (rng.normal(size=s) for s in ((B, L, E), (B, L, N), (B, L, N), (E,), (B, E, N)))
    dt, A = rng.uniform(0.1, 0.6, (B, L, E)), -rng.uniform(0.5, 2.0, (E, N))
    return [x.astype(np.float32).astype(float) for x in (u, dt, A, B_, C, D, state)]


def unrolled(u, dt, A, B, C, D, state):
    """The scan without a recurrence: what is left, at token t, of every token s <= t and of the first state."""
    time = dt.cumsum(1)  # (B, L, E), from the start to after each token
    seen = np.tri(u.shape[1], dtype=bool)[None, :, :, None]
    span = np.where(seen, time[:, :, None] - time[:, None], 0)  # (B, t, s, E)
    left = np.exp(span[..., None] * A) * seen[..., None]  # (B, t, s, E, N)
    written = (dt * u)[..., None] * B[:, :, None]  # (B, s, E, N)
    h = (left * written[:, None]).sum(2) + np.exp(time[..., None] * A) * state[:, None]
    return (h * C[:, :, None]).sum(-1) + D * u, h[:, -1]


def scan_mistakes(u, dt, A, B, C, D, state) -> dict:
    """Text: (y, last state) of scans that are wrong in a well-known way."""
    return {
        "B and C are swapped (B writes into the state, C reads from it)": unrolled(u, dt, A, C, B, D, state),
        "the given state is ignored": unrolled(u, dt, A, B, C, D, 0 * state),
        "the skip D u is missing": unrolled(u, dt, A, B, C, 0 * D, state),
        "the decay is exp(-dt A), but A is already negative": unrolled(u, dt, -A, B, C, D, state),
        "dt is left out of what is written, dt B u": unrolled(u / dt, dt, A, B, C, D * dt, state),
    }


def compare_scans(exercise, got, inputs, extra=None):
    wanted, mistakes = unrolled(*inputs), scan_mistakes(*inputs) | (extra or {})
    for i, name in enumerate(("y", "the state after the last token")):
        compare(exercise, name, got[i], wanted[i], {text: result[i] for text, result in mistakes.items()})


def compare_gradients(exercise, scan, inputs, advice):
    """Autograd's derivative along a random direction of every input, against differences of the unrolled sum."""
    rng = random_source(exercise, 99)
    leaves = [x.requires_grad_() for x in tensors(*inputs)]
    results = scan(*leaves)
    weights = [rng.normal(size=x.shape) for x in results]

    def loss(arrays):
        return sum((w * x).sum() for w, x in zip(weights, unrolled(*arrays), strict=True))

    said = sum((w * x).sum() for w, x in zip(tensors(*weights), results, strict=True))
    gradients = torch.autograd.grad(said, leaves, allow_unused=True)
    for i, (name, gradient) in enumerate(zip(("u", "dt", "A", "B", "C", "D", "state"), gradients, strict=True)):
        if gradient is None:
            raise AssertionError(
                f"gradient of {name}: there is none; likely mistake: a detach, .data or numpy on the way"
            )
        direction = rng.normal(size=inputs[i].shape)
        ends = ([x + sign * 1e-5 * direction if k == i else x for k, x in enumerate(inputs)] for sign in (1, -1))
        wanted = (loss(next(ends)) - loss(next(ends))) / 2e-5
        got = (gradient.double().numpy() * direction).sum()
        size = np.linalg.norm(gradient.double()) * np.linalg.norm(direction)
        if not abs(got - wanted) <= 1e-3 * size:
            raise AssertionError(
                f"gradient of {name}: {got:.5g} along a direction where {wanted:.5g} is right; {advice}"
            )


# ---- exercise 1: discretisation


@pytest.mark.ex1
@pytest.mark.parametrize("axes", ["one token", "a sequence"])
def test_decay(axes):
    u, dt, A, B, *_ = scan_inputs(random_source(1))
    u, dt, B = (x[:, 0] for x in (u, dt, B)) if axes == "one token" else (u, dt, B)
    decay, _ = adapters.discretise(*tensors(u, dt, A, B))
    x = dt[..., None] * A
    mistakes = {
        "1 + dt A, Euler's step; the decay is solved exactly: exp(dt A)": 1 + x,
        "exp(-dt A), but A is already negative": np.exp(-x),
        "exp(A), the step size dt is left out": np.broadcast_to(np.exp(A), x.shape),
        "dt A without exp": x,
    }
    compare(1, "decay", decay, np.exp(x), mistakes)


@pytest.mark.ex1
@pytest.mark.parametrize("axes", ["one token", "a sequence"])
def test_write(axes):
    u, dt, A, B, *_ = scan_inputs(random_source(1))
    u, dt, B = (x[:, 0] for x in (u, dt, B)) if axes == "one token" else (u, dt, B)
    _, write = adapters.discretise(*tensors(u, dt, A, B))
    right, x = np.einsum("...e,...n->...en", dt * u, B), dt[..., None] * A
    mistakes = {
        "zero-order hold (Eq. 4) for B; Mamba's code writes dt B u": np.expm1(x) / x * right,
        "dt is left out: B u instead of dt B u": right / dt[..., None],
        "u is left out: dt B instead of dt B u": right / u[..., None],
    }
    compare(1, "write", write, right, mistakes)


@pytest.mark.ex1
def test_a_step_of_size_zero_changes_nothing():
    u, dt, A, B, *_ = scan_inputs(random_source(1))
    decay, write = adapters.discretise(*tensors(u, 0 * dt, A, B))
    compare(1, "decay at dt = 0", decay, np.ones_like(decay))
    compare(1, "write at dt = 0", write, np.zeros_like(write))


# ---- exercise 2: the reference scan


@pytest.mark.ex2
@pytest.mark.parametrize("L", [1, 2, 13])
def test_reference_scan(L):
    inputs = scan_inputs(random_source(2), L=L)
    compare_scans(2, adapters.reference_scan(*tensors(*inputs)), inputs)


@pytest.mark.ex2
def test_reference_scan_in_two_pieces():
    u, dt, A, B, C, D, state = inputs = scan_inputs(random_source(2, 1))
    pieces, h = [], tensors(state)[0]
    for now in (slice(0, 5), slice(5, None)):
        y, h = adapters.reference_scan(*tensors(u[:, now], dt[:, now], A, B[:, now], C[:, now], D), h)
        pieces.append(y)
    compare_scans(2, (torch.cat(pieces, 1), h), inputs)


@pytest.mark.ex2
def test_gradients_of_the_reference_scan():
    inputs = scan_inputs(random_source(2, 2))
    compare_gradients(2, adapters.reference_scan, inputs, "likely mistake: a tensor overwritten in place")


# ---- exercise 3: the chunked scan


@pytest.mark.ex3
def test_carry_from_chunk_to_chunk():
    u, dt, A, B, C, D, state = inputs = scan_inputs(random_source(3, 100), L=8)

    def two_chunks(tokens, keep=1):
        """The second chunk starts from `keep` times what these tokens of the first would leave."""
        _, carry = unrolled(u[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], D, state)
        y_1, _ = unrolled(u[:, :4], dt[:, :4], A, B[:, :4], C[:, :4], D, state)
        y_2, last = unrolled(u[:, 4:], dt[:, 4:], A, B[:, 4:], C[:, 4:], D, carry * keep)
        return np.concatenate([y_1, y_2], 1), last

    mistakes = {
        "off by one: a chunk starts from the state before the last token of the chunk before": two_chunks([0, 1, 2]),
        "off by one: the last token of a chunk is counted again in the next": two_chunks([0, 1, 2, 3, 3]),
        "the state is not handed on: every chunk starts from zero": two_chunks([0], keep=0),
    }
    compare_scans(3, adapters.chunked_scan(*tensors(*inputs), 4), inputs, mistakes)


@pytest.mark.ex3
@pytest.mark.parametrize("chunk", [1, 4, 13, 50])
def test_chunked_scan(chunk):
    inputs = scan_inputs(random_source(3, chunk))
    compare_scans(3, adapters.chunked_scan(*tensors(*inputs), chunk), inputs)


@pytest.mark.ex3
@pytest.mark.parametrize("chunk", [4, 13])
def test_gradients_of_the_chunked_scan(chunk):
    inputs = scan_inputs(random_source(3, 200))
    advice = "likely mistake: off by one chunk: what is kept for the backward pass must be the state BEFORE each chunk"
    compare_gradients(3, lambda *x: adapters.chunked_scan(*x, chunk), inputs, advice)


@pytest.mark.ex3
def test_chunked_scan_keeps_few_states():
    B, L, E, N = 2, 64, 32, 16
    inputs = [x.requires_grad_() for x in tensors(*scan_inputs(random_source(3, 300), B, L, E, N))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        adapters.chunked_scan(*inputs, 16)
    if sum(kept) > B * L * E * N / 2:
        raise AssertionError(
            f"{sum(kept)} numbers are kept for the backward pass, the states of all tokens are {B * L * E * N}: likely "
            f"mistake: autograd keeps every state; keep the one before each chunk and make the rest again. {READ[3]}"
        )


# ---- exercise 4: step


@pytest.mark.ex4
def test_one_step():
    u, dt, A, B, C, D, state = scan_inputs(random_source(4), L=1)
    token = [x[:, 0] for x in (u, dt, B, C)]
    y, after = adapters.step(*tensors(token[0], token[1], A, token[2], token[3], D, state))
    wanted_y, wanted = (
        x[:, 0] if x.ndim == 3 and i == 0 else x for i, x in enumerate(unrolled(u, dt, A, B, C, D, state))
    )
    old = (state * token[3][:, None]).sum(-1) + D * token[0]
    decay = np.exp(token[1][..., None] * A)
    mistakes = {text: (a[:, 0], b) for text, (a, b) in scan_mistakes(u, dt, A, B, C, D, state).items()}
    mistakes["the old state: update it first, then read y from it and return it"] = (old, state)
    late = wanted - (1 - decay) * (wanted - decay * state)  # decay (h + write)
    mistakes["what is written decays at once: it is decay h + write"] = ((late * token[3][:, None]).sum(-1), late)
    compare(4, "y", y, wanted_y, {text: m[0] for text, m in mistakes.items()})
    compare(4, "the state after the token", after, wanted, {text: m[1] for text, m in mistakes.items()})


@pytest.mark.ex4
def test_steps_are_the_scan():
    u, dt, A, B, C, D, state = inputs = scan_inputs(random_source(4, 1))
    ys, h = [], tensors(state)[0]
    for t in range(u.shape[1]):
        y, h = adapters.step(*tensors(u[:, t], dt[:, t], A, B[:, t], C[:, t], D), h)
        ys.append(y)
    compare_scans(4, (torch.stack(ys, 1), h), inputs)


@pytest.mark.ex4
def test_step_leaves_the_given_state_alone():
    u, dt, A, B, C, D, state = scan_inputs(random_source(4, 2), L=1)
    given = tensors(state)[0]
    _, after = adapters.step(*tensors(u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D), given)
    if after is given or not torch.equal(given, tensors(state)[0]):
        raise AssertionError(
            "the given state was overwritten, so that two questions cannot branch from one picture; likely mistake: an "
            "operation in place (mul_, +=) on the argument"
        )


# ---- exercise 5: the Mamba block


def softplus(x):
    return np.logaddexp(0, x)


def silu(x):
    return x / (1 + np.exp(-x))


BLOCK_MISTAKES = {
    "minus": "A = exp(A_log) without the minus: the state grows instead of decaying",
    "halves": "the halves of in_proj are swapped: the first goes into the convolution, the second is the gate",
    "gate": "the gate is z, it should be silu(z)",
    "no gate": "the gate is missing: y silu(z)",
    "ahead": "the convolution looks ahead: its past (K - 1 inputs) belongs in front, nothing behind",
    "taps": "the taps of the convolution are reversed: the last one is for the present token",
    "past": "the convolution's past is ignored: it starts from zeros",
    "activation": "silu after the convolution is missing",
    "softplus": "softplus of dt is missing",
    "B and C": "B and C are swapped: x_proj gives dt, B, C in this order",
    "skip": "the skip D u is missing",
}


def block_inputs(rng, B=2, L=9, D=6, E=12, N=3, R=2, K=4):
    shapes = {
        "in_proj.weight": (2 * E, D),
        "conv1d.weight": (E, 1, K),
        "conv1d.bias": (E,),
        "x_proj.weight": (R + 2 * N, E),
        "dt_proj.weight": (E, R),
        "dt_proj.bias": (E,),
        "D": (E,),
        "out_proj.weight": (D, E),
    }
    weights = {name: rng.normal(size=s) / np.sqrt(s[-1] if len(s) > 1 else 1) for name, s in shapes.items()}
    weights["A_log"] = np.log(rng.uniform(0.5, 2.0, (E, N)))
    return rng.normal(size=(B, L, D)), weights, rng.normal(size=(B, K - 1, E)), rng.normal(size=(B, E, N))


def block(x, w, conv, ssm, mistake=""):
    """The mixer in NumPy, right or with one of BLOCK_MISTAKES; returns y, conv, ssm."""
    L, E, K = x.shape[1], len(w["D"]), conv.shape[1] + 1
    u, z = np.split(x @ w["in_proj.weight"].T, 2, -1)
    u, z = (z, u) if mistake == "halves" else (u, z)
    past = np.concatenate([0 * conv if mistake == "past" else conv, u], 1)  # (B, K - 1 + L, E)
    window = np.concatenate([past[:, 1:], 0 * past[:, :1]], 1) if mistake == "ahead" else past
    taps = w["conv1d.weight"][:, 0, ::-1] if mistake == "taps" else w["conv1d.weight"][:, 0]
    u = np.stack([np.einsum("bke,ek->be", window[:, t : t + K], taps) for t in range(L)], 1) + w["conv1d.bias"]
    u = u if mistake == "activation" else silu(u)
    N, R = ssm.shape[2], w["dt_proj.weight"].shape[1]
    dt, B, C = np.split(u @ w["x_proj.weight"].T, [R, R + N], -1)
    dt, (B, C) = dt @ w["dt_proj.weight"].T + w["dt_proj.bias"], (C, B) if mistake == "B and C" else (B, C)
    dt = dt if mistake == "softplus" else softplus(dt)
    A = np.exp(w["A_log"]) * (1 if mistake == "minus" else -1)
    y, ssm = unrolled(u, dt, A, B, C, w["D"] * (mistake != "skip"), ssm)
    gate = {"gate": z, "no gate": np.ones((1, 1, E))}.get(mistake, silu(z))
    return (y * gate) @ w["out_proj.weight"].T, past[:, L:], ssm


def run_block(x, weights, conv, ssm):
    with torch.no_grad():
        return adapters.mamba_block(tensors(x)[0], {k: tensors(w)[0] for k, w in weights.items()}, *tensors(conv, ssm))


@pytest.mark.ex5
@pytest.mark.parametrize("L", [1, 9])
def test_block(L):
    inputs = block_inputs(random_source(5, L), L=L)
    got, wanted = run_block(*inputs), block(*inputs)
    mistakes = {text: block(*inputs, mistake=key) for key, text in BLOCK_MISTAKES.items()}
    for i, name in enumerate(("y", "conv after the last token", "ssm after the last token")):
        compare(5, name, got[i], wanted[i], {text: result[i] for text, result in mistakes.items()})


@pytest.mark.ex5
def test_block_is_causal():
    x, *rest = block_inputs(random_source(5, 100))
    changed = x.copy()
    changed[:, 6] += 1
    first, second = run_block(x, *rest)[0], run_block(changed, *rest)[0]
    if not torch.allclose(first[:, :6], second[:, :6], atol=1e-5):
        raise AssertionError(f"token 6 changes an earlier output; likely mistake: {BLOCK_MISTAKES['ahead']}")
    if torch.allclose(first[:, 6], second[:, 6], atol=1e-3):
        raise AssertionError("token 6 does not change its own output; likely mistake: the output is late by one token")


@pytest.mark.ex5
def test_block_in_two_pieces():
    x, weights, conv, ssm = block_inputs(random_source(5, 101))
    whole, pieces, states = block(x, weights, conv, ssm)[0], [], (conv, ssm)
    for now in (slice(0, 2), slice(2, None)):  # the first piece is shorter than the convolution's past
        y, *states = run_block(x[:, now], weights, *(np.asarray(s) for s in states))
        pieces.append(y)
    compare(5, "y of two pieces, the states handed on", torch.cat(pieces, 1), whole)


# ---- exercise 6: loss mask and packing of a conversation

IGNORE, END = -100, 3


def conversations(rng, count=4):
    """Turns of random ids from 10 on; their lengths differ, and so does the number of turns."""

    def ids(low, high):
        return rng.integers(10, 500, rng.integers(low, high)).tolist()

    return [[(ids(2, 7), [*ids(1, 6), END]) for _ in range(1 + k % 3)] for k in rng.permutation(count)]


def padded(rows, value):
    out = np.full((len(rows), max(map(len, rows))), value)
    for k, row in enumerate(rows):
        out[k, : len(row)] = row
    return out


def packed(talks, is_target=lambda turn, turns, is_reply, is_end: is_reply):
    """Labels by the rule: which tokens are targets?"""
    rows = []
    for turns in talks:
        row = []
        for k, (prompt, reply) in enumerate(turns):
            row += [i if is_target(k, len(turns), False, False) else IGNORE for i in prompt]
            row += [i if is_target(k, len(turns), True, j == len(reply) - 1) else IGNORE for j, i in enumerate(reply)]
        rows.append(row)
    return padded(rows, IGNORE)


@pytest.mark.ex6
def test_tokens_of_all_turns_follow_each_other():
    talks = conversations(random_source(6))
    tokens = adapters.pack_conversations(talks, END)[0]
    right = [[i for turn in turns for part in turn for i in part] for turns in talks]
    grouped = [[i for k in (0, 1) for turn in turns for i in turn[k]] for turns in talks]
    width = max(map(len, right))
    mistakes = {
        "padded on the left; the state would run through the padding first": [
            [END] * (width - len(row)) + row for row in right
        ],
        "padded with 0 instead of `end`": padded(right, 0),
        "all prompts first, then all replies": padded(grouped, END),
    }
    compare(6, "tokens", tokens, padded(right, END), {text: np.array(x) for text, x in mistakes.items()}, scale=0)


@pytest.mark.ex6
def test_labels_are_the_replies():
    talks = conversations(random_source(6, 1))
    labels = adapters.pack_conversations(talks, END)[1]
    right = packed(talks)
    tokens = packed(talks, lambda *_: True)
    mistakes = {
        "prompts are targets too; the model would learn to ask": tokens,
        "padding is a target too": np.where(tokens == IGNORE, END, right),
        "everything is a target": np.where(tokens == IGNORE, END, tokens),
        "labels are shifted, but the loss shifts them": np.pad(right[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE),
        "the end of a reply is not a target; the model would never stop": packed(talks, lambda k, n, r, e: r and not e),
        "only the last reply is a target": packed(talks, lambda k, n, r, e: r and k == n - 1),
        "only the first reply is a target": packed(talks, lambda k, n, r, e: r and k == 0),
        "prompts are targets and replies are not": packed(talks, lambda k, n, r, e: not r),
    }
    compare(6, "labels", labels, right, mistakes, scale=0)


@pytest.mark.ex6
def test_lengths_and_prompts_count_no_padding():
    talks = conversations(random_source(6, 2))
    tokens, _, lengths, prompts = adapters.pack_conversations(talks, END)
    right = np.array([sum(len(part) for turn in turns for part in turn) for turns in talks])
    mistakes = {
        "padding is counted: the state of a pad position would be pooled": np.full(len(talks), tokens.shape[1]),
        "the index of the last token instead of the length": right - 1,
    }
    compare(6, "lengths", lengths, right, mistakes, scale=0)
    first = np.array([len(turns[0][0]) for turns in talks])
    last = right - [len(turns[-1][1]) for turns in talks]
    mistakes = {
        "padding is counted: the policy head would read the state of a pad position": np.full(
            len(talks), tokens.shape[1]
        ),
        "the index of the prompt's last token instead of its length": first - 1,
        "up to the last reply; it is the FIRST prompt that counts": last,
    }
    compare(6, "prompts", prompts, first, mistakes, scale=0)


# ---- exercise 7: 6D rotation and geodesic loss


def turn(axis, angle):
    """Rodrigues' formula: rotations (n, 3, 3) about unit axes (n, 3) by angles (n,), radians."""
    x, y, z = axis.T
    K = np.stack([0 * x, -z, y, z, 0 * x, -x, -y, x, 0 * x], -1).reshape(-1, 3, 3)
    sin, cos = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return np.eye(3) + sin * K + (1 - cos) * K @ K


def random_rotations(rng, n=20):
    axis = rng.normal(size=(n, 3))
    return turn(axis / np.linalg.norm(axis, axis=1, keepdims=True), rng.uniform(0.3, 2.8, n))


def six_numbers(rotation, rng):
    """Six numbers that mean these rotations: the approach, and a forward direction that leans towards it."""
    forward, _, approach = np.moveaxis(rotation, -1, 0)
    long, short, lean = rng.uniform(0.3, 3, (3, len(rotation), 1)) * [[[1]], [[1]], [[0.3]]]
    return np.concatenate([long * approach, short * forward + lean * approach], -1)


@pytest.mark.ex7
def test_rotation_from_six_numbers():
    rng = random_source(7)
    wanted = random_rotations(rng)
    r6 = six_numbers(wanted, rng)
    got, _ = adapters.rotation_and_angle(*tensors(r6, wanted))
    approach, forward = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (r6[:, :3], r6[:, 3:]))
    skew = np.stack([forward, np.cross(approach, forward), approach], -1)
    f, left, a = np.moveaxis(wanted, -1, 0)
    other = r6[:, :3] - (forward * r6[:, :3]).sum(1, keepdims=True) * forward
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    mistakes = {
        "rows instead of columns: the matrix is transposed": wanted.transpose(0, 2, 1),
        "forward is not made orthogonal to the approach": skew,
        "left-handed: left is approach x forward": np.stack([f, -left, a], -1),
        "the columns are [approach, left, forward]; they are [forward, left, approach]": np.stack([a, left, f], -1),
        "the columns are [approach, forward, ..]; they are [forward, left, approach]": np.stack(
            [a, f, np.cross(a, f)], -1
        ),
        "the approach is made orthogonal to forward; it is the approach that stays": np.stack(
            [forward, np.cross(other, forward), other], -1
        ),
        "the first three numbers are the approach, not forward": np.stack([a, -left, f], -1),
    }
    compare(7, "rotation", got, wanted, mistakes)


@pytest.mark.ex7
def test_angle_between_rotations():
    rng = random_source(7, 1)
    rotation, axis, angle = random_rotations(rng), rng.normal(size=(20, 3)), rng.uniform(0.1, 3.0, 20)
    target = rotation @ turn(axis / np.linalg.norm(axis, axis=1, keepdims=True), angle)
    _, got = adapters.rotation_and_angle(*tensors(six_numbers(rotation, rng), target))
    trace = np.trace(rotation @ target, axis1=1, axis2=2)
    mistakes = {
        "degrees instead of radians": np.degrees(angle),
        "the trace of a b instead of a^T b": np.arccos(np.clip((trace - 1) / 2, -1, 1)),
        "the cosine; arccos is missing": np.cos(angle),
        "1 - cosine; the loss is the angle itself": 1 - np.cos(angle),
        "half the angle": angle / 2,
        "the squared angle": angle**2,
        "the mean over all rows; one angle a row is asked for": np.full(20, angle.mean()),
    }
    compare(7, "angle", got, angle, mistakes, scale=1e-3)  # arccos near its ends doubles the rounding


@pytest.mark.ex7
def test_gradient_of_the_angle_is_finite():
    rng = random_source(7, 2)
    rotation = random_rotations(rng)
    for name, target in (("equal to", rotation), ("half a turn from", rotation @ np.diag([1.0, -1, -1]))):
        r6, target = tensors(six_numbers(rotation, rng), target)
        adapters.rotation_and_angle(r6.requires_grad_(), target)[1].sum().backward()
        if r6.grad is None or not r6.grad.isfinite().all():
            raise AssertionError(
                f"the angle's gradient is not finite where the rotation is {name} the target; likely mistake: arccos "
                "has no slope at 1 and -1, and rounding goes beyond; clamp a little inside"
            )


# ---- exercise 8: back-projection of a pixel


def camera(rng, S=24):
    """depth (S, S) with holes, intrinsics (f, cx, cy), eye, camera_rotation."""
    depth = np.where(rng.uniform(size=(S, S)) < 0.2, np.inf, rng.uniform(0.5, 3, (S, S)))
    depth[0, 0] = depth[S - 1, S - 1] = 1.0  # the corners hold something
    intrinsics = (rng.uniform(20, 40), S / 2 + rng.uniform(-3, 3), S / 2 + rng.uniform(-3, 3))
    return depth, intrinsics, rng.normal(size=3), random_rotations(rng, 1)[0]


def seen_at(u, v, z, intrinsics, along_ray=False):
    """The point (n, 3), camera frame, at pixels and depths (n,)."""
    f, cx, cy = intrinsics
    ray = np.stack([(u - cx) / f, (v - cy) / f, np.ones(len(u))], 1)
    return ray * (z / (np.linalg.norm(ray, axis=1) if along_ray else 1))[:, None]


@pytest.mark.ex8
def test_points_of_pixels():
    rng = random_source(8)
    depth, intrinsics, eye, rotation = camera(rng)
    v, u = rng.permutation(np.argwhere(np.isfinite(depth)))[:30].T
    z, f = depth[v, u], intrinsics[0]
    points = [
        adapters.backproject(float(a), float(b), depth, intrinsics, eye, rotation) for a, b in np.stack([u, v], 1)
    ]
    if any(point is None for point in points):
        raise AssertionError(
            "None for a pixel that has a depth; likely mistake: u and v are swapped: depth[row, column]"
        )
    right = seen_at(u, v, z, intrinsics)
    in_camera_frame = {
        "half-pixel shift: 0.5 is added; the intrinsics start at 0": seen_at(u + 0.5, v + 0.5, z, intrinsics),
        "half-pixel shift: 0.5 is taken off": seen_at(u - 0.5, v - 0.5, z, intrinsics),
        "depth is taken along the ray; it is along the camera's z": seen_at(u, v, z, intrinsics, along_ray=True),
        "y points up; in this camera's frame it points down": right * [1, -1, 1],
        "u and v are swapped: u is the column (x), v the row (y)": seen_at(v, u, z, intrinsics),
        "the focal length is left out": right * [f, f, 1],
    }
    mistakes = {text: point @ rotation + eye for text, point in in_camera_frame.items()} | {
        "the rotation is transposed: camera_rotation is world -> camera": right @ rotation.T + eye,
        "the point is in the camera's frame, not in the world's": right,
        "the camera's position is left out": right @ rotation,
        "the camera's position is rotated too": (right + eye) @ rotation,
    }
    compare(8, "points", np.stack(points), right @ rotation + eye, mistakes, scale=1e-6)


@pytest.mark.ex8
def test_the_nearest_pixel_counts():
    rng = random_source(8, 1)
    depth, intrinsics, eye, rotation = camera(rng)
    depth[:] = rng.uniform(0.5, 3, depth.shape)  # no holes
    u, v = rng.integers(1, 22, (2, 12))
    du, dv = rng.uniform(0.1, 0.4, (2, 12)) * rng.choice([-1, 1], (2, 12))
    asked = np.stack([u + du, v + dv], 1)
    points = [adapters.backproject(float(a), float(b), depth, intrinsics, eye, rotation) for a, b in asked]
    if any(point is None for point in points):
        raise AssertionError("None for a place between pixels that all have a depth")
    x, y = np.floor(asked).astype(int).T
    wanted = seen_at(u, v, depth[v, u], intrinsics)
    mistakes = {
        "rounded down: floor(u + 0.5) is the nearest pixel, int(u) is not": seen_at(x, y, depth[y, x], intrinsics),
        "the ray is that of (u, v) itself, not that of the pixel whose depth it takes": seen_at(
            *asked.T, depth[v, u], intrinsics
        ),
    }
    mistakes = {text: point @ rotation + eye for text, point in mistakes.items()}
    compare(8, "points between pixels", np.stack(points), wanted @ rotation + eye, mistakes, scale=1e-6)


@pytest.mark.ex8
def test_nothing_there_is_none():
    depth, *rest = camera(random_source(8, 2))
    S = len(depth)
    row, column = np.argwhere(np.isinf(depth))[0]
    for what, u, v, wanted in (
        ("where nothing is", column, row, False),
        ("left of the picture (a negative index counts from the right)", -1, 0, False),
        ("right of the picture", S, S - 1, False),
        ("below the picture", S - 1, S - 0.5, False),
        ("just inside the first pixel", -0.4, -0.4, True),
    ):
        point = adapters.backproject(float(u), float(v), depth, *rest)
        if (point is not None) != wanted:
            raise AssertionError(f"pixel ({u}, {v}), {what}: got {point}, expected {'a point' if wanted else 'None'}")
