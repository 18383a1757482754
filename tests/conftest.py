"""Shared, miniature things for the tests: a tokenizer, a model, a picture; and what happens without PyBullet."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest
import torch

from common.scripts import run_main
from data.tokenizer import load_encoding, train_ranks, write_ranks
from robomamba import HeadConfig, LMConfig, RoboMamba, RoboMambaConfig, VisionConfig


class NeedsPyBullet:
    """Import hook: a test file, or a test, that loads the simulator is skipped where PyBullet is not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "pybullet":
            pytest.skip("needs PyBullet (extra [sim])", allow_module_level=True)


if PathFinder.find_spec("pybullet") is None:  # asks no hook, so that this file may be imported twice
    sys.meta_path.insert(0, NeedsPyBullet)


def pytest_terminal_summary(terminalreporter):
    """How much was left out: pytest's own count takes a file that is skipped as a whole for one test."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "needs PyBullet" in str(r.longrepr)]
    files = [Path(report.nodeid).name for report in skipped if isinstance(report, pytest.CollectReport)]
    if skipped:
        tests = len(skipped) - len(files)
        whole = ", ".join(files) or "none"
        terminalreporter.line(f"needs PyBullet: {tests} tests skipped; files skipped whole: {whole}")


TEXTS = ["What is this object?", "open the top drawer of the cabinet", "(37,52) 12 34 56", "yes", "no, there is no lid"]


@pytest.fixture(scope="session")
def encoding(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.tiktoken"
    write_ranks(path, train_ranks(TEXTS, 400))
    return load_encoding(path)


def mini_config(vocab_size: int) -> RoboMambaConfig:
    vision = VisionConfig(image_size=32, patch_size=8, width=24, n_layer=2, n_head=3, stem=(8, 16))
    return RoboMambaConfig(vision, LMConfig(32, 2, vocab_size, d_state=4), HeadConfig(hidden=(4,)), (24,))


@pytest.fixture
def mini(encoding):
    """A random model of some thousand parameters on 32-pixel pictures."""
    torch.manual_seed(0)
    return RoboMamba(mini_config(encoding.n_vocab), encoding).eval()


@pytest.fixture
def shell(monkeypatch, capsys):
    """(module of a script, flags ..) -> exit code and what it printed (.out, .err), as from the shell."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            run_main(script.main, getattr(script, "GOES_ON", ""))
        return stopped.value.code, capsys.readouterr()

    return run


@pytest.fixture
def refused(shell):
    """The same for bad input: exit code 2 and one line, which holds `message`."""

    def run(message, script, *flags):
        code, said = shell(script, *flags)
        assert code == 2 and message in said.err and said.err.count("\n") == 1, said.err

    return run


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
