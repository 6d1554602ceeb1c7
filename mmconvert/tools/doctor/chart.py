"""An MM checkpoint as far as it can be read: its family, its tensors, the layers on each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mmconvert.converters.family import Dims, Family, Module, Row, Variant, encoders, mm_index
from mmconvert.errors import CheckpointError
from mmconvert.formats import manifest
from mmconvert.formats.mm.folder import MMCheckpoint
from mmconvert.formats.mm.model import TEXT, variant_of
from mmconvert.formats.model import Model
from mmconvert.formats.recognise import by_names, mm_form_of
from mmconvert.names import NO_LAYER, TemplateIndex
from mmconvert.narrow import is_object
from mmconvert.sharding.layout import Chunk
from mmconvert.sharding.stages import StageGrid
from mmconvert.stored import StoredTensor
from mmconvert.tools.doctor.folder import Ranks
from mmconvert.tools.doctor.report import DoctorReport

Chunks = Mapping[Chunk, Mapping[str, StoredTensor]]


@dataclass(frozen=True)
class Chart:
    """What is known of an MM checkpoint.

    Attributes:
        folder: what holds the rank folders.
        parts: the tensors that were read, by chunk.
        tp, pp, vpp: tp folders, pipeline ranks, model chunks per rank.
        whole: every rank was read.
        family, variant, modules: the table that its names fit.
        dims: sizes as far as hf_dir or mmconvert.json tell them.
        tied: whether the output layer is the embedding; None if nobody says.
        encoders_only: it holds the encoders alone.
    """

    folder: Path
    parts: Chunks
    tp: int
    pp: int
    vpp: int
    whole: bool
    family: Family
    variant: Variant
    modules: tuple[Module, ...]
    dims: Dims
    tied: bool | None
    encoders_only: bool

    @cached_property
    def index(self) -> TemplateIndex[tuple[Module, Row]]:
        """Finds the row of an MM name."""
        return mm_index(self.modules)

    def stages(self) -> range:
        """All stages: ``virtual stage * pp + pp rank``."""
        return range(self.pp * self.vpp)

    @cached_property
    def _by_stage(self) -> dict[int, dict[Chunk, Mapping[str, StoredTensor]]]:
        found: dict[int, dict[Chunk, Mapping[str, StoredTensor]]] = {}
        for chunk, part in self.parts.items():
            stage = chunk.virtual * self.pp + chunk.rank.pp
            found.setdefault(stage, {})[chunk] = part
        return found

    def chunks_at(self, stage: int) -> dict[Chunk, Mapping[str, StoredTensor]]:
        """The chunks of one stage that were read, by tp rank."""
        return self._by_stage.get(stage, {})

    @cached_property
    def _names(self) -> dict[int, set[str]]:
        return {
            stage: {name for part in parts.values() for name in part}
            for stage, parts in self._by_stage.items()
        }

    def names_at(self, stage: int) -> set[str]:
        """The names on any tp rank of a stage."""
        return self._names.get(stage, set())

    def place(self, stage: int) -> str:
        """A stage in words."""
        words = f"pp rank {stage % self.pp}"
        return words + (f", model{stage // self.pp}" if self.vpp > 1 else "")

    def path(self, stage: int) -> Path:
        """The folder of a stage's first rank that was read."""
        for part in self.chunks_at(stage).values():
            for tensor in part.values():
                return tensor.path.parent
        return self.folder

    @cached_property
    def _layers(self) -> dict[int, dict[str, dict[int, set[str]]]]:
        layers: dict[int, dict[str, dict[int, set[str]]]] = {}
        for stage in self.stages():
            found: dict[str, dict[int, set[str]]] = {m.key: {} for m in self.modules}
            for name in self.names_at(stage):
                hit = self.index.find(name)
                if hit and hit[1] != NO_LAYER:
                    (module, row), layer, _ = hit
                    found[module.key].setdefault(layer, set()).add(row.mm)
            layers[stage] = found
        return layers

    def layers_at(self, stage: int) -> dict[str, dict[int, set[str]]]:
        """Module key -> local layer -> MM templates of the tensors that are there."""
        return self._layers[stage]

    def grids(self) -> dict[str, StageGrid]:
        """Stage grids: as many layers as the highest local number says."""
        counts = [self.layers_at(stage) for stage in self.stages()]
        return {
            m.key: tuple(
                tuple(max(counts[v * self.pp + p][m.key], default=-1) + 1 for p in range(self.pp))
                for v in range(self.vpp)
            )
            for m in self.modules
        }

    def as_checkpoint(self) -> MMCheckpoint:
        """For the functions that read a layout off a checkpoint."""
        return MMCheckpoint(self.folder, self.folder, "", self.tp, self.pp, self.vpp, self.parts)


def make_chart(
    root: Path, ranks: Ranks, parts: Chunks, hf: Model | None, report: DoctorReport
) -> Chart | None:
    """Recognises the family; None if no family knows the names."""
    names = {name for part in parts.values() for name in part}
    if not names:
        return None
    if (fault := mm_form_of(parts.values(), ranks.folder)) is not None:
        report.add_error("refused", fault, path=ranks.folder)
        return None
    try:
        family = by_names(names, ranks.folder)
    except CheckpointError as error:
        report.add_error("unknown-family", error, path=ranks.folder)
        return None
    report.family = family.name
    if hf is not None and hf.family.converter != family.converter:
        report.add(
            "other-family",
            f"{ranks.folder} holds tensors of {family.name}; hf_dir is of {hf.family.name}",
            "give the hf_dir of the model that this checkpoint was made from",
            path=ranks.folder,
        )
        hf = None
    content, _ = manifest.read(root)
    said = content.get("variant") if content else None
    tied = said.get("tied") if is_object(said) else None
    if hf is not None and hf.tied_known:
        tied = hf.variant.tied
    variant = variant_of(
        family,
        names,
        MMCheckpoint(root, ranks.folder, "", ranks.tp, ranks.pp, 1, parts),
        hf,
    )
    variant = replace(variant, tied=tied is True)
    modules = family.table(variant)
    encoders_only = not any(name.startswith(TEXT) for name in names)
    if encoders_only:
        modules = encoders(modules)
    return Chart(
        folder=ranks.folder,
        parts=parts,
        tp=ranks.tp,
        pp=ranks.pp,
        vpp=1 + max(chunk.virtual for chunk in parts),
        whole=ranks.whole and len({chunk.rank for chunk in parts}) == ranks.tp * ranks.pp,
        family=family,
        variant=variant,
        modules=modules,
        dims=dict(hf.dims) if hf else manifest.sizes(content or {}),
        tied=tied if isinstance(tied, bool) else None,
        encoders_only=encoders_only,
    )
