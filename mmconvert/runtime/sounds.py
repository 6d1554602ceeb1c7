"""Sounds as samples at 16 kHz: PCM WAV by Python itself, other files by the decoder of videos."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
import struct
import wave
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.errors import RequestError
from mmconvert.runtime import films

RATES = (1000, 1_000_000)  # of a WAV file; a slower one would grow without bounds
RATE = 16000  # samples a second that the audio encoder knows
ZEROS = 32  # zero crossings of the filter on each side
BETA = 12.0  # of its Kaiser window: what folds back is 118 dB below
PASSED = 0.95  # of the lower Nyquist frequency: what the filter lets pass
FINEST = 1000  # the ratio of two rates is taken as one of numbers up to this
LONGEST = 1 << 28  # bytes of a file's samples


def read_sound(path: Path) -> Tensor:
    """Samples in [-1, 1] at 16 kHz, channels averaged.

    Raises:
        RequestError: the file is no sound that can be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", "a sound file") from None
    if head[:4] == b"RIFF" and head[8:] == b"WAVE" and (found := _pcm(path)) is not None:
        return resampled(*found)
    return resampled(*films.sound(path))


def _pcm(path: Path) -> tuple[Tensor, int] | None:
    """(samples, samples a second) of a PCM WAV file; None if its samples are of another kind."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = bytearray(file.readframes(LONGEST // max(1, width * channels)))
    except (OSError, EOFError, ArithmeticError, struct.error) as error:
        raise RequestError(f"{path} cannot be read: {error}", "a PCM WAV file") from None
    except wave.Error:
        return None
    kinds = {
        1: (torch.uint8, 128.0, 128.0),
        2: (torch.int16, 0.0, 32768.0),
        4: (torch.int32, 0.0, 2.0**31),
    }
    if width not in kinds:
        return None
    if not RATES[0] <= rate <= RATES[1]:
        raise RequestError(f"{path}: {rate} samples a second", f"{RATES[0]} to {RATES[1]} of them")
    if not raw or channels < 1:
        raise RequestError(f"{path}: no samples in it", "a sound file with samples in it")
    dtype, zero, most = kinds[width]
    raw = raw[: len(raw) // (width * channels) * width * channels]
    samples = torch.frombuffer(raw, dtype=dtype).float()
    return ((samples - zero) / most).view(-1, channels).mean(1), rate


def resampled(samples: Tensor, rate: int) -> Tensor:
    """Samples at 16 kHz, by a polyphase filter: a sinc in a Kaiser window.

    Args:
        samples: (n,).
        rate: samples a second.
    """
    ratio = Fraction(rate, RATE)
    if ratio.numerator > FINEST:
        ratio = ratio.limit_denominator(FINEST)
    old, new = ratio.numerator, ratio.denominator
    if old == new:
        return samples
    # Each of `new` outputs a period is a dot product with the inputs around its own moment.
    cut = PASSED * min(1.0, new / old)  # of the input's Nyquist frequency
    reach = math.ceil(ZEROS / cut)
    taps = torch.arange(-reach, old + reach + 1, dtype=torch.float64)
    moments = torch.arange(new, dtype=torch.float64)[:, None] * old / new
    away = taps - moments
    inside = (1 - (away / (reach + 1)) ** 2).clamp(min=0)
    window = torch.special.i0(BETA * inside.sqrt()) / torch.special.i0(torch.tensor(BETA).double())
    bank = torch.where(inside > 0, torch.special.sinc(cut * away) * window * cut, 0.0)
    periods = -(-len(samples) // old)
    padded = F.pad(samples, (reach, periods * old - len(samples) + reach + 1))
    out = F.conv1d(padded[None, None], bank[:, None].float(), stride=old)[0]
    return out[:, :periods].T.reshape(-1)[: math.ceil(len(samples) * new / old)]


def drawn_sound(seconds: float = 0.5) -> Tensor:
    """The built-in sound: a tone that rises, as samples at 16 kHz."""
    time = torch.arange(int(seconds * RATE)) / RATE
    return 0.3 * torch.sin(2 * torch.pi * (300 + 600 * time) * time)
