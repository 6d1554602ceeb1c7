"""Adapters in the running model: low-rank matrices beside linear layers, which alone learn.

The key of a matrix is its layer's MM name, as MindSpeed-MM's LoRA training saves it; A and B are
divided over tensor-parallel ranks as that layer's columns and rows are. What is copied has summed
gradients: each rank computes a part of them (Hu et al. 2021, arXiv:2106.09685; PEFT's Megatron
layer).
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.adapters import MM_A, MM_B, Settings, of_training
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.runtime.collectives import TensorGroup, copy_in, sum_out
from mmconvert.runtime.parallel import View


@dataclass(frozen=True)
class LoraPlan:
    """What is adapted.

    Attributes:
        rank, alpha: of all adapters.
        targets: module names, or their ends; () adapts what the adapter's checkpoint holds.
        frozen: beginnings of MM names that are not adapted.
        seed: of the matrices A of new adapters; B begins with zeros.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    seed: int = 0

    @property
    def scale(self) -> float:
        """The factor of B @ A."""
        return self.alpha / self.rank

    def adapts(self, module: str) -> bool:
        """Whether a linear layer of this MM name is a target."""
        if any(module == f or module.startswith(f.rstrip(".") + ".") for f in self.frozen):
            return False
        return any(module == t or module.endswith(f".{t}") for t in self.targets)

    def settings(self) -> dict[str, object]:
        """What decides the curve."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": sorted(self.targets)}


@dataclass(frozen=True)
class LoraFolders:
    """One adapter in both forms.

    Attributes:
        mm: the MM checkpoint.
        peft: PEFT's folder, where transformers' model gets it too.
        alpha: that the user gives, where nothing else tells it.
    """

    mm: Path
    peft: Path | None
    alpha: float | None = None


class Low(nn.Module):
    """One layer's adapter on this rank.

    Args:
        a: (rank, in), or this rank's columns of it.
        b: (out, rank), or this rank's rows of it.
        group: the ranks that share the layer.
        columns: whether A is divided; else B is.
    """

    def __init__(
        self, a: nn.Parameter, b: nn.Parameter, scale: float, group: TensorGroup, columns: bool
    ) -> None:
        super().__init__()
        self.a, self.b, self.scale = a, b, scale
        self._group, self._columns = group, columns

    def rows(self, x: Tensor, part: View) -> Tensor:
        """(..., in) -> (..., the part's rows): what is added behind a column-parallel layer.

        The input's gradient is summed by the layer; A's, of which each rank has a part, here.
        """
        low = F.linear(x, copy_in(self.a, self._group))
        return F.linear(low, part(self.b)) * self.scale

    def summed(self, x: Tensor) -> Tensor:
        """(..., in on this rank) -> (..., out): what is added behind a row-parallel layer."""
        return F.linear(sum_out(F.linear(x, self.a), self._group), self.b) * self.scale

    def change(self) -> Tensor:
        """The change of the weight, as far as this rank has it."""
        a, b = self.a, self.b
        if self._columns:
            b = copy_in(b, self._group)
        else:
            a = copy_in(a, self._group)
        return (b @ a) * self.scale


class Adapted(nn.Module):
    """A list of weights, some with adapters: an item is the weight that computes."""

    def __init__(self, weights: list[nn.Parameter], low: Mapping[int, Low]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.low = nn.ModuleDict({str(i): one for i, one in low.items()})

    def __getitem__(self, number: int) -> Tensor:
        weight, key = self.weights[int(number)], str(int(number))
        if key not in self.low:
            return weight
        low: Any = self.low[key]
        return weight + low.change().to(weight.dtype)

    def __len__(self) -> int:
        return len(self.weights)


def drawn(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """A new matrix A, the same on all ranks and in all layouts: uniform as in ``nn.Linear``.

    Args:
        name: of the layer in the whole model.
        shape: (rank, in), of the whole matrix.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_ with a = sqrt(5), as PEFT draws it
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def is_adapter(name: str) -> bool:
    """Whether a tensor is an adapter's, by its MM name."""
    return name.endswith((MM_A, MM_B))


def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a LoRA save holds of a model chunk: adapters alone."""
    return {name: tensor for name, tensor in tensors.items() if is_adapter(name)}


def arguments(plan: LoraPlan, trained: list[str], base: str) -> Namespace:
    """``args`` of a save, as MindSpeed-MM's training has them, as far as they speak of LoRA."""
    return Namespace(
        lora_r=plan.rank,
        lora_alpha=int(plan.alpha) if float(plan.alpha).is_integer() else plan.alpha,
        lora_dropout=0.0,
        lora_target_modules=list(plan.targets),
        lora_trainable_target_modules=trained,
        lora_mixed_training=False,
        load_base_model=base,
    )


def plan_of(args: object, ranks: set[int], alpha: float | None, where: str) -> LoraPlan:
    """The plan of adapters that a checkpoint holds.

    Args:
        args: of a training save; None where there are none.
        ranks: that its matrices have.
        alpha: that the user or a manifest gives.

    Raises:
        CheckpointError: it has no adapters, or no one rank; nothing tells alpha.
    """
    if len(ranks) != 1:
        what = "no adapters" if not ranks else f"adapters of ranks {sorted(ranks)}"
        raise CheckpointError(
            f"{where} holds {what}",
            "the adapters of one LoRA training",
            "give the folder of one; a training of whole weights goes on without LoRA's flags",
        )
    (rank,) = ranks
    found = of_training(vars(args)) if isinstance(args, Namespace) else None
    if found is not None and found.r != rank:
        raise CheckpointError(
            f"{where}: its args say lora_r {found.r}, its matrices have rank {rank}", "one rank"
        )
    told = found or Settings(rank, alpha)
    return LoraPlan(rank, told.scale("", rank) * rank)


def check(rank: int, alpha: float, dropout: float) -> None:
    """Numbers that make no sense.

    Raises:
        RequestError: naming the flag.
    """
    if rank < 1:
        raise RequestError(f"--lora_r is {rank}", "a rank of at least 1")
    if not 0 < alpha < math.inf:
        raise RequestError(f"--lora_alpha is {alpha}", "a number above 0")
    if dropout:
        raise RequestError(
            f"--lora_dropout is {dropout}",
            "0, the default of MindSpeed-MM: nothing is drawn in a training here, so that every "
            "layout and every restart learns the same",
            "leave it out; a lower --lora_r or fewer iterations work against overfitting too",
        )  # fmt: skip
