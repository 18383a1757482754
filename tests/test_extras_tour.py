"""extras/tour.ipynb runs from top to bottom without the simulator, and its pictures are what the simulator renders.

pytest tests/test_extras_tour.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "extras/tour.ipynb"
EXAMPLES = ROOT / "data/figures/examples"
RUNNER = """
import json, sys
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
names = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
assert "pybullet" not in sys.modules, "the notebook loaded the simulator"
assert abs(names["by_hand"][2] - 0.3466) < 1e-4
assert names["cut"] < 1e-5 and names["moved"][:30].max() == 0
assert names["matrix"].shape == (names["L"], names["L"]) and float(names["matrix"].triu(1).abs().max()) == 0
print("cells:", sum(cell["cell_type"] == "code" for cell in cells))
"""


def test_every_cell_runs_without_the_simulator():
    environment = os.environ | {"MPLBACKEND": "Agg", "TOUR_STEPS": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUNNER, str(NOTEBOOK)]
    done = subprocess.run(command, cwd=ROOT / "extras", env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "cells: 10" in done.stdout


def test_outputs_are_committed_and_small():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [out for cell in cells for out in cell["outputs"] if "image/png" in out.get("data", {})]
    assert len(pictures) >= 4
    assert not any(out["output_type"] == "error" for cell in cells for out in cell["outputs"])


@pytest.mark.parametrize("example", json.loads((EXAMPLES / "examples.json").read_text()), ids=lambda e: e["picture"])
def test_an_example_is_what_the_simulator_renders_from_its_seed(example):
    pytest.importorskip("pybullet")
    from sim.scene import Scene

    with Scene(128) as scene:
        scene.spawn(example["category"], example["seed"]).render()
        depth = np.nan_to_num(np.round(scene.depth * 1000), posinf=0)
        f, cx, cy = scene.intrinsics
    assert np.array_equal(np.array(Image.open(EXAMPLES / example["picture"])), scene.rgb)
    assert np.abs(np.array(Image.open(EXAMPLES / example["depth"])).astype(float) - depth).max() <= 1
    assert example["intrinsics"] == pytest.approx([f, f, cx, cy], abs=1e-3)
