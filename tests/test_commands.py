"""Every command of the README and of the Makefile, run as it stands there, at miniature size.

pytest tests/test_commands.py

The sizes and names that a reader is asked to fill in are replaced by MINIATURE, from the top; nothing else is changed.
What takes the environment or minutes at any size stands in ELSEWHERE with the test that runs it.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_partnet import write_cabinet

import sim_eval
from extras.assignments import SHIPPED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = ROOT / "data/pretrained/robomamba-tiny"

ELSEWHERE = {
    "python3.11 -m venv": "the environment itself",
    "python -m pytest": "this suite",
    "python sim_eval.py --demo": "test_eval.py",
    "python sim_eval.py --speed": "test_speed.py",
    "python selective_scan.py": "test_scan.py",
    "python -m extras.mistakes --prove": "test_extras_look.py",
    "python -m extras.assignments --grade": "test_extras_assignments.py",
    "python train.py --stage align --vision-weights": "test_published.py",
    "torchrun --nproc-per-node": "test_train.py",
}
MINIATURE = (  # {place} is a folder with what a reader would bring
    (r"scene.png|depth.npy|your.json|--images \w+", r"{place}/\g<0>"),
    (r"{place}/--images \w+", "--images {place}/pictures"),
    (r"mine=DIR", "mine=data/pretrained/robomamba-tiny"),
    (r"--objects DIR", "--objects {place}/objects"),
    (r"--(out|student|look) \S+", r"--\1 {out}"),
    (r"--episodes \d+", ""),
    (r"^(python sim_eval.py (?!--sheet|--affordance).*)", r"\1 --episodes 2"),
    (r"--affordance \S+", "--affordance Bottle"),
    (r"^python train.py .*", r"\g<0> --max-steps 2 --batch-size 2"),
    (r"^python -m extras.mistakes$", r"\g<0> --out {out}"),
    (r"^python -m extras.reasoning_eval.*", r"\g<0> --train {place}/questions --data {place}/questions"),
)


def commands() -> list[str]:
    """Every line that starts with python or torchrun, of bash blocks and of code in sentences, without its comment."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).splitlines() + re.findall(r"`([^`\n]+)`", README)
    lines = [re.sub(r"^OMP_\w+=\w+ ", "", line.split(" #")[0].strip()) for line in lines]
    return list(dict.fromkeys(line for line in lines if re.match(r"(python|torchrun)[\d.]* .*(\.py|-m )", line)))


def elsewhere(command: str) -> bool:
    return any(command.startswith(start) for start in ELSEWHERE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A picture with its depth, a cabinet of one's own, two records in LLaVA's layout, and a set of questions."""
    folder = tmp_path_factory.mktemp("reader")
    scene = sim_eval.Scene(128)
    try:
        scene.spawn("StorageFurniture", 10_700_000).render()
        Image.fromarray(scene.rgb).save(folder / "scene.png")
        np.save(folder / "depth.npy", scene.depth)
    finally:
        scene.close()
    (folder / "pictures").mkdir()
    shutil.copy(folder / "scene.png", folder / "pictures/one.png")
    turns = [{"from": "human", "value": "<image>\nWhat is this object?"}, {"from": "gpt", "value": "a cabinet"}]
    records = [{"id": str(k), "image": "one.png", "conversations": turns} for k in range(2)]
    (folder / "your.json").write_text(json.dumps(records))
    write_cabinet(folder / "objects/1")
    build = [
        "data.build",
        "--scenes",
        "4",
        "--split",
        "test-seen",
        "--workers",
        "1",
        "--out",
        str(folder / "questions"),
    ]
    subprocess.run([sys.executable, "-m", *build], cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


def test_few_commands_are_left_to_other_tests():
    assert [start for start in ELSEWHERE if not any(c.startswith(start) for c in commands())] == []
    assert sum(not elsewhere(c) for c in commands()) >= 15


@pytest.mark.parametrize("command", [c for c in commands() if not elsewhere(c)])
def test_a_command_of_the_readme(command, place, tmp_path):
    small = command
    for pattern, replacement in MINIATURE:
        small = re.sub(pattern, replacement, small)
    words = [w.format(place=place, out=tmp_path / "out") for w in shlex.split(small)]
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    written = list((tmp_path / "out").rglob("*.*"))
    assert written if "{out}" in small else done.stdout.strip(), f"{small!r} left nothing"


def test_the_python_of_the_readme(place):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    code = block.replace("scene.png", str(place / "scene.png")) + "\nprint(action.u, action.v, action.rotation.shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip().endswith("(3, 3)"), done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_the_makefile_makes_a_checkpoint_and_its_tables(tmp_path):
    """make train, ship, evaluate, ablations and encoders in a copy of the tree, with two steps of every training."""
    tree = tmp_path / "tree"
    for pattern in SHIPPED:
        for file in ROOT.glob(pattern):
            if file.is_file():
                (tree / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tree / file.relative_to(ROOT))
    (tree / ".venv/bin").mkdir(parents=True)
    (tree / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tree / ".venv/bin/python").chmod(0o755)
    (tree / ".venv/ready").touch()
    sizes = (
        "SCENES=12 VAL_SCENES=6 TEST_SCENES=4 EPISODES=2 VISION_FLAGS=--max-steps=2,2 ALIGN_FLAGS=--max-steps=2"
        " COTRAIN_FLAGS=--max-steps=2"
    )
    for target in ("train", "ship", "evaluate", "ablations", "encoders"):
        command = ["make", target, *sizes.split(), "ABLATION_STEPS=2", "ENCODER_STEPS=2", "PROBE_STEPS=2"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    shipped = tree / "data/pretrained/robomamba-tiny"
    assert (shipped / "model.safetensors").read_bytes() != (TINY / "model.safetensors").read_bytes()
    assert json.loads((shipped / "results.json").read_text())["policies"]["model"]["splits"]["seen"]["n"] == 2
    assert json.loads((tree / "runs/tiny/ablations/results.json").read_text())["policies"]["general-only"]
