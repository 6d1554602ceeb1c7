"""Staging folders: ours alone, whatever others have put where one is to be made.

The folder above may be writable by everybody, as /tmp is. What another user could have made, or
could write to, is refused: files that are written into it would be theirs to change, and a link
in it would lead our writes elsewhere.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from mmconvert.errors import OutputError

try:
    import fcntl
except ImportError:  # not POSIX: no advisory locks; staging and rename still hold
    fcntl = None

FOLDER_MODE = 0o750
FILE_MODE = 0o640
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def make(folder: Path) -> None:
    """Makes a staging folder, or finds the one that an earlier run of ours has left.

    Raises:
        OutputError: what stands there is not ours alone.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        check_ours(folder)


def check_ours(folder: Path) -> None:
    """Raises OutputError for a link, and for a folder that others own or may write to."""
    status = os.lstat(folder)
    if stat.S_ISLNK(status.st_mode):
        trouble = "is a link"
    elif not stat.S_ISDIR(status.st_mode):
        trouble = "is not a folder"
    elif (status.st_uid, status.st_mode & _OTHERS) != _own(folder.parent):
        trouble = "is not this user's alone: someone else owns it, or may write to it"
    else:
        return
    raise OutputError(
        f"{folder} {trouble}",
        "nothing of that name, or what an earlier run of the same user left there",
        "see who made it and remove it, or choose an output in another folder",
    )


def check_former(folder: Path) -> None:
    """Raises OutputError unless a folder can be the checkpoint that an earlier run was replacing.

    It has the modes of its maker's choice, so only its kind and its owner tell.
    """
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != _own(folder.parent)[0]:
        raise OutputError(
            f"{folder} is a link, is not a folder, or belongs to another user",
            "nothing of that name, or the checkpoint that an earlier run was replacing",
            "see who made it and remove it, or choose an output in another folder",
        )


def _own(parent: Path) -> tuple[int, int]:
    """Owner, and mode for others, of a private folder that is made here.

    Asked of the file system: a file server may know root as nobody, and some have no modes.
    """
    probe = parent / f".mmconvert-{os.urandom(8).hex()}"
    probe.mkdir(mode=0o700)
    try:
        status = os.lstat(probe)
    finally:
        os.rmdir(probe)
    return status.st_uid, status.st_mode & _OTHERS


def lock(folder: Path) -> int | None:
    """Locks a staging folder; None where there are no locks.

    Returns:
        a descriptor that holds the lock until it is closed.

    Raises:
        BlockingIOError: another run holds it.
        FileNotFoundError: the holder has renamed it away between our making and our locking it.
    """
    if fcntl is None:
        return None
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks
    try:
        there = os.lstat(folder)
    except FileNotFoundError:
        there = None
    here = os.fstat(fd)
    if there is None or (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
        os.close(fd)
        raise FileNotFoundError(folder)
    return fd


def holds_links(folder: Path) -> bool:
    """Whether there is a link below a folder: no conversion makes one."""
    return any(
        os.path.islink(os.path.join(here, name))
        for here, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )


def empty(folder: Path) -> None:
    """Removes what is in a folder; links are removed, not followed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def set_modes(folder: Path) -> None:
    """Gives the folders and files of a checkpoint their modes, whatever the umask.

    Those that have theirs are not touched: that would change the time of the inode, which a
    manifest notes.
    """
    for here, _, files in os.walk(folder):
        for path, mode in ((here, FOLDER_MODE), *((Path(here, f), FILE_MODE) for f in files)):
            now = os.lstat(path).st_mode
            if not stat.S_ISLNK(now) and stat.S_IMODE(now) != mode:
                os.chmod(path, mode)


def room_taken(folder: Path) -> int:
    """Bytes of disk that the files below a folder take; 0 if there is none."""
    taken = 0
    for here, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # another run is at work there
                taken += os.lstat(Path(here, name)).st_blocks * 512  # stat(2): units of 512 bytes
    return taken


def free_bytes(path: Path) -> int | None:
    """Free bytes on the disk where ``path`` is or will be; None if that cannot be known."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            try:
                return shutil.disk_usage(folder).free
            except OSError:
                return None
    return None
