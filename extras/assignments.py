"""Assignment mode, for teachers: eight exercises, a student's tree without their solutions, a grader.

    python -m extras.assignments --student OUT                     # this repository, solutions left out
    python -m extras.assignments --student OUT --exercises 1,2,3   # the others stay solved
    python -m extras.assignments --grade TREE [TREE ..]            # points per exercise; also to score.json

A solution stands between two comment lines, `# exercise N: what` and `# end of exercise N`; an exercise may have
several such places. In the student's tree NotImplementedError stands there; docstrings, tests and all else stay. Files
that give answers away are left out (TEACHER_ONLY). Students run `pytest -m exN`.

The grader runs `pytest -m exN` with ITS OWN copy of tests/test_exercises.py, no conftest and no plugins; of the tree's
tests it uses adapters.py alone. Data comes from another seed than the student's (--seed, kept in the score). An
exercise gives its points in proportion to its passed tests. Each runs in a process of its own, stopped after --seconds
of CPU time or ten times that on the clock, so a syntax error, a crash or an endless loop costs only the exercises that
it touches. It is no sandbox: a student's code may do all that the teacher's account may, so grade strangers in a
container. Linux and macOS.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from common.files import write_text

ROOT = Path(__file__).parent.parent
EXERCISES = {  # in teaching order: title, points
    1: ("discretisation", 10),
    2: ("the reference scan", 10),
    3: ("the chunked scan", 15),
    4: ("step", 10),
    5: ("the Mamba block", 20),
    6: ("loss mask and packing of a conversation", 15),
    7: ("6D rotation and geodesic loss", 10),
    8: ("back-projection of a pixel", 10),
}
SHIPPED = (
    "*.py",
    "*.md",
    "*.toml",
    "*.txt",
    "*.cff",
    "LICENSE",
    "Makefile",
    ".gitignore",
    ".ci/*",
    "data/*.*",
    "sim/*.*",
    "common/*.*",
    "extras/*.*",
)
SHIPPED += ("data/figures/*", "data/pretrained/**/*", "data/results/*", "tests/*.py")
TEACHER_ONLY = {
    "tests/test_assignments.py": "holds the wrong answers",
    "tests/test_scan.py": "writes the recurrence out, and its bugs",
}
PRELOAD = (
    "pytest",
    "torch",
    "PIL.Image",
    "safetensors.torch",
    "tiktoken",
    "regex",
)  # once, not in each process of the grader
BEGIN, END = re.compile(r"( *)# exercise (\d+): (.+)"), re.compile(r" *# end of exercise (\d+)")


# ---- a student's tree ------------------------------------------------------------------------------------------------


def solutions(text: str, file: str) -> list[tuple[int, int, int]]:
    """(exercise, first line, line after the last), counted from 0, of every marked solution; markers not included.

    Raises: ValueError naming the file and line of a marker without its partner, or of an unknown exercise.
    """
    found, open_at = [], None  # (exercise, line)
    for i, line in enumerate(text.splitlines()):
        begin, end = BEGIN.fullmatch(line), END.fullmatch(line)
        number = int((begin and begin[2]) or (end and end[1]) or 0)
        if (begin and (open_at or number not in EXERCISES)) or (end and (not open_at or open_at[0] != number)):
            raise ValueError(f"{file}:{i + 1}: {line.strip()!r} has no partner, or there is no such exercise")
        if end:
            found.append((number, open_at[1] + 1, i))
        open_at = (number, i) if begin else None if end else open_at
    if open_at:
        raise ValueError(f"{file}:{open_at[1] + 1}: exercise {open_at[0]} has no `# end of exercise {open_at[0]}`")
    return found


def stub(text: str, file: str, exercises=tuple(EXERCISES)) -> str:
    """A source file with the marked solutions of `exercises` replaced by NotImplementedError."""
    lines = text.splitlines()
    for number, first, end in reversed(solutions(text, file)):
        if number in exercises:
            indent, _, what = BEGIN.fullmatch(lines[first - 1]).groups()
            error = f'raise NotImplementedError("exercise {number}, {what}: {file}")'
            lines[first:end] = [indent + error]
    return "\n".join(lines) + "\n"


def write_student(out, exercises=tuple(EXERCISES)) -> dict[int, list[str]]:
    """Write a student's tree to the new folder `out`, whole or not at all; returns where each exercise is to be done.

    Raises: ValueError where `out` exists, or an exercise is marked nowhere.
    """
    out, places = Path(out), {}
    if out.exists():
        raise ValueError(f"{out}: exists; name a new folder")
    partial = Path(f"{out}.tmp{os.getpid()}")
    try:
        for path in sorted({path for pattern in SHIPPED for path in ROOT.glob(pattern) if path.is_file()}):
            file = path.relative_to(ROOT).as_posix()
            if file in TEACHER_ONLY:
                continue
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, partial / file)
            if path.suffix == ".py":
                text = stub(path.read_text(), file, exercises)
                for number, first, _ in solutions(text, file):
                    if number in exercises:
                        places.setdefault(number, []).append(f"{file}:{first + 1}")
                (partial / file).write_text(text)
        missing = [number for number in exercises if number not in places]
        if missing:
            raise ValueError(f"{ROOT}: no marked solution of exercise {missing[0]}")
        partial.rename(out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dict(sorted(places.items()))


# ---- the grader ------------------------------------------------------------------------------------------------------


class Record:
    """A pytest plugin: one JSON line for all that happens, so that a process which dies leaves what it knew."""

    def __init__(self, path: Path):
        self.file = open(path, "a", buffering=1)

    def pytest_sessionstart(self):  # not before: pytest itself is loaded from where its bytecode is
        sys.pycache_prefix = str(Path(self.file.name).parent / "bytecode")  # nothing is written into the tree

    def note(self, **event):
        self.file.write(json.dumps(event) + "\n")

    def pytest_collection_finish(self, session):
        self.note(collected=[item.name for item in session.items])

    def pytest_collectreport(self, report):
        if report.failed:
            lines = [line[1:].strip() for line in str(report.longrepr).splitlines() if line.startswith("E")]
            self.note(error=" ".join(lines)[-500:])

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = " ".join((crash.message if crash else str(report.longrepr or "")).split())
            message = re.sub(r"^AssertionError: |^Failed: ", "", message)[:500]
            if crash and Path(crash.path).name != "test_exercises.py":
                message += f" ({os.path.relpath(crash.path)}:{crash.lineno})"
            self.note(test=report.nodeid.split("::")[-1], passed=report.outcome == "passed", message=message)

    def pytest_sessionfinish(self):
        self.note(finished=True)


def _run_pytest(tree: Path, exercise: int, seed: int, folder: Path) -> None:
    """In a process of its own: `pytest -m exN` on `folder`/test_exercises.py with the code of `tree`."""
    import pytest
    import torch

    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    gc.freeze()  # what is loaded already need not be looked through again; that is half of a run's time
    torch.set_num_threads(1)
    for name in [name for name in sys.modules if name.split(".")[0] in ("data", "sim", "common", "extras")]:
        del sys.modules[name]  # ours; the tree has its own
    # What the tree lacks must not come from us: neither by a path, nor by pip's finder of an editable installation.
    sys.path[:] = [str(tree / "tests"), str(tree), *(p for p in sys.path if not Path(p, "selective_scan.py").exists())]
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
    os.environ |= {"EXERCISE_SEED": str(seed), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    os.chdir(tree)
    options = ["--noconftest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "-p", "no:cacheprovider"]
    options += ["-q", "--tb=short", "-m", f"ex{exercise}", str(folder / "test_exercises.py")]
    pytest.main(options, plugins=[Record(folder / f"ex{exercise}.jsonl")])


def _in_a_process(seconds: int, function, *args) -> str:
    """Run `function` in a fork of this process; how it ended: "" by itself, else why not."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)  # so that it can be stopped with all that it starts
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # its own time: others may be busy too
        with contextlib.suppress(BaseException):
            function(*args)
        os._exit(0)
    code, end = None, time.monotonic() + 10 * seconds
    try:
        while code is None and time.monotonic() < end:
            time.sleep(0.01)
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
    finally:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        if code is None:
            os.waitpid(child, 0)
    if code in (None, -signal.SIGXCPU):
        return f"was stopped after {seconds} s"
    return "" if code == 0 else f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def grade_exercise(tree: Path, exercise: int, seed: int, seconds: int, folder: Path) -> dict:
    """One exercise: {points, max_points, title, passed: [test], failed: {test: message}, message}."""
    ended = _in_a_process(seconds, _run_pytest, tree, exercise, seed, folder)
    record, events = folder / f"ex{exercise}.jsonl", []
    for line in record.read_text().splitlines() if record.exists() else ():
        with contextlib.suppress(ValueError):  # the last line of a process that was stopped
            events.append(json.loads(line))
    tests = next((e["collected"] for e in events if "collected" in e), [])
    results = {e["test"]: e for e in events if "test" in e}
    message = next((e["error"] for e in events if "error" in e), "")
    if not any("finished" in e for e in events):
        running = next((test for test in tests if test not in results), "loading the tests")
        message = f"the process {ended or 'ended by itself'} in {running}"
    passed = [test for test in tests if test in results and results[test]["passed"]]
    failed = {test: results[test]["message"] if test in results else "not run" for test in tests if test not in passed}
    title, most = EXERCISES[exercise]
    points = round(most * len(passed) / len(tests), 1) if tests else 0.0
    score = {"points": points, "max_points": most, "title": title, "passed": passed, "failed": failed}
    return score | {"message": message}


def grade(tree, exercises=tuple(EXERCISES), seed: int = 1, seconds: int = 60) -> dict:
    """The score of a tree: {points, max_points, message, exercises: {number: as `grade_exercise` says}}.

    Raises: ValueError where `tree` is no folder. Whatever is wrong inside it is a result.
    """
    tree = Path(tree).resolve()
    if not tree.is_dir():
        raise ValueError(f"{tree}: no such folder; name the root of a student's tree")
    there = (tree / "tests/adapters.py").is_file()
    message = "" if there else "tests/adapters.py: no such file, so nothing could be tested"
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copy(ROOT / "tests/test_exercises.py", folder)
        (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = ignore\n")
        for number in exercises:
            if there:
                scores[number] = grade_exercise(tree, number, seed, seconds, folder)
            else:
                title, most = EXERCISES[number]
                scores[number] = {"points": 0.0, "max_points": most, "title": title, "passed": [], "failed": {}}
                scores[number]["message"] = message
    totals = {key: round(sum(s[key] for s in scores.values()), 1) for key in ("points", "max_points")}
    return totals | {"message": message, "exercises": scores}


def summary(tree, score: dict) -> str:
    """A score for people: a line an exercise, then a line for each way in which its tests failed."""
    lines = [f"{tree}: {score['points']:g} of {score['max_points']:g} points", "  exercise  points   tests"]
    for number, s in score["exercises"].items():
        points, tests = (
            f"{s['points']:g}/{s['max_points']:g}",
            f"{len(s['passed'])}/{len(s['passed'] + list(s['failed']))}",
        )
        lines.append(f"  {number:>8}  {points:8} {tests:6} {s['title']}")
        lines += [f"            {s['message']}"] if s["message"] and s["message"] != score["message"] else []
        for message in dict.fromkeys(s["failed"].values()):
            tests = [test for test, said in s["failed"].items() if said == message]
            lines.append(f"            {', '.join(tests)}: {message}")
    return "\n".join(lines + ([f"  {score['message']}"] if score["message"] else []))


# ---- main ------------------------------------------------------------------------------------------------------------


def read_numbers(text: str) -> tuple[int, ...]:
    """'1,2,3' -> (1, 2, 3)"""
    known = ", ".join(map(str, EXERCISES))
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--exercises {text}: expected numbers with commas, of {known}") from None
    if not set(numbers) <= set(EXERCISES):
        raise ValueError(f"--exercises {text}: there are {known}")
    return tuple(sorted(numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a student's tree, or grade trees.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--student", metavar="OUT", help="write a student's tree to this new folder")
    task.add_argument("--grade", metavar="TREE", nargs="+", help="grade these trees")
    parser.add_argument("--exercises", default=",".join(map(str, EXERCISES)), help="only these (default: all)")
    parser.add_argument("--out", default="score.json", help="with --grade: the scores (default: score.json)")
    parser.add_argument("--seed", type=int, default=1, help="with --grade: of the tests' data (default: 1)")
    parser.add_argument("--seconds", type=int, default=60, help="with --grade: CPU time of an exercise (default: 60)")
    args = parser.parse_args()
    try:
        exercises = read_numbers(args.exercises)
        if args.student:
            for number, places in write_student(args.student, exercises).items():
                title, points = EXERCISES[number]
                print(f"exercise {number}  {points:2} points  {title}: {', '.join(places)}")
            print(f"wrote {args.student}, without {', '.join(TEACHER_ONLY)}")
            return
        if args.seed < 0 or args.seconds < 1:
            raise ValueError(f"--seed {args.seed} must be 0 or more, --seconds {args.seconds} must be 1 or more")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for name in PRELOAD:
            importlib.import_module(name)
        scores, start = {}, time.monotonic()
        for done, tree in enumerate(args.grade, 1):
            scores[tree] = grade(tree, exercises, args.seed, args.seconds)
            left = (time.monotonic() - start) / done * (len(args.grade) - done)
            print(summary(tree, scores[tree]) + (f"\n({left:.0f} s left)" if left else ""), flush=True)
            write_text(Path(args.out), json.dumps({"seed": args.seed, "trees": scores}, indent=1) + "\n")
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
