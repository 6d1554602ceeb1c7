"""Modules that are not trained: their names, and what training must know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from difflib import get_close_matches

from mmconvert.errors import RequestError
from mmconvert.formats.model import Model
from mmconvert.sharding.stages import StageGrid, flat

DUMMY = "--enable-dummy-optimizer"  # MindSpeed-MM's flag for ranks without trained weights


def frozen_keys(model: Model, names: Sequence[str]) -> set[str]:
    """Module keys of the modules that are named.

    Raises:
        RequestError: a name that is no module's, or every module frozen.
    """
    keys = {m.label: m.key for m in model.modules}
    for name in names:
        if name not in keys:
            near = get_close_matches(name, keys, n=1, cutoff=0.4)
            raise RequestError(
                f"--freeze {name}: {model.family.name} has no such module",
                f"one or more of {', '.join(keys)}",
                f"did you mean {near[0]}?" if near else "take a module's MM name",
            )
    found = {keys[name] for name in names}
    if found == set(keys.values()):
        raise RequestError(
            f"--freeze {','.join(keys)} leaves nothing to train", "a module that is trained"
        )
    return found


def frozen_warnings(grids: Mapping[str, StageGrid], frozen: Set[str], pp: int) -> list[str]:
    """What to say of ranks and model chunks without anything to train."""
    trained = [flat(grid) for key, grid in grids.items() if key not in frozen]
    idle = [not any(counts[s] for counts in trained) for s in range(len(trained[0]))]
    whole = [rank for rank in range(pp) if all(idle[rank::pp])]
    parts = [s for s, empty in enumerate(idle) if empty and s % pp not in whole]
    out: list[str] = []
    if whole:
        ranks = ", ".join(map(str, whole))
        words = f"ranks {ranks} hold" if len(whole) > 1 else f"rank {ranks} holds"
        out.append(f"pipeline {words} only frozen weights: training needs {DUMMY}")
    if parts:
        listed = ", ".join(f"{s // pp} of pipeline rank {s % pp}" for s in parts)
        words = f"chunks {listed} hold" if len(parts) > 1 else f"chunk {listed} holds"
        out.append(
            f"model {words} only frozen weights, beside chunks of the same rank that are trained: "
            f"training may need {DUMMY}"
        )
    return out
