"""From files to batches: conversations in LLaVA's layout, dense targets, manipulation samples, cached visual tokens.

    python -m data.dataset data/cache/train/conversations.json     # check a file (yours too), list every bad record

A conversation file is LLaVA's JSON, `[{id, image, conversations: [{from: "human" | "gpt", value}, ..]}, ..]`; image
paths are relative to `--images` (default: the file's folder) and may not leave it. Records without `image` are text
alone; they see a flat grey picture.

Two ways to read a record with several turns, `Conversations(turns=...)`:
    "branch"  every turn is asked of the picture alone. The picture is read once and its state is shared by the
              questions, so four questions cost little more than one, and none gives away another's answer. For
              independent questions (ours).
    "pack"    the turns follow each other in one sequence, as LLaVA trains them. For turns that speak of earlier ones.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.prompts import QUESTION_TYPES
from data.tokenizer import NUMBER_BASE, NUMBERS, has_number_tokens

IGNORE = -100  # label of a token that is not to be predicted
N_NUMBERS = 5  # an answer holds at most so many numbers: u, v and the approach's x, y, z
GREY = 128


@dataclass
class Batch:
    """Q questions on each of B pictures. Rows b * Q .. b * Q + Q - 1 of the token tensors belong to picture b."""

    rows: np.ndarray  # (B,) record numbers
    tokens: Tensor  # (B * Q, T) int64, right-padded with <|endoftext|>
    lengths: Tensor  # (B * Q,) int64, true lengths
    labels: Tensor  # (B * Q, T) int64, IGNORE outside answers
    prompts: (
        Tensor  # (B * Q,) int64, length of the (first) prompt: its last token's state is what the policy head will read
    )
    numbers: Tensor  # (B * Q, N_NUMBERS) float32, the answer's numbers / 100, NaN where there are fewer


def read_picture(path, size: int) -> np.ndarray:
    """Any picture file -> uint8 (size, size, 3); resized when its size is another."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
            return np.asarray(
                picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from None


def load_records(file, root=None) -> list[dict]:
    """Read and check a conversation file; one ValueError lists all bad records (file, index, field)."""
    file = Path(file)
    root = Path(root) if root else file.parent
    try:
        records = json.loads(file.read_text())
    except FileNotFoundError:
        folder = file.parent if file.suffix else file
        raise ValueError(f"{file}: no such file; `python -m data.build --out {folder}` makes one") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: expected a list of at least one record (LLaVA's layout)")
    problems = [p for i, record in enumerate(records) for p in check_record(record, root, i, str(file))]
    if problems:
        more = f"\n.. and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError("\n".join(problems[:20]) + more)
    return records


def check_record(record, root: str | Path, index: int, source: str) -> list[str]:
    """What is wrong with one record of a LLaVA-format file, a line each: "source, record index: field: problem".

    Unknown keys are fine; `image` may be missing (text alone). An image must be an existing file inside `root`, also
    after symbolic links are followed. Whether it can be decoded is found out when it is read.
    """
    problems = []

    def bad(field, problem):
        problems.append(f"{source}, record {index}: {field}: {problem}")

    if not isinstance(record, dict):
        bad("record", f"expected an object with 'conversations', got {type(record).__name__}")
        return problems
    image, said = record.get("image"), record.get("conversations")
    if "image" in record and (not isinstance(image, str) or not image.strip()):
        bad("image", f"expected a path, got {image!r}; leave the field out for text alone")
    elif image:
        try:
            path = Path(root, image)
            if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image.replace("\\", "/")).parts:
                bad("image", f"{image!r} is absolute or has '..'; write it relative to {root}")
            elif not path.resolve().is_relative_to(Path(root).resolve()):
                bad("image", f"{image!r} is a link that leaves {root}")
            elif not path.is_file():
                bad("image", f"no file {path}")
        except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
            bad("image", f"{image[:80]!r} is no usable path ({error})")
    if not isinstance(said, list) or not said:
        bad("conversations", f"expected a list of turns, got {'an empty list' if said == [] else type(said).__name__}")
        return problems
    for i, turn in enumerate(said):
        field, who = f"conversations[{i}]", ("human", "gpt")[i % 2]
        if not isinstance(turn, dict):
            bad(field, f"expected an object with 'from' and 'value', got {type(turn).__name__}")
            continue
        if turn.get("from") != who:
            bad(f"{field}.from", f"expected {who!r} (turns alternate, human first), got {turn.get('from')!r}")
        value = turn.get("value")
        if not isinstance(value, str) or not value.replace("<image>", "").strip():
            bad(f"{field}.value", f"expected text, got {value!r}")
        elif "<image>" in value and not image:
            bad(f"{field}.value", "holds <image>, but the record has no image")
    if len(said) % 2:
        bad("conversations", f"{len(said)} entries: the last question has no answer")
    return problems


class Item(NamedTuple):
    """One question with its answer, or with turns "pack" a whole conversation, as token numbers."""

    tokens: list[int]
    labels: list[int]  # IGNORE outside answers
    prompt: int  # length of the (first) prompt
    numbers: list[float]  # of the answer / 100
    weight: float  # how often it is drawn beside others of its record


def pack(turns: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], int]:
    """Turns that follow each other, as one sequence; only replies are to be predicted.

    Args: turns: token ids of each (prompt, reply); the reply ends with <|endoftext|>, which is predicted too.
    Returns: tokens; labels, as long, the token itself inside replies and IGNORE elsewhere (not shifted: the loss does
        that); the length of the first prompt, whose last token's state is what the policy head will read.
    """
    # exercise 6: loss mask and packing of a conversation
    tokens, labels = [], []
    for prompt, reply in turns:
        tokens += prompt + reply
        labels += [IGNORE] * len(prompt) + reply
    return tokens, labels, len(turns[0][0])
    # end of exercise 6


def pad(items: list[tuple], end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences of different lengths as one batch, padded on the right.

    Args: items: tuples that begin with what `pack` returns, as Item does; end: the id to pad with. Labels are padded
        with IGNORE.
    Returns: tokens (n, T), labels (n, T), lengths (n,) of the sequences without padding, prompts (n,); all int64.
    """
    # exercise 6: padding of a batch
    T = max(len(item[0]) for item in items)
    tokens = torch.full((len(items), T), end)
    labels = torch.full((len(items), T), IGNORE)
    for k, item in enumerate(items):
        tokens[k, : len(item[0])] = torch.tensor(item[0])
        labels[k, : len(item[1])] = torch.tensor(item[1])
    lengths = torch.tensor([len(item[0]) for item in items])
    return tokens, labels, lengths, torch.tensor([item[2] for item in items])
    # end of exercise 6


class Conversations:
    """A conversation file, tokenized. `draw` chooses questions, `collate` makes tensors, `pictures` reads pictures.

    Args: file; encoding (tiktoken.Encoding); image_size in pixels; images, root of the image paths (default: the file's
        folder); turns "branch" | "pack"; limit, first records only (0 = all); max_length in tokens (longer turns are
        cut, with a count in `cut`); skip, families of questions left out ("plan,contact"; records without families stay
        whole, and a record of which nothing is left keeps its first question); more, families drawn so many times as
        often ("presence=4,count=2").
    Raises: ValueError for a bad record, or a `more` that is not written so.
    """

    def __init__(
        self, file, encoding, image_size, images=None, turns="branch", limit=0, max_length=1024, skip="", more=""
    ):
        self.root = Path(images) if images else Path(file).parent
        self.records, self.image_size, self.encoding, self.cut = load_records(file, self.root), image_size, encoding, 0
        self.records = self.records[: limit or None]
        self.end, user, assistant = (
            encoding.encode_single_token(t) for t in ("<|endoftext|>", "<|user|>", "<|assistant|>")
        )
        # Where records name the families of their turns, rare ones are drawn more often: weight 1 / sqrt(their number)
        tally = Counter(family for record in self.records for family in record.get("families", ()))
        try:
            factor = {family: float(times) for family, times in (pair.split("=") for pair in more.split(",") if pair)}
        except ValueError:
            raise ValueError(f"--more {more}: expected FAMILY=TIMES, such as presence=4,count=2") from None
        known = {*tally, *QUESTION_TYPES}
        if unknown := factor.keys() - known:
            raise ValueError(f"--more {more}: {sorted(unknown)[0]!r} is no family of questions, only {sorted(known)}")
        self.items: list[list[Item]] = []  # per record
        for record in self.records:
            said = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
            families = record.get("families") or [""] * len(said)
            asked = list(zip(said[::2], said[1::2], families, strict=False))
            asked = [turn for turn in asked if not skip or turn[2] not in skip.split(",")] or asked[:1]
            turn_ids, rest = [], []
            for question, answer, family in asked:
                reply = [*encoding.encode_ordinary(answer), self.end]
                turn_ids.append(([user, *encoding.encode_ordinary(question), assistant], reply))
                is_number = range(NUMBER_BASE, NUMBER_BASE + NUMBERS) if has_number_tokens(encoding) else ()
                numbers = [(t - NUMBER_BASE + 0.5) / NUMBERS for t in reply if t in is_number]
                weight = factor.get(family, 1.0) * tally[family] ** -0.5 if family else 1.0
                rest.append((numbers[:N_NUMBERS], weight))
            if turns == "pack":
                items = [Item(*pack(turn_ids), *rest[0])]
            else:
                items = [Item(*pack([turn]), *tail) for turn, tail in zip(turn_ids, rest, strict=True)]
            self.cut += sum(len(i.tokens) > max_length for i in items)
            cut = [i._replace(tokens=i.tokens[:max_length], labels=i.labels[:max_length]) for i in items]
            self.items.append([i._replace(prompt=min(i.prompt, max_length)) for i in cut])

    def __len__(self) -> int:
        return len(self.records)

    def pictures(self, rows) -> Tensor:
        """Record numbers -> uint8 (B, 3, S, S)."""
        S = self.image_size
        grey = np.full((S, S, 3), GREY, np.uint8)
        out = [
            read_picture(self.root / self.records[r]["image"], S) if "image" in self.records[r] else grey for r in rows
        ]
        return torch.from_numpy(np.stack(out).transpose(0, 3, 1, 2).copy())

    def draw(self, rows, rng, per_picture: int, contact: float, grounding: float) -> list[Item]:
        """`per_picture` questions for each record, row by row.

        contact, grounding: chance that a question is one for a contact (an answer of N_NUMBERS numbers), or another one
        answered with numbers (where, box); the rest is answered in words. Where a record has none of the wanted sort,
        any of its questions will do.
        """
        chosen = []
        for r in rows:
            sorts = [[], [], []]
            for item in self.items[r]:
                sorts[0 if len(item.numbers) == N_NUMBERS else 1 if item.numbers else 2].append(item)
            for _ in range(per_picture):
                wanted = np.searchsorted([contact, contact + grounding], rng.random(), side="right")
                left = sorts[wanted] or [i for s in sorts for i in s] or self.items[r]
                weights = np.array([item.weight for item in left])
                chosen.append(left[rng.choice(len(left), p=weights / weights.sum())])
                for s in sorts:  # no question twice, as long as there are others
                    s[:] = [i for i in s if i is not chosen[-1]]
        return chosen

    def collate(self, rows, items) -> Batch:
        tokens, labels, lengths, prompts = pad(items, self.end)
        numbers = torch.full((len(items), N_NUMBERS), float("nan"))
        for k, item in enumerate(items):
            numbers[k, : len(item.numbers)] = torch.tensor(item.numbers)
        return Batch(np.asarray(rows), tokens, lengths, labels, prompts, numbers)


def load_manipulation(file) -> list[dict]:
    """manipulation.jsonl as written by data/build.py; a bad line is named with its number and field."""
    out = []
    try:
        lines = Path(file).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); `python -m data.build` makes one") from None
    lengths = {"u": (), "v": (), "approach": (3,), "rotation6d": (6,)}
    for number, line in enumerate(lines, 1):
        try:
            sample = json.loads(line)
            fields = {key: sample[key] for key in ("image", "instruction", *lengths)}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number}: not a JSON object with {error}") from None
        for key, value in fields.items():
            if key not in lengths:
                good = isinstance(value, str) and value.strip()
            else:
                numbers = value if isinstance(value, list) else [value]
                good = (
                    all(type(x) in (int, float) and np.isfinite(x) for x in numbers) and np.shape(value) == lengths[key]
                )
            if not good:
                raise ValueError(f"{file}, line {number}: field {key!r} is {value!r}")
        if Path(sample["image"]).is_absolute() or ".." in Path(sample["image"]).parts:
            raise ValueError(f"{file}, line {number}: image {sample['image']!r} leaves the folder of the file")
        out.append(sample)
    if not out:
        raise ValueError(f"{file}: no samples")
    return out


@torch.no_grad()
def visual_tokens(vision, folder, names: list[str], world, batch: int = 64) -> np.ndarray:
    """Visual tokens (n, P, W) float16 of picture files `names` under `folder`, computed once per encoder and kept on
    disk.

    The file's name holds a digest of the encoder's weights and of the list, so another encoder never reads these.
    Several processes share the work. Memory-mapped: only the rows that are used are read.
    """
    digest = hashlib.sha256("\n".join(names).encode())
    for key, value in sorted(vision.state_dict().items()):
        digest.update(key.encode() + value.float().cpu().numpy().tobytes())
    path = Path(folder) / f"tokens-{digest.hexdigest()[:16]}.npy"
    cfg = vision.cfg
    shape = (len(names), (cfg.image_size // cfg.patch_size) ** 2, cfg.width)
    if not path.exists():
        partial = path.with_suffix(".partial")
        if world.first:
            np.lib.format.open_memmap(partial, "w+", np.float16, shape).flush()
        world.barrier()
        out = np.lib.format.open_memmap(partial, "r+")
        for start in range(world.rank * batch, len(names), world.size * batch):
            part = [
                read_picture(Path(folder) / n, cfg.image_size)
                if n
                else np.full((cfg.image_size,) * 2 + (3,), GREY, np.uint8)
                for n in names[start : start + batch]
            ]
            pictures = torch.from_numpy(np.stack(part).transpose(0, 3, 1, 2).copy()).to(world.device)
            out[start : start + batch] = vision(pictures).half().cpu().numpy()
        out.flush()
        world.barrier()
        if world.first:
            partial.rename(path)
        world.barrier()
    return np.load(path, mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a conversation file; every bad record is listed.")
    parser.add_argument("file")
    parser.add_argument("--images", help="folder the image paths are relative to (default: the file's folder)")
    args = parser.parse_args()
    try:
        records = load_records(args.file, args.images)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.file}: {len(records)} records, {sum(len(r['conversations']) // 2 for r in records)} turns, all good")


if __name__ == "__main__":
    main()
