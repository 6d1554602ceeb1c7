"""What Qwen-VL learns from a conversation: MindFormers' template of training, ids and labels."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmconvert.errors import DatasetError, RequestError
from mmconvert.runtime.batch import IGNORED
from mmconvert.runtime.dataset import SampleOrder
from mmconvert.runtime.qwenvl import prompts
from mmconvert.runtime.qwenvl.sizes import QUERIES, Sizes
from mmconvert.runtime.qwenvl.tokenizer import END, IMAGE, IMAGE_END, SLOT, Tokenizer
from mmconvert.runtime.samples import Sample

ROLES = ("user", "assistant")
PLACE = re.compile(r"(Picture \d+: )?<image>(\n?)")
TAIL = 2  # ids that end each turn: its end token and a line break


@dataclass(frozen=True)
class Lesson:
    """Some samples side by side.

    Attributes:
        ids, labels: (batch, time); padded with the end token and with -100.
        pixels: (n, 3, side, side), or None.
        slots: (n, 256, 2), or None.
        keep: (batch, time), false for padding.
    """

    ids: Tensor
    labels: Tensor
    pixels: Tensor | None
    slots: Tensor | None
    keep: Tensor

    def to(self, device: torch.device) -> Lesson:
        """The same on a device."""
        pixels = None if self.pixels is None else self.pixels.to(device)
        slots = None if self.slots is None else self.slots.to(device)
        ids, labels, keep = (t.to(device) for t in (self.ids, self.labels, self.keep))
        return Lesson(ids, labels, pixels, slots, keep)


class Encoded(NamedTuple):
    """A sample as ids, labels and pictures (3, side, side)."""

    ids: list[int]
    labels: list[int]
    pixels: list[Tensor]


def template(
    tokenizer: Tokenizer, messages: Sequence[tuple[str, str]], length: int = 0
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation, at most ``length`` + 1 of them (0: all).

    Of what is asked, and of the system's words, the first id and the last two are learnt; of an
    answer all but its role. Turns of other roles are left out.

    Source: ``QwenVLContentTransformTemplate`` of MindFormers 1.3.1.
    """
    system = next((text for role, text in messages if role == "system"), prompts.SYSTEM)
    turns = [("system", system), *((r, text) for r, text in messages if r in ROLES)]
    ids: list[int] = []
    labels: list[int] = []
    for role, text in turns:
        piece = prompts.encode(tokenizer, prompts.turn(role, text))
        answered = role == "assistant"
        hidden = 1 + len(tokenizer.encode(role)) if answered else len(piece) - 1 - TAIL
        ids += piece
        labels += [piece[0], *[IGNORED] * hidden, *piece[1 + hidden :]]
    most = length + 1 if length else len(ids)
    return ids[:most], labels[:most]


class Teacher:
    """Makes micro-batches of samples.

    Args:
        length: of a sample in tokens; longer ones are cut. 0 for no limit.
    """

    def __init__(self, tokenizer: Tokenizer, sizes: Sizes, length: int) -> None:
        self._tokenizer, self._sizes, self._length = tokenizer, sizes, length

    def joined(self, made: Sequence[Encoded]) -> Lesson:
        """A micro-batch."""
        most = max(len(one.ids) for one in made)
        end, slot = self._tokenizer.special[END], self._tokenizer.special[SLOT]
        ids = torch.full((len(made), most), end)
        labels = torch.full_like(ids, IGNORED)
        for row, one in enumerate(made):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            labels[row, : len(one.labels)] = torch.tensor(one.labels)
        # A token behind the end token is not learnt, in the text or in the padding.
        labels[:, 1:].masked_fill_(ids[:, :-1] == end, IGNORED)
        pixels = [picture for one in made for picture in one.pixels]
        keep = ids != end
        if not pixels:
            return Lesson(ids, labels, None, None, keep)
        return Lesson(ids, labels, torch.stack(pixels), prompts.slots_of(ids, slot), keep)

    def encode(self, sample: Sample) -> Encoded:
        """A sample by itself.

        Raises:
            DatasetError: it cannot be used; it is named.
        """
        if sample.videos or sample.audios:
            raise DatasetError(f"{sample.name} has videos or sounds", "pictures alone")
        ids, labels = template(self._tokenizer, _tagged(sample.messages), self._length)
        slot = self._tokenizer.special[SLOT]
        whole, cut = divmod(ids.count(slot), QUERIES)
        if cut or whole != len(sample.images):
            raise DatasetError(
                f"{sample.name}: {whole} of its {len(sample.images)} pictures are within "
                f"{self._length} tokens",
                "whole pictures: 258 tokens each",
                "a larger --seq_length",
            )
        try:
            prompts.check_ids(torch.tensor(ids), self._sizes)
            pixels = [prompts.pixels_of(picture, self._sizes) for picture in sample.images]
        except RequestError as error:
            raise DatasetError(f"{sample.name}: {error.what}", error.expected, error.fix) from None
        return Encoded(ids, labels, pixels)


class Lessons:
    """The samples of a training as micro-batches of an endless row of passes.

    Args:
        strict: a sample that cannot be used is an error; else its turn goes to the next.
    """

    def __init__(
        self,
        teacher: Teacher,
        samples: Sequence[Sample],
        order: SampleOrder,
        seed: int,
        *,
        strict: bool,
    ) -> None:
        self._teacher, self._samples, self._strict = teacher, samples, strict
        self._order, self._seed = order, seed
        self.bad: dict[int, str] = {}  # sample -> what is wrong with it

    def at(self, number: int, size: int) -> Lesson:
        """A micro-batch of ``size`` samples.

        Raises:
            DatasetError: no sample can be used; if ``strict``, one cannot.
        """
        return self._teacher.joined([self._sample(number * size + i) for i in range(size)])

    def once(self, size: int, most: int) -> list[Lesson]:
        """The first samples in the files' order, each once."""
        some = self._samples[:most]
        groups = [some[first : first + size] for first in range(0, len(some), size)]
        return [self._teacher.joined([self._teacher.encode(s) for s in g]) for g in groups]

    def first_pass(self) -> list[int]:
        """The samples in the order of their first turns."""
        return self._pass(0)

    def _sample(self, place: int) -> Encoded:
        count = len(self._samples)
        order = self._pass(place // count)
        for further in range(count):
            index = order[(place + further) % count]
            if index in self.bad:
                continue
            sample = self._samples[index]
            try:
                if sample.fault:
                    raise DatasetError(f"{sample.name}: {sample.fault}")
                return self._teacher.encode(sample)
            except DatasetError as error:
                if self._strict:
                    raise
                self.bad[index] = error.what
        raise DatasetError("no sample can be used", "pictures and texts that fit --seq_length")

    def _pass(self, epoch: int) -> list[int]:
        count = len(self._samples)
        if self._order in ("file", "once"):
            return list(range(count))
        seed = epoch + (self._seed if self._order == "seed" else 0)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _tagged(messages: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The places of pictures as Qwen-VL's data has them; other dialects' get numbers."""
    numbers = iter(range(1, 1 << 20))

    def tag(match: re.Match[str]) -> str:
        number, said, line = next(numbers), match[1], match[2]
        return f"{said or f'Picture {number}: '}{IMAGE}{IMAGE_END}{line if said else chr(10)}"

    return [(role, PLACE.sub(tag, text)) for role, text in messages]
