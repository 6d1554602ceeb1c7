"""Output folders that are complete or not there at all.

Everything is written into a staging folder beside the target and renamed when it is complete and
on the disk. The staging folder is locked by its run; one that nobody holds is the rest of an
interrupted run: the next run of the same request goes on with it, any other removes it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mmconvert import durable
from mmconvert.errors import (
    ANOTHER_PLACE,
    Interrupted,
    LostProcessError,
    OutputError,
    cannot_write,
)
from mmconvert.executor import staging
from mmconvert.executor.apart import Identity, check_apart, check_survives, identity, is_mount_point
from mmconvert.formats.registry import strangers
from mmconvert.names import summarise
from mmconvert.words import amount


class Output:
    """A target folder under construction; use as a context manager.

    Attributes:
        final: the target, links resolved.
        folder: the staging folder to write into.
        manifest: whether a manifest goes with it.
    """

    manifest = True

    def __init__(
        self,
        target: Path,
        inputs: Iterable[Path],
        *,
        overwrite: bool,
        keeps: Callable[[Path], bool] = lambda folder: False,
        read: Mapping[Identity, Path] | None = None,
        sync: bool = True,
    ) -> None:
        """Checks that the target may be written.

        Args:
            keeps: whether what an interrupted run has left in the staging folder is of use.
            read: all files that are read, by device and inode.
            sync: whether everything is brought to the disk before the output gets its name.

        Raises:
            OutputError: it exists, is a mount point, is, holds or lies in an input, or cannot be
                written.
        """
        self.final = Path(os.path.realpath(target))
        self.folder = durable.beside(self.final, ".mmconvert-partial")
        self._aside = durable.beside(self.final, ".mmconvert-old")
        self._overwrite = overwrite
        self._keeps = keeps
        self._sync = sync
        self._lock: int | None = None
        self._new_parents: list[Path] = []
        self._placed: Identity | None = None  # of what is to get the final name
        inputs = list(inputs)
        found = {name: path for path in inputs if (name := identity(path)) is not None}
        self._read = {**(read or {}), **found}
        check_apart(self.final, inputs)
        self._check_target()
        self._check_writable()

    def _check_target(self) -> None:
        if is_mount_point(self.final):
            raise OutputError(
                f"{self.final} is a mount point: it cannot be replaced by a complete output",
                "a name inside it",
                f"write to {self.final / 'NAME'}",
            )
        self._check_free()
        check_survives((self.final, self.folder, self._aside), self._read)

    def _check_free(self) -> None:
        """Whether the target is free, or may be replaced."""
        try:
            exists = os.path.lexists(self.final)
            names = set(os.listdir(self.final)) if exists else set[str]()
        except NotADirectoryError:
            raise OutputError(
                f"{self.final} is a file",
                "a folder that does not exist yet",
                "choose another name for the output",
            ) from None
        except OSError as error:
            raise OutputError(f"{self.final}: {error.strerror}", "a readable folder") from error
        if not names:
            return
        if not self._overwrite:
            raise OutputError(
                f"{self.final} exists and is not empty",
                "a folder that does not exist yet",
                "choose another folder, or give --overwrite to replace it",
            )
        others = strangers(self.final, names)
        if others is None:
            raise OutputError(
                f"{self.final} does not look like a checkpoint, so --overwrite does not remove it",
                "a checkpoint folder, or one that does not exist yet",
                "choose another folder, or empty this one yourself",
            )
        if others:
            raise OutputError(
                f"{self.final} also holds {summarise(others)}, which no conversion writes; "
                "--overwrite replaces the whole folder",
                "a folder with a checkpoint and nothing else",
                "move that elsewhere, or choose another folder",
            )

    def check_room(self, nbytes: int) -> None:
        """Raises OutputError if the disk has not ``nbytes`` free, the staging folder's included."""
        free = staging.free_bytes(self.final)
        if free is not None:  # an interrupted run's files are filled further, or removed
            free += staging.room_taken(self.folder)
        if free is not None and free < nbytes:
            raise OutputError(
                f"{self.final}: {amount(nbytes)} needed at most, {amount(free)} free",
                "room for the whole checkpoint",
                "free some space, or write to another disk",
            )

    def _check_writable(self) -> None:
        there = next(folder for folder in self.final.parents if folder.exists())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return
        denied = errno.EROFS if _read_only(there) else errno.EACCES
        why = os.strerror(denied if there.is_dir() else errno.ENOTDIR)
        raise OutputError(f"{there}: {why}", "a folder that can be written", ANOTHER_PLACE)

    def __enter__(self) -> Output:
        try:
            self._new_parents = [p for p in self.final.parents if not p.exists()]
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self._take()
            if os.path.lexists(self._aside):  # a run was killed between its renames, or after
                staging.check_former(self._aside)
                if os.path.lexists(self.final):
                    shutil.rmtree(self._aside)
                else:
                    self._aside.rename(self.final)
        except OSError as error:
            raise OutputError(
                f"{self.folder}: {error.strerror or error}",
                "a folder that can be written",
                ANOTHER_PLACE,
            ) from error
        return self

    def _take(self) -> None:
        """Makes the staging folder ours, empty but for what can be kept."""
        while self._lock is None:
            try:
                staging.make(self.folder)
                self._lock = staging.lock(self.folder)
            except FileNotFoundError:  # its holder has just given it its final name
                continue
            except BlockingIOError:
                raise OutputError(
                    f"another conversion is writing {self.final} (it holds {self.folder})",
                    "one conversion into a folder at a time",
                    "wait for it, or stop it, or choose another folder",
                ) from None
            if self._lock is None:  # no locks here
                break
        if staging.holds_links(self.folder) or not self._keeps(self.folder):
            staging.empty(self.folder)

    def commit(self) -> list[str]:
        """Sets the modes, brings all to the disk and gives the folder its final name.

        Returns:
            warnings: what could not be tidied up.

        Raises:
            OutputError: the target appeared meanwhile, or the rename failed.
        """
        self._check_target()
        try:
            staging.set_modes(self.folder)
            if self._sync:
                durable.sync_tree(self.folder)
            self._put_in_place()
        except OSError as error:
            raise OutputError(
                f"{self.final}: cannot be put in place: {error.strerror}", "a writable folder"
            ) from error
        self._sync_names()
        return self._tidy()

    def _put_in_place(self) -> None:
        if os.path.lexists(self.final) and os.listdir(self.final):
            self.final.rename(self._aside)
        self._placed = identity(self.folder)
        self.folder.rename(self.final)

    def _sync_names(self) -> None:
        """Makes the new name safe, and those of the folders that were made above it."""
        try:
            for made in (self.final, *self._new_parents) if self._sync else ():
                durable.sync_folder(made.parent)
        except OSError as error:
            raise OutputError(
                f"{self.final} is complete, but its name may not outlive a loss of power: "
                f"{error.strerror}",
                "a disk that works",
                "see what the system says of the disk (dmesg)",
            ) from error

    def _tidy(self) -> list[str]:
        """Removes what the output has replaced, and what is left of the staging folder."""
        left: list[str] = []
        for path in (self._aside, self.folder):
            try:
                if path.exists():
                    shutil.rmtree(path)
            except OSError as error:
                left.append(f"warning: {path} could not be removed: {error.strerror}")
        return left

    @property
    def _done(self) -> bool:
        """Whether what was written has its final name."""
        return self._placed is not None and identity(self.final) == self._placed

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        done = self._done
        with suppress(OSError):  # stopped between the two renames: the old checkpoint comes back
            if not done and self._aside.exists() and not os.path.lexists(self.final):
                self._aside.rename(self.final)
        stopped = isinstance(error, (KeyboardInterrupt, LostProcessError))
        kept = not done and stopped and self._keeps(self.folder)
        if not done and not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
            durable.remove_empty(self._new_parents)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if isinstance(error, KeyboardInterrupt):
            raise self._interrupted(kept=kept) from error
        if isinstance(error, OSError):  # from whatever was written outside the executor
            raise cannot_write(error.filename or self.final, error) from error

    def _interrupted(self, *, kept: bool) -> Interrupted:
        """What is true now."""
        if self._done:
            old = f"{self._aside} is the former one: remove it" if self._aside.exists() else ""
            return Interrupted(f"interrupted, but {self.final} is complete", old)
        again = "the same command goes on where it was stopped" if kept else ""
        return Interrupted(f"interrupted: {self.final} is as it was before", again)


def _read_only(folder: Path) -> bool:
    """Whether a folder's disk can only be read, as far as the system tells."""
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
