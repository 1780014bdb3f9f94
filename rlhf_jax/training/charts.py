"""Curves as inline SVG figures: axes with round ticks, gaps, and a tooltip over every point."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from typing import NamedTuple

MAX_POINTS = 120  # each point of a longer curve is the mean over several steps
WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 22


class Curve(NamedTuple):
    """One metric of one stage, at the steps that reported it; values may be NaN or infinite."""

    steps: list[int]
    values: list[float]


def chart(
    metric: str,
    curve: Curve,
    heading: str | None = None,
    level: tuple[float, str] | None = None,
    steps: tuple[int, int] | None = None,
) -> str:
    """A figure with axes, the curve, and a tooltip over every point; "" if no value is finite.

    A metric that only some steps report, such as a held-out evaluation, has a dot at each of them.
    `heading` stands above the metric's name. `level` is a value to compare with and its name, drawn
    as a dashed line. `steps` are the first and the last step of the axis, by default the curve's.
    """
    drawn_steps, values = _thin(curve)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = _span(finite, level)
    first, last = steps or (curve.steps[0], curve.steps[-1])
    last = max(last, first + 1)

    def x(step):
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first), 1)

    def y(value):
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    points = [(x(s), y(v) if math.isfinite(v) else None) for s, v in zip(drawn_steps, values)]
    body = [
        *(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 3.5}" text-anchor="end">{_tick_label(tick)}</text>'
            for tick in _ticks(low, high)
        ),
        *_step_labels(first, last, x),
        _level_line(level, y) if level else "",
        _path(points, dots=_has_gaps(curve)),
        *_tooltips(drawn_steps, values, points),
    ]
    name = html.escape(metric)
    title = name if heading is None else f"{html.escape(heading)}<code>{name}</code>"
    return (
        f"<figure><figcaption><span>{title}</span><b>{number(curve.values[-1])}</b>"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f"{''.join(body)}</svg></figure>"
    )


def _has_gaps(curve: Curve) -> bool:
    return any(later - earlier > 1 for earlier, later in zip(curve.steps, curve.steps[1:]))


def _thin(curve: Curve) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points to draw, each the mean of the finite values of several steps."""
    stride = math.ceil(len(curve.steps) / MAX_POINTS)
    steps, values = [], []
    for begin in range(0, len(curve.steps), stride):
        together = curve.values[begin : begin + stride]
        finite = [value for value in together if math.isfinite(value)]
        values.append(sum(finite) / len(finite) if finite else together[0])
        averaged = curve.steps[begin : begin + stride]
        steps.append(sum(averaged) / len(averaged))
    return steps, values


def _span(values: list[float], level: tuple[float, str] | None) -> tuple[float, float]:
    """The lower and the upper end of the vertical axis, with a little room around the values."""
    values = values + ([level[0]] if level else [])
    low, high = min(values), max(values)
    room = 0.05 * (high - low)
    if room < 1e-9 * max(abs(low), abs(high)) or room == 0.0:  # a constant
        room = 0.1 * abs(high) or 1.0
    above = 3 * room if level else room  # the label of the level stands above its line
    return low - room, high + above


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between `low` and `high`, for the vertical axis."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [index * step for index in range(first, last + 1)]


def _step_labels(first: int, last: int, x) -> Iterable[str]:
    for step in sorted({first, (first + last) // 2, last}):
        anchor = "end" if step == last else "start" if step == first else "middle"
        yield f'<text x="{x(step)}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step}</text>'


def _level_line(level: tuple[float, str], y) -> str:
    value, name = level
    return (
        f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>'
        f'<text x="{WIDTH - RIGHT}" y="{y(value) - 4}" text-anchor="end">'
        f"{html.escape(name)} {number(value)}</text>"
    )


def _path(points: list[tuple[float, float | None]], dots: bool) -> str:
    """The curve, broken where a value is not finite. A point without neighbours is a dot.

    With `dots` every point is a dot.
    """
    pieces, current = [], []
    for px, py in [*points, (0.0, None)]:
        if py is not None:
            current.append((px, py))
        elif current:
            pieces.append(current)
            current = []
    lines = ["M" + "L".join(f"{px},{py}" for px, py in piece) for piece in pieces if len(piece) > 1]
    marked = [point for piece in pieces if dots or len(piece) == 1 for point in piece]
    drawn = f'<path class="curve" d="{"".join(lines)}"/>' if lines else ""
    return drawn + "".join(f'<circle cx="{px}" cy="{py}"/>' for px, py in marked)


def _tooltips(steps, values, points) -> Iterable[str]:
    """For each point a band that lights up under the mouse and names step and value."""
    edges = [(a[0] + b[0]) / 2 for a, b in zip(points, points[1:])]
    lefts, rights = [LEFT, *edges], [*edges, WIDTH - RIGHT]
    for step, value, (px, py), left, right in zip(steps, values, points, lefts, rights):
        dot = "" if py is None else f'<circle cx="{px}" cy="{py}"/>'
        yield (
            f'<g><rect x="{left:.4g}" width="{right - left:.3g}"/>{dot}'
            f"<title>step {step:.0f}: {number(value)}</title></g>"
        )


def number(value) -> str:
    """A value as people read it: numbers with four digits and a true minus sign, text as it is."""
    if not isinstance(value, float):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
    return "0" if value == 0 else text.replace("-", "−", 1) if text[0] == "-" else text


def _tick_label(tick: float) -> str:
    """The number beside a tick of the axis, in at most seven characters."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if least <= abs(tick) < 1e12:
            return number(tick / unit) + letter
    return number(tick)
