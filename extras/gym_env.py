"""The simulator as a Gymnasium environment: a picture and a sentence in, one grip out, the part's motion as reward.

    python -m extras.gym_env --episodes 100 --split seen      # a random agent next to the committed row `random`

    import gymnasium
    import extras.gym_env  # registers the name
    env = gymnasium.make("RoboMamba/Grip-v0", split="train", grips=3)
    observation, info = env.reset(seed=0)
    for _ in range(100):
        action = policy(observation)  # yours; info["expert"] from reset is one that works
        observation, reward, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            observation, info = env.reset()
    env.close()

observation  "picture" (S, S, 3) uint8; "depth" (S, S) metres, from an imperfect camera, 0 = not measured; "intrinsics"
             fx, fy, cx, cy; "sentence"; its "tokens" (default checkpoint's), padded with the end token; their "length"
action       (5,): pixel u, v in 0..S; direction of the gripper, camera frame (x right, y down, z forward), any length
reward       how far this grip moved the named part, rad or m, in the instructed direction (sim/scene.py)
terminated   the part has moved since reset by 0.01 (threshold="initial"), by 0.1 or half its remaining range ("long")
truncated    after `grips` grips or when the named part is out of sight. A grip starts where the last one left the parts
info         from reset: split, category, scene_seed, part, expert (privileged); from step: reason (sim.scene.Outcome,
             or "zero direction"), moved (since the reset), is_success

reset(seed=n, options={"split": .., "category": .., "round": r}) is round r of the category in sim_eval.py --seed n.
What is not given is drawn, except the round, which is 0. Train on "train", select on "val"; "seen" and "unseen" are the
test scenes. PyBullet has one world per process: with make_vec(.., vectorization_mode="sync") environments take turns
and reload their scene, in 30 ms; "async" needs vector_kwargs={"shared_memory": False}, or its sentences stay blank.
"""

from dataclasses import dataclass

import numpy as np

from common.files import read_json
from common.report import percent, wilson
from common.scripts import cli, flag, run_main
from data.tokenizer import load_encoding
from sim.policies import REFERENCE_S
from sim.scene import INITIAL, Outcome, Scene, View, unit
from sim_eval import MAX_TRIES, ROOT, SPLITS, Bench, EvalConfig, Job, make_jobs, observe

try:
    import gymnasium
    from gymnasium import spaces
except ImportError:
    missing = "the environment needs Gymnasium: `pip install gymnasium` (the extra [gym])"
    raise (SystemExit if __name__ == "__main__" else ImportError)(missing) from None

CATEGORIES = {"train": SPLITS["val"]["val"], **SPLITS["val"], **SPLITS["both"]}  # of each split
LONGEST, TOKENS = 64, 16  # limits of a sentence: characters, tokens; the catalogue's have up to 50 and 10
RESULTS = ROOT / "data/results/random.json"  # sim_eval.py --policy random --split both --episodes 550
BENCH = Bench(EvalConfig(policy="random"))  # this process's world; reset opens it


def check(name: str, values, choices) -> None:
    for value in values:
        if value not in choices:
            raise ValueError(f"{name} {value!r}: expected one of {', '.join(choices)}")


class RoboMambaEnv(gymnasium.Env):
    """See the module. categories: those to draw from; empty: all of the split. Raises: ValueError for bad input."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}
    present = None  # the environment whose scene is loaded in this process's world

    def __init__(
        self, split="train", categories=(), grips=3, threshold="initial", image_size=REFERENCE_S, render_mode=None
    ):
        check("split", [split], CATEGORIES)
        check("category", categories, CATEGORIES[split])
        check("threshold", [threshold], ("initial", "long"))
        if grips < 1:
            raise ValueError(f"grips {grips}: must be at least 1")
        self.split, self.categories, self.grips = split, categories, grips
        self.threshold, self.image_size, self.render_mode = threshold, image_size, render_mode
        self.encoding = load_encoding(ROOT / EvalConfig.checkpoint / "vocab.tiktoken")
        self.joints = None  # current values, of all parts
        S = image_size
        self.action_space = spaces.Box(np.float32([0, 0, -1, -1, -1]), np.float32([S, S, 1, 1, 1]))
        self.observation_space = spaces.Dict(
            picture=spaces.Box(0, 255, (S, S, 3), np.uint8),
            depth=spaces.Box(0, View().far_m, (S, S)),
            intrinsics=spaces.Box(0, 2 * S, (4,)),
            sentence=spaces.Text(LONGEST, charset="".join(map(chr, range(32, 127)))),
            tokens=spaces.Box(0, self.encoding.n_vocab - 1, (TOKENS,), np.int64),
            length=spaces.Discrete(TOKENS + 1),
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        options = options or {}
        check("option", options, ("split", "category", "round"))
        split = options.get("split", self.split)
        check("split", [split], CATEGORIES)
        drawn = self.categories if self.categories and split == self.split else CATEGORIES[split]
        category = options.get("category", str(self.np_random.choice(drawn)))
        check("category", [category], CATEGORIES[split])
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        job = Job(split, category, options.get("round", 0), seed)
        self.joints = None
        scene = self.world()
        label = BENCH.find(job)[1]
        if label is None:
            raise RuntimeError(f"{job}: the expert solves none of {MAX_TRIES} scenes")
        self.scene = category, scene.seed
        self.start = self.joints = scene.joints
        self.goal = INITIAL if self.threshold == "initial" else scene.long_threshold(scene.target)
        self.moved = 0.0
        self.gripped = 0
        info = {"split": split, "category": category, "scene_seed": scene.seed}
        info["part"] = scene.spec.parts[scene.target].label
        return self.observe(scene), info | {"expert": np.float32([label.u, label.v, *label.approach])}

    def step(self, action) -> tuple[dict, float, bool, bool, dict]:
        """Raises: ResetNeeded before the first reset; ValueError for an action that is not (5,)."""
        if self.joints is None:
            raise gymnasium.error.ResetNeeded("step() before reset()")
        scene = self.world()
        u, v, *direction = np.asarray(action, float).reshape(5)
        zero = np.linalg.norm(direction) < 1e-9
        outcome = Outcome(0.0, False, False, "zero direction") if zero else scene.act(u, v, direction)
        if outcome.joints is not None:
            scene.set_joints(self.start)
            self.moved = float(scene.opened(scene.target, outcome.joints[scene.target]))
            limits = [(part.lower, part.upper) for part in scene.spec.parts]  # the solver may overshoot one slightly
            self.joints = [min(max(q, low), high) for q, (low, high) in zip(outcome.joints, limits, strict=True)]
            scene.set_joints(self.joints)
            scene.render()
        self.gripped += 1
        success = bool(self.moved >= self.goal)
        over = self.gripped >= self.grips or not (scene.links == scene.target).any()
        info = {"reason": outcome.reason, "moved": self.moved, "is_success": success}
        return self.observe(scene), float(outcome.moved), success, over and not success, info

    def render(self) -> np.ndarray | None:
        return self.world().rgb.copy() if self.render_mode else None

    def close(self) -> None:
        """Free PyBullet's client; another environment of the process reopens one when it continues."""
        if RoboMambaEnv.present is self:
            RoboMambaEnv.present = None
            BENCH.close()

    def world(self) -> Scene:
        """The process's world, with this environment's scene in its current state."""
        scene = BENCH.open()
        if RoboMambaEnv.present is not self:
            RoboMambaEnv.present = self
            scene.image_size = self.image_size
            if self.joints is not None:
                scene.spawn(*self.scene).set_joints(self.joints)
                scene.render()
        return scene

    def observe(self, scene: Scene) -> dict:
        o = observe(scene, None, "gym")
        ids = self.encoding.encode_ordinary(o.instruction)
        tokens = np.array(ids + [self.encoding.eot_token] * (TOKENS - len(ids)))
        seen = {"picture": o.image, "depth": o.depth, "intrinsics": np.float32(o.intrinsics)}
        return seen | {"sentence": o.instruction, "tokens": tokens, "length": len(ids)}


def random_agent(split: str, episodes: int, seed: int) -> dict:
    """Success rate of one grip per scene of sim_eval.py: a random pixel with measured depth, a random direction."""
    rng = np.random.default_rng(seed)
    won = 0
    with RoboMambaEnv(split, grips=1) as env:
        for job in make_jobs(EvalConfig(episodes=episodes), {split: CATEGORIES[split]}):
            observation, _ = env.reset(seed=seed, options={"category": job.category, "round": job.round})
            v, u = rng.choice(np.argwhere(observation["depth"]))
            won += env.step(np.float32([u, v, *unit(rng.normal(size=3))]))[2]
    return wilson(won, episodes)


@dataclass
class RandomConfig:
    split: str = flag("seen", "split of the scenes", choices=tuple(SPLITS["both"]))
    episodes: int = flag(100, "number of scenes, cycling through the categories", low=1, high=1_000_000)
    seed: int = flag(0, "seed of scenes and agent", low=0, high=2**31)


def main(argv: list[str] | None = None) -> None:
    cfg = cli(RandomConfig, __doc__, argv)
    row = read_json(RESULTS, dict)["policies"]["random"]["splits"][cfg.split]["initial"]
    print(f"random agent, {cfg.split}, moved by >= 0.01: {percent(random_agent(**vars(cfg)))}")
    print(f"`random` in {RESULTS.relative_to(ROOT)}: {percent(row)}")


gymnasium.register("RoboMamba/Grip-v0", entry_point="extras.gym_env:RoboMambaEnv")

if __name__ == "__main__":
    run_main(main)
