"""Prompts of Qwen-VL: text and pictures become ids, pixels and the places of the pictures' rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmconvert.errors import RequestError
from mmconvert.runtime.pictures import Picture as PILImage
from mmconvert.runtime.pictures import open_picture, squared
from mmconvert.runtime.qwenvl.sizes import QUERIES, Sizes
from mmconvert.runtime.qwenvl.tokenizer import (
    END_TURN,
    IMAGE,
    IMAGE_END,
    SLOT,
    START_TURN,
    Tokenizer,
)

TAGS = re.compile(f"{re.escape(IMAGE)}(.*?){re.escape(IMAGE_END)}", re.DOTALL)
SYSTEM = "You are a helpful assistant."
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PictureOrFile = Path | PILImage


@dataclass(frozen=True)
class Prompt:
    """What goes into the model.

    Attributes:
        ids: (1, time).
        pixels: (n, 3, side, side), or None.
        slots: (n, 256, 2): row and index of the tokens that stand for the pictures' rows.
    """

    ids: Tensor
    pixels: Tensor | None
    slots: Tensor | None

    def rows(self, count: int, device: torch.device) -> Prompt:
        """The same prompt in several rows."""
        ids = self.ids.to(device).expand(count, -1)
        if self.pixels is None or self.slots is None:
            return Prompt(ids, None, None)
        step = torch.tensor([1, 0], device=device)
        slots = torch.cat([self.slots.to(device) + i * step for i in range(count)])
        return Prompt(ids, self.pixels.to(device).repeat(count, 1, 1, 1), slots)


def written(words: str, pictures: int) -> str:
    """A question with its pictures: each in the place of an ``<image>``, else before all words.

    Raises:
        RequestError: other numbers of pictures and of places.
    """
    marks = words.count("<image>")
    if marks not in (0, pictures):
        raise RequestError(f"{marks} <image> in the prompt, {pictures} pictures", "one for each")
    tags = [f"Picture {i + 1}: {IMAGE}{IMAGE_END}\n" for i in range(pictures)]
    if not marks:
        return "".join(tags) + words
    parts = re.split(r"<image>\n?", words)
    return parts[0] + "".join(tag + part for tag, part in zip(tags, parts[1:], strict=True))


def turn(role: str, text: str) -> str:
    """One turn of a conversation, in the form of a chat (ChatML)."""
    return f"{START_TURN}{role}\n{text}{END_TURN}\n"


def chat(text: str, system: str = SYSTEM) -> str:
    """A question as a chat model is asked it."""
    return f"{turn('system', system)}{turn('user', text)}{START_TURN}assistant\n"


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text; the path in each ``<img>...</img>`` becomes 256 places for rows."""
    bare = TAGS.sub(IMAGE + IMAGE_END, text)
    first, slot = tokenizer.special[IMAGE], tokenizer.special[SLOT]
    last, found = tokenizer.special[IMAGE_END], list[int]()
    for token in tokenizer.encode(bare):
        if token == last and found and found[-1] == first:
            found += [slot] * QUERIES
        found.append(token)
    return found


def slots_of(ids: Tensor, slot: int) -> Tensor:
    """(n, 256, 2): the places of whole pictures in (batch, time) ids, by rows.

    Raises:
        RequestError: a picture's places are not all there.
    """
    places = (ids == slot).nonzero()
    if len(places) % QUERIES:
        raise RequestError(
            f"{len(places)} places for rows of pictures", f"{QUERIES} for each picture"
        )
    return places.view(-1, QUERIES, 2)


def prompt(
    tokenizer: Tokenizer, sizes: Sizes, text: str, pictures: Sequence[PictureOrFile]
) -> Prompt:
    """A text in which each picture has its ``<img></img>``.

    Raises:
        RequestError: a picture that cannot be read, or ids that the model does not have.
    """
    ids = torch.tensor([encode(tokenizer, text)])
    if not ids.numel():
        raise RequestError("there is no question", "a prompt of at least one token")
    check_ids(ids, sizes)
    slots = slots_of(ids, tokenizer.special[SLOT])
    if len(slots) != len(pictures):
        raise RequestError(f"{len(slots)} pictures in the text, {len(pictures)} files")
    if not pictures:
        return Prompt(ids, None, None)
    pixels = torch.stack([pixels_of(picture, sizes) for picture in pictures])
    return Prompt(ids, pixels, slots)


def check_ids(ids: Tensor, sizes: Sizes) -> None:
    """Raises RequestError for a tokenizer of a larger vocabulary than the model's."""
    if int(ids.max()) >= sizes.vocab:
        raise RequestError(
            f"the tokenizer makes id {int(ids.max())}; the model has {sizes.vocab}",
            "the qwen.tiktoken of this very model",
        )


def pixels_of(picture: PictureOrFile, sizes: Sizes) -> Tensor:
    """(3, side, side) normalised; bicubic to a square, whatever the ratio.

    MindFormers turns a picture as EXIF says, the hub's code does not.
    """
    if isinstance(picture, Path):
        picture = open_picture(picture, upright=sizes.positions == "mindformers")
    data = bytearray(squared(picture, sizes.side).tobytes())
    x = torch.frombuffer(data, dtype=torch.uint8).view(sizes.side, sizes.side, 3)
    x = x.permute(2, 0, 1).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
