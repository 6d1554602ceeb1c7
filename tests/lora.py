"""Adapters for tests: made by PEFT of tiny models, or with random matrices for any family."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from inprocess import call

Tensors = dict[str, torch.Tensor]

# Ends of the Hugging Face names of linear layers, in every family here.
LINEAR = re.compile(
    r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|gate_up_proj|qkv|proj|fc1|fc2"
    r"|wqkv|wo|w1|w2|w3|mlp\.[0-9]|kv_a_proj_with_mqa|kv_b_proj|linear_fc1|linear_fc2)\.weight$"
)

STACK = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


def randomised(model: Any, seed: int = 3) -> Any:
    """A PEFT model whose A and B are random: B is zero before training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def save_adapter(
    folder: Path, tensors: Tensors, config: Mapping[str, Any] | None = None, **more: Any
) -> Path:
    """An adapter's folder with these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = dict(config or {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, **more)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def matrices(
    hf: Path,
    *,
    r: int = 4,
    shared: bool = False,
    only: str = "",
    dtype: torch.dtype = torch.float32,
    rename: Any = None,
    seed: int = 5,
) -> Tensors:
    """A and B for the linear layers of a checkpoint.

    Args:
        shared: layers with one input have one A, as those of a fused layer.
        only: a pattern that the names must have.
        rename: a function of a module's path.
    """
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    inputs: dict[str, torch.Tensor] = {}
    for name, tensor in weights(hf).items():
        if STACK.search(name) and re.search(only, name):
            found |= _stacked(name, tensor, r, generator)
        if tensor.ndim != 2 or not LINEAR.search(name) or not re.search(only, name):
            continue
        path = name.removesuffix(".weight")
        group = re.sub(r"\.(q|k|v|gate|up)_proj$", ".fused", path) if shared else path
        rows, cols = tensor.shape
        if group not in inputs:
            inputs[group] = (torch.randn(r, cols, generator=generator) * 0.3).to(dtype)
        new = f"base_model.model.{rename(path) if rename else path}"
        found[f"{new}.lora_A.weight"] = inputs[group].clone()
        found[f"{new}.lora_B.weight"] = (torch.randn(rows, r, generator=generator) * 0.3).to(dtype)
    assert found
    return found


def _stacked(name: str, tensor: torch.Tensor, r: int, generator: torch.Generator) -> Tensors:
    """A and B of a stack of experts as the hub has it, inputs first, in the form of PEFT."""
    count, inputs, outputs = tensor.shape
    module, _, leaf = name.rpartition(".")
    depth = ".base_layer" if leaf == "gate_up_proj" else ""
    stem = f"base_model.model.{module}{depth}.lora"
    a = torch.randn(r * count, inputs, generator=generator) * 0.3
    b = torch.randn(outputs, r * count, generator=generator) * 0.3
    return {f"{stem}_A.weight": a, f"{stem}_B.weight": b}


def weights(hf: Path) -> Tensors:
    """Every tensor of a checkpoint."""
    found: Tensors = {}
    for path in sorted(hf.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def adapter(folder: Path) -> Tensors:
    """Every tensor of an adapter."""
    return load_file(folder / "adapter_model.safetensors")


def products(tensors: Tensors, scale: float, r: int = 4) -> Tensors:
    """``scale * B @ A`` of every module, in float64; of stacked experts, one below the other."""
    found: Tensors = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = tensors[f"{module}.lora_B.weight"]
            count = a.shape[0] // r if ".experts" in module else 1
            each = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
            one = a.reshape(count, a.shape[0] // count, -1)
            found[module] = scale * (each.double() @ one.double()).flatten(0, 1)
    return found


def same(one: Tensors, other: Tensors) -> None:
    """The same names and the same bits."""
    assert one.keys() == other.keys()
    different = [
        n for n in one if one[n].dtype != other[n].dtype or not torch.equal(one[n], other[n])
    ]
    assert different == []


def run(converter: str, verb: str, *words: str | Path, check: int = 0) -> Any:
    """A command in this process."""
    return call(converter, verb, *words, check=check)


def merge(
    converter: str,
    base: Path,
    adapters: Iterable[Path],
    out: Path,
    *words: str | Path,
    check: int = 0,
) -> Any:
    """lora_merge."""
    flags: list[str | Path] = [word for path in adapters for word in ("--cfg.lora_dir", path)]
    return run(
        converter,
        "lora_merge",
        "--cfg.base_dir",
        base,
        "--cfg.save_dir",
        out,
        *flags,
        *words,
        check=check,
    )
