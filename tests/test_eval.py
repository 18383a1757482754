"""pytest tests/test_eval.py -q

The examination: intervals, results.json, the same run twice and in several processes, accidents, every bad input.
"""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mini_config
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sim_eval  # noqa: E402
from common.scripts import start_worker  # noqa: E402
from extras import panda  # noqa: E402
from robomamba import RoboMamba  # noqa: E402
from sim import objects, pictures  # noqa: E402
from sim.scene import p, unit  # noqa: E402
from sim_eval import (  # noqa: E402
    EvalConfig,
    Scene,
    main,
    model_policy,  # noqa: E402
    wilson,
)

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
    assert main(["--make-blind-table", str(samples), "--blind-table", str(path)]) == 0
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
    assert main([*map(str, flags), "--out", str(out)]) == code
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def tiny(table, tmp_path_factory):
    out, flags = (
        tmp_path_factory.mktemp("tiny"),
        ("--policy", "expert,random,blind", "--episodes", "2", "--workers", "1"),
    )
    return out, (*flags, "--blind-table", table), run(out, *flags, "--blind-table", table)


# ---- scoring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(  # the usual textbook values, four digits
    "k, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (95, 100, 0.8882, 0.9785),
    ],
)
def test_wilson_interval(k, n, low, high):
    got = wilson(k, n)
    assert (got["k"], got["n"], got["rate"]) == (k, n, k / n)
    assert got["lo"] == pytest.approx(low, abs=1e-4) and got["hi"] == pytest.approx(high, abs=1e-4)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == {"k": 0, "n": 0, "rate": 0.0, "lo": 0.0, "hi": 1.0}


def test_summary_counts_categories_alike_and_every_failure():
    episodes = [("Safe", True, True)] * 3 + [("Safe", True, False)] + [("Door", False, False)] * 2
    records = [
        {"category": c, "initial": i, "long": g, "reason": "success" if i else "no seal", "pixel_error": k}
        for k, (c, i, g) in enumerate(episodes)
    ]
    got = sim_eval.summarise(records)
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
    got = sim_eval.language([*records, {"initial": True}])
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
        spec = objects.make_object("Safe", np.random.default_rng(0))

    policy = sim_eval.blind_policy(got, mean=False)
    u, v, approach = policy(Stub, "open the door", 0, None)
    assert (u, v) == (28, 40) and approach.tolist() == [0, 0, 1]
    Stub.category = "Microwave"  # unknown to the table: the part's name decides
    assert policy(Stub, "", 0, None)[:2] == (44, 46)
    Stub.spec.parts[0].label = "flap"
    assert policy(Stub, "", 0, None)[:2] == (60, 52)
    assert sim_eval.blind_policy(got, mean=True)(Stub, "", 0, None)[:2] == pytest.approx((57.6, 66.8))


@pytest.mark.parametrize(
    "line", ["{", '{"u": 1}', '{"image": "0.png", "category": "a", "part": "b", "u": 1, "v": 2, "approach": [0, 1]}']
)
def test_a_bad_sample_is_named_with_its_line(samples, tmp_path, line, capsys):
    bad = samples.parent / "bad.jsonl"
    bad.write_text(samples.read_text() + line + "\n")
    assert main(["--make-blind-table", str(bad), "--blind-table", str(tmp_path / "t.json")]) == 2
    assert f"bad.jsonl, line {len(SAMPLES) + 1}:" in capsys.readouterr().err and not (tmp_path / "t.json").exists()


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
    keys = {
        "category",
        "part",
        "seed",
        "instruction",
        "u",
        "v",
        "moved",
        "initial",
        "long",
        "reason",
        "policy",
        "split",
    }
    for record in results["episodes"]:
        assert keys <= record.keys() and record["part"].split()[-1] in record["instruction"].lower()
        base, names = (20_000_000, objects.SEEN) if record["split"] == "seen" else (30_000_000, objects.UNSEEN)
        assert record["category"] in names[:2] and base <= record["seed"] < base + 10_000_000
        assert record["initial"] == (record["moved"] >= 0.01) and (record["reason"] == "success") == record["initial"]
    table = (out / "table.md").read_text()
    assert (
        "| expert | 2/2 1.00 [0.34, 1.00] |" in table and "| expert, unconditioned | " in table and "seen: why" in table
    )
    beside = (out / "categories.md").read_text()  # what the paper prints stands beside it, and says whose it is
    assert "| seen | n | expert | random | blind | RoboMamba (theirs) | ManipLLM (theirs) |" in beside
    assert "| Safe | 1 | 1.00 / " in beside and " | 0.81 | 0.68 |\n| Door | 1 |" in beside and "must not" in beside
    assert beside.count("the average they print") == 2 and " | 0.63 | 0.56 |" in beside and " | 0.53 | 0.51 |" in beside
    assert not list(out.glob("*.tmp*")) and not list(out.glob(".probe*"))


def test_every_category_gets_its_share_of_the_protocol():
    jobs = sim_eval.make_jobs(EvalConfig(split="both", episodes=550))
    counts = {split: Counter(job.category for job in jobs if job.split == split) for split in ("seen", "unseen")}
    assert len(set(jobs)) == len(jobs) == 1100 and set(counts["seen"]) == set(objects.SEEN)
    assert set(counts["seen"].values()) == {27, 28} and counts["unseen"] == dict.fromkeys(objects.UNSEEN, 55)
    half = [job.split for job in jobs[:550]]  # a run that is stopped has both splits
    assert half.count("seen") == 275


def test_the_papers_table_has_its_categories_and_averages():
    paper = json.loads((ROOT / "data" / "paper_table2.json").read_text())
    assert list(paper["categories"]) == [*objects.SEEN, *objects.UNSEEN]
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
    scene = Scene()
    try:
        for record in tiny[2]["episodes"]:
            scene.spawn(record["category"], record["seed"]).render()
            outcome = scene.act(record["u"], record["v"], record["approach"])
            assert (round(outcome.moved, 5), outcome.reason) == (record["moved"], record["reason"])
    finally:
        scene.close()


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
    assert drawers == {*objects.DRAWER_DOOR_UNSEEN} and doors == {*objects.DRAWER_DOOR_SEEN}


# ---- closed loop ----------------------------------------------------------------------------------------------------
def test_closed_loop_goes_on_where_the_last_grip_ended(tmp_path):
    flags = ("--policy", "expert,random-normal", "--split", "drawer-door", "--episodes", 5, "--workers", 1)
    once, again = run(tmp_path / "once", *flags), run(tmp_path / "again", *flags, "--closed-loop", 2)
    loops = [record.pop("closed_loop") for record in again["episodes"]]
    assert once["episodes"] == again["episodes"]  # the open loop beside it is the usual one, in the usual world
    assert not any("closed_loop" in record for record in once["episodes"])
    gained = []
    for record, loop in zip(again["episodes"], loops, strict=True):
        assert 1 <= len(loop["reasons"]) <= 3 and loop["reasons"][0] == record["reason"]
        assert loop["initial"] == (loop["moved"] >= 0.01) and loop["long"] >= (loop["moved"] >= 0.1)
        if record["policy"] == "expert":
            gained.append(loop["moved"] - record["moved"])
    assert min(gained) > -0.01 and np.median(gained) > 0.05  # a second pull opens a door further
    summary = again["splits"]["seen"]["closed_loop"]
    assert summary["grips"] == 3 and summary["initial"]["n"] == 5 and summary["moved"] > summary["open"]["moved"]
    assert "closed loop (3 grips" in (tmp_path / "again" / "table.md").read_text()


def test_closed_loop_ends_when_the_part_is_gone_and_leaves_the_scene_as_it_was():
    bench = sim_eval.Bench(EvalConfig(policy="random", closed_loop=3))
    job = sim_eval.Job("val", "Safe", 0, sim_eval.VAL, 0)
    try:
        bench.find(job)
        scene, label, seen = bench.scene, bench.label, []
        before, joints = scene.rgb.copy(), list(scene.joints)

        def same(scene, instruction, part, rng):
            seen.append((scene.joints[part], scene.rgb.copy()))
            return label.u, label.v, label.approach

        loop = bench.closed_loop("same", same, (label.u, label.v, label.approach), "", scene.target)
        assert len(seen) == 3 and seen[0][0] > joints[scene.target] + 0.1 and (seen[0][1] != before).any()
        assert len(loop["reasons"]) == 4 and loop["reasons"][0] == "success"
        assert scene.joints == joints and (scene.rgb == before).all() and bench.label is label
        nowhere = bench.closed_loop("gone", lambda *_: None, (label.u, label.v, label.approach), "", scene.target)
        assert nowhere["reasons"] == ["success"] and nowhere["moved"] == pytest.approx(seen[0][0] - joints[0], abs=1e-5)
        lost = bench.closed_loop("same", same, (math.nan, 0.0, label.approach), "", scene.target)
        assert lost["reasons"][:2] == ["not a number", "success"]  # the next look may be luckier
    finally:
        bench.close()


# ---- models ---------------------------------------------------------------------------------------------------------
def test_an_action_spelled_out_is_read_back_and_babble_is_a_failure(checkpoints, monkeypatch):
    policy, S = model_policy(str(checkpoints["a"]), as_text=True)
    scene = Scene(64)
    try:
        scene.spawn("Door", 1).render()
        monkeypatch.setattr(RoboMamba, "generate", lambda *_, **__: "50 25 49 49 99")
        u, v, approach = policy(scene, "open the door", 0, None)
        assert (u / S, v / S) == pytest.approx((0.505, 0.255)) and approach[2] > 0.99
        monkeypatch.setattr(RoboMamba, "generate", lambda *_, **__: "I do not know")
        u, v, approach = policy(scene, "open the door", 0, None)
        assert scene.act(u, v, approach).reason == "not a number"
    finally:
        scene.close()


def test_checkpoints_side_by_side_on_the_same_scenes(checkpoints, tmp_path):
    flags = ("--policy", f"model,random-backbone={checkpoints['b']},expert", "--checkpoint", checkpoints["a"])
    results = run(tmp_path, *flags, "--split", "drawer-door", "--episodes", 8, "--workers", 1)
    assert results["checkpoint"] == str(checkpoints["a"]) and results["policies"]["expert"]["checkpoint"] is None
    assert results["policies"]["random-backbone"]["checkpoint"] == str(checkpoints["b"])
    by_policy = {name: [r for r in results["episodes"] if r["policy"] == name] for name in results["policies"]}
    scenes = [[(r["category"], r["seed"], r["instruction"]) for r in records] for records in by_policy.values()]
    assert scenes[0] == scenes[1] == scenes[2] and len(scenes[0]) == 16
    assert [r["u"] for r in by_policy["model"]] != [r["u"] for r in by_policy["random-backbone"]]
    record, scene = by_policy["model"][3], Scene(64)
    try:
        action = RoboMamba.from_pretrained(checkpoints["a"]).predict_action(
            scene.spawn(record["category"], record["seed"]).render(), record["instruction"]
        )
    finally:
        scene.close()
    assert (record["u"], record["v"]) == pytest.approx((action.u, action.v), abs=1e-2)
    asked = [r["language"] for r in by_policy["model"] if "language" in r]
    assert len(asked) == results["language"]["nearest"]["n"] >= 3 and all(said["parts"] >= 2 for said in asked)
    assert results["language"] == results["policies"]["model"]["language"] and 0 < results["language"]["chance"] <= 0.5
    assert not any("language" in r for r in by_policy["expert"]) and results["policies"]["model"]["predict_ms"] > 0
    assert "ms a prediction" in (tmp_path / "table.md").read_text()


def test_half_of_the_action_is_the_experts(checkpoints, tmp_path):
    flags = ("--policy", "model,model-pixel,model-direction,expert", "--checkpoint", checkpoints["a"])
    results = run(tmp_path, *flags, "--split", "drawer-door", "--episodes", 4, "--workers", 1)
    by_policy = {name: [r for r in results["episodes"] if r["policy"] == name] for name in results["policies"]}
    pixels = {name: [(r["u"], r["v"]) for r in records] for name, records in by_policy.items()}
    directions = {name: [r["approach"] for r in records] for name, records in by_policy.items()}
    assert pixels["model-pixel"] == pixels["model"] != pixels["expert"] == pixels["model-direction"]
    assert directions["model-direction"] == directions["model"] != directions["expert"] == directions["model-pixel"]


def test_a_prediction_that_is_not_a_number_is_a_failure():
    bench = sim_eval.Bench(EvalConfig(policy="random"))
    bench.policies = {"random": lambda *_: (math.nan, 3.0, np.array([0.0, 0.0, 1.0]))}
    try:
        record = bench.episode(sim_eval.Job("val", "Safe", 0, sim_eval.VAL, 0))["records"][0]
    finally:
        bench.close()
    assert record["reason"] == "not a number" and record["u"] is None and not record["initial"] and record["moved"] == 0
    json.dumps(record, allow_nan=False)


def test_a_scene_without_a_contact_is_counted_and_passed_over(monkeypatch):
    bench, expert, calls = sim_eval.Bench(EvalConfig(policy="expert")), Scene.expert, []
    monkeypatch.setattr(
        Scene, "expert", lambda *a, **k: calls.append(0) or (expert(*a, **k) if len(calls) > 2 else None)
    )
    job = sim_eval.Job("val", "Safe", 0, sim_eval.VAL, 0)
    try:
        answer = bench.episode(job)
        assert (answer["tried"], answer["solved"]) == (3, 1) and answer["records"][0]["seed"] == job.scene_seed(2)
        monkeypatch.setattr(Scene, "expert", lambda *a, **k: None)
        answer = bench.episode(job)
        assert (answer["tried"], answer["solved"], answer["records"]) == (sim_eval.MAX_TRIES, 0, [])
    finally:
        bench.close()


# ---- accidents ------------------------------------------------------------------------------------------------------
def test_ctrl_c_leaves_a_readable_partial_result(tmp_path, monkeypatch, capsys):
    episode, calls = sim_eval.Bench.episode, []

    def interrupted(self, job):
        calls.append(job)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return episode(self, job)

    monkeypatch.setattr(sim_eval.Bench, "episode", interrupted)
    results = run(tmp_path, "--policy", "expert", "--episodes", 4, "--workers", 1, "--strips", 1, code=130)
    assert results["partial"] is True and len(results["episodes"]) == 3
    assert results["splits"]["seen"]["n"] == 2 and results["splits"]["unseen"]["n"] == 1
    assert "Partial" in (tmp_path / "table.md").read_text() and "3 of 8 scenes" in capsys.readouterr().err


def test_a_killed_worker_is_noticed_and_its_share_is_done_again(capsys):
    cfg = EvalConfig(policy="expert", split="val", episodes=30, workers=2)
    jobs, answers = sim_eval.make_jobs(cfg), {}
    for job, answer in sim_eval.run_jobs(cfg, jobs):
        if not answers:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        answers[job] = answer
    assert set(answers) == set(jobs) and all(answer["records"] for answer in answers.values())
    assert "a worker process died" in capsys.readouterr().err


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    code = f"""
import multiprocessing, os, signal, sys
from pathlib import Path
import sim_eval
if __name__ == "__main__":
    cfg = sim_eval.EvalConfig(policy="expert", split="val", episodes=200, workers=2)
    for job, answer in sim_eval.run_jobs(cfg, sim_eval.make_jobs(cfg)):
        Path({str(tmp_path / "workers")!r}).write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
        os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "parent.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.run([sys.executable, tmp_path / "parent.py"], env=environment, capture_output=True, timeout=60)
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert parent.returncode == -signal.SIGKILL and len(workers) == 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def test_workers_of_the_data_builder_do_not_outlive_it_either(tmp_path):
    flags = ["--scenes", "5000", "--workers", "2", "--image-size", "32", "--split", "val", "--out", str(tmp_path)]
    builder = subprocess.Popen([sys.executable, "-m", "data.build", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len({*tmp_path.glob("images/*")}) < 2 and time.monotonic() < deadline:  # both workers are at it
        time.sleep(0.05)
    children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()
    builder.kill()
    builder.wait()
    while any(alive(int(pid)) for pid in children) and time.monotonic() < deadline + 20:
        time.sleep(0.05)
    assert len(children) >= 2 and not any(alive(int(pid)) for pid in children)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or os.cpu_count() < 2, reason="needs Linux and two cores")
def test_every_worker_has_a_core_of_its_own():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, start_worker, (context.Value("i", 0),)) as pool:
        found = {pool.submit(os.sched_getaffinity, 0).result().pop() for _ in range(2)}
        cores = [pool.submit(core_after, 0.5) for _ in range(2)]
        found |= {core for future in cores for core in future.result()}
    assert len(found) == 2


def core_after(seconds: float) -> set[int]:
    time.sleep(seconds)  # so that each of two such tasks gets a worker
    return os.sched_getaffinity(0)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended but was not yet collected does not)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--policy", "expert", "--split", "moon"), "--split moon"),
        (("--policy", "genius"), "--policy genius"),
        (("--policy", "expert,expert"), "twice"),
        (("--policy", "model", "--checkpoint", "no/such/folder"), "no/such/folder"),
        (("--policy", "other=no/such/folder"), "--policy no/such/folder"),
        (("--policy", "other="), "--policy (not given)"),
        (("--policy", "blind", "--blind-table", "no/such/table.json"), "no/such/table.json"),
        (("--policy", "blind", "--blind-table", __file__), "not a table"),
        (("--policy", "expert", "--episodes", "0"), "--episodes 0"),
        (("--policy", "expert", "--episodes", "many"), "many"),
        (("--policy", "expert", "--workers", "-1"), "--workers -1"),
        (("--policy", "expert", "--seed", "-1"), "--seed -1"),
        (("--policy", "expert", "--strips", "-1"), "--strips -1"),
        (("--policy", "expert", "--loud"), "--loud"),
        (("--policy", "expert", "--closed-loop", "-1"), "--closed-loop -1"),
        (("--policy", "expert", "--robot", "r2d2"), "--robot r2d2"),
        (("--policy", "expert", "--objects", "no/such/folder"), "no/such/folder"),
        (("--affordance", "Spaceship"), "Spaceship"),
        (("--make-blind-table", "no/such.jsonl"), "no/such.jsonl"),
        (("--sheet", "no/such/folder/sheet.png"), "sheet.png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, said, tmp_path, capsys):
    assert main([*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_named_before_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--policy", "expert", "--episodes", "100000", "--out", str(tmp_path / "file" / "out")]) == 2
    error = capsys.readouterr().err
    assert f"--out {tmp_path / 'file' / 'out'}: cannot be written" in error and error.count("\n") == 1


def test_checkpoints_of_two_picture_sizes_are_refused(checkpoints, tmp_path, capsys):
    flags = ["--policy", f"model,other={checkpoints['small']}", "--checkpoint", str(checkpoints["a"])]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 2
    assert "different sizes" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- pictures and modes ---------------------------------------------------------------------------------------------
def test_strips_show_a_failure_and_the_gif_has_few_colours(tmp_path):
    run(tmp_path, "--policy", "pixel-8", "--split", "seen", "--episodes", 24, "--workers", 1, "--strips", 3)
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
    monkeypatch.setattr(sim_eval, "DEMO_EPISODES", 2)
    flags = ("--demo", "--checkpoint", checkpoints["a"], "--blind-table", table, "--workers", 1)
    results = run(tmp_path, *flags)
    said = capsys.readouterr().out
    assert list(results["policies"]) == sim_eval.DEMO_POLICIES.split(",") and len(results["episodes"]) == 4 * 6
    assert said.count("  you    ") >= 4 == said.count("  you    ") - said.count("  truth  ") + 4
    assert "Predict the contact point" in said and "| model |" in said and str(tmp_path / "results.json") in said
    assert (
        (tmp_path / "scene.png").exists()
        and (tmp_path / "episode.gif").exists()
        and len([*tmp_path.glob("strip_*")]) == 4
    )


def test_physics_table_and_affordance(tmp_path, capsys):
    assert main(["--physics-table", "--episodes", "2", "--workers", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "physics.json").read_text())
    assert results["split"] == "val" and list(results["policies"]) == sim_eval.PHYSICS_POLICIES.split(",")
    assert results["splits"]["val"]["initial"]["k"] == 2 and "| direction-60 |" in (tmp_path / "physics.md").read_text()
    assert main(["--affordance", "Microwave,Bottle", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "affordance.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    below = pixels[256:512]
    for colour in ((255, 0, 0), (0, 255, 0)):  # near the hinge nothing moves, at the free edge all of it
        assert (below[:, :256] == colour).all(-1).sum() > 100
    assert not (pixels[:256] == (255, 0, 0)).all(-1).any()


# ---- the arm --------------------------------------------------------------------------------------------------------
def test_the_hand_points_along_the_approach():
    for approach in [*unit(np.random.default_rng(0).normal(size=(50, 3))), *np.eye(3), *-np.eye(3)]:
        turns = [panda.hand_pose(approach, turn) for turn in (0.0, 1.0, 4.0)]
        for pose in turns:
            matrix = np.reshape(p.getMatrixFromQuaternion(pose), (3, 3))
            assert np.abs(matrix[:, 2] - approach).max() < 1e-5 and np.linalg.det(matrix) == pytest.approx(1, abs=1e-5)
        angle = p.getAxisAngleFromQuaternion(p.getDifferenceQuaternion(*turns[:2]))[1]
        assert min(angle, 2 * math.pi - angle) == pytest.approx(1.0, abs=1e-4)


def test_a_panda_opens_what_the_expert_points_at(tmp_path, capsys):
    assert main(["--robot", "panda", "--policy", "expert", "--split", "drawer-door", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "a demonstration: no collisions" in said and "Not comparable" in said
    assert ": success, moved 0." in said and "panda.gif" in said
    with Image.open(tmp_path / "panda.gif") as gif:
        assert gif.n_frames > 20 and gif.size == (256, 256)
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(gif.n_frames - 1)
        assert (np.abs(np.asarray(gif.convert("RGB")) - first).max(-1) > 40).mean() > 0.01  # arm and door moved


def test_a_panda_that_reaches_nothing_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(panda, "STAND_M", 3.0)
    monkeypatch.setattr(panda, "TURNS", 1)
    flags = ["--robot", "panda", "--policy", "expert", "--split", "val", "--episodes", "1", "--out", str(tmp_path)]
    assert main(flags) == 2
    said = capsys.readouterr()
    assert "the arm cannot reach it" in said.out and "nothing to film" in said.err
    assert not (tmp_path / "panda.gif").exists()


def test_printing_tables_again_and_what_is_no_result(tmp_path):
    def report(path, *more):
        command = [sys.executable, "-m", "common.report", str(path), *map(str, more)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    done = report(ROOT / "data/pretrained/robomamba-tiny/results.json", "--out", tmp_path / "short.json")
    short = json.loads((tmp_path / "short.json").read_text())
    assert done.stdout.startswith("| policy |") and "episodes" not in short and short["policies"]["model"]
    for name in ("data/results/mistakes.json", "data/results/heads.json", "README.md", "nowhere.json"):
        failed = report(name)
        assert failed.returncode == 2 and f"{name}: not a results.json" in failed.stderr, name
        assert "Traceback" not in failed.stderr
