"""One model chunk's tensors on their way into the MM tree.

The MM tree holds the parameters under the names of MM format, so that its ``state_dict()`` is the
checkpoint. What a module needs is taken out of the shard by its MM name; what is left over or
absent is an error.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmconvert.adapters import MM_A, MM_B
from mmconvert.errors import TensorError
from mmconvert.names import number
from mmconvert.runtime.collectives import TensorGroup
from mmconvert.runtime.lora import LoraPlan, Low, drawn
from mmconvert.runtime.parallel import View


class Binding(NamedTuple):
    """What one parameter of transformers' model is in this rank's shard.

    Attributes:
        mm: the MM name.
        hf: key of the module, and the name in transformers' model: ``blocks.3.norm1.weight``.
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
def params_on_meta(dtype: torch.dtype) -> Generator[None]:
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
        vocabulary: rows of the whole word embedding, those that pad it included; 0: not padded.
        lora: what is adapted, if anything is.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        where: str,
        dtype: torch.dtype,
        device: torch.device,
        vocabulary: int = 0,
        lora: LoraPlan | None = None,
    ) -> None:
        self.vocabulary, self.lora = vocabulary, lora
        self.left = dict(tensors)
        self.where = where
        self.tree = nn.Module()
        self.bindings: list[Binding] = []
        # Parts of packed biases that transformers' layer has not: they must be and stay zero.
        self.void: list[tuple[str, nn.Parameter, View]] = []
        self.pieces: dict[str, int] = {}  # MM name -> how many different parts its ranks hold
        self.canonical = any(".self_attention.q_proj." in name for name in tensors)
        self._dtype, self._device = dtype, device

    def take(self, name: str, shape: tuple[int, ...], pieces: int) -> nn.Parameter:
        """Moves a tensor from the shard into the MM tree.

        Args:
            pieces: how many different parts of it the processes of a model hold; 1: copies.

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
        self.pieces[name] = pieces
        return parameter

    def low(
        self,
        module: str,
        name: str,
        sizes: tuple[int, int],
        group: TensorGroup,
        mine: slice | None,
        *,
        pieces: int = 0,
    ) -> Low | None:
        """The adapter of a linear layer, from the checkpoint or new; None where it has none.

        Args:
            module: the layer's MM name; ``name``: in the whole model, of which new ones are drawn.
            sizes: rows on this rank, and columns of the whole layer.
            mine: this rank's columns, of a row-parallel layer; None: rows are divided.
            pieces: how many different parts of what is divided there are; 0: one for each rank.

        Raises:
            TensorError: one of another shape.
        """
        if self.lora is None or not (self.lora.adapts(module) or module + MM_A in self.left):
            return None
        rank, columns = self.lora.rank, mine is not None
        if module + MM_A not in self.left:
            whole = drawn(name, (rank, sizes[1]), self.lora.seed)
            self.left[module + MM_A] = whole if mine is None else whole[:, mine]
            self.left[module + MM_B] = torch.zeros(sizes[0], rank)
        width = sizes[1] if mine is None else mine.stop - mine.start
        divided = pieces or group.size
        copied = max(1, divided // group.size)
        a = self.take(module + MM_A, (rank, width), divided if columns else copied)
        b = self.take(module + MM_B, (sizes[0], rank), copied if columns else divided)
        return Low(a, b, self.lora.scale, group, columns)

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
                f"{self.where}: {number(names, 'tensor has', 'tensors have')} no place in the "
                f"model: {', '.join(names[:3])}",
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
