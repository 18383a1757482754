"""Reasoning evaluation: BLEU, POPE and coordinates against cases worked by hand, the baselines, a whole run.

pytest tests/test_extras_reasoning_eval.py
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from extras import reasoning_eval
from extras.decoding import generate_batch, generate_ids
from extras.reasoning_eval import (
    ANSWERERS,
    PAPER_REASONING,
    Question,
    bleu,
    coordinates,
    iou,
    majority,
    paper_table1,
    place_scores,
    pope,
    reasoning_details,
    reasoning_report,
    score,
    words,
)
from robomamba import RoboMamba


@pytest.mark.parametrize(
    "said, true, wanted",
    [
        (["Move to the lid."], ["move to the lid ."], [100, 100, 100, 100]),
        # 2 of 7 "the" count; no bigram
        (["the the the the the the the"], ["the cat is on the mat"], [100 * 2 / 7, 0, 0, 0]),
        # all of it right, half as long: exp(1 - 6 / 3); there is no 4-gram
        (["open the door"], ["open the door of the safe"], [100 / math.e] * 3 + [0]),
        # pooled over the corpus: 5 of 6 words, 3 of 4 bigrams, 2 of 3 trigrams, 1 of 2 4-grams
        (
            ["yes", "move to the lid now"],
            ["yes", "move to the lid then"],
            [100 * 5 / 6, 100 * (5 / 6 * 3 / 4) ** (1 / 2), 100 * (5 / 12) ** (1 / 3), 100 * (5 / 24) ** (1 / 4)],
        ),
        # longer than the truth is not rewarded: 3 of 4 words, 2 of 3, 1 of 2, 0 of 1
        (["the red lid here"], ["the red lid"], [75, 100 * 0.5**0.5, 100 * 0.25 ** (1 / 3), 0]),
        ([""], ["yes"], [0, 0, 0, 0]),
        ([], [], [0, 0, 0, 0]),
    ],
)
def test_bleu_by_hand(said, true, wanted):
    assert bleu(said, true) == pytest.approx(wanted, abs=0.005)  # it is rounded to two digits


def test_bleu_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")  # in the extra [parity], which `make test` installs
    rng, some = np.random.default_rng(0), "move to the lid , grip it , swing it open . no there is none yes".split()
    said, true = ([" ".join(rng.choice(some, rng.integers(1, 12))) for _ in range(60)] for _ in range(2))
    for n, ours in enumerate(bleu(said, true), 1):
        metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n)
        theirs = metric.corpus_score([" ".join(words(s)) for s in said], [[" ".join(words(t)) for t in true]]).score
        assert ours == pytest.approx(theirs, abs=0.005)


def test_words_are_lower_cased_and_punctuation_stands_alone():
    assert words("No, it's 12 % open.") == ["no", ",", "it", "'", "s", "12", "%", "open", "."]


def test_pope_by_hand():
    got = pope(["yes", "Yes, there is", "no", "no.", "yes", "maybe yes"], ["yes", "no", "no", "yes", "yes", "no"])
    assert (got["accuracy"]["k"], got["accuracy"]["n"]) == (3, 6)  # what is neither yes nor no is wrong
    assert (got["precision"], got["recall"], got["f1"], got["yes"]) == (0.6667, 0.6667, 0.6667, 0.5)
    always = pope(["yes"] * 4, ["yes", "no", "no", "no"])
    assert (always["precision"], always["recall"], always["f1"], always["yes"]) == (0.25, 1.0, 0.4, 1.0)
    never = pope([""] * 2, ["yes", "no"])
    assert (never["accuracy"]["k"], never["precision"], never["recall"], never["f1"], never["yes"]) == (0, 0, 0, 0, 0)


def test_coordinates_are_middles_of_bins_and_strict():
    assert coordinates(" (37,52) ", 2) == [0.375, 0.525] and coordinates("(00,00,99,99)", 4)[3] == 0.995
    assert coordinates("37 52 05 71 93", 5) == [0.375, 0.525, 0.055, 0.715, 0.935]
    for text, n in (("(37,52)", 4), ("(37, 52)", 2), ("37 52", 2), ("(3,52)", 2), ("37 52 05 71", 5), ("no", 2)):
        assert coordinates(text, n) is None


def test_iou_by_hand():
    assert iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7) and iou([0, 0, 1, 1], [0, 0, 1, 1]) == 1
    assert iou([0, 0, 1, 1], [2, 0, 3, 1]) == 0 and iou([1, 1, 0, 0], [0, 0, 1, 1]) == 0  # apart; inside out


def test_place_scores_count_what_cannot_be_read_as_wrong():
    where = place_scores("where", ["(13,24)", "(10,20)", "somewhere"], ["(10,20)"] * 3, 100)
    assert where["px"] == pytest.approx(5) and where["read"]["k"] == 2  # median of 0, 5 and infinity
    assert place_scores("where", ["?", "?", "(10,20)"], ["(10,20)"] * 3, 100)["px"] is None
    boxes = place_scores("box", ["(00,00,20,20)", "none", "(10,10,20,20)"], ["(10,10,30,30)"] * 3, 100)
    assert boxes["iou"] == pytest.approx(1 / 7, abs=1e-4)  # median of 1/7, 0 and 1/4
    contact = place_scores("contact", ["50 50 49 49 99", "x"], ["50 56 99 49 49"] * 2, 100)
    assert contact["px"] is None and contact["degrees"] == pytest.approx((90 + 180) / 2, abs=1.2)  # bins of 0.02
    assert place_scores("contact", ["50 50 49 49 99"], ["50 56 49 49 99"], 100)["px"] == pytest.approx(6)


TURNS = {  # family: [(question, answer of the first, second, .. picture)]; success, past, future by hand
    "object": ("What is this?", "a safe", "a box", "a safe", "a box"),
    "presence": ("Is there a lid?", "no", "yes", "no", "yes"),
    "plan": ("How do I open the door?", "move to the door, grip it", "move to the lid, grip it", "wait", "wait"),
    "success": ("Was the door opened?", "yes", "no", "yes", "yes"),
    "past": ("What was done?", "the door was opened", "nothing", "the door was opened", "nothing"),
    "future": ("What will happen?", "the door opens", "the lid opens", "nothing", "nothing"),
    "where": ("Where is the lid?", "(10,20)", "(12,20)", "(14,30)", "(90,90)"),
    "box": ("Put a box around it.", "(10,10,30,30)", "(10,10,30,30)", "(20,20,40,40)", "(90,90,95,95)"),
    "contact": ("Predict: open the lid.", "10 20 49 49 99", "12 20 49 49 99", "14 30 49 49 99", "90 90 99 49 49"),
}


def questions_by_hand() -> list[Question]:
    return [
        Question(f"{i}.png", ("Safe", "Box")[i % 2], family, question, answers[i])
        for i in range(4)
        for family, (question, *answers) in TURNS.items()
    ]


def write_folder(folder, split: str, seed: int = 0):
    """A data.build folder by hand: four pictures of 32 pixels, every family of TURNS."""
    folder.mkdir()
    asked, records, facts, rng = questions_by_hand(), [], [], np.random.default_rng(seed)
    for i in range(4):
        mine = [q for q in asked if q.image == f"{i}.png"]
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        said = [{"from": who, "value": text} for q in mine for who, text in (("human", q.question), ("gpt", q.answer))]
        said[0]["value"] = "<image>\n" + said[0]["value"]
        families = [q.question_type for q in mine]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": said, "families": families})
        facts.append({"image": f"{i}.png", "facts": {"category": mine[0].category}})
    (folder / "conversations.json").write_text(json.dumps(records))
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    (folder / "manifest.json").write_text(json.dumps({"config": {"split": split, "seed": seed}}))
    return folder


def test_majority_is_the_most_frequent_answer_and_of_coordinates_the_median():
    floor = majority(questions_by_hand())
    assert floor["object"] == "a box" and floor["plan"] == "wait" and floor["success"] == "yes"  # a tie: the alphabet
    assert floor["where"] == "(13,25)" and floor["contact"] == "13 25 49 49 99" and floor["box"] == "(15,15,35,35)"


def test_scores_of_records_by_hand():
    asked = questions_by_hand()
    perfect = score(asked, [f" {q.answer} " for q in asked], 32)
    rates = [perfect[key] for key in ("words", "general", "robot")]
    assert [(r["k"], r["n"]) for r in rates] == [(24, 24), (8, 8), (16, 16)]  # white space is forgiven
    assert perfect["bleu"] == [100.0] * 4 and perfect["pope"]["f1"] == 1 and perfect["families"]["box"]["iou"] == 1
    assert perfect["families"]["where"]["px"] == perfect["families"]["contact"]["degrees"] == 0
    assert {c: r["n"] for c, r in perfect["categories"].items()} == {"Box": 12, "Safe": 12}
    assert list(perfect["families"]) == [*TURNS]  # general, robot, coordinates
    floor = majority(asked)
    blind = score(asked, [floor[q.question_type] for q in asked], 32)
    assert [blind["families"][f]["k"] for f in ("object", "presence", "success", "future")] == [2, 2, 3, 2]
    other = [replace(q, question_type="weather") for q in asked if q.question_type == "object"]
    odd = score(other, ["a safe"] * 4, 32)
    assert odd["families"]["weather"]["k"] == odd["words"]["k"] == 2 and not {"robot", "general", "pope"} & set(odd)


@pytest.fixture
def folders(tmp_path):
    return {s: write_folder(tmp_path / s, s, i) for i, s in enumerate(("train", "test-seen", "test-unseen"))}


def test_a_whole_run_answers_by_decoding(mini, folders, tmp_path, shell):
    mini.lm.lm_head.weight.data *= 20  # far from a tie between two tokens
    mini.save_pretrained(tmp_path / "m")
    out, data = tmp_path / "out", f"{folders['test-seen']},{folders['test-unseen']}"
    base = ("--checkpoint", tmp_path / "m", "--train", folders["train"], "--device", "cpu", "--batch-size", 3)
    torch.set_num_threads(1)
    printed = shell(reasoning_eval, *base, "--data", data, "--out", out)[1].out
    assert "batches of 3 pictures 2/2" in printed and "s left" in printed
    results = json.loads((out / "reasoning.json").read_text())
    assert {"command", "commit", "versions", "hardware", "seconds", "checkpoint"} <= set(results)
    assert {s: (r["n"], r["pictures"], r["seed"]) for s, r in results["splits"].items()} == {
        "seen": (36, 4, 1),
        "unseen": (36, 4, 2),
    }
    assert all(tuple(result["answerers"]) == ANSWERERS for result in results["splits"].values())
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    model, blind = RoboMamba.from_pretrained(tmp_path / "m"), {}
    for row in rows[-9:]:  # the questions about the last picture
        assert row["model"] == model.generate(row["image"], row["question"])
        assert blind.setdefault(row["question"], row["image-blind"]) == row["image-blind"]
    text = (out / "reasoning.md").read_text()
    tables = (reasoning_report(results), reasoning_details(results), paper_table1(results))
    assert all(table in text for table in tables) and tables[0] in printed
    copy = results["splits"]["seen"]["answerers"]["copy"]
    assert copy["words"]["k"] == 0 and copy["bleu"][0] > 0 and copy["families"]["where"]["px"] is None
    first = [results["splits"][s]["answerers"]["majority"]["families"]["success"]["k"] for s in ("seen", "unseen")]
    assert first == [3, 3] and "| seen, majority | " in tables[0] and "| success | 4 |" in tables[0]


def test_the_paper_s_table_is_whole_and_labelled():
    paper = json.loads(PAPER_REASONING.read_text())
    assert {len(row) for row in paper["rows"].values()} == {len(paper["columns"])} and len(paper["rows"]) == 12
    ours = dict(zip(paper["columns"], paper["rows"]["RoboMamba, 224 px"], strict=True))
    assert (ours["BLEU-4"], ours["BLEU-1"], ours["POPE"], ours["OKVQA"]) == (42.8, 62.7, 86.3, 63.3)
    assert "do not compare" in paper_table1({"splits": {}})


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("conversations.json", None, "conversations.json: no such file"),
        ("conversations.json", lambda t: t.replace('"plan", ', ""), "record 0: families: expec"),
        ("conversations.json", lambda t: t.replace("(12,20)", "(12,2)"), "record 1: family 'where': '(12,2)' is not 2"),
        ("facts.jsonl", lambda t: t.replace("category", "kind"), "facts.jsonl: a line is not what data.build writes"),
        ("facts.jsonl", lambda t: t.replace("3.png", "4.png"), "facts.jsonl: no line for 3.png"),
        ("manifest.json", lambda t: "{}", "manifest.json: not what data.build writes"),
    ],
)
def test_bad_folders_are_one_line_and_exit_code_2(folders, tmp_path, refused, file, text, message):
    path = folders["test-seen"] / file
    path.write_text(text(path.read_text())) if text else path.unlink()
    flags = ("--data", folders["test-seen"], "--train", folders["train"], "--out", tmp_path / "out")
    refused(message, reasoning_eval, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--batch-size", 0), "--batch-size 0: must be at least 1"),
        (("--device", "tpu"), "--device tpu: expected one of auto, cpu, cuda"),
        (("--checkpoint", "nowhere"), "nowhere/config.json: no such file"),
        (("--train", "nowhere"), "nowhere/conversations.json: no such file"),
        (("--out", "/proc/none"), "/proc/none/.probe: cannot be written"),
        (("--data", "{train},{train}"), "two folders of the same split"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(folders, tmp_path, refused, flags, message):
    base = ("--data", folders["test-seen"], "--train", folders["train"], "--out", tmp_path / "out")
    refused(message, reasoning_eval, *base, *(str(flag).format(**folders) for flag in flags))


# ---- answers to many questions at once (extras/decoding.py)


def test_a_batch_of_questions_gets_the_answers_of_each_alone(mini):
    """16 prompts of 9 lengths over 4 pictures; the end token is made likely, so that rows leave at different times.

    Rounding differs between a batch and one row by about 1e-6 of a logit, which decides nothing: equal to the letter.
    """
    likely = torch.zeros(len(mini.lm.lm_head.weight))
    likely[mini.encoding.eot_token] = 4.0
    mini.lm.lm_head.register_forward_hook(lambda module, inputs, logits: 20 * logits + likely)
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(4)]
    text = "open the top drawer of the cabinet and say what this object is"
    images, asked = [pictures[i % 4] for i in range(16)], [text[: 2 + 3 * (7 * i % 16)] for i in range(16)]
    assert len({len(mini.prompt(question)) for question in asked}) >= 9
    alone = [mini.generate(image, question, 12) for image, question in zip(images, asked, strict=True)]
    assert generate_batch(mini, images, asked, 12) == alone
    ids = generate_ids(mini, images, asked, 12)
    assert [mini.text(answer) for answer in ids] == alone
    assert len({len(answer) for answer in ids}) > 4 and len(set(alone)) > 8
    assert generate_batch(mini, pictures[2], asked[2:4], 12)[0] == alone[2]
    assert generate_batch(mini, None, asked, 12) == [mini.generate(None, question, 12) for question in asked]
    assert generate_batch(mini, [], []) == [] and generate_batch(mini, images[:2], asked[:2], 0) == ["", ""]


def test_a_picture_of_several_questions_is_encoded_once(mini, picture, tmp_path, monkeypatch):
    Image.fromarray(picture).save(tmp_path / "p.png")
    read, real = [], mini.encode_image
    monkeypatch.setattr(mini, "encode_image", lambda pictures: read.append(len(pictures)) or real(pictures))
    generate_batch(mini, [tmp_path / "p.png", picture, str(tmp_path / "p.png"), picture], ["a", "b", "c", "d"], 1)
    generate_batch(mini, picture, ["a", "b", "c"], 1)
    assert read == [2, 1]


def test_a_batch_that_cannot_be_answered_is_refused(mini, picture):
    with pytest.raises(ValueError, match="2 for 3 questions"):
        generate_batch(mini, [picture, picture], ["a", "b", "c"])
    with torch.no_grad():
        for p in mini.parameters():
            p *= 1e30  # finite weights, but nothing computed with them is
    with pytest.raises(ValueError, match="the logits are not finite"):
        generate_batch(mini, picture, ["what?"])
