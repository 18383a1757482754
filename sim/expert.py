"""The scripted expert, and what the simulator knows about a rendered scene: labels, facts and dense targets.

    scene.spawn(category, seed).render()
    expert(scene, rng)      -> Label, a contact that works
    attempt(scene, rng)     -> what was tried and its result; the scene keeps its end state
    facts(scene, rng)       -> JSON values, for questions and answers
    dense_targets(scene)    -> rasters for the vision stage
    part_targets(scene)     -> rasters: which part, how to approach it, how far from its hinge

The expert knows what a policy does not: the joint, the mask, the collision shapes.
"""

import math
from typing import NamedTuple

import numpy as np

from sim.objects import PART_KINDS, main_colour
from sim.scene import BACKGROUND, BASE, INITIAL, Scene, tilt, unit

MIN_PART_PIXELS = 8  # a part with fewer visible pixels is not asked for
PIXELS, TRIES = 160, 6  # maximum number of a part's pixels that are scored, and of contacts that are tried
MOST_LEVER = 0.8  # share of the largest lever arm: more does not help
MOST_EDGE = 1 / 32  # share of the frame: more distance to an edge does not help either
EDGE_JUMP_M = 0.02  # a larger jump in depth counts as an edge
REGION = 0.75  # pixels with at least this share of the best score form the region
LEAST_SCORE = 0.3  # minimum share of the best score for the other pixels that are tried
JITTER_FRAME, JITTER_DEG = 1 / 128, 8.0  # perturbation that a label must survive: share of the frame, tilt
ATTEMPTS = ("good", "good", "good", "other", "bad", "bad")  # the expert's; on another part; wrong direction
BAD_ANGLE = (math.pi / 3, math.pi / 2)  # radians by which a wrong direction is off
FURTHER = (0.3, 0.8)  # end position of a part that was moved on purpose, as a share of its range
GRID = 16  # raster side of dense_targets
DEPTH_UNIT_M = 0.3  # of relative depth
EMPTY_WEIGHT = 0.6  # a part names a cell when it fills more than this share of the area that no part fills
PART_GRID = 32  # raster side of part_targets


class Label(NamedTuple):
    """A contact that works: pixel (u, v) and the unit direction of the gripper's approach, CAMERA frame."""

    u: float
    v: float
    approach: np.ndarray


def expert(scene: Scene, rng: np.random.Generator, part: int | None = None, jitter: bool = True) -> Label | None:
    """A contact in the rendered picture that works for `part` (None: the target); None if none was found.

    Scores pixels by alignment(normal, motion) * min(lever, 0.8) * distance to the nearest edge, tries the middle one
    of the best region along the true motion, then others. With `jitter` a perturbed copy of a label must work too."""
    part = scene.target if part is None else part
    mask = scene.links == part
    if mask.sum() < MIN_PART_PIXELS:
        return None
    step = -(-mask.sum() // PIXELS)
    rows, columns = (index[::step] for index in np.nonzero(mask))
    points = scene.backproject_pixels(rows, columns)
    _, along, way, lever = _work(scene, points, part)
    edge = _edge_distance(scene.depth, mask)[rows, columns]
    score = along.clip(0) * lever.clip(0, MOST_LEVER) * edge
    if score.max() <= 0:
        return None
    for i in _candidates(points, score):
        label = Label(float(columns[i]), float(rows[i]), scene.camera_rotation @ way[i])
        if _works(scene, label, part, rng, jitter):
            return label
    return None


def _work(scene: Scene, points: np.ndarray, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """How to move `part` by a contact at points (n, 3), world.

    Returns: seen (n,), whether the part is visible there; along (n,), cosine between its surface and a pull along its
        motion (or a push against it), 0 where it is not visible; way (n, 3), world, the gripper's direction;
        lever (n,), lever arm as a share of the largest."""
    link, normals = scene.normals(points)
    direction, lever = scene.motion(points, part)
    along = np.where(link == part, (normals * direction).sum(1), 0)
    sense = scene.sense(part) or np.sign(along)  # if either counts, the surface decides: approach from outside
    return link == part, sense * along, -(sense * direction.T).T, lever


def true_approach(scene: Scene, point: np.ndarray, part: int) -> np.ndarray | None:
    """The approach direction (3,), camera frame, to move `part` at `point` (3,), world; None where it is hidden."""
    (seen,), _, (way,), _ = _work(scene, point[None], part)
    return scene.camera_rotation @ way if seen else None


def why_unsolved(scene: Scene) -> str:
    """A message saying what may be wrong with the target of a rendered scene for which `expert` found nothing."""
    label = scene.spec.parts[scene.target].label
    rows, columns = np.nonzero(scene.links == scene.target)
    if len(rows) < MIN_PART_PIXELS:
        return f"the {label} is seen on {len(rows)} pixels only: it is hidden or too small"
    seen, along, *_ = _work(scene, scene.backproject_pixels(rows, columns), scene.target)
    if not seen.any():
        return f"no ray meets the {label}: check its mesh"
    if scene.sense(scene.target) and (along[seen] > scene.view.min_alignment).mean() < scene.view.min_workable:
        return f"the positive motion of the {label} is blocked or leads into the object: check axis and limits"
    return f"no contact that was tried moves the {label}"


def _candidates(points: np.ndarray, score: np.ndarray) -> list[int]:
    """Order in which the expert tries its pixels: the middle of the best region first, then others by score."""
    region = np.flatnonzero(score >= REGION * score.max())
    spread = np.linalg.norm(points[region, None] - points[None, region], axis=2).sum(1)
    ranked = np.argsort(-score, kind="stable")[: max(1, (score > LEAST_SCORE * score.max()).sum())]
    others = ranked[np.linspace(0, len(ranked) - 1, TRIES - 1).astype(int)]
    return list(dict.fromkeys([int(region[spread.argmin()]), *others.tolist()]))


def _works(scene: Scene, label: Label, part: int, rng: np.random.Generator, jitter: bool) -> bool:
    """Whether the label reaches the long threshold, and with `jitter` its perturbed copy the initial one."""
    long = scene.act(*label, part, stop_at=scene.long_threshold(part)).long
    if not long or not jitter:
        return long
    du, dv = rng.uniform(-1, 1, 2) * JITTER_FRAME * scene.image_size
    approach = tilt(label.approach, math.radians(JITTER_DEG), rng)
    return scene.act(label.u + du, label.v + dv, approach, part, stop_at=INITIAL).initial


def _edge_distance(depth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(S, S) pixel distance to the nearest edge of `mask` (or depth jump), as a share of the largest that counts."""
    own = np.where(mask, depth, 0)
    padded = np.pad(np.where(mask, depth, np.inf), 1, constant_values=np.inf)
    inside = mask.copy()
    for neighbour in (padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2]):
        inside &= ~(np.abs(neighbour - own) > EDGE_JUMP_M)
    most = max(1, round(MOST_EDGE * len(mask)))
    distance = mask.astype(float)
    for _ in range(most - 1):
        distance += inside
        grown = np.pad(inside, 1)
        inside = inside & grown[2:, 1:-1] & grown[:-2, 1:-1] & grown[1:-1, 2:] & grown[1:-1, :-2]
    return distance / most


def attempt(scene: Scene, rng: np.random.Generator) -> dict | None:
    """Simulate a good or bad attempt at the target and keep the end state, for pictures taken afterwards.

    Returns {"goal", "acted" (labels), "moved" (by the first stroke, rad or m), "success" (the goal's long threshold)};
    None where the expert finds no contact: nothing has moved."""
    scene.render()
    goal = acted = scene.target
    others = [j for j in range(len(scene.joints)) if j != goal]
    kind = ATTEMPTS[rng.integers(len(ATTEMPTS))]
    if kind == "other" and others:
        acted = others[rng.integers(len(others))]
    label = expert(scene, rng, acted, jitter=False)
    if label is None:
        return None
    approach = tilt(label.approach, rng.uniform(*BAD_ANGLE), rng) if kind == "bad" else label.approach
    outcome = scene.act(label.u, label.v, approach, acted)
    parts = scene.spec.parts
    ended = np.clip(outcome.joints or scene.joints, [part.lower for part in parts], [part.upper for part in parts])
    success = scene.opened(goal, ended[goal]) >= scene.long_threshold(goal)
    if outcome.long and not parts[acted].both_ways:  # as if more strokes followed, so that the motion is obvious
        start = scene.joints[acted]
        ended[acted] = max(ended[acted], start + rng.uniform(*FURTHER) * (parts[acted].upper - start))
    scene.set_joints(ended.tolist())
    done = {"moved": round(outcome.moved, 4), "success": bool(success)}
    return {"goal": parts[goal].label, "acted": parts[acted].label} | done


def facts(scene: Scene, rng: np.random.Generator, expert: bool = True) -> dict:
    """Facts about the rendered picture, as plain JSON values (data/questions.py uses them). rng: for the expert's
    jitter. expert: fill "contact" (else it is None)."""
    return {
        "category": scene.category,
        "seed": int(scene.seed),
        "image_size": scene.image_size,
        "box": _box(scene.links != BACKGROUND),
        "colour": main_colour(scene.spec.base),
        "parts": [_part_facts(scene, j, rng if expert else None) for j in range(len(scene.spec.parts))],
    }


def _part_facts(scene: Scene, j: int, rng: np.random.Generator | None) -> dict:
    """Facts about part j. With rng=None "contact" is None."""
    part = scene.spec.parts[j]
    mask = scene.links == j
    rows, columns = np.nonzero(mask)
    shown = len(rows) >= MIN_PART_PIXELS
    label = expert(scene, rng, j) if rng is not None and shown else None
    return {name: getattr(part, name) for name in ("label", "kind", "verb", "primitive", "joint")} | {
        "colour": main_colour(part.shapes),
        "pixels": len(rows),
        "centre": [round(float(columns.mean()), 2), round(float(rows.mean()), 2)] if shown else None,
        "box": _box(mask) if shown else None,
        "openness": round(scene.openness(j), 4),
        "contact": label and {"u": label.u, "v": label.v, "approach": [round(float(d), 5) for d in label.approach]},
    }


def _box(mask: np.ndarray) -> list[int] | None:
    """[x0, y0, x1, y1], inclusive, of the set pixels."""
    rows, columns = np.nonzero(mask)
    return [int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())] if len(rows) else None


def dense_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Training targets of the vision stage, averaged over the cells of a 16 x 16 raster.

    Returns:
        targets (16, 16, 7) float16: depth relative to the object's mean (units of 0.3 m, clipped to +-3), normal
            x, y, z (camera frame, from the depth image), share of object, share of movable parts, openness (0..1) of
            the part that fills the cell (0: none).
        part_kind (16, 16) int8: index into PART_KINDS of that part (0: none, or no such kind).
    Raises: ValueError when 16 does not divide the image size."""
    S = scene.image_size
    if S % GRID:
        raise ValueError(f"image_size={S} must be a multiple of {GRID} for the dense targets")
    f, cx, cy = scene.intrinsics
    shown = scene.links != BACKGROUND
    depth = np.where(shown, scene.depth, 0)
    rows, columns = np.indices((S, S))
    cloud = np.stack([(columns - cx) / f * depth, (rows - cy) / f * depth, depth], -1)  # (S, S, 3) camera frame
    down = np.diff(cloud, axis=0, append=cloud[-1:])
    right = np.diff(cloud, axis=1, append=cloud[:, -1:])
    normal = unit(np.cross(down, right)) * shown[..., None]  # towards the camera: z < 0
    middle = depth[shown].mean() if shown.any() else 0.0
    relative = np.where(shown, (depth - middle) / DEPTH_UNIT_M, 0).clip(-3, 3)
    maps = np.dstack([relative, normal, shown, scene.links >= 0])

    def cells(picture):  # (S, S, C) -> (16, 16, C)
        return picture.reshape(GRID, S // GRID, GRID, S // GRID, -1).mean((1, 3))

    parts = scene.spec.parts
    share = cells(np.stack([scene.links == j for j in range(len(parts))], -1).astype(float))  # (16, 16, parts)
    kinds = np.array([PART_KINDS.index(part.kind) if part.kind in PART_KINDS else 0 for part in parts])
    openness = np.array([scene.openness(j) for j in range(len(parts))])
    largest = share.argmax(-1)
    filled = share.max(-1) > EMPTY_WEIGHT * (1 - share.sum(-1))
    targets = np.dstack([cells(maps), np.where(filled, openness[largest], 0)]).astype(np.float16)
    return targets, np.where(filled, kinds[largest], 0).astype(np.int8)


def part_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per-part targets for instructions at the cell centres of a 32 x 32 raster: pixels 4 i + 2 of a 128-pixel picture.

    Returns:
        part (32, 32) int8: j for part j, -1 body, -2 background.
        act (32, 32, 3) float16: unit approach direction, camera frame, for the part visible there; 0 where there is
            none, and where either sense counts and the surface does not say which.
        arm (32, 32) float16: moment arm as a share of the part's largest: 0 at the hinge, 1 far from it or for a slide.
    Raises: ValueError for a picture smaller than 32 pixels."""
    S = scene.image_size
    if S < PART_GRID:
        raise ValueError(f"image_size={S} must be at least {PART_GRID} for the part targets")
    at = ((np.arange(PART_GRID) + 0.5) * S / PART_GRID).astype(int)
    part = scene.links[np.ix_(at, at)].astype(np.int8)
    act = np.zeros((PART_GRID, PART_GRID, 3), np.float16)
    arm = np.zeros((PART_GRID, PART_GRID), np.float16)
    for j in set(part.ravel().tolist()) - {BACKGROUND, BASE}:
        rows, columns = np.nonzero(part == j)
        _, _, way, lever = _work(scene, scene.backproject_pixels(at[rows], at[columns]), j)
        act[rows, columns] = way @ scene.camera_rotation.T
        arm[rows, columns] = lever.clip(0, 1)
    return part, act, arm
