"""A picture of a layout for the terminal: pipeline stages, and the layers on each."""

from __future__ import annotations

from rich.table import Table

from mmconvert.sharding.layout import TP_FLAG, Layout
from mmconvert.sharding.stages import first_stage, flat, last_stage

NAMES = {"vit": "vision", "audio": "audio", "llm": "text"}
COLORS = {"vit": "cyan", "audio": "magenta", "llm": "green"}


def layout_table(layout: Layout, title: str = "") -> Table:
    """One line for each pipeline rank, one column for each virtual stage."""
    sizes = ", ".join(f"{TP_FLAG[key]} {size}" for key, size in layout.tp.items())
    caption = f"{sizes}; in, out: what stands before and after a module's layers"
    table = Table(title=title or None, caption=caption)
    table.add_column("pp rank", justify="right")
    for virtual in range(layout.vpp_size):
        table.add_column(f"model chunk {virtual}" if layout.vpp_size > 1 else "model")
    for pp in range(layout.pp_size):
        stages = [v * layout.pp_size + pp for v in range(layout.vpp_size)]
        table.add_row(str(pp), *(_cell(layout, stage) for stage in stages))
    return table


def _cell(layout: Layout, stage: int) -> str:
    lines: list[str] = []
    for key, grid in layout.grids.items():
        counts = flat(grid)
        if not counts[stage]:
            continue
        first = sum(counts[:stage])
        last = first + counts[stage] - 1
        words = f"{NAMES[key]} {first}" + (f"-{last}" if last > first else "")
        if stage == first_stage(grid):
            words = f"in, {words}"
        if stage == last_stage(grid):
            words = f"{words}, out"
        lines.append(f"[{COLORS[key]}]{words}[/]")
    return "\n".join(lines) or "[dim]empty[/]"
