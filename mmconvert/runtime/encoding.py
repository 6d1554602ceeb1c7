"""Samples become batches ahead of their step, by threads, and stay while there is room for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields

from torch import Tensor

from mmconvert.errors import DatasetError, MMConvertError
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.inputs import rope_model
from mmconvert.runtime.samples import Sample

ROOM = 1 << 29  # bytes of encoded samples that stay in memory
EncodedSample = Batch | DatasetError


class Encoder:
    """Encodes samples by their number.

    Args:
        threads: how many encode at a time.
        room: bytes of encoded samples that are kept; at least one sample is.
    """

    def __init__(
        self, speaker: Speaker, samples: Sequence[Sample], threads: int = 1, room: int = ROOM
    ) -> None:
        self._speaker, self._samples, self._room = speaker, samples, room
        self._waiting: OrderedDict[int, Future[EncodedSample]] = OrderedDict()
        self._kept: OrderedDict[int, tuple[EncodedSample, int]] = OrderedDict()
        self.held = 0  # bytes
        self._largest = 0
        if not speaker.arch.intern:
            rope_model(speaker.arch)  # made once, and not by two threads
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="encode")

    def get(self, number: int) -> EncodedSample:
        """A sample as a batch of its own, or what is wrong with it."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number][0]
        future = self._waiting.pop(number, None)
        found = future.result() if future is not None else self._encode(number)
        size = nbytes(found) if isinstance(found, Batch) else 0
        self._largest = max(self._largest, size)
        self._kept[number] = (found, size)
        self.held += size
        while self.held > self._room and len(self._kept) > 1:
            self.held -= self._kept.popitem(last=False)[1][1]
        return found

    def ask(self, numbers: Iterable[int]) -> None:
        """Starts to encode samples that will be wanted next, as many as there is room for."""
        for number in numbers:
            if (len(self._waiting) + 1) * self._largest > self._room:
                return
            if number not in self._kept and number not in self._waiting:
                self._waiting[number] = self._pool.submit(self._encode, number)

    def _encode(self, number: int) -> EncodedSample:
        sample = self._samples[number]
        if sample.fault:
            return DatasetError(f"{sample.name}: {sample.fault}")
        try:
            return self._speaker.batch(sample, answer=False)
        except MMConvertError as error:
            what = error.what.removeprefix(f"{sample.name}: ").removeprefix(f"{sample.name} ")
            return DatasetError(f"{sample.name}: {what}", error.expected, error.fix)
        except (MemoryError, AssertionError):
            raise
        except Exception as error:  # whatever a decoder makes of a stranger's file
            return DatasetError(f"{sample.name}: {type(error).__name__}: {error}"[:300])


def nbytes(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    values = (getattr(batch, f.name) for f in fields(batch))
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
