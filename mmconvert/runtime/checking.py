"""Pictures that end too early are found before the first step, by the ends of their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mmconvert.errors import DatasetError, RequestError
from mmconvert.runtime.pictures import open_picture
from mmconvert.runtime.samples import NAMED, Sample

LOOKING = 30.0  # seconds; what is not looked at by then is met when its turn comes


def checked(
    samples: Sequence[Sample], say: Callable[[str], None], *, strict: bool, seconds: float = LOOKING
) -> list[Sample]:
    """The samples, those with a damaged picture marked: they are left out when their turn comes.

    All stay in the list, so that its order is the same however many files were looked at.

    Raises:
        DatasetError: with ``strict``, the first damaged picture; none is sound.
    """
    until = time.monotonic() + seconds
    known: dict[Path, str] = {}
    found: list[Sample] = []
    faults: list[DatasetError] = []
    for number, sample in enumerate(samples):
        if time.monotonic() > until:
            say(f"note: pictures of {number} of {len(samples)} samples were looked at beforehand")
            found += samples[number:]
            break
        fault = next((f for path in sample.images if (f := _fault(path, known))), "")
        if fault:
            faults.append(DatasetError(f"{sample.name}: {fault}", "a picture file"))
            if strict:
                raise faults[0]
            sample = replace(sample, fault=fault)
        found.append(sample)
    if faults and len(faults) == len(samples):
        raise DatasetError(f"no sample can be used: {faults[0].what}", "sound pictures")
    if faults:
        say(f"warning: {len(faults)} of {len(samples)} samples are left out:")
        for error in faults[:NAMED]:
            say(f"  {error.what}")
        if len(faults) > NAMED:
            say(f"  and {len(faults) - NAMED} more")
    return found


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
