"""A bar chart: one bar for each layer of a module, or for each module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mmconvert.report.svg import Drawing, width_of

SPREAD = 100  # largest over smallest bar, beyond which the axis is logarithmic
# Pixels: to the axis, to the words, from the top to the highest bar, of that bar, of a whole chart.
LEFT, EDGE, HEAD, HEIGHT, WHOLE = 76, 16, 58, 180, 290
WIDEST, NARROWEST = 88, 5  # pixels of one bar
BETWEEN = 6.0  # pixels between two labels below the bars


class Bar(NamedTuple):
    """A bar: what stands below it, its value (may be infinite), a hint for the pointer, and a mark
    that stands above it.
    """

    label: str
    value: float
    hint: str
    mark: str = ""


class Axis(NamedTuple):
    """From 0 (linear) or from ``low`` (logarithmic) to ``high``, with ticks."""

    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """How high a value stands, from 0 to 1."""
        if value <= self.low:
            return 0.0
        if value >= self.high:
            return 1.0
        if self.low:  # the logarithms apart: a quotient of small numbers may have no digits left
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(value) - low) / (high - low)
        return value / self.high


def axis_for(values: Sequence[float]) -> Axis:
    """The axis for bars of these heights: logarithmic if they differ by more than SPREAD."""
    found = [v for v in values if 0 < v < math.inf]
    if not found:
        return Axis(0.0, 1.0, [0.0, 1.0])
    least, most = min(found), max(found)
    if most / least > SPREAD:
        # One decade below the least, so that the smallest bar is still a bar.
        first, last = math.floor(math.log10(least)) - 1, math.ceil(math.log10(most))
        step = max(1, math.ceil((last - first) / 8))
        last = first + step * math.ceil((last - first) / step)
        ticks = [10.0**power for power in range(first, last + 1, step)]
        return Axis(10.0**first, 10.0**last, ticks)
    step = _round_step(most / 4)
    count = math.ceil(most / step - 1e-9)
    return Axis(0.0, count * step, [i * step for i in range(count + 1)])


def _round_step(value: float) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= value * (1 - 1e-9))


def bar_chart(
    drawing: Drawing,
    top: float,
    title: str,
    bars: Sequence[Bar],
    css: str,
    quantity: str,
    axis: Axis,
    width: int,
) -> None:
    """Upright bars on an axis, which other charts may have too.

    Args:
        drawing: what to draw into.
        top: where the chart begins there.
        css: the class that colours the bars.
        quantity: what the axis shows.
        width: pixels of the whole chart; it takes more where bars would be too narrow.
    """
    room = width - LEFT - EDGE
    step = min(WIDEST, max(NARROWEST, room / max(1, len(bars))))
    drawing.text(EDGE, top + 20, title, "ink big")
    scale = "log scale; no bar: 0" if axis.low else "linear scale"
    drawing.text(EDGE, top + 38, f"{quantity}, {scale}", "dim")
    right = LEFT + max(step * len(bars), min(room, 300))
    floor = top + HEAD + HEIGHT
    for tick in axis.ticks:
        y = floor - HEIGHT * axis.share(tick)
        drawing.line(LEFT, y, right, y)
        drawing.text(LEFT - 8, y + 4, f"{tick:.3g}", "dim", "end")
    _bars(drawing, bars, axis, step, floor, css)
    drawing.text((LEFT + right) / 2, floor + 36, "layer", "dim", "middle")


def _bars(
    drawing: Drawing, bars: Sequence[Bar], axis: Axis, step: float, floor: float, css: str
) -> None:
    widest = max((width_of(bar.label) for bar in bars), default=0)
    each = round(_round_step(max(1, math.ceil((widest + BETWEEN) / step))))
    labelled = [n for n, bar in enumerate(bars) if not bar.label.isdigit()]
    for number, bar in enumerate(bars):
        x = LEFT + number * step
        height = HEIGHT * axis.share(bar.value)
        if height:
            drawing.rect(x + step * 0.1, floor - height, step * 0.8, height, css, bar.hint)
        if bar.mark:
            drawing.text(x + step / 2, floor - height - 3, bar.mark, "ink bold", "middle")
        free = all(abs(number - other) >= each for other in labelled)
        if number in labelled or (bar.label.isdigit() and int(bar.label) % each == 0 and free):
            drawing.text(x + step / 2, floor + 17, bar.label, "dim", "middle")
