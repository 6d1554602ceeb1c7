"""The verbs of DCP."""

from __future__ import annotations

from functools import partial

from mmconvert.config import Options
from mmconvert.config.dcp import DCPLayout, DCPToHF, DCPToMM, HFToDCP, HFToMMDCP, MMToDCP
from mmconvert.convert import convert
from mmconvert.converters.family import Family
from mmconvert.errors import LayoutError
from mmconvert.events import Events
from mmconvert.request import PARALLEL, End, Request
from mmconvert.result import Result


def hf_to_mm_dcp(
    family: Family, cfg: HFToMMDCP, options: Options | None = None, events: Events | None = None
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


def _with_dcp(
    command: str,
    family: Family,
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


hf_to_dcp = partial(_with_dcp, "hf_to_dcp")
dcp_to_hf = partial(_with_dcp, "dcp_to_hf")
mm_to_dcp = partial(_with_dcp, "mm_to_dcp")
dcp_to_mm = partial(_with_dcp, "dcp_to_mm")
