"""Linear and embedding layers over tensor-parallel shards, in Megatron's sense.

Column-parallel layers hold rows of a weight, row-parallel ones columns. In the backward pass the
input gradient of a column-parallel layer is summed over the ranks; in the forward pass the output
of a row-parallel one is (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
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
