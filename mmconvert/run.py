"""What the three directions share: prove a plan, then write it, complete or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from mmconvert.config import Options
from mmconvert.errors import CheckpointError, OutputError, ReplicaError, RequestError
from mmconvert.estimate import estimate
from mmconvert.events import Events
from mmconvert.executor import agreement, compare, group, journal, staging
from mmconvert.executor.casts import DTYPES
from mmconvert.executor.differences import Difference, in_words
from mmconvert.executor.digests import ALGORITHM, digests
from mmconvert.executor.jobs import default_workers
from mmconvert.executor.moving import Moved, Staged, move
from mmconvert.executor.output import Output
from mmconvert.formats import manifest, reading
from mmconvert.formats.containers.safetensors import Entry
from mmconvert.formats.hf import output as hf_output
from mmconvert.formats.hf.sides import copy_side_files, side_files
from mmconvert.formats.mm import folder as megatron
from mmconvert.formats.model import Model
from mmconvert.formats.reading import State
from mmconvert.plan.plan import Plan, Side
from mmconvert.plan.proof import prove
from mmconvert.result import Described, OutputFile, Result
from mmconvert.sharding.layout import Layout
from mmconvert.stored import StoredTensor

SIDE_ROOM = 64 << 20  # bytes of free disk expected beside the tensors, for everything small
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Create = Callable[[Path], Sequence[StoredTensor]]  # makes the files in a staging folder


class Run:
    """One conversion under way.

    Attributes:
        cast: safetensors spelling of the dtype that ``--dtype`` asks for; "" for none.
        file_limit: bytes of a weight file by ``--max-shard-size``; 0 for none.
    """

    def __init__(
        self, command: str, cfg: object, options: Options | None, events: Events | None
    ) -> None:
        """Begins a conversion.

        Raises:
            RequestError: options that make no sense; or the processes of the run want different
                things.
        """
        self.command = command
        self.options = options or Options()
        if self.options.workers < 0:
            raise RequestError(f"--workers is {self.options.workers}", "a number of threads, or 0")
        self.events = events or Events()
        self.workers = self.options.workers or default_workers()
        self.cast = DTYPES.get(self.options.dtype, "")
        limit = self.options.max_shard_size
        self.file_limit = hf_output.parse_size(limit) if limit else 0
        self.group = group.current()
        self.watch = reading.current()
        self.began = time.monotonic()
        self.group.agree(agreement.of_request(command, cfg, self.options))

    # ------------------------------------------------------------------------------- proving

    def prove(self, plan: Plan) -> Plan:
        """Everything that can be known before a byte is written."""
        for note in plan.notes:
            self.events.note(note)
        prove(plan)
        if self.group.size > 1:
            self.group.agree(agreement.of_plan(plan, self.watch.states))
        self._check_replicas(plan)
        return plan

    def _check_replicas(self, plan: Plan) -> None:
        def differing() -> list[Difference]:
            mine = self.group.share(
                plan.replicas, lambda c: compare.comparison_bytes([c], plan.sources)
            )
            self.events.start("comparing replicas", compare.comparison_bytes(mine, plan.sources))
            sources, advance = plan.sources, self.events.advance
            return compare.compare(mine, sources, sources, self.workers, advance, plan.cast)

        if plan.replicas:
            found = [d for part in self.group.together(differing) for d in part]
            self._settle(found, "copies of one tensor differ", "the same values in every copy")
        found = compare.not_zero(plan.zeros, plan.sources)
        self._settle(found, "values that HF does not store are not zero", "zeros, as converted")

    def _settle(self, found: list[Difference], what: str, expected: str) -> None:
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
            expected,
            "find out which values training used, or give --replicas first to go on with a warning",
        )

    # ------------------------------------------------------------------------------- writing

    def write_mm(
        self,
        plan: Plan,
        dst: Side,
        source: Model,
        layout: Layout,
        target: Path,
        inputs: Sequence[Path],
    ) -> Result:
        """Writes an MM checkpoint."""
        files = megatron.plan_mm(layout, plan.targets)
        held: dict[str, list[int]] = {str(file.path): [] for file in files}
        names = {file.rank: str(file.path) for file in files}
        for i, t in enumerate(plan.targets):
            if t.chunk is not None:
                held[names[t.chunk.rank]].append(i)
        listing = [OutputFile(str(f.path), f.image.size, tuple(held[str(f.path)])) for f in files]

        def create(folder: Path) -> Sequence[StoredTensor]:
            return megatron.create_mm(folder, layout, files, plan.targets)

        about = {"kind": "mm", **_about(source, layout)}
        result = Result(target, False, plan, layout, 0.0, tuple(listing), source.dropped)
        result = replace(result, carried=tuple(t.name for t in source.carried))
        return self.write(result, dst, about, inputs, create)

    def write_hf(
        self,
        plan: Plan,
        dst: Side,
        model: Model,
        source: Model,
        layout: Described,
        target: Path,
        inputs: Sequence[Path],
    ) -> Result:
        """Writes a Hugging Face checkpoint like ``model``'s."""
        original = model.hf
        if original is None:
            raise CheckpointError("hf_dir holds no weights", "the original checkpoint")
        entries = {t.name: Entry(t.name, t.dtype, t.stack or t.shape) for t in plan.targets}
        weights = hf_output.plan_weights(original, entries, self.file_limit)
        number = {t.name: i for i, t in enumerate(plan.targets)}
        listing = [
            OutputFile(file.name, file.size, tuple(number[e.name] for e in file.entries))
            for file in weights.files
        ]
        sides = side_files(original.folder, original.read)
        for note in sides.notes():
            self.events.note(note)
            plan.notes.append(note)
        reading.note(original.folder / path for path in sides.copied)
        listing += [OutputFile(str(p), (original.folder / p).stat().st_size) for p in sides.copied]

        def create(folder: Path) -> Sequence[StoredTensor]:
            created = hf_output.create_hf(folder, weights)
            copy_side_files(original.folder, folder, sides.copied)
            if self.cast:
                hf_output.write_dtype(folder, TORCH_NAMES[self.cast])
            return [created[t.name]._replace(shape=t.shape) for t in plan.targets]

        about = {"kind": "hf", **_about(source, layout), "weight_files": repr(weights)}
        dropped = {**model.dropped, **source.dropped}
        result = Result(target, False, plan, layout, 0.0, tuple(listing), dropped)
        result = replace(result, carried=tuple(t.name for t in model.carried))
        result = replace(result, not_copied=sides.left)
        return self.write(result, dst, about, inputs, create)

    def write(
        self,
        result: Result,
        dst: Side,
        about: dict[str, object],
        inputs: Sequence[Path],
        create: Create,
        *,
        finish: Callable[[Path], None] | None = None,
        form: type[Output] = Output,
    ) -> Result:
        """Writes the output, or says what it would take.

        Args:
            about: what the manifest says of it.
            create: makes the files in a staging folder.
            finish: what is left to do there when all data is in place.
            form: of the output: a folder, or one file.
        """
        plan = result.plan
        boots = set(self.group.gather(journal.boot_id()))
        size = sum(file.nbytes for file in result.files)
        request = journal.request_of(plan, (about, result.files, self._sources(plan)))
        about.pop("weight_files", None)  # the files themselves tell
        written = {file.path: file.nbytes for file in result.files if file.tensors}

        def finished(folder: Path) -> journal.Finished:
            return journal.read(folder, request, boots, written)

        output = form(
            result.output,
            inputs,
            overwrite=self.options.overwrite,
            keeps=lambda folder: bool(finished(folder)),
            read=self.watch.identities(),
            sync=not self.options.no_sync,
        )
        # Only once: a process that comes late would miss what the first one has taken already.
        self.group.lead(lambda: self._check_room(output, size))
        if self.options.dry_run:
            would = estimate(plan, output.final, size, self.workers)
            return replace(result, estimate=would, seconds=self._seconds())

        def stage() -> Staged:
            done = finished(output.folder)
            return Staged(output.folder, request, create(output.folder), done)

        def commit() -> None:
            if finish is not None:
                finish(output.folder)
            journal.remove(output.folder)
            if output.manifest:
                staging.set_modes(output.folder)  # before the manifest notes the files' times
                manifest.write(output.folder, {"command": self.command, **about, **extra})
            for warning in output.commit():
                self.events.note(warning)

        here: AbstractContextManager[object] = output if self.group.leads else nullcontext()
        with here:
            staged = self.group.lead(stage)
            moved = move(
                plan, staged, self.workers, self.group, self.events, sync=not self.options.no_sync
            )
            for note in moved.losses.notes():
                self.events.note(note)
            extra = self._extra(plan, dst, staged, moved)
            self.group.together(self.watch.check)
            self.group.lead(commit)
        return replace(result, written=True, moved=moved, seconds=self._seconds())

    def _extra(self, plan: Plan, dst: Side, staged: Staged, moved: Moved) -> dict[str, object]:
        """What the manifest says of the data that was written."""
        extra: dict[str, object] = {
            "cast": {"dtype": plan.cast or None, **moved.losses.as_dict()},
            "source": {
                f"{p.parent.name}/{p.name}": [state.nbytes, state.mtime_ns]
                for p, state in self._sources(plan).items()
            },
        }
        if self.options.digests:
            mine = dict(self.group.share(list(dst.wholes.items()), lambda _: 1))
            parts = self.group.together(
                lambda: digests(mine, staged.places, self.workers, self.events)
            )
            whole = {name: digest for part in parts for name, digest in part.items()}
            extra |= {"digest": ALGORITHM, "digests": whole}
        return extra

    def _sources(self, plan: Plan) -> dict[Path, State]:
        """The files that a plan takes tensors from, in the state of the first look."""
        return {path: self.watch.states[path] for path in sorted({t.path for t in plan.sources})}

    def _check_room(self, output: Output, nbytes: int) -> None:
        try:
            output.check_room(nbytes + SIDE_ROOM)
        except OutputError as error:
            if not self.options.dry_run:
                raise
            self.events.note(f"warning: {error.what}")

    def _seconds(self) -> float:
        return time.monotonic() - self.began


def _about(source: Model, layout: Described) -> dict[str, object]:
    """What a manifest says of the model."""
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
    }
