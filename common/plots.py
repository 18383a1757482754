"""Curves as pictures, if matplotlib is installed (an optional extra; training and evaluation run without it).

python -m common.plots runs/cotrain/metrics.csv --out curves.png      (train.py and finetune_policy.py draw their own)
"""

import argparse
import csv
import math

import numpy as np
from PIL import Image

from common.files import read_text, write_atomically
from common.scripts import run_main


def new_figure(width: float, height: float):
    """An empty matplotlib figure, size in inches. Raises: ValueError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("these pictures need matplotlib: pip install matplotlib") from None
    return FigureCanvasAgg(Figure((width, height), dpi=80, layout="constrained")).figure


def as_image(figure) -> Image.Image:
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def draw_lines(panels: dict[str, dict[str, list[tuple[float, float]]]], log_x: bool = True) -> Image.Image:
    """{title: {line: [(x, y), ..]}} -> one panel per title, four a row, finite points only. Raises: as `new_figure`"""
    columns = min(4, max(len(panels), 1))
    rows = max(math.ceil(len(panels) / columns), 1)
    figure = new_figure(3.2 * columns, 2.2 * rows)
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
    return as_image(figure)


def draw_curves_file(metrics_csv, out_png) -> bool:
    """One panel per curve of a metrics.csv, its last value in the title. Without matplotlib: False, and a hint."""
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        for row in csv.DictReader(read_text(metrics_csv).splitlines()):
            name = f"{row['stage']} {row['name']}" if row.get("stage") else row["name"]
            curves.setdefault(name, []).append((float(row["step"]), float(row["value"])))
    except (KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{metrics_csv}: not a metrics.csv with step, name, value ({error})") from None
    panels = {f"{name}: {points[-1][1]:.4g}": {name: points} for name, points in curves.items()}
    try:
        sheet = draw_lines(panels, log_x=False)
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
