"""Checkpoints of a training of Qwen-VL: Hugging Face folders, with the optimizer beside them."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmconvert.errors import CheckpointError, cannot_write
from mmconvert.formats.hf.choice import ORDER
from mmconvert.runtime import iterations
from mmconvert.runtime.qwenvl.answer import RANKS

OPTIMIZER, WEIGHTS = "optimizer.pt", "model.safetensors"
LARGEST = 16 << 20  # bytes of a side file
OURS = {OPTIMIZER, "mmconvert.json"}


def save(
    folder: Path,
    iteration: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    like: tuple[Path, Path],
) -> Path:
    """Writes the checkpoint of an iteration: whole, or not at all; its folder.

    Args:
        state: of the training; empty for none.
        like: the Hugging Face folder whose side files to take along, and the tokenizer.

    Raises:
        OutputError: the system refuses.
    """
    iterations.begin(folder, iteration)
    staging = iterations.staging_folder(folder, iteration)
    try:
        for path in sorted(like[0].iterdir()):
            if _beside(path):
                shutil.copyfile(path, staging / path.name)
        shutil.copyfile(like[1], staging / RANKS)
        held = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
        save_file(held, staging / WEIGHTS, metadata={"format": "pt"})
        if state:
            torch.save(dict(state), staging / OPTIMIZER)
        for path in staging.iterdir():
            os.chmod(path, 0o640)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else OSError(0, str(error))
        raise cannot_write(staging, cause) from None
    iterations.finish(folder, iteration)
    return iterations.iteration_folder(folder, iteration)


def _beside(path: Path) -> bool:
    """Whether a file stands beside weights, and is none itself."""
    about = path.stat()
    weights = path.suffix in (".safetensors", ".bin") or path.name in ORDER
    return (
        stat.S_ISREG(about.st_mode)
        and about.st_size <= LARGEST
        and not (weights or path.name in OURS)
    )


def restored(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a training, saved with the same settings.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of other settings.
    """
    path = folder / OPTIMIZER
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        before, optimizer = state["settings"], state["optimizer"]
        if not isinstance(before, dict) or not isinstance(optimizer, dict):
            raise TypeError
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}", "the optimizer's state",
            "it was saved with --no_save_optim: start again, with --hf_dir the checkpoint's folder",
        ) from None  # fmt: skip
    except Exception as error:  # a damaged file raises what it likes
        raise CheckpointError(f"{path} is damaged: {error}"[:300], "a state as saved") from None
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        key = changed[0]
        raise CheckpointError(
            f"--resume: {key} was {before.get(key)!r}, and is {settings[key]!r}"[:300],
            "the same settings as before",
            "give them again, or start in another --save",
        )
    return state
