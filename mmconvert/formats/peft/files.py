"""The files of a PEFT adapter: its weights, and adapter_config.json."""

from __future__ import annotations

from pathlib import Path

from mmconvert.adapters import CONFIG, parse_key
from mmconvert.errors import CheckpointError, MMConvertError, TensorError
from mmconvert.formats.containers.safetensors import WeightFile, read_weight_file
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.jsonfile import read_json_file
from mmconvert.names import summarise

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
FSDP = "lora_adapter*.safetensors"  # of MindSpeed-MM's FSDP2 training


def weight_path(path: Path) -> Path | None:
    """The weight file of an adapter's folder, or the file itself; None where there is none."""
    if path.is_file():
        return path
    for name in (SAFETENSORS, PICKLED):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob(FSDP)) if path.is_dir() else []
    return found[-1] if found else None


def read_file(path: Path) -> tuple[WeightFile, dict[str, object]]:
    """The headers of an adapter's weights, and its configuration ({} where there is none).

    Raises:
        CheckpointError: no adapter here.
    """
    found = weight_path(path)
    if found is None:
        raise CheckpointError(
            f"{path} holds no adapter" if path.exists() else f"{path} does not exist",
            f"{SAFETENSORS} and {CONFIG}, as PEFT saves them, or an MM checkpoint of LoRA training",
            "give the adapter's own folder",
        )
    file = hf_bin.read_bin(found) if found.suffix == ".bin" else read_weight_file(found)
    if not any(parse_key(tensor.name) for tensor in file.tensors):
        raise TensorError(
            f"{found}: no name has lora_ in it: {summarise([t.name for t in file.tensors], 2)}",
            "the matrices lora_A and lora_B of an adapter",
            "give the adapter's own folder, not that of a merged or base model",
        )
    config = found.parent / CONFIG
    return file, read_json_file(config) if config.is_file() else {}


def named_base(adapter: Path) -> Path | None:
    """The folder that adapter_config.json names as base model, if it is on this disk."""
    path = (adapter if adapter.is_dir() else adapter.parent) / CONFIG
    try:
        base = read_json_file(path).get("base_model_name_or_path") if path.is_file() else None
    except MMConvertError:
        return None
    if not isinstance(base, str) or not base or "\0" in base:
        return None
    return Path(base) if (Path(base) / "config.json").is_file() else None
