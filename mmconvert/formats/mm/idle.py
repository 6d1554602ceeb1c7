"""Layers that an adapter leaves alone: they leave no trace in its files, and count all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from mmconvert.converters.configs import Dims
from mmconvert.errors import CheckpointError, LayoutError
from mmconvert.narrow import is_object
from mmconvert.sharding.layout import Layout, grid_flag
from mmconvert.sharding.stages import StageGrid, flat, parse_grid, total


def noted_grids(content: Mapping[str, object]) -> dict[str, StageGrid]:
    """The stage grids that a manifest notes, by module key."""
    noted = content.get("layout")
    flags = noted.items() if is_object(noted) else ()
    found: dict[str, StageGrid] = {}
    for flag, value in flags:
        key = flag.removesuffix(grid_flag(""))
        if key != flag and value is not None:
            with suppress(LayoutError):
                found[key] = parse_grid(value, str(value))
    return found


def with_idle_layers(
    layout: Layout, told: Sequence[Mapping[str, StageGrid]], dims: Dims, prefix: str
) -> Layout:
    """The layout with the layers that no adapter changes, which leave no trace in the files.

    Args:
        told: grids that say where these are, the most reliable ones first.

    Raises:
        CheckpointError: nothing says on which stage they are.
    """
    grids = dict(layout.grids)
    for key, seen in layout.grids.items():
        fitting = (said[key] for said in told if key in said and _has_room(said[key], seen))
        count = dims.get(f"{key}.layers", total(seen))
        if (found := next(fitting, None)) is not None:
            grids[key] = found
        elif count > total(seen) and len(flat(seen)) == 1:
            grids[key] = ((count,),)
        elif count > total(seen):
            flag = f"{prefix}{grid_flag(key)}"
            raise CheckpointError(
                f"{total(seen)} of {count} layers have adapters; on which stages the others are is "
                "not known from the files",
                f"{flag}, the number of layers on each stage",
                f"give {flag} as the base model was trained with",
            )
    return replace(layout, grids=grids)


def _has_room(grid: StageGrid, seen: StageGrid) -> bool:
    """Whether a grid has the stages of another, and on each at least its layers."""
    if [len(row) for row in grid] != [len(row) for row in seen]:
        return False
    return all(a >= b for a, b in zip(flat(grid), flat(seen), strict=True))
