"""Two adapters compared by what they add: with other ranks or formats they may still be equal."""

from __future__ import annotations

from pathlib import Path

from mmconvert.config import Options
from mmconvert.errors import DifferenceError
from mmconvert.events import Events
from mmconvert.executor.fileio import open_files
from mmconvert.formats.adapters import open_adapter
from mmconvert.formats.recognise import family_of
from mmconvert.names import number, summarise
from mmconvert.plan.plan import Key
from mmconvert.plan.products import Adapter
from mmconvert.tools.comparison.verification import Verdict


def verify_adapters(a: Path, b: Path, options: Options, events: Events) -> Verdict:
    """Compares ``scale * B @ A`` of every Hugging Face layer, in float64; zero is no layer.

    Raises:
        DifferenceError: layers that only one of them adapts.
        MMConvertError: an adapter that cannot be read.
    """
    from mmconvert.executor.productsize import compare_products  # numpy

    family = family_of(a)
    left, right = (open_adapter(path, family, options) for path in (a, b))
    _check_layers(a, b, left, right)
    others = {(d.name, d.expert): d.term for d in right.deltas}
    pairs = [
        (Key(d.name, -1, d.expert), d.term, others[d.name, d.expert])
        for d in left.deltas
        if (d.name, d.expert) in others
    ]
    events.note("adapters: the products of their matrices are compared")
    found = compare_products(pairs, left.stored, right.stored)
    nbytes = sum(tensor.nbytes for tensor in left.stored)
    return Verdict(len(pairs), nbytes, found)


def _check_layers(a: Path, b: Path, left: Adapter, right: Adapter) -> None:
    from mmconvert.executor.productsize import zero  # numpy

    for one, mine, other, theirs in ((a, left, b, right), (b, right, a, left)):
        known = {(d.name, d.expert) for d in theirs.deltas}
        alone = [d for d in mine.deltas if (d.name, d.expert) not in known]
        with open_files() as files:  # where layers are packed, some may be there as zeros
            absent = [d.name for d in alone if not zero(files, mine.stored, d.term)]
        if absent:
            raise DifferenceError(
                f"{number(absent, 'layer')} adapted in {one} and not in {other}: "
                f"{summarise(absent)}",
                "the same adapted layers in both",
            )
