"""The command ``inspect``: what is this checkpoint?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import amount
from mmconvert.sharding.layout import Layout


@dataclass(frozen=True)
class Inspected:
    """What to look at."""

    path: tyro.conf.Positional[Path]
    """A checkpoint folder, Hugging Face or MM, or one rank file."""
    tensors: bool = False
    """List every tensor."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Looks, and shows."""
    text = "What a checkpoint is: kind, family, sizes; for MM the layout, as a picture."
    prog = "mm-convert inspect"
    asked = read_plain(Inspected, words, prog, f"{text}\n\nexample:\n  {prog} MM_DIR")
    from mmconvert import inspection

    found = inspection.inspect(asked.path)
    if asked.json:
        listing = [[t.name, t.dtype, list(t.shape), str(t.path)] for t in found.listing]
        extra = {"listing": listing} if asked.tensors else {}
        print(json.dumps(found.as_dict() | extra))
        return 0
    kinds = {"hf": "Hugging Face checkpoint", "mm": "MM checkpoint", "mm_rank_file": "MM rank file"}
    print(f"{asked.path}: {kinds[found.kind]}, {found.family or 'unknown family'}")
    print(
        f"{found.parameters:,} parameters, {'/'.join(found.dtype)}, {found.tensors} tensors, ",
        end="",
    )
    print(amount(found.nbytes) + (f", iteration {found.iteration}" if found.iteration else ""))
    for note in found.notes:
        print(f"note: {note}")
    if found.layout is not None:
        show_layout(found.layout)
    if asked.tensors:
        for t in found.listing:
            print(f"{t.name}  {t.dtype} {list(t.shape)}  {t.path.parent.name}/{t.path.name}")
    return 0


def show_layout(layout: Layout) -> None:
    """Draws a layout in the terminal."""
    from rich.console import Console

    from mmconvert.picture import layout_table

    Console().print(layout_table(layout))
