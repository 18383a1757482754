"""The closed loop of `sim_eval.py --closed-loop K`: grip, take a new picture, predict, grip again, K times.

    python sim_eval.py --policy model,random-normal,expert --closed-loop 3 --out runs/closed

The paper's protocol is open loop: one picture, one prediction, one stroke. Here every grip starts where the last one
left the parts. Success is counted from the first start, so a closed loop can only be compared with the open loop of the
same scenes, which the same run reports.
"""

from collections.abc import Callable

from sim.expert import expert
from sim.policies import Observation
from sim.scene import INITIAL, Scene, stream
from sim_eval import Attempt, attempt, observe


def within_limits(scene: Scene, joints: list[float]) -> list[float]:
    """Where a grip left the joints, as a next start: the solver may pass a limit by a hair."""
    limits = [(part.lower, part.upper) for part in scene.spec.parts]
    return [min(max(q, low), high) for q, (low, high) in zip(joints, limits, strict=True)]


def grip_again(policy: Callable, first: Observation, done: Attempt, grips: int, purpose: str) -> dict:
    """Up to `grips` grips more than the one in `done`; the scene is left as it was found.

    purpose: names the random numbers, as in sim.scene.stream.
    Returns: "moved" (rad or m), "initial", "long", and "reasons": how every grip ended. That list is shorter when the
        part is out of sight or the policy does not apply any more.
    """
    scene = first.scene
    part = first.part
    start = list(scene.joints)
    threshold = scene.long_threshold(part)
    joints = start
    reasons = []
    for grip in range(1 + grips):
        if grip:
            scene.set_joints(joints)
            scene.render()
            if not (scene.links == part).any():
                break
            again = f"{purpose}, grip {grip}"
            label = expert(scene, stream(scene.category, scene.seed, again))
            done = attempt(policy, observe(scene, label, again), part)
            if done is None:
                break
        reasons.append(done.outcome.reason)
        if done.outcome.joints is not None:
            joints = within_limits(scene, done.outcome.joints)
    scene.set_joints(start)
    scene.render()
    moved = float(scene.opened(part, joints[part]))
    goals = {"initial": moved >= INITIAL, "long": bool(moved >= threshold)}
    return {"moved": round(moved, 5), **goals, "reasons": reasons}
