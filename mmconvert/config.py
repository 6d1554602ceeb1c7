"""What can be asked for. Attribute docstrings are the help text of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Union

from mmconvert.sharding.layout import GRID_FLAG, TP_FLAG
from mmconvert.sharding.stages import StageGrid

# For ``X | None`` tyro asks a type-checking library, 90 ms to load, whether None is one; it sees
# by itself that None is in a typing.Union where None comes first.
MaybeGrid = Union[None, StageGrid]  # noqa: UP007 - see above
MaybeInt = Union[None, int]  # noqa: UP007 - see above
MaybePath = Union[None, Path]  # noqa: UP007 - see above


class Patterns(tuple[str, ...]):
    """Name patterns with * and ?. A class of its own, for the same reason."""

    __slots__ = ()


NO_PATTERNS = Patterns()


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel sizes and stage grids."""

    llm_pp_layers: MaybeGrid = None
    """Text decoder layers per pipeline stage: [1,10,10,7], or one list per virtual stage."""
    vit_pp_layers: MaybeGrid = None
    """Vision encoder layers per pipeline stage, in the same form."""
    audio_pp_layers: MaybeGrid = None
    """Audio encoder layers per pipeline stage, in the same form."""
    tp_size: MaybeInt = None
    """Tensor-parallel size of the text decoder; not given: 1, or as found in an MM checkpoint."""
    vit_tp_size: int = 0
    """Tensor-parallel size of the vision encoder; 0 means tp_size."""
    audio_tp_size: int = 0
    """Tensor-parallel size of the audio encoder; 0 means tp_size."""
    ep_size: int = 0
    """Expert-parallel size, for models with experts; 0 means 1, or as found in an MM checkpoint."""

    def grids(self) -> dict[str, StageGrid]:
        """The stage grids that are given, by module key."""
        given = {"vit": self.vit_pp_layers, "audio": self.audio_pp_layers}
        given["llm"] = self.llm_pp_layers
        return {key: grid for key, grid in given.items() if grid is not None}

    def tp(self) -> dict[str, int]:
        """The tensor-parallel sizes that are given, by module key."""
        given = {"vit": self.vit_tp_size, "audio": self.audio_tp_size, "llm": self.tp_size}
        return {key: size for key, size in given.items() if size}


@dataclass(frozen=True)
class HFConfig:
    """The Hugging Face checkpoint."""

    hf_dir: Path
    """Folder of the original Hugging Face checkpoint."""


@dataclass(frozen=True)
class CommonModelConfig:
    """Choices about the model's form."""

    enable_canonical_hf_struct: bool = False
    """Keep q/k/v and gate/up apart in MM format (from MM: recognised by the names)."""
    llm_hf_dir: MaybePath = None
    """Take the text decoder from this plain language model instead (hf_to_mm only)."""


@dataclass(frozen=True)
class HFToMM:
    """Hugging Face -> MM."""

    mm_dir: Path
    """Folder to write: tracker file and release/mp_rank_*/model_optim_rng.pt."""
    hf_config: HFConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    save_vit_only: bool = False
    """Write the encoders and their projector only, without the text decoder."""
    model_json: MaybePath = None
    """MindSpeed-MM's model.json in place of the layer lists and tensor-parallel sizes."""
    trust_remote_code: bool = False
    """Accepted for compatibility: config.json is read as data, nothing is ever run."""


@dataclass(frozen=True)
class MMToHF:
    """MM -> Hugging Face."""

    save_hf_dir: Path
    """Folder to write."""
    mm_dir: Path
    """MM checkpoint: a folder with a tracker file, or one iteration's folder."""
    hf_config: HFConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    model_json: MaybePath = None
    """MindSpeed-MM's model.json in place of the layer lists and tensor-parallel sizes."""
    trust_remote_code: bool = False
    """Accepted for compatibility: config.json is read as data, nothing is ever run."""


@dataclass(frozen=True)
class OptionalHFConfig:
    """A Hugging Face checkpoint to take sizes from."""

    hf_dir: MaybePath = None
    """Gives head counts by its config.json, where neither shapes nor mmconvert.json do."""


@dataclass(frozen=True)
class Resplit:
    """MM -> MM in another layout (reshard)."""

    source_dir: Path
    """MM checkpoint to read."""
    target_dir: Path
    """Folder to write."""
    source_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    target_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    hf_config: OptionalHFConfig = field(default_factory=OptionalHFConfig)
    save_vit_only: bool = False
    """Read and write the encoders and their projector only."""
    model_json: MaybePath = None
    """MindSpeed-MM's model.json in place of the lists and sizes that are written."""
    trust_remote_code: bool = False
    """Accepted for compatibility; nothing is ever run."""


@dataclass(frozen=True)
class CommonOptions:
    """How to do it, whatever the formats."""

    dry_run: bool = False
    """Plan and prove everything, write nothing."""
    overwrite: bool = False
    """Replace an existing checkpoint at the target."""
    no_sync: bool = False
    """Do not wait until the output is on the disk: for benchmarks and scratch disks. A loss of
    power may then leave zeros in a checkpoint that is finished."""
    workers: int = 0
    """Number of threads; 0 takes one for each core."""
    drop: Patterns = NO_PATTERNS
    """Leave out tensors whose names fit this pattern (* and ?); may be repeated."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Cast floating-point tensors; values that overflow or become zero are reported."""
    max_shard_size: str = ""
    """Largest weight file of Hugging Face output, such as 5GB; not given: files as in hf_dir."""
    replicas: Literal["check", "first"] = "check"
    """Copies of one tensor that differ: an error, or take the first with a warning."""


@dataclass(frozen=True)
class Options(CommonOptions):
    """How to do it."""

    digests: bool = False
    """Note a digest of every tensor, for verify --quick; reads the output once more."""
    vit_qkv: Literal["interleaved", "concatenated"] = "interleaved"
    """Order of the vision q, k, v that are read; reference 2.2.0 to 2.3.0: concatenated."""


def flag_names(key: str) -> tuple[str, str]:
    """The flags of a module: its stage grid, its tensor-parallel size."""
    return GRID_FLAG[key], TP_FLAG[key]
