"""Qwen3-VL with experts: a dry run of the largest model, and conversions of a small one beside cp.

    python benchmarks/experts.py dry [--folder DIR]
    python benchmarks/experts.py copy [--rounds 3] [--layers 3] [--folder DIR]

``dry``: Qwen3-VL-235B-A22B, its real sizes in sparse files (470 GB of holes), to ep 8, tp 2, pp 4.
``copy``: the shapes of Qwen3-VL-30B-A3B with 3 layers (about 3.9 GB), to ep 2, tp 2 and back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from shapes import write_weights
from timing import machine, read, run

CONVERT = [sys.executable, "-m", "mmconvert", "Qwen3VLMegatronConverter"]
PARALLEL = "--cfg.parallel_config."
FILE = 5_000_000_000  # bytes of a weight file, as on the hub
Shape = tuple[int, ...]


class Sizes(NamedTuple):
    """A model, as its config.json has it."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    expert_ffn: int
    experts: int
    active: int = 8
    vocab: int = 151936
    depth: int = 27


LARGE = Sizes(94, 4096, 64, 4, 12288, 1536, 128)
SMALL = Sizes(48, 2048, 32, 4, 6144, 768, 128)
WIDTH, VIT_FFN, MERGED, HEAD = 1152, 4304, 4 * 1152, 128


def config(s: Sizes) -> dict[str, object]:
    """config.json."""
    text = {
        "model_type": "qwen3_vl_moe_text",
        "num_hidden_layers": s.layers,
        "hidden_size": s.hidden,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.groups,
        "head_dim": HEAD,
        "intermediate_size": s.ffn,
        "moe_intermediate_size": s.expert_ffn,
        "num_experts": s.experts,
        "num_experts_per_tok": s.active,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": s.vocab,
    }
    vision = {
        "depth": s.depth,
        "hidden_size": WIDTH,
        "num_heads": 16,
        "intermediate_size": VIT_FFN,
        "out_hidden_size": s.hidden,
        "deepstack_visual_indexes": [8, 16, 24],
        "num_position_embeddings": 2304,
        "spatial_merge_size": 2,
        "patch_size": 16,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0",
        "text_config": text,
        "vision_config": vision,
    }


def linear(name: str, out: int, into: int) -> Iterator[tuple[str, Shape]]:
    """A weight and its bias."""
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    """A norm with bias."""
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def shapes(s: Sizes) -> Iterator[tuple[str, Shape]]:
    """Names and shapes, in model order."""
    v, t = "model.visual", "model.language_model"
    yield f"{v}.patch_embed.proj.weight", (WIDTH, 3, 2, 16, 16)
    yield f"{v}.patch_embed.proj.bias", (WIDTH,)
    yield f"{v}.pos_embed.weight", (2304, WIDTH)
    for i in range(s.depth):
        b = f"{v}.blocks.{i}"
        yield from norm(f"{b}.norm1", WIDTH)
        yield from norm(f"{b}.norm2", WIDTH)
        yield from linear(f"{b}.attn.qkv", 3 * WIDTH, WIDTH)
        yield from linear(f"{b}.attn.proj", WIDTH, WIDTH)
        yield from linear(f"{b}.mlp.linear_fc1", VIT_FFN, WIDTH)
        yield from linear(f"{b}.mlp.linear_fc2", WIDTH, VIT_FFN)
    for name in ("merger", *(f"deepstack_merger_list.{k}" for k in range(3))):
        yield from norm(f"{v}.{name}.norm", WIDTH if name == "merger" else MERGED)
        yield from linear(f"{v}.{name}.linear_fc1", MERGED, MERGED)
        yield from linear(f"{v}.{name}.linear_fc2", s.hidden, MERGED)
    yield f"{t}.embed_tokens.weight", (s.vocab, s.hidden)
    for i in range(s.layers):
        p, q, kv = f"{t}.layers.{i}", s.heads * HEAD, s.groups * HEAD
        yield f"{p}.input_layernorm.weight", (s.hidden,)
        for x, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{p}.self_attn.{x}_proj.weight", (rows, s.hidden)
        yield f"{p}.self_attn.o_proj.weight", (s.hidden, q)
        for x in "qk":
            yield f"{p}.self_attn.{x}_norm.weight", (HEAD,)
        yield f"{p}.post_attention_layernorm.weight", (s.hidden,)
        yield f"{p}.mlp.gate.weight", (s.experts, s.hidden)
        yield f"{p}.mlp.experts.gate_up_proj", (s.experts, s.hidden, 2 * s.expert_ffn)
        yield f"{p}.mlp.experts.down_proj", (s.experts, s.expert_ffn, s.hidden)
    yield f"{t}.norm.weight", (s.hidden,)
    yield "lm_head.weight", (s.vocab, s.hidden)


def write(folder: Path, s: Sizes, noise: bytes = b"") -> int:
    """Writes a checkpoint; returns its bytes.

    Args:
        noise: repeated as the data; without it files are sparse.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(s), indent=2))
    files: list[dict[str, Shape]] = [{}]
    used = total = 0
    for name, shape in shapes(s):
        size = 2 * prod(shape)
        if used and used + size > FILE:
            files.append({})
            used = 0
        files[-1][name] = shape
        used, total = used + size, total + size
    weight_map: dict[str, str] = {}
    for number, run_ in enumerate(files, 1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_weights(path, run_, noise)
        weight_map |= dict.fromkeys(run_, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def layout(llm: str, vit: str, tp: int, ep: int) -> list[str]:
    """The flags of a layout."""
    pairs = {"llm_pp_layers": llm, "vit_pp_layers": vit, "tp_size": tp, "ep_size": ep}
    return [word for key, value in pairs.items() for word in (PARALLEL + key, str(value))]


def dry(folder: Path) -> None:
    """The dry run of the largest model."""
    hf = folder / "hf-235b"
    shutil.rmtree(hf, ignore_errors=True)
    total = write(hf, LARGE)
    flags = layout("[22,24,24,24]", "[27,0,0,0]", 2, 8)
    paths = ["--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(folder / "mm-235b")]
    found = run([*CONVERT, "hf_to_mm", *paths, *flags, "--dry-run"])
    shutil.rmtree(hf)
    print(f"{machine()}\nQwen3-VL-235B-A22B, {total / 1e9:.0f} GB, {' '.join(flags)}: dry run")
    print(f"{found.seconds:.1f} s, {found.peak_mib:.0f} MiB")


def copy(folder: Path, rounds: int, layers: int) -> None:
    """Conversions there and back beside ``cp -r``, in turns."""
    hf, mm, back, twin = (folder / name for name in ("hf-30b", "mm-30b", "back-30b", "cp-30b"))
    for path in (hf, mm, back, twin):
        shutil.rmtree(path, ignore_errors=True)
    noise = np.random.default_rng(0).integers(0, 256, 16 << 20, np.uint8).tobytes()
    total = write(hf, SMALL._replace(layers=layers), noise)
    there = ["hf_to_mm", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(mm)]
    there += layout(f"[{layers}]", "[27]", 2, 2)
    again = ["mm_to_hf", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(mm)]
    again += ["--cfg.save_hf_dir", str(back)]
    commands = {"cp -r": ["cp", "-r", str(hf), str(twin)]}
    commands |= {v[0]: [*CONVERT, *v, "--no-sync", "--quiet"] for v in (there, again)}
    timed: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, float] = {}
    for number in range(rounds + 1):  # the first round warms the machine; not counted
        for name, command in commands.items():
            read(mm if name == "mm_to_hf" else hf)
            found = run(command)
            peaks[name] = max(found.peak_mib, peaks.get(name, 0))
            if number:
                timed[name].append(found.seconds)
            for path in (twin, back):
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(mm)
    shutil.rmtree(hf)
    print(f"{machine()}\nthe shapes of Qwen3-VL-30B-A3B, {layers} layers, {total / 1e9:.2f} GB")
    print("| command | seconds (median, all) | peak MiB |\n|---|---|---|")
    for name, seconds in timed.items():
        every = ", ".join(f"{s:.2f}" for s in sorted(seconds))
        print(f"| {name} | {statistics.median(seconds):.2f} ({every}) | {peaks[name]:.0f} |")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("dry", "copy"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.what == "dry":
        dry(folder)
    else:
        copy(folder, args.rounds, args.layers)


if __name__ == "__main__":
    main()
