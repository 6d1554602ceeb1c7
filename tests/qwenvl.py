"""Tiny deterministic Qwen-VL checkpoints in Hugging Face form; values as in the playground."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cli import run_cli
from commands import Done
from mmconvert.playground.checkpoints import tensor_bytes
from mmconvert.playground.qwenvl import SMALL, PlaygroundSizes, config, shapes

QWENVL = "QwenVLConverter"
Tensors = dict[str, torch.Tensor]


def values(s: PlaygroundSizes) -> Tensors:
    """The tensors, in bfloat16."""
    return {
        name: torch.frombuffer(bytearray(tensor_bytes(name, shape)), dtype=torch.bfloat16).reshape(
            shape
        )
        for name, shape in shapes(s).items()
    }


def make_qwenvl(
    out: Path,
    sizes: PlaygroundSizes = SMALL,
    *,
    files: int = 2,
    pickled: bool = False,
    edit: Callable[[Tensors], object] = len,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        files: number of weight files; 1 has no index.
        pickled: ``pytorch_model*.bin`` in place of safetensors.
        edit: changes the tensors before they are written.
        settings: further keys of config.json.
    """
    tensors = values(sizes)
    edit(tensors)
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    out.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(files):
        part = names[len(names) * i // files : len(names) * (i + 1) // files]
        number = f"-{i + 1:05d}-of-{files:05d}" if files > 1 else ""
        name = f"{stem}{number}.{suffix}"
        held = {n: tensors[n] for n in part}
        if pickled:
            torch.save(held, out / name)
        else:
            plain = {n: t.contiguous() for n, t in held.items()}
            save_file(plain, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if files > 1:
        total = sum(t.nbytes for t in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / index).write_text(json.dumps(content, indent=1))
    (out / "config.json").write_text(json.dumps({**config(sizes), **(settings or {})}, indent=1))
    (out / "generation_config.json").write_text('{"chat_format": "raw"}')
    (out / "qwen.tiktoken").write_text("IQ== 0\n")
    (out / "modeling_qwen.py").write_text('raise RuntimeError("code of a checkpoint was run")\n')
    return out


def hf_to_ms(hf: Path, ms: Path, *flags: str, check: int | None = 0) -> Done:
    words = ["--cfg.hf_config.hf_dir", hf, "--cfg.ms_path", ms, *flags]
    return run_cli(QWENVL, "hf_to_ms", *words, check=check)


def ms_to_hf(ms: Path, hf: Path, out: Path, *flags: str, check: int | None = 0) -> Done:
    words = ["--cfg.ms_path", ms, "--cfg.hf_config.hf_dir", hf, "--cfg.save_hf_dir", out, *flags]
    return run_cli(QWENVL, "ms_to_hf", *words, check=check)


def resplit_ms(source: Path, target: Path, *flags: str, check: int | None = 0) -> Done:
    words = ["--cfg.source_dir", source, "--cfg.target_dir", target, *flags]
    return run_cli(QWENVL, "resplit", *words, check=check)


def devices(**sizes: int | str) -> list[str]:
    """The flags of the layout that resplit is to write."""
    prefix = "--cfg.target_parallel_config."
    return [word for key, value in sizes.items() for word in (f"{prefix}{key}", str(value))]
