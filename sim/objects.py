"""The catalogue: articulated objects made in code, from a seed to URDF text (numpy only).

    python -m sim.objects            # print the catalogue: category, split, parts of three sample instances

A builder takes a random generator and returns the fixed base (a list of primitive shapes) and the movable parts.
World frame: the object's front is +x, up is +z; metres and radians; objects are 0.5-1 m, normalised as in
PartNet-Mobility. Somebody in front of the object looks along -x and sees +y on the RIGHT: "left door" is at -y.
Positive joint motion is always the instructed motion (opening, lifting, pressing ...).

    make_object(category, rng) -> ObjectSpec(base shapes, parts) -> to_urdf(spec) -> text for any URDF simulator

| category         | split    | joint of the moving part        | moving part                           | primitive |
|------------------|----------|---------------------------------|---------------------------------------|-----------|
| Safe             | seen     | hinge, upright                  | door                                  | pull      |
| Door *           | seen     | hinge, upright                  | one leaf, or left and right door      | pull      |
| Display          | seen     | hinge, lying, low on the screen | screen, tilted forward                | pull      |
| Refrigerator *   | seen     | hinge, upright / slide forward  | 1, 2 stacked or french doors, drawer  | pull      |
| Laptop           | seen     | hinge, lying, at the back       | lid                                   | pull      |
| Lighter          | seen     | hinge, lying, at one side       | cap                                   | pull      |
| Microwave        | seen     | hinge, upright, left            | door                                  | pull      |
| Mouse *          | seen     | hinge, lying                    | left and right button, lifted         | pull      |
| Box *            | seen     | hinge, lying                    | left and right flap, or a lid         | pull      |
| TrashCan *       | seen     | hinge, lying, at the back       | one lid, or left and right lid        | pull      |
| KitchenPot       | seen     | slide up                        | lid                                   | pull      |
| Suitcase         | seen     | slide up / hinge at the back    | telescopic handle / lid               | pull      |
| Pliers           | seen     | hinge, upright (lying flat)     | front handle                          | pull      |
| StorageFurniture * | seen   | slide forward / hinge, upright  | 1-4 drawers, 1-2 doors, drawer + door | pull      |
| Remote           | seen     | slide back                      | battery cover                         | push      |
| Bottle           | seen     | slide up                        | cap                                   | pull      |
| FoldingChair     | seen     | hinge, lying, at the back       | seat, folded up                       | pull      |
| Toaster *        | seen     | slide down                      | one lever, or left and right lever    | push      |
| Lamp             | seen     | hinge, lying, on the pole       | lamp head, raised                     | pull      |
| Dispenser        | seen     | slide up                        | pump head                             | pull      |
| Toilet           | unseen   | hinge, lying, at the back       | lid                                   | pull      |
| Scissors         | unseen   | hinge, upright (lying flat)     | front handle                          | pull      |
| Table *          | unseen   | slide forward                   | 1-3 drawers                           | pull      |
| Stapler          | unseen   | hinge, lying, at the back       | arm                                   | pull      |
| Kettle           | unseen   | hinge, lying, at one side       | lid                                   | pull      |
| USB              | unseen   | slide forward                   | cap                                   | pull      |
| Switch *         | unseen   | hinge, lying                    | 1-2 levers, pressed down              | push      |
| WashingMachine * | unseen   | hinge, upright / slide forward  | round door, detergent drawer          | pull      |
| Faucet *         | unseen   | hinge, upright, both ways       | 1-2 levers                            | pull      |
| Phone            | unseen   | hinge, lying, at the back       | flip cover                            | pull      |
| Oven *, Dishwasher | spare  | hinge, lying, at the bottom     | door (and a drawer below it)          | pull      |
| Window           | spare    | slide to the right              | sash                                  | pull      |
| Gadget *         | training | any of these, on any face       | 1-3 parts of eight kinds              | both      |

* may have several movable parts (MULTI_CAPABLE); more than half of such instances do.

Source: RoboMamba (arXiv 2406.04339) Table 2 for the categories and the split; the shapes are our own, since
PartNet-Mobility may not be redistributed.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Names

SEEN = (
    "Safe", "Door", "Display", "Refrigerator", "Laptop", "Lighter", "Microwave", "Mouse", "Box", "TrashCan",
    "KitchenPot", "Suitcase", "Pliers", "StorageFurniture", "Remote", "Bottle", "FoldingChair", "Toaster", "Lamp",
    "Dispenser",
)  # fmt: skip
UNSEEN = ("Toilet", "Scissors", "Table", "Stapler", "Kettle", "USB", "Switch", "WashingMachine", "Faucet", "Phone")
SPARE = ("Oven", "Dishwasher", "Window")  # not in the paper: for exercises and for a user's own splits
GADGET = "Gadget"  # random bodies with random parts: training variety, in no test set

DRAWER_DOOR_SEEN = ("StorageFurniture", "Door", "Refrigerator", "Microwave", "Safe")
DRAWER_DOOR_UNSEEN = ("Table", "WashingMachine")
MULTI_CAPABLE = (
    "StorageFurniture", "Refrigerator", "Door", "Mouse", "Box", "TrashCan", "Toaster",
    "Table", "WashingMachine", "Switch", "Faucet", "Oven", GADGET,
)  # fmt: skip

NOUNS = {
    "Safe": "safe", "Door": "door", "Display": "monitor", "Refrigerator": "refrigerator", "Laptop": "laptop",
    "Lighter": "lighter", "Microwave": "microwave", "Mouse": "computer mouse", "Box": "box", "TrashCan": "trash can",
    "KitchenPot": "cooking pot", "Suitcase": "suitcase", "Pliers": "pair of pliers", "StorageFurniture": "cabinet",
    "Remote": "remote control", "Bottle": "bottle", "FoldingChair": "folding chair", "Toaster": "toaster",
    "Lamp": "lamp", "Dispenser": "soap dispenser", "Toilet": "toilet", "Scissors": "pair of scissors",
    "Table": "table", "Stapler": "stapler", "Kettle": "kettle", "USB": "USB stick", "Switch": "switch",
    "WashingMachine": "washing machine", "Faucet": "faucet", "Phone": "flip phone", "Oven": "oven",
    "Dishwasher": "dishwasher", "Window": "window", "Gadget": "gadget",
}  # fmt: skip

# Every kind of movable part (last word of its label) in SEEN and GADGET; index 0 is reserved for "no part".
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
COLOUR_MARGIN = 0.1  # a shade must be that much nearer (in rgb) to its own word than to the next

GAP = 0.012  # metres, between the front of a door or drawer and its neighbours, so that one sees where it ends
LABEL = 1.03  # radius of a label around a bottle, relative to the bottle; less, and low-polygon cylinders mix
LEFT_RIGHT = ((-1, "left"), (1, "right"))  # sign of y, word
ENDS = (-1, 1)  # both ends of an axis

# ---------------------------------------------------------------------------------------------------------------------
# What an object is


def rotation(rpy) -> np.ndarray:
    """(3, 3) matrix of roll, pitch, yaw, radians, URDF convention: Rz(yaw) Ry(pitch) Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@dataclass(frozen=True)
class Shape:
    """One primitive in its link's frame. Collision and visual geometry are the same.

    kind "box": size = full extents (x, y, z); "cylinder": (radius, length along local z); "sphere": (radius,). Metres.
    xyz: centre, metres. rpy: roll, pitch, yaw, radians, URDF convention. rgb: 0..1.
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
        radius, length = self.size[0], self.size[-1]
        round_extents = (2 * radius, 2 * radius, length if self.kind == "cylinder" else 2 * radius)
        extents = self.size if self.kind == "box" else round_extents
        signs = np.array([(a, b, c) for a in ENDS for b in ENDS for c in ENDS])
        return np.array(self.xyz) + signs * np.array(extents) / 2 @ rotation(self.rpy).T


@dataclass
class Part:
    """One movable link. Positive joint motion is the instructed motion.

    label: what a person calls it, unique inside the object. joint: "revolute" | "prismatic". origin: metres, base
    frame; the link's frame has the same axes as the base at joint value 0. axis: unit vector. lower, upper: radians or
    metres. verb: imperative for the instruction. primitive: "pull" | "push", the way the gripper moves after contact.
    start: joint value of the closed state. both_ways: either sense of motion counts (a lever that turns).
    """

    name: str
    label: str
    joint: str
    origin: tuple
    axis: tuple
    lower: float
    upper: float
    shapes: list[Shape]
    verb: str = "open"
    primitive: str = "pull"
    start: float | None = None
    both_ways: bool = False

    def __post_init__(self):
        if self.start is None:
            self.start = self.lower

    @property
    def kind(self) -> str:
        """Last word of the label: "drawer", "door", "lid" ..."""
        return self.label.split()[-1]


@dataclass
class ObjectSpec:
    """A whole object: fixed base plus movable parts; part i becomes link i of the URDF."""

    category: str
    base: list[Shape]
    parts: list[Part] = field(default_factory=list)

    @property
    def multi_capable(self) -> bool:
        """Can this category have more than one movable part?"""
        return self.category in MULTI_CAPABLE


def to_urdf(spec: ObjectSpec, mass: float = 1.0, inertia: float = 0.02) -> str:
    """URDF text of an object: link "base" (fixed, mass 0) and one link and joint per part, in order.

    Args: mass: kg, of every movable link. inertia: kg m^2, its diagonal; both deliberately equal for all parts, so
    that the joint friction set by the simulator decides how hard a part moves.
    Every visual has its own material name: simulators that cache materials by name would mix up the colours.
    """
    material = 0

    def link(name: str, shapes: list[Shape], link_mass: float) -> list[str]:
        nonlocal material
        x, y, z = np.mean([s.xyz for s in shapes], axis=0) if link_mass else (0.0, 0.0, 0.0)
        lines = [
            f'<link name="{name}"><inertial><origin xyz="{x:.4f} {y:.4f} {z:.4f}"/><mass value="{link_mass:g}"/>'
            f'<inertia ixx="{inertia:g}" iyy="{inertia:g}" izz="{inertia:g}" ixy="0" ixz="0" iyz="0"/></inertial>'
        ]
        for s in shapes:
            material += 1
            size = " ".join(f"{v:.4f}" for v in s.size)
            geometry = {
                "box": f'<box size="{size}"/>',
                "cylinder": f'<cylinder radius="{s.size[0]:.4f}" length="{s.size[-1]:.4f}"/>',
                "sphere": f'<sphere radius="{s.size[0]:.4f}"/>',
            }[s.kind]
            place = '<origin xyz="{:.4f} {:.4f} {:.4f}" rpy="{:.5f} {:.5f} {:.5f}"/>'.format(*s.xyz, *s.rpy)
            body = f"{place}<geometry>{geometry}</geometry>"
            colour = '<color rgba="{:.3f} {:.3f} {:.3f} 1"/>'.format(*s.rgb)
            lines += [
                f'<visual>{body}<material name="m{material}">{colour}</material></visual>',
                f"<collision>{body}</collision>",
            ]
        return lines + ["</link>"]

    lines = [f'<robot name="{spec.category}">', *link("base", spec.base, 0.0)]
    for part in spec.parts:
        lines += link(part.name, part.shapes, mass)
        lines += [
            f'<joint name="joint_{part.name}" type="{part.joint}"><parent link="base"/><child link="{part.name}"/>',
            '<origin xyz="{:.4f} {:.4f} {:.4f}"/>'.format(*part.origin),
            '<axis xyz="{:.6f} {:.6f} {:.6f}"/>'.format(*part.axis),
            f'<limit lower="{part.lower:.4f}" upper="{part.upper:.4f}" effort="1000" velocity="10"/></joint>',
        ]
    return "\n".join(lines + ["</robot>"])


def colour_name(rgb) -> str:
    """The word of COLOURS nearest to rgb (0..1)."""
    return WORDS[int(((PALETTE - rgb) ** 2).sum(1).argmin())]


def body_colour(spec: ObjectSpec) -> str:
    """Colour word of the base's largest shape."""
    return colour_name(max(spec.base, key=lambda s: s.volume).rgb)


def part_colour(part: Part) -> str:
    """Colour word of the part's largest shape."""
    return colour_name(max(part.shapes, key=lambda s: s.volume).rgb)


# ---------------------------------------------------------------------------------------------------------------------
# Small tools of the builders


def sizes(rng, *ranges):
    """One number from each (low, high), metres."""
    return [float(rng.uniform(low, high)) for low, high in ranges]


def pick(rng, *options):
    """One of the options, all equally likely."""
    return options[rng.integers(len(options))]


def tint(rng, *words) -> tuple:
    """A colour near one of the given words (default: any word of COLOURS)."""
    word = pick(rng, *(words or tuple(COLOURS)))
    return tuple(float(v) for v in np.clip(np.array(COLOURS[word]) + rng.normal(0, COLOUR_JITTER, 3), 0.04, 0.97))


def shade(rgb, factor) -> tuple:
    """Darker (factor < 1) or lighter (> 1), but never so far that people would call it another colour."""
    shaded = tuple(float(v) for v in np.clip(np.array(rgb) * factor, 0.02, 0.98))
    near, second = np.argsort(np.linalg.norm(PALETTE - shaded, axis=1))[:2]
    margin = np.linalg.norm(PALETTE[second] - shaded) - np.linalg.norm(PALETTE[near] - shaded)
    if (WORDS[near] == colour_name(rgb) and margin > COLOUR_MARGIN) or abs(factor - 1) < 0.02:
        return shaded
    return shade(rgb, (factor + 1) / 2)


def box(size, at, rgb, yaw=0.0) -> Shape:
    return Shape("box", tuple(size), tuple(at), (0.0, 0.0, yaw), rgb)


def cylinder(radius, length, at, rgb, along="z") -> Shape:
    rpy = {"z": (0.0, 0.0, 0.0), "x": (0.0, math.pi / 2, 0.0), "y": (math.pi / 2, 0.0, 0.0)}[along]
    return Shape("cylinder", (radius, length), tuple(at), rpy, rgb)


def sphere(radius, at, rgb) -> Shape:
    return Shape("sphere", (radius,), tuple(at), (0.0, 0.0, 0.0), rgb)


def hinge(label, origin, axis, upper, shapes, verb="open", lower=0.0, **more) -> Part:
    return Part("", label, "revolute", tuple(origin), tuple(axis), lower, upper, shapes, verb, **more)


def slide(label, origin, axis, travel, shapes, verb="open", **more) -> Part:
    return Part("", label, "prismatic", tuple(origin), tuple(axis), 0.0, travel, shapes, verb, **more)


def turned(shape: Shape, turn: np.ndarray, by=(0.0, 0.0, 0.0)) -> Shape:
    """The shape turned by a rotation matrix about the origin, then moved by `by`, metres."""
    m = turn @ rotation(shape.rpy)
    roll, pitch, yaw = math.atan2(m[2, 1], m[2, 2]), math.asin(np.clip(-m[2, 0], -1, 1)), math.atan2(m[1, 0], m[0, 0])
    if math.hypot(m[0, 0], m[1, 0]) < 1e-6:  # pitch of +-90 degrees: roll and yaw turn about the same axis
        roll, yaw = math.atan2(-m[1, 2], m[1, 1]), 0.0
    return replace(shape, xyz=tuple((turn @ shape.xyz + by).tolist()), rpy=(roll, pitch, yaw))


# ---------------------------------------------------------------------------------------------------------------------
# Shared parts


def shell(width, depth, height, bottom, wall, rgb) -> list[Shape]:
    """A box open at the front, centred on x = y = 0, floor at z = bottom."""
    middle = bottom + height / 2
    back = box((wall / 2, width, height), (-depth / 2 + wall / 4, 0, middle), shade(rgb, 0.7))
    sides = [box((depth, wall, height), (0, s * (width - wall) / 2, middle), rgb) for s in ENDS]
    ends = [box((depth, width, wall), (0, 0, bottom + z), rgb) for z in (wall / 2, height - wall / 2)]
    return [back, *sides, *ends]


def legs(width, depth, height, thick, rgb) -> list[Shape]:
    """Four legs from the floor up to z = height, under a body of width x depth."""
    x, y = (depth - thick) / 2, (width - thick) / 2
    return [box((thick, thick, height), (sx * x, sy * y, height / 2), rgb) for sx in ENDS for sy in ENDS]


def handle(kind, at, span, rgb, out=0.04) -> list[Shape]:
    """A handle on a panel whose outer face is at x = at[0]. kind: knob, bar, upright bar, recess, lever or none.

    span: length, metres; negative for a lever that points to -y.
    """
    x, y, z = at
    length, thick = abs(span), 0.024
    if kind == "knob":
        return [cylinder(0.012, out, (x + out / 2, y, z), rgb, "x"), sphere(0.026, (x + out, y, z), rgb)]
    if kind == "bar":
        posts = [box((out, 0.015, 0.015), (x + out / 2, y + s * length * 0.4, z), rgb) for s in ENDS]
        return [box((thick, length, 0.03), (x + out, y, z), rgb), *posts]
    if kind == "upright bar":
        posts = [box((out, 0.015, 0.015), (x + out / 2, y, z + s * length * 0.4), rgb) for s in ENDS]
        return [box((thick, 0.03, length), (x + out, y, z), rgb), *posts]
    if kind == "recess":
        return [box((0.004, length, 0.035), (x + 0.002, y, z), DARK)]
    if kind == "lever":
        stem = cylinder(0.02, out, (x + out / 2, y, z), rgb, "x")
        return [stem, box((thick, length, 0.03), (x + out, y + span * 0.4, z), rgb)]
    return []


def seam(rgb) -> tuple:
    """Colour of what shows in a gap: dark, but not on black, where one would not see it."""
    return METAL if colour_name(rgb) == "black" else DARK


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
    to_middle = -side * width / 2
    if span is None or grip != "upright bar":
        span = height * rng.uniform(0.25, 0.5) if grip == "upright bar" else side * min(0.12, width * 0.3)
    shapes = panel(size, (0, to_middle, 0), rgb)
    shapes += handle(grip, (thick, -side * (width - 0.05), 0), span, pick(rng, METAL, DARK))
    shapes += [turned(s, np.eye(3), (thick, to_middle, 0)) for s in extra]
    return hinge(label, (x, y + side * width / 2, z), (0, 0, side), rng.uniform(1.3, 1.9), shapes)


def drawer(rng, label, size, front, rgb, grip, thick=0.02) -> Part:
    """A drawer that slides to +x. size: depth, width, height. front: middle of the back face of its front panel."""
    depth, width, height = size
    inside = shade(rgb, 0.8)
    x, up, span = -depth * 0.425, height * 0.25 if grip == "recess" else 0, width * rng.uniform(0.25, 0.5)
    shapes = panel((thick, width, height), (0, 0, 0), rgb)
    shapes += [box((depth * 0.85, width * 0.9, 0.01), (x, 0, -height * 0.35), inside)]
    shapes += [box((depth * 0.85, 0.01, height * 0.6), (x, s * width * 0.45, 0), inside) for s in ENDS]
    shapes += handle(grip, (thick, 0, up), span, seam(rgb))
    return slide(label, front, (1, 0, 0), depth * rng.uniform(0.6, 0.8), shapes)


def top_lid(label, back, size, upper, rgb, extra=(), verb="open", **more) -> Part:
    """A lid hinged along its back edge (axis -y): extends to +x, opens upwards. back: middle of the hinge line."""
    depth, _, thick = size
    return hinge(label, back, (0, -1, 0), upper, [box(size, (depth / 2, 0, thick / 2), rgb), *extra], verb, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Seen categories. A builder returns (base shapes, parts); numbers are metres and radians.


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
    base = [box((0.08, 0.05, tall), (0, s * (whole / 2 + 0.025), tall / 2), shade(rgb, 0.7)) for s in ENDS]
    base += [box((0.08, whole + 0.1, 0.05), (0, 0, tall + 0.025), shade(rgb, 0.7))]
    base += [box((0.2, whole + 0.2, 0.01), (0, 0, -0.005), COLOURS["grey"])]
    panels = [box((0.006, wide * 0.6, tall * 0.3), (0.003, 0, tall * z), shade(rgb, 0.85)) for z in (-0.25, 0.25)]

    def leaf(label, side, y):
        return side_door(rng, label, side, (0.03, wide, tall), (0, y, tall / 2), rgb, grip, 0.2, panels)

    if double:
        return base, [leaf(f"{word} door", s, s * wide / 2) for s, word in LEFT_RIGHT]
    return base, [leaf("door", pick(rng, *ENDS), 0)]


def display(rng):
    wide, pivot = sizes(rng, (0.6, 0.85), (0.3, 0.36))
    tall, rgb = wide * rng.uniform(0.5, 0.65), tint(rng, "black", "grey", "white")
    middle = 0.3 * tall  # of the screen above its hinge, so that most of it tilts towards the viewer
    base = [cylinder(wide * 0.2, 0.02, (-0.03, 0, 0.01), rgb), box((0.03, 0.08, pivot), (-0.03, 0, pivot / 2), rgb)]
    frame = box((0.014, wide, tall), (0.007, 0, middle), rgb)
    glass = box((0.02, wide * 0.94, tall * 0.88), (0.02, 0, middle + 0.01), tint(rng, "black", "blue"))
    tilt = hinge("screen", (-0.01, 0, pivot), (0, 1, 0), 0.6, [frame, glass], "tilt", lower=-0.25)
    return base, [tilt]


def refrigerator(rng):
    wide, deep, tall = sizes(rng, (0.42, 0.58), (0.4, 0.5), (0.9, 1.05))
    rgb, side = tint(rng, "white", "grey", "black", "red"), pick(rng, *ENDS)
    base = shell(wide, deep, tall, 0.03, 0.025, rgb) + [box((deep * 0.8, wide * 0.9, 0.03), (0, 0, 0.015), DARK)]

    def leaf(label, side, width, y, low, high):
        size, at = (0.04, width, high - low), (deep / 2, y, 0.03 + (low + high) / 2)
        return side_door(rng, label, side, size, at, rgb, "upright bar")

    layout = pick(rng, "one", "stacked", "french")
    if layout == "one":
        return base, [leaf("door", side, wide, 0, 0, tall)]
    if layout == "stacked":
        split = tall * pick(rng, rng.uniform(0.3, 0.38), rng.uniform(0.62, 0.7))
        return base, [leaf("top door", side, wide, 0, split, tall), leaf("bottom door", side, wide, 0, 0, split)]
    low = tall * pick(rng, 0.0, rng.uniform(0.25, 0.33))
    parts = [leaf(f"{word} door", s, wide / 2, s * wide / 4, low, tall) for s, word in LEFT_RIGHT]
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
    middle = -side * wide / 2  # of the cap, seen from its hinge
    cap = [box((deep, wide, 0.02), (0, middle, 0.17), METAL), box((deep, 0.01, 0.16), (0, 2 * middle, 0.08), METAL)]
    cap += [box((0.01, wide, 0.16), (s * (deep / 2 - 0.005), middle, 0.08), METAL) for s in ENDS]
    return base, [hinge("cap", (0, side * wide / 2, tall + 0.005), (-side, 0, 0), 2.0, cap)]


def microwave(rng):
    wide, deep, tall = sizes(rng, (0.65, 0.85), (0.38, 0.5), (0.36, 0.45))
    rgb, leaf = tint(rng, "white", "black", "grey", "red"), wide * 0.72
    x, keys, z = deep / 2, wide - leaf, 0.02 + tall / 2
    y = leaf / 2  # middle of the panel of buttons, right of the door
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
    parts = [hinge(f"{w} button", (0, s * wide * 0.27, 0.06), (0, -1, 0), 0.45, flap, "lift") for s, w in LEFT_RIGHT]
    return base, parts


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
    pedal = [box((0.1, 0.12, 0.02), (half + 0.05, 0, 0.03), DARK)]
    if rng.random() < 0.6:  # two compartments side by side
        base, wide = [box((2 * half, 3 * half, tall), (0, 0, tall / 2), rgb), *pedal], 1.5 * half
        tab = box((0.05, 0.1, 0.02), (2 * half + 0.02, 0, 0.02), DARK)
        size, at = (2 * half + 0.01, wide - 0.01, 0.04), [(s * wide / 2, word) for s, word in LEFT_RIGHT]
        return base, [top_lid(f"{word} lid", (-half, y, tall), size, 1.6, lid_rgb, [tab]) for y, word in at]
    tab = box((0.05, 0.1, 0.02), (2 * half + 0.02, 0, 0.02), DARK)
    if rng.random() < 0.5:
        base, lid = cylinder(half, tall, (0, 0, tall / 2), rgb), cylinder(half * 1.05, 0.04, (half, 0, 0.02), lid_rgb)
        return [base, *pedal], [hinge("lid", (-half, 0, tall), (0, -1, 0), 1.6, [lid, tab])]
    size = (2 * half + 0.02, 2 * half + 0.02, 0.04)
    body = box((2 * half, 2 * half, tall), (0, 0, tall / 2), rgb)
    return [body, *pedal], [top_lid("lid", (-half, 0, tall), size, 1.6, lid_rgb, [tab])]


def kitchen_pot(rng):
    radius, tall = sizes(rng, (0.26, 0.36), (0.2, 0.34))
    rgb = tint(rng, "grey", "red", "black", "blue", "green")
    base = [cylinder(radius, tall, (0, 0, tall / 2), rgb)]
    base += [box((0.1, 0.05, 0.025), (0, s * (radius + 0.02), tall * 0.75), DARK) for s in ENDS]
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
        locks = [box((0.012, 0.06, 0.07), (tall / 2 + 0.006, s * wide * 0.3, deep * 0.45), METAL) for s in ENDS]
        grip = handle("bar", (tall / 2, 0, deep * 0.25), 0.2, DARK, 0.05)
        base = [box((tall, wide, deep * 0.55), (0, 0, deep * 0.275), rgb), *locks, *grip]
        at, size = (-tall / 2, 0, deep * 0.56), (tall, wide, deep * 0.45)
        return base, [top_lid("lid", at, size, 1.8, shade(rgb, 1.1), ribs)]
    middle = tall / 2 + 0.05
    base = [box((deep, wide, tall), (0, 0, middle), rgb)]
    ribs = [y * wide for y in (-0.3, -0.1, 0.1, 0.3)]
    base += [box((0.006, 0.02, tall * 0.9), (deep / 2, y, middle), shade(rgb, 0.7)) for y in ribs]
    base += [sphere(0.04, (sx * deep * 0.35, sy * wide * 0.4, 0.04), DARK) for sx in ENDS for sy in ENDS]
    grip = [box((0.025, 0.025, 0.14), (0, s * wide * 0.22, 0), METAL) for s in ENDS]
    grip += [box((0.08, wide * 0.44 + 0.08, 0.05), (0, 0, 0.09), DARK)]
    return base, [slide("handle", (0, 0, tall + 0.05), (0, 0, 1), 0.35, grip, "pull up")]


def crossed_levers(rng, scissors):
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


def pliers(rng):
    return crossed_levers(rng, scissors=False)


def storage_furniture(rng):
    wide, deep, tall, bottom = sizes(rng, (0.5, 0.9), (0.35, 0.5), (0.5, 0.95), (0.03, 0.1))
    rgb = tint(rng)
    front_rgb = tint(rng) if rng.random() < 0.35 else shade(rgb, 1.1)
    drawer_grip, door_grip = pick(rng, "knob", "bar", "recess"), pick(rng, "knob", "upright bar")
    base = shell(wide, deep, tall, bottom, 0.02, rgb) + legs(wide, deep, bottom, 0.04, shade(rgb, 0.6))
    x, inner, top = deep / 2, wide - 0.03, bottom + tall - 0.015

    def drawers(rows, z_top, z_low):
        """rows: labels from top to bottom, each row a tuple from left to right."""
        parts, each = [], (z_top - z_low) / len(rows)
        for i, row in enumerate(rows):
            for j, label in enumerate(row):
                at = (x, inner * ((j + 0.5) / len(row) - 0.5), z_top - each * (i + 0.5))
                size = (deep - 0.04, inner / len(row), each)
                parts.append(drawer(rng, label, size, at, front_rgb, drawer_grip))
        return parts

    def doors(n, z_top, z_low):
        size, z = (0.02, inner / n, z_top - z_low), (z_top + z_low) / 2
        if n == 1:
            return [side_door(rng, "door", pick(rng, *ENDS), size, (x, 0, z), front_rgb, door_grip)]
        at = [(s, f"{word} door", (x, s * inner / 4, z)) for s, word in LEFT_RIGHT]
        return [side_door(rng, label, s, size, p, front_rgb, door_grip) for s, label, p in at]

    low, high = bottom + 0.015, top
    layout = rng.choice(8, p=[0.11, 0.14, 0.14, 0.08, 0.13, 0.16, 0.14, 0.10])
    if layout < 4:
        rows = (
            [("drawer",)],
            [("top drawer",), ("bottom drawer",)],
            [("top drawer",), ("middle drawer",), ("bottom drawer",)],
            [("top left drawer", "top right drawer"), ("bottom left drawer", "bottom right drawer")],
        )
        return base, drawers(rows[layout], high, low)
    if layout < 6:
        return base, doors(layout - 3, high, low)
    split = high - (high - low) * rng.uniform(0.25, 0.35)
    return base, drawers([("drawer",)], high, split) + doors(layout - 5, split, low)


def remote(rng):
    wide, long = sizes(rng, (0.2, 0.28), (0.6, 0.75))
    rgb = tint(rng, "black", "white", "grey", "blue")
    spots = [(long * 0.42 - i * 0.065, y) for i in range(5) for y in (-0.055, 0, 0.055)]
    base = [box((long, wide, 0.08), (0, 0, 0.04), rgb)]
    base += [cylinder(0.02, 0.02, (x, y, 0.085), tint(rng)) for x, y in spots]
    cover = [box((long * 0.36, wide * 0.9, 0.02), (0, 0, 0.01), shade(rgb, 0.8))]
    cover += [box((0.025, wide * 0.6, 0.05), (0.03, 0, 0.04), shade(rgb, 0.6))]  # the ridge one presses against
    at = (-long * 0.3, 0, 0.08)
    return base, [slide("battery cover", at, (-1, 0, 0), 0.22, cover, "push back", primitive="push")]


def bottle(rng):
    radius, tall = sizes(rng, (0.14, 0.2), (0.45, 0.6))
    rgb = tint(rng, "green", "blue", "white", "brown", "red")
    base = [cylinder(radius, tall, (0, 0, tall / 2), rgb), cylinder(radius * 0.7, 0.06, (0, 0, tall + 0.03), rgb)]
    base += [cylinder(radius * 0.4, 0.1, (0, 0, tall + 0.1), rgb)]
    base += [cylinder(radius * LABEL, tall * 0.3, (0, 0, tall / 2), tint(rng))]
    cap = [cylinder(radius * 0.55, 0.09, (0, 0, 0.045), tint(rng))]
    return base, [slide("cap", (0, 0, tall + 0.13), (0, 0, 1), 0.25, cap, "pull off")]


def folding_chair(rng):
    wide, deep, tall = sizes(rng, (0.42, 0.5), (0.4, 0.46), (0.4, 0.48))
    rgb, frame = tint(rng), pick(rng, METAL, DARK)
    base = [box((0.03, 0.03, tall * 2), (-deep / 2, s * wide / 2, tall), frame) for s in ENDS]
    base += [box((0.03, 0.03, tall), (deep / 2, s * wide / 2, tall / 2), frame) for s in ENDS]
    base += [box((deep, 0.02, 0.02), (0, s * wide / 2, tall / 2), frame) for s in ENDS]
    base += [box((0.03, wide, tall * 0.45), (-deep / 2, 0, tall * 1.75), rgb)]
    seat = [box((deep, wide - 0.04, 0.03), (deep / 2, 0, 0), rgb)]
    return base, [hinge("seat", (-deep / 2 + 0.03, 0, tall), (0, -1, 0), 1.4, seat, "fold up")]


def toaster(rng):
    deep, wide, tall = sizes(rng, (0.28, 0.34), (0.5, 0.6), (0.32, 0.4))
    rgb = tint(rng, "grey", "red", "white", "black", "green")
    base = [box((deep, wide, tall), (0, 0, tall / 2 + 0.02), rgb)]
    base += [box((0.05, wide * 0.75, 0.006), (s * deep * 0.2, 0, tall + 0.022), shade(DARK, 0.5)) for s in ENDS]
    levers = [(0, "lever")] if rng.random() < 0.4 else [(s * wide * 0.25, f"{word} lever") for s, word in LEFT_RIGHT]
    track = METAL if colour_name(rgb) == "black" else DARK
    base += [box((0.004, 0.03, tall * 0.6), (deep / 2 + 0.002, y, tall * 0.55), track) for y, _ in levers]
    knob, travel = [box((0.065, 0.12, 0.045), (0.035, 0, 0), track)], tall * 0.45
    at = [((deep / 2, y, tall * 0.78), label) for y, label in levers]
    return base, [slide(label, p, (0, 0, -1), travel, knob, "press down", primitive="push") for p, label in at]


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
    base += [cylinder(radius * LABEL, tall * 0.3, (0, 0, tall / 2), tint(rng))]
    pump = [cylinder(0.025, 0.12, (0, 0, 0), METAL)]
    pump += [box((radius * 1.4, 0.07, 0.05), (radius * 0.4, 0, 0.07), shade(rgb, 0.7))]
    pump += [cylinder(0.05, 0.06, (0, 0, 0.07), shade(rgb, 0.7))]
    return base, [slide("pump head", (0, 0, tall + 0.06), (0, 0, 1), 0.25, pump, "pull up")]


# ---------------------------------------------------------------------------------------------------------------------
# Unseen categories


def toilet(rng):
    wide, rgb = rng.uniform(0.36, 0.42), tint(rng, "white", "white", "pink", "grey")
    base = [box((0.2, wide * 1.1, 0.4), (-0.3, 0, 0.55), rgb)]
    base += [box((0.22, wide * 1.15, 0.03), (-0.3, 0, 0.765), shade(rgb, 0.95))]
    base += [cylinder(wide * 0.35, 0.36, (0, 0, 0.18), rgb), cylinder(wide * 0.5, 0.06, (0.05, 0, 0.38), rgb)]
    base += [box((0.25, wide, 0.06), (-0.1, 0, 0.38), rgb), box((0.03, 0.08, 0.02), (-0.19, wide * 0.35, 0.68), METAL)]
    seat = cylinder(wide * 0.5, 0.025, (0.23, 0, 0.0125), shade(rgb, 0.92))
    return base, [top_lid("lid", (-0.18, 0, 0.415), (0.25, wide, 0.025), 1.6, shade(rgb, 0.92), [seat])]


def scissors(rng):
    return crossed_levers(rng, scissors=True)


def table(rng):
    wide, deep, tall, low = sizes(rng, (0.8, 1.0), (0.45, 0.55), (0.5, 0.6), (0.1, 0.15))  # low: height of a drawer
    rgb = tint(rng)
    front_rgb = tint(rng) if rng.random() < 0.35 else shade(rgb, 1.1)
    z, dark = tall - 0.015 - low / 2, shade(rgb, 0.8)
    base = [box((deep, wide, 0.03), (0, 0, tall), rgb), *legs(wide - 0.04, deep - 0.04, tall, 0.05, dark)]
    base += [box((deep - 0.08, 0.02, low), (0, s * (wide / 2 - 0.06), z), dark) for s in ENDS]
    base += [box((0.02, wide - 0.1, low), (-deep / 2 + 0.05, 0, z), dark)]
    rows = (("drawer",), ("left drawer", "right drawer"), ("left drawer", "middle drawer", "right drawer"))
    labels, grip = rows[rng.choice(3, p=[0.4, 0.4, 0.2])], pick(rng, "knob", "bar")
    size = (deep - 0.1, (wide - 0.14) / len(labels), low)
    at = [(deep / 2 - 0.03, size[1] * (i + 0.5 - len(labels) / 2), z) for i in range(len(labels))]
    return base, [drawer(rng, label, size, p, front_rgb, grip) for label, p in zip(labels, at, strict=True)]


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
    more = dict(verb="press down", primitive="push", lower=-0.15)
    return base, [hinge(label, (0.02, y, middle), (0, 1, 0), 0.6, stick, **more) for y, label in at]


def washing_machine(rng):
    wide, deep, tall = sizes(rng, (0.55, 0.65), (0.5, 0.58), (0.75, 0.85))
    rgb, radius, side = tint(rng, "white", "grey", "black"), wide * rng.uniform(0.3, 0.36), pick(rng, *ENDS)
    x, strip = deep / 2, tall - 0.07  # front face; height of the strip of controls
    base = [box((deep, wide, tall), (0, 0, tall / 2), rgb)]
    base += [box((0.01, wide * 0.95, 0.1), (x + 0.005, 0, strip), shade(rgb, 0.85))]
    base += [cylinder(0.035, 0.04, (x + 0.02, wide * 0.1, strip), METAL, "x")]
    base += [box((0.012, 0.12, 0.05), (x + 0.006, wide * 0.3, strip), DARK)]
    ring = cylinder(radius, 0.04, (0.02, -side * radius, 0), METAL, "x")
    glass = cylinder(radius * 0.72, 0.02, (0.05, -side * radius, 0), (0.12, 0.16, 0.22), "x")
    latch = box((0.03, 0.03, 0.1), (0.055, -side * (2 * radius - 0.035), 0), DARK)
    parts = [hinge("door", (x, side * radius, tall * 0.45), (0, 0, side), 1.6, [ring, glass, latch])]
    if rng.random() < 0.6:  # a drawer for the detergent, top left
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


# ---------------------------------------------------------------------------------------------------------------------
# Spare categories and gadgets


def cooker(rng, glass):
    """An oven with hob and, often, a drawer for trays; without glass a dishwasher."""
    wide, deep, tall = sizes(rng, (0.55, 0.65), (0.45, 0.55), (0.65, 0.78))
    rgb, x, strip = tint(rng, "white", "black", "grey", "red"), deep / 2, tall - 0.045
    low = 0.17 if glass and rng.random() < 0.6 else 0.0  # height of the drawer
    high = tall - low - 0.14  # of the door
    base = shell(wide, deep, tall, 0.02, 0.03, rgb) + [box((0.03, wide, 0.13), (x, 0, strip), shade(rgb, 0.8))]
    front = panel((0.035, wide, high), (0, 0, high / 2), rgb) + handle("bar", (0.035, 0, high * 0.9), wide * 0.7, METAL)
    if glass:
        base += [cylinder(0.03, 0.03, (x + 0.025, y * wide, strip), DARK, "x") for y in (-0.35, -0.15, 0.15, 0.35)]
        base += [cylinder(0.08, 0.01, (sx * 0.12, sy * 0.14, tall + 0.025), DARK) for sx in ENDS for sy in ENDS]
        front += [box((0.004, wide * 0.7, high * 0.5), (0.037, 0, high * 0.45), DARK)]
    else:
        base += [box((0.004, wide * 0.3, 0.05), (x + 0.017, 0, strip), DARK)]
    parts = [hinge("door", (x, 0, 0.03 + low), (0, 1, 0), 1.5, front)]
    if low:
        parts.append(drawer(rng, "drawer", (deep - 0.05, wide, low), (x, 0, 0.03 + low / 2), rgb, "bar", 0.035))
    return base, parts


def oven(rng):
    return cooker(rng, glass=True)


def dishwasher(rng):
    return cooker(rng, glass=False)


def window(rng):
    wide, tall = sizes(rng, (0.8, 1.0), (0.6, 0.8))
    rgb, middle, pane_tall = tint(rng, "white", "brown", "grey", "green"), 0.1 + tall / 2, tall - 0.06

    def pane(x, y, z):
        bars = [box((0.03, 0.04, pane_tall), (x, y + s * (wide / 4 - 0.02), z), rgb) for s in ENDS]
        bars += [box((0.03, wide / 2, 0.04), (x, y, z + s * (pane_tall / 2 - 0.02)), rgb) for s in ENDS]
        return [box((0.006, wide / 2, pane_tall), (x, y, z), (0.22, 0.4, 0.75)), *bars]

    base = [box((0.12, wide + 0.06, 0.04), (0, 0, z), shade(rgb, 0.8)) for z in (0.1, 0.1 + tall)]
    base += [box((0.12, 0.04, tall), (0, s * (wide / 2 + 0.01), middle), shade(rgb, 0.8)) for s in ENDS]
    base += [*pane(-0.02, wide / 4, middle), box((0.2, wide * 0.8, 0.08), (0, 0, 0.04), COLOURS["grey"])]
    grip = box((0.07, 0.04, 0.18), (0.045, -wide / 4 + 0.04, 0), DARK)
    return base, [slide("sash", (0.02, -wide / 4, middle), (0, 1, 0), wide * 0.45, [*pane(0, 0, 0), grip], "slide")]


# Turns that carry what is built on a front (+x) to another face of a body.
FACES = {
    "front": np.eye(3),
    "top": np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]]),
    "right": np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]),
    "left": np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]),
}
QUARTER = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # quarter turn in the plane of the front: +y goes to +z


def moved(part: Part, turn: np.ndarray, by=(0.0, 0.0, 0.0)) -> Part:
    """The part turned about the origin, then moved by `by`, metres."""
    part.origin, part.axis = tuple((turn @ part.origin + by).tolist()), tuple((turn @ part.axis + 0.0).tolist())
    part.shapes = [turned(s, turn) for s in part.shapes]
    return part


def gadget_part(rng, kind, label, wide, tall, deep, rgb, upright):
    """A part on a front of wide x tall x deep, centred on the origin. upright: the front will not become a top."""
    hardware, thick = pick(rng, METAL, DARK, tint(rng)), rng.uniform(0.02, 0.06)
    if kind == "drawer":
        grip = pick(rng, "knob", "bar", "recess")
        return drawer(rng, label, (deep * 0.7, wide, tall), (0, 0, 0), rgb, grip, thick)
    if kind in ("door", "flap", "lid", "bar"):
        # A door hinged at the right, turned by quarters: flaps are hinged above or below, lids and bars anywhere.
        quarters = pick(rng, *{"door": (0, 2), "flap": (1, 3)}.get(kind, range(4)))
        across, along = (tall, wide) if quarters % 2 else (wide, tall)
        along = min(along, rng.uniform(0.08, 0.16)) if kind == "bar" else along
        grip = "none" if kind == "bar" else pick(rng, "knob", "bar", "upright bar", "lever", "none")
        part = side_door(rng, label, 1, (thick, across, along), (0, 0, 0), rgb, grip)
        part.verb = "swing out" if kind == "bar" else "open"
        return moved(part, np.linalg.matrix_power(QUARTER, quarters))
    if kind in ("cap", "lift-off lid"):
        small, high = min(wide, tall) * rng.uniform(0.5, 0.95), rng.uniform(0.08, 0.25) if kind == "cap" else thick
        at = (high / 2, 0, 0)
        shapes = [pick(rng, cylinder(small / 2, high, at, rgb, "x"), box((high, small, small), at, rgb))]
        if kind != "cap":
            shapes += [cylinder(0.02, 0.05, (high + 0.025, 0, 0), hardware, "x")]
            shapes += [cylinder(0.05, 0.025, (high + 0.05, 0, 0), hardware, "x")]
        verb = "pull off" if kind == "cap" else "lift"
        return slide(label, (0, 0, 0), (1, 0, 0), rng.uniform(0.2, 0.3), shapes, verb)
    if kind == "lever":
        long, thick = sizes(rng, (0.15, 0.28), (0.05, 0.09))
        shapes = [box((long, thick, thick), (long / 2, 0, 0), rgb), sphere(thick * 0.8, (long, 0, 0), hardware)]
        if upright and rng.random() < 0.5:
            more = dict(lower=rng.uniform(-0.3, -0.1), primitive="push")
            return hinge(label, (0, 0, 0), (0, 1, 0), 0.6, shapes, "press down", **more)
        axis = pick(rng, (0, 1, 0), (0, 0, 1))
        return hinge(label, (0, 0, 0), axis, 0.9, shapes, "turn", lower=-0.9, start=0.0, both_ways=True)
    quarters = pick(rng, *range(4))  # a slider, towards any of the four sides
    track, size = tall if quarters % 2 else wide, sizes(rng, (0.06, 0.13), (0.06, 0.12), (0.08, 0.16))
    block = [box(size, (size[0] / 2, 0, 0), rgb)]
    part = slide(label, (0.01, -track * 0.3, 0), (0, 1, 0), max(0.12, track * 0.55), block, "slide")
    return moved(part, np.linalg.matrix_power(QUARTER, quarters))


def gadget(rng):
    """A random body with one to three movable parts on random faces, like no category in particular."""
    wide, deep, tall, bottom = sizes(rng, (0.2, 0.9), (0.2, 0.7), (0.18, 0.9), (0.03, 0.08))
    rgb, round_body, bottom = tint(rng), rng.random() < 0.25, bottom * (rng.random() < 0.5)
    deep, middle = wide if round_body else deep, bottom + tall / 2
    body = cylinder(wide / 2, tall, (0, 0, middle), rgb) if round_body else box((deep, wide, tall), (0, 0, middle), rgb)
    base = [body, *(legs(wide * 0.7, deep * 0.7, bottom, 0.05, DARK) if bottom else [])]
    faces = {  # centre, width, height, depth of the body behind it
        "front": ((deep / 2, 0, middle), wide, tall, deep),
        "top": ((0, 0, bottom + tall), wide, deep, tall),
        "right": ((0, wide / 2, middle), deep, tall, wide),
        "left": ((0, -wide / 2, middle), deep, tall, wide),
    }
    on_side = ("cap", "lever") if round_body else ("drawer", "door", "flap", "cap", "lever", "slider", "bar")
    on_top = ("lid", "lid", "lift-off lid", "cap", "lever", "slider", "bar")
    for _ in range(rng.integers(4)):  # lumps that mean nothing, partly inside the body: nobody may rely on plain boxes
        size, at = np.array(sizes(rng, *[(0.04, 0.3)] * 3)), (deep / 2, wide / 2, tall / 2) * rng.uniform(-1, 1, 3)
        at = at + (0, 0, middle + size[2] / 2)
        lump = pick(rng, box(size, at, tint(rng)), cylinder(size[0] / 2, size[1], at, tint(rng), pick(rng, *"xyz")))
        base.append(lump)
    order = [*rng.permutation(["front", "top"]), *rng.permutation(["right", "left"])]
    wanted, parts, used = int(rng.choice([1, 2, 3], p=[0.36, 0.42, 0.22])), [], set()
    wanted = min(wanted, len(on_side))  # every face gets a kind of its own, so that the labels differ
    pair = wanted > 1 and not round_body and rng.random() < 0.5
    for face in order[: wanted - pair]:
        centre, across, up, behind = faces[face]
        kind = pick(rng, *[k for k in (on_top if face == "top" else on_side) if k.split()[-1] not in used])
        word = kind.split()[-1]
        used.add(word)
        part_rgb = tint(rng) if rng.random() < 0.5 else shade(rgb, pick(rng, 0.75, 1.2))
        if pair and not parts:  # two of a kind, side by side or one above (on a top: behind) the other
            if across >= up:
                across /= 2
                cells = [(s * across / 2, 0, f"{side} {word}") for s, side in LEFT_RIGHT]
            else:
                up, names = up / 2, ("bottom", "top") if face == "front" else ("front", "back")
                cells = [(0, s * up / 2, f"{side} {word}") for s, side in zip(ENDS, names, strict=True)]
        else:
            room, (across, up) = (across, up), (across, up) * rng.uniform(0.55, 0.97, 2)
            across *= 0.5 if round_body and face != "top" else 1
            shift = (np.array(room) - (across, up)) / 2 * rng.uniform(-1, 1, 2) * (not round_body)
            cells = [(*shift, word)]
        for y, z, label in cells:
            part = gadget_part(rng, kind, label, across, up, behind, part_rgb, face != "top")
            parts.append(moved(part, FACES[face], FACES[face] @ (0.002, y, z) + centre))
    return base, parts


# ---------------------------------------------------------------------------------------------------------------------
# The whole

BUILDERS = {
    "Safe": safe, "Door": door, "Display": display, "Refrigerator": refrigerator, "Laptop": laptop, "Lighter": lighter,
    "Microwave": microwave, "Mouse": mouse, "Box": box_with_flaps, "TrashCan": trash_can, "KitchenPot": kitchen_pot,
    "Suitcase": suitcase, "Pliers": pliers, "StorageFurniture": storage_furniture, "Remote": remote, "Bottle": bottle,
    "FoldingChair": folding_chair, "Toaster": toaster, "Lamp": lamp, "Dispenser": dispenser, "Toilet": toilet,
    "Scissors": scissors, "Table": table, "Stapler": stapler, "Kettle": kettle, "USB": usb, "Switch": switch,
    "WashingMachine": washing_machine, "Faucet": faucet, "Phone": phone, "Oven": oven, "Dishwasher": dishwasher,
    "Window": window, GADGET: gadget,
}  # fmt: skip


def make_object(category: str, rng: np.random.Generator) -> ObjectSpec:
    """A random instance of a category; the same state of rng gives the same object.

    Raises: ValueError for a category that is not in SEEN, UNSEEN, SPARE or GADGET.
    """
    if category not in BUILDERS:
        raise ValueError(f"unknown category {category!r}; choose one of {', '.join(sorted(BUILDERS))}")
    base, parts = BUILDERS[category](rng)
    for i, part in enumerate(parts):
        part.name = f"part_{i}"
    return ObjectSpec(category, base, parts)


def main():
    for split, names in (("seen", SEEN), ("unseen", UNSEEN), ("spare", SPARE), ("training", (GADGET,))):
        for category in names:
            for seed in range(3):
                spec = make_object(category, np.random.default_rng(seed))
                parts = ", ".join(f"{p.verb} the {p.label}" for p in spec.parts)
                print(f"{category:17s} {split:8s} {body_colour(spec):7s} {parts}")


if __name__ == "__main__":
    main()
