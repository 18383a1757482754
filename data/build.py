"""Make the training data: pictures, questions with known answers, manipulation samples, dense targets for the encoder.

    python -m data.build --scenes 20000 --out data/cache/train          # what `make train` uses: 4 minutes on two cores
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

Sources: the sampling of successful poses follows RoboMamba section 4.1 and ManipLLM (arXiv 2312.16217); question
families RoboVQA (arXiv 2311.00899). Differs: contact labels are the middle of the region that works, tested with small
jitters, not random points.
"""

import dataclasses
import json
import multiprocessing
import platform
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

from common.files import write_atomically, write_text
from common.scripts import cli, flag, progress, start_worker
from data import questions
from data.tokenizer import train_ranks, write_ranks
from sim import objects

# Test scenes: sim_eval.py acts on 20,000,000+ (seen) and 30,000,000+ (unseen); the questions have ranges of their own.
SEED_BASE = {"train": 0, "val": 10_000_000, "test-seen": 40_000_000, "test-unseen": 50_000_000}
CATEGORY_WEIGHT = {"StorageFurniture": 3.0, "Refrigerator": 2.0}  # the rest 1: furniture has the most kinds of fronts
GROUP = 100  # scenes a worker makes at a time; also the unit of resuming
TARGET_SIDE = 16  # cells of the dense targets along one side


@dataclass
class BuildConfig:
    scenes: int = flag(2000, "pictures")
    demos: int = flag(10_000, "at most so many manipulation samples, seen categories only (the paper's 10K)")
    workers: int = flag(2, "processes")
    seed: int = flag(0, "")
    out: str = flag("data/cache/train", "folder")
    split: str = flag("train", "train | val | test-seen | test-unseen: which range of scene seeds, which categories")
    image_size: int = flag(128, "pixels")
    gadgets: float = flag(0.25, "share of pictures with random gadgets (training variety; train only)")
    unseen: float = flag(
        0.08, "share of pictures of unseen categories, general questions only (0: strict rule; train only)"
    )
    opened: float = flag(
        0.08, "share of pictures with parts already open: for questions of state, without contact labels"
    )
    after: float = flag(
        0.14, "share of pictures taken after an attempt, good or bad: for questions of past and success"
    )
    vocab: int = flag(
        1021, "byte-pair ranks learned on the texts of a train split (3 special tokens come on top); 0 = none"
    )


def scene_kind(cfg: BuildConfig, index: int) -> tuple[str, int, str, str]:
    """Scene number -> (category, scene seed, rule "all" | "general", "closed" | "opened" | "after"), from the seed and
    the number alone."""
    rng = np.random.default_rng([cfg.seed, SEED_BASE[cfg.split], index])
    draw, rule, names = rng.random(), "all", objects.UNSEEN if cfg.split == "test-unseen" else objects.SEEN
    if cfg.split == "train" and draw < cfg.unseen:
        rule, names = "general", objects.UNSEEN
    elif cfg.split == "train" and draw < cfg.unseen + cfg.gadgets:
        names = (objects.GADGET,)
    weight = np.array([CATEGORY_WEIGHT.get(name, 1.0) for name in names])
    category = names[rng.choice(len(names), p=weight / weight.sum())]
    seed = SEED_BASE[cfg.split] + zlib.crc32(f"{cfg.seed}/{category}/{index}".encode()) % 9_000_000
    how = np.searchsorted([cfg.opened, cfg.opened + cfg.after], rng.random(), side="right")
    return category, seed, rule, ("opened", "after", "closed")[how]


def make_scene(scene, cfg: BuildConfig, index: int) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """Scene number `index`, rendered in `scene` -> (row of facts.jsonl, picture (S, S, 3), dense targets, kinds)."""
    from sim import scene as world  # here, so that only the workers load PyBullet

    category, seed, rule, how = scene_kind(cfg, index)
    rng = np.random.default_rng([seed, 1])
    scene.spawn(category, seed)
    event = world.attempt(scene, rng) if how == "after" else None
    if how == "opened":
        scene.set_joints(
            [
                q + rng.uniform(0.3, 0.8) * (p.upper - q) if rng.random() < 0.7 else q
                for p, q in zip(scene.spec.parts, scene.joints, strict=True)
            ]
        )
    picture = scene.render()
    facts = world.facts(scene, rng, expert=rule == "all" and how == "closed")
    if event:
        facts["event"] = event
    for part in facts["parts"]:
        if part["contact"]:  # the head's target: approach, then forward, which the fixed rule fills in
            rotation = world.rotation_from_approach(np.array(part["contact"]["approach"]))
            part["contact"]["rotation6d"] = [round(float(x), 5) for x in (*rotation[:, 2], *rotation[:, 0])]
    dense, kind = world.dense_targets(scene)
    if rule == "general":
        dense[..., 5:], kind = -1, np.full_like(kind, -1)  # -1 = not told
    image = f"images/{index // GROUP:05d}/{index:08d}.png"
    return {"index": index, "image": image, "rule": rule, "facts": facts}, picture, dense, kind


_scene = None  # one PyBullet world a process


def make_group(job: tuple[BuildConfig, int, int]) -> int:
    """Render and label scenes [first, last) into DIR/parts and DIR/images, in a worker; returns their number."""
    global _scene
    from sim import scene as world  # here, so that only the workers load PyBullet

    cfg, first, last = job
    done = Path(cfg.out) / "parts" / f"{first:08d}.npz"
    if done.exists():
        return last - first
    _scene = _scene or world.Scene(cfg.image_size)
    folder = Path(cfg.out) / "images" / f"{first // GROUP:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, targets, kinds = [], [], []
    for index in range(first, last):
        row, picture, dense, kind = make_scene(_scene, cfg, index)
        Image.fromarray(picture).save(Path(cfg.out) / row["image"], compress_level=3)
        rows.append(row)
        targets.append(dense)
        kinds.append(kind)
    done.parent.mkdir(exist_ok=True)
    arrays = {"rows": np.frombuffer(json.dumps(rows).encode(), np.uint8), "targets": np.stack(targets)}
    arrays["kinds"] = np.stack(kinds)

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:  # a file, because savez adds .npz to a name
            np.savez(file, **arrays)

    write_atomically(done, write)
    return last - first


def merge(cfg: BuildConfig, seconds: float) -> dict:
    """Join the groups into the files a training run reads; returns the manifest."""
    out = Path(cfg.out)
    groups = sorted((out / "parts").glob("*.npz"))
    rows, targets, kinds = [], [], []
    for path in groups:
        with np.load(path) as part:
            rows += json.loads(part["rows"].tobytes())
            targets.append(part["targets"])
            kinds.append(part["kinds"])
    conversations, manipulation, families = [], [], Counter()
    tally = Counter(row["facts"]["category"] for row in rows)
    shares = {
        category: n / len(rows) for category, n in sorted(tally.items())
    }  # "no" answers draw words in these shares
    for row in rows:
        facts = row["facts"]
        rng = np.random.default_rng([cfg.seed, row["index"], 2])
        turns = questions.turns(facts, rng, allowed=row["rule"], shares=shares)
        record = questions.to_llava(f"{row['index']:08d}", row["image"], turns)
        conversations.append(record | {"families": [turn.family for turn in turns]})
        families.update(turn.family for turn in turns)
        for part in facts["parts"]:
            if part["contact"] and row["rule"] == "all" and facts["category"] != objects.GADGET:
                contact = part["contact"]
                manipulation.append(
                    {
                        "image": row["image"],
                        "category": facts["category"],
                        "part": part["label"],
                        "instruction": questions.instruction(part, objects.NOUNS[facts["category"]], rng),
                        **{k: contact[k] for k in ("u", "v", "approach", "rotation6d")},
                        "seed": facts["seed"],
                    }
                )
    categories = (*objects.SEEN, *objects.UNSEEN, objects.GADGET)
    np.savez(
        out / "dense.npz",
        targets=np.concatenate(targets),
        kinds=np.concatenate(kinds),
        category=np.array([categories.index(r["facts"]["category"]) for r in rows], np.int16),
        colour=np.array([list(objects.COLOURS).index(r["facts"]["colour"]) for r in rows], np.int16),
    )
    write_text(out / "facts.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    write_text(out / "manipulation.jsonl", "".join(json.dumps(m) + "\n" for m in manipulation[: cfg.demos]))
    write_text(out / "conversations.json", json.dumps(conversations, indent=0))
    if cfg.vocab and cfg.split == "train":
        texts = (turn["value"] for record in conversations for turn in record["conversations"])
        write_ranks(out / "vocab.tiktoken", train_ranks(texts, cfg.vocab))
    closed = [r["facts"] for r in rows if r["rule"] == "all" and r["facts"]["category"] in objects.SEEN]
    capable = [f for f in closed if f["category"] in objects.MULTI_CAPABLE]
    manifest = {
        "config": dataclasses.asdict(cfg),
        "pictures": len(rows),
        "turns": sum(families.values()),
        "families": dict(sorted(families.items())),
        "manipulation_samples": min(len(manipulation), cfg.demos),
        "multi_part_share_of_capable": round(float(np.mean([len(f["parts"]) > 1 for f in capable])), 4)
        if capable
        else None,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    for path in groups:
        path.unlink()
    (out / "parts").rmdir()
    return manifest


def build(cfg: BuildConfig) -> dict:
    if cfg.split not in SEED_BASE:
        raise ValueError(f"--split {cfg.split}: expected one of {', '.join(SEED_BASE)}")
    if cfg.scenes < 1 or cfg.workers < 1:
        raise ValueError(f"--scenes {cfg.scenes} and --workers {cfg.workers} must be at least 1")
    out, done = Path(cfg.out), Path(cfg.out) / "manifest.json"
    if done.exists():
        manifest = json.loads(done.read_text())
        if manifest["config"] | {"workers": 0, "out": ""} == dataclasses.asdict(cfg) | {"workers": 0, "out": ""}:
            print(f"{done} is there with these settings: nothing to do")
            return manifest
        raise ValueError(f"--out {out} holds data made with other settings; remove it or name another folder")
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from None
    started_with = out / "parts" / "config.json"
    if started_with.exists() and json.loads(started_with.read_text()) != dataclasses.asdict(cfg) | {"workers": 0}:
        raise ValueError(f"--out {out} holds an unfinished build with other settings; remove it or name another folder")
    write_text(started_with, json.dumps(dataclasses.asdict(cfg) | {"workers": 0}))
    start, made = time.monotonic(), 0
    jobs = [(cfg, first, min(first + GROUP, cfg.scenes)) for first in range(0, cfg.scenes, GROUP)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cfg.workers, spawn, start_worker, (spawn.Value("i", 0),)) as pool:
        try:
            for future in as_completed([pool.submit(make_group, job) for job in jobs]):
                made += future.result()
                progress(made, cfg.scenes, start)
        except BrokenProcessPool:
            raise ValueError(
                f"a worker process died after {made} scenes; nothing is lost: the same command goes on"
            ) from None
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)  # the groups at hand are finished and kept
            raise ValueError(f"\nstopped after {made} scenes; nothing is lost: the same command goes on") from None
    started_with.unlink()
    return merge(cfg, time.monotonic() - start)


def main() -> None:
    cfg = cli(BuildConfig, __doc__)
    try:
        manifest = build(cfg)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(
        json.dumps(
            {
                k: manifest[k]
                for k in ("pictures", "turns", "manipulation_samples", "multi_part_share_of_capable", "seconds")
            }
        )
    )


if __name__ == "__main__":
    main()
