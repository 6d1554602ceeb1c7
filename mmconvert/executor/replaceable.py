"""What ``--overwrite`` may replace: folders that hold a checkpoint, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from mmconvert.sharding.layout import parse_folder

TRACKER = "latest_checkpointed_iteration.txt"
INDEX = "model.safetensors.index.json"
RANK_FOLDER = re.compile(r"rank_\d{1,5}")  # of MindSpore
OWN_NAMES = re.compile(
    rf"{re.escape(TRACKER)}|mmconvert\.json|release|iter_\d+|{RANK_FOLDER.pattern}|strategy|\.DS_Store"
)
MS_SUFFIXES = (".ckpt", ".safetensors")


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
