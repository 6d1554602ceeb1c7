"""From a model's folder to a balanced layout, its figures, and the command that converts to it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmconvert.causes.folders import other_form
from mmconvert.errors import CheckpointError, LayoutError
from mmconvert.formats.hf.folder import read_config
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.model import Model
from mmconvert.formats.recognise import family_of
from mmconvert.formats.registry import recognise
from mmconvert.plan.training import cautions, in_one_piece
from mmconvert.sharding.layout import Layout, grid_flag, tp_flag
from mmconvert.sharding.stages import StageGrid, first_stage, flat, show
from mmconvert.tools.suggest.chains import Problem, rank_loads, stage_costs
from mmconvert.tools.suggest.chains import grid as as_grid
from mmconvert.tools.suggest.cost import Costs, model_parameters, module_costs
from mmconvert.tools.suggest.experts import SHARE, STATE, about_ep, ep_sizes
from mmconvert.tools.suggest.frozen import frozen_keys, frozen_warnings
from mmconvert.tools.suggest.optimum import Balance, balance
from mmconvert.tools.suggest.shapes import config_shapes, has_weights, stored_shapes
from mmconvert.tools.suggest.workload import Workload, flows, patch_sizes

LARGEST = 1024  # no tensor-parallel group is larger; a mistyped size must not take for ever


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


def suggest(folder: Path, expected: Goal) -> Suggestion:
    """The layout whose slowest pipeline rank is fastest.

    Args:
        folder: an HF checkpoint, or a folder with its config.json.

    Raises:
        RequestError: sizes or names that cannot be.
        CheckpointError: a folder that is no such checkpoint, or damaged.
    """
    for flag, size in {"pp": expected.pp, "vpp": expected.vpp}.items():
        if size < 1:
            raise LayoutError(f"--{flag} is {size}", "a number of at least 1")
    if recognise(folder) != "hf":
        raise other_form(folder, "hf") or CheckpointError(
            f"{folder} {'has no config.json' if folder.is_dir() else 'does not exist'}",
            "the folder of a Hugging Face checkpoint, or one with its config.json alone",
            "give that folder as HF_DIR",
        )
    config = read_config(folder)
    family = family_of(folder)
    model = config_model(family, folder)
    expected.work.check(sounds=any(m.medium == "sounds" for m in model.modules))
    tp = _tp(model, expected)
    frozen = frozen_keys(model, expected.freeze)
    sizes = patch_sizes(model, config)
    notes: list[str] = []
    warnings: list[str] = []
    if has_weights(folder) and not expected.config_only:
        model, wholes = stored_shapes(family, folder)
    else:
        wholes, warnings = config_shapes(model, config, sizes)
        notes.append("sizes are those of config.json; no weight file was read")
    every = {m.key: tp.get(m.key, tp[family.decoder]) for m in model.modules}
    work = flows(model, sizes, expected.work)
    costs = module_costs(model, wholes, every, work, frozen)
    problem = _problem(costs, expected, expected.by)
    found = _balanced(problem, {m.key for m in model.modules if in_one_piece(m)})
    layout = Layout(every, found.grids, decoder=family.decoder)
    if unusable := cautions(model.modules, model.dims, layout):
        raise LayoutError(unusable[0], "a layout that training can use", "give another --tp")
    counts = {key: flat(grid) for key, grid in found.grids.items()}
    chunks = [
        sum(c)
        for c in zip(*(stage_costs(ch, counts[ch.key]) for ch in problem.chains), strict=True)
    ]
    ep, most, ranks = 0, 0, _ranks(found.grids, costs, expected, model)
    for size in ep_sizes(model, expected.ep):
        ep, costs = size, module_costs(model, wholes, every, work, frozen, size)
        ranks = _ranks(found.grids, costs, expected, model)
        most = max(rank.parameters for rank in ranks) * STATE
        if most <= expected.device_memory * SHARE:
            break
    notes += [about_ep(ep, most, expected)] if ep else []
    warnings += frozen_warnings(found.grids, frozen, expected.pp)
    if expected.vpp > 1 and expected.pp == 1:
        warnings.append("virtual stages need at least 2 pipeline ranks in training")
    return Suggestion(
        model,
        expected,
        tp,
        found,
        _over_mean(found.loads),
        _over_mean(chunks),
        ranks,
        notes,
        warnings,
        ep,
        model_parameters(model, wholes),
    )


def _balanced(problem: Problem, beside_text: Set[str]) -> Balance:
    """The balance where some encoders stand as a whole on the first stage of the text.

    To the search they are a part of what stands before the text layers.
    """
    fixed = [chain for chain in problem.encoders if chain.key in beside_text]
    text = problem.text._replace(before=problem.text.before + sum(c.total for c in fixed))
    others = tuple(chain for chain in problem.encoders if chain.key not in beside_text)
    found = balance(replace(problem, encoders=others, text=text))
    grids = dict(found.grids)
    for chain in fixed:
        counts = [0] * problem.stages
        counts[first_stage(found.grids[text.key])] = chain.layers
        grids[chain.key] = as_grid(counts, problem.pp)
    return replace(found, grids={chain.key: grids[chain.key] for chain in problem.chains})


def _tp(model: Model, expected: Goal) -> dict[str, int]:
    """The sizes that were given, checked; that of the text decoder always among them."""
    decoder = model.family.decoder
    sizes = {decoder: expected.tp}
    sizes |= {key: size for key, size in expected.encoder_tp.items() if size}
    for key, size in sizes.items():
        flag = "--" + tp_flag(key, decoder).removesuffix("_size").replace("_", "-")
        if key not in model.family.module_keys:
            raise LayoutError(f"{flag} is given, but {model.family.name} has no such module")
        if not 1 <= size <= LARGEST:
            raise LayoutError(f"{flag} is {size}", f"a size from 1 to {LARGEST}")
    largest = max(sizes.values())
    for key, size in sizes.items():
        if largest % size:
            raise LayoutError(
                f"{tp_flag(key, decoder)} {size} does not divide {largest}, the largest size",
                f"sizes that divide {largest}",
            )
    return sizes


def _problem(costs: Sequence[Costs], expected: Goal, by: str) -> Problem:
    """The modules as chains; the encoders come before the text decoder in the order of data."""
    *encoders, text = costs  # a family's table has the encoders first
    trained_encoders = any(not encoder.frozen for encoder in encoders)
    return Problem(
        tuple(encoder.chain(by, gradient=False) for encoder in encoders),
        text.chain(by, gradient=trained_encoders),
        expected.pp,
        expected.vpp,
    )


def _ranks(
    grids: Mapping[str, StageGrid], costs: Sequence[Costs], expected: Goal, model: Model
) -> list[RankFigures]:
    counts = {key: flat(grid) for key, grid in grids.items()}
    load = rank_loads(_problem(costs, expected, expected.by), counts)
    flop = rank_loads(_problem(costs, expected, "flops"), counts)
    parameters, nbytes = [0] * expected.pp, [0] * expected.pp
    for c in costs:
        filled = [stage for stage, n in enumerate(counts[c.key]) if n]
        placed = [(s, c.layer, counts[c.key][s]) for s in filled]
        placed.append((filled[0], c.before, 1))
        placed.append((filled[-1], c.after, 1))
        if (
            c.key == model.family.decoder and model.variant.tied and len(filled) == 1
        ):  # one tensor for both ends
            placed.append((filled[0], c.before, -1))
        for stage, part, times in placed:
            parameters[stage % expected.pp] += part.parameters * times
            nbytes[stage % expected.pp] += part.nbytes * times
    return [
        RankFigures(
            load[rank] / sum(load),
            flop[rank] / 1e12,
            parameters[rank],
            nbytes[rank],
            [{key: grid[v][rank] for key, grid in grids.items()} for v in range(expected.vpp)],
        )
        for rank in range(expected.pp)
    ]


def _over_mean(loads: Sequence[int]) -> float:
    return max(loads) * len(loads) / sum(loads) - 1


def _as_list(grid: StageGrid) -> list[object]:
    """As it is written on the command line: flat unless there are virtual stages."""
    return list(grid[0]) if len(grid) == 1 else [list(row) for row in grid]
