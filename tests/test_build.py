"""data/build.py: refused settings, resuming, what a kill leaves behind, which objects a split shows, every label."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import build as build_module
from data.build import UNTOLD, BuildConfig, build, check, draw_from, draw_points, remove_parts, scene_kind
from data.depth import read_depth
from sim.catalogue import DRAWER_DOOR_SEEN, SEEN, UNSEEN
from sim.grammar import ARCHETYPES, NEAR, PREFIX, STRICT

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


def test_bad_settings_are_refused_before_anything_is_made(tmp_path):
    for change, reason in (
        ({"vocab": 3}, "--vocab 3: must be 0 or at least 356"),
        ({"scenes": 0}, "--scenes 0: must be at least 1"),
        ({"demos": -1}, "--demos -1: must be at least 0"),
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"image_size": 100_000}, "--image-size 100000: must be at most 1024"),
        ({"after": float("nan")}, "--after nan: must be a finite"),
        ({"image_size": 40}, "multiple of 16"),
        ({"split": "test"}, "--split test: expected one of train, val"),
        ({"opened": 0.6, "after": 0.6}, "--opened and --after together"),
        ({"grammar": 0.6, "unseen": 0.6}, "--grammar and --unseen together"),
        ({"archetypes": "99"}, "--archetypes 99: there are"),
        ({"archetypes": "book,spoon"}, "--archetypes: unknown spoon; choose from lidded_box, "),
        ({"hold_out": "Phone"}, "--hold-out: unknown Phone"),  # never labelled anyway
        ({"hold_out": "Safe", "categories": "Safe"}, "no category is left to show"),
        ({"split": "transfer"}, "no category is left to show"),
    ):
        with pytest.raises(ValueError, match=reason):
            build(replace(TINY, out=str(tmp_path / "d"), **change))
    assert not (tmp_path / "d").exists()
    check(TINY)


def test_a_build_killed_in_its_merge_keeps_no_picture_of_another_seed(tmp_path, inline, monkeypatch):
    cfg = replace(TINY, out=str(tmp_path / "killed"))
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(build_module, "write_text", stop_at("conversations.json", build_module.write_text))
        build(cfg)
    with pytest.raises(ValueError, match="holds a build with other settings"):
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
    with pytest.raises(ValueError, match="holds a build with other settings"):
        build(replace(cfg, seed=5))
    (tmp_path / "d/manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json: not valid JSON"):
        build(cfg)


def test_stopping_it_is_one_line_that_says_how_to_go_on(tmp_path, monkeypatch, shell):
    def stopped(function, jobs, workers):
        yield jobs[0], 100
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "parallel", stopped)
    code, said = shell(build_module, "--scenes", 300, "--split", "val", "--out", tmp_path)
    assert code == 130 and said.err.strip() == "stopped; nothing is lost: the same command goes on"
    assert json.loads((tmp_path / "parts/config.json").read_text())["scenes"] == 300


def shown(**changes) -> list[tuple[str, int, str, str]]:
    cfg = BuildConfig(**changes)
    return [scene_kind(cfg, index) for index in range(1200)]


def test_a_train_split_shows_the_shares_it_was_asked_for():
    kinds = shown(grammar=0.4, unseen=0.08)
    grammar = [name for name, _, _, _ in kinds if name.startswith(PREFIX)]
    general = [name for name, _, question_set, _ in kinds if question_set == "general"]
    assert abs(len(grammar) / 1200 - 0.4) < 0.05 and abs(len(general) / 1200 - 0.08) < 0.03  # 3 standard deviations
    assert {PREFIX + name for name in ARCHETYPES} == set(grammar) and set(general) == set(UNSEEN)
    labelled = {name for name, _, question_set, _ in kinds if question_set == "all"}
    assert labelled == set(SEEN) | set(grammar)
    assert max(seed for _, seed, _, _ in kinds) < 10_000_000 <= min(seed for _, seed, _, _ in shown(split="val"))
    assert {name for name, _, _, _ in shown(split="val")} == set(SEEN)
    assert {name for name, _, _, _ in shown(split="test-unseen")} == set(UNSEEN)
    assert shown(grammar=0.4) == shown(grammar=0.4, workers=7, out="elsewhere")


def test_archetypes_are_nested_and_strict_leaves_out_what_comes_near_an_unseen_category():
    of = lambda archetypes: draw_from(BuildConfig(archetypes=archetypes))["grammar"]  # noqa: E731
    assert of("0") == () and not any(name.startswith(PREFIX) for name, _, _, _ in shown(archetypes="0"))
    assert set(of("6")) < set(of("12")) < set(of("24")) < set(of("all")) and len(of("24")) == 24
    assert of("6") != of("all")[:6]  # a random order: the list itself is sorted by likeness
    assert of("strict") == tuple(PREFIX + name for name in STRICT) and not set(STRICT) & set(NEAR)
    assert of("book, trays") == ("grammar:book", "grammar:trays")


def test_held_out_objects_have_no_label_in_train_and_are_all_of_transfer():
    hold_out = "Display,Toaster,trays,latch"
    out = {"Display", "Toaster", "grammar:trays", "grammar:latch"}
    kinds = shown(hold_out=hold_out)
    assert not out & {name for name, _, question_set, _ in kinds if question_set == "all"}
    assert {"Display", "Toaster"} < {name for name, _, question_set, _ in kinds if question_set == "general"}
    assert not out & {name for name, _, _, _ in shown(hold_out=hold_out, split="val")}
    transfer = shown(hold_out=hold_out, split="transfer")
    assert {name for name, _, _, _ in transfer} == out and {row[2] for row in transfer} == {"all"}
    assert min(seed for _, seed, _, _ in transfer) >= 10_000_000
    kinds = shown(categories="drawer-door", grammar=0.0, unseen=0.0)
    assert {name for name, _, _, _ in kinds} == set(DRAWER_DOOR_SEEN)
    assert {name for name, _, _, _ in shown(categories="Safe, Box", split="val")} == {"Safe", "Box"}


def test_points_lie_on_what_they_are_said_to_lie_on():
    links = np.full((64, 64), -2)
    links[20:50, 10:40] = -1
    links[30:45, 15:25] = 0
    links[20:50, 39] = 1  # one pixel wide: too near an edge to ask about
    answers = []
    for seed in range(50):
        for u, v, movable in draw_points(links, np.random.default_rng(seed)):
            around = links[v - 1 : v + 2, u - 1 : u + 2]
            assert (around == 0).all() if movable else (around < 0).all()
            assert 6 <= u <= 43 and 16 <= v <= 53
            answers.append((movable, int(links[v, u])))
    assert answers.count((True, 0)) == 150 and answers.count((False, -1)) == 100 and answers.count((False, -2)) == 50
    assert draw_points(np.full((64, 64), -2), np.random.default_rng(0)) == []


def test_a_test_split_asks_for_parts_of_unseen_categories_too(tmp_path, inline):
    build(replace(TINY, out=str(tmp_path), split="test-unseen", scenes=12))
    asked = set(json.loads((tmp_path / "manifest.json").read_text())["families"])
    assert {"possible", "presence", "count", "plan", "contact"} <= asked


def test_every_picture_has_depth_and_every_contact_what_others_need(tmp_path, inline):
    """Full labels: from a sample's files alone its contact is found on the part, and its point in the world."""
    flags = dict(scenes=9, workers=1, image_size=64, grammar=0.5, unseen=0.3, after=0.0, vocab=0, full_labels=True)
    cfg = BuildConfig(out=str(tmp_path), demos=2, **flags)
    manifest = build(cfg)
    rows = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (tmp_path / "manipulation.jsonl").read_text().splitlines()]
    assert manifest["pictures"] == 9
    for grammar in (True, False):  # --demos is counted for the categories and for the grammar alone
        of = [row["facts"] for row in rows if row["facts"]["category"].startswith(PREFIX) == grammar]
        known = sum(part["contact"] is not None for facts in of for part in facts["parts"])
        assert sum(sample["category"].startswith(PREFIX) == grammar for sample in samples) == min(2, known) > 0
    for row in rows:
        depth = read_depth((tmp_path / row["image"]).with_suffix(".depth.png"))
        assert depth.shape == (64, 64) and (depth > 0).any() and row["intrinsics"] == manifest["intrinsics"]
    for sample in samples:
        mask = np.asarray(Image.open(tmp_path / sample["mask"])) == sample["mask_value"]
        depth = read_depth(tmp_path / sample["depth"])
        u, v = round(sample["u"]), round(sample["v"])
        assert mask[v, u]
        if depth[v, u] == 0:
            continue
        fx, fy, cx, cy = sample["intrinsics"]
        point = np.array([(u - cx) / fx, (v - cy) / fy, 1.0]) * depth[v, u]
        camera = np.array(sample["camera"])
        world = camera[:3, :3] @ point + camera[:3, 3]
        assert np.allclose(camera[:3, :3] @ camera[:3, :3].T, np.eye(3), atol=1e-6)
        assert -0.3 < world[2] < 1.5 and np.abs(world[:2]).max() < 1.5  # objects stand on the floor at the origin
    dense = np.load(tmp_path / "dense.npz")
    shapes = {name: dense[name].shape[1:] for name in ("part", "act", "arm")}
    assert shapes == {"part": (32, 32), "act": (32, 32, 3), "arm": (32, 32)}
    for i, row in enumerate(rows):
        part = dense["part"][i]
        if row["rule"] == "general":
            assert (part == UNTOLD).all() and not dense["act"][i].any() and not dense["arm"][i].any()
            assert "points" not in row["facts"] and "camera" not in row
            assert not (tmp_path / row["image"]).with_suffix(".parts.png").exists()
        else:
            masks = np.asarray(Image.open((tmp_path / row["image"]).with_suffix(".parts.png")))
            assert np.array_equal(part, masks[1::2, 1::2].astype(int) - 2)
            assert (dense["act"][i][part < 0] == 0).all() and row["facts"]["points"]
    assert {row["rule"] for row in rows} == {"all", "general"}
