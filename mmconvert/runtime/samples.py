"""Conversations, and where they come from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmconvert.errors import DatasetError

PLACE = re.compile(r"<(image|video|audio)>")
KINDS = IMAGE, VIDEO, AUDIO = ("image", "video", "audio")


class Clip(NamedTuple):
    """A part of a video, in seconds."""

    path: Path
    start: float
    end: float


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        messages: (role, text); ``<image>``, ``<video>`` and ``<audio>`` mark the places.
        images, videos, audios: files, in the order of their places; pictures and sounds
            may be objects.
        fault: what makes it useless, if that is known; its turn goes to another then.
        looked: its files have been decoded.
    """

    messages: Sequence[tuple[str, str]]
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    audios: Sequence[Any] = ()
    name: str = "the prompt"
    fault: str = ""
    looked: bool = False

    def files(self) -> list[Path]:
        """All its files."""
        every = (*self.images, *self.videos, *self.audios)
        paths = (f.path if isinstance(f, Clip) else f for f in every)
        return [p for p in paths if isinstance(p, Path)]


@dataclass(frozen=True)
class Columns:
    """What an entry's keys are called: ``attr`` of data.json.

    Attributes:
        roles: role by the word that stands for it.
        front: what stands before the first question for each picture that no place is marked for.
    """

    messages: str = "conversations"
    role: str = "from"
    content: str = "value"
    roles: Mapping[str, str] = field(
        default_factory=lambda: {"human": "user", "gpt": "assistant", "system": "system"}
    )
    system: str | None = None
    files: Mapping[str, str | None] = field(default_factory=lambda: dict.fromkeys(KINDS))
    front: str = ""

    @property
    def known(self) -> set[str]:
        """All keys of an entry that are read."""
        named = {self.messages, self.system, *self.files.values(), "id", "clip"}
        return {key for key in named if key is not None}


@dataclass(frozen=True)
class SampleSource:
    """Where conversations come from.

    Attributes:
        files: data files, in their order.
        most: how many conversations at most; 0 for all.
        folders: where media files are looked for first.
        columns: None where each entry tells its own dialect.
        share: of each file, the first part that is taken; above 1: how often it is repeated.
    """

    files: tuple[Path, ...]
    most: int = 0
    folders: tuple[Path, ...] = ()
    columns: Columns | None = None
    share: float = 1.0


@dataclass
class SamplesRead:
    """What a source held.

    Attributes:
        samples: the conversations that can be used.
        faults: of the entries that cannot.
        unread: keys of entries that nothing is done with.
    """

    samples: list[Sample] = field(default_factory=list[Sample])
    faults: list[DatasetError] = field(default_factory=list[DatasetError])
    unread: set[str] = field(default_factory=set[str])

    def notes(self) -> list[str]:
        """What to say of it."""
        said: list[str] = []
        if self.unread:
            said.append(
                f"note: keys of the data that are not read: {', '.join(listed(self.unread))}"
            )
        if self.faults:
            every = len(self.faults) + len(self.samples)
            said.append(f"warning: {len(self.faults)} of {every} samples are left out:")
            said += [f"  {fault.what}" for fault in self.faults[:NAMED]]
            if len(self.faults) > NAMED:
                said.append(f"  and {len(self.faults) - NAMED} more")
        return said


NAMED = 10  # faults that are named one by one


def listed(names: set[str]) -> list[str]:
    """Names in order, not more than fit a line."""
    every = sorted(names)
    return every if len(every) <= NAMED else [*every[:NAMED], f"and {len(every) - NAMED} more"]
