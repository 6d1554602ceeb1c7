"""The verbs of MM format."""

from __future__ import annotations

from typing import Any

from mmconvert.config import HFToMM, MMToHF, Options, Resplit
from mmconvert.convert import convert
from mmconvert.converters.family import Family
from mmconvert.directions import SOURCE, TARGET
from mmconvert.events import Events
from mmconvert.formats.reading import watched
from mmconvert.request import PARALLEL, End, Request
from mmconvert.result import Result


@watched
def hf_to_mm(
    family: Family, cfg: HFToMM, options: Options | None = None, events: Events | None = None
) -> Result:
    """Hugging Face -> MM. Raises and returns as :func:`convert`, like all that follow."""
    cfg = _settled(cfg)
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
    cfg = _settled(cfg)
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


@watched
def resplit(
    family: Family, cfg: Resplit, options: Options | None = None, events: Events | None = None
) -> Result:
    """MM -> MM in another layout."""
    cfg = _settled(cfg)
    asked = Request(
        "resplit",
        End("mm", cfg.source_dir, cfg.source_parallel_config, SOURCE),
        End("mm", cfg.target_dir, cfg.target_parallel_config, TARGET),
        original=cfg.hf_config.hf_dir,
        encoders_only=cfg.save_vit_only,
        cfg=cfg,
    )
    return convert(family, asked, options, events)


def _settled(cfg: Any) -> Any:  # noqa: ANN401 - of the class that is given
    """A request whose layout flags are those of its model.json, if it has one."""
    if cfg.model_json is None:
        return cfg
    from mmconvert.modeljson.layout import settled

    return settled(cfg)
