"""The command ``moe_expert``: experts merged, split or transposed, as MindSpeed-MM spells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from mmconvert.cli import conversions
from mmconvert.cli.arguments import Screen, read_plain
from mmconvert.cli.screen import screen_events
from mmconvert.config import Options
from mmconvert.config.experts import MoEExpert

PROG = "mm-convert moe_expert"
TEXT = f"""Hugging Face to Hugging Face, with experts in another form: InternVL3.5-MoE, GLM-4.5V,
Qwen3-Omni, Qwen3-VL-MoE.

examples:
  {PROG} --style merge --hf_dir HF_DIR --save_dir MERGED
  {PROG} --style split --hf_dir MERGED --save_dir NEW_HF_DIR --max_shard_size 4GB"""


@dataclass(frozen=True)
class ExpertFlags:
    """What to convert."""

    cfg: Annotated[MoEExpert, tyro.conf.OmitArgPrefixes]
    conversion: Annotated[Options, tyro.conf.OmitArgPrefixes] = field(default_factory=Options)
    screen: Annotated[Screen, tyro.conf.OmitArgPrefixes] = field(default_factory=Screen)


def run(words: list[str]) -> int:
    """Runs one conversion."""
    asked = read_plain(ExpertFlags, words, PROG, TEXT)
    from mmconvert.regroup import moe_expert  # not before the flags are understood

    with screen_events(quiet=asked.screen.quiet) as events:
        result = moe_expert(asked.cfg, asked.conversion, events)
    conversions.show("moe_expert", result, asked.screen)
    return 0
