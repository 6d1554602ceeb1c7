"""The vision encoder of the Qwen families, cut for one model chunk.

It takes transformers' own binder, keeps the layers of this chunk, binds every parameter to its MM
name, and makes the ends that lie on other stages pass hidden states through. MM names:
docs/formats.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmconvert.runtime.attention import head_qkv, packed_qkv
from mmconvert.runtime.bind import Binder
from mmconvert.runtime.encoders import LayerRange, Point, Rows, Seen, kept, layer_points

ENCODER = "image_encoder.encoder"
LAYERS = f"{ENCODER}.blocks.layers"
PROJECTOR = "image_encoder.projector"


class QwenVision(nn.Module):
    """Vision transformer of Qwen2-VL, Qwen2.5-VL and Qwen2.5-Omni.

    Windows (Qwen2.5) need nothing here: transformers' model brings patches into window order at
    its start and back at its end, on both sides of a border.
    """

    def __init__(self, binder: Binder, visual: Any, span: LayerRange) -> None:  # noqa: ANN401 - HF's model
        super().__init__()
        unit = visual.spatial_merge_size**2
        width = visual.blocks[0].norm1.weight.shape[0]
        self.width, self.unit, self.span = width, unit, span
        self.points: list[Point] = []
        if span.first:
            self.begin(binder, visual)
        else:
            self.receive(visual)
        visual.blocks = kept(visual.blocks, span)
        for i, block in enumerate(visual.blocks):
            self._block(binder, block, i, span.start + i)
        if hasattr(visual, "fullatt_block_indexes"):
            full = [i - span.start for i in visual.fullatt_block_indexes]
            visual.fullatt_block_indexes = [i for i in full if i >= 0]
        if span.last:
            self.end(binder, visual)
            self.points.append(
                Point("image_encoder projector", (binder.key, "merger"), visual.merger)
            )
        else:
            self.send(visual)
        self.visual = visual

    def begin(self, binder: Binder, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Binds what stands before the layers."""
        proj, name = visual.patch_embed.proj, "patch_embed.proj"
        binder.replicated(proj, f"{ENCODER}.{name}", name)
        self.points.append(
            Point("image_encoder patch_embed", (binder.key, "patch_embed"), visual.patch_embed)
        )

    def receive(self, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Lets hidden states pass through what stands before the layers."""
        visual.patch_embed = Rows(self.width)

    def end(self, binder: Binder, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Binds what stands after the layers."""
        merger = visual.merger
        binder.replicated(merger.ln_q, f"{PROJECTOR}.layernorm", "merger.ln_q")
        binder.column(merger.mlp, "0", f"{PROJECTOR}.encoder.linear_fc1", "merger.mlp.0")
        binder.row(merger.mlp, "2", f"{PROJECTOR}.encoder.linear_fc2", "merger.mlp.2")

    def send(self, visual: Any) -> None:  # noqa: ANN401 - HF's model
        """Lets hidden states pass through what stands after the layers."""
        visual.merger = Rows(self.width * self.unit)

    def attention(self, binder: Binder, attn: Any, mm: str, hf: str) -> None:  # noqa: ANN401 - HF's module
        """Binds the attention of a layer."""
        if hasattr(attn, "qkv"):
            packed_qkv(binder, attn, f"{mm}.linear_qkv", f"{hf}.qkv")
        else:
            head_qkv(binder, attn, ("q", "k", "v"), f"{mm}.linear_qkv", hf)
        binder.row(attn, "proj", f"{mm}.linear_proj", f"{hf}.proj")

    def _block(self, binder: Binder, block: Any, i: int, number: int) -> None:  # noqa: ANN401 - HF's layer
        mm, hf = f"{LAYERS}.{i}", f"blocks.{number}"
        binder.replicated(block.norm1, f"{mm}.input_layernorm", f"{hf}.norm1")
        self.attention(binder, block.attn, f"{mm}.self_attention", f"{hf}.attn")
        binder.replicated(block.norm2, f"{mm}.pre_mlp_layernorm", f"{hf}.norm2")
        if hasattr(block.mlp, "gate_proj"):
            binder.glu(block.mlp, f"{mm}.mlp", f"{hf}.mlp")
            binder.row(block.mlp, "down_proj", f"{mm}.mlp.linear_fc2", f"{hf}.mlp.down_proj")
        else:
            two_linears(binder, block.mlp, f"{mm}.mlp", f"{hf}.mlp")
        names = {"norm1": "input_layernorm", "attn": "self_attention"}
        names |= {"norm2": "pre_mlp_layernorm", "mlp": "mlp"}
        self.points += layer_points(f"image_encoder layer {number}", binder.key, hf, block, names)

    @property
    def layers(self) -> Any:  # noqa: ANN401 - a ModuleList of HF's layers
        """The layers of this chunk."""
        return self.visual.blocks

    def forward(self, x: Tensor, grid: Tensor) -> Seen:
        """Pixels or hidden states of all patches -> hidden states, or one row per image token.

        Args:
            x: (patches, values of a patch) or (patches, width).
            grid: (images, 3): time, height and width of each image in patches.
        """
        out = self.visual(x, grid_thw=grid)
        return Seen(self.passed_on(getattr(out, "pooler_output", out)))  # a tensor in 4

    def passed_on(self, rows: Tensor) -> Tensor:
        """What the last stage made, or hidden states that have passed through its stand-ins."""
        return rows if self.span.last else rows.reshape(-1, self.width)


def two_linears(binder: Binder, mlp: Any, mm: str, hf: str) -> None:  # noqa: ANN401 - HF's module
    """``fc1`` and ``fc2``, which newer models call ``linear_fc1`` and ``linear_fc2``."""
    prefix = "linear_" if hasattr(mlp, "linear_fc1") else ""
    one, two = f"{prefix}fc1", f"{prefix}fc2"
    binder.column(mlp, one, f"{mm}.linear_fc1", f"{hf}.{one}")
    binder.row(mlp, two, f"{mm}.linear_fc2", f"{hf}.{two}")
