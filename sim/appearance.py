"""How a scene looks apart from its shapes: light, background, textures, each a function of its random numbers alone.
Wide on purpose, so that brightness and background tell nothing about the object."""

import math
from collections.abc import Callable

import numpy as np

from sim.objects import BASE

KINDS = ("plain", "stripes", "plain", "grain", "plain", "checks", "plain", "speckle")  # of a texture; half are plain
WAVELENGTH_M = (0.06, 0.16)
AMPLITUDE = (0.03, 0.08)  # share by which the brightness varies
OWN_TEXTURE = 0.3  # chance that a part has a texture of its own, not its body's

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
        "shadow": 0,  # self-shadows come with stripes and cost two thirds of the time
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
    """A random solid texture (Perlin 1985): it needs neither images nor coordinates per mesh."""
    kind = KINDS[rng.integers(len(KINDS))]
    directions = rng.normal(size=(2, 3))
    direction, side = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    wave = 2 * math.pi / rng.uniform(*WAVELENGTH_M)
    size = rng.uniform(*AMPLITUDE)
    phase = rng.uniform(0, 6, 3)
    cells = rng.uniform(-1, 1, (16, 16, 16))
    patterns = {
        "plain": None,
        "stripes": lambda x: size * np.sign(np.sin(wave * x @ direction)),
        "grain": lambda x: size * np.sin(wave * x @ direction + 2 * np.sin(0.4 * wave * x @ side)),  # bent, as in wood
        "checks": lambda x: size * np.sign(np.sin(0.5 * wave * x + phase)).prod(1),
        "speckle": lambda x: size * cells[tuple((np.floor(wave / 3 * x).astype(int) % 16).T)],
    }
    return patterns[kind]


def textures(rng: np.random.Generator, parts: int) -> dict[int, Texture]:
    """Link -> texture, of the body and that many parts."""
    found = {BASE: texture(rng)}
    for j in range(parts):
        own = texture(rng)  # drawn always, so that one part's draw does not move the next one's
        found[j] = own if rng.random() < OWN_TEXTURE else found[BASE]
    return found
