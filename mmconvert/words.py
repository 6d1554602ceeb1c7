"""Numbers and names as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mmconvert.errors import RequestError

LONGEST = 200  # characters of a name; a name comes from a file and may have any length
_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_UNITS = ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1))


def amount(nbytes: float) -> str:
    """Bytes in words: 512 B, 7.1 kB, 12.3 MB, 4.42 GB."""
    for size, unit, digits in _UNITS:
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB, in transformers' sense; a plain number is bytes.

    Raises:
        RequestError: anything else.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(found[1]) * _SIZES[found[2] or ""]) if found else 0
    if size < 1:
        raise RequestError(f"--max-shard-size {text}", "a size such as 5GB, 500MB or 2GiB")
    return size


def printable(text: str, longest: int = LONGEST) -> str:
    """A name from a file, safe to show: control and invisible characters escaped, cut if long.

    Terminals obey control characters, XML forbids some, text direction marks mislead readers and
    lone surrogates cannot be encoded.
    """
    text = _cut(text, longest)
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _cut("".join(shown), longest)


def one_line(text: str) -> str:
    """A message with names from files in it, safe to show, whole: see :func:`printable`."""
    return printable(text, 10 * len(text))  # the longest escape, \\U0001f600, has 10 characters


def _cut(text: str, longest: int) -> str:
    half = (longest - 3) // 2
    return f"{text[:half]}...{text[-half:]}" if len(text) > longest else text


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges: 0-3,7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
