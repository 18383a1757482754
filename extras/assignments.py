"""Assignments, for teachers: eight exercises, a student's tree without their solutions, a grader.

    python -m extras.assignments --student OUT                     # this repository, solutions left out
    python -m extras.assignments --student OUT --exercises 1,2,3   # the others stay solved
    python -m extras.assignments --grade TREE [TREE ..]            # points per exercise; also to score.json

A solution stands between two comment lines, `# exercise N: what` and `# end of exercise N`; an exercise may have
several such places. In the student's tree NotImplementedError stands there; docstrings, tests and all else stay. Files
that give answers away are left out (TEACHER_ONLY). Students run `pytest -m exN`.

The grader runs the same checks (tests/test_exercises.py), in its own process and on data from another seed. A student's
process only returns numbers: the check draws inputs, sends them, and compares what comes back, so a submission earns
points by right numbers alone. (One number is a count that a submission could understate: what autograd keeps in
exercise 3; results and gradients must be right as well.) An exercise gives points in proportion to its passed checks.

Each submission runs on a copy of its .py files, with limits on time, memory, file size and no further processes. Where
`unshare` is allowed (Linux), it has a root directory of its own, which holds Python and that copy only, no network, and
ends with all that it started. Where it is not, the grader says so: then grade strangers in a container each.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common.files import write_json
from common.scripts import run_main

ROOT = Path(__file__).resolve().parent.parent
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
SHIPPED = ("*.*", "LICENSE", "Makefile", ".gitignore", ".ci/*", "tests/*.py", "common/*.py", "extras/*.*", "sim/*.*")
SHIPPED += ("data/*.*", "data/figures/*", "data/results/*", "data/pretrained/**/*")
TEACHER_ONLY = {
    "tests/test_extras_assignments.py": "holds the wrong answers",
    "tests/test_scan.py": "writes the recurrence out, and its bugs",
}
BEGIN, END = re.compile(r"( *)# exercise (\d+): (.+)"), re.compile(r" *# end of exercise (\d+)")
SOURCE_BYTES, SOURCE_FILES = 2**20, 1000  # of a submission; larger files, and more of them, are not copied
REPLY_BYTES, START_SECONDS = 2**22, 120  # the longest answer; how long loading torch may take
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")  # what Python stands on
NOBODY = 65534
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1"}


# ---- a student's tree ------------------------------------------------------------------------------------------------


def solutions(text: str, file: str) -> list[tuple[int, int, int]]:
    """(exercise, first line, line after the last), counted from 0, of every marked solution; markers not included.

    Raises: ValueError naming the file and line of a marker without its partner, or of an unknown exercise.
    """
    found = []
    opened = None  # (exercise, line)
    for i, line in enumerate(text.splitlines()):
        begin = BEGIN.fullmatch(line)
        end = END.fullmatch(line)
        if begin and not opened and int(begin[2]) in EXERCISES:
            opened = (int(begin[2]), i)
        elif end and opened and int(end[1]) == opened[0]:
            found.append((opened[0], opened[1] + 1, i))
            opened = None
        elif begin or end:
            raise ValueError(f"{file}:{i + 1}: {line.strip()!r} has no partner, or there is no such exercise")
    if opened:
        raise ValueError(f"{file}:{opened[1] + 1}: exercise {opened[0]} has no `# end of exercise {opened[0]}`")
    return found


def stub(text: str, file: str, exercises=tuple(EXERCISES)) -> str:
    """A source file with the marked solutions of `exercises` replaced by NotImplementedError."""
    lines = text.splitlines()
    for number, first, end in reversed(solutions(text, file)):
        if number in exercises:
            indent, _, what = BEGIN.fullmatch(lines[first - 1]).groups()
            lines[first:end] = [f'{indent}raise NotImplementedError("exercise {number}, {what}: {file}")']
    return "\n".join(lines) + "\n"


def write_student(out, exercises=tuple(EXERCISES)) -> dict[int, list[str]]:
    """Write a student's tree to the new folder `out`, whole or not at all; returns where each exercise is to be done.

    Raises: ValueError where `out` exists, or an exercise is marked nowhere.
    """
    out = Path(out)
    places = {}
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
                text = stub(path.read_text("utf-8"), file, exercises)
                for number, first, _ in solutions(text, file):
                    if number in exercises:
                        places.setdefault(number, []).append(f"{file}:{first + 1}")
                (partial / file).write_text(text, "utf-8")
        missing = [number for number in exercises if number not in places]
        if missing:
            raise ValueError(f"{ROOT}: no marked solution of exercise {missing[0]}")
        partial.rename(out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dict(sorted(places.items()))


# ---- a student's process ---------------------------------------------------------------------------------------------


class Failed(Exception):
    """What the student's code raised."""


class Ended(Exception):
    """How the student's process ended before it answered."""


def copy_sources(tree: Path, out: Path) -> None:
    """The .py files of a submission but its tests. No links and pipes: they may lead to what is not its own."""
    copied = 0
    for folder, folders, files in os.walk(tree):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "site-packages")
        for path in sorted(Path(folder, name) for name in files if name.endswith(".py")):
            regular = path.is_file() and not path.is_symlink() and path.stat().st_size <= SOURCE_BYTES
            if regular and not path.name.startswith("test_") and copied < SOURCE_FILES:
                (out / path.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / path.relative_to(tree))
                copied += 1


def new_root(root: Path, visible: list, hidden: list) -> str:
    """A shell script that makes a root directory of read-only places and goes there; the next line is run in it."""
    lines = ["set -e", f"mount -t tmpfs -o size=64m none {root}", f"mkdir -m 1777 {root}/tmp"]

    def show(place):
        inside = shlex.quote(f"{root}{place}")
        made = f"mkdir -p {inside}" if Path(place).is_dir() else f"mkdir -p $(dirname {inside}); touch {inside}"
        lines.append(f"{made}; mount --bind {shlex.quote(str(place))} {inside}; mount -o remount,bind,ro {inside}")

    for place in filter(os.path.exists, SYSTEM):
        show(place)
    for inside in (shlex.quote(f"{root}{place}") for place in hidden):  # where a tree lies within /usr
        lines.append(f"if [ -d {inside} ]; then mount -t tmpfs none {inside}; fi")
    for place in visible:
        show(place)
    lines += [
        f"mkdir {root}/old",
        f"cd {root}",
        "pivot_root . old",
        "cd /",
        "mkdir proc",
        "mount -t proc none proc",
        "umount -l old",
    ]
    return "\n".join(lines)


def isolations(work: Path, root: Path, hidden: list):
    """(command before Python's, options of Popen, what it is), the strictest first."""
    python = dict.fromkeys([Path(sys.base_prefix), Path(sys.prefix), work])  # in this order, without repetition
    drop = "exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all"
    unshare = ["unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child"]
    other = os.geteuid() == 0
    if other:
        drop += f" --reuid={NOBODY} --regid={NOBODY} --clear-groups"
    else:
        unshare += ["--user", "--map-root-user"]
    script = new_root(root, list(python), hidden) + f'\n{drop} "$@"'
    if shutil.which("unshare"):
        yield [*unshare, "sh", "-c", script, "sh"], {}, "a root directory of its own, no network"
    if other:
        options = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        yield [], options, "another account, but no namespaces: it can read what everybody can"
    yield [], {}, "the teacher's account and no namespaces: use a container for each submission"


def children() -> set[int]:
    """Processes whose parent is this one (Linux)."""
    with contextlib.suppress(OSError):
        return {int(pid) for pid in Path("/proc/thread-self/children").read_text().split()}
    return set()


class Student:
    """A submission's process, started when it is first asked and again after it has died."""

    def __init__(self, folder: Path, tree: Path, hidden: list, seconds: int):
        """folder: an empty one, for the copy of `tree`; seconds: CPU time in all."""
        self.work = folder / "work"
        self.root = folder / "root"
        self.seconds = seconds
        self.process = None
        self.before = children()
        self.root.mkdir()
        copy_sources(tree, self.work / "tree")
        shutil.copyfile(ROOT / "tests/exercise_calls.py", self.work / "exercise_calls.py")
        os.chmod(folder, 0o755)
        path = [str(self.work), *(p for p in sys.path if p.startswith((sys.prefix, sys.base_prefix)))]
        serve = f"import sys; sys.path[:] = {path}; import exercise_calls; exercise_calls.serve"
        python = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c"]
        for before, options, isolation in isolations(self.work, self.root, hidden):
            self.command = [*before, *python, f"{serve}({str(self.work / 'tree')!r}, {seconds})"]
            self.options = options
            self.isolation = isolation
            test = [*before, *python, f"import sys; sys.path[:] = {path}; import numpy"]
            with contextlib.suppress(OSError):
                if subprocess.run(test, capture_output=True, env=ENVIRONMENT, **options).returncode == 0:
                    break
        self.end = 0.0  # time.monotonic() at which the next answer must be there

    def call(self, name: str, *arguments, weights=None, count=False) -> dict:
        """`exercise_calls.answer` in the student's process. Raises: Failed, Ended."""
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(
                self.command,
                env=ENVIRONMENT,
                start_new_session=True,
                pipesize=2**20,
                bufsize=0,
                **pipes,
                **self.options,
            )
            left = self.end - time.monotonic()
            self.read(time.monotonic() + START_SECONDS)
            self.end = time.monotonic() + left
        asked = {"name": name, "arguments": arguments, "weights": weights, "count": count}
        with contextlib.suppress(BrokenPipeError):  # then it has ended, which `read` finds
            self.process.stdin.write(json.dumps(asked, default=np.ndarray.tolist).encode() + b"\n")
        reply = self.read(self.end)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    def read(self, end: float) -> dict:
        pipe = self.process.stdout
        text = b""
        while not text.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise Ended("was stopped, out of time")
            part = os.read(pipe.fileno(), 2**16)
            text += part
            if not part or len(text) > REPLY_BYTES:
                raise Ended("ended" if not part else "was stopped, its answer is too long")
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise Ended("was stopped, its answer is not readable")
        return reply

    def stop(self) -> None:
        """Kill the process and, one generation after the other, whatever it has left behind."""
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        while left := children() - self.before:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


# ---- the grader ------------------------------------------------------------------------------------------------------


def load_checks():
    """The module tests/test_exercises.py of this repository."""
    path = ROOT / "tests/test_exercises.py"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; grade from a checkout of the repository")
    spec = importlib.util.spec_from_file_location("exercises_of_the_grader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(error) -> str:
    """One printable line about an error, never empty."""
    text = "".join(c if c.isprintable() else " " for c in f"{error}"[:600])
    return " ".join(text.split()) or type(error).__name__


def grade_exercise(student: Student, exercise: int, checks, seed: int, seconds: int) -> dict:
    """One exercise: {points, max_points, title, passed: [check], failed: {check: message}, message}."""
    title, most = EXERCISES[exercise]
    names = [name for name, (number, _) in checks.CHECKS.items() if number == exercise]
    passed = []
    failed = {}
    message = ""
    student.end = time.monotonic() + seconds
    for name in names:
        try:
            if message:
                raise Failed("not run")
            checks.run(name, student.call, seed)
            passed.append(name)
        except Ended as ended:
            message = f"the process {ended}, in {name}"
            failed[name] = message
            student.stop()
        except Exception as error:  # a check that cannot even use what came back has failed too
            failed[name] = said(error)
    points = round(most * len(passed) / len(names), 1)
    score = {"points": points, "max_points": most, "title": title, "passed": passed}
    return score | {"failed": failed, "message": message}


def grade(tree, checks, exercises=tuple(EXERCISES), seed: int = 1, seconds: int = 20, hidden=()) -> dict:
    """The score of a tree: {points, max_points, message, isolation, exercises: {number: as `grade_exercise` says}}.

    Args: seconds, of one exercise; hidden, folders that the student's process must not see.
    Raises: ValueError where `tree` is no folder. Whatever is wrong inside it is a result.
    """
    tree = Path(tree).resolve()
    if not tree.is_dir():
        raise ValueError(f"{tree}: no such folder; name the root of a student's tree")
    with tempfile.TemporaryDirectory(prefix="grading-") as folder:
        student = Student(Path(folder), tree, [ROOT, tree, *hidden], seconds * len(exercises))
        there = (student.work / "tree/tests/adapters.py").is_file()
        message = "" if there else "tests/adapters.py: no such file, so nothing could be tested"
        try:
            scores = {n: grade_exercise(student, n, checks, seed, seconds) for n in exercises}
        finally:
            student.stop()
    totals = {key: round(sum(s[key] for s in scores.values()), 1) for key in ("points", "max_points")}
    return totals | {"message": message, "isolation": student.isolation, "exercises": scores}


def summary(tree, score: dict) -> str:
    """A score for people: a line an exercise, then a line for each way in which its checks failed."""
    lines = [f"{tree}: {score['points']:g} of {score['max_points']:g} points", "  exercise  points   checks"]
    for number, s in score["exercises"].items():
        points = f"{s['points']:g}/{s['max_points']:g}"
        share = f"{len(s['passed'])}/{len(s['passed']) + len(s['failed'])}"
        lines.append(f"  {number:>8}  {points:8} {share:6}  {s['title']}")
        for message in dict.fromkeys(s["failed"].values()):
            names = [name for name, text in s["failed"].items() if text == message]
            lines.append(f"            {'; '.join(names)}: {message}")
    return "\n".join(lines + [f"  {score['message']}"] * bool(score["message"]))


# ---- main ------------------------------------------------------------------------------------------------------------


def read_numbers(text: str) -> tuple[int, ...]:
    """'1,2,3' -> (1, 2, 3)"""
    known = ", ".join(map(str, EXERCISES))
    try:
        numbers = {int(part) for part in text.split(",")}
    except ValueError:
        raise ValueError(f"--exercises {text}: expected numbers with commas, of {known}") from None
    if not numbers <= set(EXERCISES):
        raise ValueError(f"--exercises {text}: there are {known}")
    return tuple(sorted(numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a student's tree, or grade trees.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--student", metavar="OUT", help="write a student's tree to this new folder")
    task.add_argument("--grade", metavar="TREE", nargs="+", help="grade these trees")
    parser.add_argument("--exercises", default=",".join(map(str, EXERCISES)), help="only these (default: all)")
    parser.add_argument("--out", default="score.json", help="with --grade: the scores (default: score.json)")
    parser.add_argument("--seed", type=int, help="with --grade: of the data (default: drawn, and kept in the scores)")
    parser.add_argument("--seconds", type=int, default=20, help="with --grade: time of one exercise (default: 20)")
    args = parser.parse_args()
    exercises = read_numbers(args.exercises)
    if args.student:
        for number, places in write_student(args.student, exercises).items():
            title, points = EXERCISES[number]
            print(f"exercise {number}  {points:2} points  {title}: {', '.join(places)}")
        print(f"wrote {args.student}, without {', '.join(TEACHER_ONLY)}")
        return
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if seed < 0 or args.seconds < 1:
        raise ValueError(f"--seed {seed} must be 0 or more, --seconds {args.seconds} must be 1 or more")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a submission leaves behind becomes our child
    checks = load_checks()
    scores = {}
    for tree in args.grade:
        scores[tree] = grade(tree, checks, exercises, seed, args.seconds, map(os.path.abspath, args.grade))
        print(f"{summary(tree, scores[tree])}\n  isolation: {scores[tree]['isolation']}", flush=True)
        write_json(args.out, {"seed": seed, "trees": scores})


if __name__ == "__main__":
    run_main(main)
