"""pytest tests/test_objects.py -q

The catalogue: every category builds, every part moves the way its instruction says, words and colours can be trusted.
"""

import itertools
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from sim import catalogue, objects
from sim.catalogue import MULTI_CAPABLE, NOUNS, SEED_SPAN, SEEDS, SEEN, UNSEEN, make_object
from sim.grammar import ARCHETYPES, PREFIX, TO_TOP, quarter, spin
from sim.objects import to_urdf

ROOT = Path(__file__).resolve().parent.parent
ALL = (*SEEN, *UNSEEN)
GRAMMAR = tuple(PREFIX + name for name in ARCHETYPES)
N_SEEDS = 50

# Where the outermost point of a part goes first, as (axis, sign): towards the viewer, up, the pressed way.
FORWARD, BACK, UP, DOWN = (0, 1), (0, -1), (2, 1), (2, -1)
WAY = dict.fromkeys(ALL, UP) | dict.fromkeys(
    ("Safe", "Door", "Display", "Refrigerator", "Microwave", "StorageFurniture", "Pliers", "Scissors", "Table", "USB",
     "WashingMachine"), FORWARD) | {
    "Remote": BACK, "Toaster": DOWN, "Switch": DOWN,
    "Faucet": None,  # either way round, in a test of its own
}  # fmt: skip


def instances(category, n=N_SEEDS):
    return [make_object(category, np.random.default_rng(seed)) for seed in range(n)]


def place(part, points, value):
    """World positions (n, 3) of points of a part's link at a joint value: Rodrigues' formula, or a shift."""
    axis, origin = np.array(part.axis, float), np.array(part.origin, float)
    if part.joint == "prismatic":
        return points + axis * value + origin
    along = np.outer(points @ axis, axis)
    turned = along + math.cos(value) * (points - along) + math.sin(value) * np.cross(axis, points)
    return turned + origin


def corners(shapes):
    return np.concatenate([shape.corners() for shape in shapes])


def outermost_step(part):
    """(start (3,), unit step (3,)) of the part's point farthest from its axis, for a small positive motion."""
    points = corners(part.shapes)
    farthest = points[[np.linalg.norm(np.cross(points, part.axis), axis=1).argmax()]]
    before, after = place(part, farthest, part.start)[0], place(part, farthest, part.start + 1e-3)[0]
    step = after - before
    return before, step / np.linalg.norm(step)


@pytest.mark.parametrize("category", [*ALL, *GRAMMAR])
def test_every_instance_is_well_formed(category):
    least, most = (0.3, 1.5) if category in GRAMMAR else (0.39, 1.3)
    for spec in instances(category):
        labels = [part.label for part in spec.parts]
        assert spec.category == category and spec.base and 1 <= len(labels) == len(set(labels)), labels
        assert len(labels) == 1 or category in (*MULTI_CAPABLE, *GRAMMAR)
        for part in spec.parts:
            assert part.joint in ("revolute", "prismatic") and part.primitive in ("pull", "push")
            assert abs(np.linalg.norm(part.axis) - 1) < 1e-9
            assert part.lower <= part.start < part.upper
            assert part.both_ways == (part.lower < part.start and part.verb == "turn")
            assert part.upper - part.start >= 0.1, "too short a range for the 0.1 threshold"  # rad or m
            assert part.label.split()[-1] == part.kind and part.verb.split()[0].islower()
        for shape in [*spec.base, *itertools.chain(*(part.shapes for part in spec.parts))]:
            assert len(shape.size) == {"box": 3, "cylinder": 2, "sphere": 1}[shape.kind]
            assert min(shape.size) > 0 and all(0 <= value <= 1 for value in shape.rgb)
        everything = np.concatenate([corners(spec.base), *(place(p, corners(p.shapes), p.start) for p in spec.parts)])
        extent = np.ptp(everything, axis=0)
        assert least < extent.max() < most, f"about 0.5 to 1 m across, got {extent}"


@pytest.mark.parametrize("category", [c for c in ALL if WAY[c]])
def test_positive_motion_is_the_instructed_motion(category):
    axis, sign = WAY[category]
    for spec in instances(category):
        for part in spec.parts:
            _, step = outermost_step(part)
            assert sign * step[axis] > 0.5, f"{part.label}: outermost point goes {step}, expected axis {axis} {sign:+d}"
            assert (part.primitive == "push") == (category in ("Remote", "Toaster", "Switch"))


def test_faucet_levers_turn_about_the_vertical():
    parts = [part for spec in instances("Faucet") for part in spec.parts]
    assert all(part.both_ways and abs(outermost_step(part)[1][2]) < 1e-9 for part in parts)


def test_words_of_position_are_true():
    """Left is at smaller y than right (seen from the front), top above bottom, front at larger x than back."""
    order = {"left": ("right", 1), "bottom": ("top", 2), "back": ("front", 0)}
    checked = dict.fromkeys((*MULTI_CAPABLE, *GRAMMAR), 0)
    for category in checked:
        for spec in instances(category, 30 if category in GRAMMAR else 100):
            centre = {p.label: place(p, corners(p.shapes), p.start).mean(0) for p in spec.parts}
            for label, (low, (high, axis)) in itertools.product(centre, order.items()):
                other = " ".join(high if word == low else word for word in label.split())
                if other != label and other in centre:
                    gap = 0.02 if category in GRAMMAR else 0.05
                    assert centre[label][axis] < centre[other][axis] - gap, (category, label, other)
                    checked[category] += 1
    assert {c for c in MULTI_CAPABLE if not checked[c]} <= {"WashingMachine"}, "no pair of words was ever compared"
    assert sum(checked[c] for c in GRAMMAR) > 100


@pytest.mark.parametrize("category", MULTI_CAPABLE)
def test_at_least_half_have_several_parts(category):
    share = np.mean([len(spec.parts) > 1 for spec in instances(category, 200)])
    assert share >= 0.5, f"{share:.3f} of 200 instances have two or more movable parts"


@pytest.mark.parametrize("category", [*ALL, *GRAMMAR])
def test_same_seed_same_urdf_and_seeds_differ(category):
    texts = [to_urdf(spec) for spec in instances(category, 6)]
    assert texts == [to_urdf(spec) for spec in instances(category, 6)] and len(set(texts)) == 6


@pytest.mark.parametrize("category", ALL)
def test_urdf_is_one_link_per_part(category):
    for spec in instances(category, 10):
        robot = ET.fromstring(to_urdf(spec, mass=2.0, inertia=0.5))
        links, joints = robot.findall("link"), robot.findall("joint")
        names = [f"part_{i}" for i in range(len(spec.parts))]
        assert [link.get("name") for link in links] == ["base", *names]
        assert [joint.find("child").get("link") for joint in joints] == names
        masses = [float(link.find("inertial/mass").get("value")) for link in links]
        assert masses == [0.0] + [2.0] * len(spec.parts)
        materials = [material.get("name") for material in robot.iter("material")]
        assert len(materials) == len(set(materials)) == len(robot.findall("link/collision"))
        for joint, part in zip(joints, spec.parts, strict=True):
            limit, axis = joint.find("limit"), joint.find("axis").get("xyz")
            assert joint.get("type") == part.joint
            limits = [float(limit.get("lower")), float(limit.get("upper"))]
            np.testing.assert_allclose(limits, (part.lower, part.upper), atol=1e-4)
            np.testing.assert_allclose([float(v) for v in axis.split()], part.axis, atol=1e-6)


def test_names_are_complete_and_splits_are_disjoint():
    assert (len(SEEN), len(UNSEEN)) == (20, 10) and len(set(ALL)) == len(ALL)
    assert set(NOUNS) == set(catalogue.BUILDERS) > set(ALL) and len({NOUNS[c] for c in ALL}) == len(ALL)
    assert set(catalogue.DRAWER_DOOR_SEEN) < set(SEEN) and set(catalogue.DRAWER_DOOR_UNSEEN) < set(UNSEEN)
    assert min(np.diff(sorted(SEEDS.values()))) > SEED_SPAN  # no use draws another one's scenes
    found = {part.kind for c in (*SEEN, "grammar:sliders", "grammar:pull_up") for s in instances(c) for part in s.parts}
    assert objects.PART_KINDS[0] == "none" and set(objects.PART_KINDS[1:]) == found
    assert len(set(objects.PART_KINDS)) == len(objects.PART_KINDS)


@pytest.mark.parametrize("category", ["cabinet", "", "storagefurniture", "grammar:spaceship"])
def test_unknown_category_is_named(category):
    with pytest.raises(ValueError, match=f"unknown category '{category}'.*StorageFurniture"):
        make_object(category, np.random.default_rng(0))


def test_colour_words_survive():
    assert [objects.colour_name(rgb) for rgb in objects.COLOURS.values()] == list(objects.COLOURS)
    rng = np.random.default_rng(0)
    for word in objects.COLOURS:
        tints = [objects.tint(rng, word) for _ in range(50)]
        assert {objects.colour_name(rgb) for rgb in tints} == {word}
        shades = [objects.shade(rgb, factor) for rgb in tints for factor in (0.5, 0.8, 1.35)]
        assert {objects.colour_name(rgb) for rgb in shades} == {word}


@pytest.mark.parametrize("category", ALL)
def test_a_person_would_agree_with_the_colour(category):
    """The largest shape is clearly nearer to one word than to the next one (0.08 in rgb; words are 0.3 apart)."""
    palette = np.array(list(objects.COLOURS.values()))
    for spec in instances(category):
        for shapes in (spec.base, *(part.shapes for part in spec.parts)):
            largest = max(shapes, key=lambda shape: shape.volume)
            near, second = np.sort(np.linalg.norm(palette - largest.rgb, axis=1))[:2]
            assert second - near > 0.08, f"{largest.rgb} is between two words"
            assert objects.main_colour(shapes) == objects.colour_name(largest.rgb)


def test_turning_a_shape_turns_its_corners():
    """`turned` goes through roll, pitch, yaw and back; a pitch of 90 degrees is the trap."""
    rng = np.random.default_rng(0)
    turns = [quarter(1), spin(1), quarter(2) @ spin(3), TO_TOP, objects.rotation((0.3, -1.1, 2.5))]
    for kind, size in (("box", (0.1, 0.2, 0.3)), ("cylinder", (0.1, 0.4)), ("sphere", (0.2,))):
        for turn, pitch in itertools.product(turns, (0, math.pi / 2, -math.pi / 2, 0.7)):
            rpy = (rng.uniform(-3, 3), pitch, rng.uniform(-3, 3))
            shape = objects.Shape(kind, size, tuple(rng.normal(size=3)), rpy, (0, 0, 0))
            shift = rng.normal(size=3)
            got = objects.turned(shape, turn, shift).corners()
            np.testing.assert_allclose(got, shape.corners() @ turn.T + shift, atol=1e-7)


def test_printed_catalogue_names_every_category():
    command = [sys.executable, "-m", "sim.catalogue"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in printed] == [c for c in ALL for _ in range(3)]
    assert "Toaster" in printed[51] and "press down the left lever (prismatic, push)" in printed[51]


def test_bullet_loads_every_joint_with_its_limits(tmp_path):
    p = pytest.importorskip("pybullet")
    client = p.connect(p.DIRECT)
    try:
        p.setPhysicsEngineParameter(enableFileCaching=0, physicsClientId=client)
        for category in ALL:
            spec = make_object(category, np.random.default_rng(3))
            path = tmp_path / f"{category}.urdf"
            path.write_text(to_urdf(spec))
            body = p.loadURDF(str(path), useFixedBase=True, physicsClientId=client)
            assert p.getNumJoints(body, physicsClientId=client) == len(spec.parts)
            for j, part in enumerate(spec.parts):
                info = p.getJointInfo(body, j, physicsClientId=client)
                assert info[2] == {"revolute": p.JOINT_REVOLUTE, "prismatic": p.JOINT_PRISMATIC}[part.joint]
                np.testing.assert_allclose(info[8:10], (part.lower, part.upper), atol=1e-4)
                # the world position Bullet gives the link agrees with `place`, at an opened joint too
                value = part.start + 0.09
                p.resetJointState(body, j, value, physicsClientId=client)
                link = p.getLinkState(body, j, computeForwardKinematics=1, physicsClientId=client)
                centre = np.mean([shape.xyz for shape in part.shapes], axis=0)
                np.testing.assert_allclose(link[0], place(part, centre[None], value)[0], atol=1e-3)
    finally:
        p.disconnect(client)
