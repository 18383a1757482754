"""What the scripts share besides the science: flags, errors, progress, metrics, checkpoints, processes.

    cfg = cli(Config, __doc__)             every field of a dataclass is a flag; booleans are --x / --no-x
    run_main(main)                         bad input and Ctrl-C end with one line, exit codes 2 and 130
    processes = Processes(cfg.device)      one process, or one of several under torchrun
    run = Run(cfg, processes, total)   OUT/metrics.csv, one updating line, OUT/checkpoint.pt, --resume, OUT/curves.png
    for job, result in parallel(...)       a pool of workers

Exact resume needs no saved random state: whatever is random at step i is drawn from a generator seeded by (seed, i).
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from common.files import write_atomically, write_text

# ---- flags and errors ------------------------------------------------------------------------------------------------


def flag(default, help: str, low: float | None = None, high: float | None = None, choices: tuple = ()):
    """A field of a config dataclass with its help text and the values it may have (low and high included)."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def check_flags(cfg) -> None:
    """Raises: ValueError naming the first flag outside its range."""
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), "--" + field.name.replace("_", "-")
        low, high = field.metadata.get("low"), field.metadata.get("high")
        choices = field.metadata.get("choices")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {value}: must be a finite number")
        if low is not None and value < low:
            raise ValueError(f"{name} {value}: must be at least {low}")
        if high is not None and value > high:
            raise ValueError(f"{name} {value}: must be at most {high}")
        if choices and value not in choices:
            raise ValueError(f"{name} {value}: expected one of {', '.join(choices)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the flags)")


def cli(config_class, doc: str, argv: list[str] | None = None):
    """Flags from a dataclass made of `flag(..)` fields; `doc` is the script's docstring. Raises: ValueError."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = _Parser(description=doc.split("\n\n")[0], formatter_class=style, allow_abbrev=False)
    for field in dataclasses.fields(config_class):
        name, note = "--" + field.name.replace("_", "-"), field.metadata.get("help", "").replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=note)
        else:
            parser.add_argument(name, type=type(field.default), default=field.default, help=note)
    cfg = config_class(**vars(parser.parse_args(argv)))
    check_flags(cfg)
    return cfg


def run_main(main: Callable, hint: str = "") -> None:
    """Run a script's `main` and exit with what it returns (None = 0).

    ValueError, OSError and FloatingPointError are bad input: their message on one line, exit 2. Ctrl-C: one line, exit
    130. hint: what to do after Ctrl-C, such as "--resume goes on from the last checkpoint".
    """
    try:
        code = main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\nstopped" + (f"; {hint}" if hint else ""), file=sys.stderr)
        code = 130
    sys.exit(code)


# ---- workers ---------------------------------------------------------------------------------------------------------


def pin_to_core(index: int) -> None:
    """Keep this process on one core (Linux). Left alone, two busy processes may share one core while another idles."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


def end_with_parent() -> None:
    """End this process when its parent does: a killed parent would leave its workers waiting for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def start_worker(counter, setup: Callable | None = None, arguments: tuple = ()) -> None:
    """First thing in a process of a pool: a core of its own, Ctrl-C left to the parent, an end with the parent."""
    with counter.get_lock():
        pin_to_core(counter.value)
        counter.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if setup is not None:
        setup(*arguments)


def parallel(
    function: Callable, jobs: Iterable, workers: int, setup: Callable | None = None, arguments: tuple = ()
) -> Iterator[tuple]:
    """Yield (job, function(job)) as they are done, in `workers` fresh processes.

    Args: jobs: hashable. setup(*arguments): called once in every worker, before its first job.
    Raises: BrokenProcessPool when workers die twice; after the first death the unfinished jobs are run once more.
    """
    left, died = dict.fromkeys(jobs), False
    while left:
        spawn = multiprocessing.get_context("spawn")
        count = min(workers, len(left))
        pool = ProcessPoolExecutor(count, spawn, start_worker, (spawn.Value("i", 0), setup, arguments))
        try:
            futures = {pool.submit(function, job): job for job in left}
            for future in as_completed(futures):
                result = future.result()
                del left[futures[future]]
                yield futures[future], result
        except BrokenProcessPool:
            if died:
                raise
            died = True
            print(f"\na worker process died; {len(left)} unfinished jobs are run again", file=sys.stderr)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # what is being worked on is finished and kept


# ---- where and how ---------------------------------------------------------------------------------------------------


def progress(done: int, total: int, start: float, what: str = "scenes") -> None:
    """One updating line of `what` is done, with rate and time left; where it cannot update, one line every tenth."""
    rate = done / max(time.monotonic() - start, 1e-9)
    line = f"{what} {done}/{total}  {rate:.1f}/s  {(total - done) / max(rate, 1e-9):.0f} s left"
    if sys.stdout.isatty():
        print(f"\r{line:60s}", end="\n" if done == total else "", flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(line, flush=True)


def commit() -> str | None:
    """Short hash of this repository's commit; None outside of git."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> str:
    """The processor's name and the number of cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text() + "\nmodel name: " + name)[1]
    return f"{name}, {os.cpu_count()} cores"


def environment() -> dict:
    """What a committed result says of the machine it was made on: commit, hardware, versions."""
    names = ("torch", "numpy", "pybullet")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"commit": commit(), "hardware": hardware(), "versions": versions}


class Processes:
    """This process among its peers. Alone unless started by torchrun; then gloo on CPUs, nccl on GPUs."""

    def __init__(self, device: str = "auto"):
        import torch

        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and self.size > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(device)
        if self.size > 1 and self.device.type == "cpu":
            pin_to_core(int(os.environ.get("LOCAL_RANK", 0)))
        if self.size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wrap(self, module):
        """PyTorch's own data parallel when there are several processes."""
        import torch

        return torch.nn.parallel.DistributedDataParallel(module) if self.size > 1 else module

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each number over all processes."""
        import torch

        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return (total / self.size).tolist()

    def barrier(self) -> None:
        import torch

        if self.size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        import torch

        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def cosine(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def rows_of_step(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Which of n records step `step` trains on: pass after pass in fresh order, a function of (seed, step) alone."""
    out = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, k = divmod(position, n)
        out.append(_permutation(seed, epoch, n)[k])
    return np.array(out)


_permutations: dict = {}


def _permutation(seed, epoch, n):
    key = (seed, epoch, n)
    if key not in _permutations:
        for old in [k for k in _permutations if k[0] == seed and k[2] == n and k[1] < epoch - 1]:
            del _permutations[old]
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(n)
    return _permutations[key]


class Run:
    """Metrics, progress line and checkpoints of one training run in folder cfg.out. Only the first process writes."""

    def __init__(self, cfg, processes: Processes, total: int, log_every: int = 20):
        self.out, self.processes, self.total, self.log_every = Path(cfg.out), processes, total, log_every
        self.cfg, self.start_step, self.start_time, self.before = cfg, 0, time.monotonic(), 0.0
        self.averages: dict[str, list[float]] = {}
        if processes.first:
            settings = dataclasses.asdict(cfg) | {"command": " ".join(sys.argv)}
            write_text(self.out / "run.json", json.dumps(settings, indent=1) + "\n")

    # -- checkpoints

    def settings(self) -> dict:
        """What a resumed run must share with the interrupted one: all but where it runs and how often it reports."""
        free = ("out", "resume", "device", "save_every")
        return {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in free}

    def save(self, step: int, modules, optimizer) -> None:
        """Everything that the next step depends on, in one file that appears whole or not at all."""
        import torch

        if self.processes.first:
            state = {"step": step, "modules": [m.state_dict() for m in modules], "optimizer": optimizer.state_dict()}
            state |= {"settings": self.settings(), "averages": self.averages}
            state["seconds"] = self.before + time.monotonic() - self.start_time
            write_atomically(self.out / "checkpoint.pt", lambda tmp: torch.save(state, tmp))
        self.processes.barrier()

    def resume(self, modules, optimizer) -> int:
        """Load OUT/checkpoint.pt if it is there; returns the first step still to do. metrics.csv is cut back to it.

        Raises: ValueError naming the first setting that is not what the interrupted run had.
        """
        import torch

        path = self.out / "checkpoint.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.processes.device, weights_only=True)
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                was = state["settings"].get(name)
                raise ValueError(f"{path}: --{name.replace('_', '-')} was {was!r}, now {value!r}; name another --out")
        for module, values in zip(modules, state["modules"], strict=True):
            module.load_state_dict(values)
        optimizer.load_state_dict(state["optimizer"])
        self.before, self.start_step = state["seconds"], state["step"]
        self.averages = state.get("averages", {})  # what was logged since the last row
        if self.processes.first and (self.out / "metrics.csv").exists():
            with open(self.out / "metrics.csv", newline="") as file:
                rows = [r for r in csv.reader(file) if r and (r[0] == "step" or int(r[0]) <= state["step"])]
            write_text(self.out / "metrics.csv", "".join(",".join(row) + "\n" for row in rows))
        return state["step"]

    def finish(self) -> None:
        """The run is complete: draw OUT/curves.png; the checkpoint, and what kills left half written, can go."""
        if self.processes.first:
            if (self.out / "metrics.csv").exists():
                from common.plots import draw_curves_file

                draw_curves_file(self.out / "metrics.csv", self.out / "curves.png")
            for path in (*self.out.glob("*.tmp*"), self.out / "checkpoint.pt"):
                path.unlink(missing_ok=True)
            print(flush=True)

    # -- metrics

    def log(self, step: int, **values: float) -> None:
        """Collect; every `log_every` steps write the means to metrics.csv and refresh the line. `step`: steps done."""
        for key, value in values.items():
            self.averages.setdefault(key, []).append(float(value))
        if step % self.log_every and step != self.total:
            return
        means = {k: sum(v) / len(v) for k, v in self.averages.items()}
        self.averages = {}
        self.write(step, **means)
        seconds = time.monotonic() - self.start_time
        rate = (step - self.start_step) / max(seconds, 1e-9)
        text = f"step {step}/{self.total}  " + "  ".join(f"{k} {v:.4g}" for k, v in means.items())
        self.say(
            f"{text}  {rate:.2f} steps/s  {(self.total - step) / max(rate, 1e-9) / 60:.1f} min left",
            end="\r" if sys.stdout.isatty() else "\n",
        )

    def say(self, text: str, end: str = "\n") -> None:
        if self.processes.first:
            print(f"{text:110s}", end=end, flush=True)

    def write(self, step: int, **values: float) -> None:
        """Append one row a value to metrics.csv: step, seconds, name, value."""
        if not self.processes.first:
            return
        path = self.out / "metrics.csv"
        new = not path.exists() or (step <= self.log_every and self.start_step == 0 and not hasattr(self, "_opened"))
        self._opened = True
        with open(path, "w" if new else "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "seconds", "name", "value"])
            seconds = f"{self.before + time.monotonic() - self.start_time:.1f}"
            writer.writerows([step, seconds, k, f"{v:.6g}"] for k, v in values.items())


def stop_on_nan(step: int, loss, named_parameters) -> None:
    """Raise FloatingPointError naming the step and the first parameter (or its gradient) that is not finite."""
    import torch

    if torch.isfinite(loss):
        return
    for name, p in named_parameters:
        for what, value in (("", p), (".grad", p.grad)):
            if value is not None and not torch.isfinite(value).all():
                raise FloatingPointError(
                    f"step {step}: loss is {loss.item()}; first bad tensor {name}{what}; lower --lr or look at the data"
                )
    raise FloatingPointError(
        f"step {step}: loss is {loss.item()} while all parameters are finite; look at the batch of this step"
    )


def digest(module) -> str:
    """A fingerprint of every bit of a module's weights."""
    h = hashlib.sha256()
    for name, p in sorted(module.state_dict().items()):
        h.update(name.encode() + p.detach().float().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()
