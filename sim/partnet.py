"""A user's own articulated objects, in PartNet-Mobility's layout, made to fit the world.

    DIR/45261/mobility.urdf            links, joints, meshes
    DIR/45261/textured_objs/*.obj      the meshes (and .mtl with their colours)
    DIR/45261/semantics.txt            optional, a line a link: "link_1 hinge door", "link_0 slider drawer"
    DIR/45261/meta.json                optional: "model_cat" is the object's category

    mobility.urdf -> read_object -> UserObject(spec, meshes) -> to_urdf -> ObjectScene.spawn("objects/45261", seed)

The layout's pitfalls, and what happens to each:
* links are numbered through fixed joints too      -> fixed links are merged into what carries them: link i = part i
* a root joint turns y-up meshes, the front is -x  -> poses are multiplied out, and the object turned: the front is +x
* sizes are in units of a sphere                   -> scaled to a diagonal of 1 m, slides too, as our own objects are
* no masses                                        -> 1 kg and 0.02 kg m^2 for every part, as in the catalogue
* collision hulls fill a cabinet's inside          -> the visible mesh itself is the collision shape (concave)
* colours are in the .mtl files                    -> loaded with URDF_USE_MATERIAL_COLORS_FROM_MTL
* a joint on a part that moves itself (the handle of a door) is held fixed: one motion a part. Joints without range are
  fixed too; a "continuous" joint gets one turn and may move either way.
A joint's lower limit is its closed state and positive motion opens it, as in ManipLLM's data (arXiv 2312.16217).

Whatever is wrong with a folder is said in one ValueError that names file and field: a mesh path that leaves the folder,
a face without its vertex (which would crash the simulator), a link that nothing carries, no movable joint.
Tested on hand-made folders in this layout; PartNet-Mobility itself may not be redistributed.
"""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sim.objects import ObjectSpec, Part, Shape, rotation
from sim.scene import Scene, p

PREFIX = "objects/"  # of an object's name where the catalogue's categories are named too
DIAGONAL_M = 1.0  # of the bounding box, after scaling
TURN = rotation((0.0, 0.0, math.pi))  # the front faces -x in the file and +x in the world
GREY = (0.5, 0.5, 0.5)
JOINT_TYPES = ("revolute", "prismatic", "continuous", "fixed")
# words of semantics.txt -> verb of the instruction; the rest is opened
VERBS = {"button": "press down", "key": "press down"} | dict.fromkeys(("knob", "lever", "switch", "wheel"), "turn")
APART = 0.1  # two parts are told apart by "top" or "left" when they lie so far apart, as a share of the diagonal
DOWN, RIGHT = (
    {2: ("top", "bottom"), 3: ("top", "middle", "bottom")},
    {2: ("left", "right"), 3: ("left", "middle", "right")},
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass
class Mesh:
    """One visual: turn @ (scale * vertex) + offset is a point in the frame of its part (or of the base)."""

    path: Path  # .obj file
    scale: np.ndarray  # (3,) along the mesh's own axes
    turn: np.ndarray  # (3, 3) rotation
    offset: np.ndarray  # (3,) metres
    points: np.ndarray  # (n, 3) its vertices in the world at joint value 0, metres


@dataclass
class UserObject:
    """spec: as the catalogue's, a box around every mesh; meshes[0] the base's, meshes[1 + i] those of part i."""

    spec: ObjectSpec
    meshes: list[list[Mesh]]
    held: int = 0  # joints that could move but are fixed, because what carries them moves


# --------------------------------------------------------------------------------------------------------------- files


def read_obj(path: Path) -> np.ndarray:
    """Vertices (n, 3) of an .obj file. Raises: ValueError naming file and line, also for a face without its vertex."""
    vertices, counts, corners = [], {"v": 0, "vt": 0, "vn": 0}, []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        word, *rest = line.split() or [""]
        try:
            if word == "v":
                vertices.append([float(value) for value in rest[:3]])
                if len(rest) < 3 or not np.isfinite(vertices[-1]).all():
                    raise ValueError("a vertex needs three finite numbers")
            if word in counts:
                counts[word] += 1
            elif word == "f":
                if len(rest) < 3:
                    raise ValueError("a face needs three corners")
                indices = [[int(index) if index else None for index in corner.split("/")] for corner in rest]
                if any(corner[0] is None or len(corner) > 3 for corner in indices):
                    raise ValueError("a corner is v, v/vt, v//vn or v/vt/vn")
                so_far = dict(counts)
                corners += [(number, corner, so_far) for corner in indices]
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    for number, corner, so_far in corners:
        for kind, index in zip(counts, corner, strict=False):  # a negative index counts back from the line it is in
            if index is not None and not (1 <= index <= counts[kind] or -so_far[kind] <= index <= -1):
                raise ValueError(f"{path}, line {number}: there is no {kind} {index}")
    if not corners:
        raise ValueError(f"{path}: no faces")
    return np.array(vertices)


def _numbers(element, name: str, default: str, count: int, where: str) -> np.ndarray:
    """`count` finite numbers of an attribute. Raises: ValueError that says where."""
    text = default if element is None else element.get(name, default)
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError:
        values = np.array([])
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{where}: {name}={text!r} must be {count} finite numbers")
    return values


def _origin(element, where: str) -> np.ndarray:
    """(4, 4) pose of an element's <origin>."""
    origin, pose = element.find("origin"), np.eye(4)
    pose[:3, :3] = rotation(_numbers(origin, "rpy", "0 0 0", 3, where))
    pose[:3, 3] = _numbers(origin, "xyz", "0 0 0", 3, where)
    return pose


def _attribute(element, tag: str, name: str, where: str) -> str:
    child = element.find(tag)
    if child is None or not child.get(name):
        raise ValueError(f"{where}: <{tag} {name}=...> is missing")
    return child.get(name)


def read_semantics(path: Path) -> dict[str, str]:
    """Link name -> what people call it ("rotation_door" -> "door"), from semantics.txt; {} where there is none."""
    names = {}
    if path.exists():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.split()
            if words and len(words) != 3:
                raise ValueError(f"{path}, line {number}: expected LINK JOINT NAME, got {line!r}")
            if words:
                names[words[0]] = (words[2].replace("_", " ").split() or ["part"])[-1].lower()
    return names


def read_category(path: Path) -> str:
    """ "model_cat" of meta.json; "Object" where there is none."""
    if not path.exists():
        return "Object"
    try:
        return str(json.loads(path.read_text())["model_cat"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}: not JSON with "model_cat"') from None


# ------------------------------------------------------------------------------------------------------------- objects


def read_object(folder: Path) -> UserObject:
    """The object in `folder`, in the world's terms. Raises: ValueError naming the file and what is wrong with it."""
    path = folder / "mobility.urdf"
    try:
        robot = ElementTree.parse(path).getroot()
        names, category = read_semantics(folder / "semantics.txt"), read_category(folder / "meta.json")
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not XML ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: cannot be read ({error})") from None
    links = {link.get("name"): link for link in robot.findall("link")}
    joints, children = {}, defaultdict(list)  # child link -> its joint; link -> those it carries
    for joint in robot.findall("joint"):
        where = f"{path}, joint {joint.get('name')}"
        child, parent = _attribute(joint, "child", "link", where), _attribute(joint, "parent", "link", where)
        if child not in links or parent not in links:
            raise ValueError(f"{where}: there is no link {child if child not in links else parent}")
        if child in joints:
            raise ValueError(f"{where}: link {child} has two parents")
        if joint.get("type") not in JOINT_TYPES:
            raise ValueError(f"{where}: type {joint.get('type')!r} is none of {', '.join(JOINT_TYPES)}")
        joints[child] = joint
        children[parent].append(child)
    roots = [name for name in links if name not in joints]
    if len(roots) != 1:
        raise ValueError(f"{path}: {len(roots)} links without a parent; there must be one")

    # From the root outwards: the pose of every link at joint value 0, and which part it belongs to (-1: the base).
    pose, owner, owned = {roots[0]: np.eye(4)}, {roots[0]: -1}, [[roots[0]]]
    pose[roots[0]][:3, :3] = TURN
    movable, held, queue = [], 0, [*roots]
    while queue:
        parent = queue.pop(0)
        for child in children[parent]:
            joint = joints[child]
            where = f"{path}, joint {joint.get('name')}"
            pose[child], owner[child] = pose[parent] @ _origin(joint, where), owner[parent]
            limits = _limits(joint, where)
            if limits and owner[parent] == -1:
                owner[child] = len(movable)
                axis = pose[child][:3, :3] @ _numbers(joint.find("axis"), "xyz", "1 0 0", 3, where)
                if np.linalg.norm(axis) < 1e-6:
                    raise ValueError(f"{where}: the axis has no length")
                movable.append((joint.get("type"), pose[child][:3, 3], axis / np.linalg.norm(axis), limits))
                owned.append([])
            elif limits:
                held += 1
            owned[1 + owner[child]].append(child)
            queue.append(child)
    if len(pose) < len(links):
        raise ValueError(f"{path}: the link {next(name for name in links if name not in pose)} hangs on itself")

    meshes = [[mesh for name in group for mesh in _meshes(links[name], pose[name], folder)] for group in owned]
    kept = [i for i in range(len(movable)) if meshes[1 + i]]  # a joint that carries nothing visible is no part
    if not kept:
        raise ValueError(f"{path}: no movable joint" + (" with a mesh" if movable else ""))
    movable, owned = [movable[i] for i in kept], [owned[1 + i] for i in kept]
    meshes = [meshes[0], *(meshes[1 + i] for i in kept)]
    kinds = [
        next((names[name] for name in group if name in names), _kind(joint[0], joint[2]))
        for group, joint in zip(owned, movable, strict=True)
    ]
    thing = _fit(category, movable, kinds, meshes, path)
    thing.held = held
    return thing


def _limits(joint, where: str) -> tuple[float, float] | None:
    """(lower, upper) in the file's units; None for a joint that does not move."""
    if joint.get("type") == "fixed":
        return None
    if joint.get("type") == "continuous":
        return -math.pi, math.pi
    if joint.find("limit") is None:
        raise ValueError(f"{where}: a {joint.get('type')} joint needs a <limit>")
    lower, upper = (float(_numbers(joint.find("limit"), name, "0", 1, where)[0]) for name in ("lower", "upper"))
    if lower > upper:
        raise ValueError(f"{where}: its lower limit {lower:g} is above its upper limit {upper:g}")
    return (lower, upper) if upper > lower else None


def _meshes(link, pose: np.ndarray, folder: Path) -> list[Mesh]:
    """The visuals of a link whose pose (4, 4) is in the world, before scaling."""
    meshes, where = [], f"{folder / 'mobility.urdf'}, link {link.get('name')}"
    for visual in link.findall("visual"):
        mesh = visual.find("geometry/mesh")
        if mesh is None or not mesh.get("filename"):
            raise ValueError(f"{where}: only <mesh filename=...> can be read")
        path = (folder / mesh.get("filename")).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ValueError(f"{where}: the mesh {mesh.get('filename')} is outside {folder}")
        if path.suffix.lower() != ".obj" or not path.is_file():
            raise ValueError(f"{where}: the mesh {mesh.get('filename')} is missing or not an .obj file")
        placed, scale = pose @ _origin(visual, where), _numbers(mesh, "scale", "1 1 1", 3, where)
        points = (read_obj(path) * scale) @ placed[:3, :3].T + placed[:3, 3]
        meshes.append(Mesh(path, scale, placed[:3, :3], placed[:3, 3], points))
    return meshes


def _fit(category: str, movable: list[tuple], kinds: list[str], meshes: list[list[Mesh]], path: Path) -> UserObject:
    """Moves the object to the middle of the world and scales it; names its parts; boxes around its meshes."""
    points = np.concatenate([mesh.points for group in meshes for mesh in group])
    low, high = points.min(0), points.max(0)
    if np.linalg.norm(high - low) < 1e-9:
        raise ValueError(f"{path}: the meshes have no size")
    size, middle = DIAGONAL_M / np.linalg.norm(high - low), (low + high) / 2
    origins = [np.zeros(3), *(size * (origin - middle) for _, origin, _, _ in movable)]
    shapes, centres = [], []
    for group, origin in zip(meshes, origins, strict=True):
        for mesh in group:
            mesh.points = size * (mesh.points - middle)
            mesh.offset, mesh.scale = size * (mesh.offset - middle) - origin, size * mesh.scale
        boxes = [(mesh.points.min(0), mesh.points.max(0)) for mesh in group]
        shapes.append(
            [Shape("box", tuple(b - a), tuple((a + b) / 2 - origin), (0.0, 0.0, 0.0), GREY) for a, b in boxes]
        )
        centres.append(np.mean([(a + b) / 2 for a, b in boxes], 0) if boxes else np.zeros(3))
    parts = []
    for i, (label, (joint, _, axis, limits)) in enumerate(zip(labels(kinds, centres[1:]), movable, strict=True)):
        slides, verb = joint == "prismatic", VERBS.get(kinds[i], "open")
        lower, upper = (size * limit if slides else limit for limit in limits)
        origin, axis, kind = tuple(origins[1 + i].tolist()), tuple(axis.tolist()), "prismatic" if slides else "revolute"
        part = Part(f"part_{i}", label, kind, origin, axis, lower, upper, shapes[1 + i], verb)
        part.primitive = "push" if verb == "press down" else "pull"
        part.both_ways = joint == "continuous" or verb == "turn"
        parts.append(part)
    return UserObject(ObjectSpec(category, shapes[0], parts), meshes)


def _kind(joint: str, axis: np.ndarray) -> str:
    """A name for a part that semantics.txt does not know: what such a joint mostly is."""
    return "drawer" if joint == "prismatic" else "door" if abs(axis[2]) > math.sqrt(0.5) else "lid"


def labels(kinds: list[str], centres: list[np.ndarray]) -> list[str]:
    """A different label for every part: "door"; "top drawer", "bottom drawer"; "left door"; else "first key" ...

    Args: kinds: a word a part. centres: (3,) each, metres, world: z up, y to the right of somebody in front.
    """
    out = list(kinds)
    for kind in set(kinds):
        same = [i for i, other in enumerate(kinds) if other == kind]
        if len(same) == 1:
            continue
        down, right = [-centres[i][2] for i in same], [centres[i][1] for i in same]
        for along, words in ((down, DOWN.get(len(same))), (right, RIGHT.get(len(same)))):
            if words and np.diff(sorted(along)).min() > APART * DIAGONAL_M:
                order = np.argsort(along)
                break
        else:  # line by line from the top left
            words = [ORDINALS[k] if k < len(ORDINALS) else f"{k + 1}th" for k in range(len(same))]
            order = np.lexsort([right, np.round(down, 2)])
        for word, k in zip(words, order, strict=True):
            out[same[k]] = f"{word} {kind}"
    return out


def to_urdf(thing: UserObject, mass: float, inertia: float) -> str:
    """URDF text: a fixed base and one link a part, in order; mass in kg, inertia in kg m^2 as in sim/objects.py."""

    def link(name: str, meshes: list[Mesh], shapes: list[Shape], link_mass: float) -> list[str]:
        x, y, z = np.mean([shape.xyz for shape in shapes], axis=0) if link_mass else (0.0, 0.0, 0.0)
        lines = [
            f'<link name="{name}"><inertial><origin xyz="{x:.6f} {y:.6f} {z:.6f}"/><mass value="{link_mass:g}"/>'
            f'<inertia ixx="{inertia:g}" iyy="{inertia:g}" izz="{inertia:g}" ixy="0" ixz="0" iyz="0"/></inertial>'
        ]
        for mesh in meshes:
            element = ElementTree.Element(
                "mesh", filename=str(mesh.path), scale=" ".join(f"{s:.9g}" for s in mesh.scale)
            )
            place = '<origin xyz="{:.9g} {:.9g} {:.9g}" rpy="{:.9g} {:.9g} {:.9g}"/>'.format(
                *mesh.offset, *roll_pitch_yaw(mesh.turn)
            )
            body = f"{place}<geometry>{ElementTree.tostring(element, encoding='unicode')}</geometry>"
            lines += [f"<visual>{body}</visual>", f'<collision concave="yes">{body}</collision>']
        return [*lines, "</link>"]

    lines = ['<robot name="object">', *link("base", thing.meshes[0], thing.spec.base, 0.0)]
    for part, meshes in zip(thing.spec.parts, thing.meshes[1:], strict=True):
        lines += link(part.name, meshes, part.shapes, mass)
        lines += [
            f'<joint name="joint_{part.name}" type="{part.joint}"><parent link="base"/><child link="{part.name}"/>',
            '<origin xyz="{:.9g} {:.9g} {:.9g}"/>'.format(*part.origin),
            '<axis xyz="{:.9g} {:.9g} {:.9g}"/>'.format(*part.axis),
            f'<limit lower="{part.lower:.9g}" upper="{part.upper:.9g}" effort="1000" velocity="10"/></joint>',
        ]
    return "\n".join([*lines, "</robot>"])


def roll_pitch_yaw(m: np.ndarray) -> tuple[float, float, float]:
    """Radians, URDF convention, of a rotation (3, 3): the inverse of sim.objects.rotation."""
    pitch = math.asin(np.clip(-m[2, 0], -1, 1))
    if math.hypot(m[0, 0], m[1, 0]) < 1e-6:  # +-90 degrees: roll and yaw turn about the same axis
        return math.atan2(-m[1, 2], m[1, 1]), pitch, 0.0
    return math.atan2(m[2, 1], m[2, 2]), pitch, math.atan2(m[1, 0], m[0, 0])


# --------------------------------------------------------------------------------------------------------------- world


def find_objects(directory: str) -> tuple[list[str], dict[str, str], dict[str, int]]:
    """Names for ObjectScene.spawn of what can be used in `directory`; {folder: what is wrong} of the rest; and
    {name: how many of its joints are held fixed} of those that have such joints.

    `directory` holds one folder an object, or is itself the folder of one. Raises: ValueError when nothing is usable.
    """
    top, good, bad, held = Path(directory), [], {}, {}
    try:
        folders = [top] if (top / "mobility.urdf").exists() else sorted(d for d in top.iterdir() if d.is_dir())
    except OSError as error:
        raise ValueError(f"--objects {directory}: {error.strerror}") from None
    for folder in folders:
        try:
            thing = read_object(folder)
            good.append(PREFIX + folder.name)
            if thing.held:
                held[good[-1]] = thing.held
        except ValueError as error:
            bad[folder.name] = str(error)
    if not good:
        why = "; ".join(bad.values()) or "it has no folders"
        raise ValueError(f"--objects {directory}: none of {len(folders)} objects can be used: {why}")
    return good, bad, held


class ObjectScene(Scene):
    """A Scene that knows the user's objects as well as the catalogue: spawn("objects/45261", seed).

    .category is the object's own ("model_cat" of its meta.json); .object is the name it was spawned by.
    """

    def __init__(self, directory: str, image_size: int = 128):
        top = Path(directory)
        self._folders = {PREFIX + d.name: d for d in ([top] if (top / "mobility.urdf").exists() else top.iterdir())}
        self._read: dict[str, UserObject] = {}
        super().__init__(image_size)

    def make(self, category: str, seed: int) -> ObjectSpec:
        self._thing, self.load_flags = None, 0
        if category not in self._folders:
            return super().make(category, seed)
        if category not in self._read:
            self._read[category] = read_object(self._folders[category])
        self._thing, self.load_flags = self._read[category], p.URDF_USE_MATERIAL_COLORS_FROM_MTL  # else all is white
        return self._thing.spec

    def urdf(self) -> str:
        if self._thing is None:
            return super().urdf()
        return to_urdf(self._thing, self.physics.mass_kg, self.physics.inertia)

    def draw_textures(self):
        super().draw_textures()
        if self._thing is not None:  # has its own
            self.textures = {}

    def spawn(self, category: str, seed: int, part: int | None = None) -> "ObjectScene":
        """As Scene.spawn. Raises: ValueError also for a user's object that PyBullet cannot load."""
        try:
            super().spawn(category, seed, part)
        except p.error as error:
            raise ValueError(f"{category}: PyBullet cannot load it ({error})") from None
        self.object, self.category = category, self.spec.category
        return self
