"""From files to batches: pictures, conversations in LLaVA's layout, manipulation samples, cached visual tokens.

    python -m data.dataset data/cache/train/conversations.json     # check a file (yours too), list every bad record

A conversation file is LLaVA's JSON, `[{id, image, conversations: [{from: "human" | "gpt", value}, ..]}, ..]`; image
paths are relative to `--images` (default: the file's folder) and may not leave it. Records without `image` are text
only and get a flat grey picture. Ours also have `families`: the question type of each turn.

Two ways to read a record with several turns, `Conversations(turns=...)`:
    "branch"  each turn is asked on its own, given only the picture. All questions share the picture as a prefix, so
              four cost little more than one, and none gives away another's answer. For independent questions.
    "pack"    the turns are concatenated in one sequence, as LLaVA trains them. For turns that refer to earlier ones.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.files import read_json, read_json_lines, write_atomically
from common.training import digest
from data.depth import check_intrinsics, geometry, read_depth, resample
from data.prompts import QUESTION_TYPES
from data.tokenizer import NUMBER_BASE, NUMBERS, SPECIAL_TOKENS, PublishedEncoding

IGNORE = -100  # label of tokens that are not predicted
N_NUMBERS = 5  # maximum number of numbers in an answer: u, v and the approach's x, y, z
GREY = 128
MAX_LENGTH = 1024  # tokens; longer turns are cut
MAX_RECORDS_NAMED = 20  # in one error
BLOCK = 64  # pictures that a process encodes at a time

# ---- pictures --------------------------------------------------------------------------------------------------------


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Any PIL picture as RGB, as a viewer shows it: EXIF rotation applied, transparency on white, 16 bits scaled."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":  # of unknown range
        raise ValueError("its pixels are floats; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16 bits; Pillow itself would clip them to 255
        grey = np.clip(np.asarray(picture, np.float32) / 257, 0, 255).round()
        picture = Image.fromarray(grey.astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def open_picture(path) -> Image.Image:
    """A picture file, opened but not yet decoded; refuses decompression bombs and anything but a regular file."""
    if not Path(path).is_file():  # a named pipe would block for ever
        raise ValueError("no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def read_picture(path, size: int) -> np.ndarray:
    """Any picture file -> uint8 (size, size, 3); resized if needed."""
    try:
        with open_picture(path) as file:
            return np.asarray(upright_rgb(file).resize((size, size), Image.Resampling.BILINEAR))
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from None


def to_tensor(pictures) -> Tensor:
    """uint8 pictures (B, S, S, 3), an array or a list -> (B, 3, S, S)."""
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())


def grey_picture(size: int) -> np.ndarray:
    """The picture for records that have none."""
    return np.full((size, size, 3), GREY, np.uint8)


# ---- files -----------------------------------------------------------------------------------------------------------


def load_records(file, root=None) -> list[dict]:
    """Read and check a conversation file; one ValueError lists all bad records (file, index, field)."""
    file = Path(file)
    root = Path(root) if root else file.parent
    records = read_json(file, list, f"`python -m data.build --out {file.parent if file.suffix else file}` makes one")
    if not records:
        raise ValueError(f"{file}: expected a list of at least one record (LLaVA's layout)")
    problems = [p for i, record in enumerate(records) for p in check_record(record, root, i, str(file))]
    if problems:
        left = len(problems) - MAX_RECORDS_NAMED
        more = [f".. and {left} more"] if left > 0 else []
        raise ValueError("\n".join(problems[:MAX_RECORDS_NAMED] + more))
    return records


def check_image(image: str, root) -> str | None:
    """What is wrong with an image path, or None: it must be a file inside `root`, even after following links."""
    try:
        path = Path(root, image)
        if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image.replace("\\", "/")).parts:
            return f"{image!r} is absolute or has '..'; write it relative to {root}"
        if not path.resolve().is_relative_to(Path(root).resolve()):
            return f"{image!r} is a link that leaves {root}"
        return None if path.is_file() else f"no file {path}"
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a link that leads to itself
        return f"{image[:80]!r} is no usable path ({getattr(error, 'strerror', None) or error})"


def check_record(record, root: str | Path, index: int, source: str) -> list[str]:
    """The problems in one record of a LLaVA-format file, one line each: "source, record index: field: problem".

    Unknown keys are fine; `image` (text only) and `families` may be missing. Whether an image decodes is not checked.
    """
    problems = []

    def bad(field, problem):
        problems.append(f"{source}, record {index}: {field}: {problem}")

    if not isinstance(record, dict):
        bad("record", f"expected an object with 'conversations', got {type(record).__name__}")
        return problems
    image = record.get("image")
    said = record.get("conversations")
    if "image" in record and (not isinstance(image, str) or not image.strip()):
        bad("image", f"expected a path, got {image!r}; leave the field out for text alone")
    elif image and (problem := check_image(image, root)):
        bad("image", problem)
    if not isinstance(said, list) or not said:
        bad("conversations", f"expected a list of turns, got {'an empty list' if said == [] else type(said).__name__}")
        return problems
    for i, turn in enumerate(said):
        field = f"conversations[{i}]"
        who = ("human", "gpt")[i % 2]
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
    types = record.get("families", [""] * (len(said) // 2))
    if not isinstance(types, list) or not all(isinstance(t, str) for t in types) or len(types) != len(said) // 2:
        bad("families", f"expected the question type of each of {len(said) // 2} turns, got {str(types)[:80]}")
    return problems


def load_manipulation(file) -> list[dict]:
    """manipulation.jsonl as data/build.py writes it: samples with image, instruction, u, v, approach, rotation6d.

    Each sample gets "size": the (width, height) in pixels of its picture, in which u and v are measured.
    Raises: ValueError with file, line and field for an invalid sample, such as a pixel outside the picture.
    """
    file = Path(file)
    sizes: dict[str, tuple[int, int]] = {}
    samples = []
    for number, sample in read_json_lines(file, "`python -m data.build` makes one"):
        try:
            image = sample.get("image")
            if not isinstance(image, str) or not image.strip():
                raise ValueError(f"field 'image' is {image!r}")
            if image not in sizes:
                sizes[image] = picture_size(image, file.parent)
            check_sample(sample, *sizes[image])
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        samples.append(sample | {"size": sizes[image]})
    if not samples:
        raise ValueError(f"{file}: no samples")
    return samples


def picture_size(image: str, root) -> tuple[int, int]:
    """(width, height) of a picture file inside `root`, as it is shown."""
    if problem := check_image(image, root):
        raise ValueError(f"image {problem}")
    try:
        with open_picture(Path(root, image)) as file:
            turned = file.getexif().get(0x0112, 1) >= 5  # EXIF orientation: a quarter turn
            return file.size[::-1] if turned else file.size
    except Exception as error:  # as in read_picture
        raise ValueError(f"{Path(root, image)}: cannot be read as a picture ({error})") from None


def check_sample(sample: dict, width: int, height: int) -> None:
    """Raises: ValueError naming the field that is invalid for a picture of this size."""
    text = sample.get("instruction")
    if not isinstance(text, str) or not text.strip(" .!?\t\n"):
        raise ValueError(f"field 'instruction' is {text!r}")
    for key, side in (("u", width), ("v", height)):
        value = sample.get(key)
        if type(value) not in (int, float) or not 0 <= value < side:
            raise ValueError(f"field {key!r} is {str(value)[:80]}: not a pixel of a picture of {width} x {height}")
    for key, length in (("approach", 3), ("rotation6d", 6)):
        values = sample.get(key)
        numbers = isinstance(values, list) and all(type(x) in (int, float) and abs(x) < 1e6 for x in values)
        if not numbers or len(values) != length:
            raise ValueError(f"field {key!r} is {str(values)[:80]}: expected {length} numbers")
        if np.linalg.norm(values[:3]) < 1e-3:
            raise ValueError(f"field {key!r} is {values}: a direction of no length")
    approach, forward = np.split(np.array(sample["rotation6d"], float), 2)
    if np.linalg.norm(np.cross(approach, forward)) < 1e-3 * np.linalg.norm(approach):
        raise ValueError(f"field 'rotation6d' is {sample['rotation6d']}: its two directions are parallel")


# ---- conversations ---------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Q questions on each of B pictures. Rows b * Q .. b * Q + Q - 1 belong to picture b."""

    tokens: Tensor  # (B * Q, T) int64, right-padded with <|endoftext|>
    lengths: Tensor  # (B * Q,) int64, true lengths
    labels: Tensor  # (B * Q, T) int64, IGNORE outside answers
    prompts: Tensor  # (B * Q,) int64, length of the first prompt: the policy head reads the state of its last token
    numbers: Tensor  # (B * Q, N_NUMBERS) float32, the answer's numbers, (n + 0.5) / 100; NaN where there are fewer


class Item(NamedTuple):
    """One question with its answer, or a whole conversation if turns is "pack", as token ids."""

    tokens: list[int]
    labels: list[int]  # IGNORE outside answers
    prompt: int  # length of the (first) prompt
    numbers: list[float]  # the answer's numbers, (n + 0.5) / 100
    weight: float  # how often it is drawn, relative to the others in its record


def pack(turns: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], int]:
    """Join consecutive turns into one sequence; only replies are predicted.

    Args: turns: token ids of each (prompt, reply); the reply ends with <|endoftext|>, which is predicted too.
    Returns: tokens; labels of the same length, the token itself inside replies and IGNORE elsewhere (not shifted: the
        loss does that); the length of the first prompt, whose last token's state the policy head reads.
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
    pad_sequence = torch.nn.utils.rnn.pad_sequence
    tokens = pad_sequence([torch.tensor(item[0]) for item in items], batch_first=True, padding_value=end)
    labels = pad_sequence([torch.tensor(item[1]) for item in items], batch_first=True, padding_value=IGNORE)
    lengths = torch.tensor([len(item[0]) for item in items])
    return tokens, labels, lengths, torch.tensor([item[2] for item in items])
    # end of exercise 6


def question_weights(records: list[dict], more: str) -> dict[str, float]:
    """How often each question type is drawn, relative to the others in its record: 1 / sqrt(number of its questions).

    more: extra factors, "presence=4,plan=0"; 0 leaves a type out. Raises: ValueError if it is malformed.
    """
    tally = Counter(kind for record in records for kind in record.get("families", ()))
    times = factors(more, {*tally, *QUESTION_TYPES}, "question type")
    return {kind: n**-0.5 * times.get(kind, 1.0) for kind, n in tally.items()}


def factors(more: str, known, what: str) -> dict[str, float]:
    """Parse --more: "presence=4,plan=0" -> {"presence": 4.0, "plan": 0.0}. what: what the names stand for.

    Raises: ValueError for a malformed entry, and for a name that is not in `known` or occurs twice.
    """
    found = {}
    for pair in filter(None, more.split(",")):
        name, _, times = pair.partition("=")
        try:
            factor = float(times)
        except ValueError:
            factor = -1.0
        if not 0 <= factor < float("inf") or name in found:
            raise ValueError(f"--more {more}: expected NAME=TIMES, such as presence=4,plan=0")
        if name not in known:
            raise ValueError(f"--more {more}: {name!r} is no {what}, only {sorted(known)}")
        found[name] = factor
    return found


class Conversations:
    """A conversation file, tokenized. `draw` chooses questions, `collate` makes tensors, `pictures` reads pictures.

    Args: file; encoding (tiktoken.Encoding); image_size in pixels; images, root of the image paths (default: the file's
        folder); turns "branch" | "pack"; limit, read only the first N records (0 = all); more, see `question_weights`
        (records without question types keep everything; a record left with no question keeps its first).
    Attributes: records; items, a list of Item for each record; cut, how many items were longer than MAX_LENGTH tokens.
    """

    def __init__(self, file, encoding, image_size: int, images="", turns: str = "branch", limit: int = 0, more=""):
        self.root = Path(images) if images else Path(file).parent
        self.records = load_records(file, self.root)[: limit or None]
        self.image_size = image_size
        self.encoding = encoding
        self.has_numbers = not isinstance(encoding, PublishedEncoding)  # a published vocabulary has none
        self.cut = 0
        self.end, self.user, self.assistant = (encoding.encode_single_token(name) for name in SPECIAL_TOKENS)
        weights = question_weights(self.records, more)
        self.items = [self._items(record, turns, weights) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def _items(self, record: dict, turns: str, weights: dict[str, float]) -> list[Item]:
        said = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        types = record.get("families", [""] * (len(said) // 2))
        asked = list(zip(said[::2], said[1::2], types, strict=True))
        asked = [turn for turn in asked if weights.get(turn[2], 1.0) > 0] or asked[:1]
        encode = self.encoding.encode_ordinary
        pairs = [([self.user, *encode(q), self.assistant], [*encode(answer), self.end]) for q, answer, _ in asked]
        if turns == "pack":
            return [self._item(pairs, 1.0)]
        return [self._item([pair], weights.get(turn[2]) or 1.0) for pair, turn in zip(pairs, asked, strict=True)]

    def _item(self, turns: list[tuple[list[int], list[int]]], weight: float) -> Item:
        tokens, labels, prompt = pack(turns)
        self.cut += len(tokens) > MAX_LENGTH
        numbers = [t - NUMBER_BASE for t in turns[0][1] if 0 <= t - NUMBER_BASE < NUMBERS and self.has_numbers]
        numbers = [(number + 0.5) / NUMBERS for number in numbers[:N_NUMBERS]]
        return Item(tokens[:MAX_LENGTH], labels[:MAX_LENGTH], min(prompt, MAX_LENGTH), numbers, weight)

    def pictures(self, rows) -> Tensor:
        """Record numbers -> uint8 (B, 3, S, S)."""
        names = [self.records[row].get("image") for row in rows]
        size = self.image_size
        return to_tensor([read_picture(self.root / name, size) if name else grey_picture(size) for name in names])

    def draw(self, rows, rng, per_picture: int, contact: float, grounding: float) -> list[Item]:
        """`per_picture` questions for each record, row by row.

        contact, grounding: probability that a question asks for a contact (N_NUMBERS numbers), or is another that is
        answered with numbers (where, box); the rest are in words. A record without that sort gives any question.
        """
        chosen = []
        for row in rows:
            items = self.items[row]
            contacts = [item for item in items if len(item.numbers) == N_NUMBERS]
            grounded = [item for item in items if 0 < len(item.numbers) < N_NUMBERS]
            words = [item for item in items if not item.numbers]
            sorts = (contacts, grounded, words)
            for _ in range(per_picture):
                wanted = np.searchsorted([contact, contact + grounding], rng.random(), side="right")
                left = sorts[wanted] or contacts + grounded + words or items
                weights = np.array([item.weight for item in left])
                item = left[rng.choice(len(left), p=weights / weights.sum())]
                chosen.append(item)
                for sort in sorts:  # no question twice, as long as there are others
                    sort[:] = [other for other in sort if other is not item]
        return chosen

    def collate(self, items: list[Item]) -> Batch:
        tokens, labels, lengths, prompts = pad(items, self.end)
        missing = [float("nan")] * N_NUMBERS
        numbers = torch.tensor([(item.numbers + missing)[:N_NUMBERS] for item in items])
        return Batch(tokens, lengths, labels, prompts, numbers)


# ---- cached visual tokens --------------------------------------------------------------------------------------------


def read_geometry(folder, name: str, size: int) -> np.ndarray:
    """(4, size, size) float32: an RGB-D encoder's extra channels for picture `name` of a folder made by data.build."""
    depth = read_depth(Path(folder, name).with_suffix(".depth.png"))
    return geometry(*resample(depth, _intrinsics(Path(folder)), size))


def ways(vision, folder, names: list[str]) -> tuple[bool, ...]:
    """How the pictures can be shown: without depth and, for an RGB-D encoder, also with it if the folder has depth."""
    name = next(filter(None, names), "")
    depth = vision.cfg.depth and name and Path(folder, name).with_suffix(".depth.png").exists()
    return (False, True) if depth else (False,)


@functools.cache
def _intrinsics(folder: Path) -> tuple[float, ...]:
    """The intrinsics of all pictures in a folder made by data.build."""
    values = read_json(folder / "manifest.json", dict, "`python -m data.build` makes it").get("intrinsics")
    if not values:
        raise ValueError(f"{folder / 'manifest.json'}: no intrinsics; remove the folder and build it again")
    return check_intrinsics(values)


@torch.no_grad()
def visual_tokens(vision, folder, names: list[str], processes, cache="", out="", depth=False) -> np.ndarray:
    """Visual tokens (n, P, W) float16 of picture files `names` under `folder`; "" is the grey picture.

    Computed once and cached on disk. The file name is a digest of the encoder and of every picture's name, size and
    modification time, so other weights or pictures never read it; a checksum at its end shows that it is complete.
    Several processes share the work. The file is memory-mapped, and read whole only for its checksum.
    Args: cache: folder of the file; default `folder`, or `out` if `folder` is not writable. depth: an RGB-D encoder
        also sees the depth pictures; otherwise it sees zeros in their place.
    """
    cfg = vision.cfg
    shape = (len(names), (cfg.image_size // cfg.patch_size) ** 2, cfg.width)
    file = f"tokens-{_pictures_digest(vision, folder, names, depth)[:16]}{'-depth' if depth else ''}.npy"
    path = Path(cache or folder) / file
    if not cache and out and not path.exists() and not os.access(folder, os.W_OK):
        path = Path(out) / file
    if processes.first_says(processes.first and not _is_whole(path, shape)):
        blocks = (tokens for (tokens,) in _encode(vision, folder, names, processes, depth))
        if processes.first:
            write_atomically(path, lambda temporary: _write_tokens(temporary, shape, blocks))
        else:
            for _ in blocks:
                pass
        processes.barrier()
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def tokens_and_maps(vision, folder, names: list[str], processes, depth: bool = False) -> list[np.ndarray]:
    """The same tokens and the fine maps (n, C, H, H), float16, both in memory: 100 kB per map of the preset tiny."""
    blocks = _encode(vision, folder, names, processes, depth, fine=True)
    return [np.concatenate(kind) for kind in zip(*blocks, strict=True)]


def _pictures_digest(vision, folder, names: list[str], depth: bool) -> str:
    h = hashlib.sha256(digest(vision).encode())
    h.update(json.dumps(dataclasses.asdict(vision.cfg)).encode())
    if depth:
        h.update(json.dumps(_intrinsics(Path(folder))).encode())
        names = [*names, *(str(Path(name).with_suffix(".depth.png")) for name in names if name)]
    for name in names:
        stat = os.stat(Path(folder, name)) if name else None
        h.update(f"{name}\n{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return h.hexdigest()


def _encode(vision, folder, names: list[str], processes, depth, fine=False) -> Iterator[list[np.ndarray]]:
    """Blocks of [tokens], with `fine` of [tokens, maps], in the order of `names`; the processes share each block."""
    size = vision.cfg.image_size

    def read(start: int) -> tuple[Tensor, ...]:
        first = start + processes.rank * BLOCK
        part = names[first : first + BLOCK]
        if processes.size > 1:  # gather needs equal shapes
            part = part + [""] * (BLOCK - len(part))
        images = to_tensor([read_picture(Path(folder, name), size) if name else grey_picture(size) for name in part])
        if not depth:
            return (images,)
        blank = np.zeros((4, size, size), np.float32)
        channels = [read_geometry(folder, name, size) if name else blank for name in part]
        return images, torch.from_numpy(np.stack(channels))

    starts = range(0, len(names), BLOCK * processes.size)
    for start, inputs in zip(starts, processes.ahead(read, starts), strict=True):
        out = vision(*(x.to(processes.device) for x in inputs), fine=fine)
        kinds = [processes.gather(kind.half()) for kind in (out if fine else (out,))]
        yield [kind[: len(names) - start].cpu().numpy() for kind in kinds]


def _write_tokens(path: str, shape: tuple, blocks: Iterator[np.ndarray]) -> None:
    """An .npy file, then the CRC-32 of its data. Not written as a memory map: on a full disk that ends in SIGBUS."""
    checksum = 0
    with open(path, "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            checksum = zlib.crc32(block.tobytes(), checksum)
            file.write(block.tobytes())
        file.write(checksum.to_bytes(4, "big"))


def _is_whole(path: Path, shape: tuple) -> bool:
    try:
        tokens = np.load(path, mmap_mode="r")
        if tokens.shape != shape or tokens.dtype != np.float16:
            return False
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            return int.from_bytes(file.read(), "big") == zlib.crc32(tokens)
    except (OSError, ValueError, EOFError):  # missing or truncated
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a conversation file; every bad record is listed.")
    parser.add_argument("file")
    parser.add_argument("--images", help="folder the image paths are relative to (default: the file's folder)")
    args = parser.parse_args()
    try:
        records = load_records(args.file, args.images)
    except ValueError as error:  # one line per bad record; run_main would join them
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.file}: {len(records)} records, {sum(len(r['conversations']) // 2 for r in records)} turns, all good")


if __name__ == "__main__":
    main()
