"""The cost of each layer: floating-point operations of a training step, and parameters.

Everything is for one tensor-parallel rank, the one with the largest shards. docs/suggest.md has
the formulas and their sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from mmconvert.converters.rows import Module, Row
from mmconvert.formats.mm.instances import Instance
from mmconvert.formats.mm.target import mm_target, shard_spans
from mmconvert.formats.model import Model
from mmconvert.names import INDEX, NO_LAYER
from mmconvert.plan.dtypes import widest
from mmconvert.plan.plan import Key, Whole, matrix
from mmconvert.sharding.layout import Layout
from mmconvert.stored import ITEM_SIZE
from mmconvert.tools.suggest.chains import Chain
from mmconvert.tools.suggest.workload import Flow

# Weights that are looked up, not multiplied.
LOOKED_UP = (
    "word_embeddings.weight",
    "audio_bos_eos_token.weight",
    "position_embedding.weight",
    "pos_embed.weight",
)
HALF_STRIDE = ".conv2."  # works on the positions of the layers, not on the frames before them
# Its columns are the attention's width.
OUTPUT = ("self_attention.linear_proj.weight", "self_attention.proj.weight", "attn.proj.weight")


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
    ep: int = 1,
) -> list[Costs]:
    """The costs of each module, in the order of the table.

    Args:
        wholes: the shapes of whole tensors; of the layers, the first is enough.
        tp: tensor-parallel size by module key.
        flow: what each module processes.
        frozen: keys of the modules whose weights are not trained.
        ep: the expert-parallel size.

    Raises:
        LayoutError: a tp size that does not divide a tensor.
    """
    grids = {m.key: ((1,),) for m in model.modules}
    one_layer = Layout(tp, grids, decoder=model.family.decoder)
    mm_target(model.modules, model.dims, one_layer, wholes)  # raises what a conversion would
    by_row = {key.mm: whole for key, whole in wholes.items()}
    shared = Sharing(flow, frozen, ep)
    return [_costs(model, module, by_row, tp[module.key], shared) for module in model.modules]


def _costs(
    model: Model, module: Module, wholes: Mapping[str, Whole], tp: int, shared: Sharing
) -> Costs:
    """The costs of one module; of its layers the mean."""
    layers, flow = model.dims[f"{module.key}.layers"], shared.flow[module.key]
    found, total = Costs(module.key, layers, module.key in shared.frozen), SectionCost()
    width = 0
    for row in module.all_rows():
        whole = wholes.get(row.tied_to or row.mm)
        if whole is None:  # no layer has it
            continue
        item = Instance(module, row, 0 if row in module.layer else NO_LAYER)
        shape = local_shape(item, whole.shape, tp, model.dims)
        counts = TensorCounts.of(module, row, model.dims, shared.ep)
        part = total if item.layer != NO_LAYER else _part(found, item)
        part.parameters += prod(shape) * counts.held
        part.nbytes += prod(shape) * counts.held * ITEM_SIZE[widest(whole.dtype)]
        if len(whole.shape) > 1 and row.mm.endswith(".weight"):
            part.matmul += 2 * prod(shape) * _positions(item, flow) * counts.active
        width = matrix(shape)[1] if row.mm.endswith(OUTPUT) else width
    found.after.matmul += total.matmul % layers  # what the mean leaves over
    found.after.parameters += total.parameters % layers
    found.after.nbytes += total.nbytes % layers
    found.layer = SectionCost(
        total.matmul // layers,
        4 * flow.pairs * width,  # queries by keys, and weights by values
        total.parameters // layers,
        total.nbytes // layers,
    )
    return found


class TensorCounts(NamedTuple):
    """How many tensors a row stands for in a whole module.

    Attributes:
        every: on all ranks together.
        held: on one expert-parallel rank.
        active: those that one token meets.
    """

    every: int
    held: int
    active: int

    @staticmethod
    def of(module: Module, row: Row, dims: Mapping[str, int], ep: int) -> TensorCounts:
        """Counted over the layers that have the row, and their experts."""
        if row not in module.layer:
            return TensorCounts(1, 1, 1)
        layers = dims[f"{module.key}.layers"] if row.layers is None else len(row.layers)
        if not row.of_expert:
            return TensorCounts(layers, layers, layers)
        experts = dims.get(f"{module.key}.experts", 0)
        active = min(experts, dims.get(f"{module.key}.active_experts", experts))
        return TensorCounts(layers * experts, layers * experts // ep, layers * active)


class Sharing(NamedTuple):
    """What besides tensor parallelism decides what a rank has to do.

    Attributes:
        flow: what each module processes.
        frozen: keys of the modules whose weights are not trained.
        ep: the expert-parallel size. Its ranks have samples of their own, so that each computes as
            much as without it.
    """

    flow: Mapping[str, Flow]
    frozen: Set[str]
    ep: int = 1


def model_parameters(model: Model, wholes: Mapping[Key, Whole]) -> tuple[int, int]:
    """Parameters of the whole model, and those of them that work on one token."""
    by_row = {key.mm: whole for key, whole in wholes.items()}
    every = active = 0
    for module in model.modules:
        for row in module.all_rows():
            if row.tied_to or row.mm not in by_row:
                continue
            counts = TensorCounts.of(module, row, model.dims, 1)
            every += prod(by_row[row.mm].shape) * counts.every
            active += prod(by_row[row.mm].shape) * counts.active
    return every, active


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
    if item.layer != NO_LAYER:  # mergers beside some layers make as many tokens as the last one
        return flow.after if any(INDEX in name for name in item.row.hf) else flow.layer
    if not _within(item.row, item.module):
        return flow.after
    return flow.layer if HALF_STRIDE in item.row.mm else flow.before
