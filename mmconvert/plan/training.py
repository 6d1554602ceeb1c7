"""Layouts that hold every byte and that training cannot use: seen in MindSpeed-MM's own code.

Source: MindSpeed-MM 2.2.0 (4c75a551) with Megatron-LM core_v0.12.1, whose model was built with such
layouts and given our files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module
from mmconvert.errors import LayoutError
from mmconvert.names import INDEX
from mmconvert.sharding.layout import Layout, grid_flag
from mmconvert.sharding.stages import StageGrid, first_stage, flat, locate, show, total

LARGEST = 64  # tp sizes that are named as a way out


def cautions(modules: Sequence[Module], dims: Dims, layout: Layout) -> list[str]:
    """What training will make of a layout that it cannot use, and which one is good; mostly none.

    Args:
        dims: sizes of the model as far as they are known.
    """
    return [
        *_encoders_beside_text(modules, layout),
        *_order(layout),
        *_deepstack(modules, layout),
        *_uneven_rows(modules, dims, layout),
    ]


def _order(layout: Layout) -> Iterator[str]:
    """Text layers before the end of an encoder, in families whose checkpoints may be so."""
    try:
        layout.check_order()
    except LayoutError as error:
        yield f"{error.what}: the text reads features that are not there yet"


def has_mergers(module: Module) -> bool:
    """Whether layers of an encoder hand features to the text, through mergers of their own."""
    return any(INDEX in name for r in module.layer for name in r.hf)


def in_one_piece(module: Module) -> bool:
    """Whether training wants all layers of an encoder where the text begins."""
    return module.beside_text or has_mergers(module)


def _deepstack(modules: Sequence[Module], layout: Layout) -> Iterator[str]:
    """Encoders whose layers hand features to the text, on several stages: each stage keeps its
    own (read in the model code of MindSpeed-MM 26.1).
    """
    for module in modules:
        grid = layout.grids.get(module.key, ())
        if not has_mergers(module) or sum(map(bool, flat(grid))) < 2:
            continue
        yield (
            f"{grid_flag(module.key)} {show(grid)} has {module.label} on several stages: training "
            "looks for its mergers by the layer's number within a stage"
            f"{_other_numbers(module, grid)}, and hands their features on within a stage only"
            f"{_all_where_text_begins(module.key, layout)}"
        )


def _other_numbers(module: Module, grid: StageGrid) -> str:
    """The mergers that training looks for at another layer of their stage, in words."""
    layers = next(
        (r.layers for r in module.layer if r.layers and any(INDEX in n for n in r.hf)), None
    )
    places = locate(grid)
    found = [f"{n} is {places[n][1]} of stage {places[n][0]}" for n in layers or ()]
    return f" (it expects {list(layers)}; {', '.join(found)})" if layers else ""


def _all_where_text_begins(key: str, layout: Layout) -> str:
    """A way out: all layers of an encoder on the stage of the first text layer, in words."""
    grid = layout.grids[key]
    if not layout.decoder:
        return ""
    good = [0] * len(flat(grid))
    good[first_stage(layout.grids[layout.decoder])] = total(grid)
    width = len(grid[0])
    better = tuple(tuple(good[i : i + width]) for i in range(0, len(good), width))
    return (
        f". Training can use {grid_flag(key)} {show(better)}: all its layers on the stage where "
        "the text begins"
    )


def _encoders_beside_text(modules: Sequence[Module], layout: Layout) -> Iterator[str]:
    """Encoders of which training builds both ends on each stage that has a layer of them."""
    if not layout.decoder:
        return
    text = first_stage(layout.grids[layout.decoder])
    for module in modules:
        grid = layout.grids.get(module.key)
        if not module.beside_text or grid is None or flat(grid)[text] == total(grid):
            continue
        several = sum(map(bool, flat(grid))) > 1
        where = "on several stages" if several else f"before stage {text}, that of the embedding"
        then = (
            "training builds its first and last parts on each of them and fails to load (missing "
            "keys), or crashes in its first step"
        )
        yield (
            f"{grid_flag(module.key)} {show(grid)} has {module.label} {where}: {then}"
            f"{_all_where_text_begins(module.key, layout)}"
        )


def _uneven_rows(modules: Sequence[Module], dims: Dims, layout: Layout) -> Iterator[str]:
    """Vocabularies that tp does not divide: training starts each rank's rows elsewhere."""
    for module in modules:
        flag, size = module.tp_flag, layout.tp.get(module.key, 1)
        names = {
            row.rows[0]
            for row in module.all_rows()
            if row.shard and row.shard.uneven and not row.shard.unit and len(row.rows) == 1
        }
        for name in sorted(names):
            count = dims.get(name, 0)
            if count % size:
                good = [str(n) for n in range(1, LARGEST + 1) if count % n == 0]
                yield (
                    f"{flag} {size} does not divide the vocabulary of {count:,}: "
                    "training with --unaligned-linear reads the rows of rank 1 and later shifted "
                    "by one, and computes wrong logits without an error. Training can use "
                    f"{flag} {' or '.join(good)}, as far as it divides the heads"
                )
