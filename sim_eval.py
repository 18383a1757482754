"""Evaluate policies in simulation and report success rates.

    python sim_eval.py --demo --out demo                                             # `make demo`
    python sim_eval.py --policy model,model-depth,expert,random,blind --split both --episodes 550 --out runs/eval
    python sim_eval.py --policy model,other=FOLDER --split val --out runs/val        # compare another checkpoint
    python sim_eval.py --policy mine=package.module:function --out runs/mine         # your own policy
    python sim_eval.py --objects FOLDER --policy model,expert --out runs/objects     # your own objects (extras/partnet)
    python sim_eval.py --policy physics --episodes 300 --out runs/physics            # how forgiving is the simulator?

    (category, seed) -> Scene -> Observation(image, depth, sentence, ..) -> policy -> pixel (column u, row v), approach
                          |                                                    '-> Scene.act -> Outcome -> a record
                          '-> the expert finds no contact: counted as infeasible, and the next seed is tried

Policies: those in SCRIPTED of sim/policies.py, direction-DEGREES, pixel-PIXELS, and the following:
    model               --checkpoint: the policy head on picture and sentence, in one forward pass
    model-depth         the same plus an imperfect camera's depth picture and intrinsics: an RGB-D encoder sees them,
                        the pointing head (if any) predicts, and `refine` in data/depth.py improves the contact
    model-depth-head    with the paper's head; model-depth-raw, model-depth-head-raw: without refinement
    model-point         with the pointing head, without depth
    model-text          the answer generated token by token, as ManipLLM does; unparsable text is a failure
    model-pixel         the model's pixel, the expert's direction; model-direction: the other way round
    blind, mean-action  the vision-free baselines: median label of the category and part; mean label
    random-depth        a random pixel of the object, refined freely on the depth picture by `refine`
    NAME=FOLDER         another checkpoint; -depth, -depth-head, -point, -text .. at the end of NAME work as above
    NAME=MODULE:FUNC    your own (template: extras/example_policy.py); an error or a call of over 10 s is a failure
Success means that the NAMED part moved: by >= 0.01 rad or m ("initial"), by >= 0.1 ("long"; formula in sim/scene.py).
Every miss is a failure and stays in the denominator. All policies get the same scenes and sentences, and only scenes
that the expert solves, so its own row is 1 by construction; "expert, unconditioned" is how often it solves a scene.
OUT/results.json holds every episode, OUT/table.md the tables, OUT/categories.md each category next to the paper's; an
interrupted run leaves results.partial.json. Thresholds, categories and the seen/unseen split are RoboMamba's (arXiv
2406.04339, section 4.3) and ManipLLM's (2312.16217); simulator and objects are not, so do not compare the numbers.
"""

import math
import shlex
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.report import report, summarise, write_results
from common.scripts import cli, environment, flag, listed, parallel, progress, run_main
from data import depth, questions
from data.prompts import CONTACT_TOKENS, contact_question, parse_contact
from sim import policies
from sim.catalogue import DRAWER_DOOR_SEEN, DRAWER_DOOR_UNSEEN, GRAMMAR, NOUNS, SEED_SPAN, SEEDS, SEEN, UNSEEN
from sim.expert import Label, expert, facts, why_unsolved
from sim.pictures import ZOOM, draw_strips
from sim.policies import Observation, PolicyFailure, combine, oracle, scripted
from sim.scene import Outcome, Scene, stream, unit

ROOT = Path(__file__).resolve().parent
SPLITS = {  # --split -> {name in the results and in SEEDS: categories}
    "seen": {"seen": SEEN},
    "unseen": {"unseen": UNSEEN},
    "both": {"seen": SEEN, "unseen": UNSEEN},
    "val": {"val": SEEN},  # for model selection; never uses the test seeds
    "drawer-door": {"seen": DRAWER_DOOR_SEEN, "unseen": DRAWER_DOOR_UNSEEN},
}
MAX_TRIES = 20  # scenes tried per episode before giving up

WAYS = ("", "depth", "depth-raw", "depth-head", "depth-head-raw", "point", "text", "pixel", "direction")
MODELS = tuple(f"model-{way}".strip("-") for way in WAYS)  # --checkpoint, used in several ways
TABLES = ("blind", "mean-action")
NAMES = (*MODELS, *TABLES, *policies.SCRIPTED, "random-depth", "direction-DEGREES", "pixel-PIXELS", "NAME=FOLDER")
PHYSICS = "expert,expert-jittered,random,random-normal,part-pixel-normal,hinge-pixel"  # on validation scenes
PHYSICS += "".join(f",direction-{n}" for n in (10, 20, 30, 45, 60)) + "".join(f",pixel-{n}" for n in (2, 4, 8, 16))
DEMO = {"policy": "model-depth,model,expert,random,random-normal,blind", "split": "both", "episodes": 32, "strips": 6}


@dataclass
class EvalConfig:
    policy: str = flag("model", "comma-separated names (a wrong one lists all; physics: a preset); --strips: the first")
    checkpoint: str = flag("data/pretrained/robomamba-tiny-rgbd", "checkpoint folder of the policy `model`")
    blind_table: str = flag("data/pretrained/blind_table.json", "label table that `mean-action` and `blind` use")
    split: str = flag("", "which scenes (default: both; physics: val; --objects: only those)", choices=("", *SPLITS))
    categories: str = flag("", "comma-separated subset of the split; val also has grammar archetypes (grammar:book)")
    objects: str = flag("", "folder of your own objects: an extra split, or the only one without --split")
    episodes: int = flag(100, "scenes per split, cycling through the categories", low=1, high=1_000_000)
    seed: int = flag(0, "random seed that selects the scenes", low=0, high=2**31)
    workers: int = flag(2, "number of worker processes", low=1, high=256)
    strips: int = flag(0, "draw this many episodes of the first policy, and one GIF", low=0, high=1000)
    out: str = flag("runs/eval", "folder for results.json, table.md and pictures")
    demo: bool = flag(False, "a dialogue, then 32 + 32 scenes and six strips")


def ours(path: str) -> Path:
    """The path as given if it exists, else inside this repository: the defaults work from any working directory."""
    return Path(path) if Path(path).exists() else ROOT / path


def make_policies(cfg: EvalConfig) -> tuple[dict[str, Callable], dict[str, str | None], dict[str, object]]:
    """({name: policy}, {name: its checkpoint or MODULE:FUNCTION, or None}, {folder: model}) of --policy.

    Raises: ValueError naming an unknown policy, a missing or broken checkpoint, table or function."""
    found, sources, models = {}, {}, {}
    for entry in cfg.policy.split(","):
        name, equals, source = entry.partition("=")
        if name in found:
            raise ValueError(f"--policy {cfg.policy}: names {name} twice")
        if equals and (name in NAMES or scripted(name)):
            raise ValueError(f"--policy {entry}: {name} has a meaning already; choose another name")
        if name in MODELS:
            source = cfg.checkpoint
        sources[name] = source if equals or name in MODELS else None
        if name in TABLES:
            table = policies.read_blind_table(ours(cfg.blind_table))
            found[name] = policies.blind_policy(table, mean=name == "mean-action")
        elif sources[name] is None:
            found[name] = random_depth if name == "random-depth" else scripted(name)
            if found[name] is None:
                raise ValueError(f"--policy {name}: unknown; choose from {', '.join(NAMES)}")
        elif ":" in source and not Path(source).is_dir():
            found[name] = policies.user_function(name, source)
        else:
            if not source or not ours(source).is_dir():
                named = "--checkpoint" if name in MODELS else "--policy"
                raise ValueError(f"{named} {source or '(not given)'}: no such folder; the policy {name} needs it")
            if source not in models:
                models[source] = load_model(ours(source))
            way = max((way for way in WAYS if name.endswith(f"-{way}")), key=len, default="")
            found[name] = model_policy(models[source], set(way.split("-")))
    sizes = {folder: model.config.vision.image_size for folder, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"checkpoints want pictures of different sizes, which cannot share a scene: {sizes}")
    return found, sources, models


def load_model(folder: Path):
    """Load RoboMamba on one thread and warm it up: the first call is slower, so it happens here, untimed."""
    import torch  # imported only here: policies without a model start in half a second

    from robomamba import RoboMamba

    torch.set_num_threads(1)
    model = RoboMamba.from_pretrained(folder)
    model.predict_action(np.zeros((model.config.vision.image_size,) * 2 + (3,), np.uint8), "open the door")
    return model


def model_policy(model, ways: set[str]) -> Callable:
    """Wrap a RoboMamba as a policy. ways: the words of one of WAYS; see the module docstring."""
    S = model.config.vision.image_size  # side of its picture, pixels
    point = "point" in ways or ("depth" in ways and "head" not in ways)

    def head(o: Observation):
        camera = {"depth": o.depth, "intrinsics": o.intrinsics, "refine": "raw" not in ways} if "depth" in ways else {}
        action = model.predict_action(o.image, o.instruction, point=point, **camera)
        return action.u, action.v, action.approach

    def text(o: Observation):
        said = model.generate(o.image, contact_question(o.instruction), max_new_tokens=CONTACT_TOKENS)
        u, v, approach = parse_contact(said) or (math.nan, math.nan, (math.nan,) * 3)
        return u * S, v * S, approach

    special = {"text": text, "pixel": combine(head, oracle), "direction": combine(oracle, head)}
    return next((special[way] for way in special if way in ways), head)


def random_depth(o: Observation):
    """Baseline for model-depth: a random pixel of the object, no predicted direction, the same use of depth."""
    u, v, approach = depth.refine(*policies.object_pixel(o), None, o.depth, o.intrinsics)
    return u, v, (0.0, 0.0, 1.0) if approach is None else approach


def partnet():
    """The module that reads the user's own objects."""
    try:
        from extras import partnet
    except ModuleNotFoundError:
        raise ValueError("--objects: read by extras/partnet.py, which is not here") from None
    return partnet


# ---- one episode ----------------------------------------------------------------------------------------------------
class Job(NamedTuple):
    """One episode: number `k` of a split is round k // len(categories) of its category."""

    split: str
    category: str
    round: int
    seed: int  # --seed

    def scene_seed(self, attempt: int) -> int:
        """Depends on (split, category, round, --seed, attempt), not on other episodes or the number of workers."""
        name = f"{self.category}/{self.round}/{attempt}/{self.seed}"
        return SEEDS[self.split] + zlib.crc32(name.encode()) % SEED_SPAN


def sentence(scene: Scene, part: int) -> str:
    """The instruction for `part`: one of several phrasings, determined by (category, seed, part)."""
    noun = NOUNS.get(scene.category, scene.category.lower())
    rng = stream(scene.category, scene.seed, f"sentence {part}")
    return questions.instruction(vars(scene.spec.parts[part]), noun, rng)


def observe(scene: Scene, label: Label | None, purpose: str) -> Observation:
    """What one policy sees of the rendered scene, with the instruction for its target part."""
    rng = stream(scene.category, scene.seed, purpose)
    return Observation(scene, sentence(scene, scene.target), scene.target, label, rng, depth.camera_depth)


class Attempt(NamedTuple):
    """A policy's action (rounded as in a record, so that it can be replayed; None: not finite), its outcome, the time
    the policy took (ms), and what went wrong in a user's policy."""

    action: list  # u, v and the three components of approach
    outcome: Outcome
    ms: float
    failure: str = ""


def attempt(policy: Callable, o: Observation, part: int) -> Attempt | None:
    """Ask the policy, execute its action, measure success for `part`. None if the policy does not apply."""
    start = time.perf_counter()
    try:
        action = policy(o)
    except PolicyFailure as failure:
        detail = f"{failure}: {failure.__cause__}"[:500] if failure.__cause__ else str(failure)
        return Attempt([None] * 5, Outcome(0.0, False, False, str(failure)), 0.0, detail)
    ms = 1000 * (time.perf_counter() - start)
    if action is None:
        return None
    values = zip((*action[:2], *action[2]), (3, 3, 5, 5, 5), strict=True)
    u, v, *approach = (round(float(x), digits) for x, digits in values)
    finite = [x if math.isfinite(x) else None for x in (u, v, *approach)]
    return Attempt(finite, o.scene.act(u, v, approach, part), ms)


def score(o: Observation, done: Attempt) -> dict:
    """The fields of a record for the action, its outcome and its distance from the expert's contact."""
    u, v, *approach = done.action
    outcome = done.outcome
    record = {"u": u, "v": v, "approach": approach, "moved": round(float(outcome.moved), 5)}
    record |= {"initial": bool(outcome.initial), "long": bool(outcome.long), "reason": outcome.reason}
    if done.failure:
        record["failure"] = done.failure
    record["on_part"] = False
    if None not in (u, v, *approach):
        pixel = math.floor(v + 0.5), math.floor(u + 0.5)
        inside = min(pixel) >= 0 and max(pixel) < o.scene.image_size
        record["on_part"] = inside and bool(o.scene.links[pixel] >= 0)
        cosine = float(np.clip(unit(approach) @ unit(o.label.approach), -1, 1))
        record["pixel_error"] = round(math.hypot(u - o.label.u, v - o.label.v), 2)
        record["approach_error_deg"] = round(math.degrees(math.acos(cosine)), 2)
    return record


def all_labels(scene: Scene, label: Label) -> dict[int, Label]:
    """The expert's contact for every part of the scene that has one; `label` is the target's."""
    others = [part for part in range(len(scene.spec.parts)) if part != scene.target]
    found = {part: expert(scene, stream(scene.category, scene.seed, f"expert {part}"), part) for part in others}
    return {scene.target: label} | {part: other for part, other in found.items() if other}


def wrong_sentence(policy: Callable, o: Observation, done: Attempt, labels: dict[int, Label]) -> dict:
    """Does the sentence matter? Is the named part the labelled one nearest to the prediction? And the wrong-sentence
    control: the sentence names another part, but success still counts for the original one."""
    rng = stream(o.scene.category, o.scene.seed, "language")
    u, v = done.action[:2]
    away = {} if None in (u, v) else {j: math.hypot(u - label.u, v - label.v) for j, label in labels.items()}
    other = int(rng.choice([j for j in labels if j != o.part]))
    asked = o._replace(instruction=sentence(o.scene, other), part=other, label=labels[other], rng=rng)
    wrong = attempt(policy, asked, o.part)
    nearest = min(away, key=away.get, default=None) == o.part
    return {"parts": len(labels), "nearest": nearest, "wrong_initial": bool(wrong and wrong.outcome.initial)}


class Bench:
    """What one process holds: the policies, the models behind them and the scene. Raises: as make_policies."""

    def __init__(self, cfg: EvalConfig):
        self.cfg = cfg
        self.policies, self.sources, self.models = make_policies(cfg)
        self.image_size = next((m.config.vision.image_size for m in self.models.values()), policies.REFERENCE_S)
        self.scene: Scene | None = None

    def open(self) -> Scene:
        if self.scene is None:
            objects = self.cfg.objects
            self.scene = partnet().ObjectScene(objects, self.image_size) if objects else Scene(self.image_size)
        return self.scene

    def close(self) -> None:
        if self.scene is not None:
            self.scene.close()
            self.scene = None

    def find(self, job: Job) -> tuple[int, Label | None]:
        """Spawn and render scenes until the expert solves one: (number tried, its contact or None)."""
        scene = self.open()
        for number in range(MAX_TRIES):
            seed = job.scene_seed(number)
            scene.spawn(job.category, seed).render()
            label = expert(scene, stream(job.category, seed, "expert"))
            if label is not None:
                return number + 1, label
        return MAX_TRIES, None

    def episode(self, job: Job) -> dict:
        """Run all policies on one scene -> {"tried", "solved", "records", "ms": {policy: ms}}; "why" if none ran."""
        answer = {"tried": 0, "solved": 0, "records": [], "ms": {}}
        try:
            answer["tried"], label = self.find(job)
        except Exception as error:  # whatever a hostile object does, go on with the others
            if job.split != "objects":
                raise
            self.close()
            return answer | {"why": f"{type(error).__name__}: {error}"[:500]}
        scene = self.scene
        if label is None:
            return answer | {"why": f"the expert found no contact: {why_unsolved(scene)}"}
        answer["solved"] = 1
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
                if not done.failure:
                    answer["ms"][name] = done.ms
                labels = labels or all_labels(scene, label)
                if len(labels) > 1:
                    record["language"] = wrong_sentence(policy, o, done, labels)
            answer["records"].append(record)
        return answer


# ---- the whole run --------------------------------------------------------------------------------------------------
def only(splits: dict[str, tuple], categories: str) -> dict[str, tuple]:
    """Keep the named categories of each split. Raises: ValueError for a category that is in none of them."""
    splits = {split: (*names, *GRAMMAR) if split == "val" else names for split, names in splits.items()}
    wanted = listed("--categories", categories, tuple(name for names in splits.values() for name in names))
    if not wanted:
        raise ValueError(f"--categories '{categories}': no name")
    found = {split: tuple(name for name in wanted if name in names) for split, names in splits.items()}
    return {split: names for split, names in found.items() if names}


def make_jobs(cfg: EvalConfig, splits: dict[str, tuple]) -> list[Job]:
    """--episodes jobs per split, cycling through its categories so that each gets an equal share (or one less)."""
    return [
        Job(split, names[k % len(names)], k // len(names), cfg.seed)
        for k in range(cfg.episodes)  # alternate the splits, so that an interrupted run has some of each
        for split, names in splits.items()
    ]


_bench: list[Bench] = []  # one per worker process


def _start(cfg: EvalConfig) -> None:
    _bench.append(Bench(cfg))


def _work(job: Job) -> dict:
    return _bench[0].episode(job)


def evaluate(bench: Bench, splits: dict, broken: dict, held: dict, command: str = "") -> dict:
    """Run every policy on every scene -> the contents of results.json; "partial": true after Ctrl-C or a dead worker.

    splits: {split: categories} as in SPLITS. broken: {unusable object: why}. held: {object: number of fixed joints}."""
    cfg = bench.cfg
    for name, why in broken.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    jobs = make_jobs(cfg, splits)
    arriving = ((job, bench.episode(job)) for job in jobs)
    if cfg.workers > 1:
        arriving = parallel(_work, jobs, cfg.workers, _start, (cfg,))
    answers = {}
    start = time.monotonic()
    partial = False
    try:
        for job, answer in arriving:
            answers[job] = answer
            progress(len(answers), len(jobs), start)
    except (KeyboardInterrupt, BrokenProcessPool) as stop:
        partial = True
        print(f"\nstopped ({type(stop).__name__}) after {len(answers)} of {len(jobs)} scenes", file=sys.stderr)
    done = [(job, answers[job]) for job in jobs if job in answers]  # in job order, not order of completion
    return {
        **summarise(bench.sources, list(splits), done),
        "split": cfg.split or "objects",
        "categories": cfg.categories,
        "command": command,
        **environment(),
        "workers": cfg.workers,
        "seconds": round(time.monotonic() - start, 1),
        "seed": cfg.seed,
        "partial": partial,
        "skipped": skipped(done, broken) | {"held_joints": held},
        "episodes": [record for _, answer in done for record in answer["records"]],
    }


def skipped(done: list[tuple[Job, dict]], broken: dict) -> dict:
    """What was left out: objects {name: why}; scenes without a contact and episodes given up {name: count}. Raises:
    ValueError when nothing is left."""
    given_up = Counter(job.category for job, answer in done if not answer["solved"])
    infeasible: Counter = Counter()
    for job, answer in done:
        infeasible[job.category] += answer["tried"] - answer["solved"]
    solved = {job.category for job, answer in done if answer["solved"]}
    failed = {job: answer["why"] for job, answer in done if job.category not in solved}
    if done and not solved:
        why = {job.category: reason for job, reason in failed.items()} | broken
        raise ValueError("nothing could be evaluated. " + "; ".join(f"{name}: {why[name]}" for name in why))
    objects = broken | {job.category: why for job, why in failed.items() if job.split == "objects"}
    return {"objects": objects, "infeasible": dict(+infeasible), "given_up": dict(given_up)}


def show_dialogue(bench: Bench, out: Path) -> None:
    """Print the model's answers about one test scene next to the true ones; write OUT/scene.png."""
    model = bench.models[bench.cfg.checkpoint]
    S = bench.image_size
    job = Job("seen", "StorageFurniture", 0, bench.cfg.seed)
    bench.find(job)
    scene = bench.scene
    rng = stream(job.category, scene.seed, "dialogue")
    known = facts(scene, rng)
    Image.fromarray(scene.rgb).resize((ZOOM * S,) * 2, Image.Resampling.BICUBIC).save(out / "scene.png")
    turns = [(turn.question, turn.answer) for turn in questions.dialogue(known, rng)]
    contact = known["parts"][scene.target]["contact"]
    if contact:
        turns.append((contact_question(sentence(scene, scene.target)), questions.contact_answer(contact, S)))
    print(f"A picture of a {NOUNS[job.category]} it has never seen ({out / 'scene.png'}):\n")
    for question, truth in turns:
        print(f"  you    {question}\n  model  {model.generate(scene.rgb, question)}\n  truth  {truth}\n")


def main(argv: list[str] | None = None) -> int:
    """Do what the flags ask for; returns the exit code. Raises: ValueError for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(EvalConfig, __doc__, argv)
    if cfg.policy == "physics":
        cfg = replace(cfg, policy=PHYSICS, split=cfg.split or "val")
    if cfg.demo:
        cfg = replace(cfg, **DEMO)
    if not cfg.split and not cfg.objects:
        cfg = replace(cfg, split="both")
    bench = Bench(cfg)  # raises for a bad policy or checkpoint
    splits = SPLITS[cfg.split] if cfg.split else {}
    if cfg.categories:
        splits = only(splits, cfg.categories)
    broken, held = {}, {}
    if cfg.objects:  # raises for a folder without any usable object
        names, broken, held = partnet().find_objects(cfg.objects)
        splits = splits | {"objects": tuple(names)}
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        if cfg.demo:
            show_dialogue(bench, out)
        bench.close()  # the workers open their own scenes
        results = evaluate(bench, splits, broken, held, shlex.join(["python", "sim_eval.py", *argv]))
        files = write_results(out, results)
        print(f"\n{report(results)}\n")
        mine = [record for record in results["episodes"] if record["policy"] == results["policy"]]
        if cfg.strips and mine and not results["partial"]:
            files += draw_strips(out, mine, cfg.strips, bench.open())
    finally:
        bench.close()
    print(f"{results['seconds']} s. Written:", *files)
    return 130 if results["partial"] else 0


if __name__ == "__main__":
    run_main(main)
