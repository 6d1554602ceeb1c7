"""The verbs: spellings of a conversion, one for each command."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from mmconvert.config import (
    DCPLayout,
    DCPToHF,
    DCPToMM,
    HFToDCP,
    HFToMM,
    MMToDCP,
    MMToHF,
    Options,
    Resplit,
)
from mmconvert.convert import PARALLEL, End, Request, convert
from mmconvert.converters.family import Family
from mmconvert.errors import LayoutError
from mmconvert.events import Events
from mmconvert.formats.reading import watched
from mmconvert.modeljson.layout import settled
from mmconvert.msconfig import DeviceConfig, HFToMS, MSResplit, MSToHF, RankFolders
from mmconvert.result import Result


@watched
def hf_to_mm(
    family: Family, cfg: HFToMM, options: Options | None = None, events: Events | None = None
) -> Result:
    """Hugging Face -> MM. Raises and returns as :func:`convert`, like all that follow."""
    cfg = settled(cfg)
    common, hf_dir = cfg.common_model_config, cfg.hf_config.hf_dir
    asked = Request(
        "hf_to_mm",
        End("hf", hf_dir),
        End("mm", cfg.mm_dir, cfg.parallel_config, PARALLEL),
        canonical=common.enable_canonical_hf_struct,
        encoders_only=cfg.save_vit_only,
        text_dir=common.llm_hf_dir,
        vocabulary=(cfg.pad_vocab_to, cfg.make_vocab_size_divisible_by),
        cfg=cfg,
    )
    return convert(family, asked, options, events)


@watched
def mm_to_hf(
    family: Family, cfg: MMToHF, options: Options | None = None, events: Events | None = None
) -> Result:
    """MM -> Hugging Face: weight files, index and side files as in ``hf_dir``."""
    cfg = settled(cfg)
    common = cfg.common_model_config
    asked = Request(
        "mm_to_hf",
        End("mm", cfg.mm_dir, cfg.parallel_config, PARALLEL),
        End("hf", cfg.save_hf_dir),
        original=cfg.hf_config.hf_dir,
        canonical=common.enable_canonical_hf_struct,
        text_dir=common.llm_hf_dir,
        cfg=cfg,
    )
    return convert(family, asked, options, events)


def hf_to_ms(
    family: Family, cfg: HFToMS, options: Options | None = None, events: Events | None = None
) -> Result:
    """Hugging Face -> one MindSpore file, or a folder of ranks."""
    layout = _ranks(cfg.parallel_config, RankFolders(format=cfg.format))
    asked = Request(
        "hf_to_ms",
        End("hf", cfg.hf_config.hf_dir),
        End("ms", cfg.ms_path, layout, PARALLEL),
        dtype=cfg.dtype,
        cfg=cfg,
    )
    return convert(family, asked, options, events)


def ms_to_hf(
    family: Family, cfg: MSToHF, options: Options | None = None, events: Events | None = None
) -> Result:
    """MindSpore -> Hugging Face: weight files, index and side files as in ``hf_dir``."""
    asked = Request(
        "ms_to_hf",
        End("ms", cfg.ms_path, RankFolders(strategy=cfg.strategy)),
        End("hf", cfg.save_hf_dir),
        original=cfg.hf_config.hf_dir,
        dtype=cfg.dtype,
        cfg=cfg,
    )
    return convert(family, asked, options, events)


@watched
def resplit(
    family: Family,
    cfg: Resplit | MSResplit,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """MM -> MM, or MindSpore -> MindSpore, in another layout."""
    flags = ("--cfg.source_parallel_config.", "--cfg.target_parallel_config.")
    if isinstance(cfg, Resplit):
        cfg = settled(cfg)
        source = End("mm", cfg.source_dir, cfg.source_parallel_config, flags[0])
        target = End("mm", cfg.target_dir, cfg.target_parallel_config, flags[1])
    else:
        given = RankFolders(strategy=cfg.source_strategy)
        source = End("ms", cfg.source_dir, given)
        more = RankFolders(strategy=cfg.target_strategy, format=cfg.format)
        given = _ranks(cfg.target_parallel_config, more)
        target = End("ms", cfg.target_dir, given, flags[1])
    asked = Request(
        "resplit",
        source,
        target,
        original=cfg.hf_config.hf_dir,
        encoders_only=isinstance(cfg, Resplit) and cfg.save_vit_only,
        dtype="keep" if isinstance(cfg, Resplit) else cfg.dtype,
        cfg=cfg,
    )
    return convert(family, asked, options, events)


def hf_to_mm_dcp(
    family: Family, cfg: HFToMM, options: Options | None = None, events: Events | None = None
) -> Result:
    """Hugging Face -> DCP with whole MM tensors, which loaders divide as they run.

    Raises:
        LayoutError: sizes of another layout than one rank.
    """
    layout = cfg.parallel_config
    grids = [stage for grid in layout.grids().values() for stage in grid]
    if any(n > 1 for n in layout.tp(family.decoder).values()) or any(
        len(stage) > 1 for stage in grids
    ):
        raise LayoutError(
            "hf_to_mm_dcp writes whole tensors, and the request names parallel sizes",
            "no layer lists and sizes: whatever loads the folder divides them",
            "leave them out",
        )
    asked = Request(
        "hf_to_mm_dcp",
        End("hf", cfg.hf_config.hf_dir),
        End("dcp", cfg.mm_dir, DCPLayout(names="mm")),
        canonical=cfg.common_model_config.enable_canonical_hf_struct,
        encoders_only=cfg.save_vit_only,
        cfg=cfg,
    )
    return convert(family, asked, options, events)


def with_dcp(
    family: Family,
    command: str,
    cfg: MMToDCP | DCPToMM | HFToDCP | DCPToHF,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """From or to DCP, by a family's table."""
    ends = {"dcp": End("dcp", cfg.dcp_dir, cfg.dcp_config, "--cfg.dcp_config.")}
    if isinstance(cfg, (MMToDCP, DCPToMM)):
        ends["mm"] = End("mm", cfg.mm_dir, cfg.parallel_config, PARALLEL)
    elif isinstance(cfg, DCPToHF):
        ends["hf"] = End("hf", cfg.save_hf_dir)
    else:
        ends["hf"] = End("hf", cfg.hf_config.hf_dir)
    first, _, second = command.partition("_to_")
    original = None if first == "hf" else cfg.hf_config.hf_dir
    asked = Request(command, ends[first], ends[second], original=original, cfg=cfg)
    return convert(family, asked, options, events)


def between(command: str, cfg: Any) -> Request:  # noqa: ANN401 - made of the formats' flags
    """The request of a verb such as hf_to_npy, between any two formats."""
    first, _, second = command.partition("_to_")
    return Request(
        command,
        End(first, cfg.source, cfg.source_layout, "--cfg.source_layout."),
        End(second, cfg.target, cfg.target_layout, "--cfg.target_layout."),
        original=cfg.hf_config.hf_dir,
        cfg=cfg,
    )


def _ranks(sizes: DeviceConfig, more: RankFolders) -> RankFolders:
    """A MindSpore layout with these parallel sizes."""
    return replace(more, **{f.name: getattr(sizes, f.name) for f in fields(DeviceConfig)})
