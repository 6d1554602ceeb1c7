"""How the parameters of an optimizer may stand in its groups and buffers: guesses, to be proven."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import NamedTuple

from mmconvert.formats.mm.optimizer.buffers import USUAL_BUCKET
from mmconvert.formats.mm.optimizer.rankstate import RankState, arguments
from mmconvert.formats.mm.optimizer.state import Buckets, GroupKey
from mmconvert.narrow import is_sequence
from mmconvert.stored import StoredTensor

EMBEDDINGS = ("embedding.word_embeddings.weight", "output_layer.weight")

Rule = Callable[[str, StoredTensor], GroupKey]  # the group of a parameter


class Guess(NamedTuple):
    """What may be so.

    Attributes:
        frozen: beginnings of names that do not learn.
        key: the group of a parameter.
        buckets: of a distributed optimizer's buffers.
        named: the groups name their parameters.
    """

    frozen: tuple[str, ...]
    key: Rule
    buckets: Buckets
    named: bool = False


def guesses(ranks: Sequence[RankState]) -> Iterator[Guess]:
    """Guesses, the likeliest first."""
    told = arguments(ranks[0].pt)
    names = {name for rank in ranks for chunk in rank.chunks.values() for name in chunk}
    groups = [g for r in ranks for e in r.entries for g in e.groups]
    experts, named = any(g.key.expert for g in groups), any(g.names for g in groups)
    for frozen in _frozen(names):
        for key in _rules(told, experts, ranks):
            for buckets in _buckets(told, ranks):
                yield Guess(frozen, key, buckets, named)


def _frozen(names: set[str]) -> Iterator[tuple[str, ...]]:
    """Parts of the model that may be frozen: none, then few, then more."""
    parts = sorted({".".join(name.split(".")[:2]) for name in names})
    return chain.from_iterable(combinations(parts, n) for n in range(len(parts)))


def _rules(told: Mapping[str, object], experts: bool, ranks: Sequence[RankState]) -> Iterator[Rule]:
    """How training may group: Megatron's rule, words of MindSpeed-MM's arguments, one group."""
    exempt, scaled = _words(told, "weight_decay_exclude_modules"), _words(told, "lr_scale_modules")
    decoupled = any(g.key.decoupled for r in ranks for e in r.entries for g in e.groups)

    def rule(no_decay: Callable[[str, StoredTensor], bool]) -> Rule:
        def key(name: str, tensor: StoredTensor) -> GroupKey:
            return GroupKey(
                no_decay(name, tensor),
                any(word in name for word in scaled),
                experts and is_expert(name),
                decoupled and name.endswith(EMBEDDINGS),
            )

        return key

    yield rule(lambda name, tensor: name.endswith(".bias") or len(tensor.shape) == 1)
    if exempt:
        yield rule(lambda name, tensor: any(word in name for word in exempt))
    yield rule(lambda name, tensor: False)
    yield rule(lambda name, tensor: True)


def _words(told: Mapping[str, object], name: str) -> tuple[str, ...]:
    found = told.get(name)
    return tuple(w for w in found if isinstance(w, str)) if is_sequence(found) else ()


def is_expert(name: str) -> bool:
    """Whether a parameter is an expert's."""
    return ".experts." in name


def _buckets(told: Mapping[str, object], ranks: Sequence[RankState]) -> list[Buckets]:
    """How the buffers may be cut, where the weights are no views into them."""
    if all(rank.kind != "distributed" for rank in ranks):
        return [Buckets()]
    size = told.get("ddp_bucket_size")
    usual = size if isinstance(size, int) and size > 0 else USUAL_BUCKET
    first = usual if told.get("overlap_grad_reduce") is True else 0
    sizes = dict.fromkeys((first, 0, usual))
    return [Buckets(n, shared) for n in sizes for shared in (False, True)]
