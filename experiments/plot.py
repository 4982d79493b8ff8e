"""Curves of runs as SVG, on the canvas that draws the models."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from experiments.frame import Results
from rorqual.family.canvas import INK, SOFT, Canvas

COLOURS = (
    "#3f6fb5", "#c07a1c", "#12857c", "#b0468f", "#6a4fb3", "#5b6470", "#b5403f", "#7f9a2b", "#2b9ab5", "#8a6a4a",
)  # fmt: skip
LEFT, TOP, WIDTH, HEIGHT, GAP = 76, 84, 430, 300, 90
BEGIN = 0.05
"""The share of a run that is not drawn: losses fall so far there that nothing else could be seen."""

Curve = list[tuple[float, float]]


def mean(curves: list[Curve]) -> Curve:
    """Over runs, point by point, as far as all of them go."""
    return [
        (points[0][0], statistics.fmean(value for _, value in points))
        for points in zip(*curves, strict=False)
    ]


def draw(title: str, note: str, results: Results, measures: Sequence[str]) -> str:
    """A chart for each of the measures that was followed, with the mean curve of each arm: a whole SVG file. ValueError
    where no run got far enough to have a curve."""
    followed = {kind for runs in results.runs.values() for run in runs.values() for kind in run["curves"]}
    kinds = [measure for measure in measures if measure in followed]
    charts: dict[str, dict[str, Curve]] = {}
    for kind in kinds:
        found = {
            arm: mean([run["curves"][kind] for run in runs.values() if kind in run["curves"]])
            for arm, runs in results.runs.items()
        }
        end = max((curve[-1][0] for curve in found.values() if curve), default=0.0)
        late = {arm: [p for p in curve if p[0] >= BEGIN * end] for arm, curve in found.items()}
        charts[kind] = {arm: curve for arm, curve in late.items() if curve}
    charts = {kind: found for kind, found in charts.items() if found}
    if not charts:
        raise ValueError(f"nothing to draw for {title!r}: no run has a curve")
    names = list(results.runs)
    colour = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    width = LEFT + len(charts) * (WIDTH + GAP) - GAP + 50
    canvas = Canvas(width, TOP + HEIGHT + 60 + 20 * len(names), title, note)
    canvas.text(30, 34, title, 17, INK, 700)
    canvas.text(30, 55, note, 12, SOFT)
    for number, (kind, found) in enumerate(charts.items()):
        _chart(canvas, kind, found, LEFT + number * (WIDTH + GAP), colour)
    for line, name in enumerate(names):
        y = TOP + HEIGHT + 62 + 20 * line
        canvas.rect(LEFT, y - 9, 18, 4, colour[name])
        canvas.text(LEFT + 26, y - 3, name, 12.5)
    return canvas.document()


def _chart(canvas: Canvas, kind: str, found: dict[str, Curve], left: float, colour: dict[str, str]) -> None:
    points = [point for curve in found.values() for point in curve]
    end = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    high = high if high > low else low + 1.0
    canvas.text(left, TOP - 10, kind, 12.5, INK, 600)
    for part in range(5):
        value = low + (high - low) * part / 4
        y = TOP + HEIGHT * (1 - part / 4)
        canvas.line(left, y, left + WIDTH, y, "#d9d6cc", 1)
        canvas.text(left - 8, y + 4, f"{value:.3g}", 11, SOFT, anchor="end")
    for part in range(1, 5):
        x = left + WIDTH * part / 4
        canvas.text(x, TOP + HEIGHT + 18, f"{end * part / 4 / 1e6:.3g}M", 11, SOFT, anchor="middle")
    canvas.text(left + WIDTH / 2, TOP + HEIGHT + 38, "tokens", 12, SOFT, anchor="middle")
    for name, curve in found.items():
        corners = [(left + WIDTH * x / end, TOP + HEIGHT * (1 - (y - low) / (high - low))) for x, y in curve]
        for (x1, y1), (x2, y2) in itertools.pairwise(corners):
            canvas.line(x1, y1, x2, y2, colour[name], 2)
