"""New iterations of an MM checkpoint: each is whole or not there, and the tracker file names it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmconvert import durable
from mmconvert.errors import cannot_write
from mmconvert.formats.mm.ranks import RANK_FILE, TRACKER
from mmconvert.sharding.layout import Layout, Rank


def iteration_folder(save: Path, iteration: int) -> Path:
    """Where an iteration's rank folders stand."""
    return save / f"iter_{iteration:07d}"


def staging_folder(save: Path, iteration: int) -> Path:
    """Where they are written first."""
    return save / f".iter_{iteration:07d}.part"


def _former(save: Path, iteration: int) -> Path:
    """Where an iteration that is written once more waits until the new one is safe."""
    return save / f".iter_{iteration:07d}.old"


def begin(save: Path, iteration: int) -> None:
    """Makes an empty staging folder. One process calls this, before the others write."""
    folder, staging = iteration_folder(save, iteration), staging_folder(save, iteration)
    former = _former(save, iteration)
    try:
        if former.is_dir():  # a run was killed between its renames, or after
            shutil.rmtree(former) if folder.exists() else former.rename(folder)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(staging, error) from None


def write_rank(
    save: Path, iteration: int, layout: Layout, rank: Rank, content: Mapping[str, Any]
) -> None:
    """Writes one rank file into the staging folder.

    Raises:
        OutputError: the system refuses.
    """
    path = staging_folder(save, iteration) / layout.folder(rank) / RANK_FILE
    try:
        path.parent.mkdir()
        with path.open("xb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None
    except RuntimeError as error:  # torch's own zip writer, on a full disk
        raise cannot_write(path, OSError(str(error))) from None


def finish(save: Path, iteration: int) -> None:
    """Gives the staging folder its name, then the tracker file its number.

    One process calls this, after all have written: the checkpoint is whole or not there. It is on
    the disk before the tracker file names it, and only then is one of the same name removed.
    """
    folder, staging = iteration_folder(save, iteration), staging_folder(save, iteration)
    former = _former(save, iteration)
    try:
        durable.sync_tree(staging)
        if folder.exists():
            folder.rename(former)
        durable.replace(staging, folder)
        durable.replace_file(save / TRACKER, str(iteration).encode())
    except OSError as error:
        raise cannot_write(folder, error) from None
    shutil.rmtree(former, ignore_errors=True)


def last_saved(save: Path) -> int | None:
    """The iteration of the newest checkpoint in a folder; None if there is none."""
    try:
        return int((save / TRACKER).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def remove(save: Path, iteration: int) -> None:
    """Takes an iteration away that this run has written; one that does not go stays."""
    shutil.rmtree(iteration_folder(save, iteration), ignore_errors=True)
