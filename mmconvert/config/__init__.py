"""What can be asked for. Attribute docstrings are the help text of the command line.

What formats other than Hugging Face's and MM are asked stands in modules of its own: none is
imported for a request that does not need it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Union

from mmconvert.sharding.layout import grid_flag, tp_flag
from mmconvert.sharding.stages import StageGrid

# For ``X | None`` tyro asks a type-checking library, 90 ms to load, whether None is one; it sees
# by itself that None is in a typing.Union where None comes first.
MaybeGrid = Union[None, StageGrid]  # noqa: UP007 - see above
MaybeInt = Union[None, int]  # noqa: UP007 - see above
MaybePath = Union[None, Path]  # noqa: UP007 - see above
MaybeFloat = Union[None, float]  # noqa: UP007 - see above
MaybeBool = Union[None, bool]  # noqa: UP007 - see above


DType = Literal["keep", "bf16", "fp16", "fp32"]
OptimizerKind = Literal["same", "plain", "distributed"]


class Patterns(tuple[str, ...]):
    """Name patterns with * and ?. A class of its own, for the same reason."""

    __slots__ = ()


NO_PATTERNS = Patterns()


class Folders(tuple[str, ...]):
    """Paths of a flag that may be repeated. A class of its own, for the same reason."""

    __slots__ = ()


NO_FOLDERS = Folders()


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
        return {k: grid for k in self.keys() if (grid := getattr(self, grid_flag(k))) is not None}

    def tp(self, decoder: str) -> dict[str, int]:
        """The tensor-parallel sizes that are given, by module key.

        Args:
            decoder: the key of the module that ``tp_size`` speaks of.
        """
        sizes = {key: getattr(self, tp_flag(key, decoder), 0) for key in self.keys()}
        return {key: size for key, size in {**sizes, decoder: self.tp_size}.items() if size}

    @classmethod
    def keys(cls) -> list[str]:
        """The keys of the modules that have flags."""
        end = grid_flag("")
        return [f.name.removesuffix(end) for f in fields(cls) if f.name.endswith(end)]


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
    pad_vocab_to: int = 0
    """Rows of the word embedding and the output layer in MM; those added are zeros. 0 adds none."""
    make_vocab_size_divisible_by: int = 0
    """Pad the vocabulary to a multiple of this times tp_size, as Megatron counts. 0 adds none."""
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
class Options:
    """How to convert."""

    dry_run: bool = False
    """Plan and prove everything, write nothing."""
    overwrite: bool = False
    """Replace an existing checkpoint at the target."""
    no_sync: bool = False
    """Do not wait until the output is on the disk: for benchmarks and scratch disks. A loss of
    power may then leave zeros in a checkpoint that is finished."""
    workers: int = 0
    """Number of processes, or threads, that share the work; 0 takes one for each core."""
    ranks: str = ""
    """This is process I of N that write the output together: I/N, from 0/4 to 3/4. Not given: as
    mpirun or Slurm has started it, else alone."""
    ranks_timeout: int = 600
    """Seconds to wait for the other processes at the start."""
    drop: Patterns = NO_PATTERNS
    """Leave out tensors whose names fit this pattern (* and ?); may be repeated."""
    dtype: DType = "keep"
    """Cast floating-point tensors; values that overflow or become zero are reported."""
    dequantize: bool = False
    """Read fp8 weights with a scale for each block (weight_scale_inv); written as bf16, or as
    --dtype says."""
    max_shard_size: str = ""
    """Largest weight file of Hugging Face output, such as 5GB; not given: files as in hf_dir."""
    replicas: Literal["check", "first", "mean"] = "check"
    """Copies of one tensor that differ: an error, or take the first with a warning; of adapters
    also their mean."""
    digests: bool = False
    """Note a digest of every tensor, for verify --quick; reads the output once more."""
    vit_qkv: Literal["interleaved", "concatenated"] = "interleaved"
    """Order of the vision q, k, v that are read; reference 2.2.0 to 2.3.0: concatenated."""
    experts: Literal["megatron", "transposed"] = "megatron"
    """How stacked experts that are read are stored; the reference writes some of them
    transposed."""
    optimizer: bool = False
    """resplit carries the optimizer state, the schedule and the iteration of training over too, if
    it is proven to be of the weights."""
    optimizer_kind: OptimizerKind = "same"
    """With --optimizer: the state as a run without --use-distributed-optimizer loads it (plain), or
    as one with it (distributed: distrib_optim.pt); the same kind as the source's if not given."""
    crc: bool = False
    """Add the checksum to each .ckpt that save_checkpoint adds with crc_check=True; MindSpore
    before 2.1 cannot read such files."""
