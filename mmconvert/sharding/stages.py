"""Stage grids: how many layers of a module each pipeline stage holds.

``grid[virtual stage][pp rank]`` is a number of layers; the flat order of stages is
``virtual stage * pp_size + pp rank``, and layers are renumbered from 0 in every stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmconvert.errors import LayoutError
from mmconvert.narrow import is_sequence

StageGrid = tuple[tuple[int, ...], ...]


def parse_grid(value: object, flag: str) -> StageGrid:
    """A stage grid from a flat ``[1,10,10,7]`` or nested ``[[0,1],[4,4]]`` list.

    Raises:
        LayoutError: not such a list, rows of different lengths, or a negative number.
    """
    expected = "a list of layer counts such as [1,10,10,7], or one list per virtual stage"
    if not is_sequence(value) or not value:
        raise LayoutError(f"{flag} is {value!r}", expected)
    nested = any(is_sequence(row) for row in value)
    rows: Sequence[object] = value if nested else [value]
    grid: list[tuple[int, ...]] = []
    for row in rows:
        if not is_sequence(row) or not row:
            raise LayoutError(f"{flag} is {value!r}: {row!r} is not a list of numbers", expected)
        counts: list[int] = []
        for count in row:
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise LayoutError(f"{flag} is {value!r}: {count!r} is not a layer count", expected)
            counts.append(count)
        grid.append(tuple(counts))
    if len({len(row) for row in grid}) > 1:
        lengths = [len(row) for row in grid]
        raise LayoutError(
            f"{flag} has virtual stages of different lengths: {lengths}",
            "every virtual stage lists all pipeline ranks, zeros included",
        )
    return tuple(grid)


def flat(grid: StageGrid) -> list[int]:
    """Layer counts in stage order."""
    return [count for row in grid for count in row]


def total(grid: StageGrid) -> int:
    """Number of layers in the grid."""
    return sum(flat(grid))


def first_stage(grid: StageGrid) -> int:
    """The first stage with a layer: it holds what stands before the layers."""
    return next((s for s, count in enumerate(flat(grid)) if count), 0)


def last_stage(grid: StageGrid) -> int:
    """The last stage with a layer: it holds what stands after the layers."""
    counts = flat(grid)
    return next((s for s in reversed(range(len(counts))) if counts[s]), 0)


def locate(grid: StageGrid) -> list[tuple[int, int]]:
    """For each layer of the model: its stage and its local number there."""
    return [(stage, i) for stage, count in enumerate(flat(grid)) for i in range(count)]


def show(grid: StageGrid) -> str:
    """The grid as it is written on the command line: flat unless it has virtual stages."""
    rows = ["[" + ",".join(map(str, row)) + "]" for row in grid]
    return rows[0] if len(rows) == 1 else "[" + ",".join(rows) + "]"


def check_grids(grids: Mapping[str, StageGrid], flags: Mapping[str, str]) -> None:
    """All modules use the same pipeline.

    Args:
        grids: stage grid by module key.
        flags: how the user names each module's grid.

    Raises:
        LayoutError: different numbers of stages, or an empty grid.
    """
    shapes = {(len(grid), len(grid[0])) for grid in grids.values()}
    if len(shapes) > 1:
        listed = ", ".join(
            f"{flags[key]} {len(grid)} x {len(grid[0])}" for key, grid in grids.items()
        )
        raise LayoutError(
            f"the stage grids differ in size (virtual stages x pipeline ranks): {listed}",
            "the same number of virtual stages and pipeline ranks in every list",
            "write zeros for stages without layers of a module",
        )
    for key, grid in grids.items():
        if total(grid) == 0:
            raise LayoutError(f"{flags[key]} {show(grid)} holds no layer", "at least one layer")


def check_order(grids: Mapping[str, StageGrid], decoder: str, flags: Mapping[str, str]) -> None:
    """No text layer stands before an encoder ends.

    Args:
        grids: stage grid by module key.
        decoder: key of the text decoder.
        flags: how the user names each module's grid.

    Raises:
        LayoutError: naming both grids.
    """
    if decoder not in grids:
        return
    text = first_stage(grids[decoder])
    for key, grid in grids.items():
        if key != decoder and last_stage(grid) > text:
            raise LayoutError(
                f"{flags[decoder]} {show(grids[decoder])} has a text layer on stage {text}, before "
                f"{flags[key]} {show(grid)} ends on stage {last_stage(grid)}",
                "no text layer on an earlier stage than the last layer of an encoder",
                f"move the first text layers to stage {last_stage(grid)} or later",
            )
