"""The command ``rename_lora``: an adapter under the names that its reader expects."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmconvert.cli.arguments import Screen, read_plain
from mmconvert.cli.screen import screen_events
from mmconvert.config import Options
from mmconvert.config.lora import RenameLora
from mmconvert.executor import group

PROG = "mm-convert rename_lora"
TEXT = f"""An adapter under other names. PEFT loads one in the wrong spelling without any effect.

examples:
  {PROG} --lora_dir ADAPTER --save_dir NEW --names new
  {PROG} --lora_dir save_path/iter_100 --save_dir ADAPTER   (from FSDP2 training)"""


@dataclass(frozen=True)
class RenameFlags:
    """What to rename."""

    lora_dir: Path
    """Adapter of PEFT, or a folder with lora_adapter*.safetensors of FSDP2 training."""
    save_dir: Path
    """Folder to write."""
    names: Literal["new", "old", "fsdp2"] = "new"
    """new: PEFT with transformers 4.52 and later; old: PEFT with earlier ones; fsdp2: what
    MindSpeed-MM's FSDP2 training reads."""
    conversion: Annotated[Options, tyro.conf.OmitArgPrefixes] = field(default_factory=Options)
    screen: Annotated[Screen, tyro.conf.OmitArgPrefixes] = field(default_factory=Screen)


def run(words: list[str]) -> int:
    """Renames the tensors of one adapter."""
    asked = read_plain(RenameFlags, words, PROG, TEXT)
    from mmconvert.renaming import rename_lora

    cfg = RenameLora(asked.lora_dir, asked.save_dir, asked.names)
    with screen_events(quiet=asked.screen.quiet) as events:
        result = rename_lora(cfg, asked.conversion, events)
    if not group.current().leads:
        return 0
    if asked.screen.json:
        print(json.dumps(result.as_dict()))
    elif not asked.screen.quiet:
        done = "wrote" if result.written else "would write"
        print(f"{done} {result.output}: {len(result.plan.targets)} tensors, the same bytes")
    return 0
