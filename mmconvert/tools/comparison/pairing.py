"""Opens two checkpoints of one family, HF, MM or MindSpore, as sides of one comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmconvert.config import Options, ParallelConfig
from mmconvert.errors import CheckpointError
from mmconvert.formats.hf.model import hf_model
from mmconvert.formats.hf.side import hf_side
from mmconvert.formats.mm.model import mm_model
from mmconvert.formats.mm.source import Parts, mm_source
from mmconvert.formats.model import Model
from mmconvert.formats.recognise import family_of, is_hf
from mmconvert.plan.reorder import reorder
from mmconvert.sharding.layout import Layout
from mmconvert.tools.comparison.opened import Opened
from mmconvert.tools.comparison.pairing_ms import is_ms_pair, open_ms_pair


def open_pair(a: Path, b: Path, options: Options) -> tuple[Opened, Opened]:
    """Opens both. An HF checkpoint tells an MM one's sizes, and takes its structure.

    Raises:
        CheckpointError: one cannot be read, or they are of two families.
    """
    if is_ms_pair(a, b):
        return open_ms_pair(a, b, options)
    family, other = family_of(a), family_of(b)
    if family.converter != other.converter:
        raise CheckpointError(
            f"{a} is a checkpoint of {family.name}, {b} of {other.name}", "two of one family"
        )
    hf = [hf_model(family, folder, options) if is_hf(folder) else None for folder in (a, b)]
    hint = hf[0] or hf[1]
    mm = [
        None if model else mm_model(family, folder, ParallelConfig(), hint, options, prefix="")
        for folder, model in zip((a, b), hf, strict=True)
    ]
    canonical = any(found[0].variant.canonical for found in mm if found)
    left, right = (
        _open_hf(path, one, canonical) if one else _open_mm(path, two)
        for path, one, two in zip((a, b), hf, mm, strict=True)
    )
    return left, right


def _open_hf(path: Path, model: Model, canonical: bool) -> Opened:
    """An HF checkpoint in the structure of the MM checkpoint that it is compared with."""
    variant = replace(model.variant, canonical=canonical, vit_qkv="interleaved")
    modules = model.family.table(variant)
    side = hf_side(modules, model.dims, model.hf_tensors, transposed=True)
    return Opened(path, replace(model, variant=variant, modules=modules), side, None)


def _open_mm(path: Path, found: tuple[Model, Layout, Parts] | None) -> Opened:
    assert found is not None  # noqa: S101 - narrows the type: what is not HF was opened as MM
    model, layout, parts = found
    side = mm_source(model.modules, model.dims, layout, parts)
    side = reorder(side, model.modules, model.plain_modules, model.dims)
    return Opened(path, model, side, layout)
