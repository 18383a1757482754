"""What sim_eval.py and extras/reasoning_eval.py print and write about a run: tables in Markdown, results.json.

    python -m common.report runs/eval/results.json --out FILE.json     # the tables again; FILE: without the episodes

    table(results)        policies side by side
    report(results)       the same, what the sentence is worth, what was skipped
    details(results)      how the episodes ended, per split
    categories(results)   per category, beside the paper's columns (data/paper_table2.json; theirs, another simulator)

    reasoning_report(results)     answers in words and in coordinates: what stands in the README
    reasoning_details(results)    the same with k/n and intervals for all four that answer, and per category
    paper_table1(results)         BLEU and POPE beside the paper's (data/paper_table1.json; theirs, other questions)

Each takes what sim_eval.evaluate, or below the line reasoning_eval.benchmark, returns and gives text. scan_table and
speed_table do so for selective_scan.py --out and extras/speed.py.
"""

import argparse
import json
import math
from pathlib import Path

from common.files import write_text

PAPER = Path(__file__).parent.parent / "data/paper_table2.json"
PAPER_REASONING = Path(__file__).parent.parent / "data/paper_table1.json"
THEIRS = ("RoboMamba", "ManipLLM")  # columns of it
CATALOGUE_SPLITS = ("seen", "unseen", "val")  # of our own catalogue, named as the paper's; not the user's objects


def wilson(k: int, n: int, z: float = 1.959964) -> dict:
    """Rate k / n with Wilson's 95 % interval, which stays inside 0..1 and is right at 0 and n; n = 0 says nothing."""
    if n == 0:
        return {"k": 0, "n": 0, "rate": 0.0, "lo": 0.0, "hi": 1.0}
    centre, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = (max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z)))
    return {"k": k, "n": n, "rate": round(k / n, 4), "lo": round(low, 4), "hi": round(high, 4)}


def percent(rate: dict) -> str:
    return f"{rate['k']}/{rate['n']} {rate['rate']:.2f} [{rate['lo']:.2f}, {rate['hi']:.2f}]"


def table(results: dict) -> str:
    """Policies side by side on every split, in Markdown."""
    splits = list(results["splits"])
    head = [f"{split} {text}" for split in splits for text in (">= 0.01", ">= 0.1", "category mean", "px / deg off")]
    lines = row("policy", *head) + row(*["---"] * (len(head) + 1))
    for name, policy in results["policies"].items():
        cells = []
        for summary in policy["splits"].values():
            mean, errors = summary["category_mean"], (summary["pixel_error"], summary["approach_error_deg"])
            cells += [percent(summary["initial"]), percent(summary["long"])]
            cells += [f"{mean['initial']:.2f} / {mean['long']:.2f}"]
            cells.append("" if None in errors else f"{errors[0]:.1f} / {errors[1]:.0f}")
        lines += row(name, *cells)
    unconditioned = [cell for split in splits for cell in (percent(results["expert_unconditioned"][split]), "", "", "")]
    return "\n".join(lines + row("expert, unconditioned", *unconditioned))


def report(results: dict) -> str:
    """The main table; what a prediction costs and what the sentence is worth."""
    lines = ["**Partial result: the run was stopped.**", ""] if results["partial"] else []
    lines += table(results).splitlines()
    lines += [
        "",
        "k/n, rate, [95 % Wilson interval]. Moved >= 0.01 and >= 0.1 rad or m. Medians of the distance to the",
    ]
    lines += ["expert's contact. Scenes are those that the expert solves; its last row counts all that were tried.", ""]
    for name, policy in results["policies"].items():
        if policy.get("predict_ms") is not None:
            lines += [f"{name}: {policy['predict_ms']:.1f} ms a prediction (median, batch 1, one thread).", ""]
        said = policy.get("language")
        if said and said["nearest"]["n"]:
            right, wrong = (percent(said[key]["initial"]) for key in ("right_sentence", "wrong_sentence"))
            lines += [
                f"{name}, scenes with several parts: nearest to the named part {percent(said['nearest'])}, chance"
            ]
            lines += [
                f"{said['chance']:.2f}; >= 0.01 with the right sentence {right}, with another part's {wrong}.",
                "",
            ]
        for split, summary in policy["splits"].items():
            if "closed_loop" in summary:
                again = summary["closed_loop"]
                lines += [
                    f"{name}, {split}, closed loop ({again['grips']} grips, a prediction each): >= 0.01 "
                    f"{percent(again['initial'])}, >= 0.1 {percent(again['long'])},",
                    f"median motion {again['moved']:.2f}; open loop, same scenes: {percent(again['open']['initial'])}, "
                    f"{percent(again['open']['long'])}, {again['open']['moved']:.2f}.",
                    "",
                ]
    return "\n".join(lines + skips(results["skipped"]))


def skips(skipped: dict) -> list[str]:
    """What was left out, by name and with counts: broken objects of the user, scenes that the expert cannot solve."""
    lines = []
    if skipped["objects"]:
        lines += [f"Skipped {len(skipped['objects'])} objects:", ""]
        lines += [*(f"* {name}: {reason}" for name, reason in skipped["objects"].items()), ""]
    for key, what in (
        ("held_joints", "Joints held fixed because they sit on a part that moves itself"),
        ("infeasible", "Scenes passed over because the expert found no contact, and another was taken"),
        ("given_up", "Episodes left out because no scene of theirs could be solved"),
    ):
        counts = skipped[key]
        if counts:
            named = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
            lines += [f"{what}: {sum(counts.values())} ({named}).", ""]
    return lines


def details(results: dict) -> str:
    """Per split: how the episodes ended."""
    policies, lines = results["policies"], []
    for split in results["splits"]:
        counts = {name: policy["splits"][split]["reasons"] for name, policy in policies.items()}
        reasons = list(dict.fromkeys(reason for count in counts.values() for reason in count))
        lines += row(f"{split}: why", *reasons) + row(*["---"] * (len(reasons) + 1))
        for name, count in counts.items():
            lines += row(name, *(count.get(reason, 0) for reason in reasons))
        lines.append("")
    return "\n".join(lines)


def categories(results: dict) -> str:
    """Per category: ours (>= 0.01 / >= 0.1) beside what RoboMamba's Table 2 prints for RoboMamba and ManipLLM."""
    policies, paper = results["policies"], json.loads(PAPER.read_text())
    lines = [
        "Ours: share of episodes that moved the named part by >= 0.01 / >= 0.1 rad or m. **Theirs: another simulator,",
        "other objects, another gripper. Their columns are for orientation; the numbers must not be compared.**",
        f"Theirs: {paper['source']} ({paper['setting']}).",
        "",
    ]
    for split in results["splits"]:
        theirs = paper["categories"] if split in CATALOGUE_SPLITS else {}
        columns = THEIRS if theirs else ()
        lines += row(split, "n", *policies, *(f"{name} (theirs)" for name in columns))
        lines += row(*["---"] * (len(policies) + 2 + len(columns)))
        groups = [policy["splits"][split]["categories"] for policy in policies.values()]
        names = list(dict.fromkeys(name for group in groups for name in group))
        for name in names:
            ours = [f"{g[name]['initial']:.2f} / {g[name]['long']:.2f}" if name in g else "" for g in groups]
            cells = [f"{theirs[name][column]:.2f}" for column in columns]
            lines += row(name, max(group[name]["n"] for group in groups if name in group), *ours, *cells)
        means = [policy["splits"][split]["category_mean"] for policy in policies.values()]
        cells = [f"{sum(theirs[name][column] for name in names) / max(1, len(names)):.2f}" for column in columns]
        lines += row("mean", "", *(f"{mean['initial']:.2f} / {mean['long']:.2f}" for mean in means), *cells)
        printed = paper["printed_average"].get(split, {}) if results["split"] in ("both", split) else {}
        if printed:
            lines += row("the average they print", "", *[""] * len(policies), *(f"{printed[c]:.2f}" for c in columns))
        lines.append("")
    return "\n".join(lines)


def row(*cells) -> list[str]:
    return ["| " + " | ".join(str(cell) for cell in cells) + " |"]


def write_results(out: Path, results: dict, stem: str, table_stem: str) -> None:
    """OUT/{stem}.json, one line an episode, OUT/{table_stem}.md, and categories.md beside results.json."""
    lines = ",\n".join("  " + json.dumps(record) for record in results["episodes"])
    text = json.dumps(results | {"episodes": []}, indent=1)
    write_text(out / f"{stem}.json", text.removesuffix("[]\n}") + f"[\n{lines}\n ]\n}}\n")
    write_text(out / f"{table_stem}.md", report(results) + "\n" + details(results))
    if stem == "results":
        write_text(out / "categories.md", categories(results))


def place(scores: dict) -> str:
    """A score of extras.reasoning_eval in a cell: a rate, an IoU, pixels, pixels and degrees."""
    if "rate" in scores:
        return f"{scores['rate']:.2f}"
    if "iou" in scores:
        return f"IoU {scores['iou']:.2f}"
    px = "no answer" if scores["px"] is None else f"{scores['px']:.1f} px"
    return f"{px}, {scores['degrees']:.0f} deg" if "degrees" in scores else px


def reasoning_report(results: dict) -> str:
    """Two tables: robot questions, general questions and presence, by who answers; then the families side by side."""
    columns = (
        "robot exact",
        "BLEU-1",
        "BLEU-2",
        "BLEU-3",
        "BLEU-4",
        "general exact",
        "presence",
        "precision",
        "recall",
    )
    lines = row("answers", *columns, "F1", "yes") + row(*["---"] * (len(columns) + 3))
    for split, result in results["splits"].items():
        for who, scores in result["answerers"].items():
            exact = [percent(scores[key]) if key in scores else "" for key in ("robot", "general")]
            bleu = [f"{value:.1f}" for value in scores.get("bleu", ())] or [""] * 4
            pope = scores.get("pope")
            asked = [f"{pope[key]:.2f}" for key in ("precision", "recall", "f1", "yes")] if pope else [""] * 4
            cells = (exact[0], *bleu, exact[1], f"{pope['accuracy']['rate']:.2f}" if pope else "", *asked)
            lines += row(f"{split}, {who}", *cells)
    lines += [
        "",
        "Share of answers right to the letter, k/n, [95 % Wilson interval]; corpus BLEU (0 .. 100) of the robot's",
        'questions; presence as POPE scores it ("yes" is positive). Greedy decoding, every question asked alone.',
        "",
    ]
    splits = results["splits"]
    shown = ("model", "image-blind", "majority")
    head = [text for split in splits for text in (f"{split} n", *(f"{split} {who}" for who in shown))]
    lines += row("family", *head) + row(*["---"] * (len(head) + 1))
    for family in dict.fromkeys(f for result in splits.values() for f in result["answerers"]["model"]["families"]):
        cells = []
        for result in splits.values():
            scores = [result["answerers"][who]["families"].get(family) for who in shown]
            cells += [scores[0]["n"], *map(place, scores)] if scores[0] else [""] * (1 + len(shown))
        lines += row(family, *cells)
    return "\n".join(
        [*lines, "", "Words: share right to the letter. Where, contact: median distance. Box: median IoU.", ""]
    )


def reasoning_details(results: dict) -> str:
    """Per split: every family with k/n and interval, then every category."""
    lines = []
    for split, result in results["splits"].items():
        for title in ("families", "categories"):
            groups = {who: scores[title] for who, scores in result["answerers"].items()}
            lines += row(f"{split}: {title}", *groups) + row(*["---"] * (len(groups) + 1))
            for name in groups["model"]:
                scores = [group[name] for group in groups.values()]
                lines += row(
                    name, *(percent(s) if "k" in s else f"{place(s)} ({percent(s['read'])} read)" for s in scores)
                )
            lines.append("")
        speed = f"{result['tokens_per_second']:.0f} tokens/s, reading pictures and questions included"
        lines += [
            f"{split}: {result['n']} questions, {result['pictures']} pictures of {result['folder']}; {speed}.",
            "",
        ]
    return "\n".join([*lines, f"{results['command']} (commit {results['commit']}; {results['hardware']})", ""])


def paper_table1(results: dict) -> str:
    """Ours (BLEU of the robot's questions; POPE = accuracy on presence) above what RoboMamba's Table 1 prints."""
    paper = json.loads(PAPER_REASONING.read_text())
    columns = paper["columns"]
    lines = [
        "Ours: questions of data/questions.py about rendered pictures. **Theirs: other data sets, other questions and",
        "models pre-trained on text. Their rows are for orientation; the numbers must not be compared.**",
        f"Theirs: {paper['source']} ({paper['setting']}). {paper['notes']}.",
        "",
    ]
    lines += row("model", *columns) + row(*["---"] * (len(columns) + 1))
    for split, result in results["splits"].items():
        scores = result["answerers"]["model"]
        ours = {"LM": f"{results['parameters'] / 1e6:.1f}M in all"}
        if "pope" in scores:
            ours["POPE"] = f"{100 * scores['pope']['accuracy']['rate']:.1f}"
        if "bleu" in scores:
            ours |= {f"BLEU-{n}": f"{scores['bleu'][n - 1]:.1f}" for n in (1, 4)}
        lines += row(f"ours, {split}, our own questions", *(ours.get(column, "") for column in columns))
    for name, values in paper["rows"].items():
        lines += row(f"{name} (theirs)", *("" if value is None else value for value in values))
    return "\n".join([*lines, ""])


def scan_table(results: dict) -> str:
    """The README's table of `python selective_scan.py --out FILE`: forward + backward, medians, peak extra memory."""
    lines = row(
        "(B, L, E, N)", "chunked", "loop (definition)", "compile=True", "mambapy", "faster than mambapy", "memory"
    )
    lines += row(*["---"] * 7)
    for shape in results["shapes"]:
        m = {method["method"]: method for method in shape["methods"]}
        chunked, theirs = m["chunked"], m["mambapy"]
        times = [f"{m[name]['train_ms']:.0f} ms" for name in ("chunked", "reference", "compile=True", "mambapy")]
        memory = f"{chunked['peak_mib']:.0f} against {theirs['peak_mib']:.0f} MiB"
        lines += row(tuple(shape["shape"]), *times, f"{theirs['train_ms'] / chunked['train_ms']:.1f}x", memory)
    return "\n".join(lines)


SPEED_COLUMNS = ("Mamba: ms a prediction / a token", "Transformer", "Mamba: state, kB", "Transformer")
SPEED_ROWS = {  # of extras/speed.py
    "encoder": "the picture encoder alone, part of all below",
    "head": "one pass and the policy head",
    "text": "one pass and the action as text, {text} tokens",
    "going on": "prediction {step} of a loop that remembers: going on from its state",
    "reading all again": "the same, reading all {past} earlier tokens again",
}
SPEED_NOTES = """
| the paper's Fig. 1 | Hz |
| --- | --- |
| RoboMamba 2.8B | 9.0 |
| OpenVLA 7B | 3.4 |
| ManipLLM 7B | 1.1 |

Theirs ran on an A100, without quantisation or other acceleration. These numbers must not be compared with those above,
and what makes the difference between them cannot be told: the models have different sizes, encoders and picture sizes;
RoboMamba reads an action off one pass and a head, the others spell it in tokens, in answers of different length; batch,
precision and whether 9.0 Hz is head or text are not stated; there is no Transformer of RoboMamba's size. Above, sizes,
encoder, precision, hardware and answer length are equal. But a few million parameters at batch 1 mostly cost the calls
of many small operations, of which a Mamba block has more than attention has; a model of billions does not feel them.
"""


def speed_table(results: dict) -> str:
    """Tables of `python sim_eval.py --speed`, two a device: predictions at batch 1; the same after a context."""
    names, tokens = ("mamba", "attention"), results["tokens"]
    ours, theirs = (results["models"][name] for name in names)
    named = {"text": tokens["text"], "step": results["closed_loop_step"], "past": tokens["past of the closed loop"]}
    sizes = (f"{m['language_model']:,d} parameters in {m['blocks']} blocks" for m in (ours, theirs))
    lines = [
        "Language models: Mamba {}, Transformer {}; batch 1, float32, medians;".format(*sizes),
        f"a picture is {tokens['picture']} tokens, the prompt {tokens['prompt']}.",
        "",
    ]
    for device, measured in results["devices"].items():
        lines += row(device, "Mamba", "Transformer", "Transformer / Mamba") + row(*["---"] * 4)
        for key, label in SPEED_ROWS.items():
            ms = [measured["predictions"][key][name]["ms"] for name in names]
            cells = [f"{x:.1f} ms, {1000 / x:.0f} Hz" for x in ms]
            lines += row(label.format(**named), *cells, f"{ms[1] / ms[0]:.2f}x")
        lines += ["", *row("tokens of context", *SPEED_COLUMNS), *row(*["---"] * (1 + len(SPEED_COLUMNS)))]
        for context in measured["contexts"]:
            pair = [context[name] for name in names]
            cells = [f"{x['prediction']['ms']:.1f} / {x['token_ms']:.2f}" for x in pair]
            lines += row(context["tokens"], *cells, *(f"{x['state_bytes'] / 1000:,.0f}" for x in pair))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of a results.json of sim_eval.py again.")
    parser.add_argument("results")
    parser.add_argument("--out", help="write the results there without the episodes, which are most of them")
    args = parser.parse_args()
    try:
        results = json.loads(Path(args.results).read_text())
        text = report(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        parser.error(f"{args.results}: not a results.json of sim_eval.py ({why})")
    print(text)
    if args.out:
        short = {key: value for key, value in results.items() if key != "episodes"}
        try:
            write_text(Path(args.out), json.dumps(short, indent=1) + "\n")
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
