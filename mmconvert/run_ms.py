"""Writes MindSpore checkpoints: one file, or rank folders with their strategy files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.config_ms import Format
from mmconvert.errors import RequestError
from mmconvert.executor.output import FileOutput, Output
from mmconvert.executor.replaceable import MS_SUFFIXES
from mmconvert.formats.containers.safetensors import Entry
from mmconvert.formats.mindspore.output import (
    MERGED,
    create_files,
    plan_file,
    rank_path,
    seal_files,
    strategy_path,
)
from mmconvert.formats.mindspore.side import Spread
from mmconvert.formats.mindspore.strategy import Strategy
from mmconvert.formats.mindspore.strategy_writer import encode_strategy
from mmconvert.plan.plan import Side
from mmconvert.result import OutputFile, Result
from mmconvert.run import Run
from mmconvert.stored import StoredTensor


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
    def of(path: Path, form: Format, spread: Spread, *, crc: bool, folder: bool) -> Destination:
        """The form that a path and its flags ask for.

        Args:
            folder: whether a complete checkpoint may also be a folder with rank_0.

        Raises:
            RequestError: they contradict each other.
        """
        ending = next((s for s in MS_SUFFIXES if path.name.endswith(s)), "")
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


def write_ms(
    run: Run,
    result: Result,
    dst: Side,
    held: Sequence[Sequence[int]],
    spread: Spread,
    to: Destination,
    about: dict[str, object],
    inputs: Sequence[Path],
) -> Result:
    """Writes a MindSpore checkpoint.

    Args:
        result: what is known of it so far.
        held: for each rank the numbers of its targets.
        about: what the manifest says of it; a single file has no manifest.
    """
    targets = result.plan.targets
    suffix = "ckpt" if to.ckpt else "safetensors"
    files = [
        plan_file(
            result.output.name if to.single else rank_path(rank, suffix),
            [Entry(t.name, t.dtype, t.shape) for t in (targets[i] for i in mine)],
            mine,
            ckpt=to.ckpt,
            crc=to.crc,
        )
        for rank, mine in enumerate(held)
    ]
    beside = {} if to.single else _strategies(spread)
    listing = [OutputFile(file.path, file.size, file.targets) for file in files]
    listing += [OutputFile(name, len(content)) for name, content in beside.items()]

    def create(folder: Path) -> Sequence[StoredTensor]:
        return create_files(folder, files, beside)

    return run.write(
        replace(result, files=tuple(listing)),
        dst,
        {"kind": "ms", **about, "layout": result.layout.as_dict()},
        inputs,
        create,
        finish=lambda folder: seal_files(folder, files),
        form=FileOutput if to.single else Output,
    )


def _strategies(spread: Spread) -> dict[str, bytes]:
    """A strategy file for each rank, and with pipeline stages the merged one."""
    named = [{key.name(): slicing for key, slicing in stage.items()} for stage in spread.stages]
    found: dict[str, bytes] = {}
    for stage, slicings in enumerate(named):
        content = encode_strategy(Strategy({stage: slicings}))
        for local in range(spread.devices):
            found[strategy_path(stage * spread.devices + local)] = content
    if len(named) > 1:
        found[MERGED] = encode_strategy(Strategy(dict(enumerate(named)), merged=True))
    return found
