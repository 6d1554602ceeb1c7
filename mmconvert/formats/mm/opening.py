"""MM checkpoints that are read, and those that are written with their optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mmconvert.config import ParallelConfig
from mmconvert.converters.rows import Module
from mmconvert.errors import CheckpointError, MMConvertError, RequestError
from mmconvert.formats.base import Opening, Placed, Placing, StoredCheckpoint
from mmconvert.formats.containers.image import FileImage
from mmconvert.formats.mm.folder import HINTS, OPTIMIZER
from mmconvert.formats.mm.model import OpenedMM, mm_model
from mmconvert.formats.mm.optimizer.opening import check_state, open_state
from mmconvert.formats.mm.optimizer.state import GroupKey, OptimizerState
from mmconvert.formats.mm.optimizer.telling import (
    StateSummary,
    about_of,
    notes_left,
    notes_of,
    summary_of,
    values_of,
)
from mmconvert.formats.mm.optimizer.wholes import PlacedState, groups_of, place_state, with_state
from mmconvert.formats.mm.optimizer.writing import StateWriter
from mmconvert.formats.mm.output import rank_images
from mmconvert.formats.mm.source import ChunkTensors, transposed_wholes
from mmconvert.formats.untied import ties, untied_model, untied_side
from mmconvert.plan.plan import Key, Side
from mmconvert.plan.reorder import reorder
from mmconvert.sharding.layout import Layout
from mmconvert.stored import Target


@dataclass(frozen=True, kw_only=True)
class MMStored(StoredCheckpoint):
    """An MM checkpoint that was opened.

    Attributes:
        opened: what its reader found.
        heads: rows that are no longer tied, and to which they were.
        state: of the optimizer, where it is asked for.
    """

    opened: OpenedMM
    heads: Mapping[str, str] = field(default_factory=dict[str, str])
    state: OptimizerState | None = None

    @property
    def ranks(self) -> Layout:
        """How it is laid out."""
        return self.opened.layout

    @property
    def parts(self) -> ChunkTensors:
        """Its tensors, by name, by chunk."""
        return self.opened.parts

    def side(self, modules: tuple[Module, ...] | None = None, *, as_hf: bool = False) -> Side:
        """Its wholes in the one structure that it has; vision q, k and v interleaved."""
        del modules
        model = self.model
        side = self.opened.side(as_hf=as_hf)
        if model.variant.experts_transposed and not as_hf:
            side = transposed_wholes(
                side, {r.mm for m in model.modules for r in m.layer if r.of_stack}
            )
        side = reorder(side, model.modules, model.plain_modules, model.dims)
        side = untied_side(side, self.heads)
        return side if self.state is None else with_state(side, self.state)

    @cached_property
    def groups(self) -> dict[Key, GroupKey]:
        """The optimizer's group of each weight that learns."""
        return groups_of(self.opened.side(), self.state) if self.state else {}

    def untied(self) -> MMStored:
        """See :meth:`StoredCheckpoint.untied`."""
        return replace(self, model=untied_model(self.model), heads=ties(self.model))


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


def open_mm_stored(path: Path, told: Opening) -> MMStored:
    """Opens an MM checkpoint: see :meth:`mmconvert.formats.base.Format.open`."""
    if told.text_dir is not None:
        raise RequestError(
            "--cfg.common_model_config.llm_hf_dir has no meaning for mm_to_hf",
            "only hf_dir, whose weight files and names the output takes",
            "leave it out; hf_dir must be a checkpoint with a text decoder of the same sizes",
        )
    given = told.layout if isinstance(told.layout, ParallelConfig) else ParallelConfig()
    opened = mm_model(
        told.family,
        path,
        given,
        told.like,
        told.options,
        prefix=told.flags,
        encoders_only=told.encoders_only,
        part=told.part,
        faults=told.faults,
    )
    model = opened.model
    if told.canonical and not model.variant.canonical:
        raise CheckpointError(
            "--cfg.common_model_config.enable_canonical_hf_struct says True; the checkpoint "
            "holds packed linear_qkv and linear_fc1",
            "the structure that the checkpoint has",
            "leave the flag out: the structure is recognised by the names",
        )
    checkpoint = opened.chart.checkpoint
    state = None
    check_state(told, model)
    if told.options.optimizer:
        state = open_state(opened.parts, checkpoint.folder, checkpoint.iteration)
        if told.options.optimizer_kind != "same":
            from mmconvert.formats.mm.optimizer.kinds import as_kind

            state = as_kind(state, told.options.optimizer_kind)
        model = replace(model, notes=notes_left(model.notes, checkpoint.folder))
    return MMStored(
        format="mm",
        path=path,
        model=model,
        layout=opened.layout,
        iteration=checkpoint.iteration,
        training={} if state is None else values_of(state),
        opened=opened,
        state=state,
    )


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
