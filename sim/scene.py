"""The world: one articulated object in PyBullet, one camera, one suction gripper.

    sim/catalogue.py --URDF--> Scene.spawn -> render -> picture (S, S, 3) + instruction --> a policy
                                                                                              | pixel (u, v), approach
    Outcome(moved, initial, long, reason) <- Scene.act <- Scene.backproject <-----------------'

Success is a formula. With q the joint of the NAMED part and q0 its start value, `moved = q - q0` in radians or metres,
measured in the instructed direction (|q - q0| where either direction counts):
    initial: moved >= 0.01          long: moved >= min(0.1, half of the remaining range)
0.01 and 0.1 are the thresholds of RoboMamba (arXiv 2406.04339, Sec. 4.3) and ManipLLM (arXiv 2312.16217); "half of the
remaining range" makes success possible for parts with a short range.

Differs from the paper: its simulator is SAPIEN with PartNet-Mobility meshes and a Franka gripper with a suction cup;
here the objects are boxes, cylinders and spheres, and the gripper is only its suction cup: a spring and damper with
three force limits. These limits keep the benchmark honest: with a grip of unlimited force, even hinge pixels and
60-degree errors "succeed".
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sim import appearance, catalogue, objects
from sim.objects import BACKGROUND, BASE, Part

p = None
kept = os.dup(2)
try:  # on import, PyBullet prints its build time from C, which would be the first line of every message
    with open(os.devnull, "w") as nowhere, contextlib.suppress(ImportError):  # need_pybullet reports a missing one
        os.dup2(nowhere.fileno(), 2)
        import pybullet as p
finally:
    os.dup2(kept, 2)
    os.close(kept)

# Letters: S image side (pixels) · u, v pixel column and row · f, cx, cy intrinsics (pixels) · q joint value (rad or m).
# Frames: world (x = object front, z = up, metres) and camera (OpenCV: x right, y down, z forward).

INITIAL, LONG, LONG_SHARE = 0.01, 0.1, 0.5  # success thresholds: rad or m; share of the remaining range
INSCRIBED = 0.7  # sample within this share of a shape's bounding box: inside a cylinder, nearly inside a sphere


@dataclass(frozen=True)
class Physics:
    """What the gripper can do and how stiff the joints are, SI units. Friction scales with the seal's tension limit and
    the part's largest lever arm, so that a pull near the hinge cannot succeed."""

    dt_s: float = 1 / 240
    stiffness: float = 2000.0  # N/m, of the arm: a spring and damper from the moving target to the contact
    damping: float = 40.0  # N s/m
    arm_force: float = 40.0  # N, at which its force is clipped
    stroke_m: float = 0.18  # straight, one shot: along -approach (pull) or +approach (push)
    stroke_steps: int = 216
    hold_steps: int = 24
    seal_tension: float = 35.0  # N, along the normal of the moving part: above it, the seal breaks
    seal_shear: float = 28.0  # N, across it; pressing adds `press_shear` of the compression
    press_shear: float = 0.5
    push_friction: float = 0.8  # a push has no seal: it slips beyond push_friction * compression + push_grip
    push_grip: float = 2.0  # N
    cup_radius_m: float = 0.008  # of a ring of 8 rays along the approach that must hit the same link as the centre ray
    cup_depth_m: float = 0.015  # how much unevenness the cup tolerates
    cup_rays_pull: int = 4  # of 8
    cup_rays_push: int = 3
    clear_m: float = 0.15  # free space needed in front of the contact
    reach_m: float = 0.012  # the centre ray must hit this close to the point
    hinge_friction: tuple = (0.30, 0.45)  # x seal_tension x largest lever arm -> N m
    slide_friction: tuple = (0.40, 0.60)  # x seal_tension -> N
    joint_damping: float = 0.1
    mass_kg: float = 1.0
    inertia: float = 0.02  # kg m^2
    start_open: float = 0.08  # start = closed + U(0, start_open) of the range


@dataclass(frozen=True)
class View:
    """Ranges of the random camera. Wide on purpose: with centred, upright objects even a blind table succeeds."""

    fov_deg: float = 40.0
    near_m: float = 0.05
    far_m: float = 8.0
    azimuth_deg: tuple = (-180.0, 180.0)
    elevation_deg: tuple = (10.0, 60.0)
    distance: tuple = (1.3, 2.4)  # x the diagonal of the object's bounding box
    shift: tuple = (-0.25, 0.25)  # of the frame, both ways
    roll_deg: tuple = (-10.0, 10.0)
    tries: int = 24
    part_points: int = 48  # of the target: a camera is kept if enough of them are visible AND workable from there
    min_inside: float = 0.9  # share of them that must be in the frame
    min_workable: float = 0.12  # share that must be visible and pass the next three
    min_alignment: float = 0.5  # |normal . motion|
    min_lever: float = 0.3  # of the largest lever arm
    min_facing: float = 0.2  # cosine between normal and line of sight
    border: float = 0.025  # share of the frame that does not count as inside


class Camera(NamedTuple):
    """Where the camera is, relative to the middle of the object, and where that middle appears in the picture."""

    azimuth_deg: float
    elevation_deg: float
    distance: float  # x the diagonal of the object's bounding box
    roll_deg: float
    shift_u: float  # of the frame, to the right and down
    shift_v: float


@dataclass
class Outcome:
    """What an interaction did. `moved` in rad or m; `reason` is "success" or why the initial threshold was missed:
    "off object", "not a number", "unreachable", "on body", "no seal", "wrong part", "seal broke (tension)", "seal broke
    (shear)", "slipped", "did not move"."""

    moved: float
    initial: bool
    long: bool
    reason: str
    joints: list[float] | None = None  # of all parts after the interaction; None: nothing was touched


def need_pybullet() -> None:
    """Raises: ValueError if it is not installed; every module can be imported without it."""
    if p is None:
        raise ValueError(
            "the simulator needs PyBullet: `pip install pybullet` (wheels: Linux x86_64, Python 3.11 or older); "
            "reading, training and asking work without it"
        )


def stream(category: str, seed: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend only on (category, seed, purpose): a new draw for one purpose affects no other."""
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0")
    return np.random.default_rng([zlib.crc32(f"{category}/{purpose}".encode()), int(seed)])


def unit(vector: np.ndarray) -> np.ndarray:
    """`vector` (..., 3) normalised to length 1; a zero vector stays zero."""
    vector = np.asarray(vector, float)
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)


def tilt(direction: np.ndarray, angle_rad: float, rng: np.random.Generator) -> np.ndarray:
    """`direction` (3,) turned by `angle_rad` about a random axis perpendicular to it."""
    across = unit(np.cross(direction, unit(rng.normal(size=3))))
    return math.cos(angle_rad) * direction + math.sin(angle_rad) * across


def rotation_from_approach(approach: np.ndarray) -> np.ndarray:
    """The gripper's rotation (3, 3), camera frame, columns [forward, left, approach], for an `approach` (3,).

    Suction leaves the turn about `approach` free, so a rule fixes it: the shortest arc from the camera's z (0, 0, 1) to
    `approach`; for -z, half a turn about x. Raises: ValueError for a vector that is not (3,), not finite, or zero."""
    approach = np.asarray(approach, float)
    if approach.shape != (3,) or not np.isfinite(approach).all() or np.linalg.norm(approach) < 1e-9:
        raise ValueError(f"approach must be a finite non-zero (3,) vector, got {approach}")
    x, y, z = unit(approach)
    if z < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    k = 1 / (1 + z)  # Rodrigues' formula with axis z x approach: sin = |(x, y)|, cos = z
    return np.array([[1 - k * x * x, -k * x * y, x], [-k * x * y, 1 - k * y * y, y], [-x, -y, z]])


class Scene(contextlib.AbstractContextManager):
    """One object in an empty world; image_size: side S of its picture, pixels. Raises: RuntimeError for a second Scene
    in the process: PyBullet's calls go to the first connection anyway."""

    def __init__(self, image_size: int = 128, view: View | None = None):
        need_pybullet()
        if p.isConnected():
            raise RuntimeError("one Scene per process: a second connection mixes the worlds; close() the first")
        self.image_size = image_size
        self.physics = Physics()
        self.view = view or View()
        p.connect(p.DIRECT)

    def close(self):
        p.disconnect()

    def __exit__(self, *error):
        self.close()

    # ---- the object -------------------------------------------------------------------------------------------------
    def spawn(self, category: str, seed: int, part: int | None = None) -> Scene:
        """A new object, start, friction, target, camera, light, background: a function of (category, seed). No picture.

        part: index of the target; None: it is drawn at random, skipping a part that no camera can see.
        Raises: ValueError for an unknown category, a negative seed or a part that the object does not have."""
        self.spec, urdf, flags = self.make(category, seed)
        self.category = category
        self.seed = seed
        parts = self.spec.parts
        if part is not None and not 0 <= part < len(parts):
            raise ValueError(f"part={part}: this {category} has parts 0..{len(parts) - 1}")
        self._load(urdf, flags)
        self._set_friction(stream(category, seed, "friction"))
        rng = stream(category, seed, "joints")
        self.set_joints([m.start + self.physics.start_open * rng.uniform() * (m.upper - m.start) for m in parts])
        order = [part] if part is not None else stream(category, seed, "target").permutation(len(parts)).tolist()
        camera, self.target = self._search_camera(order)
        self.look(camera)
        self.light = appearance.light(stream(category, seed, "light"), self.camera.azimuth_deg)
        self.background = appearance.background(stream(category, seed, "background"), self.image_size)
        self.textures = appearance.textures(stream(category, seed, "texture"), len(parts))
        return self

    def make(self, category: str, seed: int) -> tuple[objects.ObjectSpec, str, int]:
        """What `spawn` loads, its URDF text, flags of loadURDF; extras/partnet.py overrides it."""
        spec = catalogue.make_object(category, stream(category, seed, "object"))
        return spec, objects.to_urdf(spec, self.physics.mass_kg, self.physics.inertia), 0

    def _load(self, urdf: str, flags: int):
        p.resetSimulation()
        # With caching (on after each reset) a rewritten file of the same name silently loads as the FIRST object.
        p.setPhysicsEngineParameter(enableFileCaching=0, fixedTimeStep=self.physics.dt_s)
        p.setGravity(0, 0, 0)
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # in memory, where this folder exists
        with tempfile.NamedTemporaryFile("w", prefix="scene_", suffix=".urdf", dir=folder) as file:
            file.write(urdf)
            file.flush()
            self.body = p.loadURDF(file.name, useFixedBase=True, flags=flags)

    def _set_friction(self, rng: np.random.Generator):
        """Sets .lever: per part the largest distance from the hinge, metres; 1 for a slide: its friction is a force."""
        self.lever = []
        for j, part in enumerate(self.spec.parts):
            limits = self.physics.slide_friction
            lever = 1.0
            if part.joint == "revolute":
                corners = np.concatenate([shape.corners() for shape in part.shapes])  # the hinge passes through 0
                limits = self.physics.hinge_friction
                lever = float(np.linalg.norm(np.cross(corners, np.array(part.axis)), axis=1).max())
            self.lever.append(lever)
            friction = rng.uniform(*limits) * self.physics.seal_tension * lever
            # A velocity motor with target 0 and limited force IS Coulomb friction in the joint.
            p.setJointMotorControl2(self.body, j, p.VELOCITY_CONTROL, targetVelocity=0, force=friction)
            p.changeDynamics(self.body, j, jointDamping=self.physics.joint_damping)

    def set_joints(self, joints: list[float]):
        """Sets another start state (rad or m, one per part). Raises: ValueError for a wrong count or outside limits."""
        if len(joints) != len(self.spec.parts):
            raise ValueError(f"joints has {len(joints)} values, the object has {len(self.spec.parts)} parts")
        for value, movable in zip(joints, self.spec.parts, strict=True):
            if not movable.lower - 1e-9 <= value <= movable.upper + 1e-9:
                raise ValueError(f"{movable.label}: joint value {value} outside {movable.lower}..{movable.upper}")
        self.joints = [float(value) for value in joints]
        self.reset()

    def reset(self):
        """Moves the joints back to the start. Also refreshes the collision poses, which are stale after a load."""
        for j, value in enumerate(self.joints):
            p.resetJointState(self.body, j, value, 0.0)

    def motion(self, points: np.ndarray, part: int) -> tuple[np.ndarray, np.ndarray]:
        """For points (n, 3) on `part`, world: unit direction (n, 3) as it opens; lever arm (n,), 1 = the largest."""
        movable = self.spec.parts[part]
        axis = np.array(movable.axis)
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

    def _search_camera(self, order: list[int]) -> tuple[Camera, int]:
        """Draws cameras for one part after another until a part is workable; returns that pair, else the best one."""
        view = self.view
        ranges = (view.azimuth_deg, view.elevation_deg, view.distance, view.roll_deg, view.shift, view.shift)
        found = []
        for part in order:
            rng = stream(self.category, self.seed, f"camera {part}")
            points = self._points_of(part, view.part_points, rng)
            sense = self.sense(part)
            for _ in range(view.tries):
                camera = Camera(*(rng.uniform(*limits) for limits in ranges))
                self.look(camera)
                pixels = self.project(points) / self.image_size
                inside = ((pixels > view.border) & (pixels < 1 - view.border)).all(1)
                score = inside.mean() - 1  # below every camera that has the part in its frame
                if inside.mean() >= view.min_inside:
                    link, hit, normal = self.rays(self.eye, self.eye + 1.3 * (points - self.eye))
                    direction, lever = self.motion(hit, part)
                    along = (normal * direction).sum(1)
                    along = sense * along if sense else np.abs(along)
                    facing = (normal * unit(self.eye - hit)).sum(1)
                    workable = (link == part) & inside & (along > view.min_alignment)
                    score = (workable & (lever > view.min_lever) & (facing > view.min_facing)).mean()
                if score >= view.min_workable:
                    return camera, part
                found.append((score, camera, part))
        return max(found, key=lambda one: one[0])[1:]

    def look(self, camera: Camera):
        """Places the camera: sets .camera, .eye (3,) and .camera_rotation (3, 3), world -> camera."""
        self.camera = camera
        boxes = np.array([p.getAABB(self.body, link) for link in range(-1, len(self.spec.parts))])  # (links, 2, 3)
        low, high = boxes[:, 0].min(0), boxes[:, 1].max(0)
        azimuth, elevation, roll = np.radians([camera.azimuth_deg, camera.elevation_deg, camera.roll_deg])
        level = math.cos(elevation)
        back = np.array([level * math.cos(azimuth), level * math.sin(azimuth), math.sin(elevation)])
        self.eye = (low + high) / 2 + camera.distance * np.linalg.norm(high - low) * back
        right = unit(np.cross(-back, [0.0, 0.0, 1.0]))
        down = np.cross(-back, right)
        right, down = math.cos(roll) * right + math.sin(roll) * down, math.cos(roll) * down - math.sin(roll) * right
        # The object's centre now lies on the optical axis; turn the camera so that it lies at the wanted place instead.
        tangent = 2 * math.tan(math.radians(self.view.fov_deg) / 2)
        centre = rotation_from_approach(np.array([camera.shift_u * tangent, camera.shift_v * tangent, 1.0]))
        self.camera_rotation = centre @ np.array([right, down, -back])

    def _textured(self, rgb: np.ndarray, depth: np.ndarray, links: np.ndarray) -> np.ndarray:
        """rgb with each pixel's brightness varied by the texture at its place on its link, wherever the link is now."""
        rgb = rgb.astype(float)
        for link, pattern in self.textures.items():
            rows, columns = np.nonzero(links == link)
            if pattern is None or not len(rows):
                continue
            points = self.backproject_pixels(rows, columns, depth)
            if link != BASE:
                position, turn = self._pose(link)
                points = (points - position) @ turn
            rgb[rows, columns] *= 1 + pattern(points)[:, None]
        return rgb.clip(0, 255).astype(np.uint8)

    def picture(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Current rgb (S, S, 3) uint8, depth (S, S) metres along the camera's z (inf: nothing), links (S, S) int16."""
        S, near, far = self.image_size, self.view.near_m, self.view.far_m
        pose = np.eye(4)  # OpenGL wants x right, y up, z back
        pose[:3, :3] = self.camera_rotation * np.array([[1.0], [-1.0], [-1.0]])
        pose[:3, 3] = -pose[:3, :3] @ self.eye
        lens = p.computeProjectionMatrixFOV(self.view.fov_deg, 1.0, near, far)
        options = {"renderer": p.ER_TINY_RENDERER, "flags": p.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX}
        images = p.getCameraImage(S, S, pose.T.ravel().tolist(), lens, **options, **self.light)
        rgb = np.reshape(images[2], (S, S, 4))[..., :3].astype(np.uint8)
        depth, segments = (np.reshape(image, (S, S)) for image in images[3:])
        links = np.where(segments < 0, BACKGROUND, (segments >> 24) - 1).astype(np.int16)
        rgb = np.where(links[..., None] == BACKGROUND, self.background, rgb)
        depth = np.where(links == BACKGROUND, np.inf, near * far / (far - (far - near) * depth.astype(float)))
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
        return self.backproject_pixels(np.array([row]), np.array([column]))[0]
        # end of exercise 8

    def backproject_pixels(self, rows: np.ndarray, columns: np.ndarray, depth: np.ndarray | None = None) -> np.ndarray:
        """World points (n, 3), metres, of pixels (n,), (n,); depth (S, S) along the camera's z defaults to .depth."""
        depth = self.depth if depth is None else depth
        # exercise 8: from pixels to points
        f, cx, cy = self.intrinsics
        ray = np.stack([(columns - cx) / f, (rows - cy) / f, np.ones(len(rows))], 1)
        return self.eye + (depth[rows, columns, None] * ray) @ self.camera_rotation
        # end of exercise 8

    def rays(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Casts rays (n, 3) -> (n, 3); returns links hit (n,) (BACKGROUND: none), hit points and normals (n, 3)."""
        hits = p.rayTestBatch(np.broadcast_to(start, end.shape).tolist(), end.tolist())
        link = np.array([hit[1] if hit[0] == self.body else BACKGROUND for hit in hits])
        return link, np.array([hit[3] for hit in hits]), np.array([hit[4] for hit in hits])

    def normals(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the camera sees towards points (n, 3), world: link (n,) (BACKGROUND: none), unit normal (n, 3)."""
        link, _, normals = self.rays(self.eye, self.eye + 1.2 * (points - self.eye))
        return link, normals

    def _points_of(self, part: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random points (count, 3), world, inside the shapes of `part`, larger shapes more often."""
        shapes = self.spec.parts[part].shapes
        corners = np.stack([shape.corners() for shape in shapes])  # (shapes, 8, 3); corner 4a + 2b + c, a b c in {0, 1}
        half_axes = (corners[:, [4, 2, 1]] - corners[:, :1]) / 2
        area = np.prod(np.sort(np.linalg.norm(half_axes, axis=2))[:, 1:], axis=1)
        shape = rng.choice(len(shapes), count, p=area / area.sum())
        within = rng.uniform(-INSCRIBED, INSCRIBED, (count, 3))
        local = corners.mean(1)[shape] + (within[:, None] @ half_axes[shape])[:, 0]
        position, turn = self._pose(part)
        return local @ turn.T + position

    def _pose(self, link: int) -> tuple[np.ndarray, np.ndarray]:
        """Current position (3,) and rotation (3, 3), link -> world, of a part's frame."""
        *_, position, orientation = p.getLinkState(self.body, link, computeForwardKinematics=1)[:6]
        return np.array(position), np.reshape(p.getMatrixFromQuaternion(orientation), (3, 3))

    # ---- the gripper ------------------------------------------------------------------------------------------------
    def seal(self, point: np.ndarray, approach: np.ndarray, push: bool) -> tuple[np.ndarray, int, str]:
        """Brings the cup to `point` along `approach` (unit, world) -> surface normal, link, failure reason or ""."""
        physics = self.physics
        side = unit(np.cross(approach, [0.0, 0.0, 1.0] if abs(approach[2]) < 0.9 else [1.0, 0.0, 0.0]))
        angle = np.arange(8)[:, None] * (math.pi / 4)
        ring = physics.cup_radius_m * (np.cos(angle) * side + np.sin(angle) * np.cross(approach, side))
        centres = point + np.concatenate([np.zeros((1, 3)), ring])
        past = 2 * physics.cup_depth_m
        link, hit, normal = self.rays(centres - physics.clear_m * approach, centres + past * approach)
        depth = (hit - point) @ approach  # > 0: beyond the point
        if link[0] == BACKGROUND or abs(depth[0]) > physics.reach_m:
            return normal[0], BACKGROUND, "unreachable"  # something is in the way, or the point is seen from behind
        if link[0] == BASE:
            return normal[0], BASE, "on body"
        touching = (link[1:] == link[0]) & (np.abs(depth[1:] - depth[0]) < physics.cup_depth_m)
        enough = touching.sum() >= (physics.cup_rays_push if push else physics.cup_rays_pull)
        return normal[0], int(link[0]), "" if enough else "no seal"

    def act(self, u: float, v: float, approach, target: int | None = None, on_frame=None, stop_at=math.inf) -> Outcome:
        """Brings the gripper to pixel (u, v) along `approach` (3,), CAMERA frame, then pulls back (or pushes on) once.

        Each step, F = stiffness * (x_goal - x_contact) + damping * (v_goal - v_contact) is clipped at the arm's force,
        split along the CURRENT surface normal, compared with the seal's limits, and applied to the link.

        Args:
            target: index of the part whose joint counts (None: the scene's); its `primitive` decides pull or push.
            on_frame: called as on_frame(step, contact point (3,)) before each step and after the last, for pictures.
            stop_at: end early once the target has moved this much (rad or m); enough if only a threshold matters."""
        if not np.isfinite([u, v, *approach]).all():
            return Outcome(0.0, False, False, "not a number")
        point = self.backproject(u, v)
        if point is None:
            return Outcome(0.0, False, False, "off object")
        physics = self.physics
        target = self.target if target is None else target
        push = self.spec.parts[target].primitive == "push"
        approach = unit(self.camera_rotation.T @ np.asarray(approach, float))
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
            if push and tension > 0:
                force = np.zeros(3)  # nothing to pull with
            elif push:
                reason = "slipped" if shear > physics.push_friction * -tension + physics.push_grip else ""
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
            on_frame(step + 1, place(joints[link])[0])
        self.reset()  # so that rays and pictures between interactions always see the start state
        if moved >= INITIAL:
            reason = "success"
        elif link != target:
            reason = "wrong part"
        long = moved >= self.long_threshold(target)
        return Outcome(moved, moved >= INITIAL, long, reason or "did not move", joints)

    def openness(self, part: int) -> float:
        """Where `part` starts between its closed state (0) and its limit (1)."""
        movable = self.spec.parts[part]
        return (self.joints[part] - movable.start) / (movable.upper - movable.start)

    def opened(self, part: int, q: float) -> float:
        """How far (rad or m) `part` at joint value `q` has moved from the start, in the instructed direction."""
        moved = q - self.joints[part]
        return abs(moved) if self.spec.parts[part].both_ways else moved

    def long_threshold(self, part: int) -> float:
        """How far (rad or m) `part` must move for long success: 0.1, or half of the remaining range if that is less."""
        return min(LONG, LONG_SHARE * (self.spec.parts[part].upper - self.joints[part]))

    def sense(self, part: int) -> int:
        """Sign of a good contact's outward normal along the part's motion: +1 pull, -1 push, 0 either."""
        pull = 1 if self.spec.parts[part].primitive == "pull" else -1
        return 0 if self.spec.parts[part].both_ways else pull


def _path(part: Part, q0: float, point: np.ndarray, normal: np.ndarray):
    """How a contact moves with its part: a function q -> (contact (3,), d contact / d q (3,), normal (3,))."""
    axis = np.array(part.axis, float)
    origin = np.array(part.origin, float)
    if part.joint == "prismatic":
        return lambda q: (point + axis * (q - q0), axis, normal)
    # Rodrigues' formula: a vector turned by t about the axis is along + away cos t + across sin t.
    vectors = np.array([point - origin, normal])
    along = np.array([axis * (axis @ vector) for vector in vectors])
    away, across = vectors - along, np.cross(axis, vectors)
    along[0] += origin  # the contact is a point, the normal a direction

    def place(q):
        c, s = math.cos(q - q0), math.sin(q - q0)
        contact, turned = along + c * away + s * across
        return contact, c * across[0] - s * away[0], turned

    return place
