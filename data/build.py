"""Make the training data: pictures, questions with known answers, manipulation samples, dense targets for the encoder.

    python -m data.build --scenes 30000 --out data/cache/train
    python -m data.build --scenes 600 --split val --out data/cache/val

Files in DIR (--out) after a build:

    images/00012/00001234.png   pictures, numbered by scene; beside each a .depth.png, as an imperfect camera sees it:
                                16-bit millimetres, 0 = nothing measured (data/depth.py)
    conversations.json          LLaVA layout: [{id, image, conversations: [{from, value}, ..]}]; several turns per image
    manipulation.jsonl          one line per working contact: {image, depth, intrinsics, category, part, instruction,
                                u, v, approach, ..}; with --full-labels also camera and mask, a .parts.png
    dense.npz                   per picture: 16 x 16 depth, normals, masks, openness, part kind; 32 x 32 part number,
                                gripper direction for moving the part, moment arm; the object's category and colour
    facts.jsonl                 the ground truth of each picture, from which the questions are generated
    vocab.tiktoken              the tokenizer learned from the texts (train only)
    manifest.json               settings, counts, intrinsics, versions, seconds

Deterministic given --seed and --scenes, for any --workers. An interrupted build resumes from the groups in DIR/parts.

A train split shows the 20 seen categories; grammar objects (sim/grammar.py) with all labels; and, under the paper's
rule (README, "Unseen"), unseen categories with general questions only: no part, contact, plan or affordance.
--hold-out treats seen categories as unseen and leaves archetypes out; --split transfer shows exactly those, so that
choices about transfer can be made without the test categories (--hold-out Display,Toaster,trays,latch).

Sources: successful poses as in RoboMamba section 4.1 and ManipLLM (arXiv 2312.16217); question types of RoboVQA (arXiv
2311.00899). Differs: a contact is the centre of the region that works, tested with a small jitter, not a random point.
"""

import functools
import json
import shutil
import time
import zlib
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import read_json, read_npz, write_atomically, write_json, write_text
from common.scripts import check_flags, cli, environment, flag, listed, parallel, progress, run_main
from data import questions
from data.depth import MM_PER_M, camera_depth, windows
from data.tokenizer import NUMBER_BASE, NUMBERS, train_ranks, write_ranks
from sim.catalogue import DRAWER_DOOR_SEEN, DRAWER_DOOR_UNSEEN, MULTI_CAPABLE, NOUNS, SEED_SPAN, SEEDS, SEEN, UNSEEN
from sim.grammar import ARCHETYPES, PREFIX, STRICT
from sim.objects import BACKGROUND, BASE, COLOURS

SPLITS = ("train", "val", "transfer", "test-seen", "test-unseen")
CATEGORY_NAMES = (*SEEN, *UNSEEN, "object")  # `category` in dense.npz indexes these; the last is the grammar
CATEGORY_WEIGHT = {"StorageFurniture": 3.0, "Refrigerator": 2.0}  # others 1: furniture has the most kinds of fronts
GOES_ON = "nothing is lost: the same command goes on"
POINTS = 3  # points per answer to "can this point be moved?"
NEAR_SHARE = 1 / 24  # of the image side: how far from the object a background point may lie
DENSE = ("targets", "kinds", "part", "act", "arm")  # arrays of dense.npz, made by sim/expert.py
UNTOLD = -3  # in `part` of dense.npz: unlabelled
HIDDEN = {"kinds": -1, "part": UNTOLD, "act": 0, "arm": 0}  # fill values in dense.npz for unseen categories
GROUP = 100  # scenes a worker makes per job; also the unit of resuming
ANYWHERE = {"workers": 0, "out": ""}  # settings that may differ between two builds of one folder


@dataclass(frozen=True)
class BuildConfig:
    scenes: int = flag(2000, "number of pictures", low=1)
    demos: int = flag(10_000, "maximum samples each from seen categories (the paper's 10K) and from the grammar", low=0)
    workers: int = flag(2, "number of worker processes", low=1, high=256)
    seed: int = flag(0, "random seed", low=0)
    out: str = flag("data/cache/train", "output folder")
    split: str = flag("train", "selects the range of scene seeds and the categories", choices=SPLITS)
    image_size: int = flag(128, "side of the pictures in pixels, a multiple of 16", low=32, high=1024)
    grammar: float = flag(0.4, "fraction of pictures with grammar objects (train only)", low=0, high=1)
    archetypes: str = flag("all", "grammar archetypes: all | strict (none near an unseen category) | a number | a list")
    hold_out: str = flag("", "list of categories and archetypes without labels in train; --split transfer shows them")
    categories: str = flag("", "use only these seen categories: a list, or drawer-door")
    unseen: float = flag(0.08, "fraction of pictures of unseen categories (0: strict rule; train only)", low=0, high=1)
    opened: float = flag(0.08, "fraction with parts already open: state questions, no contact labels", low=0, high=1)
    after: float = flag(0.14, "fraction taken after a good or bad attempt: past and success questions", low=0, high=1)
    full_labels: bool = flag(False, "also write camera poses and part masks, for other people's models")
    vocab: int = flag(1021, "byte-pair ranks to learn from a train split's texts (+ 3 special tokens); 0: none", low=0)


def check(cfg: BuildConfig) -> None:
    """Raises: ValueError, before anything is rendered, for settings that cannot produce data."""
    check_flags(cfg)
    if cfg.image_size % 16:
        raise ValueError(f"--image-size {cfg.image_size}: must be a multiple of 16, the side of the dense targets")
    if 0 < cfg.vocab < NUMBER_BASE + NUMBERS:
        raise ValueError(f"--vocab {cfg.vocab}: must be 0 or at least {NUMBER_BASE + NUMBERS}")
    for one, other in (("grammar", "unseen"), ("opened", "after")):
        if getattr(cfg, one) + getattr(cfg, other) > 1:
            raise ValueError(f"--{one} and --{other} together must be at most 1")
    draw_from(cfg)


def chosen_archetypes(cfg: BuildConfig) -> tuple[str, ...]:
    """Resolve --archetypes; N takes the first N of a fixed random order, so that larger sets contain smaller ones."""
    every = tuple(ARCHETYPES)
    named = {"all": every, "strict": STRICT}
    if not cfg.archetypes.isdecimal():
        return named.get(cfg.archetypes) or listed("--archetypes", cfg.archetypes, every)
    if int(cfg.archetypes) > len(every):
        raise ValueError(f"--archetypes {cfg.archetypes}: there are {len(every)}")
    return tuple(every[i] for i in np.random.default_rng(0).permutation(len(every))[: int(cfg.archetypes)])


@functools.cache
def draw_from(cfg: BuildConfig) -> dict[str, tuple[str, ...]]:
    """Names that can be spawned: "labelled", "grammar" (labelled too) and "general" (general questions only).

    Raises: ValueError for an unknown name, and if nothing is left to draw from.
    """
    held = listed("--hold-out", cfg.hold_out, (*SEEN, *ARCHETYPES))
    held_categories = tuple(name for name in held if name in SEEN)
    names, drawer_door = (UNSEEN, DRAWER_DOOR_UNSEEN) if cfg.split == "test-unseen" else (SEEN, DRAWER_DOOR_SEEN)
    if cfg.categories:
        names = drawer_door if cfg.categories == "drawer-door" else listed("--categories", cfg.categories, names)
    labelled = tuple(name for name in names if name not in held)
    if cfg.split == "transfer":
        labelled = (*held_categories, *(PREFIX + name for name in held if name in ARCHETYPES))
    if not labelled:
        raise ValueError(f"--split {cfg.split}, --hold-out '{cfg.hold_out}': no category is left to show")
    grammar = tuple(PREFIX + name for name in chosen_archetypes(cfg) if name not in held)
    return {"labelled": labelled, "grammar": grammar, "general": (*UNSEEN, *held_categories)}


def scene_kind(cfg: BuildConfig, index: int) -> tuple[str, int, str, str]:
    """Scene number -> (category, scene seed, question set, scene state), determined by --seed and the number alone.

    Question set: "all" or "general"; scene state: "closed", "opened" or "after" (an attempt).
    """
    base = SEEDS["val" if cfg.split == "transfer" else cfg.split]
    rng = np.random.default_rng([cfg.seed, base, index])
    names = draw_from(cfg)
    draw = rng.random() if cfg.split == "train" else 1.0
    source = "general" if draw < cfg.unseen else "labelled"
    if cfg.unseen <= draw < cfg.unseen + cfg.grammar and names["grammar"]:
        source = "grammar"
    weight = np.array([CATEGORY_WEIGHT.get(name, 1.0) for name in names[source]])
    category = names[source][rng.choice(len(weight), p=weight / weight.sum())]
    seed = base + zlib.crc32(f"{cfg.seed}/{category}/{index}".encode()) % SEED_SPAN
    state = np.searchsorted([cfg.opened, cfg.opened + cfg.after], rng.random(), side="right")
    return category, seed, "general" if source == "general" else "all", ("opened", "after", "closed")[state]


def draw_points(links: np.ndarray, rng: np.random.Generator) -> list[list]:
    """[[u, v, on a movable part], ..]: POINTS for each answer (fewer if there is no room), none at an edge.

    links (S, S): part number, BASE or BACKGROUND. One "no" point lies on the background close to the object.
    """
    movable = windows(links >= 0, 1).all(-1)
    fixed = windows(links < 0, 1).all(-1)
    near = windows(links != BACKGROUND, max(1, round(NEAR_SHARE * len(links)))).any(-1)
    masks = [*[movable] * POINTS, *[fixed & (links == BASE)] * (POINTS - 1), fixed & (links == BACKGROUND) & near]
    points = []
    for cells in map(np.argwhere, masks):
        if len(cells):
            row, column = cells[rng.integers(len(cells))].tolist()
            points.append([column, row, bool(movable[row, column])])
    return points


def make_scene(scene, cfg: BuildConfig, index: int) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Render scene number `index` in `scene` -> (row of facts.jsonl, pictures by suffix, row of dense.npz).

    .png (S, S, 3) uint8; .depth.png uint16, mm; with full_labels .parts.png uint8: 0 background, 1 body, 2 + j part j.
    """
    from sim import expert  # here, so that only the workers load PyBullet
    from sim.scene import rotation_from_approach

    category, seed, question_set, state = scene_kind(cfg, index)
    rng = np.random.default_rng([seed, 1])
    scene.spawn(category, seed)
    event = expert.attempt(scene, rng) if state == "after" else None
    if state == "opened":  # open most parts by 30 to 80 % of their remaining range
        pairs = zip(scene.spec.parts, scene.joints, strict=True)
        scene.set_joints([q + rng.uniform(0.3, 0.8) * (p.upper - q) if rng.random() < 0.7 else q for p, q in pairs])
    picture = scene.render()
    facts = expert.facts(scene, rng, expert=question_set == "all" and state == "closed")
    if event:
        facts["event"] = event
    for contact in filter(None, (part["contact"] for part in facts["parts"])):
        rotation = rotation_from_approach(contact["approach"])  # the head's target: approach axis, then forward axis
        contact["rotation6d"] = [round(float(x), 5) for x in (*rotation[:, 2], *rotation[:, 0])]
    dense = dict(zip(DENSE, (*expert.dense_targets(scene), *expert.part_targets(scene)), strict=True))
    if question_set == "general":
        dense["targets"][..., 5:] = -1  # -1 = unlabelled
        for name, fill in HIDDEN.items():
            dense[name][...] = fill
    else:
        facts["points"] = draw_points(scene.links, np.random.default_rng([seed, 4]))
    metres = camera_depth(scene.depth, np.random.default_rng([seed, 3]))
    pictures = {".png": picture, ".depth.png": np.round(metres * MM_PER_M).astype(np.uint16)}
    f, cx, cy = scene.intrinsics
    image = f"images/{index // GROUP:05d}/{index:08d}.png"
    row = {"index": index, "image": image, "rule": question_set, "intrinsics": [f, f, cx, cy], "facts": facts}
    if cfg.full_labels and question_set == "all":
        pictures[".parts.png"] = (scene.links + 2).astype(np.uint8)
        row["camera"] = np.vstack([np.column_stack([scene.camera_rotation.T, scene.eye]), [0, 0, 0, 1]]).tolist()
    return row, pictures, dense


_scene = None  # one PyBullet world per process


def make_group(job: tuple[BuildConfig, int, int]) -> int:
    """Run in a worker: render and label scenes [first, last) into DIR/parts and DIR/images; returns how many."""
    global _scene
    from sim.scene import Scene  # here, so that only the workers load PyBullet

    cfg, first, last = job
    out = Path(cfg.out)
    done = out / "parts" / f"{first:08d}.npz"
    if done.exists():
        return last - first
    _scene = _scene or Scene(cfg.image_size)
    rows, dense = [], []
    for index in range(first, last):
        row, pictures, cells = make_scene(_scene, cfg, index)
        for ending, picture in pictures.items():
            path = (out / row["image"]).with_suffix(ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, compress_level=3)
        rows.append(row)
        dense.append(cells)
    arrays = {name: np.stack([cells[name] for cells in dense]) for name in DENSE}
    write_arrays(done, rows=np.frombuffer(json.dumps(rows).encode(), np.uint8), **arrays)
    return last - first


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:  # a file object, because savez appends .npz to a name
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def write_samples(row: dict, rng: np.random.Generator) -> list[dict]:
    """Lines of manipulation.jsonl; full labels add camera (4 x 4, world from camera), mask and the part's value."""
    facts, image, samples = row["facts"], Path(row["image"]), []
    for j, part in enumerate(facts["parts"]):
        if contact := part["contact"]:
            sample = {"image": row["image"], "depth": str(image.with_suffix(".depth.png"))}
            sample |= {"intrinsics": row["intrinsics"], "category": facts["category"], "part": part["label"]}
            sample["instruction"] = questions.instruction(part, NOUNS[facts["category"]], rng)
            sample |= {key: contact[key] for key in ("u", "v", "approach", "rotation6d")} | {"seed": facts["seed"]}
            if "camera" in row:
                sample |= {"camera": row["camera"], "mask": str(image.with_suffix(".parts.png")), "mask_value": 2 + j}
            samples.append(sample)
    return samples


def merge(cfg: BuildConfig, seconds: float) -> dict:
    """Join the groups into the files a training run reads; returns the manifest, which is written last."""
    out = Path(cfg.out)
    groups = [read_npz(path, ("rows", *DENSE)) for path in sorted((out / "parts").glob("*.npz"))]
    rows = [row for group in groups for row in json.loads(group["rows"].tobytes())]
    dense = {name: np.concatenate([group[name] for group in groups]) for name in DENSE}
    names = [row["facts"]["category"] for row in rows]
    shares = {name: n / len(rows) for name, n in sorted(Counter(names).items())}  # weights of the words of "no"
    untold = draw_from(cfg)["general"] if cfg.split == "train" else ()  # elsewhere all that is shown may be asked for
    conversations, samples, taken = [], [], Counter()
    for row, name in zip(rows, names, strict=True):
        rng = np.random.default_rng([cfg.seed, row["index"], 2])
        turns = questions.turns(row["facts"], rng, row["rule"], shares, untold)
        record = questions.to_llava(f"{row['index']:08d}", row["image"], turns)
        conversations.append(record | {"families": [turn.question_type for turn in turns]})
        source = "grammar" if name.startswith(PREFIX) else "categories"
        new = write_samples(row, rng)[: cfg.demos - taken[source]]
        taken[source] += len(new)
        samples += new
    numbers = {name: i for i, name in enumerate(CATEGORY_NAMES)}
    dense["category"] = np.array([numbers.get(name, numbers["object"]) for name in names], np.int16)
    dense["colour"] = np.array([list(COLOURS).index(row["facts"]["colour"]) for row in rows], np.int16)
    write_arrays(out / "dense.npz", **dense)
    write_text(out / "facts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out / "manipulation.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    write_text(out / "conversations.json", json.dumps(conversations, indent=0))
    if cfg.vocab and cfg.split == "train":
        texts = (turn["value"] for record in conversations for turn in record["conversations"])
        write_ranks(out / "vocab.tiktoken", train_ranks(texts, cfg.vocab))
    types = Counter(name for record in conversations for name in record["families"])
    capable = {*MULTI_CAPABLE} & {*SEEN}
    several = [len(row["facts"]["parts"]) > 1 for row in rows if row["facts"]["category"] in capable]
    manifest = {"config": asdict(cfg), "objects": draw_from(cfg), "intrinsics": rows[0]["intrinsics"]}
    manifest |= {"pictures": len(rows), "turns": types.total(), "families": dict(sorted(types.items()))}
    manifest |= {"manipulation_samples": len(samples), "seconds": round(seconds, 1), **environment()}
    manifest["multi_part_share_of_capable"] = round(float(np.mean(several)), 4) if several else None
    write_json(out / "manifest.json", manifest)
    return manifest


def remove_parts(parts: Path) -> None:
    """Delete the groups first and the settings last: what a kill leaves behind still says which build it belongs to."""
    for path in parts.glob("*.npz*"):
        path.unlink()
    shutil.rmtree(parts, ignore_errors=True)


def build(cfg: BuildConfig) -> dict:
    """Make the data set in cfg.out, or resume an interrupted build with the same settings; returns the manifest.

    Raises: ValueError for bad settings, for a folder that holds another build, and if workers keep dying.
    """
    check(cfg)
    out = Path(cfg.out)
    parts, done = out / "parts", out / "manifest.json"
    settings = asdict(cfg) | ANYWHERE
    known = [read_json(path, dict) for path in (done, parts / "config.json") if path.exists()]
    if known and known[0].get("config", known[0]) | ANYWHERE != settings:
        raise ValueError(f"--out {out} holds a build with other settings; remove it or name another folder")
    if done.exists():
        remove_parts(parts)
        print(f"{done} is there with these settings: nothing to do")
        return known[0]
    write_json(parts / "config.json", settings)
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
