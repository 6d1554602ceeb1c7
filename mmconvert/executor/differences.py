"""What a comparison found, as words and as JSON."""

from __future__ import annotations

from typing import NamedTuple

from mmconvert.plan.plan import Key
from mmconvert.stored import StoredTensor


class TensorDifference(NamedTuple):
    """Two stored tensors that should be equal and are not.

    Attributes:
        key: the whole tensor.
        pair: the numbers of the two tensors, in their checkpoints.
        a, b: the two tensors.
        a_index, b_index: (row, column) of the first difference in each, seen as matrices.
        a_value, b_value: the values there.
        largest: the largest absolute difference in the rectangles compared.
        elements: number of elements that differ there.
    """

    key: Key
    pair: tuple[int, int]
    a: StoredTensor
    b: StoredTensor
    a_index: tuple[int, int]
    b_index: tuple[int, int]
    a_value: float
    b_value: float
    largest: float
    elements: int


def place(tensor: StoredTensor) -> str:
    """A stored tensor in words: its name and the folder or file that holds it."""
    path = tensor.path
    where = path.parent.name if path.suffix == ".pt" else path.name
    return f"{tensor.name} in {where}"


def in_words(d: TensorDifference) -> str:
    """A difference as one line."""
    return (
        f"{d.key.name()}: {place(d.a)} has {d.a_value:g} at {list(d.a_index)}, {place(d.b)} "
        f"{d.b_value:g} at {list(d.b_index)}; largest difference {d.largest:g}, "
        f"{d.elements} elements differ"
    )


def as_dict(d: TensorDifference) -> dict[str, object]:
    """A difference as JSON."""
    return {
        "tensor": d.key.name(),
        "a": {"place": place(d.a), "index": list(d.a_index), "value": repr(d.a_value)},
        "b": {"place": place(d.b), "index": list(d.b_index), "value": repr(d.b_value)},
        "largest_difference": repr(d.largest),
        "elements": d.elements,
    }
