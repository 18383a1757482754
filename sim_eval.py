"""The examination: policies act on test scenes of sim/scene.py; this file counts what moved, and draws it.

    python sim_eval.py --demo --out demo               # what `make demo` runs: a dialogue, a robot, a table, pictures
    python sim_eval.py --policy model,expert,random,random-normal,mean-action,blind --episodes 300 --out runs/eval
    python sim_eval.py --policy model,other=DIR,third=DIR --checkpoint DIR --split val       # models side by side
    python sim_eval.py --physics-table --episodes 120 --out runs/physics     # is the simulator honest? (val seeds)
    python sim_eval.py --affordance Door,Microwave,Bottle --out runs/maps    # where on a part does a pull work?
    python sim_eval.py --sheet sheet.png                                     # one picture of every category
    python sim_eval.py --make-blind-table data/cache/train/manipulation.jsonl
    python sim_eval.py --objects DIR --out runs/mine         # articulated objects of your own (sim/partnet.py)
    python sim_eval.py --closed-loop 3 --out runs/closed     # look and grip again three times, beside open loop
    python sim_eval.py --speed --out runs/speed              # predictions a second, and a Transformer's
    python sim_eval.py --robot panda --out demo              # one episode with a Franka arm, as a film

    (category, seed) -> Scene -> picture + sentence -> policy -> pixel (u, v), approach -> Scene.act -> Outcome
                          |                              ^ one function (scene, sentence, part, rng) -> (u, v, approach)
                          `-> expert finds no contact: the scene is counted as infeasible and the next seed is taken

Reading order: sim/policies.py, Bench.episode (one scene, all policies), run_jobs (processes), evaluate, summarise,
run; then common/report.py (tables) and sim/pictures.py (strips, sheets).

OUT/results.json holds every episode, OUT/table.md the tables, OUT/categories.md each category beside the paper's.
Success means that the NAMED part moved (sim/scene.py has the formula): >= 0.01 rad or m ("initial") and >= 0.1
("long"). Whatever a policy gets wrong (off the object, not reachable, seal lost, not a number) is a failure and stays
in the denominator. All policies meet the same scenes and the same sentences. Scenes are those that the expert solves,
so its own row is about 1 by construction; the row "expert, unconditioned" says how often it does, and what was passed
over is listed. Intervals are Wilson's, 95 %. Ctrl-C keeps what is done, marked "partial".

Sources: thresholds, categories and the seen/unseen split are RoboMamba's (arXiv 2406.04339, section 4.3) and ManipLLM's
(arXiv 2312.16217). Differs: another simulator and other objects, so their numbers and ours must not be compared.
"""

# Letters: S image side (pixels) · u, v pixel column and row · k successes out of n. Directions are unit vectors in the
# camera frame (x right, y down, z forward), the way the gripper travels to the contact.

import contextlib
import dataclasses
import importlib.metadata
import io
import math
import multiprocessing
import os
import platform
import shlex
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.report import report, speed_table, wilson, write_results
from common.scripts import cli, commit, flag, hardware, progress, start_worker
from data import questions
from data.prompts import CONTACT_TOKENS, contact_question, parse_contact
from extras import panda
from sim import objects
from sim.partnet import ObjectScene, find_objects
from sim.pictures import ZOOM, affordance_sheet, contact_sheet, draw_strips
from sim.policies import (
    HALVES,
    LABELLED,
    POLICY_HELP,
    REFERENCE_S,
    SCRIPTED,
    blind_policy,
    disturbed,
    half,
    make_blind_table,
    read_blind_table,
)
from sim.scene import (
    INITIAL,
    Label,
    Outcome,
    Scene,
    dense_targets,
    facts,
    rotation_from_approach,
    stream,
    unit,
)

__all__ = ["Label", "Outcome", "Scene", "dense_targets", "facts", "rotation_from_approach"]  # the world's, by this name

# ------------------------------------------------------------------------------------------------------------- config

ROOT = Path(__file__).resolve().parent
# where the seeds start; training has those below 10,000,000
VAL, SEEN, UNSEEN, USER = 10_000_000, 20_000_000, 30_000_000, 40_000_000
SPLITS = {  # --split -> {name in the results: (categories, first seed)}
    "seen": {"seen": (objects.SEEN, SEEN)},
    "unseen": {"unseen": (objects.UNSEEN, UNSEEN)},
    "both": {"seen": (objects.SEEN, SEEN), "unseen": (objects.UNSEEN, UNSEEN)},
    "val": {"val": (objects.SEEN, VAL)},  # for choosing; never the test seeds
    "drawer-door": {"seen": (objects.DRAWER_DOOR_SEEN, SEEN), "unseen": (objects.DRAWER_DOOR_UNSEEN, UNSEEN)},
}
SEED_SPAN, MAX_TRIES = 9_000_000, 20  # seeds of a split; scenes tried for one episode before it is given up
DEMO_POLICIES, DEMO_EPISODES, DEMO_STRIPS = "model,expert,random,random-normal,mean-action,blind", 32, 6
PHYSICS_POLICIES = (
    "expert,expert-jittered,random,random-normal,part-pixel-normal,hinge-pixel,"
    "direction-10,direction-20,direction-30,direction-45,direction-60,pixel-2,pixel-4,pixel-8,pixel-16"
)
OWN = ("model", "model-text", "model-carried", *HALVES)  # the model of --checkpoint, used in several ways


@dataclass
class EvalConfig:
    policy: str = flag(
        "model", "comma separated, the first is drawn; NAME=FOLDER another model; x prints the list of all"
    )
    checkpoint: str = flag("data/pretrained/robomamba-tiny", "folder of the policy `model`")
    blind_table: str = flag("data/pretrained/blind_table.json", "what `mean-action` and `blind` know")
    split: str = flag("", "seen | unseen | both | val | drawer-door; both if not given; val for --physics-table")
    objects: str = flag(
        "", "folder of your own objects (PartNet-Mobility's layout): one more split, alone without --split"
    )
    episodes: int = flag(100, "scenes per split, categories in turn")
    seed: int = flag(0, "another seed, other scenes")
    workers: int = flag(2, "processes")
    out: str = flag("runs/eval", "folder for results.json, table.md and pictures")
    closed_loop: int = flag(
        0, "after the first grip: look, predict and grip again so many times; reported beside open loop"
    )
    robot: str = flag(
        "", "panda: the first policy's first reachable episode with a Franka arm, OUT/panda.gif, and stop"
    )
    strips: int = flag(0, "pictures of so many episodes of the first policy, and one GIF")
    demo: bool = flag(False, "a dialogue, then 32 + 32 scenes and six strips")
    physics_table: bool = flag(False, "scripted policies only, on val scenes: physics.json and physics.md")
    affordance: str = flag("", "categories, comma separated: draw where a pull works")
    sheet: str = flag("", "FILE.png: draw one scene of every category and stop")
    speed: bool = flag(False, "time predictions of --checkpoint, and of a Transformer of its size , and stop")
    make_blind_table: str = flag("", "manipulation.jsonl of the training data: write --blind-table and stop")


# ----------------------------------------------------------------------------------------------------------- episodes


@dataclass(frozen=True)
class Job:
    """One episode: number `k` of a split is round k // len(categories) of its category."""

    split: str
    category: str
    round: int
    first_seed: int
    seed: int  # --seed

    def scene_seed(self, attempt: int) -> int:
        """A function of (category, round, --seed, attempt): neither the other episodes nor the workers matter."""
        return self.first_seed + zlib.crc32(f"{self.category}/{self.round}/{attempt}/{self.seed}".encode()) % SEED_SPAN


def splits_of(cfg: EvalConfig) -> tuple[dict, dict[str, str], dict[str, int]]:
    """{split: (names, first seed)} of a run, as in SPLITS; the user's objects that cannot be used, {name: why}; and
    their joints that are held fixed, {name: count}."""
    groups, broken, held = dict(SPLITS[cfg.split]) if cfg.split else {}, {}, {}
    if cfg.objects:
        names, broken, held = find_objects(cfg.objects)
        groups["objects"] = (tuple(names), USER)
    return groups, broken, held


def make_jobs(cfg: EvalConfig, groups: dict | None = None) -> list[Job]:
    """--episodes jobs a split; its categories in turn, so that each has its equal share (or one less)."""
    return [
        Job(split, names[k % len(names)], k // len(names), first_seed, cfg.seed)
        for k in range(cfg.episodes)  # the splits in turn, so that a run that was stopped has some of each
        for split, (names, first_seed) in (groups or SPLITS[cfg.split]).items()
    ]


def numbers(values, digits: int) -> list[float | None]:
    """Rounded plain floats; None for what is not finite, which JSON cannot say."""
    return [round(float(x), digits) if math.isfinite(x) else None for x in values]


def checkpoints(cfg: EvalConfig) -> dict[str, str | None]:
    """{policy: folder of its model, None for one without a model}, in the order of --policy."""
    named = (entry.partition("=") for entry in cfg.policy.split(","))
    return {name: cfg.checkpoint if name in OWN else folder if equals else None for name, equals, folder in named}


class Bench:
    """What one process holds: the scene and the policies.

    Raises: ValueError for an unknown policy, a missing or broken checkpoint or table, checkpoints of two image sizes.
    """

    def __init__(self, cfg: EvalConfig):
        self.cfg, self.policies, sizes, self.label = cfg, {}, {}, None
        for name, folder in checkpoints(cfg).items():
            if folder is not None:
                if not folder or not Path(folder).is_dir():
                    flag = "--checkpoint" if name in OWN else "--policy"
                    raise ValueError(f"{flag} {folder or '(not given)'}: no such folder; the policy {name} needs it")
                policy, sizes[folder] = model_policy(folder, name == "model-text", name == "model-carried")
                self.policies[name] = policy
                if name in HALVES:
                    self.policies[name] = lambda *scene, name=name, policy=policy: half(
                        name, policy(*scene), self.label
                    )
            elif name in ("blind", "mean-action"):
                self.policies[name] = blind_policy(read_blind_table(cfg.blind_table), mean=name == "mean-action")
            elif name in SCRIPTED:
                self.policies[name] = SCRIPTED[name]
            elif LABELLED.fullmatch(name):
                self.policies[name] = lambda scene, instruction, part, rng, name=name: disturbed(
                    name, self.label, scene.image_size / REFERENCE_S, rng
                )
            else:
                raise ValueError(f"--policy {name}: unknown; choose from {POLICY_HELP}")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"checkpoints want pictures of different sizes, which cannot share a scene: {sizes}")
        self.image_size = next(iter(sizes.values()), REFERENCE_S)
        self.scene = None

    def find(self, job: Job) -> tuple[int, int]:
        """Spawns and renders scenes until the expert solves one: sets .label; returns (tried, solved: 0 or 1)."""
        self.scene = self.scene or new_scene(self.cfg, self.image_size)
        for attempt in range(MAX_TRIES):
            seed = job.scene_seed(attempt)
            self.scene.spawn(job.category, seed).render()
            self.label = self.scene.expert(stream(job.category, seed, "expert"))
            if self.label is not None:
                return attempt + 1, 1
        return MAX_TRIES, 0

    def episode(self, job: Job) -> dict:
        """{"tried", "solved", "records": one per policy, "ms": {policy: milliseconds of a model's prediction}}.

        "error" is there when an object of the user does not load.
        """
        try:
            tried, solved = self.find(job)
        except ValueError as error:
            if job.split != "objects":
                raise
            return {"tried": 0, "solved": 0, "records": [], "ms": {}, "error": str(error)}
        answer, scene = {"tried": tried, "solved": solved, "records": [], "ms": {}}, self.scene
        part, labels, models = scene.target, None, checkpoints(self.cfg)
        instruction = sentence(scene, part)
        for name, policy in self.policies.items() if solved else ():
            rng = stream(job.category, scene.seed, f"policy {name}")
            start = time.perf_counter()
            action = policy(scene, instruction, part, rng)
            if models[name] is not None:
                answer["ms"][name] = 1000 * (time.perf_counter() - start)
            if action is None:
                continue
            record = {"policy": name, "split": job.split, "category": scene.category, "seed": scene.seed}
            if job.split == "objects":
                record["object"] = job.category
            record |= {"part": scene.spec.parts[part].label, "instruction": instruction} | self.score(action, part)
            if models[name] is not None and len(scene.spec.parts) > 1:
                labels = labels or self.all_labels()
                if len(labels) > 1:
                    record["language"] = self.language(policy, action, part, labels)
            if self.cfg.closed_loop:
                record["closed_loop"] = self.closed_loop(name, policy, action, instruction, part)
            answer["records"].append(record)
        return answer

    def score(self, action, part: int) -> dict:
        """Carries out what is WRITTEN in the record (rounded), so that a record can be played again exactly."""
        (u, v), approach, outcome = *written(action), self.carry_out(action, part)
        record = {"u": u, "v": v, "approach": approach, "moved": round(outcome.moved, 5)}
        record |= {"initial": bool(outcome.initial), "long": bool(outcome.long), "reason": outcome.reason}
        if None not in (u, v, *approach):  # distance to the expert's contact, pixels; angle to its direction, degrees
            cosine = float(np.clip(unit(approach) @ unit(self.label.approach), -1, 1))
            record["pixel_error"] = round(math.hypot(u - self.label.u, v - self.label.v), 2)
            record["approach_error_deg"] = round(math.degrees(math.acos(cosine)), 2)
        return record

    def carry_out(self, action, part: int) -> Outcome:
        (u, v), approach = written(action)
        if None in (u, v, *approach):
            return Outcome(0.0, False, False, "not a number")
        return self.scene.act(u, v, approach, part)

    def closed_loop(self, name: str, policy, action, instruction: str, part: int) -> dict:
        """Grips again where the last grip left the parts, --closed-loop times, with a new picture and prediction each.

        Success is counted from the first start, as for open loop; the expert and its disturbed copies look for a new
        contact. "reasons": how every grip ended; the list is shorter when the part or the expert's contact is gone.
        """
        scene, start, label, reasons = self.scene, list(self.scene.joints), self.label, []
        threshold, ended = scene.long_threshold(part), list(start)
        for grip in range(1 + self.cfg.closed_loop):
            if grip:
                scene.set_joints(ended)
                scene.render()
                rng = stream(scene.category, scene.seed, f"policy {name}, grip {grip}")
                if LABELLED.fullmatch(name) or name in HALVES:
                    self.label = scene.expert(rng)
                if self.label is None or not (scene.links == part).any():
                    break
                action = policy(scene, instruction, part, rng)
                if action is None:
                    break
            outcome = self.carry_out(action, part)
            reasons.append(outcome.reason)
            if outcome.joints is not None:  # the solver may pass a limit by a hair
                limits = [(movable.lower, movable.upper) for movable in scene.spec.parts]
                ended = [min(max(q, low), high) for q, (low, high) in zip(outcome.joints, limits, strict=True)]
        scene.set_joints(start)
        scene.render()
        self.label, moved = label, scene.opened(part, ended[part])
        return {"moved": round(moved, 5), "initial": moved >= INITIAL, "long": moved >= threshold, "reasons": reasons}

    def all_labels(self) -> dict[int, Label]:
        """The expert's contact of every part of the picture that has one."""
        scene = self.scene
        rest = [j for j in range(len(scene.spec.parts)) if j != scene.target]
        found = {j: scene.expert(stream(scene.category, scene.seed, f"expert {j}"), j) for j in rest}
        return {scene.target: self.label} | {j: label for j, label in found.items() if label is not None}

    def language(self, policy, action, part: int, labels: dict[int, Label]) -> dict:
        """Does the sentence matter? Which labelled part is nearest to the prediction; and the wrong-sentence control:
        the sentence names another part, and success is still counted for the first."""
        scene, rng = self.scene, stream(self.scene.category, self.scene.seed, "language")
        nearest = min(labels, key=lambda j: math.hypot(action[0] - labels[j].u, action[1] - labels[j].v))
        other = int(rng.choice([j for j in labels if j != part]))
        wrong = self.score(policy(scene, sentence(scene, other), other, rng), part)
        return {"parts": len(labels), "nearest": nearest == part, "wrong_initial": wrong["initial"]}

    def close(self):
        if self.scene is not None:
            self.scene.close()
            self.scene = None


def new_scene(cfg: EvalConfig, image_size: int) -> Scene:
    return ObjectScene(cfg.objects, image_size) if cfg.objects else Scene(image_size)


def written(action) -> tuple[list, list]:
    """(u, v) and approach as a record has them: rounded, None for what is not finite."""
    return numbers(action[:2], 3), numbers(action[2], 5)


def sentence(scene: Scene, part: int) -> str:
    """The instruction for `part`, one of several phrasings, a function of (category, seed, part)."""
    rng = stream(scene.category, scene.seed, f"sentence {part}")
    noun = objects.NOUNS.get(scene.category, scene.category.lower())
    return questions.instruction(scene.spec.parts[part], noun, rng)


def model_policy(folder: str, as_text: bool = False, carried: bool = False):
    """RoboMamba from a checkpoint folder, on one thread; returns (policy, image size).

    as_text: spell the action out token by token, as ManipLLM and other language models do, and read the numbers back,
        instead of one forward pass and the policy head. Text that is no contact counts as a failure.
    carried: in a closed loop (--closed-loop) each prediction goes on from the state that the last one of this scene and
        sentence left, so it remembers those pictures. The model was never trained on more than one picture.
    """
    import torch  # here and in the next line: policies without a model start in half a second

    from robomamba import RoboMamba

    torch.set_num_threads(1)
    model = RoboMamba.from_pretrained(folder)
    S = model.config.vision.image_size
    memories = {}  # of one scene: {(category, seed, sentence): memory}
    model.predict_action(np.zeros((S, S, 3), np.uint8), "open the door")  # the first call is slower; keep it untimed

    def with_head(scene, instruction, part, rng):
        here = (scene.category, scene.seed)
        if any(key[:2] != here for key in memories):
            memories.clear()
        memory = memories.setdefault((*here, instruction), []) if carried else None
        action = model.predict_action(scene.rgb, instruction, memory)
        return action.u, action.v, action.approach

    def with_text(scene, instruction, part, rng):
        text = model.generate(scene.rgb, contact_question(instruction), max_new_tokens=CONTACT_TOKENS)
        u, v, approach = parse_contact(text) or (math.nan, math.nan, np.full(3, math.nan))
        return u * S, v * S, approach

    return with_text if as_text else with_head, S


# ---------------------------------------------------------------------------------------------------------- processes

_bench: Bench | None = None  # the one of a worker process


def _start(cfg: EvalConfig, counter) -> None:
    global _bench
    start_worker(counter)
    _bench = Bench(cfg)


def _work(job: Job) -> dict:
    return _bench.episode(job)


def run_jobs(cfg: EvalConfig, jobs: list[Job]):
    """Yields (job, answer) as they come. A worker that dies is noticed; what was not finished is run once more."""
    if cfg.workers == 1:
        bench = Bench(cfg)
        try:
            for job in jobs:
                yield job, bench.episode(job)
        finally:
            bench.close()
        return
    left, second = set(jobs), False
    while left:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(cfg.workers, len(left)), context, _start, (cfg, context.Value("i", 0)))
        try:
            futures = {pool.submit(_work, job): job for job in jobs if job in left}
            for future in as_completed(futures):
                answer = future.result()
                left.discard(futures[future])
                yield futures[future], answer
        except BrokenProcessPool:
            if second:
                raise
            second = True
            print(f"\na worker process died; the {len(left)} unfinished scenes are run again", file=sys.stderr)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def evaluate(cfg: EvalConfig, command: str = "", found: tuple | None = None) -> dict:
    """Runs every policy on every scene and returns what goes into results.json; "partial": true after Ctrl-C.

    found: what splits_of(cfg) says, where it was asked already.
    """
    groups, broken, held = found or splits_of(cfg)
    for name, why in broken.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    jobs, answers, start, partial = make_jobs(cfg, groups), {}, time.monotonic(), False
    with contextlib.closing(run_jobs(cfg, jobs)) as stream_of_answers:
        try:
            for job, answer in stream_of_answers:
                answers[job] = answer
                progress(len(answers), len(jobs), start)
        except (KeyboardInterrupt, BrokenProcessPool) as stop:
            partial = True
            print(f"\nstopped ({type(stop).__name__}) after {len(answers)} of {len(jobs)} scenes", file=sys.stderr)
    done = [(job, answers[job]) for job in jobs if job in answers]  # in the order of the jobs, whoever was faster
    episodes = [record for _, answer in done for record in answer["records"]]
    policies, splits = {}, list(groups)
    for name, folder in checkpoints(cfg).items():
        mine = [record for record in episodes if record["policy"] == name]
        by_split = {split: [record for record in mine if record["split"] == split] for split in splits}
        policies[name] = {
            "checkpoint": folder,
            "splits": {split: summarise(records) for split, records in by_split.items()},
        }
        if folder is not None:
            policies[name]["language"] = language(mine)
            milliseconds = [answer["ms"][name] for _, answer in done if name in answer["ms"]]
            policies[name]["predict_ms"] = median(milliseconds)  # batch 1, one thread, with the other workers running
    first = next(iter(policies))
    feasible = {
        split: wilson(
            sum(answer["solved"] for job, answer in done if job.split == split),
            sum(answer["tried"] for job, answer in done if job.split == split),
        )
        for split in splits
    }
    return {
        "policy": first,
        "checkpoint": policies[first]["checkpoint"],
        "split": cfg.split or "objects",
        "command": command,
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pybullet")},
        "hardware": hardware(),
        "workers": cfg.workers,
        "seconds": round(time.monotonic() - start, 1),
        "seed": cfg.seed,
        "partial": partial,
        "expert_unconditioned": feasible,
        "skipped": skipped(done, broken) | {"held_joints": held},
        **{key: policies[first][key] for key in ("splits", "language") if key in policies[first]},
        "policies": policies,
        "episodes": episodes,
    }


def skipped(done: list[tuple[Job, dict]], broken: dict[str, str]) -> dict:
    """What was left out: broken objects {name: why}; scenes without a contact, and episodes given up {name: count}."""
    infeasible, given_up = Counter(), Counter()
    for job, answer in done:
        if "error" in answer:
            broken = broken | {job.category: answer["error"]}
        infeasible[job.category] += answer["tried"] - answer["solved"]
        given_up[job.category] += not answer["solved"]
    return {"objects": broken, "infeasible": dict(+infeasible), "given_up": dict(+given_up)}


# ------------------------------------------------------------------------------------------------------------ scoring


def median(values) -> float | None:
    return round(float(np.median(values)), 2) if len(values) else None


def summarise(records: list[dict]) -> dict:
    """The scores of one policy on one split: sample and category means, per category, why it failed, errors."""
    groups = {}
    for record in records:
        groups.setdefault(record["category"], []).append(record)
    out = {"n": len(records)}
    out |= {goal: wilson(sum(r[goal] for r in records), len(records)) for goal in ("initial", "long")}
    out["categories"] = {
        name: {"n": len(group)}
        | {goal: round(float(np.mean([r[goal] for r in group])), 4) for goal in ("initial", "long")}
        for name, group in groups.items()
    }
    out["category_mean"] = {
        goal: round(float(np.mean([c[goal] for c in out["categories"].values()])), 4) if groups else 0.0
        for goal in ("initial", "long")
    }
    out["reasons"] = dict(Counter(record["reason"] for record in records).most_common())
    again = [record for record in records if "closed_loop" in record]
    if again:
        closed = loop_scores([record["closed_loop"] for record in again])
        grips = max(len(record["closed_loop"]["reasons"]) for record in again)
        out["closed_loop"] = closed | {"grips": grips, "open": loop_scores(again)}
    for key in ("pixel_error", "approach_error_deg"):  # medians against the expert's contact
        out[key] = median([record[key] for record in records if key in record])
    return out


def loop_scores(results: list[dict]) -> dict:
    """Rates of both thresholds and the median motion (rad or m) of episodes, or of their closed loops."""
    rates = {goal: wilson(sum(result[goal] for result in results), len(results)) for goal in ("initial", "long")}
    return rates | {"moved": median([result["moved"] for result in results])}


def language(records: list[dict]) -> dict:
    """Scenes with at least two labelled parts: is the named one meant, and does the wrong sentence hurt?"""
    asked = [record for record in records if "language" in record]
    said, n = [record["language"] for record in asked], len(asked)
    return {
        "nearest": wilson(sum(s["nearest"] for s in said), n),
        "chance": round(float(np.mean([1 / s["parts"] for s in said])), 4) if n else None,
        "right_sentence": {"initial": wilson(sum(record["initial"] for record in asked), n)},
        "wrong_sentence": {"initial": wilson(sum(s["wrong_initial"] for s in said), n)},
    }


# --------------------------------------------------------------------------------------------------------------- demo


def show_dialogue(cfg: EvalConfig, out: Path) -> None:
    """Prints what the model says about one test scene, and what is true; writes OUT/scene.png."""
    from robomamba import RoboMamba

    model = RoboMamba.from_pretrained(cfg.checkpoint)
    bench = Bench(dataclasses.replace(cfg, policy="model"))
    try:
        job = Job("seen", "StorageFurniture", 0, SEEN, cfg.seed)
        bench.find(job)
        scene, S = bench.scene, bench.image_size
        rng = stream(job.category, scene.seed, "dialogue")
        known = facts(scene, rng)
        Image.fromarray(scene.rgb).resize((ZOOM * S,) * 2, Image.Resampling.BICUBIC).save(out / "scene.png")
        turns = [(turn.question, turn.answer) for turn in questions.dialogue(known, rng)]
        contact = known["parts"][scene.target]["contact"]
        if contact:
            asked = contact_question(sentence(scene, scene.target))
            turns.append((asked, questions.contact_answer(contact, S)))
        print(f"A picture of a {objects.NOUNS[job.category]} it has never seen ({out / 'scene.png'}):\n")
        for question, truth in turns:
            print(f"  you    {question}\n  model  {model.generate(scene.rgb, question)}\n  truth  {truth}\n")
    finally:
        bench.close()


def show_panda(cfg: EvalConfig, out: Path, groups: dict) -> int:
    """One episode of the first policy with the Franka arm (extras/panda.py); writes OUT/panda.gif."""
    bench, path = Bench(dataclasses.replace(cfg, policy=cfg.policy.split(",")[0])), out / "panda.gif"
    (name, policy), *_ = bench.policies.items()
    print(panda.CONDITIONS)
    try:
        path.unlink(missing_ok=True)
        for job in make_jobs(cfg, groups):
            if not bench.find(job)[1]:
                continue
            scene, part = bench.scene, bench.scene.target
            instruction = sentence(scene, part)
            action = policy(scene, instruction, part, stream(job.category, scene.seed, f"policy {name}"))
            done = panda.play(scene, action, path) if action else None
            where = f'{scene.category} {scene.seed}, "{instruction}", {name}'
            if done is not None and path.exists():
                unit_of = "rad" if scene.spec.parts[part].joint == "revolute" else "m"
                print(f"{where}: {done['reason']}, moved {done['moved']:.3f} {unit_of}. Written: {path}")
                return 0
            print(f"{where}: {'the arm cannot reach it' if done is None else done['reason']}; the next scene is taken")
    finally:
        bench.close()
    raise ValueError(f"--robot panda: in {cfg.episodes} scenes there was nothing to film; --seed or --policy may help")


# --------------------------------------------------------------------------------------------------------------- main


def check(cfg: EvalConfig) -> None:
    """Raises a ValueError that names the first flag that cannot be."""
    if cfg.split not in SPLITS and not (cfg.objects and not cfg.split):
        raise ValueError(f"--split {cfg.split}: unknown; choose from {', '.join(SPLITS)}")
    for name, least in (("episodes", 1), ("workers", 1), ("seed", 0), ("strips", 0), ("closed_loop", 0)):
        if getattr(cfg, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least {least}")
    if cfg.robot not in ("", "panda"):
        raise ValueError(f"--robot {cfg.robot}: unknown; there is panda")
    if len(checkpoints(cfg)) < len(cfg.policy.split(",")):
        raise ValueError(f"--policy {cfg.policy}: names a policy twice")
    unknown = [name for name in filter(None, cfg.affordance.split(",")) if name not in objects.NOUNS]
    if unknown:
        raise ValueError(f"--affordance {unknown[0]}: unknown category; choose from {', '.join(objects.NOUNS)}")


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (probe := out / f".probe{os.getpid()}").touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from None


def run(cfg: EvalConfig, command: str) -> int:
    """What the flags ask for. Returns the exit code. Raises: ValueError for bad input."""
    if cfg.sheet:
        try:
            contact_sheet(cfg.sheet, cfg.seed)
        except (OSError, ValueError) as error:  # PIL names an unknown kind of file
            raise ValueError(f"--sheet {cfg.sheet}: {error}") from None
        return 0
    if cfg.make_blind_table:
        table = make_blind_table(cfg.make_blind_table, cfg.blind_table)
        print(f"{cfg.blind_table}: medians of {table['samples']} samples, {len(table['category_part'])} kinds of parts")
        return 0
    out = Path(cfg.out)
    if cfg.speed:
        from extras import speed  # needs torch

        make_folder(out)
        facts = {"command": command, "commit": commit(), "hardware": hardware()}
        print(f"\n{speed_table(speed.run(cfg.checkpoint, out, facts))}\nWritten: {out}/speed.json, .md, .png")
        return 0
    default = "val" if cfg.physics_table else "" if cfg.objects else "both"
    cfg = dataclasses.replace(cfg, split=cfg.split or default)
    if cfg.demo:
        strips = cfg.strips or DEMO_STRIPS
        cfg = dataclasses.replace(cfg, policy=DEMO_POLICIES, split="both", episodes=DEMO_EPISODES, strips=strips)
    if cfg.physics_table:
        cfg = dataclasses.replace(cfg, policy=PHYSICS_POLICIES)
    check(cfg)
    size = 0 if cfg.affordance else Bench(cfg).image_size  # a bad policy or checkpoint is named here
    found = splits_of(cfg)  # and here a folder without any usable object
    make_folder(out)
    if cfg.affordance:
        affordance_sheet(str(out / "affordance.png"), cfg.affordance.split(","), SEEN + cfg.seed)
        print(out / "affordance.png")
        return 0
    if cfg.robot:
        return show_panda(cfg, out, found[0])
    if cfg.demo:
        show_dialogue(cfg, out)
    results = evaluate(cfg, command, found)
    names = ("physics", "physics") if cfg.physics_table else ("results", "table")
    write_results(out, results, *names)
    print(f"\n{report(results)}\n")
    pictures = []
    if cfg.strips and results["episodes"]:
        pictures = draw_strips(out, results, cfg.strips, new_scene(cfg, size))
    files = [out / f"{names[0]}.json", out / f"{names[1]}.md", *([] if cfg.physics_table else [out / "categories.md"])]
    print(f"{results['seconds']} s. Written:", *files, *pictures)
    return 130 if results["partial"] else 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # argparse adds its usage to an error; its last line says enough
            cfg = cli(EvalConfig, __doc__, argv)
    except SystemExit as stop:
        if stop.code:
            print(said.getvalue().splitlines()[-1], file=sys.stderr)
        return stop.code or 0
    try:
        return run(cfg, shlex.join(["python", "sim_eval.py", *argv]))
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
