"""An output that is a single file: complete under its name, or not there at all."""

from __future__ import annotations

import os

from mmconvert.errors import OutputError
from mmconvert.executor.apart import identity
from mmconvert.executor.output import Output


class FileOutput(Output):
    """A target that is one file: the one of its name in the staging folder."""

    manifest = False

    def _check_free(self) -> None:
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
            what = f"{self.final} is not a regular file"
            raise OutputError(what, "a regular file, or a new name")

    def _put_in_place(self) -> None:
        made = self.folder / self.final.name
        self._placed = identity(made)
        os.replace(made, self.final)
