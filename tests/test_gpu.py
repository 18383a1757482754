"""On a GPU: the scans, the shipped model, and every training stage, against the same on the CPU.

pytest tests/test_gpu.py     # without a GPU all of it is skipped

Training runs under bfloat16 autocast, whose 8 bits of mantissa leave about 1 % of a loss.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from test_scan import CHECKS, check_definition, each_method
from test_train import config, data, few_steps, logged, policy, power_cut, start  # noqa: F401, fixtures

import train as train_module
from data.depth import read_depth
from finetune_policy import finetune
from robomamba import RoboMamba
from selective_scan import scan_parallel, scan_reference, selective_scan
from train import train

SHIPPED = Path(__file__).parent.parent / "data/pretrained/robomamba-tiny-rgbd"
EXAMPLES = SHIPPED.parents[1] / "figures/examples"


def on_gpu(scan):
    """The scan on the GPU, for inputs and outputs on the CPU, as the checks of test_scan.py give and take them."""
    return lambda *inputs: tuple(x.cpu() for x in scan(*(x.cuda() for x in inputs)))


@pytest.mark.parametrize("check", CHECKS)
@each_method
def test_scans(scan, check):
    check(on_gpu(scan))


@pytest.mark.parametrize("L", (1, 2, 65, 4096))
def test_long_and_short_sequences(L):
    check_definition(on_gpu(selective_scan), L=L, dtype=torch.float64)


def test_the_parallel_form_is_the_default(monkeypatch):
    called = []
    monkeypatch.setattr("selective_scan.scan_parallel", lambda *args: called.append(1) or scan_reference(*args))
    on_gpu(selective_scan)(*(torch.ones(1, 2, 3), torch.ones(1, 2, 3), -torch.ones(3, 2), *[torch.ones(1, 2, 2)] * 2))
    assert called


def test_slabs_of_a_sequence_too_long_for_one(monkeypatch):
    monkeypatch.setattr("selective_scan.PARALLEL_SLAB", 40_000)
    check_definition(on_gpu(scan_parallel), L=3000)


@pytest.fixture(scope="module")
def both() -> tuple[RoboMamba, RoboMamba]:
    """The shipped model on the CPU and on the GPU."""
    torch.backends.cudnn.allow_tf32 = False  # on by default in convolutions: three digits
    return RoboMamba.from_pretrained(SHIPPED), RoboMamba.from_pretrained(SHIPPED, device="cuda")


def examples() -> list[dict]:
    return json.loads((EXAMPLES / "examples.json").read_text())


@pytest.mark.parametrize("point", (False, True))
@pytest.mark.parametrize("with_depth", (False, True))
def test_actions_are_those_of_the_cpu(both, point, with_depth):
    assert len(examples()) > 3
    for example in examples():
        seen = (read_depth(EXAMPLES / example["depth"]), example["intrinsics"]) if with_depth else ()
        one, two = (
            m.predict_action(EXAMPLES / example["picture"], example["instruction"], *seen, point=point) for m in both
        )
        assert abs(one.u - two.u) < 0.05 and abs(one.v - two.v) < 0.05
        assert np.abs(one.rotation - two.rotation).max() < 1e-3


def test_answers_are_those_of_the_cpu(both):
    files = [EXAMPLES / example["picture"] for example in examples()]
    asked = ["What is this object?"] * len(files)
    said = [model.generate(file, asked[0]) for model in both for file in files]
    assert said[: len(files)] == said[len(files) :]
    decoding = pytest.importorskip("extras.decoding")
    assert decoding.generate_batch(both[1], files, asked) == said[: len(files)]


def test_step_is_forward(both):
    backbone = both[1].lm.backbone
    x = backbone.embedding(torch.arange(20, 60, device="cuda")[None])
    with torch.no_grad():
        whole, _ = backbone(x)
        _, states = backbone(x[:, :15])
        for t in range(15, 40):
            h, states = backbone.step(x[:, t], states)
            assert (h - whole[:, t]).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("stage", ("vision", "align", "cotrain"))
@pytest.mark.parametrize("workers", (0, 2))
def test_a_stage_has_the_losses_of_the_cpu(data, start, tmp_path, stage, workers):  # noqa: F811
    changes = dict(val=str(data / "val"), muon=stage != "align", max_steps=6, workers=workers)
    for device in ("cpu", "cuda"):
        train(config(data, start, tmp_path / device, stage, device=device, **changes))
    one, two = (logged(tmp_path / device, "loss") for device in ("cpu", "cuda"))
    assert len(one) == 6 and np.allclose(one, two, rtol=0.03), (one, two)


def test_stage_2_learns_what_it_learns_on_the_cpu(data, start, tmp_path):  # noqa: F811
    for device in ("cpu", "cuda"):
        finetune(policy(data, start, tmp_path / device, device=device))
    one, two = (logged(tmp_path / device, "loss") for device in ("cpu", "cuda"))
    assert len(one) == 4 and np.allclose(one, two, rtol=1e-3), (one, two)


@pytest.mark.parametrize("workers", (0, 2))
def test_a_stopped_run_goes_on(data, start, tmp_path, monkeypatch, workers):  # noqa: F811
    """Not bit for bit: some of cuDNN's and PyTorch's backward passes add in any order."""
    monkeypatch.setattr(train_module, "SAVE_EVERY", 2)
    cfg = config(data, start, tmp_path / "stopped", "cotrain", device="cuda", muon=True, max_steps=7, workers=workers)
    train(dataclasses.replace(cfg, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        power_cut(patch, 5)
        train(cfg)
    train(dataclasses.replace(cfg, resume=True))
    one, two = (logged(tmp_path / name, "loss") for name in ("whole", "stopped"))
    assert len(one) == 7 and np.allclose(one, two, rtol=0.01), (one, two)
