"""The training stages and stage 2: recipes, objectives, freezing, exact resume, two processes, bad input.

pytest tests/test_train.py
"""

import csv
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mini_config
from PIL import Image
from torch import nn

import finetune_policy
import train as train_module
from common import plots, training
from common.config import PRESETS
from common.scripts import cli, end_with_parent, run_main
from common.training import Processes, Run, stop_on_nan
from data.dataset import IGNORE, Conversations, load_manipulation, visual_tokens
from data.dense import N_CATEGORIES, N_COLOURS, N_KINDS, DenseBatch, DensePictures
from data.objectives import NAMED_WEIGHTS, WEIGHTS, AnswerObjective, DenseObjective
from data.tokenizer import NUMBER_BASE, load_encoding
from finetune_policy import PolicyConfig, finetune, geodesic
from robomamba import HeadConfig, PolicyHead, RoboMamba, rotation_from_6d
from tests.toy import write_data
from train import RECIPE, TrainConfig, recipe, train

REPOSITORY = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")  # starts at once, with what is imported and patched here
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Four steps instead of thousands: everything that happens every so many steps happens here too."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    for name, value in {"WARMUP": 2, "QUESTIONS": 2, "LOG_EVERY": 1, "EVAL_RECORDS": 4}.items():
        patch.setattr(train_module, name, value)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 training and 8 validation pictures of 32 pixels."""
    root = tmp_path_factory.mktemp("data")
    write_data(root / "train", 24)
    write_data(root / "val", 8, seed=1)
    return root


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """A checkpoint folder with a miniature random model."""
    encoding = load_encoding(data / "train/vocab.tiktoken")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start") / "mini"
    RoboMamba(mini_config(encoding.n_vocab), encoding).save_pretrained(folder)
    return folder


def config(folder, start, out, stage="cotrain", **changes) -> TrainConfig:
    common = dict(data=str(folder / "train"), val="", init=str(start), out=str(out), device="cpu")
    return recipe(stage, **(common | dict(max_steps=4, lr=1e-3, muon=False, more="", batch_size=4) | changes))


def policy(folder, start, out, **changes) -> PolicyConfig:
    common = dict(checkpoint=str(start), data=str(folder / "train"), val=str(folder / "val"), out=str(out))
    return PolicyConfig(**(common | dict(device="cpu", epochs=4, batch_size=8) | changes))


def weights(folder) -> dict:
    return dict(RoboMamba.from_pretrained(folder).named_parameters())


def same(folder, other) -> bool:
    one, two = weights(folder), weights(other)
    return all(torch.equal(one[name], two[name]) for name in one)


def moved(folder, other) -> set:
    """Parts of which any weight differs."""
    one, two = weights(folder), weights(other)
    return {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}


def rows(folder) -> list[tuple]:
    """metrics.csv without the seconds."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [(int(r["step"]), r["name"], float(r["value"])) for r in csv.DictReader(file)]


def logged(folder, name) -> list[float]:
    return [value for _, key, value in rows(folder) if key == name]


def power_cut(monkeypatch, at: int):
    """The run ends in step `at`, before its weights change."""
    real = training.stop_on_nan

    def cut(step, loss, module):
        if step == at:
            raise KeyboardInterrupt
        real(step, loss, module)

    monkeypatch.setattr(train_module, "stop_on_nan", cut)
    monkeypatch.setattr(finetune_policy, "stop_on_nan", cut)


# ---- recipes and flags


def test_a_stage_alone_is_the_shipped_run():
    for stage in RECIPE:
        cfg = cli(TrainConfig, "x", ["--stage", stage], recipes=RECIPE)
        assert cfg == recipe(stage) and {k: getattr(cfg, k) for k in RECIPE[stage]} == RECIPE[stage]
    assert RECIPE["align"]["init"] == RECIPE["vision"]["out"] and RECIPE["cotrain"]["init"] == RECIPE["align"]["out"]
    argv = "--stage align --lr 0.5 --max-steps 3 --unfreeze-vision --no-resume".split()
    cfg = cli(TrainConfig, "x", argv, recipes=RECIPE)
    assert cfg == recipe("align", lr=0.5, max_steps=3, unfreeze_vision=True)


def test_flags_are_few_and_each_has_help():
    for cls in (TrainConfig, PolicyConfig):
        fields = dataclasses.fields(cls)
        assert len(fields) <= 25 and all(len(field.metadata["help"]) > 5 for field in fields)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train", "--stage both|--device gpu|--max-steps 0|--max-steps -1|--max-steps x|--batch-size 0|--turns x"),
        ("train", "--lr 0|--lr nan|--lr inf|--seed -1|--soft-numbers -1|--number-weight nan|--preset huge"),
        ("finetune_policy", "--device gpu|--batch-size 0|--samples 0|--samples -1|--hidden -1|--epochs 0|--lr inf"),
        ("finetune_policy", "--max-steps -1|--head ssm|--pool x|--seed -1|--direction-weight nan"),
    ],
)
def test_a_flag_outside_its_range_is_refused_before_any_work(script, flags, tmp_path, monkeypatch):
    module = {"train": train_module, "finetune_policy": finetune_policy}[script]
    for flag in flags.split("|"):
        monkeypatch.setattr("sys.argv", [script, *flag.split(), "--out", str(tmp_path / "o")])
        with pytest.raises(ValueError, match=flag.split()[0]):
            module.main()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data nowhere", "data.build --out nowhere"),
        ("--init nowhere", "nowhere/config.json: no such file"),
        ("--out /proc/none", "cannot be written"),
        ("--stage vision --data nowhere", "nowhere/dense.npz: cannot be read"),
        ("--more pln=3", "'pln' is no question type"),
        ("--vision-weights x", "give both, or neither"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(data, start, tmp_path, refused, flags, message):
    base = ("--data", data / "train", "--val", "", "--out", tmp_path / "o", "--init", start, "--stage", "cotrain")
    refused(message, train_module, *base, *flags.split())
    assert not (tmp_path / "o/model.safetensors").exists()


def test_ctrl_c_is_one_line_that_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_main(main, "--resume goes on from the last checkpoint")
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped; --resume goes on from the last checkpoint"


# ---- objectives


def test_the_dense_loss_of_a_model_that_says_nothing(data, start):
    """With read-outs of zero every part of the loss has a value that the targets alone give."""
    model = RoboMamba.from_pretrained(start)
    objective = DenseObjective(model)
    for layer in (objective.dense, objective.category, objective.colour):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    batch = DensePictures(data / "train", 32, model.encoding).batch(np.arange(24))
    loss, parts = objective(batch)
    expected = {
        "geometry": (0.5 + 0 + 0 + 1) / 4,  # tests/toy.py: depth 0.5, normal (0, 0, -1) on every cell of the object
        "mask": np.log(2),
        "movable": np.log(2),
        "kinds": np.log(N_KINDS),
        "openness": 0.3,
        "words": np.log(N_CATEGORIES) + np.log(N_COLOURS),
    }
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-3), name  # targets are float16
    weighted = 2 * parts["geometry"] + parts["mask"] + parts["movable"] + 0.3 * parts["kinds"] + parts["openness"]
    assert loss.item() == pytest.approx((weighted + 0.2 * parts["words"]).item(), rel=1e-6)
    only = batch._replace(cells=batch.cells._replace(movable=-torch.ones_like(batch.cells.movable)))
    only.cells.movable[0] = batch.cells.movable[0]
    assert objective(only)[1]["kinds"].item() == pytest.approx(expected["kinds"], rel=1e-3)  # not told: left out


def test_terms_of_what_a_batch_does_not_label_are_0(data, start):
    """Not nan; and the names are the same in every process, which average the list."""
    model = RoboMamba.from_pretrained(start)
    objective = DenseObjective(model, named=True)
    batch = DensePictures(data / "train", 32, model.encoding).batch(np.arange(2))
    blank = {name: -torch.ones_like(getattr(batch.cells, name)) for name in ("movable", "kind", "openness")}
    loss, parts = objective(batch._replace(named=None, cells=batch.cells._replace(**blank)))
    assert list(parts) == [*WEIGHTS, *NAMED_WEIGHTS] and loss.isfinite() and parts["geometry"] > 0
    assert all(parts[name] == 0 for name in ("movable", "kinds", "openness", *NAMED_WEIGHTS))
    loss.backward()
    assert all(p.grad is not None for p in objective.named.parameters())


def test_what_no_output_reads_is_not_trained(start, tmp_path, data):
    """A CLIP-shaped encoder skips its last block; stage vision trains the fine map, whatever --unfreeze-vision says."""
    model = RoboMamba.from_pretrained(start)
    config_ = dataclasses.replace(
        model.config.vision, n_layer=2, select_layer=-2, output_norm=False, fine=8, stem=(8, 16)
    )
    RoboMamba(dataclasses.replace(model.config, vision=config_), model.encoding).save_pretrained(tmp_path / "clip")
    for stage, fine in (("vision", True), ("cotrain", False)):
        cfg = config(data, tmp_path / "clip", tmp_path / stage, stage, unfreeze_vision=True)
        vision = train_module.set_up(cfg)[0].vision
        trained = {name.split(".weight")[0] for name, p in vision.named_parameters() if p.requires_grad}
        assert "encoder.layers.0.layer_norm1" in trained and ("fine.mixes.0" in trained) == fine
        assert not any(name.startswith(("encoder.layers.1", "post_layernorm")) for name in trained)


def test_read_outs_lie_where_their_cells_are(start):
    """The read-out of patch (r, c) fills cells 4 r .. 4 r + 3, 4 c .. 4 c + 3 of a picture of 4 x 4 patches."""
    model = RoboMamba.from_pretrained(start)
    objective = DenseObjective(model)
    tokens = torch.zeros(1, 16, 24)
    tokens[0, 6] = 1  # row 1, column 2
    nn.init.ones_(objective.dense.weight)
    nn.init.zeros_(objective.dense.bias)
    objective.vision.forward = lambda tokens, geometry, fine: tokens
    mask = objective.predict(DenseBatch(tokens, *[None] * 5))[1].mask[0]
    assert (mask[4:8, 8:12] == 24).all() and mask.sum() == 24 * 16


def test_the_answer_loss_is_the_model_s_own_and_the_auxiliary_head_s(data, start):
    """Against a computation by hand, row by row, from the logits."""
    model = RoboMamba.from_pretrained(start)
    conversations = Conversations(data / "train/conversations.json", model.encoding, 32)
    b = conversations.collate(conversations.draw(np.arange(3), np.random.default_rng(0), 2, 0.5, 0.2))
    images, owners = conversations.pictures(np.arange(3)), torch.arange(3).repeat_interleave(2)
    torch.manual_seed(0)
    objective = AnswerObjective(model, soft_numbers=1.9, number_weight=3.0)
    inputs = (images, owners, b.tokens, b.lengths, b.labels, b.prompts, b.numbers)
    loss, parts = objective(*inputs, 10.0, 4.0)
    bins = np.arange(100)
    answer = numbers = 0.0
    with torch.no_grad():
        for k in range(6):
            length, prompt = b.lengths[k], b.prompts[k]
            ids = b.tokens[k : k + 1, :length]
            logits, _, states = model(images[owners[k]][None], ids, length[None], return_states=True)
            log_p = logits[0].log_softmax(-1)
            for t in range(prompt, length):
                token = ids[0, t].item()
                if 0 <= token - NUMBER_BASE < 100:
                    soft = np.exp(-((bins - (token - NUMBER_BASE)) ** 2) / (2 * 1.9**2))
                    near = log_p[t - 1, NUMBER_BASE : NUMBER_BASE + 100]
                    answer -= (torch.from_numpy(soft / soft.sum()) * near).sum().item()
                else:
                    answer -= log_p[t - 1, token].item()
            told = b.numbers[k][~b.numbers[k].isnan()]
            said = objective.numbers(states[0, prompt - 1])[: len(told)]
            numbers += (said - (2 * told - 1)).abs().sum().item()
    assert numbers > 0 and parts["answer"].item() == pytest.approx(answer / 10, rel=1e-5)
    assert parts["numbers"].item() == pytest.approx(numbers / 4 / 2, rel=1e-5)
    assert loss.item() == pytest.approx(answer / 10 + 3 * numbers / 4, rel=1e-5)

    plain, parts = AnswerObjective(model, soft_numbers=0.0, number_weight=0.0)(*inputs, 10.0, 4.0)
    logits = model(images, b.tokens, b.lengths, owners=owners)[0][:, :-1]
    whole = F.cross_entropy(logits.flatten(0, 1), b.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    assert plain.item() == pytest.approx(whole.item() / 10, rel=1e-5) and list(parts) == ["answer"]


# ---- stages


@pytest.mark.parametrize("stage", ["vision", "align", "cotrain"])
def test_each_stage_trains_its_parts_and_leaves_the_others_bit_equal(data, start, tmp_path, stage):
    train(config(data, start, tmp_path / stage, stage))
    assert moved(start, tmp_path / stage) == set(train_module.TRAINED[stage])
    assert len(logged(tmp_path / stage, "loss")) == 4
    files = {"model.safetensors", "config.json", "vocab.tiktoken", "run.json", "metrics.csv", "curves.png"}
    assert {path.name for path in (tmp_path / stage).iterdir()} == files


def test_a_frozen_part_that_moves_is_an_error(data, start, tmp_path, monkeypatch):
    def nudge(loss, objective, *rest):
        with torch.no_grad():
            objective.model.vision.post_layernorm.bias[0] += 1e-6

    monkeypatch.setattr(train_module, "descend", nudge)
    with pytest.raises(RuntimeError, match="vision was frozen but has changed"):
        train(config(data, start, tmp_path / "o", max_steps=1))
    assert not (tmp_path / "o/model.safetensors").exists()


def test_unfreeze_vision_moves_the_encoder_too_and_validates_what_it_became(data, start, tmp_path):
    train(config(data, start, tmp_path / "u", unfreeze_vision=True, max_steps=2, val=str(data / "val")))
    assert logged(tmp_path / "u", "exact.object") and not list((data / "val").glob("tokens-*"))
    assert moved(start, tmp_path / "u") == {"vision", "projector", "lm"}


@pytest.mark.parametrize("stage, muon, at", [("vision", False, 7), ("cotrain", True, 5)])
def test_a_stopped_run_resumes_bit_for_bit(data, start, tmp_path, monkeypatch, stage, muon, at):
    """Stopped in step 7 or 5; saved, validated, logged every 2, 3, 2 steps."""
    for name, value in {"SAVE_EVERY": 2, "EVAL_EVERY": 3, "LOG_EVERY": 2}.items():
        monkeypatch.setattr(train_module, name, value)
    changes = dict(max_steps=9, lr=1e-3, muon=muon, val=str(data / "val"))
    train(config(data, start, tmp_path / "whole", stage, **changes))
    stopped = config(data, start, tmp_path / "stopped", stage, **changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        power_cut(patch, at)
        train(stopped)
    assert (tmp_path / "stopped/checkpoint.pt").exists() and not (tmp_path / "stopped/model.safetensors").exists()
    with open(tmp_path / "stopped/metrics.csv", "a") as file:
        file.write(f"{at},1.0,lo")  # half a row
    (tmp_path / "stopped/checkpoint.pt.tmp1").write_text("left by a kill")

    before = (tmp_path / "stopped/run.json").read_text()
    other = dataclasses.replace(stopped, resume=True, lr=0.5)
    with pytest.raises(ValueError, match="--lr was .*0.001.* now .*0.5.*name another --out"):
        train(other)
    assert (tmp_path / "stopped/run.json").read_text() == before

    train(dataclasses.replace(stopped, resume=True))
    assert same(tmp_path / "whole", tmp_path / "stopped") and rows(tmp_path / "whole") == rows(tmp_path / "stopped")
    files = [{p.name: p for p in (tmp_path / name).iterdir()} for name in ("whole", "stopped")]
    assert files[0].keys() == files[1].keys()
    if stage == "cotrain":
        assert files[0]["answers.md"].read_text() == files[1]["answers.md"].read_text()
    train(dataclasses.replace(stopped, resume=True))  # finished: nothing to do
    assert same(tmp_path / "whole", tmp_path / "stopped")


def test_batches_made_in_advance_are_the_same(data, start, tmp_path):
    for stage in ("vision", "cotrain"):
        for workers in (0, 2):
            out = tmp_path / f"{stage}{workers}"
            cache = tmp_path / f"cache{workers}"  # the visual tokens are read in advance too
            cache.mkdir(exist_ok=True)
            train(config(data, start, out, stage, val=str(data / "val"), workers=workers, cache=str(cache)))
        assert same(tmp_path / f"{stage}0", tmp_path / f"{stage}2")
        assert rows(tmp_path / f"{stage}0") == rows(tmp_path / f"{stage}2")


def test_workers_are_refused_where_processes_do_not_fork(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ValueError, match="--workers 2: this system does not fork"):
        Processes("cpu", workers=2)


def test_a_batch_that_fails_in_a_worker_is_one_error():
    def fail(n):
        raise ValueError(f"{n}.png: cannot be read")

    with pytest.raises(ValueError, match="^0.png: cannot be read$"):
        list(Processes("cpu", workers=2).ahead(fail, range(3)))


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(data, start, tmp_path, monkeypatch):
    """SIGKILL three times, at a random step plus a random delay: in a step, a validation, a save, wherever it hits."""
    for name, value in {"SAVE_EVERY": 5, "EVAL_EVERY": 7, "LOG_EVERY": 2}.items():
        monkeypatch.setattr(train_module, name, value)
    cfg = config(data, start, tmp_path / "killed", muon=True, max_steps=33, val=str(data / "val"), resume=True)
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    for k in range(3):
        at = int(rng.integers(9 * k + 2, 9 * k + 11))
        process = FORK.Process(target=train, args=(cfg,))
        process.start()
        while process.is_alive() and last_step(tmp_path / "killed") < at:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, seed
    assert not (tmp_path / "killed/model.safetensors").exists()
    train(cfg)
    train(dataclasses.replace(cfg, out=str(tmp_path / "whole")))
    assert same(tmp_path / "whole", tmp_path / "killed"), seed
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed") and len(rows(tmp_path / "whole")) > 50, seed
    texts = [(tmp_path / name / "answers.md").read_text() for name in ("whole", "killed")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 2 + 3 * 5, seed
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {p.name for p in (tmp_path / "killed").iterdir()}


def last_step(folder) -> int:
    """The last whole row of a metrics.csv that somebody may be writing; 0 while there is none."""
    file = folder / "metrics.csv"
    lines = file.read_text().splitlines()[1:] if file.exists() else []
    return max([0, *(int(line.split(",")[0]) for line in lines if line.count(",") == 3)])


def test_two_processes_compute_the_losses_of_one(data, start, tmp_path):
    """The same global batch: mean loss of each of four steps agrees to rounding; the cache is shared work."""
    train(config(data, start, tmp_path / "one"))
    cfg = config(data, start, tmp_path / "two", cache=str(tmp_path / "cache"))
    script = tmp_path / "two.py"
    settings = "train.WARMUP, train.QUESTIONS, train.LOG_EVERY = 2, 2, 1"
    script.write_text(f"import train\n{settings}\ntrain.train(train.TrainConfig(**{dataclasses.asdict(cfg)}))\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = ONE_THREAD | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("answer", "numbers"):
        a, b = logged(tmp_path / "one", name), logged(tmp_path / "two", name)
        assert len(a) == 4 and np.allclose(a, b, rtol=0, atol=1e-5), (name, a, b)
    (mine,) = (data / "train").glob("tokens-*")
    (theirs,) = (tmp_path / "cache").glob("tokens-*")
    assert np.abs(np.load(mine).astype(float) - np.load(theirs)).max() < 2e-3 and mine.name == theirs.name


def test_a_rank_ends_with_its_launcher(tmp_path):
    """kill -9 of the parent; the child, which would sleep for a minute, is gone within seconds."""
    child = f"import time; from common.scripts import {end_with_parent.__name__} as e; e(); print('up', flush=True)"
    child += "; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True)"
    code += "; p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    said = {parent.stdout.readline().strip() for _ in range(2)}
    pid = int((said - {"up"}).pop())
    os.kill(pid, 0)  # alive
    killed_and_gone(parent)


def killed_and_gone(parent: subprocess.Popen) -> None:
    """kill -9. The pipe closes when its last writer, the child, is gone, which would sleep for a minute."""
    parent.kill()
    start = time.monotonic()
    assert parent.stdout.read() == "" and time.monotonic() - start < 30


def test_a_worker_that_starts_after_its_parent_was_killed_ends_too(tmp_path):
    (tmp_path / "late.py").write_text("""
import multiprocessing, time
from common.scripts import end_with_parent
def late():
    print("up", flush=True)
    time.sleep(1)
    end_with_parent()
    time.sleep(60)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=late).start()
    time.sleep(60)
""")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, tmp_path / "late.py"]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "up\n"
    killed_and_gone(parent)


def test_the_model_can_learn_a_handful_of_answers_by_heart(data, start, tmp_path):
    changes = dict(max_steps=80, batch_size=2, lr=1e-2, turns="pack", number_weight=0.0, soft_numbers=0.0)
    records = json.loads((data / "train/conversations.json").read_text())[:2]
    for record in records:
        record["conversations"] = record["conversations"][2:4]
        record["families"] = record["families"][1:2]
    few = data / "train/few.json"
    few.write_text(json.dumps(records))
    train(config(data, start, tmp_path / "few", **(changes | {"data": str(few)})))
    losses = logged(tmp_path / "few", "answer")
    assert losses[0] > 3 and np.mean(losses[-5:]) < 0.05, losses[-5:]
    model = RoboMamba.from_pretrained(tmp_path / "few")
    for record in records:
        question = record["conversations"][0]["value"].replace("<image>\n", "")
        assert model.generate(data / "train" / record["image"], question) == record["conversations"][1]["value"]


def test_a_nan_stops_the_run_and_names_step_and_tensor(data, start, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match=r"step \d+: loss is (nan|inf); first bad tensor model\."):
        monkeypatch.setattr(train_module, "CLIP", 1e30)
        train(config(data, start, tmp_path / "nan", lr=1e30, max_steps=20))
    assert not (tmp_path / "nan/model.safetensors").exists()

    model = RoboMamba.from_pretrained(start)
    with torch.no_grad():
        model.vision.post_layernorm.weight[3] = float("nan")  # frozen in this stage
    monkeypatch.setattr(train_module, "start_model", lambda *_: model)
    with pytest.raises(FloatingPointError, match="step 0: .* first bad tensor model.vision.post_layernorm.weight"):
        train(config(data, start, tmp_path / "nan"))
    with pytest.raises(FloatingPointError, match="step 3: loss is nan; all parameters are finite"):
        stop_on_nan(3, torch.tensor(float("nan")), nn.Linear(2, 2))
    stop_on_nan(3, torch.tensor(1.0), model)


def test_training_shows_what_the_model_says_and_draws_its_curves(data, start, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "EVAL_EVERY", 2)
    cfg = config(data, start, tmp_path / "s", val=str(data / "val"), lr=1e-4)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/answers.md").write_text("left by an earlier run")
    (tmp_path / "s/metrics.csv").write_text("left,by,an,earlier\n")
    train(cfg)
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "s/answers.md").read_text().splitlines()[2:]]
    assert [line[0] for line in lines] == ["2"] * 3 + ["4"] * 3 and len({line[1] for line in lines}) == 3
    records = {Path(r["image"]).name: r for r in json.loads((data / "val/conversations.json").read_text())}
    model = RoboMamba.from_pretrained(tmp_path / "s")
    for _, picture, question, answer, truth in lines[3:]:
        said = [turn["value"].replace("<image>\n", "") for turn in records[picture]["conversations"]]
        assert said[said.index(question) + 1] == truth
        now = model.generate(data / "val" / records[picture]["image"], question)
        assert " ".join(now.split()).replace("|", "\\|") == answer
    names = {name for _, name, _ in rows(tmp_path / "s")}
    assert {"loss", "answer", "numbers", "exact.plan", "blank.plan"} <= names
    with Image.open(tmp_path / "s/curves.png") as sheet:
        assert sheet.width > 100


# ---- one run in a folder


def test_a_second_run_in_a_folder_says_so_and_stops(data, start, tmp_path):
    cfg = config(data, start, tmp_path / "o", max_steps=1)
    ready = FORK.Event()

    def hold():
        with Run(cfg, Processes("cpu"), 1):
            ready.set()
            time.sleep(60)

    first = FORK.Process(target=hold)
    first.start()
    assert ready.wait(20)
    with pytest.raises(ValueError, match=f"--out {re.escape(cfg.out)}: process {first.pid} is training into it"):
        train(cfg)
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"run.lock"}
    first.kill()  # without a chance to tidy up
    first.join()
    train(cfg)
    assert (tmp_path / "o/model.safetensors").exists() and not (tmp_path / "o/run.lock").exists()


def test_a_failed_command_leaves_a_finished_run_as_it_is(data, start, tmp_path):
    train(config(data, start, tmp_path / "o", "align", max_steps=1))
    finetune(policy(data, start, tmp_path / "p", epochs=1, val=""))
    files = {p: p.read_bytes() for name in "op" for p in (tmp_path / name).iterdir()}
    with pytest.raises(ValueError):
        train(config(data, start, tmp_path / "o", data="nowhere"))
    with pytest.raises(ValueError):
        train(config(data, start, tmp_path / "o", "vision", val="nowhere"))
    with pytest.raises(ValueError):
        train(config(data, start, tmp_path / "o", "vision", more="no term of the loss=1"))
    with pytest.raises(ValueError):
        finetune(policy(data, start, tmp_path / "p", val="nowhere"))
    assert files == {p: p.read_bytes() for name in "op" for p in (tmp_path / name).iterdir()}


def test_a_full_disk_and_a_damaged_checkpoint_are_one_error(data, start, tmp_path):
    cfg = config(data, start, tmp_path / "o", resume=True)
    with Run(cfg, Processes("cpu"), 4) as run:
        run.begin()
        (run.out / "metrics.csv").unlink()
        (run.out / "metrics.csv").symlink_to("/dev/full")
        with pytest.raises(ValueError, match="metrics.csv: cannot be written .No space left on device"):
            run.write(1, loss=1.0)
        (run.out / "metrics.csv").unlink()
        run.save(1, [nn.Linear(2, 2)], torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    whole = (tmp_path / "o/checkpoint.pt").read_bytes()
    for content in (b"", whole[:50], whole[: len(whole) // 2], b"{}"):
        (tmp_path / "o/checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.pt: cannot be read .*remove it"):
            train(cfg)


def test_curves_are_drawn_without_what_is_not_finite(tmp_path, monkeypatch, capsys):
    inf, nan = float("inf"), float("nan")
    got = plots.draw_lines({"a": {"a": [(1, nan)]}, "b": {"b": [(1, 2.0), (2, inf), (3, 1.0)]}}, log_x=False)
    wanted = plots.draw_lines({"a": {"a": []}, "b": {"b": [(1, 2.0), (3, 1.0)]}}, log_x=False)
    assert np.array_equal(got, wanted) and len(np.unique(wanted)) > 3
    (tmp_path / "metrics.csv").write_text("step,seconds,name,value\n1,0.1,loss,2.5\n2,0.2,loss,nan\n")
    assert plots.draw_curves_file(tmp_path / "metrics.csv", tmp_path / "curves.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    assert not plots.draw_curves_file(tmp_path / "metrics.csv", tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists() and "pip install matplotlib" in capsys.readouterr().out


# ---- stage 2


def test_stage_2_trains_the_head_only(data, start, tmp_path):
    result = finetune(policy(data, start, tmp_path / "p", epochs=30))
    assert moved(start, tmp_path / "p") == {"head"}
    losses = logged(tmp_path / "p", "loss")
    assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]
    assert len(logged(tmp_path / "p", "pixel_px")) == 6 and (tmp_path / "p/curves.png").exists()
    assert result["head_parameters"] == sum(p.numel() for n, p in weights(tmp_path / "p").items() if "head." in n[:5])
    keys = "pixel_px approach_degrees rotation_degrees head_parameters head_share samples read_seconds seconds"
    assert list(json.loads((tmp_path / "p/policy.json").read_text())) == keys.split()


@pytest.mark.parametrize("unfreeze", [False, True])
def test_stage_2_resumes_bit_for_bit(data, start, tmp_path, monkeypatch, unfreeze):
    changes = dict(unfreeze=unfreeze, samples=12, epochs=3, max_steps=5)  # 2 steps an epoch
    whole = finetune(policy(data, start, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        power_cut(patch, 3)
        finetune(policy(data, start, tmp_path / "cut", **changes))
    assert not (tmp_path / "cut/model.safetensors").exists()
    result = finetune(policy(data, start, tmp_path / "cut", **changes, resume=True))
    assert same(tmp_path / "whole", tmp_path / "cut") and rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert [step for step, name, _ in rows(tmp_path / "cut") if name == "loss"] == [2, 4, 5]
    assert result["pixel_px"] == whole["pixel_px"]
    assert moved(start, tmp_path / "cut") == ({"vision", "projector", "lm", "head"} if unfreeze else {"head"})
    assert finetune(policy(data, start, tmp_path / "cut", **changes, resume=True)) == {}


def test_a_new_head_starts_at_the_mean_of_the_states():
    """Far from the origin, as the states are, every hidden unit still passes some samples and not others."""
    torch.manual_seed(0)
    states = torch.randn(200, 16) + 3
    head = PolicyHead(HeadConfig(hidden=(8,)), 16)
    finetune_policy.centre(head, finetune_policy.Samples(lambda rows: states[rows], torch.zeros(200, 2), None))
    for mlp in head.mlps:
        passed = (mlp[0](states) > 0).float().mean(0)
        assert ((0.2 < passed) & (passed < 0.8)).all(), passed


def test_stage_2_goes_on_with_the_old_head_or_another_backbone(data, start, tmp_path):
    finetune(policy(data, start, tmp_path / "k", keep_head=True, epochs=1, lr=1e-9, pool="mean", hidden=3, val=""))
    old, kept = weights(start), weights(tmp_path / "k")
    assert RoboMamba.from_pretrained(tmp_path / "k").config.head == RoboMamba.from_pretrained(start).config.head
    assert all((old[name] - kept[name]).abs().max() < 1e-7 for name in old)
    finetune(policy(data, start, tmp_path / "r", random_backbone=True, epochs=1, seed=5, val=""))
    assert moved(start, tmp_path / "r") == {"vision", "projector", "lm", "head"}
    untrained = RoboMamba.from_pretrained(tmp_path / "r").lm.backbone
    assert all((norm.weight == 1).all() for norm in [untrained.norm_f, *(block.norm for block in untrained.layers)])


def test_states_are_the_same_in_batches_of_any_size(data, start):
    """Other batches have other padding, and other samples that share a picture."""
    model = RoboMamba.from_pretrained(start)
    samples = load_manipulation(data / "train/manipulation.jsonl")[:6]
    samples += [samples[0] | {"instruction": "open the very long and heavy drawer"}]
    names, owners = np.unique([s["image"] for s in samples], return_inverse=True)
    tokens = visual_tokens(model.vision, data / "train", list(names), Processes("cpu"))
    many, few, one = (finetune_policy.pooled_states(model, tokens, samples, owners, batch=n) for n in (7, 2, 1))
    direct = finetune_policy.read_states(model, str(data / "train"), samples, torch.arange(7))
    assert many.shape == (7, 32) and not torch.allclose(many[0], many[6], atol=1e-3)
    scale = many.abs().max()
    assert (few - many).abs().max() < 1e-5 * scale and (one - many).abs().max() < 1e-5 * scale
    assert (direct - many).abs().max() < 5e-3 * scale  # cached tokens are float16


def test_stage_2_refuses_torchrun_in_one_line(data, start, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        finetune(policy(data, start, tmp_path / "p"))
    assert not (tmp_path / "p").exists()


def test_pixels_are_fractions_of_the_picture_they_were_marked_in():
    sample = {"u": 96, "v": 10, "size": (128, 40), "rotation6d": [0, 0, 1, 1, 0, 0]}
    pixel, rotation = finetune_policy.targets([sample], "cpu")
    assert pixel.tolist() == [[0.5, -0.5]] and rotation[0, :, 2].tolist() == [0, 0, 1]


def test_geodesic_is_the_angle_in_radians():
    angle = torch.tensor([0.0, 0.1, 1.0, 3.0])
    turn = torch.eye(3).repeat(4, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 1, 0], turn[:, 0, 1] = angle.sin(), -angle.sin()
    got = geodesic(torch.eye(3).expand(4, 3, 3), turn)
    assert torch.allclose(got, angle, atol=2e-3)  # the clamp by 1e-6 is worth 1.4e-3 radians at angle 0


def test_a_random_yaw_costs_90_degrees_of_the_rotation_loss():
    """The paper labels suction with a random yaw. A perfect approach axis then still costs a quarter turn."""
    torch.manual_seed(0)
    approach = torch.randn(4000, 3)
    labels = [rotation_from_6d(torch.cat([approach, torch.randn(4000, 3)], 1)) for _ in range(2)]
    assert torch.allclose(labels[0][..., 2], labels[1][..., 2], atol=1e-5)
    assert abs(geodesic(*labels).rad2deg().mean() - 90) < 3  # standard error of the mean: 52 / sqrt(4000) = 0.8 degrees


def test_presets_can_be_built_for_training():
    for preset in ("tiny", "small"):
        assert PRESETS[preset].vision.image_size % 16 == 0
