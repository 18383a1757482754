"""The catalogue: the 30 categories of articulated objects, generated in code from a seed (numpy only).

    python -m sim.catalogue          # print it: category, split, colour, parts of three sample instances
    make_object("Safe", rng)         # an ObjectSpec: base shapes and parts; sim/objects.py: frames, units, URDF text

The tables of categories are at the end. Source: RoboMamba (arXiv 2406.04339) Table 2 for the categories and the split;
the shapes are our own, since PartNet-Mobility may not be redistributed.
"""

import math
from functools import partial

import numpy as np

from sim.grammar import ARCHETYPES, PREFIX

from sim.objects import (  # isort: skip
    COLOURS, DARK, ENDS, LEFT_RIGHT, METAL, ObjectSpec, box, cylinder, drawer, grid, handle, hinge, legs, main_colour,
    pair, pick, seam, shade, shell, side_door, sizes, slide, sphere, tint, top_lid,
)  # fmt: skip

# First scene seed of each use; the ranges do not overlap.
SEED_SPAN = 9_000_000
SEEDS = {
    "train": 0,
    "val": 10_000_000,  # for model selection; never the test seeds
    "seen": 20_000_000,  # test scenes
    "unseen": 30_000_000,
    "test-seen": 40_000_000,  # questions about test scenes
    "test-unseen": 50_000_000,
    "objects": 60_000_000,  # the user's own objects
}
STICKER = 1.03  # radius of a bottle's sticker, relative to the bottle; if smaller, the low-polygon cylinders intersect


# ---- seen categories: a builder takes a random generator and returns (fixed shapes, parts); metres and radians ------
def safe(rng):
    size, depth = sizes(rng, (0.45, 0.65), (0.4, 0.5))
    rgb = tint(rng, "black", "grey", "green", "blue")
    dial = [cylinder(0.05, 0.02, (0.01, 0, 0.08), METAL, "x"), cylinder(0.015, 0.05, (0.025, 0, 0.08), DARK, "x")]
    bolt = [box((0.02, 0.14, 0.025), (0.035, 0, -0.06), METAL), cylinder(0.015, 0.03, (0.015, 0, -0.06), METAL, "x")]
    front, at = (0.035, size - 0.07, size - 0.07), (depth / 2 - 0.03, 0, size / 2)
    leaf = side_door(rng, "door", pick(rng, *ENDS), front, at, shade(rgb, 1.2), "none", extra=dial + bolt)
    return shell(size, depth, size, 0.0, 0.05, rgb), [leaf]


def door(rng):
    double = rng.random() < 0.6
    wide, tall = sizes(rng, (0.35, 0.42) if double else (0.4, 0.5), (0.85, 1.0))
    rgb, grip, whole = tint(rng), pick(rng, "knob", "lever", "upright bar"), wide * (1 + double)
    base = pair((0.08, 0.05, tall), (0, whole / 2 + 0.025, tall / 2), shade(rgb, 0.7))
    base += [box((0.08, whole + 0.1, 0.05), (0, 0, tall + 0.025), shade(rgb, 0.7))]
    base += [box((0.2, whole + 0.2, 0.01), (0, 0, -0.005), COLOURS["grey"])]
    panels = [box((0.006, wide * 0.6, tall * 0.3), (0.003, 0, tall * z), shade(rgb, 0.85)) for z in (-0.25, 0.25)]
    size = (0.03, wide, tall)
    if double:
        leaves = [(f"{word} door", s, s * wide / 2) for s, word in LEFT_RIGHT]
    else:
        leaves = [("door", pick(rng, *ENDS), 0)]
    return base, [side_door(rng, label, s, size, (0, y, tall / 2), rgb, grip, 0.2, panels) for label, s, y in leaves]


def display(rng):
    wide, pivot = sizes(rng, (0.6, 0.85), (0.3, 0.36))
    tall, rgb = wide * rng.uniform(0.5, 0.65), tint(rng, "black", "grey", "white")
    middle = 0.3 * tall  # height of the screen's middle above its hinge, so that most of it tilts towards the viewer
    base = [cylinder(wide * 0.2, 0.02, (-0.03, 0, 0.01), rgb), box((0.03, 0.08, pivot), (-0.03, 0, pivot / 2), rgb)]
    frame = box((0.014, wide, tall), (0.007, 0, middle), rgb)
    glass = box((0.02, wide * 0.94, tall * 0.88), (0.02, 0, middle + 0.01), tint(rng, "black", "blue"))
    return base, [hinge("screen", (-0.01, 0, pivot), (0, 1, 0), 0.6, [frame, glass], "tilt", lower=-0.25)]


def refrigerator(rng):
    wide, deep, tall = sizes(rng, (0.42, 0.58), (0.4, 0.5), (0.9, 1.05))
    rgb, side = tint(rng, "white", "grey", "black", "red"), pick(rng, *ENDS)
    base = shell(wide, deep, tall, 0.03, 0.025, rgb) + [box((deep * 0.8, wide * 0.9, 0.03), (0, 0, 0.015), DARK)]
    layout = pick(rng, "one", "stacked", "french")
    leaves, low = [("door", side, 0, 0, tall)], 0.0  # label, hinge, y, lower and upper edge
    if layout == "stacked":
        split = tall * pick(rng, rng.uniform(0.3, 0.38), rng.uniform(0.62, 0.7))
        leaves = [("top door", side, 0, split, tall), ("bottom door", side, 0, 0, split)]
    elif layout == "french":
        low = tall * pick(rng, 0.0, rng.uniform(0.25, 0.33))
        leaves = [(f"{word} door", s, s * wide / 4, low, tall) for s, word in LEFT_RIGHT]
    parts = []
    for label, hinge_side, y, z_low, z_top in leaves:
        size, at = (0.04, wide / 2 if y else wide, z_top - z_low), (deep / 2, y, 0.03 + (z_low + z_top) / 2)
        parts.append(side_door(rng, label, hinge_side, size, at, rgb, "upright bar"))
    if low:
        size, at = (deep - 0.05, wide, low), (deep / 2, 0, 0.03 + low / 2)
        parts.append(drawer(rng, "bottom drawer", size, at, rgb, "bar", 0.04))
    return base, parts


def laptop(rng):
    wide, deep = sizes(rng, (0.6, 0.8), (0.42, 0.55))
    rgb = tint(rng, "grey", "black", "pink", "white")
    base = [box((deep, wide, 0.03), (0, 0, 0.015), rgb)]
    base += [box((deep * 0.45, wide * 0.85, 0.004), (-deep * 0.15, 0, 0.032), DARK)]
    base += [box((deep * 0.25, wide * 0.3, 0.004), (deep * 0.3, 0, 0.032), shade(rgb, 0.8))]
    screen = box((deep * 0.85, wide * 0.9, 0.003), (deep * 0.5, 0, -0.0015), (0.15, 0.25, 0.4))
    badge = cylinder(0.03, 0.003, (deep * 0.5, 0, 0.0215), shade(rgb, 0.7))
    size, start = (deep, wide, 0.02), rng.uniform(0.02, 0.25)
    return base, [top_lid("lid", (-deep / 2, 0, 0.034), size, 2.2, rgb, [screen, badge], start=start)]


def lighter(rng):
    wide, tall = sizes(rng, (0.18, 0.26), (0.4, 0.5))
    deep, side, rgb = wide * 0.6, pick(rng, *ENDS), tint(rng)
    base = [box((deep, wide, tall), (0, 0, tall / 2), rgb)]
    base += [box((deep * 0.5, wide * 0.5, 0.1), (0, 0, tall + 0.05), METAL)]
    base += [cylinder(0.03, deep * 0.4, (0, side * 0.03, tall + 0.1), DARK, "x")]
    middle = -side * wide / 2  # of the cap, relative to its hinge
    cap = [box((deep, wide, 0.02), (0, middle, 0.17), METAL), box((deep, 0.01, 0.16), (0, 2 * middle, 0.08), METAL)]
    cap += [box((0.01, wide, 0.16), (s * (deep / 2 - 0.005), middle, 0.08), METAL) for s in ENDS]
    return base, [hinge("cap", (0, side * wide / 2, tall + 0.005), (-side, 0, 0), 2.0, cap)]


def microwave(rng):
    wide, deep, tall = sizes(rng, (0.65, 0.85), (0.38, 0.5), (0.36, 0.45))
    rgb, leaf = tint(rng, "white", "black", "grey", "red"), wide * 0.72
    x, keys, z = deep / 2, wide - leaf, 0.02 + tall / 2
    y = leaf / 2  # middle of the button panel, right of the door
    base = shell(wide, deep, tall, 0.02, 0.02, rgb) + [box((0.02, keys, tall), (x + 0.01, y, z), shade(rgb, 0.9))]
    base += [box((0.01, keys * 0.7, 0.05), (x + 0.022, y, z + tall * 0.3), (0.1, 0.35, 0.2))]
    spots = [(dy, dz * tall) for dy in (-0.05, 0, 0.05) for dz in (-0.3, -0.15, 0)]
    base += [cylinder(0.016, 0.012, (x + 0.024, y + dy, z + dz), METAL, "x") for dy, dz in spots]
    glass = [box((0.004, leaf * 0.65, tall * 0.6), (0.002, 0, 0), DARK)]
    size, grip = (0.03, leaf, tall), pick(rng, "upright bar", "upright bar", "recess")
    return base, [side_door(rng, "door", -1, size, (x, -keys / 2, z), rgb, grip, tall * 0.6, glass)]


def mouse(rng):
    wide, long = sizes(rng, (0.3, 0.38), (0.5, 0.62))
    rgb = tint(rng)
    base = [box((long / 2, wide, tall), (s * long / 4, 0, tall / 2), rgb) for s, tall in ((-1, 0.12), (1, 0.05))]
    base += [cylinder(wide / 2, 0.12, (-long / 2, 0, 0.06), rgb), cylinder(0.05, 0.035, (long / 4, 0, 0.09), DARK, "y")]
    base += [cylinder(0.012, 0.15, (long / 2 + 0.07, 0, 0.03), DARK, "x")]  # the cable shows which end is the front
    flap = [box((long * 0.5, wide * 0.44, 0.06), (long * 0.25, 0, 0.03), shade(rgb, 1.2))]
    at = [(f"{word} button", (0, s * wide * 0.27, 0.06)) for s, word in LEFT_RIGHT]
    return base, [hinge(label, place, (0, -1, 0), 0.45, flap, "lift") for label, place in at]


def box_with_flaps(rng):
    wide, deep, tall = sizes(rng, (0.45, 0.7), (0.4, 0.55), (0.25, 0.45))
    rgb = shade(tint(rng, "brown"), 1.35) if rng.random() < 0.6 else tint(rng)
    base = shell(wide, deep, tall, 0, 0.012, rgb)[:-1]  # no top
    sticker = (0.004, wide * 0.3, tall * 0.3), (deep / 2 + 0.008, wide * 0.2, tall * 0.6)  # shows which side is front
    base += [box((0.012, wide, tall), (deep / 2, 0, tall / 2), rgb), box(*sticker, COLOURS["white"])]
    if rng.random() < 0.35:
        lip = box((0.012, wide + 0.02, 0.06), (deep + 0.016, 0, -0.02), shade(rgb, 0.85))
        size = (deep + 0.02, wide + 0.02, 0.015)
        return base, [top_lid("lid", (-deep / 2, 0, tall), size, 2.2, shade(rgb, 1.1), [lip])]
    size, parts = (deep, wide / 2 - 0.005, 0.015), []
    for s, word in LEFT_RIGHT:
        flap = [box(size, (0, -s * size[1] / 2, 0.008), shade(rgb, 1.1))]
        at, start = (0, s * wide / 2, tall), rng.uniform(0.05, 0.3)
        parts.append(hinge(f"{word} flap", at, (-s, 0, 0), 2.2, flap, start=start))
    return base, parts


def trash_can(rng):
    tall, half, rgb = rng.uniform(0.5, 0.75), rng.uniform(0.2, 0.28), tint(rng)
    lid_rgb = tint(rng) if rng.random() < 0.3 else shade(rgb, 0.75)
    pedal = box((0.1, 0.12, 0.02), (half + 0.05, 0, 0.03), DARK)
    tab = box((0.05, 0.1, 0.02), (2 * half + 0.02, 0, 0.02), DARK)
    if rng.random() < 0.6:  # two compartments side by side
        body = box((2 * half, 3 * half, tall), (0, 0, tall / 2), rgb)
        size, y = (2 * half + 0.01, 1.5 * half - 0.01, 0.04), 0.75 * half
        lids = [top_lid(f"{word} lid", (-half, s * y, tall), size, 1.6, lid_rgb, [tab]) for s, word in LEFT_RIGHT]
    elif rng.random() < 0.5:
        body, lid = cylinder(half, tall, (0, 0, tall / 2), rgb), cylinder(half * 1.05, 0.04, (half, 0, 0.02), lid_rgb)
        lids = [hinge("lid", (-half, 0, tall), (0, -1, 0), 1.6, [lid, tab])]
    else:
        body = box((2 * half, 2 * half, tall), (0, 0, tall / 2), rgb)
        lids = [top_lid("lid", (-half, 0, tall), (2 * half + 0.02, 2 * half + 0.02, 0.04), 1.6, lid_rgb, [tab])]
    return [body, pedal], lids


def kitchen_pot(rng):
    radius, tall = sizes(rng, (0.26, 0.36), (0.2, 0.34))
    rgb = tint(rng, "grey", "red", "black", "blue", "green")
    base = [cylinder(radius, tall, (0, 0, tall / 2), rgb)]
    base += pair((0.1, 0.05, 0.025), (0, radius + 0.02, tall * 0.75), DARK)
    lid = [cylinder(radius * 1.03, 0.02, (0, 0, 0.01), shade(rgb, 1.15))]
    lid += [cylinder(radius * 0.6, 0.03, (0, 0, 0.03), shade(rgb, 1.1))]
    lid += [cylinder(0.02, 0.05, (0, 0, 0.06), DARK), cylinder(0.05, 0.025, (0, 0, 0.095), DARK)]
    return base, [slide("lid", (0, 0, tall), (0, 0, 1), 0.35, lid, "lift")]


def suitcase(rng):
    wide, deep, tall = sizes(rng, (0.45, 0.6), (0.22, 0.3), (0.55, 0.7))
    rgb = tint(rng)
    if rng.random() < 0.4:  # lying on its back: the lid is the upper half
        ribs = [(tall / 2, y * wide, deep * 0.45) for y in (-0.3, 0, 0.3)]
        ribs = [box((tall * 0.9, 0.02, 0.006), at, shade(rgb, 0.7)) for at in ribs]
        locks = pair((0.012, 0.06, 0.07), (tall / 2 + 0.006, wide * 0.3, deep * 0.45), METAL)
        grip = handle("bar", (tall / 2, 0, deep * 0.25), 0.2, DARK, 0.05)
        base = [box((tall, wide, deep * 0.55), (0, 0, deep * 0.275), rgb), *locks, *grip]
        at, size = (-tall / 2, 0, deep * 0.56), (tall, wide, deep * 0.45)
        return base, [top_lid("lid", at, size, 1.8, shade(rgb, 1.1), ribs)]
    middle = tall / 2 + 0.05
    base = [box((deep, wide, tall), (0, 0, middle), rgb)]
    ribs = [y * wide for y in (-0.3, -0.1, 0.1, 0.3)]
    base += [box((0.006, 0.02, tall * 0.9), (deep / 2, y, middle), shade(rgb, 0.7)) for y in ribs]
    base += [sphere(0.04, (sx * deep * 0.35, sy * wide * 0.4, 0.04), DARK) for sx in ENDS for sy in ENDS]
    grip = pair((0.025, 0.025, 0.14), (0, wide * 0.22, 0), METAL)
    grip += [box((0.08, wide * 0.44 + 0.08, 0.05), (0, 0, 0.09), DARK)]
    return base, [slide("handle", (0, 0, tall + 0.05), (0, 0, 1), 0.35, grip, "pull up")]


def crossed_levers(rng, scissors=False):
    """Pliers or scissors, lying flat with the jaws to one side; the handle in front moves towards the viewer."""
    long, half_angle, side, rgb = rng.uniform(0.4, 0.5), rng.uniform(0.15, 0.3), pick(rng, *ENDS), tint(rng)

    def lever(front, z):
        """front = +1: the lever whose handle is in front (+x), -1: the other one."""
        along = np.array([front * math.sin(half_angle), -side * math.cos(half_angle), 0.0])  # pivot -> handle
        yaw, up = math.atan2(along[1], along[0]), np.array([0, 0, z])
        jaw = long * (0.8 if scissors else 0.35)
        shapes = [box((long, 0.035, 0.04), 0.5 * long * along + up, rgb if scissors else METAL, yaw)]
        shapes += [box((jaw, 0.05, 0.03), -0.5 * jaw * along + up, METAL, yaw)]
        if scissors:
            ring = long * along + up
            return [*shapes, cylinder(0.09, 0.05, ring, rgb), cylinder(0.055, 0.052, ring, DARK)]
        return [*shapes, box((long * 0.6, 0.06, 0.055), 0.7 * long * along + up, rgb, yaw)]

    base = [*lever(-1, 0.03), cylinder(0.03, 0.11, (0, 0, 0.055), DARK)]
    return base, [hinge("front handle", (0, 0, 0.045), (0, 0, side), 0.9, lever(1, 0.03))]


def drawer_grid(rng, rows, columns, size, x, top, rgb, grip):
    """A grid of drawers. size: total depth, width, height. x: of the panels' back faces. top: z of the upper edge."""
    depth, wide, tall = size
    parts = []
    for i, j, label in grid(rows, columns, "drawer"):
        each = (depth, wide / columns, tall / rows)
        at = (x, each[1] * (j + 0.5 - columns / 2), top - each[2] * (i + 0.5))
        parts.append(drawer(rng, label, each, at, rgb, grip))
    return parts


def storage_furniture(rng):
    wide, deep, tall, bottom = sizes(rng, (0.5, 0.9), (0.35, 0.5), (0.5, 0.95), (0.03, 0.1))
    rgb = tint(rng)
    front_rgb = tint(rng) if rng.random() < 0.35 else shade(rgb, 1.1)
    drawer_grip, door_grip = pick(rng, "knob", "bar", "recess"), pick(rng, "knob", "upright bar")
    base = shell(wide, deep, tall, bottom, 0.02, rgb) + legs(wide, deep, bottom, 0.04, shade(rgb, 0.6))
    x, inner, low, top = deep / 2, wide - 0.03, bottom + 0.015, bottom + tall - 0.015
    # Rows and columns of drawers; number of doors, below them
    layouts = ((1, 1, 0), (2, 1, 0), (3, 1, 0), (2, 2, 0), (0, 0, 1), (0, 0, 2), (1, 1, 1), (1, 1, 2))
    rows, columns, doors = layouts[rng.choice(8, p=[0.11, 0.14, 0.14, 0.08, 0.13, 0.16, 0.14, 0.10])]
    split = top if doors else low  # height of the edge between drawers and doors
    if rows and doors:
        split = top - (top - low) * rng.uniform(0.25, 0.35)
    parts = drawer_grid(rng, rows, columns, (deep - 0.04, inner, top - split), x, top, front_rgb, drawer_grip)
    leaves = [(s, f"{word} door", s * inner / 4) for s, word in LEFT_RIGHT] if doors == 2 else [(0, "door", 0)] * doors
    for side, label, y in leaves:
        size, at = (0.02, inner / doors, split - low), (x, y, (split + low) / 2)
        parts.append(side_door(rng, label, side or pick(rng, *ENDS), size, at, front_rgb, door_grip))
    return base, parts


def remote(rng):
    wide, long = sizes(rng, (0.2, 0.28), (0.6, 0.75))
    rgb = tint(rng, "black", "white", "grey", "blue")
    spots = [(long * 0.42 - i * 0.065, y) for i in range(5) for y in (-0.055, 0, 0.055)]
    base = [box((long, wide, 0.08), (0, 0, 0.04), rgb)]
    base += [cylinder(0.02, 0.02, (x, y, 0.085), tint(rng)) for x, y in spots]
    cover = [box((long * 0.36, wide * 0.9, 0.02), (0, 0, 0.01), shade(rgb, 0.8))]
    cover += [box((0.025, wide * 0.6, 0.05), (0.03, 0, 0.04), shade(rgb, 0.6))]  # the ridge to push against
    return base, [slide("battery cover", (-long * 0.3, 0, 0.08), (-1, 0, 0), 0.22, cover, "push back")]


def bottle(rng):
    radius, tall = sizes(rng, (0.14, 0.2), (0.45, 0.6))
    rgb = tint(rng, "green", "blue", "white", "brown", "red")
    base = [cylinder(radius, tall, (0, 0, tall / 2), rgb), cylinder(radius * 0.7, 0.06, (0, 0, tall + 0.03), rgb)]
    base += [cylinder(radius * 0.4, 0.1, (0, 0, tall + 0.1), rgb)]
    base += [cylinder(radius * STICKER, tall * 0.3, (0, 0, tall / 2), tint(rng))]
    cap = [cylinder(radius * 0.55, 0.09, (0, 0, 0.045), tint(rng))]
    return base, [slide("cap", (0, 0, tall + 0.13), (0, 0, 1), 0.25, cap, "pull off")]


def folding_chair(rng):
    wide, deep, tall = sizes(rng, (0.42, 0.5), (0.4, 0.46), (0.4, 0.48))
    rgb, frame = tint(rng), pick(rng, METAL, DARK)
    base = pair((0.03, 0.03, tall * 2), (-deep / 2, wide / 2, tall), frame)
    base += pair((0.03, 0.03, tall), (deep / 2, wide / 2, tall / 2), frame)
    base += pair((deep, 0.02, 0.02), (0, wide / 2, tall / 2), frame)
    base += [box((0.03, wide, tall * 0.45), (-deep / 2, 0, tall * 1.75), rgb)]
    seat = [box((deep, wide - 0.04, 0.03), (deep / 2, 0, 0), rgb)]
    return base, [hinge("seat", (-deep / 2 + 0.03, 0, tall), (0, -1, 0), 1.4, seat, "fold up")]


def toaster(rng):
    deep, wide, tall = sizes(rng, (0.28, 0.34), (0.5, 0.6), (0.32, 0.4))
    rgb = tint(rng, "grey", "red", "white", "black", "green")
    base = [box((deep, wide, tall), (0, 0, tall / 2 + 0.02), rgb)]
    base += [box((0.05, wide * 0.75, 0.006), (s * deep * 0.2, 0, tall + 0.022), shade(DARK, 0.5)) for s in ENDS]
    levers = [(0, "lever")] if rng.random() < 0.4 else [(s * wide * 0.25, f"{word} lever") for s, word in LEFT_RIGHT]
    base += [box((0.004, 0.03, tall * 0.6), (deep / 2 + 0.002, y, tall * 0.55), seam(rgb)) for y, _ in levers]
    knob = [box((0.065, 0.12, 0.045), (0.035, 0, 0), seam(rgb))]
    at = [((deep / 2, y, tall * 0.78), label) for y, label in levers]
    return base, [slide(label, place, (0, 0, -1), tall * 0.45, knob, "press down") for place, label in at]


def lamp(rng):
    pole, arm = sizes(rng, (0.4, 0.5), (0.28, 0.36))
    rgb, metal = tint(rng), pick(rng, METAL, DARK)
    base = [cylinder(0.13, 0.03, (0, 0, 0.015), rgb), cylinder(0.015, pole, (0, 0, 0.03 + pole / 2), metal)]
    head = [cylinder(0.015, arm, (arm / 2, 0, 0), metal, "x"), cylinder(0.09, 0.1, (arm, 0, -0.02), rgb)]
    head += [sphere(0.05, (arm, 0, -0.07), (0.95, 0.93, 0.7))]
    return base, [hinge("lamp head", (0, 0, pole + 0.03), (0, -1, 0), 0.8, head, "raise", lower=-0.2)]


def dispenser(rng):
    radius, tall, rgb = rng.uniform(0.16, 0.22), rng.uniform(0.38, 0.5), tint(rng)
    base = [cylinder(radius, tall, (0, 0, tall / 2), rgb)]
    base += [cylinder(radius * 0.5, 0.05, (0, 0, tall + 0.02), shade(rgb, 0.8))]
    base += [cylinder(radius * STICKER, tall * 0.3, (0, 0, tall / 2), tint(rng))]
    pump = [cylinder(0.025, 0.12, (0, 0, 0), METAL)]
    pump += [box((radius * 1.4, 0.07, 0.05), (radius * 0.4, 0, 0.07), shade(rgb, 0.7))]
    pump += [cylinder(0.05, 0.06, (0, 0, 0.07), shade(rgb, 0.7))]
    return base, [slide("pump head", (0, 0, tall + 0.06), (0, 0, 1), 0.25, pump, "pull up")]


# ---- unseen categories ----------------------------------------------------------------------------------------------
def toilet(rng):
    wide, rgb = rng.uniform(0.36, 0.42), tint(rng, "white", "white", "pink", "grey")
    base = [box((0.2, wide * 1.1, 0.4), (-0.3, 0, 0.55), rgb)]
    base += [box((0.22, wide * 1.15, 0.03), (-0.3, 0, 0.765), shade(rgb, 0.95))]
    base += [cylinder(wide * 0.35, 0.36, (0, 0, 0.18), rgb), cylinder(wide * 0.5, 0.06, (0.05, 0, 0.38), rgb)]
    base += [box((0.25, wide, 0.06), (-0.1, 0, 0.38), rgb), box((0.03, 0.08, 0.02), (-0.19, wide * 0.35, 0.68), METAL)]
    seat = cylinder(wide * 0.5, 0.025, (0.23, 0, 0.0125), shade(rgb, 0.92))
    return base, [top_lid("lid", (-0.18, 0, 0.415), (0.25, wide, 0.025), 1.6, shade(rgb, 0.92), [seat])]


def table(rng):
    wide, deep, tall, low = sizes(rng, (0.8, 1.0), (0.45, 0.55), (0.5, 0.6), (0.1, 0.15))  # low: height of a drawer
    rgb = tint(rng)
    front_rgb = tint(rng) if rng.random() < 0.35 else shade(rgb, 1.1)
    top, dark = tall - 0.015, shade(rgb, 0.8)
    z = top - low / 2
    base = [box((deep, wide, 0.03), (0, 0, tall), rgb), *legs(wide - 0.04, deep - 0.04, tall, 0.05, dark)]
    base += pair((deep - 0.08, 0.02, low), (0, wide / 2 - 0.06, z), dark)
    base += [box((0.02, wide - 0.1, low), (-deep / 2 + 0.05, 0, z), dark)]
    columns, grip = (1, 2, 3)[rng.choice(3, p=[0.4, 0.4, 0.2])], pick(rng, "knob", "bar")
    return base, drawer_grid(rng, 1, columns, (deep - 0.1, wide - 0.14, low), deep / 2 - 0.03, top, front_rgb, grip)


def stapler(rng):
    long, wide, rgb = rng.uniform(0.55, 0.7), 0.13, tint(rng)
    hinge_x = -long / 2 + 0.05
    base = [box((long, wide, 0.04), (0, 0, 0.02), shade(rgb, 0.8)), box((0.1, wide, 0.14), (hinge_x, 0, 0.1), rgb)]
    base += [box((0.05, 0.06, 0.01), (long / 2 - 0.06, 0, 0.045), METAL)]
    arm = [box((long * 0.95, wide, 0.09), (long * 0.47, 0, 0.03), rgb)]
    arm += [box((long * 0.8, wide * 0.7, 0.04), (long * 0.42, 0, -0.03), METAL)]
    return base, [hinge("arm", (hinge_x, 0, 0.14), (0, -1, 0), 0.9, arm, "lift")]


def kettle(rng):
    radius, tall = sizes(rng, (0.19, 0.24), (0.34, 0.44))
    rgb, side = tint(rng), pick(rng, *ENDS)  # side of the spout; the lid is hinged above the handle
    base = [cylinder(radius, tall, (0, 0, tall / 2), rgb), cylinder(radius * 1.1, 0.04, (0, 0, 0.02), DARK)]
    base += [box((0.05, 0.16, 0.05), (0, side * (radius + 0.06), tall * 0.8), rgb)]
    base += [box((0.04, 0.03, tall * 0.7), (0, -side * (radius + 0.1), tall * 0.55), DARK)]
    base += [box((0.04, 0.12, 0.04), (0, -side * (radius + 0.04), tall * 0.9), DARK)]
    reach = radius * 0.85
    lid = [cylinder(reach, 0.03, (0, side * reach, 0.015), shade(rgb, 0.8))]
    lid += [cylinder(0.04, 0.04, (0, side * reach, 0.045), DARK)]
    return base, [hinge("lid", (0, -side * reach, tall), (side, 0, 0), 1.3, lid)]


def usb(rng):
    wide, long, rgb = rng.uniform(0.18, 0.22), rng.uniform(0.45, 0.55), tint(rng)
    base = [box((long * 0.6, wide, 0.1), (-long * 0.3, 0, 0.05), rgb)]
    base += [box((long * 0.35, wide * 0.7, 0.05), (long * 0.17, 0, 0.05), METAL)]  # the plug shows between body and cap
    cap = [box((long * 0.33, wide, 0.1), (long * 0.26, 0, 0), tint(rng) if rng.random() < 0.4 else shade(rgb, 1.3))]
    cap += [box((0.02, wide * 1.1, 0.12), (long * 0.36, 0, 0), DARK)]
    return base, [slide("cap", (0, 0, 0.05), (1, 0, 0), 0.3, cap, "pull off")]


def switch(rng):
    tall, rgb, lever_rgb = rng.uniform(0.45, 0.55), tint(rng, "white", "white", "grey", "black", "yellow"), tint(rng)
    double = rng.random() < 0.6
    wide, middle = rng.uniform(0.3, 0.36) * (1 + 0.5 * double), tall / 2 + 0.05
    base = [box((0.04, wide, tall), (0, 0, middle), rgb)]
    base += [box((0.2, wide * 0.7, 0.05), (-0.02, 0, 0.025), COLOURS["grey"])]
    base += [sphere(0.015, (0.02, 0, middle + s * tall * 0.42), METAL) for s in ENDS]
    stick = [box((0.2, 0.09, 0.06), (0.1, 0, 0), lever_rgb), box((0.08, 0.13, 0.07), (0.18, 0, 0), lever_rgb)]
    at = [(s * wide / 4, f"{word} lever") for s, word in LEFT_RIGHT] if double else [(0, "lever")]
    base += [box((0.012, 0.12, tall * 0.55), (0.024, y, middle), shade(rgb, 0.7)) for y, _ in at]
    return base, [hinge(label, (0.02, y, middle), (0, 1, 0), 0.6, stick, "press down", -0.15) for y, label in at]


def washing_machine(rng):
    wide, deep, tall = sizes(rng, (0.55, 0.65), (0.5, 0.58), (0.75, 0.85))
    rgb, radius, side = tint(rng, "white", "grey", "black"), wide * rng.uniform(0.3, 0.36), pick(rng, *ENDS)
    x, strip = deep / 2, tall - 0.07  # front face; height of the control strip
    base = [box((deep, wide, tall), (0, 0, tall / 2), rgb)]
    base += [box((0.01, wide * 0.95, 0.1), (x + 0.005, 0, strip), shade(rgb, 0.85))]
    base += [cylinder(0.035, 0.04, (x + 0.02, wide * 0.1, strip), METAL, "x")]
    base += [box((0.012, 0.12, 0.05), (x + 0.006, wide * 0.3, strip), DARK)]
    ring = cylinder(radius, 0.04, (0.02, -side * radius, 0), METAL, "x")
    glass = cylinder(radius * 0.72, 0.02, (0.05, -side * radius, 0), (0.12, 0.16, 0.22), "x")
    latch = box((0.03, 0.03, 0.1), (0.055, -side * (2 * radius - 0.035), 0), DARK)
    parts = [hinge("door", (x, side * radius, tall * 0.45), (0, 0, side), 1.6, [ring, glass, latch])]
    if rng.random() < 0.6:  # detergent drawer, top left
        size, at = (deep * 0.5, wide * 0.32, 0.1), (x + 0.005, -wide * 0.28, strip)
        parts.append(drawer(rng, "drawer", size, at, rgb, "recess", 0.03))
    return base, parts


def faucet(rng):
    tall = rng.uniform(0.34, 0.44)
    rgb, spout = tint(rng, "grey", "grey", "yellow", "black"), tall * 0.75
    base = [cylinder(0.05, tall, (0, 0, tall / 2), rgb), cylinder(0.032, 0.34, (0.17, 0, spout), rgb, "x")]
    base += [cylinder(0.034, 0.1, (0.32, 0, spout - 0.06), rgb)]
    base += [box((0.5, 0.5, 0.006), (0.16, 0, 0.003), COLOURS["white"]), cylinder(0.15, 0.01, (0.25, 0, 0.005), DARK)]
    lever = [cylinder(0.055, 0.05, (0, 0, 0.02), shade(rgb, 1.1))]
    lever += [box((0.24, 0.05, 0.045), (0.14, 0, 0.05), shade(rgb, 1.1))]
    turn = dict(verb="turn", lower=-1.2, start=0.0, both_ways=True)
    if rng.random() < 0.4:
        return base, [hinge("lever", (0, 0, tall + 0.01), (0, 0, 1), 1.2, lever, **turn)]
    base += [cylinder(0.045, 0.2, (0, s * 0.22, 0.1), rgb) for s in ENDS]  # cold and warm on posts beside the spout
    return base, [hinge(f"{w} lever", (0, s * 0.22, 0.21), (0, 0, 1), 1.2, lever, **turn) for s, w in LEFT_RIGHT]


def phone(rng):
    wide, long, rgb = rng.uniform(0.26, 0.32), rng.uniform(0.4, 0.48), tint(rng)
    keys = [(long * 0.35 - i * 0.085, y) for i in range(4) for y in (-0.08, 0, 0.08)]
    base = [box((long, wide, 0.05), (0, 0, 0.025), rgb)]
    base += [box((0.05, 0.06, 0.01), (x, y, 0.054), METAL) for x, y in keys]
    screen = box((long * 0.6, wide * 0.75, 0.004), (long * 0.5, 0, -0.002), (0.3, 0.6, 0.7))
    window = box((long * 0.2, wide * 0.4, 0.004), (long * 0.6, 0, 0.037), (0.2, 0.3, 0.35))
    size, start = (long * 0.97, wide, 0.035), rng.uniform(0.02, 0.25)
    return base, [top_lid("flip cover", (-long / 2, 0, 0.062), size, 2.4, rgb, [screen, window], start=start)]


# category: (builder, noun in sentences); the comment says what moves. Splits and order: Table 2 of the paper.
SEEN_TABLE = {
    "Safe": (safe, "safe"),  # a door
    "Door": (door, "door"),  # one leaf, or left and right door
    "Display": (display, "monitor"),  # the screen, tilted forward
    "Refrigerator": (refrigerator, "refrigerator"),  # 1 door, 2 stacked doors, or French doors, some with a drawer
    "Laptop": (laptop, "laptop"),  # the lid
    "Lighter": (lighter, "lighter"),  # the cap, hinged at one side
    "Microwave": (microwave, "microwave"),  # the door, hinged at the left
    "Mouse": (mouse, "computer mouse"),  # left and right button, lifted
    "Box": (box_with_flaps, "box"),  # left and right flap, or a lid
    "TrashCan": (trash_can, "trash can"),  # one lid, or left and right lid
    "KitchenPot": (kitchen_pot, "cooking pot"),  # the lid, straight up
    "Suitcase": (suitcase, "suitcase"),  # a telescopic handle, or the lid
    "Pliers": (crossed_levers, "pair of pliers"),  # the handle in front
    "StorageFurniture": (storage_furniture, "cabinet"),  # 1-4 drawers, 1-2 doors, or a drawer above doors
    "Remote": (remote, "remote control"),  # the battery cover, pushed back
    "Bottle": (bottle, "bottle"),  # the cap, straight up
    "FoldingChair": (folding_chair, "folding chair"),  # the seat, folded up
    "Toaster": (toaster, "toaster"),  # one lever, or left and right lever, pressed down
    "Lamp": (lamp, "lamp"),  # the head, raised
    "Dispenser": (dispenser, "soap dispenser"),  # the pump head, straight up
}
UNSEEN_TABLE = {
    "Toilet": (toilet, "toilet"),  # the lid
    "Scissors": (partial(crossed_levers, scissors=True), "pair of scissors"),  # the handle in front
    "Table": (table, "table"),  # 1-3 drawers
    "Stapler": (stapler, "stapler"),  # the arm
    "Kettle": (kettle, "kettle"),  # the lid, hinged at one side
    "USB": (usb, "USB stick"),  # the cap, pulled forward
    "Switch": (switch, "switch"),  # 1-2 levers, pressed down
    "WashingMachine": (washing_machine, "washing machine"),  # a round door, often a detergent drawer
    "Faucet": (faucet, "faucet"),  # 1-2 levers that turn either way
    "Phone": (phone, "flip phone"),  # the cover
}
SEEN, UNSEEN = tuple(SEEN_TABLE), tuple(UNSEEN_TABLE)
GRAMMAR = {PREFIX + name: (build, "object") for name, build in ARCHETYPES.items()}
BUILDERS = {name: build for name, (build, _) in (SEEN_TABLE | UNSEEN_TABLE | GRAMMAR).items()}
NOUNS = {name: noun for name, (_, noun) in (SEEN_TABLE | UNSEEN_TABLE | GRAMMAR).items()}

DRAWER_DOOR_SEEN = ("StorageFurniture", "Door", "Refrigerator", "Microwave", "Safe")
DRAWER_DOOR_UNSEEN = ("Table", "WashingMachine")
MULTI_CAPABLE = (  # more than half of their instances have several movable parts
    "StorageFurniture", "Refrigerator", "Door", "Mouse", "Box", "TrashCan", "Toaster",
    "Table", "WashingMachine", "Switch", "Faucet",
)  # fmt: skip


def make_object(category: str, rng: np.random.Generator) -> ObjectSpec:
    """A random instance of a category ("Safe", "grammar:book"); the same rng state gives the same object.

    Raises: ValueError for a category that has no builder.
    """
    if category not in BUILDERS:
        raise ValueError(f"unknown category {category!r}; choose one of {', '.join(sorted(BUILDERS))}")
    return ObjectSpec(category, *BUILDERS[category](rng))


def main():
    for category in (*SEEN, *UNSEEN):
        split = "seen" if category in SEEN else "unseen"
        for seed in range(3):
            spec = make_object(category, np.random.default_rng(seed))
            parts = ", ".join(f"{part.verb} the {part.label} ({part.joint}, {part.primitive})" for part in spec.parts)
            print(f"{category:17s} {split:8s} {main_colour(spec.base):7s} {parts}")


if __name__ == "__main__":
    main()
