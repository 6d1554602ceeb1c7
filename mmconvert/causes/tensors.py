"""What the names and shapes of a checkpoint's tensors say of all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from mmconvert.causes.quantised import quantised
from mmconvert.errors import FormError, TensorError
from mmconvert.names import number, summarise
from mmconvert.narrow import is_dict, is_object
from mmconvert.stored import StoredTensor

ADAPTER_CONFIG = "adapter_config.json"
MERGE = (
    "merge it into its base model first: lora_merge --cfg.base_dir BASE --cfg.lora_dir ADAPTER (or "
    "peft's merge_and_unload, then save_pretrained); lora_hf_to_mm converts an adapter by itself"
)
GATHER = (
    "gather them with zero_to_fp32.py, which DeepSpeed leaves beside global_step*/: python "
    "zero_to_fp32.py . OUT; or save with stage3_gather_16bit_weights_on_model_save"
)
DOWNLOAD = "download the weight files again; if config.json belongs to another model, replace it"
TIE = (
    "set tie_word_embeddings true in config.json, if the model's output layer is its word "
    "embedding; else download the weight files again"
)
MAX_CONFIG = 1 << 20  # bytes of an adapter_config.json
# Part of a module's path that PEFT's tuners put in: what it wraps, and what it adds.
_ADAPTER = re.compile(
    r"(?:^|\.)(?:base_layer|lora_[A-Za-z_]+|hada_\w+|lokr_\w+|ia3_l|vera_lambda_\w|oft_[rs]"
    r"|modules_to_save|original_module|token_adapter)(?:\.|$)"
)
# Experts of one layer in one tensor each for both linears, or numbered behind them.
_GROUPED = re.compile(r"\.experts\.(?:weight[12]|linear_fc[12]\.weight\d+)$")
# Words that wrappers put into names, and what they are.
WRAPPERS = {
    "module": "DistributedDataParallel, DeepSpeed",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
DEEPEST = 4  # words of a prefix


def unusable(
    tensors: Mapping[str, StoredTensor],
    known: Callable[[str], bool],
    config: Mapping[str, object],
    folder: Path,
) -> FormError | None:
    """Why these tensors are no plain weights of a model; None if they look like it.

    Args:
        tensors: by the name that ``known`` understands.
        known: whether the model's table knows a name.
        config: config.json; empty where there is none.
        folder: where an adapter_config.json may stand.
    """
    weights = {name: tensor for name, tensor in tensors.items() if known(name)}
    others = {name: tensor for name, tensor in tensors.items() if name not in weights}
    found = (
        quantised(others.values(), weights.values(), config)
        or adapter(list(others), folder)
        or empty(list(weights.values()))
        or wrapped(list(tensors), known)
        or grouped(list(others))
    )
    return found and FormError(found.cause, f"{folder}: {found.what}", found.expected, found.fix)


def adapter(names: Collection[str], folder: Path) -> FormError | None:
    """Low-rank matrices that are not merged, alone or beside the weights that they change."""
    found = sorted(name for name in names if _ADAPTER.search(name))
    if not found:
        return None
    modules = {_ADAPTER.split(name)[0].rpartition(".")[2] for name in found} - {""}
    return unmerged(
        f"{number(found, 'tensor')} of an unmerged LoRA adapter ({summarise(modules)}): "
        f"{summarise(found, 2)}",
        folder,
    )


def unmerged(what: str, folder: Path) -> FormError:
    """The refusal of an adapter; its base model is named where adapter_config.json does."""
    base = base_model(folder)
    return FormError(
        "unmerged-adapter",
        what + (f"; its base is {base} by {ADAPTER_CONFIG}" if base else ""),
        "the weights of a whole model",
        MERGE,
    )


def base_model(folder: Path) -> str:
    """What adapter_config.json calls the base model; "" if nothing does."""
    path = folder / ADAPTER_CONFIG
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG:
            return ""
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    base = content.get("base_model_name_or_path") if is_object(content) else None
    return base[:200] if isinstance(base, str) else ""


def empty(weights: Sequence[StoredTensor]) -> FormError | None:
    """Weights without elements: ZeRO-3 keeps the parameters elsewhere."""
    found = [tensor.name for tensor in weights if 0 in tensor.shape]
    if not found:
        return None
    return FormError(
        "empty-tensors",
        f"{len(found)} of {number(weights, 'weight')} are empty, as DeepSpeed's ZeRO-3 leaves "
        f"those that were not gathered: {summarise(found)}",
        "weights with values",
        GATHER,
    )


def wrapped(names: Sequence[str], known: Callable[[str], bool]) -> FormError | None:
    """Names behind the prefix of a wrapper, or with its words within them."""
    if 2 * sum(map(known, names)) >= len(names):
        return None
    words = names[0].split(".")
    for count in range(1, min(DEEPEST, len(words) - 1) + 1):
        prefix = ".".join(words[:count]) + "."
        inner = [name.removeprefix(prefix) for name in names]
        if not all(name.startswith(prefix) for name in names):
            break
        if 2 * sum(known(_plain(name)) for name in inner) >= len(names):
            while words[count] in WRAPPERS and all(
                n.split(".")[count] == words[count] for n in names
            ):
                prefix, count = f"{prefix}{words[count]}.", count + 1
            return _wrapped(f"every name begins with {prefix}", prefix, names)
    inner = [_plain(name) for name in names]
    if 2 * sum(map(known, inner)) < len(names):
        return None
    found = next(word for word in WRAPPERS if any(word in name.split(".") for name in names))
    return _wrapped(f"names have {found}. in them", found, names)


def grouped(names: Collection[str]) -> FormError | None:
    """Experts side by side: Megatron's GroupedMLP, or the grouped ones of Transformer Engine."""
    found = sorted(name for name in names if _GROUPED.search(name))
    if not found:
        return None
    return FormError(
        "grouped-experts",
        f"{number(found, 'tensor')} of grouped experts (--moe-grouped-gemm): {summarise(found, 2)}",
        "a tensor for each expert: mlp.experts.local_experts.0.linear_fc1.weight and so on",
        "save the checkpoint once from a run without --moe-grouped-gemm; nothing here proves how "
        "the experts stand in a group",
    )


def _plain(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def _wrapped(what: str, prefix: str, names: Sequence[str]) -> FormError:
    made = next((maker for word, maker in WRAPPERS.items() if word in prefix.split(".")), "")
    made = "PEFT" if prefix.startswith("base_model.model.") else made
    return FormError(
        "wrapped-names",
        f"{what}, as a wrapper of training leaves them{made and f' ({made})'}: "
        f"{summarise(names, 1)}",
        "the names of the model alone",
        "save the state dict of the model inside the wrapper, or take the prefix off the names",
    )


def no_model(file: Path, content: Mapping[str, object]) -> FormError:
    """A rank file without ``model``: the weights may lie under another key, or at the top."""
    tensors = sum(isinstance(value, StoredTensor) for value in content.values())
    holders = _holders(content)
    what = f"holds no model, but {summarise(list(map(str, content))) or 'nothing'}"
    where = f"under {str(holders[0])!r}" if holders else "at its top"
    return FormError(
        "chunk-keys",
        f"{file} {what}" + (f"; there are tensors {where}" if holders or tensors else ""),
        "model, or model0, model1, ... without a gap",
        f"save it as {{'model': WEIGHTS, 'checkpoint_version': 3.0}}, WEIGHTS being those {where}"
        if holders or tensors
        else "copy the file with the model's weights here",
    )


def _holders(content: Mapping[str, object]) -> list[str]:
    """The keys under which tensors lie."""
    return [
        key
        for key, value in content.items()
        if is_dict(value) and any(isinstance(v, StoredTensor) for v in value.values())
    ]


def nested(file: Path, content: Mapping[str, object]) -> FormError | None:
    """A weight file that holds the weights under a key, as trainers save them."""
    holders = _holders(content)
    if not holders:
        return None
    return FormError(
        "nested-weights",
        f"{file} holds {summarise(list(content))}; there are tensors under {holders[0]!r}",
        "a dict of tensors alone, as a model's state_dict is",
        f"save what is under {holders[0]!r} by itself, with torch.save",
    )


def missing(
    places: Mapping[str, Sequence[str]], heads: Collection[str], folder: Path
) -> Iterator[TensorError]:
    """Tensors that the model lacks, an error for each place.

    Args:
        places: where in the model -> the names of those that are missing there.
        heads: the names of its output layer, which a tied model does not store.
    """
    total = sum(map(len, places.values()))
    for place, names in places.items():
        more = f"; {total} in all" if len(places) > 1 else ""
        yield TensorError(
            f"{number(names, 'tensor')} missing: {summarise(names)} ({place}{more})",
            "every tensor of the model, in the names of the hub or of transformers",
            TIE if set(names) <= set(heads) else DOWNLOAD,
            cause="missing-tensor",
            path=folder,
            tensors=names,
        )
