"""Policies say where to grip: baselines, the scripted expert and worse copies of it, tables that never look.

    policy(observation) -> (u, v, approach), or None where the policy does not apply

    python sim_eval.py --policy expert,blind,random,random-normal --out runs/eval              # scores some of them
    python -m sim.policies --make-blind-table data/cache/train/manipulation.jsonl              # what `blind` knows

(u, v) is the contact, pixel column and row. approach (3,) is the unit direction in which the gripper travels to it,
camera frame: x right, y down, z forward.

The baselines say what a number is worth. `blind` is the vision-free baseline: it answers with the median label of the
category and the part, so a policy has seen something only where it scores above that. random-normal and
part-pixel-normal are privileged baselines: the simulator tells them the surface normal, the latter also the mask.
Policies that need a model or a depth picture are in sim_eval.py.
"""

import importlib
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.files import read_json, read_json_lines, write_json
from common.scripts import cli, flag, run_main
from sim.expert import Label
from sim.scene import BACKGROUND, Scene, stream, tilt, unit

BLIND_TABLE = Path(__file__).parent.parent / "data/pretrained/blind_table.json"
JITTER_PX = 1.0  # of expert-jittered, pixels of a REFERENCE_S picture
JITTER_DEG = 5.0
REFERENCE_S = 128  # the picture that `pixel-4` and JITTER_PX speak of, whatever the scene's size
TIME_LIMIT_S = 10.0  # of one call of a user's policy
HINGE_SHARE = 0.15  # hinge-pixel: from the pixels with the smallest lever arm


def perfect_camera(depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The simulator's own depth, 0 where nothing is."""
    return np.where(np.isfinite(depth), depth, 0).astype(np.float32)


class Observation(NamedTuple):
    """What a policy is given. A robot has `image`, `depth`, `intrinsics` and `instruction`; the rest is privileged.

    scene: PRIVILEGED, the simulator's state (sim/scene.py). Reading it is fine for baselines; leave it as it is.
    instruction: the sentence, such as "open the top drawer, please".
    part: PRIVILEGED, the number of the part that the sentence names.
    label: PRIVILEGED, the expert's contact; None where it found none.
    rng: random numbers of this policy in this scene, the same in every run.
    depth_camera: (exact depth, rng) -> `depth`.
    """

    scene: Scene
    instruction: str
    part: int
    label: Label | None
    rng: np.random.Generator
    depth_camera: Callable = perfect_camera

    @property
    def image(self) -> np.ndarray:
        """(S, S, 3) uint8, RGB."""
        return self.scene.rgb.copy()

    @property
    def depth(self) -> np.ndarray:
        """(S, S) float32, metres along the camera's z, as `depth_camera` measures it; 0 where it measured nothing."""
        noise = stream(self.scene.category, self.scene.seed, "depth camera")  # every policy meets the same picture
        return self.depth_camera(self.scene.depth, noise)

    @property
    def intrinsics(self) -> tuple[float, float, float, float]:
        """(fx, fy, cx, cy) in pixels: pixel (u, v) at depth z is ((u - cx) z / fx, (v - cy) z / fy, z) in metres."""
        f, cx, cy = self.scene.intrinsics
        return f, f, cx, cy


# ---- baselines -------------------------------------------------------------------------------------------------------


def random_pixel(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """(u, v) of a random set pixel of mask (S, S)."""
    rows, columns = np.nonzero(mask)
    i = rng.integers(len(rows))
    return float(columns[i]), float(rows[i])


def object_pixel(o: Observation) -> tuple[float, float]:
    """A random pixel of the object."""
    return random_pixel(o.scene.links != BACKGROUND, o.rng)


def against_normal(scene: Scene, u: float, v: float) -> np.ndarray:
    """(3,) straight onto the surface at (u, v), by the simulator's own normal: more than a picture tells."""
    link, normals = scene.normals(scene.backproject(u, v)[None])
    if link[0] == BACKGROUND:
        return np.array([0.0, 0.0, 1.0])
    return scene.camera_rotation @ -normals[0]


def random_action(o: Observation):
    """A pixel of the object, a direction of the whole sphere."""
    return *object_pixel(o), unit(o.rng.normal(size=3))


def random_normal(o: Observation):
    """A pixel of the object, straight onto the surface there."""
    u, v = object_pixel(o)
    return u, v, against_normal(o.scene, u, v)


def part_pixel_normal(o: Observation):
    """A pixel of the named part, straight onto the surface: what perfect segmentation alone is worth."""
    u, v = random_pixel(o.scene.links == o.part, o.rng)
    return u, v, against_normal(o.scene, u, v)


def hinge_pixel(o: Observation):
    """A pixel of the part close to its hinge, straight onto the surface. None for parts that slide."""
    scene = o.scene
    if scene.spec.parts[o.part].joint != "revolute":
        return None
    mask = scene.links == o.part
    points = np.array([scene.backproject(column, row) for row, column in np.argwhere(mask)])
    lever = scene.motion(points, o.part)[1]
    mask[mask] = lever <= np.quantile(lever, HINGE_SHARE)
    u, v = random_pixel(mask, o.rng)
    return u, v, against_normal(scene, u, v)


# ---- the scripted expert, and worse copies of it ---------------------------------------------------------------------


def expert(o: Observation):
    """The oracle: a contact found by trying, with the joint, the mask and the shapes known."""
    if o.label is None:
        return None
    return o.label.u, o.label.v, o.label.approach


def expert_jittered(o: Observation):
    """The expert's contact, off by up to JITTER_PX in u and in v, and by JITTER_DEG."""
    if o.label is None:
        return None
    o.rng.random()  # the sense that `disturbed` draws first
    du, dv = o.scene.image_size / REFERENCE_S * o.rng.uniform(-JITTER_PX, JITTER_PX, 2)
    return o.label.u + du, o.label.v + dv, tilt(o.label.approach, math.radians(JITTER_DEG), o.rng)


def disturbed(pixels: float = 0, degrees: float = 0) -> Callable:
    """A policy: the expert's contact moved by `pixels` and its direction turned by `degrees`, in random senses."""

    def policy(o: Observation):
        if o.label is None:
            return None
        sense = o.rng.uniform(0, 2 * math.pi)
        reach = pixels * o.scene.image_size / REFERENCE_S
        approach = tilt(o.label.approach, math.radians(degrees), o.rng) if degrees else o.label.approach
        return o.label.u + reach * math.cos(sense), o.label.v + reach * math.sin(sense), approach

    return policy


def combine(pixel: Callable, direction: Callable) -> Callable:
    """A policy: where the policy `pixel` says, along what the policy `direction` says. Which half of it fails?"""

    def policy(o: Observation):
        where = pixel(o)
        way = direction(o)
        if where is None or way is None:
            return None
        return where[0], where[1], way[2]

    return policy


SCRIPTED = {
    "random": random_action,
    "random-normal": random_normal,
    "part-pixel-normal": part_pixel_normal,
    "hinge-pixel": hinge_pixel,
    "expert": expert,
    "expert-jittered": expert_jittered,
}


def scripted(name: str) -> Callable | None:
    """The policy of that name: one of SCRIPTED, direction-DEGREES or pixel-PIXELS. None when there is none."""
    if name in SCRIPTED:
        return SCRIPTED[name]
    match = re.fullmatch(r"(pixel|direction)-(\d{1,3})", name)
    if match is None:
        return None
    size = int(match[2])
    return disturbed(pixels=size) if match[1] == "pixel" else disturbed(degrees=size)


# ---- a function of the user's own -----------------------------------------------------------------------------------


class PolicyFailure(Exception):
    """A user's policy gave no action; the message is the reason that is counted."""


class _TimeIsUp(BaseException):
    """Not an Exception, which a policy may catch."""


def user_function(name: str, source: str) -> Callable:
    """The function that MODULE:FUNCTION names. Raises: ValueError when it cannot be imported."""
    module, _, function = source.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise ValueError(f"--policy {name}={source}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ValueError(f"--policy {name}={source}: not a function")
    return found


def guarded(function: Callable) -> Callable:
    """A user's function as a policy: a PolicyFailure for what it raises, takes too long for, or answers wrongly."""

    def stop(signal_number, frame):
        raise _TimeIsUp

    def policy(o: Observation):
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
        try:
            action = function(o)
        except _TimeIsUp:
            raise PolicyFailure(f"longer than {TIME_LIMIT_S:g} s") from None
        except (Exception, SystemExit) as error:
            raise PolicyFailure(f"raised {type(error).__name__}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if action is None:
            return None
        try:
            u, v, approach = action
            values = np.array([u, v, *approach], float)
        except (TypeError, ValueError):
            raise PolicyFailure("wrong shape") from None
        if values.shape != (5,):
            raise PolicyFailure("wrong shape")
        if not values[2:].any():
            raise PolicyFailure("zero direction")
        return float(values[0]), float(values[1]), unit(values[2:])

    return policy


# ---- tables that never look ------------------------------------------------------------------------------------------


def blind_policy(table: dict, mean: bool = False) -> Callable:
    """The median label of this category and part, else of this part's name, else of all; mean: the mean of all."""

    def policy(o: Observation):
        part = o.scene.spec.parts[o.part].label
        row = table["mean"]
        if not mean:
            row = table["category_part"].get(f"{o.scene.category}/{part}") or table["part"].get(part) or table["median"]
        u, v = np.array(row[:2]) * o.scene.image_size / table["image_size"]
        return u, v, unit(row[2:])

    return policy


def make_blind_table(samples: str, path: str) -> dict:
    """Median labels of training samples (manipulation.jsonl of data/build.py), written to `path`.

    A row is [u, v, x, y, z]: pixels of an `image_size` picture, and the unit direction.
    Raises: ValueError naming file and line.
    """
    rows = []
    by_category_part: dict[str, list] = {}
    by_part: dict[str, list] = {}
    first = None
    for number, record in read_json_lines(samples, "python -m data.build writes it"):
        try:
            row = [float(x) for x in (record["u"], record["v"], *record["approach"])]
            if len(row) != 5 or not np.isfinite(row).all():
                raise ValueError("u, v and approach must be five finite numbers")
            part = str(record["part"])
            category = str(record["category"])
            first = first or str(record["image"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{samples}, line {number}: {type(error).__name__}: {error}") from None
        rows.append(row)
        by_part.setdefault(part, []).append(row)
        by_category_part.setdefault(f"{category}/{part}", []).append(row)
    if not rows:
        raise ValueError(f"{samples}: no samples")
    picture = Path(samples).parent / first
    try:
        with Image.open(picture) as image:
            size = image.width
    except OSError as error:
        raise ValueError(f"{picture}: cannot be read as a picture ({error.strerror or error})") from None

    def compact(values) -> list[float]:
        return [*(round(float(x), 1) for x in values[:2]), *(round(float(x), 3) for x in unit(values[2:]))]

    def medians(groups: dict[str, list]) -> dict[str, list[float]]:
        return {key: compact(np.median(groups[key], 0)) for key in sorted(groups)}

    table = {
        "samples": len(rows),
        "image_size": size,
        "mean": compact(np.mean(rows, 0)),
        "median": compact(np.median(rows, 0)),
        "category_part": medians(by_category_part),
        "part": medians(by_part),
    }
    write_json(path, table, indent=None)
    return table


def read_blind_table(path) -> dict:
    """A table written by `make_blind_table`. Raises: ValueError naming the file."""
    table = read_json(path, dict, "python -m sim.policies --make-blind-table MANIPULATION.jsonl writes one")
    if not {"mean", "median", "part", "category_part", "image_size"} <= table.keys():
        raise ValueError(f"{path}: not a table written by --make-blind-table")
    return table


@dataclass
class TableConfig:
    make_blind_table: str = flag("", "manipulation.jsonl of the training data")
    out: str = flag(str(BLIND_TABLE), "where the table goes")


def main(argv: list[str] | None = None) -> None:
    cfg = cli(TableConfig, __doc__, argv)
    if not cfg.make_blind_table:
        raise ValueError("--make-blind-table: name the manipulation.jsonl of the training data")
    table = make_blind_table(cfg.make_blind_table, cfg.out)
    print(f"{cfg.out}: medians of {table['samples']} samples, {len(table['category_part'])} kinds of parts")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
