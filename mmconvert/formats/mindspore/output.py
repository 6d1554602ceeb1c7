"""The files of a MindSpore checkpoint that is to be written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmconvert.config.mindspore import FileForm
from mmconvert.errors import RequestError
from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.mindspore.side import Spread
from mmconvert.formats.mindspore.strategy import Strategy
from mmconvert.formats.mindspore.strategy_writer import encode_strategy

METADATA = {"format": "ms"}  # what MindSpore's own save_checkpoint writes into safetensors
STRATEGIES = "strategy"  # folder, as in MindFormers' output
MERGED = f"{STRATEGIES}/merged_ckpt_strategy.ckpt"
SUFFIXES = (".ckpt", ".safetensors")


@dataclass(frozen=True)
class Destination:
    """In which form to write.

    Attributes:
        single: one file, not a folder.
        ckpt: .ckpt files, not safetensors.
        crc: with a checksum.
    """

    single: bool
    ckpt: bool
    crc: bool

    @staticmethod
    def of(path: Path, form: FileForm, spread: Spread, *, crc: bool, folder: bool) -> Destination:
        """The form that a path and its flags ask for.

        Args:
            folder: whether a complete checkpoint may also be a folder with rank_0.

        Raises:
            RequestError: they contradict each other.
        """
        ending = next((s for s in SUFFIXES if path.name.endswith(s)), "")
        if ending and form not in ("auto", ending[1:]):
            raise RequestError(
                f"the output {path} ends in {ending}; --cfg.format says {form}",
                f"a name that ends in .{form}",
            )
        if ending and spread.ranks > 1:
            raise RequestError(
                f"the output {path} is the name of one file; the layout has {spread.ranks} ranks",
                "the name of a folder, for rank_0 and so on",
            )
        if not ending and spread.ranks == 1 and not folder:
            raise RequestError(
                f"the output {path} does not end in .ckpt or .safetensors",
                "the name of a file: MindSpore loads only files whose name ends so",
            )
        ckpt = ending != ".safetensors" and form != "safetensors"
        if crc and not ckpt:
            raise RequestError("--crc adds a checksum to .ckpt files; safetensors have none")
        return Destination(bool(ending), ckpt, crc)


def rank_path(rank: int, suffix: str) -> str:
    """Path of a rank's weight file, as ``transform_checkpoints`` and MindFormers expect it."""
    return f"rank_{rank}/checkpoint_{rank}.{suffix}"


def strategy_images(spread: Spread) -> Iterator[FileImage]:
    """A strategy file for each rank, and with pipeline stages the merged one."""
    named = [{key.name(): slicing for key, slicing in stage.items()} for stage in spread.stages]
    for stage, slicings in enumerate(named):
        content = encode_strategy(Strategy({stage: slicings}))
        for local in range(spread.devices):
            rank = stage * spread.devices + local
            yield small(f"{STRATEGIES}/ckpt_strategy_rank_{rank}.ckpt", content)
    if len(named) > 1:
        yield small(MERGED, encode_strategy(Strategy(dict(enumerate(named)), merged=True)))
