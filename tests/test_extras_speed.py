"""pytest tests/test_extras_speed.py

The Transformer of the same size, going on from a state, and the speed comparison.
"""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from common.config import PRESETS
from common.weights import count
from extras import speed
from extras.speed import SPEED_ROWS, speed_table
from extras.transformer import append, parameter_matched, transformer_blocks
from robomamba import MambaLM, RoboMamba


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def transformer(mini):
    """Of four Mamba blocks, so with two attention blocks."""
    torch.manual_seed(1)
    lm = dataclasses.replace(mini.config.lm, n_layer=4)
    return parameter_matched(RoboMamba(dataclasses.replace(mini.config, lm=lm), mini.encoding))


# ---- the Transformer of the same size


def test_the_transformer_has_the_parameters_of_the_mamba():
    for name in ("tiny", "mamba-130m", "robomamba-2.8b"):
        lm = dataclasses.replace(PRESETS[name].lm, n_layer=4)
        with torch.device("meta"):
            ours = count(MambaLM(lm).backbone.layers)
            theirs = count(transformer_blocks(lm))
        assert abs(theirs / ours - 1) < 0.002, name  # the MLP's width is a multiple of 8


@torch.no_grad()
def test_transformer_step_equals_forward_at_any_split(transformer):
    backbone, x = transformer.lm.backbone, torch.randn(2, 17, 32)
    whole, last = backbone(x)
    h, states = backbone(x[:, :1])
    steps = [h[:, 0]]
    for t in range(1, 17):
        h, states = backbone.step(x[:, t], states)
        steps.append(h)
    close(torch.stack(steps, 1), whole)
    close(states[1].keys, last[1].keys)
    for cut in (2, 8, 16):
        a, states = backbone(x[:, :cut])
        b, _ = backbone(x[:, cut:], states)
        close(torch.cat([a, b], 1), whole)


@torch.no_grad()
def test_transformer_is_causal_and_its_order_matters(transformer):
    tokens = torch.randint(0, 300, (1, 12))
    changed = tokens.clone()
    changed[0, 7] += 1
    a, b = transformer.lm(tokens), transformer.lm(changed)
    close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7], b[:, 7], atol=1e-4)
    swapped = tokens[:, [1, 0, *range(2, 12)]]  # no position code: only the mask of the second block tells
    assert not torch.allclose(transformer.lm(swapped)[:, -1], a[:, -1], atol=1e-6)


@torch.no_grad()
def test_two_sequences_that_step_from_one_state_do_not_disturb_each_other(transformer):
    backbone, x = transformer.lm.backbone, torch.randn(1, 5, 32)
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
def test_the_transformer_acts_and_answers(transformer, picture):
    ids = transformer.prompt("open the top drawer")
    start = len(ids)
    for _ in range(6):
        logits, _ = transformer(transformer.image_tensor(picture), torch.tensor([ids]), torch.tensor([len(ids)]))
        ids.append(int(logits[0, -1].argmax()))
    answer, end = ids[start:], transformer.encoding.eot_token
    answer = answer[: answer.index(end)] if end in answer else answer
    assert transformer.generate(picture, "open the top drawer", 6) == transformer.encoding.decode(answer).strip()
    assert 0 <= transformer.predict_action(picture, "open").u <= 32


# ---- the comparison


@torch.no_grad()
@pytest.mark.parametrize("which", ["mini", "transformer"])
def test_going_on_from_a_state_equals_reading_all_of_it_again(which, request):
    model = request.getfixturevalue(which)
    subject, seen = speed.Subject(model, torch.device("cpu")), []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    subject.head()
    subject.head(subject.past_states)
    whole, _ = subject.backbone(torch.cat([subject.past, model.sequence(subject.picture, subject.ids)], 1))
    close(seen[1], model.pool(whole[:, -subject.ids.shape[1] :], torch.tensor([subject.ids.shape[1]])))
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)


@torch.no_grad()
def test_spelling_reads_as_many_tokens_as_it_is_told(mini):
    subject, calls = speed.Subject(mini, torch.device("cpu")), []
    real = mini.lm.backbone.step
    mini.lm.backbone.step = lambda x, states: calls.append(1) or real(x, states)
    subject.text()
    assert len(calls) == subject.answer - 1


def test_speed_writes_its_tables_and_figure(mini, tmp_path, capsys, monkeypatch):
    mini.save_pretrained(tmp_path / "m")
    monkeypatch.setattr(speed, "LENGTHS", (8, 64, 4096))
    threads = torch.get_num_threads()
    flags = ["--seconds", "0.02", "--longest", "64"]
    speed.main(["--checkpoint", str(tmp_path / "m"), "--out", str(tmp_path / "o"), *flags])
    assert torch.get_num_threads() == threads
    results = json.loads((tmp_path / "o/speed.json").read_text())
    assert {"command", "commit", "hardware", "versions", "checkpoint", "seconds"} <= results.keys()
    assert results["command"].startswith("python -m extras.speed --checkpoint")
    assert results["tokens"]["text"] >= 10  # nine and the end; more with the miniature's few words
    rows = results["devices"]["CPU, one thread"]
    assert rows["predictions"].keys() == SPEED_ROWS.keys()
    for times in rows["predictions"].values():
        for t in times.values():
            assert t["calls"] >= 5 and 0 < t["quartiles"][0] <= t["ms"] <= t["quartiles"][1]
    assert [row["tokens"] for row in rows["contexts"]] == [8, 64]
    mamba, attention = ([row[name]["state_bytes"] for row in rows["contexts"]] for name in ("mamba", "attention"))
    assert mamba[0] == mamba[1] == 2 * 4 * (3 * 64 + 64 * 4)  # blocks, bytes, convolution inputs and h
    assert attention == [1 * 4 * 2 * 32 * n for n in (8, 64)]  # block, bytes, keys and values, width, tokens
    text = speed_table(results)
    assert text in capsys.readouterr().out and text in (tmp_path / "o/speed.md").read_text()
    assert "| 64 | " in text and "stateful" in text and "1.1" in (tmp_path / "o/speed.md").read_text()
    with Image.open(tmp_path / "o/speed.png") as figure:
        assert figure.width > 100


def test_bad_flags_of_speed_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere/config.json: no such file"):
        speed.main(["--checkpoint", "nowhere", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="--seconds -1"):
        speed.main(["--seconds", "-1"])
    with pytest.raises(ValueError, match="--longest 3: must be at least"):
        speed.main(["--longest", "3"])
