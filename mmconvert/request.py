"""A conversion that is asked for, and whether what is asked makes sense between its formats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.family import Family
from mmconvert.errors import RequestError
from mmconvert.formats.base import Format, ModelPart
from mmconvert.formats.model import Model
from mmconvert.plan.products import Adapter

PARALLEL = "--cfg.parallel_config."
# Options that make sense only where some format is read, or written.
ONLY_READ = {
    "vit_qkv": (
        "--vit-qkv says how an MM checkpoint that is read is ordered; {verb} reads none",
        "--vit-qkv with mm_to_hf or resplit",
    ),
    "experts": (
        "--experts is for reading an MM checkpoint; {verb} reads none",
        "--experts with mm_to_hf or resplit",
    ),
    "optimizer": (
        "--optimizer carries the optimizer state of an MM checkpoint over; {verb} reads none",
        "--optimizer with resplit",
    ),
    "optimizer_kind": (
        "--optimizer-kind is for optimizer state that is carried over; {verb} carries none",
        "--optimizer-kind with resplit --optimizer",
    ),
}
ONLY_WRITTEN = {
    "max_shard_size": (
        "--max-shard-size says how large weight files of a Hugging Face checkpoint may be; none is "
        "written here",
        "--max-shard-size with mm_to_hf",
    ),
    "optimizer": (
        "--optimizer carries the optimizer state over to an MM checkpoint; {verb} writes none",
        "--optimizer with resplit",
    ),
    "optimizer_kind": (
        "--optimizer-kind is for optimizer state that is carried over; {verb} writes none",
        "--optimizer-kind with resplit --optimizer",
    ),
    "crc": ("--crc adds a checksum to .ckpt files; none is written here", ""),
}


@dataclass(frozen=True)
class End:
    """One end of a conversion.

    Attributes:
        format: the name of its format.
        path: the checkpoint's.
        layout: in the format's own ``Layout``: asserts of the source, asks for the target.
        flags: how its flags begin, for messages.
        part: see :class:`mmconvert.formats.base.Opening`.
    """

    format: str
    path: Path
    layout: object = None
    flags: str = ""
    part: ModelPart = ""


@dataclass(frozen=True)
class Request:
    """A conversion that is asked for.

    Attributes:
        command: its verb.
        source, target: what becomes what.
        original: the Hugging Face checkpoint that the model came from; not needed for every one.
        canonical, encoders_only, text_dir: see :class:`mmconvert.formats.base.Opening`.
        vocabulary: rows to pad it to, and a number of which they are to be a multiple; 0 for none.
        dtype: what to cast to, where a command has a flag of its own beside ``--dtype``.
        cfg: the flags as they were given, which all processes of a run must agree on.
        like: the model that it is of, where no original is given.
        adapters: what is merged into the model on the way.
        untie: tied embeddings become two tensors.
    """

    command: str
    source: End
    target: End
    original: Path | None = None
    canonical: bool = False
    encoders_only: bool = False
    text_dir: Path | None = None
    vocabulary: tuple[int, int] = (0, 0)
    dtype: str = "keep"
    cfg: object = None
    like: Model | None = None
    adapters: tuple[Adapter, ...] = ()
    untie: bool = False


def with_given_dtype(options: Options, asked: Request) -> Options:
    """The options with the dtype that either flag gives."""
    if asked.dtype == "keep":
        return options
    if options.dtype not in ("keep", asked.dtype):
        raise RequestError(
            f"--cfg.dtype {asked.dtype} and --dtype {options.dtype} differ", "one of them"
        )
    return replace(options, dtype=asked.dtype)


def check_formats(family: Family, options: Options, reader: Format, writer: Format) -> None:
    """Raises RequestError for formats that a family's table does not lead to, and for options that
    make no sense between two formats.
    """
    for kind in (reader, writer):
        if kind.naming and kind.naming not in family.namings:
            raise RequestError(
                f"{family.name} cannot be stored as {kind.title} ({kind.name})",
                f"a format for {family.form}",
            )
    usual = Options()
    for table, known in ((ONLY_READ, reader.reads), (ONLY_WRITTEN, writer.writes)):
        for option, (what, expected) in table.items():
            if option not in known and getattr(options, option) != getattr(usual, option):
                verb = f"{reader.name}_to_{writer.name}"
                raise RequestError(what.format(verb=verb), expected)
