"""What the three directions share: prove a plan, then write it, complete or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmconvert import compare, manifest
from mmconvert.config import Options
from mmconvert.differences import Difference, in_words
from mmconvert.errors import CheckpointError, OutputError, ReplicaError, RequestError
from mmconvert.events import Events
from mmconvert.execute import execute
from mmconvert.formats import hf, megatron
from mmconvert.formats.safetensors import Entry
from mmconvert.jobs import default_workers
from mmconvert.output import Output
from mmconvert.plan import Plan
from mmconvert.proof import prove
from mmconvert.sharding.layout import Layout
from mmconvert.sources.model import Model
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


class Run:
    """One conversion under way."""

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
        prove(plan)
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

    def _settle(self, found: list[Difference], what: str, wanted: str) -> None:
        """Raises ReplicaError for differences, or warns if the user has chosen."""
        if not found:
            return
        more = f"; {len(found) - 1} more tensors differ" if len(found) > 1 else ""
        words = f"{what}: {in_words(found[0])}{more}"
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
        try:
            output.check_room(plan.nbytes + SIDE_ROOM)
        except OutputError as error:
            if not self.options.dry_run:
                raise
            self.events.note(f"warning: {error.what}")
        return output

    def _move(self, plan: Plan, places: Sequence[StoredTensor]) -> None:
        self.events.start("converting", plan.nbytes)
        execute(plan, places, self.workers, self.events.advance)

    def _result(self, plan: Plan, layout: Layout, target: Path) -> Result:
        seconds = time.monotonic() - self.began
        return Result(target, not self.options.dry_run, plan, layout, seconds)


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
        "save_vit_only": all(m.key != "llm" for m in source.modules),
        "dims": source.dims,
        "layout": layout.as_dict(),
        "source": {
            f"{path.parent.name}/{path.name}": [path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
        },
    }
