"""Videos and sounds of the tests' own, encoded by PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

av: Any = pytest.importorskip("av")


def film(path: Path, grey: list[int], *, rate: int = 10, pitch: float = 0) -> Path:
    """A video whose frames have one grey each, with a tone of a second if there is a pitch."""
    with av.open(str(path), "w") as box:
        video = box.add_stream("mpeg4", rate=rate)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = box.add_stream("aac", rate=44100) if pitch else None
        for value in grey:
            picture = np.full((48, 64, 3), value, np.uint8)
            for packet in video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                box.mux(packet)
        for packet in video.encode():
            box.mux(packet)
        if audio is not None:
            _sing(box, audio, pitch, 44100)
    return path


def song(path: Path, codec: str, pitch: float, rate: int) -> Path:
    """A tone of a second."""
    with av.open(str(path), "w") as box:
        _sing(box, box.add_stream(codec, rate=rate), pitch, rate)
    return path


def _sing(box: Any, stream: Any, pitch: float, rate: int) -> None:
    time = np.arange(rate) / rate
    tone = (0.3 * np.sin(2 * np.pi * pitch * time) * 32767).astype(np.int16)[None]
    frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
    frame.rate = rate
    ready = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate)
    for part in ready.resample(frame):
        for packet in stream.encode(part):
            box.mux(packet)
    for packet in stream.encode():
        box.mux(packet)
