"""What a download may leave in place of a file: the words."""

from __future__ import annotations

import re
from pathlib import Path

from mmconvert.errors import FormatError

LFS = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
LONGEST = 64  # bytes that tell
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # ORGANISATION/MODEL
POINTER = "the pointer that git LFS keeps in place of the file"


def way_to(path: Path) -> str:
    """What to do about a folder that does not exist, and may be a name on the hub."""
    if HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        how = f"hf download {path} --local-dir {path.name}"
        return f"check the path; a model of the hub is downloaded first: {how}"
    return "check the path"


def not_the_file(path: Path, head: bytes) -> FormatError | None:
    """Why a file is none of a checkpoint's, by its first bytes; None if they are no download's."""
    if head.startswith(LFS):
        return FormatError(
            f"{path} is {POINTER}",
            "the file itself",
            "fetch the files with git LFS: git lfs pull, in that folder",
            cause="lfs-pointer",
            path=path,
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return FormatError(
            f"{path} is an HTML page, such as a server sends in place of a file",
            "the file itself",
            "see in a browser what the page says, and download the file again (logged in, if the "
            "model asks for that)",
        )
    return None
