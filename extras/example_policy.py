"""A template for your own policy: grip the middle of the largest flat region of the named colour, perpendicular to it.

    python sim_eval.py --policy mine=extras.example_policy:pick,random --out runs/mine

Copy the file next to your work, change `pick`, and pass it as --policy NAME=MODULE:FUNCTION; sim.policies.Observation
lists what a policy receives. This one uses what a robot has (image, depth, intrinsics, sentence), nothing privileged.
"""

import numpy as np

from data.depth import normals
from sim.policies import Observation

COLOURS = {"red": (200, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 200), "white": (235, 235, 235)}
FARTHEST = 442.0  # colour distance from black to white
SAME_PLANE = 0.97  # minimum cosine between the normals of neighbouring pixels
COLOUR_WEIGHT = 40  # how many pixels deeper a contact must lie to make up for the opposite colour


def pick(observation: Observation) -> tuple[float, float, np.ndarray]:
    """(u, v, approach): the pixel deepest inside a flat region, preferably of the colour named in the sentence."""
    normal = normals(observation.depth, observation.intrinsics)  # (S, S, 3), towards the camera; 0 where not measured
    region = normal.any(-1)
    for axis in (0, 1):
        region &= (normal * np.roll(normal, 1, axis)).sum(-1) > SAME_PLANE
    score = np.zeros(region.shape)  # pixels from the edge of the flat region
    while region.any():
        score += region
        for axis in (0, 1):
            region = region & np.roll(region, 1, axis) & np.roll(region, -1, axis)
    for word, colour in COLOURS.items():
        if word in observation.instruction.split():
            distance = np.linalg.norm(observation.image - np.array(colour, float), axis=-1)
            score -= COLOUR_WEIGHT * distance / FARTHEST
    v, u = np.unravel_index(score.argmax(), score.shape)
    return float(u), float(v), -normal[v, u]
