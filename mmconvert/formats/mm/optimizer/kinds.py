"""A plain mixed-precision optimizer's state as a distributed one's, and back.

Both keep the same fp32 values of each parameter; only their places in the files differ, and where
the step is noted: a distributed optimizer has it in its groups, a plain one there too (Apex,
MindSpeed's fused AdamW) or, with torch's AdamW, beside the moments of each parameter.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from mmconvert.config import OptimizerKind
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.executor.blockio import Region, read_compact
from mmconvert.executor.fileio import open_files
from mmconvert.formats.mm.optimizer.pairing import HALF
from mmconvert.formats.mm.optimizer.state import (
    MASTER,
    MOMENTS,
    STEP,
    Learnt,
    OptimizerState,
)

KEEP = "--optimizer-kind same keeps the optimizer as it is"
OF_TORCH = "foreach"  # stands in the groups of torch's own AdamW alone


def as_kind(state: OptimizerState, kind: OptimizerKind) -> OptimizerState:
    """The state as an optimizer of another kind would have saved it.

    Raises:
        RequestError: it would need values that the files do not hold.
        CheckpointError: parameters that are at different steps.
    """
    if kind in ("same", state.kind):
        return state
    if state.kind == "fp32":
        raise RequestError(
            f"--optimizer-kind {kind}: the state is of fp32 training, which has no masters",
            "the state of mixed-precision training",
            KEEP,
        )
    for one in state.learnt:
        _check(one, kind)
    if kind == "distributed":
        return _in_groups(state)
    torch_own = [values for values in state.groups.values() if OF_TORCH in values]
    if torch_own:
        raise RequestError(
            "--optimizer-kind plain: the groups are of torch's own AdamW, which keeps a tensor "
            "with the step for each parameter; the source has none",
            "the state of a fused AdamW, whose step is in its groups",
            KEEP,
        )
    if any(STEP not in values for values in state.groups.values()):
        raise _no_step(kind)
    return replace(state, kind="plain")


def _check(one: Learnt, kind: OptimizerKind) -> None:
    """Raises RequestError for a parameter that one of both kinds keeps otherwise."""
    where = f"{one.weight.path}: {one.name}"
    if one.weight.dtype not in HALF:
        raise RequestError(
            f"--optimizer-kind {kind}: {where} learns in {one.weight.dtype}; a plain optimizer has "
            "no master of it, a distributed one has",
            f"parameters in {' or '.join(HALF)}",
            KEEP,
        )
    if missing := [name for name in (MASTER, *MOMENTS) if name not in one.fields]:
        raise RequestError(
            f"--optimizer-kind {kind}: {where} has no {missing[0]}, as it never had a gradient",
            "masters and moments of every parameter",
            KEEP,
        )


def _in_groups(state: OptimizerState) -> OptimizerState:
    """With the step in the groups, where it stands beside the moments."""
    if all(STEP in values for values in state.groups.values()):
        return replace(state, kind="distributed")
    steps = _steps(state)
    if not steps:
        raise _no_step("distributed")
    if len(set(steps.values())) > 1:
        (one, first), (other, second) = list({v: k for k, v in steps.items()}.items())[:2]
        raise CheckpointError(
            f"--optimizer-kind distributed: {first} is at step {one:g}, {second} at {other:g}; a "
            "distributed optimizer has one step for all",
            "parameters at one step",
            KEEP,
        )
    step = next(iter(steps.values()))
    noted = int(step) if step.is_integer() else step
    groups = {key: {**values, STEP: noted} for key, values in state.groups.items()}
    learnt = [_without_step(one) for one in state.learnt]
    return replace(state, kind="distributed", groups=groups, learnt=learnt)


def _without_step(one: Learnt) -> Learnt:
    """A parameter without a step of its own."""
    return one._replace(fields={name: t for name, t in one.fields.items() if name != STEP})


def _steps(state: OptimizerState) -> dict[str, float]:
    """The step of each parameter that notes one."""
    found: dict[str, float] = {}
    with open_files() as files:
        for one in state.learnt:
            tensor = one.fields.get(STEP)
            if tensor is not None and tensor.dtype == "F32":
                data = read_compact(files, tensor, Region(0, 0, 1, 1), "left")
                found[f"{one.name} in {one.weight.path}"] = struct.unpack("<f", data[:4])[0]
    return found if len(found) == len(state.learnt) else {}


def _no_step(kind: OptimizerKind) -> RequestError:
    return RequestError(
        f"--optimizer-kind {kind}: the files do not tell the step of every parameter",
        "the step in every group, or beside the moments of every parameter",
        KEEP,
    )
