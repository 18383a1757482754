"""What README.md, RESULTS.md, LOG.md and the model card say: links, flags, sizes, numbers; and the shipped checkpoint.

pytest tests/test_docs.py
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_commands import commands, execute

from common.weights import count
from data.depth import read_depth
from data.prompts import contact_question
from robomamba import RoboMamba

ROOT = Path(__file__).parent.parent
FOLDER = "data/pretrained/robomamba-tiny-rgbd"
SHIPPED = ROOT / FOLDER
EXAMPLES = ROOT / "data/figures/examples"
CARD = f"{FOLDER}/README.md"
DOCUMENTS = ("README.md", "RESULTS.md", "LOG.md", CARD)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readme_stays_short():
    text = read("README.md")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 16_000


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_picture_exists(document):
    text = read(document)
    headings = set(re.findall(r"\]\(#([\w-]+)\)", read("RESULTS.md")))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, place = target.partition("#")
        if path.startswith("http") or (path.startswith("extras") and not (ROOT / "extras").exists()):
            continue
        assert not path or ((ROOT / document).parent / path).exists(), target
        if place:
            assert place in headings, target


def test_every_flag_that_is_quoted_exists(monkeypatch):
    """Of the commands that other tests run; the rest runs in test_commands.py."""
    monkeypatch.chdir(ROOT)
    said: dict[str, set[str]] = {}
    for command in commands():
        match = re.match(r"python (-m )?([\w./]+)(.*)", command)
        if match and match[2] not in ("venv", "pytest"):
            said.setdefault((match[1] or "") + match[2], set()).update(re.findall(r"--[\w-]+", match[3]))
    assert {"sim_eval.py", "robomamba.py", "train.py", "-m data.build"} <= set(said)
    for script, flags in said.items():
        code, text = execute([*script.split(), "--help"])
        assert code == 0 and text, script
        assert [flag for flag in flags if flag not in text] == [], script


def test_make_targets_that_are_quoted_exist():
    makefile = read("Makefile")
    targets = {name for document in DOCUMENTS for name in re.findall(r"(?:`|^)make ([a-z]+)", read(document), re.M)}
    assert {"demo", "test", "quick", "train", "ship", "evaluate"} <= targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.M)] == []


# ---- numbers


def test_the_committed_results_are_of_hundreds_of_scenes_and_thousands_of_questions():
    main, reasoning = (json.loads((SHIPPED / f"{name}.json").read_text()) for name in ("results", "reasoning"))
    assert all(p["splits"][s]["n"] >= 300 for p in main["policies"].values() for s in ("seen", "unseen"))
    assert len(reasoning["splits"]) == 2 and all(split["n"] >= 2000 for split in reasoning["splits"].values())


def test_the_readme_counts_lines_parameters_and_questions_right():
    model = RoboMamba.from_pretrained(SHIPPED)
    text = " ".join(read("README.md").split())
    scripts = ("selective_scan", "robomamba", "train", "finetune_policy", "sim_eval")
    lines = sum(len(read(f"{name}.py").splitlines()) for name in scripts)
    data = json.loads(read(f"{FOLDER}/data.json"))
    assert abs(int(re.search(r"about ([\d,]+) lines to read", text)[1].replace(",", "")) / lines - 1) < 0.05, lines
    assert f"{count(model) / 1e6:.1f} million parameters" in text and f"the head of {count(model.head):,d} para" in text
    assert f"ViT of {count(model.vision) / 1e6:.1f} M" in text
    assert f"{data['turns'] / data['pictures']:.0f} questions each" in text
    drawing = read("data/figures/model.svg")
    assert all(f">{count(part):,d}<" in drawing for part in model.children()), "parameters of the drawing"


def test_the_table_of_make_quick_is_that_of_its_file():
    policies = json.loads((ROOT / "data/results/quick.json").read_text())["policies"]
    rows = re.findall(r"^([\w-]+) +(\d+/\d+) +(\d+/\d+) +(\d+/\d+) +(\d+/\d+) ", read("README.md"), re.M)
    assert {"model", "model-depth", "blind", "random-backbone-depth"} <= {name for name, *_ in rows}
    for name, *said in rows:
        splits = policies[name]["splits"]
        rates = [splits[split][key] for split in ("seen", "unseen") for key in ("initial", "long")]
        assert said == [f"{rate['k']}/{rate['n']}" for rate in rates], name


THRESHOLDS = {0.01, 0.1}  # of success


def numbers_in(path: Path) -> list[float]:
    """Every number of a JSON or CSV file, those inside its texts too."""
    return [abs(float(n)) for n in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", path.read_text())]


@pytest.mark.parametrize(("document", "at_least"), [("README.md", 15), ("LOG.md", 60), (CARD, 8)])
def test_every_number_in_a_paragraph_stands_in_the_files_that_it_names(document, at_least):
    """Decimals (also as percent) and k/n, rounded as they are written, outside of code blocks.

    In LOG.md a paragraph with such numbers has to name a file, and a table is checked with the paragraph before it;
    elsewhere tables are skipped, and a paragraph with a measured number (unit behind) has to name one.
    """
    text = re.sub(r"```.*?```|^#.*?$|^---.*?^---", "", read(document), flags=re.S | re.M)
    if document == "LOG.md":
        text = text.replace("\n\n|", "\n|")
    else:
        text = re.sub(r"^\|.*?$", "", text, flags=re.M)
    checked, unknown = 0, []
    for paragraph in re.split(r"\n\s*\n|\n\* ", text):
        named = re.findall(r"[\w/.-]+\.(?:json|csv)\b", paragraph)
        files = {p for f in named for p in (ROOT / f, (ROOT / document).parent / f) if p.exists()}
        have = sorted(THRESHOLDS | {n for file in files for n in numbers_in(file)})
        said = re.findall(r"(?<![\w.,/:-])(?:\d[\d,]*\.\d+|\d+/\d+)(?![\w/-])", paragraph)
        said += re.findall(r"(?<=\| )\d+(?= \|)", paragraph)  # a table's cells
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
    assert checked >= at_least


# ---- the shipped checkpoint


@pytest.fixture(scope="module")
def model():
    return RoboMamba.from_pretrained(SHIPPED)


def test_shipped_checkpoint_is_small_and_its_head_is_smaller(model):
    assert (SHIPPED / "model.safetensors").stat().st_size <= 12e6
    assert count(model.head) / count(model) <= 0.001 and count(model.point) / count(model) <= 0.0011


def test_the_model_card_names_what_the_checkpoint_has(model):
    card = read(CARD)
    front = dict(line.split(": ", 1) for line in card.split("---")[1].splitlines() if re.match(r"\w+: ", line))
    assert front["license"] == "mit" and front["pipeline_tag"] == "robotics"
    data = json.loads((SHIPPED / "data.json").read_text())
    for number in (count(model), count(model.head), count(model.point), data["pictures"], data["turns"]):
        assert f"{number:,d}" in card


def test_shipped_model_finds_the_door_of_the_example_with_depth(model):
    image, depth = (ROOT / f"data/figures/examples/{name}.png" for name in ("microwave", "microwave-depth"))
    camera = (read_depth(depth), (175.839, 175.839, 64, 63))
    ours, papers = (model.predict_action(image, "open the door", *camera, point=point) for point in (True, False))
    truth = next(e for e in json.loads(read("data/figures/examples/examples.json")) if e["picture"] == "microwave.png")
    for action in (ours, papers):
        assert np.hypot(action.u - truth["u"], action.v - truth["v"]) < 8
    assert (ours.u, ours.v) != (papers.u, papers.v)


def test_the_multi_part_share_is_as_promised():
    assert json.loads((SHIPPED / "data.json").read_text())["multi_part_share_of_capable"] >= 0.5


def test_shipped_model_looks_at_the_picture(model):
    """Nearer to the oracle's contact than the vision-free baseline by a third, on validation scenes."""
    pytest.importorskip("pybullet")
    from sim.catalogue import SEEN
    from sim.expert import expert
    from sim.policies import Observation, blind_policy, read_blind_table
    from sim.scene import Scene

    table = blind_policy(read_blind_table(ROOT / "data/pretrained/blind_table.json"))
    rng, errors = np.random.default_rng(0), []
    with Scene(model.config.vision.image_size) as scene:
        for k in range(40):
            scene.spawn(SEEN[k % 20], 10_500_000 + k).render()
            label = expert(scene, rng)
            if label is None:
                continue
            sentence = f"open the {scene.spec.parts[scene.target].label}"
            action = model.predict_action(scene.rgb, sentence)
            u, v, _ = table(Observation(scene, sentence, scene.target, label, rng))
            errors.append([np.hypot(x - label.u, y - label.v) for x, y in ((action.u, action.v), (u, v))])
    ours, blind = np.median(errors, 0)
    assert len(errors) >= 35 and ours < 2 / 3 * blind, (ours, blind)


def test_shipped_model_answers_in_words(model):
    assert model.generate(EXAMPLES / "microwave.png", "What is this object?").lower() == "a microwave"
    contact = model.generate(EXAMPLES / "microwave.png", contact_question("open the door"))
    assert re.fullmatch(r"\d\d( \d\d){4}", contact), contact
