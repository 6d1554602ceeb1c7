"""The audio encoder of Qwen2.5-Omni, cut for one model chunk as the vision encoder is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmconvert.runtime.attention import head_qkv
from mmconvert.runtime.bind import Binder
from mmconvert.runtime.encoders import LayerRange, Point, kept, layer_points

AUDIO = "audio_encoder.encoder"


class Silent(nn.Module):
    """Stands for a convolution of the audio encoder that another stage has: zeros of its shape."""

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        self._channels, self._stride = conv.out_channels, conv.stride[0]
        self.weight = torch.empty(0, dtype=dtype)  # transformers asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, time) -> (batch, out, time / stride)."""
        time = (x.shape[-1] - 1) // self._stride + 1
        return x.new_zeros(x.shape[0], self._channels, time)


class QwenAudio(nn.Module):
    """Audio encoder of Qwen2.5-Omni. MM format has a k bias that transformers has not: zeros."""

    def __init__(self, binder: Binder, audio: Any, span: LayerRange, dtype: torch.dtype) -> None:  # noqa: ANN401 - HF's model
        super().__init__()
        self.width, self.span = audio.conv2.out_channels, span
        self.points: list[Point] = []
        if span.first:
            for name in ("conv1", "conv2", "audio_bos_eos_token"):
                binder.replicated(getattr(audio, name), f"{AUDIO}.{name}", name)
            self.points.append(Point("audio_encoder conv2", (binder.key, "conv2"), audio.conv2))
        else:
            audio.conv1, audio.conv2 = Silent(audio.conv1, dtype), Silent(audio.conv2, dtype)
            audio.audio_bos_eos_token = nn.Identity()
        audio.layers = kept(audio.layers, span)
        for i, layer in enumerate(audio.layers):
            self._layer(binder, layer, i, span.start + i)
        self._received: Tensor | None = None
        self._sent: Tensor | None = None
        if not span.first:
            audio.layers[0].register_forward_pre_hook(self._receive)
        if span.last:
            for name in ("ln_post", "proj"):
                binder.replicated(getattr(audio, name), f"{AUDIO}.{name}", name)
                self.points.append(
                    Point(f"audio_encoder {name}", (binder.key, name), getattr(audio, name))
                )
        else:
            audio.ln_post, audio.proj = nn.Identity(), nn.Identity()
            audio.layers[-1].register_forward_hook(self._send)
        self.audio = audio

    def _layer(self, binder: Binder, layer: Any, i: int, number: int) -> None:  # noqa: ANN401 - HF's layer
        mm, hf = f"{AUDIO}.blocks.layers.{i}", f"layers.{number}"
        attn, mm_attn = layer.self_attn, f"{mm}.self_attention"
        binder.replicated(
            layer.self_attn_layer_norm, f"{mm}.input_layernorm", f"{hf}.self_attn_layer_norm"
        )
        head_qkv(
            binder, attn, ("q_proj", "k_proj", "v_proj"), f"{mm_attn}.linear_qkv", f"{hf}.self_attn"
        )
        binder.row(attn, "out_proj", f"{mm_attn}.linear_proj", f"{hf}.self_attn.out_proj")
        binder.replicated(
            layer.final_layer_norm, f"{mm}.pre_mlp_layernorm", f"{hf}.final_layer_norm"
        )
        binder.column(layer, "fc1", f"{mm}.mlp.linear_fc1", f"{hf}.fc1")
        binder.row(layer, "fc2", f"{mm}.mlp.linear_fc2", f"{hf}.fc2")
        names = {"self_attn_layer_norm": "input_layernorm", "self_attn": "self_attention"}
        names |= {"final_layer_norm": "pre_mlp_layernorm", "fc2": "mlp"}
        self.points += layer_points(f"audio_encoder layer {number}", binder.key, hf, layer, names)

    def _receive(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (self._received, *args[1:])

    def _send(self, module: nn.Module, args: object, out: Any) -> None:  # noqa: ANN401 - tuple or tensor
        del module, args
        self._sent = out[0] if isinstance(out, tuple) else out

    @property
    def layers(self) -> Any:  # noqa: ANN401 - a ModuleList of HF's layers
        """The layers of this chunk."""
        return self.audio.layers

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
