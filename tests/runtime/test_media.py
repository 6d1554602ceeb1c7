"""Pictures, videos and sounds of data files: sizes, frames and samples as the references have."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import talking
from mmconvert.errors import RequestError
from mmconvert.runtime import films
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.families import architecture
from mmconvert.runtime.media import Media
from mmconvert.runtime.pictures import frames_of, open_picture, scaled
from mmconvert.runtime.prepare import Prepare, Tiling
from mmconvert.runtime.samples import Clip, Sample
from mmconvert.runtime.sounds import RATE, read_sound, resampled
from mmconvert.runtime.tiles import tiles


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 1000), (512, 512)), ((20, 20), (28, 28)), ((3000, 10), (3000, 28)),
     ((640, 480), (591, 443)), ((9000, 28), (5040, 28)), ((28, 9000), (28, 5040)),
     ((300, 200), (300, 200))],
)  # fmt: skip
def test_pictures_get_the_sizes_that_mindspeed_gives_them(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Sizes that its mm_plugin.py gave with image_max_pixels 262144."""
    assert scaled(Image.new("RGB", size), 0, 262144).size == expected


def test_a_picture_below_the_least_grows() -> None:
    assert scaled(Image.new("RGB", (40, 30)), 4800, 0).size == (80, 60)


def test_pictures_are_scaled_by_nearest_neighbour(tmp_path: Path) -> None:
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    values = set(np.asarray(scaled(board, 0, 45 * 45)).flatten().tolist())
    assert values == {0, 255}  # no other filter keeps them


def test_a_turn_of_exif_is_not_made(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (60, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (60, 30)


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png(*, size: tuple[int, int] = (8, 8), extra: bytes = b"") -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((8, 8)).convert("RGB").save(out, "PNG")
    raw = out.getvalue()
    head = raw[16:29].replace(struct.pack(">II", 8, 8), struct.pack(">II", *size))
    return raw[:8] + chunk(b"IHDR", head) + extra + raw[33:]


def test_a_picture_with_a_long_comment_is_read(tmp_path: Path) -> None:
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (3 << 20)))
    (tmp_path / "a.png").write_bytes(png(extra=comment))
    assert open_picture(tmp_path / "a.png").size == (8, 8)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(png()[:60]), "truncated|broken"),
    "too large": (lambda p: p.write_bytes(png(size=(20000, 20000))), "20000 x 20000|exceeds limit"),
    "no picture": (lambda p: p.write_bytes(b"hello"), "not a picture"),
    "a huge comment": (
        lambda p: p.write_bytes(
            png(extra=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (80 << 20))))
        ),
        "too large",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_picture_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    write, expected = BAD[name]
    write(tmp_path / "a.png")
    with pytest.raises(RequestError, match=rf"a\.png: .*({expected})"):
        open_picture(tmp_path / "a.png")


def test_frames_come_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 1, 2, 100):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    frames = frames_of(tmp_path)
    assert frames is not None
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [1, 2, 9, 10, 100]  # type: ignore[index]


def test_frames_are_spread_as_llama_factory_spreads_them() -> None:
    assert films.sampled(20, 2.0, 2.0, 64) == [0, 6, 12, 19]
    assert films.sampled(20, 100.0, 2.0, 4) == [0, 6, 12, 19]
    assert films.sampled(3, 100.0, 2.0, 64) == [0, 1, 2]
    assert films.sampled(7, 0.1, 2.0, 64) == [0]
    for count in (5, 17, 100):  # numpy's own line
        for parts in (2, 3, 5):
            line = np.linspace(0, count - 1, parts).astype(np.int32).tolist()
            assert films.sampled(count, 1e9, 2.0, parts) == line


def test_a_video_file_gives_its_frames_and_its_sound(tmp_path: Path) -> None:
    filming = pytest.importorskip("filming")
    path = filming.film(tmp_path / "a.mp4", [i * 10 for i in range(20)], pitch=440)
    chosen = films.frames(path, lambda count, seconds: films.sampled(count, seconds, 2.0, 64))
    greys = [frame.getpixel((30, 20))[0] for frame in chosen]  # type: ignore[index]
    assert greys == pytest.approx([0, 60, 120, 190], abs=5)
    heard = read_sound(path)
    assert len(heard) == pytest.approx(RATE, rel=0.06)
    tone = torch.fft.rfft(heard[2000:12000]).abs().argmax()
    assert int(tone) * RATE / 10000 == pytest.approx(440, abs=2)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.flac", "flac"), ("a.mp3", "mp3"), ("a.ogg", "opus")]
)
def test_compressed_sounds_are_decoded(name: str, codec: str, tmp_path: Path) -> None:
    filming = pytest.importorskip("filming")
    try:
        path = filming.song(tmp_path / name, codec, 880, 48000)
    except (ValueError, OSError) as error:
        pytest.skip(f"no encoder: {error}")
    heard = read_sound(path)
    tone = torch.fft.rfft(heard[2000:12000]).abs().argmax()
    assert int(tone) * RATE / 10000 == pytest.approx(880, abs=2)


def test_a_playlist_is_no_video(tmp_path: Path) -> None:
    """It would name other files, and addresses."""
    filming = pytest.importorskip("filming")
    filming.film(tmp_path / "a.mp4", [0, 9])
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "list.m3u8"):
        with pytest.raises(RequestError, match="cannot be decoded"):
            films.frames(tmp_path / name, lambda count, seconds: [0])


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_sounds_are_resampled_without_loss_or_folding(rate: int) -> None:
    time = torch.arange(rate).double() / rate
    tone = torch.sin(2 * torch.pi * 1000 * time) + 0.4 * torch.sin(2 * torch.pi * 3000 * time)
    got = resampled(tone.float(), rate)
    assert len(got) == RATE
    there = torch.arange(RATE).double() / RATE
    same = torch.sin(2 * torch.pi * 1000 * there) + 0.4 * torch.sin(2 * torch.pi * 3000 * there)
    assert float((got - same)[1000:-1000].abs().max()) < 1e-5
    if rate > 2 * 10000:  # above 8 kHz nothing may come back from elsewhere
        high = torch.sin(2 * torch.pi * 10000 * time).float()
        assert float(resampled(high, rate)[1000:-1000].abs().max()) < 1e-4


def test_a_rate_that_no_filter_bank_fits_is_taken_nearly() -> None:
    assert len(resampled(torch.zeros(44101), 44101)) == pytest.approx(RATE, abs=2)


# ----------------------------------------------------------------------------------- InternVL
@pytest.mark.parametrize(
    ("size", "most", "shape"),
    [((448, 448), 6, (1, 1)), ((896, 448), 6, (2, 1)), ((800, 1333), 6, (2, 3)),
     ((100, 100), 6, (1, 1)), ((1000, 1000), 6, (2, 2)), ((2000, 500), 12, (4, 1)),
     ((3000, 100), 6, (6, 1))],
)  # fmt: skip
def test_a_picture_is_cut_by_its_shape(
    size: tuple[int, int], most: int, shape: tuple[int, int]
) -> None:
    """Shapes by hand from the rule: the nearest ratio, of equals the larger if there are pixels."""
    picture = Image.new("RGB", size)
    cut = tiles(picture, 448, Tiling(dynamic=True), most)
    assert len(cut) == shape[0] * shape[1]


def test_tiles_are_cut_row_by_row_and_the_thumbnail_is_last() -> None:
    picture = Image.new("RGB", (64, 96))
    for number in range(6):
        colour = (number * 40, 0, 0)
        picture.paste(colour, ((number % 2) * 32, number // 2 * 32, (number % 2 + 1) * 32, 96))
    cut = tiles(picture, 32, Tiling(dynamic=True, thumbnail=True), 6)
    assert [tile.getpixel((16, 16))[0] for tile in cut[:6]] == [0, 40, 80, 120, 160, 200]  # type: ignore[index]
    assert len(cut) == 7
    assert cut[6].size == (32, 32)


def test_a_picture_is_padded_to_a_square() -> None:
    (tile,) = tiles(Image.new("RGB", (64, 32), "red"), 32, Tiling(square=True), 1)
    assert tile.getpixel((16, 2)) == (123, 116, 103)
    assert tile.getpixel((16, 16)) == (255, 0, 0)


@pytest.fixture(scope="module")
def intern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.make("intern-qwen2", tmp_path_factory.mktemp("intern") / "hf")


def test_internvl_counts_its_tiles_and_numbers_its_frames(intern: Path, tmp_path: Path) -> None:
    arch = architecture(intern)
    speaker = Speaker(arch, intern, Prepare(tiling=Tiling(True, True, 1, 6), video_frames=3))
    wide = tmp_path / "wide.png"
    Image.new("RGB", (200, 100), "red").save(wide)
    one = speaker.batch(Sample([("user", "<image>\nQ"), ("assistant", "A")], [wide]), answer=False)
    assert one.patches == 3  # two tiles and the thumbnail
    assert int((one.ids == arch.image_token()).sum()) == 3 * 4
    both = Sample([("user", "<image><image>\nQ"), ("assistant", "A")], [wide, wide])
    assert speaker.batch(both, answer=False).patches == 6  # of at most three tiles each
    folder = tmp_path / "film"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (60, 30)).save(folder / f"{number}.png")
    said = [("user", "<video>\nQ"), ("assistant", "A")]
    film = speaker.batch(Sample(said, videos=[folder]), answer=False)
    assert film.patches == 3  # a tile each
    kept = [i for i in film.ids[0].tolist() if i != arch.image_token()]
    assert "Frame1: \nFrame2: \nFrame3: \nQ" in speaker.words(kept)


def test_internvl_takes_the_middles_of_equal_parts(intern: Path, tmp_path: Path) -> None:
    filming = pytest.importorskip("filming")
    path = filming.film(tmp_path / "a.mp4", [i * 10 for i in range(20)])
    media = Media(architecture(intern), intern, Prepare(video_frames=4))
    frames, times, each = media.frames(path)
    greys = [f.getpixel((30, 20))[0] for f in frames]  # type: ignore[index]
    assert greys == pytest.approx([20, 70, 120, 170], abs=5)
    assert times == pytest.approx([0.2, 0.7, 1.2, 1.7])
    assert each == pytest.approx(0.5)
    part, *_ = media.frames(Clip(path, 1.0, 1.4))  # frames 10 to 13
    assert [f.getpixel((30, 20))[0] for f in part] == pytest.approx([100, 110, 120, 130], abs=5)  # type: ignore[index]


# -------------------------------------------------------------------------------------- texts
def test_the_form_of_internlm2_chat(intern: Path) -> None:
    speaker = Speaker(architecture(intern), intern, Prepare(template="internlm2-chat"))
    sample = Sample([("user", "Hi"), ("assistant", "Yes."), ("user", "So?"), ("assistant", "No.")])
    batch = speaker.batch(sample, answer=False)
    text = speaker.tokenizer.decode(batch.ids[0])
    assert text.startswith("<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的")
    turns = "user\nHi<|im_end|><|im_start|>assistant\nYes.<|im_end|><|im_start|>user\nSo?<|im_end|>"
    assert text.endswith(f"<|im_end|><|im_start|>{turns}<|im_start|>assistant\nNo.<|im_end|>")
    learnt = batch.ids[0][batch.labels[0] != -100].tolist()
    assert speaker.tokenizer.decode(learnt) == "Yes.<|im_end|>No.<|im_end|>"
