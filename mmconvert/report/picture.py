"""Pictures for the terminal: the stages of a layout and the layers on each; weight files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from mmconvert.formats.contents import Box, Holding
from mmconvert.sharding.layout import Chunk, Layout
from mmconvert.sharding.stages import first_stage, flat, last_stage
from mmconvert.words import amount, printable

COLORS = {"encoder1": "cyan", "encoder2": "magenta", "encoder3": "yellow", "decoder": "green"}
BAR = 12  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"


def layout_table(
    layout: Layout,
    title: str = "",
    boxes: Sequence[Box] = (),
    *,
    unicode: bool = True,
) -> Table:
    """One line for each pipeline rank, one column for each virtual stage.

    Args:
        boxes: what each model chunk of each rank holds; with them, the bytes of the rank files
            are drawn as bars.
        unicode: whether block characters can be shown.
    """
    words = ", ".join(f"{layout.tp_flag(key)} {size}" for key, size in layout.tp.items())
    words += f", ep_size {layout.ep}: each of its ranks holds its share of the experts" * (
        layout.ep > 1
    )
    caption = f"{words}\nin, out: tensors before and after a module's layers"
    table = Table(title=title or None, caption=caption, caption_justify="left")
    table.add_column("pp rank", justify="right")
    for virtual in range(layout.vpp_size):
        table.add_column(f"model chunk {virtual}" if layout.vpp_size > 1 else "model")
    sizes = {box.chunk: box.nbytes for box in boxes if box.chunk is not None}
    modules = {holding.module: holding for box in boxes for holding in box.holdings}
    files = _file_sizes(layout, sizes) if sizes else []
    if files:
        table.add_column("bytes of each rank file", overflow="fold")
    most = max((largest for _, largest in files), default=0)
    for pp in range(layout.pp_size):
        stages = [v * layout.pp_size + pp for v in range(layout.vpp_size)]
        cells: list[str | Text] = [_cell(layout, stage, modules) for stage in stages]
        if files:
            least, largest = files[pp]
            size = amount(largest) if least == largest else f"{amount(least)} to {amount(largest)}"
            cells.append(Text(f"{_bar(largest, most, unicode)} {size}"))
        table.add_row(str(pp), *cells)
    return table


def _file_sizes(layout: Layout, sizes: Mapping[Chunk, int]) -> list[tuple[int, int]]:
    """Bytes of the smallest and of the largest rank file of each pipeline rank."""
    found: list[tuple[int, int]] = []
    for pp in range(layout.pp_size):
        files = [0] * (layout.tp_folders * layout.ep)
        for chunk, nbytes in sizes.items():
            if chunk.rank.pp == pp:
                files[layout.column(chunk.rank)] += nbytes
        found.append((min(files), max(files)))
    return found


def _bar(nbytes: int, most: int, unicode: bool) -> str:
    """A bar of BAR characters at most, padded to that length."""
    if not unicode:
        return ("#" * (-(-nbytes * BAR // most) if most else 0)).ljust(BAR)
    eighths = -(-nbytes * BAR * 8 // most) if most else 0
    bar = "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
    return bar.ljust(BAR)


def boxes_table(boxes: Sequence[Box], unit: str, *, unicode: bool = True) -> Table:
    """One line for each weight file, or model chunk of one rank file: bytes, and what it holds."""
    table = Table()
    table.add_column(unit, overflow="fold")
    table.add_column("bytes", overflow="fold")
    table.add_column("holds", overflow="fold")
    most = max((box.nbytes for box in boxes), default=0)
    for box in boxes:
        holds = Text("\n").join(
            Text(printable(h.words), style=COLORS.get(h.colour, "")) for h in box.holdings
        )
        bar = f"{_bar(box.nbytes, most, unicode)} {amount(box.nbytes)}"
        table.add_row(Text(printable(box.name)), Text(bar), holds)
    return table


def _cell(layout: Layout, stage: int, modules: Mapping[str, Holding]) -> str:
    lines: list[str] = []
    for key, grid in layout.grids.items():
        counts = flat(grid)
        if not counts[stage]:
            continue
        first = sum(counts[:stage])
        last = first + counts[stage] - 1
        held = modules.get(key)
        words = f"{held.word if held else key} {first}" + (f"-{last}" if last > first else "")
        if stage == first_stage(grid):
            words = f"in, {words}"
        if stage == last_stage(grid):
            words = f"{words}, out"
        lines.append(f"[{COLORS.get(held.colour if held else '', 'default')}]{words}[/]")
    return "\n".join(lines) or "[dim]empty[/]"
