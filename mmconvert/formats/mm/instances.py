"""A table's rows for every layer and expert, and where each stands in an MM checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mmconvert.converters.rows import ZEROS, Module, Row
from mmconvert.names import EXPERT, NO_EXPERT, NO_LAYER, fill
from mmconvert.plan.plan import Key
from mmconvert.sharding.layout import Layout
from mmconvert.sharding.stages import first_stage, last_stage, locate, total


class Instance(NamedTuple):
    """A row for one layer (NO_LAYER outside the layers) and one expert (NO_EXPERT for most)."""

    module: Module
    row: Row
    layer: int
    expert: int = NO_EXPERT

    @property
    def key(self) -> Key:
        """The whole that this row makes, or repeats."""
        return Key(self.row.tied_to or self.row.mm, self.layer, self.expert)

    def hf_names(self) -> list[str]:
        """The HF tensors that make it, in hub spelling."""
        return self.row.hf_names(self.layer, self.expert)

    def hf_places(self) -> list[tuple[str, int]]:
        """These, and which expert of each, where it stacks them; else NO_EXPERT."""
        templates = (template for template in self.row.hf if template != ZEROS)
        inside = [NO_EXPERT if EXPERT in template else self.expert for template in templates]
        return list(zip(self.hf_names(), inside, strict=True))


def experts_of(modules: Sequence[Module], dims: Mapping[str, int]) -> dict[str, int]:
    """The number of experts in a layer, by the key of each module that has some."""
    return {m.key: dims.get(f"{m.key}.experts", 0) for m in modules if m.has_experts}


def instances(
    modules: Sequence[Module], layers: Mapping[str, int], experts: Mapping[str, int] | None = None
) -> Iterator[Instance]:
    """Every row of a table for every layer and expert; both are counted by module key."""
    for module in modules:
        for r in module.everywhere + module.before:
            yield Instance(module, r, NO_LAYER)
        count = (experts or {}).get(module.key, 0)
        for layer in range(layers[module.key]):
            for r in module.layer:
                if r.layers is not None and layer not in r.layers:
                    continue
                if r.of_expert:
                    for expert in range(count):
                        yield Instance(module, r, layer, expert)
                else:
                    yield Instance(module, r, layer)
        for r in module.after:
            yield Instance(module, r, NO_LAYER)


class Placement(NamedTuple):
    """Where an instance stands in an MM checkpoint.

    Attributes:
        stage: its pipeline stage.
        name: its name there.
        eps: the expert-parallel ranks that hold it.
    """

    item: Instance
    stage: int
    name: str
    eps: range


def placements(
    modules: Sequence[Module],
    layout: Layout,
    dims: Mapping[str, int],
    *,
    every_tied: bool = False,
) -> Iterator[Placement]:
    """Every tensor of an MM checkpoint.

    What stands before the layers is on the first stage with a layer of its module, what stands
    after them on the last. A tied row stands only on another stage than the tensor that it
    repeats; ``every_tied`` yields it in any case, since other tools leave it there too. Experts
    are divided over the expert-parallel ranks and numbered anew on each; all others stand on all.

    Args:
        dims: tells the number of experts.
    """
    layers = {key: total(grid) for key, grid in layout.grids.items()}
    experts = experts_of(modules, dims)
    found = {m.key: locate(layout.grids[m.key]) for m in modules}
    origin: dict[str, int] = {}
    everyone = range(layout.ep)
    for item in instances(modules, layers, experts):
        module, row = item.module, item.row
        grid = layout.grids[module.key]
        if item.layer != NO_LAYER:
            stage, local = found[module.key][item.layer]
        elif row in module.everywhere:
            for stage in range(layout.pp_size * layout.vpp_size):
                yield Placement(item, stage, row.mm, everyone)
            continue
        else:
            stage, local = first_stage(grid) if row in module.before else last_stage(grid), NO_LAYER
        if row.tied_to and origin[row.tied_to] == stage and not every_tied:
            continue
        origin.setdefault(row.mm, stage)
        if row.of_expert:
            share = experts[module.key] // layout.ep
            ep, expert = divmod(item.expert, share)
            yield Placement(item, stage, fill(row.mm, local, expert), range(ep, ep + 1))
        else:
            yield Placement(item, stage, fill(row.mm, local), everyone)
