"""Shared by all scripts: flags, one-line errors, workers, progress. Does not load torch.

    cfg = cli(Config, __doc__)         every field of a dataclass is a flag
    run_main(main)                     bad input and Ctrl-C end with one line, exit codes 2 and 130
    for job, result in parallel(...)   a pool of workers

What only training needs is in common/training.py.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
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

# ---- flags and errors ------------------------------------------------------------------------------------------------


def flag(default, help: str, low: float | None = None, high: float | None = None, choices: tuple = ()):
    """A field of a config dataclass with its help text and the values it may have (low and high included)."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def check_flags(cfg) -> None:
    """Raises: ValueError naming the first flag outside its range."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        said = f"{flag_name(field)} {value}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{said}: must be a finite number")
        if low is not None and value < low:
            raise ValueError(f"{said}: must be at least {low}")
        if high is not None and value > high:
            raise ValueError(f"{said}: must be at most {high}")
        if choices and value not in choices:
            raise ValueError(f"{said}: expected one of {', '.join(choices)}")


def flag_name(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def listed(name: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b"). Raises: ValueError for a name that is not known."""
    names = tuple(word.strip() for word in text.split(",") if word.strip())
    if unknown := [word for word in names if word not in known]:
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    return names


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the flags)")


def cli(config_class, doc: str, argv: list[str] | None = None, recipes: dict[str, dict] | None = None):
    """Flags from a dataclass made of `flag(..)` fields; booleans are --x / --no-x.

    Args: doc: the script's docstring; its first paragraph is the description. recipes: {value of the first field:
        {field: default}}, so that `--stage align` alone selects a whole recipe; --help shows that stage's defaults.
    Raises: ValueError for an unknown flag or a value outside its range.
    """
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = _Parser(description=doc.split("\n\n")[0], formatter_class=style, allow_abbrev=False)
    fields = dataclasses.fields(config_class)
    for field in fields:
        kind = {"type": type(field.default)}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        note = field.metadata["help"].replace("%", "%%")
        parser.add_argument(flag_name(field), default=field.default, help=note, **kind)
    if recipes:
        first = _Parser(add_help=False, allow_abbrev=False)
        first.add_argument(flag_name(fields[0]), default=fields[0].default)
        chosen = getattr(first.parse_known_args(argv)[0], fields[0].name)
        parser.set_defaults(**recipes.get(chosen, {}))
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
    """End this process when its parent does: a killed parent would leave its workers waiting or working for ever."""
    parent = multiprocessing.parent_process()
    launcher = os.getppid()

    def watch() -> None:
        if parent is not None:  # started by multiprocessing: join returns even if it ended before this call
            parent.join()
        while parent is None and os.getppid() == launcher:  # started by torchrun
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker(counter, setup: Callable | None = None, arguments: tuple = ()) -> None:
    """Initialise a pool worker: pin it to its own core, leave Ctrl-C to the parent, and end when the parent ends."""
    with counter.get_lock():
        pin_to_core(counter.value)
        counter.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if setup is not None:
        setup(*arguments)


def parallel(function: Callable, jobs: Iterable, workers: int, setup=None, arguments: tuple = ()) -> Iterator[tuple]:
    """Yield (job, function(job)) as jobs finish in `workers` fresh processes.

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
            pool.shutdown(wait=True, cancel_futures=True)  # jobs in progress are finished and kept


# ---- where and how ---------------------------------------------------------------------------------------------------


def progress(done: int, total: int, start: float, what: str = "scenes") -> None:
    """One updating line: `what` done so far, rate and time left; if it cannot update, one line every tenth."""
    rate = done / max(time.monotonic() - start, 1e-9)
    line = f"{what} {done}/{total}  {rate:.1f}/s  {(total - done) / max(rate, 1e-9):.0f} s left"
    if sys.stdout.isatty():
        print(f"\r{line:60s}", end="\n" if done == total else "", flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(line, flush=True)


def environment() -> dict:
    """What a committed result records about where it was made: commit (None outside of git), hardware, versions."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text() + "\nmodel name: " + cpu)[1]
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "pybullet"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"commit": commit, "hardware": f"{cpu}, {os.cpu_count()} cores", "versions": versions}
