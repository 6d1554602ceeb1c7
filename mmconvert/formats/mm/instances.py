"""A table's rows for every layer, and where each stands in an MM checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mmconvert.converters.family import Module, Row
from mmconvert.names import NO_LAYER
from mmconvert.plan.plan import Key
from mmconvert.sharding.layout import Layout
from mmconvert.sharding.stages import first_stage, last_stage, locate, total


class Instance(NamedTuple):
    """A row for one layer (NO_LAYER before and after the layers)."""

    module: Module
    row: Row
    layer: int

    @property
    def key(self) -> Key:
        """The whole that this row makes, or repeats."""
        return Key(self.row.tied_to or self.row.mm, self.layer)


def instances(modules: Sequence[Module], layers: Mapping[str, int]) -> Iterator[Instance]:
    """Every row of a table for every layer; ``layers`` counts them by module key."""
    for module in modules:
        for r in module.before:
            yield Instance(module, r, NO_LAYER)
        for layer in range(layers[module.key]):
            for r in module.layer:
                yield Instance(module, r, layer)
        for r in module.after:
            yield Instance(module, r, NO_LAYER)


def placements(
    modules: Sequence[Module], layout: Layout, *, every_tied: bool = False
) -> Iterator[tuple[Instance, int, str]]:
    """Every tensor of an MM checkpoint: instance, stage, name there.

    What stands before the layers is on the first stage with a layer of its module, what stands
    after them on the last. A tied row stands only on another stage than the tensor that it
    repeats; ``every_tied`` yields it in any case, since other tools leave it there too.
    """
    layers = {key: total(grid) for key, grid in layout.grids.items()}
    found = {m.key: locate(layout.grids[m.key]) for m in modules}
    origin: dict[str, int] = {}
    for item in instances(modules, layers):
        grid = layout.grids[item.module.key]
        if item.layer != NO_LAYER:
            stage, local = found[item.module.key][item.layer]
        elif item.row in item.module.before:
            stage, local = first_stage(grid), NO_LAYER
        else:
            stage, local = last_stage(grid), NO_LAYER
        if item.row.tied_to and origin[item.row.tied_to] == stage and not every_tied:
            continue
        origin.setdefault(item.row.mm, stage)
        yield item, stage, item.row.mm.replace("{}", str(local))
