"""Are two checkpoints the same model? Compared through the plan, streaming, nothing written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert import compare
from mmconvert.config import Options
from mmconvert.differences import Difference
from mmconvert.events import Events
from mmconvert.jobs import default_workers
from mmconvert.pairing import open_pair
from mmconvert.plan import Key, Side, build_comparison


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison.

    Attributes:
        tensors: number of whole tensors compared.
        nbytes: bytes of each side that were compared, replicas included.
        differences: at most one for each pair of stored tensors; empty if the models are equal.
    """

    tensors: int
    nbytes: int
    differences: list[Difference]


def verify(
    a: Path, b: Path, options: Options | None = None, events: Events | None = None
) -> Verdict:
    """Compares every tensor of two checkpoints, HF or MM, in any layouts of one family.

    Raises:
        MMConvertError: a checkpoint that cannot be read, or that lacks tensors of the other.
    """
    options, events = options or Options(), events or Events()
    left, right = (opened.side for opened in open_pair(a, b, options))
    _leave_out_text(left, right, events)
    pairs = build_comparison(left, right)
    nbytes = compare.comparison_bytes(pairs.equal, left.stored)
    events.start("comparing", nbytes)
    workers = options.workers or default_workers()
    found = compare.compare(pairs.equal, left.stored, right.stored, workers, events.advance)
    found += compare.not_zero(pairs.zeros_a, left.stored)
    found += compare.not_zero(pairs.zeros_b, right.stored)
    return Verdict(len(left.wholes), nbytes, found)


def _leave_out_text(left: Side, right: Side, events: Events) -> None:
    """Compares the encoders alone where one checkpoint was written with save_vit_only."""

    def text(side: Side) -> list[Key]:
        return [key for key in side.wholes if key.mm.startswith("text_decoder.")]

    if bool(text(left)) == bool(text(right)):
        return
    events.note("one checkpoint holds the encoders only (save_vit_only): only they are compared")
    for side in (left, right):
        for key in text(side):
            del side.wholes[key]


def hint(a: Path, b: Path, verdict: Verdict, options: Options) -> str:
    """What else would make two checkpoints equal: vision q, k, v left uninterleaved."""
    keys = {d.key.mm for d in verdict.differences}
    if not keys or not all("image_encoder" in k and "linear_qkv" in k for k in keys):
        return ""
    order = "interleaved" if options.vit_qkv == "concatenated" else "concatenated"
    if verify(a, b, replace(options, vit_qkv=order)).differences:
        return ""
    return (
        f"equal with --vit_qkv {order}: one of them leaves the vision encoder's q, k and v "
        "uninterleaved, as the reference tool 2.2.0 to 2.3.0 wrote them; "
        "mend it with resplit --vit_qkv concatenated"
    )
