"""A folder of toy data in the layout of data.build, made in a moment: coloured boxes on grey, with questions."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.prompts import number
from data.tokenizer import train_ranks, write_ranks
from sim.catalogue import SEEN
from sim.objects import COLOURS

COLOUR_NAMES = list(COLOURS)
SIDE = 32


def write_data(folder: Path, n: int, seed: int = 0) -> Path:
    """n pictures of 32 pixels, a box each, with its depth: all files that data.build leaves in a folder."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    records, samples, facts = [], [], []
    part = np.full((n, 32, 32), -2, np.int8)
    targets = np.zeros((n, 16, 16, 7), np.float16)
    kinds = np.zeros((n, 16, 16), np.int8)
    category, colour = rng.integers(0, 3, n), rng.integers(0, 3, n)
    for i in range(n):
        x, y = rng.integers(1, 9, 2)  # cells
        picture = np.full((SIDE, SIDE, 3), 128, np.uint8)
        picture[2 * y : 2 * y + 10, 2 * x : 2 * x + 10] = 30 + 100 * np.eye(3, dtype=np.uint8)[colour[i]]
        targets[i, y : y + 5, x : x + 5] = (0.5, 0, 0, -1, 1, 1, 0.3)
        kinds[i, y : y + 5, x : x + 5] = 1 + category[i]
        part[i, 2 * y : 2 * y + 10, 2 * x : 2 * x + 10] = 0
        depth = np.where(picture[..., 0] == 128, 0, 1000).astype(np.uint16)
        image = f"images/{i}.png"
        Image.fromarray(depth).save(folder / f"images/{i}.depth.png")
        Image.fromarray(picture).save(folder / image)
        u, v = 2.0 * x + 5, 2.0 * y + 5
        name, tint = SEEN[category[i]].lower(), COLOUR_NAMES[colour[i]]
        pixel = f"{number(u, SIDE)} {number(v, SIDE)}"
        asked = {
            "object": ("What is this?", name),
            "caption": ("What is in the picture?", f"a {tint} {name}"),
            "colour": ("Which colour has it?", tint),
            "presence": ("Is there a cup?", ("no", "yes")[i % 2]),
            "where": ("Where is the box?", pixel),
            "plan": ("What can be done?", f"open the {name}"),
            "contact": (f"Predict the contact point and direction: open the {name}.", f"{pixel} 50 50 00"),
        }
        if i % 3 == 0:
            del asked["colour"]
        turns = [text for question, answer in asked.values() for text in ("<image>\n" + question, answer)]
        said = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
        records.append({"id": str(i), "image": image, "conversations": said, "families": list(asked)})
        sample = {"image": image, "instruction": f"open the {name}", "u": u, "v": v}
        contact = {"u": u, "v": v, "approach": [0.0, 0.0, 1.0]}
        box = {"verb": "open", "label": f"{('left', 'right')[i % 2]} box", "contact": contact}
        facts.append({"image": image, "facts": {"parts": [box]}})
        samples.append(sample | {"approach": [0.0, 0.0, -1.0], "rotation6d": [0.0, 0.0, -1.0, 0.0, 1.0, 0.0]})
    (folder / "conversations.json").write_text(json.dumps(records))
    (folder / "manipulation.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    (folder / "manifest.json").write_text(json.dumps({"intrinsics": [44.0, 44.0, 16.0, 16.0]}))
    act = np.zeros((n, 32, 32, 3), np.float16)
    act[part == 0] = (1.0, 0.0, 0.0)
    arm = (part == 0).astype(np.float16)
    arrays = dict(targets=targets, kinds=kinds, category=category, colour=colour, part=part, act=act, arm=arm)
    np.savez(folder / "dense.npz", **arrays)
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    write_ranks(folder / "vocab.tiktoken", train_ranks(texts, 400))
    return folder
