"""pytest tests/test_eval.py -q

The evaluation: intervals, results.json, the same run twice and in several processes, accidents, every bad input.
"""

import json
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mini_config
from PIL import Image

import sim_eval
from common import report
from common.report import wilson
from data import depth
from robomamba import Action, RoboMamba
from sim import catalogue, pictures, policies
from sim.catalogue import DRAWER_DOOR_SEEN, DRAWER_DOOR_UNSEEN, SEEN, UNSEEN
from sim.expert import Label, expert
from sim.policies import Observation
from sim.scene import Scene
from sim_eval import EvalConfig, load_model, model_policy

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = [  # category, part, u, v, approach
    ("Safe", "door", 10, 20, (0, 0, 1)),
    ("Safe", "door", 14, 26, (0, 0, 1)),
    ("Safe", "door", 30, 20, (0, 0.6, 0.8)),
    ("Door", "door", 50, 60, (1, 0, 0)),
    ("Table", "top drawer", 40, 41, (0, 1, 0)),
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    records = [
        {"image": "0.png", "category": c, "part": part, "u": u, "v": v, "approach": approach}
        for c, part, u, v, approach in SAMPLES
    ]
    (folder / "manipulation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "manipulation.jsonl"


@pytest.fixture(scope="module")
def table(samples):
    path = samples.parent / "blind.json"
    policies.main(["--make-blind-table", str(samples), "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def checkpoints(encoding, tmp_path_factory):
    """Two random models for 64-pixel pictures and one for 32."""
    folders = {}
    for name, seed, side in (("a", 0, 64), ("b", 1, 64), ("small", 2, 32)):
        config = mini_config(encoding.n_vocab)
        torch.manual_seed(seed)
        folders[name] = tmp_path_factory.mktemp("checkpoints") / name
        RoboMamba(replace(config, vision=replace(config.vision, image_size=side)), encoding).save_pretrained(
            folders[name]
        )
    return folders


def run(out, *flags, code=0) -> dict:
    """results.json of `sim_eval.py flags`, in this process."""
    assert sim_eval.main([*map(str, flags), "--out", str(out)]) == code
    return json.loads((out / ("results.json" if code == 0 else "results.partial.json")).read_text())


def observation(scene, label=None, instruction="open the door", rng=None) -> Observation:
    return Observation(scene, instruction, getattr(scene, "target", 0), label, rng)


VAL_SAFE = sim_eval.Job("val", "Safe", 0, 0)


@pytest.fixture
def bench():
    """One that is asked for by bench(flags), and closed."""
    made = []

    def make(**flags):
        made.append(sim_eval.Bench(EvalConfig(**flags)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def tiny(table, tmp_path_factory):
    out, flags = (
        tmp_path_factory.mktemp("tiny"),
        ("--policy", "expert,random,blind", "--episodes", "2", "--workers", "1"),
    )
    return out, (*flags, "--blind-table", table), run(out, *flags, "--blind-table", table)


# ---- scoring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(  # the usual textbook values, four digits
    "k, n, low, high", [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (10, 10, 0.7225, 1.0), (95, 100, 0.8882, 0.9785)]
)
def test_wilson_interval(k, n, low, high):
    assert wilson(0, 0) == {"k": 0, "n": 0, "rate": 0.0, "lo": 0.0, "hi": 1.0}  # nothing tried says nothing
    got = wilson(k, n)
    assert (got["k"], got["n"], got["rate"]) == (k, n, k / n)
    assert got["lo"] == pytest.approx(low, abs=1e-4) and got["hi"] == pytest.approx(high, abs=1e-4)


def test_summary_counts_categories_alike_and_every_failure():
    episodes = [("Safe", True, True)] * 3 + [("Safe", True, False)] + [("Door", False, False)] * 2
    records = [
        {"category": c, "initial": i, "long": g, "reason": "success" if i else "no seal", "pixel_error": k}
        for k, (c, i, g) in enumerate(episodes)
    ]
    got = report.summarise_split(records)
    assert got["n"] == 6 and got["initial"]["k"] == 4 and got["long"]["k"] == 3
    assert got["categories"] == {
        "Safe": {"n": 4, "initial": 1.0, "long": 0.75},
        "Door": {"n": 2, "initial": 0.0, "long": 0.0},
    }
    assert got["category_mean"] == {"initial": 0.5, "long": 0.375}  # the sample mean would be 0.667
    assert got["reasons"] == {"success": 4, "no seal": 2} and got["pixel_error"] == 2.5


def test_language_counts_scenes_with_several_parts():
    said = [(2, True, True, False), (2, True, True, False), (4, False, False, True)]
    records = [
        {"initial": right, "language": {"parts": n, "nearest": near, "wrong_initial": wrong}}
        for n, near, right, wrong in said
    ]
    got = report.summarise_language([*records, {"initial": True}])
    assert got["nearest"]["k"] == 2 and got["nearest"]["n"] == 3 and got["chance"] == pytest.approx(1.25 / 3, abs=1e-4)
    assert got["right_sentence"]["initial"]["k"] == 2 and got["wrong_sentence"]["initial"]["k"] == 1


# ---- the blind table ------------------------------------------------------------------------------------------------
def test_blind_table_holds_medians_and_falls_back(table):
    got = json.loads(table.read_text())
    assert got["samples"] == len(SAMPLES) and got["image_size"] == 64
    assert got["category_part"]["Safe/door"] == [14, 20, 0, 0, 1]
    assert got["part"]["door"][:2] == [22, 23] and got["median"][:2] == [30, 26] and got["mean"][:2] == [28.8, 33.4]

    class Stub:  # a scene of 128 pixels: twice the table's
        image_size, category = 128, "Safe"
        spec = catalogue.make_object("Safe", np.random.default_rng(0))

    policy = policies.blind_policy(got)
    u, v, approach = policy(observation(Stub))
    assert (u, v) == (28, 40) and approach.tolist() == [0, 0, 1]
    Stub.category = "Microwave"  # unknown to the table: the part's name decides
    assert policy(observation(Stub))[:2] == (44, 46)
    Stub.spec.parts[0].label = "flap"
    assert policy(observation(Stub))[:2] == (60, 52)
    assert policies.blind_policy(got, mean=True)(observation(Stub))[:2] == pytest.approx((57.6, 66.8))


@pytest.mark.parametrize(
    "line", ["{", '{"u": 1}', '{"image": "0.png", "category": "a", "part": "b", "u": 1, "v": 2, "approach": [0, 1]}']
)
def test_a_bad_sample_is_named_with_its_line(samples, tmp_path, line):
    bad = samples.parent / "bad.jsonl"
    bad.write_text(samples.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl, line {len(SAMPLES) + 1}:"):
        policies.main(["--make-blind-table", str(bad), "--out", str(tmp_path / "t.json")])
    assert not (tmp_path / "t.json").exists()


# ---- a run ----------------------------------------------------------------------------------------------------------
def test_results_have_the_promised_form(tiny):
    out, flags, results = tiny
    assert results["policy"] == "expert" and results["checkpoint"] is None and results["seed"] == 0
    assert results["command"].startswith("python sim_eval.py --policy expert,random,blind")
    assert {"torch", "numpy", "pybullet", "python"} <= results["versions"].keys() and "cores" in results["hardware"]
    assert results["partial"] is False and list(results["policies"]) == ["expert", "random", "blind"]
    assert results["splits"] == results["policies"]["expert"]["splits"] and list(results["splits"]) == [
        "seen",
        "unseen",
    ]
    for policy in results["policies"].values():
        for summary in policy["splits"].values():
            assert summary["n"] == 2 and sum(summary["reasons"].values()) == 2
            for goal in ("initial", "long"):
                assert {"k", "rate", "lo", "hi"} <= summary[goal].keys() and goal in summary["category_mean"]
                assert summary[goal]["lo"] <= summary[goal]["rate"] <= summary[goal]["hi"]
            assert all(c.keys() == {"n", "initial", "long"} for c in summary["categories"].values())
    assert results["splits"]["seen"]["initial"]["k"] == 2 and results["splits"]["seen"]["pixel_error"] == 0
    assert len(results["episodes"]) == 2 * 2 * 3
    keys = set("category part seed instruction u v moved initial long reason policy split".split())
    for record in results["episodes"]:
        assert keys <= record.keys() and record["part"].split()[-1] in record["instruction"].lower()
        base, names = (20_000_000, SEEN) if record["split"] == "seen" else (30_000_000, UNSEEN)
        assert record["category"] in names[:2] and base <= record["seed"] < base + 10_000_000
        assert record["initial"] == (record["moved"] >= 0.01) and (record["reason"] == "success") == record["initial"]
    table = (out / "table.md").read_text()
    assert (
        "| expert | 2/2 1.00 [0.34, 1.00] |" in table
        and "| expert, unconditioned | " in table
        and "seen: how episodes ended" in table
    )
    beside = (out / "categories.md").read_text()  # what the paper prints stands beside it, and says whose it is
    assert "| seen | n | expert | random | blind | RoboMamba (theirs) | ManipLLM (theirs) |" in beside
    assert "| Safe | 1 | 1.00 / " in beside and " | 0.81 | 0.68 |\n| Door | 1 |" in beside and "not compare" in beside
    assert beside.count("the average they print") == 2 and " | 0.63 | 0.56 |" in beside and " | 0.53 | 0.51 |" in beside
    assert not list(out.glob("*.tmp*")) and not list(out.glob(".probe*"))


def test_every_category_gets_its_share_of_the_protocol():
    jobs = sim_eval.make_jobs(EvalConfig(episodes=550), sim_eval.SPLITS["both"])
    counts = {split: Counter(job.category for job in jobs if job.split == split) for split in ("seen", "unseen")}
    assert len(set(jobs)) == len(jobs) == 1100 and set(counts["seen"]) == set(SEEN)
    assert set(counts["seen"].values()) == {27, 28} and counts["unseen"] == dict.fromkeys(UNSEEN, 55)
    half = [job.split for job in jobs[:550]]  # a run that is stopped has both splits
    assert half.count("seen") == 275


def test_the_papers_table_has_its_categories_and_averages():
    paper = json.loads((ROOT / "data" / "paper_table2.json").read_text())
    assert list(paper["categories"]) == [*SEEN, *UNSEEN]
    for who, seen, unseen in (("RoboMamba", 0.627, 0.533), ("ManipLLM", 0.5625, 0.535)):  # means of the printed columns
        values = [row[who] for row in paper["categories"].values()]
        assert np.mean(values[:20]) == pytest.approx(seen) and np.mean(values[20:]) == pytest.approx(unseen)


def without_time(results: dict) -> dict:
    return {key: results[key] for key in ("policies", "episodes", "expert_unconditioned", "splits", "split", "seed")}


def test_the_same_run_twice_is_the_same_and_another_seed_is_not(tiny, tmp_path):
    _, flags, first = tiny
    assert without_time(run(tmp_path / "again", *flags)) == without_time(first)
    other = run(tmp_path / "other", *flags, "--seed", 1)
    assert not {record["seed"] for record in other["episodes"]} & {record["seed"] for record in first["episodes"]}


def test_two_workers_give_what_one_gives(tiny, tmp_path):
    _, flags, first = tiny
    assert without_time(run(tmp_path, *flags, "--workers", 2)) == without_time(first)


def test_more_episodes_and_more_policies_leave_the_earlier_ones_alone(tiny, tmp_path):
    _, _, first = tiny
    wider = run(tmp_path, "--policy", "random,random-normal", "--episodes", 3, "--workers", 1)
    wanted = [record for record in first["episodes"] if record["policy"] == "random"]
    assert len(wanted) == 4 and all(record in wider["episodes"] for record in wanted)


def test_a_record_can_be_played_again(tiny):
    with Scene() as scene:
        for record in tiny[2]["episodes"]:
            scene.spawn(record["category"], record["seed"]).render()
            outcome = scene.act(record["u"], record["v"], record["approach"])
            assert (round(outcome.moved, 5), outcome.reason) == (record["moved"], record["reason"])


def test_disturbed_labels_are_off_by_what_their_name_says(tmp_path):
    flags = ("--policy", "pixel-8,direction-20,expert-jittered,hinge-pixel,part-pixel-normal", "--split", "drawer-door")
    results = run(tmp_path, *flags, "--episodes", 6, "--workers", 1)
    by_policy = {name: [r for r in results["episodes"] if r["policy"] == name] for name in results["policies"]}
    assert [len(by_policy[name]) for name in ("pixel-8", "direction-20", "part-pixel-normal")] == [12, 12, 12]
    assert all(
        r["pixel_error"] == pytest.approx(8, abs=0.01) and r["approach_error_deg"] < 0.01 for r in by_policy["pixel-8"]
    )
    assert all(r["approach_error_deg"] == pytest.approx(20, abs=0.01) for r in by_policy["direction-20"])
    assert all(r["pixel_error"] == 0 for r in by_policy["direction-20"])
    assert all(0 < r["pixel_error"] < math.sqrt(2) + 0.01 for r in by_policy["expert-jittered"])
    assert 0 < len(by_policy["hinge-pixel"]) < 12  # tables have drawers, which have no hinge
    assert not any("drawer" in r["part"] or r["initial"] for r in by_policy["hinge-pixel"])
    drawers, doors = ({r["category"] for r in results["episodes"] if r["split"] == s} for s in ("unseen", "seen"))
    assert drawers == {*DRAWER_DOOR_UNSEEN} and doors == {*DRAWER_DOOR_SEEN}


def test_no_strips_of_a_policy_that_applies_to_no_scene(tmp_path):
    run(tmp_path, "--policy", "hinge-pixel,expert", "--split", "unseen", "--categories", "Table",
        "--episodes", 1, "--workers", 1, "--strips", 1)  # fmt: skip
    assert (tmp_path / "results.json").exists() and not list(tmp_path.glob("*.png"))


def test_only_some_categories_and_archetypes(tmp_path):
    both = {"seen": ("Door", "Box"), "unseen": ("Table",)}
    assert sim_eval.only(both, "Table") == {"unseen": ("Table",)}
    assert sim_eval.only(both, "Box, Table") == {"seen": ("Box",), "unseen": ("Table",)}
    with pytest.raises(ValueError, match="--categories: unknown grammar:book; choose from Door, Box, Table"):
        sim_eval.only(both, "grammar:book")
    flags = ("--policy", "expert", "--split", "val", "--categories", "Laptop,grammar:trays", "--episodes", 4)
    results = run(tmp_path, *flags, "--workers", 1)
    shown = results["splits"]["val"]["categories"]
    assert {name: scores["n"] for name, scores in shown.items()} == {"Laptop": 2, "grammar:trays": 2}
    assert "grammar:trays | 2 | 1.00 / 1.00 | - | - |" in (tmp_path / "categories.md").read_text()
    run(tmp_path, "--policy", "expert", "--split", "seen", "--categories", "Door", "--episodes", 1, "--workers", 1)
    beside = (tmp_path / "categories.md").read_text()  # the paper's average is one of all categories
    assert "| Door | 1 | 1.00 / 1.00 | 0.73 | 0.62 |" in beside and "the average they print" not in beside


# ---- models ---------------------------------------------------------------------------------------------------------
def test_a_model_is_used_in_four_ways(checkpoints, monkeypatch):
    model = load_model(checkpoints["a"])
    label = Label(3.0, 4.0, np.array([0.0, 0.6, 0.8]))
    with Scene(64) as scene:
        scene.spawn("Door", 1).render()
        o = sim_eval.observe(scene, label, "test")
        monkeypatch.setattr(RoboMamba, "generate", lambda *_, **__: "50 25 49 49 99")
        u, v, approach = model_policy(model, {"text"})(o)
        assert (u / 64, v / 64) == pytest.approx((0.505, 0.255)) and approach[2] > 0.99
        monkeypatch.setattr(RoboMamba, "generate", lambda *_, **__: "I do not know")
        assert sim_eval.attempt(model_policy(model, {"text"}), o, o.part).outcome.reason == "not a number"
        u, v, approach = model_policy(model, {"other"})(o)
        pixel, direction = (model_policy(model, {way})(o) for way in ("pixel", "direction"))
        assert pixel == (u, v, label.approach) and direction[:2] == (3, 4) and (direction[2] == approach).all()

        def with_depth(self, image, instruction, depth, intrinsics, point, refine):
            assert depth.shape == image.shape[:2] == (64, 64) and depth.dtype == np.float32
            assert ((depth > 0) <= np.isfinite(scene.depth)).mean() > 0.99 and intrinsics == o.intrinsics
            return Action(float(point), float(refine), np.eye(3))

        monkeypatch.setattr(RoboMamba, "predict_action", with_depth)
        ways = [{"depth"}, {"depth", "raw"}, {"depth", "head"}, {"depth", "head", "raw"}]
        said = [model_policy(model, way)(o)[:2] for way in ways]
        assert said == [(True, True), (True, False), (False, True), (False, False)]


def test_the_end_of_a_name_says_how_its_checkpoint_is_used(checkpoints, monkeypatch):
    monkeypatch.setattr(sim_eval, "model_policy", lambda model, ways: ways)
    names = {"wide-text-2": {""}, "my-pixel-net": {""}, "a-depth-head": {"depth", "head"}, "b-depth": {"depth"}}
    listed = ",".join(f"{name}={checkpoints['b']}" for name in names)
    cfg = EvalConfig(policy=f"model,model-point,{listed}", checkpoint=str(checkpoints["a"]))
    found, _, _ = sim_eval.make_policies(cfg)
    assert found == {"model": {""}, "model-point": {"point"}} | names


def test_the_wrong_sentence_comes_with_its_own_part_and_label():
    shown = []

    def policy(o):
        shown.append(o)
        return 1.0, 1.0, np.array([0.0, 0.0, 1.0])

    with Scene(64) as scene:
        for seed in range(40):
            scene.spawn("StorageFurniture", seed).render()
            label = expert(scene, np.random.default_rng(0))
            labels = sim_eval.all_labels(scene, label) if label else {}
            if len(labels) > 1:
                break
        o = sim_eval.observe(scene, label, "test")
        done = sim_eval.attempt(policy, o, o.part)
        sim_eval.wrong_sentence(policy, o, done, labels)
    right, wrong = shown
    assert wrong.part != right.part == o.part and wrong.label is labels[wrong.part] and right.label is label


def test_checkpoints_side_by_side_on_the_same_scenes(checkpoints, tmp_path):
    flags = ("--policy", f"model,random-backbone={checkpoints['b']},expert", "--checkpoint", checkpoints["a"])
    results = run(tmp_path, *flags, "--split", "drawer-door", "--episodes", 8, "--workers", 1)
    assert results["checkpoint"] == str(checkpoints["a"]) and results["policies"]["expert"]["checkpoint"] is None
    assert results["policies"]["random-backbone"]["checkpoint"] == str(checkpoints["b"])
    by_policy = {name: [r for r in results["episodes"] if r["policy"] == name] for name in results["policies"]}
    scenes = [[(r["category"], r["seed"], r["instruction"]) for r in records] for records in by_policy.values()]
    assert scenes[0] == scenes[1] == scenes[2] and len(scenes[0]) == 16
    assert [r["u"] for r in by_policy["model"]] != [r["u"] for r in by_policy["random-backbone"]]
    record = by_policy["model"][3]
    with Scene(64) as scene:
        action = RoboMamba.from_pretrained(checkpoints["a"]).predict_action(
            scene.spawn(record["category"], record["seed"]).render(), record["instruction"]
        )
    assert (record["u"], record["v"]) == pytest.approx((action.u, action.v), abs=1e-2)
    asked = [r["language"] for r in by_policy["model"] if "language" in r]
    assert len(asked) == results["language"]["nearest"]["n"] >= 3 and all(said["parts"] >= 2 for said in asked)
    assert results["language"] == results["policies"]["model"]["language"] and 0 < results["language"]["chance"] <= 0.5
    assert not any("language" in r for r in by_policy["expert"]) and results["policies"]["model"]["predict_ms"] > 0
    assert "ms a prediction" in (tmp_path / "table.md").read_text()


def test_checkpoints_of_two_picture_sizes_are_refused(checkpoints, tmp_path):
    flags = ["--policy", f"model,other={checkpoints['small']}", "--checkpoint", str(checkpoints["a"])]
    with pytest.raises(ValueError, match="different sizes"):
        sim_eval.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_prediction_that_is_not_a_number_is_a_failure(bench):
    one = bench(policy="random")
    one.policies = {"random": lambda _: (math.nan, 3.0, np.array([0.0, 0.0, 1.0]))}
    record = one.episode(VAL_SAFE)["records"][0]
    assert record["reason"] == "not a number" and record["u"] is None and not record["initial"] and record["moved"] == 0
    json.dumps(record, allow_nan=False)


def test_a_scene_without_a_contact_is_counted_and_passed_over(bench, monkeypatch):
    one, calls = bench(policy="expert"), []
    monkeypatch.setattr(sim_eval, "expert", lambda *a: calls.append(0) or (expert(*a) if len(calls) > 2 else None))
    answer = one.episode(VAL_SAFE)
    assert (answer["tried"], answer["solved"]) == (3, 1) and answer["records"][0]["seed"] == VAL_SAFE.scene_seed(2)
    monkeypatch.setattr(sim_eval, "expert", lambda *_: None)
    answer = one.episode(VAL_SAFE)
    assert (answer["tried"], answer["solved"], answer["records"]) == (sim_eval.MAX_TRIES, 0, [])


# ---- what a policy is given, and policies of the user ----------------------------------------------------------------


def test_an_observation_is_what_a_camera_gives():
    with Scene(64) as scene:
        scene.spawn("Microwave", 5).render()
        o = sim_eval.observe(scene, None, "policy x")
        assert o.image.shape == (64, 64, 3) and o.image.dtype == np.uint8 and (o.image == scene.rgb).all()
        o.image[:] = 0  # a copy: the next policy sees the picture
        assert (o.image == scene.rgb).all()
        assert o.depth.shape == (64, 64) and (o.depth == o.depth).all()
        exact = observation(scene).depth
        assert ((exact > 0) == (scene.links >= -1)).all() and exact.dtype == np.float32
        fx, fy, cx, cy = o.intrinsics
        row, column = np.argwhere(scene.links == scene.target)[7]
        z = exact[row, column]
        point = scene.camera_rotation @ (scene.backproject(column, row) - scene.eye)
        assert [(column - cx) * z / fx, (row - cy) * z / fy, z] == pytest.approx(point.tolist(), abs=1e-5)


USER_POLICY = """
import time
import torch

def good(o):
    return o.label.u, o.label.v, 7 * o.label.approach

def clumsy(o):
    if o.scene.seed % 2:
        raise KeyError("drawer")
    return o.label.u, o.label.v, o.label.approach

def slow(o):
    try:
        time.sleep(60)
    except Exception:
        pass

answers = {"nan": (1, float("nan"), (0, 0, 1)), "flat": (1, 2, 3), "long": (1, 2, (0, 0, 1, 0)), "none": None,
           "words": ("a", "b", (0, 0, 1)), "zero": (1, 2, (0, 0, 0)), "text": "1 2 3", "exit": SystemExit(0),
           "grad": (1, 2, torch.ones(3, requires_grad=True))}

def made(name):
    def policy(o):
        if isinstance(answers[name], BaseException):
            raise answers[name]
        return answers[name]
    return policy

nan, flat, long, none, words, zero, text, exit, grad = (made(name) for name in answers)
number = 5
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of a name of its own in the current folder."""
    name = f"policy_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(USER_POLICY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_policy_of_the_user_is_scored_and_its_failures_are_counted(user_module, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "TIME_LIMIT_S", 0.2)
    names = ("good", "clumsy", "slow", "nan", "flat", "long", "none", "words", "zero", "text", "exit", "grad")
    flags = ",".join(f"my-{name}={user_module}:{name}" for name in names)
    start = time.monotonic()
    results = run(tmp_path / "out", "--policy", flags, "--split", "val", "--episodes", 6, "--workers", 1)
    reasons = {name: results["policies"][f"my-{name}"]["splits"]["val"]["reasons"] for name in names}
    clumsy = reasons.pop("clumsy")
    assert set(clumsy) == {"success", "raised KeyError"} and sum(clumsy.values()) == 6
    assert reasons == {
        "good": {"success": 6},
        "slow": {"longer than 0.2 s": 6},
        "nan": {"not a number": 6},
        "flat": {"wrong shape": 6},
        "long": {"wrong shape": 6},
        "none": {},  # does not apply
        "words": {"wrong shape": 6},
        "zero": {"zero direction": 6},
        "text": {"wrong shape": 6},
        "exit": {"raised SystemExit": 6},
        "grad": {"wrong shape": 6},
    }
    assert time.monotonic() - start < 60
    failed = next(r for r in results["episodes"] if r["reason"] == "raised KeyError")
    assert failed["failure"] == "raised KeyError: 'drawer'" and failed["u"] is None and not failed["on_part"]
    assert results["policies"]["my-good"]["checkpoint"] == f"{user_module}:good"
    assert results["policies"]["my-slow"]["predict_ms"] is None  # it made no prediction
    assert (
        results["policies"]["my-good"]["predict_ms"] < 5 and results["policies"]["my-none"]["splits"]["val"]["n"] == 0
    )
    assert "| my-none | - | - | - |  |" in (tmp_path / "out/table.md").read_text()  # nothing tried is not 0.00
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("function, said", [("number", "not a function"), ("missing", "AttributeError")])
def test_a_function_that_is_none_is_named(user_module, function, said):
    with pytest.raises(ValueError, match=f"--policy x={user_module}:{function}: {said}"):
        sim_eval.Bench(EvalConfig(policy=f"x={user_module}:{function}"))


def test_the_default_files_are_found_from_anywhere(tmp_path, monkeypatch, bench):
    monkeypatch.chdir(tmp_path)
    one = bench(policy="model,blind,mean-action")
    assert list(one.policies) == ["model", "blind", "mean-action"] and one.image_size == 128


def test_a_random_pixel_gets_the_help_of_the_depth_picture(monkeypatch):
    asked = []

    def refine(u, v, approach, depth, intrinsics):
        asked.append((u, v, approach, depth.shape, intrinsics))
        return u, v, None if len(asked) == 2 else np.array([0.0, 0.6, 0.8])

    monkeypatch.setattr(depth, "refine", refine)
    with Scene(64) as scene:
        scene.spawn("Box", 3).render()
        o = sim_eval.observe(scene, None, "policy random-depth")
        u, v, approach = sim_eval.random_depth(o)
        assert scene.links[int(v), int(u)] >= -1 and asked[0] == (u, v, None, (64, 64), o.intrinsics)
        assert approach.tolist() == [0, 0.6, 0.8]
        assert list(sim_eval.random_depth(o)[2]) == [0, 0, 1]  # where nothing was measured


# ---- pictures and modes ---------------------------------------------------------------------------------------------
def test_strips_show_a_failure_and_the_gif_has_few_colours(tmp_path):
    run(tmp_path, "--policy", "pixel-8", "--split", "seen", "--episodes", 12, "--workers", 1, "--strips", 3)
    strips = sorted(tmp_path.glob("strip_*.png"))
    kinds = {path.stem.split("_")[-1] for path in strips}
    assert len(strips) == 3 and kinds == {"success", "failure"}
    with Image.open(strips[0]) as strip:
        assert strip.height > 256 and strip.width % 256 == 0 and 4 <= strip.width // 256 <= 6
    with Image.open(tmp_path / "strips.png") as sheet:
        assert sheet.height == 3 * (128 + strip.height - 256) and sheet.width >= strip.width // 2
    with Image.open(tmp_path / "episode.gif") as gif:
        assert gif.n_frames > 10 and len(gif.convert("RGB").getcolors()) <= 64
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(gif.n_frames - 1)
        assert (np.abs(np.asarray(gif.convert("RGB")) - first) > 40).any()  # something moved


def test_choice_of_strips_takes_failures_that_show_something():
    def record(split, initial, reason):
        return {"split": split, "initial": initial, "long": initial, "reason": reason}

    records = [record("seen", True, "success")] * 5 + [
        record("unseen", False, "off object"),
        record("unseen", False, "slipped"),
    ]
    assert [r["reason"] for r in pictures.choose(records, 3)] == ["success", "success", "slipped"]
    assert [r["reason"] for r in pictures.choose(records[5:], 6)] == ["slipped", "off object"]
    assert pictures.choose(records[:5], 2) == records[:2]


def test_demo(checkpoints, table, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sim_eval.DEMO, "episodes", 2)
    flags = ("--demo", "--checkpoint", checkpoints["a"], "--blind-table", table, "--workers", 1)
    results = run(tmp_path, *flags)
    said = capsys.readouterr().out
    assert list(results["policies"]) == sim_eval.DEMO["policy"].split(",") and len(results["episodes"]) == 4 * 6
    assert said.count("  you    ") >= 4 == said.count("  you    ") - said.count("  truth  ") + 4
    assert "Predict the contact point" in said and "| model |" in said and str(tmp_path / "results.json") in said
    assert (
        (tmp_path / "scene.png").exists()
        and (tmp_path / "episode.gif").exists()
        and len([*tmp_path.glob("strip_*")]) == 4
    )


def test_physics_is_a_set_of_policies_on_validation_scenes(tmp_path):
    results = run(tmp_path, "--policy", "physics", "--episodes", 2, "--workers", 1)
    assert results["split"] == "val" and list(results["policies"]) == sim_eval.PHYSICS.split(",")
    assert results["splits"]["val"]["initial"]["k"] == 2 and "| direction-60 |" in (tmp_path / "table.md").read_text()


def test_affordance_is_red_at_the_hinge_and_green_at_the_edge(tmp_path):
    pictures.main(["--affordance", "Microwave,Bottle", "--out", str(tmp_path)])
    with Image.open(tmp_path / "affordance.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    below = pixels[256:512]
    for colour in ((255, 0, 0), (0, 255, 0)):  # near the hinge nothing moves, at the free edge all of it
        assert (below[:, :256] == colour).all(-1).sum() > 100
    assert not (pixels[:256] == (255, 0, 0)).all(-1).any()


# ---- reports --------------------------------------------------------------------------------------------------------
def test_names_that_would_break_a_table_are_written_plain():
    line = report.row("a|b\n<script>", "x" * 100_000)
    assert line.startswith("| a&#124;b &lt;script> | xxx") and len(line) < 300 and line.count("|") == 3
    assert "\n" not in line
    skipped = {"objects": {"a\n<b>": "no | mesh"}, "held_joints": {}, "infeasible": {"<i>": 2}, "given_up": {}}
    text = "\n".join(report.skips(skipped))
    assert "* a &lt;b>: no &#124; mesh" in text and "(&lt;i> 2)" in text


def test_pixels_on_no_movable_part_are_left_out_of_the_ancestors_rate(tiny):
    out, _, results = tiny
    for name, policy in results["policies"].items():
        for split, summary in policy["splits"].items():
            mine = [r for r in results["episodes"] if (r["policy"], r["split"]) == (name, split) and r["on_part"]]
            assert summary["on_part"]["initial"]["n"] == len(mine) <= summary["n"]
            assert summary["on_part"]["long"]["k"] == sum(r["long"] for r in mine) == summary["long"]["k"]
    assert results["splits"]["seen"]["on_part"]["initial"]["n"] == 2
    off = [r for r in results["episodes"] if r["reason"] in ("on body", "off object")]
    assert off and not any(r["on_part"] for r in off)
    assert "| pixels on a movable part only | seen >= 0.01 |" in (out / "table.md").read_text()


def test_printing_tables_again_and_what_is_no_result(tmp_path, monkeypatch, capsys):
    def again(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        report.main()

    again(ROOT / "data/results/ablations.json", "--out", tmp_path / "short.json")
    short = json.loads((tmp_path / "short.json").read_text())
    assert capsys.readouterr().out.startswith("| policy |") and "episodes" not in short and short["policies"]["model"]
    for name in ("data/results/mistakes.json", "data/results/speed.json"):
        with pytest.raises(ValueError, match=f"{name}: not a results.json"):
            again(ROOT / name)
    for name in ("README.md", "nowhere.json"):
        with pytest.raises(ValueError, match=f"{name}: (not valid JSON|no such file)"):
            again(ROOT / name)
