"""mmconvert: multimodal checkpoints between Hugging Face and MM format, in any parallel layout.

The public functions are those of :mod:`mmconvert.api`, the errors those of
:mod:`mmconvert.errors`; nothing else is public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmconvert import version
from mmconvert.errors import (
    CheckpointError,
    DatasetError,
    DifferenceError,
    FormatError,
    LayoutError,
    MMConvertError,
    OutputError,
    ReplicaError,
    RequestError,
    TensorError,
    UnknownSizeError,
)

if TYPE_CHECKING:
    from mmconvert.api import (
        convert_to,
        hf_to_mm,
        hf_to_ms,
        inspect,
        load_rank,
        mm_to_hf,
        ms_to_hf,
        open,  # noqa: A004 - its public name is mmconvert.open
        reshard,
        verify,
    )
    from mmconvert.config import Options, ParallelConfig, Patterns
    from mmconvert.config.mindspore import RankFolders

__version__ = version.VERSION

__all__ = [
    "CheckpointError",
    "DatasetError",
    "DifferenceError",
    "FormatError",
    "LayoutError",
    "MMConvertError",
    "Options",
    "OutputError",
    "ParallelConfig",
    "Patterns",
    "RankFolders",
    "ReplicaError",
    "RequestError",
    "TensorError",
    "UnknownSizeError",
    "__version__",
    "convert_to",
    "hf_to_mm",
    "hf_to_ms",
    "inspect",
    "load_rank",
    "mm_to_hf",
    "ms_to_hf",
    "open",
    "reshard",
    "verify",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute can be anything
    """Loads a public function when it is first asked for: ``import mmconvert`` stays cheap."""
    from importlib import import_module

    if name == "RankFolders":
        return getattr(import_module("mmconvert.config.mindspore"), name)
    if name in ("Options", "ParallelConfig", "Patterns"):
        return getattr(import_module("mmconvert.config"), name)
    if name in __all__:
        return getattr(import_module("mmconvert.api"), name)
    raise AttributeError(f"module 'mmconvert' has no attribute {name!r}")
