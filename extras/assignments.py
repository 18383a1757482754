"""Assignments for teachers: eight exercises, a student's tree without the solutions, and a grader.

    python -m extras.assignments --student OUT                     # this repository, solutions left out
    python -m extras.assignments --student OUT --exercises 1,2,3   # the others stay solved
    python -m extras.assignments --grade TREE [TREE ..]            # points per exercise; also to score.json

A solution sits between two comment lines, `# exercise N: what` and `# end of exercise N`, in one or more places; the
student's tree has NotImplementedError there and leaves out TEACHER_ONLY, the files that give answers away. Students run
`pytest -m exN`. The grader runs the same checks (tests/test_exercises.py) in its own process, with inputs from another
seed: a student's process only returns numbers, and only correct numbers earn points. (One of them is a count that a
submission could understate: what autograd keeps in exercise 3.)

A submission runs on a copy of its .py files, with limits on time, memory and file size. Where `unshare` is allowed
(Linux), it runs without network, in a separate root directory that holds only Python and that copy, and every process
it started ends with it. Where it is not allowed, the grader says so: then grade strangers in one container each.
"""

import argparse
import contextlib
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
    "extras/scan_bench.py": "writes the recurrence out",
    "tests/test_extras_assignments.py": "holds the wrong answers",
    "tests/test_extras_scan_bench.py": "tests what is left out",
    "tests/test_scan.py": "writes the recurrence out, and its bugs",
}
MARKER = re.compile(r"^ *# (end of )?exercise \d+(: .+)?\n", re.M)
BEGIN = r"^(?P<begin>(?P<indent> *)# exercise (?P<number>\d+): (?P<what>.+)\n)"
SOLUTION = re.compile(BEGIN + r"(?P<body>(?:.*\n)*?)(?P<end> *# end of exercise (?P=number)\n)", re.M)
# Limits: a submission's file and levels of folders (what is beyond is not copied), an answer
SOURCE_BYTES, DEEPEST, REPLY_BYTES = 2**20, 8, 2**22
START_SECONDS = 120  # time allowed for loading torch
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1"}
UNPROTECTED = "none (no unshare here): it can read your files, use the network and leave processes; use a container"
# Shell: $new becomes the root directory; it contains, read-only, what Python needs and $visible.
NEW_ROOT = """set -e
umask 022
mount -t tmpfs -o size=64m none "$new"
mkdir -m 1777 "$new/tmp" "$new/old" "$new/proc"
show() {
    if [ -d "$1" ]; then mkdir -p "$new$1"; else mkdir -p "$new${1%/*}"; touch "$new$1"; fi
    mount --bind "$1" "$new$1"
    mount -o remount,bind,ro "$new$1"
}
for place in /usr /lib /lib64 /bin /etc/ld.so.cache /dev/null /dev/urandom; do
    if [ -e $place ]; then show $place; fi
done
for place in $hidden; do if [ -d "$new$place" ]; then mount -t tmpfs none "$new$place"; fi; done
for place in $visible; do show "$place"; done
cd "$new"
pivot_root . old
cd /
mount -t proc none proc
umount -l old
"""


def solutions(text: str, file: str) -> list[re.Match]:
    """Every marked solution (groups of SOLUTION). Raises: ValueError naming the file and line of an unpaired marker."""
    found = [match for match in SOLUTION.finditer(text) if int(match["number"]) in EXERCISES]
    paired = {match.start(part) for match in found for part in ("begin", "end")}
    for marker in MARKER.finditer(text):
        if marker.start() not in paired:
            line = text.count("\n", 0, marker.start()) + 1
            raise ValueError(f"{file}:{line}: {marker[0].strip()!r} has no partner, or there is no such exercise")
    return found


def stub(text: str, file: str, exercises=tuple(EXERCISES)) -> str:
    """A source file with the marked solutions of `exercises` replaced by NotImplementedError."""
    for match in reversed(solutions(text, file)):
        if int(match["number"]) in exercises:
            error = f'{match["indent"]}raise NotImplementedError("exercise {match["number"]}, {match["what"]}: {file}")'
            text = text[: match.start("body")] + error + "\n" + text[match.end("body") :]
    return text


def write_student(out, exercises=tuple(EXERCISES)) -> dict[int, list[str]]:
    """Write a student's tree to the new folder `out`, completely or not at all; returns the files of each exercise.
    Raises: ValueError if `out` exists."""
    out = Path(out)
    partial = Path(f"{out}.tmp{os.getpid()}")
    places = {}
    if out.exists():
        raise ValueError(f"{out}: exists; name a new folder")
    try:
        for path in sorted({path for pattern in SHIPPED for path in ROOT.glob(pattern) if path.is_file()}):
            file = path.relative_to(ROOT).as_posix()
            if file in TEACHER_ONLY:
                continue
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, partial / file)
            if path.suffix == ".py":
                text = path.read_text("utf-8")
                (partial / file).write_text(stub(text, file, exercises), "utf-8")
                for match in solutions(text, file):
                    places.setdefault(int(match["number"]), set()).add(file)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {number: sorted(places[number]) for number in exercises}


def copy_sources(tree: Path, out: Path) -> None:
    """Copies the .py files of a submission except its tests. No links or pipes: they may lead outside of it."""
    out.mkdir(parents=True)
    for folder, folders, files in os.walk(tree):
        deep = len(Path(folder).relative_to(tree).parts) >= DEEPEST
        folders[:] = [f for f in folders if not deep and not f.startswith(".") and f != "site-packages"]
        for path in (Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("test_")):
            with contextlib.suppress(PermissionError):
                if path.is_file() and not path.is_symlink() and path.stat().st_size <= SOURCE_BYTES:
                    (out / path.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, out / path.relative_to(tree))


def isolated(new: Path, visible: list, hidden: list) -> list[str]:
    """A command prefix that runs what follows with `new` as its root directory, without network or privileges."""
    unshare = ["unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child"]
    drop = "setpriv --no-new-privs --inh-caps=-all --bounding-set=-all"
    if os.geteuid() == 0:
        drop += " --reuid=65534 --regid=65534 --clear-groups"  # nobody
    else:
        unshare += ["--user", "--map-root-user"]
    places = [shlex.quote("\n".join(map(str, some))) for some in ([new], visible, hidden, ["", ""])]
    names = "new={}; visible={}; hidden={}; IFS={}\n".format(*places)
    return [*unshare, "sh", "-c", f'{names}{NEW_ROOT}exec {drop} "$@"', "sh"]


class Student:
    """A submission's process, started at the first call and restarted after it has ended. folder: an empty one, for
    the copy of `tree`; seconds: time limit per exercise."""

    def __init__(self, folder: Path, tree: Path, hidden: list, seconds: int):
        work = folder / "work"
        self.seconds = seconds
        self.process = None
        umask = os.umask(0o022)  # `nobody`, as whom root lets it run, must be able to read the copies
        copy_sources(tree, work / "tree")
        shutil.copyfile(ROOT / "tests/exercise_calls.py", work / "exercise_calls.py")
        (folder / "root").mkdir()
        folder.chmod(0o755)
        os.umask(umask)
        path = [str(work), *(p for p in sys.path if p.startswith((sys.prefix, sys.base_prefix)))]
        python = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c"]
        start = f"import sys; sys.path[:] = {path}; import "
        before = isolated(folder / "root", list(dict.fromkeys([sys.base_prefix, sys.prefix, work])), hidden)
        self.isolation = "a root directory of its own, no network"
        test = [*before, *python, start + "numpy"]
        if not shutil.which("unshare") or subprocess.run(test, capture_output=True, env=ENVIRONMENT).returncode:
            before = []
            self.isolation = UNPROTECTED
        serve = f"exercise_calls; exercise_calls.serve({str(work / 'tree')!r}, {seconds * len(EXERCISES)})"
        self.command = [*before, *python, start + serve]

    def call(self, name: str, *arguments, weights=None, count=False) -> dict:
        """`exercise_calls.answer` in the student's process. Raises: ChildProcessError if it ends before it answers;
        RuntimeError with what the student's code raised."""
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            options = {"env": ENVIRONMENT, "start_new_session": True, "pipesize": 2**20, "bufsize": 0}
            self.process = subprocess.Popen(self.command, **pipes, **options)
            self.read(time.monotonic() + START_SECONDS)
            self.end = time.monotonic() + self.seconds
        asked = {"name": name, "arguments": arguments, "weights": weights, "count": count}
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `read` reports
            self.process.stdin.write(json.dumps(asked, default=np.ndarray.tolist).encode() + b"\n")
        reply = self.read(self.end)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def read(self, end: float) -> dict:
        """The next reply, which must arrive before `end` (of time.monotonic())."""
        text = b""
        while not text.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise ChildProcessError("was stopped, out of time")
            part = os.read(self.process.stdout.fileno(), 2**16)
            text += part
            if not part or len(text) > REPLY_BYTES:
                raise ChildProcessError("was stopped, its answer is too long" if part else "ended")
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            raise ChildProcessError("was stopped, its answer is not readable") from None

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def grade_exercise(student: Student, exercise: int, checks, seed: int, seconds: int) -> dict:
    """Grades one exercise: {points, max_points, title, passed: [check], failed: {check: message}}."""
    title, most = EXERCISES[exercise]
    names = [name for name, (number, _) in checks.CHECKS.items() if number == exercise]
    failed = {}
    student.end = time.monotonic() + seconds
    for k, name in enumerate(names):
        try:
            checks.run(name, student.call, seed)
        except ChildProcessError as error:
            failed |= {name: f"the process {error}"} | dict.fromkeys(names[k + 1 :], "not run")
            student.close()
            break
        except Exception as error:  # a check that cannot even use what came back has failed too
            text = "".join(c if c.isprintable() else " " for c in f"{error}"[:600])
            failed[name] = " ".join(text.split()) or type(error).__name__
    passed = [name for name in names if name not in failed]
    points = round(most * len(passed) / len(names), 1)
    return {"points": points, "max_points": most, "title": title, "passed": passed, "failed": failed}


def grade(tree, checks, exercises=tuple(EXERCISES), seed: int = 1, seconds: int = 20, hidden=()) -> dict:
    """The score of a tree: {points, max_points, isolation, exercises: {number: as from `grade_exercise`}}.

    Args: checks: the module tests/test_exercises.py; seconds: per exercise; hidden: folders it must not see.
    Raises: ValueError if `tree` is not a folder. Anything wrong inside it is part of the score."""
    tree = Path(os.path.realpath(tree))
    if not tree.is_dir():
        raise ValueError(f"{tree}: no such folder; name the root of a student's tree")
    with tempfile.TemporaryDirectory(prefix="grading-") as folder:
        with contextlib.closing(Student(Path(folder), tree, [ROOT, tree, *hidden], seconds)) as student:
            scores = {n: grade_exercise(student, n, checks, seed, seconds) for n in exercises}
    totals = {key: round(sum(s[key] for s in scores.values()), 1) for key in ("points", "max_points")}
    return totals | {"isolation": student.isolation, "exercises": scores}


def summary(tree, score: dict) -> str:
    """A readable score: one line per exercise, followed by one line per way in which its checks failed."""
    lines = [f"{tree}: {score['points']:g} of {score['max_points']:g} points; isolation: {score['isolation']}"]
    for number, s in score["exercises"].items():
        lines.append(f"  exercise {number}  {s['points']:4g}/{s['max_points']:2}  {s['title']}")
        for message in dict.fromkeys(s["failed"].values()):
            names = [name for name, text in s["failed"].items() if text == message]
            lines.append(f"              {'; '.join(names)}: {message}")
    return "\n".join(lines)


def main() -> None:
    known = ",".join(map(str, EXERCISES))
    parser = argparse.ArgumentParser(description="Write a student's tree, or grade trees.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--student", metavar="OUT", help="write a student's tree to this new folder")
    task.add_argument("--grade", metavar="TREE", nargs="+", help="grade these trees")
    parser.add_argument("--exercises", default=known, help="only these (default: all)")
    parser.add_argument("--out", default="score.json", help="with --grade: the scores (default: score.json)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="with --grade (default: drawn)")
    parser.add_argument("--seconds", type=int, default=20, help="with --grade: time of one exercise (default: 20)")
    args = parser.parse_args()
    if not set(args.exercises.split(",")) <= set(known.split(",")):
        raise ValueError(f"--exercises {args.exercises}: expected some of {known}")
    exercises = sorted(set(map(int, args.exercises.split(","))))
    if args.student:
        for number, places in write_student(args.student, exercises).items():
            title, points = EXERCISES[number]
            print(f"exercise {number}  {points:2} points  {title}: {', '.join(places)}")
        print(f"wrote {args.student}, without {', '.join(TEACHER_ONLY)}")
        return
    if args.seed < 0 or args.seconds < 1:
        raise ValueError(f"--seed {args.seed} must be 0 or more, --seconds {args.seconds} must be 1 or more")
    sys.path.insert(0, str(ROOT / "tests"))
    import test_exercises

    scores = {}
    for tree in args.grade:
        scores[tree] = grade(tree, test_exercises, exercises, args.seed, args.seconds, map(os.path.abspath, args.grade))
        print(summary(tree, scores[tree]), flush=True)
        write_json(args.out, {"seed": args.seed, "trees": scores})


if __name__ == "__main__":
    run_main(main)
