"""Layouts whose one encoder goes on into further model chunks: exact for one encoder.

The first text stage is then at least ``pp``, so every rank holds encoder layers. Layers of a module
are alike and in order, so any numbers of layers on the ranks can be had, and only these numbers
count, with the two stages at the ends of the encoder. For each such pair of ends, a dynamic program
over (rank, encoder layers on the ranks so far) finds the greatest room for text layers under a
bound on every rank's load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmconvert.tools.suggest.chains import Problem, level
from mmconvert.tools.suggest.effort import Effort
from mmconvert.tools.suggest.narrow import BalancedLayers, with_text


class Ends(NamedTuple):
    """Where the encoder ends and the text begins.

    Attributes:
        text: the first stage with text layers.
        shared: whether that stage has encoder layers too; else the encoder ends one before.
    """

    text: int
    shared: bool


def layouts(
    problem: Problem, bound: int, effort: Effort, *, every: bool = False
) -> Iterator[BalancedLayers]:
    """Layouts in which no rank's load exceeds ``bound``, the roomiest for each pair of ends.

    ``problem`` has one encoder. ``every`` changes nothing here.

    Raises:
        EffortSpent: too much to search.
    """
    del every
    (encoder,) = problem.encoders
    for text in range(problem.pp, problem.stages):
        if problem.stages - text > problem.text.layers:
            continue
        for shared in (False, True):
            if text + shared <= encoder.layers:
                found = _layout(problem, bound, Ends(text, shared), effort)
                if found is not None:
                    yield found


def _layout(problem: Problem, bound: int, ends: Ends, effort: Effort) -> BalancedLayers | None:
    (encoder,), text, pp = problem.encoders, problem.text, problem.pp
    last = ends.text if ends.shared else ends.text - 1
    own = [problem.stages_of(rank, 0, last + 1) for rank in range(pp)]
    chunks = [len(problem.stages_of(rank, ends.text, problem.stages)) for rank in range(pp)]
    fixed = [0] * pp
    fixed[0] += encoder.before
    fixed[last % pp] += encoder.after
    base = list(fixed)
    base[ends.text % pp] += text.before
    base[pp - 1] += text.after
    counts = _counts(problem, bound, [len(q) for q in own], chunks, base, effort)
    if counts is None:
        return None
    placed = [0] * problem.stages
    for rank, stages in enumerate(own):
        n = len(stages)
        for stage, count in zip(
            stages,
            level([0] * n, [1] * n, [encoder.layers] * n, counts[rank], 1) or [],
            strict=True,
        ):
            placed[stage] = count
    loads = [load + n * encoder.layer for load, n in zip(fixed, counts, strict=True)]
    return with_text(problem, bound, ends.text, {encoder.key: placed}, loads)


def _counts(
    problem: Problem,
    bound: int,
    fewest: Sequence[int],
    chunks: Sequence[int],
    base: Sequence[int],
    effort: Effort,
) -> list[int] | None:
    """Encoder layers for each rank such that text layers have the most room.

    Args:
        fewest: encoder layers that each rank must hold.
        chunks: text layers that each rank must hold; 0: it can hold none.
        base: cost of what stands before and after the layers, by rank.
    """
    (encoder,), text, pp = problem.encoders, problem.text, problem.pp
    states: dict[int, tuple[int, int]] = {0: (0, 0)}  # layers placed -> room, -sum of squares
    steps: list[dict[int, int]] = []  # layers placed -> layers on this rank
    for rank in range(pp):
        later = sum(fewest[rank + 1 :])
        ahead = (pp - rank - 1) * bound - sum(base[rank + 1 :])
        after: dict[int, tuple[int, int]] = {}
        choice: dict[int, int] = {}
        for placed, (room, squares) in states.items():
            for n in range(fewest[rank], encoder.layers - placed - later + 1):
                effort.spend()
                left = bound - base[rank] - n * encoder.layer
                if left < chunks[rank] * text.layer:
                    break
                here = room + (left // text.layer if chunks[rank] else 0)
                rest = (encoder.layers - placed - n) * encoder.layer
                if ahead < rest or here + (ahead - rest) // text.layer < text.layers:
                    continue
                best = (here, squares - (bound - left) ** 2)
                if placed + n not in after or best > after[placed + n]:
                    after[placed + n] = best
                    choice[placed + n] = n
        states = after
        steps.append(choice)
    if states.get(encoder.layers, (-1, 0))[0] < text.layers:
        return None
    counts: list[int] = []
    placed = encoder.layers
    for choice in reversed(steps):
        counts.append(choice[placed])
        placed -= choice[placed]
    return counts[::-1]
