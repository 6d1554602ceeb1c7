"""From a model's folder to the layout whose slowest pipeline rank is fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from mmconvert.causes.downloads import way_to
from mmconvert.causes.folders import other_form
from mmconvert.errors import CheckpointError, LayoutError
from mmconvert.formats.hf.folder import has_weights, read_config
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.model import Model
from mmconvert.formats.recognise import family_of
from mmconvert.formats.registry import recognise
from mmconvert.plan.training import cautions, in_one_piece
from mmconvert.sharding.layout import Layout, tp_flag
from mmconvert.sharding.stages import StageGrid, first_stage, flat
from mmconvert.tools.suggest.chains import Problem, rank_loads, stage_costs
from mmconvert.tools.suggest.chains import grid as as_grid
from mmconvert.tools.suggest.cost import Costs, model_parameters, module_costs
from mmconvert.tools.suggest.experts import SHARE, STATE, about_ep, ep_sizes
from mmconvert.tools.suggest.frozen import frozen_keys, frozen_warnings
from mmconvert.tools.suggest.optimum import Balance, balance
from mmconvert.tools.suggest.shapes import config_shapes, stored_shapes
from mmconvert.tools.suggest.suggestion import Goal, RankFigures, Suggestion
from mmconvert.tools.suggest.workload import flows, patch_sizes

LARGEST = 1024  # no tensor-parallel group is larger; a mistyped size must not take for ever


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
            "give that folder as HF_DIR" if folder.exists() else way_to(folder),
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
        raise LayoutError(unusable[0], "a layout that training can use", "choose another --tp")
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
