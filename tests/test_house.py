"""The rules of the house: who may import whom, and that the extras can be deleted.

pytest tests/test_house.py
"""

import ast
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("selective_scan", "robomamba", "train", "finetune_policy", "sim_eval")
MAY_IMPORT = {  # arrows run one way: scripts -> data -> sim -> common
    "scripts": {"scripts", "data", "sim", "common"},
    "data": {"data", "sim", "common"},
    "sim": {"sim", "common"},
    "common": {"common"},
    "extras": {"scripts", "data", "sim", "common", "extras"},
}
FILES = [ROOT / f"{name}.py" for name in SCRIPTS]
FILES += [path for room in ("data", "sim", "common", "extras") for path in sorted(ROOT.glob(f"{room}/*.py"))]


def imported(path: Path, everywhere: bool = False) -> set[str]:
    """Full names of what a file imports: at module level, or also inside its functions."""
    nodes = [ast.parse(path.read_text("utf-8"))]
    found = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


def room_of(name: str) -> str | None:
    first = name.split(".")[0]
    if first in SCRIPTS:
        return "scripts"
    return first if first in MAY_IMPORT else None


def test_arrows_run_one_way_and_only_the_simulator_imports_pybullet():
    """Inside functions too, a room imports no extras; a script may there, and no test but test_extras*."""
    wrong = []
    users = set()
    tests = [path for path in ROOT.glob("tests/*.py") if not path.name.startswith("test_extras")]
    for path in FILES + tests:
        file = path.relative_to(ROOT).as_posix()
        everywhere = imported(path, everywhere=True)
        owner = room_of(file.removesuffix(".py").replace("/", "."))
        if path in FILES:
            rooms = {room_of(name) for name in imported(path)} - {None}
            wrong += [f"{file} imports {room}" for room in rooms - MAY_IMPORT[owner]]
            users |= {file} if "pybullet" in {name.split(".")[0] for name in everywhere} else set()
        if owner not in ("scripts", "extras") and "extras" in {room_of(name) for name in everywhere}:
            wrong.append(f"{file} needs extras")
    assert not wrong, sorted(wrong)
    assert users and all(user.startswith("sim/") for user in users), users


def test_nothing_that_the_model_imports_imports_the_model():
    todo = [ROOT / "robomamba.py"]
    seen = set()
    while todo:
        path = todo.pop()
        seen.add(path)
        files = {ROOT / (name.replace(".", "/") + ".py") for name in imported(path) if room_of(name)}
        todo += [file for file in files - seen if file.is_file()]
    back = [str(path.relative_to(ROOT)) for path in seen if "robomamba" in imported(path, everywhere=True)]
    assert len(seen) > 3 and not back, back


RUN = SCRIPTS if PathFinder.find_spec("pybullet") else SCRIPTS[:-1]  # sim_eval.py runs in the simulator
PROGRAM = f"""
import contextlib, io, runpy, sys
import robomamba
heavy = {{"pybullet", "sim", "extras", "matplotlib", "common.plots"}}
loaded = set(sys.modules) | {{name.split(".")[0] for name in sys.modules}}
assert "selective_scan" in loaded and not loaded & heavy, loaded & heavy
for name in {RUN}:
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
if "sim_eval" in {RUN}:
    import sim_eval
    try:
        raise AssertionError(sim_eval.partnet())
    except ValueError as error:
        assert "extras/partnet.py, which is not here" in str(error), error
print("all loaded")
"""


def test_the_extras_can_be_deleted_and_the_model_loads_no_simulator_and_no_plots(tmp_path):
    """In a copy of the sources without extras/ and their tests."""
    left_out = shutil.ignore_patterns("extras", "test_extras*", "pretrained", "cache", "runs", ".*", "__pycache__")
    copy = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out))
    assert not (copy / "extras").exists() and not list(copy.glob("tests/test_extras*"))
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=copy, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip().endswith("all loaded"), done.stderr[-1000:]
