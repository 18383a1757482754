"""pytest tests/test_extras_example_policy.py

The template of a user's policy: what it picks, and that it uses nothing that a robot has not; the closed loop.
"""

import json
import math
import types

import numpy as np
import pytest
from test_eval import VAL_SAFE, run

import sim_eval
from extras.closed_loop import grip_again
from extras.example_policy import pick
from sim.policies import Observation
from sim.scene import Scene
from sim_eval import EvalConfig

S = 96
FOCAL = 120.0


def seen(depth: np.ndarray, rgb: np.ndarray | None = None, instruction: str = "open it") -> Observation:
    """An observation whose scene has what a camera needs and nothing else: anything privileged is an AttributeError."""
    picture = np.full((S, S, 3), 128, np.uint8) if rgb is None else rgb
    scene = types.SimpleNamespace(category="Box", seed=1, rgb=picture, depth=depth, intrinsics=(FOCAL, S / 2, S / 2))
    return Observation(scene, instruction, None, None, None)


def board(columns: tuple, slope: float = 0.0) -> np.ndarray:
    """Depth (S, S) of upright boards one metre away, between the given columns; slope: metres of z a metre of x."""
    depth = np.full((S, S), np.inf)
    x = (np.arange(S) - S / 2) / FOCAL
    for left, right in columns:
        depth[20:76, left:right] = (1 / (1 - slope * x))[left:right]
    return depth


def test_it_picks_the_middle_of_the_largest_flat_region_and_comes_straight():
    u, v, approach = pick(seen(board(((4, 20), (30, 80)))))
    assert abs(u - 54.5) <= 4 and abs(v - 47.5) <= 4
    np.testing.assert_allclose(approach, [0, 0, 1], atol=1e-3)
    slanted = pick(seen(board(((30, 80),), slope=0.5)))[2]
    np.testing.assert_allclose(slanted, np.array([-0.5, 0, 1]) / np.hypot(0.5, 1), atol=1e-2)


def test_a_colour_in_the_sentence_wins_over_a_larger_region():
    rgb = np.full((S, S, 3), (200, 40, 40), np.uint8)
    rgb[:, :25] = (40, 80, 200)
    depth = board(((2, 24), (30, 80)))
    assert pick(seen(depth, rgb, "open the blue lid"))[0] < 25 < pick(seen(depth, rgb, "open the red lid"))[0]


def test_it_runs_by_its_name_and_scores_above_random(tmp_path):
    flags = ["--policy", "mine=extras.example_policy:pick,random", "--split", "val", "--episodes", "24"]
    policies = run(tmp_path, *flags, "--workers", 1)["policies"]
    mine, random = (policies[name]["splits"]["val"]["initial"]["k"] for name in ("mine", "random"))
    assert mine > random, (mine, random)


# ---- closed loop ----------------------------------------------------------------------------------------------------
def test_closed_loop_goes_on_where_the_last_grip_ended(tmp_path):
    flags = ("--policy", "expert,random-normal", "--split", "drawer-door", "--episodes", 5, "--workers", 1)
    once, again = run(tmp_path / "once", *flags), run(tmp_path / "again", *flags, "--closed-loop", 2)
    loops = [record.pop("closed_loop") for record in again["episodes"]]
    assert once["episodes"] == again["episodes"]  # the open loop beside it is the usual one, in the usual world
    assert not any("closed_loop" in record for record in once["episodes"])
    gained = []
    for record, loop in zip(again["episodes"], loops, strict=True):
        assert 1 <= len(loop["reasons"]) <= 3 and loop["reasons"][0] == record["reason"]
        assert loop["initial"] == (loop["moved"] >= 0.01) and loop["long"] >= (loop["moved"] >= 0.1)
        if record["policy"] == "expert":
            gained.append(loop["moved"] - record["moved"])
    assert min(gained) > -0.01 and np.median(gained) > 0.05  # a second pull opens a door further
    summary = again["splits"]["seen"]["closed_loop"]
    assert summary["grips"] == 3 and summary["initial"]["n"] == 5 and summary["moved"] > summary["open"]["moved"]
    assert "closed loop (3 grips" in (tmp_path / "again" / "table.md").read_text()


def test_closed_loop_ends_when_the_part_is_gone_and_leaves_the_scene_as_it_was(request):
    one = sim_eval.Bench(EvalConfig(policy="random"))
    request.addfinalizer(one.close)
    _, label = one.find(VAL_SAFE)
    scene = one.scene
    before, joints, seen = scene.rgb.copy(), list(scene.joints), []

    def same(o):
        seen.append((o.scene.joints[o.part], o.image, o.label))
        return label.u, label.v, label.approach

    def loop(policy, action):
        o = sim_eval.observe(scene, label, "policy same")
        return grip_again(policy, o, sim_eval.attempt(lambda _: action, o, o.part), 3, "policy same")

    first = loop(same, (label.u, label.v, label.approach))
    assert len(seen) == 3 and seen[0][0] > joints[scene.target] + 0.1 and (seen[0][1] != before).any()
    assert seen[0][2] is None or seen[0][2].u != label.u or seen[0][2].v != label.v  # a new look, a new oracle
    assert len(first["reasons"]) == 4 and first["reasons"][0] == "success"
    assert scene.joints == joints and (scene.rgb == before).all()
    nowhere = loop(lambda _: None, (label.u, label.v, label.approach))
    assert nowhere["reasons"] == ["success"] and nowhere["moved"] == pytest.approx(seen[0][0] - joints[0], abs=1e-5)
    lost = loop(same, (math.nan, 0.0, label.approach))
    assert lost["reasons"][:2] == ["not a number", "success"]  # the next look may be luckier


def test_closed_loop_of_a_slide_is_written_as_json(request, monkeypatch):
    """Limits of a user's sliding joint are NumPy floats, and NumPy's bools are not JSON."""
    one = sim_eval.Bench(EvalConfig(policy="expert", closed_loop=1))
    request.addfinalizer(one.close)
    job = sim_eval.Job("val", "Table", 0, 0)
    one.find(job)
    opened = one.scene.opened
    monkeypatch.setattr(Scene, "opened", lambda self, part, q: np.float64(opened(part, q)))
    record = one.episode(job)["records"][0]
    assert "drawer" in record["part"] and len(record["closed_loop"]["reasons"]) == 2
    json.dumps(record, allow_nan=False)
