"""Pictures of a report as SVG text: lines with intervals, labelled where they end.

Written by hand because colours then come from the page's style sheet: one picture works in light, dark and print.
`Markup.format` escapes every name that is put in. Left out: legends (a label at the line's end needs no look-up).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from opentao.bestofn import ROUNDING
from opentao.show import visible
from opentao.summary import Mean, number

WIDTH, HEIGHT = 520.0, 320.0
LEFT, TOP, BOTTOM = 48.0, 14.0, 46.0
LABELLED, UNLABELLED = 134.0, 12.0  # the right margin, with and without names in it
INSET = 24.0  # pixels between the plot's edge and the first and last x
LABEL_GAP = 17.0  # pixels between the baselines of two labels
LONGEST_LABEL = 20  # characters; names come from the user
HEADROOM = 0.06  # of the span, above and below the data


@dataclass(kw_only=True, slots=True, frozen=True)
class Series:
    """A line of means. `style` is "base", "tuned" or "faint"; with `whiskers` intervals are bars, else a band."""

    name: str  # "" = no label
    points: Mapping[float, Mean]  # x -> mean
    style: str
    whiskers: bool = False

    def drawn(self) -> list[tuple[float, float]]:
        return [(x, m.mean) for x, m in sorted(self.points.items()) if m.mean is not None]

    def bounded(self) -> list[tuple[float, float, float]]:
        """Where there is an interval: x, low, high."""
        points = sorted(self.points.items())
        return [(x, m.low, m.high) for x, m in points if m.low is not None and m.high is not None]


@dataclass(kw_only=True, slots=True, frozen=True)
class Level:
    """A horizontal line from `start` (x) to `end`; None is the edge of the picture."""

    name: str
    y: float
    style: str
    end: float | None = None
    drop: str | None = None  # with `end`: a line down to the x axis, with this label


@dataclass(kw_only=True, slots=True, frozen=True)
class Chart:
    """Everything one picture shows. `title` is read out by screen readers."""

    title: str
    x_label: str
    x_ticks: Mapping[float, str]
    series: Sequence[Series]
    levels: Sequence[Level] = ()

    @property
    def named(self) -> bool:
        return any(s.name for s in self.series) or any(level.name for level in self.levels)

    @property
    def empty(self) -> bool:
        return not any(s.drawn() for s in self.series)


@dataclass(kw_only=True, slots=True, frozen=True)
class Scale:
    """Data to pixels. `right` is the right edge of the plot."""

    right: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """A single x stands in the middle."""
        share = (value - self.x_low) / (self.x_high - self.x_low) if self.x_high > self.x_low else 0.5
        return round(LEFT + INSET + share * (self.right - LEFT - 2 * INSET), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM), 1)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span low to high.

    >>> ticks(0.11, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * (about + 0.5) >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def spread(wanted: Sequence[float], gap: float = LABEL_GAP) -> list[float]:
    """Positions as near to the wanted ones as can be, in their order, at least `gap` apart.

    >>> spread([10.0, 12.0, 100.0])
    [2.5, 19.5, 100.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, int]] = []  # (centre, labels): labels that touch move as one
    for index in order:
        blocks.append((wanted[index], 1))
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2:
            (centre, count), (before, others) = blocks.pop(), blocks.pop()
            blocks.append(((centre * count + before * others) / (count + others), count + others))
    placed = [centre + gap * (i - (count - 1) / 2) for centre, count in blocks for i in range(count)]
    return [y for _, y in sorted(zip(order, placed, strict=True))]


def draw(chart: Chart) -> Markup:
    """The chart as one `<svg>`; empty text if there is nothing to draw."""
    if chart.empty:
        return Markup("")
    marks = ticks(*_y_range(chart))
    xs = [*chart.x_ticks, *(x for s in chart.series for x in s.points)]
    right = WIDTH - (LABELLED if chart.named else UNLABELLED)
    scale = Scale(right=right, x_low=min(xs), x_high=max(xs), y_low=marks[0], y_high=marks[-1])
    parts = [
        *_axes(chart, scale, marks),
        *(piece for s in chart.series for piece in _interval(s, scale)),
        *(piece for level in chart.levels for piece in _level(level, scale)),
        *(piece for s in chart.series for piece in _line(s, scale)),
        *_labels(chart, scale),
    ]
    head = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}"><title>{}</title>')
    title = visible(chart.title)
    return head.format(WIDTH, HEIGHT, title, title) + Markup("").join(parts) + Markup("</svg>")


def _y_range(chart: Chart) -> tuple[float, float]:
    """From 0 where that does not squash the picture; rewards may be any real numbers."""
    ys = [y for s in chart.series for _, y in s.drawn()] + [level.y for level in chart.levels]
    ys += [y for s in chart.series for _, low, high in s.bounded() for y in (low, high)]
    low, high = min(ys), max(ys)
    if high - low <= ROUNDING * max(abs(low), abs(high)):  # equal numbers that were averaged in different ways
        low = high
    pad = HEADROOM * (high - low)
    if 0 <= low <= high <= 1:
        return 0.0, high
    return (0.0 if 0 <= low < high / 2 else low - pad), high + pad


def _axes(chart: Chart, scale: Scale, marks: list[float]) -> Iterable[Markup]:
    right, bottom = scale.right, HEIGHT - BOTTOM
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    digits += round((marks[1] - marks[0]) * 10**digits, 6) % 1 > 0  # a step of 0.25 needs one more
    for mark in marks:
        y = scale.y(mark)
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, y, y)
        yield _text(LEFT - 8, y + 4.5, number(mark, digits), "tick end")
    for x, label in chart.x_ticks.items():
        yield _text(scale.x(x), bottom + 21, label, "tick middle")
    yield _text((LEFT + right) / 2, HEIGHT - 6, chart.x_label, "tick middle")


def _text(x: float, y: float, text: str, css: str) -> Markup:
    short = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, css, visible(short))


def _interval(series: Series, scale: Scale) -> Iterable[Markup]:
    bounds = [(scale.x(x), scale.y(low), scale.y(high)) for x, low, high in series.bounded()]
    if series.whiskers or len(bounds) == 1:
        for x, low, high in bounds:
            line = Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
            yield line.format(series.style, x, x, low, high)
    elif bounds:
        outline = [(x, high) for x, _, high in bounds] + [(x, low) for x, low, _ in reversed(bounds)]
        yield Markup('<polygon class="band {}" points="{}"/>').format(series.style, _points(outline))


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _line(series: Series, scale: Scale) -> Iterable[Markup]:
    points = [(scale.x(x), scale.y(y)) for x, y in series.drawn()]
    yield Markup('<polyline class="line {}" points="{}"/>').format(series.style, _points(points))
    for x, y in points:
        yield Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.6"/>').format(series.style, x, y)


def _level(level: Level, scale: Scale) -> Iterable[Markup]:
    y, bottom = scale.y(level.y), HEIGHT - BOTTOM
    end = scale.right if level.end is None else scale.x(level.end)
    line = Markup('<line class="level {}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    yield line.format(level.style, LEFT, end, y, y)
    if level.drop is not None:
        yield line.format(level.style, end, end, y, bottom)
        yield Markup('<circle class="ring {}" cx="{}" cy="{}" r="6"/>').format(level.style, end, y)
        left_of_it = end > scale.right - 70
        yield _text(
            end + (-9 if left_of_it else 9), bottom - 9, level.drop, f"label {level.style}" + " end" * left_of_it
        )


def _labels(chart: Chart, scale: Scale) -> Iterable[Markup]:
    """A line that ends early is named at its end, the others at the right edge."""
    at_edge: list[tuple[str, str, float]] = []
    for series in chart.series:
        x, y = series.drawn()[-1] if series.drawn() else (math.nan, math.nan)
        if series.name and x == scale.x_high > scale.x_low:
            at_edge.append((series.name, series.style, scale.y(y)))
        elif series.name and not math.isnan(x):
            yield _text(scale.x(x) + 9, scale.y(y) - 9, series.name, f"label {series.style}")
    at_edge += [(level.name, level.style, scale.y(level.y)) for level in chart.levels if level.name]
    yield from _edge_labels(at_edge, scale.right)


def _edge_labels(named: Sequence[tuple[str, str, float]], right: float) -> Iterable[Markup]:
    """Names moved apart where they would touch; a thin line leads back to what each one names."""
    for (name, style, y), at in zip(named, spread([y for _, _, y in named]), strict=True):
        yield Markup('<polyline class="leader" points="{}"/>').format(_points([(right + 1, y), (right + 11, at)]))
        yield _text(right + 15, at + 4.5, name, f"label {style}")
