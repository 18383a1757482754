"""Pictures with dense targets, for stage 0: what the simulator knows of each of the 16 x 16 cells of a picture.

The folder is one that data.build made: dense.npz, and conversations.json with the pictures' names in the same order.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.files import read_npz
from data.dataset import load_records, read_picture, to_tensor
from sim import objects
from sim.catalogue import SEEN, UNSEEN

GRID = 16  # cells along one side
N_KINDS = len(objects.PART_KINDS)
N_CATEGORIES = len(SEEN) + len(UNSEEN) + 1
N_COLOURS = len(objects.COLOURS)
MAX_SHIFT = 2  # augmentation: pictures are shifted by up to so many cells
LIGHT = 0.15  # augmentation: brightness and contrast vary by this fraction


class Cells(NamedTuple):
    """What is known of the cells of B pictures, or predicted: then mask, movable and kind are logits."""

    geometry: Tensor  # (B, 16, 16, 4): relative depth, then the surface normal x, y, z in the camera frame
    mask: Tensor  # (B, 16, 16): fraction of the cell that the object fills
    movable: Tensor  # (B, 16, 16): 1 on a movable part, 0 elsewhere, -1 = not told (held-out categories)
    openness: Tensor  # (B, 16, 16): of the part in the cell, 0 closed .. 1 open
    kind: Tensor  # (B, 16, 16) int64, index into objects.PART_KINDS; predicted: (B, 16, 16, N_KINDS)


class DenseBatch(NamedTuple):
    pictures: Tensor  # (B, 3, S, S) uint8
    cells: Cells
    category: Tensor  # (B,) int64
    colour: Tensor  # (B,) int64, index into objects.COLOURS
    captions: Tensor  # token ids of all captions, one after the other
    caption_starts: Tensor  # (B,) int64

    def to(self, device) -> "DenseBatch":
        moved = (x.to(device) if isinstance(x, Tensor) else Cells(*(c.to(device) for c in x)) for x in self)
        return DenseBatch(*moved)


class DensePictures:
    """Pictures and dense targets of a folder made by data.build.

    Raises: ValueError naming the file that is missing, damaged, or does not fit the others.
    """

    def __init__(self, folder: str, image_size: int, encoding):
        self.folder = Path(folder)
        self.size = image_size
        file = self.folder / "dense.npz"
        names = ("targets", "kinds", "category", "colour")
        arrays = read_npz(file, names, "`python -m data.build` makes it")
        self.targets, self.kinds, self.category, self.colour = (arrays[name] for name in names)
        n = len(self.targets) if self.targets.ndim else 0
        shapes = ((n, GRID, GRID, 7), (n, GRID, GRID), (n,), (n,))
        for name, shape in zip(names, shapes, strict=True):
            if arrays[name].shape != shape or arrays[name].dtype.kind not in "fiu":
                was = f"{arrays[name].dtype} {arrays[name].shape}, expected {shape}"
                raise ValueError(f"{file}: {name} {was}; remove the folder and build it anew")
        for name, low, high in (("kinds", -1, N_KINDS), ("category", 0, N_CATEGORIES), ("colour", 0, N_COLOURS)):
            if n and not (low <= arrays[name].min() and arrays[name].max() < high):
                raise ValueError(f"{file}: {name} must lie in {low} .. {high - 1}")
        if not np.isfinite(self.targets).all():
            raise ValueError(f"{file}: targets hold values that are not finite")

        records = load_records(self.folder / "conversations.json")
        if len(records) != n:
            raise ValueError(f"{self.folder}: {n} rows in dense.npz, {len(records)} conversations")
        for index, record in enumerate(records):
            if "image" not in record:
                raise ValueError(f"{self.folder / 'conversations.json'}, record {index}: image: stage vision needs one")
        self.names = [record["image"] for record in records]
        self.captions = [encoding.encode_ordinary(caption(record)) for record in records]

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, rows, seed: list[int] | None = None) -> DenseBatch:
        """With a seed each picture and its targets are shifted, mirrored and relit."""
        pictures = np.stack([read_picture(self.folder / self.names[row], self.size) for row in rows])
        targets = self.targets[rows].astype(np.float32)
        kinds = self.kinds[rows].astype(np.int64)
        if seed is not None:
            for i, row in enumerate(rows):
                rng = np.random.default_rng([*seed, row])
                pictures[i], targets[i], kinds[i] = augment(pictures[i], targets[i], kinds[i], rng)
        channels = torch.from_numpy(targets)
        cells = Cells(channels[..., :4], *channels[..., 4:].unbind(-1), torch.from_numpy(kinds))
        captions = [self.captions[row] for row in rows]
        lengths = [len(ids) for ids in captions]
        return DenseBatch(
            to_tensor(pictures),
            cells,
            torch.from_numpy(self.category[rows].astype(np.int64)),
            torch.from_numpy(self.colour[rows].astype(np.int64)),
            torch.tensor([token for ids in captions for token in ids]),
            torch.tensor([0, *lengths[:-1]]).cumsum(0),
        )


def augment(picture: np.ndarray, target: np.ndarray, kind: np.ndarray, rng) -> tuple[np.ndarray, ...]:
    """Shift, mirror and relight a picture (S, S, 3); shift and mirror its targets (16, 16, 7) and kinds (16, 16)."""
    dy, dx = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2)
    cell = len(picture) // GRID
    picture = shift(picture, dy * cell, dx * cell)
    target = shift(target, dy, dx)
    kind = shift(kind, dy, dx)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
        kind = kind[:, ::-1]
        target = target[:, ::-1].copy()
        target[..., 1] *= -1  # the normal's x
    gain = rng.uniform(1 - LIGHT, 1 + LIGHT)
    offset = rng.uniform(-127, 127) * LIGHT
    picture = np.clip((picture - 127.0) * gain + 127 + offset, 0, 255).astype(np.uint8)
    return picture, target, kind


def shift(x: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """(H, W, ..) moved by (dy, dx); the border is repeated."""
    H, W = x.shape[:2]
    rows = np.clip(np.arange(H) - dy, 0, H - 1)
    columns = np.clip(np.arange(W) - dx, 0, W - 1)
    return x[rows][:, columns]


def caption(record: dict) -> str:
    """The first answer to a question of type "caption"; of a record without one, its first answer."""
    types = record.get("families", ())
    turn = types.index("caption") if "caption" in types else 0
    return record["conversations"][2 * turn + 1]["value"]
