"""Policies choose where to grip: baselines, the scripted expert and degraded copies, tables that ignore the picture.

    policy(observation) -> (u, v, approach), or None where the policy does not apply
        u, v: the contact, pixel column and row. approach (3,): the unit direction in which the gripper travels to it,
        camera frame (x right, y down, z forward)
    python -m sim.policies --make-blind-table data/cache/train/manipulation.jsonl              # `blind`'s table

`blind` is the vision-free baseline, the median label of the category and the part: only a policy that beats it makes
use of the picture. random-normal and part-pixel-normal are privileged baselines: both get the surface normal, the
latter also the mask. Policies that use a model or a depth image are in sim_eval.py, which scores them all.
"""

import importlib
import math
import os
import re
import signal
import sys
from collections import defaultdict
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

REFERENCE_S = 128  # picture size in which `pixel-4` is measured, whatever the scene's size
TIME_LIMIT_S = 10.0  # per call of a user's policy
HINGE_SHARE = 0.15  # hinge-pixel: drawn from this share of pixels, those with the smallest lever arm


class Observation(NamedTuple):
    """The input of a policy. A robot has `image`, `depth`, `intrinsics` and `instruction`; the rest is PRIVILEGED:
    only baselines may read it."""

    scene: Scene  # the simulator's state; do not change it
    instruction: str  # the sentence, such as "open the top drawer, please"
    part: int  # index of the part it names
    label: Label | None  # the expert's contact; None if it found none
    rng: np.random.Generator  # for this policy in this scene, the same in every run
    depth_camera: Callable = lambda exact, rng: exact  # turns the simulator's depth into `depth`

    @property
    def image(self) -> np.ndarray:
        """(S, S, 3) uint8, RGB."""
        return self.scene.rgb.copy()

    @property
    def depth(self) -> np.ndarray:
        """(S, S) float32, metres along the camera's z, as `depth_camera` measures it; 0 where it measured nothing."""
        exact = np.where(np.isfinite(self.scene.depth), self.scene.depth, 0).astype(np.float32)
        noise = stream(self.scene.category, self.scene.seed, "depth camera")  # every policy gets the same image
        return self.depth_camera(exact, noise)

    @property
    def intrinsics(self) -> tuple[float, float, float, float]:
        """(fx, fy, cx, cy) in pixels: pixel (u, v) at depth z is ((u - cx) z / fx, (v - cy) z / fy, z) in metres."""
        f, cx, cy = self.scene.intrinsics
        return f, f, cx, cy


# ---- baselines ------------------------------------------------------------------------------------------------------
def random_pixel(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """(u, v) of a random set pixel of mask (S, S)."""
    rows, columns = np.nonzero(mask)
    i = rng.integers(len(rows))
    return float(columns[i]), float(rows[i])


def object_pixel(o: Observation) -> tuple[float, float]:
    return random_pixel(o.scene.links != BACKGROUND, o.rng)


def against_normal(scene: Scene, u: float, v: float) -> tuple[float, float, np.ndarray]:
    """The action perpendicular to the surface at (u, v), from the simulator's own normal, which no picture gives."""
    (link,), (normal,) = scene.normals(scene.backproject(u, v)[None])
    approach = np.array([0.0, 0.0, 1.0]) if link == BACKGROUND else scene.camera_rotation @ -normal
    return u, v, approach


def hinge_pixel(o: Observation):
    """A pixel of the part close to its hinge, approached perpendicular to the surface. None for sliding parts."""
    scene = o.scene
    if scene.spec.parts[o.part].joint != "revolute":
        return None
    mask = scene.links == o.part
    lever = scene.motion(scene.backproject_pixels(*np.nonzero(mask)), o.part)[1]
    mask[mask] = lever <= np.quantile(lever, HINGE_SHARE)
    return against_normal(scene, *random_pixel(mask, o.rng))


# ---- the scripted expert, and degraded copies of it -----------------------------------------------------------------
def oracle(o: Observation):
    """The expert: a contact found by trial, knowing the joint, the mask and the shapes. None: it found none."""
    return o.label


def disturbed(pixels: float = 0, degrees: float = 0, square: bool = False) -> Callable:
    """A policy: the expert's contact moved by `pixels` (square: by up to that in u and in v) and its approach turned by
    `degrees`, in random directions."""

    def policy(o: Observation):
        if o.label is None:
            return None
        sense = o.rng.uniform(0, 2 * math.pi)
        du, dv = o.rng.uniform(-1, 1, 2) if square else (math.cos(sense), math.sin(sense))
        reach = pixels * o.scene.image_size / REFERENCE_S
        u, v, approach = o.label
        return u + reach * du, v + reach * dv, tilt(approach, math.radians(degrees), o.rng) if degrees else approach

    return policy


def combine(pixel: Callable, direction: Callable) -> Callable:
    """A policy with the contact of the policy `pixel` and the approach of `direction`, to see which half fails."""

    def policy(o: Observation):
        where = pixel(o)
        way = direction(o)
        return where and way and (where[0], where[1], way[2])

    return policy


SCRIPTED = {
    "random": lambda o: (*object_pixel(o), unit(o.rng.normal(size=3))),  # a direction from the whole sphere
    "random-normal": lambda o: against_normal(o.scene, *object_pixel(o)),
    "part-pixel-normal": lambda o: against_normal(o.scene, *random_pixel(o.scene.links == o.part, o.rng)),
    "hinge-pixel": hinge_pixel,
    "expert": oracle,
    "expert-jittered": disturbed(1, 5, square=True),
}


def scripted(name: str) -> Callable | None:
    """The policy of that name: one of SCRIPTED, direction-DEGREES or pixel-PIXELS. None if there is none."""
    match = re.fullmatch(r"(pixel|direction)-(\d{1,3})", name)
    if match is None:
        return SCRIPTED.get(name)
    return disturbed(pixels=int(match[2])) if match[1] == "pixel" else disturbed(degrees=int(match[2]))


# ---- the user's own function ----------------------------------------------------------------------------------------
class PolicyFailure(Exception):
    """A user's policy gave no valid action; the message is the failure reason that is counted."""


class _TimeIsUp(BaseException):
    """Not an Exception, because a policy may catch those."""


def user_function(name: str, source: str) -> Callable:
    """The function MODULE:FUNCTION as a policy, which raises PolicyFailure for an exception, a timeout or an invalid
    answer. Raises: ValueError when it cannot be imported."""
    module, _, function = source.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise ValueError(f"--policy {name}={source}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ValueError(f"--policy {name}={source}: not a function")

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
            u, v, *approach = np.array([u, v, *approach], float).reshape(5).tolist()
        except Exception as error:  # numpy refuses a torch tensor that requires grad with a RuntimeError
            raise PolicyFailure("wrong shape") from error
        if not any(approach):
            raise PolicyFailure("zero direction")
        return u, v, unit(approach)

    return policy


# ---- tables that ignore the picture ---------------------------------------------------------------------------------
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
    Raises: ValueError naming file and line."""
    rows, image = [], None
    groups = {"category_part": defaultdict(list), "part": defaultdict(list)}
    for number, record in read_json_lines(samples, "python -m data.build writes it"):
        try:
            row = np.array([record["u"], record["v"], *record["approach"]], float).reshape(5)
            if not np.isfinite(row).all():
                raise ValueError("u, v and approach must be finite")
            groups["category_part"][f"{record['category']}/{record['part']}"].append(row)
            groups["part"][str(record["part"])].append(row)
            image = image or str(record["image"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{samples}, line {number}: {type(error).__name__}: {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{samples}: no samples")
    first = Path(samples).parent / image
    try:
        with Image.open(first) as picture:
            size = picture.width
    except OSError as error:
        raise ValueError(f"{first}: cannot be read as a picture ({error.strerror or error})") from None

    def compact(row) -> list[float]:
        return [*(round(float(x), 1) for x in row[:2]), *(round(float(x), 3) for x in unit(row[2:]))]

    table = {"samples": len(rows), "image_size": size}
    table |= {"mean": compact(np.mean(rows, 0)), "median": compact(np.median(rows, 0))}
    for kind, group in groups.items():
        table[kind] = {key: compact(np.median(group[key], 0)) for key in sorted(group)}
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
    out: str = flag(str(Path(__file__).parent.parent / "data/pretrained/blind_table.json"), "file for the table")


def main(argv: list[str] | None = None) -> None:
    cfg = cli(TableConfig, __doc__, argv)
    if not cfg.make_blind_table:
        raise ValueError("--make-blind-table: name the manipulation.jsonl of the training data")
    table = make_blind_table(cfg.make_blind_table, cfg.out)
    print(f"{cfg.out}: medians of {table['samples']} samples, {len(table['category_part'])} kinds of parts")


if __name__ == "__main__":
    run_main(main)
