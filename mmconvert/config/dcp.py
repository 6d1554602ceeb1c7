"""What can be asked of DCP folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmconvert.config import HFConfig, HFToMM, OptionalHFConfig, ParallelConfig


@dataclass(frozen=True)
class DCPLayout:
    """What a DCP folder is like."""

    ranks: int = 1
    """Divide every tensor over so many ranks, as FSDP2 does; 1 leaves tensors whole."""
    dcp_prefix: str = "auto"
    """What stands between model. and each Hugging Face name; auto: as the family's trainer has it,
    or as the folder shows."""
    names: Literal["hf", "mm"] = "hf"
    """Tensors of Hugging Face, or whole tensors of MM format under their MM names."""


@dataclass(frozen=True, kw_only=True)
class HFToDCP:
    """Hugging Face -> DCP."""

    dcp_dir: Path
    """Folder to write: release/ with .metadata and *.distcp, and a tracker file."""
    hf_config: HFConfig
    dcp_config: DCPLayout = field(default_factory=DCPLayout)


@dataclass(frozen=True, kw_only=True)
class MMToDCP(HFToDCP):
    """MM -> DCP."""

    mm_dir: Path
    """MM checkpoint."""
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class DCPSource:
    """What is read."""

    dcp_dir: Path
    """DCP folder, or the folder with its tracker file."""
    dcp_config: DCPLayout = field(default_factory=DCPLayout)


@dataclass(frozen=True, kw_only=True)
class DCPToMM(DCPSource):
    """DCP -> MM."""

    mm_dir: Path
    """Folder to write."""
    hf_config: OptionalHFConfig = field(default_factory=OptionalHFConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class DCPToHF(DCPSource):
    """DCP -> Hugging Face."""

    save_hf_dir: Path
    """Folder to write."""
    hf_config: HFConfig


@dataclass(frozen=True)
class HFToMMDCP(HFToMM):
    """Hugging Face -> DCP with whole MM tensors."""
