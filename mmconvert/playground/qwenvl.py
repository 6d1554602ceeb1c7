"""A small Qwen-VL checkpoint in Hugging Face form: names, shapes, config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmconvert.playground.weights import Json, Tensor, write_json, write_weights

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PlaygroundSizes:
    """The sizes of a model; ``inter`` is that of w1 and of w2, half of config.json's."""

    hidden: int = 128
    heads: int = 4
    layers: int = 3
    inter: int = 88
    vocab: int = 256
    width: int = 64
    vision_heads: int = 4
    vision_layers: int = 2


SMALL = PlaygroundSizes()  # those of the golden record


def shapes(s: PlaygroundSizes) -> Shapes:
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


def config(s: PlaygroundSizes) -> Json:
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


def make_qwenvl(out: Path, sizes: PlaygroundSizes = SMALL) -> Path:
    """Writes the checkpoint in two weight files, bf16."""
    out.mkdir(parents=True)
    tensors = [Tensor(name, shape, "BF16", name) for name, shape in shapes(sizes).items()]
    write_weights(out, tensors, 2)
    write_json(out / "config.json", config(sizes))
    write_json(out / "generation_config.json", {"chat_format": "raw"})
    (out / "qwen.tiktoken").write_text("IQ== 0\n")
    return out
