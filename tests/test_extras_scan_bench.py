"""The benchmark of the scans: it runs, its drawing is drawn, and its two classic failures fail.

pytest tests/test_extras_scan_bench.py
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_scan import check_definition, check_finite, check_linear

import selective_scan as module
from extras import scan_bench
from selective_scan import example_inputs, scan_chunked, scan_parallel

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "bug, check", [(scan_bench.scan_cumprod, check_finite), (scan_bench.scan_indexed, check_linear)]
)
def test_a_classic_failure_fails_its_check(bug, check):
    check_definition(bug, L=8, dt_range=(1e-3, 1e-2))  # it looks right on a short sequence
    with pytest.raises(AssertionError):
        check(bug)


@pytest.mark.parametrize("scan", (scan_chunked, scan_parallel))
def test_peak_memory_does_not_grow_with_all_states(scan, monkeypatch):
    """A few buffers and the states that are kept; the parallel scan of mambapy holds about eight tensors of states."""
    monkeypatch.setattr(module, "SLAB", 2**14)
    shape = (1, 512, 64, 16)
    states_mib = 4 * math.prod(shape) / 2**20
    slab_mib = 4 * module.SLAB / 2**20
    inputs_mib = 4 * 512 * (12 * 64 + 12 * 16) / 2**20
    peak = scan_bench.peak_mib(scan_bench.train, scan, example_inputs(*shape))
    assert peak <= 9 * slab_mib + states_mib / module.MIN_CHUNK + inputs_mib


def test_peak_memory_of_the_definition_is_all_states():
    shape = (1, 64, 64, 16)
    states_mib = 4 * math.prod(shape) / 2**20
    assert scan_bench.peak_mib(scan_bench.train, scan_bench.scan_reference, example_inputs(*shape)) >= 2 * states_mib


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_gpu_that_is_not_there_is_one_line(refused):
    refused("--device cuda: this machine has no GPU", scan_bench, "--device", "cuda")


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scan_bench, "QUICK_SHAPES", [(1, 16, 8, 4)])
    for name in ("linear", "indexed"):
        monkeypatch.setattr(scan_bench, name, lambda L, *_: {"L": L})
    monkeypatch.setattr(sys, "argv", ["", "--quick", "--rounds", "2", "--out", str(tmp_path / "scan.json")])
    scan_bench.main()
    result = json.loads((tmp_path / "scan.json").read_text())
    rows = {row["method"]: row for row in result["shapes"][0]["methods"]}
    assert {"reference", "chunked", "parallel"} <= rows.keys()
    for row in rows.values():
        assert row["error"] < 1e-5 and row["grad_error"] < 1e-4
        assert row["peak_mib"] > 0 and row["train_ms"] > 0 and row["times"][0] <= row["times"][1]
    assert rows["chunked"]["times"] == [1, 1]
    assert result["cumprod"][-1]["dt .001 to .1"] > 0.5 > result["cumprod"][0]["dt .001 to .1"]
    assert {"command", "commit", "hardware", "versions", "linear", "indexed"} <= result.keys()
    assert "parallel" in capsys.readouterr().out


def test_the_scan_itself_prints_the_ladder(monkeypatch):
    calls = []
    monkeypatch.setattr(scan_bench, "main", lambda short: calls.append(short))
    module.main()
    assert calls == [True]


def test_the_scan_without_extras_says_so(tmp_path):
    (tmp_path / "selective_scan.py").write_text((ROOT / "selective_scan.py").read_text())
    done = subprocess.run([sys.executable, "selective_scan.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "extras/scan_bench.py" in done.stdout


def test_figure(tmp_path, monkeypatch):
    scan_bench.figure(tmp_path / "chunks.png")
    assert min(Image.open(tmp_path / "chunks.png").size) >= 280
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="need matplotlib: pip install"):
        scan_bench.figure(tmp_path / "other.png")
