"""Balanced layouts against every layout that there is, tried one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

from mmconvert.errors import LayoutError
from mmconvert.sharding.stages import check_grids, flat
from mmconvert.tools.suggest.chains import Chain, Problem, level, rank_loads
from mmconvert.tools.suggest.optimum import Balance, balance
from nights import examples

SLOW = examples(50, nightly=150)
NAMES = ("vit", "audio")
MOST_STAGES = {0: 12, 1: 12, 2: 6}  # by number of encoders: more than these take too long
MOST_TRIED = 60_000


def cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to put layers on stages in order."""
    for ends in itertools.combinations_with_replacement(range(layers + 1), stages - 1):
        edges = (0, *ends, layers)
        yield tuple(b - a for a, b in itertools.pairwise(edges))


def allowed(placed: tuple[tuple[int, ...], ...]) -> bool:
    """A layer on every stage, no text layer (the last row) before an encoder's last."""
    *encoders, text = placed
    first = next(stage for stage, count in enumerate(text) if count)
    return all(map(any, zip(*placed, strict=True))) and not any(
        any(encoder[first + 1 :]) for encoder in encoders
    )


def best_of_all(problem: Problem) -> tuple[int, int] | None:
    """The smallest (largest load, sum of squares) of any layout."""
    keys = [chain.key for chain in problem.chains]
    choices = [list(cuts(chain.layers, problem.stages)) for chain in problem.chains]
    found = []
    for placed in itertools.product(*choices):
        if allowed(placed):
            loads = rank_loads(problem, dict(zip(keys, placed, strict=True)))
            found.append((max(loads), sum(load * load for load in loads)))
    return min(found, default=None)


def number_of_layouts(problem: Problem) -> int:
    count = 1
    for chain in problem.chains:
        count *= sum(1 for _ in cuts(chain.layers, problem.stages))
    return count


@st.composite
def problems(draw: st.DrawFn, encoders: st.SearchStrategy[int]) -> Problem:
    number = draw(encoders)
    cost = st.integers(0, draw(st.sampled_from([3, 30, 1000])))
    size = {0: 9, 1: 7, 2: 4}[number]
    chains = [
        Chain(name, draw(st.integers(1, size)), draw(cost), draw(cost), draw(cost))
        for name in NAMES[:number]
    ]
    text = Chain("llm", draw(st.integers(1, 7)), draw(cost), draw(cost) + 1, draw(cost))
    problem = Problem(tuple(chains), text, draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    assume(problem.stages <= MOST_STAGES[number])
    assume(problem.stages <= sum(chain.layers for chain in problem.chains))
    assume(number_of_layouts(problem) <= MOST_TRIED)
    return problem


def check(problem: Problem, found: Balance) -> None:
    """What holds of every answer."""
    counts = {key: tuple(flat(grid)) for key, grid in found.grids.items()}
    assert allowed(tuple(counts[chain.key] for chain in problem.chains))
    assert all(sum(counts[chain.key]) == chain.layers for chain in problem.chains)
    assert all(len(g) == problem.vpp and len(g[0]) == problem.pp for g in found.grids.values())
    assert found.loads == rank_loads(problem, counts)
    check_grids(found.grids, {key: key for key in found.grids})
    assert found == balance(problem)


@SLOW
@given(problems(st.sampled_from([0, 1, 1, 1])))
# with virtual stages, having placed more of the encoder is not always better: 147, not 148
@example(Problem((Chain("vit", 3, 42, 39, 43),), Chain("llm", 6, 83, 22, 1), 3, 2))
def test_one_encoder_is_balanced_as_well_as_can_be(problem: Problem) -> None:
    want, found = best_of_all(problem), balance(problem)
    event(f"vpp {problem.vpp}")
    assert want is not None
    check(problem, found)
    assert max(found.loads) == want[0]
    assert found.optimal and found.gap == 0


@SLOW
@given(problems(st.just(2)))
# the whole of either encoder fits one stage, and the text starts in the second model chunk
@example(
    Problem((Chain("vit", 3, 1, 5, 2), Chain("audio", 2, 0, 4, 1)), Chain("llm", 3, 0, 3, 2), 2, 2)
)
def test_two_encoders_are_optimal_where_it_is_said(problem: Problem) -> None:
    want = best_of_all(problem)
    assert want is not None
    try:
        found = balance(problem)
    except LayoutError:
        # Only where the text layers are too few for the later model chunks.
        assert problem.stages - problem.text.layers >= problem.pp and problem.vpp > 1
        return
    check(problem, found)
    assert found.lower_bound <= want[0] <= max(found.loads)
    assert found.optimal or problem.vpp > 1
    event(f"vpp {problem.vpp}, proven {found.optimal}")
    if found.optimal:
        assert max(found.loads) == want[0]


@SLOW
@given(problems(st.sampled_from([1, 2])))
def test_without_virtual_stages_the_ranks_are_as_even_as_can_be(problem: Problem) -> None:
    problem = Problem(problem.encoders, problem.text, problem.stages)
    loads = balance(problem).loads
    assert (max(loads), sum(load * load for load in loads)) == best_of_all(problem)


@SLOW
@given(st.data())
def test_level_spreads_evenly(data: st.DataObject) -> None:
    bins, unit = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    small = st.lists(st.integers(0, 5), min_size=bins, max_size=bins)
    base, floor, cap = data.draw(small), data.draw(small), data.draw(small)
    n = data.draw(st.integers(0, 12))
    got = level(base, floor, cap, n, unit)
    ways = [
        taken
        for taken in itertools.product(*(range(a, b + 1) for a, b in zip(floor, cap, strict=True)))
        if sum(taken) == n
    ]

    def squares(taken: tuple[int, ...] | list[int]) -> int:
        return sum((b + unit * t) ** 2 for b, t in zip(base, taken, strict=True))

    if got is None:
        assert not ways
    else:
        assert tuple(got) in ways and squares(got) == min(map(squares, ways))


def test_what_cannot_be_searched_is_not_called_optimal() -> None:
    """With hardly any steps the answer is either a refusal or has an honest bound."""
    vit, audio = Chain("vit", 8, 3, 7, 11), Chain("audio", 9, 2, 5, 1)
    problem = Problem((vit, audio), Chain("llm", 12, 0, 13, 17), 4)
    full = balance(problem)
    assert full.optimal
    seen = set()
    for steps in (0, 200, 600, 1000, 2000, 5000):
        try:
            found = balance(problem, steps=steps)
        except LayoutError:
            seen.add("refused")
            continue
        seen.add("proven" if found.optimal else "open")
        assert found.lower_bound <= max(full.loads) <= max(found.loads)
        assert found.optimal == (max(found.loads) == found.lower_bound)
    assert "refused" in seen and "proven" in seen


@pytest.mark.parametrize(("pp", "vpp"), [(0, 1), (1, 0), (7, 1), (2, 4)])
def test_impossible_numbers_of_stages_are_refused(pp: int, vpp: int) -> None:
    problem = Problem((Chain("vit", 3, 0, 1, 0),), Chain("llm", 3, 0, 1, 0), pp, vpp)
    with pytest.raises(LayoutError, match=r"--pp|--vpp"):
        balance(problem)


def test_a_pipeline_of_today_takes_a_moment() -> None:
    """The largest layout that is asked of it stays far below the number of steps allowed."""
    vit = Chain("vit", 45, 3, 31, 40)
    problem = Problem((vit,), Chain("llm", 80, 0, 97, 130), 16, 3)
    assert balance(problem, steps=300_000).optimal
