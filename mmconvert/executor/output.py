"""Output folders that are complete or not there at all.

Everything is written into a staging folder beside the target and renamed when complete. The
staging folder is locked by its run; one that nobody holds is the rest of an interrupted run: the
next run of the same request goes on with it, any other removes it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mmconvert.errors import LostProcessError, OutputError, cannot_write
from mmconvert.names import summarise
from mmconvert.sharding.layout import parse_folder

try:
    import fcntl
except ImportError:  # not POSIX: no advisory locks; staging and rename still hold
    fcntl = None

FOLDER_MODE = 0o750
FILE_MODE = 0o640

TRACKER = "latest_checkpointed_iteration.txt"
INDEX = "model.safetensors.index.json"
RANK_FOLDER = re.compile(r"rank_\d{1,5}")  # of MindSpore
OWN_NAMES = re.compile(
    rf"{re.escape(TRACKER)}|mmconvert\.json|release|iter_\d+|{RANK_FOLDER.pattern}|strategy|\.DS_Store"
)
MS_SUFFIXES = (".ckpt", ".safetensors")


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
    ) -> None:
        """Checks that the target may be written.

        Args:
            keeps: whether what an interrupted run has left in the staging folder is of use.

        Raises:
            OutputError: it exists, or is, holds or lies in an input.
        """
        self.final = Path(os.path.realpath(target))
        self.folder = self.final.parent / f".{self.final.name}.mmconvert-partial"
        self._aside = self.final.parent / f".{self.final.name}.mmconvert-old"
        self._overwrite = overwrite
        self._keeps = keeps
        self._lock: int | None = None
        self._new_parents: list[Path] = []
        self._done = False
        check_apart(self.final, inputs)
        self._check_target()

    def _check_target(self) -> None:
        try:
            exists = os.path.lexists(self.final)
            names = set(os.listdir(self.final)) if exists else set()
        except NotADirectoryError:
            raise OutputError(
                f"{self.final} is a file", "a folder that does not exist yet"
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
        if not looks_like_a_checkpoint(self.final, names):
            raise OutputError(
                f"{self.final} does not look like a checkpoint, so --overwrite does not remove it",
                "a checkpoint folder, or one that does not exist yet",
                "choose another folder, or empty this one yourself",
            )
        if others := strangers(names):
            raise OutputError(
                f"{self.final} also holds {summarise(others)}, which no conversion writes; "
                "--overwrite replaces the whole folder",
                "a folder with a checkpoint and nothing else",
                "move that elsewhere, or choose another folder",
            )

    def check_room(self, nbytes: int) -> None:
        """Raises OutputError if the disk has not ``nbytes`` free, the staging folder's included."""
        free = free_bytes(self.final)
        if free is not None:
            free += _room_taken(self.folder)  # an interrupted run's: filled further, or removed
        if free is not None and free < nbytes:
            raise OutputError(
                f"{self.final}: {nbytes / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free",
                "room for the whole checkpoint",
                "free some space, or write to another disk",
            )

    def __enter__(self) -> Output:
        try:
            self._new_parents = [p for p in self.final.parents if not p.exists()]
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self._take()
            if self._aside.exists():  # a run was killed between two renames, or while tidying up
                if os.path.lexists(self.final):
                    shutil.rmtree(self._aside)
                else:
                    self._aside.rename(self.final)
        except OSError as error:
            raise OutputError(
                f"{self.folder}: {error.strerror or error}", "a folder that can be written"
            ) from error
        return self

    def _take(self) -> None:
        """Makes the staging folder ours, empty but for what can be kept."""
        while True:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if self.folder.is_symlink():  # what it points to is not ours to empty
                raise OutputError(
                    f"{self.folder} is a link", "no file of that name, or the rest of a run"
                )
            if fcntl is None:
                break
            lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise OutputError(
                    f"another conversion is writing {self.final} (it holds {self.folder})",
                    "one conversion into a folder at a time",
                    "wait for it, or stop it, or choose another folder",
                ) from None
            except OSError:  # a file system without locks
                os.close(lock)
                break
            # The holder may have renamed the folder away between our mkdir and our lock.
            if _same(lock, self.folder):
                self._lock = lock
                break
            os.close(lock)
        if not self._keeps(self.folder):
            _empty(self.folder)

    def commit(self) -> None:
        """Sets the modes and gives the folder its final name.

        Raises:
            OutputError: the target appeared meanwhile, or the rename failed.
        """
        self._check_target()
        try:
            _set_modes(self.folder)
            self._put_in_place()
        except OSError as error:
            raise OutputError(
                f"{self.final}: cannot be put in place: {error.strerror}", "a writable folder"
            ) from error

    def _put_in_place(self) -> None:
        if os.path.lexists(self.final) and os.listdir(self.final):
            self.final.rename(self._aside)
        self.folder.rename(self.final)
        self._done = True
        if self._aside.exists():
            shutil.rmtree(self._aside)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # stopped between the two renames: the old checkpoint comes back
            if not self._done and self._aside.exists() and not os.path.lexists(self.final):
                self._aside.rename(self.final)
        stopped = isinstance(error, (KeyboardInterrupt, LostProcessError))
        kept = stopped and self._keeps(self.folder)
        if not self._done and not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in self._new_parents:  # innermost first; stops at one that is in use
                try:
                    parent.rmdir()
                except OSError:
                    break
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if isinstance(error, OSError):  # from whatever was written outside the executor
            raise cannot_write(error.filename or self.final, error) from error


class FileOutput(Output):
    """A target that is one file: the one of its name in the staging folder."""

    manifest = False

    def _check_target(self) -> None:
        if self.final.is_dir():
            raise OutputError(
                f"{self.final} is a folder", "the name of a file", "add the file's name to the path"
            )
        if not os.path.lexists(self.final):
            return
        if not self._overwrite:
            raise OutputError(
                f"{self.final} exists",
                "a file that does not exist yet",
                "choose another name, or give --overwrite to replace it",
            )
        if not self.final.is_file():
            raise OutputError(f"{self.final} is no regular file", "a file, or a new name")

    def _put_in_place(self) -> None:
        os.replace(self.folder / self.final.name, self.final)
        self._done = True
        shutil.rmtree(self.folder)


def check_apart(final: Path, inputs: Iterable[Path]) -> None:
    """Raises OutputError if an output folder is, holds or lies in an input folder."""
    for given in inputs:
        path = Path(os.path.realpath(given))
        if final == path:
            relation = "is the input"
        elif final in path.parents:
            relation = f"holds the input {path}"
        elif path in final.parents:
            relation = f"lies in the input {path}"
        else:
            continue
        raise OutputError(
            f"the output {final} {relation}", "an output folder apart from the inputs"
        )


def looks_like_a_checkpoint(folder: Path, names: set[str]) -> bool:
    """Whether a folder may be replaced: it holds weights in one of the known forms."""
    if TRACKER in names or any(parse_folder(name) for name in names):
        return True
    if "config.json" in names:
        return INDEX in names or any(name.endswith(".safetensors") for name in names)
    if any(_holds_rank(folder / name) for name in names if RANK_FOLDER.fullmatch(name)):
        return True
    inner = [folder / name for name in names if name == "release" or name.startswith("iter_")]
    return any(parse_folder(p.name) for path in inner if path.is_dir() for p in path.iterdir())


def strangers(names: set[str]) -> list[str]:
    """What stands in an MM or MindSpore folder and belongs to no checkpoint.

    Hugging Face folders may hold anything: a model's code, its pictures, its licence.
    """
    if "config.json" in names:
        return []
    return sorted(name for name in names if not (OWN_NAMES.fullmatch(name) or parse_folder(name)))


def _holds_rank(folder: Path) -> bool:
    """Whether a folder of MindSpore's holds the file of a rank."""
    return folder.is_dir() and any(path.name.endswith(MS_SUFFIXES) for path in folder.iterdir())


def free_bytes(path: Path) -> int | None:
    """Free bytes on the disk where ``path`` is or will be; None if that cannot be known."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            try:
                return shutil.disk_usage(folder).free
            except OSError:
                return None
    return None


def _room_taken(folder: Path) -> int:
    """Bytes of disk that the files below a folder take; 0 if there is none."""
    taken = 0
    for here, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # another run is at work there
                taken += os.lstat(Path(here, name)).st_blocks * 512  # stat(2): units of 512 bytes
    return taken


def _same(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _set_modes(folder: Path) -> None:
    for here, _, files in os.walk(folder):
        os.chmod(here, FOLDER_MODE)
        for name in files:
            os.chmod(Path(here, name), FILE_MODE)
