"""Data building, the training stages, stage 2: freezing, exact resume, two processes, bad input.

pytest tests/test_train.py
"""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import finetune_policy
import train as train_module
from common.plots import draw_curves
from common.scripts import cli, cosine, rows_of_step
from data import build as build_module
from data.build import BuildConfig, build
from data.dataset import IGNORE, Conversations, load_manipulation, load_records
from data.tokenizer import NUMBER_BASE
from finetune_policy import PolicyConfig, finetune, geodesic
from robomamba import PRESETS, RoboMamba, rotation_from_6d
from sim.objects import SEEN, UNSEEN
from tests.conftest import mini_config
from train import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 training and 8 validation scenes of 32 pixels, made by the real builder."""
    root = tmp_path_factory.mktemp("data")
    build(BuildConfig(scenes=24, workers=2, out=str(root / "train"), image_size=32, vocab=420))
    build(BuildConfig(scenes=8, workers=1, out=str(root / "val"), image_size=32, split="val"))
    return root


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """A checkpoint folder with a miniature random model."""
    from data.tokenizer import load_encoding

    encoding = load_encoding(data / "train/vocab.tiktoken")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start") / "mini"
    RoboMamba(mini_config(encoding.n_vocab), encoding).save_pretrained(folder)
    return folder


def config(folder, start, out, **changes) -> TrainConfig:
    common = dict(data=str(folder / "train"), val="", init=str(start), out=str(out), device="cpu")
    return TrainConfig(**(common | dict(max_steps=4, batch_size=4, warmup=2, questions=2, log_every=1) | changes))


def weights(folder) -> dict:
    return dict(RoboMamba.from_pretrained(folder).named_parameters())


def logged(folder, name) -> list[float]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [float(r["value"]) for r in csv.DictReader(file) if r["name"] == name]


# ---- data


def test_build_is_the_same_for_any_number_of_workers(data, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "GROUP", 5)
    build(BuildConfig(scenes=24, workers=1, out=str(tmp_path / "a"), image_size=32, vocab=420))
    for name in ("conversations.json", "manipulation.jsonl", "vocab.tiktoken"):
        pathless = [(root / name).read_text().replace("images/0000", "") for root in (data / "train", tmp_path / "a")]
        strip = lambda text: [line[-40:] for line in text.splitlines() if '"image"' not in line]  # noqa: E731
        assert strip(pathless[0]) == strip(pathless[1]), name
    with np.load(data / "train/dense.npz") as one, np.load(tmp_path / "a/dense.npz") as other:
        assert all(np.array_equal(one[k], other[k], equal_nan=True) for k in one.files)


def test_a_build_goes_on_where_it_was_stopped(data, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "GROUP", 4)
    cfg = BuildConfig(scenes=8, workers=1, out=str(tmp_path / "b"), image_size=32, split="val")
    (tmp_path / "b/parts").mkdir(parents=True)
    build_module.make_group((cfg, 0, 4))  # a first group, then the machine went down
    stamp = (tmp_path / "b/parts/00000000.npz").stat().st_mtime_ns
    made = []
    real = build_module.make_group
    monkeypatch.setattr(build_module, "make_group", lambda job: made.append(job[1]) or real(job))
    assert stamp and real((cfg, 0, 4)) == 4 and (tmp_path / "b/parts/00000000.npz").stat().st_mtime_ns == stamp
    monkeypatch.setattr(build_module, "make_group", real)
    build_module._scene.close()  # this process made a group itself; other tests open a world of their own
    build_module._scene = None
    build(cfg)
    assert (tmp_path / "b/facts.jsonl").read_text().count("\n") == 8 and not (tmp_path / "b/parts").exists()


def test_unseen_categories_never_get_a_part_a_contact_or_a_mask(tmp_path):
    build(BuildConfig(scenes=12, workers=1, out=str(tmp_path / "u"), image_size=32, unseen=1.0, grammar=0.0, vocab=420))
    assert (tmp_path / "u/manipulation.jsonl").read_text() == ""
    families = {f for r in json.loads((tmp_path / "u/conversations.json").read_text()) for f in r["families"]}
    assert families <= {"object", "caption", "colour", "size", "relation", "presence"}
    with np.load(tmp_path / "u/dense.npz") as dense:
        assert (dense["targets"][..., 5:] == -1).all() and (dense["kinds"] == -1).all()
        assert dense["targets"][..., 4].max() > 0.5  # the object's own mask is told


def test_pictures_after_an_attempt_show_what_became_of_it(tmp_path):
    """Both test splits; every scene is an attempt: its joints, its questions and its openness targets agree."""
    for split, categories in (("test-seen", SEEN), ("test-unseen", UNSEEN)):
        build(BuildConfig(scenes=16, workers=2, out=str(tmp_path / split), image_size=64, split=split, after=0.92))
        facts = [json.loads(line)["facts"] for line in (tmp_path / split / "facts.jsonl").read_text().splitlines()]
        assert {f["category"] for f in facts} <= set(categories)
        events = [f for f in facts if "event" in f]
        assert len(events) >= 12 and {True, False} == {f["event"]["success"] for f in events}
        for f in events:
            acted = next(p for p in f["parts"] if p["label"] == f["event"]["acted"])
            assert (acted["openness"] > 0.1) == (f["event"]["moved"] >= 0.05) or acted["verb"] == "turn", f
            assert all(p["contact"] is None for p in f["parts"])
        families = [t for r in json.loads((tmp_path / split / "conversations.json").read_text()) for t in r["families"]]
        assert {"success", "past", "future", "plan"} <= set(families)
        with np.load(tmp_path / split / "dense.npz") as dense:
            opened = dense["targets"][..., 6].astype(float).max((1, 2))
        widest = [max(f["parts"], key=lambda p: p["openness"]) for f in facts]
        told = [(o, p["openness"]) for o, p in zip(opened, widest, strict=True) if p["pixels"] > 200]
        assert len(told) > 3 and np.allclose(*zip(*told, strict=True), atol=1e-3), told  # float16


def test_rare_families_are_drawn_more_often_and_skipped_ones_never(data, start):
    model = RoboMamba.from_pretrained(start)
    file = data / "train/conversations.json"
    both = Conversations(file, model.encoding, 32), Conversations(file, model.encoding, 32, skip="contact,plan,future")
    weights_ = {}
    for record, items in zip(both[0].records, both[0].items, strict=True):
        for family, item in zip(record["families"], items, strict=True):
            weights_[family] = item.weight
    tally = Counter(f for r in both[0].records for f in r["families"])
    assert all(abs(weights_[f] ** -2 - n) < 1e-6 for f, n in tally.items()) and len(tally) > 8
    kept = sum(n for f, n in tally.items() if f not in ("contact", "plan", "future"))
    assert sum(map(len, both[1].items)) == kept < tally.total()
    assert not any(len(item.numbers) == 5 for items in both[1].items for item in items)
    more = Conversations(file, model.encoding, 32, more="presence=3,count=0.5")
    for record, items, plain in zip(both[0].records, more.items, both[0].items, strict=True):
        for family, item, was in zip(record["families"], items, plain, strict=True):
            assert item.weight == pytest.approx(was.weight * {"presence": 3, "count": 0.5}.get(family, 1))


@pytest.mark.parametrize(
    "more, said", [("presence", "expected FAMILY=TIMES"), ("presense=2", "'presense' is no family")]
)
def test_a_share_of_questions_that_is_not_written_so_is_named(data, start, more, said):
    with pytest.raises(ValueError, match=said):
        Conversations(data / "train/conversations.json", RoboMamba.from_pretrained(start).encoding, 32, more=more)


def test_labels_hold_the_answer_and_the_end_and_nothing_else(data, start):
    model = RoboMamba.from_pretrained(start)
    conversations = Conversations(data / "train/conversations.json", model.encoding, 32)
    drawn = conversations.draw(np.arange(6), np.random.default_rng(0), 3, 0.3, 0.3)
    batch = conversations.collate(np.arange(6), drawn)
    assert batch.tokens.shape == batch.labels.shape and len(batch.tokens) == 18
    for ids, labels, prompt, length, numbers in zip(
        batch.tokens, batch.labels, batch.prompts, batch.lengths, batch.numbers, strict=True
    ):
        assert (labels[:prompt] == IGNORE).all() and (labels[length:] == IGNORE).all()
        assert torch.equal(labels[prompt:length], ids[prompt:length]) and ids[length - 1] == model.encoding.eot_token
        assert ids[prompt - 1] == model.encoding.encode_single_token("<|assistant|>")
        reply = ids[prompt:length].tolist()
        said = [(t - NUMBER_BASE + 0.5) / 100 for t in reply if NUMBER_BASE <= t < NUMBER_BASE + 100]
        assert torch.allclose(numbers[~numbers.isnan()], torch.tensor(said[:5]))
    packed = Conversations(data / "train/conversations.json", model.encoding, 32, turns="pack")
    assert len(packed.items[0]) == 1 and len(packed.items[0][0][0]) == sum(len(i[0]) for i in conversations.items[0])


def test_rows_of_step_visits_every_record_once_a_pass():
    rows = np.concatenate([rows_of_step(3, step, 4, 10) for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and not np.array_equal(rows[:10], rows[10:])
    assert np.array_equal(rows_of_step(3, 2, 4, 10), rows[8:12])


# ---- stages


@pytest.mark.parametrize("stage", ["vision", "align", "cotrain"])
def test_each_stage_trains_its_parts_and_leaves_the_others_bit_equal(data, start, tmp_path, stage):
    train(config(data, start, tmp_path / stage, stage=stage))
    before, after = weights(start), weights(tmp_path / stage)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(train_module.STAGES[stage])
    assert len(logged(tmp_path / stage, "loss")) == 4 and not (tmp_path / stage / "checkpoint.pt").exists()


def test_unfreeze_vision_moves_the_encoder_too_and_validates_what_it_became(data, start, tmp_path):
    changes = dict(stage="cotrain", unfreeze_vision=True, max_steps=2, val=str(data / "val"))
    train(config(data, start, tmp_path / "u", **changes))
    assert logged(tmp_path / "u", "exact.object") and not list((data / "val").glob("tokens-*"))
    before, after = weights(start), weights(tmp_path / "u")
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("vision"))


def test_a_probe_leaves_the_encoder_and_contrast_teaches_it_captions(data, start, tmp_path):
    train(config(data, start, tmp_path / "p", stage="vision", probe=True, val=str(data / "val")))
    before, after = weights(start), weights(tmp_path / "p")
    assert all(torch.equal(before[n], after[n]) for n in before) and logged(tmp_path / "p", "normal_degrees")
    train(config(data, start, tmp_path / "c", stage="vision", dense=0.0, contrast=1.0, max_steps=40, batch_size=8))
    losses = logged(tmp_path / "c", "contrast")
    assert np.mean(losses[-5:]) < 0.8 * losses[0], losses


@pytest.mark.parametrize("stage, muon", [("vision", False), ("cotrain", False), ("cotrain", True)])
def test_a_killed_run_resumes_bit_for_bit(data, start, tmp_path, monkeypatch, stage, muon):
    whole = config(data, start, tmp_path / "whole", stage=stage, max_steps=6, save_every=2, muon=muon)
    train(whole)
    killed = config(data, start, tmp_path / "killed", stage=stage, max_steps=6, save_every=2, muon=muon)
    real = train_module.stop_on_nan

    def power_cut(step, loss, named):
        if step == 5:
            raise KeyboardInterrupt
        real(step, loss, named)

    monkeypatch.setattr(train_module, "stop_on_nan", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    assert not (tmp_path / "killed/model.safetensors").exists() and (tmp_path / "killed/checkpoint.pt").exists()
    monkeypatch.setattr(train_module, "stop_on_nan", real)
    killed.resume = True
    train(killed)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert logged(tmp_path / "whole", "loss") == logged(tmp_path / "killed", "loss")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(data, start, tmp_path):
    """SIGKILL to train.py three times, at a random step plus a random delay: in a step, a validation, a save, wherever
    it hits. log_every, eval_every and save_every share no divisor: means, rows and answers must be cut right."""
    T, environment = 45, os.environ | {"OMP_NUM_THREADS": "1"}
    flags = f"--stage cotrain --data {data}/train --val {data}/val --init {start} --device cpu --resume --max-steps {T}"
    flags += (
        " --muon --batch-size 4 --warmup 2 --questions 2 --log-every 2 --save-every 5 --eval-every 7 --eval-records 4"
    )

    def launch(name: str) -> subprocess.Popen:
        command = [sys.executable, "train.py", *flags.split(), "--out", str(tmp_path / name)]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)

    def rows(name: str) -> list[tuple]:
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            return [(r["step"], r["name"], r["value"]) for r in csv.DictReader(file)]

    def last_step(name: str) -> int:
        with contextlib.suppress(OSError, IndexError, ValueError):  # no file, no row, half a row
            return int((tmp_path / name / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
        return 0

    seed = int.from_bytes(os.urandom(4), "little")
    rng, killed_at = np.random.default_rng(seed), []
    for k in range(3):
        step, process = int(rng.integers(10 * k + 2, 10 * k + 11)), launch("killed")
        while process.poll() is None and last_step("killed") < step:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        killed_at.append(step)
        assert process.wait() == -signal.SIGKILL, (seed, killed_at)
    assert not (tmp_path / "killed/model.safetensors").exists()
    assert launch("killed").wait(300) == 0 and launch("whole").wait(300) == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[n], other[n]) for n in one), (seed, killed_at)
    assert rows("whole") == rows("killed") and len(rows("whole")) > 100, (seed, killed_at)
    texts = [(tmp_path / name / "answers.md").read_text() for name in ("whole", "killed")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 2 + 3 * -(-T // 7), (seed, killed_at)
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {p.name for p in (tmp_path / "killed").iterdir()}


def test_two_processes_compute_the_losses_of_one(data, start, tmp_path):
    """The same global batch: mean loss and weights after four steps agree to rounding."""
    one = config(data, start, tmp_path / "one", stage="cotrain")
    train(one)
    flags = ["--stage", "cotrain", "--data", one.data, "--val", "", "--init", one.init, "--out", str(tmp_path / "two")]
    flags += "--device cpu --max-steps 4 --batch-size 4 --warmup 2 --questions 2 --log-every 1".split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("answer", "numbers"):
        a, b = logged(tmp_path / "one", name), logged(tmp_path / "two", name)
        assert len(a) == 4 and np.allclose(a, b, rtol=0, atol=1e-5), (name, a, b)


def test_the_model_can_learn_a_handful_of_answers_by_heart(data, start, tmp_path):
    changes = dict(stage="cotrain", max_steps=120, batch_size=2, lr=1e-2, turns="pack")
    changes |= dict(number_weight=0.0, soft_numbers=0.0, contact=0.0, grounding=0.0)
    records = json.loads((data / "train/conversations.json").read_text())[:2]
    for record in records:
        record["conversations"], record["families"] = record["conversations"][:2], record["families"][:1]
    few = data / "train/few.json"
    few.write_text(json.dumps(records))
    train(config(data, start, tmp_path / "few", **(changes | {"data": str(few)})))
    losses = logged(tmp_path / "few", "answer")
    assert losses[0] > 3 and np.mean(losses[-5:]) < 0.05, losses[-5:]
    model = RoboMamba.from_pretrained(tmp_path / "few")
    for record in records:
        question = record["conversations"][0]["value"].replace("<image>\n", "")
        assert model.generate(data / "train" / record["image"], question) == record["conversations"][1]["value"]


def test_a_nan_stops_the_run_and_names_step_and_tensor(data, start, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: loss is (nan|inf).*"):
        train(config(data, start, tmp_path / "nan", stage="cotrain", lr=1e30, warmup=1, clip=1e30, max_steps=20))
    assert not (tmp_path / "nan/model.safetensors").exists()


def test_no_weight_decay_on_a_log_d_norms_biases_embeddings(start):
    model = RoboMamba.from_pretrained(start)
    decay, rest = train_module.parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0 and len(decayed) > 10
    forbidden = ("A_log", ".D", "norm", "bias", "embedding.weight", "class_embedding", "position_embedding")
    assert not [n for n in decayed if any(f in n for f in forbidden)]
    assert "lm.backbone.layers.0.mixer.in_proj.weight" in decayed
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    wide = train_module.parameter_groups(model, 0.1, muon=True)[2]
    assert wide["orthogonal"] and {id(p) for p in wide["params"]} < {id(p) for p in decay["params"]}
    assert "lm.backbone.layers.0.mixer.in_proj.weight" in {names[id(p)] for p in wide["params"]}
    assert not [p for p in wide["params"] if p.ndim != 2 or min(p.shape) < 32]


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (64, 64)])
def test_muon_steps_along_the_orthogonal_part_of_the_momentum(shape):
    """U V^T of the gradient, scaled to a root mean square of about 0.2; and three steps equal torch's, which rounds the
    iterations to bfloat16: singular values scatter there by a hundredth, so steps of 0.01 by some 1e-4."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    U, S, V = torch.linalg.svd(train_module.Muon.orthogonal(gradients[0]), full_matrices=False)
    u, _, v = torch.linalg.svd(gradients[0], full_matrices=False)
    assert 0.6 < S.min() and S.max() < 1.3
    assert (U @ V - u @ v).abs().max() < 1e-4
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one = train_module.Muon([{"params": [ours], "orthogonal": True}], lr=0.01, weight_decay=0.05)
    other = torch.optim.Muon([torchs], lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        for p, optimizer in ((ours, one), (torchs, other)):
            p.grad = gradient.clone()
            optimizer.step()
    assert 0.01 < (ours - start).abs().max() and (ours - torchs).abs().max() < 1e-3


def test_muon_leaves_the_other_groups_to_adamw():
    torch.manual_seed(0)
    start, gradient = torch.randn(5, 7), torch.randn(5, 7)
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one = train_module.Muon([{"params": [ours], "orthogonal": False}], lr=0.01)
    other = torch.optim.AdamW([torchs], lr=0.01)
    for p, optimizer in ((ours, one), (torchs, other)):
        p.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(ours, torchs) and not torch.equal(ours, start)


def test_resuming_with_other_settings_is_refused(data, start, tmp_path, monkeypatch):
    cfg = config(data, start, tmp_path / "r", stage="cotrain", save_every=2)
    monkeypatch.setattr(train_module, "digest", lambda module: 1 / 0 if (tmp_path / "r/checkpoint.pt").exists() else 0)
    with pytest.raises(ZeroDivisionError):  # falls over after the last step, with a checkpoint of step 2 on disk
        train(cfg)
    monkeypatch.undo()
    cfg.resume, cfg.lr = True, 0.5
    with pytest.raises(ValueError, match="--lr was 0.001, now 0.5"):
        train(cfg)


def test_training_shows_what_the_model_says_and_draws_its_curves(data, start, tmp_path):
    cfg = config(data, start, tmp_path / "s", stage="cotrain", val=str(data / "val"), eval_every=2, lr=1e-4)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/answers.md").write_text("left by an earlier run")
    train(cfg)
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "s/answers.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["2"] * 3 + ["4"] * 3 and len({row[1] for row in rows}) == 3
    records = {Path(r["image"]).name: r for r in json.loads((data / "val/conversations.json").read_text())}
    model = RoboMamba.from_pretrained(tmp_path / "s")
    for _, picture, question, answer, truth in rows[3:]:
        said = [turn["value"].replace("<image>\n", "") for turn in records[picture]["conversations"]]
        assert said[said.index(question) + 1] == truth
        now = model.generate(data / "val" / records[picture]["image"], question)
        assert " ".join(now.split()).replace("|", "\\|") == answer
    with Image.open(tmp_path / "s/curves.png") as sheet:
        assert len(sheet.getcolors()) > 3  # paper, ink, grid and line


def test_curves_are_drawn_without_what_is_not_finite():
    got = draw_curves({"a": [(1, float("nan"))], "b": [(1, 2.0), (2, float("inf")), (3, 1.0)]})
    wanted = draw_curves({"a": [], "b": [(1, 2.0), (3, 1.0)]})
    assert np.array_equal(got, wanted) and len(wanted.getcolors()) > 3


# ---- stage 2


def test_stage_2_trains_the_head_only(data, start, tmp_path):
    folders = (str(start), str(data / "train"), str(data / "val"), str(tmp_path / "p"))
    cfg = PolicyConfig(*folders, device="cpu", epochs=30, batch_size=8)
    result = finetune(cfg)
    before, after = weights(start), weights(tmp_path / "p")
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("head"))
    losses = logged(tmp_path / "p", "loss")
    assert (tmp_path / "p/curves.png").exists()
    assert (
        losses[-1] < 0.7 * losses[0]
        and result["pixel_px"] > 0
        and result["head_parameters"] == sum(after[n].numel() for n in after if n.startswith("head"))
    )


def test_unfreezing_in_stage_2_moves_every_part(data, start, tmp_path):
    folders = (str(start), str(data / "train"), str(data / "val"), str(tmp_path / "u"))
    cfg = PolicyConfig(*folders, device="cpu", epochs=2, batch_size=8, samples=12, unfreeze=True, hidden=0, lr=1e-3)
    assert np.isfinite(finetune(cfg)["pixel_px"])
    before, after = weights(start), weights(tmp_path / "u")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision", "projector", "lm", "head"}


def test_random_backbone_is_another_backbone(data, start, tmp_path):
    folders = (str(start), str(data / "train"), "", str(tmp_path / "r"))
    finetune(PolicyConfig(*folders, device="cpu", seed=5, epochs=1, random_backbone=True))
    before, after = weights(start), weights(tmp_path / "r")
    assert not torch.equal(before["lm.backbone.embedding.weight"], after["lm.backbone.embedding.weight"])


def test_geodesic_is_the_angle_in_radians():
    angle = torch.tensor([0.0, 0.1, 1.0, 3.0])
    turn = torch.eye(3).repeat(4, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 1, 0], turn[:, 0, 1] = angle.sin(), -angle.sin()
    got = geodesic(torch.eye(3).expand(4, 3, 3), turn)
    assert torch.allclose(got, angle, atol=2e-3)  # the clamp by 1e-6 is worth 1.4e-3 radians at angle 0


def test_a_random_yaw_puts_a_floor_of_90_degrees_under_the_rotation_loss():
    """The paper labels suction with a random yaw. A perfect approach axis then still costs a quarter turn."""
    torch.manual_seed(0)
    approach = torch.randn(4000, 3)
    labels = [rotation_from_6d(torch.cat([approach, torch.randn(4000, 3)], 1)) for _ in range(2)]
    assert torch.allclose(labels[0][..., 2], labels[1][..., 2], atol=1e-5)
    assert abs(geodesic(*labels).rad2deg().mean() - 90) < 3  # standard error of the mean: 52 / sqrt(4000) = 0.8 degrees


# ---- flags and bad input


def test_cli_makes_a_flag_of_every_field():
    cfg = cli(TrainConfig, "x", ["--stage", "align", "--lr", "0.5", "--unfreeze-vision", "--no-resume"])
    assert (cfg.stage, cfg.lr, cfg.unfreeze_vision, cfg.resume, cfg.batch_size) == ("align", 0.5, True, False, 32)


def test_cosine_warms_up_and_comes_down():
    rates = [cosine(s, 100, 10) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 == max(rates) and 0.02 <= rates[-1] < 0.03


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stage", "both"], "--stage both: expected one of vision, align, cotrain"),
        (["--stage", "cotrain", "--data", "nowhere"], "data.build --out nowhere"),
        (["--stage", "vision", "--data", "nowhere", "--preset", "huge"], "--preset huge: expected one of tiny"),
        (["--stage", "cotrain", "--init", "nowhere"], "nowhere/config.json: no such file"),
        (["--stage", "cotrain", "--out", "/proc/none"], "cannot be written"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(data, start, tmp_path, monkeypatch, capsys, flags, message):
    base = ["train.py", "--data", str(data / "train"), "--val", "", "--out", str(tmp_path / "o"), "--init", str(start)]
    base = base if "--preset" not in flags else base[:-2]
    monkeypatch.setattr("sys.argv", base + flags)
    with pytest.raises(SystemExit) as stopped:
        train_module.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "o/model.safetensors").exists()


def test_bad_records_are_all_named_before_anything_is_trained(data, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    said = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    records = [
        {"id": "0", "image": "ok.png", "conversations": said},
        {"id": "1", "image": "../secret.png", "conversations": said},
        {"id": "2", "image": "gone.png", "conversations": said},
        {"id": "3", "conversations": said[::-1]},
        {"id": "4", "conversations": [said[0], {"from": "gpt", "value": " "}]},
    ]
    file = tmp_path / "c.json"
    file.write_text(json.dumps(records))
    with pytest.raises(ValueError) as caught:
        load_records(file)
    text = str(caught.value)
    bad = {1: "image", 2: "image", 3: "conversations[0].from", 4: "conversations[1].value"}
    assert all(f"record {i}: {field}" in text for i, field in bad.items())
    assert "record 0" not in text
    file.write_text(json.dumps([records[0], {"id": "t", "conversations": said}]))
    assert len(load_records(file)) == 2


def test_a_corrupt_manipulation_sample_is_named(data, tmp_path, monkeypatch, capsys):
    lines = (data / "train/manipulation.jsonl").read_text().splitlines()
    no_number = lines[0].replace('"u": ', '"u": "x", "w": ')
    for broken, field in (('{"image": "a.png"}', "instruction"), ("{", "JSON object"), (no_number, "'u'")):
        (tmp_path / "m.jsonl").write_text("\n".join([lines[0], broken]))
        with pytest.raises(ValueError, match=r"m.jsonl, line 2") as caught:
            load_manipulation(tmp_path / "m.jsonl")
        assert field in str(caught.value)
    with pytest.raises(ValueError, match="leaves the folder"):
        (tmp_path / "m.jsonl").write_text(lines[0].replace("images/", "../images/"))
        load_manipulation(tmp_path / "m.jsonl")
    monkeypatch.setattr("sys.argv", ["finetune_policy.py", "--checkpoint", "nowhere", "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stopped:
        finetune_policy.main()
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "o").exists()


def test_presets_can_be_built_for_training():
    for preset in ("tiny", "small"):
        assert PRESETS[preset].vision.image_size % 16 == 0
