"""The Transformer of the same size, the SSM head, reading on from a state, and the speed comparison.

pytest tests/test_speed.py
"""

import dataclasses
import functools
import json
import types

import pytest
import torch
from PIL import Image

import sim_eval
from common.report import SPEED_ROWS, speed_table
from data.prompts import contact_question
from extras import speed
from extras.costs import memory
from extras.transformer import append
from robomamba import PRESETS, HeadConfig, MambaLM, PolicyHead, RoboMamba, RoboMambaConfig, count
from sim_eval import model_policy
from tests.test_model import close, uint8_picture
from tests.test_train import data, start, weights  # noqa: F401  (two fixtures: a data folder, a random checkpoint)


@pytest.fixture
def twin(mini):
    """Of four Mamba blocks, so with two attention blocks."""
    torch.manual_seed(1)
    lm = dataclasses.replace(mini.config.lm, n_layer=4)
    return speed.twin(RoboMamba(dataclasses.replace(mini.config, lm=lm), mini.encoding))


# ---- the Transformer of the same size


def test_the_transformer_has_the_parameters_of_the_mamba():
    for name in ("tiny", "mamba-130m", "robomamba-2.8b"):
        with torch.device("meta"):
            ours, theirs = (
                count(MambaLM(dataclasses.replace(PRESETS[name].lm, n_layer=4, mixer=mixer)).backbone.layers)
                for mixer in ("mamba", "attention")
            )
        assert abs(theirs / ours - 1) < 0.002, name  # the MLP's width is a multiple of 8


@torch.no_grad()
def test_transformer_step_equals_forward(twin):
    x = torch.randn(2, 17, 32)
    whole, last = twin.lm.backbone(x)
    h, states = twin.lm.backbone(x[:, :1])
    steps = [h[:, 0]]
    for t in range(1, 17):
        h, states = twin.lm.backbone.step(x[:, t], states)
        steps.append(h)
    close(torch.stack(steps, 1), whole)
    close(states[1].keys, last[1].keys)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 8, 16])
def test_any_split_of_a_sequence_gives_the_transformer_s_output(twin, cut):
    x = torch.randn(2, 17, 32)
    a, states = twin.lm.backbone(x[:, :cut])
    b, states = twin.lm.backbone(x[:, cut:], states)
    close(torch.cat([a, b], 1), twin.lm.backbone(x)[0])


@torch.no_grad()
def test_transformer_is_causal_and_its_order_matters(twin):
    tokens = torch.randint(0, 300, (1, 12))
    changed = tokens.clone()
    changed[0, 7] += 1
    a, b = twin.lm(tokens), twin.lm(changed)
    close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7], b[:, 7], atol=1e-4)
    swapped = tokens[:, [1, 0, *range(2, 12)]]  # no position code: only the mask of the second block tells
    assert not torch.allclose(twin.lm(swapped)[:, -1], a[:, -1], atol=1e-6)


@torch.no_grad()
def test_two_sequences_that_step_from_one_state_do_not_disturb_each_other(twin):
    backbone, x = twin.lm.backbone, torch.randn(1, 5, 32)
    one = backbone.step(x[:, 3], backbone(x[:, :3])[1])[1]  # has room behind its end
    mine = backbone.step(x[:, 4], one)[1]
    backbone.step(torch.randn(1, 32), one)  # another one goes on from the same state
    again = backbone(x)[1]
    close(mine[1].keys, again[1].keys)
    close(mine[1].values, again[1].values)
    past, new = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 1, 8)
    once = append(past, new)
    assert append(once, new).data_ptr() == once.data_ptr()  # written behind it, not copied
    assert append(once, new).data_ptr() != once.data_ptr()  # there is something already


@torch.no_grad()
def test_the_transformer_acts_answers_branches_and_is_saved(twin, picture, tmp_path):
    pictures, tokens = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 300, (6, 5))
    alone = torch.cat([twin.hidden(pictures[i // 3 : i // 3 + 1], tokens[i : i + 1]) for i in range(6)])
    close(twin.hidden(pictures, tokens), alone)
    ids = twin.prompt("open the top drawer")
    for _ in range(6):
        logits, _ = twin(uint8_picture(picture), torch.tensor([ids]), torch.tensor([len(ids)]))
        ids.append(int(logits[0, -1].argmax()))
    answer, end = ids[len(twin.prompt("open the top drawer")) :], twin.encoding.eot_token
    answer = answer[: answer.index(end)] if end in answer else answer
    assert twin.generate(picture, "open the top drawer", 6) == twin.encoding.decode(answer).strip()
    twin.save_pretrained(tmp_path / "t")
    again = RoboMamba.from_pretrained(tmp_path / "t")
    assert again.config.lm.mixer == "attention"
    assert again.predict_action(picture, "open").u == twin.predict_action(picture, "open").u
    told = memory(twin)
    assert told["state"] == 0
    states = twin.to(torch.bfloat16).look(pictures[:1])
    assert told["cache"] * 16 == sum(t.numel() * t.element_size() for state in states for t in state)


def test_mixer_names(mini, twin, tmp_path):
    values = mini.config.to_dict()
    del values["lm"]["mixer"]  # a config.json from before there was a choice
    assert RoboMambaConfig.from_dict(values) == mini.config
    values["lm"]["mixer"] = "rwkv"
    with pytest.raises(ValueError, match="lm.mixer: 'rwkv' is unknown"):
        RoboMambaConfig.from_dict(values)
    with pytest.raises(ValueError, match="mixer: attention"):
        twin.lm.save_pretrained(tmp_path / "m")


# ---- reading on


@torch.no_grad()
@pytest.mark.parametrize("which", ["mini", "twin"])
def test_reading_on_from_a_state_equals_reading_all_of_it(which, request):
    model = request.getfixturevalue(which)
    pictures, tokens = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 300, (1, 9))
    backbone, P = model.lm.backbone, 16
    first = backbone(backbone.embedding(tokens), model.look(pictures[:1]))[1]
    on, _ = model.read(pictures[1:], tokens[:, :4], states=first)
    shown = []
    handle = backbone.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    for b in range(2):
        model.look(pictures[b : b + 1])
    handle.remove()
    words = backbone.embedding(tokens)
    whole = backbone(torch.cat([shown[0], words, shown[1], words[:, :4]], 1))[0]
    assert whole.shape[1] == 2 * P + 13
    close(on, whole[:, -4:])


def test_a_memory_is_gone_on_from(mini, picture):
    other, memory = picture[::-1].copy(), []
    first, second = (mini.predict_action(p, "open", memory) for p in (picture, other))
    fresh = [mini.predict_action(p, "open") for p in (picture, other)]
    assert first.u == fresh[0].u and second.u != fresh[1].u
    ids = torch.tensor([mini.prompt(contact_question("open"))])
    with torch.no_grad():
        states = mini.read(uint8_picture(picture), ids)[1]
        states = mini.read(uint8_picture(other), ids, states=states)[1]
    for kept, wanted in zip(memory, states, strict=True):
        close(kept.ssm, wanted.ssm)


def test_the_carried_policy_forgets_with_the_scene_and_keeps_sentences_apart(mini, picture, tmp_path):
    mini.save_pretrained(tmp_path / "m")
    policy, fresh = model_policy(tmp_path / "m", carried=True)[0], model_policy(tmp_path / "m")[0]
    one, other = (types.SimpleNamespace(category="Box", seed=seed, rgb=picture) for seed in (1, 2))
    said = fresh(one, "open", 0, None)[0]
    assert policy(one, "open", 0, None)[0] == said
    assert policy(one, "close", 0, None)[0] == fresh(one, "close", 0, None)[0]
    assert policy(one, "open", 0, None)[0] != said  # it has seen this one before
    assert policy(other, "open", 0, None)[0] == said


# ---- the head with SSM blocks


@pytest.fixture
def ssm(mini):
    config = dataclasses.replace(mini.config, head=HeadConfig("ssm", (32,)))
    torch.manual_seed(0)
    return RoboMamba(config, mini.encoding).eval()


@torch.no_grad()
def test_padding_does_not_change_what_the_ssm_head_says(ssm):
    pictures, tokens = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 300, (1, 9))
    short = ssm.head(ssm.pooled(pictures, tokens[:, :6], torch.tensor([6])))
    padded = ssm.head(ssm.pooled(pictures, tokens, torch.tensor([6])))
    longer = ssm.head(ssm.pooled(pictures, tokens, torch.tensor([9])))
    for a, b, c in zip(padded, short, longer, strict=True):
        close(a, b)
        assert not torch.allclose(a, c, atol=1e-4)


@torch.no_grad()
def test_the_ssm_head_is_saved_and_runs_in_16_bits(ssm, picture, tmp_path):
    wanted = ssm.predict_action(picture, "open the drawer")
    ssm.save_pretrained(tmp_path / "m")
    again = RoboMamba.from_pretrained(tmp_path / "m")
    assert again.config.head.kind == "ssm" and again.predict_action(picture, "open the drawer").u == wanted.u
    half = again.to(torch.bfloat16).predict_action(picture, "open the drawer")
    assert abs(half.u - wanted.u) < 1 and abs(half.v - wanted.v) < 1  # of 32 pixels
    assert count(PolicyHead(HeadConfig("ssm"), 192)) == 2 * (192 * (3 * 192 + 4 + 2 * 12 + 3 * 8 + 3) + 192) + 3152


# ---- the comparison


def test_speed_writes_its_tables_and_figure(mini, tmp_path, monkeypatch, capsys):
    mini.save_pretrained(tmp_path / "m")
    small = functools.partial(speed.run, lengths=(8, 40), seconds=0.02)
    monkeypatch.setattr(speed, "run", small)
    flags = ["--speed", "--checkpoint", str(tmp_path / "m"), "--out", str(tmp_path / "o")]
    threads = torch.get_num_threads()
    assert sim_eval.main(flags) == 0 and torch.get_num_threads() == threads
    results = json.loads((tmp_path / "o/speed.json").read_text())
    assert {"command", "commit", "hardware", "versions", "checkpoint", "seconds"} <= results.keys()
    assert results["tokens"]["text"] >= 10  # nine and the end; more with the miniature's few words
    rows = results["devices"]["CPU, one thread"]
    assert rows["predictions"].keys() == SPEED_ROWS.keys()
    for times in rows["predictions"].values():
        for t in times.values():
            assert t["calls"] >= 5 and 0 < t["quartiles"][0] <= t["ms"] <= t["quartiles"][1]
    mamba, attention = ([row[name]["state_bytes"] for row in rows["contexts"]] for name in ("mamba", "attention"))
    assert mamba[0] == mamba[1] == 2 * 4 * (3 * 64 + 64 * 4)  # blocks, bytes, convolution inputs and h
    assert attention == [1 * 4 * 2 * 32 * n for n in (8, 40)]  # block, bytes, keys and values, width, tokens
    text = speed_table(results)
    assert text in capsys.readouterr().out and text in (tmp_path / "o/speed.md").read_text()
    assert "| 40 | " in text and "1.1" in (tmp_path / "o/speed.md").read_text()
    with Image.open(tmp_path / "o/speed.png") as figure:
        assert figure.size == (900, 170)
    assert sim_eval.main([*flags[:2], "nowhere", *flags[3:]]) == 2
    assert "nowhere/config.json: no such file" in capsys.readouterr().err


@torch.no_grad()
def test_spelling_reads_as_many_tokens_as_it_is_told(mini):
    subject, calls = speed.Subject(mini, torch.device("cpu")), []
    real = mini.lm.backbone.step
    mini.lm.backbone.step = lambda x, states: calls.append(1) or real(x, states)
    subject.text()
    assert len(calls) == subject.answer - 1
