"""Eight classic mistakes, planted in the real code one at a time, and what each does to the shipped model.

    python -m extras.mistakes                   # the table, on 20 validation scenes
    python -m extras.mistakes --prove           # also run, with each mistake, the test that must fail (needs pytest)
    python -m extras.mistakes --out runs/mistakes    # also write mistakes.json and mistakes.md

None of them raises an error or changes a shape, which is why each needs a test. A mistake is a function
that returns a context manager, inside which one function of robomamba.py or selective_scan.py is replaced.
"""

import argparse
import contextlib
import io
import math
import statistics
from functools import wraps
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import robomamba
import selective_scan as scan
from common.files import write_json, write_text
from common.report import grid
from common.scripts import run_main
from data.prompts import CONTACT_TOKENS, contact_question, parse_contact

ROOT = Path(__file__).parent.parent
FIRST_SEED = 10_800_000  # validation scenes (sim_eval.py)
DECAY_STEPS = 1000  # with dt * A = -1 / DECAY_STEPS a state falls to 1 / e


class Sample(NamedTuple):
    rgb: np.ndarray  # uint8 (S, S, 3)
    instruction: str
    label: object  # sim.expert.Label, the expert's contact


def samples(size: int) -> list[Sample]:
    """One validation scene of each of the 20 seen categories, with the expert's contact where it finds one."""
    from sim.catalogue import SEEN
    from sim.expert import expert
    from sim.scene import Scene

    found = []
    with Scene(size) as scene:
        for k, category in enumerate(SEEN):
            scene.spawn(category, FIRST_SEED + k).render()
            label = expert(scene, np.random.default_rng(k))
            if label is not None:
                found.append(Sample(scene.rgb, f"open the {scene.spec.parts[scene.target].label}", label))
    return found


def batch(model, scenes: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pictures (n, 3, S, S), prompts (n, T) padded on the right, their true lengths (n,)."""
    prompts = [torch.tensor(model.prompt(contact_question(s.instruction))) for s in scenes]
    tokens = pad_sequence(prompts, batch_first=True, padding_value=model.encoding.eot_token)
    pictures = torch.from_numpy(np.stack([s.rgb.transpose(2, 0, 1) for s in scenes]))
    return pictures, tokens, torch.tensor([len(prompt) for prompt in prompts])


def replaces(owner, name: str):
    """Decorator: wrong(right, ..) becomes a mistake: it is called in place of the function owner.name, its `right`."""

    def decorate(wrong):
        def plant():
            right = getattr(owner, name)
            return patch.object(owner, name, lambda *args, **options: wrong(right, *args, **options))

        return wraps(wrong)(plant)

    return decorate


@replaces(scan, "_forward_chunk")
def swapped_b_and_c(right, dt, dtu, A2, B, C, *rest):
    """B and C swapped in the scan: same shapes, no error; the contact is somewhere else"""
    return right(dt, dtu, A2, C, B, *rest)


@replaces(robomamba.MambaMixer, "selection")
def no_softplus(right, self, u):
    """softplus of dt left out: negative steps, so the state grows instead of fading"""
    dt, A, B, C = right(self, u)
    return dt + torch.log(-torch.expm1(-dt)), A, B, C  # the input of the softplus


@replaces(scan, "_prepare")
def state_in_bfloat16(right, *args, **options):
    """scan in bfloat16: slow memories stand still: 0.999 times a state rounds to the state"""
    return [x.bfloat16() if x.dtype == torch.float32 else x for x in right(*args, **options)]


@replaces(scan, "_states")
def divided_by_product(right, dt, dtu, A2, B, h, decay, hs):
    """divide by the cumulative product of decays: right on short inputs; on long ones the product underflows
    and 0 / 0 follows"""
    product = torch.mul(dt.unsqueeze(2), A2, out=decay).exp2_().cumprod(0)
    torch.mul(dtu.unsqueeze(2), B.unsqueeze(3), out=hs).div_(product).cumsum_(0).add_(h).mul_(product)


@replaces(robomamba.MambaMixer, "conv")
def centred_convolution(right, self, x):
    """conv1d centred instead of causal: the loss is too good to be true: a word sees the next one"""
    return right(self, torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1))  # one token of the future


@replaces(robomamba.MambaMixer, "step")
def forgotten_convolution(right, self, x, state):
    """`step` forgets the inputs of conv1d: loss and head are right, generated text is noise (inf: no contact)"""
    return right(self, x, robomamba.LayerState(torch.zeros_like(state.conv), state.ssm))


def read_at_the_padding():
    """head reads `[:, -1]`, the padding: right for one prompt, wrong for a batch of unequal ones"""
    return patch.object(robomamba.RoboMamba, "pool", lambda self, states, lengths: states[:, -1])


def row_for_column():
    """direction read from a row of the rotation: the pixel is right, the gripper comes from elsewhere"""
    return patch.object(robomamba.Action, "approach", property(lambda self: self.rotation[2]))


@torch.inference_mode()
def contact_px(model, scenes) -> float:
    """Median distance, pixels, between the head's contacts and the expert's; all prompts in one padded batch."""
    pictures, tokens, lengths = batch(model, scenes)
    pixel, _ = model.head(model.pool(model.text_states(pictures, tokens), lengths))
    u, v = ((pixel + 1) * model.config.vision.image_size / 2).T.tolist()
    pairs = zip(u, v, scenes, strict=True)
    return statistics.median(math.hypot(u - s.label.u, v - s.label.v) for u, v, s in pairs)


def direction_deg(model, scenes) -> float:
    """Median angle, degrees, between the predicted direction and the expert's."""
    cosines = [model.predict_action(s.rgb, s.instruction).approach @ s.label.approach for s in scenes]
    return math.degrees(math.acos(min(1.0, statistics.median(cosines))))


@torch.inference_mode()
def largest_state(model, scenes) -> float:
    """The largest magnitude in any layer's state after reading a picture."""
    states = model.encode_image(batch(model, scenes)[0])
    return max(state.ssm.abs().nan_to_num(math.inf).max().item() for state in states)


def left_of_memory(model, scenes) -> float:
    """What is left of a state of 1 after DECAY_STEPS tokens that write nothing; 1 / e = 0.37 by definition."""
    one, state = torch.ones(1, 1), torch.ones(1, 1, 1)
    for _ in range(DECAY_STEPS):
        state = scan.scan_step(0 * one, one / DECAY_STEPS, -one, one, one, None, state)[1]
    return state.item()


def not_finite(model, scenes) -> float:
    """Share of the scan's outputs that are inf or nan; 1,024 tokens with dt from 0.1 to 1."""
    y, _ = scan.selective_scan(*(x.detach() for x in scan.example_inputs(1, 1024, 64, 16, scan.LARGE_DT_RANGE)))
    return 1 - y.isfinite().double().mean().item()


@torch.inference_mode()
def moved_by_the_future(model, scenes) -> float:
    """How much a different last word changes the outputs before it, as a share of their size."""
    pictures, tokens, _ = batch(model, scenes[:1])
    changed = tokens.clone()
    changed[0, -1] = 0
    a, b = (model.text_states(pictures, t)[:, :-1] for t in (tokens, changed))
    return ((a - b).abs().max() / a.abs().max()).item()


def written_px(model, scenes) -> float:
    """As contact_px, with the contact generated as text, one `step` per token; text that is no contact is inf off."""
    S, errors = model.config.vision.image_size, []
    for sample in scenes:
        text = model.generate(sample.rgb, contact_question(sample.instruction), max_new_tokens=CONTACT_TOKENS)
        u, v, _ = parse_contact(text) or (math.inf, math.inf, None)
        errors.append(math.hypot(S * u - sample.label.u, S * v - sample.label.v))
    return statistics.median(errors)


MISTAKES = (  # the function that plants it, what is measured, its format, the test in test_*.py that must fail
    (swapped_b_and_c, contact_px, "{:.1f} px off", "scan.py::test_official_formulas"),
    (no_softplus, largest_state, "largest state {:.2g}", "model.py::test_the_picture_reaches_the_last_state_at_step_0"),
    (state_in_bfloat16, left_of_memory, "{:.2f} left after 1,000 tokens", "scan.py::test_mixed_precision_and_autocast"),
    (divided_by_product, not_finite, "{:.0%} inf or nan", "scan.py::test_extreme_steps"),
    (centred_convolution, moved_by_the_future, "outputs move by {:.2g} with the next word",
     "model.py::test_language_model_is_causal"),
    (forgotten_convolution, written_px, "{:.1f} px off in words",
     "model.py::test_step_equals_forward_for_the_whole_tiny_model"),
    (read_at_the_padding, contact_px, "{:.1f} px off", "model.py::test_padding_never_reaches_the_pooled_state"),
    (row_for_column, direction_deg, "{:.0f} degrees off",
     "model.py::test_predict_action_stays_in_the_picture_and_does_not_depend_on_full_stops"),
)  # fmt: skip


def rows(model, scenes: list[Sample]) -> list[dict]:
    """One row per mistake: {"mistake", "see", "right", "wrong" (numbers), "form", "test"}; None if not finite."""
    table = []
    measures = dict.fromkeys(measure for _, measure, *_ in MISTAKES)
    right = {measure: measure(model, scenes) for measure in measures}
    for plant, measure, form, test in MISTAKES:
        with plant():
            wrong = measure(model, scenes)
        name, see = " ".join(plant.__doc__.split()).split(": ", 1)
        numbers = {"right": right[measure], "wrong": wrong if math.isfinite(wrong) else None}
        table.append({"mistake": name, "see": see, **numbers, "form": form, "test": f"tests/test_{test}"})
    return table


def prove(table: list[dict]) -> None:
    """Adds "caught" to the rows: does its test fail with the mistake in place? Raises: ValueError if a test fails
    without a mistake."""
    import pytest

    def run(*tests) -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *tests])

    tests = [str(ROOT / row["test"]) for row in table]
    if code := int(run(*tests)):
        raise ValueError(f"the tests do not pass without a mistake (pytest says {code}); run them first")
    for row, test, (plant, *_) in zip(table, tests, MISTAKES, strict=True):
        with plant():
            row["caught"] = run(test) == pytest.ExitCode.TESTS_FAILED


def mistakes_table(rows: list[dict]) -> str:
    """What the shipped model does with each planted mistake, and the test that catches it."""
    lines = []
    for item in rows:
        values = [item["form"].format(math.inf if item[key] is None else item[key]) for key in ("right", "wrong")]
        lines.append([item["mistake"], item["see"], *values, f"`{item['test'].split('::')[1]}`"])
    return grid(["mistake", "what you see", "right", "wrong", "caught by"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Classic mistakes and what they do to the shipped model.")
    shipped = ROOT / "data/pretrained/robomamba-tiny-rgbd"
    parser.add_argument("--checkpoint", default=shipped, help="folder written by save_pretrained")
    parser.add_argument("--out", help="folder for mistakes.json and mistakes.md")
    parser.add_argument("--prove", action="store_true", help="run the named tests with each mistake in place")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = robomamba.RoboMamba.from_pretrained(args.checkpoint)
    scenes = samples(model.config.vision.image_size)
    table = rows(model, scenes)
    if args.prove:
        prove(table)
    text = mistakes_table(table) + "\n"
    print(text)
    if args.out:
        write_json(Path(args.out) / "mistakes.json", {"scenes": len(scenes), "rows": table})
        write_text(Path(args.out) / "mistakes.md", text)
    missed = [row["mistake"] for row in table if not row.get("caught", True)]
    if missed:
        raise ValueError(f"not caught by the test that is named: {', '.join(missed)}")
    if args.prove:
        print(f"{len(table)} mistakes planted, {len(table)} caught by the tests named.")


if __name__ == "__main__":
    run_main(main)
