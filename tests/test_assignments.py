"""Assignment mode: every stub fails its own tests, every solution passes, every typical wrong answer is named.

pytest tests/test_assignments.py    (for teachers: holds the wrong answers, and is left out of a student's tree)

Everything is graded by the command that teachers use, in one run: trees with one stub, with wrong answers, broken ones.
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

from extras import assignments
from extras.assignments import EXERCISES, ROOT, TEACHER_ONLY, solutions, stub

pytestmark = pytest.mark.slow

# Whose tests fail while an exercise is not solved: its own, and those of solutions that are built upon it.
FAIL_WITH = {
    1: {1, 2, 4},  # the reference scan and `step` discretise token by token
    2: {2},
    3: {3, 5},  # the Mamba block scans in chunks
    4: {4},
    5: {5},
    6: {6},
    7: {7},
    8: {8},
}

KEEP = "                if keep:\n                    bounds[i, rows] = h\n"
STORE = "                y[rows, steps] = y_"
EARLY = "                h = buffers[1, : math.prod(size)].view(size)[-2:][0].clone()\n"
# Exercise: file, [(what is right, what is typically written)], what the tests must say.
WRONG = {
    1: ("selective_scan.py", [("torch.exp(dt[..., None] * A)", "1 + dt[..., None] * A")], "Euler's step"),
    2: ("selective_scan.py", [("dt_t, A, B_t)", "dt_t, A, C_t)"), ("* C_t[", "* B_t[")], "B and C are swapped"),
    3: (
        "selective_scan.py",
        [(STORE, EARLY + STORE)],
        "off by one: a chunk starts from the state before the last token",
    ),
    4: ("selective_scan.py", [("(after * C", "(state * C")], "the old state: update it first"),
    5: ("robomamba.py", [("dt, -torch.exp(", "dt, torch.exp(")], "without the minus"),
    6: ("data/dataset.py", [("[len(item[0]) for item in items]", "[T for item in items]")], "a pad position"),
    7: ("finetune_policy.py", [("1 - 1e-6))", "1 - 1e-6)).rad2deg()")], "degrees instead of radians"),
    8: (
        "sim/scene.py",
        [("[(columns - cx)", "[(columns + 0.5 - cx)"), ("(rows - cy)", "(rows + 0.5 - cy)")],
        "half-pixel",
    ),
}
MORE_WRONG = {
    1: ("selective_scan.py", [("(dt * u)[", "u[")], "dt is left out"),
    3: ("selective_scan.py", [(KEEP, ""), (STORE, KEEP + STORE)], "must be the state BEFORE each chunk"),
    4: ("selective_scan.py", [("decay * state + write", "state.mul_(decay).add_(write)")], "an operation in place"),
    5: ("robomamba.py", [("u, z = self.in_proj", "z, u = self.in_proj")], "the halves of in_proj are swapped"),
    6: ("data/dataset.py", [("[IGNORE] * len(prompt) + reply", "prompt + reply")], "prompts are targets too"),
    7: ("robomamba.py", [("approach], -1)", "approach], -2)")], "rows instead of columns"),
    8: ("sim/scene.py", [("@ self.camera_rotation", "@ self.camera_rotation.T")], "the rotation is transposed"),
}
TOGETHER = ((1, 3, 6, 7, 8), (2, 4, 5))  # wrong answers of one tree: none makes the tests of another fail


def code() -> dict[str, str]:
    files = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), ROOT / "tests/adapters.py"]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def answer(files: dict[str, str], exercise: int, file: str, edits: list) -> None:
    """Edit the solution of an exercise, and nothing outside its markers."""
    for right, wrong in edits:
        lines, edited = files[file].splitlines(keepends=True), 0
        for number, first, end in reversed(solutions(files[file], file)):
            body = "".join(lines[first:end])
            if number == exercise and right in body:
                assert body.count(right) == 1, f"exercise {exercise}: {right!r} stands there more than once"
                lines[first:end], edited = [body.replace(right, wrong)], edited + 1
        assert edited == 1, f"exercise {exercise}: {right!r} stands in {edited} of its solutions"
        files[file] = "".join(lines)


def command(*arguments) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "extras.assignments", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    out = tmp_path_factory.mktemp("class") / "student"
    done = command("--student", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def trees(student, tmp_path_factory):
    """All trees by name."""
    folder, files = tmp_path_factory.mktemp("trees"), code()
    marked = {file: text for file, text in files.items() if solutions(text, file)}
    out = {"solved": write_tree(folder / "solved", files)}
    for k in EXERCISES:
        stubbed = {file: stub(text, file, (k,)) for file, text in marked.items()}
        out[f"stub {k}"] = write_tree(folder / f"stub{k}", files | stubbed)
    for name, answers in (("wrong", WRONG), ("more wrong", MORE_WRONG)):
        for group in TOGETHER:
            edited = dict(files)
            for k in set(group) & set(answers):
                answer(edited, k, *answers[k][:2])
            for k in group:
                out[f"{name} {k}"] = folder / f"{name} {group}"
            write_tree(folder / f"{name} {group}", edited)
    broken = files["selective_scan.py"].replace("def scan_reference(", "def scan_reference((")
    out["syntax error"] = write_tree(folder / "syntax", files | {"selective_scan.py": broken})
    broken = {"tests/adapters.py": "def discretise(:\n"}
    out["broken adapters"] = write_tree(folder / "adapters", files | broken)
    ends = {file: text for file, text in files.items() if file != "sim/scene.py"}
    answer(ends, 6, "data/dataset.py", [("tokens, labels = [], []", "import os; os._exit(0)")])
    out["a file is missing, a process ends"] = write_tree(folder / "ends", ends)
    out["empty"] = write_tree(folder / "empty", {"notes.txt": ""})
    # A student who edits the tests: nothing of it may count.
    pass_all = "import pytest\n@pytest.hookimpl(wrapper=True)\ndef pytest_runtest_makereport(item, call):\n"
    pass_all += "    report = yield\n    report.outcome = 'passed'\n    return report\n"
    empty = "".join(f"import pytest\n@pytest.mark.ex{k}\ndef test_{k}(): pass\n" for k in EXERCISES)
    out["edited tests"] = shutil.copytree(student, folder / "cheat")
    write_tree(
        folder / "cheat", {"tests/conftest.py": pass_all, "conftest.py": pass_all, "tests/test_exercises.py": empty}
    )
    return out


@pytest.fixture(scope="module")
def scores(trees, tmp_path_factory):
    """Name: score, all of one run of the grader."""
    file = tmp_path_factory.mktemp("scores") / "score.json"
    done = command("--grade", *dict.fromkeys(trees.values()), "--out", file)
    assert done.returncode == 0, done.stderr
    read = json.loads(file.read_text())["trees"]
    assert all(f"{tree}: {read[str(tree)]['points']:g} of 100 points" in done.stdout for tree in trees.values())
    return {name: read[str(tree)] for name, tree in trees.items()}


def failing(score: dict) -> set[int]:
    return {int(k) for k, s in score["exercises"].items() if s["failed"] or not s["passed"]}


# ---- the student's tree


def has_docstring(node) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None


def test_the_students_tree_has_all_but_the_solutions(student):
    files = {path.relative_to(student).as_posix() for path in student.rglob("*") if path.is_file()}
    assert not files & set(TEACHER_ONLY) and all((ROOT / file).is_file() for file in TEACHER_ONLY)
    assert {
        "README.md",
        "tests/adapters.py",
        "tests/test_exercises.py",
        "data/pretrained/robomamba-tiny/config.json",
    } <= files
    stubbed = 0
    for file in files:
        if (ROOT / file).read_bytes() == (student / file).read_bytes():
            continue
        ours, theirs = (ROOT / file).read_text(), (student / file).read_text()
        for _, first, end in solutions(ours, file):
            lines = ours.splitlines()[first:end]
            assert "\n".join(lines) not in theirs and "NotImplementedError" not in "\n".join(lines)
            stubbed += 1
        for number, first, end in solutions(theirs, file):
            (line,) = theirs.splitlines()[first:end]
            assert f"exercise {number}" in line and file in line
        docs = [
            [ast.get_docstring(node) for node in ast.walk(ast.parse(x)) if has_docstring(node)] for x in (ours, theirs)
        ]
        assert docs[0] == docs[1], f"{file}: a docstring was lost"
    assert stubbed == sum(len(solutions(text, file)) for file, text in code().items()) >= len(EXERCISES)


def test_the_students_tree_loads_and_only_a_call_fails(student):
    names = [file[:-3].replace("/", ".") for file in code() if not file.startswith("tests/") and "__init__" not in file]
    program = f"import {', '.join(names)}\ninputs = selective_scan.example_inputs(1, 2, 3, 4)\n"
    program += "try:\n    selective_scan.scan_reference(*inputs)\n"
    program += "except NotImplementedError as error:\n    print(error, selective_scan.__file__)"
    env = os.environ | {"PYTHONPATH": str(student)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=student, env=env, capture_output=True, text=True, timeout=120
    )
    expected = f"exercise 2, the reference scan: selective_scan.py {student}/selective_scan.py"
    assert done.stdout.strip() == expected, done.stderr


def test_every_file_is_the_students_or_the_teachers(student):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    left_out = [file for file in listed.stdout.splitlines() if not (student / file).exists() and (ROOT / file).exists()]
    assert set(left_out) <= set(TEACHER_ONLY), "say in extras/assignments.py whose these are"


def test_markers_of_pytest_are_the_exercises():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert [m for m in said if m.startswith("ex")] == [f"ex{k}: {title}" for k, (title, _) in EXERCISES.items()]
    assert sum(points for _, points in EXERCISES.values()) == 100


@pytest.mark.parametrize(
    "text, line",
    [
        ("# exercise 1: a\nx\n", 1),
        ("x\n# end of exercise 1\n", 2),
        ("# exercise 1: a\n# end of exercise 2\n", 2),
        ("# exercise 1: a\n# exercise 2: b\n# end of exercise 2\n", 2),
        ("# exercise 9: a\n# end of exercise 9\n", 1),
    ],
)
def test_markers_without_partner_are_named(text, line):
    with pytest.raises(ValueError, match=f"^file.py:{line}: "):
        solutions(text, "file.py")


# ---- the grader


def test_every_solution_passes(scores):
    assert scores["solved"]["points"] == scores["solved"]["max_points"] == 100 and not failing(scores["solved"])


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_stub_fails_its_own_tests_and_those_that_must_depend_on_it(scores, exercise):
    score = scores[f"stub {exercise}"]
    assert failing(score) == FAIL_WITH[exercise]
    own = score["exercises"][str(exercise)]
    assert own["passed"] == [] and own["points"] == 0
    for k in FAIL_WITH[exercise]:
        for message in score["exercises"][str(k)]["failed"].values():
            assert message.startswith(f"NotImplementedError: exercise {exercise}, ") and ".py:" in message


@pytest.mark.parametrize(
    "name, exercise", [(n, k) for n, w in (("wrong", WRONG), ("more wrong", MORE_WRONG)) for k in w]
)
def test_a_typical_wrong_answer_is_named(scores, name, exercise):
    said = (WRONG if name == "wrong" else MORE_WRONG)[exercise][2]
    own = scores[f"{name} {exercise}"]["exercises"][str(exercise)]
    assert any("likely mistake: " in text and said in text for text in own["failed"].values()), own
    assert own["points"] < own["max_points"]


def test_without_solutions_there_are_no_points_whatever_the_students_tests_say(scores):
    assert scores["edited tests"]["points"] == 0
    assert all(
        "NotImplementedError" in m for s in scores["edited tests"]["exercises"].values() for m in s["failed"].values()
    )


def test_a_broken_tree_is_a_result(scores):
    assert failing(scores["syntax error"]) == {1, 2, 3, 4, 5, 7}  # 6 and 8 need no scan
    message = scores["syntax error"]["exercises"]["1"]["failed"]["test_decay[one token]"]
    assert "SyntaxError" in message and "selective_scan.py" in message
    score = scores["a file is missing, a process ends"]
    assert failing(score) == {6, 8}, "a file that the tree lacks came from elsewhere"
    assert "cannot import name 'world'" in str(score["exercises"]["8"]["failed"])
    assert score["exercises"]["6"]["message"].startswith("the process ended by itself in test_tokens")
    assert scores["broken adapters"]["points"] == 0 and failing(scores["broken adapters"]) == set(EXERCISES)
    assert all("adapters.py" in s["message"] for s in scores["broken adapters"]["exercises"].values())
    assert scores["empty"]["points"] == 0 and "tests/adapters.py: no such file" in scores["empty"]["message"]


def test_an_endless_loop_is_stopped_and_named(tmp_path):
    files = code()
    answer(files, 6, "data/dataset.py", [("tokens, labels = [], []", "while True: pass")])
    tree = write_tree(tmp_path / "tree", files)
    before = sorted(tree.rglob("*"))
    done = command("--grade", tree, "--exercises", "6", "--seconds", "2", "--out", tmp_path / "score.json")
    assert done.returncode == 0, done.stderr
    own = json.loads((tmp_path / "score.json").read_text())["trees"][str(tree)]["exercises"]["6"]
    assert own["points"] == 0 and len(own["failed"]) == 3 and set(own["failed"].values()) == {"not run"}
    assert own["message"] == "the process was stopped after 2 s in test_tokens_of_all_turns_follow_each_other"
    assert own["message"] in done.stdout
    assert sorted(tree.rglob("*")) == before, "the grader wrote into the student's tree"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--grade", "nowhere"], "nowhere: no such folder"),
        (["--student", "data"], "data: exists"),
        (["--student", "new", "--exercises", "1,9"], "--exercises 1,9: there are 1, 2"),
        (["--student", "new", "--exercises", "one"], "--exercises one: expected numbers"),
        (["--grade", ".", "--seconds", "0"], "--seconds 0"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["assignments", *flags])
    with pytest.raises(SystemExit) as stop:
        assignments.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_some_exercises_only(tmp_path):
    assignments.write_student(tmp_path / "week1", (1, 2))
    assert (tmp_path / "week1/robomamba.py").read_text() == (ROOT / "robomamba.py").read_text()
    assert (tmp_path / "week1/selective_scan.py").read_text().count("raise NotImplementedError") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["week1"]
