"""Write RESULTS.md, and the table of README.md and of the model card, from the committed JSON.

    python -m common.results            # rewrites all three; tests/test_docs.py checks that they are up to date

    with_table(text) -> text            a page with what stands between its two marks made again
    document() -> text                  RESULTS.md: one section a table, each with command, commit, hardware and seed

Nothing is measured here. Tables of sim_eval.py, extras.reasoning_eval and extras.speed come from common/report.py; the
few below it are read from JSON as they are.
"""

import csv
import math
from pathlib import Path

from common import report
from common.files import read_json, read_text, write_text
from common.report import header, row
from common.scripts import run_main

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = "data/pretrained/robomamba-tiny"
PAGES = ("README.md", f"{SHIPPED}/README.md")
BEGIN = "<!-- made by python -m common.results -->"
END = "<!-- end -->"

README_ROWS = {  # name in results.json -> what the row is
    "model": "the shipped model: RGB image and instruction",
    "model-depth": "the same model + depth read-out: pixel snapped to the part, normal from a depth image",
    "random-backbone": "random frozen backbone + head: the same network never trained, a head trained as ours",
    "blind": "vision-free baseline: median label of each category and part",
    "random-normal": "random pixel of the object + its true surface normal (told the normal)",
    "expert": "oracle: scripted expert that knows the joint; scenes are those it solves",
}
GLOSSARY = """| row | what it is |
| --- | --- |
| `model` | the checkpoint named by `--checkpoint`: image and instruction, one forward pass, policy head |
| `model-depth` | the same + a depth read-out (imperfect camera): pixel snapped to the part, normal from depth |
| `model-text` | the same weights answer in words ("64 33 69 25 89": quantised coordinates), no policy head |
| `random-backbone` | random frozen backbone + head: a network that was never trained, with a head trained like ours |
| `random-depth` | random pixel of the object with the same depth read-out: what depth alone gives |
| `blind` | vision-free baseline: median training label of each (category, part); it never sees the image |
| `mean-action` | the mean training label for everything |
| `part-pixel-normal` | privileged baseline: random pixel of the *named part*, true surface normal |
| `random-normal` | privileged baseline: random pixel of the *object*, true surface normal |
| `random` | random pixel of the object, random direction |
| `expert` | oracle: scripted expert that knows the joint; scenes are those it solves, so its row is 1 |
| `expert, unconditioned` | scene acceptance rate: how many of the scenes tried it solved |

Success: the *named* part moved by at least 0.01 rad or m ("initial") or 0.1 (the paper's threshold). Cells: k/n, rate,
[95 % Wilson interval]. Category mean: mean over categories of the rates at 0.01 / 0.1. px / deg off: median distance to
the oracle's contact. Every policy acts on the same scenes with the same sentences."""
ABLATIONS = """| row | what changed |
| --- | --- |
| `model-pixel`, `model-direction` | half of the action is the model's, the other half the oracle's |
| `head-seed-1`, `head-seed-2` | the shipped backbone, heads trained from other seeds |
| `all-fine-tuned` | the shipped model with every weight fine-tuned on the manipulation samples |
| `all-questions` | stage 1.2 cut to 400 steps, all questions |
| `general-only` | the same without the robot's questions (plan, possible, success, past, future, contact) |
| `untrained-encoder` | the same as `all-questions`, encoder not pre-trained (no stage 0) |"""
CLOSED = """Four grips, a new image and prediction for each. `model-carried` kept the recurrent state from grip to grip
instead of reading the prompt again; it gained nothing and is no longer in the code."""


def made_by(results: dict) -> str:
    """One line: command, commit, hardware, seed, versions; what a file does not say is left out."""
    machine = results.get("hardware")
    if isinstance(machine, dict):
        machine = ", ".join(f"{key} {value}" for key, value in machine.items())
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    facts = {"commit": results.get("commit"), "hardware": machine, "seed": results.get("seed"), "versions": versions}
    said = "; ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    return f"`{results['command']}`\n({said})." if said else f"`{results['command']}`"


def rates(policy: dict, split: str, key: str = "long") -> str:
    """One cell of the README: rate and interval of a policy on a split, `-` where it was not evaluated."""
    if split not in policy.get("splits", {}):
        return "-"
    rate = policy["splits"][split][key]
    return f"{rate['rate']:.2f} [{rate['lo']:.2f}, {rate['hi']:.2f}]"


def short_table() -> str:
    """Six rows at the paper's threshold, for the first page."""
    results = read_json(ROOT / SHIPPED / "results.json", dict)
    episodes = [f"{split} ({results['policies']['model']['splits'][split]['n']})" for split in ("seen", "unseen")]
    lines = [header("policy", *episodes, "what it is")]
    for name, text in README_ROWS.items():
        policy = results["policies"].get(name, {})
        lines.append(row(f"`{name}`", rates(policy, "seen"), rates(policy, "unseen"), text))
    return "\n".join(lines)


def with_table(text: str, name: str = "README.md") -> str:
    """A page with its table made again. Raises: ValueError naming the page when a mark is missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{name}: expected one line {BEGIN} and one line {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{short_table()}\n{END}{after}"


# ---- tables that only this document has


def heads(runs: list[dict]) -> str:
    lines = [header("head or backbone", "parameters", "% of all", "pixel error", "direction error", "s")]
    for run in runs:
        flags = run["command"].split("finetune_policy.py ")[1]
        name = run.get("what") or f"`{flags}`"
        share = f"{100 * run['head_share']:.2f}"
        errors = (f"{run['pixel_px']:.2f} px", f"{run['approach_degrees']:.1f} deg")
        lines.append(row(name, f"{run['head_parameters']:,d}", share, *errors, f"{run['seconds']:.0f}"))
    return "\n".join(lines)


def physics(results: dict) -> str:
    """What the simulator forgives: success of scripted policies on validation scenes."""
    lines = [header("policy", ">= 0.01", ">= 0.1")]
    for name, policy in results["policies"].items():
        (summary,) = policy["splits"].values()
        lines.append(row(name, report.percent(summary["initial"]), report.percent(summary["long"])))
    return "\n".join(lines)


def scan(results: dict) -> str:
    """Forward and backward of every method, shape and thread count; the classic failures; the time per element."""
    names = list(dict.fromkeys(method["method"] for shape in results["shapes"] for method in shape["methods"]))
    lines = [header("(B, L, E, N)", "threads", *names)]
    for shape in results["shapes"]:
        found = {method["method"]: method for method in shape["methods"]}
        cells = []
        for name in names:
            low, high = found[name]["train_range_ms"]
            cell = f"{low:.0f} to {high:.0f} ms, {found[name]['peak_mib']:.0f} MiB"
            if name != "chunked":
                least, most = found[name]["times"]
                cell += f", {least:.1f} to {most:.1f}x"
            cells.append(cell)
        lines.append(row(tuple(shape["shape"]), shape["threads"], *cells))
    lines += [
        "",
        "Forward and backward, float32: least and most time of all rounds, peak memory on top of the inputs, and",
    ]
    lines += ["least and most of the time as a multiple of chunked's in the same round.", ""]
    for key, text in (
        ("linear", "The chunked scan is linear in L:"),
        ("indexed", "Indexing a tensor inside an autograd loop is quadratic in L; `unbind` once is not:"),
        ("cumprod", "Share of outputs that are inf or nan when one divides by the cumulative product of decays:"),
    ):
        if key in results:
            lines += [text, "", *records(results[key]), ""]
    return "\n".join(lines).rstrip()


def records(items: list[dict]) -> list[str]:
    """A list of flat JSON objects with the same keys as a table."""
    lines = [header(*items[0])]
    for item in items:
        lines.append(row(*(f"{value:.3g}" if isinstance(value, float) else value for value in item.values())))
    return lines


def mistakes(results: dict) -> str:
    """Eight planted mistakes: what the shipped model does with each, and the test that catches it."""
    lines = [header("mistake", "what you see", "right", "wrong", "caught by")]
    for item in results["rows"]:
        values = [item["form"].format(math.inf if item[key] is None else item[key]) for key in ("right", "wrong")]
        lines.append(row(item["mistake"], item["see"], *values, f"`{item['test'].split('::')[1]}`"))
    return "\n".join(lines)


def encoders(explorations: list[dict]) -> str:
    """What teaches the encoder: a linear probe on tokens of four encoders."""
    (found,) = (item for item in explorations if item.get("command") == "make encoders")
    kinds = {name: scores for name, scores in found.items() if isinstance(scores, dict)}
    columns = list(next(iter(kinds.values())))
    lines = [header("trained with", *columns)]
    for name, scores in kinds.items():
        lines.append(row(name, *(scores[column] for column in columns)))
    return "\n".join([*lines, "", f"{found['what']}. {found['hardware']}."])


def stages() -> str:
    """Minutes of every stage of the shipped run."""
    seconds = {"data": read_json(ROOT / SHIPPED / "data.json", dict)["seconds"]}
    steps = {}
    last = {}
    for item in csv.DictReader(read_text(ROOT / SHIPPED / "metrics.csv").splitlines()):
        stage = "vision" if item["stage"] == "vision2" else item["stage"]  # one stage, two schedules
        last[item["stage"]] = (stage, int(item["step"]), float(item["seconds"]))
    for stage, step, second in last.values():
        steps[stage] = steps.get(stage, 0) + step
        seconds[stage] = seconds.get(stage, 0.0) + second
    seconds["policy"] = read_json(ROOT / SHIPPED / "policy.json", dict)["seconds"]
    lines = [header("stage", "steps (policy: epochs)", "minutes")]
    for stage, value in seconds.items():
        lines.append(row(stage, steps.get(stage, ""), f"{value / 60:.1f}"))
    return "\n".join([*lines, row("together", "", f"{sum(seconds.values()) / 60:.1f}")])


def earlier(first: dict, second: dict) -> str:
    """The two trainings before the shipped one, on the same test scenes."""
    lines = [header("training", "policy", *(f"{s} {t}" for s in ("seen", "unseen") for t in (">= 0.01", ">= 0.1")))]
    for name, training in (("first", first), ("second", second)):
        for policy, splits in training["policies"].items():
            cells = [report.percent(splits[s][key]) for s in ("seen", "unseen") for key in ("initial", "long")]
            lines.append(row(name, policy, *cells))
    return "\n".join([*lines, "", *(f"* {training['what']}" for training in (first, second))])


# ---- the document


def document() -> str:
    """RESULTS.md."""

    def shipped(name: str) -> dict:
        return read_json(ROOT / SHIPPED / name, dict)

    def result(name: str) -> dict:
        return read_json(ROOT / "data/results" / name, dict)

    main, reasoning = shipped("results.json"), shipped("reasoning.json")
    ablations, closed, speed = result("ablations.json"), result("closed_loop.json"), result("speed.json")
    tests, ladder, planted = result("physics.json"), result("scan.json"), result("mistakes.json")
    explored = read_json(ROOT / "data/results/explorations.json", list)
    policy_runs = read_json(ROOT / "data/results/heads.json", list)
    planted_on = f"`python -m extras.mistakes`, {planted['scenes']} validation scenes"
    sections = {
        "Manipulation": (SHIPPED + "/results.json", made_by(main), GLOSSARY, report.report(main)),
        "How the attempts ended": (SHIPPED + "/results.json", made_by(main), report.details(main)),
        "Per category, beside the paper": (SHIPPED + "/results.json", made_by(main), report.categories(main)),
        "Ablations": ("data/results/ablations.json", made_by(ablations), ABLATIONS, report.table(ablations)),
        "Policy heads": ("data/results/heads.json", "Validation medians; 10,000 samples.", heads(policy_runs)),
        "Closed loop": ("data/results/closed_loop.json", made_by(closed), CLOSED, report.report(closed)),
        "Reasoning": (SHIPPED + "/reasoning.json", made_by(reasoning), report.reasoning_report(reasoning)),
        "Reasoning, beside the paper": (SHIPPED + "/reasoning.json", report.paper_table1(reasoning)),
        "Speed": ("data/results/speed.json", made_by(speed), report.speed_table(speed), report.SPEED_NOTES),
        "What the physics forgives": ("data/results/physics.json", made_by(tests), physics(tests)),
        "Scan": ("data/results/scan.json", made_by(ladder), scan(ladder)),
        "Classic mistakes": ("data/results/mistakes.json", planted_on, mistakes(planted)),
        "What teaches the encoder": ("data/results/explorations.json", encoders(explored)),
        "Time of the shipped training": (SHIPPED + "/metrics.csv", "`make train`, a busy machine.", stages()),
        "Earlier trainings": (
            "data/results/first_training.json, second_training.json",
            earlier(result("first_training.json"), result("second_training.json")),
        ),
    }
    head = """# Results

Made by `python -m common.results` from the committed JSON; do not edit. Each section names its file and how that was
made. One training seed unless a row says otherwise; intervals are binomial and leave out the spread between trainings.

On another machine: data and scenes are bit-equal on Linux x86_64 with the pinned versions; training and predictions
agree to float rounding, so a success count differs by a few scenes of 550; times are only comparable within a table."""
    lines = [head, ""]
    lines += [f"* [{title}](#{anchor(title)})" for title in sections]
    for title, (source, *parts) in sections.items():
        lines += ["", f"## {title}", "", f"From {source}."]
        for part in parts:
            lines += ["", part.strip()]
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """The address that Git hosts give a heading."""
    return title.lower().replace(",", "").replace(" ", "-")


def main() -> None:
    for name in PAGES:
        write_text(ROOT / name, with_table(read_text(ROOT / name), name))
    write_text(ROOT / "RESULTS.md", document())
    print("wrote RESULTS.md and the table of", " and ".join(PAGES))


if __name__ == "__main__":
    run_main(main)
