"""Line and area charts: this module computes the coordinates, and macros.html.jinja writes the SVG.

The page's style sheet sets the colours, so that charts follow the reader's light or dark theme without a script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 100
"""Maximum number of points of a line. A point is the mean of several steps, so the page of a long run stays small."""

WIDTH, HEIGHT = 400.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 8.0, 8.0, 30.0


@dataclass(frozen=True)
class Line:
    """A named series: steps [num_points] and values [num_points]; NaN if a step has no value."""

    label: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    colour: int
    """Number of the colour. The same run or phase has the same colour in every chart."""


@dataclass(frozen=True)
class Chart:
    """Lines over steps, or stacked areas."""

    title: str
    unit: str
    lines: Sequence[Line]
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    position: float
    text: str


@dataclass(frozen=True, slots=True)
class Stroke:
    """A drawn line: SVG paths of the line and of its band (or area), and the last value as text."""

    label: str
    colour: int
    path: str
    band: str
    last: str


@dataclass(frozen=True, slots=True)
class Column:
    """A vertical slice of the chart that shows its values under the pointer."""

    x: float
    width: float
    text: str


@dataclass(frozen=True)
class Drawing:
    """A chart in the coordinates of a WIDTH x HEIGHT image."""

    title: str
    unit: str
    stacked: bool
    strokes: Sequence[Stroke]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    columns: Sequence[Column]
    steps_per_point: int
    plot: tuple[float, float, float, float] = (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)
    """Left, top, right and bottom of the plotted area."""


def draw(chart: Chart) -> Drawing | None:
    """Compute the coordinates of a chart; None if no line has a finite value."""
    lines = [line for line in chart.lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    steps = np.unique(np.concatenate([line.steps for line in lines]))
    edges = _edges(steps)
    middles = [_mean(steps[(steps >= low) & (steps < high)]) for low, high in pairwise(edges)]
    means, lows, highs = np.stack([_reduce(line, edges) for line in lines], axis=1)  # each [num_lines, num_points]
    if chart.stacked:
        highs = np.cumsum(np.nan_to_num(means), axis=0)
        lows = highs - np.nan_to_num(means)
    x = _Scale(middles[0], middles[-1], _LEFT, WIDTH - _RIGHT)
    low = 0.0 if chart.stacked else float(np.nanmin(lows))
    y = _Scale(*_range(low, float(np.nanmax(highs))), HEIGHT - _BOTTOM, _TOP)
    tops = highs if chart.stacked else means
    banded = chart.stacked or len(edges) - 1 < len(steps)
    points = [x(step) for step in middles]
    strokes = [
        Stroke(
            label=line.label,
            colour=line.colour,
            path=_path(points, [y(value) for value in top]),
            band=_band(points, [y(value) for value in low_], [y(value) for value in high]) if banded else "",
            last=short(mean[np.isfinite(mean)][-1]),
        )
        for line, mean, top, low_, high in zip(lines, means, tops, lows, highs, strict=True)
    ]
    return Drawing(
        title=chart.title,
        unit=chart.unit,
        stacked=chart.stacked,
        strokes=strokes,
        x_ticks=_ticks(x.low, x.high, x, whole=True),
        y_ticks=_ticks(y.low, y.high, y),
        columns=_columns(points, middles, [line.label for line in lines], means),
        steps_per_point=math.ceil(len(steps) / (len(edges) - 1)),
    )


def short(value: float) -> str:
    """Format a number in few characters: 0.123, 1.23e-06, 12k, 3.4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def words(name: str) -> str:
    """Spell a name from a file for readers: grounded_qa becomes grounded QA."""
    spelled = {"iou": "IoU", "qa": "QA"}
    return " ".join(spelled.get(word, word) for word in name.split("_"))


class _Scale:
    """A linear map from low..high to the coordinates first..last."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high, self._first = low, high, first
        self._slope = (last - first) / (high - low) if high > low else 0.0

    def __call__(self, value: float) -> float:
        return round(self._first + (value - self.low) * self._slope, 1)


def _edges(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the borders [num_points + 1] of the bins of steps that share a point; no bin is empty."""
    num_points = min(len(steps), MAX_POINTS)
    firsts = steps[(np.arange(num_points) * len(steps)) // num_points]
    return np.append(firsts, steps[-1] + 1).astype(np.float64)


def _reduce(line: Line, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean, minimum and maximum of each bin: [3, num_points]."""
    reduced = np.full((3, len(edges) - 1), np.nan)
    bins = np.searchsorted(edges, line.steps, side="right") - 1
    finite = np.isfinite(line.values)
    for point in np.unique(bins[finite]):
        values = line.values[finite & (bins == point)]
        reduced[:, point] = values.mean(), values.min(), values.max()
    return reduced


def _mean(values: NDArray[np.int64]) -> float:
    return float(values.mean())


def _range(low: float, high: float) -> tuple[float, float]:
    """Return the range of the y axis: it starts at 0 if that uses less than half of the height, and is never empty."""
    if 0 < low < high / 2 or low == high > 0:
        low = 0.0
    return low, high + ((high - low) * 0.04 or 1.0)


def _ticks(low: float, high: float, place: Callable[[float], float], *, whole: bool = False) -> list[Tick]:
    """Return two to six round numbers in low..high, with enough digits to distinguish them."""
    if not high > low:
        return [Tick(place(low), short(low))]
    span = high - low
    size = 10 ** math.floor(math.log10(span / 5))
    size = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 5)
    size = max(size, 1) if whole else size
    numbers = range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)
    decimals = max(-math.floor(math.log10(size)), 0)
    plain = decimals <= 4 and max(abs(low), abs(high)) < 1e4
    values = [number * size for number in numbers]
    return [Tick(place(value), f"{value:.{decimals}f}" if plain else short(value)) for value in values]


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return an SVG path through the points, with a gap where y is NaN and a dot for an isolated point."""
    parts: list[str] = []
    drawing = False
    for x, y in zip(xs, ys, strict=True):
        if math.isnan(y):
            drawing = False
            continue
        parts.append(f"L{x:g} {y:g}" if drawing else f"M{x:g} {y:g}h0")
        drawing = True
    return "".join(parts)


def _band(xs: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> str:
    """Return the closed SVG path between two lines, without the points that are NaN."""
    finite = [(x, low, high) for x, low, high in zip(xs, lows, highs, strict=True) if not math.isnan(low)]
    forth = [f"{x:g} {high:g}" for x, _, high in finite]
    back = [f"{x:g} {low:g}" for x, low, _ in reversed(finite)]
    return f"M{'L'.join(forth + back)}Z"


def _columns(
    xs: Sequence[float], steps: Sequence[float], labels: Sequence[str], values: NDArray[np.float64]
) -> list[Column]:
    borders = [_LEFT, *((a + b) / 2 for a, b in pairwise(xs)), WIDTH - _RIGHT]
    columns = []
    for point, step in enumerate(steps):
        shown = [
            f"{label} {short(value)}"
            for label, value in zip(labels, values[:, point], strict=True)
            if not math.isnan(value)
        ]
        if shown:
            width = round(borders[point + 1] - borders[point], 1)
            columns.append(Column(round(borders[point], 1), width, "\n".join([f"step {step:.0f}", *shown])))
    return columns
