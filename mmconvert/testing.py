"""The contract of all families, for the tests of those that are written elsewhere."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mmconvert.config import (
    HFConfig,
    HFToMM,
    MMToHF,
    OptionalHFConfig,
    Options,
    ParallelConfig,
    Resplit,
)
from mmconvert.converters.checks import faults
from mmconvert.directions.mm import hf_to_mm, mm_to_hf, resplit
from mmconvert.errors import LayoutError
from mmconvert.formats.hf.model import hf_model
from mmconvert.formats.mm.instances import experts_of
from mmconvert.formats.model import Model

if TYPE_CHECKING:
    from mmconvert.converters.family import Family

__all__ = ["contract"]


def contract(family: Family, hf_dir: Path | str | None = None) -> None:
    """Holds a family to what every family must be.

    Its table: names and fields, module keys, sizes, fuse and shard of every row; what an MM
    checkpoint's names are to tell apart differs in its names. With a checkpoint also: config.json
    gives every size that a row names; every tensor has one place; and to MM, to another layout and
    back to Hugging Face returns every weight file byte for byte, on one rank, and on two tensor
    and two pipeline ranks as far as the sizes allow. Experts are spread over two ranks.

    Args:
        family: the table.
        hf_dir: a small checkpoint of the family, whose text decoder has two layers or more.

    Raises:
        AssertionError: naming what does not hold.
        MMConvertError: what a conversion refuses.
    """
    found = [
        word
        for variant in family.variants
        for tied in (False, True)
        for word in faults(family, family.modules(replace(variant, tied=tied)))
    ]
    _hold(not found, "; ".join(dict.fromkeys(found)))
    tables = [
        frozenset(r.mm for m in family.modules(v) for r in m.all_rows()) for v in family.variants
    ]
    _hold(len(set(tables)) == len(tables), "two variants have the same MM names")
    if hf_dir is not None:
        model = hf_model(family, Path(hf_dir), Options())
        _check_sizes(model)
        with TemporaryDirectory() as folder:
            _there_and_back(model, Path(hf_dir), Path(folder))


def _hold(good: bool, words: str) -> None:
    if not good:
        raise AssertionError(words)


def _check_sizes(model: Model) -> None:
    named: set[str] = set()
    for module in model.modules:
        named |= {f"{module.key}.layers"}
        for row in module.all_rows():
            groups, unit = getattr(row.fuse, "groups", ""), getattr(row.shard, "unit", "")
            named |= {*row.rows, row.cols, groups, unit}
    unknown = sorted(named - model.dims.keys() - {""})
    _hold(not unknown, f"config.json gives no {', '.join(unknown)}")


def _there_and_back(model: Model, hf: Path, folder: Path) -> None:
    family, mm = model.family, folder / "mm"
    hf_to_mm(family, HFToMM(mm, HFConfig(hf)))
    wide = _wide(model)
    there = Resplit(mm, folder / "wide", ParallelConfig(), wide, OptionalHFConfig(hf))
    try:
        resplit(family, there)
    except LayoutError:  # heads or sizes that two ranks cannot share
        resplit(family, replace(there, target_parallel_config=replace(wide, tp_size=1)))
    for source in (mm, folder / "wide"):
        back = folder / f"back {source.name}"
        mm_to_hf(family, MMToHF(back, source, HFConfig(hf)))
        for path in sorted([*hf.glob("*.safetensors"), *hf.glob("*.index.json")]):
            same = filecmp.cmp(path, back / path.name, shallow=False)
            _hold(same, f"{path.name} comes back other than it was, by {source.name}")


def _wide(model: Model) -> ParallelConfig:
    """Two tensor and two pipeline ranks; experts, if all their counts are even, on two."""
    grids: dict[str, Any] = {}
    for module in model.modules:
        count = model.dims[f"{module.key}.layers"]
        text = module.key == model.modules[-1].key
        grids[f"{module.key}_pp_layers"] = (
            (count // 2, count - count // 2) if text else (count, 0),
        )
    if not {m.key for m in model.modules} <= set(ParallelConfig.keys()):  # no flags for its lists
        grids = {}
    counts = [n for n in experts_of(model.modules, model.dims).values() if n]
    ep = 2 if counts and all(n % 2 == 0 for n in counts) else 0
    return ParallelConfig(tp_size=2, ep_size=ep, **grids)
