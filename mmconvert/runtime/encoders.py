"""What the modules have in common: the layers that one model chunk holds, and places to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class LayerRange(NamedTuple):
    """The layers of a module that one stage holds: ``start`` to ``stop`` of ``total``."""

    start: int
    stop: int
    total: int

    @property
    def first(self) -> bool:
        """Whether what stands before the layers is here."""
        return self.start == 0

    @property
    def last(self) -> bool:
        """Whether what stands after the layers is here."""
        return self.stop == self.total


class Seen(NamedTuple):
    """What a vision encoder passes on.

    Attributes:
        rows: hidden states of the patches, or one row for each image token.
        deep: rows of inner layers, for image tokens in the first text layers; in their order.
    """

    rows: Tensor
    deep: Sequence[Tensor] = ()


class Point(NamedTuple):
    """A place where hidden states can be compared with transformers'.

    Attributes:
        label: in words, for messages.
        hf: module and module name in the whole model.
        module: the module here.
    """

    label: str
    hf: tuple[str, str]
    module: nn.Module


class Rows(nn.Module):
    """Passes hidden states through, in rows of a width: stands for an end of a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> (rows, width)."""
        return x.reshape(-1, self._width)


def kept(layers: Any, span: LayerRange) -> nn.ModuleList:  # noqa: ANN401 - a ModuleList of any model
    """The layers of a span."""
    return nn.ModuleList(list(layers)[span.start : span.stop])


def layer_points(
    label: str, key: str, hf: str, layer: nn.Module, names: dict[str, str]
) -> list[Point]:
    """The points inside a layer in the order of computing, and its end.

    Args:
        names: module name in the layer -> its MM name.
    """
    inner = [
        Point(f"{label}, {mm}", (key, f"{hf}.{name}"), layer.get_submodule(name))
        for name, mm in names.items()
    ]
    return [*inner, Point(label, (key, hf), layer)]
