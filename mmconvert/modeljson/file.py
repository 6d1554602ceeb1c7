"""MindSpeed-MM's model.json: the layer lists, tensor-parallel sizes and frozen parts in it.

Keys as MindSpeed-MM 2.0.0 to 26.1.0 reads them (mindspeed_mm/configs/config.py,
models/vlm_model.py, utils/hetero_parallel.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmconvert.errors import LayoutError, RequestError
from mmconvert.sharding.layout import grid_flag, tp_flag
from mmconvert.sharding.stages import StageGrid, check_grids, parse_grid, show, total

LARGEST_FILE = 1 << 24  # bytes; theirs have some 5,000
# Module, by the beginning of its flags -> where its sizes stand. The outer part has tp, pp and cp.
PLACES = {
    "vit": ("image_encoder", "vision_encoder"),
    "audio": ("audio_encoder", "audio_encoder"),
    "llm": ("text_decoder",),
}
DECODER = "llm"
LISTS = "pipeline_num_layers"
# Part -> (MM name, whether it is frozen where nothing is said): vlm_model.py. The text decoder's
# own key has no effect there.
FREEZE = {
    ("image_encoder", "vision_encoder"): ("image_encoder.encoder", True),
    ("image_encoder", "vision_projector"): ("image_encoder.projector", False),
    ("audio_encoder", "audio_encoder"): ("audio_encoder", True),
}


@dataclass(frozen=True)
class ModelJson:
    """A model.json.

    Attributes:
        path: the file.
        content: all of it.
    """

    path: Path
    content: Mapping[str, Any]

    def part(self, *keys: str) -> Mapping[str, Any] | None:
        """A part of it, or None if it has none."""
        found: object = self.content
        for key in keys:
            found = cast("Mapping[str, object]", found).get(key) if _is_object(found) else None
        return cast("Mapping[str, Any]", found) if _is_object(found) else None

    def modules(self) -> dict[str, Mapping[str, Any]]:
        """The parts that have layers, by module key."""
        found = {key: self.part(*place) for key, place in PLACES.items()}
        return {key: part for key, part in found.items() if part is not None}

    def grids(self) -> dict[str, StageGrid]:
        """The stage grid of each module, by module key.

        Where there are no lists a module lies on one stage, as there with one pipeline rank.

        Raises:
            LayoutError: lists that do not fit each other, or not their ``num_layers``.
        """
        found: dict[str, StageGrid] = {}
        for key, part in self.modules().items():
            count, listed = part.get("num_layers"), part.get(LISTS)
            where = f"{self.path}: {'.'.join(PLACES[key])}.{LISTS}"
            if listed is None:
                if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                    continue
                listed = [count]
            grid = parse_grid(listed, where)
            if isinstance(count, int) and total(grid) != count:
                raise LayoutError(
                    f"{where} is {show(grid)}, {total(grid)} layers in all",
                    f"{count}, its num_layers",
                    "MindSpeed-MM does not check the sum, and stops when it loads the weights",
                )
            found[key] = grid
        if found:
            flags = {key: f"{'.'.join(PLACES[key])}.{LISTS}" for key in found}
            check_grids(found, flags)
        return found

    def tp(self) -> dict[str, int]:
        """The tensor-parallel sizes of a hetero-parallel training, by module key; else none.

        Raises:
            LayoutError: one is no such size.
        """
        found: dict[str, int] = {}
        for key, place in PLACES.items():
            outer = self.part(place[0]) or {}
            size = outer.get("tp")
            if size is None:
                continue
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise LayoutError(f"{self.path}: {place[0]}.tp is {size!r}", "a size from 1 on")
            found[key] = size
        return found

    def frozen(self) -> tuple[str, ...]:
        """Beginnings of the MM names that do not learn in pretrain_vlm.py.

        Raises:
            RequestError: a ``freeze`` that is neither true nor false.
        """
        found: list[str] = []
        for place, (name, default) in FREEZE.items():
            part = self.part(*place)
            if part is None:
                continue
            value = part.get("freeze", default)
            if not isinstance(value, bool):
                raise RequestError(
                    f"{self.path}: {'.'.join(place)}.freeze is {value!r}", "true or false"
                )
            found += [name] if value else []
        return tuple(found)

    def recomputed(self, usual: str) -> frozenset[str]:
        """Keys of the modules whose layers are computed again in the backward pass.

        Args:
            usual: ``--recompute-granularity``, for modules that have no such key of their own.
        """
        key = "recompute_granularity"
        return frozenset(k for k, part in self.modules().items() if part.get(key, usual) == "full")

    def layout_words(self) -> str:
        """Its layout in the words of the command line."""
        words = [f"{tp_flag(key, DECODER)} {size}" for key, size in self.tp().items()]
        return ", ".join(words + [f"{grid_flag(k)} {show(g)}" for k, g in self.grids().items()])


def read_model_json(path: Path) -> ModelJson:
    """Reads a model.json.

    Raises:
        RequestError: it is missing, no JSON object, or describes no text decoder.
    """
    expected = "MindSpeed-MM's model.json"
    content = read_object(path, "model.json")
    found = ModelJson(path, content)
    if found.part("text_decoder") is None:
        raise RequestError(
            f"{path} has no text_decoder", f"{expected}: image_encoder, text_decoder"
        )
    return found


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        RequestError: it does not, cannot be read, or is larger than any such file.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise RequestError(f"{path} has {path.stat().st_size} bytes", f"a {what}")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", f"a {what} that can be read") from None
    except (ValueError, RecursionError) as error:
        lines = "Extra data" in str(error)
        raise RequestError(
            f"{path} is not valid JSON: {error}",
            f"a {what}",
            "one object for each line? conversations are given with --data" if lines else "",
        ) from None
    if not isinstance(content, dict):
        raise RequestError(f"{path} holds no JSON object", f"a {what}")
    return cast("dict[str, Any]", content)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)
