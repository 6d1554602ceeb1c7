"""The files of a Hugging Face folder beside its weights: which belong to the model, and why not.

Every file is in one list or the other: nothing of ``hf_dir`` is lost in silence. Links are
followed within the folder, and into the blobs of a download cache; a checkpoint is a stranger's,
and a link out of it may lead to a private key or to a whole disk.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmconvert.errors import CheckpointError
from mmconvert.formats.hf.choice import ADAPTER, WEIGHTS
from mmconvert.formats.jsonfile import read_json_file
from mmconvert.names import number, summarise

DOWNLOADS = "what downloads leave behind"
TRAINING = "what training leaves behind"
CACHES = "version control and caches"
OTHER_WEIGHTS = "other weights, which are not read"
ADAPTERS = "an adapter, which is not applied"
OTHER_MODEL = "folders with weights of their own"
OUTSIDE = "links that leave the folder"
NO_FILE = "links to nowhere, pipes and devices"
OURS = "of the conversion that wrote the folder"


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


# Names of files, and of folders with all that is in them. The names are those that the tools
# themselves write: huggingface_hub, ModelScope, hfd, aria2, browsers; the trainers of
# transformers, accelerate, DeepSpeed, Megatron and LLaMA-Factory; TensorBoard and its like.
FILES: Mapping[str, re.Pattern[str]] = {
    OURS: _words(r"mmconvert\.json"),
    ADAPTERS: ADAPTER,
    DOWNLOADS: _words(
        r"\.(msc|mdl|mv)",
        r".*\.(incomplete|lock|tmp|part|partial|download|crdownload|aria2|aria2__temp)",
        r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini",
    ),
    TRAINING: _words(
        r"(optimizer|optim|scheduler|scaler|rng_state|random_states|custom_checkpoint)"
        r"([-_.0-9].*)?\.(pt|pth|bin|pkl|safetensors|distcp)",
        r"training_args\.(bin|json|yaml|yml)|trainer_state\.json|trainer_log\.jsonl",
        r"(all|train|eval|test|predict)_results\.json|training_(eval_)?(loss|accuracy)\.png",
        r".*_(optim|model)_states\.pt|mp_rank_.*\.pt|model_optim_rng\.pt|zero_to_fp32\.py|latest",
        r"latest_checkpointed_iteration\.txt|events\.out\.tfevents\..*|nohup\.out|.*\.log",
    ),
    CACHES: _words(r".*\.pyc"),
    OTHER_WEIGHTS: WEIGHTS,
}
FOLDERS: Mapping[str, re.Pattern[str]] = {
    DOWNLOADS: _words(r"\._+temp", r"\.(cache|huggingface|modelscope|hfd|locks|no_exist)"),
    TRAINING: _words(
        r"(tmp-)?(checkpoint|ckpt)-\w+|(global_step|iter_)\d+|mp_rank_[\d_]+",
        r"(pytorch_model|optimizer)_fsdp.*|(pytorch_model|optimizer)_\d+",
        r"runs|wandb|tensorboard|tb_logs|lightning_logs|mlruns|swanlog|logs",
    ),
    CACHES: _words(
        r"\.(git|svn|hg|mmconvert|idea|vscode|ipynb_checkpoints)|__pycache__|\.\w+_cache"
    ),
}


@dataclass(frozen=True)
class SideFiles:
    """The files beside the weights that are read.

    Attributes:
        copied: paths below the folder of those that belong to the model.
        left: reason -> the others; a folder, with all that is in it, ends in "/".
    """

    copied: tuple[Path, ...]
    left: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])

    def notes(self) -> list[str]:
        """What to say of those that are not copied."""
        return [
            f"{number(names, 'entry', 'entries')} of hf_dir not copied ({why}): {summarise(names)}"
            for why, names in self.left.items()
        ]


def side_files(folder: Path, weights: Iterable[str]) -> SideFiles:
    """Sorts the files of a folder.

    Args:
        weights: names of the weight files and of the index that are read: they are no side files.

    Raises:
        CheckpointError: a folder in it that cannot be listed.
    """
    return _Walk(folder, frozenset(weights)).run()


class _Walk:
    def __init__(self, folder: Path, weights: frozenset[str]) -> None:
        self.folder = folder
        self.weights = weights
        self.root = folder.resolve()
        # A download cache: snapshots/REVISION/NAME is a link to ../../blobs/DIGEST.
        cached = self.root.parent.name == "snapshots"
        self.blobs = self.root.parent.parent / "blobs" if cached else self.root
        self.copied: list[Path] = []
        self.left: dict[str, list[str]] = {}
        self.seen: set[tuple[int, int]] = set()

    def run(self) -> SideFiles:
        waiting = [Path()]  # not by recursion: folders may be nested as deep as paths go
        while waiting:
            waiting += self._enter(waiting.pop())
        return SideFiles(tuple(sorted(self.copied)), self.left)

    def _enter(self, below: Path) -> list[Path]:
        """Sorts the files of one folder; returns the folders in it."""
        here = self.folder / below
        if here.is_symlink() and below.name and not self._inside(here):
            self._leave(OUTSIDE, f"{below}/")
            return []
        try:
            status = here.stat()
            names = sorted(os.listdir(here))
        except OSError as error:
            raise CheckpointError(
                f"{here}: {error.strerror}",
                "a folder that can be listed",
                "change its permissions, or ask its owner to",
            ) from error
        if (status.st_dev, status.st_ino) in self.seen:  # linked folders may go in circles
            return []
        self.seen.add((status.st_dev, status.st_ino))
        if below.name and (why := _why_not_entered(below.name, names)):
            self._leave(why, f"{below}/")
            return []
        paths = [below / name for name in names]
        folders = {path for path in paths if (self.folder / path).is_dir()}
        for path in paths:
            if path not in folders and (path.name not in self.weights or below.name):
                why = self._why_not_copied(path)
                self._leave(why, str(path)) if why else self.copied.append(path)
        return sorted(folders, reverse=True)

    def _leave(self, why: str, name: str) -> None:
        self.left.setdefault(why, []).append(name)

    def _why_not_copied(self, below: Path) -> str:
        path = self.folder / below
        if why := _reason(FILES, path.name):
            return why
        if not path.is_file():
            return NO_FILE
        if path.is_symlink() and not self._inside(path) and not self._of_a_model(below):
            return OUTSIDE
        return ""

    def _inside(self, path: Path) -> bool:
        target = path.resolve()
        return any(place in (target, *target.parents) for place in (self.root, self.blobs))

    def _of_a_model(self, below: Path) -> bool:
        """Whether a link leads to the file of this name in a model's folder: such are made by
        hand, to share a tokenizer. config.json itself has been read as a model's already.
        """
        if str(below) == "config.json":
            return True
        target = (self.folder / below).resolve()
        try:
            config = read_json_file(target.parent / "config.json")
        except CheckpointError:
            return False
        return target.name == str(below) and isinstance(config.get("model_type"), str)


def _why_not_entered(name: str, names: Iterable[str]) -> str:
    own = any(WEIGHTS.fullmatch(name) or ADAPTER.fullmatch(name) for name in names)
    return _reason(FOLDERS, name) or (OTHER_MODEL if own else "")


def _reason(table: Mapping[str, re.Pattern[str]], name: str) -> str:
    return next((why for why, names in table.items() if names.fullmatch(name)), "")


def copy_side_files(source: Path, target: Path, paths: Iterable[Path]) -> None:
    """Copies side files as real files."""
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).unlink(missing_ok=True)  # what stands there may be a link
        shutil.copyfile(source / path, target / path)
