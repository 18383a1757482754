"""Policies say where to grip: random floors, the expert made worse, the blind table, a model.

    python sim_eval.py --policy model,expert,blind,random-normal                 # scores some of them
    python sim_eval.py --make-blind-table data/cache/train/manipulation.jsonl    # writes what `blind` knows

A policy is a function (scene, instruction, part, rng) -> (u, v, approach), or None where it does not apply: pixel
column and row, and the unit direction (3,), camera frame, in which the gripper travels to the contact.

The floors say what a number is worth. `blind` never looks: it answers with the median label of the category and part;
with centred, upright objects such a table scored .53, so a score means seeing only above it.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import write_text
from sim.scene import BACKGROUND, Label, Scene, tilt, unit

JITTER_PX, JITTER_DEG = 1.0, 5.0  # of expert-jittered; pixels of a REFERENCE_S picture
REFERENCE_S = 128  # the picture that `pixel-4` and JITTER_PX speak of, whatever the scene's size
HINGE_SHARE = 0.15  # hinge-pixel: from the pixels with the smallest lever arm


def random_pixel(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """(u, v) of a random set pixel of mask (S, S)."""
    rows, columns = np.nonzero(mask)
    i = rng.integers(len(rows))
    return float(columns[i]), float(rows[i])


def against_normal(scene: Scene, u: float, v: float) -> np.ndarray:
    """(3,) straight onto the surface at (u, v), by the simulator's own normal: more than a picture tells."""
    normal, _ = scene.normal(scene.backproject(u, v))
    return np.array([0.0, 0.0, 1.0]) if normal is None else scene.camera_rotation @ -normal


def random_action(scene, instruction, part, rng):
    """A pixel of the object, a direction of the whole sphere."""
    return *random_pixel(scene.links != BACKGROUND, rng), unit(rng.normal(size=3))


def random_normal(scene, instruction, part, rng):
    """A pixel of the object, straight onto the surface there."""
    u, v = random_pixel(scene.links != BACKGROUND, rng)
    return u, v, against_normal(scene, u, v)


def part_pixel_normal(scene, instruction, part, rng):
    """A pixel of the named part: what perfect segmentation alone is worth."""
    u, v = random_pixel(scene.links == part, rng)
    return u, v, against_normal(scene, u, v)


def hinge_pixel(scene, instruction, part, rng):
    """A pixel of the part close to its hinge, straight onto the surface. None for parts that slide."""
    if scene.spec.parts[part].joint != "revolute":
        return None
    mask = scene.links == part
    points = np.array([scene.backproject(column, row) for row, column in np.argwhere(mask)])
    lever = scene.motion(points, part)[1]
    mask[mask] = lever <= np.quantile(lever, HINGE_SHARE)
    u, v = random_pixel(mask, rng)
    return u, v, against_normal(scene, u, v)


SCRIPTED = {
    "random": random_action,
    "random-normal": random_normal,
    "part-pixel-normal": part_pixel_normal,
    "hinge-pixel": hinge_pixel,
}
LABELLED = re.compile(r"expert|expert-jittered|direction-\d+|pixel-\d+")  # the expert's contact, made worse
HALVES = ("model-pixel", "model-direction")  # one half is the model's, the other the expert's: which of them fails?
NAMED = ("model", "model-text", "model-carried", *HALVES, "NAME=FOLDER", "blind", "mean-action", "expert")
POLICY_HELP = ", ".join((*NAMED, *SCRIPTED, "expert-jittered, direction-DEGREES, pixel-PIXELS"))


def disturbed(name: str, label: Label, scale: float, rng: np.random.Generator):
    """The label of policy `name`: moved by that many pixels (x scale) or turned by that many degrees, at random."""
    u, v, approach, angle = label.u, label.v, label.approach, rng.uniform(0, 2 * math.pi)
    if name == "expert-jittered":
        du, dv = scale * rng.uniform(-JITTER_PX, JITTER_PX, 2)
        return u + du, v + dv, tilt(approach, math.radians(JITTER_DEG), rng)
    kind, _, size = name.partition("-")
    if kind == "pixel":
        u, v = u + scale * int(size) * math.cos(angle), v + scale * int(size) * math.sin(angle)
    return u, v, tilt(approach, math.radians(int(size)), rng) if kind == "direction" else approach


def half(name: str, action, label: Label):
    """model-pixel: the model's pixel with the expert's direction; model-direction: the other way round."""
    u, v, approach = action
    return (u, v, label.approach) if name == "model-pixel" else (label.u, label.v, approach)


# ---------------------------------------------------------------------------------------------------- the blind table


def blind_policy(table: dict, mean: bool):
    """Never looks: the median label of this category and part, else of this part's name, else of all; or the mean."""

    def policy(scene, instruction, part, rng):
        label = scene.spec.parts[part].label
        row = table["mean"] if mean else table["category_part"].get(f"{scene.category}/{label}")
        row = np.array(row or table["part"].get(label) or table["median"])
        u, v = row[:2] * scene.image_size / table["image_size"]
        return u, v, unit(row[2:])

    return policy


def make_blind_table(samples: str, path: str) -> dict:
    """Median labels of training samples (manipulation.jsonl of data/build.py) -> `path`: what looking is compared with.

    A row is [u, v, x, y, z]: pixels of an `image_size` picture, and the unit direction. Raises: ValueError naming file
    and line.
    """
    groups, rows, first = {"category_part": {}, "part": {}}, [], None
    try:
        for number, line in enumerate(Path(samples).read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                row = [float(x) for x in (record["u"], record["v"], *record["approach"])]
                if len(row) != 5 or not np.isfinite(row).all():
                    raise ValueError("u, v and approach must be five finite numbers")
                keys, first = (f"{record['category']}/{record['part']}", record["part"]), first or record["image"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{samples}, line {number}: {type(error).__name__}: {error}") from None
            rows.append(row)
            for group, key in zip(groups.values(), keys, strict=True):
                group.setdefault(key, []).append(row)
        if not rows:
            raise ValueError(f"{samples}: no samples")
        with Image.open(Path(samples).parent / first) as picture:
            size = picture.width
    except OSError as error:
        raise ValueError(f"{error.filename or samples}: {error.strerror or error}") from None

    def compact(values) -> list[float]:
        return [*(round(float(x), 1) for x in values[:2]), *(round(float(x), 3) for x in unit(values[2:]))]

    table = {"samples": len(rows), "image_size": size, "mean": compact(np.mean(rows, 0))}
    table["median"] = compact(np.median(rows, 0))
    table |= {name: {key: compact(np.median(g[key], 0)) for key in sorted(g)} for name, g in groups.items()}
    write_text(Path(path), json.dumps(table).replace('], "', '],\n "').replace('{"', '{\n "') + "\n")
    return table


def read_blind_table(path: str) -> dict:
    try:
        table = json.loads(Path(path).read_text())
        if not {"mean", "median", "part", "category_part", "image_size"} <= table.keys():
            raise ValueError("not a table")
    except OSError:
        raise ValueError(
            f"--blind-table {path}: no such file; `python sim_eval.py --make-blind-table MANIPULATION.jsonl` writes it"
        ) from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--blind-table {path}: not a table written by --make-blind-table ({error})") from None
    return table
