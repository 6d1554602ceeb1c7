"""What can be asked of stacked experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ExpertStyle = Literal["merge", "split", "transformers4", "transformers5"]


@dataclass(frozen=True)
class MoEExpert:
    """Hugging Face -> Hugging Face with experts in another form, as MindSpeed-MM spells it."""

    style: ExpertStyle
    """merge: one stack for the experts of a layer, as MindSpeed-MM trains them. split: a tensor for
    each expert again. transformers4, transformers5: stacks in the order of those versions."""
    hf_dir: Path
    """Folder of the Hugging Face checkpoint."""
    save_dir: Path
    """Folder to write."""
