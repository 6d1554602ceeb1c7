"""The cost of each layer: floating-point operations of a training step, and parameters.

Everything is for one tensor-parallel rank, the one with the largest shards. docs/suggest.md has
the formulas and their sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from math import prod

from mmconvert.converters.family import Module, Row
from mmconvert.formats.mm.instances import Instance, instances
from mmconvert.formats.mm.target import mm_target, shard_spans
from mmconvert.formats.model import Model
from mmconvert.names import NO_LAYER
from mmconvert.plan.dtypes import widest
from mmconvert.plan.plan import Key, Whole, matrix
from mmconvert.sharding.layout import Layout
from mmconvert.stored import ITEM_SIZE
from mmconvert.tools.suggest.chains import Chain
from mmconvert.tools.suggest.workload import Flow

# Weights that are looked up, not multiplied.
LOOKED_UP = ("word_embeddings.weight", "audio_bos_eos_token.weight")
HALF_STRIDE = ".conv2."  # works on the positions of the layers, not on the frames before them
OUTPUT = "self_attention.linear_proj.weight"  # its columns are the attention's width


@dataclass
class SectionCost:
    """What stands before, in, or after the layers of a module, on one tensor-parallel rank.

    Attributes:
        matmul: operations of the forward pass that multiply by weights.
        attention: operations of the forward pass that multiply activations by each other.
        parameters: number of parameters.
        nbytes: bytes of their weights.
    """

    matmul: int = 0
    attention: int = 0
    parameters: int = 0
    nbytes: int = 0

    def step(self, trained: bool, gradient: bool) -> int:
        """Operations of forward and backward.

        Args:
            trained: the weights get a gradient: one more product for each of the forward pass.
            gradient: the input gets one: another one.
        """
        back = 2 if trained or gradient else 0  # a product of activations has two gradients
        return self.matmul * (1 + trained + gradient) + self.attention * (1 + back)


@dataclass
class Costs:
    """Costs of one module.

    Attributes:
        frozen: its weights are not trained.
    """

    key: str
    layers: int
    frozen: bool
    before: SectionCost = field(default_factory=SectionCost)
    layer: SectionCost = field(default_factory=SectionCost)
    after: SectionCost = field(default_factory=SectionCost)

    def chain(self, by: str, gradient: bool) -> Chain:
        """The module as the balance sees it.

        Args:
            by: ``flops`` or ``parameters``.
            gradient: something that is trained stands before this module.
        """
        if by == "parameters":
            parts = (self.before, self.layer, self.after)
            return Chain(self.key, self.layers, *(part.parameters for part in parts))
        trained = not self.frozen
        inside = trained or gradient  # the layers' input depends on what stands before them
        costs = (
            self.before.step(trained, gradient),
            self.layer.step(trained, inside),
            self.after.step(trained, inside),
        )
        return Chain(self.key, self.layers, *costs)


def module_costs(
    model: Model,
    wholes: Mapping[Key, Whole],
    tp: Mapping[str, int],
    flow: Mapping[str, Flow],
    frozen: Set[str],
) -> list[Costs]:
    """The costs of each module, in the order of the table.

    Args:
        wholes: the shapes of whole tensors; of the layers, the first is enough.
        tp: tensor-parallel size by module key.
        flow: what each module processes.
        frozen: keys of the modules whose weights are not trained.

    Raises:
        LayoutError: a tp size that does not divide a tensor.
    """
    grids = {m.key: ((1,),) for m in model.modules}
    one_layer = Layout(tp, grids, decoder=model.family.decoder)
    mm_target(model.modules, model.dims, one_layer, wholes)  # raises what a conversion would
    found = {
        m.key: Costs(m.key, model.dims[f"{m.key}.layers"], m.key in frozen) for m in model.modules
    }
    widths: dict[str, int] = {}
    for item in instances(model.modules, {m.key: 1 for m in model.modules}):
        key, whole = item.module.key, wholes[item.key]
        shape = local_shape(item, whole.shape, tp[key], model.dims)
        part = _part(found[key], item)
        part.parameters += prod(shape)
        part.nbytes += prod(shape) * ITEM_SIZE[widest(whole.dtype)]
        if len(whole.shape) > 1 and item.row.mm.endswith(".weight"):
            part.matmul += 2 * prod(shape) * _positions(item, flow[key])
        if item.row.mm.endswith(OUTPUT):
            widths[key] = matrix(shape)[1]
    for key, width in widths.items():  # queries by keys, and weights by values
        found[key].layer.attention = 4 * flow[key].pairs * width
    return list(found.values())


def local_shape(
    item: Instance, shape: tuple[int, ...], size: int, dims: dict[str, int]
) -> tuple[int, int]:
    """Rows and columns of a tensor on tp rank 0, whose shards are never smaller than others'."""
    rows, cols = matrix(shape)
    held = sum(span.length for span in shard_spans(item, shape, size, 0, dims))
    split = item.row.shard
    return (held, cols) if split is None or split.axis == 0 else (rows, held)


def _part(costs: Costs, item: Instance) -> SectionCost:
    if item.layer != NO_LAYER:
        return costs.layer
    return costs.before if _within(item.row, item.module) else costs.after


def _within(row: Row, module: Module) -> bool:
    return any(row is one for one in module.before)


def _positions(item: Instance, flow: Flow) -> int:
    if item.row.mm.endswith(LOOKED_UP):
        return 0
    if item.layer != NO_LAYER:
        return flow.layer
    if not _within(item.row, item.module):
        return flow.after
    return flow.layer if HALF_STRIDE in item.row.mm else flow.before
