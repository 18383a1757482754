"""A Franka arm does what a policy says: one episode by inverse kinematics, as a film. A demonstration, not a score.

    python sim_eval.py --robot panda --policy expert --out demo      # the first episode that the arm can reach

    (u, v), approach -> Scene.seal -> a place for the arm -> go there -> suction -> back (or on) -> GIF

Conditions, which make it easier than life, and other than the scored episodes of sim/scene.py:
* the arm stands where it reaches: 6 places around the contact at the contact's height or below it, 8 turns of the hand
  about the approach direction (suction leaves that turn free), the first that inverse kinematics solves;
* arm and object do not collide: the fingers would press a part shut before the seal is made;
* the suction is a ball joint from the hand to the part, for pulls and pushes alike; it breaks when it carries more
  than 51 N for 12 steps in a row, without the three limits of the scored gripper;
* the hand starts straight back (or on) and then follows the way that the part gives, 18 cm in all, with its
  direction kept; the scored gripper pulls in one straight line;
* no gravity; the seal itself (is the point free, is the surface flat?) is tested as in the scored episodes.

The arm is pybullet_data's franka_panda. Joints are driven to what inverse kinematics says for the next piece of the
hand's way, 1/240 s a step. Reaching and opening are reported, whatever they are.
"""

import math
from pathlib import Path

import numpy as np
import pybullet_data
from PIL import Image

from sim.partnet import roll_pitch_yaw
from sim.pictures import save_gif
from sim.scene import INITIAL, Scene, p, unit

TIP, ARM_JOINTS = 11, tuple(range(7))  # in panda.urdf: the link between the fingertips; the joints of the arm
HOME = (0.0, -0.4, 0.0, -2.0, 0.0, 1.6, 0.8)  # radians: where inverse kinematics starts from
STAND_M, STAND_DEG, BELOW_M = 0.55, (0.0, 40.0, -40.0), (0.35, 0.0)  # from the contact: distance, to the side, below
FROM_ABOVE = 0.3  # an approach that is less level than this: the arm stands on the camera's side
TURNS = 8  # of the hand about the approach direction
CLEAR_M, APPROACH_STEPS = 0.10, 120  # the hand comes from so far, in so many steps
NEAR_M, NEAR_RAD = 0.005, math.radians(5)  # inverse kinematics has solved a pose when it is this near
SOLVER = {"maxNumIterations": 200, "residualThreshold": 1e-6}
STEP_M, RAMP_STEPS = 0.18 / 216, 24  # speed of the stroke, a step; it starts gently
FEEL_FROM_M, FEEL_STEPS = 0.005, 12  # after so much way the hand follows the motion of so many last steps
BREAK_N, BREAK_STEPS, HOLD_N = 51.0, 12, 200.0  # the suction; what the ball joint can carry along one axis
DRIVE_NM, DRIVE_GAIN = 200.0, 0.2  # torque of a joint; share of its error that a step takes away
FRAME_EVERY, FILM_PX, FILM_DISTANCE, FILM_SIDE_DEG = 8, 256, 2.8, 35.0
CONDITIONS = (
    "Panda, a demonstration: no collisions between arm and object, the arm placed where it reaches, no gravity, "
    f"suction as a ball joint that breaks above {BREAK_N:.0f} N, the hand follows the part's way. Not comparable with "
    "the scored episodes."
)


def put(arm: int, joints) -> None:
    for j, q in zip(ARM_JOINTS, joints, strict=True):
        p.resetJointState(arm, j, q)


def solve(arm: int, point: np.ndarray, pose: tuple) -> bool:
    """Moves the arm (without time) so that its tip is at `point` in `pose`; False where it cannot."""
    for _ in range(3):  # from where it stands: with rest poses and ranges the solution drifts by centimetres a call
        joints = p.calculateInverseKinematics(arm, TIP, point.tolist(), pose, **SOLVER)[:7]
        low_high = [p.getJointInfo(arm, j)[8:10] for j in ARM_JOINTS]
        put(arm, [min(max(q, low), high) for q, (low, high) in zip(joints, low_high, strict=True)])
        at, turned = p.getLinkState(arm, TIP, computeForwardKinematics=1)[4:6]
        angle = p.getAxisAngleFromQuaternion(p.getDifferenceQuaternion(turned, pose))[1]
        if np.linalg.norm(np.array(at) - point) < NEAR_M and min(angle, 2 * math.pi - angle) < NEAR_RAD:
            return True
    return False


def hand_pose(approach: np.ndarray, turn: float) -> tuple:
    """Quaternion of a hand that points along `approach` (3,), world, turned by `turn` about it."""
    side = unit(np.cross(approach, [0.0, 0.0, 1.0] if abs(approach[2]) < 0.9 else [1.0, 0.0, 0.0]))
    x = math.cos(turn) * side + math.sin(turn) * np.cross(approach, side)
    axes = np.stack([x, np.cross(approach, x), approach], 1)  # columns: the hand's x, y, z
    return p.getQuaternionFromEuler(roll_pitch_yaw(axes))


def find_reach(arm: int, scene: Scene, point: np.ndarray, approach: np.ndarray, travel: np.ndarray) -> tuple | None:
    """Stands the arm where it reaches the contact, the way to it and the end of the stroke; returns the hand's pose.

    That is a quaternion (x, y, z, w), world; None when there is no such place among those tried.
    """
    ends = (point - CLEAR_M * approach, point, point + scene.physics.stroke_m * travel)
    from_above = np.linalg.norm(approach[:2]) < FROM_ABOVE
    outwards = scene.eye - point if from_above else -approach
    azimuth = math.atan2(outwards[1], outwards[0])
    for below in BELOW_M:
        for side in np.radians(STAND_DEG):
            out = np.array([math.cos(azimuth + side), math.sin(azimuth + side), 0.0])
            base, yaw = point + STAND_M * out - [0.0, 0.0, below], azimuth + side + math.pi  # it faces the contact
            p.resetBasePositionAndOrientation(arm, base.tolist(), p.getQuaternionFromEuler([0.0, 0.0, yaw]))
            for turn in range(TURNS):
                pose = hand_pose(approach, turn * 2 * math.pi / TURNS)
                put(arm, HOME)
                if all(solve(arm, end, pose) for end in ends):
                    return pose
    return None


def tip_of(arm: int) -> np.ndarray:
    return np.array(p.getLinkState(arm, TIP, computeForwardKinematics=1)[4])


def drive(arm: int, point: np.ndarray, pose: tuple) -> None:
    """Sets the motors for the tip to go to `point` in `pose`: inverse kinematics from where the arm is now."""
    joints = p.calculateInverseKinematics(arm, TIP, point.tolist(), pose, **SOLVER)
    for j, q in zip(ARM_JOINTS, joints, strict=False):
        p.setJointMotorControl2(arm, j, p.POSITION_CONTROL, q, force=DRIVE_NM, positionGain=DRIVE_GAIN)


def play(scene: Scene, action: tuple, path: Path) -> dict | None:
    """Carries out `action` = (u, v, approach), camera frame, on the rendered scene with the arm; writes the GIF `path`.

    Returns: {"moved": rad or m of the target part, "opened": moved >= 0.01, "reason": "success" or why not}; None when
    the arm reaches the contact from nowhere. The scene must be spawned anew afterwards: the arm stands in it.
    """
    u, v, approach = action[0], action[1], scene.camera_rotation.T @ unit(action[2])
    point = scene.backproject(u, v) if np.isfinite([u, v, *approach]).all() else None
    if point is None:
        return {"moved": 0.0, "opened": False, "reason": "off object"}
    push = scene.spec.parts[scene.target].primitive == "push"
    _, link, reason = scene.seal(point, approach, push)
    if reason:
        return {"moved": 0.0, "opened": False, "reason": reason}
    travel = approach if push else -approach
    arm = p.loadURDF(str(Path(pybullet_data.getDataPath()) / "franka_panda" / "panda.urdf"), useFixedBase=True)
    pose = find_reach(arm, scene, point, approach, travel)
    if pose is None:
        p.removeBody(arm)
        return None
    for own in range(-1, p.getNumJoints(arm)):
        for other in range(-1, p.getNumJoints(scene.body)):
            p.setCollisionFilterPair(arm, scene.body, own, other, 0)
    usual, scene.image_size = scene.image_size, FILM_PX
    scene.draw_light_and_background()
    film = {"distance": FILM_DISTANCE, "shift_u": 0.0, "shift_v": 0.0, "roll_deg": 0.0}
    scene.look(scene.camera._replace(azimuth_deg=scene.camera.azimuth_deg + FILM_SIDE_DEG, **film))
    frames, steps = [], 0

    def step(goal):
        nonlocal steps
        drive(arm, goal, pose)
        if steps % FRAME_EVERY == 0:
            frames.append(Image.fromarray(scene.picture()[0]))
        p.stepSimulation()
        steps += 1

    put(arm, HOME)
    solve(arm, point - CLEAR_M * approach, pose)
    for k in range(APPROACH_STEPS):
        step(point - CLEAR_M * (1 - (k + 1) / APPROACH_STEPS) * approach)
    joint = suck(arm, scene.body, link, point)
    overloaded, reason, direction, trace = 0, "", travel, [tip_of(arm)]
    for k in range(round(scene.physics.stroke_m / STEP_M) + scene.physics.hold_steps):
        step(trace[-1] + min(1.0, k / RAMP_STEPS) * STEP_M / DRIVE_GAIN * direction)
        trace.append(tip_of(arm))
        went = trace[-1] - trace[max(0, len(trace) - 1 - FEEL_STEPS)]
        if np.linalg.norm(trace[-1] - trace[0]) > FEEL_FROM_M and np.linalg.norm(went) > 0:
            direction = unit(went)
        overloaded = overloaded + 1 if np.linalg.norm(p.getConstraintState(joint)) > BREAK_N else 0
        if overloaded >= BREAK_STEPS:
            reason = "suction broke"
            break
    scene.image_size = usual
    moved = scene.opened(scene.target, p.getJointState(scene.body, scene.target)[0])
    save_gif(path, frames)
    opened = moved >= INITIAL
    reason = "success" if opened else "wrong part" if link != scene.target else reason or "did not move"
    return {"moved": moved, "opened": opened, "reason": reason}


def suck(arm: int, body: int, link: int, point: np.ndarray) -> int:
    """A ball joint between the tip and `link` of `body` at `point` (3,), world; returns its id."""
    tip, part = p.getLinkState(arm, TIP, computeForwardKinematics=1), p.getLinkState(body, link)
    frames = []
    for state in (tip, part):  # constraints are placed in the frame of a link's centre of mass
        inverse = p.invertTransform(*state[:2])
        frames.append(p.multiplyTransforms(*inverse, point.tolist(), [0.0, 0.0, 0.0, 1.0])[0])
    joint = p.createConstraint(arm, TIP, body, link, p.JOINT_POINT2POINT, [0, 0, 0], *frames)
    p.changeConstraint(joint, maxForce=HOLD_N)
    return joint
