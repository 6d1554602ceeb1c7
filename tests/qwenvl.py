"""Tiny deterministic Qwen-VL checkpoints in Hugging Face form; values as in the playground."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cli import run_cli
from commands import Done
from mmconvert.playground.checkpoints import tensor_bytes

QWENVL = "QwenVLConverter"
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model; ``inter`` is that of w1 and of w2, half of config.json's."""

    hidden: int = 128
    heads: int = 4
    layers: int = 3
    inter: int = 88
    vocab: int = 256
    width: int = 64
    vision_heads: int = 4
    vision_layers: int = 2


SMALL = Sizes()  # those of the golden record


def shapes(s: Sizes) -> Shapes:
    """Names and shapes, in the order of the model's modules."""
    h, i, w = s.hidden, s.inter, s.width
    found: Shapes = {"transformer.wte.weight": (s.vocab, h)}
    for n in range(s.layers):
        p = f"transformer.h.{n}"
        found |= {
            f"{p}.ln_1.weight": (h,),
            f"{p}.attn.c_attn.weight": (3 * h, h),
            f"{p}.attn.c_attn.bias": (3 * h,),
            f"{p}.attn.c_proj.weight": (h, h),
            f"{p}.ln_2.weight": (h,),
            f"{p}.mlp.w1.weight": (i, h),
            f"{p}.mlp.w2.weight": (i, h),
            f"{p}.mlp.c_proj.weight": (h, i),
        }
    v = "transformer.visual"
    found |= {
        "transformer.ln_f.weight": (h,),
        f"{v}.positional_embedding": (256, w),
        f"{v}.proj": (h, h),
        f"{v}.conv1.weight": (w, 3, 14, 14),
        **_pair(f"{v}.ln_pre", w),
    }
    for m in range(s.vision_layers):
        p = f"{v}.transformer.resblocks.{m}"
        found |= _pair(f"{p}.ln_1", w) | _pair(f"{p}.ln_2", w)
        found |= _pair(f"{p}.attn.in_proj", 3 * w, w) | _pair(f"{p}.attn.out_proj", w, w)
        found |= _pair(f"{p}.mlp.c_fc", 2 * w, w) | _pair(f"{p}.mlp.c_proj", w, 2 * w)
    p = f"{v}.attn_pool"
    found |= {
        f"{p}.pos_embed": (256, h),
        f"{p}.query": (256, h),
        f"{p}.kv_proj.weight": (h, w),
        f"{p}.attn.in_proj_weight": (3 * h, h),
        f"{p}.attn.in_proj_bias": (3 * h,),
        **_pair(f"{p}.attn.out_proj", h, h),
        **_pair(f"{p}.ln_q", h),
        **_pair(f"{p}.ln_kv", h),
        **_pair(f"{v}.ln_post", h),
        "lm_head.weight": (s.vocab, h),
    }
    return found


def _pair(name: str, rows: int, *cols: int) -> Shapes:
    return {f"{name}.weight": (rows, *cols), f"{name}.bias": (rows,)}


def config(s: Sizes) -> dict[str, Any]:
    """config.json, in the words of the hub's."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "bf16": False,
        "fp16": False,
        "hidden_size": s.hidden,
        "intermediate_size": 2 * s.inter,
        "kv_channels": s.hidden // s.heads,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "visual": {
            "heads": s.vision_heads,
            "image_size": 448,
            "layers": s.vision_layers,
            "mlp_ratio": 2.0,
            "output_dim": s.hidden,
            "patch_size": 14,
            "width": s.width,
        },
        "vocab_size": s.vocab,
    }


def values(s: Sizes) -> Tensors:
    """The tensors, in bfloat16."""
    return {
        name: torch.frombuffer(bytearray(tensor_bytes(name, shape)), dtype=torch.bfloat16).reshape(
            shape
        )
        for name, shape in shapes(s).items()
    }


def make_qwenvl(
    out: Path,
    sizes: Sizes = SMALL,
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
