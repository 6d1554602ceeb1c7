"""Runs a plan's jobs: shared among the processes of a run, and noted so that a run can resume."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from mmconvert.durable import EarlySync
from mmconvert.errors import cannot_write
from mmconvert.events import Events
from mmconvert.executor import journal
from mmconvert.executor.casts import LossByTensor, Losses
from mmconvert.executor.execute import jobs_of
from mmconvert.executor.group import ProcessGroup
from mmconvert.executor.jobs import Job, run_jobs
from mmconvert.executor.pieces import in_pieces
from mmconvert.plan.plan import Plan
from mmconvert.stored import StoredTensor
from mmconvert.words import amount


@dataclass
class Moved:
    """What was done.

    Attributes:
        losses: of casts.
        resumed: bytes that an interrupted run had moved before.
    """

    losses: Losses = field(default_factory=Losses)
    resumed: int = 0


@dataclass(frozen=True)
class Staged:
    """A staging folder, ready to be filled.

    Attributes:
        folder: the folder.
        request: see :func:`mmconvert.executor.journal.request_of`.
        places: where each of the plan's targets lies, in their order.
        finished: what an interrupted run of the same request has left.
    """

    folder: Path
    request: str
    places: Sequence[StoredTensor]
    finished: journal.Finished


def move(
    plan: Plan, staged: Staged, workers: int, group: ProcessGroup, events: Events, *, sync: bool
) -> Moved:
    """Moves every byte of a plan that is not in place already; returns when all processes have.

    Args:
        sync: whether each process brings what it has written to the disk.

    Raises:
        MMConvertError: a file that cannot be read or written, in any process.
    """
    jobs = jobs_of(*in_pieces(plan, staged.places))
    known = {id(job): journal.job_key(job, staged.folder) for job in jobs if staged.finished}
    done = [job for job in jobs if known.get(id(job)) in staged.finished]
    moved = Moved(resumed=sum(job.nbytes for job in done if job.writes))
    for job in done:
        moved.losses.add(staged.finished[known[id(job)]])
    if done:
        share = 100 * moved.resumed / max(1, plan.nbytes)
        events.note(
            f"an interrupted run of the same request left {amount(moved.resumed)} "
            f"({share:.0f} %) in place: only the rest is copied"
        )
    left = {id(job) for job in jobs} - {id(job) for job in done}
    mine = group.share(
        sorted((j for j in jobs if id(j) in left), key=lambda j: (j.writes, j.place)),
        lambda job: job.nbytes,
    )
    for losses in group.together(lambda: _run(mine, staged, workers, group, events, sync=sync)):
        moved.losses.merge(losses)
    return moved


def _run(
    jobs: Sequence[Job],
    staged: Staged,
    workers: int,
    group: ProcessGroup,
    events: Events,
    *,
    sync: bool,
) -> Losses:
    """Runs the jobs of this process; returns what they lost."""
    events.start("converting", sum(job.nbytes for job in jobs))
    losses = Losses()
    notes = journal.Journal(staged.folder, staged.request, group.rank)

    early = EarlySync() if sync else None

    def finished(job: Job, lost: LossByTensor | None) -> None:
        if early is not None:
            early.wrote(job.writes)
        lost = lost or {}
        notes.add(job, lost)
        losses.add(lost)
        events.advance(job.nbytes)

    try:
        with early or nullcontext():
            run_jobs(jobs, workers, finished)
    except OSError as error:  # of a sync; the others have their own words
        raise cannot_write(error.filename or staged.folder, error) from error
    finally:
        notes.close()
    return losses
