"""MM checkpoints of MindSpeed-MM, as a format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.family import Family
from mmconvert.errors import MMConvertError
from mmconvert.formats.base import Format, Opening, Placed, Placing
from mmconvert.formats.containers.image import FileImage
from mmconvert.formats.mm.output import rank_images
from mmconvert.formats.mm.ranks import TRACKER, is_mm
from mmconvert.formats.mm.target import mm_target
from mmconvert.formats.model import Model, target_layout, unchecked_units
from mmconvert.plan.padding import vocabulary_keys
from mmconvert.plan.plan import Side
from mmconvert.plan.training import cautions
from mmconvert.sharding.layout import RANK_FOLDER, Chunk, Layout
from mmconvert.stored import StoredTensor, Target

if TYPE_CHECKING:
    from mmconvert.formats.contents import Look
    from mmconvert.formats.mm.opening import MMStored  # reading takes much that writing need not


class MM(Format):
    """Rank folders with a ``model_optim_rng.pt`` each."""

    name: ClassVar = "mm"
    title: ClassVar = "MM"
    naming: ClassVar = "mm"
    reads: ClassVar = frozenset({"vit_qkv", "experts", "optimizer", "optimizer_kind"})
    writes: ClassVar = frozenset({"optimizer", "optimizer_kind"})
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
        from mmconvert.formats.recognise import mm_family

        return mm_family(path)

    def look(self, path: Path) -> Look:
        """Its ranks; its wholes under MM names with the model's own layer numbers."""
        from mmconvert.formats import contents
        from mmconvert.formats.mm.folder import OPTIMIZER
        from mmconvert.formats.mm.optimizer.placing import state_at_a_glance

        stored = self.open(path, Opening(self.family(path), Options()))
        model, layout, side = stored.model, stored.ranks, stored.opened.side()
        # What its own words say better than those of a reader that passes it over.
        start = f"{stored.opened.chart.checkpoint.folder}: {OPTIMIZER} ("
        return contents.Look(
            kind=self.name,
            title="MM checkpoint",
            family=model.family.name,
            listing=[tensor for part in stored.parts.values() for tensor in part.values()],
            wholes={key.name(): whole for key, whole in side.wholes.items()},
            stored=side.stored,
            boxes=contents.of_mm(model.modules, layout, stored.parts),
            iteration=stored.iteration,
            layout=layout,
            notes=[note for note in model.notes if not note.startswith(start)],
            optimizer=lambda: state_at_a_glance(stored.opened),
        )

    def open(self, path: Path, told: Opening) -> MMStored:
        """The layout is read from the folder; what the user says of it must be so."""
        from mmconvert.formats.mm.opening import open_mm_stored

        return open_mm_stored(path, told)

    def place(self, asked: Placing) -> Placed:
        """Every whole divided over tensor-parallel ranks, on its pipeline stage."""
        model, found = asked.source.model, asked.source.layout
        given = asked.layout if isinstance(asked.layout, ParallelConfig) else ParallelConfig()
        if model.adapter is not None:
            from mmconvert.formats.mm.adapters import sized

            model = sized(model, given)
        layout = target_layout(model, given, prefix=asked.flags)
        side = mm_target(model.plain_modules, model.dims, layout, asked.wholes)
        notes = unchecked_units(model, found if isinstance(found, Layout) else None, layout)
        dims = dict(model.dims)
        for key in vocabulary_keys(side, model.modules):
            dims[model.family.vocabulary] = side.wholes[key].shape[0]  # it may be padded
        notes += [f"warning: {words}" for words in cautions(model.modules, dims, layout)]
        placed = Placed(side=side, layout=layout, notes=tuple(notes))
        if not asked.options.optimizer:
            return placed
        from mmconvert.formats.mm.optimizer.placing import placed_state

        return placed_state(placed, asked, layout)

    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterator[FileImage]:
        """A file for each rank, and the tracker file."""
        assert isinstance(placed.layout, Layout)  # noqa: S101 - narrows the type: it is our own
        if not asked.options.optimizer:
            return rank_images(placed.layout, targets)
        from mmconvert.formats.mm.optimizer.placing import state_images

        return state_images(placed.layout, targets, placed, asked)

    def read_back(self, stored: Sequence[StoredTensor], placed: Placed, asked: Placing) -> Side:
        """By the names and places of the rank files."""
        from mmconvert.formats.mm.source import claim_mm, mm_source

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
        from mmconvert.formats.mm.samples import representative

        return list(representative(model))


FORMAT = MM()
