"""THE STORY: the three directions. Newcomers start here.

Each opens its source, makes both sides of the plan from one table, proves the plan, and only
then writes: into a staging folder that gets its final name when it is complete.
"""

from __future__ import annotations

from mmconvert.config import HFToMM, MMToHF, Options, Resplit
from mmconvert.converters.family import Family
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.events import Events
from mmconvert.executor.apart import check_apart
from mmconvert.formats.hf.model import config_model, hf_model
from mmconvert.formats.hf.side import hf_side, hf_target
from mmconvert.formats.mm.model import mm_model
from mmconvert.formats.mm.source import mm_source
from mmconvert.formats.mm.target import mm_target
from mmconvert.formats.model import (
    Model,
    check_reading_options,
    check_writing_options,
    idle_patterns,
    target_layout,
    unchecked_units,
)
from mmconvert.formats.reading import watched
from mmconvert.modeljson.layout import settled
from mmconvert.names import summarise
from mmconvert.plan.plan import Side, build, carry, in_dtype
from mmconvert.plan.reorder import reorder
from mmconvert.plan.training import cautions
from mmconvert.result import Result
from mmconvert.run import Run


@watched
def hf_to_mm(
    family: Family, cfg: HFToMM, options: Options | None = None, events: Events | None = None
) -> Result:
    """Hugging Face -> MM.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    cfg = settled(cfg)
    run = Run("hf_to_mm", cfg, options, events)
    check_apart(cfg.mm_dir, [cfg.hf_config.hf_dir])
    check_reading_options(run.options)
    source = hf_model(
        family,
        cfg.hf_config.hf_dir,
        run.options,
        canonical=cfg.common_model_config.enable_canonical_hf_struct,
        vit_only=cfg.save_vit_only,
        llm_dir=cfg.common_model_config.llm_hf_dir,
    )
    layout = target_layout(source, cfg.parallel_config, prefix="--cfg.parallel_config.")
    src = hf_side(source.modules, source.dims, source.hf_tensors, transposed=True)
    dst = mm_target(source.modules, source.dims, layout, in_dtype(src.wholes, run.cast))
    notes = [*source.notes, *idle_patterns(run.options, source)]
    notes += [f"warning: {words}" for words in cautions(source.modules, source.dims, layout)]
    notes += _carried_note(source, "stay in hf_dir and return from it")
    plan = run.prove(build(src, dst, notes, run.cast))
    inputs = [p for p in (cfg.hf_config.hf_dir, cfg.common_model_config.llm_hf_dir) if p]
    return run.write_mm(plan, dst, source, layout, cfg.mm_dir, inputs)


@watched
def mm_to_hf(
    family: Family, cfg: MMToHF, options: Options | None = None, events: Events | None = None
) -> Result:
    """MM -> Hugging Face: weight files, index and side files as in ``hf_dir``.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    cfg = settled(cfg)
    run = Run("mm_to_hf", cfg, options, events)
    check_apart(cfg.save_hf_dir, [cfg.hf_config.hf_dir, cfg.mm_dir])
    model = hf_model(family, cfg.hf_config.hf_dir, run.options)
    source, layout, parts = mm_model(
        family, cfg.mm_dir, cfg.parallel_config, model, run.options, prefix="--cfg.parallel_config."
    )
    _check_structure(cfg, source)
    src = mm_source(source.modules, source.dims, layout, parts, transposed=True)
    headers = hf_side(source.modules, source.dims, model.hf_tensors)
    dst = hf_target(headers, in_dtype(src.wholes, run.cast))
    notes = [*model.notes, *source.notes, *idle_patterns(run.options, model, source)]
    notes += _carried_note(model, "copied from hf_dir")
    notes += [] if run.cast else dtype_notes(headers, dst, "MM")
    plan = run.prove(carry(build(src, dst, notes, run.cast), model.carried))
    inputs = [cfg.hf_config.hf_dir, cfg.mm_dir]
    return run.write_hf(plan, dst, model, source, layout, cfg.save_hf_dir, inputs)


@watched
def reshard(
    family: Family, cfg: Resplit, options: Options | None = None, events: Events | None = None
) -> Result:
    """MM -> MM in another layout.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    cfg = settled(cfg)
    run = Run("resplit", cfg, options, events)
    check_writing_options(run.options)
    check_apart(cfg.target_dir, [cfg.source_dir])
    hf_dir = cfg.hf_config.hf_dir
    model = config_model(family, hf_dir) if hf_dir else None
    source, found, parts = mm_model(
        family,
        cfg.source_dir,
        cfg.source_parallel_config,
        model,
        run.options,
        prefix="--cfg.source_parallel_config.",
        vit_only=cfg.save_vit_only,
    )
    layout = target_layout(
        source, cfg.target_parallel_config, prefix="--cfg.target_parallel_config."
    )
    src = mm_source(source.modules, source.dims, found, parts)
    src = reorder(src, source.modules, source.plain_modules, source.dims)
    dst = mm_target(source.plain_modules, source.dims, layout, in_dtype(src.wholes, run.cast))
    notes = [*source.notes, *idle_patterns(run.options, source)]
    notes += unchecked_units(source, found, layout)
    notes += [f"warning: {words}" for words in cautions(source.modules, source.dims, layout)]
    plan = run.prove(build(src, dst, notes, run.cast))
    return run.write_mm(plan, dst, source, layout, cfg.target_dir, [cfg.source_dir])


def _check_structure(cfg: MMToHF, source: Model) -> None:
    """What the user says of an MM checkpoint's form must be so."""
    given = cfg.common_model_config
    if given.llm_hf_dir is not None:
        raise RequestError(
            "--cfg.common_model_config.llm_hf_dir has no meaning for mm_to_hf",
            "only hf_dir, whose weight files and names the output takes",
            "leave it out; hf_dir must be a checkpoint with a text decoder of the same sizes",
        )
    if given.enable_canonical_hf_struct and not source.variant.canonical:
        raise CheckpointError(
            "--cfg.common_model_config.enable_canonical_hf_struct says True; the checkpoint holds "
            "packed linear_qkv and linear_fc1",
            "the structure that the checkpoint has",
            "leave the flag out: the structure is recognised by the names",
        )


def _carried_note(model: Model, what: str) -> list[str]:
    names = [t.name for t in model.carried]
    return [f"{len(names)} tensors {what}: {summarise(names)}"] if names else []


def dtype_notes(headers: Side, dst: Side, form: str) -> list[str]:
    """Says so where training has changed a dtype: tensors are written as training left them."""
    changed: dict[tuple[str, str], list[str]] = {}
    for old, new in zip(headers.stored, dst.targets, strict=True):
        if old.dtype != new.dtype:
            changed.setdefault((old.dtype, new.dtype), []).append(new.name)
    return [
        f"warning: {len(names)} tensors are {old} in hf_dir and {new} in the {form} checkpoint; "
        f"written as {new} (config.json still names its own dtype): {summarise(names)}"
        for (old, new), names in changed.items()
    ]
