"""Videos and compressed sounds, decoded by PyAV (FFmpeg): the extra ``media``."""

# Some functions of PyAV and Pillow have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmconvert.errors import RequestError
from mmconvert.runtime.samples import AUDIO

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MOST_PIXELS = 89_478_485  # of a frame
LONGEST = 1 << 27  # samples of a sound: 46 minutes at 48 kHz
# What is decoded: FFmpeg also knows playlists, which name other files and addresses.
KINDS = (
    "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpeg", "mpegts",
    "mpegvideo", "flv", "live_flv", "asf", "mp3", "flac", "ogg", "wav", "w64", "aac", "ac3", "aiff",
    "au", "amr", "caf", "gif", "apng", "h264", "hevc", "ivf", "mjpeg",
)  # fmt: skip
ONLY = {"format_whitelist": ",".join(KINDS), "protocol_whitelist": "none"}
Choose = Callable[[int, float], list[int]]  # (frames, seconds) -> numbers of frames


@contextmanager
def _opened(path: Path, kind: str) -> Generator[tuple[Any, Any]]:
    """The file and its first stream of a kind (``video`` or ``audio``).

    Raises:
        RequestError: PyAV is not installed, or cannot read it.
    """
    try:
        import av
    except ImportError:
        raise RequestError(
            f"{path} needs a decoder, which is not installed",
            "PyAV for videos and compressed sounds",
            "pip install 'mmconvert[media]'; PCM WAV files and folders of pictures need none",
        ) from None
    try:
        with path.open("rb") as file, av.open(file, mode="r", options=ONLY) as box:
            streams = getattr(box.streams, kind)
            if not streams:
                raise RequestError(f"{path} has no {kind}", f"a file with {kind} in it")
            yield box, streams[0]
    except OSError as error:  # av's errors are of this kind, too
        reason = error.strerror or str(error)
        raise RequestError(f"{path} cannot be decoded: {reason}", f"a {kind} file") from None
    except (ValueError, IndexError, ArithmeticError) as error:
        raise RequestError(f"{path} cannot be decoded: {error}", f"a {kind} file") from None


def frames(path: Path, choose: Choose) -> list[Image.Image]:
    """The chosen frames of a video file, without sound.

    Args:
        choose: gets the number of frames and the length in seconds.

    Raises:
        RequestError: it is no video that can be decoded.
    """
    with _opened(path, "video") as (box, stream):
        count, seconds = _extent(box, stream)
    chosen = choose(count, seconds)
    times: dict[int, int] = {}
    for number in chosen:
        times[number] = times.get(number, 0) + 1
    found: list[Image.Image] = []
    with _opened(path, "video") as (box, stream):
        if stream.width * stream.height > MOST_PIXELS:
            raise RequestError(
                f"{path}: frames of {stream.width} x {stream.height} pixels",
                f"frames of at most {MOST_PIXELS} pixels",
            )
        for number, frame in enumerate(box.decode(stream)):
            if number in times:
                found += [frame.to_image()] * times[number]
            if number >= chosen[-1]:
                break
    if not found:
        raise RequestError(f"{path} has no frame that can be decoded", "a video file that is whole")
    return found + found[-1:] * (len(chosen) - len(found))


def _extent(box: Any, stream: Any) -> tuple[int, float]:  # noqa: ANN401 - PyAV's classes
    """(frames, seconds) of a video, counted where the file does not say."""
    count = int(stream.frames or 0)
    if not count:
        count = sum(1 for packet in box.demux(stream) if packet.size)
    rate = float(stream.average_rate or 0) or 25.0
    if stream.duration and stream.time_base:
        return count, float(stream.duration * stream.time_base)
    return count, count / rate


def sampled(count: int, seconds: float, rate: float, most: int) -> list[int]:
    """Numbers of frames, evenly spread from the first to the last: LLaMA-Factory's rule.

    Args:
        rate: frames a second that are taken.
        most: frames at most.
    """
    taken = max(1, min(count, most, max(1, math.floor(seconds * rate))))
    step = (count - 1) / (taken - 1) if taken > 1 else 0.0
    return [int(i * step) for i in range(taken)]


def middles(count: int, parts: int, first: int = 0) -> list[int]:
    """Numbers of the frames in the middle of equal parts of a video, as InternVL takes them."""
    size = count / parts
    return [first + min(count - 1, int(size / 2 + size * i)) for i in range(parts)]


def sounds(path: Path) -> bool:
    """Whether a video file has sound.

    Raises:
        RequestError: it cannot be read.
    """
    with _opened(path, "video") as (box, _):
        return bool(box.streams.audio)


def sound(path: Path) -> tuple[Tensor, int]:
    """(samples, samples a second) of a sound file or of a video's sound, channels averaged.

    Raises:
        RequestError: there is none that can be decoded.
    """
    with _opened(path, AUDIO) as (box, stream):
        import av

        rate = int(stream.rate or 0)
        plain = av.AudioResampler(format="flt", layout="mono", rate=rate or None)
        parts: list[Tensor] = []
        total = 0
        for frame in box.decode(stream):
            for piece in plain.resample(frame):
                parts.append(torch.from_numpy(piece.to_ndarray().reshape(-1).copy()))
                total += len(parts[-1])
            if total > LONGEST:
                raise RequestError(f"{path} is too long", f"at most {LONGEST} samples")
    if not total or not rate:
        raise RequestError(f"{path} holds no sound", "a sound file with samples in it")
    return torch.cat(parts), rate
