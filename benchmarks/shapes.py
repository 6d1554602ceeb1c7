"""A Qwen2-VL-2B-shaped Hugging Face checkpoint of random bytes, for timing and nothing else.

Shapes: Qwen/Qwen2-VL-2B-Instruct's config.json on the hub.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import numpy as np

HIDDEN, FFN, LAYERS, HEADS, GROUPS, VOCAB = 1536, 8960, 28, 12, 2, 151936
WIDTH, DEPTH, VIT_HEADS = 1280, 32, 16

CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": DEPTH,
        "embed_dim": WIDTH,
        "mlp_ratio": 4,
        "num_heads": VIT_HEADS,
        "hidden_size": HIDDEN,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape, in model order."""
    found: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (WIDTH, 3, 2, 14, 14)}
    for i in range(DEPTH):
        b = f"visual.blocks.{i}"
        for norm in ("norm1", "norm2"):
            found |= {f"{b}.{norm}.weight": (WIDTH,), f"{b}.{norm}.bias": (WIDTH,)}
        for name, out, into in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            found |= {f"{b}.{name}.weight": (out, into), f"{b}.{name}.bias": (out,)}
    merged = 4 * WIDTH
    found |= {"visual.merger.ln_q.weight": (WIDTH,), "visual.merger.ln_q.bias": (WIDTH,)}
    for name, out in (("0", merged), ("2", HIDDEN)):
        found |= {f"visual.merger.mlp.{name}.weight": (out, merged)}
        found |= {f"visual.merger.mlp.{name}.bias": (out,)}
    found["model.embed_tokens.weight"] = (VOCAB, HIDDEN)
    kv = HIDDEN // HEADS * GROUPS
    for i in range(LAYERS):
        p = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{p}.{norm}.weight"] = (HIDDEN,)
        for x, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            found[f"{p}.self_attn.{x}_proj.weight"] = (rows, HIDDEN)
            found[f"{p}.self_attn.{x}_proj.bias"] = (rows,)
        found[f"{p}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{p}.mlp.gate_proj.weight"] = (FFN, HIDDEN)
        found[f"{p}.mlp.up_proj.weight"] = (FFN, HIDDEN)
        found[f"{p}.mlp.down_proj.weight"] = (HIDDEN, FFN)
    found["model.norm.weight"] = (HIDDEN,)
    return found


def write_checkpoint(
    folder: Path, files: int = 2, layers: float = 1.0, *, sparse: bool = False
) -> int:
    """Writes the checkpoint in ``files`` weight files; returns its bytes.

    Args:
        folder: created if need be.
        files: number of weight files of about equal size.
        layers: share of the text and vision layers to keep (1.0: the real 4.4 GB).
        sparse: its data are holes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(CONFIG))
    text, depth = max(1, int(LAYERS * layers)), max(1, int(DEPTH * layers))
    config["num_hidden_layers"], config["vision_config"]["depth"] = text, depth
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    kept = {n: s for n, s in shapes().items() if _layer(n) < (depth if "visual" in n else text)}
    total = 2 * sum(prod(s) for s in kept.values())
    runs: list[dict[str, tuple[int, ...]]] = [{} for _ in range(files)]
    done = 0
    for name, shape in kept.items():
        runs[min(files - 1, done * files // total)][name] = shape
        done += 2 * prod(shape)
    weight_map: dict[str, str] = {}
    noise = np.random.default_rng(0).integers(0, 256, 16 << 20, np.uint8).tobytes()
    for i, run in enumerate(runs, 1):
        file = f"model-{i:05d}-of-{files:05d}.safetensors"
        write_weights(folder / file, run, b"" if sparse else noise)
        weight_map |= dict.fromkeys(run, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def _layer(name: str) -> int:
    numbers = [int(word) for word in name.split(".") if word.isdigit()]
    return numbers[0] if "layers." in name or "blocks." in name else -1


def write_weights(path: Path, run: dict[str, tuple[int, ...]], noise: bytes) -> None:
    """One weight file in bf16; without noise its data is a hole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in run.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if not noise:
            file.truncate(8 + len(text) + at)
            return
        while at:
            at -= file.write(noise[: min(at, len(noise))])
