"""The sound of a video between its frames, as Qwen2.5-Omni takes it.

Source of the rule: ``Qwen2_5OmniProcessor`` of transformers, and LLaMA-Factory's ``qwen2_omni``
plugin, which MindSpeed-MM has: ``use_audio_in_video``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from mmconvert.errors import RequestError
from mmconvert.runtime import films
from mmconvert.runtime.pictures import frames_of
from mmconvert.runtime.samples import AUDIO, IMAGE, PLACE, VIDEO, Clip, Sample

FIX = "name a sound for each video in audios, with <audio> behind each <video>; or leave all out"


def chunks(moments: Sequence[float], size: int) -> list[int]:
    """How many tokens each chunk has.

    Args:
        moments: of the tokens, in order, in steps of the model's positions in time.
        size: steps of a chunk.
    """
    found, start = list[int](), 0
    for at, moment in enumerate(moments):
        if moment >= (len(found) + 1) * size:
            found.append(at - start)
            start = at
    return [*found, len(moments) - start]


def woven(frames: Sequence[int], sounds: Sequence[int]) -> list[int]:
    """0 for each token of a frame and 1 for each of the sound, chunk by chunk in turn."""
    both = zip_longest(frames, sounds, fillvalue=0)
    return [which for pair in both for which, count in enumerate(pair) for _ in range(count)]


def paired(sample: Sample) -> Sample:
    """The sample with the sound of each video in ``audios``, and no places for them.

    Sounds that are named are taken, one for each video; else those of the videos themselves. Where
    no video has one, the sample is as it was.

    Raises:
        RequestError: some videos have a sound and some have none.
    """
    if not sample.audios:
        own = [_has_sound(video) for video in sample.videos]
        if not any(own):
            return sample
        if not all(own):
            silent = sample.videos[own.index(False)]
            raise RequestError(
                f"{sample.name}: {silent} has no sound, others of its videos have",
                "videos with sound, or videos without",
            )
        return replace(sample, audios=sample.videos)
    for _, text in sample.messages:
        kinds = [m[1] for m in PLACE.finditer(text) if m[1] != IMAGE]
        ahead = [kinds[: i + 1].count(VIDEO) - kinds[: i + 1].count(AUDIO)
                 for i in range(len(kinds))]  # fmt: skip
        if kinds and (ahead[-1] or min(ahead) < 0):
            raise RequestError(
                f"{sample.name}: not every <video> is followed by an <audio>",
                "a sound for each video, as use_audio_in_video asks for",
                FIX,
            )
    messages = [(role, text.replace("<audio>", "")) for role, text in sample.messages]
    return replace(sample, messages=messages)


def _has_sound(video: Path | Clip) -> bool:
    path = video.path if isinstance(video, Clip) else video
    return frames_of(path) is None and films.sounds(path)
