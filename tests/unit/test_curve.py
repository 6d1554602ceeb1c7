"""The picture of a training: round ticks, marked evaluations, a logarithmic axis on request."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmconvert.runtime.curve import draw, log_scale, round_scale

SVG = "{http://www.w3.org/2000/svg}"
TRAINING = [(i, 8 * 0.9**i + 0.02) for i in range(1, 101)]
EVALUATIONS = [(20, 2.0), (40, 0.8), (60, 0.5)]


def is_round(value: float) -> bool:
    digits = f"{abs(value):.6e}".partition("e")[0].rstrip("0").rstrip(".")
    return value == 0 or len(digits.replace(".", "")) <= 3


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_an_axis_holds_its_values_at_round_ticks(least: float, width: float) -> None:
    assume(width > 1e-4 * abs(least))  # else the digits of a float do not tell ticks apart
    scale = round_scale(least, least + width)
    slack = 1e-6 * (scale.high - scale.low)
    assert scale.low <= least + slack
    assert scale.high >= least + width - slack
    assert 2 <= len(scale.ticks) <= 7
    steps = [b - a for a, b in zip(scale.ticks, scale.ticks[1:], strict=False)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)
    assert f"{steps[0]:.3g}".strip("0.")[0] in "125"


@given(st.floats(1e-6, 1e6), st.floats(1, 1e6))
def test_a_logarithmic_axis_holds_its_values(least: float, factor: float) -> None:
    scale = log_scale(least, least * factor)
    assert scale.low <= least * (1 + 1e-12)
    assert scale.high >= least * factor * (1 - 1e-12)
    assert 0 <= scale.share(least) <= 1
    assert scale.share(scale.low) == 0
    assert scale.share(scale.high) == 1


@pytest.mark.parametrize("log", [False, True])
def test_evaluations_are_marked_where_they_stand(log: bool) -> None:
    picture = ElementTree.fromstring(
        draw("loss", {"training": TRAINING, "validation": EVALUATIONS}, log=log)
    )
    circles = picture.findall(f"{SVG}circle")
    assert len(circles) == len(EVALUATIONS)
    heights = [float(c.get("cy", "")) for c in circles]
    assert heights == sorted(heights), "a smaller loss stands lower"
    texts = [t.text or "" for t in picture.findall(f"{SVG}text")]
    assert {"training", "validation", "iteration"} <= set(texts)
    assert texts[0] == ("loss, logarithmic" if log else "loss")
    numbers = [float(t) for t in texts if re.fullmatch(r"[\d.e+-]+", t)]
    assert all(map(is_round, numbers))


def test_odd_curves_are_drawn() -> None:
    for lines in ({}, {"training": [(1, 2.0)]}, {"training": [(1, float("nan")), (2, 1.0)]}):
        ElementTree.fromstring(draw("loss", lines))
    ElementTree.fromstring(draw("loss", {"training": [(1, -1.0), (2, 1.0)]}, log=True))


def test_the_names_of_the_lines_stand_clear_of_the_grid() -> None:
    """Above the plot, one beside the other."""
    lines = {"training": [(1, 6.0), (100, 0.1)], "evaluation": [(50, 2.0)]}
    picture = draw("loss", lines)
    names = re.findall(r'<text class="\w+" x="(\d+)" y="(\d+)" text-anchor="end">(\w+)<', picture)
    assert [name for _, _, name in names] == list(lines)
    highest = min(float(y) for y in re.findall(r'<line class="grid" [^>]*y1="([\d.]+)"', picture))
    assert all(int(y) + 4 < highest for _, y, _ in names)
    (first, second) = (int(x) for x, _, _ in names)
    assert second - first >= 7 * len("evaluation")
