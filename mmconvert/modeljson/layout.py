"""The layout of a model.json beside the layout flags of a conversion: one of both, or the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from mmconvert.config import HFToMM, MMToHF, ParallelConfig, Resplit
from mmconvert.errors import LayoutError
from mmconvert.modeljson.file import DECODER, PLACES, ModelJson, read_model_json
from mmconvert.sharding.layout import grid_flag, tp_flag
from mmconvert.sharding.stages import show

Settled = TypeVar("Settled", HFToMM, MMToHF, Resplit)


def settled(cfg: Settled) -> Settled:
    """A request whose layout flags are those of its model.json, if it has one.

    For ``resplit`` the file describes the checkpoint that is written.

    Raises:
        RequestError: the file is none; LayoutError: it and a flag differ, both are printed.
    """
    if cfg.model_json is None:
        return cfg
    model = read_model_json(cfg.model_json)
    if isinstance(cfg, Resplit):
        target = joined(cfg.target_parallel_config, model, "--cfg.target_parallel_config.")
        return cast("Settled", replace(cfg, target_parallel_config=target))
    config = joined(cfg.parallel_config, model, "--cfg.parallel_config.")
    return cast("Settled", replace(cfg, parallel_config=config))


def joined(config: ParallelConfig, model: ModelJson, prefix: str = "") -> ParallelConfig:
    """Layout flags, with what a model.json says where they say nothing.

    Raises:
        LayoutError: a flag and the file differ; both are printed.
    """
    grids, sizes = config.grids(), config.tp(DECODER)
    for key, grid in model.grids().items():
        if grids.setdefault(key, grid) != grid:
            where = ".".join(PLACES[key])
            raise _differ(prefix + grid_flag(key), show(grids[key]), model.path, where, show(grid))
    for key, size in model.tp().items():
        flag = sizes.get(key, sizes.get(DECODER, size))
        if flag != size:
            name = prefix + tp_flag(key if key in sizes else DECODER, DECODER)
            raise _differ(name, str(flag), model.path, f"{PLACES[key][0]}.tp", str(size))
        sizes[key] = size
    flags: dict[str, Any] = {grid_flag(key): grid for key, grid in grids.items()}
    return replace(config, **flags, **{tp_flag(k, DECODER): size for k, size in sizes.items()})


def _differ(flag: str, one: str, path: Path, where: str, other: str) -> LayoutError:
    return LayoutError(
        f"{flag} is {one}, {path} has {other} in {where}",
        "the same in both",
        f"leave out {flag}, or change the file",
    )
