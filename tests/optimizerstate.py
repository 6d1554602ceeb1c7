"""Optimizer state made by hand, as Megatron's optimizers save it; nothing of mmconvert is used.

Masters and moments are given by whole tensors in Hugging Face form, each a checkpoint of its own
that hf_to_mm divides: so the state of every layout is known without a resplit.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from commands import RANK_FILE, rank_files

ITERATION = 7
KEPT = ("master", "exp_avg", "exp_avg_sq")
Kind = Literal["plain", "distributed"]
Tensors = dict[str, torch.Tensor]


class Parts(NamedTuple):
    """Folders of Hugging Face checkpoints: the weights, and what the optimizer keeps of them."""

    weights: Path
    kept: dict[str, Path]


def make_parts(hf: Path, folder: Path) -> Parts:
    """Weights in bf16, masters that round to them, and moments, each under the weights' names."""
    generator = torch.Generator().manual_seed(3)
    kept = {name: folder / name for name in KEPT}
    for name, to in kept.items():
        shutil.copytree(hf, to)
        for file in to.glob("*.safetensors"):
            tensors = load_file(file)
            for key, weight in tensors.items():
                noise = torch.rand(weight.shape, generator=generator)
                fine = weight.float() * (1 + (noise - 0.5) / 1024)
                tensors[key] = fine if name == "master" else noise * (2 if name == "exp_avg" else 3)
                assert name != "master" or torch.equal(fine.bfloat16(), weight)
            save_file(tensors, file, metadata={"format": "pt"})
    return Parts(hf, kept)


# The modules of the model, those before others that are registered first.
WORDS: Sequence[str] = """
    image_encoder text_decoder patch_embed embedding blocks decoder encoder projector layers
    input_layernorm self_attention pre_mlp_layernorm layernorm linear_proj linear_qkv mlp
    linear_fc1 linear_fc2 final_layernorm output_layer word_embeddings proj weight bias
""".split()  # noqa: SIM905 - a list of them is a screen long


def order(name: str) -> list[int]:
    """Sorts names as a model registers them: modules in an order of its own, layers by number."""
    return [int(word) if word.isdigit() else WORDS.index(word) for word in name.split(".")]


def assemble(
    convert: Callable[[Path, Path], object], parts: Parts, folder: Path, kind: Kind
) -> Path:
    """A checkpoint as training leaves it: weights, optimizer, schedule.

    Args:
        convert: brings a Hugging Face checkpoint to MM format, in the layout that is wanted.
    """
    made: dict[str, Path] = {"weights": folder / "weights"}
    convert(parts.weights, made["weights"])
    for name, hf in parts.kept.items():
        made[name] = folder / name
        convert(hf, made[name])
    save = folder / "save"
    for rank, path in rank_files(made["weights"]).items():
        chunks = {
            part: {name: tensors[name] for name in sorted(tensors, key=order)}
            for part, tensors in _chunks(path).items()
        }
        held = {name: _chunks(rank_files(made[name])[rank]) for name in KEPT}
        to = save / f"iter_{ITERATION:07d}" / rank / RANK_FILE
        to.parent.mkdir(parents=True)
        content = {**chunks, "checkpoint_version": 3.0, "iteration": ITERATION}
        content["opt_param_scheduler"] = {"num_steps": 56, "lr_decay_style": "cosine"}
        content["args"] = Namespace(tensor_model_parallel_size=2, lr=1e-5, mm=Namespace)
        if kind == "plain":
            content["optimizer"] = _plain(chunks, held)
        else:
            first = next(iter(_kinds(chunks)))
            groups = [_group(first), _group(1.0 - first)]
            content["optimizer"] = {"optimizer": {"param_groups": groups}}
            torch.save(_buffers(chunks, held), to.with_name("distrib_optim.pt"))
        torch.save(content, to)
    (save / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    for path in made.values():
        shutil.rmtree(path)
    return save


def _chunks(path: Path) -> dict[str, Tensors]:
    content = torch.load(path, weights_only=True)
    return {key: value for key, value in content.items() if key.startswith("model")}


def _group(decay: float) -> dict[str, Any]:
    return {"wd_mult": decay, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False,
            "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1 * decay,
            "step": ITERATION}  # fmt: skip


def _decays(name: str, tensor: torch.Tensor) -> float:
    return 0.0 if name.endswith(".bias") or tensor.dim() == 1 else 1.0


def _kinds(chunks: dict[str, Tensors]) -> dict[float, None]:
    """The groups in the order of their first parameters."""
    return dict.fromkeys(_decays(n, t) for chunk in chunks.values() for n, t in chunk.items())


def _plain(chunks: dict[str, Tensors], held: dict[str, dict[str, Tensors]]) -> dict[str, Any]:
    params = [(part, name, t) for part, tensors in chunks.items() for name, t in tensors.items()]
    state: dict[int, Tensors] = {}
    groups: list[dict[str, Any]] = []
    masters: list[list[torch.Tensor]] = []
    for kind in _kinds(chunks):
        mine = [(part, name) for part, name, t in params if _decays(name, t) == kind]
        numbers = range(len(state), len(state) + len(mine))
        for number, (part, name) in zip(numbers, mine, strict=True):
            state[number] = {f: held[f][part][name] for f in KEPT[1:]}
        groups.append({**_group(kind), "params": list(numbers)})
        masters.append([held["master"][part][name] for part, name in mine])
    inner = {"state": state, "param_groups": groups}
    return {"optimizer": inner, "fp32_from_fp16_params": masters}


def _buffers(chunks: dict[str, Tensors], held: dict[str, dict[str, Tensors]]) -> dict[Any, Any]:
    """As _ParamAndGradBuffer lays them out, in one bucket."""
    tree: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (part, tensors) in enumerate(chunks.items()):
        at, starts = 0, dict[str, int]()
        for name in reversed(tensors):
            at = -(-at // 64) * 64
            starts[name] = at
            at += tensors[name].numel()
        fields: dict[str, Any] = {}
        for field in KEPT:
            flat = torch.zeros(at)
            for name, start in starts.items():
                flat[start : start + tensors[name].numel()] = held[field][part][name].flatten()
            fields["param" if field == "master" else field] = flat
        tree[number] = {(torch.bfloat16, torch.float32): {**fields, "numel_unpadded": at}}
    return tree
