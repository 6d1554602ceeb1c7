"""MM checkpoints that are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.config import ParallelConfig
from mmconvert.converters.rows import Module
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.formats.base import Opening, StoredCheckpoint
from mmconvert.formats.mm.model import OpenedMM, mm_model
from mmconvert.formats.mm.source import ChunkTensors, transposed_wholes
from mmconvert.formats.model import Model
from mmconvert.formats.untied import ties, untied_model, untied_side
from mmconvert.plan.plan import Key, Side
from mmconvert.plan.reorder import reorder
from mmconvert.sharding.layout import Layout

if TYPE_CHECKING:  # few read the optimizer state
    from mmconvert.formats.mm.optimizer.state import GroupKey, OptimizerState


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
        if self.state is None:
            return side
        from mmconvert.formats.mm.optimizer.wholes import with_state

        return with_state(side, self.state)

    @cached_property
    def groups(self) -> dict[Key, GroupKey]:
        """The optimizer's group of each weight that learns."""
        from mmconvert.formats.mm.optimizer.wholes import groups_of

        return groups_of(self.opened.side(), self.state) if self.state else {}

    def untied(self) -> MMStored:
        """See :meth:`StoredCheckpoint.untied`."""
        return replace(self, model=untied_model(self.model), heads=ties(self.model))


def check_state(told: Opening, model: Model) -> None:
    """Raises RequestError where the weights would not be those of the optimizer state."""
    options = told.options
    if not options.optimizer:
        if options.optimizer_kind != "same":
            raise RequestError(
                f"--optimizer-kind {options.optimizer_kind} says how optimizer state is written; "
                "none is without --optimizer",
                "--optimizer too",
            )
        return
    if model.adapter is not None:
        raise RequestError(
            "--optimizer carries the state of a whole model's training; these are adapters", "",
            "leave --optimizer out: lora_resplit brings adapters to another layout",
        )  # fmt: skip
    for flag, given in (
        (f"--dtype {options.dtype}", options.dtype != "keep"),
        ("--drop", bool(options.drop)),
        ("--cfg.save_vit_only", told.encoders_only),
    ):
        if given:
            raise RequestError(
                f"--optimizer needs the weights as they are, and {flag} changes them",
                "one of the two",
            )


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
    state, training = None, dict[str, object]()
    check_state(told, model)
    if told.options.optimizer:
        from mmconvert.formats.mm.optimizer.opening import open_state
        from mmconvert.formats.mm.optimizer.telling import notes_left, values_of

        state = open_state(opened.parts, checkpoint.folder, checkpoint.iteration)
        if told.options.optimizer_kind != "same":
            from mmconvert.formats.mm.optimizer.kinds import as_kind

            state = as_kind(state, told.options.optimizer_kind)
        model = replace(model, notes=notes_left(model.notes, checkpoint.folder))
        training = values_of(state)
    return MMStored(
        format="mm",
        path=path,
        model=model,
        layout=opened.layout,
        iteration=checkpoint.iteration,
        training=training,
        opened=opened,
        state=state,
    )
