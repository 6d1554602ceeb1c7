"""Merging adapters, as a part of a plan: which product is added to which part of which weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mmconvert.converters.adapters import part_spans
from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import ZEROS, Module, Row
from mmconvert.errors import RequestError, TensorError
from mmconvert.names import EXPERT, NO_EXPERT
from mmconvert.plan.build import join
from mmconvert.plan.plan import Block, Comparison, Copy, Key, Plan, Side, Term, exchanged, matrix
from mmconvert.sharding.spans import Span
from mmconvert.stored import FLOATS, StoredTensor


class Delta(NamedTuple):
    """What an adapter adds to one Hugging Face tensor.

    Attributes:
        name: of the tensor, in hub spelling.
        expert: which one of those that it stacks, or NO_EXPERT.
        term: what is added; its blocks refer to the adapter's own tensors.
    """

    name: str
    expert: int
    term: Term


class TrainedTokens(NamedTuple):
    """Rows of an embedding that were trained, and their numbers there."""

    rows: StoredTensor
    numbers: tuple[int, ...]


@dataclass
class Adapter:
    """An adapter that is to be merged.

    Attributes:
        where: its folder, for messages.
        stored: its tensors.
        deltas: what it adds.
        replicas: copies of one matrix that must be equal.
        replaced: tensors that stand in the place of the base's, by name in hub spelling.
        tokens: rows that do, and which of the base's each of them is.
        notes: what is worth knowing of it, in words.
    """

    where: str
    stored: list[StoredTensor] = field(default_factory=list[StoredTensor])
    deltas: list[Delta] = field(default_factory=list[Delta])
    replicas: list[Comparison] = field(default_factory=list[Comparison])
    replaced: dict[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    tokens: dict[str, TrainedTokens] = field(default_factory=dict[str, TrainedTokens])
    notes: list[str] = field(default_factory=list[str])


class ProductPlace(NamedTuple):
    """Where one Hugging Face tensor lies in a whole.

    Attributes:
        key: the whole.
        spans: its rows beside those of the whole.
        transposed: the whole has the orientation of Hugging Face, where that is the other one.
    """

    key: Key
    spans: list[Span]
    transposed: bool


class ProductPlaces:
    """Finds the Hugging Face tensors of a model in the wholes of a side.

    Args:
        modules: the table of the wholes.
        as_hf: the wholes have the orientation of Hugging Face.
    """

    def __init__(self, modules: Sequence[Module], side: Side, dims: Dims, *, as_hf: bool) -> None:
        self._side, self._dims, self._as_hf = side, dims, as_hf
        rows = {r.mm: r for m in modules for r in m.all_rows() if not r.tied_to}
        self.tied = {name for m in modules for r in m.all_rows() if r.tied_to for name in r.hf}
        self.tied |= {
            name
            for m in modules
            for r in m.all_rows()
            for other in m.all_rows()
            if other.tied_to == r.mm
            for name in r.hf
        }
        self._found: dict[tuple[str, int], tuple[Key, Row, int]] = {}
        for key in side.wholes:
            row = rows.get(key.mm)
            if row is None:
                continue
            numbers = [i for i, name in enumerate(row.hf) if name != ZEROS]
            for name, number in zip(row.hf_names(key.layer, key.expert), numbers, strict=True):
                stacked = key.expert if EXPERT not in row.hf[number] else NO_EXPERT
                self._found[name, stacked] = (key, row, number)

    def find(self, name: str, expert: int) -> ProductPlace | None:
        """Where a tensor lies; None if the model has none of this name.

        Raises:
            TensorError: sizes that are not known.
        """
        hit = self._found.get((name, expert))
        if hit is None:
            return None
        key, row, number = hit
        transposed = row.transposed and self._as_hf
        height = matrix(self._side.wholes[key].shape)[1 if transposed else 0]
        return ProductPlace(
            key, part_spans(row, height, self._dims, key.name())[number], transposed
        )


def merged(plan: Plan, dst: Side, places: ProductPlaces, adapters: Iterable[Adapter]) -> Plan:
    """The plan that also adds the products of adapters.

    Raises:
        TensorError: a delta that has no place, or does not fit it.
    """
    sources, replicas = list(plan.sources), list(plan.replicas)
    terms, products = list(plan.terms), list(plan.products)
    notes = list(plan.notes)
    for adapter in adapters:
        first = len(sources)
        sources += adapter.stored
        replicas += [_moved(check, first) for check in adapter.replicas]
        notes += adapter.notes
        for name, expert, term in adapter.deltas:
            check_tied(adapter.where, name, places)
            place = places.find(name, expert)
            if place is None:
                raise no_place(adapter.where, term.name)
            added = _added(len(terms), term, place, dst, adapter.where)
            transposed = term.transposed != place.transposed
            terms.append(_numbered(term, first)._replace(transposed=transposed))
            products += added
    return replace(
        plan, sources=sources, replicas=replicas, terms=terms, products=products, notes=notes
    )


def no_place(where: str, name: str) -> TensorError:
    """The error of an adapter of what the base model does not have."""
    return TensorError(
        f"{where}: {name} is adapted, and the base model has no such tensor",
        "an adapter of this very model",
        "give the base model that adapter_config.json names",
    )


def check_tied(where: str, name: str, places: ProductPlaces) -> None:
    """Raises RequestError for an adapter of embeddings that are tied: it adapts one of two uses."""
    if name in places.tied:
        raise RequestError(
            f"{where} changes {name}, and the model ties its output layer to its word embedding: "
            "what is merged into one would change the other too",
            "a model whose embeddings are not tied",
            "give --cfg.untie True: the merged model gets an output layer of its own, and its "
            "config.json says tie_word_embeddings false",
        )


def _added(number: int, term: Term, place: ProductPlace, dst: Side, where: str) -> list[Copy]:
    """The rectangles of a term in those of the targets."""
    whole = dst.wholes[place.key]
    width = matrix(whole.shape)[0 if place.transposed else 1]
    rows = sum(span.length for span in place.spans)
    if term.shape != (rows, width):
        raise TensorError(
            f"{where}: the adapter of {term.name} is for a weight of {list(term.shape)}; the "
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
    if place.transposed:
        blocks = [exchanged(block) for block in blocks]
    found = [copy for target in whole.copies for copy in join(blocks, target)]
    if term.magnitude >= 0 and (place.transposed or any(c.cols != width for c in found)):
        raise RequestError(
            f"{where}: DoRA scales whole rows of {term.name}, which this layout divides",
            "a layout that keeps rows whole: tp size 1 for this module",
            "merge into the Hugging Face form or at tp size 1, and bring the result to the layout",
        )
    return found


def _moved(check: Comparison, first: int) -> Comparison:
    copy = check.copy
    return check._replace(copy=copy._replace(src=copy.src + first, dst=copy.dst + first))


def _numbered(term: Term, first: int) -> Term:
    """The term with the numbers that the adapter's tensors have in the plan."""

    def moved(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(block._replace(tensor=block.tensor + first) for block in blocks)

    magnitude = term.magnitude + first if term.magnitude >= 0 else -1
    return term._replace(a=moved(term.a), b=moved(term.b), magnitude=magnitude)
