"""What training runs logged, as curves in one PNG: a panel a quantity, a line a run.

python curves.py runs/ar runs/other_ar --out both.png"""

import contextlib
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import runtime

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf"]
COLUMNS, WIDTH, HEIGHT = 3, 420, 250  # panels side by side; pixels of each
LEFT, RIGHT, TOP, BOTTOM = 80, 390, 40, 220  # where its curves lie in it


def read_log(run):
    """{quantity: [(step, value)]} of a run's log. Left out: damaged lines, and what is not finite (text, in a log)."""
    curves, path = {}, Path(run, "log.jsonl")
    with runtime.reading(path, "a log"):
        for text in path.read_bytes().splitlines():
            with contextlib.suppress(Exception):
                line = json.loads(text)
                step = int(line.pop("step"))
                for name, value in line.items():
                    if not isinstance(value, str) and math.isfinite(value):
                        curves.setdefault(name, []).append((step, value))
    if not curves:
        raise runtime.UserError(f"{path} holds no values; let the run log some first")
    return curves


def draw_panel(sheet, left, top, name, curves):
    """Draw a quantity, from step 0 on and from its least value to its greatest. curves: [(step, value)] of each run."""
    steps, values = zip(*(point for curve in curves for point in curve))
    last, low, span = max(1, *steps), min(values), max(values) - min(values)

    def place(step, value):
        part = (value - low) / span if span else 0.5
        return left + LEFT + (RIGHT - LEFT) * step / last, top + BOTTOM - (BOTTOM - TOP) * part

    sheet.text((left + LEFT, top + TOP - 8), name, "black", ImageFont.load_default(16), "ls")
    for part in (0, 0.25, 0.5, 0.75, 1):
        step, value = part * last, low + part * span
        x, y = place(step, value)
        sheet.line([(left + LEFT, y), (left + RIGHT, y)], "#dddddd")
        sheet.text((left + LEFT - 8, y), f"{value:.4g}", "#555555", ImageFont.load_default(12), "rm")
        sheet.text((x, top + BOTTOM + 8), f"{step:,.0f}", "#555555", ImageFont.load_default(12), "mt")
    for i, curve in enumerate(curves):
        points = [place(*point) for point in curve]
        sheet.line(points, COLOURS[i % len(COLOURS)], 2, "curve")
        for point in points if len(points) < 20 else ():
            sheet.circle(point, 3, COLOURS[i % len(COLOURS)])


def main():
    arguments = runtime.parser(__doc__)
    arguments.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    arguments.add_argument("--out", default="curves.png", help="the PNG to write")
    args = arguments.parse_args()
    logs = [read_log(run) for run in args.runs]
    names, top = list(dict.fromkeys(name for log in logs for name in log)), 24 * (len(logs) + 1)
    picture = Image.new("RGB", (COLUMNS * WIDTH, top + math.ceil(len(names) / COLUMNS) * HEIGHT), "white")
    sheet = ImageDraw.Draw(picture)
    for i, run in enumerate(args.runs):
        words = run.encode(errors="backslashreplace").decode()
        sheet.text((LEFT, 24 * (i + 1)), words, COLOURS[i % len(COLOURS)], ImageFont.load_default(18), "lm")
    for i, name in enumerate(names):
        draw_panel(sheet, i % COLUMNS * WIDTH, top + i // COLUMNS * HEIGHT, name, [log.get(name, []) for log in logs])
    with runtime.replacing(args.out) as file:
        picture.save(file, "PNG")


if __name__ == "__main__":
    runtime.run_script(main)
