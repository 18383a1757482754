"""Dense targets, named parts and depth in training.

pytest tests/test_dense.py
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import mini_config
from toy import SIDE, write_data

from data.dataset import read_geometry, visual_tokens
from data.dense import DEPTH_DROPPED, Augmentation, DensePictures, moved, read_parts, swap_sides
from data.objectives import DenseObjective, soft_label
from data.tokenizer import load_encoding
from data.validation import evaluate_dense
from finetune_policy import PolicyConfig, finetune
from robomamba import RoboMamba
from train import recipe, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("toy") / "train", 24)


@pytest.fixture(scope="module")
def rgbd(folder):
    encoding = load_encoding(folder / "vocab.tiktoken")
    config = mini_config(encoding.n_vocab)
    config.vision = dataclasses.replace(config.vision, depth=True)
    torch.manual_seed(0)
    return RoboMamba(config, encoding).eval()


def test_a_named_part_moves_with_its_picture(folder, rgbd):
    """Whatever the augmentation: the contact lies on the part, on the box that is seen, and on its depth."""
    data = DensePictures(str(folder), SIDE, rgbd.encoding, depth=True)
    told = 0
    for seed in range(12):
        b = data.batch(np.arange(8), [seed])
        for k, owner in enumerate(b.named.owners):
            column, row = (b.named.contact[k] + 0.5).floor().long().tolist()  # 32 cells on 32 pixels
            assert b.named.mask[k, row, column] == 1 and abs(b.named.act[k, row, column, 0]) == 1
            assert (b.pictures[owner, :, row, column].float() - b.pictures[owner, :, 0, 0].float()).abs().max() > 10
            seen = b.geometry[owner, 3, row, column]
            assert seen == 0 or seen == pytest.approx(-1, abs=0.05)  # the box faces the camera
            told += seen != 0
    assert told > 20


def test_a_mirror_turns_directions_and_words_round():
    x = np.arange(16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
    turned = moved(x, Augmentation(mirror=True), x_channel=0)
    assert np.array_equal(turned[..., 1:], x[:, ::-1, 1:]) and np.array_equal(turned[..., 0], -x[:, ::-1, 0])
    assert np.array_equal(moved(x, Augmentation()), x)
    assert np.array_equal(moved(x, Augmentation(dy=2, dx=-1))[5, 5], x[3, 6])
    assert swap_sides("open the left door, lefty right") == "open the right door, lefty left"


@pytest.mark.parametrize("line", ["{}", '{"facts": {"parts": [5]}}', '{"facts": {"parts": [{"contact": {"u": 1}}]}}'])
def test_facts_of_another_form_are_one_error_with_their_line(folder, tmp_path, line):
    file = tmp_path / "facts.jsonl"
    file.write_text((folder / "facts.jsonl").read_text() + line + "\n")
    with pytest.raises(ValueError, match="facts.jsonl, line 25: not what data.build writes"):
        read_parts(file)


def test_some_pictures_lose_their_depth_in_training_and_none_in_validation(folder, rgbd):
    data = DensePictures(str(folder), SIDE, rgbd.encoding, depth=True)
    lost = [(data.batch(np.arange(24), [seed]).geometry == 0).all((1, 2, 3)).float().mean() for seed in range(20)]
    assert np.mean(lost) == pytest.approx(DEPTH_DROPPED, abs=0.07)  # 480 draws: a standard deviation of 0.02
    assert (data.batch(np.arange(24)).geometry != 0).any((1, 2, 3)).all()
    assert DensePictures(str(folder), SIDE, rgbd.encoding).batch(np.arange(2)).geometry is None


def test_the_soft_label_of_a_contact():
    label = soft_label(torch.tensor([[3.0, 20.0], [-2.0, 31.0]]), 32)
    assert torch.allclose(label.sum(1), torch.ones(2)) and label[0].argmax() == 20 * 32 + 3
    near = label[0].view(32, 32)[20, 4] / label[0].view(32, 32)[20, 3]
    assert near == pytest.approx(np.exp(-1 / (2 * 0.6**2)), rel=1e-4)


def test_named_parts_are_learned(folder, rgbd):
    """The contact of the one box of each picture is found after some steps, and words alone do not find it."""
    data = DensePictures(str(folder), SIDE, rgbd.encoding, depth=True)
    torch.manual_seed(0)
    objective = DenseObjective(rgbd, named=True)
    before = evaluate_dense(objective, data, "cpu")
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for step in range(60):
        loss, parts = objective(data.batch(np.arange(24), [step]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert {"contact", "aim", "motion", "part", "dice", "arm"} <= parts.keys()
    after = evaluate_dense(objective, data, "cpu")
    assert after["contact_px"] < 0.5 * before["contact_px"] and after["part_iou"] > 0.5
    assert objective(data.batch(np.arange(2))._replace(named=None))[0].isfinite()


def test_geometry_changes_the_tokens_and_has_a_cache_of_its_own(folder, rgbd):
    from common.training import Processes

    names = [f"images/{i}.png" for i in range(3)]
    plain, deep = (visual_tokens(rgbd.vision, folder, names, Processes("cpu"), depth=way) for way in (False, True))
    assert len(list(folder.glob("tokens-*.npy"))) == 2 and np.abs(np.array(plain) - np.array(deep)).max() > 0.01
    with torch.no_grad():
        image = DensePictures(str(folder), SIDE, rgbd.encoding).batch([1]).pictures
        geometry = torch.from_numpy(read_geometry(folder, names[1], SIDE))[None]
        assert torch.allclose(rgbd.vision(image, geometry)[0].half(), torch.from_numpy(np.array(deep[1])), atol=2e-3)


def test_all_stages_train_an_rgbd_model(folder, rgbd, tmp_path):
    rgbd.save_pretrained(tmp_path / "start")
    shared = dict(data=str(folder), val=str(folder), batch_size=4, device="cpu")
    for stage, init in (("vision", "start"), ("cotrain", "vision")):
        changes = dict(init=str(tmp_path / init), out=str(tmp_path / stage), max_steps=(3,), more="")
        result = train(recipe(stage, **shared, **changes))
    assert "exact.contact" in result
    result = finetune(
        PolicyConfig(
            checkpoint=str(tmp_path / "cotrain"), data=str(folder), val=str(folder), out=str(tmp_path / "p"), epochs=2
        )
    )
    assert np.isfinite(result["pixel_px"]) and json.loads((tmp_path / "p/config.json").read_text())["vision"]["depth"]
