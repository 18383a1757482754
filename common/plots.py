"""Curves as pictures, where matplotlib is installed (an optional extra; training and evaluation run without it).

draw_curves_file(metrics_csv, out_png)      every curve of a metrics.csv: train.py and finetune_policy.py leave it
draw_lines(panels)                          lines in panels as one PIL image

python -m common.plots runs/cotrain/metrics.csv --out curves.png
"""

import argparse
import csv
import math

import numpy as np
from PIL import Image

from common.files import write_atomically
from common.scripts import run_main

COLUMNS = 4  # panels a row
INCHES = (3.2, 2.2)  # of a panel
DPI = 80


def read_curves(path) -> dict[str, list[tuple[float, float]]]:
    """metrics.csv -> {"stage name" or "name": [(step, value), ..]}; rows may carry a `stage` column."""
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                label = f"{row['stage']} {row['name']}" if row.get("stage") else row["name"]
                curves.setdefault(label, []).append((float(row["step"]), float(row["value"])))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a metrics.csv with step, name, value ({error})") from None
    return curves


def draw_lines(panels: dict[str, dict[str, list[tuple[float, float]]]], log_x: bool = True) -> Image.Image:
    """{title: {line: [(x, y), ..]}} -> one panel a title, without what is not finite.

    Raises: ValueError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("curves need matplotlib: pip install matplotlib") from None
    columns = min(COLUMNS, max(len(panels), 1))
    rows = max(math.ceil(len(panels) / columns), 1)
    figure = Figure((columns * INCHES[0], rows * INCHES[1]), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for i, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, points in lines.items():
            finite = [(x, y) for x, y in points if math.isfinite(y)]
            axes.plot([x for x, _ in finite], [y for _, y in finite], marker="." if len(finite) < 9 else "", label=name)
        axes.set_title(title, fontsize="small")
        axes.tick_params(labelsize="x-small")
        if log_x:
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(fontsize="x-small")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_curves_file(metrics_csv, out_png) -> bool:
    """One panel a curve of a metrics.csv, its last value in the title. False, and a hint, without matplotlib."""
    curves = read_curves(metrics_csv)
    titles = {name: f"{name}: {points[-1][1]:.4g}" for name, points in curves.items()}
    try:
        sheet = draw_lines({titles[name]: {name: points} for name, points in curves.items()}, log_x=False)
    except ValueError as error:
        print(f"{out_png}: not drawn; {error}")
        return False
    write_atomically(out_png, lambda temporary: sheet.save(temporary, "PNG"))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of a metrics.csv.")
    parser.add_argument("metrics")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    draw_curves_file(args.metrics, args.out)


if __name__ == "__main__":
    run_main(main)
