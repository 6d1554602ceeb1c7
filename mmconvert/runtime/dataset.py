"""Training data: conversation files, their order, and the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from mmconvert.errors import DatasetError, RequestError
from mmconvert.runtime.batch import IGNORED, Batch, alike
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.inputs import joined
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample, Source, read_source

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


class Feed:
    """Micro-batches of any step: the same on every process and after every restart.

    Args:
        size: samples of a micro-batch.
        count: micro-batches of a step.
        seed: decides the order; None keeps the order of the files, and lets only the first pass
            through them count.
    """

    def __init__(
        self, speaker: Speaker, samples: Sequence[Sample], size: int, count: int, seed: int | None
    ) -> None:
        self._speaker, self._samples = speaker, samples
        self._size, self._count, self._seed = size, count, seed
        self._encoded = lru_cache(KEPT)(self._encode)
        self._order = lru_cache(2)(self._permutation)

    def _encode(self, index: int) -> Batch:
        sample = self._samples[index]
        try:
            return self._speaker.batch(sample, answer=False)
        except RequestError as error:
            raise DatasetError(f"{sample.name}: {error.what}", error.expected, error.fix) from None

    def _permutation(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(len(self._samples)))
        made = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(len(self._samples), generator=made).tolist()

    def _picked(self, number: int) -> list[Batch]:
        """The samples of a step."""
        total = len(self._samples)
        start = number * self._size * self._count
        picked: list[Batch] = []
        for place in range(start, start + self._size * self._count):
            batch = self._encoded(self._order(place // total)[place % total])
            if self._seed is None and place >= total:  # an evaluation counts each sample once
                batch = replace(batch, labels=torch.full_like(batch.labels, IGNORED))
            picked.append(batch)
        return picked

    def tokens(self, number: int) -> int:
        """Tokens of a step, padding not counted."""
        return sum(batch.ids.numel() for batch in self._picked(number))

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of a step (from 0), padded to one shape."""
        picked = self._picked(number)
        arch = self._speaker.arch
        groups = [picked[i : i + self._size] for i in range(0, len(picked), self._size)]
        merge = 1 if arch.intern else arch.config.vision_config.spatial_merge_size
        return alike([joined(arch, group) for group in groups], merge, arch.intern)

    @property
    def steps(self) -> int:
        """Steps that see every sample at least once."""
        return -(-len(self._samples) // (self._size * self._count))
