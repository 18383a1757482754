"""The eight exercises: each check draws its data from a seed, and names the mistake it recognises.

pytest -m ex1    (ex1 .. ex8, in teaching order; EXERCISE_SEED=7 draws other data)

A check is a function (call, rng): `call` runs one function of adapters.py and returns plain numbers
(exercise_calls.py), here in this process, for the grader in the student's. They are compared with what is right, in
another form than the exercise asks for (the scan as a sum over pairs of tokens), then with what known mistakes give.
"""

import functools
import os

import numpy as np
import pytest

SEED = int(os.environ.get("EXERCISE_SEED", 0))
SCALE = 1e-4  # largest gap allowed, as a fraction of the largest number: float32 leaves 1e-6, a mistake 1e-2 or more
READ = {
    1: "selective_scan.py, 'From the continuous equation to the loop', steps 2 and 3",
    2: "selective_scan.py, 'From the continuous equation to the loop' and the four tokens by hand",
    3: "selective_scan.py, 'The chunked form'",
    4: "selective_scan.py, the four tokens by hand; the state returned is the one that y was read from",
    5: "Mamba paper, Fig. 3 and Algorithm 2; robomamba.py, LayerState",
    6: "data/dataset.py, `pack` and `pad`; robomamba.py, RoboMamba.forward, which uses them",
    7: "Zhou et al. 2019, section 4; RoboMamba paper, Eq. 6",
    8: "sim/scene.py, Scene.intrinsics and Scene.project",
}
CHECKS = {}  # name: (exercise, function of call and rng)


def check(exercise: int, *variants):
    """Register a check, or one for each of its variants, which it then gets as its third argument."""

    def register(function):
        name = function.__name__.replace("_", " ")
        for variant in variants:
            CHECKS[f"{name}, {variant}"] = (exercise, functools.partial(function, variant=variant))
        if not variants:
            CHECKS[name] = (exercise, function)
        return function

    return register


def run(name: str, call, seed: int) -> None:
    """One check. Raises: AssertionError with the likely mistake."""
    CHECKS[name][1](call, np.random.default_rng([seed, *name.encode()]))


def compare(exercise: int, name: str, got, wanted, mistakes: dict | None = None, scale: float = SCALE, otherwise=""):
    """Fail unless `got` equals `wanted`; the message names the one of `mistakes` (text: its result) that `got` is."""
    got, wanted = (np.asarray(x, float) for x in (got, wanted))
    advice = f"Read again: {READ[exercise]}."
    require(got.shape == wanted.shape, f"{name}: shape {got.shape}, expected {wanted.shape}. {advice}")
    size = max(np.abs(wanted).max(), 1e-6)
    if np.isfinite(got).all() and np.abs(got - wanted).max() <= scale * size:
        return
    for mistake, result in (mistakes or {}).items():
        with np.errstate(invalid="ignore"):
            if np.shape(result) == got.shape and np.abs(got - result).max() <= 10 * scale * size:
                raise AssertionError(f"{name}: likely mistake: {mistake}. {advice}")
    off = f"off by up to {np.abs(got - wanted).max():.2g}" if np.isfinite(got).all() else "not finite"
    known = f"likely mistake: {otherwise}" if otherwise else "not one of the known mistakes"
    raise AssertionError(f"{name}: {off}, where the numbers go up to {size:.2g}; {known}. {advice}")


def require(condition, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def compare_all(exercise: int, names, got, wanted, mistakes: dict) -> None:
    """`compare` of several results; a mistake gives as many."""
    require(len(got) == len(names), f"{len(got)} results, expected {', '.join(names)}")
    for i, name in enumerate(names):
        compare(exercise, name, got[i], wanted[i], {text: results[i] for text, results in mistakes.items()})


def differences(function, x, step: float = 1e-5) -> np.ndarray:
    """Derivatives of a number (or one number a row of x) to every entry of x (or of its rows)."""
    rows = np.ndim(function(x)) > 0
    out = np.empty_like(x)
    for place in np.ndindex(x.shape[1:] if rows else x.shape):
        move = np.zeros_like(x)
        move[(slice(None), *place) if rows else place] = step
        out[(slice(None), *place) if rows else place] = (function(x + move) - function(x - move)) / (2 * step)
    return out


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
    names = ("y", "the state after the last token")
    compare_all(exercise, names, got, unrolled(*inputs), scan_mistakes(*inputs) | (extra or {}))


def compare_gradients(exercise, call, rng, name, *more, otherwise):
    """Autograd's derivatives to every input against differences of the unrolled sum."""
    inputs = scan_inputs(rng, B=2, L=7, E=2, N=2)
    weights = [rng.normal(size=x.shape) for x in unrolled(*inputs)]
    reply = call(name, *inputs, *more, weights=weights)
    compare_scans(exercise, reply["outputs"], inputs)
    for i, (letter, got) in enumerate(zip(("u", "dt", "A", "B", "C", "D", "state"), reply["gradients"], strict=True)):
        require(got is not None, f"gradient of {letter}: none; likely mistake: a detach, .data or numpy on the way")

        def loss(x, i=i):
            results = unrolled(*(x if k == i else other for k, other in enumerate(inputs)))
            return sum((w * result).sum() for w, result in zip(weights, results, strict=True))

        wanted = differences(loss, inputs[i])
        compare(exercise, f"gradient of {letter}", got, wanted, scale=1e-3, otherwise=otherwise)


def discretised(rng, variant):
    """u, dt, A, B of one token a row, or of a sequence."""
    u, dt, A, B, *_ = scan_inputs(rng)
    return (u[:, 0], dt[:, 0], A, B[:, 0]) if variant == "one token" else (u, dt, A, B)


@check(1, "one token", "a sequence")
def decay_and_write(call, rng, variant):
    u, dt, A, B = discretised(rng, variant)
    decay, write = call("discretise", u, dt, A, B)["outputs"]
    x = dt[..., None] * A
    mistakes = {
        "1 + dt A, Euler's step; the decay is solved exactly: exp(dt A)": 1 + x,
        "exp(-dt A), but A is already negative": np.exp(-x),
        "exp(A), the step size dt is left out": np.broadcast_to(np.exp(A), x.shape),
        "dt A without exp": x,
    }
    compare(1, "decay", decay, np.exp(x), mistakes)
    right = np.einsum("...e,...n->...en", dt * u, B)
    mistakes = {
        "zero-order hold (Eq. 4) for B; Mamba's code writes dt B u": np.expm1(x) / x * right,
        "dt is left out: B u instead of dt B u": right / dt[..., None],
        "u is left out: dt B instead of dt B u": right / u[..., None],
    }
    compare(1, "write", write, right, mistakes)


@check(1)
def a_step_of_size_zero_changes_nothing(call, rng):
    u, dt, A, B, *_ = scan_inputs(rng)
    dt[:, ::2] = 0
    got = call("discretise", u, dt, A, B)["outputs"]
    compare(1, "decay where every second dt is 0", got[0], np.exp(dt[..., None] * A))
    compare(1, "write where every second dt is 0", got[1], np.einsum("...e,...n->...en", dt * u, B))


@check(2, 1, 2, 13)
def reference_scan_of_length(call, rng, variant):
    inputs = scan_inputs(rng, L=variant)
    compare_scans(2, call("reference_scan", *inputs)["outputs"], inputs)


@check(2)
def reference_scan_in_two_pieces(call, rng):
    u, dt, A, B, C, D, state = inputs = scan_inputs(rng)
    pieces, h = [], state
    for now in (slice(0, 5), slice(5, None)):
        y, h = call("reference_scan", u[:, now], dt[:, now], A, B[:, now], C[:, now], D, h)["outputs"]
        pieces.append(y)
    compare_scans(2, (np.concatenate(pieces, 1), h), inputs)


@check(2)
def gradients_of_the_reference_scan(call, rng):
    compare_gradients(2, call, rng, "reference_scan", otherwise="a tensor overwritten in place")


@check(3)
def carry_from_chunk_to_chunk(call, rng):
    u, dt, A, B, C, D, state = inputs = scan_inputs(rng, L=8)

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
    compare_scans(3, call("chunked_scan", *inputs, 4)["outputs"], inputs, mistakes)


@check(3, 1, 4, 13, 50)
def chunked_scan_in_chunks_of(call, rng, variant):
    inputs = scan_inputs(rng)
    compare_scans(3, call("chunked_scan", *inputs, variant)["outputs"], inputs)


@check(3, 3, 7)
def gradients_of_the_chunked_scan_in_chunks_of(call, rng, variant):
    otherwise = "off by one chunk: what is kept for the backward pass must be the state BEFORE each chunk"
    compare_gradients(3, call, rng, "chunked_scan", variant, otherwise=otherwise)


@check(3)
def chunked_scan_keeps_few_states(call, rng):
    B, L, E, N = 1, 48, 16, 16
    inputs = scan_inputs(rng, B, L, E, N)
    reply = call("chunked_scan", *inputs, 16, count=True)
    compare_scans(3, reply["outputs"], inputs)
    text = f"{reply['kept']} numbers are kept for the backward pass, the states of all tokens are {B * L * E * N}; "
    text += "likely mistake: autograd keeps every state; keep the one before each chunk and recompute the rest. "
    require(0 <= reply["kept"] <= B * L * E * N / 2, text + READ[3])


@check(4)
def one_step(call, rng):
    u, dt, A, B, C, D, state = scan_inputs(rng, L=1)
    token = [x[:, 0] for x in (u, dt, B, C)]
    got = call("step", token[0], token[1], A, token[2], token[3], D, state)["outputs"]
    y, after = unrolled(u, dt, A, B, C, D, state)
    old = (state * token[3][:, None]).sum(-1) + D * token[0]
    decay = np.exp(token[1][..., None] * A)
    mistakes = {text: (m_y[:, 0], m_h) for text, (m_y, m_h) in scan_mistakes(u, dt, A, B, C, D, state).items()}
    mistakes["the old state: update it first, then read y from it and return it"] = (old, state)
    late = after - (1 - decay) * (after - decay * state)  # decay (h + write)
    mistakes["what is written decays at once: it is decay h + write"] = ((late * token[3][:, None]).sum(-1), late)
    compare_all(4, ("y", "the state after the token"), got, (y[:, 0], after), mistakes)


@check(4)
def steps_are_the_scan(call, rng):
    u, dt, A, B, C, D, state = inputs = scan_inputs(rng)
    ys, h = [], state
    for t in range(u.shape[1]):
        y, h = call("step", u[:, t], dt[:, t], A, B[:, t], C[:, t], D, h)["outputs"]
        ys.append(y)
    compare_scans(4, (np.stack(ys, 1), h), inputs)


@check(4)
def step_leaves_the_given_state_alone(call, rng):
    u, dt, A, B, C, D, state = inputs = scan_inputs(rng, L=1)
    reply = call("step", u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    text = "the given state was overwritten; likely mistake: an operation in place (mul_, +=) on the argument"
    require(np.array_equal(reply["arguments"][-1], state), text)
    y, after = reply["outputs"]
    compare_scans(4, (np.asarray(y)[:, None], after), inputs)


def softplus(x):
    return np.logaddexp(0, x)


def silu(x):
    return x / (1 + np.exp(-x))


BLOCK_RESULTS = ("y", "conv after the last token", "ssm after the last token")
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


@check(5, 1, 9)
def block_of_length(call, rng, variant):
    inputs = block_inputs(rng, L=variant)
    mistakes = {text: block(*inputs, mistake=key) for key, text in BLOCK_MISTAKES.items()}
    compare_all(5, BLOCK_RESULTS, call("mamba_block", *inputs)["outputs"], block(*inputs), mistakes)


@check(5)
def block_is_causal(call, rng):
    x, *rest = block_inputs(rng)
    changed = x.copy()
    changed[:, 6] += 1
    first, second = (np.asarray(call("mamba_block", inputs, *rest)["outputs"][0]) for inputs in (x, changed))
    text = f"token 6 changes an earlier output; likely mistake: {BLOCK_MISTAKES['ahead']}"
    require(np.allclose(first[:, :6], second[:, :6], atol=1e-5), text)
    text = "token 6 does not change its own output; likely mistake: the output is late by one token"
    require(not np.allclose(first[:, 6], second[:, 6], atol=1e-3), text)
    for got, inputs in ((first, x), (second, changed)):
        compare(5, "y", got, block(inputs, *rest)[0])


@check(5)
def block_in_two_pieces(call, rng):
    x, weights, conv, ssm = block_inputs(rng)
    pieces, states = [], (conv, ssm)
    for now in (slice(0, 2), slice(2, None)):  # the first piece is shorter than the convolution's past
        y, *states = call("mamba_block", x[:, now], weights, *states)["outputs"]
        pieces.append(y)
    whole = block(x, weights, conv, ssm)[0]
    compare(5, "y of two pieces, the states handed on", np.concatenate(pieces, 1), whole)


IGNORE, END = -100, 3


def conversations(rng, count=4):
    """Turns of random ids from 10 on; their lengths differ, and so does the number of turns."""

    def ids(low, high):
        return rng.integers(10, 500, rng.integers(low, high)).tolist()

    return [[(ids(2, 7), [*ids(1, 6), END]) for _ in range(1 + k % 3)] for k in rng.permutation(count).tolist()]


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


@check(6)
def tokens_of_all_turns_follow_each_other(call, rng):
    talks = conversations(rng)
    tokens = call("pack_conversations", talks, END)["outputs"][0]
    right = [[i for turn in turns for part in turn for i in part] for turns in talks]
    grouped = [[i for k in (0, 1) for turn in turns for i in turn[k]] for turns in talks]
    width = max(map(len, right))
    left = [[END] * (width - len(row)) + row for row in right]
    mistakes = {
        "padded on the left; the state would run through the padding first": np.array(left),
        "padded with 0 instead of `end`": padded(right, 0),
        "all prompts first, then all replies": padded(grouped, END),
    }
    compare(6, "tokens", tokens, padded(right, END), mistakes, scale=0)


@check(6)
def labels_are_the_replies(call, rng):
    talks = conversations(rng)
    labels = call("pack_conversations", talks, END)["outputs"][1]
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


@check(6)
def lengths_and_prompts_count_no_padding(call, rng):
    talks = conversations(rng)
    _, _, lengths, prompts = call("pack_conversations", talks, END)["outputs"]
    right = np.array([sum(len(part) for turn in turns for part in turn) for turns in talks])
    width = np.full(len(talks), right.max())
    mistakes = {
        "padding is counted: the state of a pad position would be pooled": width,
        "the index of the last token instead of the length": right - 1,
    }
    compare(6, "lengths", lengths, right, mistakes, scale=0)
    first = np.array([len(turns[0][0]) for turns in talks])
    last = right - [len(turns[-1][1]) for turns in talks]
    mistakes = {
        "padding is counted: the policy head would read the state of a pad position": width,
        "the index of the prompt's last token instead of its length": first - 1,
        "up to the last reply; it is the FIRST prompt that counts": last,
    }
    compare(6, "prompts", prompts, first, mistakes, scale=0)


def turn(axis, angle):
    """Rodrigues' formula: rotations (n, 3, 3) about unit axes (n, 3) by angles (n,), radians."""
    x, y, z = axis.T
    K = np.stack([0 * x, -z, y, z, 0 * x, -x, -y, x, 0 * x], -1).reshape(-1, 3, 3)
    sin, cos = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return np.eye(3) + sin * K + (1 - cos) * K @ K


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_rotations(rng, n=20):
    return turn(unit(rng.normal(size=(n, 3))), rng.uniform(0.3, 2.8, n))


def six_numbers(rotation, rng):
    """Six numbers that mean these rotations: the approach, and a forward direction that leans towards it."""
    forward, _, approach = np.moveaxis(rotation, -1, 0)
    long, short, lean = rng.uniform(0.3, 3, (3, len(rotation), 1)) * [[[1]], [[1]], [[0.3]]]
    return np.concatenate([long * approach, short * forward + lean * approach], -1)


def angle_to(r6, target):
    """Angles (n,) between the rotations that r6 (n, 6) means and target: |R - T| = sqrt(8) sin(angle / 2)."""
    approach = unit(r6[:, :3])
    forward = unit(r6[:, 3:] - (r6[:, 3:] * approach).sum(1, keepdims=True) * approach)
    rotation = np.stack([forward, np.cross(approach, forward), approach], -1)
    return 2 * np.arcsin(np.clip(np.linalg.norm(rotation - target, axis=(1, 2)) / np.sqrt(8), 0, 1))


@check(7)
def rotation_from_six_numbers(call, rng):
    wanted = random_rotations(rng)
    r6 = six_numbers(wanted, rng)
    got = call("rotation_and_angle", r6, random_rotations(rng))["outputs"][0]
    approach, forward = unit(r6[:, :3]), unit(r6[:, 3:])
    skew = np.stack([forward, np.cross(approach, forward), approach], -1)
    f, left, a = np.moveaxis(wanted, -1, 0)
    other = unit(r6[:, :3] - (forward * r6[:, :3]).sum(1, keepdims=True) * forward)
    columns = "they are [forward, left, approach]"
    mistakes = {
        "rows instead of columns: the matrix is transposed": wanted.transpose(0, 2, 1),
        "forward is not made orthogonal to the approach": skew,
        "left-handed: left is approach x forward": np.stack([f, -left, a], -1),
        f"the columns are [approach, left, forward]; {columns}": np.stack([a, left, f], -1),
        f"the columns are [approach, forward, ..]; {columns}": np.stack([a, f, np.cross(a, f)], -1),
        "the approach is made orthogonal to forward; it is the approach that stays": np.stack(
            [forward, np.cross(other, forward), other], -1
        ),
        "the first three numbers are the approach, not forward": np.stack([a, -left, f], -1),
    }
    compare(7, "rotation", got, wanted, mistakes)


@check(7)
def angle_between_rotations(call, rng):
    rotation, axis, angle = random_rotations(rng), unit(rng.normal(size=(20, 3))), rng.uniform(0.1, 3.0, 20)
    target = rotation @ turn(axis, angle)
    got = call("rotation_and_angle", six_numbers(rotation, rng), target)["outputs"][1]
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


@check(7)
def gradient_of_the_angle(call, rng):
    """Right in general, finite where the rotation equals its target and where it is half a turn away."""
    rotation = random_rotations(rng, 30)
    equal, opposite, general = slice(0, 10), slice(10, 20), slice(20, 30)
    target = rotation.copy()
    target[opposite] = rotation[opposite] @ np.diag([1.0, -1, -1])
    target[general] = rotation[general] @ turn(unit(rng.normal(size=(10, 3))), rng.uniform(0.3, 2.8, 10))
    r6 = six_numbers(rotation, rng)
    reply = call("rotation_and_angle", r6, target, weights=[np.zeros((30, 3, 3)), np.ones(30)])
    compare(7, "rotation", reply["outputs"][0], rotation)
    compare(7, "angle", reply["outputs"][1], angle_to(r6, target), scale=2e-3)  # a clamp of 1e-6 moves 0 to 1.4e-3
    text = "the angle has no gradient; likely mistake: a detach, .data or numpy on the way"
    require(reply["gradients"][0] is not None, text)
    gradient = np.asarray(reply["gradients"][0], float)
    for where, rows in (("equal to", equal), ("half a turn from", opposite)):
        text = f"the angle's gradient is not finite where the rotation is {where} the target; likely mistake: "
        text += "arccos has no slope at 1 and -1, and rounding goes beyond; clamp a little inside"
        require(np.isfinite(gradient[rows]).all(), text)
    wanted = differences(lambda x: angle_to(x, target[general]), r6[general])
    compare(7, "gradient of the angle", gradient[general], wanted, scale=1e-3)


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


def points_at(call, pixels, depth, intrinsics, eye, rotation) -> np.ndarray:
    """(n, 3), NaN for None."""
    points = np.asarray(call("backproject", pixels, depth, intrinsics, eye, rotation)["outputs"][0], float)
    require(points.shape == (len(pixels), 3), f"points: shape {points.shape[1:]}, expected (3,)")
    return points


@check(8)
def points_of_pixels(call, rng):
    depth, intrinsics, eye, rotation = camera(rng)
    v, u = rng.permutation(np.argwhere(np.isfinite(depth)))[:30].T
    z, f = depth[v, u], intrinsics[0]
    points = points_at(call, np.stack([u, v], 1), depth, intrinsics, eye, rotation)
    text = "None for a pixel that has a depth; likely mistake: u and v are swapped: depth[row, column]"
    require(not np.isnan(points).any(), text)
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
    compare(8, "points", points, right @ rotation + eye, mistakes, scale=1e-6)


@check(8)
def the_nearest_pixel_counts(call, rng):
    depth, intrinsics, eye, rotation = camera(rng)
    depth[:] = rng.uniform(0.5, 3, depth.shape)  # no holes
    u, v = rng.integers(1, 22, (2, 12))
    du, dv = rng.uniform(0.1, 0.4, (2, 12)) * rng.choice([-1, 1], (2, 12))
    asked = np.stack([u + du, v + dv], 1)
    points = points_at(call, asked, depth, intrinsics, eye, rotation)
    require(not np.isnan(points).any(), "None for a place between pixels that all have a depth")
    x, y = np.floor(asked).astype(int).T
    unrounded = seen_at(*asked.T, depth[v, u], intrinsics)
    mistakes = {
        "rounded down: floor(u + 0.5) is the nearest pixel, int(u) is not": seen_at(x, y, depth[y, x], intrinsics),
        "the ray is that of (u, v) itself, not that of the pixel whose depth it takes": unrounded,
    }
    mistakes = {text: point @ rotation + eye for text, point in mistakes.items()}
    wanted = seen_at(u, v, depth[v, u], intrinsics) @ rotation + eye
    compare(8, "points between pixels", points, wanted, mistakes, scale=1e-6)


@check(8)
def nothing_there_is_none(call, rng):
    depth, intrinsics, eye, rotation = camera(rng)
    S = len(depth)
    holes, there = (rng.permutation(np.argwhere(mask))[:10, ::-1] for mask in (np.isinf(depth), np.isfinite(depth)))
    outside = ((-1, 0), (0, -1), (S, S - 1), (S - 1, S - 0.5))
    cases = [("where nothing is", *pixel) for pixel in holes]
    cases += [("off the picture (a negative index counts from the other side)", *pixel) for pixel in outside]
    cases += [("", -0.4, -0.4), *(("", *pixel) for pixel in there)]  # just inside the first pixel; anywhere
    cases = [cases[k] for k in rng.permutation(len(cases))]
    pixels = np.array([[u, v] for _, u, v in cases], float)
    points = points_at(call, pixels, depth, intrinsics, eye, rotation)
    for point, (nothing, u, v) in zip(points, cases, strict=True):
        wrong = f"a point {nothing}; expected None" if nothing else "None where something is"
        require(np.isnan(point).any() == bool(nothing), f"pixel ({u:g}, {v:g}): {wrong}")
    seen = [k for k, case in enumerate(cases) if not case[0]]
    column, row = np.floor(pixels[seen] + 0.5).astype(int).T
    wanted = seen_at(column, row, depth[row, column], intrinsics) @ rotation + eye
    compare(8, "points", points[seen], wanted, scale=1e-6)


def call_here(name: str, *arguments, weights=None, count=False) -> dict:
    import exercise_calls  # here: the grader needs the checks without the student's code

    return exercise_calls.answer(name, arguments, weights, count)


PARAMETERS = [pytest.param(name, marks=getattr(pytest.mark, f"ex{number}")) for name, (number, _) in CHECKS.items()]


@pytest.mark.parametrize("name", PARAMETERS)
def test_exercise(name):
    run(name, call_here, SEED)
