"""Which word follows: the best, or one drawn at random, the same in every layout and batch."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmconvert.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How words are chosen; in the order in which transformers applies these.

    Attributes:
        penalty: divides the logits of words that stand in the prompt or the answer (those below 0
            are multiplied), as transformers' repetition_penalty does; 1 for none.
        temperature: divides all logits; 0 takes the best word.
        top_k: words to draw from, the most probable; 0 for all.
        top_p: words to draw from: the most probable that have this share together.
        seed: of the draws.
    """

    penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the best word is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def check(self) -> None:
        """Raises RequestError: a number that makes no sense."""
        if not self.penalty > 0:
            raise RequestError(f"a repetition penalty of {self.penalty}", "a number above 0")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"--temperature is {self.temperature}", "0, or a number above it")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"--top_p is {self.top_p}", "a number above 0, and at most 1")
        if self.top_k < 0:
            raise RequestError(f"--top_k is {self.top_k}", "0 for all words, or how many")


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """(rows, vocabulary) -> what each word is drawn with, in double precision."""
    found = torch.softmax(logits.double() / how.temperature, -1)
    best, order = found.sort(dim=-1, descending=True, stable=True)
    if how.top_k:
        best[:, how.top_k :] = 0
        best /= best.sum(-1, keepdim=True)
    best = best.masked_fill(best.cumsum(-1) - best >= how.top_p, 0)
    best /= best.sum(-1, keepdim=True)
    return torch.zeros_like(found).scatter_(-1, order, best)


class Chooser:
    """Chooses the words of some answers, one step after the other.

    Args:
        numbers: of the answers; each has draws of its own, whatever stands beside it.
    """

    def __init__(self, how: Sampling, numbers: Sequence[int]) -> None:
        self._how = how
        self._draws = [torch.Generator().manual_seed(_seed(how.seed, n)) for n in numbers]
        self._said: Tensor | None = None

    def read(self, ids: Tensor, mask: Tensor | None, vocab: int) -> None:
        """Takes note of words that stand there.

        Args:
            ids: (rows, time).
            mask: (rows, time), 0 where an id is padding; None where none is.
        """
        if self._how.penalty == 1:
            return
        if self._said is None:
            self._said = torch.zeros(len(ids), vocab, dtype=torch.bool, device=ids.device)
        there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self._said |= torch.zeros_like(self._said).scatter_(1, ids, there)

    def choose(self, logits: Tensor) -> Tensor:
        """(rows, vocabulary) -> (rows,) ids."""
        if self._said is not None:
            punished = torch.where(
                logits < 0, logits * self._how.penalty, logits / self._how.penalty
            )
            logits = torch.where(self._said, punished, logits)
        if self._how.greedy:
            return logits.argmax(-1)
        share = probabilities(logits.cpu(), self._how)
        drawn = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._draws])
        edges = share.cumsum(-1)
        places = torch.searchsorted(edges, (drawn * edges[:, -1])[:, None], right=True)
        return places.clamp(max=share.shape[-1] - 1)[:, 0].to(logits.device)


def _seed(seed: int, number: int) -> int:
    """The seed of an answer's draws: far from those of its neighbours and of other seeds."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
