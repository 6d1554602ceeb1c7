"""The loss curve as a picture (SVG), drawn without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 45
NAMES = ("first", "second")  # classes of the style, in the order of the lines
# Light, or dark as the reader's system is; both colours are readable on both grounds.
STYLE = """<style>
.ground { fill: #fff } .grid { stroke: #ddd } text { fill: #222 }
.first { stroke: #1f6fb4 } .second { stroke: #d1495b }
text.first, circle.first { fill: #1f6fb4; stroke: none }
text.second, circle.second { fill: #d1495b; stroke: none }
@media (prefers-color-scheme: dark) {
.ground { fill: #15181d } .grid { stroke: #3a3f47 } text { fill: #e6e6e6 }
.first { stroke: #6fb1e8 } .second { stroke: #f08a96 }
text.first, circle.first { fill: #6fb1e8 } text.second, circle.second { fill: #f08a96 }
}
</style>"""

Series = Sequence[tuple[int, float]]


class Scale(NamedTuple):
    """An axis: where it begins and ends, and its ticks."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def share(self, value: float) -> float:
        """How far along a value stands, from 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)


def round_scale(least: float, most: float) -> Scale:
    """An axis of about five steps of 1, 2 or 5 times a power of ten."""
    width = (most - least) or abs(most) or 1.0
    power = 10.0 ** math.floor(math.log10(width / 5))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= width / 5 * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    last = max(last, first + 1)
    return Scale(first * step, last * step, [i * step for i in range(first, last + 1)])


def log_scale(least: float, most: float) -> Scale:
    """An axis of 1, 2 and 5 times powers of ten, from the next one below to the next above."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    marks = [n * 10.0**power for power in range(first, last + 1) for n in (1, 2, 5)]
    low = max(mark for mark in marks if mark <= least)
    high = min(mark for mark in marks if mark >= most and mark > low)
    return Scale(low, high, [mark for mark in marks if low <= mark <= high], log=True)


def draw(title: str, lines: Mapping[str, Series], *, log: bool = False) -> str:
    """An SVG of one or two lines over iterations.

    Args:
        lines: name -> (iteration, loss) pairs; empty ones are left out. The points of a line that
            has fewer of them than another, such as evaluations, are marked.
        log: the losses stand on a logarithmic axis, if all are above 0.
    """
    shown = {name: list(points) for name, points in lines.items() if points}
    points = [p for some in shown.values() for p in some if math.isfinite(p[1])]
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"/>\n'
    least, most = min(y for _, y in points), max(y for _, y in points)
    up = log_scale(least, most) if log and least > 0 else round_scale(least, most)
    across = round_scale(min(x for x, _ in points), max(x for x, _ in points))

    def at(x: float, y: float) -> tuple[float, float]:
        left = LEFT + across.share(x) * (WIDTH - LEFT - RIGHT)
        return left, HEIGHT - BOTTOM - up.share(y) * (HEIGHT - TOP - BOTTOM)

    scale = ", logarithmic" if up.log else ""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        STYLE,
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}{scale}</text>',
    ]
    for y in up.ticks:
        height = at(across.low, y)[1]
        out.append(
            f'<line class="grid" x1="{LEFT}" y1="{height:.1f}" x2="{WIDTH - RIGHT}" '
            f'y2="{height:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in across.ticks:
        left = at(x, up.low)[0]
        out.append(f'<text x="{left:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) // 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">iteration</text>')
    longest = max(map(len, shown.values()))
    right = WIDTH - RIGHT - sum(7 * len(name) + 16 for name in shown)  # of the names, above
    for number, (name, some) in enumerate(shown.items()):
        kind = NAMES[number % len(NAMES)]
        places = [at(*p) for p in some if math.isfinite(p[1])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline class="{kind}" points="{path}" fill="none" stroke-width="1.8"/>')
        if len(some) < longest or longest == 1:
            out += [
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places
            ]
        right += 7 * len(name) + 16
        out.append(
            f'<text class="{kind}" x="{right}" y="18" text-anchor="end">{escape(name)}</text>'
        )
    return "\n".join([*out, "</svg>", ""])
