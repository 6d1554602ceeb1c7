"""Small file systems: to see what a full disk does, and what a loss of power leaves."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def file_system(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size (``1m``) in memory, mounted at ``folder``; for root only."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@contextmanager
def bind(source: Path, target: Path, *options: str) -> Iterator[Path]:
    """`source` shown once more at `target`, a folder that is made; for root only."""
    target.mkdir(parents=True, exist_ok=True)
    _mount("--bind", *options, str(source), target)
    try:
        yield target
    finally:
        subprocess.run(["umount", "-l", str(target)], check=False)


@contextmanager
def disk(image: Path, folder: Path, size: str = "160M") -> Iterator[Path]:
    """A file with an ext4 file system in it, made if it is not there, mounted; for root only."""
    folder.mkdir(exist_ok=True)
    if not image.exists():
        subprocess.run(["truncate", "-s", size, str(image)], check=True)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    _mount("-o", "loop", str(image), folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def _mount(*words: str | Path) -> None:
    try:
        made = subprocess.run(["mount", *map(str, words)], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted: {made.stderr.decode().strip()}")
