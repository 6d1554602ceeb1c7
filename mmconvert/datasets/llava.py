"""LLaVA-Instruct annotations to the forms that training reads.

LLaVA: a JSON list of ``{"id", "image", "conversations": [{"from": "human" or "gpt", "value"}]}``;
``<image>`` in a value stands for the image. Two forms are written:

    MLLM      {"images": [path], "messages": [{"role": "user" or "assistant", "content"}]}
              (MindSpeed-MM's ``llava_instruct_2_mllm_demo_format.py``, 2.0.0)
    Qwen-VL   the item without "image"; in the values "Picture 1: <img>path</img>" stands for it
              (MindFormers' ``research/qwenvl/data_convert.py``, 1.3.1)

One item is converted at a time; nothing here reads or writes files, but for asking whether an
image is there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from mmconvert.datasets.jsonlist import Item
from mmconvert.errors import DatasetError

TAG = "<image>"
SHOWN = 5  # examples of each kind that are named


@dataclass
class Report:
    """What has been met, by kind; see :data:`KINDS`."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Counts one, and keeps the first few examples."""
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < SHOWN:
            kept.append(example)


# What is worth a warning, or an error with --strict: kind -> (in words, the way out).
KINDS = {
    "missing": ("items left out: their image is not there", "check the folder of the images"),
    "unused": ("items with an image that no <image> stands for", "put <image> into a value"),
    "untouched": (
        "items in which <image> is left as it is: no line break beside it, or no image",
        "put <image> on a line of its own",
    ),
    "tags": (
        "items with another number of <image> than of images",
        "one <image> for each image",
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

    def find(self, image: str) -> tuple[str, str, bool]:
        """The path that the output names, the one that was looked for, whether it is there."""
        path = self.prefix + image
        looked_for = os.path.join(self.root, path)
        named = {"full": looked_for, "plain": path, "dotted": f"./{path}"}[self.stored]
        return named, looked_for, os.path.exists(looked_for)


class Converter:
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
        self.report = Report()

    def convert(self, item: Item, index: int) -> Item | None:
        """The item in the other form; None if it is left out.

        Raises:
            DatasetError: an item that has not the form of LLaVA, or what ``strict`` forbids.
        """
        raise NotImplementedError

    def fail(self, index: int, what: str, expected: str, fix: str = "") -> NoReturn:
        """Raises DatasetError for an item."""
        raise DatasetError(f"item {index}{what}", expected, fix)

    def noticed(self, kind: str, index: int, example: str) -> None:
        """Counts something that is worth a warning. Raises DatasetError if strict."""
        if self.strict:
            words, fix = KINDS[kind]
            self.fail(
                index, f": {example}", f"none of the {words}", f"{fix}, or leave out --strict"
            )
        self.report.add(kind, f"item {index}: {example}")

    def image_of(self, item: Item, index: int) -> str | None:
        """The item's image; None if it has none."""
        image = item.get("image")
        if image is None or image in ("", []):
            return None
        if not isinstance(image, str):
            self.fail(index, f": image is {image!r:.80}", "the name of one file")
        if "\0" in image:
            self.fail(index, f": image is {image!r:.80}", "the name of a file")
        return image

    def found(self, image: str, index: int) -> str | None:
        """The path that the output names; None if the image is not there."""
        named, looked_for, there = self.images.find(image)
        if there:
            self.report.counts["images"] += 1
            return named
        self.noticed("missing", index, f"{looked_for} is not there")
        return None

    def turns(self, item: Item, index: int) -> list[Item]:
        """The item's conversations, checked."""
        turns = item.get("conversations")
        if not isinstance(turns, list):
            what = "has no conversations" if turns is None else "conversations is not a list"
            self.fail(index, f": {what}", 'a list of {"from": ..., "value": ...}')
        for number, turn in enumerate(turns):
            good = isinstance(turn, dict) and all(
                isinstance(turn.get(key), str) for key in ("from", "value")
            )
            if not good:
                where = f", turn {number}: {turn!r:.80}"
                self.fail(index, where, 'an object with the texts "from" and "value"')
        return turns


class ToMLLM(Converter):
    """LLaVA to the MLLM form."""

    ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant"}

    def convert(self, item: Item, index: int) -> Item | None:
        """See :meth:`Converter.convert`. Text-only items have no images."""
        turns = self.turns(item, index)
        image = self.image_of(item, index)
        path = None if image is None else self.found(image, index)
        if image is not None and path is None:
            return None
        messages: list[Item] = []
        for number, turn in enumerate(turns):
            role = self.ROLES.get(turn["from"])
            if role is None:
                where = f", turn {number}: from is {turn['from']!r:.80}"
                self.fail(index, where, "human or gpt", "rename the role, or leave out the item")
            messages.append({"role": role, "content": turn["value"]})
        tags = sum(turn["value"].count(TAG) for turn in turns)
        if tags != (path is not None):
            self.noticed("tags", index, f"{tags} {TAG}, {int(path is not None)} images")
        if path is None:
            self.report.counts["text_only"] += 1
        return {"images": [] if path is None else [path], "messages": messages}


class ToQwenVL(Converter):
    """LLaVA to the Qwen-VL form.

    Args:
        user, assistant: what stands for human and gpt.
    """

    def __init__(
        self,
        images: Images,
        *,
        user: str = "user",
        assistant: str = "assistant",
        strict: bool = False,
        compat: bool = False,
    ) -> None:
        super().__init__(images, strict=strict, compat=compat)
        self._roles = {"human": user, "gpt": assistant}

    def convert(self, item: Item, index: int) -> Item | None:
        """See :meth:`Converter.convert`. Text-only items keep their values."""
        turns = self.turns(item, index)
        image = self.image_of(item, index)
        picture = None
        if image is not None:
            path = self.found(image, index)
            if path is None:
                return None
            picture = self._picture(path, index)
        elif self.compat:
            what = " has no image; the reference fails here"
            self.fail(index, what, "an image in every item", "leave out --compat")
        else:
            self.report.counts["text_only"] += 1
        new_turns: list[Item] = []
        for number, turn in enumerate(turns):
            role = turn["from"]
            if role not in self._roles and role not in self._roles.values():
                self.noticed("roles", index, f"turn {number} is from {role!r:.80}")
            value = turn["value"] if picture is None else self._value(turn["value"], picture)
            new_turns.append(turn | {"from": self._roles.get(role, role), "value": value})
        self._check_values(new_turns, picture, index)
        new = item | {"conversations": new_turns}
        new.pop("image", None)
        return new

    def _picture(self, path: str, index: int) -> str:
        if not self.compat and any(sign in path for sign in ("<img>", "</img>", "\n")):
            self.fail(index, f": image is {path!r:.80}", "a name without <img>, </img> or a break")
        return f"Picture 1: <img>{path}</img>\n"

    def _check_values(self, turns: list[Item], picture: str | None, index: int) -> None:
        """Every ``<image>`` has become the picture, and the picture is there."""
        values = [turn["value"] for turn in turns]
        left = next((value for value in values if TAG in value), None)
        if left is not None:
            self.noticed("untouched", index, f"{left!r:.80}")
        elif picture is not None and not any(picture in value for value in values):
            self.noticed("unused", index, f"no {TAG} in any value")

    def _value(self, value: str, picture: str) -> str:
        """The value with the picture in the place of ``<image>``.

        A question with the image on the line after it: the reference puts the picture there and
        loses the break, "What?Picture 1: ...". The picture stands first here, as everywhere else.
        """
        if f"{TAG}\n" in value:
            return value.replace(f"{TAG}\n", picture)
        if f"\n{TAG}" not in value:
            return value
        if self.compat:
            return value.replace(f"\n{TAG}", picture)
        self.report.counts["mended"] += 1
        return picture + value.replace(f"\n{TAG}", "")
