"""Layouts whose encoders end within the first model chunk of the ranks: exact, for any encoders.

There stage = rank for everything of the encoders, so their layout is a cut of the encoders into
consecutive stages. Text layers are alike and stand in order, so only their number on each rank
counts. For a bound on the load of every rank, a dynamic program over (stage, encoder layers placed)
finds the greatest number of text layers for which the ranks have room; the bound can be kept if
and only if that is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from mmconvert.tools.suggest.chains import Problem, level
from mmconvert.tools.suggest.effort import Effort

LayersPlaced = tuple[int, ...]  # layers placed of each encoder


class BalancedLayers(NamedTuple):
    """A layout: layers on every stage by chain key, and the largest load of a rank."""

    placed: dict[str, list[int]]
    loads: list[int]

    @property
    def rank_order(self) -> tuple[int, int, list[list[int]]]:
        """The smaller the better: largest load, evenness, then any fixed order."""
        squares = sum(load * load for load in self.loads)
        return max(self.loads), squares, list(self.placed.values())


class _Best(NamedTuple):
    """The best way to a state: room for text layers so far, evenness, and where it came from."""

    room: int
    squares: int
    came_from: LayersPlaced


def layouts(
    problem: Problem, bound: int, effort: Effort, *, every: bool = False
) -> Iterator[BalancedLayers]:
    """Layouts in which no rank's load exceeds ``bound``; at least one if there is any.

    For each first text stage and each state of the encoders before it, the way there with the most
    room for text is tried, the evenest among equals.

    Args:
        every: also states that others outdo, which only matter for evenness.

    Raises:
        EffortSpent: too much to search.
    """
    text, pp = problem.text, problem.pp
    start: LayersPlaced = (0,) * len(problem.encoders)
    reached: list[dict[LayersPlaced, _Best]] = [{start: _Best(0, 0, start)}]
    fewest = max(0, problem.stages - text.layers)  # a stage beyond these has a text layer
    for stage in range(pp):
        if stage >= fewest:
            for state in sorted(reached[stage]):
                found = _finish(problem, bound, reached, stage, state)
                if found is not None:
                    yield found
        if stage + 1 < pp:
            after = _advance(problem, bound, reached[stage], stage, effort)
            reached.append(after if every else _furthest(problem, after))


def _prefix(problem: Problem, state: LayersPlaced) -> int:
    return sum(t.upto(count) for t, count in zip(problem.encoders, state, strict=True))


def _advance(
    problem: Problem, bound: int, states: dict[LayersPlaced, _Best], stage: int, effort: Effort
) -> dict[LayersPlaced, _Best]:
    """The states after a stage that holds encoder layers only."""
    unit, chunks = problem.text.layer, problem.vpp - 1
    encoders = sum(t.total for t in problem.encoders)
    # What is left must fit the ranks that are left, whatever its order: an upper bound.
    ahead = (problem.pp - stage - 1) * bound - problem.text.before - problem.text.after
    after: dict[LayersPlaced, _Best] = {}
    for state in sorted(states):
        here = states[state]
        done = _prefix(problem, state)
        for nxt, cost in _cuts(problem, state, bound):
            effort.spend()
            room = (bound - cost) // unit if chunks else 0
            if nxt == state or room < chunks:
                continue
            most = here.room + room + (ahead - (encoders - done - cost)) // unit
            if most < problem.text.layers:
                continue
            best = _Best(here.room + room, here.squares + cost * cost, state)
            old = after.get(nxt)
            if old is None or (best.room, -best.squares) > (old.room, -old.squares):
                after[nxt] = best
    return after


def _furthest(problem: Problem, states: dict[LayersPlaced, _Best]) -> dict[LayersPlaced, _Best]:
    """Without states that have placed no more of any encoder than another.

    Without virtual stages the further state can do what the other can: from any layout of the
    other, take out the layers that it has placed already, close up stages that this leaves empty,
    and give the stages won at the end to text layers, of which there are enough to split.
    """
    if problem.vpp > 1 or problem.text.layers < problem.stages:
        return states
    kept: list[LayersPlaced] = []
    for state in sorted(states, reverse=True):
        if not any(all(a <= b for a, b in zip(state, k, strict=True)) for k in kept):
            kept.append(state)
    return {state: states[state] for state in kept}


def _cuts(problem: Problem, state: LayersPlaced, bound: int) -> Iterator[tuple[LayersPlaced, int]]:
    """The states that one more stage can lead to, with the stage's cost, at most ``bound``."""
    partial: list[tuple[LayersPlaced, int]] = [((), 0)]
    for encoder, placed in zip(problem.encoders, state, strict=True):
        base = encoder.upto(placed)
        longer: list[tuple[LayersPlaced, int]] = []
        for head, cost in partial:
            for count in range(placed, encoder.layers + 1):
                total = cost + encoder.upto(count) - base
                if total > bound:
                    break
                longer.append(((*head, count), total))
        partial = longer
    yield from partial


def _finish(
    problem: Problem,
    bound: int,
    reached: list[dict[LayersPlaced, _Best]],
    stage: int,
    state: LayersPlaced,
) -> BalancedLayers | None:
    """Puts the rest of the encoders on ``stage``, which is the first with text layers."""
    path = [state]
    for earlier in range(stage, 0, -1):
        path.append(reached[earlier][path[-1]].came_from)
    path.reverse()
    path.append(tuple(t.layers for t in problem.encoders))
    placed = {
        t.key: [b[i] - a[i] for a, b in pairwise(path)] + [0] * (problem.stages - stage - 1)
        for i, t in enumerate(problem.encoders)
    }
    prefixes = [_prefix(problem, s) for s in path]
    base = [b - a for a, b in pairwise(prefixes)]
    base += [0] * (problem.pp - stage - 1)
    return with_text(problem, bound, stage, placed, base)


def with_text(
    problem: Problem, bound: int, stage: int, placed: dict[str, list[int]], base: list[int]
) -> BalancedLayers | None:
    """Adds the text layers to a layout of the encoders, or None if the bound has no room for them.

    Args:
        stage: the first that has text layers.
        base: cost of the encoders on each rank.
    """
    text, pp = problem.text, problem.pp
    base = list(base)
    base[stage % pp] += text.before
    base[pp - 1] += text.after
    chunks = [problem.stages_of(rank, stage, problem.stages) for rank in range(pp)]
    floor = [len(own) for own in chunks]
    cap = [
        (bound - load) // text.layer if own else 0 for load, own in zip(base, chunks, strict=True)
    ]
    if any(load > bound for load in base):
        return None
    counts = level(base, floor, cap, text.layers, text.layer)
    if counts is None:
        return None
    loads = [load + count * text.layer for load, count in zip(base, counts, strict=True)]
    filled = [0] * problem.stages
    for rank, own in enumerate(chunks):
        encoder_here = [_encoder_cost(problem, placed, q) for q in own]
        extra = [
            cost
            + (text.before if q == stage else 0)
            + (text.after if q + 1 == problem.stages else 0)
            for cost, q in zip(encoder_here, own, strict=True)
        ]
        shares = level(extra, [1] * len(own), [text.layers] * len(own), counts[rank], text.layer)
        for q, count in zip(own, shares or [], strict=True):
            filled[q] = count
    return BalancedLayers({**placed, text.key: filled}, loads)


def _encoder_cost(problem: Problem, placed: dict[str, list[int]], stage: int) -> int:
    """Cost of the encoders on one stage."""
    cost = 0
    for encoder in problem.encoders:
        before = sum(placed[encoder.key][:stage])
        cost += encoder.upto(before + placed[encoder.key][stage]) - encoder.upto(before)
    return cost
