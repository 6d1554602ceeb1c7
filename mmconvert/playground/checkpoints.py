"""Tiny deterministic Hugging Face checkpoints with the names and layer counts of real ones.

Their tables, configs and sizes are in the modules beside this one, ``catalogue`` at the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mmconvert.playground.catalogue import MODELS
from mmconvert.playground.qwenconfigs import nested_config
from mmconvert.playground.sections import flags_of, listed_tensors
from mmconvert.playground.weights import (
    Json,
    Tensor,
    tensor_bytes,
    write_json,
    write_safetensors,
    write_weights,
)

__all__ = [
    "MODELS",
    "NEW_NAMES",
    "Json",
    "Tensor",
    "make_hf",
    "nested_config",
    "renamed",
    "tensor_bytes",
    "write_json",
    "write_safetensors",
    "write_weights",
]

Rename = Sequence[tuple[str, str]]

NEW_NAMES: Rename = (("visual.", "model.visual."), ("model.", "model.language_model."))
"""Prefixes of the hub and those of transformers >= 4.52 (Qwen2-VL, Qwen2.5-VL)."""


def renamed(name: str, rename: Rename = NEW_NAMES) -> str:
    """`name` with the first prefix that fits replaced; by default the new-style name."""
    for old, new in rename:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _write_side_files(out: Path, model: str) -> None:
    write_json(
        out / "generation_config.json",
        {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643]},
    )
    write_json(
        out / "tokenizer_config.json",
        {"model_max_length": 32768, "tokenizer_class": "Qwen2Tokenizer"},
    )
    write_json(out / "preprocessor_config.json", {"patch_size": 14, "temporal_patch_size": 2})
    write_json(out / "vocab.json", {"!": 0, "\u00e9": 1})
    (out / "merges.txt").write_text("#version: 0.2\n")
    (out / "README.md").write_text(f"# tiny {model}\n\nMade by a test; not trained.\n")
    (out / "examples").mkdir(exist_ok=True)
    (out / "examples" / "image1.txt").write_text("a file in a sub-folder\n")
    if model.startswith("internvl"):
        (out / "configuration_internvl_chat.py").write_text(
            'raise RuntimeError("the code of a checkpoint must not be run")\n'
        )


def make_hf(
    model: str,
    out: Path,
    shards: int | None = None,
    extra: Iterable[tuple[str, Sequence[int]]] = (),
    rename: Rename = (),
    seed: str = "",
    *,
    same_values: bool = False,
    edit_config: Callable[[Json], Json] | None = None,
    **overrides: int | bool | str | list[int],
) -> Path:
    """Write a checkpoint of the catalogue's `model` to `out` and return `out`.

    Args:
        model: a key of `MODELS`.
        out: the folder; made if it is not there.
        shards: number of weight files; 1 writes a lone `model.safetensors` without an index.
        extra: (name, shape) of further bf16 tensors.
        rename: (prefix, new prefix) pairs; the first that fits a name is applied.
        seed: other values under the same names.
        same_values: a renamed tensor keeps the values of its old name.
        edit_config: applied to the config before it is written, such as `nested_config`.
        overrides: sizes of the catalogue entry to replace, such as `vocab_size=301`.
    """
    sections, config, sizes, default_shards = MODELS[model]
    if unknown := set(overrides) - set(sizes):
        raise TypeError(f"{model} has no size {sorted(unknown)}; it has {sorted(sizes)}")
    sizes = {**sizes, **overrides}
    listed = [
        *listed_tensors(sections, flags_of(sizes)),
        *((n, tuple(s), "BF16") for n, s in extra),
    ]
    tensors: list[Tensor] = []
    for name, shape, dtype in listed:
        new = renamed(name, rename)
        tensors.append(Tensor(new, shape, dtype, name if same_values else new))
    if len({t.name for t in tensors}) != len(tensors):
        raise ValueError("a tensor name occurs twice")

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", (edit_config or dict)(config(sizes)))
    _write_side_files(out, model)
    write_weights(out, tensors, shards or default_shards, seed)
    return out
