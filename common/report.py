"""Tables in Markdown: what sim_eval.py prints and writes about a run.

    python -m common.report runs/eval/results.json --out FILE.json     # the tables again; FILE: without the episodes

summarise(..) makes the scores of a run; report, table, details, categories take them, or what a committed JSON holds.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.files import read_json, write_json, write_text
from common.scripts import run_main

DATA = Path(__file__).parent.parent / "data"
THEIRS = ("RoboMamba", "ManipLLM")  # columns of data/paper_table2.json
CATALOGUE_SPLITS = ("seen", "unseen", "val")  # their categories have the names of the paper's; not the user's objects
GOALS = {"initial": ">= 0.01", "long": ">= 0.1"}  # key of a record: rad or m
SUCCESS = """Success: k/n, rate, [95 % Wilson interval]; the named part moved >= 0.01 and >= 0.1 rad or m (or half of
its remaining range, if that is less than 0.1). px / deg off: median distance to the expert's contact. Only scenes that
the expert (the oracle) solves are used; the last row counts all sampled scenes."""
SENTENCES = ("policy", "ms a prediction", "nearest to the named part", "chance", "right sentence", "wrong sentence")
SENTENCES_TEXT = """Scenes with several parts: how often the predicted pixel is nearest to the named part, and how often
it would be by chance; how often the named part moves >= 0.01 with its own instruction, and with the instruction for
another part. ms: median, batch 1, one thread; with depth it includes the simulation of the imperfect camera."""
OURS = """Ours: share of episodes that moved the named part by >= 0.01 / >= 0.1 rad or m. **Theirs: another simulator,
other objects, another gripper. Their columns are for orientation only; do not compare the numbers.**"""
ON_PART = """Scored like the released evaluator of ManipLLM, on which the paper builds: episodes whose predicted pixel
lies on no movable part are left out of n. Every other table here counts them as failures."""
LONGEST_CELL = 200  # characters


# ---- Markdown --------------------------------------------------------------------------------------------------------


def plain(text) -> str:
    """Text that cannot break a table or bring HTML in: categories, objects and policies are named by the user."""
    text = " ".join(str(text).split())
    if len(text) > LONGEST_CELL:
        text = text[:LONGEST_CELL] + " .."
    return text.replace("<", "&lt;").replace("|", "&#124;")


def row(*cells) -> str:
    return "| " + " | ".join(plain(cell) for cell in cells) + " |"


def grid(head: Iterable, rows: Iterable[Iterable]) -> str:
    """A whole table."""
    head = list(head)
    return "\n".join(row(*cells) for cells in (head, ["---"] * len(head), *rows))


def percent(rate: dict) -> str:
    """k/n, the rate and its interval; "-" where nothing was tried."""
    if not rate["n"]:
        return "-"
    return f"{rate['k']}/{rate['n']} {rate['rate']:.2f} [{rate['lo']:.2f}, {rate['hi']:.2f}]"


def both(means: dict, n: int = 1) -> str:
    """The rates of both thresholds in one cell."""
    return f"{means['initial']:.2f} / {means['long']:.2f}" if n else "-"


# ---- scores of sim_eval.py -------------------------------------------------------------------------------------------


def wilson(k: int, n: int, z: float = 1.959964) -> dict:
    """Rate k / n with Wilson's 95 % interval, which stays inside 0..1 and is right at 0 and n; n = 0 says nothing."""
    centre = k + z * z / 2
    spread = z * math.sqrt(k * (n - k) / n + z * z / 4) if n else centre
    low = max(0.0, (centre - spread) / (n + z * z))
    high = min(1.0, (centre + spread) / (n + z * z))
    return {"k": k, "n": n, "rate": round(k / max(1, n), 4), "lo": round(low, 4), "hi": round(high, 4)}


def rates(records: list[dict]) -> dict:
    """Both success rates of records."""
    return {goal: wilson(sum(record[goal] for record in records), len(records)) for goal in GOALS}


def mean(values) -> float:
    return round(float(np.mean(values)), 4) if len(values) else 0.0


def median(values) -> float | None:
    return round(float(np.median(values)), 2) if len(values) else None


def summarise(sources: dict, splits: list[str], done: list[tuple]) -> dict:
    """The scores of a run. sources: {policy: what is behind it, or None}. done: (job, answer) pairs of sim_eval.py."""
    episodes = [record for _, answer in done for record in answer["records"]]
    policies = {}
    for name, source in sources.items():
        mine = [record for record in episodes if record["policy"] == name]
        scores = {split: summarise_split([r for r in mine if r["split"] == split]) for split in splits}
        policies[name] = {"checkpoint": source, "splits": scores}
        if source is not None:
            policies[name]["language"] = summarise_language(mine)
            # batch 1, one thread, with the other workers running
            policies[name]["predict_ms"] = median([answer["ms"][name] for _, answer in done if name in answer["ms"]])
    unconditioned = {}
    for split in splits:
        answers = [answer for job, answer in done if job.split == split]
        unconditioned[split] = wilson(sum(a["solved"] for a in answers), sum(a["tried"] for a in answers))
    first = next(iter(policies))
    shown = {key: value for key, value in policies[first].items() if key != "predict_ms"}
    return {"policy": first, **shown, "policies": policies, "expert_unconditioned": unconditioned}


def summarise_split(records: list[dict]) -> dict:
    """The scores of one policy on one split: sample and category means, per category, why it failed, errors."""
    out = {"n": len(records), **rates(records), "categories": {}}
    for name in dict.fromkeys(record["category"] for record in records):
        group = [record for record in records if record["category"] == name]
        out["categories"][name] = {"n": len(group)} | {goal: mean([r[goal] for r in group]) for goal in GOALS}
    out["category_mean"] = {goal: mean([c[goal] for c in out["categories"].values()]) for goal in GOALS}
    out["reasons"] = dict(Counter(record["reason"] for record in records).most_common())
    out["on_part"] = rates([record for record in records if record.get("on_part")])
    for key in ("pixel_error", "approach_error_deg"):  # medians against the expert's contact
        out[key] = median([record[key] for record in records if key in record])
    return out


def summarise_language(records: list[dict]) -> dict:
    """Scenes with at least two labelled parts: is the named one meant, and does the wrong sentence hurt?"""
    asked = [record for record in records if "language" in record]
    said = [record["language"] for record in asked]
    n = len(asked)
    return {
        "nearest": wilson(sum(s["nearest"] for s in said), n),
        "chance": mean([1 / s["parts"] for s in said]) if n else None,
        "right_sentence": {"initial": wilson(sum(record["initial"] for record in asked), n)},
        "wrong_sentence": {"initial": wilson(sum(s["wrong_initial"] for s in said), n)},
    }


# ---- tables of sim_eval.py -------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """Success rates of all policies on every split."""
    splits = results["splits"]
    head = [f"{split} {name}" for split in splits for name in (*GOALS.values(), "category mean", "px / deg off")]
    rows = []
    for name, policy in results["policies"].items():
        rows.append([name])
        for summary in policy["splits"].values():
            pixels, degrees = summary["pixel_error"], summary["approach_error_deg"]
            off = "" if None in (pixels, degrees) else f"{pixels:.1f} / {degrees:.0f}"
            means = both(summary["category_mean"], summary["n"])
            rows[-1] += [*(percent(summary[goal]) for goal in GOALS), means, off]
    tried = [cell for split in splits for cell in (percent(results["expert_unconditioned"][split]), "", "", "")]
    return grid(["policy", *head], [*rows, ["expert, unconditioned", *tried]])


def report(results: dict) -> str:
    """The main table; what a prediction costs and what the sentence is worth; what was skipped."""
    lines = ["**Partial result: the run was stopped.**", ""] if results["partial"] else []
    lines += [table(results), "", SUCCESS, ""]
    rows = []
    for name, policy in results["policies"].items():
        said = policy.get("language")
        if said and said["nearest"]["n"]:
            sentences = (percent(said[key]["initial"]) for key in ("right_sentence", "wrong_sentence"))
            ms = "" if policy.get("predict_ms") is None else f"{policy['predict_ms']:.1f}"
            rows.append([name, ms, percent(said["nearest"]), f"{said['chance']:.2f}", *sentences])
    if rows:
        lines += [grid(SENTENCES, rows), "", SENTENCES_TEXT, ""]
    return "\n".join(lines + skips(results["skipped"]))


def skips(skipped: dict) -> list[str]:
    """What was left out, by name and with counts: broken objects of the user, scenes that the expert cannot solve."""
    lines = []
    if skipped["objects"]:
        named = [f"* {plain(name)}: {plain(reason)}" for name, reason in skipped["objects"].items()]
        lines += [f"Skipped {len(named)} objects:", "", *named, ""]
    for key, what in (
        ("held_joints", "Joints held fixed because they sit on a part that moves itself"),
        ("infeasible", "Scenes passed over because the expert found no contact, and another was taken"),
        ("given_up", "Episodes left out because no scene of theirs could be solved"),
    ):
        counts = Counter(skipped[key])
        if counts:
            named = ", ".join(f"{plain(name)} {count}" for name, count in counts.most_common())
            lines += [f"{what}: {sum(counts.values())} ({named}).", ""]
    return lines


def details(results: dict) -> str:
    """Per split: how the episodes ended; then the rates as ManipLLM's released evaluator counts them."""
    policies = results["policies"]
    lines = []
    for split in results["splits"]:
        counts = {name: policy["splits"][split]["reasons"] for name, policy in policies.items()}
        reasons = list(dict.fromkeys(reason for count in counts.values() for reason in count))
        rows = [[name, *(count.get(reason, 0) for reason in reasons)] for name, count in counts.items()]
        lines += [grid([f"{split}: how episodes ended", *reasons], rows), ""]
    head = [f"{split} {goal}" for split in results["splits"] for goal in GOALS.values()]
    summaries = {name: [s["on_part"] for s in policy["splits"].values()] for name, policy in policies.items()}
    rows = [[name, *(percent(s[goal]) for s in parts for goal in GOALS)] for name, parts in summaries.items()]
    lines += [grid(["pixels on a movable part only", *head], rows), "", ON_PART, ""]
    return "\n".join(lines)


def categories(results: dict) -> str:
    """Per category: ours (>= 0.01 / >= 0.1) beside what RoboMamba's Table 2 prints for RoboMamba and ManipLLM."""
    policies = results["policies"]
    paper = read_json(DATA / "paper_table2.json", dict)
    lines = [OURS, f"Theirs: {paper['source']} ({paper['setting']}).", ""]
    for split in results["splits"]:
        columns = THEIRS if split in CATALOGUE_SPLITS else ()
        summaries = [policy["splits"][split] for policy in policies.values()]
        groups = [summary["categories"] for summary in summaries]
        names = list(dict.fromkeys(name for group in groups for name in group))
        known = [paper["categories"][name] for name in names if name in paper["categories"]]  # not archetypes
        rows = []
        for name in names:
            ours = [both(group[name]) if name in group else "-" for group in groups]
            theirs = [f"{paper['categories'][name][c]:.2f}" if name in paper["categories"] else "-" for c in columns]
            rows.append([name, max(group[name]["n"] for group in groups if name in group), *ours, *theirs])
        ours = [both(summary["category_mean"], summary["n"]) for summary in summaries]
        theirs = [f"{sum(row[c] for row in known) / len(known):.2f}" if known else "-" for c in columns]
        rows.append(["mean", "", *ours, *theirs])
        printed = paper["printed_average"].get(split)
        if printed and results["split"] in ("both", split) and not results.get("categories"):
            rows.append(["the average they print", "", *[""] * len(ours), *(f"{printed[c]:.2f}" for c in columns)])
        lines += [grid([split, "n", *policies, *(f"{name} (theirs)" for name in columns)], rows), ""]
    return "\n".join(lines)


def write_results(out: Path, results: dict) -> list[Path]:
    """OUT/results.json (a line an episode), table.md and categories.md; returns what was written.

    A run that was stopped writes results.partial.json and table.partial.md and leaves what a finished one wrote."""
    kind = ".partial" if results["partial"] else ""
    paths = [out / f"results{kind}.json", out / f"table{kind}.md"]
    scores = {key: json.dumps(value, allow_nan=False) for key, value in results.items()}
    scores["episodes"] = "[\n" + ",\n".join(json.dumps(r, allow_nan=False) for r in results["episodes"]) + "\n]"
    write_text(paths[0], "{\n" + ",\n".join(f'"{key}": {text}' for key, text in scores.items()) + "\n}\n")
    write_text(paths[1], report(results) + "\n" + details(results))
    if not results["partial"]:
        paths.append(out / "categories.md")
        write_text(paths[2], categories(results))
        for name in ("results.partial.json", "table.partial.md"):  # of an earlier try
            (out / name).unlink(missing_ok=True)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of a results.json of sim_eval.py again.")
    parser.add_argument("results")
    parser.add_argument("--out", help="write the results there without the episodes, which are most of them")
    args = parser.parse_args()
    results = read_json(args.results)
    try:
        print(report(results))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{args.results}: not a results.json of sim_eval.py ({error!r})") from None
    if args.out:
        write_json(args.out, {key: value for key, value in results.items() if key != "episodes"})


if __name__ == "__main__":
    run_main(main)
