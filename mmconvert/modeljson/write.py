"""Writes a model.json, and says which flags the training script needs beside it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from mmconvert import durable
from mmconvert.errors import OutputError, cannot_write
from mmconvert.modeljson.file import DECODER, FREEZE, LISTS, PLACES
from mmconvert.narrow import is_object
from mmconvert.sharding.layout import Layout


def with_layout(content: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """A model.json with the layer lists of a layout, and with tp sizes where they differ."""
    made = copy.deepcopy(dict(content))
    hetero = len(set(layout.tp.values())) > 1
    for key, grid in layout.grids.items():
        part = made
        for name in PLACES[key]:
            part = cast("dict[str, Any]", part.setdefault(name, {}))
        rows = [list(row) for row in grid]
        part[LISTS] = rows if len(rows) > 1 else rows[0]
        outer = cast("dict[str, Any]", made[PLACES[key][0]])
        if hetero:
            outer |= {"tp": layout.tp[key], "pp": layout.pp_size, "cp": 1}
        else:
            for name in ("tp", "pp", "cp"):
                outer.pop(name, None)
    return made


def script_flags(content: Mapping[str, Any], layout: Layout) -> list[str]:
    """The flags of the training script that go with a model.json of this layout."""
    hetero = len(set(layout.tp.values())) > 1
    size = 1 if hetero else layout.tp[DECODER]
    flags = [f"--tensor-model-parallel-size {size}"]
    flags.append(f"--pipeline-model-parallel-size {layout.pp_size}")
    if layout.vpp_size > 1:
        flags.append(f"--virtual-pipeline-model-parallel-size {layout.vpp_size}")
    if layout.ep > 1:
        flags.append(f"--expert-model-parallel-size {layout.ep}")
    if hetero:
        flags.append("--hetero-parallel")
    if frozen_ranks(content, layout):
        flags.append("--enable-dummy-optimizer")
    return flags


def frozen_ranks(content: Mapping[str, Any], layout: Layout) -> list[int]:
    """Pipeline ranks on which nothing learns."""
    learns = {DECODER}
    for place, (_, default) in FREEZE.items():
        part: object = content
        for name in place:
            part = part.get(name) if is_object(part) else None
        if is_object(part) and not part.get("freeze", default):
            learns |= {key for key, known in PLACES.items() if known[0] == place[0]}
    return [
        rank
        for rank in range(layout.pp_size)
        if not any(row[rank] for key in learns if key in layout.grids for row in layout.grids[key])
    ]


def write_json(content: Mapping[str, Any], path: Path, *, overwrite: bool) -> None:
    """Writes a file that is complete or not there.

    Raises:
        OutputError: it is there, or cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists",
            "a file that does not exist yet",
            "choose another name, or give --overwrite to replace it",
        )
    text = json.dumps(content, indent=2) + "\n"
    try:
        durable.replace_file(Path(os.path.realpath(path)), text.encode())
    except OSError as error:
        raise cannot_write(path, error) from None
