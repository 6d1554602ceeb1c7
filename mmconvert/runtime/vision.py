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
from mmconvert.runtime.encoders import LayerRange, Point, Rows, kept, layer_points

VIT = "image_encoder.encoder.blocks.layers"
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
            proj, name = visual.patch_embed.proj, "patch_embed.proj"
            binder.replicated(proj, f"image_encoder.encoder.{name}", name)
            self.points.append(
                Point("image_encoder patch_embed", ("vit", "patch_embed"), visual.patch_embed)
            )
        else:
            visual.patch_embed = Rows(width)
        visual.blocks = kept(visual.blocks, span)
        for i, block in enumerate(visual.blocks):
            self._block(binder, block, i, span.start + i)
        if hasattr(visual, "fullatt_block_indexes"):
            full = [i - span.start for i in visual.fullatt_block_indexes]
            visual.fullatt_block_indexes = [i for i in full if i >= 0]
        if span.last:
            merger = visual.merger
            binder.replicated(merger.ln_q, f"{PROJECTOR}.layernorm", "merger.ln_q")
            binder.column(merger.mlp, "0", f"{PROJECTOR}.encoder.linear_fc1", "merger.mlp.0")
            binder.row(merger.mlp, "2", f"{PROJECTOR}.encoder.linear_fc2", "merger.mlp.2")
            self.points.append(Point("image_encoder projector", ("vit", "merger"), merger))
        else:
            visual.merger = Rows(width * unit)
        self.visual = visual

    def _block(self, binder: Binder, block: Any, i: int, number: int) -> None:  # noqa: ANN401 - HF's layer
        mm, hf = f"{VIT}.{i}", f"blocks.{number}"
        binder.replicated(block.norm1, f"{mm}.input_layernorm", f"{hf}.norm1")
        attn, mm_attn = block.attn, f"{mm}.self_attention"
        if hasattr(attn, "qkv"):
            packed_qkv(binder, attn, f"{mm_attn}.linear_qkv", f"{hf}.attn.qkv")
        else:
            head_qkv(binder, attn, ("q", "k", "v"), f"{mm_attn}.linear_qkv", f"{hf}.attn")
        binder.row(attn, "proj", f"{mm_attn}.linear_proj", f"{hf}.attn.proj")
        binder.replicated(block.norm2, f"{mm}.pre_mlp_layernorm", f"{hf}.norm2")
        if hasattr(block.mlp, "gate_proj"):
            binder.glu(block.mlp, f"{mm}.mlp", f"{hf}.mlp")
            binder.row(block.mlp, "down_proj", f"{mm}.mlp.linear_fc2", f"{hf}.mlp.down_proj")
        else:
            binder.column(block.mlp, "fc1", f"{mm}.mlp.linear_fc1", f"{hf}.mlp.fc1")
            binder.row(block.mlp, "fc2", f"{mm}.mlp.linear_fc2", f"{hf}.mlp.fc2")
        names = {"norm1": "input_layernorm", "attn": "self_attention"}
        names |= {"norm2": "pre_mlp_layernorm", "mlp": "mlp"}
        self.points += layer_points(f"image_encoder layer {number}", "vit", hf, block, names)

    def rows_out(self, patches: int) -> tuple[int, int]:
        """Shape of the output for a number of patches; the last stage's width is 0: the text's."""
        return (patches // self.unit, 0) if self.span.last else (patches, self.width)

    @property
    def layers(self) -> Any:  # noqa: ANN401 - a ModuleList of HF's layers
        """The layers of this chunk."""
        return self.visual.blocks

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        """Pixels or hidden states of all patches -> hidden states, or one row per image token.

        Args:
            x: (patches, values of a patch) or (patches, width).
            grid: (images, 3): time, height and width of each image in patches.
        """
        out = self.visual(x, grid_thw=grid)
        out = getattr(out, "pooler_output", out)  # transformers 4 returns the tensor itself
        return out if self.span.last else out.reshape(-1, self.width)
