"""Charts of measured curves as SVG, on the canvas that draws the models."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from rorqual.family.canvas import INK, SOFT, Canvas

COLOURS = ("#3f6fb5", "#12857c", "#6a4fb3", "#b0468f", "#c07a1c", "#5b6470")
LEFT, TOP, WIDTH, HEIGHT, GAP = 84, 92, 400, 300, 110


@dataclass
class Panel:
    """One chart: named curves of (x, y) points, both axes logarithmic."""

    title: str
    unit: str
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def short(value: float) -> str:
    """1536 -> 1.5K, 1048576 -> 1M (of 1,024 each)."""
    for power, letter in ((30, "G"), (20, "M"), (10, "K")):
        if value >= 1 << power:
            return f"{value / (1 << power):.3g}{letter}"
    return f"{value:.3g}"


def chart(title: str, note: str, panels: list[Panel], x_title: str) -> str:
    """The panels side by side under one legend, as a whole SVG file. Raises ValueError for a panel without points."""
    for panel in panels:
        if not any(panel.curves.values()):
            raise ValueError(f"nothing to draw: {panel.title!r} of {title!r} has no points")
    width = LEFT + len(panels) * (WIDTH + GAP) - GAP + 40
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    height = TOP + HEIGHT + 64 + 22 * len(names)
    canvas = Canvas(width, height, title, note)
    canvas.text(LEFT - 50, 36, title, 18, INK, 700)
    canvas.text(LEFT - 50, 58, note, 12, SOFT)
    colour = dict(zip(names, COLOURS * len(names), strict=False))
    for number, panel in enumerate(panels):
        _panel(canvas, panel, LEFT + number * (WIDTH + GAP), colour, x_title)
    for line, name in enumerate(names):
        y = TOP + HEIGHT + 66 + 22 * line
        canvas.rect(LEFT, y - 9, 18, 4, colour[name])
        canvas.text(LEFT + 26, y - 3, name, 12.5)
    return canvas.document()


def _marks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from at most `low` to at least `high`; the powers alone over more than two."""
    steps = (1, 2, 5) if high / low < 100 else (1,)
    first = math.floor(math.log10(low))
    marks = [step * 10.0**power for power in range(first, first + 20) for step in steps]
    begin = max(i for i, mark in enumerate(marks) if mark <= low)
    end = min(i for i, mark in enumerate(marks) if mark >= high and i > begin)
    return marks[begin : end + 1]


def _panel(canvas: Canvas, panel: Panel, left: float, colour: dict[str, str], x_title: str) -> None:
    points = [point for curve in panel.curves.values() for point in curve]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    marks = _marks(min(y for _, y in points), max(y for _, y in points))
    low_y, high_y = marks[0], marks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / low_x) / max(math.log(high_x / low_x), 1e-9)
        up = math.log(y / low_y) / math.log(high_y / low_y)
        return left + across * WIDTH, TOP + HEIGHT * (1 - up)

    canvas.text(left, TOP - 12, f"{panel.title}, {panel.unit}", 12.5, INK, 600)
    for mark in marks:
        _, y = place(low_x, mark)
        canvas.line(left, y, left + WIDTH, y, "#d9d6cc", 1)
        canvas.text(left - 8, y + 4, f"{mark:,g}", 11, SOFT, anchor="end")
    for x in sorted({x for x, _ in points}):
        at, _ = place(x, low_y)
        canvas.text(at, TOP + HEIGHT + 18, short(x), 11, SOFT, anchor="middle")
    canvas.text(left + WIDTH / 2, TOP + HEIGHT + 38, x_title, 12, SOFT, anchor="middle")
    for name, curve in panel.curves.items():
        corners = [place(x, y) for x, y in curve]
        for (x1, y1), (x2, y2) in itertools.pairwise(corners):
            canvas.line(x1, y1, x2, y2, colour[name], 2.2)
        for x, y in corners:
            canvas.rect(x - 3, y - 3, 6, 6, colour[name], radius=3)
