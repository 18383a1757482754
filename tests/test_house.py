"""The rules of the house: who may import whom, and that the extras can be deleted.

pytest tests/test_house.py
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("selective_scan", "robomamba", "train", "finetune_policy", "sim_eval")
ROOMS = ("data", "sim", "common", "extras")
MAY_IMPORT = {  # arrows run one way: scripts -> data -> sim -> common
    "scripts": {"scripts", "data", "sim", "common"},
    "data": {"data", "sim", "common"},
    "sim": {"sim", "common"},
    "common": {"common"},
}
FILES = {name: [ROOT / f"{name}.py"] for name in SCRIPTS} | {room: sorted(ROOT.glob(f"{room}/*.py")) for room in ROOMS}


def imported(path: Path, everywhere: bool = False) -> set[str]:
    """Full names of what a file imports: at module level, or also inside its functions."""
    body = [ast.parse(path.read_text("utf-8"))]
    found = set()
    while body:
        node = body.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            body += ast.iter_child_nodes(node)
    return found


def room_of(name: str) -> str | None:
    first = name.split(".")[0]
    return "scripts" if first in SCRIPTS else first if first in ROOMS else None


def test_arrows_run_one_way_and_nobody_needs_the_extras():
    wrong = []
    for owner, files in FILES.items():
        for path in files if owner != "extras" else ():
            rooms = {room_of(name) for name in imported(path)} - {None}
            wrong += [f"{path.relative_to(ROOT)} imports {room}" for room in rooms - MAY_IMPORT[room_of(owner)]]
    assert not wrong, sorted(wrong)


def test_rooms_import_no_extras_and_no_upper_room_inside_functions_either():
    """Scripts may, inside a function; so may a room's `main`-like use of a script that hands a model over."""
    wrong = []
    for room in ("data", "sim", "common"):
        for path in FILES[room]:
            if "extras" in {room_of(name) for name in imported(path, everywhere=True)}:
                wrong.append(str(path.relative_to(ROOT)))
    assert not wrong, wrong


def module_file(name: str) -> Path | None:
    """data.prompts -> data/prompts.py; None for what is not ours."""
    path = ROOT / (name.replace(".", "/") + ".py")
    return path if room_of(name) and path.is_file() else None


def test_nothing_that_the_model_imports_imports_the_model():
    todo, seen = [ROOT / "robomamba.py"], set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [file for file in map(module_file, imported(path)) if file]
    back = [str(path.relative_to(ROOT)) for path in seen if "robomamba" in imported(path, everywhere=True)]
    assert len(seen) > 3 and not back, back


def test_only_the_simulator_imports_pybullet():
    users = {
        path.relative_to(ROOT).as_posix()
        for files in FILES.values()
        for path in files
        if any(name.split(".")[0] == "pybullet" for name in imported(path, everywhere=True))
    }
    assert users and all(user.startswith("sim/") for user in users), users


def test_importing_the_model_loads_no_simulator_and_no_plots():
    command = [sys.executable, "-X", "importtime", "-c", "import robomamba"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-500:]
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "selective_scan" in loaded and "torch" in loaded
    heavy = ("pybullet", "sim", "extras", "matplotlib", "common.plots")
    assert not [name for name in loaded if name in heavy or name.startswith(("sim.", "extras.", "matplotlib."))]


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory):
    """A copy of the sources without extras/ and their tests."""
    copy = tmp_path_factory.mktemp("house") / "copy"
    left_out = shutil.ignore_patterns("extras", "test_extras*", "pretrained", "cache", "runs", ".*", "__pycache__")
    return Path(shutil.copytree(ROOT, copy, ignore=left_out))


PROGRAM = """
import contextlib, io, runpy, sys
for name in {scripts}:
    sys.argv = [name + ".py", "--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module(name, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (name, stop.code)
    assert name == "selective_scan" or "--" in said.getvalue(), name
import data.build, data.dataset, data.questions, data.tokenizer
assert not [name for name in sys.modules if name.split(".")[0] == "extras"]
print("all loaded")
"""


def test_the_extras_can_be_deleted(without_extras):
    assert not (without_extras / "extras").exists() and not list(without_extras.glob("tests/test_extras*"))
    program = PROGRAM.format(scripts=SCRIPTS)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=without_extras, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip().endswith("all loaded"), done.stderr[-1000:]


def test_no_other_test_needs_the_extras():
    """What stays after `rm -rf extras tests/test_extras*` imports none of it."""
    left = [path for path in ROOT.glob("tests/*.py") if not path.name.startswith("test_extras")]
    using = [path.name for path in left if any(room_of(name) == "extras" for name in imported(path, everywhere=True))]
    assert left and not using, using
