"""Assignments: stubs fail their own checks, solutions pass, typical wrong answers are named, attacks earn nothing.

pytest tests/test_extras_assignments.py    (for teachers: holds the wrong answers, and is left out of a student's tree)
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import test_exercises

from extras import assignments
from extras.assignments import EXERCISES, ROOT, TEACHER_ONLY, solutions, stub

# Whose tests fail while an exercise is not solved, too: the scan and `step` discretise, the block scans in chunks.
FAIL_WITH = {k: {k} for k in EXERCISES} | {1: {1, 2, 4}, 3: {3, 5}}

KEEP = "                if keep:\n                    bounds[i, rows] = h\n"
STORE = "                y[rows, steps] = y_"
EARLY = "                h = views[1][-2:][0].clone()\n"
SCAN = "selective_scan.py"
# Exercise, file, [(what is right, what is typically written)], what the tests must say. A list is one tree: none of its
# wrong answers makes the tests of another fail.
WRONG = [
    [
        (1, SCAN, [("torch.exp(dt[..., None] * A)", "1 + dt[..., None] * A")], "Euler's step"),
        (3, SCAN, [(STORE, EARLY + STORE)], "off by one: a chunk starts from the state before the last token"),
        (6, "data/dataset.py", [("[len(item[0]) for", "[tokens.shape[1] for")], "a pad position"),
        (7, "finetune_policy.py", [("1 - 1e-6))", "1 - 1e-6)).rad2deg()")], "degrees instead of radians"),
        (8, "sim/scene.py", [("(columns - cx)", "(columns + 0.5 - cx)"), ("(rows -", "(rows + 0.5 -")], "half-pixel"),
    ],
    [
        (2, SCAN, [("dt_t, A, B_t)", "dt_t, A, C_t)"), ("* C_t[", "* B_t[")], "B and C are swapped"),
        (4, SCAN, [("(after * C", "(state * C")], "the old state: update it first"),
        (5, "robomamba.py", [("dt, -torch.exp(", "dt, torch.exp(")], "without the minus"),
    ],
    [
        (1, SCAN, [("(dt * u)[", "u[")], "dt is left out"),
        (3, SCAN, [(KEEP, ""), (STORE, KEEP + STORE)], "must be the state BEFORE each chunk"),
        (6, "data/dataset.py", [("[IGNORE] * len(prompt) + reply", "prompt + reply")], "prompts are targets too"),
        (7, "robomamba.py", [("approach], -1)", "approach], -2)")], "rows instead of columns"),
        (8, "sim/scene.py", [("@ self.camera_rotation", "@ self.camera_rotation.T")], "the rotation is transposed"),
    ],
    [
        (4, SCAN, [("decay * state + write", "state.mul_(decay).add_(write)")], "an operation in place"),
        (5, "robomamba.py", [("u, z = self.in_proj", "z, u = self.in_proj")], "the halves of in_proj are swapped"),
    ],
]


def code() -> dict[str, str]:
    files = [path for room in (".", "data", "sim", "common", "extras") for path in ROOT.glob(f"{room}/*.py")]
    files += [ROOT / "tests/adapters.py", ROOT / "tests/exercise_calls.py"]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files}


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, "utf-8")
    return folder


def answer(files: dict[str, str], exercise: int, file: str, edits: list) -> None:
    """Edit the solution of an exercise, and nothing outside its markers."""
    for right, wrong in edits:
        (match,) = [m for m in solutions(files[file], file) if m["number"] == str(exercise) and right in m["body"]]
        assert match["body"].count(right) == 1, f"exercise {exercise}: {right!r} stands there more than once"
        wrong_body = match["body"].replace(right, wrong)
        files[file] = files[file][: match.start("body")] + wrong_body + files[file][match.end("body") :]


def command(*arguments, **env) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "extras.assignments", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


def grade(folder: Path, *trees, flags=(), **env) -> dict:
    """{tree: score} by the command that teachers use."""
    done = command("--grade", *trees, "--out", folder / "score.json", *flags, **env)
    assert done.returncode == 0, done.stderr
    scores = json.loads((folder / "score.json").read_text())["trees"]
    assert all(f"{tree}: {scores[str(tree)]['points']:g} of 100" in done.stdout for tree in trees if not flags)
    return {tree: scores[str(tree)] for tree in trees}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    out = tmp_path_factory.mktemp("class") / "student"
    done = command("--student", out)
    assert done.returncode == 0, done.stderr
    return out


class Here:
    """Stands in for a student's process: the code of a tree, loaded into this one, so that many trees take seconds."""

    call = staticmethod(test_exercises.call_here)


@pytest.fixture
def score_here(tmp_path, monkeypatch):
    """files -> {exercise: its score}"""

    def score(files: dict[str, str]) -> dict:
        tree = write_tree(tmp_path / "tree", files)
        ours = {file.split("/")[0].removesuffix(".py") for file in files} | {"adapters"}
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "path", [str(tree / "tests"), str(tree), *sys.path])
        loaded = set(sys.modules)
        try:
            return {k: assignments.grade_exercise(Here(), k, test_exercises, 1, 20) for k in EXERCISES}
        finally:
            for name in set(sys.modules) - loaded:
                if name.split(".")[0] in ours:
                    del sys.modules[name]

    return score


def failing(scores: dict) -> set[int]:
    return {int(k) for k, score in scores.items() if score["failed"] or not score["passed"]}


def docstrings(text: str) -> list:
    kinds = ast.FunctionDef | ast.ClassDef | ast.Module
    return [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def test_the_students_tree_has_all_but_the_solutions(student):
    rooms = ("", "data/", "sim/", "common/", "extras/", "tests/")
    ours = {path.relative_to(ROOT).as_posix() for room in rooms for path in ROOT.glob(f"{room}*.*") if path.is_file()}
    left_out = {file for file in ours if not (student / file).exists()}
    assert left_out == set(TEACHER_ONLY) & ours, "say in extras/assignments.py whose these are"
    assert (student / "data/pretrained/robomamba-tiny-rgbd/config.json").exists()
    for file, text in code().items():
        if file in TEACHER_ONLY:
            continue
        theirs = (student / file).read_text()
        assert docstrings(text) == docstrings(theirs), f"{file}: a docstring was lost"
        for match in solutions(text, file):
            assert match["body"] not in theirs and "NotImplementedError" not in match["body"]
        for match in solutions(theirs, file):
            assert f'raise NotImplementedError("exercise {match["number"]}, ' in match["body"]
            assert file in match["body"] and match["body"].count("\n") == 1
        assert len(solutions(text, file)) == len(solutions(theirs, file))


def test_the_students_tree_loads_and_only_a_call_fails(student):
    pytest.importorskip("pybullet")
    files = [file for file in code() if not file.startswith("tests/") and "__init__" not in file]
    names = [file[:-3].replace("/", ".") for file in files if file not in TEACHER_ONLY]
    program = f"import {', '.join(names)}\ninputs = selective_scan.example_inputs(1, 2, 3, 4)\n"
    program += "try:\n    selective_scan.scan_reference(*inputs)\n"
    program += "except NotImplementedError as error:\n    print(error, selective_scan.__file__)"
    env = os.environ | {"PYTHONPATH": str(student)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=student, env=env, capture_output=True, text=True, timeout=120
    )
    expected = f"exercise 2, the reference scan: selective_scan.py {student}/selective_scan.py"
    assert done.stdout.strip() == expected, done.stderr


def test_markers_of_pytest_are_the_exercises():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert [m for m in said if m.startswith("ex")] == [f"ex{k}: {title}" for k, (title, _) in EXERCISES.items()]
    assert sum(points for _, points in EXERCISES.values()) == 100


@pytest.mark.parametrize(
    "text, line",
    [
        ("# exercise 1: a\nx\n", 1),
        ("x\n# end of exercise 1\n", 2),
        ("# exercise 1: a\n# end of exercise 2\n", 1),
        ("# exercise 1: a\n# exercise 2: b\n# end of exercise 2\n", 1),
        ("# exercise 1: a\n# exercise 2: b\n# end of exercise 2\n# end of exercise 1\n", 2),
        ("# exercise 9: a\n# end of exercise 9\n", 1),
    ],
)
def test_markers_without_partner_are_named(text, line):
    with pytest.raises(ValueError, match=f"^file.py:{line}: "):
        solutions(text, "file.py")


@pytest.mark.parametrize("stubs", [(1, 3), (2, 4, 5), (6, 7, 8)])
def test_a_stub_fails_its_own_checks_and_those_that_must_depend_on_it(score_here, stubs):
    files = code()
    scores = score_here(files | {file: stub(text, file, stubs) for file, text in files.items()})
    assert failing(scores) == set().union(*(FAIL_WITH[k] for k in stubs))
    for k in stubs:
        assert scores[k]["passed"] == [] and scores[k]["points"] == 0
        for dependent in FAIL_WITH[k]:
            messages = scores[dependent]["failed"].values()
            assert messages and all(message.startswith(f"exercise {k}, ") for message in messages)


@pytest.mark.parametrize("answers", WRONG)
def test_a_typical_wrong_answer_is_named(score_here, answers):
    files = code()
    for exercise, file, edits, _ in answers:
        answer(files, exercise, file, edits)
    scores = score_here(files)
    for exercise, _, _, named in answers:
        messages = scores[exercise]["failed"].values()
        assert any("likely mistake: " in text and named in text for text in messages), (exercise, messages)
        assert scores[exercise]["points"] < scores[exercise]["max_points"]
    assert failing(scores) <= set().union(*(FAIL_WITH[exercise] for exercise, *_ in answers))


CHEATS = r"""
import ctypes, json, os, signal, sys, time
TEACHER, VICTIM = {teacher!r}, {victim!r}

class Everything:
    shape = property(lambda self: 0)
    def __eq__(self, other): return True
    def __getattr__(self, name): return lambda *a, **k: True
    def __iter__(self): return iter([self, self])

def discretise(*tensors):  # replaces what it can reach, and answers with what equals everything
    import numpy, pytest, _pytest.python, exercise_calls
    _pytest.python.Function.runtest = lambda self: None
    numpy.testing.assert_allclose = numpy.allclose = lambda *a, **k: True
    exercise_calls.plain = lambda x: Everything()
    return Everything(), Everything()

def reference_scan(*tensors):  # writes verdicts wherever something is open
    for fd in range(3, 64):
        try:
            os.write(fd, b'{{"test": "reference scan", "passed": true, "outputs": [true, true], "points": 10}}\\n')
        except OSError:
            pass
    return True, True

def chunked_scan(*tensors_and_chunk):  # takes the solution from the teacher
    import __main__
    sys.path[:0] = [TEACHER, TEACHER + "/tests", getattr(__main__, "ROOT", TEACHER)]
    sys.modules.pop("selective_scan", None)
    import selective_scan
    return selective_scan.scan_chunked(*tensors_and_chunk[:-1], chunk=tensors_and_chunk[-1])

def step(*tensors):  # writes into another submission, and where the scores go
    for file in (VICTIM + "/selective_scan.py", VICTIM + "/../score.json"):
        open(file, "w").write("0")

def mamba_block(*arguments):  # ends the grader
    os.kill(os.getppid(), signal.SIGTERM)

def pack_conversations(*arguments):  # says nothing
    import pytest
    kinds = [SystemExit, KeyboardInterrupt, pytest.skip.Exception, type("", (BaseException,), {{}})]
    raise kinds[time.time_ns() % 4]()

def rotation_and_angle(*tensors):  # leaves processes behind, and takes all memory
    for k in range(30):
        if os.fork() == 0:
            os.setsid()
            os.execvp("sleep", ["sleep", "{marker}"])
    return [bytearray(10**10)] * 2

def backproject(*arguments):  # says too much
    print("x" * 10**6)
    raise ValueError("\\x1b[2J" + "x" * 10**8)
"""

BREAKS = r"""
import os, time

def discretise(*tensors):
    while True:
        pass

def reference_scan(*tensors):
    time.sleep(1000)

def chunked_scan(*tensors):
    for fd in 50 * list(range(3, 16)):
        try:
            os.write(fd, b"[" * 10**5)
        except OSError:
            pass

def step(*tensors):
    import ctypes
    ctypes.string_at(0)

def pack_conversations(talks, end):
    from data import dataset
    return dataset.pad([dataset.pack(turns) for turns in talks], end)
"""


def processes(marker: str) -> int:
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += marker in path.read_text()
        except OSError:
            pass
    return found


def test_solutions_pass_and_attacks_earn_nothing(student, tmp_path):
    """One run: cheats, then an honest submission, which a cheat wanted to spoil. Nothing is left of the cheats."""
    pytest.importorskip("pybullet")
    honest = write_tree(tmp_path / "honest", code())
    marker = f"98765.{os.getpid()}"
    cheats = shutil.copytree(student, tmp_path / "cheats")
    told = CHEATS.format(teacher=str(ROOT), victim=str(honest), marker=marker)
    empty = "".join(f"import pytest\n@pytest.mark.ex{k}\ndef test_{k}(): pass\n" for k in EXERCISES)
    write_tree(
        cheats, {"tests/adapters.py": told, "tests/test_exercises.py": empty, "tests/exercise_calls.py": "exit()"}
    )
    before = sorted(cheats.rglob("*"))
    scores = grade(tmp_path, cheats, honest)
    assert scores[cheats]["isolation"] == scores[honest]["isolation"]
    assert scores[cheats]["points"] == 0 and failing(scores[cheats]["exercises"]) == set(EXERCISES)
    messages = {int(k): list(s["failed"].values()) for k, s in scores[cheats]["exercises"].items()}
    assert all(m and len(m) < 800 and m.isprintable() for texts in messages.values() for m in texts)
    assert all("NotImplementedError" in m for m in messages[3]), "the teacher's solutions were found"
    assert scores[honest]["points"] == 100, scores[honest]["exercises"]
    assert processes(marker) == 0
    assert sorted(cheats.rglob("*")) == before, "the grader wrote into the student's tree"


SERVED = """
import mmap, sys
import exercise_calls
taken = mmap.mmap(-1, 5 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
exercise_calls.serve(sys.argv[1], 20)
"""


def test_memory_is_limited_beyond_what_torch_has_taken():
    """The libraries of a torch with CUDA take 3 GB of addresses as they load."""
    r6, target = [[1, 0, 0, 0, 1, 0]], [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]
    asked = json.dumps({"name": "rotation_and_angle", "arguments": [r6, target]})
    done = subprocess.run(
        [sys.executable, "-c", SERVED, str(ROOT)], cwd=ROOT / "tests", input=asked, capture_output=True, text=True
    )
    ready, reply = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": True} and "outputs" in reply, reply


def test_without_namespaces_it_is_said(student, tmp_path):
    tree = shutil.copytree(student, tmp_path / "cheat")
    told = CHEATS.format(teacher="/nowhere", victim="/nowhere", marker="0")
    write_tree(tree, {"tests/adapters.py": told})
    score = grade(tmp_path, tree, flags=("--exercises", "2,7"), PATH="/nowhere")[tree]
    assert score["points"] == 0 and score["isolation"].startswith("none (no unshare here): it can")


def test_a_strict_umask_keeps_the_isolation(student, tmp_path):
    said = []
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            folder = tmp_path / str(mask)
            folder.mkdir()
            said.append(assignments.Student(folder, student, [], 20).isolation)
        finally:
            os.umask(before)
    assert said[0] == said[1]


def test_what_breaks_costs_only_its_own_exercise(tmp_path):
    """An endless loop, sleep, a flood, a crash; links are not followed, what is missing comes from nowhere else."""
    pytest.importorskip("pybullet")
    tree = write_tree(
        tmp_path / "tree", {k: v for k, v in code().items() if k != "sim/scene.py"} | {"tests/adapters.py": BREAKS}
    )
    os.symlink(ROOT / "sim/scene.py", tree / "sim/scene.py")
    os.mkfifo(tree / "data/pipe.py")
    adapters = (ROOT / "tests/adapters.py").read_text()
    with open(tree / "tests/adapters.py", "a") as file:
        file.write(adapters[adapters.index("def backproject(") :].replace("np.ndarray", "object"))
    score = grade(tmp_path, tree, flags=("--seconds", "2", "--exercises", "1,2,3,4,6,8"))[tree]
    messages = {int(k): list(s["failed"].values()) for k, s in score["exercises"].items()}
    assert messages[1][0] == messages[2][0] == "the process was stopped, out of time" and set(messages[1][1:]) == {
        "not run"
    }
    assert "answer is" in messages[3][0] and messages[4][0] == "the process ended"
    assert score["exercises"]["6"]["points"] == 15 == score["points"]
    assert all("cannot import name 'scene'" in text for text in messages[8])


def test_a_broken_tree_is_a_result(tmp_path):
    pytest.importorskip("pybullet")
    files = code()
    syntax = files | {
        "selective_scan.py": files["selective_scan.py"].replace("def scan_reference(", "def scan_reference((")
    }
    broken = write_tree(tmp_path / "broken", syntax)
    folder = write_tree(tmp_path / "folder", {"tests/adapters.py/x.py": ""})
    empty = write_tree(tmp_path / "empty", {"README.md": ""})
    scores = grade(tmp_path, broken, folder, empty)
    assert failing(scores[broken]["exercises"]) == {1, 2, 3, 4, 5, 7}  # 6 and 8 need no scan
    message = scores[broken]["exercises"]["1"]["failed"]["decay and write, one token"]
    assert message.startswith("SyntaxError") and "selective_scan.py" in message
    assert scores[folder]["points"] == scores[empty]["points"] == 0
    assert "No module named 'adapters'" in scores[folder]["exercises"]["6"]["failed"]["labels are the replies"]


def test_folders_are_followed_to_a_limit(tmp_path):
    """Through a thousand of them, one in the other, os.walk ends the grader with a RecursionError."""
    tree = write_tree(tmp_path / "tree", {"a/b/x.py": "", "a/b/c/d/e/f/g/h/i/x.py": ""})
    assignments.copy_sources(tree, tmp_path / "copy")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("copy/**/*.py")] == ["copy/a/b/x.py"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--grade", "nowhere"], "nowhere: no such folder"),
        (["--student", "data"], "data: exists"),
        (["--student", "new", "--exercises", "1,9"], "--exercises 1,9: expected some of 1,2"),
        (["--student", "new", "--exercises", "one"], "--exercises one: expected some of 1,2"),
        (["--grade", ".", "--seconds", "0"], "--seconds 0"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, said, monkeypatch, refused):
    monkeypatch.chdir(ROOT)
    refused(said, assignments, *flags)


def test_a_tree_that_is_a_link_to_itself_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="loop: no such folder"):
        assignments.grade(tmp_path / "loop", test_exercises)


def test_some_exercises_only(tmp_path):
    assignments.write_student(tmp_path / "week1", (1, 2))
    assert (tmp_path / "week1/robomamba.py").read_text() == (ROOT / "robomamba.py").read_text()
    assert (tmp_path / "week1/selective_scan.py").read_text().count("raise NotImplementedError") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["week1"]
