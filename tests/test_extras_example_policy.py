"""pytest tests/test_extras_example_policy.py

The template of a user's policy: what it picks, and that it uses nothing that a robot has not.
"""

import types

import numpy as np
from test_eval import run

from extras.example_policy import pick
from sim.policies import Observation

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
