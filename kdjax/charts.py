"""Charts as SVG inside of HTML, by pure functions: numbers in, text out.

Colours are classes, s0 to s7, of which the page says how they look in the light and in the dark.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kdjax.markup import Html, element

Point = tuple[float, float]


class Line(NamedTuple):
    """A line of a chart."""

    points: Sequence[Point]
    """From left to right; where a number is not finite the line is broken."""
    colour: int = 0
    """Modulo ``COLOURS``."""
    dash: int = 0
    """0 for a whole line."""


class Curves(NamedTuple):
    """Lines over one axis."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    """By name."""
    logarithmic: bool = False
    """The axis of y; points that are not above 0 break their line then."""
    ends: bool = False
    """Whether the last number of each line is said beside its name."""


class Matrix(NamedTuple):
    """Shares of each row, such as which classes are taken for which."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    shares: Sequence[Sequence[float]]
    """Percent, row by row."""
    remark: str = ""


Chart = Curves | Matrix

COLOURS = 8
MOST_POINTS = 200
"""Of a line: a long run is drawn by means of steps that follow one another."""
_WIDTH, _HEIGHT = 360, 220
"""Of a chart, in units that are about pixels on a telephone."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 34
"""Room around it, for numbers."""
_DASHES = ("none", "6 4", "2 3")
_TICKS = 5
_CHARACTER = 6
"""Width of a digit."""


def as_json(chart: Chart) -> dict[str, Any]:
    """A chart as plain JSON, of which :func:`from_json` makes it again."""
    found = chart._asdict()
    if isinstance(chart, Curves):
        found["lines"] = {name: line._asdict() for name, line in chart.lines.items()}
    return found


def from_json(found: Mapping[str, Any]) -> Chart:
    """The chart of :func:`as_json`.

    >>> chart = Matrix("a", ["b"], ["c"], [[100.0]])
    >>> from_json(as_json(chart)) == chart
    True

    Raises:
        TypeError: it is none.
    """
    if "lines" not in found:
        return Matrix(**found)
    return Curves(**{**found, "lines": {name: Line(**line) for name, line in found["lines"].items()}})


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points, each the mean of some that follow one another, the last one as it is.

    >>> thinned([(0, 1.0), (1, 3.0), (2, 5.0)], most=2)
    [(0.5, 2.0), (2, 5.0)]
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 1) / (most - 1))
    chunks = [points[at : min(at + size, len(points) - 1)] for at in range(0, len(points) - 1, size)]
    return [(_mean(x for x, _ in chunk), _mean(y for _, y in chunk)) for chunk in chunks] + [points[-1]]


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def drawn(chart: Chart) -> Html:
    """A chart as a figure of HTML: its title, the drawing, and what the colours mean."""
    inside = _curves(chart) if isinstance(chart, Curves) else _matrix(chart)
    return element("figure", element("figcaption", chart.title), *inside)


def _curves(chart: Curves) -> list[Html]:
    lines = {name: line._replace(points=thinned(line.points)) for name, line in chart.lines.items()}
    shown = [(x, y) for line in lines.values() for x, y in line.points if _is_drawn(x, y, chart.logarithmic)]
    if not shown:
        return [element("p", "Nothing is recorded yet.", class_="remark")]
    xs, ys = ([point[axis] for point in shown] for axis in (0, 1))
    across, down = _Axis(min(xs), max(xs)), _Axis(min(ys), max(ys), chart.logarithmic, whole=True)
    svg = element(
        "svg",
        *_grid(across, down, chart),
        *(part for line in lines.values() for part in _line(line, across, down)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{chart.title}: {chart.y} over {chart.x}, {', '.join(lines)}",
    )
    entries = [element("li", _key(line), name, _last(line) if chart.ends else "") for name, line in lines.items()]
    return [svg, element("ul", *entries, class_="legend")]


def _is_drawn(x: float, y: float, logarithmic: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (y > 0 or not logarithmic)


class _Axis:
    """Where numbers are on an axis, from 0 to 1, and which are named."""

    def __init__(self, low: float, high: float, logarithmic: bool = False, whole: bool = False):
        """From ``low`` to ``high``, or, with ``whole``, from the round number before to the one behind."""
        self.logarithmic = logarithmic
        if logarithmic:
            self.low, self.high = math.log10(low), math.log10(high)
            if self.high - self.low < 0.1:
                self.low, self.high = self.low - 0.05, self.high + 0.05
        else:
            margin = (abs(low) or 1.0) * 0.1 if low == high else 0.0
            self.low, self.high = low - margin, high + margin
            if whole:
                step = _round_step((self.high - self.low) / _TICKS)
                self.low, self.high = math.floor(self.low / step) * step, math.ceil(self.high / step) * step

    def at(self, value: float) -> float:
        value = math.log10(value) if self.logarithmic else value
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers between both ends."""
        if self.logarithmic and self.high - self.low >= 1:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            steps = (1, 2, 5) if len(powers) < 3 else (1,)
            every = max(1, math.ceil(len(powers) / 5))
            tens = range(math.floor(self.low), powers.stop)[::every]
            found = [step * 10.0**power for power in tens for step in steps]
            return [x for x in found if self.low - 1e-9 <= math.log10(x) <= self.high + 1e-9]
        low, high = (10**self.low, 10**self.high) if self.logarithmic else (self.low, self.high)
        step = _round_step((high - low) / _TICKS)
        return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    """The next larger of 1, 2, 5, 10, ... times a power of ten.

    >>> [_round_step(x) for x in (0.3, 1, 2.1)]
    [0.5, 1.0, 5.0]
    """
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))


def _number(value: float) -> str:
    """A number in a few characters.

    >>> [_number(x) for x in (0.0, 0.1 + 0.2, 1500, 2e4, 2e-5)]
    ['0', '0.3', '1500', '2e4', '2e-5']
    """
    if value and not 1e-3 <= abs(value) < 1e4:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _x(share: float) -> float:
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(share: float) -> float:
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _grid(across: _Axis, down: _Axis, chart: Curves) -> Iterator[Html]:
    for value in down.ticks():
        y = _y(down.at(value))
        yield element("path", d=f"M{_LEFT} {y}H{_WIDTH - _RIGHT}", class_="grid")
        yield element("text", _number(value), x=_LEFT - 5, y=y + 3.5, text_anchor="end")
    for value in across.ticks():
        x = _x(across.at(value))
        half = len(_number(value)) * _CHARACTER / 2
        anchor = "end" if x + half > _WIDTH else "middle"
        yield element("path", d=f"M{x} {_HEIGHT - _BOTTOM}v4", class_="axis")
        yield element("text", _number(value), x=x, y=_HEIGHT - _BOTTOM + 15, text_anchor=anchor)
    yield element("path", d=f"M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}", class_="axis")
    unit = f"{chart.y} over {chart.x}" + ", logarithmic" * chart.logarithmic
    yield element("text", unit, x=_WIDTH - _RIGHT, y=_HEIGHT - 3, text_anchor="end", class_="unit")


def _line(line: Line, across: _Axis, down: _Axis) -> Iterator[Html]:
    for whole, points in itertools.groupby(line.points, lambda point: _is_drawn(point[0], point[1], down.logarithmic)):
        if not whole:
            continue
        places = [(_x(across.at(x)), _y(down.at(y))) for x, y in points]
        style = f"s{line.colour % COLOURS}"
        if len(places) == 1:
            yield element("circle", cx=places[0][0], cy=places[0][1], r=3, class_=f"{style} dot")
        path = " ".join(f"{x:g},{y:g}" for x, y in places)
        yield element("polyline", points=path, class_=style, stroke_dasharray=_DASHES[line.dash % len(_DASHES)])


def _key(line: Line) -> Html:
    """A bit of a line, beside its name."""
    dash = _DASHES[line.dash % len(_DASHES)]
    stroke = element("path", d="M0 5H22", class_=f"s{line.colour % COLOURS}", stroke_dasharray=dash)
    return element("svg", stroke, viewBox="0 0 22 10", class_="key", aria_hidden="true")


def _last(line: Line) -> Html:
    """The last number of a line."""
    finite = [y for _, y in line.points if math.isfinite(y)]
    return element("span", f" {_number(finite[-1])}" if finite else "", class_="faint")


def _matrix(matrix: Matrix) -> list[Html]:
    names = (element("th", element("span", name), scope="col") for name in matrix.columns)
    head = element("tr", element("td", ""), *names)
    rows = [
        element("tr", element("th", name, scope="row"), *map(_cell, shares))
        for name, shares in zip(matrix.rows, matrix.shares, strict=True)
    ]
    inside = element("table", element("thead", head), element("tbody", *rows), class_="matrix")
    remark = [element("p", matrix.remark, class_="remark")] if matrix.remark else []
    return [element("div", inside, class_="scroll", tabindex=0), *remark]


def _cell(share: float) -> Html:
    """A share as a number on a background that is as strong."""
    if not share:
        return element("td", "")
    strong = "strong" if share > 55 else ""
    return element("td", f"{share:.0f}", style=f"--share:{share:.0f}%", class_=strong)
