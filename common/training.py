"""Shared by the training scripts: processes, freezing, checkpoints and metrics of a run, and stopping on a NaN.

    processes = Processes(cfg.device)       one process, or one of several under torchrun
    for batch in processes.ahead(make, range(n)):   make(0), make(1), ..; with --workers made in advance
    frozen = freeze(model, ("projector",))  .. check_frozen(model, frozen): no bit of the other parts may have changed
    with Run(cfg, processes, total) as run: OUT is locked for this run
        first = run.begin()                 run.json, metrics.csv; with --resume the step to resume from
        run.load(modules, optimizer)        OUT/checkpoint.pt, if the run resumes from one
        run.log(step, loss=..)              metrics.csv and one updating line
        run.save(step, modules, optimizer)
        run.finish()                        OUT/curves.png; deletes the checkpoint

Exact resume needs no saved random state: whatever is random at step i is drawn from a generator seeded by (seed, i).
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.files import write_atomically, write_json, write_text
from common.scripts import end_with_parent, pin_to_core

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder go unnoticed
    fcntl = None

PARTS = ("vision", "projector", "lm", "head", "point")  # of RoboMamba; a stage trains or freezes each


class Processes:
    """This process among its peers. Alone unless started by torchrun; then gloo on CPUs, nccl on GPUs."""

    def __init__(self, device: str = "auto", workers: int = 0):
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError(f"--workers {workers}: this system does not fork processes; leave it at 0")
        self.workers = workers
        self.rank = int(os.environ.get("RANK", 0))
        self.first = self.rank == 0
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no GPU that torch can use")
        self.device = torch.device(f"cuda:{local}" if device == "cuda" and self.size > 1 else device)
        if self.size == 1:
            return
        end_with_parent()
        if self.device.type == "cpu":
            pin_to_core(local)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap `module` in PyTorch's own data parallel if there are several processes."""
        return nn.parallel.DistributedDataParallel(module) if self.size > 1 else module

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each number over all processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return (total / self.size).tolist()

    def first_says(self, value: bool) -> bool:
        """The first process's value, broadcast so that all processes take the same branch."""
        return self.mean([float(value and self.first)])[0] > 0

    def gather(self, x: Tensor) -> Tensor:
        """(n, ..) of each process, equal shapes -> (size * n, ..) in the order of ranks."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def ahead(self, make: Callable[[int], Any], numbers: range) -> Iterable:
        """make(n) for each n in order; with workers, that many extra processes make the next ones in advance.

        Raises: whatever `make` raises, when its turn comes. `make` must return tensors, or tuples of them.
        """
        if not self.workers or len(numbers) < 2:
            return map(make, numbers)
        how = dict(batch_size=None, num_workers=self.workers, multiprocessing_context="fork")
        return map(_raised, torch.utils.data.DataLoader(numbers, collate_fn=functools.partial(_caught, make), **how))

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _caught(make: Callable[[int], Any], n: int):
    """make(n), or the error it raised, which DataLoader would hide in a traceback."""
    try:
        return make(n)
    except Exception as error:
        return error


def _raised(item):
    if isinstance(item, Exception):
        raise item
    return item


# ---- what a step is --------------------------------------------------------------------------------------------------


def cosine(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Fraction of the peak learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@functools.lru_cache(maxsize=2)
def order_of_pass(seed: int, number: int, n: int) -> np.ndarray:
    """The order in which pass `number` over n records visits them."""
    return np.random.default_rng([seed, number]).permutation(n)


def rows_of_step(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Which of n records step `step` trains on: each pass in a fresh order, a function of (seed, step) alone."""
    places = (divmod(position, n) for position in range(step * batch, (step + 1) * batch))
    return np.array([order_of_pass(seed, number, n)[k] for number, k in places])


def stop_on_nan(step: int, loss: Tensor, module: nn.Module) -> None:
    """Raise FloatingPointError naming the step and the tensor at fault when the loss is not finite.

    Weights are checked first, frozen ones included, then gradients: a bad weight makes bad gradients everywhere.
    """
    if torch.isfinite(loss):
        return
    tensors = [*module.named_parameters(), *module.named_buffers()]
    tensors += [(f"{name}.grad", p.grad) for name, p in module.named_parameters() if p.grad is not None]
    bad = next((name for name, tensor in tensors if not torch.isfinite(tensor).all()), None)
    cause = f"first bad tensor {bad}; lower --lr or look at the data"
    if bad is None:
        cause = "all parameters are finite; look at the batch of this step"
    raise FloatingPointError(f"step {step}: loss is {loss.item()}; {cause}")


# ---- freezing --------------------------------------------------------------------------------------------------------


def digest(module: nn.Module) -> str:
    """A fingerprint of every bit of a module's weights."""
    h = hashlib.sha256()
    for name, p in sorted(module.state_dict().items()):
        h.update(name.encode() + p.detach().float().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that this model has."""
    return {name: getattr(model, name) for name in PARTS if getattr(model, name) is not None}


def freeze(model: nn.Module, trained: tuple) -> dict[str, str]:
    """Only the parts in `trained` require gradients; returns {frozen part: its digest} for check_frozen."""
    for name, part in parts_of(model).items():
        part.requires_grad_(name in trained)
    return {name: digest(part) for name, part in parts_of(model).items() if name not in trained}


def check_frozen(model: nn.Module, frozen: dict[str, str]) -> None:
    """Raises: RuntimeError when a frozen part has changed by a single bit."""
    for name, before in frozen.items():
        if digest(getattr(model, name)) != before:
            raise RuntimeError(f"{name} was frozen but has changed")


# ---- a run -----------------------------------------------------------------------------------------------------------


def finished(out: Path, last_file: str) -> bool:
    """Is there nothing left to --resume in OUT? `last_file` is written at the end, when the checkpoint is deleted."""
    there = (out / last_file).exists() and not (out / "checkpoint.pt").exists()
    if there:
        print(f"{out / last_file} is there and no checkpoint.pt: this run has finished; remove {out} to train again")
    return there


class Run:
    """One training run in folder cfg.out: its lock, metrics, checkpoint. Only the first process writes.

    A context manager: two runs in one folder would mix their files, so OUT is locked until the block ends. The lock
    belongs to the process, not to the file, so a kill releases it.
    Raises: ValueError if another run has locked OUT, or OUT cannot be written.
    """

    FREE = ("out", "resume", "device", "workers", "cache")  # settings that a resumed run may change

    def __init__(self, cfg, processes: Processes, total: int, log_every: int = 20):
        self.cfg = cfg
        self.settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in self.FREE}
        self.out = Path(cfg.out)
        self.processes = processes
        self.total = total
        self.log_every = log_every
        self.averages: dict[str, list[float]] = {}  # logged since the last row
        self.answers: list[str] = []  # rows of OUT/answers.md
        self.loaded: dict = {}  # the checkpoint this run resumes from
        self.first_step = 0
        self.start_time = time.monotonic()

    def __enter__(self) -> "Run":
        self.lock = self._take_lock() if self.processes.first else None
        return self

    def __exit__(self, *error) -> None:
        if self.lock:
            if not fcntl:  # Windows removes no open file
                self.lock.close()
            (self.out / "run.lock").unlink(missing_ok=True)
            self.lock.close()
        if error[0] is None:  # otherwise the others still wait for this one; torchrun ends them
            self.processes.close()

    def _take_lock(self):
        path = self.out / "run.lock"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            file.close()
            raise ValueError(f"--out {self.out}: process {owner} is training into it; wait, or name another") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def begin(self) -> int:
        """Call once all input is checked: writes run.json and returns the first step to do.

        With --resume, that is the step of OUT/checkpoint.pt, if there is one; anything logged later is removed.
        Raises: ValueError for an unreadable checkpoint, or naming the first setting that differs from its run's.
        """
        path = self.out / "checkpoint.pt"
        if self.cfg.resume and path.exists():
            self.loaded = self._read_checkpoint(path)
            self.first_step = self.loaded["step"]
            self.averages = self.loaded["averages"]
            self.answers = self.loaded["answers"]
            self.start_time = time.monotonic() - self.loaded["seconds"]
        self.started = time.monotonic()
        if self.processes.first:
            write_json(self.out / "run.json", dataclasses.asdict(self.cfg) | {"command": " ".join(sys.argv)})
            self._cut_metrics()
            self._write_answers()
        return self.first_step

    def _read_checkpoint(self, path: Path) -> dict:
        try:
            state = torch.load(path, map_location=self.processes.device, weights_only=True)
            was = state["settings"]
        except Exception as error:  # a truncated or damaged file makes torch.load raise nearly anything
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"{path}: cannot be read ({reason}); remove it to start from the beginning") from None
        for name, value in self.settings.items():
            if was.get(name) != value:
                flag = name.replace("_", "-")
                raise ValueError(f"{path}: --{flag} was {was.get(name)!r}, now {value!r}; name another --out")
        return state

    def load(self, modules: list[nn.Module], optimizer) -> None:
        """Load the checkpoint, if there is one, into modules and optimizer."""
        if self.loaded:
            for module, values in zip(modules, self.loaded["modules"], strict=True):
                module.load_state_dict(values)
            optimizer.load_state_dict(self.loaded["optimizer"])
        self.loaded = {}

    def save(self, step: int, modules: list[nn.Module], optimizer) -> None:
        """Save everything that the next step depends on, in one file that appears whole or not at all."""
        if self.processes.first:
            state = {"step": step, "modules": [m.state_dict() for m in modules], "optimizer": optimizer.state_dict()}
            state |= {"settings": self.settings, "averages": self.averages, "answers": self.answers}
            state["seconds"] = time.monotonic() - self.start_time
            write_atomically(self.out / "checkpoint.pt", lambda tmp: torch.save(state, tmp))
        self.processes.barrier()

    def finish(self) -> None:
        """The run is complete: draw OUT/curves.png, delete the checkpoint and files that kills left half written."""
        if self.processes.first:
            from common.plots import draw_curves_file  # imported here: models and data are used without plots

            draw_curves_file(self.out / "metrics.csv", self.out / "curves.png")
            for path in (*self.out.glob("*.tmp*"), self.out / "checkpoint.pt"):
                path.unlink(missing_ok=True)
            print(flush=True)

    def log(self, step: int, **values: float) -> None:
        """Collect values; every `log_every` steps write means to metrics.csv and refresh the line. step: steps done."""
        for key, value in values.items():
            self.averages.setdefault(key, []).append(float(value))
        if step % self.log_every and step != self.total:
            return
        means = {key: sum(v) / len(v) for key, v in self.averages.items()}
        self.averages = {}
        self.write(step, **means)
        rate = (step - self.first_step) / max(time.monotonic() - self.started, 1e-9)
        minutes = (self.total - step) / max(rate, 1e-9) / 60
        text = f"step {step}/{self.total}  " + "  ".join(f"{k} {v:.4g}" for k, v in means.items())
        end = "\r" if sys.stdout.isatty() else "\n"
        self.say(f"{text}  {rate:.2f} steps/s  {minutes:.1f} min left", end)

    def say(self, text: str, end: str = "\n") -> None:
        if self.processes.first:
            print(f"{text:110s}", end=end, flush=True)

    def write(self, step: int, **values: float) -> None:
        """Append one row per value to metrics.csv: step, seconds, name, value."""
        if not self.processes.first:
            return
        seconds = f"{time.monotonic() - self.start_time:.1f}"
        path = self.out / "metrics.csv"
        try:
            with open(path, "a", newline="") as file:
                file.writelines(f"{step},{seconds},{name},{value:.6g}\n" for name, value in values.items())
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None

    def _cut_metrics(self) -> None:
        """Keep the header and the rows up to the step this run resumes from; a killed run may have left half a row."""
        path = self.out / "metrics.csv"
        rows = [["step", "seconds", "name", "value"]]
        if self.first_step:
            with contextlib.suppress(FileNotFoundError), open(path, newline="") as file:
                rows += [r for r in csv.reader(file) if len(r) == 4 and r[0].isdigit() and int(r[0]) <= self.first_step]
        write_text(path, "".join(",".join(row) + "\n" for row in rows))

    def add_answers(self, step: int, rows: list[tuple[str, ...]]) -> None:
        """Rows (picture, question, model, truth) for OUT/answers.md, so that people can watch the model learn."""
        for row in rows:
            cells = [" ".join(text.split()).replace("|", "\\|") for text in row]
            self.say("  {1}  model: {2}  truth: {3}".format(*cells))
            self.answers.append(f"| {step} | {' | '.join(cells)} |")
        self._write_answers()

    def _write_answers(self) -> None:
        path = self.out / "answers.md"
        path.unlink(missing_ok=True)
        if self.answers:
            head = ["| step | picture | question | model | truth |", "| --- " * 5 + "|"]
            write_text(path, "\n".join([*head, *self.answers, ""]))
