"""Packaging: what an installation may touch, and how the Makefile finds its Python.

pytest tests/test_install.py
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHELL = "#!/bin/sh\n"


@pytest.fixture
def bare(tmp_path):
    """Packaging files and Makefile alone in a folder with a space, and a PATH that holds a shell's tools only."""
    tree = tmp_path / "a copy"
    tree.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "robomamba.py"):
        shutil.copy(ROOT / name, tree)
    for folder in ("data", "sim", "common"):
        (tree / folder).mkdir()
        (tree / folder / "__init__.py").touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "make", "test", "touch", "echo", "mkdir"):
        (tools / name).symlink_to(shutil.which(name))
    return tree, tools


def make(tree: Path, tools: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {"PATH": str(tools), "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(["make", *words], cwd=tree, env=environment, capture_output=True, text=True, timeout=60)


def fake_python(path: Path, minor: int) -> None:
    """A program that says its version as Python does; made into .venv/bin/python, it notes what it is called with."""
    text = (
        SHELL
        + f"""case "$1" in
-c) [ {minor} -ge 11 ] ;;
-m) if [ "$2" = venv ]; then mkdir "$3" "$3/bin"; echo "{SHELL.strip()}" > "$3/log"; cp "$0" "$3/bin/python"; fi
    if [ "$2" = pip ]; then echo "$@" >> .venv/log; fi ;;
esac
"""
    )
    path.write_text(text)
    path.chmod(0o755)


def test_an_installation_puts_no_module_into_site_packages(bare, tmp_path, monkeypatch):
    """A wheel of this project holds its metadata only: `data`, `sim`, `common` would shadow other people's modules."""
    monkeypatch.chdir(bare[0])
    wheel = build_meta.build_wheel(str(tmp_path))
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    assert names and all(".dist-info/" in name for name in names), names


def test_the_simulator_is_an_extra_and_every_extra_has_what_it_promises():
    extras = PROJECT["optional-dependencies"]
    assert {"sim", "test", "dev", "plots", "bench", "published", "parity", "gym", "play", "notebook"} == set(extras)
    assert not any("pybullet" in need for need in PROJECT["dependencies"])
    assert extras["sim"][0].startswith("pybullet")
    assert PROJECT["requires-python"] == ">=3.11"


def test_constraints_pin_what_make_installs():
    makefile = (ROOT / "Makefile").read_text()
    installed = {name for group in re.findall(r'"\.\[([\w,]+)\]"', makefile) for name in group.split(",")}
    needs = PROJECT["dependencies"] + [n for e in installed for n in PROJECT["optional-dependencies"][e]]
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    assert {re.match(r"[\w-]+", need)[0] for need in needs} <= pinned


def test_make_says_what_to_do_without_a_python(bare):
    tree, tools = bare
    for minor in (8, 10):
        fake_python(tools / "python3", minor)
        done = make(tree, tools, ".venv/ready")
        assert done.returncode != 0 and not (tree / ".venv").exists()
        first, *rest = done.stderr.strip().splitlines()
        assert "No Python >= 3.11" in first and "uv venv" in first and "PYTHON=" in first
        assert all(line.startswith("make:") for line in rest), rest
        assert make(tree, tools, ".venv/ready", f"PYTHON={tools}/python3").stderr.startswith(first)


def test_an_environment_without_pip_or_of_an_old_python_is_one_line(bare):
    """What `python3 -m venv` leaves on a Debian without python3-venv, and `uv venv` without --seed."""
    tree, tools = bare
    (tree / ".venv/bin").mkdir(parents=True)
    fake_python(tree / ".venv/bin/python", 10)
    done = make(tree, tools, ".venv/ready")
    first, *rest = done.stderr.strip().splitlines()
    assert done.returncode != 0 and "Remove .venv" in first and "--seed" in first
    assert all(line.startswith("make:") for line in rest) and not (tree / ".venv/log").exists()


@pytest.mark.parametrize(("names", "taken"), [({"python3.11": 11, "python3": 12}, 11), ({"python3": 13}, 13)])
def test_make_takes_the_first_python_that_answers(bare, names, taken):
    """A command that exists but does not start, as pyenv's shims do, is passed over."""
    tree, tools = bare
    (tools / "python3.12").write_text(SHELL + "echo not installed >&2; exit 127\n")
    (tools / "python3.12").chmod(0o755)
    (tools / "cp").symlink_to(shutil.which("cp"))
    for name, minor in names.items():
        fake_python(tools / name, minor)
    done = make(tree, tools, ".venv/ready")
    assert done.returncode == 0, done.stderr
    assert f"[ {taken} -ge 11 ]" in (tree / ".venv/bin/python").read_text()
    log = (tree / ".venv/log").read_text()
    assert ".[sim]" in log and ".[test" in log


def test_make_uses_an_environment_that_is_there(bare):
    tree, tools = bare
    (tree / ".venv/bin").mkdir(parents=True)
    fake_python(tree / ".venv/bin/python", 12)
    done = make(tree, tools, ".venv/ready")
    assert done.returncode == 0, done.stderr  # there is no Python on the PATH
    assert ".[test" in (tree / ".venv/log").read_text()


@pytest.mark.parametrize("target", ["demo", "quick", "train", "evaluate"])
def test_make_without_the_simulator_is_one_line(bare, target):
    tree, tools = bare
    (tree / ".venv/bin").mkdir(parents=True)
    (tree / ".venv/bin/python").write_text(SHELL + '[ "$2" != "import pybullet" ]\n')
    (tree / ".venv/bin/python").chmod(0o755)
    done = make(tree, tools, target)
    first, *rest = done.stderr.strip().splitlines()
    assert done.returncode != 0 and "needs the simulator" in first and "Linux x86_64" in first
    assert all(line.startswith("make:") for line in rest), rest


BLOCKED = """
import sys
sys.modules["pybullet"] = None
import numpy as np
import robomamba, train, finetune_policy, data.dataset, data.depth
from sim import appearance, catalogue, objects
for name in ("Safe", "grammar:book"):
    assert "<robot" in objects.to_urdf(catalogue.make_object(name, np.random.default_rng(0)))
model = robomamba.RoboMamba.from_pretrained("data/pretrained/robomamba-tiny-rgbd")
picture = "data/figures/examples/microwave.png"
print(model.generate(picture, "What is this object?"), model.predict_action(picture, "open the door").u > 0)
"""


def test_model_and_training_load_without_pybullet():
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "True" in done.stdout


COLLECTED = """
import sys
from importlib.machinery import PathFinder
import pytest
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *more: None if name == "pybullet" else real(name, *more))
sys.exit(pytest.main(["-p", "no:cacheprovider", "--collect-only", "tests"]))
"""


def test_without_pybullet_only_the_files_that_load_the_simulator_are_skipped_whole():
    done = subprocess.run([sys.executable, "-c", COLLECTED], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    whole = set(re.search(r"files skipped whole: (.*)", done.stdout)[1].split(", "))
    allowed = {"test_eval.py", "test_eval_accidents.py", "test_sim.py"}
    allowed |= {f"test_extras_{name}.py" for name in ("example_policy", "gym", "partnet", "play")}
    assert {"test_eval.py", "test_eval_accidents.py", "test_sim.py"} <= whole <= allowed


@pytest.mark.parametrize(
    "module, flags",
    [
        ("sim_eval", ["--demo"]),
        ("sim_eval", ["--policy", "expert", "--episodes", "2"]),  # found out by a worker
        ("sim_eval", ["--policy", "expert", "--objects", "."]),
        ("sim.pictures", ["--sheet", "sheet.png"]),
        ("sim.pictures", ["--affordance", "Door"]),
    ],
)
def test_asking_for_the_simulator_without_pybullet_is_one_line(module, flags, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pybullet'] = None\n")  # in workers too
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", module, *flags, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("the simulator needs PyBullet: `pip install pybullet`")
    assert "Python 3.11" in line and line.endswith("reading, training and asking work without it")
