"""The command ``merge_base_lora_weight``: MindSpeed-MM's own spelling of a merge in MM format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mmconvert.cli.arguments import Command, Screen, read_plain
from mmconvert.config import Folders, MaybeFloat, MaybeInt, Options, ParallelConfig
from mmconvert.config.lora import LoraMerge

PROG = "mm-convert merge_base_lora_weight"
TEXT = f"""Base model + adapter, both in MM format, with the flags of MindSpeed-MM's script.

example:
  {PROG} --base_save_dir BASE --lora_save_dir ADAPTER --merge_save_dir MERGED \\
    --lora_target_modules linear_qkv linear_proj --lora_alpha 16 --lora_r 8"""


@dataclass(frozen=True)
class MergeFlags:
    """What to merge."""

    base_save_dir: Path
    """MM checkpoint of the base model."""
    lora_save_dir: Path
    """MM checkpoint of LoRA training."""
    merge_save_dir: Path
    """Folder to write."""
    lora_target_modules: tuple[str, ...] = ()
    """The modules that were adapted; not given: those that the adapter holds."""
    lora_alpha: MaybeFloat = None
    """lora_alpha of training, where the adapter does not tell it."""
    lora_r: MaybeInt = None
    """The rank; the matrices must have it."""
    pp_size: MaybeInt = None
    """Pipeline-parallel size; read off the folder."""
    tp_size: MaybeInt = None
    """Tensor-parallel size; the base model must have it."""
    conversion: Annotated[Options, tyro.conf.OmitArgPrefixes] = field(default_factory=Options)
    screen: Annotated[Screen, tyro.conf.OmitArgPrefixes] = field(default_factory=Screen)


def run(words: list[str]) -> int:
    """Runs one merge."""
    asked = read_plain(MergeFlags, words, PROG, TEXT)
    cfg = LoraMerge(
        base_dir=asked.base_save_dir,
        save_dir=asked.merge_save_dir,
        lora_dir=Folders((str(asked.lora_save_dir),)),
        lora_alpha=asked.lora_alpha,
        lora_r=asked.lora_r,
        lora_target_modules=asked.lora_target_modules,
        parallel_config=ParallelConfig(tp_size=asked.tp_size),
    )
    from mmconvert.cli import conversions
    from mmconvert.cli.commands import AUTO

    conversions.run(AUTO, "lora", "lora_merge", Command(cfg, asked.conversion, asked.screen))
    return 0
