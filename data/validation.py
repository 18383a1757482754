"""Validation during training: teacher-forced answers, dense predictions, and three sample answers to read."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import GREY, IGNORE, Conversations
from data.dense import FINE, DensePictures
from data.prompts import parse_contact

SHOWN_TYPES = ("caption", "plan", "contact")  # answers.md: one question of each type, on different pictures


@torch.no_grad()
def evaluate_dense(objective, data: DensePictures, device, batch: int = 64) -> dict[str, float]:
    """Movable-part IoU and part-kind accuracy over cells, normal error in degrees on the object, category accuracy.

    If parts are named, also the contact error in pixels and the IoU of the part asked for. objective: DenseObjective.
    """
    both = either = right = parts = categories = 0
    angles, pixels, overlaps = [], [], []
    for start in range(0, len(data), batch):
        true = data.batch(np.arange(start, min(start + batch, len(data)))).to(device)
        maps, cells, category_logits, _ = objective.predict(true)
        if true.named is not None:
            asked = objective.named.predict(maps, true.named)[-1]
            best = asked[:, 0].flatten(1).argmax(1)
            found = torch.stack([best % FINE, best // FINE], 1)
            pixels.append((found - true.named.contact).norm(dim=1) * data.size / FINE)
            masks = [asked[:, 1] > 0, true.named.mask > 0.5]
            overlaps.append((masks[0] & masks[1]).sum((1, 2)) / (masks[0] | masks[1]).sum((1, 2)).clamp(min=1))
        said = (cells.mask > 0) & (cells.movable > 0)
        movable = true.cells.movable > 0.5
        both += (said & movable).sum().item()
        either += (said | movable).sum().item()
        on_part = true.cells.kind > 0
        right += (cells.kind.argmax(-1) == true.cells.kind)[on_part].sum().item()
        parts += on_part.sum().item()
        solid = true.cells.mask > 0.95
        normals = (x.geometry[..., 1:][solid] for x in (cells, true.cells))
        angles.append(torch.rad2deg(torch.arccos(F.cosine_similarity(*normals, dim=-1).clamp(-1, 1))))
        categories += (category_logits.argmax(1) == true.category).sum().item()
    named = {}
    if pixels:
        named = {"contact_px": torch.cat(pixels).median().item(), "part_iou": torch.cat(overlaps).mean().item()}
    return named | {
        "movable_iou": both / max(either, 1),
        "kind_accuracy": right / max(parts, 1),
        "normal_degrees": torch.cat(angles).median().item(),
        "category_accuracy": categories / len(data),
    }


@torch.no_grad()
def evaluate_answers(model, data: Conversations, cached: np.ndarray | None, device, batch: int = 32) -> dict:
    """Exact match by question type, with the picture and with a grey one, and the contact error of decoded numbers.

    Teacher-forced: all tokens of an answer are correct if and only if greedy decoding is correct.
    Args: model: a RoboMamba; cached: visual tokens (n, P, W) of `data`, None = read the pictures.
    Returns: exact.TYPE, blank.TYPE and, if there are contacts, contact_px and contact_degrees (medians).
    """
    hits: dict[str, list[bool]] = {}
    blanks: dict[str, list[bool]] = {}
    pixels: list[float] = []
    degrees: list[float] = []
    S = model.config.vision.image_size
    grey = model.vision(torch.full((1, 3, S, S), GREY, dtype=torch.uint8, device=device))
    for start in range(0, len(data), batch):
        rows = range(start, min(start + batch, len(data)))
        asked = [(row, turn) for row in rows for turn in range(len(data.items[row]))]
        b = data.collate([data.items[row][turn] for row, turn in asked])
        target = b.labels[:, 1:]
        shown = data.pictures(rows) if cached is None else torch.from_numpy(np.array(cached[start : rows.stop])).float()
        owners = torch.tensor([row - start for row, _ in asked])
        said = teacher_forced(model, shown, b, owners, device)
        said_blank = teacher_forced(model, grey, b, torch.zeros_like(owners), device)
        for i, (row, turn) in enumerate(asked):
            kind = data.records[row].get("families", ["all"] * (turn + 1))[turn]
            hits.setdefault(kind, []).append(torch.equal(said[i], target[i]))
            blanks.setdefault(kind, []).append(torch.equal(said_blank[i], target[i]))
            if kind == "contact":
                texts = (data.encoding.decode(ids[i][target[i] != IGNORE][:-1].tolist()) for ids in (said, target))
                guess, true = (parse_contact(text) for text in texts)
                if guess and true:
                    pixels.append(S * float(np.hypot(guess[0] - true[0], guess[1] - true[1])))
                    degrees.append(float(np.degrees(np.arccos(np.clip(np.dot(guess[2], true[2]), -1, 1)))))
    out = {f"exact.{kind}": float(np.mean(right)) for kind, right in sorted(hits.items())}
    out |= {f"blank.{kind}": float(np.mean(right)) for kind, right in sorted(blanks.items())}
    if pixels:
        out |= {"contact_px": float(np.median(pixels)), "contact_degrees": float(np.median(degrees))}
    return out


def teacher_forced(model, images: Tensor, b, owners: Tensor, device) -> Tensor:
    """The most likely token at each answer position, IGNORE elsewhere: (n, T - 1), aligned with labels[:, 1:]."""
    inputs = (x.to(device) for x in (images, b.tokens, b.lengths))
    logits, _ = model(*inputs, owners=owners.to(device))
    return torch.where(b.labels[:, 1:] != IGNORE, logits[:, :-1].argmax(-1).cpu(), IGNORE)


def shown_questions(data: Conversations) -> list[tuple[str, str, str]]:
    """(picture file, question, answer) of up to three records: the first question of each of SHOWN_TYPES in the data.

    For a file without question types, its first questions.
    """
    found: dict[int, tuple[str, str, str]] = {}
    for kind in SHOWN_TYPES:
        for row, record in enumerate(data.records):
            types = record.get("families", [kind])
            if row not in found and "image" in record and kind in types:
                turn = 2 * types.index(kind)
                question, answer = (record["conversations"][turn + k]["value"] for k in (0, 1))
                question = question.replace("<image>", "").strip()
                found[row] = (str(data.root / record["image"]), question, answer)
                break
    return list(found.values())


def show_answers(model, shown: list[tuple[str, str, str]]) -> list[tuple[str, str, str, str]]:
    """The model's greedily decoded answers to `shown_questions`: rows (picture, question, model, truth)."""
    return [(Path(image).name, question, model.generate(image, question), truth) for image, question, truth in shown]
