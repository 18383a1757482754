"""A grammar of training objects: skeletons x bodies x edges x handles x distractors, like no particular category.

    python -m sim.pictures --sheet FILE.png --grammar     # a picture: one object of each archetype
    make_object("grammar:book", rng)                      # sim/catalogue.py: one object

An archetype puts movable parts on a body. It draws a body, an edge or face, parts and fixed distractors from shared
lists, so a few functions produce a large variety of objects. They vary what the 20 seen categories keep fixed. None is
in a test set, and none is built to be one of the ten unseen categories. Some come close anyway: a slab hinged on a slab
is also a flip phone. NEAR lists these; training on STRICT leaves them out.

The words are those of the seen categories, except bar, slider, turn, slide and swing out. Frames and units:
sim/objects.py. k: an edge of the top, also quarter turns about z: 0 back, 1 left, 2 front, 3 right.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from sim.objects import (  # isort: skip
    DARK, ENDS, LEFT_RIGHT, METAL, Part, Shape, box, cylinder, drawer, grid, handle, hinge, legs, moved, pair, pick,
    shade, shell, side_door, sizes, slide, sphere, tint, turned,
)  # fmt: skip

PREFIX = "grammar:"  # of a category's name: "grammar:book"
BACK_FRONT = ((-1, "back"), (1, "front"))  # sign of x, word
LID_WORDS = ("lid", "lid", "lid", "cover", "flap", "cap")
GRIPS = ("knob", "bar", "upright bar", "recess", "lever", "none")
TO_TOP = np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])  # rotates the front to the top


def quarter(k: int) -> np.ndarray:
    """(3, 3) rotation by k quarter turns about z: the back (-x) moves to edge k."""
    return np.linalg.matrix_power(np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), int(k))


def spin(k: int) -> np.ndarray:
    """(3, 3) rotation by k quarter turns in the plane of a front: +y goes to +z."""
    return np.linalg.matrix_power(np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), int(k))


def turn_all(shapes, k: int, by=(0.0, 0.0, 0.0)) -> list[Shape]:
    return [turned(shape, quarter(k), by) for shape in shapes]


def other_colour(rng, rgb) -> tuple:
    """The same colour, a shade of it, metal, black, or any: a part's colour must not give it away."""
    return pick(rng, rgb, shade(rgb, 0.75), shade(rgb, 1.2), pick(rng, METAL, DARK), tint(rng))


# ---- bodies ---------------------------------------------------------------------------------------------------------
@dataclass
class Body:
    """Fixed shapes, centred on x = y = 0, with a free top face."""

    shapes: list[Shape]
    rgb: tuple
    deep: float  # x and y extents of the top
    wide: float
    top: float  # z of the top
    low: float = 0.0  # z of the lower edge of the front
    flat: bool = True  # has a flat, rectangular front: details fit on it, and a hinged lid is a plate, not a disc

    @property
    def face(self) -> np.ndarray:
        """(width, height) of the front, metres."""
        return np.array((self.wide, self.top - self.low))

    def extents(self, k: int) -> tuple[float, float]:
        """(away from edge k, along it), metres."""
        return (self.wide, self.deep) if k % 2 else (self.deep, self.wide)

    def front(self, y=0.0, z=0.0, out=0.003) -> tuple[float, float, float]:
        """The point y to the right of and z above the middle of the front, `out` in front of it."""
        return self.deep / 2 + out, y, (self.top + self.low) / 2 + z

    def somewhere(self, rng, size, out=0.003) -> tuple[float, float, float]:
        """A random centre on the front, `out` in front of it, for something of `size` (width, height) or a square."""
        return self.front(*(self.face - size) / 2 * rng.uniform(-1, 1, 2), out)


def block(rng, deep=(0.2, 0.6), wide=(0.25, 0.8), tall=(0.15, 0.8)) -> Body:
    """A box, with or without feet."""
    deep, wide, tall = sizes(rng, deep, wide, tall)
    rgb = tint(rng)
    low = rng.uniform(0.02, 0.08) if rng.random() < 0.4 else 0.0
    feet = legs(wide * 0.9, deep * 0.9, low, 0.04, DARK) if low else []
    return Body([box((deep, wide, tall), (0, 0, low + tall / 2), rgb), *feet], rgb, deep, wide, low + tall, low)


slab = partial(block, deep=(0.3, 0.7), tall=(0.03, 0.12))
tower = partial(block, deep=(0.18, 0.4), wide=(0.2, 0.45), tall=(0.5, 0.9))


def tray(rng) -> Body:
    """Open at the top."""
    deep, wide, tall = sizes(rng, (0.25, 0.55), (0.3, 0.8), (0.15, 0.5))
    rgb = tint(rng)
    shapes = [*shell(wide, deep, tall, 0, 0.02, rgb)[:-1], box((0.015, wide, tall), (deep / 2, 0, tall / 2), rgb)]
    return Body(shapes, rgb, deep, wide, tall)


def oblong(rng) -> Body:
    """A block with half-round sides."""
    deep, long, tall = sizes(rng, (0.25, 0.5), (0.1, 0.4), (0.08, 0.5))
    rgb = tint(rng)
    ends = [cylinder(deep / 2, tall, (0, s * long / 2, tall / 2), rgb) for s in ENDS]
    return Body([box((deep, long, tall), (0, 0, tall / 2), rgb), *ends], rgb, deep, long + deep, tall)


def drum(rng) -> Body:
    """A cylinder, with or without a band."""
    radius, tall = sizes(rng, (0.14, 0.34), (0.15, 0.7))
    rgb = tint(rng)
    shapes = [cylinder(radius, tall, (0, 0, tall / 2), rgb)]
    if rng.random() < 0.5:
        shapes += [cylinder(radius * 1.03, tall * 0.2, (0, 0, tall * rng.uniform(0.15, 0.8)), other_colour(rng, rgb))]
    return Body(shapes, rgb, 2 * radius, 2 * radius, tall, flat=False)


def stack(rng) -> Body:
    """Two or three discs of different widths."""
    rgb, shapes, top = tint(rng), [], 0.0
    for _ in range(rng.integers(2, 4)):
        radius, tall = sizes(rng, (0.12, 0.3), (0.08, 0.28))
        shapes += [cylinder(radius, tall, (0, 0, top + tall / 2), pick(rng, rgb, rgb, other_colour(rng, rgb)))]
        top += tall
    return Body(shapes, rgb, 2 * radius, 2 * radius, top, flat=False)


def goblet(rng) -> Body:
    """A wide disc on a narrow foot."""
    radius, high, thick = sizes(rng, (0.17, 0.34), (0.12, 0.4), (0.05, 0.2))
    rgb = tint(rng)
    shapes = [cylinder(radius, thick, (0, 0, high + thick / 2), rgb)]
    shapes += [cylinder(radius * rng.uniform(0.3, 0.7), high, (0, 0, high / 2), other_colour(rng, rgb))]
    return Body(shapes, rgb, 2 * radius, 2 * radius, high + thick, flat=False)


def add_back(rng, body: Body, k: int) -> None:
    """Add something taller behind edge k of the top, which makes an L."""
    away, along = body.extents(k)
    thick, rise = sizes(rng, (0.04, 0.22), (0.12, 0.5))
    tall, rgb = body.top + rise, pick(rng, body.rgb, other_colour(rng, body.rgb))
    back = box((thick, along * rng.uniform(0.4, 1.1), tall), (-(away + thick) / 2, 0, tall / 2), rgb)
    body.shapes += turn_all([back], k)


# ---- distractors: shapes that do not move ---------------------------------------------------------------------------
def front_details(rng, body: Body) -> list[Shape]:
    """A panel, a dial, a row of fixed studs or a stripe on the front."""
    x, tall = body.deep / 2, body.face[1]
    y, z = rng.uniform(-0.35, 0.35) * body.wide, body.low + tall * rng.uniform(0.15, 0.85)
    rgb = pick(rng, METAL, DARK, tint(rng), shade(body.rgb, 0.75))
    panel = box((0.012, body.wide * rng.uniform(0.1, 0.4), tall * 0.1), (x, y, z), rgb)
    dial = cylinder(rng.uniform(0.02, 0.05), rng.uniform(0.02, 0.06), (x, y, z), rgb, "x")
    studs = [cylinder(0.016, 0.016, (x, y + i * 0.05, z), rgb, "x") for i in (-1, 0, 1)]
    return pick(rng, [panel], [dial], studs, [box((0.006, body.wide * 0.98, 0.01), (x, 0, z), rgb)])


def lump(rng, body: Body) -> list[Shape]:
    """A box, cylinder or ball, partly inside the body, with its centre below the top."""
    size = sizes(rng, *[(0.05, 0.18)] * 3)
    x, y = rng.uniform(-0.5, 0.5, 2) * (body.deep, body.wide)
    at, rgb = (x, y, body.top * rng.uniform(0.15, 0.6)), tint(rng)
    round_lump = cylinder(size[0] / 2, size[1], at, rgb, pick(rng, *"xyz"))
    return [pick(rng, box(size, at, rgb), round_lump, sphere(size[0] / 2, at, rgb))]


def fixture(rng, body: Body) -> list[Shape]:
    """A handle, a tube, a lug or a mast at any side, all fixed."""
    k = rng.integers(4)
    x, out, z = body.extents(k)[0] / 2, rng.uniform(0.06, 0.18), body.top * rng.uniform(0.35, 0.8)
    rgb = other_colour(rng, body.rgb)
    loop = [box((out, 0.03, 0.03), (x + out / 2, 0, z + s * 0.06), rgb) for s in ENDS]
    loop += [box((0.03, 0.03, 0.15), (x + out, 0, z), rgb)]
    tube = cylinder(rng.uniform(0.015, 0.04), 1.5 * out, (x + 0.6 * out, 0, z), rgb, "x")
    lug = box((out, rng.uniform(0.05, 0.16), 0.04), (x + 0.3 * out, 0, z), rgb)
    mast = box((0.03, 0.03, body.top * 1.4), (x + 0.03, 0, body.top * 0.7), rgb)
    return turn_all(pick(rng, loop, [tube], [lug], [mast]), k)


def finish(rng, body: Body, parts: list[Part], details: int = 3, fixtures: int = 0) -> tuple[list[Shape], list[Part]]:
    """The object: its body with up to `details` front details or lumps and up to `fixtures` fixtures."""
    shapes = list(body.shapes)
    for _ in range(rng.integers(details + 1)):
        shapes += pick(rng, front_details, front_details, lump)(rng, body) if body.flat else lump(rng, body)
    for _ in range(rng.integers(fixtures + 1)):
        shapes += fixture(rng, body)
    return shapes, parts


# ---- parts ----------------------------------------------------------------------------------------------------------
def top_grip(rng, x, z, rgb) -> list[Shape]:
    """A grip on a face that points up: a knob, a ball, a loop, a ridge, or nothing."""
    hard = pick(rng, METAL, DARK, rgb, tint(rng))
    knob = [cylinder(0.02, 0.05, (x, 0, z + 0.025), hard), cylinder(0.05, 0.025, (x, 0, z + 0.05), hard)]
    loop = [*pair((0.02, 0.02, 0.05), (x, 0.05, z + 0.025), hard), box((0.03, 0.14, 0.03), (x, 0, z + 0.05), hard)]
    ridge = box((0.03, 0.12, 0.03), (x, 0, z + 0.015), hard)
    return pick(rng, knob, [sphere(0.04, (x, 0, z + 0.02), hard)], loop, [ridge], [], [])


def lid(rng, label, body: Body, k: int, rgb, share=(0.85, 1.08), thick=None, cell=1.0, shift=0.0, start=None) -> Part:
    """A plate or disc on the top, hinged at edge k, that opens upwards.

    share: covered fraction of the top, a range. cell: of that, along the edge. shift: along it, metres. start: radians.
    """
    away, along = np.array(body.extents(k)) * rng.uniform(*share, 2)
    thick = thick or rng.uniform(0.015, 0.06)
    shapes = [box((away, along * cell, thick), (away / 2, 0, thick / 2), rgb)]
    if not body.flat and rng.random() < 0.85:
        shapes = [cylinder(away / 2, thick, (away / 2, 0, thick / 2), rgb)]
    shapes += top_grip(rng, away * rng.uniform(0.5, 0.85), thick, rgb)
    if rng.random() < 0.3:  # a tab in front
        shapes += [box((0.05, along * cell * rng.uniform(0.1, 0.4), thick), (away, 0, thick / 2), tint(rng))]
    if start is None:
        start = pick(rng, 0.0, rng.uniform(0, 0.5))
    verb = pick(rng, "open", "open", "lift")
    part = hinge(label, (0, 0, 0), (0, -1, 0), rng.uniform(1.1, 2.3), shapes, verb, start=start)
    return moved(part, quarter(k), quarter(k) @ (-away / 2, shift, 0) + (0, 0, body.top + 0.003))


def front_part(rng, kind, label, at, wide, tall, deep, rgb, grip) -> Part:
    """A drawer, a door (hinged left or right), a flap (above or below) or a cover (at any side) on a front.

    at: middle of its back face. deep: depth of the body behind it.
    """
    x, y, z = at
    thick = rng.uniform(0.015, 0.05)
    if kind == "drawer":
        return drawer(rng, label, (deep * 0.8, wide, tall), (x + 0.002, y, z), rgb, grip, thick)
    k = pick(rng, *{"door": (0, 2), "flap": (1, 3)}.get(kind, (0, 1, 2, 3)))  # quarter turns of a door hinged right
    across, upright = (tall, wide) if k % 2 else (wide, tall)
    return moved(side_door(rng, label, 1, (thick, across, upright), (0, 0, 0), rgb, grip), spin(k), (x + 0.002, y, z))


def stick(rng, long, thick, rgb) -> list[Shape]:
    """A square or round rod from the origin to +x, with or without something at its end."""
    hard = other_colour(rng, rgb)
    square = box((long, thick, thick), (long / 2, 0, 0), rgb)
    block_end = box((0.07, thick * 1.8, thick * 1.2), (long, 0, 0), hard)
    cross = cylinder(thick * 0.7, thick * 2, (long, 0, 0), hard, "y")
    end = pick(rng, [], [sphere(thick * 0.9, (long, 0, 0), hard)], [block_end], [cross])
    return [pick(rng, square, square, cylinder(thick / 2, long, (long / 2, 0, 0), rgb, "x")), *end]


def foot(rng, wide, rgb) -> Shape:
    return pick(rng, cylinder(wide / 2, 0.03, (0, 0, 0.015), rgb), box((wide * 0.8, wide, 0.03), (0, 0, 0.015), rgb))


# ---- archetypes far from the unseen categories; each returns (base shapes, parts) ------------------------------------
def lidded_box(rng):
    """One lid at any edge of the top, or two side by side."""
    body = pick(rng, block, tray, tower, oblong)(rng)
    rgb, word = other_colour(rng, body.rgb), pick(rng, *LID_WORDS)
    if rng.random() < 0.35:
        cells = [(s * body.wide / 4, f"{side} {word}") for s, side in LEFT_RIGHT]
        return finish(rng, body, [lid(rng, w, body, 0, rgb, (0.97, 1.0), cell=0.48, shift=y) for y, w in cells])
    return finish(rng, body, [lid(rng, word, body, pick(rng, 0, 0, 1, 2, 3), rgb)])


def lift_off(rng):
    """A lid, cap or cover on the top that goes straight up."""
    body = pick(rng, drum, stack, goblet, block, tower, tray)(rng)
    rgb, thick, share = other_colour(rng, body.rgb), *sizes(rng, (0.02, 0.14), (0.5, 1.08))
    plate = box((body.deep * share, body.wide * share, thick), (0, 0, thick / 2), rgb)
    disc = cylinder(min(body.deep, body.wide) * share / 2, thick, (0, 0, thick / 2), rgb)
    shapes = [pick(rng, plate, disc) if body.flat else disc, *top_grip(rng, 0, thick, rgb)]
    word, verb = pick(rng, "lid", "cap", "cover"), pick(rng, "lift", "pull off", "lift")
    part = slide(word, (0, 0, body.top + 0.003), (0, 0, 1), rng.uniform(0.2, 0.4), shapes, verb)
    return finish(rng, body, [part], fixtures=2)


def tipped_cap(rng):
    """A tall cap that tips over at an edge of the top."""
    body = pick(rng, tower, drum, block, stack)(rng)
    rgb, k = other_colour(rng, body.rgb), rng.integers(4)
    word, thick = pick(rng, "cap", "lid", "cover"), rng.uniform(0.07, 0.22)
    return finish(rng, body, [lid(rng, word, body, k, rgb, (0.8, 1.05), thick, start=0.0)])


def chest(rng):
    """A front with a grid of drawers, doors or flaps."""
    body = block(rng, (0.25, 0.5), (0.35, 0.9), (0.35, 0.9))
    rows, columns = pick(rng, (1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (1, 3))
    kind, grip, rgb = pick(rng, "drawer", "drawer", "door", "flap"), pick(rng, *GRIPS), other_colour(rng, body.rgb)
    wide, tall = body.face * rng.uniform(0.65, 0.97, 2) / (columns, rows)
    parts = []
    for i, j, label in grid(rows, columns, kind):
        at = body.front(wide * (j + 0.5 - columns / 2), tall * (rows / 2 - i - 0.5), 0.0)
        parts.append(front_part(rng, kind, label, at, wide * 0.96, tall * 0.96, body.deep, rgb, grip))
    return finish(rng, body, parts, 1)


def trays(rng):
    """Flat trays one above the other in an open frame."""
    deep, wide, tall = sizes(rng, (0.3, 0.5), (0.35, 0.8), (0.3, 0.9))
    rgb, count = tint(rng), pick(rng, 2, 3)
    frame = pick(rng, shell(wide, deep, tall, 0, 0.02, rgb), legs(wide, deep, tall, 0.04, rgb))
    own, lip = other_colour(rng, rgb), rng.uniform(0.05, 0.1)
    tray = [box((deep * 0.9, wide - 0.1, 0.02), (-deep * 0.45, 0, -lip / 2), own)]
    tray += [box((0.03, wide - 0.1, lip), (0, 0, 0), own)]
    cells = [(tall * (count - i - 0.4) / count, label) for i, _, label in grid(count, 1, "drawer")]
    parts = [slide(label, (deep / 2, 0, z), (1, 0, 0), deep * 0.6, tray) for z, label in cells]
    return [*frame, box((deep, wide, 0.03), (0, 0, tall + 0.015), rgb)], parts


def side_flap(rng):
    """One door, flap or cover that leaves much of the front free, on blocks and Ls."""
    body = pick(rng, block, tower, tray)(rng)
    if rng.random() < 0.4:
        add_back(rng, body, 0)
    size = body.face * rng.uniform(0.45, 0.95, 2)
    at, kind = body.somewhere(rng, size, 0.0), pick(rng, "door", "flap", "cover")
    part = front_part(rng, kind, kind, at, *size, body.deep, other_colour(rng, body.rgb), pick(rng, *GRIPS))
    return finish(rng, body, [part], 4)


def latch(rng):
    """A bar that lies across a front and swings out from it."""
    body = pick(rng, block, tower)(rng)
    k, high, thick = rng.integers(4), *sizes(rng, (0.07, 0.14), (0.03, 0.08))
    long = max(0.15, body.face[k % 2] * rng.uniform(0.5, 1.0))
    bar = [box((thick, long, high), (thick / 2, -long / 2, 0), other_colour(rng, body.rgb))]
    bar += pick(rng, [], [box((0.03, 0.05, high * 1.3), (thick, 0.05 - long, 0), pick(rng, METAL, DARK))])
    part = hinge("bar", (0, long / 2, 0), (0, 0, 1), rng.uniform(1.2, 1.8), bar, "swing out")
    return finish(rng, body, [moved(part, spin(k), body.front())], 2, 2)


def hanging_flap(rng):
    """A panel that hangs from a rail between posts, or on a body, and swings out below."""
    wide, tall, thick, rise = sizes(rng, (0.3, 0.8), (0.25, 0.6), (0.02, 0.05), (0.05, 0.3))
    rgb, top = tint(rng), tall + rise
    posts = pair((0.05, 0.05, top), (0, wide / 2 + 0.03, top / 2), rgb)
    posts += [cylinder(0.025, wide + 0.1, (0, 0, top), METAL, "y"), foot(rng, wide * 0.8, rgb)]
    wall = [box((0.25, wide * rng.uniform(0.9, 1.3), top + 0.05), (-0.15, 0, top / 2), rgb)]
    panel = [box((thick, wide * 0.94, tall), (0, 0, -tall / 2), other_colour(rng, rgb))]
    panel += handle(pick(rng, *GRIPS), (thick / 2, 0, -tall * 0.85), 0.12, DARK)
    part = hinge(pick(rng, "flap", "flap", "cover"), (0, 0, top), (0, -1, 0), 1.2, panel, pick(rng, "open", "lift"))
    return pick(rng, posts, wall), [part]


def wings(rng):
    """Leaves that hang at the sides of a body and are folded up."""
    body = pick(rng, block, tower, tray)(rng)
    thick, drop = rng.uniform(0.02, 0.05), max(0.12, body.top * rng.uniform(0.4, 0.9))
    long, rgb, parts = body.deep * rng.uniform(0.6, 1.0), other_colour(rng, body.rgb), []
    for s, word in LEFT_RIGHT:
        leaf = [box((long, thick, drop), (0, s * thick / 2, -drop / 2), rgb)]
        at = (0, s * (body.wide / 2 + 0.003), body.top)
        parts.append(hinge(f"{word} flap", at, (s, 0, 0), rng.uniform(1.2, 1.6), leaf, "lift"))
    if rng.random() < 0.4:
        parts = [parts[rng.integers(2)]]
        parts[0].label = "flap"
    return finish(rng, body, parts, 2)


def sash(rng):
    """A screen with a grip that slides in a frame, sideways or up."""
    wide, tall = sizes(rng, (0.5, 1.0), (0.4, 0.8))
    rgb, pane_rgb, z = tint(rng), tint(rng), 0.1 + tall / 2
    base = [box((0.1, wide + 0.08, 0.04), (0, 0, z + s * (tall / 2 + 0.02)), rgb) for s in ENDS]
    base += pair((0.1, 0.04, tall), (0, wide / 2 + 0.02, z), rgb)
    base += [box((0.25, wide * 0.7, 0.08), (0, 0, 0.04), other_colour(rng, rgb))]
    k = rng.integers(3)  # slides right, up or left; sliding down would be visible only from below
    room, across = (tall, wide) if k % 2 else (wide, tall)
    pane = [box((0.03, room / 2, across * 0.97), (0, 0, 0), pane_rgb)]
    pane += pick(rng, [], [box((0.034, room * 0.4, across * 0.7), (0, 0, 0), tint(rng))])
    pane += [box((0.13, 0.06, across * rng.uniform(0.3, 0.7)), (0.075, room * rng.uniform(-0.2, 0.0), 0), DARK)]
    part = slide("screen", (0.02, -room / 4, 0), (0, 1, 0), room * 0.45, pane, "slide")
    return base, [moved(part, spin(k), (0, 0, z))]


def sliders(rng):
    """Blocks that slide in tracks on the top."""
    body = pick(rng, block, slab, oblong)(rng)
    k = rng.integers(4)
    away, along = body.extents(k)
    aside, words = (np.array((1.0, 0, 0)), BACK_FRONT) if k % 2 else (np.array((0, 1.0, 0)), LEFT_RIGHT)
    cells = [(s * along / 4, f"{word} slider") for s, word in words] if along > 0.3 else [(0.0, "slider")]
    rgb, size, parts = other_colour(rng, body.rgb), sizes(rng, (0.05, 0.12), (0.06, 0.13), (0.07, 0.14)), []
    for offset, label in cells:
        centre = offset * aside + (0, 0, body.top)
        body.shapes += turn_all([box((away * 0.8, 0.03, 0.006), (0, 0, 0), DARK)], k, centre)
        knob = [box(size, (0, 0, size[2] / 2), rgb)]
        part = slide(label, (0, 0, 0.004), (1, 0, 0), max(0.13, away * 0.5), knob, "slide")
        parts.append(moved(part, quarter(k), centre - away * 0.28 * (quarter(k) @ (1, 0, 0))))
    return finish(rng, body, parts)


def sliding_cover(rng):
    """A cover with a ridge that is pushed back along the top."""
    body = pick(rng, block, slab, oblong, tower)(rng)
    k = rng.integers(4)
    away, along = body.extents(k)
    rgb, thick, share, ridge = other_colour(rng, body.rgb), *sizes(rng, (0.015, 0.05), (0.3, 0.55), (0.05, 0.09))
    cover = [box((away * share, along * 0.85, thick), (0, 0, thick / 2), rgb)]
    at = (away * share * rng.uniform(-0.3, 0.3), 0, thick + ridge / 2)
    cover += [box((0.025, along * rng.uniform(0.3, 0.7), ridge), at, other_colour(rng, rgb))]
    part = slide("cover", (-away * 0.2, 0, 0.004), (1, 0, 0), max(0.14, away * 0.45), cover, "push back")
    return finish(rng, body, [moved(part, quarter(k), (0, 0, body.top))])


def tilting_panel(rng):
    """A panel on a post or between two uprights that tilts forward."""
    wide, tall, pivot, thick = sizes(rng, (0.25, 0.9), (0.25, 0.6), (0.2, 0.5), (0.015, 0.06))
    rgb, rise = tint(rng), tall * rng.uniform(0.15, 0.45)
    post = [box((0.03, 0.06, pivot), (-0.03, 0, pivot / 2), other_colour(rng, rgb))]
    uprights = pair((0.04, 0.03, pivot + 0.05), (0, wide / 2 + 0.03, pivot / 2), rgb)
    panel = [box((thick, wide, tall), (0.01, 0, rise), other_colour(rng, rgb))]
    face = (0.006, wide * rng.uniform(0.5, 0.95), tall * rng.uniform(0.4, 0.9))
    panel += pick(rng, [], [box(face, (0.01 + thick / 2, 0, rise), tint(rng))])
    part = hinge(pick(rng, "screen", "screen", "head"), (0, 0, pivot), (0, 1, 0), 0.7, panel, "tilt", lower=-0.25)
    return [foot(rng, wide * 0.5, rgb), *pick(rng, post, uprights)], [part]


def pull_up(rng):
    """A handle, bar or head that comes straight up out of a body: a U, a T or a mushroom."""
    body = pick(rng, block, tower, drum, stack, slab)(rng)
    wide, high, thick = sizes(rng, (0.12, 0.35), (0.06, 0.2), (0.04, 0.08))
    rgb, stem = other_colour(rng, body.rgb), cylinder(0.025, high, (0, 0, high / 2), METAL)
    beam = box((thick, wide + 0.04, thick), (0, 0, high), rgb)
    posts = pair((0.025, 0.025, high), (0, wide * 0.45, high / 2), METAL)
    shapes = pick(rng, [*posts, beam], [stem, beam], [stem, cylinder(wide / 2, thick, (0, 0, high), rgb)])
    word, verb = pick(rng, "handle", "handle", "head", "bar"), pick(rng, "pull up", "lift")
    part = slide(word, (0, 0, body.top), (0, 0, 1), rng.uniform(0.2, 0.35), shapes, verb)
    return finish(rng, body, [moved(part, quarter(rng.integers(2)))])


def plunger(rng):
    """A button or head on a stem that is pressed down into a body."""
    body = pick(rng, block, tower, drum, stack, slab)(rng)
    radius, high, thick = sizes(rng, (0.05, 0.13), (0.13, 0.22), (0.03, 0.08))
    rgb, size = other_colour(rng, body.rgb), (2 * radius, 2 * radius, thick)
    top = pick(rng, cylinder(radius, thick, (0, 0, high), rgb), box(size, (0, 0, high), rgb))
    shapes, label = [top, cylinder(0.025, high, (0, 0, high / 2), METAL)], pick(rng, "button", "head", "lever")
    part = slide(label, (0, 0, body.top), (0, 0, -1), high - 0.01, shapes, "press down")
    return finish(rng, body, [part], fixtures=2)


def buttons(rng):
    """Hinged keys on a flat top that are lifted."""
    body = pick(rng, slab, block, oblong)(rng)
    deep, thick = body.deep * rng.uniform(0.4, 0.7), rng.uniform(0.03, 0.09)
    cells = [(s * body.wide / 4, f"{word} button") for s, word in LEFT_RIGHT]
    if rng.random() < 0.4:
        cells = [(body.wide * rng.uniform(-0.2, 0.2), "button")]
    rgb, wide, x = other_colour(rng, body.rgb), body.wide * rng.uniform(0.25, 0.42), -body.deep * rng.uniform(0.1, 0.45)
    key = [box((deep, wide, thick), (deep / 2, 0, thick / 2), rgb)]
    return finish(rng, body, [hinge(label, (x, y, body.top), (0, -1, 0), 0.5, key, "lift") for y, label in cells])


def folding_plate(rng):
    """A level plate on a wall or between uprights that folds up."""
    wide, deep, z, more, thick = sizes(rng, (0.3, 0.7), (0.22, 0.45), (0.3, 0.55), (0.1, 0.4), (0.02, 0.06))
    rgb, tall = tint(rng), z + more
    wall = [box((0.05, wide * 1.1, tall), (-0.05, 0, tall / 2), rgb)]
    wall += [box((deep, wide * 0.8, 0.03), (0.1, 0, 0.015), rgb)]
    frame = pair((0.035, 0.035, tall), (-0.03, wide / 2, tall / 2), rgb)
    frame += pair((deep, 0.035, 0.03), (deep / 2, wide / 2, 0.015), rgb)
    plate = [box((deep, wide * rng.uniform(0.6, 0.94), thick), (deep / 2, 0, 0), other_colour(rng, rgb))]
    word, verb = pick(rng, ("seat", "fold up"), ("flap", "lift"), ("cover", "lift"))
    k = rng.integers(4)
    part = hinge(word, (0, 0, z), (0, -1, 0), 1.4, plate, verb)
    return turn_all(pick(rng, wall, frame), k), [moved(part, quarter(k))]


def boom(rng):
    """An arm on a mast that can be raised, with a weight, lamp or hook at its end; there may be a second, fixed arm."""
    pole, arm, thick = sizes(rng, (0.3, 0.7), (0.22, 0.45), (0.03, 0.06))
    rgb, metal = tint(rng), pick(rng, METAL, DARK, tint(rng))
    base = [foot(rng, rng.uniform(0.2, 0.4), rgb), cylinder(rng.uniform(0.015, 0.04), pole, (0, 0, pole / 2), metal)]
    if rng.random() < 0.4:
        base += turn_all([cylinder(0.02, arm, (arm / 2, 0, pole * rng.uniform(0.2, 0.5)), metal, "x")], rng.integers(4))
    shapes, own, end = stick(rng, arm, thick, metal), other_colour(rng, rgb), (arm, 0, -0.02)
    shapes.append(pick(rng, cylinder(0.08, 0.1, end, own), sphere(0.07, end, own), box((0.12, 0.15, 0.08), end, own)))
    word, verb, at = pick(rng, "head", "bar"), pick(rng, "raise", "lift"), (0, 0, pole * rng.uniform(0.7, 1.0))
    return base, [moved(hinge(word, at, (0, -1, 0), 0.9, shapes, verb, lower=-0.3), quarter(rng.integers(4)))]


# ---- archetypes close to an unseen category (NEAR says which) --------------------------------------------------------
def book(rng):
    """A slab hinged on a slab, at any edge, closed or ajar."""
    body = slab(rng)
    word, k = pick(rng, "lid", "cover", "screen", "flap"), rng.integers(4)
    studs = [(i * 0.08, j * 0.08) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    body.shapes += pick(rng, [], [box((0.04, 0.04, 0.01), (x, y, body.top), METAL) for x, y in studs])
    rgb = pick(rng, body.rgb, other_colour(rng, body.rgb))
    thick = pick(rng, 0.02, 0.1) * rng.uniform(0.7, 1.3)
    part = lid(rng, word, body, k, rgb, (0.85, 1.02), thick, start=rng.uniform(0, 0.6))
    part.verb = "open"
    return finish(rng, body, [part], 2)


def clamp_arm(rng):
    """A long arm over a long base, hinged at one end, raised or pressed down."""
    long, wide, high = sizes(rng, (0.4, 0.85), (0.08, 0.22), (0.08, 0.35))
    rgb, x = tint(rng), -long / 2 + 0.04
    base = [box((long, wide * rng.uniform(0.9, 1.8), 0.04), (0, 0, 0.02), other_colour(rng, rgb))]
    base += [box((0.08, wide, high + 0.02), (x, 0, high / 2), rgb)]
    thick, reach = rng.uniform(0.04, 0.08), long * rng.uniform(0.6, 1.0)
    arm = [box((reach, wide * rng.uniform(0.5, 1.0), thick), (reach / 2, 0, thick / 2), other_colour(rng, rgb))]
    arm += pick(rng, [], [box((0.1, wide * 1.1, thick * 1.2), (reach, 0, thick / 2), other_colour(rng, rgb))])
    word, k = pick(rng, "bar", "lever", "handle", "head"), rng.integers(4)
    if high > 0.2 and rng.random() < 0.4:
        more = dict(axis=(0, 1, 0), upper=0.6, verb="press down", lower=-rng.uniform(0.1, 0.4))
    else:
        verb, start = pick(rng, "lift", "raise"), rng.uniform(0, 0.4)
        more = dict(axis=(0, -1, 0), upper=rng.uniform(0.9, 1.5), verb=verb, start=start)
    return turn_all(base, k), [moved(hinge(word, (x, 0, high), shapes=arm, **more), quarter(k))]


def lidded_drum(rng):
    """A round body with a hinged lid; handles, tubes and masts that do not move."""
    body = pick(rng, drum, stack, goblet)(rng)
    word, k = pick(rng, *LID_WORDS), rng.integers(4)
    return finish(rng, body, [lid(rng, word, body, k, other_colour(rng, body.rgb))], 1, 3)


def backed_lid(rng):
    """A lid in front of something taller that does not move."""
    body = pick(rng, goblet, drum, oblong, block)(rng)
    k = rng.integers(4)
    add_back(rng, body, k)
    word = pick(rng, "lid", "lid", "cover", "seat")
    return finish(rng, body, [lid(rng, word, body, pick(rng, k, k, (k + 2) % 4), other_colour(rng, body.rgb))], 2)


def post_levers(rng):
    """Levers on posts that turn either way, next to fixed sticks."""
    rgb, long, thick = tint(rng), *sizes(rng, (0.16, 0.3), (0.04, 0.07))
    base = [foot(rng, rng.uniform(0.4, 0.6), other_colour(rng, rgb))]
    for _ in range(rng.integers(3)):
        x, y, tall = sizes(rng, (-0.2, 0.2), (-0.2, 0.2), (0.15, 0.5))
        base += [cylinder(0.03, tall, (x, y, tall / 2), other_colour(rng, rgb))]
        base += turn_all([cylinder(0.025, 0.2, (0.1, 0, tall * 0.9), rgb, "x")], rng.integers(4), (x, y, 0))
    lever = turn_all(stick(rng, long, thick, other_colour(rng, rgb)), 0, (0, 0, 0.05))
    lever += [cylinder(thick, 0.06, (0, 0, 0.03), rgb)]
    cells = [(s * 0.2, f"{word} ") for s, word in LEFT_RIGHT] if rng.random() < 0.4 else [(0.0, "")]
    tall, kind, k, parts = rng.uniform(0.1, 0.45), pick(rng, "lever", "handle", "bar"), rng.integers(4), []
    for y, word in cells:
        base += [cylinder(rng.uniform(0.04, 0.09), tall, (0, y, tall / 2), rgb)]
        part = hinge(word + kind, (0, 0, 0), (0, 0, 1), 1.0, lever, "turn", lower=-1.0, start=0.0, both_ways=True)
        parts.append(moved(part, quarter(k), (0, y, tall)))
    return base, parts


def wall_levers(rng):
    """One to three levers on an upright plate or box: pressed down, raised or turned."""
    count, way = pick(rng, 1, 2, 3), pick(rng, "press down", "press down", "raise", "turn")
    tall, deep, long, thick = sizes(rng, (0.35, 0.8), (0.03, 0.3), (0.18, 0.26), (0.04, 0.08))
    rgb, wide = tint(rng), rng.uniform(0.2, 0.3) * (1 + 0.6 * (count - 1))
    body = Body([box((deep, wide, tall), (0, 0, tall / 2), rgb)], rgb, deep, wide, tall)
    body.shapes += [box((deep + 0.2, wide * 0.7, 0.04), (0, 0, 0.02), other_colour(rng, rgb))]
    lever = stick(rng, long, thick, other_colour(rng, rgb))
    z, lower = tall * rng.uniform(0.4, 0.7), -rng.uniform(0.1, 0.4)
    axis, upper = {"press down": ((0, 1, 0), 0.6), "raise": ((0, -1, 0), 0.7), "turn": ((0, 0, 1), 0.9)}[way]
    more = dict(lower=-0.9, start=0.0, both_ways=True) if way == "turn" else dict(lower=lower)
    kind, parts = pick(rng, "lever", "bar", "handle"), []
    for _, i, label in grid(1, count, kind):
        y = wide * ((i + 0.5) / count - 0.5)
        body.shapes += pick(rng, [], [box((0.01, thick * 1.6, tall * 0.4), (deep / 2 + 0.002, y, z), DARK)])
        parts.append(hinge(label, (deep / 2, y, z), axis, upper, lever, way, **more))
    return finish(rng, body, parts, 2)


def capped_stick(rng):
    """A long stick, lying or upright, with a cap at one or both ends."""
    long, thick, cap_long, neck = sizes(rng, (0.35, 0.8), (0.08, 0.2), (0.1, 0.25), (0.0, 0.08))
    rgb, flat, is_round = tint(rng), rng.uniform(0.5, 1.0), rng.random() < 0.45

    def piece(length, x, colour, wider=1.0):
        if is_round:
            return cylinder(thick / 2 * wider, length, (x, 0, 0), colour, "x")
        return box((length, thick * wider, thick * flat * wider), (x, 0, 0), colour)

    base = [piece(long, 0, rgb)]
    for _ in range(rng.integers(3)):
        base.append(piece(rng.uniform(0.03, 0.15), rng.uniform(-0.35, 0.3) * long, tint(rng), 1.04))
    cap, way = piece(cap_long, cap_long / 2, other_colour(rng, rgb), rng.uniform(0.9, 1.2)), pick(rng, "x", "y", "z")
    ends, parts = [(1, "cap")], []
    if way != "z" and rng.random() < 0.3:
        ends = [(s, f"{word} cap") for s, word in (BACK_FRONT if way == "x" else LEFT_RIGHT)]
    turn, up = {"x": np.eye(3), "y": quarter(1), "z": TO_TOP}[way], long / 2 if way == "z" else thick * 0.6
    for s, label in ends:
        flip = np.diag([s, s, 1.0])
        base += [turned(piece(neck + 0.02, long / 2 + neck / 2, METAL, 0.6), flip)]
        part = slide(label, (long / 2 + neck, 0, 0), (1, 0, 0), rng.uniform(0.2, 0.35), [cap], "pull off")
        parts.append(moved(moved(part, flip), turn, (0, 0, up)))
    return [turned(s, turn, (0, 0, up)) for s in base], parts


def plugged_face(rng):
    """A cap plugged into the front, pulled off towards the viewer."""
    body = pick(rng, block, tower)(rng)
    size, high = min(body.face) * rng.uniform(0.4, 0.8), rng.uniform(0.06, 0.22)
    middle = body.somewhere(rng, size)
    rgb, at = other_colour(rng, body.rgb), (high / 2, 0, 0)
    cap = [pick(rng, cylinder(size / 2, high, at, rgb, "x"), box((high, size, size), at, rgb))]
    cap += handle(pick(rng, *GRIPS), (high, 0, 0), size * 0.6, pick(rng, METAL, DARK))
    return finish(rng, body, [slide("cap", middle, (1, 0, 0), rng.uniform(0.2, 0.3), cap, "pull off")], 3, 2)


def crossed(rng):
    """Two arms that cross or meet at a pivot and lie flat; the one in front swings out."""
    long, half, thick, wide = sizes(rng, (0.35, 0.6), (0.15, 0.6), (0.04, 0.07), (0.04, 0.08))
    rgb, back, side = tint(rng), rng.uniform(0.0, 0.7) * long, pick(rng, *ENDS)
    hand, tip_rgb, hand_rgb = pick(rng, "plain", "thick", "ball"), other_colour(rng, rgb), other_colour(rng, rgb)

    def arm(front):
        x, y = front * math.sin(half), -side * math.cos(half)
        yaw = math.atan2(y, x)
        shapes = [box((long, wide, thick), (x * long / 2, y * long / 2, 0.03), rgb, yaw)]
        shapes += [box((back + 0.03, wide, thick), (-x * back / 2, -y * back / 2, 0.03), tip_rgb, yaw)]
        if hand == "thick":
            at = (x * 0.75 * long, y * 0.75 * long, 0.03)
            shapes += [box((long / 2, wide * 1.6, thick * 1.3), at, hand_rgb, yaw)]
        return [*shapes, sphere(wide, (x * long, y * long, 0.03), hand_rgb)] if hand == "ball" else shapes

    base = [*arm(-1), cylinder(0.035, 0.13, (0, 0, 0.06), other_colour(rng, rgb))]
    label, verb = pick(rng, ("front handle", "open"), ("front bar", "swing out"))
    return base, [hinge(label, (0, 0, 0.005 + thick), (0, 0, side), 0.9, arm(1), verb)]


def frame_drawers(rng):
    """A slab on legs, walls or a column, with drawers or a flap below it."""
    wide, deep, tall, low = sizes(rng, (0.45, 1.0), (0.3, 0.6), (0.3, 0.75), (0.1, 0.22))
    rgb, count, share = tint(rng), pick(rng, 1, 1, 2, 3), rng.uniform(0.5, 0.9)
    dark, z, span = other_colour(rng, rgb), tall - 0.01 - low / 2, wide * share
    column = [cylinder(0.05, tall, (0, 0, tall / 2), dark), cylinder(0.22, 0.03, (0, 0, 0.015), dark)]
    walls = pair((deep * 0.9, 0.04, tall), (0, wide * 0.47, tall / 2), dark)
    base = [box((deep, wide, 0.03), (0, 0, tall), rgb), box((deep * 0.8, span, low), (-0.03, 0, z), dark)]
    base += pick(rng, legs(wide * 0.95, deep * 0.9, tall, 0.05, dark), walls, column)
    kind, grip, own = pick(rng, "drawer", "drawer", "drawer", "flap"), pick(rng, *GRIPS), other_colour(rng, rgb)
    cells = [(span * ((i + 0.5) / count - 0.5), label) for _, i, label in grid(1, count, kind)]
    at, size = deep * 0.4 - 0.03, (span / count * 0.96, low * 0.95)
    return base, [front_part(rng, kind, label, (at, y, z), *size, deep * 0.8, own, grip) for y, label in cells]


def round_door(rng):
    """A round door or cover on a front, hinged at any side, or on the end of a lying drum."""
    if rng.random() < 0.3:
        radius, long, rgb = *sizes(rng, (0.15, 0.3), (0.3, 0.6)), tint(rng)
        shapes = [cylinder(radius, long, (0, 0, radius + 0.05), rgb, "x")]
        shapes += [box((long * 0.7, radius, 0.1), (0, 0, 0.05), DARK)]
        body = Body(shapes, rgb, long, 2 * radius, 2 * radius + 0.1, 0.0, flat=False)
    else:
        body = block(rng, (0.2, 0.6), (0.35, 0.7), (0.35, 0.9))
        radius = min(body.face) / 2 * rng.uniform(0.45, 0.9)
    rgb, thick = other_colour(rng, body.rgb), rng.uniform(0.025, 0.08)
    shapes = [cylinder(radius, thick, (thick / 2, -radius, 0), rgb, "x")]
    shapes += pick(rng, [], [cylinder(radius * rng.uniform(0.3, 0.7), 0.02, (thick, -radius, 0), tint(rng), "x")])
    shapes += handle(pick(rng, *GRIPS), (thick, 0.05 - 2 * radius, 0), 0.1, pick(rng, METAL, DARK))
    part = hinge(pick(rng, "door", "door", "cover", "lid"), (0, radius, 0), (0, 0, 1), rng.uniform(1.2, 1.9), shapes)
    return finish(rng, body, [moved(part, spin(rng.integers(4)), body.front())])


# ---- the whole ------------------------------------------------------------------------------------------------------
NEAR: dict[str, tuple[str, ...]] = {  # archetype -> the unseen categories it is close to
    "book": ("Phone",), "clamp_arm": ("Stapler",), "lidded_drum": ("Kettle",), "backed_lid": ("Toilet",),
    "post_levers": ("Faucet",), "wall_levers": ("Switch",), "capped_stick": ("USB",), "plugged_face": ("USB",),
    "crossed": ("Scissors",), "frame_drawers": ("Table",), "round_door": ("WashingMachine",),
}  # fmt: skip
ARCHETYPES = {build.__name__: build for build in (
    lidded_box, lift_off, tipped_cap, chest, trays, side_flap, latch, hanging_flap, wings, sash, sliders, sliding_cover,
    tilting_panel, pull_up, plunger, buttons, folding_plate, boom, book, clamp_arm, lidded_drum, backed_lid,
    post_levers, wall_levers, capped_stick, plugged_face, crossed, frame_drawers, round_door,
)}  # fmt: skip
STRICT = tuple(name for name in ARCHETYPES if name not in NEAR)
