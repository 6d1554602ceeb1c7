"""Training data: conversation files, their order, and the micro-batches of a step."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from mmconvert.errors import DatasetError, RequestError
from mmconvert.runtime.batch import IGNORED, Batch, alike
from mmconvert.runtime.checking import Checks, Decode, look_at_pictures
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.dialects import read_source
from mmconvert.runtime.encoding import Encoder
from mmconvert.runtime.inputs import joined
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample, SampleSource

SampleOrder = Literal["epoch", "seed", "file", "once"]


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

    train: tuple[SampleSource, ...]
    check: tuple[SampleSource, ...] = ()
    rate: float = 0.0
    prepare: Prepare = field(default_factory=Prepare)
    strict: bool = False

    def read(
        self, seed: int, say: Callable[[str], None], look: Decode = look_at_pictures
    ) -> tuple[list[Sample], list[Sample]]:
        """(samples for training, samples for evaluations).

        Args:
            look: decodes the files of a sample.

        Raises:
            DatasetError, RequestError: as :func:`read_source` and :func:`split`.
        """
        checks = Checks(look, self.strict)
        samples, kept = (self._all(sources, say, checks) for sources in (self.train, self.check))
        return split(samples, self.rate, seed) if self.rate else (samples, kept)

    def _all(
        self, sources: Sequence[SampleSource], say: Callable[[str], None], checks: Checks
    ) -> list[Sample]:
        samples: list[Sample] = []
        for source in sources:
            found = read_source(source, strict=self.strict)
            samples += found.samples
            for note in found.notes():
                say(note)
        return checks.checked(samples, say) if samples else samples


def read_samples(files: Sequence[Path], most: int) -> list[Sample]:
    """The conversations of data files, in their order.

    Args:
        files: JSON lists or lines, in any dialect; paths in them start at the file's own folder,
            or at the working directory.
        most: how many at most; 0 for all.

    Raises:
        DatasetError: a file is missing or an entry makes no sense; it is named.
    """
    return read_source(SampleSource(tuple(files), most), strict=True).samples


def split(samples: Sequence[Sample], rate: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training samples, validation samples): a share of ``rate`` is drawn for validation.

    Raises:
        RequestError: nothing would be left on one side.
    """
    count = round(len(samples) * rate)
    if not 0 < count < len(samples):
        raise RequestError(
            f"--val_rate {rate} takes {count} of {len(samples)} samples for validation",
            "at least one for validation and one for training",
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
        say: gets a warning for each sample that is left out. The next one in the order takes its
            place, the same on every process.
        strict: such a sample is an error.
        threads: how many samples are encoded at a time, ahead of their step.
    """

    def __init__(
        self,
        speaker: Speaker,
        samples: Sequence[Sample],
        size: int,
        count: int,
        order: SampleOrder = "epoch",
        seed: int = 0,
        share: Share = Share(),  # noqa: B008 - it does not change
        say: Callable[[str], None] | None = None,
        *,
        strict: bool = False,
        threads: int = 1,
    ) -> None:
        self._speaker, self._samples = speaker, samples
        self._say, self._strict = say, strict
        self.bad: dict[int, str] = {}  # sample -> what is wrong with it
        self._counts: dict[int, int] = {}
        self._size, self._count, self._kind, self._seed = size, count, order, seed
        self._share = share
        whole = len(samples) // size * size if order == "epoch" else 0
        self._total = whole or len(samples)
        self._encoder = Encoder(speaker, samples, threads)
        self._order = lru_cache(2)(self._permutation)

    def _permutation(self, epoch: int) -> list[int]:
        if self._kind in ("file", "once"):
            return list(range(self._total))
        made = torch.Generator().manual_seed(epoch + (self._seed if self._kind == "seed" else 0))
        return torch.randperm(self._total, generator=made).tolist()

    def _places(self, number: int) -> list[range]:
        """The places of the samples of this replica's micro-batches in a step."""
        first = number * self._count
        mine = range(first + self._share.number, first + self._count, self._share.of)
        return [range(m * self._size, (m + 1) * self._size) for m in mine]

    def _index(self, place: int, further: int = 0) -> int:
        """The sample at a place of the endless row of passes, or one further on in its pass."""
        return self._order(place // self._total)[(place + further) % self._total]

    def _at(self, place: int) -> Batch:
        """The sample at a place, or the next one that can be used.

        Raises:
            DatasetError: it cannot be used, if ``strict``; or none can.
        """
        fault = DatasetError("there are no samples")
        for further in range(self._total):
            index = self._index(place, further)
            known = self.bad.get(index)  # perhaps to another process alone
            found = self._encoder.get(index) if known is None else DatasetError(known)
            if isinstance(found, DatasetError):
                self._leave_out(index, found)
                fault = found
                continue
            if self._kind == "once" and (further or place >= self._total):
                return replace(found, labels=torch.full_like(found.labels, IGNORED))
            return found
        raise DatasetError(f"no sample can be used: {fault.what}", fault.expected, fault.fix)

    def _leave_out(self, index: int, fault: DatasetError) -> None:
        if self._strict:
            raise fault
        if index not in self.bad:
            self.bad[index] = fault.what
            if self._say is not None and not self._samples[index].fault:
                self._say(f"warning: left out, {len(self.bad)} so far: {fault.what}")

    def first_pass(self) -> list[int]:
        """The samples in the order of their first turns."""
        return [self._index(place) for place in range(self._total)]

    def tokens(self, number: int) -> int:
        """Tokens of this replica's part of a step, padding not counted."""
        if number not in self._counts:
            self.step(number)
        return self._counts[number]

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of this replica in a step (from 0), padded to one shape."""
        arch = self._speaker.arch
        merge = 1 if arch.intern else arch.config.vision_config.spatial_merge_size
        picked = [[self._at(place) for place in places] for places in self._places(number)]
        self._counts = {number: sum(b.ids.numel() for group in picked for b in group)}
        made = alike([joined(arch, group) for group in picked], merge, arch.intern)
        later = (place for places in self._places(number + 1) for place in places)
        self._encoder.ask(self._index(place) for place in later)
        return made

    @property
    def steps(self) -> int:
        """Steps that see every sample at least once."""
        return -(-len(self._samples) // (self._size * self._count))
