"""GLM-4.1V's vision encoder: attention whole on every rank, patches joined by a convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmconvert.runtime.bind import Binder
from mmconvert.runtime.encoders import Point
from mmconvert.runtime.vision import ENCODER, PROJECTOR, QwenVision


class First(nn.Module):
    """Stands for embeddings that another stage has added: gives hidden states back as they are."""

    def forward(self, hidden: Tensor, *others: object) -> Tensor:
        """(patches, width) -> the same."""
        return hidden


class Unjoined(nn.Module):
    """Stands for the convolution that joins patches: gives the patches of one back as one row."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width, side, side) -> (rows, side * side * width), patch by patch."""
        return x.permute(0, 2, 3, 1).flatten(1)


class GlmVision(QwenVision):
    """Vision transformer of GLM-4.1V."""

    def begin(self, binder: Binder, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Patch embedding, its norm, and positions."""
        super().begin(binder, visual)
        norm, positions = "post_conv_layernorm", "embeddings.position_embedding"
        binder.replicated(visual.post_conv_layernorm, f"{ENCODER}.{norm}", norm)
        binder.replicated(visual.embeddings.position_embedding, f"{ENCODER}.{positions}", positions)
        self.points.append(
            Point(
                "image_encoder post_conv_layernorm", (binder.key, norm), visual.post_conv_layernorm
            )
        )
        self.points.append(
            Point("image_encoder embeddings", (binder.key, "embeddings"), visual.embeddings)
        )

    def receive(self, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Hidden states have their norm and their positions already."""
        super().receive(visual)
        visual.post_conv_layernorm, visual.embeddings = nn.Identity(), First()

    def end(self, binder: Binder, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """The last norm, the convolution and the projector."""
        binder.replicated(
            visual.post_layernorm, f"{ENCODER}.blocks.final_layernorm", "post_layernorm"
        )
        binder.replicated(visual.downsample, f"{ENCODER}.downsample", "downsample")
        for name, module in visual.merger.named_children():
            binder.replicated(module, f"{PROJECTOR}.{name}", f"merger.{name}")
        for label, name in (("final_layernorm", "post_layernorm"), ("downsample", "downsample")):
            module = getattr(visual, name)
            self.points.append(Point(f"image_encoder {label}", (binder.key, name), module))

    def send(self, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Patches stay apart; transformers takes the convolution's width from the config."""
        super().send(visual)
        visual.post_layernorm, visual.downsample = nn.Identity(), Unjoined()
        visual.config.out_hidden_size = self.width * self.unit

    def attention(self, binder: Binder, attn: Any, mm: str, hf: str) -> None:  # noqa: ANN401 - HF's module
        """Copies on every rank."""
        binder.replicated(attn.qkv, f"{mm}.qkv", f"{hf}.qkv")
        binder.replicated(attn.proj, f"{mm}.proj", f"{hf}.proj")
