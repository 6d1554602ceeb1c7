"""Linear layers that MM format keeps in one tensor: q, k and v; gate and up."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.runtime.collectives import TensorGroup, copy_in
from mmconvert.runtime.parallel import View, whole


class Packing:
    """How the rows of a packed tensor are divided among linear layers.

    Attributes:
        parts: take each layer's rows out of it; every row is of one layer.
        places: the numbers of these rows; a slice where they follow one another.
    """

    def __init__(self, parts: Sequence[View], rows: int, device: torch.device) -> None:
        self.parts = parts
        self.places: list[slice | Tensor] = []
        for part in parts:
            place = part(torch.arange(rows, device=device))
            first, count = int(place[0]), len(place)
            run = torch.arange(first, first + count, device=device)
            self.places.append(slice(first, first + count) if torch.equal(place, run) else place)


class _Linears(torch.autograd.Function):
    """Linear layers over the parts of one packed tensor, with one input.

    They compute as transformers' own layers do, gradients included, and write the packed weight's
    gradient where it belongs. By autograd alone each part would send back a gradient of the whole,
    zeros but for its own rows.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        packing: Packing,
    ) -> tuple[Tensor, ...]:
        """(..., in) -> (..., rows of the part) for each part."""
        weights = [part(weight) for part in packing.parts]
        biases = [None if bias is None else part(bias) for part in packing.parts]
        ctx.packing, ctx.rows = packing, weight.shape[0]
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        """Gradients of the input, the packed weight and the packed bias."""
        x, *weights = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:  # added up in the order of autograd: the last part first
            of_x = flat[-1].mm(weights[-1])
            for grad, weight in zip(flat[-2::-1], weights[-2::-1], strict=True):
                of_x += grad.mm(weight)
            of_x = of_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1])
            of_weight = x.new_empty(ctx.rows, x.shape[-1])
            for grad, place in zip(flat, ctx.packing.places, strict=True):
                if isinstance(place, slice):
                    torch.mm(grad.t(), rows, out=of_weight[place])
                else:
                    of_weight.index_copy_(0, place, grad.t().mm(rows))
        if ctx.needs_input_grad[2]:
            of_bias = x.new_empty(ctx.rows)
            for grad, place in zip(flat, ctx.packing.places, strict=True):
                of_bias[place] = grad.sum(0)
        return of_x, of_weight, of_bias, None


class PackedLinears:
    """Linear layers that one module calls one after the other, with the same input.

    Args:
        weight: the packed tensor, (rows on this rank, in).
        bias: packed likewise, (rows on this rank,).
        parts: take each layer's rows out of a packed tensor, in the layer's order.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        parts: Sequence[View],
        group: TensorGroup,
    ) -> None:
        self._weight, self._bias, self._group = weight, bias, group
        self._packing = Packing(parts, weight.shape[0], weight.device)
        self._x: Tensor | None = None  # the input that the results below are of
        self._copy: Tensor | None = None
        self._pending: dict[int, Tensor] = {}

    def take(self, x: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The input as this rank's layers get it, and the output of one of them.

        All are computed for the first; each is handed out once.
        """
        if self._x is not x or number not in self._pending:
            self._x, self._copy = x, copy_in(x, self._group)
            outs: Any = _Linears.apply(self._copy, self._weight, self._bias, self._packing)
            self._pending = dict(enumerate(outs))
        out, copy = self._pending.pop(number), cast("Tensor", self._copy)
        if not self._pending:
            self._x = self._copy = None
        return copy, out


class PartOf(nn.Module):
    """A linear layer whose weight is a part of a packed column-parallel tensor.

    Args:
        weight: the packed tensor, (rows on this rank, in).
        bias: packed likewise, (rows on this rank,).
        part: takes the rows of this layer out of a packed tensor, in this layer's order.
        low: the packed tensor's adapter, if it has one.
        joint: computes this layer together with the others of the packed tensor where there are
            gradients, and this one's number there; None where the tensor is all this layer's.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        part: View,
        group: TensorGroup,
        low: Any = None,  # noqa: ANN401 - lora.Low, which is built on this module
        joint: tuple[PackedLinears, int] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.low = weight, bias, low
        self._part, self._group, self._joint = part, group, joint
        self._rows = part  # in `weight` and `bias`

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., this layer's rows on this rank)."""
        if self._joint is not None and torch.is_grad_enabled():
            x, out = self._joint[0].take(x, self._joint[1])
        else:
            x = copy_in(x, self._group)
            bias = None if self.bias is None else self._rows(self.bias)
            out = F.linear(x, self._rows(self.weight), bias)
        return out if self.low is None else out + self.low.rows(x, self._part)

    def unpack(self) -> None:
        """Keeps its own rows in their order, in place of the packed tensor: for answers alone."""
        self._joint = None
        for name in ("weight", "bias"):
            if (packed := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(self._rows(packed.detach()), requires_grad=False))
        self._rows = whole
