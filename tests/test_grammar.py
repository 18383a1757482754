"""pytest tests/test_grammar.py -q

The grammar of training objects: every archetype builds, moves as its words say, and is solved by the expert.
"""

import numpy as np
import pytest
from test_objects import corners, place

from sim.catalogue import NOUNS, SEEN, UNSEEN, make_object
from sim.grammar import ARCHETYPES, NEAR, PREFIX, STRICT
from sim.objects import PART_KINDS

VERBS = {part.verb for c in SEEN for seed in range(20) for part in make_object(c, np.random.default_rng(seed)).parts}


def instances(name, n=30):
    return [make_object(PREFIX + name, np.random.default_rng(seed)) for seed in range(n)]


def test_strict_leaves_out_what_comes_near_an_unseen_category():
    assert len(ARCHETYPES) >= 24 and len(STRICT) + len(NEAR) == len(ARCHETYPES) and set(NEAR) < set(ARCHETYPES)
    assert {category for near in NEAR.values() for category in near} == set(UNSEEN)
    assert not {name.lower() for name in (*SEEN, *UNSEEN)} & set(ARCHETYPES)
    assert all(NOUNS[PREFIX + name] == "object" for name in ARCHETYPES)


@pytest.mark.parametrize("name", ARCHETYPES)
def test_words_are_those_of_the_seen_categories(name):
    for spec in instances(name):
        assert len(spec.parts) <= 6
        for part in spec.parts:
            assert part.kind in PART_KINDS[1:] and part.verb in VERBS | {"turn", "swing out", "slide"}
            assert part.both_ways == (part.verb == "turn")


UP = ("lift", "pull up", "raise", "fold up")


def test_parts_move_as_their_verb_says():
    """The point farthest from the joint's axis goes up, down, or away from the body."""
    for name in ARCHETYPES:
        for spec in instances(name):
            for part in spec.parts:
                points = corners(part.shapes)
                far = points[[np.linalg.norm(np.cross(points, part.axis), axis=1).argmax()]]
                step = place(part, far, part.start + 0.1)[0] - place(part, far, part.start)[0]
                if part.verb == "press down":
                    assert step[2] < 0, (name, part)
                elif part.verb in UP and name not in ("hanging_flap", "wings"):  # these start by going out
                    assert step[2] > 0, (name, part)
                elif part.joint == "prismatic" and part.verb == "open":  # "pull it out", "slides out"
                    assert step[0] > 0.05, (name, part)


def test_the_expert_solves_every_archetype():
    pytest.importorskip("pybullet")
    from sim.expert import expert
    from sim.scene import Scene

    solved = {}
    with Scene() as scene:
        for name in ARCHETYPES:
            solved[name] = 0
            for seed in range(4):
                scene.spawn(PREFIX + name, 8_000_000 + seed).render()
                label = expert(scene, np.random.default_rng(seed))
                solved[name] += label is not None and scene.act(label.u, label.v, label.approach).long
    assert sum(solved.values()) >= 0.95 * 4 * len(ARCHETYPES) and min(solved.values()) >= 3, solved
