"""Pictures, videos and sounds of a conversation: their tensors, and the ids that stand for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmconvert.errors import RequestError
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.inputs import audio_tokens
from mmconvert.runtime.media import Media
from mmconvert.runtime.pictures import open_picture
from mmconvert.runtime.samples import AUDIO, IMAGE, KINDS, VIDEO, Sample
from mmconvert.runtime.weaving import chunks, paired, woven
from mmconvert.runtime.words import Words

FILM = re.compile("<video>")
# Around a placeholder in InternVL's text; the other families have theirs in config.json.
INTERN_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")
Spelled = dict[str, list[list[int]]]  # by kind: the ids that stand for each file


class FileTensors(NamedTuple):
    """The tensors of a sample's files, as :class:`Batch` has them."""

    pixels: Tensor
    grid: Tensor
    image_rows: int
    features: Tensor
    lengths: Tensor
    seconds: Tensor | None
    woven: bool


class FileTokens:
    """Turns the files of a sample into tensors and ids."""

    def __init__(
        self, arch: Architecture, media: Media, words: Words, *, weave: bool = False
    ) -> None:
        self._arch, self._media, self._words = arch, media, words
        self._weave = weave
        if weave and arch.kind != "qwen2_5_omni":
            raise RequestError(
                "use_audio_in_video is asked for",
                "Qwen2.5-Omni, the only family that hears",
                "leave it out",
            )
        self._around: dict[str, tuple[list[int], int | None, list[int]]]
        if arch.intern:
            around = [words.special(word) for word in INTERN_TOKENS]
            arch.config.image_token_id = around[1]
            self._around = {"image": ([around[0]], around[1], [around[2]])}
        else:
            self._around = {kind: self._tokens(kind) for kind in KINDS}

    def _tokens(self, kind: str) -> tuple[list[int], int | None, list[int]]:
        before, after = self._arch.around(kind)
        return before, self._arch.token(f"{kind}_token_id"), after

    def read(self, sample: Sample) -> tuple[Sample, FileTensors, Spelled]:
        """A sample with places for all it has, the tensors of its files, as ``assemble`` takes
        them, and the ids that stand for each file.
        """
        woven = self._weave and bool(sample.videos) and self._arch.kind == "qwen2_5_omni"
        if woven:
            sample = paired(sample)
            woven = bool(sample.audios)
        seconds: list[float] = []
        tokens: Spelled = {kind: [] for kind in KINDS}
        parts: list[tuple[Tensor, Tensor]] = []
        if sample.images:
            pictures = [open_picture(i) if isinstance(i, Path) else i for i in sample.images]
            pixels, grid, counts = self._media.images(pictures)
            parts.append((pixels, grid))
            tokens["image"] = [self._spelled("image", count) for count in counts]
        sounds = [self._media.sound(path) for path in sample.audios]
        if sounds and self._arch.kind != "qwen2_5_omni":
            raise RequestError(
                f"{sample.name} has a sound", "Qwen2.5-Omni, the only family that hears"
            )
        if sample.videos and self._arch.kind == "glm4v":
            self._pairs(sample, parts, tokens)
        elif sample.videos and self._arch.intern:
            sample = self._stills(sample, parts, tokens)
        elif sample.videos:
            seconds = self._films(sample, parts, tokens, sounds if woven else ())
        if not woven:
            tokens[AUDIO] = [self._spelled(AUDIO, audio_tokens(s.shape[1])) for s in sounds]
        empty = self._no_pixels()
        tensors = FileTensors(
            torch.cat([p for p, _ in parts]) if parts else empty,
            torch.cat([g for _, g in parts]) if parts else torch.zeros(0, 3, dtype=torch.int64),
            sum(
                i == self._arch.image_token()
                for each in tokens.values()
                for ids in each
                for i in ids
            ),
            torch.cat(sounds, dim=1) if sounds else torch.zeros(self._mel(), 0),
            torch.tensor([s.shape[1] for s in sounds], dtype=torch.int64),
            torch.tensor(seconds) if seconds else None,
            woven,
        )
        return sample, tensors, tokens

    def _films(
        self,
        sample: Sample,
        parts: list[tuple[Tensor, Tensor]],
        tokens: Spelled,
        sounds: Sequence[Tensor] = (),
    ) -> list[float]:
        """Adds the frames of videos, with sounds between them if there are any; the seconds from
        one row of each grid to the next.
        """
        seconds: list[float] = []
        for number, video in enumerate(sample.videos):
            frames, times, each = self._media.frames(video)
            pixels, grid, count = self._media.video(frames)
            parts.append((pixels, grid))
            seconds.append(self._arch.config.vision_config.temporal_patch_size * each)
            if sounds:
                heard = audio_tokens(sounds[number].shape[1])
                tokens["video"].append(self._woven(grid, count, seconds[-1], heard))
                continue
            if not self._arch.timed:
                tokens["video"].append(self._spelled("video", count))
                continue
            pairs = zip(times[::2], [*times, times[-1]][1::2], strict=False)  # frames go in twos
            each = self._spelled("video", count // int(grid[0, 0]))
            told = [[*self._words.ids(f"<{(a + b) / 2:.1f} seconds>"), *each] for a, b in pairs]
            tokens["video"].append([i for ids in told for i in ids])
        return seconds

    def _woven(self, grid: Tensor, count: int, seconds: float, heard: int) -> list[int]:
        """The ids of a video with its sound: chunks of both in turn, frames first."""
        config, rows = self._arch.config, int(grid[0, 0])
        rate = config.position_id_per_seconds
        size = int(rate * config.seconds_per_chunk)
        places = [self._place(kind) for kind in (VIDEO, AUDIO)]
        moments = [row * seconds * rate for row in range(rows) for _ in range(count // rows)]
        middle = woven(chunks(moments, size), chunks(range(heard), size))
        around = [self._around[kind] for kind in (VIDEO, AUDIO)]
        before = [i for ids, _, _ in around for i in ids]
        after = [i for _, _, ids in reversed(around) for i in ids]
        return [*before, *(places[which] for which in middle), *after]

    def _spelled(self, kind: str, count: int) -> list[int]:
        """The ids of a file of so many rows."""
        before, _, after = self._around[kind]
        return [*before, *[self._place(kind)] * count, *after]

    def _place(self, kind: str) -> int:
        """The id that stands for one row of a file."""
        place = self._around[kind][1]
        if place is None:
            raise RequestError(f"the model takes no {kind}", "files that it takes")
        return place

    def _pairs(self, sample: Sample, parts: list[tuple[Tensor, Tensor]], tokens: Spelled) -> None:
        """GLM's videos: each pair of frames is a picture of its own, with its second behind it.

        Source: ``Glm4vProcessor`` and ``Glm4vModel`` of transformers: the ids, the grid and the
        positions of a pair are those of a picture.
        """
        _one_of_both(sample)
        for video in sample.videos:
            frames, times, _ = self._media.frames(video)
            pixels, grid, count = self._media.video(frames)
            rows, height, width = (int(size) for size in grid[0])
            parts.append((pixels, torch.tensor([[1, height, width]] * rows)))
            before, _, after = self._around[VIDEO]
            each = self._spelled(IMAGE, count // rows)
            told = [[*each, *self._words.ids(str(int(second)))] for second in times[::2]]
            tokens[VIDEO].append([*before, *(i for ids in told for i in ids), *after])

    def _stills(
        self, sample: Sample, parts: list[tuple[Tensor, Tensor]], tokens: Spelled
    ) -> Sample:
        """InternVL's videos: each frame is a picture of one tile, and is numbered in the text."""
        _one_of_both(sample)
        counts: list[int] = []
        for video in sample.videos:
            frames = self._media.frames(video).pictures
            pixels, grid, each = self._media.stills(frames)
            parts.append((pixels, grid))
            tokens["image"] += [self._spelled("image", count) for count in each]
            counts.append(len(frames))

        def numbered(found: re.Match[str]) -> str:
            del found
            count = counts.pop(0) if counts else 0
            return "\n".join(f"Frame{i + 1}: <image>" for i in range(count))

        messages = [(role, FILM.sub(numbered, text)) for role, text in sample.messages]
        return replace(sample, messages=messages, videos=())

    def _mel(self) -> int:
        audio = getattr(self._arch.config, "audio_config", None)
        return 1 if audio is None else int(audio.num_mel_bins)

    def _no_pixels(self) -> Tensor:
        """Pixels of no picture, in the shape that pictures have."""
        vision = self._arch.config.vision_config
        if self._arch.intern:
            return torch.zeros(0, vision.num_channels, *vision.image_size)
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        return torch.zeros(0, channels * vision.temporal_patch_size * vision.patch_size**2)


def _one_of_both(sample: Sample) -> None:
    """Raises RequestError for pictures beside a video, where both have the same placeholder."""
    if sample.images:
        raise RequestError(
            f"{sample.name} has pictures and a video", "one of both, as this model takes them"
        )
