"""What processes do together with tensors, in the forward and the backward pass."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use


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


def gathered(x: Tensor, total: int, group: TensorGroup) -> Tensor:
    """The last dimension, ``total`` in all, put together on every rank."""
    return x if group.group is None else cast("Tensor", _Gather.apply(x, total, group))
