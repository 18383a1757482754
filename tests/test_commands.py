"""Every command of README.md and every target of the Makefile, as it stands there, at miniature size.

pytest tests/test_commands.py

What a reader is asked to fill in is replaced by NAMES; SIZES is added at the end, where the last flag of a name wins.
Commands run inside the test's process, which saves the seconds that a fresh interpreter needs to load torch.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = "data/pretrained/robomamba-tiny-rgbd"

DATA = "python -m data.build --scenes 30000"
ELSEWHERE = {  # command: the test that runs it
    "python3.11 -m venv": "the environment itself",
    DATA: "the fixture `place`",
    "python -m pytest": "test_exercises.py",
    "python sim_eval.py --demo": "test_eval.py",
    "python -m extras.assignments --grade": "test_extras_assignments.py",
    "python train.py --stage align --vision-weights": "test_extras_published.py",
    "torchrun --nproc-per-node": "test_train.py",
}
NAMES = (  # {place} is a folder with what a reader would bring
    (r"your\.json", r"{place}/\g<0>"),
    (r"--images folder", "--images {place}/pictures"),
    (r"mine=DIR", f"mine={SHIPPED}"),
    (r"--objects DIR", "--objects {place}/objects"),
    (r"--(out|student) \S+", r"--\1 {out}"),
    (r"^(python train.py --stage \w+)$", rf"\1 --data {{place}}/data --val '' --init {SHIPPED}"),
    (r"^python finetune_policy.py --half$", rf"\g<0> --data {{place}}/data --val '' --checkpoint {SHIPPED}"),
)
SIZES = {
    "data.build": "--scenes 4 --demos 2 --workers 1 --out {out}",
    "train.py": "--max-steps 2 --batch-size 2 --out {out}",
    "finetune_policy.py": "--epochs 1 --out {out}",
    "sim_eval.py": "--episodes 2 --workers 1",
    "extras.mistakes": "--out {out}",
}


def commands(comments: bool = False) -> list[str]:
    """Every line that starts with python or torchrun, of bash blocks and of code in sentences, without its comment."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    lines = blocks.splitlines() + re.findall(r"`([^`\n]+)`", README)
    lines = [line if comments else line.split(" #")[0].strip() for line in lines]
    found = list(dict.fromkeys(line for line in lines if re.match(r"(python|torchrun)[\d.]* .*(\.py|-m )", line)))
    return [line for line in found if "extras." not in line or (ROOT / "extras").exists()]


def here() -> list[str]:
    return [command for command in commands() if not command.startswith(tuple(ELSEWHERE))]


def execute(words: list[str]) -> tuple[int, str]:
    """Run `python *words` in this process: its exit code and what it printed."""
    module = words[0] == "-m"
    said = io.StringIO()
    before = sys.argv, list(sys.path)
    sys.argv = words[1:] if module else words
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        sys.argv, sys.path[:] = before
    return 0, said.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cabinet of one's own, a picture and two records in LLaVA's layout, and a small training set."""
    from test_extras_partnet import write_cabinet  # needs PyBullet

    folder = tmp_path_factory.mktemp("reader's folder")
    (folder / "pictures").mkdir()
    shutil.copy(ROOT / "data/figures/examples/cabinet.png", folder / "pictures/one.png")
    turns = [{"from": "human", "value": "<image>\nWhat is this object?"}, {"from": "gpt", "value": "a cabinet"}]
    records = [{"id": str(k), "image": "one.png", "conversations": turns} for k in range(2)]
    (folder / "your.json").write_text(json.dumps(records))
    write_cabinet(folder / "objects/1")
    code, said = execute([*DATA.split()[1:], *shlex.split(SIZES["data.build"])[:-1], str(folder / "data")])
    assert code == 0, said
    return folder


def test_few_commands_are_left_to_other_tests():
    assert [start for start in ELSEWHERE if not any(c.startswith(start) for c in commands())] == []
    assert len(here()) >= 15


@pytest.mark.parametrize("command", here())
def test_a_command_of_the_readme(command, place, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = command
    for pattern, replacement in NAMES:
        small = re.sub(pattern, replacement, small)
    words = shlex.split(small)[1:]
    script = words[1] if words[0] == "-m" else words[0]
    words += shlex.split(SIZES.get(script, ""))
    out = tmp_path / "out"
    words = [word.format(place=place, out=out) for word in words]
    code, said = execute(words)
    assert code == 0, said[-2000:]
    assert list(out.rglob("*.*")) if str(out) in words else said.strip(), f"{words} left nothing"


def blocks_of_python() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_python_of_the_readme(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    block, _ = blocks_of_python()
    names: dict = {}
    exec(block, names)
    assert names["action"].rotation.shape == (3, 3)
    assert capsys.readouterr().out.strip() in block  # the answer is its comment


def test_what_the_readme_says_of_its_questions_is_what_the_model_says(monkeypatch):
    """To a few tenths of a pixel, which is what another processor's rounding may change."""
    monkeypatch.chdir(ROOT)
    told = [line.split("# ") for line in commands(comments=True) if re.match(r"python robomamba.py .*# ", line)]
    answers = {comment: execute(shlex.split(command)[1:])[1] for command, comment in told if "metres" not in comment}
    assert len(answers) == 2
    for comment, said in answers.items():
        said = " ".join(said.split()[: len(comment.split())])
        assert re.sub(r"[\d.]+", "", said) == re.sub(r"[\d.]+", "", comment)
        assert np.allclose(*(np.array(re.findall(r"[\d.]+", text), float) for text in (said, comment)), atol=0.3), said


def test_the_readme_s_loader_of_demonstrations_finds_the_points_that_the_simulator_knows(tmp_path, capsys):
    pytest.importorskip("pybullet")
    from sim.scene import Scene

    (command,) = (line for line in commands() if "--full-labels" in line)
    folder = tmp_path / "demos"
    code, said = execute([*shlex.split(command)[1:], "--scenes", "8", "--workers", "1", "--out", str(folder)])
    assert code == 0, said
    block = blocks_of_python()[1]
    assert len(block.splitlines()) <= 15 and block.count("runs/demos") == 1
    block = block.replace("runs/demos", str(folder)) + "    found.append((demo, rgb, part, v, u, z, world[:3]))\n"
    names: dict = {"found": []}
    exec(block, names)
    assert len(names["found"]) == len(capsys.readouterr().out.splitlines()) >= 4
    errors = []
    with Scene(128) as scene:
        for demo, rgb, part, v, u, z, world in names["found"]:
            scene.spawn(demo["category"], demo["seed"]).render()
            assert np.array_equal(rgb, scene.rgb) and part[v, u]
            assert np.array_equal(part, scene.links == demo["mask_value"] - 2)
            if z:
                errors.append(np.linalg.norm(world - scene.backproject(u, v)))
    assert len(errors) >= 3 and np.median(errors) < 0.01 and max(errors) < 0.1  # in metres; the depth camera errs


# ---- the Makefile

DRIVER = """
import runpy, shlex, subprocess, sys
sys.path.insert(0, "")
for line in sys.stdin.read().replace("\\\\\\n", " ").splitlines():
    line = line.strip().removeprefix("OMP_NUM_THREADS=1 ")
    print("$", line, flush=True)
    if not line.startswith(".venv/bin/python"):
        subprocess.run(line, shell=True, check=True)
        continue
    words = shlex.split(line)[1:]
    if words[0] == "-c":
        exec(words[1])
        continue
    if words[:2] == ["-m", "torch.distributed.run"]:  # one process of it, without the launcher
        words = words[words.index("1") + 1 :]
    try:
        sys.argv = words
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
SMALL = {
    "PROCESSES": "1",
    "DATA_FLAGS": "--scenes 6 --demos 3",
    "TRAIN_FLAGS": "--batch-size 2 --max-steps 2",
    "EVAL_FLAGS": "--episodes 2",
    "QUICK_SCENES": "6",
    "QUICK_VAL_SCENES": "6",
    "QUICK_VISION_STEPS": "2",
    "QUICK_COTRAIN_STEPS": "2",
    "QUICK_EPISODES": "2",
}


def recipe(tree: Path, *targets: str) -> str:
    """The commands of targets of the Makefile, at miniature size."""
    variables = [f"{name}={value}" for name, value in SMALL.items()]
    command = ["make", "--no-print-directory", "-n", *targets, *variables]  # `make test` may be what runs this
    said = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout


def make(tree: Path, *targets: str) -> None:
    """Run targets of the Makefile in `tree`: make says the commands, one Python process runs them."""
    pytest.importorskip("pybullet")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(
        command, cwd=tree, input=recipe(tree, *targets), env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of this repository in a folder with a space, its environment taken for made."""
    copy = tmp_path_factory.mktemp("a copy") / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "demo", "cache", "__pycache__"))
    (copy / ".venv").mkdir()
    (copy / ".venv/ready").touch()
    return copy


@pytest.mark.slow
def test_make_quick_ends_with_a_policy_beside_its_baselines(tree):
    make(tree, "quick")
    results = json.loads((tree / "runs/quick/eval/results.json").read_text())
    assert {"model", "model-depth", "random-backbone-depth", "blind"} <= set(results["policies"])
    assert (tree / "runs/quick/vision/curves.png").exists()


@pytest.mark.slow
def test_make_train_ships_a_checkpoint_and_makes_its_tables(tree):
    """Training needs nothing of extras/; evaluation's questions in words do."""
    (tree / "extras").rename(tree / "away")
    make(tree, "train", "ship")
    (tree / "away").rename(tree / "extras")
    make(tree, "evaluate")
    shipped = tree / SHIPPED
    assert (shipped / "model.safetensors").read_bytes() != (ROOT / f"{SHIPPED}/model.safetensors").read_bytes()
    results = json.loads((shipped / "results.json").read_text())
    assert results["policies"]["model"]["splits"]["seen"]["n"] == 2
    assert "seen (2)" in (tree / "README.md").read_text()


def test_short_runs_and_ablations_start_from_what_is_there_with_flags_that_exist(tree, monkeypatch):
    """They train for an hour what the targets above train too; here their flags are read, and what they start from."""
    monkeypatch.chdir(ROOT)
    made = {"runs/align", "runs/cotrain", "runs/policy"}  # of make train
    helps: dict[str, str] = {}
    lines = recipe(tree, "short", "questions", "targets", "ablations", "GPU=1").replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.removeprefix("OMP_NUM_THREADS=1 "))[1:] for line in lines if " --" in line]
    assert len(commands) >= 50
    for words in commands:
        script = words[1] if words[0] == "-m" else words[0]
        if script not in helps:
            helps[script] = execute([*words[: words.index(script) + 1], "--help"])[1]
        flags = dict(pair for pair in zip(words, words[1:], strict=False) if pair[0].startswith("--"))
        assert [name for name in words if name.startswith("--") and name not in helps[script]] == [], words
        needed = [flags[name] for name in ("--init", "--checkpoint") if flags.get(name)]
        needed += [entry.split("=")[1] for entry in flags.get("--policy", "").split(",") if "=" in entry]
        assert [folder for folder in needed if folder.startswith("runs") and folder not in made] == [], words
        made.add(flags["--out"])
