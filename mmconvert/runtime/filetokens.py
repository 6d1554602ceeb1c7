"""Pictures, videos and sounds of a conversation: their tensors, and the ids that stand for them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmconvert.errors import RequestError
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.inputs import audio_tokens
from mmconvert.runtime.media import Media
from mmconvert.runtime.pictures import open_picture
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.words import Words

VIDEO = re.compile("<video>")
# Around a placeholder in InternVL's text; the other families have theirs in config.json.
INTERN_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")
Spelled = dict[str, list[list[int]]]  # by kind: the ids that stand for each file


class FileTokens:
    """Turns the files of a sample into tensors and ids."""

    def __init__(self, arch: Architecture, media: Media, words: Words) -> None:
        self._arch, self._media, self._words = arch, media, words
        self._around: dict[str, tuple[list[int], int | None, list[int]]]
        if arch.intern:
            around = [words.special(word) for word in INTERN_TOKENS]
            arch.config.image_token_id = around[1]
            self._around = {"image": ([around[0]], around[1], [around[2]])}
        else:
            self._around = {kind: self._tokens(kind) for kind in ("image", "video", "audio")}

    def _tokens(self, kind: str) -> tuple[list[int], int | None, list[int]]:
        before, after = self._arch.around(kind)
        return before, self._arch.token(f"{kind}_token_id"), after

    def read(
        self, sample: Sample
    ) -> tuple[Sample, tuple[Tensor, Tensor, int, Tensor, Tensor], Spelled]:
        """A sample with places for all it has, the tensors of its files, as ``assemble`` takes
        them, and the ids that stand for each file.
        """
        tokens: Spelled = {"image": [], "video": [], "audio": []}
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
            raise RequestError(
                f"{sample.name} has a video",
                "pictures: videos of GLM-4.1V, whose frames stand apart in the text, are not taken",
            )
        if sample.videos and self._arch.intern:
            sample = self._stills(sample, parts, tokens)
        elif sample.videos:
            self._films(sample, parts, tokens)
        tokens["audio"] = [self._spelled("audio", audio_tokens(s.shape[1])) for s in sounds]
        empty = self._no_pixels()
        tensors = (
            torch.cat([p for p, _ in parts]) if parts else empty,
            torch.cat([g for _, g in parts]) if parts else torch.zeros(0, 3, dtype=torch.int64),
            sum(i == self._arch.image_token() for ids in tokens["image"] for i in ids),
            torch.cat(sounds, dim=1) if sounds else torch.zeros(self._mel(), 0),
            torch.tensor([s.shape[1] for s in sounds], dtype=torch.int64),
        )
        return sample, tensors, tokens

    def _films(
        self,
        sample: Sample,
        parts: list[tuple[Tensor, Tensor]],
        tokens: Spelled,
    ) -> None:
        """Adds the frames of videos."""
        for video in sample.videos:
            frames, times = self._media.frames(video)
            pixels, grid, count = self._media.video(frames)
            parts.append((pixels, grid))
            if not self._arch.timed:
                tokens["video"].append(self._spelled("video", count))
                continue
            pairs = zip(times[::2], [*times, times[-1]][1::2], strict=False)  # frames go in twos
            each = self._spelled("video", count // int(grid[0, 0]))
            told = [[*self._words.ids(f"<{(a + b) / 2:.1f} seconds>"), *each] for a, b in pairs]
            tokens["video"].append([i for ids in told for i in ids])

    def _spelled(self, kind: str, count: int) -> list[int]:
        """The ids of a file of so many rows."""
        before, place, after = self._around[kind]
        if place is None:
            raise RequestError(f"the model takes no {kind}", "files that it takes")
        return [*before, *[place] * count, *after]

    def _stills(
        self, sample: Sample, parts: list[tuple[Tensor, Tensor]], tokens: Spelled
    ) -> Sample:
        """InternVL's videos: each frame is a picture of one tile, and is numbered in the text."""
        if sample.images:
            raise RequestError(
                f"{sample.name} has pictures and a video", "one of both, as InternVL takes them"
            )
        counts: list[int] = []
        for video in sample.videos:
            frames, _ = self._media.frames(video)
            pixels, grid, each = self._media.stills(frames)
            parts.append((pixels, grid))
            tokens["image"] += [self._spelled("image", count) for count in each]
            counts.append(len(frames))

        def numbered(found: re.Match[str]) -> str:
            del found
            count = counts.pop(0) if counts else 0
            return "\n".join(f"Frame{i + 1}: <image>" for i in range(count))

        messages = [(role, VIDEO.sub(numbered, text)) for role, text in sample.messages]
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
