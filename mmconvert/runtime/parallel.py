"""Linear and embedding layers over tensor-parallel shards, in Megatron's sense.

Column-parallel layers hold rows of a weight, row-parallel ones columns. In the backward pass the
input gradient of a column-parallel layer is summed over the ranks; in the forward pass the output
of a row-parallel one is (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.runtime.collectives import TensorGroup, copy_in, gathered, share, sum_out

View = Callable[[Tensor], Tensor]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself: the view of what is neither packed nor divided."""
    return tensor


class _Taken(torch.autograd.Function):
    """Parts of a tensor, by rows; all their gradients go back as one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, parts: Sequence[View]) -> tuple[Tensor, ...]:  # noqa: ANN401 - torch's
        """The rows of each part."""
        ctx.parts, ctx.shape = parts, tensor.shape
        return tuple(part(tensor) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's
        """The gradient of the tensor; rows of no part have none."""
        rows = torch.arange(ctx.shape[0], device=grads[0].device)
        places = [part(rows) for part in ctx.parts]
        full = sum(map(len, places)) == len(rows)
        made = (torch.empty if full else torch.zeros)(
            ctx.shape, dtype=grads[0].dtype, device=grads[0].device
        )
        for place, grad in zip(places, grads, strict=True):
            made.index_copy_(0, place, grad)
        return made, None


class TakenTogether:
    """The parts of one packed tensor, which layers of one module use one after the other.

    Taken one by one, each would send back a gradient of the whole tensor, zeros but for its own
    rows.
    """

    def __init__(self, parts: Sequence[View]) -> None:
        self._parts = parts
        self._pending: dict[int, Tensor] = {}
        self._state: tuple[int, int, bool] | None = None

    def take(self, tensor: Tensor, number: int) -> Tensor:
        """One part. Each is taken once; another time begins with new ones."""
        state = (id(tensor), tensor._version, torch.is_grad_enabled())
        if number not in self._pending or self._state != state:
            self._pending = dict(enumerate(_Taken.apply(tensor, self._parts)))
            self._state = state
        return self._pending.pop(number)


class PartOf(nn.Module):
    """A linear layer whose weight is a part of a packed column-parallel tensor.

    Args:
        weight: the packed tensor, (rows on this rank, in).
        bias: packed likewise, (rows on this rank,).
        part: takes the rows of this layer out of a packed tensor, in this layer's order.
        low: the packed tensor's adapter, if it has one.
        taken: takes the weight's rows together with those of other layers; ``part`` without.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        part: View,
        group: TensorGroup,
        low: Any = None,  # noqa: ANN401 - lora.Low, which is built on this module
        taken: View | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.low = weight, bias, low
        self._part, self._group = part, group
        self._taken = taken or part

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., this layer's rows on this rank)."""
        bias = None if self.bias is None else self._part(self.bias)
        x = copy_in(x, self._group)
        out = F.linear(x, self._taken(self.weight), bias)
        return out if self.low is None else out + self.low.rows(x, self._part)


class RowParallel(nn.Module):
    """A linear layer whose input features are divided over the ranks.

    Args:
        weight: (out, in on this rank).
        bias: (out,), replicated.
        low: its adapter, if it has one.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        group: TensorGroup,
        low: Any = None,  # noqa: ANN401 - as above
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.low = weight, bias, low
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """(..., in on this rank) -> (..., out)."""
        out = self._plain(x)
        return out if self.low is None else out + self.low.summed(x)

    def _plain(self, x: Tensor) -> Tensor:
        if self._group.group is None:  # one call: a bias added later is rounded once more in bf16
            return F.linear(x, self.weight, self.bias)
        out = sum_out(F.linear(x, self.weight), self._group)
        return out if self.bias is None else out + self.bias


class VocabEmbedding(nn.Module):
    """A word embedding whose rows are divided over the ranks.

    Args:
        weight: (rows on this rank, width).
        vocab: number of rows in all.
    """

    def __init__(self, weight: nn.Parameter, vocab: int, group: TensorGroup) -> None:
        super().__init__()
        self.weight = weight
        self._mine, self._group = share(vocab, group), group

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) ids -> (..., width)."""
        if self._group.group is None:
            return F.embedding(ids, self.weight)
        local = ids - self._mine.start
        absent = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(absent, 0), self.weight)
        return sum_out(rows.masked_fill(absent.unsqueeze(-1), 0), self._group)


class VocabHead(nn.Module):
    """An output layer whose rows are divided over the ranks; every rank gets all logits.

    Args:
        weight: (rows on this rank, width).
        rows: their number in all, those that pad the vocabulary included.
        vocab: number of logits.
    """

    def __init__(self, weight: nn.Parameter, rows: int, vocab: int, group: TensorGroup) -> None:
        super().__init__()
        self.weight = weight
        self._rows, self._vocab, self._group = rows, vocab, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., vocab)."""
        out = F.linear(copy_in(x, self._group), self.weight)
        return gathered(out, self._rows, self._group)[..., : self._vocab]


class OfOwnPart(nn.Module):
    """A module whose parameters all ranks have, and of whose work each does a part.

    Each rank has the gradient of its own part; they are summed.
    """

    def __init__(self, inner: nn.Module, group: TensorGroup) -> None:
        super().__init__()
        self.inner, self._group = inner, group

    def forward(self, x: Tensor) -> Tensor:
        """What the module makes of this rank's part."""
        shared = {name: copy_in(p, self._group) for name, p in self.inner.named_parameters()}
        return functional_call(self.inner, shared, (x,))


class SlicedNorm(nn.Module):
    """An RMS norm over all heads where each rank has the features of its own heads only.

    The statistic is summed over the ranks; the weight is replicated, and its gradient, of which
    each rank has its own part, is summed too.
    """

    def __init__(
        self, weight: nn.Parameter, eps: float, features: slice, group: TensorGroup
    ) -> None:
        super().__init__()
        self.weight = weight
        self._eps, self._mine, self._group = eps, features, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., features on this rank) -> the same shape."""
        wide = x.float()
        total = sum_out(wide.pow(2).sum(-1, keepdim=True), self._group)
        mean = copy_in(total, self._group) / self.weight.shape[0]
        weight = copy_in(self.weight, self._group)[self._mine]
        return weight * (wide * torch.rsqrt(mean + self._eps)).to(x.dtype)
