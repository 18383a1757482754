"""The robot's examination. See data/world.py for the world."""

from data.world import Label, Outcome, Scene, dense_targets, facts, rotation_from_approach  # noqa: F401
