"""Files to batches: pictures, records, samples, dense targets, labels and weights, the cache of visual tokens.

pytest tests/test_dataset.py
"""

import json
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.training import Processes
from data import dataset
from data.dataset import (
    IGNORE,
    Conversations,
    load_manipulation,
    load_records,
    read_picture,
    to_tensor,
    visual_tokens,
)
from data.dense import DensePictures
from data.tokenizer import NUMBER_BASE, load_encoding
from robomamba import VisionConfig, VisionTransformer
from tests.toy import write_data

SAID = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_data(tmp_path_factory.mktemp("data") / "train", 12)


@pytest.fixture(scope="module")
def words(folder):
    return load_encoding(folder / "vocab.tiktoken")


# ---- pictures


def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path):
    file = tmp_path / "p.png"
    ramp = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(ramp).save(file)  # 16-bit grey
    got = read_picture(file, 8)
    assert np.abs(got[..., 0] - ramp / 257).max() <= 0.5 and (got[..., 0] == got[..., 2]).all()

    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, 4:] = (10, 20, 30, 255)
    Image.fromarray(clear).save(file)  # left half transparent, its hidden colour black
    assert (read_picture(file, 8)[:, :4] == 255).all() and (read_picture(file, 8)[:, 4:] == (10, 20, 30)).all()
    palette = Image.fromarray(clear).convert("P")
    palette.save(file, transparency=palette.getpixel((0, 0)))
    assert (read_picture(file, 8)[:, :4] == 255).all()

    plain = np.zeros((8, 8, 3), np.uint8)
    plain[:4] = 200  # bright above
    marked = Image.fromarray(plain)
    exif = marked.getexif()
    exif[0x0112] = 3  # upside down
    marked.save(file, exif=exif)
    assert (read_picture(file, 8)[:4] == 0).all() and (read_picture(file, 8)[4:] == 200).all()
    Image.fromarray(plain).save(file)
    assert np.array_equal(read_picture(file, 8), plain)
    assert torch.equal(to_tensor([plain, plain]), torch.from_numpy(plain).permute(2, 0, 1).expand(2, -1, -1, -1))


def test_what_is_no_picture_is_one_error_with_its_name(tmp_path, recwarn):
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(good)
    data = good.read_bytes()
    os.mkfifo(tmp_path / "pipe.png")
    for name, side in (("bomb.png", 20_000), ("half.png", 10_000)):  # of the second Pillow alone would only warn
        header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
        (tmp_path / name).write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken.png").write_bytes(data[:60] + bytes(100) + data[160:])
    names = ["pipe.png", "bomb.png", "half.png", "float.tiff", "cut.png", "text.png", "empty.png", "broken.png"]
    for name in [*names, "gone.png", "."]:
        with pytest.raises(ValueError, match="cannot be read as a picture") as caught:
            read_picture(tmp_path / name, 8)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not recwarn.list


# ---- records and samples


def test_bad_records_are_all_named_before_anything_is_trained(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "out.png").symlink_to("/etc/passwd")
    good = {"image": "ok.png", "conversations": SAID}
    bad = {
        "image": [good | {"image": x} for x in ("../secret.png", "gone.png", "loop.png", "out.png", "a" * 5000, 7, "")],
        "conversations[0].from": [{"conversations": SAID[::-1]}],
        "conversations[1].value": [{"conversations": [SAID[0], {"from": "gpt", "value": " "}]}],
        "conversations": [{}, good | {"conversations": []}, good | {"conversations": SAID[:1]}],
        "families": [good | {"families": x} for x in (None, 5, [[1]], ["plan", "plan"], "plan", [])],
        "record": [None, 3, []],
    }
    records = [good] + [record for group in bad.values() for record in group]
    fields = [field for field, group in bad.items() for _ in group]
    file = tmp_path / "c.json"
    for k, field in enumerate(fields, 1):
        file.write_text(json.dumps([records[0], records[k]]))
        with pytest.raises(ValueError, match="record 1") as caught:
            load_records(file)
        assert f"record 1: {field}: " in str(caught.value) and "record 0" not in str(caught.value)
    file.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"record 19: .*\n\.\. and 2 more$") as caught:  # two problems of record 8
        load_records(file)
    assert str(caught.value).count("\n") == 20 and len(str(caught.value)) < 6000
    file.write_text(json.dumps([good, {"conversations": SAID, "extra": 1}, good | {"families": ["plan"]}]))
    assert len(load_records(file)) == 3


def test_files_that_are_cut_deep_or_of_another_code_are_one_error_with_their_name(folder, tmp_path):
    text = (folder / "conversations.json").read_bytes()
    deep = b"[" * 100_000
    for content in (b"", text[:-9], deep, '["é"]'.encode("latin-1"), b"{}", b"[]", b"3", b"null"):
        for name, load in (("c.json", load_records), ("m.jsonl", load_manipulation)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=name) as caught:
                load(tmp_path / name)
            assert len(str(caught.value)) < 500
    for load in (load_records, load_manipulation):
        with pytest.raises(ValueError, match="expected a file"):
            load(tmp_path)
        with pytest.raises(ValueError, match="no such file; `python -m data.build"):
            load(tmp_path / "none.json")


def test_a_manipulation_sample_that_cannot_be_right_is_named(folder, tmp_path):
    lines = (folder / "manipulation.jsonl").read_text().splitlines()
    good = json.loads(lines[0])
    (tmp_path / "images").symlink_to(folder / "images")
    assert load_manipulation(folder / "manipulation.jsonl")[0] == good | {"size": (32, 32)}
    wrong = {
        "u": (1e9, -50, 32, "x", None, True, float("nan"), 10**400, [1]),
        "v": (32.0, -0.1, float("inf")),
        "approach": ([0, 0, 0], [0, 0], [0, float("nan"), 1], [0, "x", 1], 3, [10**400, 0, 0]),
        "rotation6d": ([0] * 6, [0, 0, 1, 0, 0, 2], [1, 0, 0, 0, 0, 0], [0, 0, 1], [float("inf"), 0, 0, 0, 1, 0]),
        "instruction": ("", " . ", 3, None),
        "image": ("", 3, None, ["x"], "gone.png", "../x.png", "/etc/passwd", "images"),
    }
    file = folder / "bad.jsonl"
    for field, values in wrong.items():
        for value in values:
            file.write_text("\n".join([lines[0], json.dumps(good | {field: value})]))
            with pytest.raises(ValueError, match="bad.jsonl, line 2: ") as caught:
                load_manipulation(file)
            assert field in str(caught.value), (field, value, caught.value)
    file.unlink()


def test_a_pixel_counts_in_the_picture_as_it_is_shown(tmp_path):
    picture = Image.new("RGB", (60, 30))
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "p.png", exif=exif)
    sample = {"image": "p.png", "instruction": "open", "u": 10, "v": 50, "approach": [0, 0, 1]}
    sample["rotation6d"] = [0, 0, 1, 0, 1, 0]
    (tmp_path / "m.jsonl").write_text(json.dumps(sample))
    assert load_manipulation(tmp_path / "m.jsonl")[0]["size"] == (30, 60)


# ---- dense targets


def test_a_damaged_dense_file_is_one_error_with_its_name(folder, words, tmp_path):
    (tmp_path / "images").symlink_to(folder / "images")
    for name in ("conversations.json", "dense.npz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    data = (tmp_path / "dense.npz").read_bytes()
    with np.load(tmp_path / "dense.npz") as file:
        arrays = dict(file)

    def refused(pattern="dense.npz"):
        with pytest.raises(ValueError, match=pattern):
            DensePictures(tmp_path, 32, words)

    # `images` leads outside of this folder: no record may use it, in stage 0 as in the others
    refused("record 0: image: .* is a link that leaves")
    (tmp_path / "images").unlink()
    (tmp_path / "images").mkdir()
    for image in (folder / "images").iterdir():
        (tmp_path / "images" / image.name).write_bytes(image.read_bytes())
    batch = DensePictures(tmp_path, 32, words).batch(np.arange(2))
    assert torch.equal(batch.cells.movable[0], torch.from_numpy(arrays["targets"][0, ..., 5].astype(np.float32)))

    for cut in (0, 10, 9000, len(data) // 2, len(data) - 30):
        (tmp_path / "dense.npz").write_bytes(data[:cut])
        refused()
    spoiled = [
        {"targets": arrays["targets"][..., :6]},
        {"targets": np.where(arrays["targets"] == 1, np.nan, arrays["targets"])},
        {"kinds": arrays["kinds"][:3]},
        {"kinds": arrays["kinds"] + 100},
        {"category": arrays["category"] - 1 - arrays["category"].max()},
        {"colour": np.array([None] * 12)},  # a pickle: never read
        {"targets": np.array("x")},
    ]
    for change in spoiled:
        np.savez(tmp_path / "dense.npz", **(arrays | change))
        refused()
    np.savez(tmp_path / "dense.npz", **{k: x[:-1] for k, x in arrays.items()})
    refused("11 rows in dense.npz, 12 conversations")


def test_augmentation_moves_pictures_and_targets_together(folder, words):
    """The box of a shifted, mirrored, relit picture still lies where its mask says; normals are mirrored too."""
    data = DensePictures(folder, 32, words)
    moved = 0
    for seed in range(8):
        b = data.batch(np.arange(12), [seed, 3])
        again = data.batch(np.arange(12), [seed, 3])
        assert torch.equal(b.pictures, again.pictures) and torch.equal(b.cells.geometry, again.cells.geometry)
        colourful = b.pictures.float().amax(1) - b.pictures.float().amin(1) > 20  # the box; background is grey
        assert torch.equal(colourful[:, ::2, ::2], b.cells.mask > 0.5)
        assert torch.equal(b.cells.kind > 0, b.cells.mask > 0.5)
        moved += not torch.equal(b.cells.mask, data.batch(np.arange(12)).cells.mask)
    assert moved == 8


# ---- conversations


def test_rare_types_are_drawn_more_often_and_those_left_out_never(folder, words):
    file = folder / "conversations.json"
    plain = Conversations(file, words, 32)
    some = Conversations(file, words, 32, more="contact=0,plan=0,presence=3,colour=0.5")
    tally = Counter(kind for record in plain.records for kind in record["families"])
    assert tally["colour"] == 8 and tally["plan"] == 12
    for record, items, fewer in zip(plain.records, plain.items, some.items, strict=True):
        for kind, item in zip(record["families"], items, strict=True):
            assert item.weight == pytest.approx(tally[kind] ** -0.5, abs=1e-12)
        kept = [kind for kind in record["families"] if kind not in ("contact", "plan")]
        assert len(fewer) == len(kept) and not any(len(item.numbers) == 5 for item in fewer)
        for kind, item in zip(kept, fewer, strict=True):
            assert item.weight == pytest.approx(tally[kind] ** -0.5 * {"presence": 3, "colour": 0.5}.get(kind, 1))
    for more, said in (("presence", "NAME=TIMES"), ("plan=x", "NAME=TIMES"), ("plan=-1", "NAME"), ("pln=2", "'pln'")):
        with pytest.raises(ValueError, match=said):
            Conversations(file, words, 32, more=more)


def test_questions_are_drawn_by_sort(folder, words):
    data = Conversations(folder / "conversations.json", words, 32)
    rows, rng = np.arange(12), np.random.default_rng(0)
    sort = lambda item: {0: "words", 5: "contact"}.get(len(item.numbers), "grounding")  # noqa: E731
    assert {sort(item) for item in data.draw(rows, rng, 1, 1.0, 0.0)} == {"contact"}
    assert {sort(item) for item in data.draw(rows, rng, 1, 0.0, 1.0)} == {"grounding"}
    assert {sort(item) for item in data.draw(rows, rng, 3, 0.0, 0.0)} == {"words"}
    drawn = data.draw(rows, rng, 4, 0.5, 0.5)
    for k in range(12):  # no question twice
        assert len({id(item) for item in drawn[4 * k : 4 * k + 4]}) == 4


def test_labels_hold_the_answer_and_the_end_and_nothing_else(folder, words):
    data = Conversations(folder / "conversations.json", words, 32)
    b = data.collate(data.draw(np.arange(6), np.random.default_rng(0), 3, 0.3, 0.3))
    assert b.tokens.shape == b.labels.shape and len(b.tokens) == 18 and len(set(b.lengths.tolist())) > 2
    for ids, length, labels, prompt, numbers in zip(*b, strict=True):
        assert (labels[:prompt] == IGNORE).all() and (labels[length:] == IGNORE).all()
        assert torch.equal(labels[prompt:length], ids[prompt:length]) and ids[length - 1] == words.eot_token
        assert ids[prompt - 1] == words.encode_single_token("<|assistant|>")
        reply = ids[prompt:length].tolist()
        said = [(t - NUMBER_BASE + 0.5) / 100 for t in reply if NUMBER_BASE <= t < NUMBER_BASE + 100]
        assert torch.allclose(numbers[~numbers.isnan()], torch.tensor(said[:5]))
    packed = Conversations(folder / "conversations.json", words, 32, turns="pack")
    assert [len(items) for items in packed.items] == [1] * 12
    assert len(packed.items[0][0].tokens) == sum(len(item.tokens) for item in data.items[0])


# ---- the cache of visual tokens


class Vision(VisionTransformer):
    """Counts the pictures it encodes."""

    seen = 0

    def forward(self, pictures, geometry=None, fine=False):
        self.seen += len(pictures)
        return super().forward(pictures, geometry, fine=fine)


@pytest.fixture
def vision():
    torch.manual_seed(0)
    vision = Vision(VisionConfig(image_size=32, patch_size=8, width=24, n_layer=1, n_head=3, stem=(8, 16))).eval()
    for p in vision.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return vision


def encode(vision, folder, **where):
    names = [f"images/{k}.png" for k in range(12)] + [""]
    return np.array(visual_tokens(vision, folder, names, Processes("cpu"), **where))


def test_the_cache_is_used_for_the_same_pictures_and_encoder_only(tmp_path, vision):
    folder = write_data(tmp_path / "d", 12)
    first = encode(vision, folder)
    assert first.shape == (13, 16, 24) and first.dtype == np.float16 and vision.seen == 13
    picture = to_tensor([read_picture(folder / "images/3.png", 32)])
    with torch.no_grad():
        assert np.abs(first[3] - vision(picture)[0].numpy()).max() < 2e-3 * np.abs(first).max()  # float16
    vision.seen = 0
    assert np.array_equal(encode(vision, folder), first) and vision.seen == 0

    Image.new("RGB", (32, 32), "red").save(folder / "images/3.png")  # other pictures under the same names
    other = encode(vision, folder)
    assert vision.seen == 13 and not np.array_equal(other[3], first[3]) and np.array_equal(other[4], first[4])
    vision.cfg.image_std = (0.5, 0.5, 0.5)  # the same weights, another encoder
    assert not np.array_equal(encode(vision, folder), other) and vision.seen == 26


def test_a_damaged_cache_is_made_again(tmp_path, vision):
    folder = write_data(tmp_path / "d", 12)
    first = encode(vision, folder)
    (file,) = folder.glob("tokens-*.npy")
    whole = file.read_bytes()
    zeros = whole[:200] + bytes(1000) + whole[1200:]
    for k, content in enumerate((whole[: len(whole) // 2], whole[:-1], zeros, b"", whole[:40]), 2):
        file.write_bytes(content)
        assert np.array_equal(encode(vision, folder), first) and vision.seen == 13 * k
    file.with_name(file.name + ".tmp1").write_bytes(zeros)  # left by a killed run
    assert np.array_equal(encode(vision, folder), first) and vision.seen == 13 * 6


def test_the_cache_lies_where_it_can_be_written(tmp_path, vision, monkeypatch):
    folder = write_data(tmp_path / "d", 12)
    chosen = encode(vision, folder, cache=str(tmp_path / "chosen"))
    assert list((tmp_path / "chosen").glob("tokens-*")) and not list(folder.glob("tokens-*"))
    monkeypatch.setattr(dataset.os, "access", lambda path, mode: Path(path) != folder)  # read-only for us
    assert np.array_equal(encode(vision, folder, out=str(tmp_path / "run")), chosen)
    assert list((tmp_path / "run").glob("tokens-*")) and not list(folder.glob("tokens-*"))


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, vision, monkeypatch):
    folder = write_data(tmp_path / "d", 12)

    def full(path, shape, blocks):
        Path(path).write_bytes(b"half")
        next(blocks)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "_write_tokens", full)
    with pytest.raises(ValueError, match="tokens-.*: cannot be written .No space left on device"):
        encode(vision, folder)
    assert not list(folder.glob("tokens-*"))
