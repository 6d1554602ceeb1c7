"""What an adapter in MM format adds to its base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from mmconvert.adapters import MM_A, MM_B, WEIGHT
from mmconvert.converters.adapters import part_spans
from mmconvert.converters.rows import ZEROS
from mmconvert.errors import CheckpointError
from mmconvert.formats.base import StoredCheckpoint
from mmconvert.formats.mm.instances import experts_of, instances
from mmconvert.formats.mm.means import differing, mean_note
from mmconvert.plan.build import join
from mmconvert.plan.plan import Block, Comparison, Key, Term, Whole, matrix
from mmconvert.plan.products import Adapter, Delta
from mmconvert.sharding.spans import Span


def mm_deltas(
    stored: StoredCheckpoint, alpha: float | None, factor: float, *, mean: bool = False
) -> Adapter:
    """An adapter in MM format as it is merged: for each Hugging Face tensor, A and its rows of B.

    Args:
        alpha: what the user says of lora_alpha.
        factor: what the scaling is multiplied with.
        mean: of copies that differ the mean counts.

    Raises:
        CheckpointError: nothing tells alpha, or two things differ.
    """
    model, side = stored.model, stored.side()
    assert model.adapter is not None  # noqa: S101 - narrows the type: it is an adapter's
    settings = model.adapter.settings
    if alpha is not None and settings.alpha not in (None, alpha):
        raise CheckpointError(
            f"--cfg.lora_alpha says {alpha:g}, the checkpoint {settings.alpha:g}",
            "one alpha",
            "leave the flag out",
        )
    if alpha is not None:
        settings = replace(settings, alpha=alpha)
    scale = settings.scale("", settings.r) * factor
    means = differing(side) if mean else {}
    found = Adapter(str(stored.path), side.stored, notes=mean_note(means))
    base = model.adapter.base
    layers = {m.key: model.dims[f"{m.key}.layers"] for m in base}
    for item in instances(base, layers, experts_of(base, model.dims)):
        stem = item.row.mm.removesuffix(WEIGHT)
        key_a = Key(stem + MM_A, item.layer, item.expert)
        key_b = Key(stem + MM_B, item.layer, item.expert)
        a, b = side.wholes[key_a], side.wholes[key_b]
        rank, cols = matrix(a.shape)
        name = Key(stem, item.layer, item.expert).name()
        parts = part_spans(item.row, b.shape[0], model.dims, item.key.name())
        mine = [p for p, name in zip(parts, item.row.hf, strict=True) if name != ZEROS]
        for (hub, expert), spans in zip(item.hf_places(), mine, strict=True):
            rows = sum(span.length for span in spans)
            pairs = list(product(_counting(a, key_a in means), _counting(b, key_b in means)))
            for one, other in pairs:  # the product of two means is the mean of all products
                blocks = tuple(part_blocks(other, spans))
                term = Term(name, tuple(one), blocks, rank, rows, cols, scale / len(pairs))
                found.deltas.append(Delta(hub, expert, term))
    for key, whole in side.wholes.items():
        if key in means:
            continue
        original, *others = whole.copies
        found.replicas += [
            Comparison(key, copy) for blocks in others for copy in join(original, blocks)
        ]
    return found


def _counting(whole: Whole, mean: bool) -> list[list[Block]]:
    """The copies of a matrix that count: all where their mean does, else the first."""
    return whole.copies if mean else whole.copies[:1]


def part_blocks(blocks: Sequence[Block], spans: Sequence[Span]) -> list[Block]:
    """The rectangles of a whole that are some rows of it, counted as the part counts them."""
    found: list[Block] = []
    for b in blocks:
        for s in spans:
            first = max(b.whole_row, s.whole)
            last = min(b.whole_row + b.rows, s.whole + s.length)
            if first < last:
                found.append(
                    b._replace(
                        row=b.row + first - b.whole_row,
                        whole_row=s.start + first - s.whole,
                        rows=last - first,
                    )
                )
    return found
