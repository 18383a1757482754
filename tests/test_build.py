"""data/build.py: refused settings, resuming, what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data import build as build_module
from data.build import BuildConfig, build, check, merge, remove_parts, settings

ROOT = Path(__file__).parent.parent
TINY = BuildConfig(scenes=6, workers=1, image_size=32, split="val")


@pytest.fixture
def inline(monkeypatch):
    """Groups are made in this process, one after the other: no pool to start."""
    monkeypatch.setattr(build_module, "GROUP", 3)
    monkeypatch.setattr(build_module, "parallel", lambda function, jobs, workers: ((j, function(j)) for j in jobs))
    yield
    if build_module._scene is not None:
        build_module._scene.close()  # other tests open a world of their own
        build_module._scene = None


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab": 3}, "--vocab 3: must be 0 or at least 356"),
        ({"scenes": 0}, "--scenes 0: must be at least 1"),
        ({"demos": -1}, "--demos -1"),
        ({"workers": 0}, "--workers 0"),
        ({"seed": -1}, "--seed -1"),
        ({"image_size": 100_000}, "--image-size 100000"),
        ({"image_size": 40}, "multiple of 16"),
        ({"split": "test"}, "--split test: expected one of train, val"),
        ({"after": float("nan")}, "--after nan"),
        ({"opened": 0.6, "after": 0.6}, "--opened and --after together"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path, change, reason):
    cfg = replace(TINY, out=str(tmp_path / "d"), **change)
    with pytest.raises(ValueError, match=reason):
        build(cfg)
    assert not (tmp_path / "d").exists()
    check(TINY)


def test_a_build_killed_in_its_merge_keeps_no_picture_of_another_seed(tmp_path, inline, monkeypatch):
    cfg = replace(TINY, out=str(tmp_path / "killed"))
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(build_module, "write_text", stop_at("conversations.json", build_module.write_text))
        build(cfg)
    with pytest.raises(ValueError, match="holds an unfinished build with other settings"):
        build(replace(cfg, seed=5))
    build(cfg)
    build(replace(cfg, out=str(tmp_path / "whole")))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed/parts").exists()


def stop_at(name: str, write):
    """`write`, but the machine goes down at file `name`."""

    def stopping(path, text):
        if Path(path).name == name:
            raise InterruptedError
        write(path, text)

    return stopping


def test_settings_are_the_last_of_the_unfinished_things_to_go(tmp_path, monkeypatch):
    for name in ("00000000.npz", "00000100.npz", "config.json", "00000200.npz.tmp7"):
        (tmp_path / name).write_text("")
    gone = []
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: gone.append(path.name) or real(path))
    monkeypatch.setattr(build_module.shutil, "rmtree", lambda path, ignore_errors: gone.append("the rest"))
    remove_parts(tmp_path)
    assert gone[-1] == "the rest" and "config.json" not in gone and len(gone) == 4


def test_a_build_goes_on_and_a_finished_one_is_left_alone(tmp_path, inline, monkeypatch):
    cfg = replace(TINY, out=str(tmp_path / "d"))
    made = []
    real = build_module.make_scene
    monkeypatch.setattr(build_module, "make_scene", lambda scene, cfg, i: made.append(i) or real(scene, cfg, i))
    build_module.make_group((cfg, 3, 6))
    build(cfg)
    assert made == [3, 4, 5, 0, 1, 2]
    before = contents(tmp_path / "d")
    (tmp_path / "d/parts").mkdir()
    (tmp_path / "d/parts/config.json").write_text("{}")  # killed after the manifest was written
    assert build(replace(cfg, workers=2))["pictures"] == 6
    assert contents(tmp_path / "d") == before and len(made) == 6
    with pytest.raises(ValueError, match="holds data made with other settings"):
        build(replace(cfg, seed=5))
    (tmp_path / "d/manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json: not valid JSON"):
        build(cfg)
    assert settings(cfg) == settings(replace(cfg, workers=9, out="elsewhere")) and merge


def test_stopping_it_is_one_line_that_says_how_to_go_on(tmp_path):
    flags = ["--scenes", "5000", "--workers", "1", "--image-size", "32", "--split", "val", "--out", str(tmp_path)]
    flags += ["--opened", "1", "--after", "0"]  # without the expert, which takes most of the time
    command = [sys.executable, "-m", "data.build", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    builder = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
    while not (tmp_path / "images").exists():
        assert builder.poll() is None
    builder.send_signal(signal.SIGINT)
    _, said = builder.communicate(timeout=60)
    assert builder.returncode == 130
    assert said.strip() == "stopped; nothing is lost: the same command goes on"
    assert json.loads((tmp_path / "parts/config.json").read_text())["scenes"] == 5000
