"""The world: procedural articulated objects in PyBullet, one camera, one suction gripper, an expert that knows them.

    sim/objects.py --URDF--> Scene.spawn -> render -> picture (S, S, 3) + instruction --> a policy
                                                                                              | pixel (u, v), approach
    Outcome(moved, initial, long, reason) <- Scene.interact <- Scene.backproject <------------'

Reading order: Physics (what the gripper can do) -> Scene.spawn (object, joints, camera, light) -> Scene.render and
Scene.backproject (pixel <-> point) -> Scene.interact (what a pull does) -> Scene.expert (a label that works).

Success is a formula. With q the joint of the NAMED part and q0 its start value, `moved = q - q0` in radians or metres,
counted in the instructed sense (|q - q0| where either sense will do):
    initial: moved >= 0.01          long: moved >= min(0.1, half of the range that is left)
0.01 and 0.1 are the thresholds of RoboMamba (arXiv 2406.04339, Sec. 4.3) and ManipLLM (arXiv 2312.16217); the "half of
what is left" keeps parts with a short range possible at all.

Differs from the paper: its simulator is SAPIEN with PartNet-Mobility meshes and a Franka gripper with a suction cup;
here the objects are boxes, cylinders and spheres, and the gripper is only its suction cup: a spring and damper with
three force limits. The limits are what makes the benchmark honest: with an unlimited joint even hinge pixels and
60-degree errors "succeed".
"""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from dataclasses import dataclass

import numpy as np

from sim import objects

_stderr = os.dup(2)
try:  # PyBullet writes its build time to stderr as it loads, which would be the first line of every message
    with open(os.devnull, "w") as _nowhere:
        os.dup2(_nowhere.fileno(), 2)
    import pybullet as p
finally:
    os.dup2(_stderr, 2)
    os.close(_stderr)

# Letters: S image side (pixels) · u, v pixel column and row · f, cx, cy intrinsics (pixels) · q joint value (rad or m).
# Frames: world (x = object front, z = up, metres) and camera (OpenCV: x right, y down, z forward).

BACKGROUND, BASE = -2, -1  # values of Scene.links where no part is; part j has value j
# Dense targets: raster side; unit of relative depth; a part names a cell when it fills more than 0.6 x what is left.
GRID, DEPTH_UNIT_M, EMPTY_WEIGHT = 16, 0.3, 0.6


@dataclass(frozen=True)
class Physics:
    """What the gripper can do and how stiff the joints are. SI units.

    Friction is set relative to the seal and to the part's largest lever arm, so that a pull near the hinge cannot win.
    """

    dt_s: float = 1 / 240
    # the arm: a spring and damper from the moving target to the contact, force clipped at the stall force
    stiffness: float = 2000.0  # N/m
    damping: float = 40.0  # N s/m
    arm_force: float = 40.0  # N
    stroke_m: float = 0.18  # straight, one shot: along -approach (pull) or +approach (push)
    stroke_steps: int = 216
    hold_steps: int = 24
    # the seal: breaks when a limit is passed, split along the surface normal of the moving part
    seal_tension: float = 35.0  # N, along the normal
    seal_shear: float = 28.0  # N, across it; pressing adds `press_shear` of the compression
    press_shear: float = 0.5
    # a push has no seal: it slips beyond push_friction * compression + push_grip
    push_friction: float = 0.8
    push_grip: float = 2.0  # N
    # the cup: a centre ray and a ring of 8 rays along the approach must meet one link
    cup_radius_m: float = 0.008
    cup_depth_m: float = 0.015  # how much unevenness the cup takes
    cup_rays_pull: int = 4  # of 8
    cup_rays_push: int = 3
    clear_m: float = 0.15  # free way needed in front of the contact
    reach_m: float = 0.012  # the centre ray must hit this close to the point
    # the joints
    hinge_friction: tuple = (0.30, 0.45)  # x seal_tension x largest lever arm -> N m
    slide_friction: tuple = (0.40, 0.60)  # x seal_tension -> N
    joint_damping: float = 0.1
    mass_kg: float = 1.0
    inertia: float = 0.02  # kg m^2
    start_open: float = 0.08  # start = closed + U(0, start_open) of the range


@dataclass(frozen=True)
class View:
    """Ranges of the random camera. Wide on purpose: with centred, upright objects a table that never looks succeeds."""

    fov_deg: float = 40.0
    near_m: float = 0.05
    far_m: float = 8.0
    azimuth_deg: tuple = (-180.0, 180.0)
    elevation_deg: tuple = (10.0, 60.0)
    distance: tuple = (1.3, 2.4)  # x the diagonal of the object's bounding box
    shift: tuple = (-0.25, 0.25)  # of the frame, both ways
    roll_deg: tuple = (-10.0, 10.0)
    tries: int = 24
    # a camera is kept when enough of the target part can be seen AND worked on from there
    part_points: int = 48
    min_inside: float = 0.9  # share of the part's points that are in the frame
    min_workable: float = 0.12  # share that is visible and passes the next three
    min_alignment: float = 0.5  # |normal . motion|
    min_lever: float = 0.3  # of the largest lever arm
    min_facing: float = 0.2  # cosine between normal and line of sight
    border: float = 0.025  # of the frame, does not count as inside


TEXTURES = ("plain", "stripes", "plain", "grain", "plain", "checks", "plain", "speckle")  # of a body; half are plain
TEXTURE_M, TEXTURE_AMPLITUDE = (0.06, 0.16), (0.03, 0.08)  # wavelength, metres; share by which the brightness varies
OWN_TEXTURE = 0.3  # chance that a part has a texture of its own, not its body's

INITIAL, LONG, LONG_SHARE = 0.01, 0.1, 0.5  # success thresholds: rad or m; share of the range that is left
INSCRIBED = 0.7  # sample within this share of a shape's bounding box: inside a cylinder, nearly inside a sphere
MIN_PART_PIXELS = 8  # a part with fewer visible pixels is not asked for
# expert
EXPERT_PIXELS, EXPERT_TRIES = 160, 6
EXPERT_LEVER, EXPERT_EDGE, EDGE_JUMP_M = (
    0.8,
    1 / 32,
    0.02,
)  # more lever, or more distance to an edge (of the frame), is no better
EXPERT_REGION = 0.75  # pixels with at least this share of the best score form the region
JITTER_FRAME, JITTER_DEG, JITTER_SHARE = 1 / 128, 8.0, 0.8  # pixel error (of the frame), angle; share to be survived


@dataclass
class Outcome:
    """What an interaction did. `moved` in rad or m; `reason` is "success" or why the initial threshold was missed."""

    moved: float
    initial: bool
    long: bool
    reason: str
    joints: list[float] | None = None  # of all parts where the interaction left them; None: nothing was touched


@dataclass
class Label:
    """A contact that works: pixel (u, v) and the unit direction, CAMERA frame, along which the gripper arrives."""

    u: float
    v: float
    approach: np.ndarray


def stream(category: str, seed: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend on (category, seed, purpose) only: a new draw in one place changes no other place."""
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0")
    return np.random.default_rng([zlib.crc32(f"{category}/{purpose}".encode()), int(seed)])


def unit(vector: np.ndarray) -> np.ndarray:
    """`vector` (..., 3) at length 1; a zero vector stays zero."""
    vector = np.asarray(vector, float)
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)


def texture(rng: np.random.Generator):
    """A random solid texture: a function of points (n, 3), metres -> change of brightness (n,), or None for plain."""
    kind, direction, side = TEXTURES[rng.integers(len(TEXTURES))], *unit(rng.normal(size=(2, 3)))
    wave, size, phase = 2 * math.pi / rng.uniform(*TEXTURE_M), rng.uniform(*TEXTURE_AMPLITUDE), rng.uniform(0, 6, 3)
    cells = rng.uniform(-1, 1, (16, 16, 16))
    patterns = {
        "plain": None,
        "stripes": lambda x: size * np.sign(np.sin(wave * x @ direction)),
        "grain": lambda x: size * np.sin(wave * x @ direction + 2 * np.sin(0.4 * wave * x @ side)),  # bent, as in wood
        "checks": lambda x: size * np.sign(np.sin(0.5 * wave * x + phase)).prod(1),
        "speckle": lambda x: size * cells[tuple((np.floor(wave / 3 * x).astype(int) % 16).T)],
    }
    return patterns[kind]


def rotation_from_approach(approach: np.ndarray) -> np.ndarray:
    """The gripper's rotation (3, 3), camera frame, columns [forward, left, approach], for a unit `approach` (3,).

    Suction leaves the turn about `approach` free, so a rule fixes it: the shortest-arc rotation that takes the camera's
    z (0, 0, 1) to `approach`. Where that is undefined (`approach` = -z) it turns about the camera's x.

    Raises: ValueError for a vector that is not (3,), not finite, or zero.
    """
    approach = np.asarray(approach, float)
    if approach.shape != (3,) or not np.isfinite(approach).all() or np.linalg.norm(approach) < 1e-9:
        raise ValueError(f"approach must be a finite non-zero (3,) vector, got {approach}")
    x, y, z = unit(approach)
    if z < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    k = 1 / (1 + z)  # Rodrigues' formula with axis z x approach: sin = |(x, y)|, cos = z
    return np.array([[1 - k * x * x, -k * x * y, x], [-k * x * y, 1 - k * y * y, y], [-x, -y, z]])


class Scene:
    """One object in an empty world. One Scene per process: PyBullet's calls go to the first connection anyway.

    Args: image_size: side S of the picture, pixels. physics, view: the constants above.
    Raises: RuntimeError for a second Scene in the same process (call `close()` on the first).
    """

    _alive: Scene | None = None
    load_flags = 0  # of loadURDF

    def __init__(self, image_size: int = 128, physics: Physics | None = None, view: View | None = None):
        if Scene._alive is not None or p.isConnected():
            raise RuntimeError("one Scene per process: a second connection mixes the worlds; close() the first")
        self.image_size, self.physics, self.view = image_size, physics or Physics(), view or View()
        p.connect(p.DIRECT)
        Scene._alive = self

    def close(self):
        p.disconnect()
        Scene._alive = None

    # ---- the object -------------------------------------------------------------------------------------------------
    def spawn(self, category: str, seed: int, part: int | None = None) -> Scene:
        """A new object, its start, friction, target, camera, light, background: a function of (category, seed) alone.

        `part` names the target; else it is drawn, and a part that no camera can see is passed over. Renders nothing.
        Raises: ValueError for an unknown category, a negative seed or a part that the object does not have.
        """
        self.spec = self.make(category, seed)
        self.category, self.seed, parts = category, seed, self.spec.parts
        if part is not None and not 0 <= part < len(parts):
            raise ValueError(f"part={part}: this {category} has parts 0..{len(parts) - 1}")
        self._load()
        rng, rng_friction = stream(category, seed, "joints"), stream(category, seed, "friction")
        self.lever = []  # per part: largest distance from the joint's axis, metres (1 for a slide)
        for j, movable in enumerate(parts):
            self.lever.append(_largest_lever(movable))
            hinge, draw = movable.joint == "revolute", rng_friction.uniform()
            low, high = self.physics.hinge_friction if hinge else self.physics.slide_friction
            friction = (low + (high - low) * draw) * self.physics.seal_tension * self.lever[j]
            # A velocity motor with target 0 and limited force IS Coulomb friction in the joint.
            p.setJointMotorControl2(self.body, j, p.VELOCITY_CONTROL, targetVelocity=0, force=friction)
            p.changeDynamics(self.body, j, jointDamping=self.physics.joint_damping)
        self.set_joints([m.start + self.physics.start_open * rng.uniform() * (m.upper - m.start) for m in parts])

        order = [part] if part is not None else stream(category, seed, "target").permutation(len(parts)).tolist()
        found = []
        for j in order:
            found.append((*self._search_camera(j, stream(category, seed, f"camera {j}")), j))
            if found[-1][0] >= self.view.min_workable:
                break
        _, camera, self.target = max(found, key=lambda item: item[0])
        self.look(camera)
        self.draw_light_and_background()
        self.draw_textures()
        return self

    def make(self, category: str, seed: int) -> objects.ObjectSpec:
        """What `spawn` loads; sim/partnet.py brings the user's own objects here."""
        return objects.make_object(category, stream(category, seed, "object"))

    def urdf(self) -> str:
        return objects.to_urdf(self.spec, self.physics.mass_kg, self.physics.inertia)

    def _load(self):
        p.resetSimulation()
        # With caching (on after each reset) a rewritten file of the same name silently loads as the FIRST object.
        p.setPhysicsEngineParameter(enableFileCaching=0, fixedTimeStep=self.physics.dt_s)
        p.setGravity(0, 0, 0)
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # memory, where there is such a folder
        handle, path = tempfile.mkstemp(".urdf", "scene_", folder)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(self.urdf())
            self.body = p.loadURDF(path, useFixedBase=True, flags=self.load_flags)
        finally:
            os.unlink(path)
        bodies, joints = p.getNumBodies(), p.getNumJoints(self.body)
        if (bodies, joints) != (1, len(self.spec.parts)):
            raise RuntimeError(f"{self.spec.category}: loaded {bodies} bodies and {joints} joints")

    def set_joints(self, joints: list[float]):
        """Another start state (radians or metres, one value per part). Call before `render`.

        Raises: ValueError for a wrong count or a value outside its part's limits.
        """
        if len(joints) != len(self.spec.parts):
            raise ValueError(f"joints has {len(joints)} values, the object has {len(self.spec.parts)} parts")
        for value, movable in zip(joints, self.spec.parts, strict=True):
            if not movable.lower - 1e-9 <= value <= movable.upper + 1e-9:
                raise ValueError(f"{movable.label}: joint value {value} outside {movable.lower}..{movable.upper}")
        self.joints = [float(value) for value in joints]
        self.reset()

    def reset(self):
        """Joints back to the start. Also refreshes the collision poses, which go stale after a load."""
        for j, value in enumerate(self.joints):
            p.resetJointState(self.body, j, value, 0.0)

    def motion(self, points: np.ndarray, part: int) -> tuple[np.ndarray, np.ndarray]:
        """For points (n, 3) of `part`, world: unit direction (n, 3) as it opens; lever arm (n,), 1 = the largest."""
        movable, axis = self.spec.parts[part], np.array(self.spec.parts[part].axis)
        if movable.joint == "prismatic":
            return np.broadcast_to(axis, points.shape), np.ones(len(points))
        sweep = np.cross(axis, points - np.array(movable.origin))
        length = np.linalg.norm(sweep, axis=1)
        return sweep / (length[:, None] + 1e-9), length / self.lever[part]

    # ---- camera and light -------------------------------------------------------------------------------------------
    @property
    def intrinsics(self) -> tuple[float, float, float]:
        """(f, cx, cy) in pixels. TinyRenderer samples pixel (u, v) at image position (u, v + 1), not at its centre."""
        half = self.image_size / 2
        return half / math.tan(math.radians(self.view.fov_deg) / 2), half, half - 1

    def _search_camera(self, part: int, rng: np.random.Generator) -> tuple[float, dict]:
        """Draws cameras until one can see and work `part`; returns (workable share, camera), else the best one met."""
        view, best = self.view, (-math.inf, {})
        points = self._points_of(part, view.part_points, rng)
        sign = self._sense(part)
        for _ in range(view.tries):
            camera = {
                name: rng.uniform(*getattr(view, name))
                for name in ("azimuth_deg", "elevation_deg", "distance", "roll_deg")
            }
            camera["shift_u"], camera["shift_v"] = rng.uniform(*view.shift), rng.uniform(*view.shift)
            self.look(camera)
            pixels = self.project(points) / self.image_size
            inside = ((pixels > view.border) & (pixels < 1 - view.border)).all(1)
            score = inside.mean() - 1  # below every camera that has the part in its frame
            if inside.mean() >= view.min_inside:
                link, hit, normal = self._rays(self.eye, self.eye + 1.3 * (points - self.eye))
                direction, lever = self.motion(hit, part)
                along = (normal * direction).sum(1)
                along = np.abs(along) if sign == 0 else sign * along
                facing = (normal * unit(self.eye - hit)).sum(1)
                workable = (link == part) & inside & (along > view.min_alignment)
                score = (workable & (lever > view.min_lever) & (facing > view.min_facing)).mean()
            if score > best[0]:
                best = (score, camera)
            if score >= view.min_workable:
                break
        return best

    def look(self, camera: dict):
        """Puts the camera: sets .camera, .eye (3,) and .camera_rotation (3, 3), world -> camera."""
        self.camera = camera
        boxes = np.array([p.getAABB(self.body, link) for link in range(-1, len(self.spec.parts))])  # (links, 2, 3)
        low, high = boxes[:, 0].min(0), boxes[:, 1].max(0)
        azimuth, elevation, roll = np.radians([camera["azimuth_deg"], camera["elevation_deg"], camera["roll_deg"]])
        back = np.array(
            [math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)]
        )
        self.eye = (low + high) / 2 + camera["distance"] * np.linalg.norm(high - low) * back
        right = unit(np.cross(-back, [0.0, 0.0, 1.0]))
        down = np.cross(-back, right)
        right, down = math.cos(roll) * right + math.sin(roll) * down, math.cos(roll) * down - math.sin(roll) * right
        # The object's centre now lies on the optical axis; turn the camera until it lies at the wanted place instead.
        tangent = 2 * math.tan(math.radians(self.view.fov_deg) / 2)
        centre = rotation_from_approach(np.array([camera["shift_u"] * tangent, camera["shift_v"] * tangent, 1.0]))
        self.camera_rotation = centre @ np.array([right, down, -back])

    def draw_light_and_background(self):
        """Sets .light and .background (S, S, 3): functions of (category, seed)."""
        rng = stream(self.category, self.seed, "light")
        azimuth = math.radians(self.camera["azimuth_deg"] + rng.uniform(-75, 75))  # never from behind the object
        self.light = {
            "lightDirection": [2 * math.cos(azimuth), 2 * math.sin(azimuth), rng.uniform(1.0, 3.0)],
            "lightColor": rng.uniform(0.85, 1.0, 3).tolist(),
            "lightAmbientCoeff": rng.uniform(0.55, 0.7),
            "lightDiffuseCoeff": rng.uniform(0.35, 0.5),
            "lightSpecularCoeff": 0.1,
            "shadow": 0,  # self-shadows come with stripes and cost two thirds of the time
        }
        rng = stream(self.category, self.seed, "background")
        kind, colours = rng.choice(["plain", "gradient", "noise"], p=[0.45, 0.45, 0.1]), rng.uniform(0.2, 1.0, (2, 3))
        first, second = (colours + colours.mean(1, keepdims=True)) / 2  # half as colourful: walls, not paint
        ramp = (np.arange(self.image_size) + 0.5) / self.image_size
        angle, cells = rng.uniform(0, 2 * math.pi), rng.uniform(-0.15, 0.15, (8, 8, 1))
        if kind == "gradient":
            share = 0.5 + (ramp[None, :] - 0.5) * math.cos(angle) / 1.5 + (ramp[:, None] - 0.5) * math.sin(angle) / 1.5
            colour = first + share[..., None] * (second - first)
        elif kind == "noise":
            index = (ramp * 8).astype(int)
            colour = first + cells[index][:, index]
        else:
            colour = np.broadcast_to(first, (self.image_size, self.image_size, 3))
        self.background = (255 * np.clip(colour, 0, 1)).astype(np.uint8)  # (S, S, 3)

    def draw_textures(self):
        """Sets .textures, link -> function of points (n, 3) in the link's frame: a function of (category, seed)."""
        rng = stream(self.category, self.seed, "texture")
        body = texture(rng)
        self.textures = {BASE: body}
        for j in range(len(self.spec.parts)):
            own = texture(rng)  # drawn always, so that one part's draw does not move the next one's
            self.textures[j] = own if rng.random() < OWN_TEXTURE else body

    def _textured(self, rgb: np.ndarray, depth: np.ndarray, links: np.ndarray) -> np.ndarray:
        """rgb with every pixel's brightness varied by the texture at its place on its link, which moves with the link.

        The simulator's own textures need images and coordinates per mesh; a solid texture (Perlin 1985) needs neither.
        """
        rgb = rgb.astype(float)
        for link, pattern in self.textures.items():
            rows, columns = np.nonzero(links == link)
            if pattern is None or not len(rows):
                continue
            points = self._backproject_pixels(rows, columns, depth)
            if link != BASE:
                *_, position, orientation = p.getLinkState(self.body, link, computeForwardKinematics=1)[:6]
                points = (points - position) @ np.reshape(p.getMatrixFromQuaternion(orientation), (3, 3))
            rgb[rows, columns] *= 1 + pattern(points)[:, None]
        return rgb.clip(0, 255).astype(np.uint8)

    def picture(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """rgb (S, S, 3) uint8, depth (S, S) metres along the camera's z (inf: nothing), links (S, S) int16, now."""
        S, near, far = self.image_size, self.view.near_m, self.view.far_m
        pose = np.eye(4)  # OpenGL wants x right, y up, z back
        pose[:3, :3] = self.camera_rotation * np.array([[1.0], [-1.0], [-1.0]])
        pose[:3, 3] = -pose[:3, :3] @ self.eye
        lens = p.computeProjectionMatrixFOV(self.view.fov_deg, 1.0, near, far)
        flags = p.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX
        _, _, rgb, depth, segments = p.getCameraImage(
            S, S, pose.T.ravel().tolist(), lens, renderer=p.ER_TINY_RENDERER, flags=flags, **self.light
        )
        rgb = np.reshape(rgb, (S, S, 4))[..., :3].astype(np.uint8)
        segments, depth = np.reshape(segments, (S, S)), np.reshape(depth, (S, S)).astype(float)
        links = np.where(segments < 0, BACKGROUND, (segments >> 24) - 1).astype(np.int16)
        rgb = np.where(links[..., None] == BACKGROUND, self.background, rgb)
        depth = np.where(links == BACKGROUND, np.inf, near * far / (far - (far - near) * depth))
        return self._textured(rgb, depth, links), depth, links

    def render(self) -> np.ndarray:
        """Takes the picture of the start state: sets .rgb, .depth, .links (see `picture`) and returns .rgb."""
        self.reset()
        self.rgb, self.depth, self.links = self.picture()
        return self.rgb

    # ---- pixel <-> point --------------------------------------------------------------------------------------------
    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (n, 3), metres -> pixels (n, 2) as (u, v)."""
        f, cx, cy = self.intrinsics
        x, y, z = self.camera_rotation @ (np.asarray(points) - self.eye).T
        return np.stack([f * x / z + cx, f * y / z + cy], 1)

    def backproject(self, u: float, v: float) -> np.ndarray | None:
        """Surface point (3,), world metres, at the pixel nearest to (u, v); None off the object or off the frame."""
        # exercise 8: back-projection of a pixel
        column, row = math.floor(u + 0.5), math.floor(v + 0.5)
        if not (0 <= column < self.image_size and 0 <= row < self.image_size) or self.links[row, column] == BACKGROUND:
            return None
        return self._backproject_pixels(np.array([row]), np.array([column]))[0]
        # end of exercise 8

    def _backproject_pixels(self, rows: np.ndarray, columns: np.ndarray, depth: np.ndarray | None = None) -> np.ndarray:
        """World points (n, 3), metres, of pixels (n,), (n,); depth (S, S) defaults to .depth.

        Depth is along the camera's z, .camera_rotation is world -> camera, and whole numbers of (u, v) are where
        `intrinsics` are measured from: nothing is to be added.
        """
        depth = self.depth if depth is None else depth
        # exercise 8: from pixels to points
        f, cx, cy = self.intrinsics
        ray = np.stack([(columns - cx) / f, (rows - cy) / f, np.ones(len(rows))], 1)
        return self.eye + (depth[rows, columns, None] * ray) @ self.camera_rotation
        # end of exercise 8

    def _rays(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Casts rays (n, 3) -> (n, 3); returns links hit (n,) (BACKGROUND: none), hit points and normals (n, 3)."""
        hits = p.rayTestBatch(np.broadcast_to(start, end.shape).tolist(), end.tolist())
        link = np.array([hit[1] if hit[0] == self.body else BACKGROUND for hit in hits])
        return link, np.array([hit[3] for hit in hits]), np.array([hit[4] for hit in hits])

    def normal(self, point: np.ndarray) -> tuple[np.ndarray | None, int]:
        """Unit normal (3,), world, and link of the surface seen in the direction of `point`; or (None, BACKGROUND)."""
        link, _, normal = self._rays(self.eye, (self.eye + 1.2 * (point - self.eye))[None])
        return (normal[0], int(link[0])) if link[0] != BACKGROUND else (None, BACKGROUND)

    def _points_of(self, part: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random points (count, 3), world, inside the shapes of `part`, larger shapes more often."""
        shapes = self.spec.parts[part].shapes
        corners = np.stack([shape.corners() for shape in shapes])  # (shapes, 8, 3); corner 4a + 2b + c, a b c in {0, 1}
        half_axes = (corners[:, [4, 2, 1]] - corners[:, :1]) / 2
        area = np.prod(np.sort(np.linalg.norm(half_axes, axis=2))[:, 1:], axis=1)
        shape = rng.choice(len(shapes), count, p=area / area.sum())
        within = rng.uniform(-INSCRIBED, INSCRIBED, (count, 3))
        local = corners.mean(1)[shape] + (within[:, None] @ half_axes[shape])[:, 0]
        *_, position, orientation = p.getLinkState(self.body, part, computeForwardKinematics=1)[:6]
        return local @ np.reshape(p.getMatrixFromQuaternion(orientation), (3, 3)).T + np.array(position)

    # ---- the gripper ------------------------------------------------------------------------------------------------
    def seal(self, point: np.ndarray, approach: np.ndarray, push: bool) -> tuple[np.ndarray, int, str]:
        """Brings the cup to `point` along `approach` (unit, world): surface normal, link, and why it failed or ""."""
        physics = self.physics
        side = unit(np.cross(approach, [0.0, 0.0, 1.0] if abs(approach[2]) < 0.9 else [1.0, 0.0, 0.0]))
        other, angle = np.cross(approach, side), np.arange(8)[:, None] * (math.pi / 4)
        ring = physics.cup_radius_m * (np.cos(angle) * side + np.sin(angle) * other)
        centres = point + np.concatenate([np.zeros((1, 3)), ring])
        past = 2 * physics.cup_depth_m
        link, hit, normal = self._rays(centres - physics.clear_m * approach, centres + past * approach)
        depth = (hit - point) @ approach  # > 0: beyond the point
        if link[0] == BACKGROUND or abs(depth[0]) > physics.reach_m:
            return normal[0], BACKGROUND, "unreachable"  # something is in the way, or the point is seen from behind
        if link[0] == BASE:
            return normal[0], BASE, "on body"
        touching = (link[1:] == link[0]) & (np.abs(depth[1:] - depth[0]) < physics.cup_depth_m)
        enough = touching.sum() >= (physics.cup_rays_push if push else physics.cup_rays_pull)
        return normal[0], int(link[0]), "" if enough else "no seal"

    def interact(self, point, approach, target=None, on_frame=None, stop_at: float = math.inf) -> Outcome:
        """Brings the gripper to `point` along `approach`, then pulls back (or pushes on) once, in a straight line.

        Each step F = stiffness * (x_goal - x_contact) + damping * (v_goal - v_contact), clipped at the arm's force, is
        split along the CURRENT surface normal, compared with the seal's limits, and applied to the link.

        Args:
            point: (3,) world, metres. approach: (3,) world, any length > 0, the way the gripper travels to the contact.
            target: index of the part whose joint counts (None: the scene's); its `primitive` decides pull or push.
            on_frame: called as on_frame(step, contact point (3,)) before each step and after the last, for pictures.
            stop_at: end early once the target has moved this much (rad or m); enough where only a threshold counts.
        Returns: Outcome. Reasons of failure: "unreachable", "on body", "no seal", "wrong part", "seal broke (tension)",
            "seal broke (shear)", "slipped", "did not move".
        """
        physics, target = self.physics, self.target if target is None else target
        push, approach = self.spec.parts[target].primitive == "push", unit(approach)
        normal, link, reason = self.seal(point, approach, push)
        if reason:
            return Outcome(0.0, False, False, reason)
        place = _path(self.spec.parts[link], self.joints[link], point, normal)
        travel = approach if push else -approach
        speed = travel * physics.stroke_m / (physics.stroke_steps * physics.dt_s)
        for step in range(physics.stroke_steps + physics.hold_steps):
            q, q_speed = p.getJointState(self.body, link)[:2]
            if link == target and self.opened(target, q) >= stop_at:
                break
            contact, sweep, normal = place(q)
            if on_frame is not None:
                on_frame(step, contact)
            goal = point + travel * (physics.stroke_m * min(1.0, (step + 1) / physics.stroke_steps))
            goal_speed = speed if step < physics.stroke_steps else 0.0
            force = physics.stiffness * (goal - contact) + physics.damping * (goal_speed - sweep * q_speed)
            size = math.sqrt(force @ force)
            if size > physics.arm_force:
                force *= physics.arm_force / size
            tension = float(force @ normal)
            across = force - tension * normal
            shear = math.sqrt(across @ across)
            if push:
                if tension > 0:
                    force = np.zeros(3)  # nothing to pull with
                elif shear > physics.push_friction * -tension + physics.push_grip:
                    reason = "slipped"
            elif tension > physics.seal_tension:
                reason = "seal broke (tension)"
            elif shear > physics.seal_shear + physics.press_shear * max(0.0, -tension):
                reason = "seal broke (shear)"
            if reason:
                break
            p.applyExternalForce(self.body, link, force.tolist(), contact.tolist(), p.WORLD_FRAME)
            p.stepSimulation()
        joints = [p.getJointState(self.body, j)[0] for j in range(len(self.joints))]
        moved = self.opened(target, joints[target])
        if on_frame is not None:
            on_frame(step + 1, place(p.getJointState(self.body, link)[0])[0])
        self.reset()  # so that rays and pictures between interactions always meet the start state
        initial = moved >= INITIAL
        reason = "success" if initial else "wrong part" if link != target else reason or "did not move"
        return Outcome(moved, initial, moved >= self.long_threshold(target), reason, joints)

    def openness(self, part: int) -> float:
        """Where `part` starts between its closed state (0) and its limit (1)."""
        movable = self.spec.parts[part]
        return (self.joints[part] - movable.start) / (movable.upper - movable.start)

    def opened(self, part: int, q: float) -> float:
        """How far (rad or m) `part` at joint value `q` has moved from the start, counted in the instructed sense."""
        moved = q - self.joints[part]
        return abs(moved) if self.spec.parts[part].both_ways else moved

    def long_threshold(self, part: int) -> float:
        """How far (rad or m) `part` must move for the long success: 0.1, or half of what is left where that is less."""
        return min(LONG, LONG_SHARE * (self.spec.parts[part].upper - self.joints[part]))

    def _sense(self, part: int) -> int:
        """How the outward normal of a good contact points along the part's motion: +1 pull, -1 push, 0 either."""
        return 0 if self.spec.parts[part].both_ways else -1 if self.spec.parts[part].primitive == "push" else 1

    def true_approach(self, point: np.ndarray, part: int) -> np.ndarray | None:
        """The direction (3,), camera frame, in which to work `part` at `point` (3,), world; None where it is hidden.

        From outside in: against the motion for a pull, with it for a push; the surface says where either sense counts.
        """
        normal, link = self.normal(point)
        direction = self.motion(point[None], part)[0][0]
        if link != part:
            return None
        return self.camera_rotation @ (-(self._sense(part) or np.sign(normal @ direction)) * direction)

    # ---- the expert -------------------------------------------------------------------------------------------------
    def expert(self, rng: np.random.Generator, part: int | None = None, jitters: int = 1) -> Label | None:
        """A contact on the rendered picture that works, for `part` (None: the target); None when none was found.

        Knows what a policy does not: the joint, the mask, the collision shapes. Scores pixels by
        alignment(normal, motion) * min(lever, 0.8) * distance to the nearest edge, takes the middle pixel of the
        best region and tries it; the direction is the true motion's. A label must also survive `jitters` disturbed
        copies (pixel and direction), else the next candidate is tried.
        """
        part = self.target if part is None else part
        mask = self.links == part
        if mask.sum() < MIN_PART_PIXELS:
            return None
        rows, columns = np.nonzero(mask)
        step = -(-len(rows) // EXPERT_PIXELS)
        rows, columns = rows[::step], columns[::step]
        points = self._backproject_pixels(rows, columns)
        link, _, normals = self._rays(self.eye, self.eye + 1.2 * (points - self.eye))
        direction, lever = self.motion(points, part)
        along = (normals * direction).sum(1)
        sense = np.sign(along) if self._sense(part) == 0 else np.full(len(along), self._sense(part))
        edge = self._edge_distance(mask)[rows, columns]
        score = np.where(link == part, sense * along, 0).clip(0) * lever.clip(0, EXPERT_LEVER) * edge
        if score.max() <= 0:
            return None
        for i in _candidates(points, score):
            # From outside in: against the motion for a pull, with it for a push. The sign of normal . motion does both.
            label = Label(float(columns[i]), float(rows[i]), self.camera_rotation @ (-sense[i] * direction[i]))
            if self._survives(label, part, rng, jitters):
                return label
        return None

    def act(self, u: float, v: float, approach: np.ndarray, target: int | None = None, **options) -> Outcome:
        """`interact` at the pixel (u, v) with `approach` (3,) in the CAMERA frame; "off object" where nothing is."""
        finite = bool(np.isfinite([u, v, *approach]).all())
        point = self.backproject(u, v) if finite else None
        if point is None:
            return Outcome(0.0, False, False, "off object" if finite else "not a number")
        return self.interact(point, self.camera_rotation.T @ np.asarray(approach, float), target, **options)

    def _survives(self, label: Label, part: int, rng: np.random.Generator, jitters: int) -> bool:
        threshold = self.long_threshold(part)
        if not self.act(label.u, label.v, label.approach, part, stop_at=threshold).long:
            return False
        survived = 0
        for _ in range(jitters):
            du, dv = rng.uniform(-1, 1, 2) * JITTER_FRAME * self.image_size
            approach = tilt(label.approach, math.radians(JITTER_DEG), rng)
            survived += self.act(label.u + du, label.v + dv, approach, part, stop_at=INITIAL).initial
        return survived >= JITTER_SHARE * jitters

    def _edge_distance(self, mask: np.ndarray) -> np.ndarray:
        """Pixels from the nearest edge of `mask` (or jump in depth), as a share of the largest that counts, (S, S)."""
        depth = np.pad(np.where(mask, self.depth, np.inf), 1, constant_values=np.inf)
        inside, distance, most = mask.copy(), mask.astype(float), max(1, round(EXPERT_EDGE * self.image_size))
        for rows, columns in (
            (slice(2, None), slice(1, -1)),
            (slice(0, -2), slice(1, -1)),
            (slice(1, -1), slice(2, None)),
            (slice(1, -1), slice(0, -2)),
        ):
            inside &= ~(np.abs(depth[rows, columns] - np.where(mask, self.depth, 0)) > EDGE_JUMP_M)
        for _ in range(most - 1):
            distance += inside
            grown = np.pad(inside, 1)
            inside = inside & grown[2:, 1:-1] & grown[:-2, 1:-1] & grown[1:-1, 2:] & grown[1:-1, :-2]
        return distance / most


def tilt(direction: np.ndarray, angle_rad: float, rng: np.random.Generator) -> np.ndarray:
    """`direction` (3,) turned by `angle_rad` about a random axis across it."""
    across = unit(np.cross(direction, unit(rng.normal(size=3))))
    return math.cos(angle_rad) * direction + math.sin(angle_rad) * across


def _candidates(points: np.ndarray, score: np.ndarray) -> list[int]:
    """Order in which the expert tries its pixels: the middle of the best region first, then others by score."""
    region = np.flatnonzero(score >= EXPERT_REGION * score.max())
    spread = np.linalg.norm(points[region, None] - points[None, region], axis=2).sum(1)
    ranked = np.argsort(-score, kind="stable")[: max(1, (score > 0.3 * score.max()).sum())]
    others = ranked[np.linspace(0, len(ranked) - 1, EXPERT_TRIES - 1).astype(int)]
    return list(dict.fromkeys([int(region[spread.argmin()]), *others.tolist()]))


def _largest_lever(part) -> float:
    """Largest distance (metres) of the part from its hinge; 1 for a slide, whose friction is a plain force."""
    if part.joint == "prismatic":
        return 1.0
    corners = np.concatenate([shape.corners() for shape in part.shapes])  # link frame: the hinge passes through 0
    return float(np.linalg.norm(np.cross(corners, np.array(part.axis)), axis=1).max())


def _path(part, q0: float, point: np.ndarray, normal: np.ndarray):
    """How a contact moves with its part: a function q -> (contact (3,), d contact / d q (3,), normal (3,))."""
    axis, origin = np.array(part.axis, float), np.array(part.origin, float)
    if part.joint == "prismatic":
        return lambda q: (point + axis * (q - q0), axis, normal)

    def parts(
        vector,
    ):  # along the axis, away from it, and across both: the turned vector is along + cos away + sin across
        along = axis * (axis @ vector)
        return along, vector - along, np.cross(axis, vector)

    (arm_along, arm_away, arm_across), (normal_along, normal_away, normal_across) = parts(point - origin), parts(normal)
    centre = origin + arm_along

    def place(q):
        c, s = math.cos(q - q0), math.sin(q - q0)
        turned = normal_along + c * normal_away + s * normal_across
        return centre + c * arm_away + s * arm_across, c * arm_across - s * arm_away, turned

    return place


# ---- what happened ---------------------------------------------------------------------------------------------------
def attempt(scene: Scene, rng: np.random.Generator) -> dict | None:
    """Somebody tries to work the target, well or badly; the joints stay as they end. For pictures of afterwards.

    Three sixths of the attempts are the expert's, one works another part, two grip with the right point and a wrong
    direction. Returns {"goal", "acted" (labels), "moved" (by the first stroke, rad or m), "success" (the goal's long
    threshold)}; None where the expert finds no contact, and then nothing has moved. Takes the picture of the start.
    """
    scene.render()
    goal = acted = scene.target
    others = [j for j in range(len(scene.joints)) if j != goal]
    way = ("good", "good", "good", "other", "bad", "bad")[rng.integers(6)]
    if way == "other" and others:
        acted = others[rng.integers(len(others))]
    label = scene.expert(rng, acted, jitters=0)
    if label is None:
        return None
    approach = tilt(label.approach, rng.uniform(math.pi / 3, math.pi / 2), rng) if way == "bad" else label.approach
    before = list(scene.joints)
    outcome = scene.act(label.u, label.v, approach, acted)
    ended = np.clip(outcome.joints or before, [m.lower for m in scene.spec.parts], [m.upper for m in scene.spec.parts])
    success = scene.opened(goal, ended[goal]) >= scene.long_threshold(goal)
    if outcome.long and not scene.spec.parts[acted].both_ways:  # further strokes follow the first, until it is plain
        start, upper = before[acted], scene.spec.parts[acted].upper
        ended[acted] = max(ended[acted], start + rng.uniform(0.3, 0.8) * (upper - start))
    scene.set_joints(ended.tolist())
    names = [part.label for part in scene.spec.parts]
    return {"goal": names[goal], "acted": names[acted], "moved": round(outcome.moved, 4), "success": bool(success)}


# ---- what a picture shows -------------------------------------------------------------------------------------------
def facts(scene: Scene, rng: np.random.Generator, expert: bool = True, jitters: int = 1) -> dict:
    """What is true of the rendered picture, as plain JSON values (see data/questions.py for what is made of it).

    Args: scene: after `render`. rng: for the expert's jitters. expert: fill "contact" (else it is None).
    """
    parts = []
    for j, part in enumerate(scene.spec.parts):
        mask = scene.links == j
        rows, columns = np.nonzero(mask)
        shown = len(rows) >= MIN_PART_PIXELS
        label = scene.expert(rng, j, jitters) if expert and shown else None
        contact = label and {"u": label.u, "v": label.v, "approach": [round(float(d), 5) for d in label.approach]}
        parts.append(
            {
                "label": part.label,
                "kind": part.kind,
                "verb": part.verb,
                "primitive": part.primitive,
                "joint": part.joint,
                "colour": objects.part_colour(part),
                "pixels": len(rows),
                "centre": [round(float(columns.mean()), 2), round(float(rows.mean()), 2)] if shown else None,
                "box": _box(mask) if shown else None,
                "openness": round(scene.openness(j), 4),
                "contact": contact,
            }
        )
    return {
        "category": scene.category,
        "seed": int(scene.seed),
        "image_size": scene.image_size,
        "box": _box(scene.links != BACKGROUND),
        "colour": objects.body_colour(scene.spec),
        "parts": parts,
    }


def _box(mask: np.ndarray) -> list[int] | None:
    """[x0, y0, x1, y1], inclusive, of the set pixels."""
    rows, columns = np.nonzero(mask)
    return [int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())] if len(rows) else None


def dense_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the vision stage learns to see, as means over the cells of a 16 x 16 raster.

    Returns:
        targets (16, 16, 7) float16: depth relative to the object's mean (units of 0.3 m, clipped to +-3), normal
            x, y, z (camera frame, from the depth image), share of object, share of movable parts, openness (0..1) of
            the part that fills the cell (0: none).
        part_kind (16, 16) int8: index into objects.PART_KINDS of the part that fills the cell (0: none, or a kind that
            is not in the list).
    Raises: ValueError when 16 does not divide the image size.
    """
    S = scene.image_size
    if S % GRID:
        raise ValueError(f"image_size={S} must be a multiple of {GRID} for the dense targets")
    f, cx, cy = scene.intrinsics
    shown = scene.links != BACKGROUND
    depth = np.where(shown, scene.depth, 0)
    rows, columns = np.indices((S, S))
    cloud = np.stack([(columns - cx) / f * depth, (rows - cy) / f * depth, depth], -1)  # (S, S, 3) camera frame
    down, right = np.zeros_like(cloud), np.zeros_like(cloud)
    down[:-1], right[:, :-1] = cloud[1:] - cloud[:-1], cloud[:, 1:] - cloud[:, :-1]
    normal = unit(np.cross(down, right)) * shown[..., None]  # towards the camera: z < 0
    relative = np.where(shown, (depth - depth[shown].mean()) / DEPTH_UNIT_M, 0).clip(-3, 3) if shown.any() else depth
    maps = np.concatenate([relative[..., None], normal, shown[..., None], (scene.links >= 0)[..., None]], -1)

    def cells(picture):  # (S, S, C) -> (16, 16, C)
        return picture.reshape(GRID, S // GRID, GRID, S // GRID, -1).mean((1, 3))

    share = np.stack([scene.links == j for j in range(len(scene.spec.parts))], -1)
    share = cells(share.astype(float))  # (16, 16, parts)
    kinds = [part.kind for part in scene.spec.parts]
    index = np.array([objects.PART_KINDS.index(kind) if kind in objects.PART_KINDS else 0 for kind in kinds])
    filled = share.max(-1) > EMPTY_WEIGHT * (1 - share.sum(-1))
    openness = np.array([scene.openness(j) for j in range(len(kinds))])
    opened = np.where(filled, openness[share.argmax(-1)], 0)[..., None]
    targets = np.concatenate([cells(maps), opened], -1).astype(np.float16)
    return targets, np.where(filled, index[share.argmax(-1)], 0).astype(np.int8)
