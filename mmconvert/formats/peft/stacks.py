"""Adapters of experts that lie in one tensor: PEFT's ``target_parameters``.

PEFT wraps the module once for each such parameter, one wrapper in the other, so that its keys
have ``base_layer`` for all but the outermost and never say which parameter they are of: the sizes
do. A of all experts is [experts * r, inputs], expert by expert; B is [outputs, r * experts], and
has the experts side by side within each rank. Source: PEFT 0.21, ``ParamWrapper``.

A stack that is stored with its inputs first (transformers 4) is taken by newer versions of PEFT
for one with its outputs first: A and B are exchanged then. So the sizes tell that, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

from mmconvert.adapters import Settings
from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Row
from mmconvert.errors import TensorError
from mmconvert.plan.plan import matrix
from mmconvert.sharding.spans import GATED
from mmconvert.stored import ITEM_SIZE, StoredTensor, rows_of, transpose


class Parameter(NamedTuple):
    """A parameter that stacks experts.

    Attributes:
        path: in the wrapped model.
        hub: its name in hub spelling.
        row: of one expert.
        experts: the dimension that counts them.
    """

    path: str
    hub: str
    row: Row
    experts: str


class Wrapped(NamedTuple):
    """A and B of all experts, as PEFT stores them."""

    a: StoredTensor
    b: StoredTensor

    @property
    def sizes(self) -> tuple[int, int]:
        """What A takes in and B gives out."""
        return matrix(self.a.shape)[1], self.b.shape[0]


class Match(NamedTuple):
    """Which parameter a pair is of; ``exchanged``: A is of its outputs, B of its inputs."""

    parameter: Parameter
    wrapped: Wrapped
    exchanged: bool


def matched(parameters: Sequence[Parameter], found: Sequence[Wrapped], dims: Dims) -> list[Match]:
    """The parameters that pairs of one module are of, by their sizes.

    Args:
        dims: the sizes of the base model, as far as they are known.

    Raises:
        TensorError: none fits, or several do.
    """
    fitting = [
        matches
        for chosen in permutations(parameters, len(found))
        for exchanged in (False, True)  # one version of transformers: all or none
        if _fit(
            matches := [Match(*both, exchanged) for both in zip(chosen, found, strict=True)], dims
        )
    ]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(parameter.hub.rpartition(".")[2] for parameter in parameters)
    shapes = "; ".join(f"{w.a.name} {list(w.a.shape)}, B {list(w.b.shape)}" for w in found)
    raise TensorError(
        f"the adapter of stacked experts {'fits no' if not fitting else 'may be of each'} "
        f"parameter of {', '.join(dict.fromkeys(p.hub.rpartition('.')[0] for p in parameters))} "
        f"({names}): {shapes}",
        "an adapter whose sizes tell which parameter it is of",
        "give the base model that the adapter was trained on, which needs no more than its "
        "config.json: --cfg.base_hf_dir, or --cfg.hf_config.hf_dir of lora_merge",
    )


def _fit(matches: Sequence[Match], dims: Dims) -> bool:
    """Whether sizes agree with the model's and with each other."""
    known = dict(dims)
    rows = [match.parameter.row for match in matches]
    for row, match in zip(rows, matches, strict=True):
        sizes = match.wrapped.sizes[:: -1 if match.exchanged else 1]
        for dim, size in zip((row.cols, row.rows[0]), sizes, strict=True):
            if known.setdefault(dim, size) != size:
                return False
    gated = [known[row.rows[0]] for row in rows if row.shard == GATED]
    inner = [known[row.cols] for row in rows if row.shard != GATED]
    return all(both == 2 * one for both in gated for one in inner)


def experts(match: Match, settings: Settings, dims: Dims) -> Iterator[tuple[StoredTensor, ...]]:
    """A [r, inputs] and B [outputs, r] of each expert.

    Raises:
        TensorError: the stack is of another number of experts.
    """
    (parameter, (a, b), exchanged) = match
    total = matrix(a.shape)[0]
    rank = settings.rank(parameter.path)
    count = dims.get(parameter.experts) or (total // rank if rank else 0)
    if not count or total % count:
        raise TensorError(
            f"{a.name} in {a.path} is {list(a.shape)}: not the same rank for each of "
            + (f"{count} experts" if count else "the experts, whose number is not known"),
            "as many rows as rank times experts",
            "give the base model that the adapter was trained on"
            + ("" if count else ", and adapter_config.json"),
        )
    for expert in range(count):
        one = rows_of(a, expert * (total // count), total // count)
        one = one._replace(name=f"{a.name}[{expert}]")
        other = _every(b, expert, count)
        yield (transpose(other), transpose(one)) if exchanged else (one, other)


def _every(tensor: StoredTensor, first: int, step: int) -> StoredTensor:
    """Every ``step``-th column of a matrix."""
    rows, cols = tensor.shape
    down, right = tensor.strides or (cols, 1)
    return tensor._replace(
        name=f"{tensor.name}[{first}]",
        shape=(rows, cols // step),
        offset=tensor.offset + first * right * ITEM_SIZE[tensor.dtype],
        strides=(down, step * right),
    )
