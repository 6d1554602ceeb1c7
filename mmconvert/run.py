"""One conversion under way: a plan is proven, then written, complete or not at all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from mmconvert.config import Options
from mmconvert.errors import CheckpointError, OutputError, ReplicaError, RequestError
from mmconvert.events import Events
from mmconvert.executor import agreement, compare, group, journal, staging
from mmconvert.executor.casts import DTYPES
from mmconvert.executor.differences import TensorDifference, in_words
from mmconvert.executor.moving import Moved, Staged, move
from mmconvert.executor.output import Output
from mmconvert.executor.outputfile import FileOutput
from mmconvert.formats import manifest, reading
from mmconvert.formats.base import Placed
from mmconvert.formats.containers.image import create, finish
from mmconvert.formats.reading import State
from mmconvert.plan.plan import Comparison, Plan
from mmconvert.plan.proof import prove
from mmconvert.result import Result
from mmconvert.words import parse_size

SIDE_ROOM = 64 << 20  # bytes of free disk expected beside the tensors, for everything small


class Conversion:
    """One conversion under way.

    Attributes:
        cast: safetensors spelling of the dtype that ``--dtype`` asks for; "" for none.
    """

    def __init__(
        self,
        command: str,
        cfg: object,
        target: Path,
        options: Options | None,
        events: Events | None,
    ) -> None:
        """Begins a conversion; with other processes, if it has any.

        Raises:
            RequestError: options that make no sense; or the processes of the run have not all come,
                or want different things.
        """
        self.command = command
        self.options = options or Options()
        if self.options.workers < 0:
            raise RequestError(f"--workers is {self.options.workers}", "a number of threads, or 0")
        self.workers = self.options.workers
        self.cast = DTYPES.get(self.options.dtype, "")
        if self.options.max_shard_size:
            parse_size(self.options.max_shard_size)  # before anything is read
        events = events or Events()
        self.group = group.join(target, self.options.ranks, self.options.ranks_timeout, events.note)
        # The first process speaks for all; the others only of their faults.
        self.events = events if self.group.leads else Events()
        self.watch = reading.current()
        self.began = time.monotonic()
        if self.group.size > 1:
            self.group.agree(agreement.of_request(command, cfg, self.options))

    # ------------------------------------------------------------------------------- proving

    def prove(self, plan: Plan) -> Plan:
        """Everything that can be known before a byte is written."""
        for note in plan.notes:
            self.events.note(note)
        prove(plan)
        if self.group.size > 1:
            self.group.agree(agreement.of_plan(plan, self.watch.states))
        self._check_rounded(plan)
        if self.options.dry_run or self.options.replicas == "first":
            self._check_replicas(plan)  # else while they are moved
        found = compare.not_zero(plan.zeros, plan.sources)
        self._settle(found, "values that HF does not store are not zero", "zeros, as converted")
        return plan

    def _differing(self, what: str, pairs: list[Comparison], plan: Plan) -> list[TensorDifference]:
        """The differences of pairs of sources, found by all processes together."""

        def differing() -> list[TensorDifference]:
            mine = self.group.share(pairs, lambda c: compare.comparison_bytes([c], plan.sources))
            self.events.start(what, compare.comparison_bytes(mine, plan.sources))
            sources, advance = plan.sources, self.events.advance
            return compare.compare(mine, sources, sources, self.workers, advance, plan.cast)

        return [d for part in self.group.together(differing) for d in part] if pairs else []

    def _check_rounded(self, plan: Plan) -> None:
        found = self._differing("proving the optimizer state", plan.rounded, plan)
        if found:
            more = f"; {len(found) - 1} more tensors differ" if len(found) > 1 else ""
            raise CheckpointError(
                f"the optimizer state is not of these weights: {in_words(found[0])}{more}",
                "fp32 masters that are the weights once they are rounded, as training saves them",
                "were the weights changed since? Take a checkpoint of training as it is, or leave "
                "--optimizer out: the weights alone are resplit",
            )

    def _check_replicas(self, plan: Plan) -> None:
        found = self._differing("comparing replicas", plan.replicas, plan)
        self._settle(found, "copies of one tensor differ", "the same values in every copy")

    def _settle(self, found: list[TensorDifference], what: str, expected: str) -> None:
        """Raises ReplicaError for differences, or warns if the user has chosen."""
        if not found:
            return
        more = f"; {len(found) - 1} more tensors differ" if len(found) > 1 else ""
        words = f"{what}: {in_words(found[0])}{more}"
        if self.options.replicas == "first":
            self.events.note(f"warning: {words}; the first copy, or zero, is taken")
            return
        way = "--replicas first"
        if any(".lora_" in d.a.name for d in found):  # of adapters
            way += ", or --replicas mean,"
        raise ReplicaError(
            words,
            expected,
            f"find out which values training used, or give {way} to go on with a warning",
        )

    # ------------------------------------------------------------------------------- writing

    def write(
        self,
        result: Result,
        placed: Placed,
        about: Mapping[str, object],
        inputs: Sequence[Path],
    ) -> Result:
        """Writes the output, or says what it would take.

        Args:
            result: what is known of it, its files among that.
            about: what the manifest says of it.
            inputs: the files and folders that were read: none of them is written to.
        """
        plan = result.plan
        if placed.single and self.options.digests:
            raise RequestError(
                f"--digests are noted in {manifest.NAME}; {result.output} is a single file",
                "an output folder",
                "leave --digests out",
            )
        boots = set(self.group.gather(journal.boot_id()))
        size = sum(image.size for image in result.listed)
        decides = (about, result.files, self._sources(plan), self.options.replicas)
        request = journal.request_of(plan, decides)
        written = {image.path: image.size for image in result.files if image.pieces}

        def finished(folder: Path) -> journal.Finished:
            return journal.read(folder, request, boots, written)

        output = (FileOutput if placed.single else Output)(
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
            from mmconvert.estimate import estimate

            would = estimate(plan, output.final, size, self.workers)
            return replace(result, estimate=would, seconds=self._seconds())

        def stage() -> Staged:
            done = finished(output.folder)
            places = create(output.folder, result.files, plan.targets)
            return Staged(output.folder, request, places, done)

        def commit() -> None:
            finish(output.folder, result.files)
            journal.remove(output.folder)
            if output.manifest:
                staging.set_modes(output.folder)  # before the manifest notes the files' times
                content = {"command": self.command, **about, **extra}
                manifest.write(output.folder, content, written)
            for warning in output.commit():
                self.events.note(warning)

        here: AbstractContextManager[object] = output if self.group.leads else nullcontext()
        with here:
            staged = self.group.lead(stage)
            moved = self._move(plan, staged)
            for note in moved.losses.notes():
                self.events.note(note)
            extra = self._extra(plan, placed, staged, moved)
            self.group.together(self.watch.check)
            self.group.lead(commit)
        return replace(result, written=True, moved=moved, seconds=self._seconds())

    def _move(self, plan: Plan, staged: Staged) -> Moved:
        """Moves all bytes; where replicas differ on the way, says which and how."""
        compared = replace(plan, replicas=[]) if self.options.replicas == "first" else plan
        sync = not self.options.no_sync
        try:
            return move(compared, staged, self.workers, self.group, self.events, sync=sync)
        except ReplicaError:
            self.group.together(self.watch.check)  # files that change may differ for that
            self._check_replicas(plan)
            raise

    def _extra(self, plan: Plan, placed: Placed, staged: Staged, moved: Moved) -> dict[str, object]:
        """What the manifest says of the data that was written."""
        extra: dict[str, object] = {
            "cast": {"dtype": plan.cast or None, **moved.losses.as_dict()},
            "source": {
                f"{p.parent.name}/{p.name}": [state.nbytes, state.mtime_ns]
                for p, state in self._sources(plan).items()
            },
        }
        if self.options.digests:
            from mmconvert.executor.digests import ALGORITHM, as_mm, digests

            wholes, places = as_mm(placed.side.wholes, staged.places, placed.transposed)
            mine = dict(self.group.share(list(wholes.items()), lambda _: 1))
            parts = self.group.together(lambda: digests(mine, places, self.workers, self.events))
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
