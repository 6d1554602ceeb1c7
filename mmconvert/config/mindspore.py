"""What can be asked of MindSpore checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmconvert.config import DType, HFConfig, MaybeGrid, MaybePath

FileForm = Literal["auto", "ckpt", "safetensors"]


@dataclass(frozen=True)
class DeviceConfig:
    """Parallel sizes, in MindFormers' words."""

    data_parallel: int = 1
    """Replicas of the model in each pipeline stage."""
    model_parallel: int = 1
    """Devices over which weights are divided; a divisor of the numbers of heads."""
    pipeline_stage: int = 1
    """Number of pipeline stages; the text layers are dealt out evenly."""
    llm_pp_layers: MaybeGrid = None
    """Text layers on each pipeline stage, such as [15,17], where they are not dealt out evenly."""
    vocab_emb_dp: bool = False
    """Keep word embedding and output layer whole on every device."""
    optimizer_parallel: bool = False
    """Divide the weights of linears and convolutions over data-parallel devices too."""
    optimizer_threshold: int = 64
    """KiB of a slice below which optimizer_parallel leaves it whole."""


@dataclass(frozen=True)
class RankFolders(DeviceConfig):
    """The layout of a MindSpore checkpoint, and the form of its files."""

    strategy: MaybePath = None
    """Strategy file, or folder of them, that says how tensors are sliced; not given: those beside
    a checkpoint that is read, the parallel sizes for one that is written."""
    format: FileForm = "auto"
    """Form of the weight files; auto: by the ending of the path, else ckpt."""


@dataclass(frozen=True)
class HFToMS:
    """Hugging Face -> MindSpore."""

    ms_path: Path
    """File to write, X.ckpt (or X.safetensors); with parallel sizes: a folder."""
    hf_config: HFConfig
    dtype: DType = "keep"
    """Dtype of every tensor; values that overflow or become zero are reported."""
    format: FileForm = "auto"
    """Form of the weight files; auto: by the ending of ms_path, else ckpt."""
    parallel_config: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True)
class MSToHF:
    """MindSpore -> Hugging Face."""

    save_hf_dir: Path
    """Folder to write."""
    ms_path: Path
    """Checkpoint: a .ckpt or safetensors file, or a folder of rank_R folders."""
    hf_config: HFConfig
    strategy: MaybePath = None
    """Strategy file, or folder of them; not given: the folder strategy in ms_path or beside it."""
    dtype: DType = "keep"
    """Dtype of every tensor; values that overflow or become zero are reported."""


@dataclass(frozen=True)
class SizesConfig:
    """The original model, to check sizes with."""

    hf_dir: MaybePath = None
    """Folder whose config.json gives sizes and numbers of heads: with it, model_parallel is checked
    to keep heads whole."""


@dataclass(frozen=True)
class MSResplit:
    """MindSpore -> MindSpore in another layout."""

    source_dir: Path
    """Checkpoint to read: a .ckpt or safetensors file, or a folder of rank_R folders."""
    target_dir: Path
    """What to write: a file (X.ckpt) for a complete checkpoint, else a folder of rank_R folders."""
    source_strategy: MaybePath = None
    """Strategy file, or folder of them; not given: the folder strategy in source_dir or beside
    it."""
    target_strategy: MaybePath = None
    """Strategy files of the layout to write, of any model; not given: target_parallel_config."""
    target_parallel_config: DeviceConfig = field(default_factory=DeviceConfig)
    hf_config: SizesConfig = field(default_factory=SizesConfig)
    dtype: DType = "keep"
    """Dtype of every tensor; values that overflow or become zero are reported."""
    format: FileForm = "auto"
    """Form of the weight files; auto: by the ending of target_dir, else ckpt."""
