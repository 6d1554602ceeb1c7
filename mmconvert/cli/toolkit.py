"""The commands that need no converter: verify, inspect."""

from __future__ import annotations

import json

from mmconvert.cli.arguments import Inspected, Pair, read_plain
from mmconvert.cli.screen import amount, screen_events
from mmconvert.config import Options
from mmconvert.sharding.layout import Layout

DIFFERENT = 1
SHOWN = 5  # differences that verify prints


def verify(words: list[str]) -> int:
    """Are two checkpoints the same model?"""
    text = "Are two checkpoints the same model? Exit code 0 if so, 1 if not."
    prog = "mm-convert verify"
    pair = read_plain(Pair, words, prog, f"{text}\n\nexample:\n  {prog} HF_DIR MM_DIR")
    from mmconvert import verification
    from mmconvert.differences import as_dict, in_words

    with screen_events(quiet=pair.quiet) as events:
        options = Options(workers=pair.workers, drop=pair.drop, vit_qkv=pair.vit_qkv)
        verdict = verification.verify(pair.a, pair.b, options, events)
        hint = verification.hint(pair.a, pair.b, verdict, options)
    found = [as_dict(d) for d in verdict.differences]
    if pair.json:
        print(
            json.dumps(
                {"equal": not found, "tensors": verdict.tensors, "differences": found, "hint": hint}
            )
        )
    elif not pair.quiet:
        if not found:
            size = amount(verdict.nbytes)
            print(f"equal: {verdict.tensors} tensors, {size} compared, every copy included")
        for d in verdict.differences[:SHOWN]:
            print(in_words(d))
        if len(found) > SHOWN:
            print(f"and {len(found) - SHOWN} more tensors differ")
        if hint:
            print(f"hint: {hint}")
    return DIFFERENT if found else 0


def inspect(words: list[str]) -> int:
    """What is this checkpoint?"""
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
