"""One rank file: its model chunks, their tensors, and what else is in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmconvert.causes.tensors import no_model
from mmconvert.errors import CheckpointError, FormatError, blamed
from mmconvert.formats.containers.damage import AGAIN, explained
from mmconvert.formats.containers.pickles import Inert
from mmconvert.formats.containers.ptfile import PtFile, read_pt
from mmconvert.formats.mm.ranks import COPY, RANK_FILE
from mmconvert.names import number
from mmconvert.narrow import is_dict
from mmconvert.stored import StoredTensor

_PART = re.compile(r"model(0|[1-9]\d{0,3})?")
EXTRA_STATE = "_extra_state"  # Transformer Engine's per-layer state; None in MM checkpoints


FileChunks = dict[str, dict[str, StoredTensor]]


def read_rank_file(file: Path, notes: dict[str, int], size: int = 0) -> FileChunks:
    """The tensors of one rank file by the key of their model chunk, in the chunks' order.

    Args:
        notes: receives the bytes of everything else, by its key.
        size: its bytes as mmconvert.json lists them; 0 if it does not.

    Raises:
        CheckpointError: it is not there; FormatError: it is damaged.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} has no {RANK_FILE}",
            "the weights of every rank",
            COPY,
            cause="missing-rank-file",
            path=file,
        )
    with explained(file, "rank-file", size):
        pt = read_pt(file)
    with blamed("not-a-tensor", file):
        found = rank_parts(pt, notes)
    with blamed("chunk-keys", file, fix=AGAIN):
        return {name: found[name] for name in part_names(file, found)}


def extra_state(states: Mapping[Path, int]) -> CheckpointError:
    """The remark on ``_extra_state`` entries with data, by file."""
    first, *others = states
    more = f" and {number(others, 'more file')}" if others else ""
    return CheckpointError(
        f"{first}{more}: _extra_state entries with {sum(states.values())} bytes of data "
        "(Transformer Engine's, for FP8)",
        fix="nothing, if the weights are not FP8: a conversion leaves them out",
        cause="extra-state",
        path=first,
    )


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
