"""The JSON form of a diff; its keys are described in docs/json.md."""

from __future__ import annotations

import math

from mmconvert.executor.distance import Totals
from mmconvert.tools.comparison.diffresult import At, Diff, DiffGroup, Facts, TensorDistance


def diff_dict(found: Diff, top: int) -> dict[str, object]:
    """A diff as JSON, with the ``top`` tensors that changed most (0: all that changed)."""
    changed = found.changed()
    shown = changed[:top] if top else changed
    return {
        "equal": found.equal,
        "a": _facts(found.a),
        "b": _facts(found.b),
        "tensors": len(found.tensors),
        "changed": len(changed),
        "bytes": found.nbytes,
        **_totals(found.weights),
        "modules": [_group(group) for group in found.modules()],
        "layers": [{"layer": g.layer, **_group(g)} for g in found.layers()],
        "top": [{"share": _number(found.share(t)), **_tensor(t)} for t in shown],
        "not_finite": [
            {
                "tensor": t.name,
                "nan_a": t.totals.nan_a,
                "inf_a": t.totals.inf_a,
                "nan_b": t.totals.nan_b,
                "inf_b": t.totals.inf_b,
            }
            for t in found.odd()
        ],
        "only_in_a": found.only_a,
        "only_in_b": found.only_b,
        "other_shapes": [
            {"tensor": s.name, "a": list(s.a), "b": list(s.b)} for s in found.other_shapes
        ],
        "notes": found.notes,
    }


def _facts(facts: Facts) -> dict[str, object]:
    return {
        "path": str(facts.path),
        "kind": facts.kind,
        "family": facts.family,
        "dtype": list(facts.dtypes),
        "iteration": facts.iteration,
    }


def _number(value: float) -> float | None:
    """JSON has no infinity: null where A is zero throughout, or a sum exceeds float64."""
    return value if math.isfinite(value) else None


def _totals(totals: Totals) -> dict[str, object]:
    return {
        "elements": totals.elements,
        "different_elements": totals.different,
        "relative_l2": _number(totals.relative),
        "l2_difference": _number(totals.gap),
        "l2_a": _number(totals.square_a**0.5),
        "largest_difference": _number(totals.largest),
    }


def _group(group: DiffGroup) -> dict[str, object]:
    counts = {"module": group.module, "tensors": group.tensors, "changed": group.changed}
    return counts | _totals(group.totals)


def _tensor(t: TensorDistance) -> dict[str, object]:
    return {
        "tensor": t.name,
        "hf_names": list(t.hf_names),
        "module": t.module,
        "layer": t.layer,
        "shape": list(t.shape),
        "dtype_a": t.dtype_a,
        "dtype_b": t.dtype_b,
        **_totals(t.totals),
        "a": _at(t.a),
        "b": _at(t.b),
    }


def _at(at: At | None) -> dict[str, object] | None:
    if at is None:
        return None
    return {"place": at.place, "index": list(at.index), "value": at.value}
