"""A balanced layout, its figures, and the command that converts to it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmconvert.formats.model import Model
from mmconvert.sharding.layout import grid_flag, tp_flag
from mmconvert.sharding.stages import StageGrid, show
from mmconvert.tools.suggest.optimum import Balance
from mmconvert.tools.suggest.workload import Workload


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        pp, vpp: pipeline ranks and virtual stages.
        tp: tensor-parallel size of the text decoder.
        encoder_tp: that of each encoder by its key; 0 or absent means that of the decoder.
        freeze: MM names of the modules that are not trained.
        by: what is balanced, ``flops`` or ``parameters``.
        work: one training sample.
        config_only: leave weight files alone.
        ep: expert-parallel size; 0: to be proposed.
        device_memory: bytes of a device, for that.
    """

    pp: int
    vpp: int = 1
    tp: int = 1
    encoder_tp: Mapping[str, int] = field(default_factory=dict[str, int])
    freeze: tuple[str, ...] = ()
    by: str = "flops"
    work: Workload = field(default_factory=Workload)
    config_only: bool = False
    ep: int = 0
    device_memory: float = 64e9


@dataclass(frozen=True)
class RankFigures:
    """One pipeline rank: figures of one tensor-parallel rank of it.

    Attributes:
        share: its part of the whole cost, 0 to 1.
        tflop: 10^12 floating-point operations of a step for one sample.
        parameters, nbytes: of the weights that it holds.
        chunks: for each model chunk the layers of each module, by module key.
    """

    share: float
    tflop: float
    parameters: int
    nbytes: int
    chunks: list[dict[str, int]]


@dataclass(frozen=True)
class Suggestion:
    """A balanced layout.

    Attributes:
        tp: tensor-parallel sizes that were given, by module key.
        imbalance: largest load of a rank over the mean, less 1.
        chunk_imbalance: the same of model chunks, of which a rank has several with virtual stages.
        ranks: by pipeline rank.
        notes: what the figures rest on.
        warnings: what training must know.
        ep: the expert-parallel size, of models with experts; else 0.
        parameters: of the whole model, and those of them that work on one token.
    """

    model: Model
    expected: Goal
    tp: Mapping[str, int]
    balance: Balance
    imbalance: float
    chunk_imbalance: float
    ranks: list[RankFigures]
    notes: list[str]
    warnings: list[str]
    ep: int = 0
    parameters: tuple[int, int] = (0, 0)

    def parallel_config(self) -> dict[str, object]:
        """The layout with the converter's own keys."""
        out: dict[str, object] = {
            grid_flag(key): _as_list(grid) for key, grid in sorted(self.balance.grids.items())
        }
        out |= {tp_flag(key, self.model.family.decoder): size for key, size in self.tp.items()}
        return out | ({"ep_size": self.ep} if self.ep else {})

    def command(self, hf_dir: Path, mm_dir: Path) -> str:
        """The command that converts to this layout, for a POSIX shell."""
        words = ["mm-convert", self.model.family.converter, "hf_to_mm"]
        words += ["--cfg.mm_dir", str(mm_dir), "--cfg.hf_config.hf_dir", str(hf_dir)]
        for key, grid in self.balance.grids.items():
            words += [f"--cfg.parallel_config.{grid_flag(key)}", show(grid)]
        for key, size in self.tp.items():
            flag = tp_flag(key, self.model.family.decoder)
            words += [f"--cfg.parallel_config.{flag}", str(size)]
        words += ["--cfg.parallel_config.ep_size", str(self.ep)] if self.ep else []
        return shlex.join(words)

    def as_dict(self, hf_dir: Path, mm_dir: Path) -> dict[str, object]:
        """The JSON form: keys as documented in docs/json.md."""
        return {
            "parallel_config": self.parallel_config(),
            "converter": self.model.family.converter,
            "parameters": self.parameters[0],
            "active_parameters": self.parameters[1],
            "imbalance": self.imbalance,
            "chunk_imbalance": self.chunk_imbalance,
            "optimal": self.balance.optimal,
            "gap": self.balance.gap,
            "ranks": [
                {
                    "pp_rank": number,
                    "cost_share": rank.share,
                    "tflop": rank.tflop,
                    "parameters": rank.parameters,
                    "bytes": rank.nbytes,
                    "model_chunks": rank.chunks,
                }
                for number, rank in enumerate(self.ranks)
            ],
            "command": self.command(hf_dir, mm_dir),
            "notes": self.notes,
            "warnings": self.warnings,
        }


def _as_list(grid: StageGrid) -> list[object]:
    """As it is written on the command line: flat unless there are virtual stages."""
    return list(grid[0]) if len(grid) == 1 else [list(row) for row in grid]
