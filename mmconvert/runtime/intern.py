"""InternViT and its projector, cut for one model chunk; transformers' native InternVL computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmconvert.runtime.attention import per_head_qkv
from mmconvert.runtime.bind import Binder
from mmconvert.runtime.collectives import share
from mmconvert.runtime.encoders import LayerRange, Point, Seen, kept, layer_points
from mmconvert.runtime.parallel import SlicedNorm
from mmconvert.runtime.vision import PROJECTOR

ENCODER = "image_encoder.encoder"


class Unembedded(nn.Module):
    """Stands for the embeddings on a stage that gets hidden states from another one.

    Args:
        paired: whether something else goes with them, as in transformers before 5.
    """

    def __init__(self, *, paired: bool) -> None:
        super().__init__()
        self.paired = paired

    def forward(self, x: Tensor, bool_masked_pos: None = None) -> Tensor | tuple[Tensor, None]:
        """Hidden states as they are; the second argument is one that transformers gives."""
        return (x, None) if self.paired else x


def _gives_pair(embeddings: Any) -> bool:  # noqa: ANN401 - HF's module
    """Whether this transformers' embeddings give more than hidden states; tried on one tile."""
    weight = embeddings.patch_embeddings.projection.weight
    height, width = embeddings.patch_embeddings.image_size
    with torch.no_grad():
        return isinstance(embeddings(weight.new_zeros(1, weight.shape[1], height, width)), tuple)


class InternVision(nn.Module):
    """Vision encoder of InternVL.

    Args:
        inner: transformers' InternVLModel, which has encoder and projector.
    """

    def __init__(self, binder: Binder, inner: Any, span: LayerRange) -> None:  # noqa: ANN401 - HF's model
        super().__init__()
        vision, self.span = inner.vision_tower, span
        self.width = vision.config.hidden_size
        self.points: list[Point] = []
        if span.first:
            self._embeddings(binder, vision.embeddings)
        else:
            vision.embeddings = Unembedded(paired=_gives_pair(vision.embeddings))
        vision.encoder.layer = kept(vision.encoder.layer, span)
        for i, layer in enumerate(vision.encoder.layer):
            self._layer(binder, layer, i, span.start + i)
        if span.last:
            projector = inner.multi_modal_projector
            for name, mm in (
                ("layer_norm", "norm"),
                ("linear_1", "linear_fc1"),
                ("linear_2", "linear_fc2"),
            ):
                hf = f"multi_modal_projector.{name}"
                binder.replicated(getattr(projector, name), f"{PROJECTOR}.{mm}", hf)
            self.points.append(
                Point("image_encoder projector", (binder.key, "multi_modal_projector"), projector)
            )
        else:
            inner.multi_modal_projector = nn.Identity()
        inner.language_model = nn.Identity()
        self.inner = inner

    def _embeddings(self, binder: Binder, embeddings: Any) -> None:  # noqa: ANN401 - HF's module
        mm, hf = f"{ENCODER}.embeddings", "vision_tower.embeddings"
        binder.own(embeddings, "cls_token", f"{mm}.class_embedding", f"{hf}.cls_token")
        binder.own(
            embeddings,
            "position_embeddings",
            f"{mm}.position_embedding",
            f"{hf}.position_embeddings",
        )
        projection = embeddings.patch_embeddings.projection
        binder.replicated(projection, f"{mm}.patch_embedding", f"{hf}.patch_embeddings.projection")
        self.points.append(Point("image_encoder embeddings", (binder.key, hf), embeddings))

    def _layer(self, binder: Binder, layer: Any, i: int, number: int) -> None:  # noqa: ANN401 - HF's layer
        mm, hf = f"{ENCODER}.encoder.layers.{i}", f"vision_tower.encoder.layer.{number}"
        attn, mm_attn = layer.attention, f"{mm}.self_attention"
        binder.replicated(layer.layernorm_before, f"{mm}.input_layernorm", f"{hf}.layernorm_before")
        heads, size = attn.num_heads, attn.head_dim
        per_head_qkv(binder, attn, f"{mm_attn}.linear_qkv", f"{hf}.attention")
        some = share(heads, binder.group)
        for name in ("q_norm", "k_norm"):
            norm = getattr(attn, name)
            if isinstance(norm, nn.Identity):
                continue
            binder.replicated(norm, f"{mm_attn}.{name[0]}_layernorm", f"{hf}.attention.{name}")
            if binder.group.size > 1:
                features = slice(some.start * size, some.stop * size)
                sliced = SlicedNorm(norm.weight, norm.variance_epsilon, features, binder.group)
                setattr(attn, name, sliced)
        binder.row(
            attn,
            "projection_layer",
            f"{mm_attn}.linear_proj",
            f"{hf}.attention.projection_layer",
            heads,
        )
        binder.replicated(layer.layernorm_after, f"{mm}.pre_mlp_layernorm", f"{hf}.layernorm_after")
        binder.column(layer.mlp, "fc1", f"{mm}.mlp.linear_fc1", f"{hf}.mlp.fc1")
        binder.row(layer.mlp, "fc2", f"{mm}.mlp.linear_fc2", f"{hf}.mlp.fc2")
        binder.own(layer, "lambda_1", f"{mm}.ls1", f"{hf}.lambda_1")
        binder.own(layer, "lambda_2", f"{mm}.ls2", f"{hf}.lambda_2")
        names = {"layernorm_before": "input_layernorm", "attention": "self_attention"}
        names |= {"layernorm_after": "pre_mlp_layernorm", "mlp": "mlp"}
        self.points += layer_points(f"image_encoder layer {number}", binder.key, hf, layer, names)

    @property
    def layers(self) -> Any:  # noqa: ANN401 - a ModuleList of HF's layers
        """The layers of this chunk."""
        return self.inner.vision_tower.encoder.layer

    def forward(self, x: Tensor, grid: Tensor) -> Seen:
        """Pixels or hidden states of all tiles -> hidden states, or one row per image token.

        Args:
            x: (tiles, 3, height, width) or (tiles * positions, width of the binder).
            grid: (tiles, 3); only its length counts.
        """
        if not self.span.first:
            x = x.view(grid.shape[0], -1, self.width)
        if not self.span.last:
            return Seen(self.inner.vision_tower(x).last_hidden_state.reshape(-1, self.width))
        out = self.inner.get_image_features(
            pixel_values=x, vision_feature_layer=-1, vision_feature_select_strategy="default"
        )
        out = getattr(out, "pooler_output", out)
        return Seen(out.reshape(-1, out.shape[-1]))
