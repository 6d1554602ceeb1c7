"""Experts of a text layer: transformers' own module over MM format's tensors, one for each expert.

Each expert-parallel rank holds some of the experts, and each tensor-parallel rank a part of each of
these. All of them compute the same sample: a rank sends the tokens through what it holds, and the
results are summed.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmconvert.errors import RequestError, TensorError
from mmconvert.runtime.bind import Binder, even
from mmconvert.runtime.collectives import TensorGroup, copy_in, share, sum_out
from mmconvert.runtime.lora import Adapted, Low
from mmconvert.runtime.parallel import whole


class ExpertGroup(NamedTuple):
    """The ranks that share the experts of one layer.

    Attributes:
        size: how many expert-parallel ranks there are.
        rank: which of them this process is.
        everyone: the processes of all these ranks and of the tensor-parallel ranks of each.
    """

    size: int = 1
    rank: int = 0
    everyone: TensorGroup = TensorGroup()


def about_routers(config: Any) -> str:  # noqa: ANN401 - HF's text config
    """What is said of the routers' auxiliary loss where a model with experts learns."""
    said = "note: routers get no auxiliary loss, as with Megatron's default --moe-aux-loss-coeff 0"
    if getattr(config, "output_router_logits", False):
        weight = getattr(config, "router_aux_loss_coef", None)
        said += f"; transformers would add {weight} of it, as config.json has output_router_logits"
    return said


class SomeExperts(nn.Module):
    """Transformers' experts, of which this process holds some, or a part of each.

    Args:
        experts: transformers' module with the experts of this rank alone.
        start: number of the first of them.
    """

    def __init__(self, experts: Any, start: int, everyone: TensorGroup) -> None:  # noqa: ANN401 - HF's module
        super().__init__()
        self.experts, self._start, self._everyone = experts, start, everyone

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The sum of the chosen experts of all ranks.

        Args:
            hidden: (tokens, width).
            chosen: (tokens, choices) numbers of experts.
            weights: (tokens, choices).
        """
        count = self.experts.num_experts
        mine = chosen - self._start
        mine = mine.masked_fill((mine < 0) | (mine >= count), count)  # the number of no expert
        hidden, weights = copy_in(hidden, self._everyone), copy_in(weights, self._everyone)
        return sum_out(self.experts(hidden, mine, weights), self._everyone)


def bind_experts(binder: Binder, group: ExpertGroup, mlp: Any, mm: str, hf: str) -> None:  # noqa: ANN401 - HF's module
    """Router and experts of a layer.

    Args:
        mlp: has ``gate`` and ``experts``; the latter keep all gates and ups in one tensor
            (experts, 2 * ffn, width), and what goes down in another (experts, width, ffn).
        mm, hf: names of the layer's feed-forward part.
    """
    experts = mlp.experts
    if "top_k_index" not in inspect.signature(experts.forward).parameters:
        raise RequestError(
            "this version of transformers computes all experts of a layer as one tensor",
            "transformers 5, where an expert can be a tensor of its own",
            "pip install --upgrade transformers",
        )
    binder.replicated(mlp.gate, f"{mm}.router", f"{hf}.gate")
    total, width, ffn = experts.down_proj.shape
    if total % group.size:
        raise TensorError(f"{total} experts for {group.size} expert-parallel ranks", "a divisor")
    count = total // group.size
    tensors, start = binder.group, group.rank * count
    some = share(even(ffn, tensors, f"rows of an expert of {hf}"), tensors)
    rows = some.stop - some.start
    ones, twos = list[nn.Parameter](), list[nn.Parameter]()
    low_ones, low_twos = dict[int, Low](), dict[int, Low]()
    for i in range(count):
        name, number = f"{mm}.experts.local_experts.{i}", start + i

        def one(t: Tensor, number: int = number) -> Tensor:
            return t[number].view(2, ffn, -1)[:, some].flatten(0, 1)

        def two(t: Tensor, number: int = number) -> Tensor:
            return t[number][:, some]

        pieces = tensors.size * group.size
        for leaf, shape, kept, found, mine, low, columns in (
            ("linear_fc1", (2 * rows, width), "gate_up_proj", ones, one, low_ones, None),
            ("linear_fc2", (width, rows), "down_proj", twos, two, low_twos, some),
        ):
            weight = binder.shard.take(f"{name}.{leaf}.weight", shape, pieces)
            sizes = (shape[0], width if columns is None else ffn)
            whole_name = f"{binder.key}.{hf}.{number}.{leaf}"
            made = binder.shard.low(
                f"{name}.{leaf}", whole_name, sizes, tensors, columns, pieces=pieces
            )
            if made is not None:
                low[i] = made
            binder.bind(f"{name}.{leaf}.weight", f"{hf}.experts.{kept}", weight, whole, mine)
            found.append(weight)
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj = Adapted(ones, low_ones) if low_ones else nn.ParameterList(ones)
    experts.down_proj = Adapted(twos, low_twos) if low_twos else nn.ParameterList(twos)
    experts.num_experts = count
    if group.everyone.group is not None:
        mlp.experts = SomeExperts(experts, start, group.everyone)
