"""Optimizer state of two checkpoints side by side: moments, masters, and how training goes on."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.formats.mm.optimizer.state import FIELDS, PREFIX, STEP
from mmconvert.plan.plan import Key
from mmconvert.tools.comparison.opened import Opened

KIND = "kind"  # of the optimizers: state of one kind may be that of the other


def kept_of(key: Key) -> tuple[str, str]:
    """What a whole of optimizer state is of a weight, and the weight's template; "" for weights."""
    for name in (*FIELDS, STEP):
        if key.mm.startswith(start := f"{PREFIX}{name}."):
            return name, key.mm.removeprefix(start)
    return "", key.mm


def leave_out_steps(a: Opened, b: Opened) -> None:
    """Leaves out the steps of single parameters where only one of two notes them so."""
    sides = (a.side, b.side)
    steps = [{key for key in side.wholes if kept_of(key)[0] == STEP} for side in sides]
    if all(steps):
        return
    for side, keys in zip(sides, steps, strict=True):
        for key in keys:
            del side.wholes[key]


def differing(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """What training goes on with otherwise, in words; of optimizers of two kinds what both note."""
    alike = a.get(KIND) == b.get(KIND)
    names = [name for name in {**a, **b} if name != KIND and (alike or (name in a and name in b))]
    return [
        f"{name}: {_shown(a, name)} in A, {_shown(b, name)} in B"
        for name in names
        if name not in a or name not in b or a[name] != b[name]
    ]


def _shown(values: Mapping[str, object], name: str) -> str:
    return repr(values[name])[:200] if name in values else "nothing"
