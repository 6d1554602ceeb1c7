"""LLaVA-Instruct annotations: items read, checked and counted, whatever they become (``forms``).

LLaVA: a JSON list of ``{"id", "image", "conversations": [{"from": "human" or "gpt", "value"}]}``;
``<image>`` in a value stands for the image. Items may have several images, videos and sounds (see
:data:`MEDIA`).

One item is converted at a time; nothing here reads or writes files, but for asking whether an
image is there.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from mmconvert.datasets.jsonlist import Item
from mmconvert.errors import DatasetError
from mmconvert.narrow import is_array, is_object

TAG = "<image>"
# Key of the MLLM form -> the keys that LLaVA items of several origins have for it. A value is one
# name or a list; "<image>", "<video>" or "<audio>" in a text stands for each.
MEDIA = {kind: (kind[:-1], kind) for kind in ("images", "videos", "audios")}
SHOWN = 5  # examples of each kind that are named


@dataclass
class ItemCounts:
    """What has been met, by kind; see :data:`KINDS`."""

    counts: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, kind: str, example: str) -> None:
        """Counts one, and keeps the first few examples."""
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < SHOWN:
            kept.append(example)


# What is worth a warning, or an error with --strict: kind -> (in words, the way out).
KINDS = {
    "missing": ("items left out because their image is missing", "check the folder of the images"),
    "unused": ("items with an image that no <image> refers to", "put <image> into a value"),
    "untouched": (
        "items in which <image> is left as it is: no line break beside it, or no image",
        "put <image> on a line of its own",
    ),
    "tags": (
        "items with more or fewer <image>, <video> or <audio> than files",
        "one <image> for each image",
    ),
    "unread": (
        "items with files under keys that the reference does not read: these files are lost",
        "leave out --compat",
    ),
    "media": (
        "items with videos or sounds, which this form cannot name: left in the item as they are",
        "convert them with llava-to-mllm",
    ),
    "roles": ("messages of a role that is neither human nor gpt, left as they are", "rename it"),
}


@dataclass(frozen=True)
class Images:
    """Where images are, and how the output names them.

    Attributes:
        root: the folder in which they are looked for.
        prefix: what stands before an item's ``image`` to make the path below the root.
        stored: what the output names: ``full``, root and path; ``plain``, the path alone; or
            ``dotted``, the path after ``./``.
    """

    root: str
    prefix: str
    stored: Literal["full", "plain", "dotted"]

    def find(self, image: str, kind: str = "images") -> tuple[str, str, bool]:
        """The path that the output names, the one that was looked for, whether it is there.

        The prefix is one of images; of other files it counts where the path alone is not there.
        """
        path = self.prefix + image
        if kind != "images" and os.path.exists(os.path.join(self.root, image)):
            path = image
        looked_for = os.path.join(self.root, path)
        named = {"full": looked_for, "plain": path, "dotted": f"./{path}"}[self.stored]
        return named, looked_for, os.path.exists(looked_for)


class Converter(ABC):
    """What both forms share: checks, counts, images.

    Args:
        images: where they are.
        strict: raise an error for what is otherwise counted.
        compat: do what the reference does, its faults included.
    """

    def __init__(self, images: Images, *, strict: bool = False, compat: bool = False) -> None:
        self.images = images
        self.strict = strict
        self.compat = compat
        self.report = ItemCounts()

    @abstractmethod
    def convert(self, item: Item, index: int) -> Item | None:
        """The item in the other form; None if it is left out.

        Raises:
            DatasetError: an item that has not the form of LLaVA, or what ``strict`` forbids.
        """

    def fail(self, index: int, what: str, expected: str, fix: str = "") -> NoReturn:
        """Raises DatasetError for an item."""
        raise DatasetError(f"item {index}{what}", expected, fix)

    def noticed(self, kind: str, index: int, example: str) -> None:
        """Counts something that is worth a warning. Raises DatasetError if strict."""
        if self.strict:
            words, fix = KINDS[kind]
            self.fail(index, f": {example}", f"no {words}", f"{fix}, or leave out --strict")
        self.report.add(kind, f"item {index}: {example}")

    def files_of(self, item: Item, index: int, kind: str) -> list[str]:
        """The names of an item's images, videos or sounds."""
        given = {key: item[key] for key in MEDIA[kind] if item.get(key) not in (None, "", [])}
        if self.compat and (unread := [key for key in given if key != "image"]):
            self.noticed("unread", index, f"{unread[0]} is {given[unread[0]]!r:.80}")
            given = {key: value for key, value in given.items() if key == "image"}
        listed = [value if is_array(value) else [value] for value in given.values()]
        if len(listed) > 1 and listed[0] != listed[1]:
            self.fail(index, f": {' and '.join(given)} differ", "one of the two")
        found: dict[str, list[str]] = {}
        for key, value in given.items():
            for name in value if is_array(value) else [value]:
                if not isinstance(name, str) or not name or "\0" in name:
                    self.fail(index, f": {key} is {value!r:.80}", "the name of a file, or a list")
                found.setdefault(key, []).append(name)
        if self.compat and isinstance(given.get("image"), list):
            self.fail(index, f": image is {given['image']!r:.80}", "the name of one file")
        return next(iter(found.values()), list[str]())

    def found(self, item: Item, index: int, kind: str) -> list[str] | None:
        """The paths that the output names; None if a file is not there."""
        paths: list[str] = []
        for name in self.files_of(item, index, kind):
            named, looked_for, there = self.images.find(name, kind)
            if not there:
                self.noticed("missing", index, f"{looked_for} does not exist")
                return None
            paths.append(named)
        return paths

    def turns(self, item: Item, index: int) -> list[Item]:
        """The item's conversations, checked."""
        turns = item.get("conversations")
        if not is_array(turns):
            what = "has no conversations" if turns is None else "conversations is not a list"
            self.fail(index, f": {what}", 'a list of {"from": ..., "value": ...}')
        found: list[Item] = []
        for number, turn in enumerate(turns):
            if not is_object(turn) or not all(
                isinstance(turn.get(key), str) for key in ("from", "value")
            ):
                where = f", turn {number}: {turn!r:.80}"
                self.fail(index, where, 'an object with the texts "from" and "value"')
            found.append(turn)
        return found
