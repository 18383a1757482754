"""Reasoning evaluation: greedy-decoded answers to questions about pictures the model was not trained on.

    python -m data.build --scenes 200 --split test-seen --out data/cache/test-seen      # seconds; also for test-unseen
    python -m extras.reasoning_eval --data data/cache/test-seen,data/cache/test-unseen --out runs/reasoning

Writes reasoning.json, reasoning.md (tables), and every answer to answers.jsonl. Compares four answerers: the
model; the same model with a grey picture ("image-blind", the vision-free baseline); "majority", the most frequent
answer per question type in the training data, or for coordinates the median of each number; and "copy", which repeats
the question (a baseline for BLEU). Metrics of each:

    words         exact match after stripping, k/n with Wilson's 95 % interval
    coordinates   visual grounding and contact: where, contact: median distance in pixels, contact also the median angle
                  of the direction in degrees; box: median IoU. Anything that is not such a tuple counts as infinitely
                  far, 180 degrees, IoU 0
    presence      object hallucination (POPE): accuracy, precision, recall, F1 with "yes" as the positive, fraction of
                  yes; only the answer's first word counts, and anything but yes or no is wrong
    ROBOT_TYPES together: exact match and corpus BLEU-1 to 4; GENERAL_TYPES together: exact match
    categories    exact match of all answers in words, per object category

Sources: POPE, arXiv 2305.10355; BLEU, Papineni et al. 2002; Table 1 of RoboMamba (arXiv 2406.04339) for what is asked.
"""

import json
import math
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import read_json, read_json_lines, write_json, write_text
from common.report import DATA, grid, percent, wilson
from common.scripts import cli, environment, flag, progress, run_main
from common.training import Processes
from common.weights import count
from data.dataset import grey_picture, load_records
from data.prompts import COORDINATE_TYPES, GENERAL_TYPES, QUESTION_TYPES, ROBOT_TYPES, parse_contact
from extras.decoding import generate_batch, generate_ids
from robomamba import RoboMamba

ANSWERERS = ("model", "image-blind", "majority", "copy")
PAPER_REASONING = DATA / "paper_table1.json"
SHOWN = ("model", "image-blind", "majority")
REASONING_COLUMNS = ("answers", "robot exact", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "general exact")
REASONING_COLUMNS += ("presence", "precision", "recall", "F1", "yes")
EXACT = """Exact match: k/n, rate, [95 % Wilson interval]; corpus BLEU (0 .. 100) of the robot's questions; presence as
POPE scores object hallucination ("yes" is positive). Greedy decoding, each question asked on its own."""
KINDS = "Words: exact match. Where, contact: median distance. Box: median IoU."
OUR_QUESTIONS = """\
Ours: questions of data/questions.py about rendered pictures. **Theirs: other data sets, other questions and
models pre-trained on text. Their rows are for orientation only; do not compare the numbers.**"""


@dataclass
class ReasoningConfig:
    checkpoint: str = flag("data/pretrained/robomamba-tiny-rgbd", "folder written by save_pretrained")
    data: str = flag("data/cache/test-seen,data/cache/test-unseen", "folders made by data.build, comma separated")
    train: str = flag("data/cache/train", "data.build folder for the majority baseline")
    out: str = flag("runs/reasoning", "folder for reasoning.json, reasoning.md and answers.jsonl")
    batch_size: int = flag(8, "pictures per batch, with all their questions", low=1)
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"))


def words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks: "No, it's open." -> no , it ' s open ."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bleu(said: Sequence[str], true: Sequence[str]) -> list[float]:
    """Corpus BLEU-1, -2, -3, -4 in 0 .. 100, one reference each, on `words`.

        p_n = sum over pairs of the n-grams of `said` that occur in its `true`, each clipped to its count there
              / sum over pairs of the number of n-grams of `said`
        BLEU-N = 100 min(1, exp(1 - r / c)) (p_1 p_2 .. p_N)^(1/N),  c, r = tokens of all `said`, of all `true`

    No smoothing: if no n-gram matches, or no text is long enough, BLEU-n and all higher orders are 0.
    """
    pairs = [(words(s), words(t)) for s, t in zip(said, true, strict=True)]
    c, r = (sum(len(pair[k]) for pair in pairs) for k in (0, 1))
    brevity = min(1.0, math.exp(1 - r / c)) if c else 0.0
    scores, product = [], 1.0
    for n in (1, 2, 3, 4):
        right = total = 0
        for pair in pairs:
            grams, wanted = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in pair)
            right += (grams & wanted).total()
            total += grams.total()
        product *= right / max(total, 1)
        scores.append(round(100 * brevity * product ** (1 / n), 2))
    return scores


def pope(said: Sequence[str], true: Sequence[str]) -> dict:
    """{"accuracy": Wilson's, "precision", "recall", "f1", "yes": share of questions answered yes}; "yes" = positive."""
    said, true = ([(words(text) or [""])[0] for text in texts] for texts in (said, true))
    yes, wanted = said.count("yes"), true.count("yes")
    both = sum(s == t == "yes" for s, t in zip(said, true, strict=True))
    precision, recall = both / max(yes, 1), both / max(wanted, 1)
    return {
        "accuracy": exact(said, true),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "f1": round(2 * precision * recall / max(precision + recall, 1e-9), 4),
        "yes": round(yes / max(len(said), 1), 4),
    }


def coordinates(text: str, n: int) -> list[float] | None:
    """ "(37,52)" or "37 52 05 71 93" -> n fractions of the picture in 0..1, centres of their bins; None if it is no
    such tuple. The last three of five are the components of a direction, (d + 1) / 2."""
    form = r"\d\d( \d\d){4}" if n == 5 else rf"\(\d\d(,\d\d){{{n - 1}}}\)"
    if not re.fullmatch(form, text.strip(), re.ASCII):
        return None
    return [(int(number) + 0.5) / 100 for number in re.findall(r"\d\d", text)]


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes (left, top, right, bottom); 0 where a side is negative."""
    overlap = math.prod(max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [math.prod(max(0.0, box[i + 2] - box[i]) for i in (0, 1)) for box in (a, b)]
    return overlap / max(sum(areas) - overlap, 1e-9)


def place_scores(question_type: str, said: Sequence[str], true: Sequence[str], size: int) -> dict:
    """Scores for one of COORDINATE_TYPES: {"n", "read": k/n that are tuples, "px" | "iou", "degrees"}.

    A median that is not finite (more than half of the answers are not tuples) is None.
    """
    n = COORDINATE_TYPES[question_type]
    pairs = [(coordinates(s, n), coordinates(t, n)) for s, t in zip(said, true, strict=True)]
    out = {"n": len(pairs), "read": wilson(sum(s is not None for s, _ in pairs), len(pairs))}
    if question_type == "box":
        return out | {"iou": round(float(np.median([iou(s, t) if s else 0.0 for s, t in pairs])), 4)}
    px = float(np.median([size * math.dist(s[:2], t[:2]) if s else math.inf for s, t in pairs]))
    out["px"] = round(px, 2) if math.isfinite(px) else None
    if question_type == "contact":
        directions = [(parse_contact(s), parse_contact(t)[2]) for s, t in zip(said, true, strict=True)]
        cosines = np.array([np.clip(s[2] @ t, -1, 1) if s else -1.0 for s, t in directions])
        out["degrees"] = round(float(np.median(np.degrees(np.arccos(cosines)))), 2)
    return out


def exact(said: Sequence[str], true: Sequence[str]) -> dict:
    return wilson(sum(s.strip() == t.strip() for s, t in zip(said, true, strict=True)), len(true))


@dataclass(frozen=True)
class Question:
    """One turn, asked about its picture with no other turn before it."""

    image: str  # file
    category: str  # of the object, "" where there is no facts.jsonl
    question_type: str
    question: str
    answer: str


def read_questions(folder) -> list[Question]:
    """All turns of a data.build folder. Raises: ValueError naming file and record."""
    file, facts = Path(folder) / "conversations.json", Path(folder) / "facts.jsonl"
    records = load_records(file)
    try:
        lines = read_json_lines(facts) if facts.exists() else ()
        categories = {row["image"]: row["facts"]["category"] for _, row in lines}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{facts}: a line is not what data.build writes ({error}); build the folder again") from None
    found = []
    for index, record in enumerate(records):
        said = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        families, image = record.get("families"), record.get("image")
        if not families or not image:
            need = "expected an image, and families, a question type a turn"
            raise ValueError(f"{file}, record {index}: {need}; `python -m data.build` writes them")
        if categories and image not in categories:
            raise ValueError(f"{facts}: no line for {image} of {file}; build the folder again")
        for family, question, answer in zip(families, said[::2], said[1::2], strict=True):
            n = COORDINATE_TYPES.get(family)
            if n and coordinates(answer, n) is None:
                raise ValueError(f"{file}, record {index}: family {family!r}: {answer!r} is not {n} numbers")
            found.append(Question(str(Path(folder) / image), categories.get(image, ""), family, question, answer))
    return found


def majority(questions: Sequence[Question]) -> dict[str, str]:
    """{question type: its most frequent answer; for coordinates the median of every number}.

    Ties: the alphabetically first. For coordinates the median is the stronger baseline: any single tuple is rare.
    """
    out = {}
    for family in dict.fromkeys(q.question_type for q in questions):
        answers = [q.answer for q in questions if q.question_type == family]
        if n := COORDINATE_TYPES.get(family):
            middle = [f"{int(100 * x):02d}" for x in np.median([coordinates(a, n) for a in answers], 0)]
            out[family] = " ".join(middle) if n == 5 else f"({','.join(middle)})"
        else:
            out[family] = min(Counter(answers).items(), key=lambda item: (-item[1], item[0]))[0]
    return out


def decode(model, questions: Sequence[Question], pictures: int) -> tuple[list[str], list[str], float]:
    """Greedy answers with the picture and with a grey one, and tokens per second of the former (prefill included)."""
    grey = grey_picture(model.config.vision.image_size)
    images = list(dict.fromkeys(q.image for q in questions))
    answers: dict[Question, list[int]] = {}  # token ids
    blind: dict[str, str] = {}  # question: the answer without a picture, one per wording
    seconds = 0.0
    groups = range(0, len(images), pictures)
    start = time.monotonic()
    for k, first in enumerate(groups):
        now = set(images[first : first + pictures])
        asked = [q for q in questions if q.image in now]
        began = time.monotonic()
        ids = generate_ids(model, [q.image for q in asked], [q.question for q in asked])
        seconds += time.monotonic() - began
        answers |= zip(asked, ids, strict=True)
        new = list(dict.fromkeys(q.question for q in asked if q.question not in blind))
        blind |= zip(new, generate_batch(model, grey, new), strict=True)
        progress(k + 1, len(groups), start, f"batches of {pictures} pictures")
    speed = sum(len(answers[q]) for q in questions) / max(seconds, 1e-9)
    return [model.text(answers[q]) for q in questions], [blind[q.question] for q in questions], round(speed, 1)


def score(questions: Sequence[Question], said: Sequence[str], size: int) -> dict:
    """All scores of one answerer on one folder; groups without questions are left out.

    Returns {"families": {question type: Wilson's or place_scores}, "general", "robot", "words": Wilson's of exact
    matches, "bleu": [1..4] of the robot's questions, "pope": {..}, "categories": {category: Wilson's}}.
    """
    present = {q.question_type for q in questions}
    names = [*(name for name in QUESTION_TYPES if name in present), *sorted(present.difference(QUESTION_TYPES))]
    in_words = [name for name in names if name not in COORDINATE_TYPES]

    def texts(types, category: str | None = None) -> tuple[list[str], list[str]]:
        """What was said to the questions of these types (about one category), and their true answers."""
        rows = [i for i, q in enumerate(questions) if q.question_type in types and category in (None, q.category)]
        return [said[i] for i in rows], [questions[i].answer for i in rows]

    out: dict = {"families": {}}
    for name in names:
        pair = texts([name])
        out["families"][name] = place_scores(name, *pair, size) if name in COORDINATE_TYPES else exact(*pair)
    for key, types in {"general": GENERAL_TYPES, "robot": ROBOT_TYPES, "words": in_words}.items():
        if present.intersection(types):
            out[key] = exact(*texts(types))
            if key == "robot":
                out["bleu"] = bleu(*texts(types))
    if "presence" in present:
        out["pope"] = pope(*texts(["presence"]))
    categories = sorted({q.category for q in questions if q.question_type in in_words} - {""})
    out["categories"] = {category: exact(*texts(in_words, category)) for category in categories}
    return out


def split_name(folder: Path) -> tuple[str, dict]:
    """("seen" for a folder built with --split test-seen, its build settings); without a manifest, the folder's name."""
    file = folder / "manifest.json"
    if not file.exists():
        return folder.name, {}
    config = read_json(file, dict).get("config", {})
    if "split" not in config:
        raise ValueError(f"{file}: not what data.build writes")
    return config["split"].removeprefix("test-"), config


def evaluate(cfg: ReasoningConfig, command: str = "") -> tuple[dict, list[dict]]:
    """Runs everything; returns the contents of reasoning.json and one row per question for answers.jsonl."""
    start = time.monotonic()
    folders = [Path(name) for name in cfg.data.split(",")]
    named = [split_name(folder) for folder in folders]
    if len({name for name, _ in named}) < len(named):
        raise ValueError(f"--data {cfg.data}: two folders of the same split {[name for name, _ in named]}")
    asked = [read_questions(folder) for folder in folders]  # bad input is reported here
    most_frequent = majority(read_questions(cfg.train))
    model = RoboMamba.from_pretrained(cfg.checkpoint, device=Processes(cfg.device).device)
    results = {"checkpoint": cfg.checkpoint, "parameters": count(model), "command": command, **environment()}
    results |= {"decoding": "greedy", "majority": most_frequent, "splits": {}}
    rows = []  # of answers.jsonl
    size = model.config.vision.image_size
    for folder, (name, build), questions in zip(folders, named, asked, strict=True):
        pictures = len({q.image for q in questions})
        print(f"{name}: {len(questions)} questions on {pictures} pictures of {folder}")
        said, blind, speed = decode(model, questions, cfg.batch_size)
        usual = [most_frequent.get(q.question_type, "") for q in questions]
        answers = dict(zip(ANSWERERS, (said, blind, usual, [q.question for q in questions]), strict=True))
        results["splits"][name] = {
            "folder": str(folder),
            "seed": build.get("seed"),
            "n": len(questions),
            "pictures": pictures,
            "tokens_per_second": speed,
            "answerers": {who: score(questions, texts, size) for who, texts in answers.items()},
        }
        for q, answer, without in zip(questions, said, blind, strict=True):
            rows.append({"split": name, **vars(q), "model": answer, "image-blind": without})
    results["seconds"] = round(time.monotonic() - start, 1)
    return results, rows


# ---- tables ----------------------------------------------------------------------------------------------------------


def place(scores: dict) -> str:
    """The cell of a score: a rate, an IoU, pixels, pixels and degrees."""
    if "rate" in scores:
        return f"{scores['rate']:.2f}" if scores["n"] else "-"
    if "iou" in scores:
        return f"IoU {scores['iou']:.2f}"
    px = "no answer" if scores["px"] is None else f"{scores['px']:.1f} px"
    return f"{px}, {scores['degrees']:.0f} deg" if "degrees" in scores else px


def reasoning_report(results: dict) -> str:
    """Two tables: robot questions, general questions and presence, by who answers; then the question types."""
    splits = results["splits"]
    rows = []
    for split, result in splits.items():
        for who, scores in result["answerers"].items():
            robot, general = (percent(scores[key]) if key in scores else "" for key in ("robot", "general"))
            bleu = [f"{value:.1f}" for value in scores["bleu"]] if "bleu" in scores else [""] * 4
            pope = [""] * 5
            if "pope" in scores:
                pope = [f"{scores['pope'][key]:.2f}" for key in ("precision", "recall", "f1", "yes")]
                pope = [place(scores["pope"]["accuracy"]), *pope]
            rows.append([f"{split}, {who}", robot, *bleu, general, *pope])
    types = []
    for name in dict.fromkeys(name for result in splits.values() for name in result["answerers"]["model"]["families"]):
        types.append([name])
        for result in splits.values():
            scores = [result["answerers"][who]["families"].get(name) for who in SHOWN]
            types[-1] += [scores[0]["n"], *map(place, scores)] if scores[0] else [""] * (1 + len(SHOWN))
    head = ["question type", *(f"{split} {what}" for split in splits for what in ("n", *SHOWN))]
    return "\n".join([grid(REASONING_COLUMNS, rows), "", EXACT, "", grid(head, types), "", KINDS, ""])


def reasoning_details(results: dict) -> str:
    """Per split: every question type with k/n and interval, then every category."""

    def cell(scores: dict) -> str:
        return percent(scores) if "k" in scores else f"{place(scores)} ({percent(scores['read'])} read)"

    lines = []
    for split, result in results["splits"].items():
        for key, title in (("families", "question types"), ("categories", "categories")):
            groups = {who: scores[key] for who, scores in result["answerers"].items()}
            rows = [[name, *(cell(group[name]) for group in groups.values())] for name in groups["model"]]
            lines += [grid([f"{split}: {title}", *groups], rows), ""]
        asked = f"{result['n']} questions, {result['pictures']} pictures of {result['folder']}"
        lines += [f"{split}: {asked}; {result['tokens_per_second']:.0f} tokens/s, prefill included.", ""]
    return "\n".join([*lines, f"{results['command']} (commit {results['commit']}; {results['hardware']})", ""])


def paper_table1(results: dict) -> str:
    """Ours (BLEU of the robot's questions; POPE = accuracy on presence) above what RoboMamba's Table 1 prints."""
    paper = read_json(PAPER_REASONING, dict)
    rows = []
    for split, result in results["splits"].items():
        scores = result["answerers"]["model"]
        cells = {"LM": f"{results['parameters'] / 1e6:.1f}M in all"}
        if "pope" in scores:
            cells["POPE"] = f"{100 * scores['pope']['accuracy']['rate']:.1f}"
        if "bleu" in scores:
            cells |= {f"BLEU-{n}": f"{scores['bleu'][n - 1]:.1f}" for n in (1, 4)}
        rows.append([f"ours, {split}, our own questions", *(cells.get(column, "") for column in paper["columns"])])
    for name, values in paper["rows"].items():
        rows.append([f"{name} (theirs)", *("" if value is None else value for value in values)])
    source = f"Theirs: {paper['source']} ({paper['setting']}). {paper['notes']}."
    return "\n".join([OUR_QUESTIONS, source, "", grid(["model", *paper["columns"]], rows), ""])


def main() -> None:
    cfg = cli(ReasoningConfig, __doc__)
    out = Path(cfg.out)
    write_text(out / ".probe", "")  # an unwritable folder is reported before the work
    (out / ".probe").unlink()
    results, rows = evaluate(cfg, shlex.join(["python", "-m", "extras.reasoning_eval", *sys.argv[1:]]))
    tables = [reasoning_report(results), reasoning_details(results), paper_table1(results)]
    write_text(out / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(out / "reasoning.json", results)
    write_text(out / "reasoning.md", "\n".join(tables))
    print(f"\n{tables[0]}")
    print(f"{results['seconds']} s. Written:", *(out / name for name in ("reasoning.json", "reasoning.md")))


if __name__ == "__main__":
    run_main(main)
