"""The balancing problem in integers: chains of layers with costs, and the stages to fill.

A stage of the pipeline is a model chunk: flat order virtual stage * pp_size + pp rank. The step
time of a pipeline is that of its slowest rank, so what counts is the largest sum of costs over
the model chunks of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from mmconvert.errors import LayoutError
from mmconvert.sharding.stages import StageGrid

Counts = Sequence[int]  # number of layers by stage, in flat order


class Chain(NamedTuple):
    """A module as the balance sees it: layers of one cost, and what stands around them.

    Attributes:
        key: the module's.
        layers: number of layers, at least 1.
        before: cost of what stands before the layers; it goes where the first layer goes.
        layer: cost of one layer.
        after: cost of what stands after them; it goes where the last layer goes.
    """

    key: str
    layers: int
    before: int
    layer: int
    after: int

    def upto(self, count: int) -> int:
        """Cost of the first ``count`` layers with what stands around them."""
        if not count:
            return 0
        return self.before + count * self.layer + (self.after if count == self.layers else 0)

    @property
    def total(self) -> int:
        """Cost of the whole module."""
        return self.upto(self.layers)


@dataclass(frozen=True)
class Problem:
    """What is to be balanced.

    Attributes:
        encoders: the encoders; all their layers stand before or beside the first text layer.
        text: the text decoder; ``text.layer`` is at least 1.
        pp: number of pipeline ranks.
        vpp: number of virtual stages, which is the number of model chunks of a rank.
    """

    encoders: tuple[Chain, ...]
    text: Chain
    pp: int
    vpp: int = 1

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.pp * self.vpp

    @property
    def chains(self) -> tuple[Chain, ...]:
        """Encoders, then the text decoder."""
        return (*self.encoders, self.text)

    @property
    def total(self) -> int:
        """Cost of the whole model."""
        return sum(chain.total for chain in self.chains)

    def stages_of(self, rank: int, first: int, last: int) -> range:
        """The stages of a rank among ``first <= stage < last``."""
        return range(first + (rank - first) % self.pp, last, self.pp)

    def check(self) -> None:
        """Raises LayoutError if there are more stages than layers, or none."""
        layers = sum(chain.layers for chain in self.chains)
        if self.pp < 1 or self.vpp < 1:
            flag = f"--pp is {self.pp}" if self.pp < 1 else f"--vpp is {self.vpp}"
            raise LayoutError(flag, "a number of at least 1")
        if self.stages > layers:
            listed = " + ".join(f"{chain.layers} {chain.key}" for chain in self.chains)
            raise LayoutError(
                f"--pp {self.pp} x --vpp {self.vpp} are {self.stages} stages; the model has "
                f"{layers} layers ({listed})",
                "at least one layer on every stage",
                "choose a smaller --pp or --vpp",
            )


def stage_costs(chain: Chain, counts: Counts) -> list[int]:
    """Cost of a chain on each stage."""
    costs: list[int] = []
    placed = 0
    for count in counts:
        costs.append(chain.upto(placed + count) - chain.upto(placed))
        placed += count
    return costs


def rank_loads(problem: Problem, placed: Mapping[str, Counts]) -> list[int]:
    """Cost of each pipeline rank.

    Args:
        placed: layer counts by stage, by chain key.
    """
    loads = [0] * problem.pp
    for chain in problem.chains:
        for stage, cost in enumerate(stage_costs(chain, placed[chain.key])):
            loads[stage % problem.pp] += cost
    return loads


def grid(counts: Counts, pp: int) -> StageGrid:
    """Layer counts in flat order as a stage grid."""
    return tuple(tuple(counts[i : i + pp]) for i in range(0, len(counts), pp))


def level(
    base: Sequence[int], floor: Sequence[int], cap: Sequence[int], n: int, unit: int
) -> list[int] | None:
    """Spreads ``n`` equal things of cost ``unit`` so that the bins' loads are most even.

    Args:
        base: what each bin holds already, in cost.
        floor: how many each bin must take.
        cap: how many it may take.

    Returns:
        How many each bin takes; None if they do not fit. Giving each to the bin that is lowest
        minimises the sum of squares (the increments of a square grow).
    """
    taken = list(floor)
    fits = all(low <= high for low, high in zip(floor, cap, strict=True))
    if not (fits and sum(floor) <= n <= sum(cap)):
        return None
    heap = [(base[i] + taken[i] * unit, i) for i in range(len(taken)) if taken[i] < cap[i]]
    heapify(heap)
    for _ in range(n - sum(taken)):
        load, i = heap[0]
        taken[i] += 1
        if taken[i] < cap[i]:
            heapreplace(heap, (load + unit, i))
        else:
            heappop(heap)
    return taken
