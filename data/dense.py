"""Pictures with dense targets, for stage 0: what the simulator knows about each of a picture's 16 x 16 cells.

Reads a folder made by data.build: dense.npz, facts.jsonl with the parts that can be asked for, and
conversations.json with the picture names, all in the same order.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.files import read_json_lines, read_npz
from data.dataset import load_records, read_geometry, read_picture, to_tensor
from sim import objects
from sim.catalogue import SEEN, UNSEEN

GRID = 16  # cells along one side
FINE = 32  # cells along one side in the labels of named parts
ASKED = 2  # parts asked for per picture
DEPTH_DROPPED = 0.5  # fraction of pictures whose depth is hidden from an RGB-D encoder (modality dropout)
N_KINDS = len(objects.PART_KINDS)
N_CATEGORIES = len(SEEN) + len(UNSEEN) + 1
N_COLOURS = len(objects.COLOURS)
MAX_SHIFT = 2  # augmentation: maximum shift of a picture, in cells
LIGHT = 0.15  # augmentation: brightness and contrast vary by this fraction


class Cells(NamedTuple):
    """Labels for the cells of B pictures, or predictions, in which mask, movable and kind are logits."""

    geometry: Tensor  # (B, 16, 16, 4): relative depth, then the surface normal x, y, z in the camera frame
    mask: Tensor  # (B, 16, 16): fraction of the cell that the object fills
    movable: Tensor  # (B, 16, 16): fraction that movable parts fill; -1 here and below: unlabelled (unseen category)
    openness: Tensor  # (B, 16, 16): of the part in the cell, 0 closed .. 1 open
    kind: Tensor  # (B, 16, 16) int64, index into objects.PART_KINDS; predicted: (B, 16, 16, N_KINDS)


class NamedParts(NamedTuple):
    """M parts, each picked out by the words of an instruction: ASKED per picture, or as many as it has."""

    owners: Tensor  # (M,) int64: index of the picture each part is in
    words: Tensor  # int64: token ids of all "verb label" texts, concatenated for nn.EmbeddingBag
    starts: Tensor  # (M,) int64: where each text starts in words
    contact: Tensor  # (M, 2) float32: column and row of the contact in cells of the 32 x 32 raster
    approach: Tensor  # (M, 3) float32: the gripper's direction there, camera frame
    mask: Tensor  # (M, 32, 32) float32: 1 on the part
    act: Tensor  # (M, 32, 32, 3) float32: gripper direction for moving the surface seen there, 0 off the movable parts
    arm: Tensor  # (M, 32, 32) float32: moment arm there, 0 at the hinge .. 1


class DenseBatch(NamedTuple):
    pictures: Tensor  # (B, 3, S, S) uint8
    geometry: Tensor | None  # (B, 4, S, S) float32, for an RGB-D encoder
    named: NamedParts | None  # None if no part of the batch can be asked for
    cells: Cells
    category: Tensor  # (B,) int64
    colour: Tensor  # (B,) int64, index into objects.COLOURS

    def to(self, device) -> "DenseBatch":
        def move(x):
            if isinstance(x, tuple):
                return type(x)(*(move(item) for item in x))
            return x if x is None else x.to(device)

        return move(self)


class DensePictures:
    """Pictures and dense targets of a folder made by data.build. depth: read the depth pictures too.

    Raises: ValueError naming the file that is missing, damaged, or does not fit the others.
    """

    def __init__(self, folder: str, image_size: int, encoding, depth: bool = False):
        self.folder = Path(folder)
        self.size = image_size
        self.depth = depth
        self.encoding = encoding
        file = self.folder / "dense.npz"
        facts = self.folder / "facts.jsonl"
        shapes = {"targets": (GRID, GRID, 7), "kinds": (GRID, GRID), "category": (), "colour": ()}
        if facts.exists():
            shapes |= {"part": (FINE, FINE), "act": (FINE, FINE, 3), "arm": (FINE, FINE)}
        self.arrays = read_npz(file, tuple(shapes), "`python -m data.build` makes it; remove an old folder first")
        n = len(self.arrays["targets"]) if self.arrays["targets"].ndim else 0
        for name, array in self.arrays.items():
            if array.shape != (n, *shapes[name]) or array.dtype.kind not in "fiu":
                was = f"{array.dtype} {array.shape}, expected {(n, *shapes[name])}"
                raise ValueError(f"{file}: {name} {was}; remove the folder and build it again")
        for name, low, high in (("kinds", -1, N_KINDS), ("category", 0, N_CATEGORIES), ("colour", 0, N_COLOURS)):
            if n and not (low <= self.arrays[name].min() and self.arrays[name].max() < high):
                raise ValueError(f"{file}: {name} must lie in {low} .. {high - 1}")
        for name, array in self.arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{file}: {name} holds values that are not finite")

        records = load_records(self.folder / "conversations.json")
        if len(records) != n:
            raise ValueError(f"{self.folder}: {n} rows in dense.npz, {len(records)} conversations")
        for index, record in enumerate(records):
            if "image" not in record:
                raise ValueError(f"{self.folder / 'conversations.json'}, record {index}: image: stage vision needs one")
        self.names = [record["image"] for record in records]
        self.parts = read_parts(facts) if facts.exists() else []  # for each picture, the parts with a contact
        if facts.exists() and len(self.parts) != n:
            raise ValueError(f"{self.folder}: {n} rows in dense.npz, {len(self.parts)} in facts.jsonl")

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, rows, seed: list[int] | None = None) -> DenseBatch:
        """With a seed each picture and its targets are shifted, mirrored and relit; some pictures lose their depth."""
        pictures = np.stack([read_picture(self.folder / self.names[row], self.size) for row in rows])
        targets = self.arrays["targets"][rows].astype(np.float32)
        kinds, category, colour = (self.arrays[name][rows].astype(np.int64) for name in ("kinds", "category", "colour"))
        channels = np.zeros((len(rows), 4, self.size, self.size), np.float32)
        named = []
        for i, row in enumerate(rows):
            rng = np.random.default_rng([*(seed or ()), row])
            how = draw_augmentation(rng) if seed is not None else Augmentation()
            pictures[i] = relit(moved(pictures[i], how), how)
            targets[i] = moved(targets[i], how, x_channel=1)
            kinds[i] = moved(kinds[i], how)
            if self.depth and not (seed is not None and rng.random() < DEPTH_DROPPED):
                seen = read_geometry(self.folder, self.names[row], self.size)
                channels[i] = moved(seen.transpose(1, 2, 0), how, x_channel=1).transpose(2, 0, 1)
            named += [(i, row, part, how) for part in self.draw_parts(row, how, rng)]
        geometry, rest = torch.from_numpy(targets).split([4, 3], -1)
        return DenseBatch(
            to_tensor(pictures),
            torch.from_numpy(channels) if self.depth else None,
            self.name_parts(named) if named else None,
            Cells(geometry, *rest.unbind(-1), torch.from_numpy(kinds)),
            torch.from_numpy(category),
            torch.from_numpy(colour),
        )

    def draw_parts(self, row: int, how: "Augmentation", rng) -> list[dict]:
        """Up to ASKED parts of picture `row` whose contact is still in the picture after the augmentation."""
        if not self.parts:
            return []
        inside = [part for part in self.parts[row] if all(0 <= x < self.size for x in contact_of(part, how, self.size))]
        return [inside[k] for k in rng.permutation(len(inside))[:ASKED]]

    def name_parts(self, named: list[tuple]) -> NamedParts:
        """named: one (index in the batch, row, part from facts.jsonl, augmentation) per part."""
        words, contacts, approaches, masks, acts, arms = [], [], [], [], [], []
        for _, row, part, how in named:
            text = f"{part['verb']} {part['label']}"
            words.append(self.encoding.encode_ordinary(swap_sides(text) if how.mirror else text))
            contacts.append((np.array(contact_of(part, how, self.size)) + 0.5) * FINE / self.size - 0.5)
            x, y, z = part["contact"]["approach"]
            approaches.append((-x if how.mirror else x, y, z))
            masks.append(moved(self.arrays["part"][row] == part["index"], how))
            acts.append(moved(self.arrays["act"][row], how, x_channel=0))
            arms.append(moved(self.arrays["arm"][row], how))
        owners = torch.tensor([place for place, *_ in named])
        ids = torch.tensor([token for text in words for token in text])
        starts = torch.tensor([0, *map(len, words[:-1])]).cumsum(0)
        floats = (torch.from_numpy(np.stack(x)).float() for x in (contacts, approaches, masks, acts, arms))
        return NamedParts(owners, ids, starts, *floats)


def read_parts(file: Path) -> list[list[dict]]:
    """facts.jsonl -> each picture's parts with a contact, and their index. Raises: ValueError naming file and line."""
    pictures = []
    for number, row in read_json_lines(file):
        try:
            parts = [part | {"index": j} for j, part in enumerate(row["facts"]["parts"]) if part["contact"]]
            for part in parts:
                contact = part["contact"]
                numbers = np.array([contact["u"], contact["v"], *contact["approach"]], float)
                if numbers.shape != (5,) or not np.isfinite(numbers).all():
                    raise ValueError("a contact is five finite numbers")
                if not isinstance(part["verb"], str) or not isinstance(part["label"], str):
                    raise ValueError("verb and label are texts")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file}, line {number}: not what data.build writes ({error}); build it again") from None
        pictures.append(parts)
    return pictures


# ---- augmentation ----------------------------------------------------------------------------------------------------


class Augmentation(NamedTuple):
    """How a picture and its targets are changed; the defaults change nothing."""

    dy: int = 0  # down, in cells of the 16 x 16 raster
    dx: int = 0  # to the right
    mirror: bool = False  # swap left and right, after the shift
    gain: float = 1.0  # contrast about mid-grey
    offset: float = 0.0


def draw_augmentation(rng) -> Augmentation:
    dy, dx = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2)
    mirror = rng.random() < 0.5
    gain = rng.uniform(1 - LIGHT, 1 + LIGHT)
    return Augmentation(dy, dx, mirror, gain, offset=rng.uniform(-127, 127) * LIGHT)


def moved(x: np.ndarray, how: Augmentation, x_channel: int | None = None) -> np.ndarray:
    """(H, H, ..) shifted, its border repeated, and mirrored. x_channel: x of a direction, which mirroring negates."""
    H = len(x)
    rows, columns = (np.clip(np.arange(H) - by * (H // GRID), 0, H - 1) for by in (how.dy, how.dx))
    x = x[rows][:, columns]
    if how.mirror:
        x = x[:, ::-1].copy()
        if x_channel is not None:
            x[..., x_channel] *= -1
    return x


def relit(picture: np.ndarray, how: Augmentation) -> np.ndarray:
    return np.clip((picture - 127.0) * how.gain + 127 + how.offset, 0, 255).astype(np.uint8)


def contact_of(part: dict, how: Augmentation, size: int) -> tuple[float, float]:
    """Column and row of a part's contact in the augmented picture."""
    u = part["contact"]["u"] + how.dx * (size // GRID)
    v = part["contact"]["v"] + how.dy * (size // GRID)
    if how.mirror:
        u = size - 1 - u
    return u, v


def swap_sides(text: str) -> str:
    """Swap the words "left" and "right", for mirrored pictures."""
    return re.sub(r"\b(left|right)\b", lambda side: "right" if side[0] == "left" else "left", text)
