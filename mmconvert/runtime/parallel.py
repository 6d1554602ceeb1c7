"""Linear and embedding layers over tensor-parallel shards, in Megatron's sense.

Column-parallel layers hold rows of a weight, row-parallel ones columns. In the backward pass the
input gradient of a column-parallel layer is summed over the ranks; in the forward pass the output
of a row-parallel one is (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

View = Callable[[Tensor], Tensor]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself: the view of what is neither packed nor divided."""
    return tensor


class TensorGroup(NamedTuple):
    """The tensor-parallel ranks that share one module.

    Attributes:
        size: how many pieces the module is in.
        rank: which piece this process holds.
        group: the processes that hold the pieces; None for a size of 1.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


def share(total: int, group: TensorGroup) -> slice:
    """The part of ``total`` units that this rank holds; the first ranks hold one more if uneven."""
    base, extra = divmod(total, group.size)
    start = group.rank * base + min(group.rank, extra)
    return slice(start, start + base + (group.rank < extra))


class _Copy(torch.autograd.Function):
    """The same value on all ranks; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's context
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """Values are summed; the gradient is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN401 - torch's context
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's context
        return grads[0], None


class _Gather(torch.autograd.Function):
    """The last dimension is put together; each rank takes the gradient of its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int, group: TensorGroup) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.mine = share(total, group)
        sizes = [share(total, group._replace(rank=r)) for r in range(group.size)]
        most = max(s.stop - s.start for s in sizes)
        padded = F.pad(x, (0, most - x.shape[-1])).contiguous()  # collectives want equal sizes
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group.group)
        kept = [p[..., : s.stop - s.start] for p, s in zip(parts, sizes, strict=True)]
        return torch.cat(kept, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch's context
        return grads[0][..., ctx.mine].contiguous(), None, None


BUCKET = 1 << 23  # elements that are summed over the replicas in one call


def sum_over(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sums each tensor over the processes of a group, in place; small ones travel together."""
    small: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() > BUCKET // 8:
            dist.all_reduce(tensor, group=group)
            continue
        full = sum(t.numel() for t in small) > BUCKET
        if small and (full or small[0].dtype != tensor.dtype):
            _sum_together(small, group)
            small = []
        small.append(tensor)
    _sum_together(small, group)


def _sum_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors of one dtype in one call."""
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    for one, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        one.copy_(part.view_as(one))


def copy_in(x: Tensor, group: TensorGroup) -> Tensor:
    """An input of column-parallel work: identity; its gradient is the sum over the ranks."""
    return x if group.group is None else _Copy.apply(x, group.group)  # type: ignore[return-value]


def sum_out(x: Tensor, group: TensorGroup) -> Tensor:
    """The sum of partial results over the ranks."""
    return x if group.group is None else _Sum.apply(x, group.group)  # type: ignore[return-value]


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
        if self._group.group is not None:
            out = cast("Tensor", _Gather.apply(out, self._rows, self._group))
        return out[..., : self._vocab]


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
