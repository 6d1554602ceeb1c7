"""Files of samples that cannot be used are found before their turn comes.

First by the ends of all files; then by decoding, as many as a few seconds allow before the first
step, and the others in the background while it trains.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from mmconvert.errors import DatasetError, RequestError
from mmconvert.names import number
from mmconvert.runtime.pictures import open_picture
from mmconvert.runtime.samples import NAMED, Sample

LOOKING = 30.0  # seconds for the ends of files
DECODING = 5.0  # seconds for decoding before the first step
THREADS = 4
Decode = Callable[[Sample], None]  # decodes the files of a sample, or raises RequestError


def look_at_pictures(sample: Sample) -> None:
    """Decodes the pictures of a sample.

    Raises:
        RequestError: one cannot be decoded.
    """
    for path in sample.images:
        if isinstance(path, Path):
            open_picture(path)


@dataclass(frozen=True)
class Checks:
    """How samples are looked at before the first step.

    Attributes:
        look: decodes the files of one.
        strict: a sample that cannot be used is an error.
        ends, decoding: seconds for each way of looking.
    """

    look: Decode = look_at_pictures
    strict: bool = False
    ends: float = LOOKING
    decoding: float = DECODING

    def checked(self, samples: Sequence[Sample], say: Callable[[str], None]) -> list[Sample]:
        """The samples, those that are damaged marked: they are left out when their turn comes.

        All stay in the list, so that its order is the same however many files were looked at.

        Raises:
            DatasetError: if ``strict``, the first that is damaged; none is sound.
        """
        found = self._by_ends(samples, say)
        decoded = self._by_decoding(found, say)
        faults = [s for s in decoded if s.fault]
        if faults and len(faults) == len(decoded):
            what = f"{faults[0].name}: {faults[0].fault}"
            raise DatasetError(f"no sample can be used: {what}", "files that can be decoded")
        if faults:
            say(f"warning: {len(faults)} of {len(decoded)} samples are left out:")
            for sample in faults[:NAMED]:
                say(f"  {sample.name}: {sample.fault}")
            if len(faults) > NAMED:
                say(f"  and {len(faults) - NAMED} more")
        return decoded

    def _by_ends(self, samples: Sequence[Sample], say: Callable[[str], None]) -> list[Sample]:
        until = time.monotonic() + self.ends
        known: dict[Path, str] = {}
        found: list[Sample] = []
        for count, sample in enumerate(samples):
            if time.monotonic() > until:
                say(f"note: pictures of {count} of {len(samples)} samples were looked at so far")
                return found + list(samples[count:])
            fault = next((f for path in sample.images if (f := _fault(path, known))), "")
            found.append(self._marked(sample, fault) if fault else sample)
        return found

    def _by_decoding(self, samples: Sequence[Sample], say: Callable[[str], None]) -> list[Sample]:
        until = time.monotonic() + self.decoding
        found: list[Sample] = []
        threads = min(THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            while len(found) < len(samples) and time.monotonic() < until:
                some = samples[len(found) : len(found) + threads]
                for sample, fault in zip(some, pool.map(self._decode, some), strict=True):
                    marked = self._marked(sample, fault) if fault else sample
                    found.append(replace(marked, looked=True))
        if len(found) < len(samples):
            say(
                f"note: the files of {number(found, 'sample')} were decoded so far; the others "
                "are while it trains"
            )
        return found + list(samples[len(found) :])

    def _decode(self, sample: Sample) -> str:
        return sample.fault or fault_of(self.look, sample)

    def _marked(self, sample: Sample, fault: str) -> Sample:
        if self.strict:
            raise DatasetError(f"{sample.name}: {fault}", "files that can be decoded")
        return replace(sample, fault=fault)


def fault_of(look: Decode, sample: Sample) -> str:
    """What is wrong with the files of a sample; "" if nothing is."""
    try:
        look(sample)
    except RequestError as error:
        return error.what.removeprefix(f"{sample.name}: ").removeprefix(f"{sample.name} ")
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder makes of a stranger's file
        return f"{type(error).__name__}: {error}"[:300]
    return ""


@dataclass
class BackgroundCheck:
    """Decodes the files of samples in the background, one after the other.

    Attributes:
        samples: those that have not been decoded yet are.
        order: their numbers in the order of their turns.
    """

    samples: Sequence[Sample]
    order: Iterable[int]
    look: Decode
    _found: SimpleQueue[tuple[int, str]] = field(default_factory=SimpleQueue[tuple[int, str]])
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begins, if there is anything to look at."""
        if any(not sample.looked for sample in self.samples):
            threading.Thread(target=self._run, name="inspect", daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # behind the training itself, where a system can
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        for place in self.order:
            if self._ended.is_set():
                return
            sample = self.samples[place]
            if not sample.looked and not sample.fault and (fault := fault_of(self.look, sample)):
                self._found.put((place, f"{sample.name}: {fault}"))

    def news(self) -> dict[int, str]:
        """What has been found since the last time: numbers of samples, and what is wrong."""
        found: dict[int, str] = {}
        with suppress(Empty):
            while True:
                place, what = self._found.get_nowait()
                found[place] = what
        return found

    def end(self) -> None:
        """Ends after the sample that is being decoded."""
        self._ended.set()


def _fault(path: object, known: dict[Path, str]) -> str:
    """What is wrong with a picture file; "" if nothing is, as far as its end shows."""
    if not isinstance(path, Path):
        return ""
    if path not in known:
        known[path] = ""
        if not _ends_well(path):
            try:
                open_picture(path)
            except RequestError as error:
                known[path] = error.what
    return known[path]


def _ends_well(path: Path) -> bool:
    """Whether a file ends as its kind does; other kinds are to be decoded."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
            size = file.seek(0, 2)
            file.seek(max(0, size - 12))
            tail = file.read(12)
    except OSError:
        return False
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return tail[4:8] == b"IEND"
    if head.startswith(b"GIF8"):
        return tail.endswith(b";")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return False
