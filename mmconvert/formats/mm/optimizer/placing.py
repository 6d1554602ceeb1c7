"""Checkpoints that are written with their optimizer state, and what is told of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmconvert.errors import MMConvertError
from mmconvert.formats.base import Placed, Placing
from mmconvert.formats.containers.image import FileImage
from mmconvert.formats.mm.folder import HINTS, OPTIMIZER
from mmconvert.formats.mm.model import OpenedMM
from mmconvert.formats.mm.opening import MMStored
from mmconvert.formats.mm.optimizer.opening import open_state
from mmconvert.formats.mm.optimizer.telling import StateSummary, about_of, notes_of, summary_of
from mmconvert.formats.mm.optimizer.wholes import PlacedState, place_state
from mmconvert.formats.mm.optimizer.writing import StateWriter
from mmconvert.formats.mm.output import rank_images
from mmconvert.sharding.layout import Layout
from mmconvert.stored import Target


@dataclass(frozen=True, kw_only=True)
class PlacedMM(Placed):
    """An MM checkpoint that is to be written with its optimizer state."""

    state: PlacedState


def placed_state(placed: Placed, asked: Placing, layout: Layout) -> Placed:
    """With the optimizer state."""
    source = asked.source
    assert isinstance(source, MMStored)  # noqa: S101 - only MM checkpoints are read with it
    state = source.state
    assert state is not None  # noqa: S101 - it was asked for
    once = state.kind == "distributed"
    found = place_state(placed.side, asked.wholes, source.groups, layout.ep, once=once)
    return PlacedMM(
        side=placed.side,
        layout=layout,
        notes=(*placed.notes, *notes_of(state)),
        about={"optimizer": about_of(state)},
        state=found,
    )


def state_images(
    layout: Layout, targets: Sequence[Target], placed: Placed, asked: Placing
) -> Iterator[FileImage]:
    """The files of a checkpoint with its optimizer state."""
    source = asked.source
    assert isinstance(placed, PlacedMM) and isinstance(source, MMStored) and source.state  # noqa: S101, PT018 - by placed_state
    tied = source.model.variant.tied
    writer = StateWriter(source.state, placed.state, targets, layout, tied=tied)
    weights = targets[: placed.state.weights]
    return rank_images(layout, weights, str(source.state.iteration), writer)


def state_at_a_glance(opened: OpenedMM) -> tuple[dict[str, object], str]:
    """The optimizer state of a checkpoint as JSON and in words; nothing without any."""
    checkpoint = opened.chart.checkpoint
    if checkpoint.optimizer is None:
        return {}, ""
    try:
        state = open_state(opened.parts, checkpoint.folder, checkpoint.iteration)
    except MMConvertError as error:
        found, hint = StateSummary(None, fault=error.what), ""
    else:
        found, hint = summary_of(state), HINTS[OPTIMIZER]
    return found.as_dict(), found.describe(sum(map(len, opened.parts.values()))) + hint
