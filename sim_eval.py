"""Evaluate policies in simulation and report success rates.

    python sim_eval.py --demo --out demo                                             # `make demo`
    python sim_eval.py --policy model,model-depth,expert,random,blind --split both --episodes 550 --out runs/eval
    python sim_eval.py --policy model,other=FOLDER --split val --out runs/val        # another checkpoint beside it
    python sim_eval.py --policy mine=package.module:function --out runs/mine         # a policy of your own
    python sim_eval.py --objects FOLDER --policy model,expert --out runs/objects     # your objects (sim/partnet.py)
    python sim_eval.py --policy model --closed-loop 3 --out runs/closed              # look and grip three times more
    python sim_eval.py --policy physics --episodes 300 --out runs/physics            # what does the simulator forgive?

    (category, seed) -> Scene -> Observation(image, depth, sentence, ..) -> policy -> pixel (u, v), approach
                          |                                                    '-> Scene.act -> Outcome -> a record
                          '-> the expert finds no contact: counted as infeasible, and the next seed is taken

Policies: the names of SCRIPTED in sim/policies.py, direction-DEGREES and pixel-PIXELS, and here
    model               --checkpoint: picture and sentence, one pass, the policy head
    model-depth         the same with the depth picture of an imperfect camera and its intrinsics
    model-text          the same answer spelled out token by token, as ManipLLM does; babble is a failure
    model-pixel         the model's pixel, the expert's direction; model-direction: the other way round
    blind, mean-action  the vision-free baselines: median label of the category and part; mean label
    random-depth        a random pixel of the object, with the read-out of depth that model-depth has
    NAME=FOLDER         another checkpoint; a NAME that ends in -depth, -text, -pixel or -direction as above
    NAME=MODULE:FUNC    a function of your own, from the current folder too (extras/example_policy.py is a template).
                        What it raises, or does for longer than 10 s, is a failure with its reason; the run goes on

Success means that the NAMED part moved: by >= 0.01 rad or m ("initial"), by >= 0.1 ("long"; sim/scene.py has the
formula). Every miss is a failure and stays in the denominator. All policies meet the same scenes and sentences: those
that the expert solves, so its own row is 1 by construction; "expert, unconditioned" says how often it solves a scene.

OUT/results.json holds every episode, OUT/table.md the tables, OUT/categories.md each category beside the paper's. A run
that is stopped leaves results.partial.json instead.

Sources: thresholds, categories and the seen/unseen split are RoboMamba's (arXiv 2406.04339, section 4.3) and ManipLLM's
(arXiv 2312.16217). Differs: another simulator and other objects, so their numbers and ours must not be compared.
"""

# Letters: S image side (pixels) · u, v pixel column and row · k successes out of n.

import contextlib
import dataclasses
import math
import os
import shlex
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.report import report, summarise, write_results
from common.scripts import cli, environment, flag, parallel, progress, run_main
from data import depth, questions
from data.prompts import CONTACT_TOKENS, contact_question, parse_contact
from sim import catalogue
from sim import expert as oracle
from sim.catalogue import SEED_SPAN, SEEDS
from sim.expert import Label
from sim.partnet import ObjectScene, find_objects
from sim.pictures import ZOOM, draw_strips
from sim.policies import (
    REFERENCE_S,
    SCRIPTED,
    Observation,
    PolicyFailure,
    blind_policy,
    combine,
    expert,
    guarded,
    object_pixel,
    read_blind_table,
    scripted,
    user_function,
)
from sim.scene import Outcome, Scene, stream, unit

# ---- config ----------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
SPLITS = {  # --split -> {name in the results: (categories, first seed)}
    "seen": {"seen": (catalogue.SEEN, SEEDS["seen"])},
    "unseen": {"unseen": (catalogue.UNSEEN, SEEDS["unseen"])},
    "both": {"seen": (catalogue.SEEN, SEEDS["seen"]), "unseen": (catalogue.UNSEEN, SEEDS["unseen"])},
    "val": {"val": (catalogue.SEEN, SEEDS["val"])},  # for choosing; never the test seeds
    "drawer-door": {
        "seen": (catalogue.DRAWER_DOOR_SEEN, SEEDS["seen"]),
        "unseen": (catalogue.DRAWER_DOOR_UNSEEN, SEEDS["unseen"]),
    },
}
MAX_TRIES = 20  # scenes tried for one episode before it is given up

MODELS = ("model", "model-depth", "model-text", "model-pixel", "model-direction")  # --checkpoint, used in several ways
TABLES = ("blind", "mean-action")
NAMES = (*MODELS, *TABLES, *SCRIPTED, "random-depth", "direction-DEGREES", "pixel-PIXELS", "NAME=FOLDER", "NAME=M:F")
PHYSICS = (  # --policy physics, on validation scenes
    "expert,expert-jittered,random,random-normal,part-pixel-normal,hinge-pixel,"
    "direction-10,direction-20,direction-30,direction-45,direction-60,pixel-2,pixel-4,pixel-8,pixel-16"
)
DEMO = {"policy": "model,expert,random,random-normal,mean-action,blind", "split": "both", "episodes": 32, "strips": 6}
NO_CONTACT = "the expert found no contact: look at axis, origin and limits; does the way that opens it lead inside?"
NOTHING = (math.nan, math.nan, (math.nan,) * 3)  # the action of a policy that failed


@dataclass
class EvalConfig:
    policy: str = flag("model", "separated by commas, the first is drawn; x lists the names; physics: a set of them")
    checkpoint: str = flag("data/pretrained/robomamba-tiny", "folder of the policy `model`")
    blind_table: str = flag("data/pretrained/blind_table.json", "what `mean-action` and `blind` know")
    split: str = flag("", "which scenes; both where nothing else is asked for, val for physics", choices=("", *SPLITS))
    objects: str = flag("", "folder of objects of your own: one more split, alone where there is no --split")
    episodes: int = flag(100, "scenes a split, categories in turn", low=1, high=1_000_000)
    seed: int = flag(0, "another seed, other scenes", low=0, high=2**31)
    workers: int = flag(2, "processes", low=1, high=256)
    closed_loop: int = flag(0, "more grips after the first, each with a new picture and prediction", low=0, high=100)
    strips: int = flag(0, "pictures of so many episodes of the first policy, and one GIF", low=0, high=1000)
    out: str = flag("runs/eval", "folder for results.json, table.md and pictures")
    demo: bool = flag(False, "a dialogue, then 32 + 32 scenes and six strips")


def ours(path: str) -> Path:
    """The file or folder as named, else this repository's: the defaults work from any working directory."""
    return Path(path) if Path(path).exists() else ROOT / path


# ---- policies --------------------------------------------------------------------------------------------------------


def sources(cfg: EvalConfig) -> dict[str, str | None]:
    """{policy: what is behind it, in the order of --policy}: a checkpoint, MODULE:FUNCTION, or None."""
    found: dict[str, str | None] = {}
    for entry in cfg.policy.split(","):
        name, equals, source = entry.partition("=")
        if name in found:
            raise ValueError(f"--policy {cfg.policy}: names {name} twice")
        if equals and (name in NAMES or scripted(name)):
            raise ValueError(f"--policy {entry}: {name} has a meaning already; choose another name")
        if name in MODELS:
            source = cfg.checkpoint
        found[name] = source if equals or name in MODELS else None
    return found


def make_policies(cfg: EvalConfig) -> tuple[dict[str, Callable], dict[str, object]]:
    """({name: policy}, {folder: model}) of --policy.

    Raises: ValueError for an unknown policy, a missing or broken checkpoint, table or function.
    """
    policies: dict[str, Callable] = {}
    models: dict[str, object] = {}
    for name, source in sources(cfg).items():
        if source is None and name in TABLES:
            policies[name] = blind_policy(read_blind_table(ours(cfg.blind_table)), mean=name == "mean-action")
        elif source is None and name == "random-depth":
            policies[name] = random_depth
        elif source is None:
            policies[name] = scripted(name)
            if policies[name] is None:
                raise ValueError(f"--policy {name}: unknown; choose from {', '.join(NAMES)}")
        elif ":" in source and not Path(source).is_dir():
            policies[name] = guarded(user_function(name, source))
        else:
            if source not in models:
                if not source or not ours(source).is_dir():
                    named = "--checkpoint" if name in MODELS else "--policy"
                    raise ValueError(f"{named} {source or '(not given)'}: no such folder; the policy {name} needs it")
                models[source] = load_model(ours(source))
            policies[name] = model_policy(models[source], name.rpartition("-")[2])
    sizes = {folder: model.config.vision.image_size for folder, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"checkpoints want pictures of different sizes, which cannot share a scene: {sizes}")
    return policies, models


def load_model(folder: Path):
    """RoboMamba on one thread, warm."""
    import torch  # here and in the next line: policies without a model start in half a second

    from robomamba import RoboMamba

    torch.set_num_threads(1)
    model = RoboMamba.from_pretrained(folder)
    S = model.config.vision.image_size
    model.predict_action(np.zeros((S, S, 3), np.uint8), "open the door")  # the first call is slower; keep it untimed
    return model


def model_policy(model, way: str) -> Callable:
    """A policy from a RoboMamba. way: depth, text, pixel or direction, see the top; anything else: the plain one."""
    S = model.config.vision.image_size

    def with_head(o: Observation):
        action = model.predict_action(o.image, o.instruction)
        return action.u, action.v, action.approach

    def with_depth(o: Observation):
        action = model.predict_action(o.image, o.instruction, depth=o.depth, intrinsics=o.intrinsics)
        return action.u, action.v, action.approach

    def with_text(o: Observation):
        text = model.generate(o.image, contact_question(o.instruction), max_new_tokens=CONTACT_TOKENS)
        u, v, approach = parse_contact(text) or NOTHING
        return u * S, v * S, approach

    if way == "depth":
        return with_depth
    if way == "text":
        return with_text
    if way == "pixel":
        return combine(with_head, expert)
    if way == "direction":
        return combine(expert, with_head)
    return with_head


def random_depth(o: Observation):
    """The baseline of model-depth: a random pixel of the object, no predicted direction, the same read-out of depth."""
    u, v, approach = depth.refine(*object_pixel(o), None, o.depth, o.intrinsics)
    return u, v, (0.0, 0.0, 1.0) if approach is None else approach


# ---- episodes --------------------------------------------------------------------------------------------------------


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


class Plan(NamedTuple):
    """What is to be evaluated: {split: (categories, first seed)}, as in SPLITS, and what was found of --objects."""

    groups: dict
    broken: dict[str, str]  # objects that cannot be used: why
    held: dict[str, int]  # objects with joints that are held fixed: how many


def make_plan(cfg: EvalConfig) -> Plan:
    groups = dict(SPLITS[cfg.split]) if cfg.split else {}
    if not cfg.objects:
        return Plan(groups, {}, {})
    names, broken, held = find_objects(cfg.objects)
    groups["objects"] = (tuple(names), SEEDS["objects"])
    return Plan(groups, broken, held)


def make_jobs(cfg: EvalConfig, groups: dict) -> list[Job]:
    """--episodes jobs a split; its categories in turn, so that each has its equal share (or one less)."""
    return [
        Job(split, names[k % len(names)], k // len(names), first_seed, cfg.seed)
        for k in range(cfg.episodes)  # the splits in turn, so that a run that was stopped has some of each
        for split, (names, first_seed) in groups.items()
    ]


class Attempt(NamedTuple):
    """What a policy said and what came of it. failure: what a user's policy raised, else ""."""

    action: tuple
    outcome: Outcome
    ms: float
    failure: str = ""


def attempt(policy: Callable, o: Observation, part: int) -> Attempt | None:
    """Ask the policy, do what it says, count success for `part`. None where the policy does not apply."""
    start = time.perf_counter()
    try:
        action = policy(o)
    except PolicyFailure as failure:
        cause = failure.__cause__
        detail = f"{failure}: {cause}"[:500] if cause else str(failure)
        return Attempt(NOTHING, Outcome(0.0, False, False, str(failure)), 0.0, detail)
    ms = 1000 * (time.perf_counter() - start)
    if action is None:
        return None
    (u, v), approach = written(action)
    if None in (u, v, *approach):
        return Attempt(action, Outcome(0.0, False, False, "not a number"), ms)
    return Attempt(action, o.scene.act(u, v, approach, part), ms)


def written(action: tuple) -> tuple[list, list]:
    """(u, v) and approach as a record has them, so that it can be played again exactly: rounded; None: not finite."""

    def numbers(values, digits: int) -> list[float | None]:
        return [round(float(x), digits) if math.isfinite(x) else None for x in values]

    return numbers(action[:2], 3), numbers(action[2], 5)


def score(o: Observation, done: Attempt) -> dict:
    """The part of a record that says what was done, what happened and how far from the expert's contact it was."""
    (u, v), approach = written(done.action)
    outcome = done.outcome
    record = {"u": u, "v": v, "approach": approach, "moved": round(float(outcome.moved), 5)}
    record |= {"initial": bool(outcome.initial), "long": bool(outcome.long), "reason": outcome.reason}
    if done.failure:
        record["failure"] = done.failure
    record["on_part"] = False
    if None not in (u, v, *approach):
        column = math.floor(u + 0.5)
        row = math.floor(v + 0.5)
        inside = 0 <= column < o.scene.image_size and 0 <= row < o.scene.image_size
        record["on_part"] = inside and bool(o.scene.links[row, column] >= 0)
        cosine = float(np.clip(unit(approach) @ unit(o.label.approach), -1, 1))
        record["pixel_error"] = round(math.hypot(u - o.label.u, v - o.label.v), 2)
        record["approach_error_deg"] = round(math.degrees(math.acos(cosine)), 2)
    return record


def sentence(scene: Scene, part: int) -> str:
    """The instruction for `part`, one of several phrasings, a function of (category, seed, part)."""
    rng = stream(scene.category, scene.seed, f"sentence {part}")
    noun = catalogue.NOUNS.get(scene.category, scene.category.lower())
    return questions.instruction(scene.spec.parts[part], noun, rng)


def depth_camera(exact: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Depth as an imperfect camera measures it."""
    return depth.camera_depth(exact, rng)


def observe(scene: Scene, label: Label | None, purpose: str) -> Observation:
    """The target part of the rendered scene, for one policy."""
    rng = stream(scene.category, scene.seed, purpose)
    return Observation(scene, sentence(scene, scene.target), scene.target, label, rng, depth_camera)


class Bench:
    """What one process holds: the policies, the models behind them and the scene. Raises: as make_policies."""

    def __init__(self, cfg: EvalConfig):
        self.cfg = cfg
        self.sources = sources(cfg)
        self.policies, self.models = make_policies(cfg)
        model = next(iter(self.models.values()), None)
        self.image_size = model.config.vision.image_size if model else REFERENCE_S
        self.scene: Scene | None = None

    def close(self) -> None:
        if self.scene is not None:
            self.scene.close()
            self.scene = None

    def find(self, job: Job) -> tuple[int, Label | None]:
        """Spawn and render scenes until the expert solves one: (how many were tried, its contact or None)."""
        if self.scene is None:
            self.scene = ObjectScene(self.cfg.objects, self.image_size) if self.cfg.objects else Scene(self.image_size)
        for number in range(MAX_TRIES):
            seed = job.scene_seed(number)
            self.scene.spawn(job.category, seed).render()
            label = oracle.expert(self.scene, stream(job.category, seed, "expert"))
            if label is not None:
                return number + 1, label
        return MAX_TRIES, None

    def episode(self, job: Job) -> dict:
        """All policies on one scene: {"tried", "solved", "records", "ms": {policy: milliseconds of its prediction}}.

        "error": why an object of the user cannot be used.
        """
        answer = {"tried": 0, "solved": 0, "records": [], "ms": {}}
        try:
            answer["tried"], label = self.find(job)
        except Exception as error:  # whatever a hostile object does, the others go on
            if job.split != "objects":
                raise
            self.close()
            return answer | {"error": f"{type(error).__name__}: {error}"[:500]}
        if label is None:
            return answer
        answer["solved"] = 1
        scene = self.scene
        labels = None
        for name, policy in self.policies.items():
            o = observe(scene, label, f"policy {name}")
            done = attempt(policy, o, o.part)
            if done is None:
                continue
            record = {"policy": name, "split": job.split, "category": scene.category, "seed": scene.seed}
            if job.split == "objects":
                record["object"] = job.category
            record |= {"part": scene.spec.parts[o.part].label, "instruction": o.instruction} | score(o, done)
            if self.sources[name] is not None:
                answer["ms"][name] = done.ms
                if len(scene.spec.parts) > 1:
                    labels = labels or all_labels(scene, label)
                    if len(labels) > 1:
                        record["language"] = wrong_sentence(policy, o, done, labels)
            if self.cfg.closed_loop:
                from extras.closed_loop import grip_again

                record["closed_loop"] = grip_again(policy, o, done, self.cfg.closed_loop, f"policy {name}")
            answer["records"].append(record)
        return answer


def all_labels(scene: Scene, label: Label) -> dict[int, Label]:
    """The expert's contact of every part of the picture that has one; `label` is the target's."""
    found = {scene.target: label}
    for part in range(len(scene.spec.parts)):
        rng = stream(scene.category, scene.seed, f"expert {part}")
        other = part != scene.target and oracle.expert(scene, rng, part)
        if other:
            found[part] = other
    return found


def wrong_sentence(policy: Callable, o: Observation, done: Attempt, labels: dict[int, Label]) -> dict:
    """Does the sentence matter? Which labelled part is nearest to the prediction; and the wrong-sentence control: the
    sentence names another part, and success is still counted for the first."""
    rng = stream(o.scene.category, o.scene.seed, "language")
    distance = {j: math.hypot(done.action[0] - label.u, done.action[1] - label.v) for j, label in labels.items()}
    other = int(rng.choice([j for j in labels if j != o.part]))
    wrong = attempt(policy, o._replace(instruction=sentence(o.scene, other), part=other, rng=rng), o.part)
    return {
        "parts": len(labels),
        "nearest": math.isfinite(distance[o.part]) and min(distance, key=distance.get) == o.part,
        "wrong_initial": wrong is not None and bool(wrong.outcome.initial),
    }


# ---- the whole run ---------------------------------------------------------------------------------------------------

_bench: Bench | None = None  # of a worker process


def _start(cfg: EvalConfig) -> None:
    global _bench
    _bench = Bench(cfg)


def _work(job: Job) -> dict:
    return _bench.episode(job)


def run_jobs(bench: Bench, jobs: list[Job]) -> Iterator[tuple[Job, dict]]:
    """Yield (job, answer) as they come; with one worker in this process."""
    if bench.cfg.workers > 1:
        yield from parallel(_work, jobs, bench.cfg.workers, _start, (bench.cfg,))
        return
    try:
        for job in jobs:
            yield job, bench.episode(job)
    finally:
        bench.close()


def evaluate(bench: Bench, plan: Plan, command: str = "") -> dict:
    """Every policy on every scene -> what goes into results.json; "partial": true after Ctrl-C or a worker's death."""
    cfg = bench.cfg
    for name, why in plan.broken.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    jobs = make_jobs(cfg, plan.groups)
    answers: dict[Job, dict] = {}
    start = time.monotonic()
    partial = False
    with contextlib.closing(run_jobs(bench, jobs)) as arriving:
        try:
            for job, answer in arriving:
                answers[job] = answer
                progress(len(answers), len(jobs), start)
        except (KeyboardInterrupt, BrokenProcessPool) as stop:
            partial = True
            print(f"\nstopped ({type(stop).__name__}) after {len(answers)} of {len(jobs)} scenes", file=sys.stderr)
    done = [(job, answers[job]) for job in jobs if job in answers]  # in the order of the jobs, whoever was faster
    return {
        **summarise(bench.sources, list(plan.groups), done),
        "split": cfg.split or "objects",
        "command": command,
        **environment(),
        "workers": cfg.workers,
        "seconds": round(time.monotonic() - start, 1),
        "seed": cfg.seed,
        "partial": partial,
        "skipped": skipped(done, plan),
        "episodes": [record for _, answer in done for record in answer["records"]],
    }


def skipped(done: list[tuple[Job, dict]], plan: Plan) -> dict:
    """What was left out: broken objects {name: why}; scenes without a contact, episodes given up, joints {name: count}.

    Raises: ValueError when nothing is left.
    """
    broken = plan.broken | {job.category: answer["error"] for job, answer in done if "error" in answer}
    infeasible: Counter = Counter()
    given_up: Counter = Counter()
    for job, answer in done:
        infeasible[job.category] += answer["tried"] - answer["solved"]
        given_up[job.category] += not answer["solved"]
    if done and not any(answer["solved"] for _, answer in done):
        why = {job.category: NO_CONTACT for job, _ in done} | broken
        raise ValueError(
            "nothing could be evaluated. " + "; ".join(f"{name}: {reason}" for name, reason in why.items())
        )
    counts = {"infeasible": dict(+infeasible), "given_up": dict(+given_up), "held_joints": plan.held}
    return {"objects": broken, **counts}


# ---- main ------------------------------------------------------------------------------------------------------------


def show_dialogue(bench: Bench, out: Path) -> None:
    """Print what the model says about one test scene, and what is true; write OUT/scene.png."""
    model = bench.models[bench.cfg.checkpoint]
    S = bench.image_size
    job = Job("seen", "StorageFurniture", 0, SEEDS["seen"], bench.cfg.seed)
    bench.find(job)
    scene = bench.scene
    rng = stream(job.category, scene.seed, "dialogue")
    known = oracle.facts(scene, rng)
    Image.fromarray(scene.rgb).resize((ZOOM * S,) * 2, Image.Resampling.BICUBIC).save(out / "scene.png")
    turns = [(turn.question, turn.answer) for turn in questions.dialogue(known, rng)]
    contact = known["parts"][scene.target]["contact"]
    if contact:
        asked = contact_question(sentence(scene, scene.target))
        turns.append((asked, questions.contact_answer(contact, S)))
    print(f"A picture of a {catalogue.NOUNS[job.category]} it has never seen ({out / 'scene.png'}):\n")
    for question, truth in turns:
        print(f"  you    {question}\n  model  {model.generate(scene.rgb, question)}\n  truth  {truth}\n")


def make_folder(out: Path) -> None:
    """OUT, tried before the work begins."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from None


def main(argv: list[str] | None = None) -> int:
    """What the flags ask for; returns the exit code. Raises: ValueError for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(EvalConfig, __doc__, argv)
    default = "" if cfg.objects else "both"
    if cfg.policy == "physics":
        default = "val"
        cfg = dataclasses.replace(cfg, policy=PHYSICS)
    cfg = dataclasses.replace(cfg, split=cfg.split or default)
    if cfg.demo:
        cfg = dataclasses.replace(cfg, **DEMO)
    bench = Bench(cfg)  # a bad policy or checkpoint is named here
    plan = make_plan(cfg)  # and here a folder without any usable object
    out = Path(cfg.out)
    make_folder(out)
    try:
        if cfg.demo:
            show_dialogue(bench, out)
        bench.close()  # the workers have scenes of their own
        results = evaluate(bench, plan, shlex.join(["python", "sim_eval.py", *argv]))
        files = write_results(out, results)
        print(f"\n{report(results)}\n")
        if cfg.strips and results["episodes"] and not results["partial"]:
            scene = ObjectScene(cfg.objects, bench.image_size) if cfg.objects else Scene(bench.image_size)
            files += draw_strips(out, results, cfg.strips, scene)
    finally:
        bench.close()
    print(f"{results['seconds']} s. Written:", *files)
    return 130 if results["partial"] else 0


if __name__ == "__main__":
    run_main(main)
