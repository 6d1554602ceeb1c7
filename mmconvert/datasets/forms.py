"""The forms that annotations are brought to.

MLLM      {"images": [path], "messages": [{"role": "user" or "assistant", "content"}]}, and
"videos" and "audios" where there are some
(MindSpeed-MM's ``llava_instruct_2_mllm_demo_format.py``, 2.0.0)
Qwen-VL   the item without "image"; in the values "Picture 1: <img>path</img>" stands for it
(MindFormers' ``research/qwenvl/data_convert.py``, 1.3.1)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mmconvert.datasets.jsonlist import Item
from mmconvert.datasets.llava import MEDIA, TAG, Converter, Images

PLACE = re.compile(f"{TAG}\n?")


class ToMLLM(Converter):
    """LLaVA to the MLLM form."""

    ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant"}

    def convert(self, item: Item, index: int) -> Item | None:
        """See :meth:`Converter.convert`. Text-only items have no images."""
        turns = self.turns(item, index)
        media: dict[str, list[str]] = {}
        for kind in MEDIA:
            paths = self.found(item, index, kind)
            if paths is None:
                return None
            media[kind] = paths
        messages: list[Item] = []
        for number, turn in enumerate(turns):
            role = self.ROLES.get(turn["from"])
            if role is None:
                where = f", turn {number}: from is {turn['from']!r:.80}"
                self.fail(index, where, "human or gpt", "rename the role, or leave out the item")
            messages.append({"role": role, "content": turn["value"]})
        for kind, paths in media.items():
            tag = f"<{kind[:-1]}>"
            tags = sum(turn["value"].count(tag) for turn in turns)
            if tags != len(paths):
                self.noticed("tags", index, f"{tags} {tag}, {len(paths)} {kind}")
            self.report.counts[kind] += bool(paths)
        if not any(media.values()):
            self.report.counts["text_only"] += 1
        more = {kind: paths for kind, paths in media.items() if paths and kind != "images"}
        return {"images": media["images"], **more, "messages": messages}


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
        paths = self.found(item, index, "images")
        if paths is None:
            return None
        others = [n for kind in ("videos", "audios") for n in self.files_of(item, index, kind)]
        if others:
            self.noticed("media", index, f"{others[0]!r:.80}")
        pictures = [self._picture(path, number, index) for number, path in enumerate(paths, 1)]
        if paths:
            self.report.counts["images"] += 1
        elif self.compat and not others:
            what = " has no image; the reference fails here"
            self.fail(index, what, "an image in every item", "leave out --compat")
        elif not others:
            self.report.counts["text_only"] += 1
        new_turns: list[Item] = []
        left = iter(pictures)
        for number, turn in enumerate(turns):
            role = turn["from"]
            if role not in self._roles and role not in self._roles.values():
                self.noticed("roles", index, f"turn {number} is from {role!r:.80}")
            value = self._value(turn["value"], pictures, left)
            new_turns.append(turn | {"from": self._roles.get(role, role), "value": value})
        self._check_values(new_turns, pictures, index)
        new = item | {"conversations": new_turns}
        new.pop("image", None)
        if not self.compat:
            new.pop("images", None)
        return new

    def _picture(self, path: str, number: int, index: int) -> str:
        if not self.compat and any(sign in path for sign in ("<img>", "</img>", "\n")):
            self.fail(index, f": image is {path!r:.80}", "a name without <img>, </img> or a break")
        return f"Picture {number}: <img>{path}</img>\n"

    def _check_values(self, turns: list[Item], pictures: list[str], index: int) -> None:
        """Every ``<image>`` has become a picture, and every picture is there."""
        values = [turn["value"] for turn in turns]
        left = next((value for value in values if TAG in value), None)
        if left is not None:
            self.noticed("untouched", index, f"{left!r:.80}")
        elif not all(any(picture in value for value in values) for picture in pictures):
            few = "no" if len(pictures) == 1 else f"fewer than {len(pictures)}"
            self.noticed("unused", index, f"{few} {TAG} in any value")

    def _value(self, value: str, pictures: list[str], left: Iterator[str]) -> str:
        """The value with pictures in the places of ``<image>``.

        Of several pictures (``left``: those that have no place yet) each place takes the next.
        A question with the image on the line after it: the reference puts the picture there and
        loses the break, "What?Picture 1: ...". The picture stands first here, as everywhere else.
        """
        if len(pictures) != 1:
            return PLACE.sub(lambda found: next(left, found[0]), value)
        (picture,) = pictures
        if f"{TAG}\n" in value:
            return value.replace(f"{TAG}\n", picture)
        if f"\n{TAG}" not in value:
            return value
        if self.compat:
            return value.replace(f"\n{TAG}", picture)
        self.report.counts["mended"] += 1
        return picture + value.replace(f"\n{TAG}", "")
