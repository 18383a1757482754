"""What the README says: its links, commands, flags and numbers; and the shipped checkpoint behind them.

pytest tests/test_docs.py
"""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sim_eval
from common import report
from data.prompts import contact_question
from extras import mistakes
from extras.assignments import TEACHER_ONLY
from robomamba import RoboMamba, count

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data/pretrained/robomamba-tiny"
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_every_link_and_picture_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [t for t in targets if not t.startswith("http")]
    assert len(local) > 10
    assert [t for t in local if not (ROOT / t).exists()] == []


def test_every_script_and_flag_that_is_quoted_exists():
    said: dict[str, set[str]] = {}
    for line in "\n".join(blocks("bash")).splitlines() + re.findall(r"`(python [^`]+)`", README):
        for script, rest in re.findall(r"python (?:-m )?([\w./]+)(.*)", line.split("#")[0]):
            if script not in ("venv", "pytest"):
                said.setdefault(script, set()).update(re.findall(r"--[\w-]+", rest))
    assert {"sim_eval.py", "robomamba.py"} <= set(said)
    for script, flags in said.items():
        command = [sys.executable, script] if script.endswith(".py") else [sys.executable, "-m", script]
        text = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
        assert text, f"{script} --help prints nothing"
        assert [f for f in flags if f not in text] == [], script


def test_make_targets_that_are_quoted_exist():
    targets = set(re.findall(r"make ([a-z]+)", README)) - {"makes"}
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "train"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.M)] == []


def test_results_table_is_the_one_of_the_committed_results():
    results = json.loads((TINY / "results.json").read_text())
    assert report.report(results).strip() in README
    assert all(p["splits"][s]["n"] >= 300 for p in results["policies"].values() for s in ("seen", "unseen"))
    ablations = json.loads((ROOT / "data/results/ablations.json").read_text())
    assert report.table(ablations) in README and "general-only" in ablations["policies"]
    assert ablations["policies"]["model"]["splits"] == results["policies"]["model"]["splits"]  # the same scenes


def test_minutes_of_training_are_those_of_the_committed_metrics():
    seconds: dict[str, float] = {}
    with open(TINY / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            seconds[row["stage"]] = max(seconds.get(row["stage"], 0.0), float(row["seconds"]))
    seconds["data"] = json.loads((TINY / "data.json").read_text())["seconds"]
    seconds["policy"] = json.loads((TINY / "policy.json").read_text())["seconds"]
    for stage, value in seconds.items():
        (minutes,) = re.findall(rf"^\| {stage} \|.*?\| ([\d.]+) min \|", README, re.M)
        assert abs(float(minutes) - value / 60) <= 0.051, stage
    (together,) = re.findall(r"Together ([\d.]+) minutes", README)
    assert abs(float(together) - sum(seconds.values()) / 60) <= 0.051


def test_reasoning_and_speed_tables_are_those_of_the_committed_results():
    reasoning = json.loads((TINY / "reasoning.json").read_text())
    assert report.reasoning_report(reasoning).strip() in README
    assert all(split["n"] >= 2000 for split in reasoning["splits"].values()) and len(reasoning["splits"]) == 2
    assert report.speed_table(json.loads((ROOT / "data/results/speed.json").read_text())).strip() in README


def test_the_table_of_mistakes_is_the_one_of_the_committed_results():
    assert mistakes.markdown(json.loads((ROOT / "data/results/mistakes.json").read_text())["rows"]).strip() in README


def test_paper_to_code_table_names_what_exists():
    rows = re.findall(r"^\|.*\| `([\w/]+\.py):([\w.]+)` \| `(tests/\w+\.py)::(\w+)` \|$", README, re.M)
    assert len(rows) >= 12
    for file, name, test_file, test in rows:
        scope = ast.parse((ROOT / file).read_text()).body
        for part in name.split("."):
            (found,) = [node for node in scope if getattr(node, "name", None) == part]
            scope = getattr(found, "body", [])
        if (ROOT / test_file).exists() or test_file not in TEACHER_ONLY:  # a student's tree lacks some
            assert f"def {test}(" in (ROOT / test_file).read_text(), (test_file, test)


def numbers_in(path: Path) -> list[float]:
    """Every number of a JSON or CSV file, those inside its texts too."""
    return [abs(float(n)) for n in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", path.read_text())]


@pytest.mark.parametrize("document", ["README.md", "LOG.md"])
def test_every_number_in_a_paragraph_stands_in_the_files_that_it_names(document):
    """Decimals (also as percent) and k/n, rounded as they are written; tables, code blocks and what report() makes have
    tests of their own.

    In LOG.md a paragraph with such numbers has to name a file; in README.md one with a measured number (unit behind).
    """
    made = report.report(json.loads((TINY / "results.json").read_text())).strip()
    text = (ROOT / document).read_text().replace(made, "")
    text = re.sub(r"```.*?```|^\|.*?$|^#.*?$", "", text, flags=re.S | re.M)
    checked, unknown = 0, []
    for paragraph in re.split(r"\n\s*\n|\n\* ", text):
        files = {f for f in re.findall(r"[\w/.-]+\.(?:json|csv)\b", paragraph) if (ROOT / f).exists()}
        have = sorted({n for file in files for n in numbers_in(ROOT / file)})
        said = re.findall(r"(?<![\w.,/:-])(?:\d[\d,]*\.\d+|\d+/\d+)(?![\w/-])", paragraph)
        measured = re.findall(r"\d\.\d+ (?:px|degrees|ms|Hz|points|steps/s)\b|\b\d+/\d+\b", paragraph)
        if not files and (said if document == "LOG.md" else measured):
            unknown.append((said, "no file is named", paragraph[:60]))
        for number in said if files else ():
            checked += 1
            for part in number.replace(",", "").split("/"):
                half = 0.5 * 10.0 ** -len(part.partition(".")[2]) + 1e-9 if "." in part else 0.0
                if not any(abs(n * scale - float(part)) <= half for n in have for scale in (1, 100)):
                    unknown.append((number, sorted(files), paragraph[:60]))
    assert unknown == []
    assert checked >= (60 if document == "LOG.md" else 20)


def test_scan_table_is_the_one_of_the_committed_benchmark():
    assert report.scan_table(json.loads((ROOT / "data/results/scan.json").read_text())).strip() in README


# ---- the shipped checkpoint


@pytest.fixture(scope="module")
def model():
    return RoboMamba.from_pretrained(TINY)


def test_shipped_checkpoint_is_small_and_its_head_is_smaller(model):
    assert (TINY / "model.safetensors").stat().st_size <= 12e6
    assert count(model.head) / count(model) <= 0.001
    assert (TINY / "vocab.tiktoken").read_bytes() == (ROOT / "data/vocab.tiktoken").read_bytes()


def test_the_multi_part_share_is_as_promised():
    assert json.loads((TINY / "data.json").read_text())["multi_part_share_of_capable"] >= 0.5


def test_shipped_model_looks_at_the_picture(model):
    """On validation scenes its pixels are nearer to the expert's than those of the picture-blind table, by a third."""
    table = sim_eval.blind_policy(sim_eval.read_blind_table(ROOT / "data/pretrained/blind_table.json"))
    scene, rng, errors = sim_eval.Scene(model.config.vision.image_size), np.random.default_rng(0), []
    try:
        for k in range(40):
            category = sim_eval.objects.SEEN[k % 20]
            scene.spawn(category, 10_500_000 + k).render()
            label = scene.expert(rng)
            if label is None:
                continue
            sentence = f"open the {scene.spec.parts[scene.target].label}"
            action = model.predict_action(scene.rgb, sentence)
            u, v, _ = table(sim_eval.Observation(scene, sentence, scene.target, label, rng))
            errors.append([np.hypot(x - label.u, y - label.v) for x, y in ((action.u, action.v), (u, v))])
    finally:
        scene.close()
    ours, blind = np.median(errors, 0)
    assert len(errors) >= 35 and ours < 2 / 3 * blind, (ours, blind)


def test_shipped_model_answers_in_words(model):
    scene = sim_eval.Scene(model.config.vision.image_size)
    try:
        picture = scene.spawn("StorageFurniture", 10_600_000).render()
    finally:
        scene.close()
    assert re.fullmatch(r"an? [a-z ]+", model.generate(picture, "What is this object?").lower())
    contact = model.generate(picture, contact_question("open the door"))
    assert re.fullmatch(r"\d\d( \d\d){4}", contact), contact
