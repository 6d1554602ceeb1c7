"""What can be asked of adapters. Attribute docstrings are the help text of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmconvert.config import (
    NO_FOLDERS,
    CommonModelConfig,
    Folders,
    MaybeBool,
    MaybeFloat,
    MaybeInt,
    MaybePath,
    OptionalHFConfig,
    ParallelConfig,
)


@dataclass(frozen=True)
class PEFTChoices:
    """What can be chosen of an adapter of PEFT."""

    lora_alpha: MaybeFloat = None
    """lora_alpha of training, where nothing else tells it."""
    structure: Literal["", "canonical", "fused"] = ""
    """q, k, v and gate, up apart or packed, in MM format."""
    exact_rank: bool = False
    """Refuse where packing q, k, v or gate, up needs a larger rank."""
    fold_scaling: bool = False
    """Bring layers of several ranks or scalings to one: pad ranks, multiply B."""
    names: Literal["new", "old"] = "new"
    """Names of transformers since 4.52, or before."""
    base_model: str = ""
    """base_model_name_or_path of the adapter_config.json that is written."""


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter, as PEFT saves it."""

    hf_dir: Path
    """Folder of the adapter: adapter_config.json and adapter_model.safetensors."""


@dataclass(frozen=True)
class LoraCommonConfig:
    """Choices about names and form."""

    enable_canonical_hf_struct: MaybeBool = None
    """q, k, v and gate, up apart in MM format; not given: as base_mm_dir has them, else packed
    where one A serves them all, apart where not."""
    model_prefix: str = ""
    """What names begin with, base_model.model. for PEFT; recognised, and only checked."""
    new_transformers_weight_key: MaybeBool = None
    """Names of transformers since 4.52 (model.language_model.), or before; recognised where an
    adapter is read."""


@dataclass(frozen=True)
class LoraHFToMM:
    """PEFT adapter -> MM."""

    mm_dir: Path
    """Folder to write: tracker file and release/mp_rank_*/model_optim_rng.pt."""
    hf_config: AdapterConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: LoraCommonConfig = field(default_factory=LoraCommonConfig)
    base_mm_dir: MaybePath = None
    """MM checkpoint of the base model: gives layout, structure and sizes."""
    base_hf_dir: MaybePath = None
    """Hugging Face folder of the base model: gives sizes by its config.json."""
    lora_alpha: MaybeFloat = None
    """lora_alpha of training, where there is no adapter_config.json."""
    exact_rank: bool = False
    """Refuse where packing q, k, v or gate, up needs a larger rank."""
    fold_scaling: bool = False
    """Bring layers of several ranks or scalings (rank_pattern, alpha_pattern, rslora) to one: lower
    ranks are padded with zeros, scalings become a part of B."""
    trust_remote_code: bool = False
    """Accepted for compatibility; nothing is ever run."""


@dataclass(frozen=True)
class LoraMMToHF:
    """MM adapter -> PEFT."""

    save_hf_dir: Path
    """Folder to write: adapter_model.safetensors and adapter_config.json."""
    mm_dir: Path
    """MM checkpoint of LoRA training, or of lora_hf_to_mm."""
    hf_config: OptionalHFConfig = field(default_factory=OptionalHFConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: LoraCommonConfig = field(default_factory=LoraCommonConfig)
    lora_alpha: MaybeFloat = None
    """lora_alpha of training, where neither its args nor mmconvert.json tell it."""
    names: Literal["", "new", "old"] = ""
    """Names of transformers since 4.52 (new, if not given), or before (old)."""
    base_model: str = ""
    """base_model_name_or_path of adapter_config.json; not given: hf_dir."""
    trust_remote_code: bool = False
    """Accepted for compatibility; nothing is ever run."""


@dataclass(frozen=True)
class LoraMerge:
    """Base model + adapters -> model."""

    base_dir: Path
    """Base model: a Hugging Face folder, or an MM checkpoint."""
    save_dir: Path
    """Folder to write."""
    lora_dir: Folders = NO_FOLDERS
    """Adapter, of PEFT or in MM format; may be repeated: they are added in this order."""
    to: Literal["", "hf", "mm"] = ""
    """What to write; not given: as the base model is."""
    hf_config: OptionalHFConfig = field(default_factory=OptionalHFConfig)
    lora_alpha: MaybeFloat = None
    """lora_alpha of training, where nothing else tells it."""
    lora_r: MaybeInt = None
    """The rank that all matrices must have."""
    lora_target_modules: tuple[str, ...] = ()
    """Ends of the names of all modules that are adapted."""
    scale: float = 1.0
    """What alpha / r is multiplied with."""
    base_is_residual: bool = False
    """The base is the residual model that an adapter of PiSSA, OLoRA, LoftQ ... belongs to."""
    untie: bool = False
    """Give a model whose output layer is its word embedding an output layer of its own, so that an
    adapter may change either of them."""
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    target_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    trust_remote_code: bool = False
    """Accepted for compatibility; nothing is ever run."""


@dataclass(frozen=True)
class RenameLora:
    """Adapter -> the same adapter under other names."""

    lora_dir: Path
    """Adapter of PEFT, or lora_adapter*.safetensors of FSDP2 training."""
    save_dir: Path
    """Folder to write."""
    names: Literal["new", "old", "fsdp2"] = "new"
    """new: PEFT with transformers 4.52 and later; old: PEFT with earlier ones; fsdp2: what
    MindSpeed-MM's FSDP2 training reads."""


@dataclass(frozen=True)
class LoraResplit:
    """MM adapter -> MM adapter in another layout."""

    source_dir: Path
    """MM adapter to read."""
    target_dir: Path
    """Folder to write."""
    source_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    target_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    hf_config: OptionalHFConfig = field(default_factory=OptionalHFConfig)
    trust_remote_code: bool = False
    """Accepted for compatibility; nothing is ever run."""
