"""Folders that hold a model in another form than the one that is looked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from mmconvert.causes.quantised import CAUSE, EXPECTED, FIX
from mmconvert.causes.tensors import unmerged
from mmconvert.errors import FormError
from mmconvert.names import summarise
from mmconvert.sharding.layout import parse_folder

TRACKER = "latest_checkpointed_iteration.txt"
PARTS = "param_name_map.json"  # what unified_safetensors of MindSpore writes beside its parts
MOST = 10_000  # names of a folder that are looked at
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS = re.compile(r"(?:model|pytorch_model)[^/]*\.(?:safetensors|bin)(?:\.index\.json)?")
_ITERATION = re.compile(r"iter_\d{7,12}")
_STEP = re.compile(r"global_step\d+")
_DEEPSPEED = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_\d+_(?:model|optim)_states\.pt")
_VERL = re.compile(r"model_world_size_\d+_rank_\d+\.pt")
_PART = re.compile(r"part\d+\.safetensors")

FormCheck = Callable[[Path, Sequence[str]], FormError | None]


def other_form(folder: Path, sought: str = "") -> FormError | None:
    """What a folder holds in which no weights were found; None if it is nothing that is known.

    Names of files tell it; nothing is opened but adapter_config.json.

    Args:
        sought: ``hf`` or ``mm``, the kind of checkpoint that is looked for; "" takes both.
    """
    names = _listed(folder)
    looks: list[FormCheck] = [_adapter, _distributed, _fsdp, _deepspeed, _unified, _gguf]
    looks += [_one_rank] if sought != "hf" else []
    looks.append(partial(_below, sought))
    return next((found for look in looks if (found := look(folder, names))), None)


def stale_index(index: Path, listed: Collection[str]) -> FormError | None:
    """An index none of whose files is there, beside weight files that it does not name.

    Args:
        listed: the files that it names.
    """
    names = _listed(index.parent)
    others = [n for n in names if _WEIGHTS.fullmatch(n) and not n.endswith(".json")]
    if not others or any(name in listed for name in names):
        return None
    several = ", and put the right index in its place"
    fault = FormError(
        "stale-index",
        f"{index} lists {summarise(listed)}, none of which is there; the folder holds "
        f"{summarise(others)} instead",
        "an index of the weight files beside it",
        f"the index belongs to another save: move it away{several if len(others) > 1 else ''}",
    )
    fault.path, fault.aside = index, (index,)
    return fault


def unified(folder: Path) -> FormError | None:
    """Whether a folder is what MindSpore's unified_safetensors made, and the way out."""
    return _unified(folder, _listed(folder))


def _listed(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, MOST))
    except OSError:
        return []


def _adapter(folder: Path, names: Sequence[str]) -> FormError | None:
    there = [name for name in ADAPTERS if name in names]
    if not there:
        return None
    return unmerged(f"{folder} holds an unmerged LoRA adapter alone ({there[0]})", folder)


def _distributed(folder: Path, names: Sequence[str]) -> FormError | None:
    """Folders of torch.distributed.checkpoint: of Megatron, or of another trainer.

    Megatron keeps common.pt and metadata.json there, and numbers its folders.
    """
    iterations = [name for name in reversed(names) if _ITERATION.fullmatch(name)]
    for place in (folder, *(folder / name for name in iterations[:1]), folder / "release"):
        inside = names if place == folder else _listed(place)
        parts = [name for name in inside if name.endswith(".distcp")]
        if not parts and not {".metadata", "metadata.json"} <= set(inside):
            continue
        megatron = {"common.pt", "metadata.json"} & set(inside) or _ITERATION.fullmatch(place.name)
        kind = "torch_dist" if megatron else "torch.distributed.checkpoint"
        return FormError(
            "distributed-checkpoint",
            f"{place} is a distributed checkpoint ({kind}: {summarise(parts or inside, 2)}), "
            "which this command does not read",
            "rank folders mp_rank_*, or Hugging Face weights",
            f"mm-convert AutoConverter torch_dist_to_hf --cfg.source {place}, or torch_dist_to_mm; "
            "for other families, save it again with --ckpt-format torch"
            if megatron
            else f"mm-convert GenericDCPConverter dcp_to_hf --load_dir {place}, or this verb of "
            "the family's own converter",
        )
    return None


def _fsdp(folder: Path, names: Sequence[str]) -> FormError | None:
    """What accelerate, the Trainer and verl save of an FSDP model."""
    ranks = [name for name in names if _VERL.fullmatch(name)]
    found = next((name for name in names if re.fullmatch(r"pytorch_model_fsdp_\d+", name)), "")
    if found:
        fix = f"gather it first: accelerate merge-weights {folder / found} OUT"
    elif "pytorch_model_fsdp.bin" in names:
        found = "pytorch_model_fsdp.bin"
        fix = "the file holds the whole model: copy it as pytorch_model.bin beside its config.json"
    elif ranks:
        found = ranks[0]
        fix = "gather it first: python -m verl.model_merger merge --backend fsdp --local_dir "
        fix += f"{folder} --target_dir OUT"
    else:
        return None
    return FormError(
        "fsdp-checkpoint",
        f"{folder} holds the state of FSDP training ({found}), and no weights that are read here",
        "model.safetensors, or an index with its files",
        fix,
    )


def _deepspeed(folder: Path, names: Sequence[str]) -> FormError | None:
    """DeepSpeed's folders, and one of its steps."""
    steps = [name for name in names if _STEP.fullmatch(name)]
    inside = any(_DEEPSPEED.fullmatch(name.removeprefix("bf16_")) for name in names)
    if not steps and not inside:
        return None
    top = folder if steps else folder.parent
    return FormError(
        "deepspeed-checkpoint",
        f"{folder} holds the state of DeepSpeed training "
        f"({summarise(steps) if steps else names[0]}), and no weights that are read here",
        "model.safetensors, or an index with its files",
        "gather them with the script that DeepSpeed leaves there: python "
        f"{top / 'zero_to_fp32.py'} {top} OUT",
    )


def _unified(folder: Path, names: Sequence[str]) -> FormError | None:
    """What MindSpore's unified_safetensors makes of the files of many ranks."""
    parts = [name for name in names if _PART.fullmatch(name)]
    if not parts or PARTS not in names:
        return None
    one = f"give the file {folder / parts[0]} itself, as a MindSpore checkpoint"
    many = "give the rank_R folders that it was made from, with their strategy files (ms_to_hf)"
    return FormError(
        "unified-safetensors",
        f"{folder} is what MindSpore's unified_safetensors made ({summarise(parts)}), which is not "
        "read as a folder",
        "a MindSpore file, or rank_R folders",
        one if len(parts) == 1 else many,
    )


def _gguf(folder: Path, names: Sequence[str]) -> FormError | None:
    """Files of llama.cpp, which has other names and mostly quantises."""
    found = [name for name in names if name.lower().endswith((".gguf", ".ggml"))]
    if not found:
        return None
    what = f"{folder} holds a checkpoint for llama.cpp (GGUF: {summarise(found, 2)})"
    return FormError(CAUSE, what, EXPECTED, FIX)


def _one_rank(folder: Path, names: Sequence[str]) -> FormError | None:
    if "model_optim_rng.pt" not in names:
        return None
    return FormError(
        "one-level-low",
        f"{folder} is the folder of one rank",
        f"the checkpoint that it is part of: the folder with {TRACKER}",
        f"give {_top(folder)}",
    )


def _top(rank: Path) -> Path:
    above = rank.resolve().parent
    return above.parent if (above.parent / TRACKER).is_file() else above


def _below(sought: str, folder: Path, names: Sequence[str]) -> FormError | None:
    """Checkpoints one level down: checkpoint-N of a trainer, snapshots/X of the hub's cache."""
    found = sorted(_checkpoints(folder, names, sought), key=_by_number)
    if not found:
        return None
    shown = [str(path.relative_to(folder)) for path in found]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    numbered = any(_by_number(found[-1])[:2])
    return FormError(
        "one-level-high",
        f"{folder} holds no checkpoint itself; below it: "
        f"{', '.join(shown[-5:] if numbered else shown[:5])}{more}",
        "the folder of one checkpoint",
        f"give {found[-1]}" if numbered or not more else f"give one of them, such as {found[0]}",
    )


def _checkpoints(folder: Path, names: Sequence[str], sought: str) -> Iterator[Path]:
    for name in names[:1000]:
        path = folder / name
        if name == "snapshots" or name.startswith("models--"):
            yield from _checkpoints(path, _listed(path), sought)
        elif path.is_dir() and not name.startswith(".") and _is_checkpoint(path, sought):
            yield path


def _is_checkpoint(folder: Path, sought: str) -> bool:
    names = _listed(folder)
    mm = TRACKER in names or any(parse_folder(name) for name in names)
    hf = any(_WEIGHTS.fullmatch(name) or name in ADAPTERS for name in names)
    return hf if sought == "hf" else mm if sought == "mm" else hf or mm


def _by_number(path: Path) -> tuple[bool, int, str]:
    """checkpoint-1000 after checkpoint-500; of snapshots the one that refs/main names is last."""
    try:
        main = (path.parent.parent / "refs/main").read_text(encoding="ascii").strip() == path.name
    except (OSError, ValueError):
        main = False
    number = re.fullmatch(r"\D*[-_](\d{1,12})", path.name)
    return main, int(number[1]) if number else 0, path.name
