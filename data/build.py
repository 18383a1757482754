"""Make the training data: pictures, questions with known answers, manipulation samples, dense targets for the encoder.

    python -m data.build --scenes 20000 --out data/cache/train
    python -m data.build --scenes 600 --split val --out data/cache/val
    python -m data.build --scenes 200 --out data/cache/small            # seconds, to look at

What lies in DIR afterwards:

    images/00012/00001234.png   the pictures, numbered by scene
    conversations.json          LLaVA layout: [{id, image, conversations: [{from, value}, ..]}]; several turns a picture
    manipulation.jsonl          a line a contact that works: {image, category, part, instruction, u, v, approach, ..}
    dense.npz                   per picture: 16 x 16 depth, normals, masks, kind of part; its category and colour
    facts.jsonl                 the ground truth of each picture, from which the questions were made
    manifest.json               counts, seeds, versions, seconds

Everything is deterministic in --seed and --scenes, whatever the number of workers. A run that was stopped goes on where
it was: finished groups of scenes lie in DIR/parts until all are there. Pictures of unseen categories (the paper's rule,
README "Seen and unseen") carry general questions only: what is it, which colour, a caption; no part, contact, plan or
affordance, no mask of a movable part.

Sources: the sampling of successful poses follows RoboMamba section 4.1 and ManipLLM (arXiv 2312.16217); question types
RoboVQA (arXiv 2311.00899). Differs: contact labels are the middle of the region that works, tested with small jitters,
not random points.
"""

import dataclasses
import json
import shutil
import time
import zlib
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import read_json, write_atomically, write_text
from common.scripts import check_flags, cli, environment, flag, parallel, progress, run_main
from data import questions
from data.tokenizer import NUMBER_BASE, NUMBERS, train_ranks, write_ranks
from sim import objects

# Test scenes: sim_eval.py acts on 20,000,000+ (seen) and 30,000,000+ (unseen); the questions have ranges of their own.
SEED_BASE = {"train": 0, "val": 10_000_000, "test-seen": 40_000_000, "test-unseen": 50_000_000}
CATEGORY_WEIGHT = {"StorageFurniture": 3.0, "Refrigerator": 2.0}  # the rest 1: furniture has the most kinds of fronts
GOES_ON = "nothing is lost: the same command goes on"
GROUP = 100  # scenes a worker makes at a time; also the unit of resuming


@dataclass(frozen=True)
class BuildConfig:
    scenes: int = flag(2000, "pictures", low=1)
    demos: int = flag(10_000, "at most so many manipulation samples, seen categories only (the paper's 10K)", low=0)
    workers: int = flag(2, "processes", low=1, high=256)
    seed: int = flag(0, "of everything that is drawn", low=0)
    out: str = flag("data/cache/train", "folder")
    split: str = flag("train", "which range of scene seeds, which categories", choices=tuple(SEED_BASE))
    image_size: int = flag(128, "pixels, a multiple of 16", low=32, high=1024)
    gadgets: float = flag(0.25, "fraction of pictures with random gadgets (variety; train only)", low=0, high=1)
    unseen: float = flag(
        0.08, "fraction of unseen categories, general questions only (0: strict rule; train only)", low=0, high=1
    )
    opened: float = flag(0.08, "fraction with parts already open: questions of state, no contact labels", low=0, high=1)
    after: float = flag(
        0.14, "fraction taken after an attempt, good or bad: questions of past and success", low=0, high=1
    )
    vocab: int = flag(
        1021, "byte-pair ranks learned on the texts of a train split (3 special tokens come on top); 0 = none", low=0
    )


def check(cfg: BuildConfig) -> None:
    """Raises: ValueError for settings that no data can be made with, before anything is rendered."""
    check_flags(cfg)
    if cfg.image_size % 16:
        raise ValueError(f"--image-size {cfg.image_size}: must be a multiple of 16, the side of the dense targets")
    if 0 < cfg.vocab < NUMBER_BASE + NUMBERS:
        raise ValueError(f"--vocab {cfg.vocab}: must be 0 or at least {NUMBER_BASE + NUMBERS}")
    for pair in (("gadgets", "unseen"), ("opened", "after")):
        if sum(getattr(cfg, name) for name in pair) > 1:
            raise ValueError(f"--{pair[0]} and --{pair[1]} together must be at most 1")


# ---- one scene -------------------------------------------------------------------------------------------------------


def scene_kind(cfg: BuildConfig, index: int) -> tuple[str, int, str, str]:
    """Scene number -> (category, scene seed, question set, scene state), from the seed and the number alone.

    Question set: "all" or "general"; scene state: "closed", "opened" or "after" (an attempt).
    """
    rng = np.random.default_rng([cfg.seed, SEED_BASE[cfg.split], index])
    draw = rng.random()
    question_set = "all"
    names = objects.UNSEEN if cfg.split == "test-unseen" else objects.SEEN
    if cfg.split == "train" and draw < cfg.unseen:
        question_set = "general"
        names = objects.UNSEEN
    elif cfg.split == "train" and draw < cfg.unseen + cfg.gadgets:
        names = (objects.GADGET,)
    weight = np.array([CATEGORY_WEIGHT.get(name, 1.0) for name in names])
    category = names[rng.choice(len(names), p=weight / weight.sum())]
    seed = SEED_BASE[cfg.split] + zlib.crc32(f"{cfg.seed}/{category}/{index}".encode()) % 9_000_000
    state = np.searchsorted([cfg.opened, cfg.opened + cfg.after], rng.random(), side="right")
    return category, seed, question_set, ("opened", "after", "closed")[state]


def open_parts(scene, rng: np.random.Generator) -> None:
    """Most parts of the scene open to somewhere between 30 and 80 % of what is left."""
    joints = []
    for part, joint in zip(scene.spec.parts, scene.joints, strict=True):
        opens = rng.random() < 0.7
        joints.append(joint + rng.uniform(0.3, 0.8) * (part.upper - joint) if opens else joint)
    scene.set_joints(joints)


def make_scene(scene, cfg: BuildConfig, index: int) -> tuple[dict, np.ndarray, dict[str, np.ndarray]]:
    """Scene number `index`, rendered in `scene` -> (row of facts.jsonl, picture (S, S, 3), row of dense.npz)."""
    from sim import scene as world  # here, so that only the workers load PyBullet

    category, seed, question_set, state = scene_kind(cfg, index)
    rng = np.random.default_rng([seed, 1])
    scene.spawn(category, seed)
    event = world.attempt(scene, rng) if state == "after" else None
    if state == "opened":
        open_parts(scene, rng)
    picture = scene.render()
    facts = world.facts(scene, rng, expert=question_set == "all" and state == "closed")
    if event:
        facts["event"] = event
    for part in facts["parts"]:
        if part["contact"]:  # the head's target: approach, then forward, which the fixed rule fills in
            rotation = world.rotation_from_approach(np.array(part["contact"]["approach"]))
            part["contact"]["rotation6d"] = [round(float(x), 5) for x in (*rotation[:, 2], *rotation[:, 0])]
    targets, kinds = world.dense_targets(scene)
    if question_set == "general":
        targets[..., 5:] = -1  # -1 = not told
        kinds = np.full_like(kinds, -1)
    image = f"images/{index // GROUP:05d}/{index:08d}.png"
    row = {"index": index, "image": image, "rule": question_set, "facts": facts}
    return row, picture, {"targets": targets, "kinds": kinds}


_scene = None  # one PyBullet world a process


def make_group(job: tuple[BuildConfig, int, int]) -> int:
    """Render and label scenes [first, last) into DIR/parts and DIR/images, in a worker; returns their number."""
    global _scene
    from sim import scene as world  # here, so that only the workers load PyBullet

    cfg, first, last = job
    out = Path(cfg.out)
    done = out / "parts" / f"{first:08d}.npz"
    if done.exists():
        return last - first
    _scene = _scene or world.Scene(cfg.image_size)
    rows, dense = [], []
    for index in range(first, last):
        row, picture, cells = make_scene(_scene, cfg, index)
        path = out / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, compress_level=3)
        rows.append(row)
        dense.append(cells)
    arrays = {name: np.stack([cells[name] for cells in dense]) for name in dense[0]}
    write_arrays(done, rows=np.frombuffer(json.dumps(rows).encode(), np.uint8), **arrays)
    return last - first


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:  # a file, because savez adds .npz to a name
            np.savez(file, **arrays)

    write_atomically(path, write)


# ---- all scenes ------------------------------------------------------------------------------------------------------


def read_groups(paths: list[Path]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Files of `make_group` -> (rows of facts.jsonl, arrays of dense.npz)."""
    rows, parts = [], []
    for path in paths:
        with np.load(path) as file:
            rows += json.loads(file["rows"].tobytes())
            parts.append({name: file[name] for name in file.files if name != "rows"})
    return rows, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_turns(row: dict, shares: dict[str, float], rng: np.random.Generator) -> dict:
    """A record of conversations.json."""
    turns = questions.turns(row["facts"], rng, allowed=row["rule"], shares=shares)
    record = questions.to_llava(f"{row['index']:08d}", row["image"], turns)
    return record | {"families": [turn.question_type for turn in turns]}


def write_samples(row: dict, rng: np.random.Generator) -> list[dict]:
    """The lines of manipulation.jsonl of one picture."""
    facts = row["facts"]
    if row["rule"] != "all" or facts["category"] == objects.GADGET:
        return []
    samples = []
    for part in facts["parts"]:
        contact = part["contact"]
        if contact:
            samples.append(
                {
                    "image": row["image"],
                    "category": facts["category"],
                    "part": part["label"],
                    "instruction": questions.instruction(part, objects.NOUNS[facts["category"]], rng),
                    **{key: contact[key] for key in ("u", "v", "approach", "rotation6d")},
                    "seed": facts["seed"],
                }
            )
    return samples


def merge(cfg: BuildConfig, seconds: float) -> dict:
    """Join the groups into the files a training run reads; returns the manifest, which is written last."""
    out = Path(cfg.out)
    rows, dense = read_groups(sorted((out / "parts").glob("*.npz")))
    tally = Counter(row["facts"]["category"] for row in rows)
    shares = {category: n / len(rows) for category, n in sorted(tally.items())}  # "no" takes its words in these
    conversations, samples = [], []
    for row in rows:
        rng = np.random.default_rng([cfg.seed, row["index"], 2])
        conversations.append(write_turns(row, shares, rng))
        samples += write_samples(row, rng)
    samples = samples[: cfg.demos]
    categories = (*objects.SEEN, *objects.UNSEEN, objects.GADGET)
    colours = list(objects.COLOURS)
    dense["category"] = np.array([categories.index(row["facts"]["category"]) for row in rows], np.int16)
    dense["colour"] = np.array([colours.index(row["facts"]["colour"]) for row in rows], np.int16)
    write_arrays(out / "dense.npz", **dense)
    write_text(out / "facts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out / "manipulation.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    write_text(out / "conversations.json", json.dumps(conversations, indent=0))
    if cfg.vocab and cfg.split == "train":
        texts = (turn["value"] for record in conversations for turn in record["conversations"])
        write_ranks(out / "vocab.tiktoken", train_ranks(texts, cfg.vocab))
    types = Counter(name for record in conversations for name in record["families"])
    capable = set(objects.MULTI_CAPABLE) & set(objects.SEEN)
    several = [len(row["facts"]["parts"]) > 1 for row in rows if row["facts"]["category"] in capable]
    manifest = {
        "config": dataclasses.asdict(cfg),
        "pictures": len(rows),
        "turns": types.total(),
        "families": dict(sorted(types.items())),
        "manipulation_samples": len(samples),
        "multi_part_share_of_capable": round(float(np.mean(several)), 4) if several else None,
        "seconds": round(seconds, 1),
        **environment(),
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def settings(cfg: BuildConfig) -> dict:
    """What two builds of one folder must share."""
    return dataclasses.asdict(cfg) | {"workers": 0, "out": ""}


def remove_parts(parts: Path) -> None:
    """The groups go first and the settings last: what a kill leaves behind still says which build it belongs to."""
    for path in parts.glob("*.npz*"):
        path.unlink()
    shutil.rmtree(parts, ignore_errors=True)


def build(cfg: BuildConfig) -> dict:
    """Make the data set of cfg.out, or go on where a build with the same settings was stopped; returns the manifest.

    Raises: ValueError for bad settings, for a folder that holds another build, and when workers keep dying.
    """
    check(cfg)
    out = Path(cfg.out)
    parts, done, started = out / "parts", out / "manifest.json", out / "parts" / "config.json"
    if done.exists():
        manifest = read_json(done, dict)
        if manifest.get("config", {}) | {"workers": 0, "out": ""} != settings(cfg):
            raise ValueError(f"--out {out} holds data made with other settings; remove it or name another folder")
        remove_parts(parts)
        print(f"{done} is there with these settings: nothing to do")
        return manifest
    if started.exists() and read_json(started, dict) | {"workers": 0, "out": ""} != settings(cfg):
        raise ValueError(f"--out {out} holds an unfinished build with other settings; remove it or name another folder")
    write_text(started, json.dumps(settings(cfg)))
    start = time.monotonic()
    made = 0
    jobs = [(cfg, first, min(first + GROUP, cfg.scenes)) for first in range(0, cfg.scenes, GROUP)]
    try:
        for _, n in parallel(make_group, jobs, cfg.workers):
            made += n
            progress(made, cfg.scenes, start)
    except BrokenProcessPool:
        raise ValueError(f"worker processes died after {made} scenes; {GOES_ON}") from None
    manifest = merge(cfg, time.monotonic() - start)
    remove_parts(parts)
    return manifest


def main() -> None:
    manifest = build(cli(BuildConfig, __doc__))
    told = ("pictures", "turns", "manipulation_samples", "multi_part_share_of_capable", "seconds")
    print(json.dumps({key: manifest[key] for key in told}))


if __name__ == "__main__":
    run_main(main, GOES_ON)
