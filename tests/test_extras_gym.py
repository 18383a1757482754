"""pytest tests/test_extras_gym.py

The Gymnasium environment: its checker, seeds, the scenes and outcomes of sim_eval.py, several grips, no client left.
"""

import importlib
import json
import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

import sim_eval
from data import questions
from sim import scene as simulator
from sim.catalogue import NOUNS, SEEN, UNSEEN, make_object
from sim.objects import BACKGROUND
from sim.scene import stream
from sim_eval import EvalConfig, Job

gymnasium = pytest.importorskip("gymnasium", reason="extra [gym]")
check_env = pytest.importorskip("gymnasium.utils.env_checker").check_env
gym_env = importlib.import_module("extras.gym_env")
RESULTS, RoboMambaEnv = gym_env.RESULTS, gym_env.RoboMambaEnv

ROOT = Path(__file__).parent.parent
NAME = "RoboMamba/Grip-v0"
JOBS = (  # split, category, round, --seed; a hinge, a slide, a push, either sense, several parts
    Job("val", "Safe", 0, 0),
    Job("seen", "StorageFurniture", 3, 0),
    Job("seen", "Toaster", 1, 7),
    Job("unseen", "Faucet", 2, 123),
)
NOWHERE = np.array([64, 64, 0, 0, 0.0])  # a grip that does nothing


def chosen(job: Job) -> dict:
    return {"seed": job.seed, "options": {"split": job.split, "category": job.category, "round": job.round}}


def clients() -> int:
    return sum(simulator.p.getConnectionInfo(i)["isConnected"] for i in range(32))


def equal(a: dict, b: dict) -> bool:
    """Whether two observations or infos are the same to the last bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture
def make():
    """Makes an environment that is closed afterwards."""
    made = []

    def new(*args, **options):
        made.append(RoboMambaEnv(*args, **options))
        return made[-1]

    yield new
    for env in made:
        env.close()
    assert clients() == 0


@pytest.fixture
def bench():
    one = sim_eval.Bench(EvalConfig(policy="random"))
    yield one
    one.close()


def test_gymnasiums_checker_has_nothing_but_its_advice_on_scaling():
    env = gymnasium.make(NAME, render_mode="rgb_array")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    env.close()
    advice = "recommend using a symmetric and normalized space"  # pixels are pixels
    assert [str(w.message) for w in said if advice not in str(w.message)] == []
    assert clients() == 0


def test_the_same_seed_gives_the_same_two_episodes(make):
    def play(env):
        seen = []
        for seed in (5, None):  # the second scene is drawn
            observation, info = env.reset(seed=seed)
            seen += [observation, info | {"reward": None}]
            for action in (NOWHERE, info["expert"]):
                observation, reward, terminated, truncated, info = env.step(action)
                seen += [observation, info | {"reward": reward, "end": (terminated, truncated)}]
        return seen

    first, second, other = play(make()), play(make()), play(make(split="val"))
    assert all(map(equal, first, second)) and len(first) == 12
    assert first[1]["scene_seed"] != first[7]["scene_seed"] and not equal(first[0], other[0])
    assert first[5]["is_success"] and first[5]["reward"] == first[5]["moved"] >= 0.01


def test_scenes_sentences_and_outcomes_are_those_of_the_evaluation(make, bench):
    theirs = []
    for job in JOBS:
        _, label = bench.find(job)
        o = sim_eval.observe(bench.scene, label, "test")
        actions = [np.float32([label.u, label.v, *label.approach]), np.float32([70, 60, 0.5, -1, 2])]
        outcomes = [bench.scene.act(*action[:2].tolist(), action[2:].tolist()) for action in actions]
        theirs.append((bench.scene.seed, o.instruction, o.image, o.depth, o.intrinsics, actions, outcomes))
    bench.close()
    env = make(grips=1)
    for job, (seed, instruction, image, depth, intrinsics, actions, outcomes) in zip(JOBS, theirs, strict=True):
        for action, outcome in zip(actions, outcomes, strict=True):
            observation, info = env.reset(**chosen(job))
            assert (info["split"], info["category"], info["scene_seed"]) == (job.split, job.category, seed)
            assert observation["sentence"] == instruction and (observation["picture"] == image).all()
            assert (observation["depth"] == depth).all() and (observation["depth"] > 0).any()
            assert observation["intrinsics"] == pytest.approx(intrinsics)
            assert observation in env.observation_space and (info["expert"] == actions[0]).all()
            _, reward, terminated, truncated, info = env.step(action)
            assert (reward, terminated, info["reason"]) == (outcome.moved, outcome.initial, outcome.reason)
            assert truncated is not terminated
    assert [outcomes[0].reason for *_, outcomes in theirs] == ["success"] * len(JOBS)


def test_the_committed_grips_of_random_play_again(make):
    """All that succeeded and some of each category that failed: same scene, same end."""
    env = make(grips=1)
    rows = [row for row in json.loads(RESULTS.read_text())["episodes"] if row["policy"] == "random"]
    played = 0
    rounds = {}
    for row in rows:
        key = row["split"], row["category"]
        number = rounds[key] = rounds.get(key, -1) + 1
        if not row["initial"] and number % 30:
            continue
        observation, info = env.reset(**chosen(Job(*key, number, 0)))
        assert (info["scene_seed"], info["part"]) == (row["seed"], row["part"])
        assert observation["sentence"] == row["instruction"]
        _, reward, terminated, _, info = env.step(np.array([row["u"], row["v"], *row["approach"]]))
        assert info["reason"] == row["reason"] and terminated == row["initial"]
        assert reward == pytest.approx(row["moved"], abs=1e-3)
        played += 1
    assert played > 60


def test_a_random_agent_scores_as_the_committed_row():
    committed = json.loads(RESULTS.read_text())["policies"]["random"]["splits"]["seen"]["initial"]
    ours = gym_env.random_agent("seen", 100, seed=0)
    print(ours, committed)
    assert ours["lo"] <= committed["hi"] and committed["lo"] <= ours["hi"]
    assert ours["n"] == 100 and clients() == 0


@pytest.mark.parametrize("threshold", ["initial", "long"])
def test_a_grip_starts_where_the_last_one_left_the_parts(make, bench, threshold):
    """Grips that move the part a little, then the expert's: what each moves, in a scene of one's own, adds up."""
    job = Job("seen", "Safe", 0, 0)
    _, label = bench.find(job)
    scene = bench.scene
    weak = [23.168, 51.685, 0.38478, -0.47, 0.79438]  # the seal breaks
    script = [weak, [math.nan] * 5, weak, [label.u, label.v, *label.approach]]
    wanted = []
    for u, v, *approach in script:
        outcome = scene.act(round(u, 3), round(v, 3), [round(x, 5) for x in approach])
        wanted.append(outcome)
        if outcome.joints:
            low, high = zip(*((part.lower, part.upper) for part in scene.spec.parts), strict=True)
            scene.set_joints(np.clip(outcome.joints, low, high).tolist())
        scene.render()
    bench.close()
    env = make(threshold=threshold, grips=4)
    pictures = [env.reset(**chosen(job))[0]["picture"]]
    rewards, reasons = [], []
    for u, v, *approach in script:
        action = np.array([round(u, 3), round(v, 3), *(round(x, 5) for x in approach)])  # as sim_eval.attempt rounds
        observation, reward, terminated, truncated, info = env.step(action)
        pictures.append(observation["picture"])
        rewards.append(reward)
        reasons.append(info["reason"])
    assert rewards == pytest.approx([outcome.moved for outcome in wanted], abs=2e-5)
    assert reasons[:2] == [outcome.reason for outcome in wanted[:2]]
    assert sum(rewards) == pytest.approx(info["moved"]) and 0 < rewards[0] < 0.01
    assert (terminated, truncated) == (True, False)
    changed = [(a != b).any() for a, b in zip(pictures, pictures[1:], strict=False)]
    assert not changed[1] and changed[3]  # nothing was touched; the door stands open


def test_the_end_of_an_episode(make):
    env = make(split="val", categories=("Safe",), threshold="long", grips=2)
    _, info = env.reset(seed=0)
    assert info["category"] == "Safe"
    assert env.step(NOWHERE)[1:4] == (0.0, False, False)
    assert env.step(NOWHERE)[1:4] == (0.0, False, True)  # no grip is left
    env.reset(seed=0)
    scene = env.world()
    scene.links[scene.links == scene.target] = BACKGROUND
    assert env.step(NOWHERE)[1:4] == (0.0, False, True)  # out of sight
    _, info = env.reset(seed=0, options={"category": "Toaster"})  # a short way: half of what is left is enough
    assert env.goal == env.world().long_threshold(env.world().target) < 0.1
    assert env.step(info["expert"])[2]


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (NOWHERE, "zero direction"),
        ([64, 64, 1e-12, 0, 0], "zero direction"),
        ([64, 64, math.nan, 0, 1], "not a number"),
        ([math.nan, 64, 0, 0, 1], "not a number"),
        ([64, 64, math.inf, 0, 1], "not a number"),
        ([128, 64, 0, 0, 1], "off object"),
        ([-1e30, 1e30, 0, 0, 1], "off object"),
    ],
)
def test_a_bad_action_is_a_failed_grip(make, action, reason):
    env = make()
    before, _ = env.reset(seed=1)
    after, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["reason"]) == (0.0, False, False, reason)
    assert equal(before, after) and info["moved"] == 0 and not info["is_success"]


def test_the_length_of_a_direction_does_not_matter(make):
    env = make()
    moved = []
    for length in (1, 0.01, 7):
        expert = env.reset(**chosen(JOBS[0]))[1]["expert"]
        moved.append(env.step(expert * np.float32([1, 1, length, length, length]))[1])
    assert moved[0] > 0.1 and moved == pytest.approx([moved[0]] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: RoboMambaEnv("test"), "split 'test': expected one of train, val, seen, unseen"),
        (lambda: RoboMambaEnv(categories=("Kettle",)), "category 'Kettle'"),
        (lambda: RoboMambaEnv(threshold=0.1), "threshold 0.1: expected one of initial, long"),
        (lambda: RoboMambaEnv(grips=0), "grips 0"),
        (lambda: RoboMambaEnv().reset(options={"colour": 1}), "option 'colour': expected one of split, cat"),
        (lambda: RoboMambaEnv().reset(options={"split": "objects"}), "split 'objects'"),
        (lambda: RoboMambaEnv().reset(options={"category": "Kettle"}), "category 'Kettle'"),
        (lambda: gym_env.main(["--split", "val"]), "--split"),
    ],
)
def test_bad_input_is_one_clear_error(call, named):
    with pytest.raises(ValueError) as caught:
        call()
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert clients() == 0


def test_steps_out_of_order_and_actions_of_another_shape(make):
    env = make()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(NOWHERE)
    env.reset(seed=0)
    with pytest.raises(ValueError):
        env.step(NOWHERE[:4])


def test_environments_of_one_process_do_not_disturb_each_other(make):
    """Two of one process, of different sizes, in turn: each sees and does what it does alone."""

    def turns(env, seed):
        _, info = env.reset(seed=seed)
        yield info
        for action in (np.float32([40, 40, 0, 0, 1]), info["expert"], info["expert"]):
            observation, reward, *_ = env.step(action)
            yield observation | {"reward": reward, "render": env.render()}

    big = dict(split="val", render_mode="rgb_array", threshold="long")
    small = big | {"image_size": 64}
    alone = [list(turns(make(**big), 1)), list(turns(make(**small), 2))]
    together = list(zip(turns(make(**big), 1), turns(make(**small), 2), strict=True))
    for pair, lone in zip(zip(*together, strict=True), alone, strict=True):
        assert all(map(equal, pair, lone)) and len(pair) == len(lone) == 4
    assert together[-1][1]["render"].shape == (64, 64, 3) and clients() == 1


@pytest.mark.parametrize(("mode", "options"), [("sync", {}), ("async", {"shared_memory": False})])
def test_vectorised_runs_give_what_single_ones_give(make, mode, options):
    env = make(split="val")
    alone = []
    for seed in (3, 4):
        observation, info = env.reset(seed=seed)
        alone.append((observation, info, *env.step(info["expert"])))
    env.close()
    many = gymnasium.make_vec(NAME, num_envs=2, vectorization_mode=mode, vector_kwargs=options, split="val")
    try:
        observations, infos = many.reset(seed=3)
        _, rewards, terminated, truncated, _ = many.step(infos["expert"])
        for i, (observation, info, _, reward, won, *_) in enumerate(alone):
            assert equal(observation, {key: values[i] for key, values in observations.items()})
            assert infos["scene_seed"][i] == info["scene_seed"] and rewards[i] == reward and terminated[i] == won
        assert terminated.all() and not truncated.any()
        again, _, _, _, infos = many.step(many.action_space.sample())  # an episode that has ended is reset first
        assert (infos["scene_seed"] > 0).all() and again["picture"].shape == (2, 128, 128, 3)
        assert clients() == (mode == "sync")
    finally:
        many.close()
    assert clients() == 0


def test_the_spaces_hold_every_sentence_of_the_catalogue():
    env = RoboMambaEnv()
    spaces = env.observation_space.spaces
    longest = 0
    for category in SEEN + UNSEEN:
        for seed in range(20):
            for part in make_object(category, stream(category, seed, "object")).parts:
                text = questions.instruction(vars(part), NOUNS[category], np.random.default_rng(seed))
                ids = env.encoding.encode_ordinary(text)
                longest = max(longest, len(ids))
                assert text in spaces["sentence"] and len(ids) in spaces["length"]
    assert 8 <= longest < spaces["tokens"].shape[0]


def test_tokens_are_the_sentence(make):
    env = make()
    observation, _ = env.reset(seed=0)
    n = observation["length"]
    assert env.encoding.decode(observation["tokens"][:n]) == observation["sentence"]
    assert (observation["tokens"][n:] == env.encoding.eot_token).all() and n < len(observation["tokens"])


def test_no_client_is_left_after_hundreds_of_calls(make):
    envs = [make(split="val", grips=3, image_size=32) for _ in range(2)]
    rng = np.random.default_rng(0)
    for i in range(70):
        env = envs[i % 2]
        env.reset(seed=i)
        for _ in range(2):
            env.step(rng.uniform(env.action_space.low, env.action_space.high))
        assert clients() == 1
    for env in (*envs, *envs):  # twice is fine
        env.close()
        env.close()
    assert clients() == 0


def test_the_loop_of_the_docstring_runs():
    start = gym_env.__doc__.index("    import gymnasium")
    code = textwrap.dedent(gym_env.__doc__[start : gym_env.__doc__.index("\nobservation  ")])
    lines = {"policy": lambda observation: NOWHERE}
    exec(code.replace("range(100)", "range(4)"), lines)
    assert lines["truncated"] is False and lines["info"]["reason"] == "zero direction" and clients() == 0


def test_the_command_prints_both_rates(capsys):
    gym_env.main(["--episodes", "2", "--split", "unseen", "--seed", "3"])
    ours, committed = capsys.readouterr().out.splitlines()
    assert "unseen" in ours and "/2 " in ours and "[" in ours
    assert "18/550 0.03 [0.02, 0.05]" in committed and "data/results/random.json" in committed


@pytest.mark.parametrize(
    "use, lines",
    [("import extras.gym_env", 99), ("import runpy; runpy.run_module('extras.gym_env', {}, '__main__')", 1)],
)
def test_a_missing_gymnasium_is_one_sentence(use, lines):
    code = f"import sys; sys.modules['gymnasium'] = None; {use}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert len(done.stderr.strip().splitlines()) <= lines, done.stderr
    assert done.returncode and "the environment needs Gymnasium: `pip install gymnasium`" in last, done.stderr[-1500:]
