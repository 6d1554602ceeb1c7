"""Answers of a loaded checkpoint, word by word, with a KV cache."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmconvert.runtime.batch import Batch, next_step
from mmconvert.runtime.engine import Engine
from mmconvert.runtime.sampling import Chooser, Sampling


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to answer side by side.

    Attributes:
        batch: a prompt in each row, padded in front.
        most: tokens of each answer at most.
        numbers: of the answers, by row; what is drawn depends on them.
        goes_on: the prompt goes on where the answer before ended, and sees all before it; its
            positions start at 0 all the same.
        followed: another prompt may go on from the answer.
    """

    batch: Batch
    most: int
    numbers: tuple[int, ...] = (0,)
    goes_on: bool = False
    followed: bool = False


Heard = Callable[[Sequence[int | None]], None]


class Generation:
    """Answers prompts; every process of the run makes the same calls and gets the same tokens.

    Args:
        stop: ids that end an answer; the one found is the last token of it.
    """

    def __init__(
        self, engine: Engine, stop: Collection[int] = (), how: Sampling | None = None
    ) -> None:
        self._engine, self._stop = engine, frozenset(stop)
        self._how = how or Sampling()
        self._at = torch.zeros(0, dtype=torch.int64)  # the last position, by row
        self._chooser = Chooser(self._how, ())

    def answer(self, asked: PromptBatch, hear: Heard = lambda tokens: None) -> list[list[int]]:
        """The tokens of each answer.

        Args:
            hear: gets the tokens of each step by row; None for a row that has ended.
        """
        batch = self._begun(asked)
        vocab = self._engine.arch.text_config.vocab_size
        self._chooser.read(batch.ids, batch.mask, vocab)
        found: list[list[int]] = [[] for _ in batch.ids]
        for _ in range(asked.most):
            tokens = self._next(batch)
            self._chooser.read(tokens[:, None], None, vocab)
            step = [
                None if row and row[-1] in self._stop else token
                for row, token in zip(found, tokens.tolist(), strict=True)
            ]
            for row, token in zip(found, step, strict=True):
                row += [] if token is None else [token]
            hear(step)
            self._at = self._at + 1
            batch = next_step(batch, tokens, self._at)
            if all(row[-1] in self._stop for row in found):
                return found
        if asked.followed:  # the last word has been said, and not read yet
            self._engine.last_logits(batch)
        return found

    def _begun(self, asked: PromptBatch) -> Batch:
        """The batch in its place behind what was said before."""
        batch = asked.batch
        if asked.goes_on:
            batch = replace(batch, positions=batch.positions + self._at[:, None] + 1)
        else:
            self._engine.remember(True)
            self._chooser = Chooser(self._how, asked.numbers)
        self._at = batch.positions.reshape(-1, *batch.ids.shape).amax((0, 2))
        return batch

    def _next(self, batch: Batch) -> Tensor:
        logits = self._engine.last_logits(batch)
        tokens = torch.zeros(len(batch.ids), dtype=torch.int64, device=batch.ids.device)
        if logits is not None:
            tokens = self._chooser.choose(logits)
        self._engine.mesh.share_from_end(tokens)
        return tokens
