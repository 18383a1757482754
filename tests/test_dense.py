"""Dense targets, named parts and depth in training.

pytest tests/test_dense.py
"""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import mini_config
from toy import SIDE, write_data

from common.pointing import peak, soft_label
from common.training import Processes
from data.dataset import read_geometry, read_picture, tokens_and_maps, visual_tokens
from data.dense import DEPTH_DROPPED, Augmentation, DensePictures, moved, read_parts, swap_sides
from data.depth import read_depth
from data.objectives import WEIGHTS, DenseObjective
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
    config.vision = dataclasses.replace(config.vision, depth=True, fine=16)
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
    for step in range(100):
        loss, parts = objective(data.batch(np.arange(24), [step]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert {"contact", "aim", "motion", "part", "dice", "arm"} <= parts.keys()
    after = evaluate_dense(objective, data, "cpu")
    assert after["contact_px"] < 0.5 * before["contact_px"] and after["part_iou"] > 0.5
    assert objective(data.batch(np.arange(2))._replace(named=None))[0].isfinite()


def test_a_term_of_the_loss_counts_as_often_as_asked(folder, rgbd):
    batch = DensePictures(str(folder), SIDE, rgbd.encoding, depth=True).batch(np.arange(4))
    losses = []
    for more in ("", "words=0", "words=3"):
        torch.manual_seed(0)
        loss, parts = DenseObjective(rgbd, named=True, more=more)(batch)
        losses.append(loss.item())
    assert losses[0] - losses[1] == pytest.approx(WEIGHTS["words"] * parts["words"].item(), rel=1e-4)
    assert losses[2] - losses[0] == pytest.approx(2 * WEIGHTS["words"] * parts["words"].item(), rel=1e-4)
    with pytest.raises(ValueError, match="--more presence=3: 'presence' is no term of the loss"):
        DenseObjective(rgbd, more="presence=3")


def test_geometry_changes_the_tokens_and_has_a_cache_of_its_own(folder, rgbd):
    names = [f"images/{i}.png" for i in range(3)]
    plain, deep = (visual_tokens(rgbd.vision, folder, names, Processes("cpu"), depth=way) for way in (False, True))
    assert len(list(folder.glob("tokens-*.npy"))) == 2 and np.abs(np.array(plain) - np.array(deep)).max() > 0.01
    with torch.no_grad():
        image = DensePictures(str(folder), SIDE, rgbd.encoding).batch([1]).pictures
        geometry = torch.from_numpy(read_geometry(folder, names[1], SIDE))[None]
        assert torch.allclose(rgbd.vision(image, geometry)[0].half(), torch.from_numpy(np.array(deep[1])), atol=2e-3)
    os.utime(folder / "images/1.depth.png")  # another depth picture beside the same picture
    for way, files in ((False, 2), (True, 3)):
        visual_tokens(rgbd.vision, folder, names, Processes("cpu"), depth=way)
        assert len(list(folder.glob("tokens-*.npy"))) == files


def test_labels_of_named_parts_must_be_there_whole_and_finite(folder, rgbd, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with np.load(folder / "dense.npz") as file:
        arrays = dict(file)

    def refused(changed, said):
        np.savez(tmp_path / "dense.npz", **changed)
        with pytest.raises(ValueError, match=f"dense.npz: {said}"):
            DensePictures(tmp_path, SIDE, rgbd.encoding)

    for name in ("part", "act", "arm"):
        refused(arrays | {name: arrays[name][:1]}, name)
        refused({k: x for k, x in arrays.items() if k != name}, ".*remove an old folder first")
    for name in ("act", "arm"):
        refused(arrays | {name: np.full_like(arrays[name], np.nan)}, f"{name} holds values that are not finite")


def test_all_stages_train_an_rgbd_model(folder, rgbd, tmp_path):
    rgbd.save_pretrained(tmp_path / "start")
    shared = dict(data=str(folder), val=str(folder), batch_size=4, device="cpu")
    for stage, init in (("vision", "start"), ("cotrain", "vision")):
        changes = dict(init=str(tmp_path / init), out=str(tmp_path / stage), max_steps=3, more="")
        result = train(recipe(stage, **shared, **changes))
    assert "exact.contact" in result
    result = finetune(
        PolicyConfig(
            checkpoint=str(tmp_path / "cotrain"), data=str(folder), val=str(folder), out=str(tmp_path / "p"), epochs=2
        )
    )
    assert np.isfinite(result["pixel_px"]) and json.loads((tmp_path / "p/config.json").read_text())["vision"]["depth"]


def test_the_fine_map_stands_beside_the_same_tokens(folder, rgbd):
    data = DensePictures(str(folder), SIDE, rgbd.encoding, depth=True)
    batch = data.batch(np.arange(3))
    with torch.no_grad():
        tokens, fine = rgbd.vision(batch.pictures, batch.geometry, fine=True)
        assert torch.equal(tokens, rgbd.vision(batch.pictures, batch.geometry))
        assert fine.shape == (3, 16, 16, 16)  # tokens are 4 x 4
        changed = batch.pictures.clone()
        changed[:, :, :2, :2] = 255  # the top left corner
        difference = (rgbd.vision(changed, batch.geometry, fine=True)[1] - fine).abs().amax(1)
    assert difference[:, 0, 0].min() > 3 * difference[:, 8:, 8:].max(), "detail stays where it is"
    names = [f"images/{row}.png" for row in range(3)]
    kept = tokens_and_maps(rgbd.vision, folder, names, Processes("cpu"), depth=True)
    for stored, direct in zip(kept, (tokens, fine), strict=True):
        assert stored.dtype == np.float16 and np.allclose(stored, direct, atol=1e-2)


def test_patches_that_do_not_divide_the_labels_are_refused(rgbd):
    for patches, fine in ((24, 0), (16, 16)):  # the fine map would have 64 x 64 cells
        config = dataclasses.replace(rgbd.config.vision, image_size=patches * 8, fine=fine)
        model = SimpleNamespace(vision=rgbd.vision, config=SimpleNamespace(vision=config, lm=rgbd.config.lm))
        with pytest.raises(ValueError, match=f"{patches} x {patches} patches do not divide"):
            DenseObjective(model, named=True)


def test_the_peak_of_a_map():
    heat = torch.full((2, 8, 8), -20.0)
    heat[0, 2, 5] = 9.0
    heat[1, 7, 0], heat[1, 7, 1] = 9.0, 9.0  # at the border: two cells alike
    way = torch.zeros(2, 3, 8, 8)
    way[:, 2] = 1.0
    way[0, :, 2, 5] = torch.tensor([3.0, 0.0, 4.0])
    point, direction = peak(heat, way)
    assert torch.allclose(point, torch.tensor([[5.5, 2.5], [1.0, 7.5]]) / 4 - 1, atol=1e-5)
    assert torch.allclose(direction, torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 1.0]]), atol=1e-5)


def test_pointing_is_learned(folder, rgbd, tmp_path):
    """The pointing head learns beside the paper's head, from frozen maps; nothing else moves."""
    rgbd.save_pretrained(tmp_path / "start")
    shared = dict(checkpoint=str(tmp_path / "start"), data=str(folder), val=str(folder), device="cpu")
    few, many = (
        finetune(PolicyConfig(out=str(tmp_path / f"after-{n}"), epochs=n, batch_size=8, **shared)) for n in (1, 40)
    )
    assert many["point_px"] < 0.7 * few["point_px"] and many["point_degrees"] < few["point_degrees"]
    after = RoboMamba.from_pretrained(tmp_path / "after-40")
    assert after.config.head.turn == min(180.0, round(4 * many["point_degrees"], 1)) and rgbd.config.head.turn == 180
    for name, p in after.named_parameters():
        frozen = torch.equal(p, rgbd.get_parameter(name))
        assert frozen != name.startswith(("head", "point"))
    picture = read_picture(folder / "images/0.png", SIDE)
    depth = read_depth(folder / "images/0.depth.png")
    both = (after.predict_action(picture, "open", depth, (30, 30, 15.5, 15.5), way, refine=False) for way in (0, 1))
    assert not np.allclose(*((action.u, action.v) for action in both))
    whole = dict(unfreeze=True, keep_head=True, epochs=1, checkpoint=str(tmp_path / "after-40"))
    result = finetune(PolicyConfig(out=str(tmp_path / "whole"), batch_size=8, **(shared | whole)))
    turn = RoboMamba.from_pretrained(tmp_path / "whole").config.head.turn
    assert "point_degrees" not in result and turn == after.config.head.turn  # all weights: from RGB
