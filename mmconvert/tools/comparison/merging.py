"""Whether a model is a base model with adapters merged into it, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmconvert.config import Options
from mmconvert.executor import compare
from mmconvert.executor.jobs import load_numpy
from mmconvert.formats.adapters import open_adapter
from mmconvert.plan.build import build
from mmconvert.plan.plan import Comparison, Key, Side
from mmconvert.plan.products import ProductPlaces, merged
from mmconvert.plan.substitution import substituted
from mmconvert.stored import Target
from mmconvert.tools.comparison.pairing import open_pair


def unmerged(base: Path, model: Path, adapters: Sequence[Path], options: Options) -> list[str]:
    """How ``model`` differs from ``base`` with the adapters merged in, one line a tensor.

    Raises:
        MMConvertError: a checkpoint that cannot be read, or adapters of another model.
    """
    load_numpy()
    from mmconvert.executor.productsize import unlike

    left, right = open_pair(base, model, options, untie=True)
    places = ProductPlaces(left.model.plain_modules, left.side, left.model.dims, as_hf=False)
    opened = [
        open_adapter(path, left.model.family, options, left.model, base_is_residual=True)
        for path in adapters
    ]
    src, gone, new = substituted(left.side, places, opened)
    stored = right.side.stored
    targets = [Target(tensor.name, tensor.dtype, tensor.shape) for tensor in stored]
    dst = Side(targets=targets, wholes=right.side.wholes)
    plan = build(src, dst)
    plan.replaced, plan.fitted = gone, new
    plan = merged(plan, dst, places, opened)
    added = {copy.dst for copy in plan.products}
    key = Key("", -1)
    same = [Comparison(key, copy) for copy in plan.copies if copy.dst not in added]
    found = compare.compare(same, plan.sources, stored, options.workers)
    lines = [f"{d.b.name}: no adapter changes it, and it is not the base model's" for d in found]
    return lines + unlike(plan, stored)
