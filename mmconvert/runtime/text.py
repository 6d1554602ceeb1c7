"""The text decoder of every family, cut for one model chunk as the encoders are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmconvert.runtime.attention import separate_qkv
from mmconvert.runtime.bind import Binder
from mmconvert.runtime.encoders import LayerRange, Point, kept, layer_points
from mmconvert.runtime.experts import ExpertGroup, bind_experts

TEXT = "text_decoder.decoder"
# Modules of a layer in transformers and in MM format, those that a family has: norms, and places
# to compare hidden states at, in the order of computing.
NORMS = {
    "input_layernorm": "input_layernorm",
    "post_self_attn_layernorm": "post_self_attn_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "post_mlp_layernorm": "post_mlp_layernorm",
}
PLACES = {
    "input_layernorm": "input_layernorm",
    "self_attn": "self_attention",
    "post_self_attn_layernorm": "post_self_attn_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.gate": "mlp.router",
    "mlp.experts": "mlp.experts",
    "mlp": "mlp",
    "post_mlp_layernorm": "post_mlp_layernorm",
}


def has(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a module of a name."""
    parent, _, leaf = name.rpartition(".")
    return (not parent or has(layer, parent)) and hasattr(layer.get_submodule(parent), leaf)


class Text(nn.Module):
    """Text decoder: Qwen2 and Qwen3 with m-RoPE or without, GLM, Llama; with experts or without.

    Args:
        experts: the ranks that share the experts of a layer.
        model: transformers' text model.
        owner: the model that has ``lm_head``.
        tied: whether config.json ties the output layer to the embedding.
    """

    def __init__(
        self,
        binder: Binder,
        experts: ExpertGroup,
        model: Any,  # noqa: ANN401 - HF's
        owner: Any,  # noqa: ANN401 - HF's
        span: LayerRange,
        tied: bool,
    ) -> None:
        super().__init__()
        self._experts = experts
        self.width, self.span = model.norm.weight.shape[0], span
        self.points: list[Point] = []
        self.embedding = self.head_weight = None
        name = "text_decoder.embedding.word_embeddings.weight"
        if span.first:
            self.embedding = binder.embedding(model, "embed_tokens", name, "embed_tokens.weight")
            self.points.append(
                Point("text_decoder embedding", (binder.key, "embed_tokens"), model.embed_tokens)
            )
        else:
            model.embed_tokens = nn.Identity()
        self._layers(binder, model)
        self.lm_head = nn.Identity()
        if span.last:
            binder.replicated(model.norm, f"{TEXT}.final_layernorm", "norm")
            head = "text_decoder.output_layer.weight"
            near = self.embedding if tied else None
            hf = "embed_tokens.weight" if tied else "lm_head.weight"
            self.head_weight = binder.head(owner, "lm_head", head, hf, near)
            self.lm_head = owner.lm_head
            self.points.append(
                Point("text_decoder final_layernorm", (binder.key, "norm"), model.norm)
            )
            self.points.append(
                Point("text_decoder output_layer", (binder.key, "lm_head"), owner.lm_head)
            )
        else:
            model.norm = nn.Identity()
        self.model = model
        # Named otherwise from transformers 5.24 on; the old name will pass in silence one day.
        known = inspect.signature(model.forward).parameters
        self._cache = "cache" if "cache" in known else "past_key_values"

    def _layers(self, binder: Binder, model: Any) -> None:  # noqa: ANN401 - HF's model
        span, config = self.span, model.config
        model.layers = kept(model.layers, span)
        types = getattr(config, "layer_types", None)
        if types is not None:
            config.layer_types = list(types)[span.start : span.stop]
        config.num_hidden_layers = span.stop - span.start
        layer: Any  # HF's module
        for i, layer in enumerate(model.layers):
            number = span.start + i
            mm, hf = f"{TEXT}.layers.{i}", f"layers.{number}"
            attn, mm_attn = layer.self_attn, f"{mm}.self_attention"
            attn.layer_idx = i  # counts in this chunk's own cache
            for name, mm_name in NORMS.items():
                if hasattr(layer, name):
                    binder.replicated(getattr(layer, name), f"{mm}.{mm_name}", f"{hf}.{name}")
            separate_qkv(binder, attn, config.num_key_value_heads, mm_attn, f"{hf}.self_attn")
            for x in "qk":
                if hasattr(attn, f"{x}_norm"):
                    names = (f"{mm_attn}.{x}_layernorm", f"{hf}.self_attn.{x}_norm")
                    binder.norm_of_heads(attn, f"{x}_norm", *names)
            binder.row(attn, "o_proj", f"{mm_attn}.linear_proj", f"{hf}.self_attn.o_proj")
            self._feed_forward(binder, layer.mlp, f"{mm}.mlp", f"{hf}.mlp")
            inside = {hf: mm for hf, mm in PLACES.items() if has(layer, hf)}
            self.points += layer_points(
                f"text_decoder layer {number}", binder.key, hf, layer, inside
            )

    def _feed_forward(self, binder: Binder, mlp: Any, mm: str, hf: str) -> None:  # noqa: ANN401 - HF's module
        if hasattr(mlp, "experts"):
            bind_experts(binder, self._experts, mlp, mm, hf)
            return
        if hasattr(mlp, "gate_up_proj"):
            binder.glu_as_one(mlp, mm, hf)
        else:
            binder.glu(mlp, mm, hf)
        binder.row(mlp, "down_proj", f"{mm}.linear_fc2", f"{hf}.down_proj")

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, time) ids -> (batch, time, width)."""
        return self.model.embed_tokens(ids)

    @property
    def layers(self) -> Any:  # noqa: ANN401 - a ModuleList of HF's layers
        """The layers of this chunk."""
        return self.model.layers

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: Any = None,  # noqa: ANN401 - HF's cache
        deep: Sequence[Tensor] = (),
        seen: Tensor | None = None,
        mask: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """(batch, time, width) -> the same; logits (batch, time, vocabulary) on the last stage.

        Args:
            deep: (image tokens, width) each, to be added behind the first, second ... layer here.
            seen: (batch, time) where image tokens are.
            mask: as in :class:`Batch`.
            last: of the last position alone, on the last stage.
        """
        more: dict[str, Any] = {self._cache: cache}
        if deep:
            more |= {"visual_pos_masks": seen, "deepstack_visual_embeds": list(deep)}
        if mask is None and cache is None:
            # else transformers 4 takes the positions of pictures for several texts in a row
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        out = self.model(
            inputs_embeds=hidden,
            position_ids=positions,
            attention_mask=mask,
            use_cache=cache is not None,
            **more,
        )
        found = out.last_hidden_state
        return self.lm_head(found[:, -1:] if last and self.span.last else found)
