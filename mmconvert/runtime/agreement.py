"""What all processes of a training must want: a checkpoint of two requests would be of neither."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mmconvert.errors import disagreement
from mmconvert.runtime.parameters import gather


def agree(settings: Mapping[str, object], folders: Mapping[str, Path]) -> None:
    """Compares what the processes were asked for.

    Args:
        settings, folders: by the names of the flags; folders may be reached through links.

    Raises:
        RequestError: they differ; in all processes.
    """
    said = {flag: str(value) for flag, value in settings.items()}
    said |= {flag: os.path.realpath(path) for flag, path in folders.items()}
    if error := disagreement(gather(said)):
        raise error
