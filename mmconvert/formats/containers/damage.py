"""What has happened to a file that cannot be read: cut off, not fetched, or damaged."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mmconvert.errors import CheckpointError, FormatError
from mmconvert.formats.containers.safetensors import expected_size

AGAIN = "copy or download the file again"
HEAD = 16  # bytes that tell
_ZIP = b"PK\3\4"
_END = b"PK\5\6"  # how the last record of a zip directory begins
_TAIL = (1 << 16) + 22  # bytes: that record, and the longest comment behind it


@contextmanager
def explained(path: Path, kind: str, size: int = 0) -> Generator[None]:
    """Errors of reading a file within say what has happened to it.

    Args:
        kind: ``weight-file`` or ``rank-file``: the causes are ``truncated-weight-file`` and so on.
        size: the bytes that it should have, where they are known.
    """
    try:
        yield
    except FormatError as error:
        raise _explained(path, error, kind, size) from None
    except CheckpointError as error:
        error.cause = error.cause or "cannot-read"
        error.path = error.path or path
        raise


def _explained(path: Path, error: FormatError, kind: str, size: int) -> FormatError:
    if error.cause:
        return error
    try:
        there = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD)
            file.seek(max(0, there - _TAIL))
            ended = _END in file.read()
    except OSError:
        return error
    if path.name.endswith(".safetensors"):
        lacks = _lacks_of_safetensors(path, head, there)
    else:
        lacks = _lacks_of_zip(there, size) if head[:4] == _ZIP and not ended else ""
    if lacks:
        what = f"{path} is cut off at byte {there}{lacks}"
        return FormatError(what, "the whole file", AGAIN, cause=f"truncated-{kind}", path=path)
    foreign = kind == "rank-file" and head[:4] != _ZIP
    error.cause = f"{'foreign' if foreign else 'damaged'}-{kind}"
    error.path, error.fix = path, error.fix or AGAIN
    return error


def _lacks_of_zip(there: int, size: int) -> str:
    if size > there:
        return f": mmconvert.json lists {size} bytes, so the last {size - there} are missing"
    return ": the directory that ends a .pt file is missing"


def _lacks_of_safetensors(path: Path, head: bytes, there: int) -> str:
    """What is missing at the end of a safetensors file; "" if nothing is."""
    expected = expected_size(path)
    if expected is not None:
        more = expected - there
        return f": its header asks for {expected} bytes, so {more} are missing" if more > 0 else ""
    long = head[8:9] == b"{" and int.from_bytes(head[:8], "little") > there - 8
    return ", within its header" if len(head) < 9 or long else ""
