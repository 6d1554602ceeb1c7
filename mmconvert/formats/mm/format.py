"""MM checkpoints of MindSpeed-MM, as a format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module
from mmconvert.errors import CheckpointError, MMConvertError, RequestError
from mmconvert.formats import contents
from mmconvert.formats.base import Format, Look, Opening, Placed, Placing, StoredCheckpoint
from mmconvert.formats.containers.image import FileImage
from mmconvert.formats.mm.adapters import sized
from mmconvert.formats.mm.folder import TRACKER, is_mm
from mmconvert.formats.mm.model import OpenedMM, mm_model
from mmconvert.formats.mm.optimizer.opening import (
    about_of,
    check_state,
    notes_left,
    notes_of,
    open_state,
)
from mmconvert.formats.mm.optimizer.state import GroupKey, OptimizerState
from mmconvert.formats.mm.optimizer.wholes import PlacedState, groups_of, place_state, with_state
from mmconvert.formats.mm.optimizer.writing import StateWriter
from mmconvert.formats.mm.output import rank_images
from mmconvert.formats.mm.samples import representative
from mmconvert.formats.mm.source import Parts, claim_mm, mm_source, transposed_wholes
from mmconvert.formats.mm.target import mm_target
from mmconvert.formats.model import Model, target_layout, unchecked_units
from mmconvert.formats.recognise import mm_family
from mmconvert.formats.untied import ties, untied_model, untied_side
from mmconvert.plan.padding import vocabulary_keys
from mmconvert.plan.plan import Key, Side
from mmconvert.plan.reorder import reorder
from mmconvert.plan.training import cautions
from mmconvert.sharding.layout import RANK_FOLDER, Chunk, Layout
from mmconvert.stored import StoredTensor, Target


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
    def parts(self) -> Parts:
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


def _placed_state(placed: Placed, asked: Placing, layout: Layout) -> Placed:
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


class MM(Format):
    """Rank folders with a ``model_optim_rng.pt`` each."""

    name: ClassVar = "mm"
    title: ClassVar = "MM"
    naming: ClassVar = "mm"
    reads: ClassVar = frozenset({"vit_qkv", "experts", "optimizer"})
    writes: ClassVar = frozenset({"optimizer"})
    own_names: ClassVar = rf"{re.escape(TRACKER)}|release|iter_\d+|{RANK_FOLDER.pattern}"
    Layout: ClassVar = ParallelConfig

    def recognise(self, path: Path) -> bool:
        """By the tracker file, or rank folders."""
        return is_mm(path)

    def owns(self, folder: Path) -> bool:
        """Also one whose tracker file is lost."""
        inner = [path for path in folder.iterdir() if re.fullmatch(r"release|iter_\d+", path.name)]
        return is_mm(folder) or any(is_mm(path) for path in inner)

    def family(self, path: Path) -> Family:
        """By mmconvert.json, else by the tensors' names."""
        return mm_family(path)

    def look(self, path: Path) -> Look:
        """Its ranks; its wholes under MM names with the model's own layer numbers."""
        stored = self.open(path, Opening(mm_family(path), Options()))
        model, layout, side = stored.model, stored.ranks, stored.opened.side()
        return Look(
            kind=self.name,
            title="MM checkpoint",
            family=model.family.name,
            listing=[tensor for part in stored.parts.values() for tensor in part.values()],
            wholes={key.name(): whole for key, whole in side.wholes.items()},
            stored=side.stored,
            boxes=contents.of_mm(model.modules, layout, stored.parts),
            iteration=stored.iteration,
            layout=layout,
            notes=model.notes,
        )

    def open(self, path: Path, told: Opening) -> MMStored:
        """The layout is read off the folder; what the user says of it must be so."""
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
        if told.options.optimizer:
            check_state(told, model)
            state = open_state(opened.parts, checkpoint.folder, checkpoint.iteration)
            model = replace(model, notes=notes_left(model.notes, checkpoint.folder))
        return MMStored(
            format=self.name,
            path=path,
            model=model,
            layout=opened.layout,
            iteration=checkpoint.iteration,
            opened=opened,
            state=state,
        )

    def place(self, asked: Placing) -> Placed:
        """Every whole divided over tensor-parallel ranks, on its pipeline stage."""
        model, found = asked.source.model, asked.source.layout
        given = asked.layout if isinstance(asked.layout, ParallelConfig) else ParallelConfig()
        model = sized(model, given)
        layout = target_layout(model, given, prefix=asked.flags)
        side = mm_target(model.plain_modules, model.dims, layout, asked.wholes)
        notes = unchecked_units(model, found if isinstance(found, Layout) else None, layout)
        dims = dict(model.dims)
        for key in vocabulary_keys(side, model.modules):
            dims[model.family.vocabulary] = side.wholes[key].shape[0]  # it may be padded
        notes += [f"warning: {words}" for words in cautions(model.modules, dims, layout)]
        placed = Placed(side=side, layout=layout, notes=tuple(notes))
        return placed if not asked.options.optimizer else _placed_state(placed, asked, layout)

    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterator[FileImage]:
        """A file for each rank, and the tracker file."""
        assert isinstance(placed.layout, Layout)  # noqa: S101 - narrows the type: it is our own
        source = asked.source
        if not (isinstance(placed, PlacedMM) and isinstance(source, MMStored) and source.state):
            return rank_images(placed.layout, targets)
        tied = source.model.variant.tied
        writer = StateWriter(source.state, placed.state, targets, placed.layout, tied=tied)
        weights = targets[: placed.state.weights]
        return rank_images(placed.layout, weights, str(source.state.iteration), writer)

    def read_back(self, stored: Sequence[StoredTensor], placed: Placed, asked: Placing) -> Side:
        """By the names and places of the rank files."""
        model, layout = asked.source.model, placed.layout
        assert isinstance(layout, Layout)  # noqa: S101 - narrows the type: it is our own
        parts: dict[Chunk, dict[str, StoredTensor]] = {}
        for target, tensor in zip(placed.side.targets, stored, strict=True):
            assert target.chunk is not None  # noqa: S101 - as above
            parts.setdefault(target.chunk, {})[target.name] = tensor
        if lost := claim_mm(model.modules, model.dims, layout, parts):
            raise MMConvertError(
                f"{lost[0]} would not be read back", "every tensor that is written"
            )
        return mm_source(model.modules, model.dims, layout, parts)

    def samples(self, model: Model) -> list[tuple[str, object]]:
        """One rank, several, and virtual stages."""
        return list(representative(model))


FORMAT = MM()
