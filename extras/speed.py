"""How long a prediction takes: head or text, Mamba or a Transformer of the same size, short or long context.

    python -m extras.speed --out runs/speed      # under two minutes on one core, then the GPU if any

Writes OUT/speed.json, OUT/speed.md and OUT/speed.png. Batch 1, float32, CPU on one thread. Times are medians; compared
calls take turns, so that a machine that slows down affects all of them equally.

    mamba, attention  the model of --checkpoint; the same with a Transformer of as many parameters (extras.transformer),
                      whose weights are random: no time here depends on them
    head, text        one pass over picture and prompt, then the policy head, or the action generated token by token: as
                      many tokens as a contact plus the end token
    context, state    random tokens read before picture and prompt, as if remembered from earlier steps; bytes of
                      everything kept of them, without a cache's spare capacity (up to as much again)
    closed loop       prediction number STEP of a robot that remembers the earlier pictures and prompts: stateful
                      ("going on" from the state they left) or recomputed ("reading all again"), as a stateless model
                      must. Earlier pictures cost only their language-model tokens, as if their features were cached

The paper (RoboMamba, arXiv 2406.04339, Fig. 1) lacks this comparison: there the models also differ in size.
"""

import itertools
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import write_atomically, write_json, write_text
from common.plots import draw_lines
from common.report import grid
from common.scripts import cli, environment, flag, progress, run_main
from common.weights import count
from data.prompts import contact_question
from extras.transformer import parameter_matched
from robomamba import RoboMamba

LENGTHS = (64, 256, 1024, 2048, 4096, 8192)  # tokens of context
STEP = 8  # of the closed loop
WARM = 2  # warm-up rounds, not counted
ROUNDS = 5  # minimum number of counted rounds
RUN = 32  # tokens generated in a row to time one
SPEED_COLUMNS = ("Mamba: ms a prediction / a token", "Transformer", "Mamba: state, kB", "Transformer")
SPEED_ROWS = {  # key of a prediction in speed.json: label of its row
    "encoder": "the picture encoder alone, part of all below",
    "head": "prefill and the policy head",
    "text": "prefill and the action as text, {text} tokens",
    "going on": "prediction {step} of a loop, stateful: from the state that the last one left",
    "reading all again": "prediction {step} of a loop, recomputed: prefill of all {past} earlier tokens",
}
SPEED_NOTES = """
| the paper's Fig. 1 | Hz |
| --- | --- |
| RoboMamba 2.8B | 9.0 |
| OpenVLA 7B | 3.4 |
| ManipLLM 7B | 1.1 |

Theirs ran on an A100, without quantisation or other acceleration. Do not compare these numbers with those above: sizes,
encoders, picture sizes and answer lengths differ; RoboMamba reads an action off one pass and a head, the others spell
it out in tokens; batch size, precision and whether 9.0 Hz is head or text are not stated; there is no Transformer of
RoboMamba's size. In the tables above sizes, encoder, precision, hardware and answer length are equal. But with a few
million parameters at batch 1 most of the time goes into calling many small operations, of which a Mamba block has more
than attention; in a model with billions of parameters this overhead is negligible.
"""


def clock(calls: dict, seconds: float, device: torch.device) -> dict:
    """Call each of {name: function} in turn for `seconds` -> {name: {"ms": median, "quartiles", "calls"}}."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = 0
    start = 0.0
    while rounds < WARM + ROUNDS or time.monotonic() - start < seconds:
        if rounds == WARM:
            start = time.monotonic()
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - begin))
        rounds += 1
    quarters = {name: np.percentile(ms[WARM:], (25, 50, 75)).round(4).tolist() for name, ms in times.items()}
    return {name: {"ms": q[1], "quartiles": [q[0], q[2]], "calls": rounds - WARM} for name, q in quarters.items()}


def generate(model: RoboMamba, h: Tensor, states: list, n: int) -> None:
    """n greedy tokens after the state h (1, D), each fed back; like RoboMamba.generate, but no token stops it."""
    backbone = model.lm.backbone
    for _ in range(n):
        token = int(model.lm.lm_head(h)[0].argmax())
        h, states = backbone.step(backbone.embedding(torch.tensor([token], device=h.device)), states)


class Subject:
    """One model on one device with a picture and a prompt: the operations to be timed, as functions."""

    def __init__(self, model: RoboMamba, device: torch.device):
        S = model.config.vision.image_size
        self.model = model.to(device)
        self.backbone = model.lm.backbone
        self.device = device
        self.picture = torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8, device=device)
        self.ids = torch.tensor([model.prompt(contact_question("open the top drawer"))], device=device)
        self.answer = len(model.encoding.encode_ordinary("37 52 05 71 93")) + 1  # tokens of a contact and the end token
        self.picture_tokens = (S // model.config.vision.patch_size) ** 2
        self.past = self.context((STEP - 1) * (self.picture_tokens + self.ids.shape[1]))  # of the closed loop
        self.past_states = self.read(self.past)[1]

    def context(self, n: int) -> Tensor:
        """(1, n, D) embeddings of random tokens."""
        return self.backbone.embedding(torch.randint(0, self.model.config.lm.vocab_size, (1, n), device=self.device))

    def read(self, x: Tensor) -> tuple[Tensor, list]:
        h, states = self.backbone(x)
        return h[:, -1], states

    def prefill(self, states: list | None = None) -> tuple[Tensor, list]:
        """Reads picture and prompt: hidden states (1, T, D) of the prompt's tokens, and the state after both."""
        h, states = self.backbone(self.model.sequence(self.picture, self.ids), states)
        return h[:, -self.ids.shape[1] :], states

    def head(self, states: list | None = None) -> None:
        h, _ = self.prefill(states)
        self.model.head(self.model.pool(h, torch.tensor([self.ids.shape[1]], device=self.device)))

    def text(self) -> None:
        h, states = self.prefill()
        generate(self.model, h[:, -1], states, self.answer - 1)  # the last token is not fed back
        self.model.lm.lm_head(h[:, -1]).argmax()

    def predictions(self) -> dict:
        """{row: function} for the first table."""
        calls = {"encoder": lambda: self.model.vision(self.picture), "head": self.head, "text": self.text}
        calls["going on"] = lambda: self.head(self.past_states)
        return calls | {"reading all again": lambda: self.head(self.read(self.past)[1])}


@torch.inference_mode()
def measure(models: dict, device: torch.device, lengths: list[int], seconds: float, tick: Callable) -> dict:
    """All times on one device. seconds: for each group of compared calls; tick: called after each group."""
    subjects = {name: Subject(model, device) for name, model in models.items()}
    calls = {(row, name): call for name, s in subjects.items() for row, call in s.predictions().items()}
    times = clock(calls, 2 * seconds, device)
    predictions = {row: {name: times[row, name] for name in subjects} for row, _ in calls}
    tick()
    contexts = []
    for n in lengths:
        reads, calls, row = {}, {}, {"tokens": n}
        for name, s in subjects.items():
            x = s.context(n)
            h, states = s.read(x)
            row[name] = {"state_bytes": sum(t.numel() * t.element_size() for state in states for t in state)}
            reads["read", name] = partial(s.read, x)
            calls["prediction", name] = partial(s.head, states)
            calls["tokens", name] = partial(generate, s.model, h, states, RUN)
        times = clock(reads, seconds / 3, device)
        tick()
        times |= clock(calls, seconds, device)
        for (what, name), value in times.items():
            row[name][what] = value
        for name in subjects:
            row[name]["token_ms"] = round(row[name]["tokens"]["ms"] / RUN, 4)
        contexts.append(row)
        tick()
    return {"predictions": predictions, "contexts": contexts}


def speed_table(results: dict) -> str:
    """Tables of `python -m extras.speed`, two a device: predictions at batch 1; the same after a context."""
    names = ("mamba", "attention")
    tokens = results["tokens"]
    named = {"text": tokens["text"], "step": results["closed_loop_step"], "past": tokens["past of the closed loop"]}
    models = [results["models"][name] for name in names]
    sizes = (f"{m['language_model']:,d} parameters in {m['blocks']} blocks" for m in models)
    lines = [
        "Language models: Mamba {}, Transformer {}; batch 1, float32, medians;".format(*sizes),
        f"a picture is {tokens['picture']} tokens, the prompt {tokens['prompt']}.",
        "",
    ]
    for device, measured in results["devices"].items():
        rows = []
        for key, label in SPEED_ROWS.items():
            ms = [measured["predictions"][key][name]["ms"] for name in names]
            times = (f"{x:.1f} ms, {1000 / x:.0f} Hz" for x in ms)
            rows.append([label.format(**named), *times, f"{ms[1] / ms[0]:.2f}x"])
        lines += [grid([device, "Mamba", "Transformer", "Transformer / Mamba"], rows), ""]
        rows = []
        for context in measured["contexts"]:
            pair = [context[name] for name in names]
            times = (f"{x['prediction']['ms']:.1f} / {x['token_ms']:.2f}" for x in pair)
            rows.append([context["tokens"], *times, *(f"{x['state_bytes'] / 1000:,.0f}" for x in pair)])
        lines += [grid(["tokens of context", *SPEED_COLUMNS], rows), ""]
    return "\n".join(lines)


@dataclass
class SpeedConfig:
    checkpoint: str = flag("data/pretrained/robomamba-tiny-rgbd", "folder of the model")
    out: str = flag("runs/speed", "folder for speed.json, speed.md and speed.png")
    seconds: float = flag(3.0, "seconds per comparison", low=0.001, high=3600)
    longest: int = flag(LENGTHS[-1], "longest context, tokens", low=LENGTHS[0], high=LENGTHS[-1])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(SpeedConfig, __doc__, argv)
    start = time.monotonic()
    lengths = [n for n in LENGTHS if n <= cfg.longest]
    mamba = RoboMamba.from_pretrained(cfg.checkpoint)
    models = {"mamba": mamba, "attention": parameter_matched(mamba)}
    devices = {"CPU, one thread": torch.device("cpu")}
    if torch.cuda.is_available():
        devices[torch.cuda.get_device_name()] = torch.device("cuda")
    total = len(devices) * (1 + 2 * len(lengths))
    done = itertools.count(1)
    tick = lambda: progress(next(done), total, start, "measurements")  # noqa: E731
    results = {"command": shlex.join(["python", "-m", "extras.speed", *argv]), **environment()}
    results |= {"checkpoint": cfg.checkpoint, "closed_loop_step": STEP, "run": RUN}
    results["models"] = {
        name: {"parameters": count(m), "language_model": count(m.lm), "blocks": len(m.lm.backbone.layers)}
        for name, m in models.items()
    }
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    subject = Subject(mamba, torch.device("cpu"))
    results["tokens"] = {"picture": subject.picture_tokens, "prompt": subject.ids.shape[1], "text": subject.answer}
    results["tokens"]["past of the closed loop"] = subject.past.shape[1]
    results["devices"] = {name: measure(models, device, lengths, cfg.seconds, tick) for name, device in devices.items()}
    torch.set_num_threads(threads)
    results["seconds"] = round(time.monotonic() - start, 1)
    out = Path(cfg.out)
    table = speed_table(results)
    write_json(out / "speed.json", results)
    write_text(out / "speed.md", f"{table}\n{SPEED_NOTES}")
    panels = {}  # title: {model: [(tokens of context, value), ..]}
    for device, measured in results["devices"].items():
        for title, value in (
            (f"a prediction, ms ({device})", lambda v: v["prediction"]["ms"]),
            (f"a generated token, ms ({device})", lambda v: v["token_ms"]),
            ("state, kB", lambda v: v["state_bytes"] / 1000),
        ):
            rows = measured["contexts"]
            panels[title] = {name: [(row["tokens"], value(row[name])) for row in rows] for name in models}
    write_atomically(out / "speed.png", lambda tmp: draw_lines(panels).save(tmp, "PNG"))
    print(f"\n{table}\nWritten: {out}/speed.json, .md, .png")


if __name__ == "__main__":
    run_main(main)
