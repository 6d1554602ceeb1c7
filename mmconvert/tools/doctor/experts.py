"""Experts that stand the other way round in an MM checkpoint, as the reference may write them.

It transposes the stacks of a Hugging Face checkpoint without looking: those that transformers 5
stores as [E, 2 x width, hidden] become matrices of the wrong shape, which its own way back undoes.
"""

from __future__ import annotations

from mmconvert.errors import MMConvertError, TensorError
from mmconvert.formats.faults import Collected
from mmconvert.formats.mm.model import OpenedMM
from mmconvert.names import number, summarise
from mmconvert.plan.plan import matrix

CAUSE = "experts-transposed"


def told_as_one(found: Collected, opened: OpenedMM) -> None:
    """Puts one fault in the place of those of all experts that fit if they are transposed."""
    expected = [(error, names) for error in found.errors if (names := _transposed(error, opened))]
    if not expected:
        return
    first, names = expected[0][0], [name for _, names in expected for name in names]
    fault = TensorError(
        f"{number(names, 'tensor')} of experts stand the other way round, as the reference's "
        f"converter writes stacks of transformers 5: {summarise(names)}",
        "gate above up in rows, as Megatron has them",
        "convert the Hugging Face checkpoint anew with hf_to_mm, which looks at the shapes; if "
        "this one was trained, mm_to_hf of the tool that wrote it leads back first",
        cause=CAUSE,
        path=first.path,
        tensors=names,
    )
    gone = [error for error, _ in expected]
    found.errors[:] = [fault, *(error for error in found.errors if error not in gone)]


def _transposed(error: MMConvertError, opened: OpenedMM) -> tuple[str, ...]:
    """The names of the tensors of a fault, if they are an expert's and fit when transposed."""
    dims, layout = opened.model.dims, opened.layout
    if error.cause != "wrong-shape" or not error.tensors:
        return ()
    for name in error.tensors:
        hit = opened.chart.index.find(name)
        if hit is None or not hit[0][1].of_expert:
            return ()
        (module, row), _, _ = hit
        known = [dims.get(dim, 0) for dim in (*row.rows, row.cols)]
        tensors = (part[name] for part in opened.parts.values() if name in part)
        shape = list(matrix(next(tensors).shape))
        if row.shard is not None:
            shape[row.shard.axis] *= layout.tp[module.key]
        if 0 in known or shape != [known[-1], sum(known[:-1])]:
            return ()
    return error.tensors
