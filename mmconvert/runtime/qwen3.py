"""Qwen3-VL's vision encoder: positions of their own, and mergers of inner layers ("deepstack").

Each deepstack merger stands with its layer in MM format. Its rows are added to the hidden states
of the first text layers, the first merger's behind the first layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmconvert.runtime.bind import Binder
from mmconvert.runtime.encoders import LayerRange, Point, Seen
from mmconvert.runtime.vision import ENCODER, LAYERS, PROJECTOR, QwenVision, two_linears


class NoPositions(nn.Module):
    """Stands for an embedding of positions that another stage has added: zeros of one column."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.empty(0, dtype=weight.dtype)  # transformers asks for dtype and device

    def forward(self, where: Tensor) -> Tensor:
        """(...,) -> (..., 1)."""
        return torch.zeros(*where.shape, 1, dtype=self.weight.dtype, device=where.device)


class Qwen3Vision(QwenVision):
    """Vision transformer of Qwen3-VL."""

    def __init__(self, binder: Binder, visual: Any, span: LayerRange) -> None:  # noqa: ANN401 - HF's model
        indexes = list(visual.deepstack_visual_indexes)
        super().__init__(binder, visual, span)
        mergers = list[nn.Module]()
        here = [(k, layer) for k, layer in enumerate(indexes) if span.start <= layer < span.stop]
        for k, layer in here:
            merger: Any = visual.deepstack_merger_list[k]
            mm, hf = f"{LAYERS}.{layer - span.start}.deepstack_layer", f"deepstack_merger_list.{k}"
            binder.replicated(merger.norm, f"{mm}.layernorm", f"{hf}.norm")
            two_linears(binder, merger, f"{mm}.encoder", hf)
            label = f"image_encoder layer {layer}, deepstack_layer"
            self.points.append(Point(label, (binder.key, hf), merger))
            mergers.append(merger)
        visual.deepstack_merger_list = nn.ModuleList(mergers)
        visual.deepstack_visual_indexes = [layer - span.start for _, layer in here]

    def begin(self, binder: Binder, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Patch embedding and positions."""
        super().begin(binder, visual)
        binder.replicated(visual.pos_embed, f"{ENCODER}.pos_embed", "pos_embed")
        self.points.append(
            Point("image_encoder pos_embed", (binder.key, "pos_embed"), visual.pos_embed)
        )

    def receive(self, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Hidden states have their positions already."""
        super().receive(visual)
        visual.pos_embed = NoPositions(visual.pos_embed.weight)

    def end(self, binder: Binder, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """The projector."""
        binder.replicated(visual.merger.norm, f"{PROJECTOR}.layernorm", "merger.norm")
        two_linears(binder, visual.merger, f"{PROJECTOR}.encoder", "merger")

    def forward(self, x: Tensor, grid: Tensor) -> Seen:
        """As :class:`QwenVision`, and the rows of the deepstack layers that are here."""
        out = self.visual(x, grid_thw=grid)
        rows, deep = (
            (out.pooler_output, out.deepstack_features)
            if hasattr(out, "deepstack_features")
            else out  # a pair in transformers 4
        )
        return Seen(self.passed_on(rows), deep)
