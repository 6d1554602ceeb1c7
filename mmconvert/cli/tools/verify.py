"""The command ``verify``: are two checkpoints the same model?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import amount, screen_events
from mmconvert.config import NO_PATTERNS, Options, Patterns

DIFFERENT = 1
SHOWN = 5  # differences that are printed


@dataclass(frozen=True)
class Pair:
    """Two checkpoints."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """A checkpoint folder, Hugging Face or MM."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """Another one."""
    drop: Patterns = NO_PATTERNS
    """Leave out tensors whose names fit this pattern (* and ?); may be repeated."""
    vit_qkv: Literal["interleaved", "concatenated"] = "interleaved"
    """How the MM checkpoints order the rows of the vision encoder's q, k and v."""
    workers: int = 0
    """Number of threads; 0 takes one for each core."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    quiet: bool = False
    """Print nothing; the exit code is the answer."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Compares; exit code 1 if they differ."""
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
