"""Merging adapters, as a part of a plan: which product is added to which part of which weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mmconvert.converters.adapters import is_linear, part_spans
from mmconvert.converters.family import ZEROS, Dims, Module, Row
from mmconvert.errors import TensorError
from mmconvert.names import EXPERT, NO_EXPERT
from mmconvert.plan.plan import (
    Block,
    Comparison,
    Copy,
    Key,
    Plan,
    Side,
    Term,
    exchanged,
    join,
    matrix,
)
from mmconvert.sharding.spans import Span
from mmconvert.stored import FLOATS, StoredTensor


class Delta(NamedTuple):
    """What an adapter adds to one Hugging Face tensor.

    Attributes:
        name: of the weight, in hub spelling.
        expert: which one of those that it stacks, or NO_EXPERT.
        term: how; its blocks refer to the adapter's own tensors.
    """

    name: str
    expert: int
    term: Term


@dataclass
class Adapter:
    """An adapter that is to be merged.

    Attributes:
        where: its folder, for messages.
        stored: its tensors.
        deltas: what it adds.
        replicas: copies of one matrix that must be equal.
        replaced: tensors that stand in the place of the base's, by name in hub spelling.
    """

    where: str
    stored: list[StoredTensor] = field(default_factory=list[StoredTensor])
    deltas: list[Delta] = field(default_factory=list[Delta])
    replicas: list[Comparison] = field(default_factory=list[Comparison])
    replaced: dict[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])


class Place(NamedTuple):
    """Where one Hugging Face tensor lies in a whole.

    Attributes:
        key: the whole.
        spans: its rows beside those of the whole.
        turned: the whole has the orientation of Hugging Face, where that is the other one.
    """

    key: Key
    spans: list[Span]
    turned: bool


def places_of(
    modules: Sequence[Module], src: Side, dims: Dims, *, as_hf: bool
) -> dict[tuple[str, int], Place]:
    """Where the Hugging Face tensors of all linear layers lie, by name and expert."""
    rows: dict[str, Row] = {r.mm: r for m in modules for r in m.all_rows() if is_linear(r)}
    found: dict[tuple[str, int], Place] = {}
    for key, whole in src.wholes.items():
        row = rows.get(key.mm)
        if row is None:
            continue
        turned = row.transposed and as_hf
        height = matrix(whole.shape)[1 if turned else 0]
        stacked = NO_EXPERT if any(EXPERT in name for name in row.hf) else key.expert
        parts = part_spans(row, height, dims, key.name())
        stored = [part for name, part in zip(row.hf, parts, strict=True) if name != ZEROS]
        for name, part in zip(row.hf_names(key.layer, key.expert), stored, strict=True):
            found[name, stacked] = Place(key, part, turned)
    return found


def merged(
    plan: Plan, dst: Side, places: Mapping[tuple[str, int], Place], adapters: Iterable[Adapter]
) -> Plan:
    """The plan that also adds the products of adapters.

    Raises:
        TensorError: a delta that has no place, or does not fit it.
    """
    sources, replicas = list(plan.sources), list(plan.replicas)
    terms, products = list(plan.terms), list(plan.products)
    for adapter in adapters:
        first = len(sources)
        sources += adapter.stored
        replicas += [_moved(check, first) for check in adapter.replicas]
        for name, expert, term in adapter.deltas:
            place = places.get((name, expert))
            if place is None:
                raise TensorError(
                    f"{adapter.where}: {term.name} is adapted, and the base model has no such "
                    "linear layer",
                    "an adapter of this very model",
                    "give the base model that adapter_config.json names",
                )
            terms.append(_numbered(term, first)._replace(transposed=place.turned))
            products += _added(len(terms) - 1, terms[-1], place, dst, adapter.where)
    return replace(plan, sources=sources, replicas=replicas, terms=terms, products=products)


def _added(number: int, term: Term, place: Place, dst: Side, where: str) -> list[Copy]:
    """The rectangles of a term in those of the targets."""
    whole = dst.wholes[place.key]
    width = matrix(whole.shape)[0 if place.turned else 1]
    rows = sum(span.length for span in place.spans)
    if (term.rows, term.cols) != (rows, width):
        raise TensorError(
            f"{where}: the adapter of {term.name} is for a weight of {[term.rows, term.cols]}; the "
            f"base model's is {[rows, width]}",
            "an adapter of this very model",
            "give the base model that the adapter was trained on",
        )
    if whole.dtype not in FLOATS:
        raise TensorError(
            f"{term.name} is {whole.dtype} in the base model: nothing can be added to it",
            "a base model in bf16, fp16 or fp32",
            "dequantise the base model first",
        )
    blocks = [Block(number, s.start, 0, s.whole, 0, s.length, width) for s in place.spans]
    if place.turned:
        blocks = [exchanged(block) for block in blocks]
    return [copy for target in whole.copies for copy in join(blocks, target)]


def _moved(check: Comparison, first: int) -> Comparison:
    copy = check.copy
    return check._replace(copy=copy._replace(src=copy.src + first, dst=copy.dst + first))


def _numbered(term: Term, first: int) -> Term:
    """The term with the numbers that the adapter's tensors have in the plan."""

    def moved(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(block._replace(tensor=block.tensor + first) for block in blocks)

    magnitude = term.magnitude + first if term.magnitude >= 0 else -1
    return term._replace(a=moved(term.a), b=moved(term.b), magnitude=magnitude)
