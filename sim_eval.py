"""The examination: policies act on test scenes of data/world.py; this file counts what moved, and draws it.

    python sim_eval.py --demo --out demo               # what `make demo` runs: a dialogue, a robot, a table, pictures
    python sim_eval.py --policy model,expert,random,random-normal,mean-action,blind --episodes 300 --out runs/eval
    python sim_eval.py --policy model,random-backbone --checkpoint DIR --random-checkpoint DIR --split val
    python sim_eval.py --physics-table --episodes 120 --out runs/physics     # is the simulator honest? (val seeds)
    python sim_eval.py --affordance Door,Microwave,Bottle --out runs/maps    # where on a part does a pull work?
    python sim_eval.py --sheet sheet.png                                     # one picture of every category
    python sim_eval.py --make-blind-table data/cache/train/manipulation.jsonl

    (category, seed) -> Scene -> picture + sentence -> policy -> pixel (u, v), approach -> Scene.act -> Outcome
                          |                              ^ one function (scene, sentence, part, rng) -> (u, v, approach)
                          `-> expert finds no contact: the scene is counted as infeasible and the next seed is taken

Reading order: policies, Bench.episode (one scene, all policies), run_jobs (processes), summarise, report, run.

OUT/results.json holds every episode, OUT/table.md the tables. Success means that the NAMED part moved (data/world.py
has the formula): >= 0.01 rad or m ("initial") and >= 0.1 ("long"). Whatever a policy gets wrong (off the object, not
reachable, seal lost, not a number) is a failure and stays in the denominator. All policies meet the same scenes and the
same sentences. Scenes are those that the expert solves, so its own row is about 1 by construction; the row "expert,
unconditioned" says how often it does. Intervals are Wilson's, 95 %. Ctrl-C keeps what is done, marked "partial".

Sources: thresholds, categories and the seen/unseen split are RoboMamba's (arXiv 2406.04339, section 4.3) and ManipLLM's
(arXiv 2312.16217). Differs: another simulator and other objects, so their numbers and ours must not be compared.
"""

# Letters: S image side (pixels) · u, v pixel column and row · k successes out of n. Directions are unit vectors in the
# camera frame (x right, y down, z forward), the way the gripper travels to the contact.

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import objects, questions
from data.run import cli
from data.world import (
    BACKGROUND,
    Label,
    Outcome,
    Scene,
    affordance_sheet,
    contact_sheet,
    dense_targets,
    facts,
    rotation_from_approach,
    stream,
    tilt,
    unit,
)

__all__ = ["Label", "Outcome", "Scene", "dense_targets", "facts", "rotation_from_approach"]  # the world's, by this name

# ------------------------------------------------------------------------------------------------------------- config

ROOT = Path(__file__).resolve().parent
VAL, SEEN, UNSEEN = 10_000_000, 20_000_000, 30_000_000  # where the seeds start; training has those below 10,000,000
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
JITTER_PX, JITTER_DEG = 1.0, 5.0  # of expert-jittered; pixels of a REFERENCE_S picture
REFERENCE_S = 128  # the picture that `pixel-4` and JITTER_PX speak of, whatever the scene's size
HINGE_SHARE = 0.15  # hinge-pixel: from the pixels with the smallest lever arm


@dataclass
class EvalConfig:
    policy: str = "model"  # comma separated, the first is drawn; an unknown name prints the list of all
    checkpoint: str = "data/pretrained/robomamba-tiny"  # folder of the policy `model`
    random_checkpoint: str = ""  # folder of `random-backbone`: a backbone left as initialised, with a trained head
    blind_table: str = "data/pretrained/blind_table.json"  # what `mean-action` and `blind` know
    split: str = ""  # seen | unseen | both | val | drawer-door; both if not given, val for --physics-table
    episodes: int = 100  # scenes per split, categories in turn
    seed: int = 0  # another seed, other scenes
    workers: int = 2  # processes
    out: str = "runs/eval"  # folder for results.json, table.md and pictures
    strips: int = 0  # pictures of so many episodes of the first policy, and one GIF
    demo: bool = False  # a dialogue, then 32 + 32 scenes and six strips
    physics_table: bool = False  # scripted policies only, on val scenes: physics.json and physics.md
    affordance: str = ""  # categories, comma separated: draw where a pull works
    sheet: str = ""  # FILE.png: draw one scene of every category and stop
    make_blind_table: str = ""  # manipulation.jsonl of the training data: write --blind-table and stop


# ----------------------------------------------------------------------------------------------------------- policies
# A policy is a function (scene, instruction, part, rng) -> (u, v, approach), or None where it does not apply.


def random_pixel(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """(u, v) of a random set pixel of mask (S, S)."""
    rows, columns = np.nonzero(mask)
    i = rng.integers(len(rows))
    return float(columns[i]), float(rows[i])


def against_normal(scene: Scene, u: float, v: float) -> np.ndarray:
    """(3,) straight onto the surface at (u, v), by the simulator's own normal: more than a picture tells."""
    normal, _ = scene.normal(scene.backproject(u, v))
    return np.array([0.0, 0.0, 1.0]) if normal is None else scene.camera_rotation @ -normal


def random_action(scene, instruction, part, rng):
    """A pixel of the object, a direction of the whole sphere."""
    return *random_pixel(scene.links != BACKGROUND, rng), unit(rng.normal(size=3))


def random_normal(scene, instruction, part, rng):
    """A pixel of the object, straight onto the surface there."""
    u, v = random_pixel(scene.links != BACKGROUND, rng)
    return u, v, against_normal(scene, u, v)


def part_pixel_normal(scene, instruction, part, rng):
    """A pixel of the named part: what perfect segmentation alone is worth."""
    u, v = random_pixel(scene.links == part, rng)
    return u, v, against_normal(scene, u, v)


def hinge_pixel(scene, instruction, part, rng):
    """A pixel of the part close to its hinge, straight onto the surface. None for parts that slide."""
    if scene.spec.parts[part].joint != "revolute":
        return None
    mask = scene.links == part
    points = np.array([scene.backproject(column, row) for row, column in np.argwhere(mask)])
    lever = scene.motion(points, part)[1]
    mask[mask] = lever <= np.quantile(lever, HINGE_SHARE)
    u, v = random_pixel(mask, rng)
    return u, v, against_normal(scene, u, v)


SCRIPTED = {
    "random": random_action,
    "random-normal": random_normal,
    "part-pixel-normal": part_pixel_normal,
    "hinge-pixel": hinge_pixel,
}
LABELLED = re.compile(r"expert|expert-jittered|direction-\d+|pixel-\d+")  # the expert's contact, made worse
CHECKPOINTS = {"model": "checkpoint", "random-backbone": "random_checkpoint"}  # policy -> field of EvalConfig
POLICY_HELP = ", ".join((*CHECKPOINTS, "blind", "mean-action", "expert", *SCRIPTED, "direction-DEGREES, pixel-PIXELS"))


def disturbed(name: str, label: Label, scale: float, rng: np.random.Generator):
    """The label of policy `name`: moved by that many pixels (x scale) or turned by that many degrees, at random."""
    u, v, approach, angle = label.u, label.v, label.approach, rng.uniform(0, 2 * math.pi)
    if name == "expert-jittered":
        du, dv = scale * rng.uniform(-JITTER_PX, JITTER_PX, 2)
        return u + du, v + dv, tilt(approach, math.radians(JITTER_DEG), rng)
    kind, _, size = name.partition("-")
    if kind == "pixel":
        u, v = u + scale * int(size) * math.cos(angle), v + scale * int(size) * math.sin(angle)
    return u, v, tilt(approach, math.radians(int(size)), rng) if kind == "direction" else approach


def blind_policy(table: dict, mean: bool):
    """Never looks: the median label of this category and part, else of this part's name, else of all; or the mean."""

    def policy(scene, instruction, part, rng):
        label = scene.spec.parts[part].label
        row = table["mean"] if mean else table["category_part"].get(f"{scene.category}/{label}")
        row = np.array(row or table["part"].get(label) or table["median"])
        u, v = row[:2] * scene.image_size / table["image_size"]
        return u, v, unit(row[2:])

    return policy


def model_policy(folder: str):
    """RoboMamba from a checkpoint folder, on one thread; returns (policy, image size)."""
    import torch  # here and in the next line: policies without a model start in half a second

    from robomamba import RoboMamba

    torch.set_num_threads(1)
    model = RoboMamba.from_pretrained(folder)
    S = model.config.vision.image_size
    model.predict_action(np.zeros((S, S, 3), np.uint8), "open the door")  # the first call is slower; keep it untimed

    def policy(scene, instruction, part, rng):
        action = model.predict_action(scene.rgb, instruction)
        return action.u, action.v, action.approach

    return policy, S


# ------------------------------------------------------------------------------------------------------- blind table


def make_blind_table(samples: str, path: str) -> dict:
    """Median labels of training samples (manipulation.jsonl of data/build.py) -> `path`: what looking is compared with.

    A row is [u, v, x, y, z]: pixels of an `image_size` picture, and the unit direction. Raises: ValueError naming file
    and line.
    """
    groups, rows, first = {"category_part": {}, "part": {}}, [], None
    try:
        for number, line in enumerate(Path(samples).read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                row = [float(x) for x in (record["u"], record["v"], *record["approach"])]
                if len(row) != 5 or not np.isfinite(row).all():
                    raise ValueError("u, v and approach must be five finite numbers")
                keys, first = (f"{record['category']}/{record['part']}", record["part"]), first or record["image"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{samples}, line {number}: {type(error).__name__}: {error}") from None
            rows.append(row)
            for group, key in zip(groups.values(), keys, strict=True):
                group.setdefault(key, []).append(row)
        if not rows:
            raise ValueError(f"{samples}: no samples")
        with Image.open(Path(samples).parent / first) as picture:
            size = picture.width
    except OSError as error:
        raise ValueError(f"{error.filename or samples}: {error.strerror or error}") from None

    def compact(values) -> list[float]:
        return [*(round(float(x), 1) for x in values[:2]), *(round(float(x), 3) for x in unit(values[2:]))]

    table = {"samples": len(rows), "image_size": size, "mean": compact(np.mean(rows, 0))}
    table["median"] = compact(np.median(rows, 0))
    table |= {name: {key: compact(np.median(g[key], 0)) for key in sorted(g)} for name, g in groups.items()}
    write_text(Path(path), json.dumps(table).replace('], "', '],\n "').replace('{"', '{\n "') + "\n")
    return table


def read_blind_table(path: str) -> dict:
    try:
        table = json.loads(Path(path).read_text())
        if not {"mean", "median", "part", "category_part", "image_size"} <= table.keys():
            raise ValueError("not a table")
    except OSError:
        raise ValueError(
            f"--blind-table {path}: no such file; `python sim_eval.py --make-blind-table MANIPULATION.jsonl` writes it"
        ) from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--blind-table {path}: not a table written by --make-blind-table ({error})") from None
    return table


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


def make_jobs(cfg: EvalConfig) -> list[Job]:
    return [
        Job(split, names[k % len(names)], k // len(names), first_seed, cfg.seed)
        for k in range(cfg.episodes)  # the splits in turn, so that a run that was stopped has some of each
        for split, (names, first_seed) in SPLITS[cfg.split].items()
    ]


def numbers(values, digits: int) -> list[float | None]:
    """Rounded plain floats; None for what is not finite, which JSON cannot say."""
    return [round(float(x), digits) if math.isfinite(x) else None for x in values]


class Bench:
    """What one process holds: the scene and the policies.

    Raises: ValueError for an unknown policy, a missing or broken checkpoint or table, checkpoints of two image sizes.
    """

    def __init__(self, cfg: EvalConfig):
        self.policies, sizes, self.label = {}, {}, None
        for name in cfg.policy.split(","):
            if name in CHECKPOINTS:
                folder = getattr(cfg, CHECKPOINTS[name])
                if not Path(folder).is_dir() or not folder:
                    flag = "--" + CHECKPOINTS[name].replace("_", "-")
                    raise ValueError(f"{flag} {folder or '(not given)'}: no such folder; the policy {name} needs it")
                self.policies[name], sizes[folder] = model_policy(folder)
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
        self.scene = self.scene or Scene(self.image_size)
        for attempt in range(MAX_TRIES):
            seed = job.scene_seed(attempt)
            self.scene.spawn(job.category, seed).render()
            self.label = self.scene.expert(stream(job.category, seed, "expert"))
            if self.label is not None:
                return attempt + 1, 1
        return MAX_TRIES, 0

    def episode(self, job: Job) -> dict:
        """{"tried", "solved", "records": one per policy, "ms": {policy: milliseconds of a model's prediction}}."""
        tried, solved = self.find(job)
        answer, scene = {"tried": tried, "solved": solved, "records": [], "ms": {}}, self.scene
        part, labels = scene.target, None
        instruction = sentence(scene, part)
        for name, policy in self.policies.items() if solved else ():
            rng = stream(job.category, scene.seed, f"policy {name}")
            start = time.perf_counter()
            action = policy(scene, instruction, part, rng)
            if name in CHECKPOINTS:
                answer["ms"][name] = 1000 * (time.perf_counter() - start)
            if action is None:
                continue
            record = {"policy": name, "split": job.split, "category": job.category, "seed": scene.seed}
            record |= {"part": scene.spec.parts[part].label, "instruction": instruction} | self.score(action, part)
            if name in CHECKPOINTS and len(scene.spec.parts) > 1:
                labels = labels or self.all_labels()
                if len(labels) > 1:
                    record["language"] = self.language(policy, action, part, labels)
            answer["records"].append(record)
        return answer

    def score(self, action, part: int) -> dict:
        """Carries out what is WRITTEN in the record (rounded), so that a record can be played again exactly."""
        (u, v), approach = numbers(action[:2], 3), numbers(action[2], 5)
        finite = None not in (u, v, *approach)
        outcome = self.scene.act(u, v, approach, part) if finite else Outcome(0.0, False, False, "not a number")
        record = {"u": u, "v": v, "approach": approach, "moved": round(outcome.moved, 5)}
        record |= {"initial": bool(outcome.initial), "long": bool(outcome.long), "reason": outcome.reason}
        if finite:  # distance to the expert's contact, pixels; angle to its direction, degrees
            cosine = float(np.clip(unit(approach) @ unit(self.label.approach), -1, 1))
            record["pixel_error"] = round(math.hypot(u - self.label.u, v - self.label.v), 2)
            record["approach_error_deg"] = round(math.degrees(math.acos(cosine)), 2)
        return record

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


def sentence(scene: Scene, part: int) -> str:
    """The instruction for `part`, one of several phrasings, a function of (category, seed, part)."""
    rng = stream(scene.category, scene.seed, f"sentence {part}")
    return questions.instruction(scene.spec.parts[part], objects.NOUNS[scene.category], rng)


# ---------------------------------------------------------------------------------------------------------- processes

_bench: Bench | None = None  # the one of a worker process


def _start(cfg: EvalConfig) -> None:
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()  # a killed parent would leave its workers waiting for ever
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
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
        pool = ProcessPoolExecutor(min(cfg.workers, len(left)), context, _start, (cfg,))
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


def progress(done: int, total: int, start: float) -> None:
    """One updating line with rate and time left; where it cannot update, one line every tenth."""
    rate = done / max(time.monotonic() - start, 1e-9)
    line = f"scenes {done}/{total}  {rate:.1f}/s  {(total - done) / max(rate, 1e-9):.0f} s left"
    if sys.stdout.isatty():
        print(f"\r{line:60s}", end="\n" if done == total else "", flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(line, flush=True)


def evaluate(cfg: EvalConfig, command: str = "") -> dict:
    """Runs every policy on every scene and returns what goes into results.json; "partial": true after Ctrl-C."""
    jobs, answers, start, partial = make_jobs(cfg), {}, time.monotonic(), False
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
    policies, splits = {}, list(SPLITS[cfg.split])
    for name in cfg.policy.split(","):
        mine = [record for record in episodes if record["policy"] == name]
        by_split = {split: [record for record in mine if record["split"] == split] for split in splits}
        policies[name] = {
            "checkpoint": getattr(cfg, CHECKPOINTS[name]) if name in CHECKPOINTS else None,
            "splits": {split: summarise(records) for split, records in by_split.items()},
        }
        if name in CHECKPOINTS:
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
        "split": cfg.split,
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
        **{key: policies[first][key] for key in ("splits", "language") if key in policies[first]},
        "policies": policies,
        "episodes": episodes,
    }


# ------------------------------------------------------------------------------------------------------------ scoring


def wilson(k: int, n: int, z: float = 1.959964) -> dict:
    """Rate k / n with Wilson's 95 % interval, which stays inside 0..1 and is right at 0 and n; n = 0 says nothing."""
    if n == 0:
        return {"k": 0, "n": 0, "rate": 0.0, "lo": 0.0, "hi": 1.0}
    centre, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = (max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z)))
    return {"k": k, "n": n, "rate": round(k / n, 4), "lo": round(low, 4), "hi": round(high, 4)}


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
    for key in ("pixel_error", "approach_error_deg"):  # medians against the expert's contact
        out[key] = median([record[key] for record in records if key in record])
    return out


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


def commit() -> str | None:
    try:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text() + "\nmodel name: " + name)[1]
    return f"{name}, {os.cpu_count()} cores"


# ------------------------------------------------------------------------------------------------------------- report


def percent(rate: dict) -> str:
    return f"{rate['k']}/{rate['n']} {rate['rate']:.2f} [{rate['lo']:.2f}, {rate['hi']:.2f}]"


def report(results: dict) -> str:
    """The main table in Markdown: policies side by side; what a prediction costs and what the sentence is worth."""
    splits, policies = list(results["splits"]), results["policies"]
    lines = ["**Partial result: the run was stopped.**", ""] if results["partial"] else []
    head = [f"{split} {text}" for split in splits for text in (">= 0.01", ">= 0.1", "category mean", "px / deg off")]
    lines += row("policy", *head) + row(*["---"] * (len(head) + 1))
    for name, policy in policies.items():
        cells = []
        for summary in policy["splits"].values():
            mean, errors = summary["category_mean"], (summary["pixel_error"], summary["approach_error_deg"])
            cells += [
                percent(summary["initial"]),
                percent(summary["long"]),
                f"{mean['initial']:.2f} / {mean['long']:.2f}",
            ]
            cells.append("" if None in errors else f"{errors[0]:.1f} / {errors[1]:.0f}")
        lines += row(name, *cells)
    unconditioned = [cell for split in splits for cell in (percent(results["expert_unconditioned"][split]), "", "", "")]
    lines += row("expert, unconditioned", *unconditioned)
    lines += [
        "",
        "k/n, rate, [95 % Wilson interval]. Moved >= 0.01 and >= 0.1 rad or m. Medians of the distance to the",
    ]
    lines += ["expert's contact. Scenes are those that the expert solves; its last row counts all that were tried.", ""]
    for name, policy in policies.items():
        if policy.get("predict_ms") is not None:
            lines += [f"{name}: {policy['predict_ms']:.1f} ms a prediction (median, batch 1, one thread).", ""]
        said = policy.get("language")
        if said and said["nearest"]["n"]:
            right, wrong = (percent(said[key]["initial"]) for key in ("right_sentence", "wrong_sentence"))
            lines += [
                f"{name}, scenes with several parts: nearest to the named part {percent(said['nearest'])}, chance"
            ]
            lines += [
                f"{said['chance']:.2f}; >= 0.01 with the right sentence {right}, with another part's {wrong}.",
                "",
            ]
    return "\n".join(lines)


def details(results: dict) -> str:
    """More tables: per split, how the episodes ended, and the categories."""
    policies, lines = results["policies"], []
    for split in results["splits"]:
        counts = {name: policy["splits"][split]["reasons"] for name, policy in policies.items()}
        reasons = list(dict.fromkeys(reason for count in counts.values() for reason in count))
        lines += row(f"{split}: why", *reasons) + row(*["---"] * (len(reasons) + 1))
        lines += [line for name, count in counts.items() for line in row(name, *(count.get(r, 0) for r in reasons))] + [
            ""
        ]
        categories = {name: policy["splits"][split]["categories"] for name, policy in policies.items()}
        names = list(dict.fromkeys(c for group in categories.values() for c in group))
        lines += row(f"{split}, >= 0.01", "n", *policies) + row(*["---"] * (len(policies) + 2))
        for c in names:
            cells = [f"{group[c]['initial']:.2f}" if c in group else "" for group in categories.values()]
            lines += row(c, max(group[c]["n"] for group in categories.values() if c in group), *cells)
        lines.append("")
    return "\n".join(lines)


def row(*cells) -> list[str]:
    return ["| " + " | ".join(str(cell) for cell in cells) + " |"]


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None


def write_results(out: Path, results: dict, stem: str, table_stem: str) -> None:
    """OUT/{stem}.json, one line an episode, and OUT/{table_stem}.md."""
    lines = ",\n".join("  " + json.dumps(record) for record in results["episodes"])
    text = json.dumps(results | {"episodes": []}, indent=1)
    write_text(out / f"{stem}.json", text.removesuffix("[]\n}") + f"[\n{lines}\n ]\n}}\n")
    write_text(out / f"{table_stem}.md", report(results) + "\n" + details(results))


# ----------------------------------------------------------------------------------------------------------- pictures

ZOOM, FRAMES, CAPTION_PX, EVERY = (
    2,
    5,
    16,
    4,
)  # enlargement; pictures of a strip after the first; one frame every 4 steps
NOTHING_MOVES = ("off object", "not a number", "unreachable", "on body", "no seal")  # failures without frames to show
ARROW_M, GIF_COLOURS, GIF_MS = 0.18, 64, 60
RED, GREEN, BLUE = (220, 30, 30), (20, 160, 60), (30, 90, 220)


def draw_gripper(scene: Scene, rgb: np.ndarray, contact, approach, colour) -> Image.Image:
    """The picture, enlarged, with an arrow of ARROW_M metres along `approach` that ends at `contact` (3,), world."""
    picture = Image.fromarray(rgb).resize((ZOOM * scene.image_size,) * 2, Image.Resampling.BICUBIC)
    tail, head = ZOOM * (scene.project(np.array([contact - ARROW_M * approach, contact])) + 0.5)
    pen = ImageDraw.Draw(picture)
    pen.line([*tail, *head], fill=colour, width=3)
    pen.ellipse([*(head - 4), *(head + 4)], outline=colour, width=3)
    return picture


def play(scene: Scene, record: dict) -> tuple[list[Image.Image], str]:
    """Plays an episode again: [the picture with the prediction, then frames of what happened], and the caption."""
    scene.spawn(record["category"], record["seed"]).render()
    colour = GREEN if record["initial"] else RED
    if None in (record["u"], record["v"], *record["approach"]):
        return [Image.fromarray(scene.rgb).resize((ZOOM * scene.image_size,) * 2)], "not a number"
    approach = scene.camera_rotation.T @ np.array(record["approach"])
    point = scene.backproject(record["u"], record["v"])
    if point is None:  # beside the object: drawn at the object's distance
        f, cx, cy = scene.intrinsics
        ray = np.array([(record["u"] - cx) / f, (record["v"] - cy) / f, 1.0])
        point = scene.eye + float(np.median(scene.depth[scene.links != BACKGROUND])) * ray @ scene.camera_rotation
    frames = [draw_gripper(scene, scene.rgb, point, approach, BLUE)]

    def on_frame(step, contact):
        if step % EVERY == 0:
            frames.append(draw_gripper(scene, scene.picture()[0], contact, approach, colour))

    outcome = scene.act(record["u"], record["v"], record["approach"], on_frame=on_frame)
    unit_of = "rad" if scene.spec.parts[scene.target].joint == "revolute" else "m"
    done = f"moved {outcome.moved:.2f} {unit_of}" if outcome.initial else f"failed: {outcome.reason}"
    return frames, f'{record["category"]}: "{record["instruction"]}"  {done}'


def choose(records: list[dict], count: int) -> list[dict]:
    """`count` episodes: two thirds successes, the rest failures (one at least, if there is one), splits in turn."""
    by_split = {}
    for record in records:
        by_split.setdefault(record["split"], []).append(record)
    mixed = [r for i in range(len(records)) for group in by_split.values() if i < len(group) for r in group[i : i + 1]]
    good, bad = ([r for r in mixed if r["initial"] == wanted] for wanted in (True, False))
    good.sort(key=lambda record: not record["long"])
    bad.sort(key=lambda record: record["reason"] in NOTHING_MOVES)
    n_bad = min(len(bad), max(1, count // 3, count - len(good)))
    return [*good[: count - n_bad], *bad[:n_bad]]


def draw_strips(out: Path, results: dict, count: int, image_size: int) -> list[Path]:
    """OUT/strip_*.png for `count` episodes of the first policy, and OUT/episode.gif of the first of them."""
    scene, paths = Scene(image_size), []
    side = ZOOM * image_size
    try:
        for i, record in enumerate(choose([r for r in results["episodes"] if r["policy"] == results["policy"]], count)):
            frames, caption = play(scene, record)
            moving = np.unique(np.linspace(1, len(frames) - 1, FRAMES).astype(int)) if len(frames) > 1 else ()
            shown = [frames[0], *(frames[j] for j in moving)]
            strip = Image.new("RGB", (max(2, len(shown)) * side, side + CAPTION_PX), "white")
            for j, frame in enumerate(shown):
                strip.paste(frame, (j * side, 0))
            ImageDraw.Draw(strip).text((4, side + 2), caption, fill="black")
            kind = "success" if record["initial"] else "failure"
            paths.append(out / f"strip_{i}_{record['split']}_{kind}.png")
            strip.save(paths[-1], optimize=True)
            if i == 0:
                few = [frame.quantize(GIF_COLOURS) for frame in [*frames[:1] * 8, *frames[1::2], *frames[-1:] * 8]]
                paths.insert(0, out / "episode.gif")
                few[0].save(paths[0], save_all=True, append_images=few[1:], duration=GIF_MS, loop=0, optimize=True)
    finally:
        scene.close()
    return paths


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
            asked = questions.contact_question(sentence(scene, scene.target))
            turns.append((asked, questions.contact_answer(contact, S)))
        print(f"A picture of a {objects.NOUNS[job.category]} it has never seen ({out / 'scene.png'}):\n")
        for question, truth in turns:
            print(f"  you    {question}\n  model  {model.generate(scene.rgb, question)}\n  truth  {truth}\n")
    finally:
        bench.close()


# --------------------------------------------------------------------------------------------------------------- main


def check(cfg: EvalConfig) -> None:
    """Raises a ValueError that names the first flag that cannot be."""
    if cfg.split not in SPLITS:
        raise ValueError(f"--split {cfg.split}: unknown; choose from {', '.join(SPLITS)}")
    for name, least in (("episodes", 1), ("workers", 1), ("seed", 0), ("strips", 0)):
        if getattr(cfg, name) < least:
            raise ValueError(f"--{name} {getattr(cfg, name)}: must be at least {least}")
    if len(set(cfg.policy.split(","))) < len(cfg.policy.split(",")):
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
    cfg = dataclasses.replace(cfg, split=cfg.split or ("val" if cfg.physics_table else "both"))
    if cfg.demo:
        strips = cfg.strips or DEMO_STRIPS
        cfg = dataclasses.replace(cfg, policy=DEMO_POLICIES, split="both", episodes=DEMO_EPISODES, strips=strips)
    if cfg.physics_table:
        cfg = dataclasses.replace(cfg, policy=PHYSICS_POLICIES)
    check(cfg)
    size = 0 if cfg.affordance else Bench(cfg).image_size  # a bad policy or checkpoint is named here
    make_folder(out)
    if cfg.affordance:
        affordance_sheet(str(out / "affordance.png"), cfg.affordance.split(","), SEEN + cfg.seed)
        print(out / "affordance.png")
        return 0
    if cfg.demo:
        show_dialogue(cfg, out)
    results = evaluate(cfg, command)
    names = ("physics", "physics") if cfg.physics_table else ("results", "table")
    write_results(out, results, *names)
    print(f"\n{report(results)}\n")
    pictures = draw_strips(out, results, cfg.strips, size) if cfg.strips and results["episodes"] else []
    print(f"{results['seconds']} s. Written:", *(out / f"{names[0]}.json", out / f"{names[1]}.md"), *pictures)
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
