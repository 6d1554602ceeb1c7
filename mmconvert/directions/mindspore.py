"""The verbs of MindSpore."""

from __future__ import annotations

from dataclasses import fields, replace

from mmconvert.config import Options
from mmconvert.config.mindspore import DeviceConfig, HFToMS, MSResplit, MSToHF, RankFolders
from mmconvert.convert import convert
from mmconvert.converters.family import Family
from mmconvert.directions import TARGET
from mmconvert.events import Events
from mmconvert.request import PARALLEL, End, Request
from mmconvert.result import Result


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


def resplit(
    family: Family, cfg: MSResplit, options: Options | None = None, events: Events | None = None
) -> Result:
    """MindSpore -> MindSpore in another layout."""
    more = RankFolders(strategy=cfg.target_strategy, format=cfg.format)
    asked = Request(
        "resplit",
        End("ms", cfg.source_dir, RankFolders(strategy=cfg.source_strategy)),
        End("ms", cfg.target_dir, _ranks(cfg.target_parallel_config, more), TARGET),
        original=cfg.hf_config.hf_dir,
        dtype=cfg.dtype,
        cfg=cfg,
    )
    return convert(family, asked, options, events)


def _ranks(sizes: DeviceConfig, more: RankFolders) -> RankFolders:
    """A MindSpore layout with these parallel sizes."""
    return replace(more, **{f.name: getattr(sizes, f.name) for f in fields(DeviceConfig)})
