"""Makes and loads models with transformers 4.57: a request a line, as JSON, and an answer."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
import transformers

import tinyfamilies
import tinymodels
import tinymoe

MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2]}  # rope_parameters, before version 5


MADE: dict[str, Any] = {}  # the classes of the models that were saved, by folder


def save(kind: str, folder: str, tied: bool, size: str) -> dict[str, Any]:
    """A model of `kind`, by its own class."""
    if kind in tinymodels.CONVERTERS:
        model = tinymodels.tiny_model(kind, tied=tied, rope_scaling=MROPE)
    elif kind.startswith("intern-"):
        model = tinyfamilies.native_intern(kind, tied=tied)
    else:
        model = getattr(tinymoe, kind)(rope_scaling={**tinymoe.ROPE})
    MADE[folder] = type(model)
    model.save_pretrained(folder, max_shard_size=size)
    return {"version": transformers.__version__}


def loaded(made: Any, folder: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint as a class loads them; nothing is missing or left over."""
    model, info = made.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return dict(model.state_dict())


def same(made: str, *folders: str) -> dict[str, Any]:
    """How two checkpoints differ when the class of a saved one, the first if it is one of them,
    loads both.
    """
    a, b = (loaded(MADE[made], folder) for folder in (made, *folders)[-2:])
    names = a.keys() ^ b.keys()
    return {"differ": sorted(names) or [n for n in a if not torch.equal(a[n], b[n])], "all": len(a)}


def main() -> None:
    for line in sys.stdin:
        what, *words = json.loads(line)
        try:
            answer = {"save": save, "same": same}[what](*words)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(f"ANSWER {json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
