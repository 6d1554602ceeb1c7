"""What crosses the borders between the stages of a pipeline, and in which shapes."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import torch
from torch import Tensor

from mmconvert.errors import LayoutError
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.encoders import LayerRange
from mmconvert.runtime.families import Architecture
from mmconvert.sharding.layout import Layout
from mmconvert.sharding.stages import StageGrid, first_stage, flat, last_stage


def span_of(grid: StageGrid, stage: int) -> LayerRange | None:
    """The layers of a stage, or None if it has none."""
    counts = flat(grid)
    start = sum(counts[:stage])
    return LayerRange(start, start + counts[stage], sum(counts)) if counts[stage] else None


class Border:
    """What travels from one stage to the next: hidden states and finished rows, in this order."""

    def __init__(self, arch: Architecture, layout: Layout, dtype: torch.dtype) -> None:
        self._grids, self._dtype = layout.grids, dtype
        config = arch.config
        text = arch.text_config.hidden_size
        vision = config.vision_config
        self._intern = arch.intern
        if arch.intern:
            side = vision.image_size[0] // vision.patch_size[0]
            self._tile, self._unit = side * side + 1, round(1 / config.downsample_ratio) ** 2
            width = vision.hidden_size
        else:
            self._unit = vision.spatial_merge_size**2
            # Qwen2-VL's vision config calls the text model's width hidden_size.
            width = vision.embed_dim if arch.kind == "qwen2_vl" else vision.hidden_size
        self._width, self._text, self._keys = width, text, arch.keys
        self._sound = config.audio_config.d_model if arch.keys.sound else 0
        self._vocab = arch.text_config.vocab_size
        self._deep = arch.deepstack

    def keys(self, stage: int) -> list[str]:
        """What crosses the border behind a stage: modules, and rows of deepstack layers.

        Raises:
            LayoutError: nothing does.
        """
        seen, used = (
            _layers_until(self._grids[key], stage) for key in (self._keys.vision, self._keys.text)
        )
        deep = [deep_key(k) for k, layer in enumerate(self._deep) if layer < seen and k >= used]
        text = self._keys.text
        if stage >= first_stage(self._grids[text]):
            return [text] if stage >= last_stage(self._grids[text]) else [text, *deep]
        found = [k for k in self._keys.encoders if stage >= first_stage(self._grids[k])]
        if not found:
            raise LayoutError(
                f"stage {stage} of the pipeline has no layers, nor has one before it",
                "a first stage with layers of some module",
            )
        return [*found, *deep]

    def metas(self, stage: int, batch: Batch, grad: bool) -> tuple[Tensor, ...]:
        """Tensors without data in the shapes that leave a stage: logits from the last one."""
        shapes: list[tuple[int, ...]] = []
        for key in self.keys(stage):
            if key not in self._grids:  # of a deepstack layer
                shapes.append(self.vision_shape(batch.patches, True))
                continue
            done = stage >= last_stage(self._grids[key])
            if key == self._keys.text:
                rows, time = batch.ids.shape
                time = 1 if done and batch.last else time
                shapes.append((rows, time, self._vocab if done else self._text))
            elif key == self._keys.sound:
                rows = pooled(batch) if done else batch.sound_rows
                shapes.append((rows, self._text if done else self._sound))
            else:
                shapes.append(self.vision_shape(batch.patches, done))
        return tuple(
            torch.empty(s, dtype=self._dtype, device="meta", requires_grad=grad) for s in shapes
        )

    def vision_shape(self, patches: int, done: bool) -> tuple[int, int]:
        """(rows, width) of what the encoder passes on: to its next part, or when it is done."""
        if self._intern:
            rows = (self._tile - 1) // self._unit if done else self._tile
            return patches * rows, self._text if done else self._width
        return (patches // self._unit, self._text) if done else (patches, self._width)


def deep_key(number: int) -> str:
    """Key of the rows of a deepstack layer, counted in order."""
    return f"deep {number}"


def _layers_until(grid: StageGrid, stage: int) -> int:
    """Layers on a stage and those before it."""
    return sum(flat(grid)[: stage + 1])


def pooled(batch: Batch) -> int:
    """Rows that the audio encoder gives: its states are pooled in pairs, sound by sound."""
    return int((((batch.lengths + 1) // 2 - 2) // 2 + 1).sum())
