"""A LoRA adapter as PEFT writes it, for a checkpoint of the playground."""

from __future__ import annotations

from pathlib import Path

from mmconvert.formats.containers.safetensors import read_weight_file
from mmconvert.playground.weights import Tensor, write_json, write_safetensors

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(hf: Path, out: Path) -> Path:
    """Writes an adapter of all matrices of the text decoder of ``hf``."""
    tensors: list[Tensor] = []
    for file in sorted(hf.glob("*.safetensors")):
        for stored in read_weight_file(file).tensors:
            stem = stored.name.removesuffix(".weight")
            if stem == stored.name or stem.rpartition(".")[2] not in TARGETS:
                continue
            rows, cols = stored.shape
            for part, shape in (("A", (RANK, cols)), ("B", (rows, RANK))):
                full = f"base_model.model.{stem}.lora_{part}.weight"
                tensors.append(Tensor(full, shape, "F32", full))
    out.mkdir(parents=True)
    write_safetensors(out / "adapter_model.safetensors", tensors, "")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hf.name,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_json(out / "adapter_config.json", config)
    return out
