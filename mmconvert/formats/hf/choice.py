"""Which files of a Hugging Face folder hold the model, and which other weights lie there.

The order is that of transformers (``_get_resolved_checkpoint_files`` of modeling_utils, 5.23).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmconvert.errors import CheckpointError
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.names import summarise

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ORDER = (SINGLE, INDEX, hf_bin.SINGLE, hf_bin.INDEX)
SAFETENSORS = ".safetensors"

# What PEFT, diffusers and LLaVA write beside a base model: no model by itself.
ADAPTER = re.compile(
    r"(adapter_(model|config)[.-].*|adapters\.(safetensors|npz)|pytorch_lora_weights\..*"
    r"|non_lora_(trainables|state_dict)\.bin)",
    re.IGNORECASE,
)
# Files that hold weights, whatever made them.
WEIGHTS = re.compile(
    r".*\.(safetensors|h5|msgpack|gguf|ggml|onnx|onnx_data|ckpt|ot|tflite|mlmodel)"
    r"|.*\.index(\.\w+)?\.json"
    r"|((pytorch_|diffusion_pytorch_|openvino_)?model|consolidated)\b.*\.(bin|pt|pth)"
    r"|(pytorch_model|ggml|model)[-_].*\.(bin|pt|pth)",
    re.IGNORECASE,
)


def choose(folder: Path, config: Mapping[str, object]) -> str:
    """The name of the weight file, or of the index, that the model is read from.

    Where transformers would find none, the only other safetensors file is taken; "" if there is
    none, or several. An adapter is no model.

    Raises:
        CheckpointError: config.json names another one (``transformers_weights``).
    """
    named = config.get("transformers_weights")
    if named is not None and named not in ORDER:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers_weights is {named!r:.80}",
            f"weights in {' or '.join(ORDER)}",
            f"give the file one of these names and take the key out of {folder / 'config.json'}",
            cause="damaged-config",
            path=folder / "config.json",
        )
    order = ORDER if named is None else (str(named),)
    found = next((name for name in order if (folder / name).is_file()), "")
    others = [] if found else weight_files(folder)
    return others[0] if len(others) == 1 else found


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that may hold a model: adapters do not."""
    found = sorted(path.name for path in folder.glob(f"*{SAFETENSORS}"))
    return [name for name in found if not ADAPTER.fullmatch(name)]


def not_read(folder: Path, read: Iterable[str]) -> list[CheckpointError]:
    """Remarks on what else lies in a folder and is no part of the model that is read.

    Args:
        read: names of the files that are.
    """
    taken = set(read)
    there = sorted(p.name for p in folder.iterdir() if p.name not in taken and p.is_file())
    adapter = [name for name in there if ADAPTER.fullmatch(name)]
    others = [name for name in there if WEIGHTS.fullmatch(name) and name not in adapter]
    found: list[CheckpointError] = []
    if adapter:
        found.append(
            CheckpointError(
                f"an adapter in {folder} is not applied: {summarise(adapter)}",
                fix="if its training is to count, merge it into the model first (PEFT's "
                "merge_and_unload, or lora_merge here)",
                cause="adapter-not-applied",
                path=folder / adapter[0],
                aside=[folder / name for name in adapter],
            )
        )
    if others and taken:
        index = others == [INDEX]
        found.append(
            CheckpointError(
                f"other weights in {folder} are not read: {summarise(others)}; the model is read "
                f"from {summarise(taken, 2)}, as transformers does",
                fix="move it away, if it belongs to another save"
                if len(others) == 1
                else "move them away, if they belong to another save",
                cause="index-not-read" if index else "stray-weight-file",
                path=folder / others[0],
                aside=[folder / name for name in others],
            )
        )
    return found
