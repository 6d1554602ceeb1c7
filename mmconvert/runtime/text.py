"""The text decoder of every family, cut for one model chunk as the encoders are."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from mmconvert.runtime.attention import separate_qkv
from mmconvert.runtime.bind import Binder
from mmconvert.runtime.encoders import LayerRange, Point, kept, layer_points

TEXT = "text_decoder.decoder"


class Text(nn.Module):
    """Text decoder: Qwen2 with m-RoPE, Qwen2 or Llama.

    Args:
        model: transformers' text model.
        owner: the model that has ``lm_head``.
        tied: whether config.json ties the output layer to the embedding.
    """

    def __init__(
        self,
        binder: Binder,
        model: Any,  # noqa: ANN401 - HF's
        owner: Any,  # noqa: ANN401 - HF's
        span: LayerRange,
        tied: bool,
    ) -> None:
        super().__init__()
        self.width, self.span = model.norm.weight.shape[0], span
        self.points: list[Point] = []
        self.embedding = self.head_weight = None
        name = "text_decoder.embedding.word_embeddings.weight"
        if span.first:
            self.embedding = binder.embedding(model, "embed_tokens", name, "embed_tokens.weight")
            self.points.append(
                Point("text_decoder embedding", ("llm", "embed_tokens"), model.embed_tokens)
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
            self.points.append(Point("text_decoder final_layernorm", ("llm", "norm"), model.norm))
            self.points.append(
                Point("text_decoder output_layer", ("llm", "lm_head"), owner.lm_head)
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
            binder.replicated(
                layer.input_layernorm, f"{mm}.input_layernorm", f"{hf}.input_layernorm"
            )
            separate_qkv(binder, attn, config.num_key_value_heads, mm_attn, f"{hf}.self_attn")
            binder.row(attn, "o_proj", f"{mm_attn}.linear_proj", f"{hf}.self_attn.o_proj")
            norm = "post_attention_layernorm"
            binder.replicated(getattr(layer, norm), f"{mm}.pre_mlp_layernorm", f"{hf}.{norm}")
            binder.glu(layer.mlp, f"{mm}.mlp", f"{hf}.mlp")
            binder.row(layer.mlp, "down_proj", f"{mm}.mlp.linear_fc2", f"{hf}.mlp.down_proj")
            names = {"input_layernorm": "input_layernorm", "self_attn": "self_attention"}
            names |= {norm: "pre_mlp_layernorm", "mlp": "mlp"}
            self.points += layer_points(f"text_decoder layer {number}", "llm", hf, layer, names)

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, time) ids -> (batch, time, width)."""
        return self.model.embed_tokens(ids)

    @property
    def layers(self) -> Any:  # noqa: ANN401 - a ModuleList of HF's layers
        """The layers of this chunk."""
        return self.model.layers

    def forward(self, hidden: Tensor, positions: Tensor, cache: Any = None) -> Tensor:  # noqa: ANN401 - HF's cache
        """(batch, time, width) -> the same; logits (batch, time, vocabulary) on the last stage."""
        out = self.model(
            inputs_embeds=hidden,
            position_ids=positions,
            attention_mask=None,
            use_cache=cache is not None,
            **{self._cache: cache},
        )
        return self.lm_head(out.last_hidden_state)
