"""Optimizer state beside the weights of an MM checkpoint: is it whole, and is it of them?"""

from __future__ import annotations

from pathlib import Path

from mmconvert.errors import MMConvertError, RequestError
from mmconvert.events import Events
from mmconvert.executor import compare
from mmconvert.executor.differences import in_words
from mmconvert.formats.mm.model import OpenedMM
from mmconvert.formats.mm.optimizer.opening import open_state
from mmconvert.formats.mm.optimizer.telling import summary_of
from mmconvert.formats.mm.optimizer.wholes import with_state
from mmconvert.formats.mm.ranks import TRACKER
from mmconvert.plan.plan import Side
from mmconvert.stored import StoredTensor
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.report import DoctorReport

UNKNOWN = "nothing, to train on in this layout; a resplit can only leave it out"
ANEW = (
    "go back to an earlier iteration, or train on with --no-load-optim: moments and schedule then "
    "start anew"
)


def side_with_state(
    opened: OpenedMM, side: Side, asked: DoctorRequest, events: Events, report: DoctorReport
) -> Side:
    """The side with the optimizer's tensors, if there are any and they fit; else it is told why."""
    checkpoint = opened.chart.checkpoint
    if checkpoint.optimizer is None:
        return side
    try:
        state = open_state(opened.parts, checkpoint.folder, checkpoint.iteration)
        full = with_state(side, state)
    except RequestError as error:  # of a kind that is not known here; training may load it
        report.add("optimizer-unknown", error.what, UNKNOWN, path=checkpoint.folder)
        report.skipped.append("the optimizer state: of a kind that is not carried over")
        return side
    except MMConvertError as error:
        report.add("optimizer-damaged", error.what, ANEW, path=error.path or checkpoint.folder)
        report.skipped.append("the values of the optimizer state: it does not fit the weights")
        return side
    _look_at_release(checkpoint.iteration, checkpoint.folder, report)
    if asked.quick:
        report.skipped.append("masters against weights (--quick)")
    else:
        _look_at_masters(full, asked.workers, events, report)
    weights = sum(map(len, opened.parts.values()))
    report.checked.append(summary_of(state).describe(weights))
    return full


def tensors_of(side: Side, weights: Side) -> list[StoredTensor]:
    """The stored tensors of the optimizer alone."""
    return side.stored[len(weights.stored) :]


def _look_at_release(iteration: str, folder: Path, report: DoctorReport) -> None:
    """Megatron loads no optimizer, schedule and iteration of a release."""
    if iteration != "release":
        return
    report.add(
        "optimizer-in-release",
        f"{folder} holds optimizer state, which training does not load of a release",
        f"name the folder iter_N, with seven digits, and write N into {TRACKER}",
        path=folder,
    )


def _look_at_masters(side: Side, workers: int, events: Events, report: DoctorReport) -> None:
    """Masters, rounded, are the weights."""
    pairs, stored = side.rounded, side.stored
    events.start("comparing masters", compare.comparison_bytes(pairs, stored))
    for difference in compare.compare(pairs, stored, stored, workers, events.advance):
        report.add(
            "optimizer-other-weights",
            f"the optimizer state is not of these weights: {in_words(difference)}",
            "were the weights changed since? The masters, which training goes on with, are not "
            f"these weights: {ANEW}",
            path=difference.b.path,
            tensor=difference.b.name,
        )
