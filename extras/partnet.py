"""The user's own articulated objects, in PartNet-Mobility's layout, converted to the conventions of this simulator.

    DIR/45261/mobility.urdf            links, joints, meshes
    DIR/45261/textured_objs/*.obj      the meshes (and .mtl with their colours)
    DIR/45261/semantics.txt            optional, one line per link: "link_1 hinge door", "link_0 slider drawer"
    DIR/45261/meta.json                optional: "model_cat" is the object's category

    mobility.urdf -> read_object -> UserObject(spec, meshes) -> to_urdf -> ObjectScene.spawn("objects/45261", seed)

Pitfalls of the layout, and how each is handled:
* links are numbered through fixed joints too      -> fixed links are merged into their parents: link i = part i
* a root joint turns y-up meshes, the front is -x  -> poses are multiplied out and the object is turned: the front is +x
* sizes are relative to a sphere                   -> scaled to a diagonal of 1 m, slides too, like our own objects
* no masses                                        -> 1 kg and 0.02 kg m^2 for every part, as in the catalogue
* collision hulls fill the inside of a cabinet     -> the visible mesh itself is the collision shape (concave)
* colours are in the .mtl files                    -> loaded with URDF_USE_MATERIAL_COLORS_FROM_MTL
* a joint on a part that already moves (the handle of a door) is held fixed: one motion per part. So is a joint with
  almost no range. A "continuous" joint gets one turn and may move either way.
A joint's lower limit is its closed state and positive motion opens it, as in ManipLLM's data (arXiv 2312.16217).

Every problem with a folder raises one ValueError that names the file and field. Tested on hand-made folders in this
layout; PartNet-Mobility itself may not be redistributed.
"""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from common.files import read_json, read_text
from sim import objects
from sim.objects import COLUMN, ROW, ObjectSpec, Part, Shape, box, roll_pitch_yaw, rotation
from sim.scene import Scene, need_pybullet, p

PREFIX = "objects/"  # of an object's name wherever catalogue categories are accepted too
DIAGONAL_M = 1.0  # of the bounding box, after scaling
LEAST_RANGE = 0.02  # rad, or m after scaling: a joint that moves less cannot succeed and is held fixed
MAX_PARTS = 127  # PyBullet keeps the state of at most this many links per body
TURN = np.diag((-1.0, -1.0, 1.0, 1.0))  # half a turn about z: the front faces -x in the file and +x in the world
GREY = (0.5, 0.5, 0.5)
JOINT_TYPES = ("revolute", "prismatic", "continuous", "fixed")
NAME = re.compile(r"[\w .&'()-]{1,60}", re.ASCII)  # of a category, since it is printed in tables
# word of semantics.txt -> verb of the instruction; all others are opened
VERBS = {"button": "press down", "key": "press down"} | dict.fromkeys(("knob", "lever", "switch", "wheel"), "turn")
APART = 0.1  # share of the diagonal by which parts must be apart to be called "top" or "left"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass
class Mesh:
    """One visual: turn @ (scale * vertex) + offset is a point in the world at joint value 0, metres."""

    path: Path  # .obj file
    scale: np.ndarray  # (3,) along the mesh's own axes
    turn: np.ndarray  # (3, 3) rotation
    offset: np.ndarray  # (3,) metres
    points: np.ndarray  # (n, 3) its vertices in the world


@dataclass
class UserObject:
    """spec: as in the catalogue, with a box around every mesh; meshes[0]: the base's, meshes[1 + i]: part i's."""

    spec: ObjectSpec
    meshes: list[list[Mesh]]
    held: int = 0  # number of movable joints held fixed: their parent already moves, or they move too little


def read_obj(path: Path) -> np.ndarray:
    """The vertices (n, 3) used by the faces of an .obj file, in file order. Raises: ValueError naming file and line,
    also for a face whose vertex is missing and for faces without area."""
    vertices, faces, triangles = [], [], []
    counts = {"v": 0, "vt": 0, "vn": 0}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        word, *rest = line.split() or [""]
        try:
            if word == "v":
                vertices.append([float(value) for value in rest[:3]])
                if len(rest) < 3 or not np.isfinite(vertices[-1]).all():
                    raise ValueError("a vertex needs three finite numbers")
            if word in counts:
                counts[word] += 1
            elif word == "f":
                corners = [[int(index) if index else None for index in corner.split("/")] for corner in rest]
                if len(rest) < 3 or any(corner[0] is None or len(corner) > 3 for corner in corners):
                    raise ValueError("a face needs three corners, each v, v/vt, v//vn or v/vt/vn")
                faces.append((number, corners, dict(counts)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    for number, corners, so_far in faces:
        for corner in corners:
            for kind, index in zip(counts, corner, strict=False):
                if index is not None and not (1 <= index <= counts[kind] or -so_far[kind] <= index <= -1):
                    raise ValueError(f"{path}, line {number}: there is no {kind} {index}")
        first, *others = (i - 1 if i > 0 else so_far["v"] + i for i, *_ in corners)  # a negative index counts back
        triangles += [(first, *pair) for pair in zip(others, others[1:], strict=False)]
    if not faces:
        raise ValueError(f"{path}: no faces")
    points = np.array(vertices)
    a, b, c = points[np.array(triangles).T]
    if not np.cross(b - a, c - a).any():
        raise ValueError(f"{path}: the faces have no area")
    return points[np.unique(triangles)]


def _numbers(element, name: str, default: str, where: str) -> np.ndarray:
    """The finite numbers of an attribute, as many as in `default`. Raises: ValueError that says where."""
    text = default if element is None else element.get(name, default)
    count = len(default.split())
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError:
        values = np.array([])
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{where}: {name}={text[:80]!r} must be {count} finite numbers")
    return values


def _origin(element, where: str) -> np.ndarray:
    """(4, 4) pose of an element's <origin>."""
    origin = element.find("origin")
    pose = np.eye(4)
    pose[:3, :3] = rotation(_numbers(origin, "rpy", "0 0 0", where))
    pose[:3, 3] = _numbers(origin, "xyz", "0 0 0", where)
    return pose


def read_semantics(path: Path) -> dict[str, str]:
    """Link name -> what people call it ("rotation_door" -> "door"), from semantics.txt; {} where there is none."""
    names = {}
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else (), 1):
        words = line.split()
        if words and (len(words) != 3 or not NAME.fullmatch(words[2])):
            raise ValueError(f"{path}, line {number}: expected LINK JOINT NAME, got {line[:80]!r}")
        if words:
            names[words[0]] = (words[2].replace("_", " ").split() or ["part"])[-1].lower()
    return names


def read_category(path: Path) -> str:
    """ "model_cat" of meta.json; "Object" where there is none."""
    name = read_json(path, dict).get("model_cat") if path.exists() else "Object"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f'{path}: "model_cat" must be a name of at most 60 letters, digits, spaces and -_.')
    return name


def read_object(folder: Path) -> UserObject:
    """The object in `folder`, in world conventions. Raises: ValueError naming the file and what is wrong with it."""
    path = folder / "mobility.urdf"
    try:
        robot = ElementTree.fromstring(read_text(path))
        names = read_semantics(folder / "semantics.txt")
        category = read_category(folder / "meta.json")
    except (ElementTree.ParseError, RecursionError) as error:
        raise ValueError(f"{path}: not XML ({error})") from None
    links = {link.get("name"): link for link in robot.findall("link")}
    (root, *order), joints = _joints(robot, links, path)
    pose = {root: TURN.copy()}  # of every link at joint value 0
    for name in order:
        parent, joint, where = joints[name]
        pose[name] = pose[parent] @ _origin(joint, where)
    meshes = {name: _meshes(links[name], pose[name], folder) for name in (root, *order)}
    size = _fit([mesh for group in meshes.values() for mesh in group], pose, path)

    # Link -> the part it belongs to (None: the base) and that part's meshes.
    owner = {root: (None, meshes[root])}
    moving, held = [], 0
    for name in order:
        parent, joint, where = joints[name]
        owner[name] = owner[parent]
        limits = _limits(joint, size, where)
        if limits and owner[parent][0] is None and limits[1] - limits[0] >= LEAST_RANGE:
            owner[name] = (_part(joint, pose[name], limits, where), [])
            moving.append(owner[name])
        else:
            held += limits is not None
        part, group = owner[name]
        group += meshes[name]
        if part is not None:
            part.label = part.label or names.get(name, "")
    found = [(part, group) for part, group in moving if group]  # a joint that carries nothing visible is not a part
    if not found:
        least = f" that moves at least {LEAST_RANGE} rad or m" if held else ""
        raise ValueError(f"{path}: no movable joint" + (" with a mesh" if moving else least))
    if len(found) > MAX_PARTS:
        raise ValueError(f"{path}: {len(found)} movable parts; PyBullet takes at most {MAX_PARTS}")
    for part, group in found:
        part.shapes = [_box_around(mesh, part.origin) for mesh in group]
    _name_parts([part for part, _ in found])
    spec = ObjectSpec(category, [_box_around(mesh, (0, 0, 0)) for mesh in meshes[root]], [part for part, _ in found])
    return UserObject(spec, [meshes[root], *(group for _, group in found)], held)


def _joints(robot, links: dict, path: Path) -> tuple[list[str], dict[str, tuple]]:
    """The links from the root outwards; child link -> (parent link, joint, its name in error messages)."""
    joints, children = {}, defaultdict(list)
    for joint in robot.findall("joint"):
        where = f"{path}, joint {joint.get('name')}"
        parent, child = (getattr(joint.find(tag), "attrib", {}).get("link") for tag in ("parent", "child"))
        for name in (parent, child):
            if name not in links:
                raise ValueError(f"{where}: there is no link {name}")
        if child in joints:
            raise ValueError(f"{where}: link {child} has two parents")
        if joint.get("type") not in JOINT_TYPES:
            raise ValueError(f"{where}: type {joint.get('type')!r} is none of {', '.join(JOINT_TYPES)}")
        joints[child] = (parent, joint, where)
        children[parent].append(child)
    order = [name for name in links if name not in joints]
    if len(order) != 1:
        raise ValueError(f"{path}: {len(order)} links without a parent; there must be one")
    for name in order:  # grows during the loop
        order += children[name]
    if len(order) < len(links):
        raise ValueError(f"{path}: the link {next(name for name in links if name not in order)} hangs on itself")
    return order, joints


def _meshes(link, pose: np.ndarray, folder: Path) -> list[Mesh]:
    """The visuals of a link, before scaling. pose: (4, 4), of the link in the world."""
    meshes, where = [], f"{folder / 'mobility.urdf'}, link {link.get('name')}"
    for visual in link.findall("visual"):
        mesh = visual.find("geometry/mesh")
        if mesh is None or not mesh.get("filename"):
            raise ValueError(f"{where}: only <mesh filename=...> can be read")
        name = f"{where}: the mesh {mesh.get('filename')[:200]}"
        try:
            path = (folder / mesh.get("filename")).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise ValueError(f"{name} is outside {folder}")
            if path.suffix.lower() != ".obj" or not path.is_file():
                raise ValueError(f"{name} is missing or not an .obj file")
        except (OSError, RuntimeError) as error:  # a name that is too long, a symbolic link to itself
            raise ValueError(f"{name} cannot be read ({type(error).__name__})") from None
        placed = pose @ _origin(visual, where)
        scale = _numbers(mesh, "scale", "1 1 1", where)
        points = (read_obj(path) * scale) @ placed[:3, :3].T + placed[:3, 3]
        meshes.append(Mesh(path, scale, placed[:3, :3], placed[:3, 3], points))
    return meshes


def _fit(meshes: list[Mesh], pose: dict[str, np.ndarray], path: Path) -> float:
    """Centres meshes and poses in the world and scales them to its size; returns the scale factor."""
    if not meshes:
        raise ValueError(f"{path}: no meshes")
    points = np.concatenate([mesh.points for mesh in meshes])
    low, high = points.min(0), points.max(0)
    if np.linalg.norm(high - low) < 1e-9:
        raise ValueError(f"{path}: the meshes have no size")
    size = DIAGONAL_M / np.linalg.norm(high - low)
    middle = (low + high) / 2
    for mesh in meshes:
        mesh.points = size * (mesh.points - middle)
        mesh.offset = size * (mesh.offset - middle)
        mesh.scale = size * mesh.scale
    for place in pose.values():
        place[:3, 3] = size * (place[:3, 3] - middle)
    return float(size)


def _limits(joint, size: float, where: str) -> tuple[float, float] | None:
    """(lower, upper), rad or m after scaling; None for a joint that does not move."""
    kind, limit = joint.get("type"), joint.find("limit")
    if kind == "fixed":
        return None
    if kind == "continuous":
        return -math.pi, math.pi
    if limit is None:
        raise ValueError(f"{where}: a {kind} joint needs a <limit>")
    factor = size if kind == "prismatic" else 1.0
    lower, upper = (factor * float(_numbers(limit, name, "0", where)[0]) for name in ("lower", "upper"))
    if lower > upper:
        raise ValueError(f"{where}: its lower limit {lower:g} is above its upper limit {upper:g}")
    return (lower, upper) if upper > lower else None


def _part(joint, pose: np.ndarray, limits: tuple[float, float], where: str) -> Part:
    """The part that this joint moves, with no label, verb or shapes yet."""
    axis = pose[:3, :3] @ _numbers(joint.find("axis"), "xyz", "1 0 0", where)
    if np.linalg.norm(axis) < 1e-6:
        raise ValueError(f"{where}: the axis has no length")
    axis = tuple((axis / np.linalg.norm(axis)).tolist())
    kind = "prismatic" if joint.get("type") == "prismatic" else "revolute"
    return Part("", kind, tuple(pose[:3, 3].tolist()), axis, *limits, [], both_ways=joint.get("type") == "continuous")


def _box_around(mesh: Mesh, origin: tuple) -> Shape:
    """A box around a mesh, in the frame of its part."""
    low, high = mesh.points.min(0), mesh.points.max(0)
    return box((high - low).tolist(), ((low + high) / 2 - origin).tolist(), GREY)


def _name_parts(parts: list[Part]) -> None:
    """Gives the parts labels and verbs, from their semantic names or else from what such a joint usually moves."""
    for part in parts:
        usual = "door" if abs(part.axis[2]) > math.sqrt(0.5) else "lid"
        part.label = part.label or ("drawer" if part.joint == "prismatic" else usual)
        part.verb = VERBS.get(part.label, "open")
        part.both_ways = part.both_ways or part.verb == "turn"
    centres = [np.mean([shape.xyz for shape in part.shapes], 0) + part.origin for part in parts]
    for part, label in zip(parts, labels([part.label for part in parts], centres), strict=True):
        part.label = label


def labels(kinds: list[str], centres: list[np.ndarray]) -> list[str]:
    """A unique label for every part: "door"; "top drawer", "bottom drawer"; "left door"; else "first key" ...

    Args: kinds: one word per part. centres: (3,) each, metres, world: z up, y to the right of a viewer in front."""
    out = list(kinds)
    for kind in set(kinds):
        same = [i for i, other in enumerate(kinds) if other == kind]
        if len(same) == 1:
            continue
        down, right = [-centres[i][2] for i in same], [centres[i][1] for i in same]
        for along, words in ((down, COLUMN.get(len(same))), (right, ROW.get(len(same)))):
            if words and np.diff(sorted(along)).min() > APART * DIAGONAL_M:
                order = np.argsort(along)
                break
        else:  # line by line from the top left
            words = [ORDINALS[k] if k < len(ORDINALS) else f"number {k + 1}" for k in range(len(same))]
            order = np.lexsort([right, np.round(down, 2)])
        for word, k in zip(words, order, strict=True):
            out[same[k]] = f"{word.strip()} {kind}"
    return out


def to_urdf(thing: UserObject, mass: float, inertia: float) -> str:
    """URDF text as in sim.objects.to_urdf, with the meshes themselves as visible and collision shapes."""
    bodies = []
    for group, origin in zip(thing.meshes, [(0, 0, 0), *(part.origin for part in thing.spec.parts)], strict=True):
        bodies.append([])
        for mesh in group:
            values = (mesh.scale, mesh.offset - origin, roll_pitch_yaw(mesh.turn))
            scale, at, rpy = (" ".join(f"{x:.9g}" for x in vector) for vector in values)
            element = ElementTree.Element("mesh", filename=str(mesh.path), scale=scale)
            shape = ElementTree.tostring(element, encoding="unicode")
            body = f'<origin xyz="{at}" rpy="{rpy}"/><geometry>{shape}</geometry>'
            bodies[-1] += [f"<visual>{body}</visual>", f'<collision concave="yes">{body}</collision>']
    return objects.to_urdf(thing.spec, mass, inertia, bodies)


def _folders(directory: str) -> dict[str, Path]:
    """Name -> folder: `directory` holds one folder per object, or is itself an object's folder."""
    top = Path(directory)
    try:
        folders = [top] if (top / "mobility.urdf").exists() else sorted(d for d in top.iterdir() if d.is_dir())
    except OSError as error:
        raise ValueError(f"--objects {directory}: {error.strerror}") from None
    return {PREFIX + folder.name: folder for folder in folders}


def find_objects(directory: str) -> tuple[list[str], dict[str, str], dict[str, int]]:
    """Names, for ObjectScene.spawn, of the usable objects in `directory`; {folder: what is wrong} for the rest; and
    {name: number of its joints held fixed}. Raises: ValueError when nothing is usable."""
    need_pybullet()
    usable, bad = {}, {}
    for name, folder in _folders(directory).items():
        try:
            usable[name] = read_object(folder).held
        except ValueError as error:
            bad[folder.name] = str(error)
    if not usable:
        why = "; ".join(bad.values()) or "it has no folders"
        raise ValueError(f"--objects {directory}: none of {len(bad)} objects can be used: {why}")
    return list(usable), bad, {name: held for name, held in usable.items() if held}


class ObjectScene(Scene):
    """A Scene that knows the user's objects as well as the catalogue: spawn("objects/45261", seed).

    .category is the object's own ("model_cat" of its meta.json); .object is the name it was spawned by."""

    def __init__(self, directory: str, image_size: int = 128):
        super().__init__(image_size)
        self._folders = _folders(directory)
        self._read = cache(read_object)

    def make(self, category: str, seed: int) -> tuple[ObjectSpec, str, int]:
        if category not in self._folders:
            return super().make(category, seed)
        thing = self._read(self._folders[category])
        urdf = to_urdf(thing, self.physics.mass_kg, self.physics.inertia)
        return thing.spec, urdf, p.URDF_USE_MATERIAL_COLORS_FROM_MTL  # otherwise everything is white

    def spawn(self, category: str, seed: int, part: int | None = None) -> "ObjectScene":
        """As Scene.spawn. Raises: ValueError also for a user's object that PyBullet cannot load."""
        try:
            super().spawn(category, seed, part)
        except p.error as error:
            raise ValueError(f"{category}: PyBullet cannot load it ({error})") from None
        if category in self._folders:
            self.textures = {}  # the meshes have their own colours
        self.object, self.category = category, self.spec.category
        return self
