"""Write RESULTS.md, and the table of README.md and of the model card, from the committed JSON.

    python -m extras.results        # rewrites all three; tests/test_extras_results.py checks that they are up to date

Nothing is measured here. Each program prints its own tables; the few below are read from JSON as they are.
"""

import csv
import re
from pathlib import Path

from common import report
from common.files import read_json, read_text, write_atomically, write_text
from common.plots import draw_lines
from common.scripts import run_main
from extras.mistakes import mistakes_table
from extras.reasoning_eval import paper_table1, reasoning_report
from extras.speed import SPEED_NOTES, speed_table

ROOT = Path(__file__).resolve().parent.parent
RGBD = "data/pretrained/robomamba-tiny-rgbd"
PAGES = ("README.md", f"{RGBD}/README.md")
BEGIN = "<!-- made by python -m extras.results -->"
END = "<!-- end -->"

README_ROWS = {  # name in the results of RGBD -> what the row is
    "model": "RGB image and instruction, the paper's head of 3,152 parameters, all else frozen",
    "model-depth": "the same weights, shown an imperfect camera's depth image too; pointing head, contact refined",
    "random-backbone-depth": "`model-depth` with an untrained, frozen backbone: only the heads are trained",
    "blind": "vision-free baseline: median training label of each category and part",
    "random-normal": "random pixel of the object + its true surface normal (told the normal)",
    "expert": "oracle: scripted expert that knows the joint; scenes are those it solves",
}
GLOSSARY = """| row | what it is |
| --- | --- |
| `model` | image and instruction, one forward pass, the paper's head of 3,152 parameters; RGB alone |
| `model-point` | the same input, pointing head (3,580 parameters, common/pointing.py) |
| `model-text` | the same weights spell the action out ("64 33 69 25 89": quantised coordinates), no head; RGB alone |
| `model-depth-head-raw` | depth and normals as input too; the paper's head |
| `model-depth-head` | the same, with the contact refined on the depth image (data/depth.py) |
| `model-depth-raw` | depth as input, the pointing head, not refined |
| `model-depth` | depth as input, the pointing head, refined: chosen on validation scenes by the rate at 0.1 |
| `random-backbone-depth` | frozen random backbone of the same shapes; both heads trained as for ours; refined |
| `random-depth` | random pixel of the object, refined in the same way: what depth alone contributes |
| `blind` | vision-free baseline: median training label of each (category, part); it never sees the image |
| `part-pixel-normal` | privileged baseline: random pixel of the *named part*, true surface normal |
| `random-normal` | privileged baseline: random pixel of the *object*, true surface normal |
| `random` | random pixel of the object, random direction |
| `expert` | oracle: scripted expert that knows the joint; only scenes it solves are used, so its row is 1 |
| `expert, unconditioned` | scene acceptance rate: the fraction of sampled scenes that the expert solved |

Category mean: mean over categories of the rates at 0.01 / 0.1. Every policy acts on the same scenes with the same
instructions. The depth image comes from an imperfect camera: noise, holes, ragged edges. Refined: moved to the nearby
place that best suits a suction cup, flat and facing the predicted direction (`refine` in data/depth.py)."""
ABLATIONS = """`-depth`: depth as input too, pointing head, refined. All other rows: RGB alone, the paper's head.

| row | difference from `model` |
| --- | --- |
| `model-pixel`, `model-direction` | half of the action is the model's, the other half the oracle's |
| `seed-1` | heads trained from another seed |
| `mean-pool` | `--pool mean`: the head reads the mean of all text states, not the last one |
| `one-mlp` | `--head one_mlp`: pixel and rotation by one MLP (the paper's Table 6) |
| `hidden-48` | `--hidden 48`: six times as many parameters in the head |
| `all-fine-tuned` | every weight fine-tuned on the manipulation samples, three passes |"""
TARGETS = """`make targets`: 3,500 pictures, 800 + 350 steps, 20 epochs of heads. Display, Toaster, KitchenPot and
FoldingChair are shown without labels, the archetypes `trays` and `latch` not at all; scored on scenes of these six.

| row | what was trained |
| --- | --- |
| `nothing` | the default: all loss terms, 40 % of the pictures show grammar objects |
| `arm`, `motion`, `part` | without the moment arm, the motion or the mask of the named part |
| `named` | without any loss term about a named part, including the contact and its direction |
| `kinds` | without the text-free labels of movable parts: cells, kind, openness |
| `geometry`, `words` | without depth, normals and object mask; without category and colour |
| `encoder` | without stage vision: the encoder keeps its random weights |
| `grammar-20`, `grammar-60` | 20 % or 60 % of the pictures show grammar objects, same number of pictures |
| `-depth` | depth as input too, pointing head (then 27,476 parameters), refined; others: RGB, paper's head |"""
CHUNKS = "![local states of a chunk, what is carried into it, and their sum](data/figures/chunks.png)"
SCAN = """Forward and backward, float32: shortest and longest time over all rounds, peak memory beyond the inputs, and
the smallest and largest ratio to the chunked scan's time in the same round."""
SCAN_TABLES = {  # key in scan.json: caption of its table
    "linear": "The time of the chunked scan is linear in L:",
    "indexed": "Indexing a tensor inside an autograd loop takes time quadratic in L; calling `unbind` once does not:",
    "cumprod": "Fraction of outputs that are inf or nan when dividing by the cumulative product of decays:",
}
ENDINGS = """| ending | what the model is shown |
| --- | --- |
| none | RGB alone, the paper's head |
| `-point` | RGB alone, pointing head |
| `-depth` | depth as input too, pointing head, refined |"""
AGAIN = """A second training: `make train` from nothing, data included, scored on the scenes of "Manipulation". Stages
vision and align of the shipped model are older (LOG.md, "A pointing head needs no more"), so the command no longer ends
with its weights."""
SHORT = """`make short`: 8,000 pictures, 1,800 + 60 + 800 steps, 20 epochs of heads, from three seeds; `strict`
(`ARCHETYPES=strict`, seed 0) leaves out the archetypes that come near an unseen category. `rgb` has no depth:
`--preset tiny`, 15,000 pictures, 3,000 + 100 + 1,400 steps, stages vision and cotrain at `--lr 5e-3`."""
TRAININGS = """`make short`: 8,000 pictures, 1,800 + 60 + 800 steps, 20 epochs of heads.

| row | what was trained |
| --- | --- |
| `seed-0`, `seed-1`, `seed-2` | the same pictures; other weights, order and augmentation |
| `strict` | `ARCHETYPES=strict`: without the archetypes that come near an unseen category; seed 0 |
| `0-archetypes` .. `24-archetypes` | 3,500 pictures each, 40 % from that number of archetypes; 800 + 40 + 350 steps |
| `-depth` | depth as input too, pointing head, refined; rows without it: RGB alone and the paper's head |

seed-0 was trained on two CPU cores in float32, the others on a GPU under bfloat16 autocast (see "On a GPU"). These runs
predate four changes: stage vision now leaves depth out of half of the pictures, then of 30 %; new heads start at the
mean state (`centre` in finetune_policy.py); `refine` has the limit `turn`; the pointing head has 3,580 parameters, then
27,476. Nothing was chosen by these numbers."""
QUESTIONS = """`make questions`: 400 steps of stage 1.2 after seed-0's first two stages, then heads; otherwise as above.

| row | questions of stage 1.2, in addition to the general ones |
| --- | --- |
| `with-all` | plans, affordances (possible, movable), success, past, future; contacts in words |
| `with-contacts` | contacts in words only |
| `with-plans` | as `with-all`, without contacts in words |
| `with-neither` | none |"""
VARIETY = "![success over the number of archetypes](data/figures/variety.png)"


def made_by(results: dict) -> str:
    """The command; then versions and, where the file says them, commit, hardware, seed."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    told = {key: results.get(key) for key in ("commit", "hardware", "seed")} | {"versions": versions}
    said = "; ".join(f"{name} {value}" for name, value in told.items() if value is not None)
    return f"`{results['command']}`\n({said})."


def rates(policy: dict, split: str) -> str:
    """One cell of the README: rate at 0.1 and interval of a policy on a split, `-` where it was not evaluated."""
    if split not in policy.get("splits", {}):
        return "-"
    rate = policy["splits"][split]["long"]
    return f"{rate['rate']:.2f} [{rate['lo']:.2f}, {rate['hi']:.2f}]"


def short_table() -> str:
    """Six rows at the paper's threshold, for the first page."""
    policies = read_json(ROOT / RGBD / "results.json", dict)["policies"]
    splits = ("seen", "unseen")
    episodes = [f"{split} ({policies['model']['splits'][split]['n']})" for split in splits]
    rows = [
        [f"`{name}`", *(rates(policies.get(name, {}), split) for split in splits), text]
        for name, text in README_ROWS.items()
    ]
    return report.grid(["policy", *episodes, "what it is"], rows)


def with_table(text: str, name: str = "README.md") -> str:
    """A page with its table regenerated. Raises: ValueError naming the page when a mark is missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{name}: expected one line {BEGIN} and one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{short_table()}\n{END}{rest.split(END)[1]}"


# ---- tables that only this document has


def categories(results: dict) -> str:
    """Per category, of the README's policies."""
    return report.categories(results | {"policies": {name: results["policies"][name] for name in README_ROWS}})


def scan(results: dict) -> str:
    """Forward and backward of every method, shape and thread count; the classic failures; the time per element."""
    names = [method["method"] for method in results["shapes"][0]["methods"]]  # the same for every shape
    rows = []
    for shape in results["shapes"]:
        rows.append([tuple(shape["shape"]), shape["threads"]])
        for method in shape["methods"]:
            low, high = method["train_range_ms"]
            least, most = method["times"]
            cell = f"{low:.0f} to {high:.0f} ms, {method['peak_mib']:.0f} MiB"
            rows[-1].append(cell if method["method"] == "chunked" else f"{cell}, {least:.2g} to {most:.2g}x")
    lines = [report.grid(["(B, L, E, N)", "threads", *names], rows), "", SCAN, ""]
    for key, text in SCAN_TABLES.items():
        if key in results:
            lines += [text, "", records(results[key]), ""]
    return "\n".join(lines)


def records(items: list[dict]) -> str:
    """A list of flat JSON objects with the same keys as a table."""
    rows = [[f"{value:.3g}" if isinstance(value, float) else value for value in item.values()] for item in items]
    return report.grid(items[0], rows)


def trainings(results: dict) -> str:
    """A row for each training or policy, then mean and range of the seeds, if any."""
    columns = [(split, goal) for split in results["splits"] for goal in report.GOALS]
    rows, seeds = [], {}
    for name, policy in results["policies"].items():
        cells = [policy["splits"][split][goal] for split, goal in columns]
        rows.append([f"`{name}`", *map(report.percent, cells)])
        if name.startswith("seed-"):
            seeds.setdefault("seeds" + name[len("seed-0") :], []).append([cell["rate"] for cell in cells])
    for name, rates in seeds.items():
        ranges = (f"{sum(x) / len(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in zip(*rates, strict=True))
        rows.append([f"mean of {len(rates)} `{name}`, range", *ranges])
    return report.grid(["row", *(f"{split} {report.GOALS[goal]}" for split, goal in columns)], rows)


def variety(results: dict) -> dict:
    """The curves over the number of archetypes, as `draw_lines` takes them."""
    panels = {f"{split}, >= 0.1": {"RGB": [], "RGB-D": []} for split in results["splits"]}
    for name, policy in results["policies"].items():
        if found := re.fullmatch(r"(\d+)-archetypes(-depth)?", name):
            for split, scores in policy["splits"].items():
                line = panels[f"{split}, >= 0.1"]["RGB-D" if found[2] else "RGB"]
                line.append((int(found[1]), scores["long"]["rate"]))
    return {title: {name: sorted(line) for name, line in lines.items()} for title, lines in panels.items()}


def stages(data: dict) -> str:
    """Minutes of every stage of the shipped run, and the steps in its metrics.csv. data: its data.json."""
    times = {"data": ("", data["seconds"])}
    for item in csv.DictReader(read_text(ROOT / RGBD / "metrics.csv").splitlines()):  # the last row of a stage stays
        times[item["stage"]] = (int(item["step"]), float(item["seconds"]))
    times["policy"] = (times["policy"][0], read_json(ROOT / RGBD / "policy.json", dict)["seconds"])
    times["together"] = ("", sum(second for _, second in times.values()))
    rows = [[stage, steps, f"{second / 60:.1f}"] for stage, (steps, second) in times.items()]
    return report.grid(["stage", "steps", "minutes"], rows)


# ---- the document


HEAD = """# Results

Generated by `python -m extras.results` from the committed JSON; do not edit. Each section names its JSON file and the
command that produced it, as it was run at the time. One training seed unless a row says otherwise; the intervals are
binomial and do not include the spread between trainings.

On another machine: data and scenes are bit-equal on Linux x86_64 with the pinned versions; the predictions of the
shipped model agree to float rounding, so success counts differ by a few scenes of 550; weights trained there differ as
much as with another seed; times are comparable only within a table."""
PICTURES = """## Pictures

`python -m sim.pictures --sheet FILE`: the 20 seen and 10 unseen categories, from a friendlier camera than the scenes.

![one object of every category](data/figures/categories.png)

`python -m sim.pictures --grammar --sheet FILE`: the 29 archetypes of the grammar, one object each; training mixes their
bodies, handles, edges and distractors.

![one object of every archetype](data/figures/grammar.png)

`python -m sim.pictures --affordance Door,Microwave,StorageFurniture,Faucet`: how far the named part moves if it is
pulled at a pixel, in the true direction: green, as far as the paper's threshold asks; red, not at all.

![parts in green far from their hinge and in red near it](data/figures/affordance.png)

`python -m extras.look --image data/figures/examples/microwave.png --act "Open the door."`: what the last word reads of
each patch (red: more than the median), and the scan of every layer as a matrix, its implicit attention.

![patches on the door in red; four lower triangular matrices](data/figures/attention.png)

`python -m extras.play`, a page to click in: the actions of the model, the vision-free baseline and the oracle.

![a page with a cabinet, an instruction, three contacts and the stroke](data/figures/play.png)"""
TIMES = "Wall time of `make train` on two cores shared with other jobs; also from its metrics.csv and policy.json."
KEPT = "data/results"
SECTIONS = {  # title: file, then what to print: texts, or functions of the file's content
    "Manipulation": (f"{RGBD}/results.json", GLOSSARY, report.report),
    "Failure reasons": (f"{RGBD}/results.json", report.details),
    "Per category, beside the paper": (f"{RGBD}/results.json", categories),
    "Ablations": (f"{KEPT}/ablations.json", ABLATIONS, report.table),
    "The recipe run again": (f"{KEPT}/again.json", AGAIN, ENDINGS, trainings),
    "Transfer ablation": (f"{KEPT}/targets.json", TARGETS, trainings),
    "Short trainings": (f"{KEPT}/short.json", SHORT, ENDINGS, trainings),
    "Seeds, the strict variant, variety": (f"{KEPT}/trainings.json", TRAININGS, trainings, VARIETY),
    "Which robot questions help": (f"{KEPT}/questions.json", QUESTIONS, trainings),
    "Reasoning": (f"{RGBD}/reasoning.json", reasoning_report),
    "Reasoning, beside the paper": (f"{RGBD}/reasoning.json", paper_table1),
    "Speed": (f"{KEPT}/speed.json", speed_table, SPEED_NOTES),
    "What the physics forgives": (f"{KEPT}/physics.json", trainings),
    "Scan": (f"{KEPT}/scan.json", CHUNKS, scan),
    "Scan on a GPU": (f"{KEPT}/scan_gpu.json", scan),
    "On a GPU": (f"{KEPT}/gpu.json", lambda found: found["what"], lambda found: records(found["runs"])),
    "Your own policy": (f"{KEPT}/example_policy.json", "`example` is extras/example_policy.py.", report.table),
    "Classic mistakes": (
        f"{KEPT}/mistakes.json",
        lambda found: f"`python -m extras.mistakes`, {found['scenes']} validation scenes",
        lambda found: mistakes_table(found["rows"]),
    ),
    "Time of the shipped training": (f"{RGBD}/data.json", TIMES, stages),
}


def document() -> str:
    """RESULTS.md."""
    lines = [HEAD, "", *(f"* [{title}](#{anchor(title)})" for title in (*SECTIONS, "Pictures"))]
    said = set()  # files whose command stands above already
    for title, (source, *parts) in SECTIONS.items():
        found = read_json(ROOT / source, dict)
        if "command" in found and source not in said:
            parts = [made_by, *parts]
        said.add(source)
        lines += ["", f"## {title}", "", f"From {source}."]
        for part in parts:
            lines += ["", (part if isinstance(part, str) else part(found)).strip()]
    return "\n".join([*lines, "", PICTURES]) + "\n"


def anchor(title: str) -> str:
    """The address that Git hosts give a heading."""
    return title.lower().replace(",", "").replace(" ", "-")


def main() -> None:
    for name in PAGES:
        write_text(ROOT / name, with_table(read_text(ROOT / name), name))
    write_text(ROOT / "RESULTS.md", document())
    curves = draw_lines(variety(read_json(ROOT / KEPT / "trainings.json", dict)), log_x=False)
    write_atomically(ROOT / "data/figures/variety.png", lambda temporary: curves.save(temporary, "PNG"))
    print("wrote RESULTS.md and the table of", " and ".join(PAGES))


if __name__ == "__main__":
    run_main(main)
