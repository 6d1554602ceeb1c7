"""Two trees over one set of tensors.

The model of transformers computes: its tree keeps transformers' names, with its linear and
embedding leaves replaced by the layers of :mod:`parallel`. The MM tree holds the same parameters
under the names of MM format, so that its ``state_dict()`` is the checkpoint. Both are made in one
pass: what a module needs is taken out of the shard by its MM name, and what is left over or
absent is an error. The converter's tables have no part in it, so that errors cannot cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.errors import TensorError
from mmconvert.runtime.collectives import TensorGroup, share
from mmconvert.runtime.packed import PackedLinears, PartOf
from mmconvert.runtime.parallel import (
    OfOwnPart,
    RowParallel,
    View,
    VocabEmbedding,
    VocabHead,
    whole,
)
from mmconvert.runtime.shard import Binding, Shard


class Binder:
    """Binds the modules of one module (vision, audio or text) in one chunk.

    Args:
        key: of the module.
        group: the ranks that share it.
    """

    def __init__(self, shard: Shard, key: str, group: TensorGroup) -> None:
        self.shard, self.key, self.group = shard, key, group

    def bind(
        self, mm: str, hf: str, p: nn.Parameter, part: View = whole, mine: View = whole
    ) -> None:
        """Notes what a tensor of the shard is in transformers' model, as :class:`Binding` says."""
        self.shard.bindings.append(Binding(mm, (self.key, hf), p, part, mine))

    def _take(self, name: str, shape: tuple[int, ...], divided: bool) -> nn.Parameter:
        return self.shard.take(name, shape, self.group.size if divided else 1)

    def _named(self, mm: str, hf: str) -> str:
        """A name of a layer that is the same in all layouts."""
        return f"{self.key}.{hf}.{mm.rpartition('.')[2]}"

    def replicated(self, module: nn.Module, mm: str, hf: str) -> None:
        """Every parameter of a small module (a norm, a convolution, a bias), as it is."""
        for name, empty in list(module.named_parameters(recurse=False)):
            full = f"{mm}.{name}" if mm else name
            parameter = self._take(full, tuple(empty.shape), divided=False)
            setattr(module, name, parameter)
            self.bind(full, f"{hf}.{name}", parameter)

    def norm_of_heads(self, attn: nn.Module, attribute: str, mm: str, hf: str) -> None:
        """A norm of each head, of which this rank has its own: all ranks have the same weight."""
        norm = getattr(attn, attribute)
        self.replicated(norm, mm, hf)
        if self.group.size > 1:
            setattr(attn, attribute, OfOwnPart(norm, self.group))

    def own(
        self, module: nn.Module, name: str, mm: str, hf: str, shape: tuple[int, ...] | None = None
    ) -> None:
        """One parameter that stands alone in its module, replicated."""
        empty = getattr(module, name)
        parameter = self._take(mm, tuple(empty.shape), divided=False)
        setattr(module, name, parameter)
        self.bind(mm, hf, parameter)

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
        sizes = (rows, first.in_features)
        low = self.shard.low(mm, self._named(mm, hf), sizes, self.group, None)
        biased = [suffix for suffix, place in pieces.items() if _linear(*place).bias is not None]
        bias = self._take(f"{mm}.bias", (rows,), divided=True) if biased else None
        views = [parts[suffix][0] for suffix in pieces]
        joint = PackedLinears(weight, bias, views, self.group) if views != [whole] else None
        for number, (suffix, (parent, attribute)) in enumerate(pieces.items()):
            part, mine = parts[suffix]
            mine_in = None if joint is None else (joint, number)
            setattr(parent, attribute, PartOf(weight, bias, part, self.group, low, mine_in))
            self.bind(f"{mm}.weight", f"{hf}{suffix}.weight", weight, part, mine)
            if bias is None:
                continue
            if suffix in biased:
                self.bind(f"{mm}.bias", f"{hf}{suffix}.bias", bias, part, mine)
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
        self.bind(f"{mm}.weight", f"{hf}.weight", weight, whole, lambda t: t[:, mine])
        bias = None
        if linear.bias is not None:
            bias = self._take(f"{mm}.bias", (linear.out_features,), divided=False)
            self.bind(f"{mm}.bias", f"{hf}.bias", bias)
        sizes = (linear.out_features, linear.in_features)
        low = self.shard.low(mm, self._named(mm, hf), sizes, self.group, mine)
        setattr(parent, attribute, RowParallel(weight, bias, self.group, low))

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

    def glu_as_one(self, mlp: nn.Module, mm: str, hf: str) -> None:
        """gate_up_proj: one below the other in transformers too."""
        out = _linear(mlp, "gate_up_proj").out_features // 2
        mine = share(even(out, self.group, f"rows of {hf}.gate_up_proj"), self.group)

        def own(t: Tensor) -> Tensor:
            return t.view(2, out, *t.shape[1:])[:, mine].flatten(0, 1)

        pieces = {".gate_up_proj": (mlp, "gate_up_proj")}
        rows = 2 * (mine.stop - mine.start)
        self.packed(pieces, f"{mm}.linear_fc1", hf, rows, {".gate_up_proj": (whole, own)})

    def embedding(self, parent: nn.Module, attribute: str, mm: str, hf: str) -> nn.Parameter:
        """The word embedding."""
        vocab, width = getattr(parent, attribute).weight.shape
        parameter = self._vocab(mm, hf, vocab, width)
        setattr(parent, attribute, VocabEmbedding(parameter, self._rows(vocab), self.group))
        return parameter

    def head(
        self, parent: nn.Module, attribute: str, mm: str, hf: str, tied: nn.Parameter | None
    ) -> nn.Parameter:
        """The output layer; ``tied`` is the word embedding of this chunk, if it serves as such."""
        vocab, width = getattr(parent, attribute).weight.shape
        if tied is None or mm in self.shard.left:
            parameter = self._vocab(mm, hf, vocab, width)
        else:
            parameter = tied
        setattr(parent, attribute, VocabHead(parameter, self._rows(vocab), vocab, self.group))
        return parameter

    def _rows(self, vocab: int) -> int:
        """The rows of the vocabulary in the checkpoint, which may pad it."""
        return max(vocab, self.shard.vocabulary)

    def _vocab(self, mm: str, hf: str, vocab: int, width: int) -> nn.Parameter:
        rows = self._rows(vocab)
        mine = share(rows, self.group)
        parameter = self._take(mm, (mine.stop - mine.start, width), divided=True)

        def own(t: Tensor) -> Tensor:
            """The rows of this rank; those that pad the vocabulary are zeros."""
            return t[mine] if mine.stop <= vocab else F.pad(t, (0, 0, 0, rows - vocab))[mine]

        self.bind(mm, hf, parameter, whole, own)
        return parameter


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
