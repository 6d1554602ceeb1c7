"""THE STORY: the three directions. Newcomers start here.

Each opens its source, makes both sides of the plan from one table, proves the plan, and only
then writes: into a staging folder that gets its final name when it is complete.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmconvert import compare, manifest
from mmconvert.config import HFToMM, MMToHF, Options, Resplit
from mmconvert.converters.family import Family
from mmconvert.errors import CheckpointError, ReplicaError, RequestError
from mmconvert.events import Events
from mmconvert.execute import default_workers, execute
from mmconvert.formats import hf, megatron
from mmconvert.formats.safetensors import Entry
from mmconvert.names import summarise
from mmconvert.output import Output, check_apart
from mmconvert.plan import Plan, Side, build, carry
from mmconvert.sharding.layout import Layout
from mmconvert.sides.hf import hf_side, hf_target
from mmconvert.sides.mm_source import mm_source
from mmconvert.sides.mm_target import mm_target
from mmconvert.sides.reorder import reorder
from mmconvert.sources.hf import config_model, hf_model
from mmconvert.sources.mm import mm_model
from mmconvert.sources.model import Model, check_reading_options, target_layout, unchecked_units
from mmconvert.stored import StoredTensor

SIDE_ROOM = 64 << 20  # bytes of free disk wanted beside the tensors, for everything small


@dataclass(frozen=True)
class Result:
    """What a conversion did, or would do.

    Attributes:
        output: the folder.
        written: False for a dry run.
        plan: the plan.
        layout: of the MM checkpoint that was read or written last.
        seconds: wall time.
    """

    output: Path
    written: bool
    plan: Plan
    layout: Layout
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """The result as JSON."""
        return {
            "output": str(self.output),
            "written": self.written,
            "tensors": len(self.plan.targets),
            "bytes": self.plan.nbytes,
            "copies": len(self.plan.copies),
            "layout": self.layout.as_dict(),
            "notes": self.plan.notes,
            "seconds": round(self.seconds, 3),
        }


def hf_to_mm(
    family: Family, cfg: HFToMM, options: Options | None = None, events: Events | None = None
) -> Result:
    """Hugging Face -> MM.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = _Run(options, events)
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
    src = hf_side(source.modules, source.dims, source.hf_tensors)
    dst = mm_target(source.modules, source.dims, layout, src.wholes)
    notes = [*source.notes, *_carried_note(source, "stay in hf_dir and return from it")]
    plan = run.prove(build(src, dst, notes))
    inputs = [p for p in (cfg.hf_config.hf_dir, cfg.common_model_config.llm_hf_dir) if p]
    return run.write_mm(plan, source, layout, cfg.mm_dir, inputs)


def mm_to_hf(
    family: Family, cfg: MMToHF, options: Options | None = None, events: Events | None = None
) -> Result:
    """MM -> Hugging Face: weight files, index and side files as in ``hf_dir``.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = _Run(options, events)
    check_apart(cfg.save_hf_dir, [cfg.hf_config.hf_dir, cfg.mm_dir])
    model = hf_model(family, cfg.hf_config.hf_dir, run.options)
    source, layout, parts = mm_model(
        family, cfg.mm_dir, cfg.parallel_config, model, run.options, prefix="--cfg.parallel_config."
    )
    src = mm_source(source.modules, source.dims, layout, parts)
    headers = hf_side(source.modules, source.dims, model.hf_tensors)
    dst = hf_target(headers, src.wholes)
    notes = [*model.notes, *source.notes, *_carried_note(model, "copied from hf_dir")]
    notes += _dtype_notes(headers, dst)
    plan = run.prove(carry(build(src, dst, notes), model.carried))
    inputs = [cfg.hf_config.hf_dir, cfg.mm_dir]
    return run.write_hf(plan, model, layout, cfg.save_hf_dir, inputs)


def reshard(
    family: Family, cfg: Resplit, options: Options | None = None, events: Events | None = None
) -> Result:
    """MM -> MM in another layout.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = _Run(options, events)
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
    dst = mm_target(source.plain_modules, source.dims, layout, src.wholes)
    notes = [*source.notes, *unchecked_units(source, found, layout)]
    plan = run.prove(build(src, dst, notes))
    return run.write_mm(plan, source, layout, cfg.target_dir, [cfg.source_dir])


class _Run:
    """What the three directions share: proving, then writing."""

    def __init__(self, options: Options | None, events: Events | None) -> None:
        self.options = options or Options()
        if self.options.workers < 0:
            raise RequestError(f"--workers is {self.options.workers}", "a number of threads, or 0")
        self.events = events or Events()
        self.workers = self.options.workers or default_workers()
        self.began = time.monotonic()

    def prove(self, plan: Plan) -> Plan:
        """Everything that can be known before a byte is written."""
        for note in plan.notes:
            self.events.note(note)
        plan.prove()
        self._check_replicas(plan)
        return plan

    def _check_replicas(self, plan: Plan) -> None:
        if plan.replicas:
            size = compare.comparison_bytes(plan.replicas, plan.sources)
            self.events.start("comparing replicas", size)
            advance = self.events.advance
            found = compare.compare(
                plan.replicas, plan.sources, plan.sources, self.workers, advance
            )
            self._settle(found, "copies of one tensor differ", "the same values in every copy")
        found = compare.not_zero(plan.zeros, plan.sources)
        self._settle(found, "values that HF does not store are not zero", "zeros, as converted")

    def _settle(self, found: list[compare.Difference], what: str, wanted: str) -> None:
        """Raises ReplicaError for differences, or warns if the user has chosen."""
        if not found:
            return
        more = f"; {len(found) - 1} more tensors differ" if len(found) > 1 else ""
        words = f"{what}: {compare.in_words(found[0])}{more}"
        if self.options.replicas == "first":
            self.events.note(f"warning: {words}; the first copy, or zero, is taken")
            return
        raise ReplicaError(
            words,
            wanted,
            "find out which values training used, or give --replicas first to go on with a warning",
        )

    def write_mm(
        self, plan: Plan, source: Model, layout: Layout, target: Path, inputs: Sequence[Path]
    ) -> Result:
        """Writes an MM checkpoint."""
        output = self._output(plan, target, inputs)
        if not self.options.dry_run:
            with output:
                places = megatron.create_mm(output.folder, layout, plan.targets)
                self._move(plan, places)
                manifest.write(output.folder, _manifest(source, layout, plan))
                output.commit()
        return self._result(plan, layout, target)

    def write_hf(
        self, plan: Plan, model: Model, layout: Layout, target: Path, inputs: Sequence[Path]
    ) -> Result:
        """Writes a Hugging Face checkpoint like ``model``'s."""
        if model.hf is None:
            raise CheckpointError("hf_dir holds no weights", "the original checkpoint")
        output = self._output(plan, target, inputs)
        if not self.options.dry_run:
            with output:
                entries = {t.name: Entry(t.name, t.dtype, t.shape) for t in plan.targets}
                created = hf.create_hf(output.folder, model.hf, entries)
                hf.copy_side_files(model.hf.folder, output.folder)
                self._move(plan, [created[t.name] for t in plan.targets])
                output.commit()
        return self._result(plan, layout, target)

    def _output(self, plan: Plan, target: Path, inputs: Sequence[Path]) -> Output:
        output = Output(target, inputs, overwrite=self.options.overwrite)
        output.check_room(plan.nbytes + SIDE_ROOM)
        return output

    def _move(self, plan: Plan, places: Sequence[StoredTensor]) -> None:
        self.events.start("converting", plan.nbytes)
        execute(plan, places, self.workers, self.events.advance)

    def _result(self, plan: Plan, layout: Layout, target: Path) -> Result:
        seconds = time.monotonic() - self.began
        return Result(target, not self.options.dry_run, plan, layout, seconds)


def _carried_note(model: Model, what: str) -> list[str]:
    names = [t.name for t in model.carried]
    return [f"{len(names)} tensors {what}: {summarise(names)}"] if names else []


def _dtype_notes(headers: Side, dst: Side) -> list[str]:
    """Says so where training has changed a dtype: tensors are written as training left them."""
    changed: dict[tuple[str, str], list[str]] = {}
    for old, new in zip(headers.stored, dst.targets, strict=True):
        if old.dtype != new.dtype:
            changed.setdefault((old.dtype, new.dtype), []).append(new.name)
    return [
        f"warning: {len(names)} tensors are {old} in hf_dir and {new} in the MM checkpoint; "
        f"written as {new} (config.json still names its own dtype): {summarise(names)}"
        for (old, new), names in changed.items()
    ]


def _manifest(source: Model, layout: Layout, plan: Plan) -> dict[str, object]:
    files = sorted({tensor.path for tensor in plan.sources})
    return {
        "converter": source.family.converter,
        "family": source.family.name,
        "variant": {
            "tied": source.variant.tied,
            "canonical": source.variant.canonical,
            "traits": sorted(source.variant.traits),
        },
        "dims": source.dims,
        "layout": layout.as_dict(),
        "source": {
            path.name if path.suffix != ".pt" else f"{path.parent.name}/{path.name}": [
                path.stat().st_size,
                path.stat().st_mtime_ns,
            ]
            for path in files
        },
    }
