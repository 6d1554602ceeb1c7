"""MM checkpoint folders: ``[release|iter_N]/mp_rank_TT[_PPP[_EEE]]/model_optim_rng.pt``.

Source: mm-checkpoints section 1, Megatron-LM's checkpoint naming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmconvert.adapters import BASE_LAYER, MARK
from mmconvert.errors import CheckpointError
from mmconvert.formats import manifest
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.mm.rankfiles import EXTRA_STATE, FileChunks, extra_state, read_rank_file
from mmconvert.formats.mm.ranks import (
    DISTRIBUTED,
    RANK_FILE,
    RankFolderNames,
    rank_folders,
)
from mmconvert.formats.mm.tracker import find_weights
from mmconvert.narrow import is_object
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import StoredTensor

OPTIMIZER = "optimizer"
HINTS = {OPTIMIZER: "; resplit --optimizer takes it along"}


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
        whole: every rank could be read.
        numbers: how many numbers the names of the rank folders have.
        optimizer: bytes of the optimizer's state; None without one.
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
    whole: bool = True
    numbers: int = 1
    optimizer: int | None = None


def open_mm(root: Path, faults: Faults = STRICT) -> MMCheckpoint:
    """Reads the metadata of every rank file of an MM checkpoint.

    Args:
        faults: where those go after which reading goes on.

    Raises:
        CheckpointError: folders missing or mixed; FormatError: a damaged file.
    """
    folder, iteration = find_weights(root, faults)
    words = {tuple(name.split("/")): size for name, size in manifest.listed(root).items()}
    listed = {
        name[1]: size
        for name, size in words.items()
        if len(name) == 3 and (name[0], name[2]) == (folder.name, RANK_FILE)
    }
    ranks = rank_folders(folder, listed, faults)
    chunks, notes, states = _read(ranks, faults)
    if states:
        faults.remark(extra_state(states))
    if not chunks:
        faults.stop()
    parts: dict[Chunk, Mapping[str, StoredTensor]] = {
        Chunk(rank, virtual): tensors
        for rank, found in chunks.items()
        for virtual, tensors in enumerate(found.values())
    }
    whole = ranks.whole and len(chunks) == len(ranks.paths)
    tp, pp, ep = ranks.size
    names = {name for part in parts.values() for name in part}
    if _counts_ep(names, parts, root) if adapters_alone(names) else second_is_ep(parts):
        parts = {Chunk(Rank(c.rank.tp, 0, c.rank.pp), c.virtual): p for c, p in parts.items()}
        pp, ep = 1, pp
    virtual = len(next(iter(chunks.values())))
    left = [
        f"{what} ({count} bytes) left out{HINTS.get(what, '')}"
        for what, count in notes.items()
        if count
    ]
    return MMCheckpoint(
        *(root, folder, iteration, tp, pp, virtual, parts, left, ep, whole, ranks.numbers),
        optimizer=notes.get(OPTIMIZER),
    )


def _read(
    ranks: RankFolderNames, faults: Faults
) -> tuple[dict[Rank, FileChunks], dict[str, int], dict[Path, int]]:
    """The model chunks of every rank whose file can be read and has the chunks that most have;
    the bytes of everything else by its key, and of ``_extra_state`` by file.
    """
    files: dict[Rank, FileChunks] = {}
    notes: dict[str, int] = {}
    states: dict[Path, int] = {}
    for rank, path in ranks.paths.items():
        file, own = path / RANK_FILE, dict[str, int]()
        size = ranks.listed.get(path.name, 0)
        found = faults.attempt(lambda f=file, s=size, o=own: read_rank_file(f, o, s), FileChunks())
        if found:
            files[rank] = found
        states |= {file: own[EXTRA_STATE]} if EXTRA_STATE in own else {}
        beside = path / DISTRIBUTED
        if beside.is_file():
            own[OPTIMIZER] = own.get(OPTIMIZER, 0) + beside.stat().st_size
        notes |= {what: notes.get(what, 0) + count for what, count in own.items()}
    usual = Counter(tuple(parts) for parts in files.values()).most_common(1)
    for rank, parts in files.items():
        if tuple(parts) != usual[0][0]:
            file = ranks.paths[rank] / RANK_FILE
            fault = CheckpointError(
                f"{file} holds {', '.join(parts)}; {usual[0][1]} of {len(files)} files hold "
                f"{', '.join(usual[0][0])}",
                "rank files of one checkpoint, with the same model chunks",
                "copy the rank files of one checkpoint here",
                cause="chunk-keys-differ",
                path=file,
            )
            faults.add(fault)
    alike = {rank: parts for rank, parts in files.items() if tuple(parts) == usual[0][0]}
    return alike, notes, states


def adapters_alone(names: Iterable[str]) -> bool:
    """Whether these are the matrices of an adapter, as training saves them, and nothing else."""
    listed = list(names)
    return bool(listed) and all(MARK in name and BASE_LAYER not in name for name in listed)


def part_of(checkpoint: MMCheckpoint, part: str) -> MMCheckpoint:
    """Of a checkpoint in which adapters lie beside the weights that they change (MindSpeed-MM's
    ``lora_save_full_weight``), the ``base`` model or the ``adapter`` alone.
    """
    names = {name for tensors in checkpoint.parts.values() for name in tensors}
    if not part or not any(BASE_LAYER in name for name in names):
        return checkpoint
    keep = part == "adapter"
    parts = {
        chunk: {
            name.replace(BASE_LAYER, "."): tensor
            for name, tensor in tensors.items()
            if adapters_alone([name]) == keep
        }
        for chunk, tensors in checkpoint.parts.items()
    }
    return replace(checkpoint, parts=parts)


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

    Pipeline stages differ in what they hold outside their layers: the embedding stands on one.
    Expert-parallel ranks all have it.
    """
    if all(chunk.rank.pp == 0 for chunk in parts) or any(chunk.rank.ep for chunk in parts):
        return False
    outer = {
        (c.virtual, frozenset(name for name in tensors if not _is_numbered(name)))
        for c, tensors in parts.items()
    }
    return len(outer) == len({c.virtual for c in parts}) and any(names for _, names in outer)


def _is_numbered(name: str) -> bool:
    """Whether it is the name of a tensor in a layer."""
    return any(word.isdigit() for word in name.split("."))
