"""MM checkpoint folders: ``[release|iter_N]/mp_rank_TT[_PPP[_EEE]]/model_optim_rng.pt``.

Source: mm-checkpoints section 1, Megatron-LM's checkpoint naming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mmconvert.adapters import BASE_LAYER, MARK
from mmconvert.causes.folders import other_form
from mmconvert.causes.tensors import no_model
from mmconvert.errors import CheckpointError, FormatError
from mmconvert.formats import manifest
from mmconvert.formats.containers.pickles import Inert
from mmconvert.formats.containers.ptfile import PtFile, read_pt
from mmconvert.formats.reading import opened
from mmconvert.narrow import is_dict, is_object
from mmconvert.sharding.layout import Chunk, Rank, parse_folder
from mmconvert.stored import StoredTensor

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_PART = re.compile(r"model(0|[1-9]\d{0,3})?")
EXTRA_STATE = "_extra_state"  # Transformer Engine's per-layer state; None in MM checkpoints


@dataclass(frozen=True)
class MMCheckpoint:
    """An MM checkpoint's metadata.

    Attributes:
        root: the folder that was given.
        folder: the folder that holds the rank folders.
        iteration: ``release``, or the iteration number as text.
        tp_folders, pp_size, vpp_size, ep_size: what its folders and files say.
        parts: tensors by name, by chunk.
        notes: what beside the weights was found and left alone, in words.
    """

    root: Path
    folder: Path
    iteration: str
    tp_folders: int
    pp_size: int
    vpp_size: int
    parts: Mapping[Chunk, Mapping[str, StoredTensor]]
    notes: list[str] = field(default_factory=list[str])
    ep_size: int = 1


def is_mm(root: Path) -> bool:
    """Whether a path has the signs of an MM checkpoint: a tracker file, or rank folders."""
    if not root.is_dir():
        return False
    return (root / TRACKER).is_file() or any(parse_folder(path.name) for path in root.iterdir())


def find_weights(root: Path) -> tuple[Path, str]:
    """The folder of rank folders, and the iteration that it holds (``release`` or a number).

    ``root`` is a checkpoint with a tracker file, or itself holds rank folders.

    Raises:
        CheckpointError: no checkpoint here; FormatError: a tracker file that makes no sense.
    """
    if not root.is_dir():
        raise CheckpointError(
            f"{root} is not a folder",
            f"an MM checkpoint: {TRACKER} with release/ or iter_N/",
            "check the path; training writes below its --save folder",
        )
    tracker = root / TRACKER
    if tracker.is_file():
        text = tracker_text(tracker)
        name = "release" if text == "release" else f"iter_{int(text):07d}"
        if not (root / name).is_dir():
            raise CheckpointError(
                f"{tracker} says {text!r}, but {root / name} is not there",
                f"the folder {name} beside the tracker file",
                "write the number of an iteration that exists into the tracker file",
            )
        return root / name, text
    if any(parse_folder(path.name) for path in root.iterdir()):
        number = re.fullmatch(r"iter_(\d{7,12})", root.resolve().name)
        return root, str(int(number[1])) if number else "release"
    raise other_form(root, "mm") or CheckpointError(
        f"{root} has neither {TRACKER} nor mp_rank_* folders",
        f"an MM checkpoint: {TRACKER} with release/ or iter_N/",
        "it is a Hugging Face checkpoint: hf_to_mm reads it"
        if (root / "config.json").is_file()
        else "check the path; training writes below its --save folder",
    )


def tracker_text(tracker: Path) -> str:
    """What a tracker file says: ``release``, or a number.

    Raises:
        FormatError: neither.
    """
    try:
        with opened(tracker) as file:
            text = file.read(64).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{tracker}: unreadable ({error})", "release, or a number") from None
    if text != "release" and not (text.isdigit() and len(text) <= 12):
        raise FormatError(f"{tracker} holds {text!r}", "release, or an iteration number")
    return text


def open_mm(root: Path) -> MMCheckpoint:
    """Reads the metadata of every rank file of an MM checkpoint.

    Raises:
        CheckpointError: folders missing or mixed; FormatError: a damaged file.
    """
    folder, iteration = find_weights(root)
    ranks = _rank_folders(folder)
    parts: dict[Chunk, Mapping[str, StoredTensor]] = {}
    keys: dict[Path, list[str]] = {}
    notes: dict[str, int] = {}
    for rank, path in ranks.items():
        file = path / RANK_FILE
        if not file.is_file():
            raise CheckpointError(f"{path} has no {RANK_FILE}", "the weights of every rank")
        found = rank_parts(read_pt(file), notes)
        keys[file] = sorted(found)
        for virtual, name in enumerate(part_names(file, found)):
            parts[Chunk(rank, virtual)] = found[name]
    first, *others = keys
    for file in others:
        if keys[file] != keys[first]:
            raise CheckpointError(
                f"{file} holds {', '.join(keys[file])}; {first} {', '.join(keys[first])}",
                "rank files of one checkpoint, with the same model chunks",
                "keep one checkpoint in this folder",
            )
    names = {name for part in parts.values() for name in part}
    if _counts_ep(names, parts, root) if is_adapter(names) else second_is_ep(parts):
        parts = {Chunk(Rank(c.rank.tp, 0, c.rank.pp), c.virtual): p for c, p in parts.items()}
    tp, pp, ep = (max(numbers) + 1 for numbers in zip(*(c.rank for c in parts), strict=True))
    words = [f"{what} ({count} bytes) left out" for what, count in notes.items()]
    return MMCheckpoint(root, folder, iteration, tp, pp, len(keys[first]), parts, words, ep)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are the matrices of an adapter, as training saves them, and nothing else."""
    listed = list(names)
    return bool(listed) and all(MARK in name and BASE_LAYER not in name for name in listed)


def _counts_ep(names: Iterable[str], parts: Iterable[Chunk], root: Path) -> bool:
    """As :func:`second_is_ep`, of an adapter: its stages may have the same names, and so it is
    mmconvert.json that tells; without it only experts are taken for expert-parallel.
    """
    ranks = [chunk.rank for chunk in parts]
    if any(rank.ep for rank in ranks) or not any(rank.pp for rank in ranks):
        return False
    layout = (manifest.read(root)[0] or {}).get("layout")
    if is_object(layout):
        return layout.get("ep_size") is not None
    return any("local_experts" in name for name in names)


def second_is_ep(parts: Mapping[Chunk, Mapping[str, StoredTensor]]) -> bool:
    """Whether the second number of ``mp_rank_TT_XXX`` counts expert-parallel ranks.

    Pipeline stages differ in what they hold: the embedding stands on one. Expert-parallel ranks
    have the same names throughout, as each numbers its experts anew.
    """
    if all(chunk.rank.pp == 0 for chunk in parts) or any(chunk.rank.ep for chunk in parts):
        return False
    return all(
        tensors.keys() == parts.get(Chunk(Rank(c.rank.tp, 0), c.virtual), {}).keys()
        for c, tensors in parts.items()
    )


def _rank_folders(folder: Path) -> dict[Rank, Path]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}", "a readable folder") from error
    found = {name: parse_folder(name) for name in names}
    numbers = {name: n for name, n in found.items() if n is not None}
    if not numbers:
        raise other_form(folder, "mm") or CheckpointError(
            f"{folder} has no mp_rank_* folders", "one folder for each rank"
        )
    forms = {sum(x is not None for x in n): name for name, n in numbers.items()}
    if len(forms) > 1:
        raise CheckpointError(
            f"{folder} mixes folders of different layouts: {', '.join(sorted(forms.values()))}",
            "the rank folders of one checkpoint",
            "move the folders of the other checkpoint away",
        )
    ranks = {Rank(tp, pp or 0, ep or 0): folder / name for name, (tp, pp, ep) in numbers.items()}
    if len(ranks) != len(numbers):
        raise CheckpointError(f"{folder} has two folders for one rank: {', '.join(numbers)}")
    tp, pp, ep = (max(numbers) + 1 for numbers in zip(*ranks, strict=True))
    if len(ranks) != tp * pp * ep:
        # may be very many
        places = (Rank(t, p, e) for p in range(pp) for e in range(ep) for t in range(tp))
        absent = islice((rank for rank in places if rank not in ranks), 5)
        listed = ", ".join(
            f"tp {r.tp} pp {r.pp} ep {r.ep}" if ep > 1 else f"tp {r.tp} pp {r.pp}" for r in absent
        )
        raise CheckpointError(
            f"{folder} has {len(ranks)} rank folders; missing: {listed}",
            f"{tp} x {pp} x {ep} folders (tp x pp x ep)"
            if ep > 1
            else f"{tp} x {pp} folders (tp x pp)",
            "copy the missing folders from the machines that wrote them",
        )
    return dict(sorted(ranks.items()))


def part_names(file: Path, found: Iterable[str]) -> list[str]:
    """The keys of a rank file's model chunks, in their order.

    Raises:
        FormatError: none, or with a gap.
    """
    names = sorted(found, key=lambda name: int(name[5:] or 0))
    if names == ["model"] or names == [f"model{i}" for i in range(len(names))] != []:
        return names
    raise FormatError(
        f"{file} holds {', '.join(names) or 'no model'}",
        "model, or model0, model1, ... without a gap",
    )


def rank_parts(pt: PtFile, notes: dict[str, int]) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of a rank file: by name, by key of their model chunk.

    Args:
        notes: receives the bytes of everything else, by its key.

    Raises:
        FormatError: something else than tensors among the weights.
    """
    file = pt.path
    found: dict[str, dict[str, StoredTensor]] = {}
    for key, value in pt.content.items():
        if not _PART.fullmatch(key):
            if not isinstance(value, (bool, int, float, str, type(None))):
                notes[key] = notes.get(key, 0) + pt.referenced_bytes(value)
            continue
        if not is_dict(value):
            raise FormatError(f"{file}: {key} is not a dictionary", "tensors by name")
        found[key] = {}
        for name, tensor in value.items():
            if str(name).endswith(EXTRA_STATE):
                if tensor is not None:
                    notes[EXTRA_STATE] = notes.get(EXTRA_STATE, 0) + pt.referenced_bytes(tensor)
            elif isinstance(tensor, StoredTensor) and isinstance(name, str):
                found[key][name] = tensor
            else:
                what = (
                    f"an object of {tensor.function}" if isinstance(tensor, Inert) else "no tensor"
                )
                raise FormatError(
                    f"{file}: {key}[{name!r}] is {what}",
                    "only tensors among the weights; objects there are never loaded",
                    "save the model's state_dict() with plain tensors",
                )
    if not found:
        raise no_model(file, pt.content)
    return found
