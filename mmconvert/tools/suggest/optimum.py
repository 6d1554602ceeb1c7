"""The layout whose slowest rank is fastest, and the proof that no other is faster.

Whether a bound on every rank's load can be kept is decided exactly (see ``narrow`` and ``wide``);
the smallest such bound is found by bisection between whole numbers. What can be kept gives a
layout, what cannot a lower bound: when both meet, the layout is proven optimal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from mmconvert.errors import LayoutError
from mmconvert.sharding.layout import grid_flag
from mmconvert.sharding.stages import StageGrid, check_grids, check_order
from mmconvert.tools.suggest import narrow, wide
from mmconvert.tools.suggest.chains import Chain, Problem, grid, rank_loads
from mmconvert.tools.suggest.effort import Effort, EffortSpent
from mmconvert.tools.suggest.narrow import BalancedLayers

STEPS = 1_500_000  # two or three seconds of Python; one encoder needs a tenth of it


class Layouts(Protocol):
    """A kind of layouts: those that keep a bound on every rank's load."""

    def __call__(
        self, bound: int, effort: Effort, *, every: bool = False
    ) -> Iterator[BalancedLayers]:
        """At least one if there is any; ``every`` looks for more, for the sake of evenness."""
        ...


@dataclass(frozen=True)
class Balance:
    """A balanced layout.

    Attributes:
        grids: stage grid by chain key.
        loads: cost of each pipeline rank.
        lower_bound: no layout has a smaller largest load.
    """

    grids: dict[str, StageGrid]
    loads: list[int]
    lower_bound: int

    @property
    def optimal(self) -> bool:
        """Whether it is proven that no layout's slowest rank is faster."""
        return max(self.loads) == self.lower_bound

    @property
    def gap(self) -> float:
        """How much faster the slowest rank could be at most, as a part of the lower bound."""
        return max(self.loads) / self.lower_bound - 1


def balance(problem: Problem, steps: int = STEPS) -> Balance:
    """The layout with the smallest largest load of a rank.

    Every stage holds a layer, and no text layer stands before an encoder's last. Among the layouts
    with that largest load, an even one is taken: the evenest by sum of squares without virtual
    stages. The same problem always gives the same layout.

    Args:
        steps: how much may be searched, for each kind of layout.

    Raises:
        LayoutError: more stages than layers, or too many layers to search.
    """
    problem.check()
    low = max(-(-problem.total // problem.pp), *(c.layer for c in problem.chains), 1)
    found, proven = _smallest(low, problem.total, partial(narrow.layouts, problem), Effort(steps))
    if problem.vpp > 1:
        for kind, exact in _wide(problem):
            # Only what beats the best so far is of interest; mostly one look says: nothing does.
            high = max(found.loads) - 1 if found else problem.total
            other, bound = _smallest(low, high, kind, Effort(steps), sure=found is None)
            proven = min(proven, bound if exact else low)
            found = min(filter(None, (found, other)), key=lambda f: f.rank_order, default=None)
    if found is None:
        raise LayoutError(
            f"no layout found in {steps:,} steps of search for --pp {problem.pp} x --vpp "
            f"{problem.vpp} and " + ", ".join(f"{c.layers} {c.key} layers" for c in problem.chains),
            "fewer stages: a layer on each, and no text layer before an encoder's last",
            "choose a smaller --pp or --vpp",
        )
    return _checked(problem, found, proven)


def _wide(problem: Problem) -> Iterator[tuple[Layouts, bool]]:
    """The searches for encoders in several model chunks, and whether each is complete."""
    if len(problem.encoders) == 1:
        yield partial(wide.layouts, problem), True
    for encoder in problem.encoders if len(problem.encoders) == 2 else ():
        yield _pinned(problem, encoder), False


def _pinned(problem: Problem, whole: Chain) -> Layouts:
    """Of two encoders one stands on stage 0 as a whole, as in the published two-encoder layouts."""
    (other,) = (t for t in problem.encoders if t.key != whole.key)
    joined = replace(problem, encoders=(other._replace(before=other.before + whole.total),))
    alone = [whole.layers] + [0] * (problem.stages - 1)

    def layouts(bound: int, effort: Effort, *, every: bool = False) -> Iterator[BalancedLayers]:
        for found in wide.layouts(joined, bound, effort, every=every):
            yield BalancedLayers({whole.key: alone, **found.placed}, found.loads)

    return layouts


def _smallest(
    low: int, high: int, layouts: Layouts, effort: Effort, *, sure: bool = True
) -> tuple[BalancedLayers | None, int]:
    """The best layout of a kind with a largest load of at most ``high``, and a lower bound.

    The bound is for layouts of this kind; ``high + 1`` if none keeps ``high``. Bounds are tried
    from ``low`` upwards, since tight ones are decided fastest; where it is not ``sure`` that
    ``high`` can be kept, that is tried first.
    """
    best: BalancedLayers | None = None
    step = max(1, low // 256)
    with suppress(EffortSpent):
        if not sure and next(layouts(high, effort), None) is None:
            return None, high + 1
        trial = low
        while best is None and low <= high:
            best = next(layouts(trial, effort), None)
            if best is None:
                low = trial + 1
                trial, step = min(high, trial + step), step * 2
        while best is not None and low < max(best.loads):
            trial = (low + max(best.loads) - 1) // 2
            better = next(layouts(trial, effort), None)
            if better is None:
                low = trial + 1
            else:
                best = better
        if best is None:
            return None, low
        for found in layouts(low, effort, every=True):
            best = min(best, found, key=lambda f: f.rank_order)
    return best, low


def _checked(problem: Problem, found: BalancedLayers, proven: int) -> Balance:
    """The layout as grids, after what no layout may break has been checked once more."""
    grids = {c.key: grid(found.placed[c.key], problem.pp) for c in problem.chains}
    flags = {c.key: grid_flag(c.key) for c in problem.chains}
    check_grids(grids, flags)
    check_order(grids, problem.text.key, flags)
    loads = rank_loads(problem, found.placed)
    sums_fit = all(sum(found.placed[c.key]) == c.layers for c in problem.chains)
    filled = all(map(any, zip(*found.placed.values(), strict=True)))
    if not (sums_fit and filled and loads == found.loads):
        raise AssertionError(f"a layout that is not what was searched for: {grids}")
    return Balance(grids, loads, min(proven, max(loads)))
