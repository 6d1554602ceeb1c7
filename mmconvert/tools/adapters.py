"""What an adapter is: its rank, scaling and layers, and how much it changes them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from mmconvert.config import Options
from mmconvert.errors import MMConvertError
from mmconvert.executor.fileio import open_files
from mmconvert.formats.adapters import open_adapter
from mmconvert.formats.recognise import family_of
from mmconvert.names import number


def about(path: Path) -> list[str]:
    """An adapter in words: a line for all, and one for each kind of layer."""
    from mmconvert.executor.productsize import norm  # numpy

    try:
        family = family_of(path)
        found = open_adapter(path, family, Options(), base_is_residual=True)
        kinds: dict[str, list[float]] = defaultdict(list)
        with open_files() as files:
            for delta in found.deltas:
                kind = delta.name.removesuffix(".weight").rpartition(".")[2]
                size = norm(files, found.stored, delta.term) if delta.term.a else 0.0
                kinds[kind].append(size)
    except MMConvertError as error:
        return [f"adapter: {error.what}"]
    terms = [delta.term for delta in found.deltas]
    ranks = ", ".join(map(str, sorted({term.rank for term in terms if term.a})))
    scales = ", ".join(f"{scale:g}" for scale in sorted({term.scale for term in terms}))
    words = [f"adapter of {family.name}: {number(terms, 'layer')}, rank {ranks}, scaling {scales}"]
    for kind, sizes in sorted(kinds.items()):
        low, high = min(sizes), max(sizes)
        spread = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        words.append(f"{kind}: {number(sizes, 'layer')}, norm of scaling x B x A {spread}")
    if not any(map(any, kinds.values())):
        words.append("warning: every product is zero: the adapter changes nothing")
    return words
