"""What the tables of MindFormers' families have beside those of MM format: how devices slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module, Row
from mmconvert.names import NO_LAYER
from mmconvert.sharding.devices import DeviceLayout
from mmconvert.sharding.slices import WHOLE, Slicing


@dataclass(frozen=True, kw_only=True)
class MSFamily(Family):
    """A family whose table leads to MindFormers' tensors.

    The modules' rows give ``shard`` in the sense of model parallelism: 0 the first dimension, 1
    the second, None every device holds it whole.

    Attributes:
        embedding, head: MM names of the word embedding and of the output layer.
        tables: MM names of further tensors that are looked up or added, no weights of a linear
            or convolution: the optimizer never divides them.
        units: dimension -> its words; ``model_parallel`` must divide each.
    """

    embedding: str
    head: str
    tables: frozenset[str] = frozenset()
    units: tuple[tuple[str, str], ...] = ()
    form: str = "MindSpore format"
    naming: str = "mindformers"

    def slicing(self, row: Row, layout: DeviceLayout, shape: Sequence[int], item: int) -> Slicing:
        """How a tensor is sliced within its stage.

        Args:
            shape: of the whole tensor.
            item: bytes of an element.

        Source: layouts compiled from MindFormers 1.3.1's model (dp 2 mp 2, mp 4, vocab_emb_dp,
        optimizer parallel). The output layer is divided over all devices of a stage.
        """
        grid = (layout.data_parallel, layout.model_parallel)
        axes: list[tuple[int, ...]] = [()] * len(shape)
        if row.mm in (self.embedding, self.head) and layout.vocab_emb_dp:
            return Slicing(grid, tuple(axes))
        if row.mm == self.head:
            return Slicing((layout.devices,), ((0,), *axes[1:]))
        uneven = row.mm == self.embedding and shape[0] % layout.model_parallel
        if row.shard is not None and not uneven:
            axes[row.shard.axis] = (0,)
        optimizer = WHOLE if self._optimized(row, layout, shape, item) else 0
        return Slicing(grid, tuple(axes), optimizer)

    def _optimized(self, row: Row, layout: DeviceLayout, shape: Sequence[int], item: int) -> bool:
        """Whether the optimizer divides the first dimension over the devices that would hold the
        same slice: of linears and convolutions, unless they are small or do not divide.
        """
        if not layout.optimizer_parallel or layout.data_parallel == 1 or len(shape) < 2:
            return False
        if row.mm == self.embedding or row.mm in self.tables:
            return False
        parts = layout.model_parallel if row.shard else 1
        size = item
        for length in shape:
            size *= length
        first = parts if row.shard and row.shard.axis == 0 else 1
        fits = shape[0] % (first * layout.devices // parts) == 0
        return fits and size // parts >= layout.threshold

    def stage(self, module: Module, row_is_after: bool, layer: int, layout: DeviceLayout) -> int:
        """The pipeline stage of a tensor: encoders and embedding on the first, each text layer
        where the layout has it, final norm and output layer on the last.
        """
        if module.role == "head" or (module.role == "decoder" and row_is_after):
            return layout.stages - 1
        if module.role == "decoder" and layer != NO_LAYER and layout.stages > 1:
            return layout.stage_of(layer)
        return 0
