"""Weights of a Hugging Face folder for transformers' model, layer by layer.

The layers between the first and the last of each module have their weights only while they
compute; in a backward pass they compute again. So the whole model is never in memory.
"""

# Some functions of transformers and torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# torch has private names for what a module itself holds, without its children.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmconvert.errors import TensorError
from mmconvert.runtime.families import Architecture, Parts
from mmconvert.stored import StoredTensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EXPERTS = ".mlp.experts."
OTHER_PARTS = ("talker.", "token2wav.")  # of Omni, which the thinker does not need
# Names in the model -> the tensor of one stored tensor: (name, tensor) pairs.
RenameRule = Callable[[str, Tensor], list[tuple[str, Tensor]]]
Computed = Callable[[], Tensor]


def mapped(stored: StoredTensor) -> Tensor:
    """A tensor whose data is read from its file when it is used.

    Raises:
        TensorError: it holds no floating-point numbers.
    """
    dtype = DTYPES.get(stored.dtype)
    if dtype is None:
        raise TensorError(
            f"{stored.path.name}: {stored.name} is {stored.dtype}", f"one of {', '.join(DTYPES)}"
        )
    if not prod(stored.shape):
        return torch.zeros(stored.shape, dtype=dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    count = prod(stored.shape)
    if stored.strides is not None:
        count = 1 + sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True))
    end = stored.offset + count * size
    file = torch.from_file(str(stored.path), shared=False, size=end, dtype=torch.uint8)
    raw = file[stored.offset :]
    flat = (raw if stored.offset % size == 0 else raw.clone()).view(dtype)
    strides = stored.strides
    return flat.view(stored.shape) if strides is None else flat.as_strided(stored.shape, strides)


def qwen_name(name: str) -> str:
    """A name of the hub's, or of transformers' since 4.52, below the module that has it."""
    short = name.removeprefix("thinker.").removeprefix("model.")
    if short.startswith(("visual.", "audio_tower.", "lm_head.")):
        return short
    return f"language_model.{short.removeprefix('language_model.')}"


def other_way_round(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether stacked experts are stored transposed: the hub has (experts, in, out), transformers
    5 saves (experts, out, in) under the same names. Told by the first stack that is no square.
    """
    shapes = {n.rpartition(EXPERTS)[2]: p.shape for n, p in model.named_parameters()}
    for name, stored in tensors.items():
        kind = name.rpartition(EXPERTS)[2]
        if EXPERTS in name and kind in shapes and len(stored.shape) == 3:
            experts, one, two = shapes[kind]
            if one != two:
                return tuple(stored.shape) == (experts, two, one)
    return False


class Weights:
    """Puts the weights of a folder into a model without data.

    Args:
        model: transformers' model, its parameters on meta.
        tensors: the folder's, by name.
        naming: a stored tensor as the model has it, for names by module.
        changes: what adapters add to weights, by their names in the folder.
    """

    def __init__(
        self,
        arch: Architecture,
        model: Any,  # noqa: ANN401 - HF's model
        tensors: Mapping[str, StoredTensor],
        naming: RenameRule,
        dtype: torch.dtype,
        device: torch.device,
        changes: Mapping[str, Computed] | None = None,
    ) -> None:
        self._dtype, self._device, self._changes = dtype, device, changes or {}
        self._parts = arch.parts(model)
        self._roots = {"visual": self._parts.visual, "audio_tower": self._parts.audio}
        self._roots |= {"language_model": self._parts.text, "model": getattr(model, "model", None)}
        self._roots["lm_head"] = self._parts.owner
        self._made: dict[nn.Parameter, Callable[[], Tensor]] = {}
        self._plain: dict[nn.Parameter, Callable[[], Tensor]] = {}  # without adapters
        self._filled: dict[nn.Parameter, nn.Parameter] = {}
        for name, stored in tensors.items():
            if not name.startswith(OTHER_PARTS):
                self._place(stored, naming)
        if arch.tied:  # before transformers looks for it
            self._parts.owner.lm_head.weight = self._parts.text.embed_tokens.weight
        self._look_for_missing(model)
        self._fill(model)
        for layer in self._inner():
            self._stream(layer)

    def _look_for_missing(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter not in self._made:
                raise TensorError(
                    f"the Hugging Face folder has no weights for {name}", "all weights of the model"
                )

    def _fill(self, model: nn.Module) -> None:
        """Gives data to all but the inner layers."""
        inner = {p for layer in self._inner() for p in layer.parameters()}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter not in inner:
                    module._parameters[leaf] = self._resident(parameter)
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(self._device)

    def _place(self, stored: StoredTensor, naming: RenameRule) -> None:
        """Finds the parameters that a stored tensor is for; buffers and others are left."""
        meta = torch.empty(stored.shape, dtype=self._dtype, device="meta")
        for i, (name, shape) in enumerate((n, t.shape) for n, t in naming(stored.name, meta)):
            root, _, rest = name.partition(".")
            module = self._roots.get(root)
            path = name if root == "lm_head" else rest
            try:
                parameter = module.get_parameter(path)  # type: ignore[union-attr] - None has none
            except AttributeError:
                continue
            if tuple(parameter.shape) != tuple(shape):
                raise TensorError(
                    f"{stored.path.name}: {stored.name} has shape {list(stored.shape)}",
                    f"{list(parameter.shape)} by config.json",
                )
            if parameter in self._made:
                raise TensorError(f"{stored.name} is there twice", "each weight once")
            self._made[parameter] = lambda i=i: naming(stored.name, self._changed(stored))[i][1]
            self._plain[parameter] = lambda i=i: naming(stored.name, mapped(stored))[i][1]

    def _changed(self, stored: StoredTensor) -> Tensor:
        """A stored weight with what its adapter adds, in float32 then."""
        weight, change = mapped(stored), self._changes.get(stored.name)
        return weight if change is None else weight.float() + change().reshape(weight.shape)

    def _inner(self) -> list[nn.Module]:
        """The layers that are not a module's first or last one."""
        return [layer for layers in layers_of(self._parts) for layer in list(layers)[1:-1]]

    def value(self, parameter: nn.Parameter) -> Tensor:
        """The value of a parameter of the model, read from the folder if it is not in memory."""
        if not parameter.is_meta:
            return parameter.detach()
        return self._made[parameter]().to(self._device, self._dtype).contiguous()

    def stored(self, parameter: nn.Parameter) -> Tensor:
        """The value of a parameter of the model as the folder has it, without adapters."""
        if not self._changes:
            return self.value(parameter)
        empty = next((e for e, filled in self._filled.items() if filled is parameter), parameter)
        return self._plain[empty]().to(self._device, self._dtype).contiguous()

    def _resident(self, empty: nn.Parameter) -> nn.Parameter:
        """The parameter with its data; one for one, so that tied ones stay tied."""
        if empty not in self._filled:
            data = self._made[empty]().to(self._device, self._dtype, copy=True).contiguous()
            self._filled[empty] = nn.Parameter(data)
        return self._filled[empty]

    def _stream(self, layer: nn.Module) -> None:
        plain = layer.forward

        def computed(*args: Any, **more: Any) -> Any:  # noqa: ANN401 - HF's layer
            with self._loaded(layer):
                return plain(*args, **more)

        def forward(*args: Any, **more: Any) -> Any:  # noqa: ANN401 - HF's layer
            if not torch.is_grad_enabled():
                return computed(*args, **more)
            return checkpoint(
                computed, *args, use_reentrant=False, preserve_rng_state=False, **more
            )

        layer.forward = forward  # type: ignore[method-assign]

    @contextmanager
    def _loaded(self, layer: nn.Module) -> Generator[None]:
        """The layer with its weights, which do not learn."""
        empty: list[tuple[nn.Module, str, nn.Parameter]] = []
        for module in layer.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    empty.append((module, leaf, parameter))
        for module, leaf, parameter in empty:
            module._parameters[leaf] = nn.Parameter(self.value(parameter), requires_grad=False)
        try:
            yield
        finally:
            for module, leaf, parameter in empty:
                module._parameters[leaf] = parameter


def layers_of(parts: Parts) -> list[Any]:
    """The layers of each module of a model."""
    visual = parts.visual
    found = [visual.blocks if hasattr(visual, "blocks") else visual.vision_tower.encoder.layer]
    if parts.audio is not None:
        found.append(parts.audio.layers)
    return [*found, parts.text.layers]
