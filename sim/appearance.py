"""The look of a scene apart from its shapes: light, background, textures, each a function of its random numbers only.
The ranges are wide on purpose, so that brightness and background reveal nothing about the object."""

import math
from collections.abc import Callable

import numpy as np

from sim.objects import BASE

KINDS = ("plain", "stripes", "plain", "grain", "plain", "checks", "plain", "speckle")  # of textures; half are plain
WAVELENGTH_M = (0.06, 0.16)
AMPLITUDE = (0.03, 0.08)  # share by which the brightness varies
OWN_TEXTURE = 0.3  # probability that a part has its own texture instead of the body's

Texture = Callable[[np.ndarray], np.ndarray] | None  # points (n, 3), metres -> change of brightness (n,); None: plain


def light(rng: np.random.Generator, azimuth_deg: float) -> dict:
    """Arguments of getCameraImage for a camera at this azimuth: the light never comes from behind the object."""
    azimuth = math.radians(azimuth_deg + rng.uniform(-75, 75))
    return {
        "lightDirection": [2 * math.cos(azimuth), 2 * math.sin(azimuth), rng.uniform(1.0, 3.0)],
        "lightColor": rng.uniform(0.85, 1.0, 3).tolist(),
        "lightAmbientCoeff": rng.uniform(0.55, 0.7),
        "lightDiffuseCoeff": rng.uniform(0.35, 0.5),
        "lightSpecularCoeff": 0.1,
        "shadow": 0,  # self-shadows produce stripes and cost two thirds of the time
    }


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8: one colour, a gradient, or 8 x 8 cells."""
    kind = rng.choice(["plain", "gradient", "noise"], p=[0.45, 0.45, 0.1])
    colours = rng.uniform(0.2, 1.0, (2, 3))
    first, second = (colours + colours.mean(1, keepdims=True)) / 2  # half as colourful: walls, not paint
    ramp = (np.arange(size) + 0.5) / size
    angle = rng.uniform(0, 2 * math.pi)
    cells = rng.uniform(-0.15, 0.15, (8, 8, 1))
    colour = np.broadcast_to(first, (size, size, 3))
    if kind == "gradient":
        share = 0.5 + (ramp[None, :] - 0.5) * math.cos(angle) / 1.5 + (ramp[:, None] - 0.5) * math.sin(angle) / 1.5
        colour = first + share[..., None] * (second - first)
    elif kind == "noise":
        index = (ramp * 8).astype(int)
        colour = first + cells[index][:, index]
    return (255 * np.clip(colour, 0, 1)).astype(np.uint8)


def texture(rng: np.random.Generator) -> Texture:
    """A random solid texture (Perlin 1985), which needs neither images nor per-mesh coordinates."""
    kind = KINDS[rng.integers(len(KINDS))]
    directions = rng.normal(size=(2, 3))
    direction, side = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    wave = 2 * math.pi / rng.uniform(*WAVELENGTH_M)
    size = rng.uniform(*AMPLITUDE)
    phase = rng.uniform(0, 6, 3)
    cells = rng.uniform(-1, 1, (16, 16, 16))
    return {
        "plain": None,
        "stripes": lambda x: size * np.sign(np.sin(wave * x @ direction)),
        "grain": lambda x: size * np.sin(wave * x @ direction + 2 * np.sin(0.4 * wave * x @ side)),  # bent, as in wood
        "checks": lambda x: size * np.sign(np.sin(0.5 * wave * x + phase)).prod(1),
        "speckle": lambda x: size * cells[tuple((np.floor(wave / 3 * x).astype(int) % 16).T)],
    }[kind]


def textures(rng: np.random.Generator, parts: int) -> dict[int, Texture]:
    """Link -> texture, for the body and each of the parts."""
    found = {BASE: texture(rng)}
    for j in range(parts):
        own = texture(rng)  # always drawn, so that one part's draw does not shift the next part's
        found[j] = own if rng.random() < OWN_TEXTURE else found[BASE]
    return found
