"""An MM checkpoint by pipeline stages: which names, layers and experts stand on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmconvert.converters.rows import Module, Row, mm_index
from mmconvert.formats.mm.folder import MMCheckpoint
from mmconvert.names import NO_LAYER, TemplateIndex
from mmconvert.sharding.layout import Chunk
from mmconvert.sharding.stages import StageGrid
from mmconvert.stored import StoredTensor

# Local layer -> template of an MM name -> the experts that have such a tensor (NO_EXPERT for most).
Layers = dict[int, dict[str, set[int]]]


@dataclass(frozen=True)
class Chart:
    """A checkpoint, seen by the table that its names fit.

    Attributes:
        checkpoint: what could be read.
        modules: the table.
    """

    checkpoint: MMCheckpoint
    modules: tuple[Module, ...]

    @cached_property
    def index(self) -> TemplateIndex[tuple[Module, Row]]:
        """Finds the row of an MM name."""
        return mm_index(self.modules)

    @property
    def whole(self) -> bool:
        """Every rank was read."""
        return self.checkpoint.whole

    def stages(self) -> range:
        """All stages: ``virtual stage * pp + pp rank``."""
        return range(self.checkpoint.pp_size * self.checkpoint.vpp_size)

    @cached_property
    def _by_stage(self) -> dict[int, dict[Chunk, Mapping[str, StoredTensor]]]:
        found: dict[int, dict[Chunk, Mapping[str, StoredTensor]]] = {}
        for chunk, part in self.checkpoint.parts.items():
            stage = chunk.virtual * self.checkpoint.pp_size + chunk.rank.pp
            found.setdefault(stage, {})[chunk] = part
        return found

    def chunks_at(self, stage: int) -> dict[Chunk, Mapping[str, StoredTensor]]:
        """The chunks of one stage that were read: of its tp and ep ranks."""
        return self._by_stage.get(stage, {})

    @cached_property
    def _names(self) -> dict[int, set[str]]:
        return {
            stage: {name for part in parts.values() for name in part}
            for stage, parts in self._by_stage.items()
        }

    def names_at(self, stage: int) -> set[str]:
        """The names on any tp or ep rank of a stage."""
        return self._names.get(stage, set())

    def place(self, stage: int) -> str:
        """A stage in words."""
        pp = self.checkpoint.pp_size
        words = f"pp rank {stage % pp}"
        return words + (f", model{stage // pp}" if self.checkpoint.vpp_size > 1 else "")

    def rank(self, chunk: Chunk) -> str:
        """A rank of a stage in words."""
        words = f"tp rank {chunk.rank.tp}"
        return words + (f", ep rank {chunk.rank.ep}" if self.checkpoint.ep_size > 1 else "")

    def path(self, stage: int) -> Path:
        """The folder of a stage's first rank that was read."""
        for part in self.chunks_at(stage).values():
            for tensor in part.values():
                return tensor.path.parent
        return self.checkpoint.folder

    @cached_property
    def _layers(self) -> dict[int, dict[str, Layers]]:
        layers: dict[int, dict[str, Layers]] = {}
        for stage in self.stages():
            found: dict[str, Layers] = {m.key: {} for m in self.modules}
            for name in self.names_at(stage):
                hit = self.index.find(name)
                if hit and hit[1] != NO_LAYER:
                    (module, row), layer, expert = hit
                    there = found[module.key].setdefault(layer, {})
                    there.setdefault(row.mm, set()).add(expert)
            layers[stage] = found
        return layers

    def layers_at(self, stage: int) -> dict[str, Layers]:
        """What stands in the layers of a stage, by the key of their module."""
        return self._layers[stage]

    @cached_property
    def grids(self) -> dict[str, StageGrid]:
        """Stage grids: as many layers as the highest local number says."""
        counts = [self.layers_at(stage) for stage in self.stages()]
        pp = self.checkpoint.pp_size
        return {
            m.key: tuple(
                tuple(max(counts[v * pp + p][m.key], default=-1) + 1 for p in range(pp))
                for v in range(self.checkpoint.vpp_size)
            )
            for m in self.modules
        }
