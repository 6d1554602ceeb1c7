"""Training data: conversation files, their order, and the micro-batches of a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from mmconvert.errors import DatasetError, RequestError
from mmconvert.runtime.batch import IGNORED, Batch, alike
from mmconvert.runtime.conversation import Sample, Speaker, sample_of
from mmconvert.runtime.inputs import joined

KEPT = 256  # encoded samples that stay in memory


def read_samples(files: Sequence[Path], most: int) -> list[Sample]:
    """The conversations of data files, in their order.

    Args:
        files: JSON lists of ``{"images": [...], "messages": [...]}``; paths in them start at
            the file's own folder, or at the working directory.
        most: how many at most; 0 for all.

    Raises:
        DatasetError: a file is missing or an entry makes no sense; it is named.
    """
    found: list[Sample] = []
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}", "a data file (JSON)") from None
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path} is no JSON: {error}", "a list of conversations") from None
        if not isinstance(content, list):
            raise DatasetError(f"{path} holds no list", "a list of conversations")
        for number, item in enumerate(content):
            found.append(sample_of(item, path.parent, f"{path}, entry {number}"))
    found = found[:most] if most else found
    for sample in found:  # now, and not after an hour of training
        for file in (*sample.images, *sample.videos, *sample.audios):
            if not file.exists():
                raise DatasetError(
                    f"{sample.name}: {file} is missing",
                    "every file, by a path from the data file's folder or the working directory",
                )
    if not found:
        raise DatasetError("there are no conversations in the data", "at least one")
    return found


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
            raise DatasetError(f"{sample.name}: {error.what}", error.wanted, error.fix) from None

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
