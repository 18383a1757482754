"""What articulated objects are made of: shapes, movable parts, URDF text, and helpers that build them (numpy only).

    base shapes + parts -> ObjectSpec -> to_urdf(spec) -> text for any URDF simulator

World frame: the object's front is +x, up is +z; metres and radians. Objects are about 0.5-1 m across, whatever their
real size, as PartNet-Mobility normalises them too. A viewer in front of the object looks along -x and sees +y on the
RIGHT: "left door" is at -y. Positive joint motion is always the instructed motion (opening, lifting, pressing ...). The
objects: sim/catalogue.py (the 30 categories), sim/grammar.py (training objects), extras/partnet.py (the user's own).
"""

import math
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

# Every kind of movable part (last word of its label) in the seen categories and in the grammar; index 0: no part.
PART_KINDS = (
    "none", "drawer", "door", "lid", "cap", "lever", "flap", "button", "handle", "screen", "cover", "seat", "head",
    "bar", "slider",
)  # fmt: skip

COLOURS = {
    "white": (0.93, 0.93, 0.91), "grey": (0.53, 0.54, 0.56), "black": (0.15, 0.15, 0.17), "brown": (0.45, 0.27, 0.13),
    "red": (0.75, 0.12, 0.10), "orange": (0.95, 0.52, 0.10), "yellow": (0.92, 0.82, 0.20), "green": (0.16, 0.50, 0.22),
    "blue": (0.13, 0.30, 0.68), "purple": (0.47, 0.20, 0.58), "pink": (0.93, 0.58, 0.68),
}  # fmt: skip
WORDS, PALETTE = tuple(COLOURS), np.array(list(COLOURS.values()))
METAL, DARK = (0.60, 0.61, 0.64), (0.06, 0.06, 0.07)  # of handles, knobs, glass
COLOUR_JITTER = 0.02  # standard deviation of a body's colour around its word, per channel
COLOUR_MARGIN = 0.1  # a shade must be this much nearer (in rgb) to its own word than to the next

GAP = 0.012  # metres, between the front of a door or drawer and its neighbours, so that its edge is visible
BACKGROUND, BASE = -2, -1  # ids of non-parts in pictures and rays; part j has id j
LEFT_RIGHT = ((-1, "left"), (1, "right"))  # sign of y, word
ROW = {1: ("",), 2: ("left ", "right "), 3: ("left ", "middle ", "right ")}  # words of parts side by side, -y to +y
COLUMN = {0: (), 1: ("",), 2: ("top ", "bottom "), 3: ("top ", "middle ", "bottom ")}  # and one above the other
ENDS = (-1, 1)  # both ends of an axis


# ---- what an object is ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """One visible, solid primitive in its link's frame; xyz: centre, m; rpy: radians, URDF convention; rgb: 0..1.

    kind "box": size = full extents (x, y, z); "cylinder": (radius, length along local z); "sphere": (radius,). Metres.
    """

    kind: str
    size: tuple
    xyz: tuple
    rpy: tuple
    rgb: tuple

    @property
    def volume(self) -> float:
        if self.kind == "box":
            return math.prod(self.size)
        radius = self.size[0]
        return math.pi * radius**2 * self.size[1] if self.kind == "cylinder" else 4 / 3 * math.pi * radius**3

    def corners(self) -> np.ndarray:
        """(8, 3) corners of the bounding box in the link's frame, metres; corner 4a + 2b + c, a b c in {0, 1}."""
        diameter, length = 2 * self.size[0], self.size[-1]
        extents = {"box": self.size, "cylinder": (diameter, diameter, length), "sphere": (diameter,) * 3}[self.kind]
        signs = np.array([(a, b, c) for a in ENDS for b in ENDS for c in ENDS])
        return np.array(self.xyz) + signs * np.array(extents) / 2 @ rotation(self.rpy).T


@dataclass
class Part:
    """One movable link.

    label: its everyday name, unique within the object. joint: "revolute" | "prismatic". origin: metres, base frame; the
    link's frame has the same axes as the base at joint value 0. axis: unit vector. lower, upper: radians or metres.
    verb: imperative for the instruction; decides `primitive`. start: joint value of the closed state (None: lower).
    both_ways: either sense of motion counts (a lever that turns).
    """

    label: str
    joint: str
    origin: tuple
    axis: tuple
    lower: float
    upper: float
    shapes: list[Shape]
    verb: str = "open"
    start: float | None = None
    both_ways: bool = False

    def __post_init__(self):
        if self.start is None:
            self.start = self.lower

    @property
    def kind(self) -> str:
        """Last word of the label: "drawer", "door", "lid" ..."""
        return self.label.split()[-1]

    @property
    def primitive(self) -> str:
        """How the gripper moves after contact: "push" for the verbs "press down" and "push back", else "pull"."""
        return "push" if self.verb in ("press down", "push back") else "pull"


@dataclass
class ObjectSpec:
    """A whole object: fixed base plus movable parts; part i becomes link i of the URDF."""

    category: str
    base: list[Shape]
    parts: list[Part]


def to_urdf(spec: ObjectSpec, mass: float = 1.0, inertia: float = 0.02, bodies: list | None = None) -> str:
    """URDF text of an object: link "base" (fixed, mass 0) and one link "part_i" and its joint per part, in order.

    Args: mass: kg; inertia: kg m^2, its diagonal; both equal for all parts, so that joint friction decides how hard a
    part is to move. bodies: lines of visuals and collisions for the base and each part; default: their shapes.
    """
    if bodies is None:
        number = count(1)  # of materials: simulators that cache materials by name would mix up colours
        links = (spec.base, *(part.shapes for part in spec.parts))
        bodies = [[_shape_urdf(s, next(number)) for s in shapes] for shapes in links]
    diagonal = f'<inertia ixx="{inertia:g}" iyy="{inertia:g}" izz="{inertia:g}" ixy="0" ixz="0" iyz="0"/></inertial>'
    origin = '<origin xyz="{:.4f} {:.4f} {:.4f}"/>'.format
    lines = [f'<robot name="object"><link name="base"><inertial><mass value="0"/>{diagonal}', *bodies[0], "</link>"]
    for i, (part, body) in enumerate(zip(spec.parts, bodies[1:], strict=True)):
        centre = np.mean([s.xyz for s in part.shapes], axis=0)
        lines += [
            f'<link name="part_{i}"><inertial>{origin(*centre)}<mass value="{mass:g}"/>{diagonal}',
            *body,
            f'</link><joint name="joint_part_{i}" type="{part.joint}">',
            f'<parent link="base"/><child link="part_{i}"/>',
            origin(*part.origin),
            '<axis xyz="{:.6f} {:.6f} {:.6f}"/>'.format(*part.axis),
            f'<limit lower="{part.lower:.4f}" upper="{part.upper:.4f}" effort="1000" velocity="10"/></joint>',
        ]
    return "\n".join([*lines, "</robot>"])


def _shape_urdf(s: Shape, material: int) -> str:
    geometry = {
        "box": '<box size="{:.4f} {:.4f} {:.4f}"/>',
        "cylinder": '<cylinder radius="{:.4f}" length="{:.4f}"/>',
        "sphere": '<sphere radius="{:.4f}"/>',
    }[s.kind].format(*s.size)
    origin = '<origin xyz="{:.4f} {:.4f} {:.4f}" rpy="{:.5f} {:.5f} {:.5f}"/>'.format(*s.xyz, *s.rpy)
    body = f"{origin}<geometry>{geometry}</geometry>"
    colour = '<color rgba="{:.3f} {:.3f} {:.3f} 1"/>'.format(*s.rgb)
    return f'<visual>{body}<material name="m{material}">{colour}</material></visual>\n<collision>{body}</collision>'


# ---- colours --------------------------------------------------------------------------------------------------------
def colour_name(rgb) -> str:
    """The word of COLOURS nearest to rgb (0..1)."""
    return WORDS[int(((PALETTE - rgb) ** 2).sum(1).argmin())]


def main_colour(shapes: list[Shape]) -> str:
    """Colour word of the largest of the shapes."""
    return colour_name(max(shapes, key=lambda s: s.volume).rgb)


def tint(rng, *words) -> tuple:
    """A colour near one of the given words (default: any word of COLOURS)."""
    word = pick(rng, *(words or WORDS))
    return tuple(float(v) for v in np.clip(np.array(COLOURS[word]) + rng.normal(0, COLOUR_JITTER, 3), 0.04, 0.97))


def shade(rgb, factor) -> tuple:
    """Darker (factor < 1) or lighter (> 1), but never so much that people would call it another colour."""
    shaded = tuple(float(v) for v in np.clip(np.array(rgb) * factor, 0.02, 0.98))
    near, second = np.sort(np.linalg.norm(PALETTE - shaded, axis=1))[:2]
    if (colour_name(shaded) == colour_name(rgb) and second - near > COLOUR_MARGIN) or abs(factor - 1) < 0.02:
        return shaded
    return shade(rgb, (factor + 1) / 2)


def seam(rgb) -> tuple:
    """Colour that shows in a gap: dark, except on black, where dark would be invisible."""
    return METAL if colour_name(rgb) == "black" else DARK


# ---- small tools of the builders -------------------------------------------------------------------------------------
def sizes(rng, *ranges):
    """One number from each (low, high), metres."""
    return [float(rng.uniform(low, high)) for low, high in ranges]


def pick(rng, *options):
    """One of the options, all equally likely."""
    return options[rng.integers(len(options))]


def box(size, at, rgb, yaw=0.0) -> Shape:
    return Shape("box", tuple(size), tuple(at), (0.0, 0.0, yaw), rgb)


def pair(size, at, rgb) -> list[Shape]:
    """Two equal boxes, at -y and at y."""
    return [box(size, (at[0], s * at[1], at[2]), rgb) for s in ENDS]


def cylinder(radius, length, at, rgb, along="z") -> Shape:
    rpy = {"z": (0.0, 0.0, 0.0), "x": (0.0, math.pi / 2, 0.0), "y": (math.pi / 2, 0.0, 0.0)}[along]
    return Shape("cylinder", (radius, length), tuple(at), rpy, rgb)


def sphere(radius, at, rgb) -> Shape:
    return Shape("sphere", (radius,), tuple(at), (0.0, 0.0, 0.0), rgb)


def hinge(label, origin, axis, upper, shapes, verb="open", lower=0.0, **more) -> Part:
    return Part(label, "revolute", tuple(origin), tuple(axis), lower, upper, shapes, verb, **more)


def slide(label, origin, axis, travel, shapes, verb="open", **more) -> Part:
    return Part(label, "prismatic", tuple(origin), tuple(axis), 0.0, travel, shapes, verb, **more)


def grid(rows, columns, kind) -> list[tuple[int, int, str]]:
    """(row, column, label) of parts of one kind on a front, from its top left: (0, 1, "top right drawer")."""
    return [(i, j, row + word + kind) for i, row in enumerate(COLUMN[rows]) for j, word in enumerate(ROW[columns])]


# ---- turns ----------------------------------------------------------------------------------------------------------
def rotation(rpy) -> np.ndarray:
    """(3, 3) matrix of roll, pitch, yaw, radians, URDF convention: Rz(yaw) Ry(pitch) Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def roll_pitch_yaw(m: np.ndarray) -> tuple[float, float, float]:
    """Radians, URDF convention, of a rotation (3, 3): the inverse of `rotation`."""
    pitch = math.asin(np.clip(-m[2, 0], -1, 1))
    if math.hypot(m[0, 0], m[1, 0]) < 1e-6:  # pitch of +-90 degrees: roll and yaw turn about the same axis
        return math.atan2(-m[1, 2], m[1, 1]), pitch, 0.0
    return math.atan2(m[2, 1], m[2, 2]), pitch, math.atan2(m[1, 0], m[0, 0])


def turned(shape: Shape, turn: np.ndarray, by=(0.0, 0.0, 0.0)) -> Shape:
    """The shape turned by a rotation matrix about the origin, then moved by `by`, metres."""
    rpy = roll_pitch_yaw(turn @ rotation(shape.rpy))
    return replace(shape, xyz=tuple((turn @ shape.xyz + by).tolist()), rpy=rpy)


def moved(part: Part, turn: np.ndarray, by=(0.0, 0.0, 0.0)) -> Part:
    """The part turned about the origin, then moved by `by`, metres."""
    origin = tuple((turn @ part.origin + by).tolist())
    axis = tuple((turn @ part.axis + 0.0).tolist())  # + 0.0: no -0.0 in the URDF
    return replace(part, origin=origin, axis=axis, shapes=[turned(s, turn) for s in part.shapes])


# ---- shared parts ---------------------------------------------------------------------------------------------------
def shell(width, depth, height, bottom, wall, rgb) -> list[Shape]:
    """A box open at the front, centred on x = y = 0, floor at z = bottom; the last shape is its top."""
    middle = bottom + height / 2
    back = box((wall / 2, width, height), (-depth / 2 + wall / 4, 0, middle), shade(rgb, 0.7))
    ends = [box((depth, width, wall), (0, 0, bottom + z), rgb) for z in (wall / 2, height - wall / 2)]
    return [back, *pair((depth, wall, height), (0, (width - wall) / 2, middle), rgb), *ends]


def legs(width, depth, height, thick, rgb) -> list[Shape]:
    """Four legs from the floor up to z = height, under a body of width x depth."""
    x = (depth - thick) / 2
    y = (width - thick) / 2
    return [leg for s in ENDS for leg in pair((thick, thick, height), (s * x, y, height / 2), rgb)]


def handle(kind, at, span, rgb, out=0.04) -> list[Shape]:
    """A handle on a panel whose outer face is at x = at[0]. kind: knob, bar, upright bar, recess, lever or none.

    span: length, metres; negative for a lever that points to -y.
    """
    x, y, z = at
    length = abs(span)
    middle = x + out / 2
    if kind == "knob":
        return [cylinder(0.012, out, (middle, y, z), rgb, "x"), sphere(0.026, (x + out, y, z), rgb)]
    if kind == "lever":
        stem = cylinder(0.02, out, (middle, y, z), rgb, "x")
        return [stem, box((0.024, length, 0.03), (x + out, y + span * 0.4, z), rgb)]
    if kind == "bar":
        posts = [box((out, 0.015, 0.015), (middle, y + s * length * 0.4, z), rgb) for s in ENDS]
        return [box((0.024, length, 0.03), (x + out, y, z), rgb), *posts]
    if kind == "upright bar":
        posts = [box((out, 0.015, 0.015), (middle, y, z + s * length * 0.4), rgb) for s in ENDS]
        return [box((0.024, 0.03, length), (x + out, y, z), rgb), *posts]
    return [box((0.004, length, 0.035), (x + 0.002, y, z), DARK)] if kind == "recess" else []


def panel(size, at, rgb) -> list[Shape]:
    """The front of a door or drawer, and a sheet behind it that shows as a seam. at: middle of the back face."""
    (thick, wide, tall), (x, y, z) = size, at
    sheet = box((0.004, wide, tall), (x + 0.002, y, z), seam(rgb))
    return [box((thick, wide - GAP, tall - GAP), (x + thick / 2, y, z), rgb), sheet]


def side_door(rng, label, side, size, centre, rgb, grip, span=None, extra=()) -> Part:
    """A door with an upright hinge at its right (side = +1) or left (side = -1) edge.

    size: thickness, width, height. centre: middle of the panel's back face. grip: kind of handle, at the edge far from
    the hinge. span: length of an upright bar. extra: more shapes, placed relative to the middle of the outer face.
    """
    (thick, width, height), (x, y, z) = size, centre
    middle = -side * width / 2
    if grip != "upright bar":
        span = side * min(0.12, width * 0.3)
    elif span is None:
        span = height * rng.uniform(0.25, 0.5)
    shapes = panel(size, (0, middle, 0), rgb)
    shapes += handle(grip, (thick, -side * (width - 0.05), 0), span, pick(rng, METAL, DARK))
    shapes += [turned(s, np.eye(3), (thick, middle, 0)) for s in extra]
    return hinge(label, (x, y + side * width / 2, z), (0, 0, side), rng.uniform(1.3, 1.9), shapes)


def drawer(rng, label, size, front, rgb, grip, thick=0.02) -> Part:
    """A drawer that slides to +x. size: depth, width, height. front: middle of the back face of its front panel."""
    depth, width, height = size
    inside = shade(rgb, 0.8)
    span = width * rng.uniform(0.25, 0.5)
    x = -depth * 0.425
    shapes = panel((thick, width, height), (0, 0, 0), rgb)
    shapes += [box((depth * 0.85, width * 0.9, 0.01), (x, 0, -height * 0.35), inside)]
    shapes += pair((depth * 0.85, 0.01, height * 0.6), (x, width * 0.45, 0), inside)
    shapes += handle(grip, (thick, 0, height * 0.25 if grip == "recess" else 0), span, seam(rgb))
    return slide(label, front, (1, 0, 0), depth * rng.uniform(0.6, 0.8), shapes)


def top_lid(label, back, size, upper, rgb, extra=(), **more) -> Part:
    """A lid hinged along its back edge (axis -y): extends to +x, opens upwards. back: middle of the hinge line."""
    depth, _, thick = size
    return hinge(label, back, (0, -1, 0), upper, [box(size, (depth / 2, 0, thick / 2), rgb), *extra], **more)
