"""The command ``verify``: are two checkpoints the same model?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import screen_events
from mmconvert.config import NO_PATTERNS, Options, Patterns
from mmconvert.names import number
from mmconvert.words import amount, one_line

DIFFERENT = 1
SHOWN = 5  # differences that are printed


@dataclass(frozen=True)
class VerifyFlags:
    """Two checkpoints."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """A checkpoint: a folder of any format (Hugging Face, MM, DCP, torch_dist, MindSpore), or a
    MindSpore file."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """The other checkpoint, in any format and layout."""
    drop: Patterns = NO_PATTERNS
    """Leave out tensors whose names fit this pattern (* and ?); may be repeated."""
    quick: bool = False
    """Compare the digests that --digests noted, where size, times and inode of the weight files are
    those noted too. Bytes that a disk has changed by itself are not seen."""
    vit_qkv: Literal["interleaved", "concatenated"] = "interleaved"
    """How the MM checkpoints order the rows of the vision encoder's q, k and v."""
    optimizer: bool = False
    """Compare optimizer state too: masters, moments, steps, groups and schedule. Both must be MM
    checkpoints of training."""
    workers: int = 0
    """Number of processes, or threads, that share the work; 0 takes one for each core."""
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
    pair = read_plain(VerifyFlags, words, prog, f"{text}\n\nexample:\n  {prog} HF_DIR MM_DIR")
    from mmconvert.executor.differences import as_dict, in_words
    from mmconvert.tools.comparison import verification

    with screen_events(quiet=pair.quiet) as events:
        options = Options(
            workers=pair.workers, drop=pair.drop, vit_qkv=pair.vit_qkv, optimizer=pair.optimizer
        )
        compare = verification.verify_quickly if pair.quick else verification.verify
        verdict = compare(pair.a, pair.b, options, events)
        hint = verification.hint(pair.a, pair.b, verdict, options)
    found = [as_dict(d) for d in verdict.differences]
    unseen = verification.UNSEEN if verdict.by_digest else ""
    if pair.json:
        answer = {
            "equal": verdict.equal,
            "tensors": verdict.tensors,
            "differences": found,
            "by_digest": verdict.by_digest,
            "unequal_digests": list(verdict.unequal),
            "training": list(verdict.training),
            "hint": hint,
            "not_seen": unseen,
        }
        print(json.dumps(answer))
    elif not pair.quiet:
        if verdict.equal and verdict.by_digest:
            print(f"equal: {number(verdict.tensors, 'tensor')}, by the digests of both manifests")
            if unseen:
                print(f"not seen: {unseen}")
        elif verdict.equal:
            size = amount(verdict.nbytes)
            print(
                f"equal: {number(verdict.tensors, 'tensor')}, {size} compared, every copy included"
            )
        words = [in_words(d) for d in verdict.differences]
        words += [f"{name}: the digests differ" for name in verdict.unequal]
        words += [one_line(f"training goes on otherwise: {line}") for line in verdict.training]
        print("\n".join(words[:SHOWN]), end="\n" if words else "")
        if len(words) > SHOWN:
            print(f"and {len(words) - SHOWN} more differ")
        if hint:
            print(f"hint: {hint}")
    return 0 if verdict.equal else DIFFERENT
