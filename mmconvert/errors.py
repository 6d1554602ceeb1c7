"""The error tree.

    MMConvertError                    every error that mmconvert raises on purpose
    ├── DifferenceError       exit 1  two checkpoints that were compared differ
    ├── RequestError          exit 2  the request is impossible as it stands
    │   ├── LayoutError               sizes, stage grids or head counts that cannot work
    │   │   └── UnknownSizeError      a number that shapes do not tell, such as a head count
    │   ├── OutputError               the output exists, is locked, or cannot be written
    │   └── LostProcessError          a process of torchrun's is gone
    ├── DatasetError          exit 3  a dataset's annotation file is missing or damaged
    └── CheckpointError       exit 3  a checkpoint is missing, damaged or not what was declared
        ├── FormatError               a file breaks its format (truncated, hostile, unreadable)
        ├── TensorError               tensors missing, unclaimed, of a wrong shape or dtype
        ├── FormError                 maybe whole, and of a form that is not converted as it is
        └── ReplicaError              copies of one tensor differ between ranks

An interruption (Ctrl-C, SIGTERM) ends with exit code 130.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

LEAVE_OUT = (
    "if the model works without them, leave them out: --drop 'NAME' (a pattern; may be repeated)"
)
ANOTHER_PLACE = "choose another folder, or ask for permission to write to this one"


class MMConvertError(Exception):
    """What was wrong and where; what was expected; what to do about it.

    Args:
        what: one line that names the file, tensor, flag or number at fault.
        expected: one line, what would have been right.
        fix: one line, the way out.
        cause: a word for it, the id of the finding in ``doctor``; "" for what has none of its own.
        path: the file or folder at fault, where one is.
        tensors: the names of the tensors at fault.
        aside: files and folders that do not belong where they stand.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        expected: str = "",
        fix: str = "",
        *,
        cause: str = "",
        path: Path | None = None,
        tensors: Sequence[str] = (),
        aside: Sequence[Path] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.fix = fix
        self.cause = cause
        self.path = path
        self.tensors = tuple(tensors)
        self.aside = tuple(aside)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The message as one to three lines: what, expected, fix."""
        lines = [self.what]
        if self.expected:
            lines.append(f"expected: {self.expected}")
        if self.fix:
            lines.append(f"to fix: {self.fix}")
        return lines

    def as_dict(self) -> dict[str, str | int]:
        """The error as an object for ``--json``."""
        cause = {"cause": self.cause} if self.cause else {}
        return {
            "error": type(self).__name__,
            "what": self.what,
            "expected": self.expected,
            "fix": self.fix,
            "exit_code": self.exit_code,
            **cause,
        }


class DifferenceError(MMConvertError):
    """Two checkpoints that were compared differ."""

    exit_code = 1


class RequestError(MMConvertError):
    """The request is impossible as it stands."""

    exit_code = 2


class LayoutError(RequestError):
    """Parallel sizes, stage grids or head counts that cannot work."""


class UnknownSizeError(LayoutError):
    """A number that the layout needs and that shapes do not tell, such as a head count."""


class OutputError(RequestError):
    """The output exists, is in use by another run, or cannot be written."""


class LostProcessError(RequestError):
    """Another process of the same run is gone; what was done is kept, as after an interruption."""


class DatasetError(MMConvertError):
    """A dataset's annotation file is missing, damaged, or names images that are not there."""

    exit_code = 3


class CheckpointError(MMConvertError):
    """A checkpoint is missing, damaged or not what was declared."""

    exit_code = 3


class FormatError(CheckpointError):
    """A file breaks its format: truncated, hostile or unreadable."""


class TensorError(CheckpointError):
    """Tensors are missing, unclaimed, or of a wrong shape or dtype."""


class FormError(CheckpointError):
    """A checkpoint of a form that is not converted as it stands: quantised, an adapter alone ...

    Args:
        cause: a word for it, the same in conversions and ``doctor``; see :mod:`mmconvert.causes`.
        what, expected, fix: as in :class:`MMConvertError`.
    """

    def __init__(self, cause: str, what: str, expected: str, fix: str) -> None:
        super().__init__(what, expected, fix, cause=cause)

    def __reduce__(self) -> tuple[type[FormError], tuple[str, str, str, str]]:
        """For the process that started this one."""
        return FormError, (self.cause, self.what, self.expected, self.fix)


class ReplicaError(CheckpointError):
    """Copies of one tensor that should be equal differ between ranks."""


class Interrupted(KeyboardInterrupt):
    """An interruption of which it is known what it has left.

    Args:
        what: one line, the state that is true now.
        fix: one line, how to go on; "" if there is nothing to do.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


@contextmanager
def blamed(cause: str, path: Path, tensor: str = "", fix: str = "") -> Generator[None]:
    """Errors raised within get this cause, place and way out, unless they have their own."""
    try:
        yield
    except MMConvertError as error:
        error.cause = error.cause or cause
        error.path = error.path or path
        error.tensors = error.tensors or ((tensor,) if tensor else ())
        error.fix = error.fix or fix
        raise


def cannot_read(
    path: str | PathLike[str], error: OSError, expected: str = "a readable file"
) -> CheckpointError:
    """What to say when the system refuses to read ``path``."""
    ways_out = {
        errno.ENOENT: "check the path",
        errno.EACCES: "ask its owner for permission to read it",
        errno.EIO: "the disk fails to read it: copy it again from where it was made",
    }
    return CheckpointError(
        f"{path}: cannot be read: {error.strerror or error}",
        expected,
        ways_out.get(error.errno or 0, "check the path, and the disk that it is on"),
    )


def cannot_write(path: str | PathLike[str], error: OSError) -> OutputError:
    """What to say when the system refuses to write ``path``: a full disk, or anything else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"{path}: no more can be written ({error.strerror})",
            "room for all of it; an output gets its name only when it is complete",
            "free some space, write to another disk or raise the limit, and run the command again",
        )
    reason = error.strerror or error
    fix = (
        "make its folder first, or choose another" if error.errno == errno.ENOENT else ANOTHER_PLACE
    )
    return OutputError(f"{path}: cannot be written: {reason}", "a folder that can be written", fix)


def disagreement(answers: Sequence[Mapping[str, str]]) -> RequestError | None:
    """What to say when the processes of one run want different things; None if they agree.

    Args:
        answers: of each process, what it wants, by what to call it in a message.
    """
    first, *others = answers
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            ours, theirs = first.get(name, "not there"), other.get(name, "not there")
            if ours != theirs:
                return RequestError(
                    f"the processes of this run disagree: {name} is {ours} on process 0 and "
                    f"{theirs} on process {rank}",
                    "one and the same request, over the same files, in all of them",
                    "give every process the same command line, and the same version of mmconvert",
                )
    return None
