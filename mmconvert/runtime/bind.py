"""Two trees over one set of tensors.

The model of transformers computes: its tree keeps transformers' names, with its linear and
embedding leaves replaced by the layers of :mod:`parallel`. The MM tree holds the same parameters
under the names of MM format, so that its ``state_dict()`` is the checkpoint. Both are made in one
pass: what a module needs is taken out of the shard by its MM name, and what is left over or
absent is an error. The converter's tables have no part in it, so that errors cannot cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmconvert.errors import TensorError
from mmconvert.runtime.parallel import (
    PartOf,
    RowParallel,
    TensorGroup,
    View,
    VocabEmbedding,
    VocabHead,
    share,
    whole,
)


class Binding(NamedTuple):
    """What one parameter of transformers' model is in this rank's shard.

    Attributes:
        mm: the MM name.
        hf: tower and name in transformers' whole model: ``("vit", "blocks.3.norm1.weight")``.
        parameter: the tensor of the shard, which may be packed.
        part: takes this parameter out of the packed tensor.
        mine: takes this rank's share out of the whole parameter of transformers; both have one
            shape then.
    """

    mm: str
    hf: tuple[str, str]
    parameter: nn.Parameter
    part: View
    mine: View


@contextmanager
def params_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Modules made in here have parameters without data, and buffers with theirs.

    Args:
        dtype: the dtype of the parameters, and of what the library makes of the default dtype.
    """
    plain, default = nn.Module.register_parameter, torch.get_default_dtype()

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]
        torch.set_default_dtype(default)


class Shard:
    """One model chunk's tensors while they are bound.

    Args:
        tensors: the chunk's tensors by MM name.
        where: the file and chunk, for messages.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.left = dict(tensors)
        self.where = where
        self.tree = nn.Module()
        self.bindings: list[Binding] = []
        # Parts of packed biases that transformers' layer has not: they must be and stay zero.
        self.void: list[tuple[str, nn.Parameter, View]] = []
        self.divided: set[str] = set()  # MM names of which each rank of a tower has its own part
        self.group_of: dict[str, TensorGroup] = {}  # MM name -> the group of its tower
        self.canonical = any(".self_attention.q_proj." in name for name in tensors)
        self._dtype, self._device = dtype, device

    def take(self, name: str, shape: tuple[int, ...], group: TensorGroup) -> nn.Parameter:
        """Moves a tensor from the shard into the MM tree.

        Raises:
            TensorError: it is absent, or of another shape.
        """
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise TensorError(
                f"{self.where}: {name} is missing",
                f"a tensor of shape {list(shape)}",
                "convert the checkpoint again; every tensor must be there",
            )
        if tuple(tensor.shape) != shape:
            raise TensorError(
                f"{self.where}: {name} has shape {list(tensor.shape)}",
                f"{list(shape)} by config.json and the layout",
                "give the hf_dir of the model that this checkpoint was made from",
            )
        data = tensor.to(device=self._device, dtype=self._dtype, copy=True)
        parameter = nn.Parameter(data)
        _plant(self.tree, name, parameter)
        self.group_of[name] = group
        return parameter

    def finish(self, parts: nn.Module) -> None:
        """Checks that nothing is left over on either side.

        Args:
            parts: transformers' modules that will compute.

        Raises:
            TensorError: the shard holds tensors that no module has a place for.
        """
        if self.left:
            names = sorted(self.left)
            raise TensorError(
                f"{self.where}: {len(names)} tensors have no place in the model: "
                f"{', '.join(names[:3])}",
                "the tensors of this model and stage, and no others",
                "give the hf_dir of the model that this checkpoint was made from",
            )
        unbound = [name for name, p in parts.named_parameters() if p.is_meta]
        if unbound:
            raise TensorError(
                f"{unbound[0]} of transformers' model has no counterpart in MM format",
                "a model of the architecture that the converter knows",
            )


def _plant(tree: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, leaf = name.split(".")
    for word in path:
        if not hasattr(tree, word):
            tree.add_module(word, nn.Module())
        tree = getattr(tree, word)
    tree.register_parameter(leaf, parameter)


class Tower:
    """Binds the modules of one tower (vision, audio or text) in one chunk.

    Args:
        key: ``vit``, ``audio`` or ``llm``.
        group: the ranks that share it.
    """

    def __init__(self, shard: Shard, key: str, group: TensorGroup) -> None:
        self.shard, self.key, self.group = shard, key, group

    def _bind(
        self, mm: str, hf: str, p: nn.Parameter, part: View = whole, mine: View = whole
    ) -> None:
        self.shard.bindings.append(Binding(mm, (self.key, hf), p, part, mine))

    def _take(self, name: str, shape: tuple[int, ...], divided: bool) -> nn.Parameter:
        if divided:
            self.shard.divided.add(name)
        return self.shard.take(name, shape, self.group)

    def replicated(self, module: nn.Module, mm: str, hf: str) -> None:
        """Every parameter of a small module (a norm, a convolution, a bias), as it is."""
        for name, empty in list(module.named_parameters(recurse=False)):
            full = f"{mm}.{name}" if mm else name
            parameter = self._take(full, tuple(empty.shape), divided=False)
            setattr(module, name, parameter)
            self._bind(full, f"{hf}.{name}", parameter)

    def own(
        self, module: nn.Module, name: str, mm: str, hf: str, shape: tuple[int, ...] | None = None
    ) -> None:
        """One parameter that stands alone in its module, replicated."""
        empty = getattr(module, name)
        parameter = self._take(mm, tuple(empty.shape), divided=False)
        setattr(module, name, parameter)
        self._bind(mm, hf, parameter)

    def packed(
        self,
        pieces: Mapping[str, tuple[nn.Module, str]],
        mm: str,
        hf: str,
        rows: int,
        parts: Mapping[str, tuple[View, View]],
    ) -> None:
        """Column-parallel linear layers that MM format keeps in one tensor.

        Args:
            pieces: HF suffix -> (module that has the layer, attribute).
            mm, hf: names without ``.weight``; the HF one without the suffix.
            rows: rows of the packed tensor on this rank.
            parts: HF suffix -> (its rows in the packed tensor, this rank's rows of the whole).
        """
        first = _linear(*next(iter(pieces.values())))
        weight = self._take(f"{mm}.weight", (rows, first.in_features), divided=True)
        biased = [suffix for suffix, place in pieces.items() if _linear(*place).bias is not None]
        bias = self._take(f"{mm}.bias", (rows,), divided=True) if biased else None
        for suffix, (parent, attribute) in pieces.items():
            part, mine = parts[suffix]
            setattr(parent, attribute, PartOf(weight, bias, part, self.group))
            self._bind(f"{mm}.weight", f"{hf}{suffix}.weight", weight, part, mine)
            if bias is None:
                continue
            if suffix in biased:
                self._bind(f"{mm}.bias", f"{hf}{suffix}.bias", bias, part, mine)
            else:
                self.shard.void.append((f"{mm}.bias", bias, part))

    def column(self, parent: nn.Module, attribute: str, mm: str, hf: str) -> None:
        """A column-parallel linear layer that is not packed with others."""
        out = _linear(parent, attribute).out_features
        mine = share(even(out, self.group, f"rows of {hf}"), self.group)
        rows = mine.stop - mine.start
        self.packed({"": (parent, attribute)}, mm, hf, rows, {"": (whole, lambda t: t[mine])})

    def row(self, parent: nn.Module, attribute: str, mm: str, hf: str, units: int = 0) -> None:
        """A row-parallel linear layer.

        Args:
            units: heads that its columns are divided by, unevenly if need be; 0 for even columns.
        """
        linear = _linear(parent, attribute)
        width = linear.in_features // units if units else 1
        count = units or even(linear.in_features, self.group, f"columns of {hf}")
        some = share(count, self.group)
        mine = slice(some.start * width, some.stop * width)
        shape = (linear.out_features, mine.stop - mine.start)
        weight = self._take(f"{mm}.weight", shape, divided=True)
        self._bind(f"{mm}.weight", f"{hf}.weight", weight, whole, lambda t: t[:, mine])
        bias = None
        if linear.bias is not None:
            bias = self._take(f"{mm}.bias", (linear.out_features,), divided=False)
            self._bind(f"{mm}.bias", f"{hf}.bias", bias)
        setattr(parent, attribute, RowParallel(weight, bias, self.group))

    def glu(self, mlp: nn.Module, mm: str, hf: str) -> None:
        """gate_proj and up_proj: packed one below the other, or apart (canonical structure)."""
        if f"{mm}.gate_proj.weight" in self.shard.left:
            for name in ("gate_proj", "up_proj"):
                self.column(mlp, name, f"{mm}.{name}", f"{hf}.{name}")
            return
        out = _linear(mlp, "gate_proj").out_features
        mine = share(even(out, self.group, f"rows of {hf}.gate_proj"), self.group)
        rows = mine.stop - mine.start
        pieces = {f".{name}": (mlp, name) for name in ("gate_proj", "up_proj")}
        parts: dict[str, tuple[View, View]] = {
            ".gate_proj": (lambda t: t[:rows], lambda t: t[mine]),
            ".up_proj": (lambda t: t[rows:], lambda t: t[mine]),
        }
        self.packed(pieces, f"{mm}.linear_fc1", hf, 2 * rows, parts)

    def embedding(self, parent: nn.Module, attribute: str, mm: str, hf: str) -> nn.Parameter:
        """The word embedding."""
        vocab, width = getattr(parent, attribute).weight.shape
        parameter, mine = self._vocab(mm, hf, vocab, width)
        del mine
        setattr(parent, attribute, VocabEmbedding(parameter, vocab, self.group))
        return parameter

    def head(
        self, parent: nn.Module, attribute: str, mm: str, hf: str, tied: nn.Parameter | None
    ) -> nn.Parameter:
        """The output layer; ``tied`` is the word embedding of this chunk, if it serves as such."""
        vocab, width = getattr(parent, attribute).weight.shape
        if tied is None or mm in self.shard.left:
            parameter, _ = self._vocab(mm, hf, vocab, width)
        else:
            parameter = tied
        setattr(parent, attribute, VocabHead(parameter, vocab, self.group))
        return parameter

    def _vocab(self, mm: str, hf: str, vocab: int, width: int) -> tuple[nn.Parameter, slice]:
        mine = share(vocab, self.group)
        parameter = self._take(mm, (mine.stop - mine.start, width), divided=True)
        self._bind(mm, hf, parameter, whole, lambda t: t[mine])
        return parameter, mine


def even(total: int, group: TensorGroup, what: str) -> int:
    """``total``, if the ranks can share it evenly.

    Raises:
        TensorError: they cannot.
    """
    if total % group.size:
        raise TensorError(
            f"{total} {what} cannot be shared by {group.size} tensor-parallel ranks",
            "a checkpoint and a config.json of one model",
        )
    return total


def _linear(parent: nn.Module, attribute: str) -> Any:  # noqa: ANN401 - an nn.Linear of any model
    return getattr(parent, attribute)
