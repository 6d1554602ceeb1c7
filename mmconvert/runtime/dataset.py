"""Training data: conversation files, their order, and the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from mmconvert.errors import DatasetError, RequestError
from mmconvert.runtime.batch import IGNORED, Batch, alike
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.inputs import joined
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample, Source, read_source

Order = Literal["epoch", "seed", "file", "once"]
KEPT = 256  # encoded samples that stay in memory


@dataclass(frozen=True)
class Data:
    """What to learn from.

    Attributes:
        train: the training data.
        check: data for evaluations.
        rate: the share of the training data that is set aside for evaluations; 0 for none.
        prepare: how samples become batches.
        strict: a sample that cannot be used ends the training; else it is left out and counted.
    """

    train: tuple[Source, ...]
    check: tuple[Source, ...] = ()
    rate: float = 0.0
    prepare: Prepare = field(default_factory=Prepare)
    strict: bool = False

    def read(self, seed: int, say: Callable[[str], None]) -> tuple[list[Sample], list[Sample]]:
        """(samples for training, samples for evaluations).

        Raises:
            DatasetError, RequestError: as :func:`read_source` and :func:`split`.
        """
        samples, kept = (self._all(sources, say) for sources in (self.train, self.check))
        return split(samples, self.rate, seed) if self.rate else (samples, kept)

    def _all(self, sources: Sequence[Source], say: Callable[[str], None]) -> list[Sample]:
        samples: list[Sample] = []
        for source in sources:
            found = read_source(source, strict=self.strict)
            samples += found.samples
            for note in found.notes():
                say(note)
        return samples


def read_samples(files: Sequence[Path], most: int) -> list[Sample]:
    """The conversations of data files, in their order.

    Args:
        files: JSON lists or lines, in any dialect; paths in them start at the file's own folder,
            or at the working directory.
        most: how many at most; 0 for all.

    Raises:
        DatasetError: a file is missing or an entry makes no sense; it is named.
    """
    return read_source(Source(tuple(files), most), strict=True).samples


def split(samples: Sequence[Sample], rate: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training samples, validation samples): a share of ``rate`` is drawn for validation.

    Raises:
        RequestError: nothing would be left on one side.
    """
    count = round(len(samples) * rate)
    if not 0 < count < len(samples):
        raise RequestError(
            f"a --val_rate of {rate} of {len(samples)} samples is {count}", "some for both sides"
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = set(order[:count])
    train = [s for i, s in enumerate(samples) if i not in drawn]
    return train, [s for i, s in enumerate(samples) if i in drawn]


class Share(NamedTuple):
    """Which micro-batches of a step a replica takes: every ``of``-th, from ``number`` on."""

    number: int = 0
    of: int = 1


class Feed:
    """Micro-batches of any step: the same on every process of a replica, after every restart.

    Args:
        size: samples of a micro-batch.
        count: micro-batches of a step, over all replicas.
        order: ``epoch`` is MindSpeed-MM's: each pass is a permutation that its number alone
            decides, of whole micro-batches; ``seed`` takes ``seed`` into account, and every
            sample; ``file`` keeps the order of the files; ``once`` does too, and lets only the
            first pass through them count.
        share: the replica's micro-batches. They are dealt whole, so that the number of replicas
            has no part in what is learnt.
    """

    def __init__(
        self,
        speaker: Speaker,
        samples: Sequence[Sample],
        size: int,
        count: int,
        order: Order = "epoch",
        seed: int = 0,
        share: Share = Share(),  # noqa: B008 - it does not change
    ) -> None:
        self._speaker, self._samples = speaker, samples
        self._size, self._count, self._kind, self._seed = size, count, order, seed
        self._share = share
        whole = len(samples) // size * size if order == "epoch" else 0
        self._total = whole or len(samples)
        self._encoded = lru_cache(KEPT)(self._encode)
        self._order = lru_cache(2)(self._permutation)

    def _encode(self, index: int) -> Batch:
        sample = self._samples[index]
        try:
            return self._speaker.batch(sample, answer=False)
        except RequestError as error:
            raise DatasetError(f"{sample.name}: {error.what}", error.expected, error.fix) from None

    def _permutation(self, epoch: int) -> list[int]:
        if self._kind in ("file", "once"):
            return list(range(self._total))
        made = torch.Generator().manual_seed(epoch + (self._seed if self._kind == "seed" else 0))
        return torch.randperm(self._total, generator=made).tolist()

    def _picked(self, number: int) -> list[list[Batch]]:
        """The samples of this replica's micro-batches in a step."""
        first = number * self._count
        mine = range(first + self._share.number, first + self._count, self._share.of)
        return [[self._at(m * self._size + i) for i in range(self._size)] for m in mine]

    def _at(self, place: int) -> Batch:
        """The sample at a place of the endless row of passes."""
        batch = self._encoded(self._order(place // self._total)[place % self._total])
        if self._kind == "once" and place >= self._total:
            batch = replace(batch, labels=torch.full_like(batch.labels, IGNORED))
        return batch

    def tokens(self, number: int) -> int:
        """Tokens of this replica's part of a step, padding not counted."""
        return sum(batch.ids.numel() for group in self._picked(number) for batch in group)

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of this replica in a step (from 0), padded to one shape."""
        arch = self._speaker.arch
        merge = 1 if arch.intern else arch.config.vision_config.spatial_merge_size
        groups = [joined(arch, group) for group in self._picked(number)]
        return alike(groups, merge, arch.intern)

    @property
    def steps(self) -> int:
        """Steps that see every sample at least once."""
        return -(-len(self._samples) // (self._size * self._count))
