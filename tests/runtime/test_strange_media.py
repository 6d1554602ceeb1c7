"""Pictures and videos of strangers: odd, damaged or huge files are read, or named in one error."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from mmconvert.errors import RequestError
from mmconvert.runtime.pictures import frames_of, open_picture
from mmconvert.runtime.sounds import read_sound


def saved(form: str, size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    raw = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(raw, form, **options)  # pyright: ignore[reportArgumentType]
    return raw.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file (PNG specification, 5.3)."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(kind: bytes, data: bytes, *, last: bool = False) -> bytes:
    """A sound picture with one more chunk, before its pixels or after them."""
    whole = saved("PNG")
    at = len(whole) - 12 if last else 33
    return whole[:at] + chunk(kind, data) + whole[at:]


LONG = zlib.compress(b"x" * (3 << 20))
SOUND: dict[str, bytes] = {
    "zTXt": png(b"zTXt", b"Comment\0\0" + LONG),
    "zTXt after the pixels": png(b"zTXt", b"Comment\0\0" + LONG, last=True),
    "iTXt": png(b"iTXt", b"Comment\0\1\0\0\0" + LONG),
    "iCCP": png(b"iCCP", b"profile\0\0" + LONG),
    "tEXt": png(b"tEXt", b"Comment\0" + b"x" * (3 << 20)),
}
BOMB = zlib.compress(b"x" * (80 << 20))


@pytest.mark.parametrize("data", SOUND.values(), ids=SOUND.keys())
@pytest.mark.parametrize("opened", [open_picture, lambda path: (frames_of(path) or [])[0]])
def test_long_texts_in_a_sound_picture(
    data: bytes, opened: Callable[[Path], Image.Image], tmp_path: Path
) -> None:
    """Pillow refuses more than 1 MiB of text by itself; the pixels are what counts."""
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(saved("PNG"))
    assert opened(tmp_path / "a.png").size == open_picture(tmp_path / "b.png").size == (64, 48)


def gif(frames: int) -> bytes:
    raw = io.BytesIO()
    made = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(frames)]
    made[0].save(raw, "GIF", save_all=True, append_images=made[1:])
    return raw.getvalue()


def huge(form: bytes) -> bytes:
    """A header that asks for 60,000 x 60,000 pixels."""
    if form == b"GIF":
        return (
            b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"," + bytes(9) + b"\2\0;"
        )
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "text": b"no picture\n" * 100,
    "half a JPEG": saved("JPEG")[:900],
    "half a PNG": saved("PNG")[:2000],
    "half a WebP": saved("WEBP")[:300],
    "a text of 80 MiB": png(b"zTXt", b"Comment\0\0" + BOMB),
    "a profile of 80 MiB": png(b"iCCP", b"profile\0\0" + BOMB),
    "a chunk without a checksum": saved("PNG")[:33] + b"\0\0\0\4tEXtabcd\0\0\0\0",
    "a chunk of no size": saved("PNG")[:33] + b"\xff\xff\xff\xffIDAT",
    "a huge PNG": huge(b"PNG"),
    "a huge GIF": huge(b"GIF"),
    "a GIF without pictures": b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";",
    "an MP4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2mp41" + bytes(100),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_one_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(RequestError, match=r"a\.png: "):
        open_picture(tmp_path / "a.png")
    try:
        frames = frames_of(tmp_path / "a.png")
    except RequestError as error:
        assert "a.png: " in str(error)  # noqa: PT017 - None is as good: it is no animation
    else:
        assert frames is None


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "JPEG", "BMP", "TIFF"])
def test_any_damage_gives_frames_or_one_error(form: str, tmp_path: Path) -> None:
    whole = gif(5) if form == "GIF" else saved(form)
    for seed in range(150):
        data = bytearray(whole)
        for step in range(1 + seed % 3):
            data[(seed * 7919 + step * 104_729) % min(len(data), 400)] ^= 1 << seed % 8
        (tmp_path / "a").write_bytes(data)
        for opened in (open_picture, frames_of):
            with suppress(RequestError):
                opened(tmp_path / "a")


def wav(*, channels: int = 1, rate: int = 16000, bits: int = 16, data: bytes = bytes(64)) -> bytes:
    """A PCM WAV file whose header says what it is told to."""
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * block % 2**32, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head
    body += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


SOUNDS = {
    "a rate of 0": wav(rate=0),
    "a rate of 1": wav(rate=1, data=bytes(1 << 20)),
    "no channel": wav(channels=0),
    "a header alone": wav()[:30],
    "nothing in it": wav(data=b""),
    "empty": b"",
}


@pytest.mark.parametrize("data", SOUNDS.values(), ids=SOUNDS.keys())
def test_damaged_sounds_are_one_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(RequestError, match=r"a\.wav"):
        read_sound(tmp_path / "a.wav")
