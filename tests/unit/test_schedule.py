"""Learning rates against those that Megatron's scheduler gave (core 0.12.1, run)."""

from __future__ import annotations

import pytest

from mmconvert.runtime.schedule import Schedule

# schedule, and (iteration from 1, rate)
CASES = {
    "warm-up of a tenth": (
        Schedule(1e-5, 0.0, 10.0, 100),
        {1: 0.0, 2: 1e-6, 10: 9e-6, 11: 1e-5, 12: 9.996954e-6, 55: 5.174497e-6, 100: 3.045865e-9},
    ),
    "no warm-up": (
        Schedule(4e-5, 0.0, 0.0, 10),
        {1: 4e-5, 2: 3.902113e-5, 3: 3.618034e-5, 5: 2.618034e-5, 6: 2e-5, 10: 9.788697e-7},
    ),
    "a warm-up that is no whole number": (
        Schedule(1e-5, 0.0, 1.5, 15),
        {1: 0.0, 2: 6.666667e-6, 3: 9.966192e-6, 4: 9.698463e-6, 5: 9.177439e-6},
    ),
    "a least rate": (
        Schedule(1e-5, 1e-6, 1.0, 10),
        {1: 0.0, 2: 1e-5, 3: 9.728617e-6, 10: 1.271383e-6, 12: 1e-6, 20: 1e-6},
    ),
    "linear, from a rate of its own": (
        Schedule(1e-5, 1e-6, 2.0, 10, 4e-6, "linear"),
        {1: 4e-6, 2: 7e-6, 3: 1e-5, 7: 5.5e-6, 11: 1e-6},
    ),
    "constant": (Schedule(1e-5, 0.0, 0.0, 10, 0.0, "constant"), {1: 1e-5, 10: 1e-5, 50: 1e-5}),
}


@pytest.mark.parametrize("name", CASES)
def test_rates_are_megatrons(name: str) -> None:
    schedule, rates = CASES[name]
    found = {number: schedule.at(number - 1) for number in rates}
    assert found == pytest.approx(rates, rel=1e-6, abs=1e-16)
