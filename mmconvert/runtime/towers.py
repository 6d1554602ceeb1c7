"""The towers of the Qwen families, cut for one model chunk: vision, audio, text.

Each takes a tower of transformers' own model, keeps the layers of this chunk, binds every
parameter to its MM name, and makes the ends that lie on other stages pass hidden states through.
MM names: docs/formats.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmconvert.runtime.attention import head_qkv, packed_qkv, separate_qkv
from mmconvert.runtime.bind import Tower

VIT = "image_encoder.encoder.blocks.layers"
AUDIO = "audio_encoder.encoder"
TEXT = "text_decoder.decoder"
PROJECTOR = "image_encoder.projector"


class Span(NamedTuple):
    """The layers of a tower that one stage holds: ``start`` to ``stop`` of ``total``."""

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


class Point(NamedTuple):
    """A place where hidden states can be compared with transformers'.

    Attributes:
        label: in words, for messages.
        hf: tower and module name in the whole model.
        module: the module here.
    """

    label: str
    hf: tuple[str, str]
    module: nn.Module


class Rows(nn.Module):
    """Passes hidden states through, in rows of a width: stands for an end of a tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> (rows, width)."""
        return x.reshape(-1, self._width)


def kept(layers: Any, span: Span) -> nn.ModuleList:  # noqa: ANN401 - a ModuleList of any model
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


# ------------------------------------------------------------------------------------ vision
class QwenVision(nn.Module):
    """Vision transformer of Qwen2-VL, Qwen2.5-VL and Qwen2.5-Omni.

    Windows (Qwen2.5) need nothing here: transformers' model brings patches into window order at
    its start and back at its end, on both sides of a border.
    """

    def __init__(self, tower: Tower, visual: Any, span: Span) -> None:  # noqa: ANN401 - HF's model
        super().__init__()
        unit = visual.spatial_merge_size**2
        width = visual.blocks[0].norm1.weight.shape[0]
        self.width, self.unit, self.span = width, unit, span
        self.points: list[Point] = []
        if span.first:
            proj, name = visual.patch_embed.proj, "patch_embed.proj"
            tower.replicated(proj, f"image_encoder.encoder.{name}", name)
            self.points.append(
                Point("image_encoder patch_embed", ("vit", "patch_embed"), visual.patch_embed)
            )
        else:
            visual.patch_embed = Rows(width)
        visual.blocks = kept(visual.blocks, span)
        for i, block in enumerate(visual.blocks):
            self._block(tower, block, i, span.start + i)
        if hasattr(visual, "fullatt_block_indexes"):
            full = [i - span.start for i in visual.fullatt_block_indexes]
            visual.fullatt_block_indexes = [i for i in full if i >= 0]
        if span.last:
            merger = visual.merger
            tower.replicated(merger.ln_q, f"{PROJECTOR}.layernorm", "merger.ln_q")
            tower.column(merger.mlp, "0", f"{PROJECTOR}.encoder.linear_fc1", "merger.mlp.0")
            tower.row(merger.mlp, "2", f"{PROJECTOR}.encoder.linear_fc2", "merger.mlp.2")
            self.points.append(Point("image_encoder projector", ("vit", "merger"), merger))
        else:
            visual.merger = Rows(width * unit)
        self.visual = visual

    def _block(self, tower: Tower, block: Any, i: int, number: int) -> None:  # noqa: ANN401 - HF's layer
        mm, hf = f"{VIT}.{i}", f"blocks.{number}"
        tower.replicated(block.norm1, f"{mm}.input_layernorm", f"{hf}.norm1")
        attn, mm_attn = block.attn, f"{mm}.self_attention"
        if hasattr(attn, "qkv"):
            packed_qkv(tower, attn, f"{mm_attn}.linear_qkv", f"{hf}.attn.qkv")
        else:
            head_qkv(tower, attn, ("q", "k", "v"), f"{mm_attn}.linear_qkv", f"{hf}.attn")
        tower.row(attn, "proj", f"{mm_attn}.linear_proj", f"{hf}.attn.proj")
        tower.replicated(block.norm2, f"{mm}.pre_mlp_layernorm", f"{hf}.norm2")
        if hasattr(block.mlp, "gate_proj"):
            tower.glu(block.mlp, f"{mm}.mlp", f"{hf}.mlp")
            tower.row(block.mlp, "down_proj", f"{mm}.mlp.linear_fc2", f"{hf}.mlp.down_proj")
        else:
            tower.column(block.mlp, "fc1", f"{mm}.mlp.linear_fc1", f"{hf}.mlp.fc1")
            tower.row(block.mlp, "fc2", f"{mm}.mlp.linear_fc2", f"{hf}.mlp.fc2")
        names = {"norm1": "input_layernorm", "attn": "self_attention"}
        names |= {"norm2": "pre_mlp_layernorm", "mlp": "mlp"}
        self.points += layer_points(f"image_encoder layer {number}", "vit", hf, block, names)

    def rows_out(self, patches: int) -> tuple[int, int]:
        """Shape of the output for a number of patches; the last stage's width is 0: the text's."""
        return (patches // self.unit, 0) if self.span.last else (patches, self.width)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        """Pixels or hidden states of all patches -> hidden states, or one row per image token.

        Args:
            x: (patches, values of a patch) or (patches, width).
            grid: (images, 3): time, height and width of each image in patches.
        """
        out = self.visual(x, grid_thw=grid)
        out = getattr(out, "pooler_output", out)  # transformers 4 returns the tensor itself
        return out if self.span.last else out.reshape(-1, self.width)


# ------------------------------------------------------------------------------------- audio
class Silent(nn.Module):
    """Stands for a convolution of the audio tower that another stage has: zeros of its shape."""

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        self._channels, self._stride = conv.out_channels, conv.stride[0]
        self.weight = torch.empty(0, dtype=dtype)  # transformers asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, time) -> (batch, out, time / stride)."""
        time = (x.shape[-1] - 1) // self._stride + 1
        return x.new_zeros(x.shape[0], self._channels, time)


class QwenAudio(nn.Module):
    """Audio tower of Qwen2.5-Omni. MM format has a k bias that transformers has not: zeros."""

    def __init__(self, tower: Tower, audio: Any, span: Span, dtype: torch.dtype) -> None:  # noqa: ANN401 - HF's model
        super().__init__()
        self.width, self.span = audio.conv2.out_channels, span
        self.points: list[Point] = []
        if span.first:
            for name in ("conv1", "conv2", "audio_bos_eos_token"):
                tower.replicated(getattr(audio, name), f"{AUDIO}.{name}", name)
            self.points.append(Point("audio_encoder conv2", ("audio", "conv2"), audio.conv2))
        else:
            audio.conv1, audio.conv2 = Silent(audio.conv1, dtype), Silent(audio.conv2, dtype)
            audio.audio_bos_eos_token = nn.Identity()
        audio.layers = kept(audio.layers, span)
        for i, layer in enumerate(audio.layers):
            self._layer(tower, layer, i, span.start + i)
        self._received: Tensor | None = None
        self._sent: Tensor | None = None
        if not span.first:
            audio.layers[0].register_forward_pre_hook(self._receive)
        if span.last:
            for name in ("ln_post", "proj"):
                tower.replicated(getattr(audio, name), f"{AUDIO}.{name}", name)
                self.points.append(
                    Point(f"audio_encoder {name}", ("audio", name), getattr(audio, name))
                )
        else:
            audio.ln_post, audio.proj = nn.Identity(), nn.Identity()
            audio.layers[-1].register_forward_hook(self._send)
        self.audio = audio

    def _layer(self, tower: Tower, layer: Any, i: int, number: int) -> None:  # noqa: ANN401 - HF's layer
        mm, hf = f"{AUDIO}.blocks.layers.{i}", f"layers.{number}"
        attn, mm_attn = layer.self_attn, f"{mm}.self_attention"
        tower.replicated(
            layer.self_attn_layer_norm, f"{mm}.input_layernorm", f"{hf}.self_attn_layer_norm"
        )
        head_qkv(
            tower, attn, ("q_proj", "k_proj", "v_proj"), f"{mm_attn}.linear_qkv", f"{hf}.self_attn"
        )
        tower.row(attn, "out_proj", f"{mm_attn}.linear_proj", f"{hf}.self_attn.out_proj")
        tower.replicated(
            layer.final_layer_norm, f"{mm}.pre_mlp_layernorm", f"{hf}.final_layer_norm"
        )
        tower.column(layer, "fc1", f"{mm}.mlp.linear_fc1", f"{hf}.fc1")
        tower.row(layer, "fc2", f"{mm}.mlp.linear_fc2", f"{hf}.fc2")
        names = {"self_attn_layer_norm": "input_layernorm", "self_attn": "self_attention"}
        names |= {"final_layer_norm": "pre_mlp_layernorm", "fc2": "mlp"}
        self.points += layer_points(f"audio_encoder layer {number}", "audio", hf, layer, names)

    def _receive(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (self._received, *args[1:])

    def _send(self, module: nn.Module, args: object, out: Any) -> None:  # noqa: ANN401 - tuple or tensor
        del module, args
        self._sent = out[0] if isinstance(out, tuple) else out

    def forward(self, x: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states in, hidden states out; on the last stage one row per audio token.

        Args:
            x: (rows, width) from the stage before; not used on the first stage.
            features: (mel bins, frames) of all sounds, one after the other.
            lengths: (sounds,) frames of each.
        """
        self._received = x
        after = (lengths - 1) // 2 + 1
        out = self.audio(features, feature_lens=lengths, aftercnn_lens=after)
        sent, self._sent, self._received = self._sent, None, None
        if not self.span.last:
            assert sent is not None  # noqa: S101 - the hook has run
            return sent
        return out.last_hidden_state


# -------------------------------------------------------------------------------------- text
class Text(nn.Module):
    """Text decoder: Qwen2 with m-RoPE, Qwen2 or Llama.

    Args:
        model: transformers' text model.
        owner: the model that has ``lm_head``.
        tied: whether config.json ties the output layer to the embedding.
    """

    def __init__(self, tower: Tower, model: Any, owner: Any, span: Span, tied: bool) -> None:  # noqa: ANN401 - HF's
        super().__init__()
        self.width, self.span = model.norm.weight.shape[0], span
        self.points: list[Point] = []
        self.embedding = self.head_weight = None
        name = "text_decoder.embedding.word_embeddings.weight"
        if span.first:
            self.embedding = tower.embedding(model, "embed_tokens", name, "embed_tokens.weight")
            self.points.append(
                Point("text_decoder embedding", ("llm", "embed_tokens"), model.embed_tokens)
            )
        else:
            model.embed_tokens = nn.Identity()
        self._layers(tower, model)
        self.lm_head = nn.Identity()
        if span.last:
            tower.replicated(model.norm, f"{TEXT}.final_layernorm", "norm")
            head = "text_decoder.output_layer.weight"
            near = self.embedding if tied else None
            hf = "embed_tokens.weight" if tied else "lm_head.weight"
            self.head_weight = tower.head(owner, "lm_head", head, hf, near)
            self.lm_head = owner.lm_head
            self.points.append(Point("text_decoder final_layernorm", ("llm", "norm"), model.norm))
            self.points.append(
                Point("text_decoder output_layer", ("llm", "lm_head"), owner.lm_head)
            )
        else:
            model.norm = nn.Identity()
        self.model = model

    def _layers(self, tower: Tower, model: Any) -> None:  # noqa: ANN401 - HF's model
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
            tower.replicated(
                layer.input_layernorm, f"{mm}.input_layernorm", f"{hf}.input_layernorm"
            )
            separate_qkv(tower, attn, config.num_key_value_heads, mm_attn, f"{hf}.self_attn")
            tower.row(attn, "o_proj", f"{mm_attn}.linear_proj", f"{hf}.self_attn.o_proj")
            norm = "post_attention_layernorm"
            tower.replicated(getattr(layer, norm), f"{mm}.pre_mlp_layernorm", f"{hf}.{norm}")
            tower.glu(layer.mlp, f"{mm}.mlp", f"{hf}.mlp")
            tower.row(layer.mlp, "down_proj", f"{mm}.mlp.linear_fc2", f"{hf}.mlp.down_proj")
            names = {"input_layernorm": "input_layernorm", "self_attn": "self_attention"}
            names |= {norm: "pre_mlp_layernorm", "mlp": "mlp"}
            self.points += layer_points(f"text_decoder layer {number}", "llm", hf, layer, names)

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, time) ids -> (batch, time, width)."""
        return self.model.embed_tokens(ids)

    def forward(self, hidden: Tensor, positions: Tensor, cache: Any = None) -> Tensor:  # noqa: ANN401 - HF's cache
        """(batch, time, width) -> the same; logits (batch, time, vocabulary) on the last stage."""
        out = self.model(
            inputs_embeds=hidden,
            position_ids=positions,
            attention_mask=None,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return self.lm_head(out.last_hidden_state)
