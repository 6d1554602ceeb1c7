"""The command ``merge_lora_safetensors_to_base``: MindSpeed-MM's own spelling of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mmconvert.cli.arguments import Command, Screen, read_plain
from mmconvert.config import Folders, MaybeFloat, MaybeInt, Options
from mmconvert.config.lora import LoraMerge

PROG = "mm-convert merge_lora_safetensors_to_base"
TEXT = f"""Hugging Face model + adapter, with the flags of MindSpeed-MM's script.

example:
  {PROG} --base_hf_dir BASE --lora_safetensors F.safetensors --save_merged_hf_dir MERGED \\
    --lora_target_modules q_proj v_proj --lora_alpha 16 --lora_r 8"""


@dataclass(frozen=True)
class SafetensorsMergeFlags:
    """What to merge."""

    base_hf_dir: Path
    """Folder of the base model."""
    lora_safetensors: Path
    """The adapter's file, or its folder."""
    save_merged_hf_dir: Path
    """Folder to write."""
    lora_target_modules: tuple[str, ...] = ()
    """The modules that were adapted; not given: those that the adapter holds."""
    lora_alpha: MaybeFloat = None
    """lora_alpha of training, where there is no adapter_config.json."""
    lora_r: MaybeInt = None
    """The rank; the matrices must have it."""
    device: str = "cpu"
    """Accepted for compatibility: the processor does it."""
    conversion: Annotated[Options, tyro.conf.OmitArgPrefixes] = field(default_factory=Options)
    screen: Annotated[Screen, tyro.conf.OmitArgPrefixes] = field(default_factory=Screen)


def run(words: list[str]) -> int:
    """Runs one merge."""
    asked = read_plain(SafetensorsMergeFlags, words, PROG, TEXT)
    cfg = LoraMerge(
        base_dir=asked.base_hf_dir,
        save_dir=asked.save_merged_hf_dir,
        lora_dir=Folders((str(asked.lora_safetensors),)),
        lora_alpha=asked.lora_alpha,
        lora_r=asked.lora_r,
        lora_target_modules=asked.lora_target_modules,
    )
    from mmconvert.cli import conversions
    from mmconvert.cli.commands import AUTO

    conversions.run(AUTO, "lora", "lora_merge", Command(cfg, asked.conversion, asked.screen))
    return 0
