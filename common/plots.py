"""Curves from metrics.csv as one picture of small panels, drawn with Pillow.

Every run of train.py and finetune_policy.py leaves its own as OUT/curves.png.

python -m common.plots data/pretrained/robomamba-tiny/metrics.csv --out curves.png             # every stage and name
python -m common.plots runs/cotrain/metrics.csv --names loss,contact_px --out curves.png
"""

import argparse
import csv
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from common.files import write_atomically

PANEL, MARGIN, COLUMNS = (300, 170), (46, 22), 4  # pixels: size of a panel, space for its labels; panels a row
INK, GRID, LINE, OTHER = (40, 40, 40), (220, 220, 220), (30, 90, 180), (190, 70, 30)


def read_curves(path) -> dict[str, list[tuple[float, float]]]:
    """metrics.csv -> {"stage name" or "name": [(step, value), ..]}; rows may carry a `stage` column."""
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                label = f"{row['stage']} {row['name']}" if row.get("stage") else row["name"]
                curves.setdefault(label, []).append((float(row["step"]), float(row["value"])))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a metrics.csv with step, name, value ({error})") from None
    return curves


def draw_curves(curves: dict[str, list[tuple[float, float]]], columns: int = COLUMNS) -> Image.Image:
    """One panel a curve: name and last value on top, smallest and largest value at the left, last step below.

    What is not finite is left out; a curve without any finite value has a panel with its name alone.
    """
    (w, h), (left, top) = PANEL, MARGIN
    sheet = Image.new("RGB", (columns * w, -(-len(curves) // columns) * h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (label, points) in enumerate(curves.items()):
        x0, y0 = i % columns * w + left, i // columns * h + top
        x1, y1 = x0 + w - left - 12, y0 + h - 2 * top
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if not points:
            pen.text((x0, y0 - 14), f"{label}: nothing finite", fill=INK)
            continue
        low, high = min(v for _, v in points), max(v for _, v in points)
        span, last = (high - low) or 1.0, max(points[-1][0], 1.0)
        pen.rectangle((x0, y0, x1, y1), outline=GRID)
        pen.text((x0, y0 - 14), f"{label}: {points[-1][1]:.4g}", fill=INK)
        pen.text((x0 - left + 2, y0 - 4), f"{high:.3g}", fill=INK)
        pen.text((x0 - left + 2, y1 - 8), f"{low:.3g}", fill=INK)
        pen.text((x1 - 60, y1 + 2), f"step {last:.0f}", fill=INK)
        line = [(x0 + s / last * (x1 - x0), y1 - (v - low) / span * (y1 - y0)) for s, v in points]
        if len(line) > 1:
            pen.line(line, fill=LINE, width=2)
        else:
            pen.ellipse((line[0][0] - 2, line[0][1] - 2, line[0][0] + 2, line[0][1] + 2), fill=LINE)
    return sheet


def draw_lines(panels: dict[str, dict[str, list[tuple[float, float]]]], columns: int = 3) -> Image.Image:
    """{title: {line: [(x, y), ..]}} -> one panel a title, two lines at most; x logarithmic, y from 0 to the largest."""
    (w, h), (left, top) = PANEL, MARGIN
    sheet = Image.new("RGB", (min(columns, len(panels)) * w, -(-len(panels) // columns) * h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, lines) in enumerate(panels.items()):
        x0, y0 = i % columns * w + left, i // columns * h + top
        x1, y1 = x0 + w - left - 12, y0 + h - 2 * top
        xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
        first, span, high = math.log(min(xs)), math.log(max(xs) / min(xs)) or 1.0, max(ys)
        pen.rectangle((x0, y0, x1, y1), outline=GRID)
        pen.text((x0, y0 - 14), title, fill=INK)
        pen.text((x0 - left + 2, y0 - 4), f"{high:,.3g}" if high < 1000 else f"{high:,.0f}", fill=INK)
        pen.text((x0 - left + 2, y1 - 8), "0", fill=INK)
        for k, ((name, points), colour) in enumerate(zip(lines.items(), (LINE, OTHER), strict=False)):
            pen.text((x0 + 6, y0 + 4 + 12 * k), name, fill=colour)
            line = [(x0 + (math.log(x) - first) / span * (x1 - x0), y1 - y / high * (y1 - y0)) for x, y in points]
            pen.line(line, fill=colour, width=2)
            for (x, y), (label, _) in zip(line, points, strict=True):
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
                pen.text((x - 10, y1 + 2), f"{label:g}", fill=INK)
    return sheet


def draw_curves_file(metrics, out) -> bool:
    """Draw a metrics.csv as a PNG; False when nothing can be drawn."""
    sheet = draw_curves(read_curves(metrics))
    write_atomically(out, lambda temporary: sheet.save(temporary, "PNG"))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of a metrics.csv.")
    parser.add_argument("metrics")
    parser.add_argument("--names", help="only these, separated by commas (default: all)")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    try:
        curves = read_curves(args.metrics)
        if args.names:
            wanted = args.names.split(",")
            missing = [n for n in wanted if n not in curves]
            if missing:
                raise ValueError(f"--names: {missing[0]!r} is not in {args.metrics}; it holds {', '.join(curves)}")
            curves = {n: curves[n] for n in wanted}
        draw_curves(curves).save(args.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{len(curves)} curves in {Path(args.out)}")


if __name__ == "__main__":
    main()
