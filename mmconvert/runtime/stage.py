"""One stage of the pipeline: each module in one model chunk, and what crosses its borders."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmconvert.errors import LayoutError
from mmconvert.runtime.audio import QwenAudio
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.bind import Binder
from mmconvert.runtime.encoders import LayerRange, Point, Seen
from mmconvert.runtime.families import INTERN, Architecture
from mmconvert.runtime.glm import GlmVision
from mmconvert.runtime.intern import InternVision
from mmconvert.runtime.lora import LoraPlan
from mmconvert.runtime.mesh import Mesh
from mmconvert.runtime.qwen3 import Qwen3Vision
from mmconvert.runtime.shard import Shard
from mmconvert.runtime.text import Text
from mmconvert.runtime.vision import QwenVision
from mmconvert.sharding.layout import Layout
from mmconvert.sharding.stages import StageGrid, first_stage, flat, last_stage

ENCODERS = ("vit", "audio")
VISION = {
    **dict.fromkeys(INTERN, InternVision),
    "qwen3_vl": Qwen3Vision,
    "qwen3_vl_moe": Qwen3Vision,
    "glm4v": GlmVision,
}


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
            widths = {"vit": vision.hidden_size}
        else:
            self._unit = vision.spatial_merge_size**2
            # Qwen2-VL's vision config calls the text model's width hidden_size.
            widths = {"vit": vision.embed_dim if arch.kind == "qwen2_vl" else vision.hidden_size}
        if "audio" in layout.grids:
            widths["audio"] = config.audio_config.d_model
        self._widths, self._text = widths, text
        self._vocab = arch.text_config.vocab_size
        self._deep = arch.deepstack

    def keys(self, stage: int) -> list[str]:
        """What crosses the border behind a stage: modules, and rows of deepstack layers.

        Raises:
            LayoutError: nothing does.
        """
        seen, used = (_layers_until(self._grids[key], stage) for key in ("vit", "llm"))
        deep = [deep_key(k) for k, layer in enumerate(self._deep) if layer < seen and k >= used]
        if stage >= first_stage(self._grids["llm"]):
            return ["llm"] if stage >= last_stage(self._grids["llm"]) else ["llm", *deep]
        found = [k for k in ENCODERS if k in self._grids and stage >= first_stage(self._grids[k])]
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
            if key == "llm":
                rows, time = batch.ids.shape
                time = 1 if done and batch.last else time
                shapes.append((rows, time, self._vocab if done else self._text))
            elif key == "audio":
                rows = pooled(batch) if done else batch.sound_rows
                shapes.append((rows, self._text if done else self._widths["audio"]))
            else:
                shapes.append(self.vision_shape(batch.patches, done))
        return tuple(
            torch.empty(s, dtype=self._dtype, device="meta", requires_grad=grad) for s in shapes
        )

    def vision_shape(self, patches: int, done: bool) -> tuple[int, int]:
        """(rows, width) of what the encoder passes on: to its next part, or when it is done."""
        if self._intern:
            rows = (self._tile - 1) // self._unit if done else self._tile
            return patches * rows, self._text if done else self._widths["vit"]
        return (patches // self._unit, self._text) if done else (patches, self._widths["vit"])


def deep_key(number: int) -> str:
    """Key of the rows of a deepstack layer, counted in order."""
    return f"deep {number}"


def _layers_until(grid: StageGrid, stage: int) -> int:
    """Layers on a stage and those before it."""
    return sum(flat(grid)[: stage + 1])


def pooled(batch: Batch) -> int:
    """Rows that the audio encoder gives: its states are pooled in pairs, sound by sound."""
    return int((((batch.lengths + 1) // 2 - 2) // 2 + 1).sum())


class Stage(nn.Module):
    """A model chunk that computes: a part of each module that has layers here.

    Args:
        tensors: the chunk's tensors by MM name.
        number: of the stage, in flat order.
        vocabulary: rows of the whole word embedding, those that pad it included; 0: not padded.
        lora: what is adapted, if anything is.
    """

    def __init__(
        self,
        arch: Architecture,
        mesh: Mesh,
        number: int,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        where: str,
        vocabulary: int = 0,
        lora: LoraPlan | None = None,
    ) -> None:
        super().__init__()
        grids = mesh.layout.grids
        model = arch.skeleton(dtype)
        parts = arch.parts(model)
        shard = Shard(tensors, where, dtype, mesh.device, vocabulary, lora)
        spans = {key: span_of(grid, number) for key, grid in grids.items()}
        if not any(spans.values()):
            raise LayoutError(
                f"stage {number} of the pipeline has no layers of any module",
                "layers on every stage",
                "resplit the checkpoint to a layout without empty stages",
            )
        self.vit = self.audio = self.llm = None
        if (span := spans["vit"]) is not None:
            made = VISION.get(arch.kind, QwenVision)
            self.vit = made(Binder(shard, "vit", mesh.tp_groups["vit"]), parts.visual, span)
        if (span := spans.get("audio")) is not None:
            binder = Binder(shard, "audio", mesh.tp_groups["audio"])
            self.audio = QwenAudio(binder, parts.audio, span, dtype)
        if (span := spans["llm"]) is not None:
            binder = Binder(shard, "llm", mesh.tp_groups["llm"])
            self.llm = Text(binder, mesh.experts, parts.text, parts.owner, span, arch.tied)
        shard.finish(self)
        self.to(mesh.device)
        self.shard, self.number, self.arch = shard, number, arch
        self._border = Border(arch, mesh.layout, dtype)
        self._dtype, self._device = dtype, mesh.device
        self.cache: Any = None  # transformers' KV cache of the text layers, while generating
        self.batches: Sequence[Batch] = ()

    @property
    def points(self) -> list[Point]:
        """Places to compare hidden states at, in the order of computing."""
        modules: list[Any] = [t for t in (self.vit, self.audio, self.llm) if t is not None]
        return [point for module in modules for point in module.points]

    def recompute(self, which: bool | frozenset[str]) -> None:
        """Keeps, for the backward pass, each layer's input alone, and computes the rest again.

        Args:
            which: the layers of all modules, or of those with these keys.
        """
        held = {"vit": self.vit, "audio": self.audio, "llm": self.llm}
        some = held.keys() if which is True else which or ()
        parts = [part for key in some if (part := held.get(key)) is not None]
        for layer in (layer for part in parts for layer in part.layers):
            plain = layer.forward

            def again(*args: Any, plain: Any = plain, **more: Any) -> Any:  # noqa: ANN401 - HF's layer
                if not torch.is_grad_enabled():
                    return plain(*args, **more)
                return checkpoint(
                    plain, *args, use_reentrant=False, preserve_rng_state=False, **more
                )

            layer.forward = again

    def forward(self, *received: Tensor, mb: Tensor) -> Any:  # noqa: ANN401 - one tensor or several
        """What the stage before sent -> what the next one gets; logits on the last.

        Args:
            received: in the order of :meth:`Border.keys`; the first stage's is not used.
            mb: index of the micro-batch in ``batches``, as a tensor of one element.
        """
        batch = self.batches[int(mb)]
        held: dict[str, Tensor] = {}
        if self.number:
            held = dict(zip(self._border.keys(self.number - 1), received, strict=True))
        if self.vit is not None:
            held |= self._vision(batch, held)
        if self.audio is not None:
            held["audio"] = self._sound(batch, held)
        if self.llm is not None:
            hidden = held["llm"] if "llm" in held else self._embed(batch, held)
            deep, seen = self._deep(batch, held, hidden)
            held["llm"] = self.llm(
                hidden, batch.positions, self.cache, deep, seen, batch.mask, batch.last
            )
        if self.llm is not None and self.llm.span.last:
            out: tuple[Tensor, ...] = (held["llm"],)
        else:
            out = tuple(held[key].contiguous() for key in self._border.keys(self.number))
        if self.number and torch.is_grad_enabled() and any(r.requires_grad for r in received):
            out = (_joined(out[0], received), *out[1:])
        return out[0] if len(out) == 1 else out

    def _vision(self, batch: Batch, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's rows, and those of its deepstack layers."""
        assert self.vit is not None  # noqa: S101 - the caller has looked
        span = self.vit.span
        x = batch.pixels.to(self._dtype) if span.first else held["vit"]
        mine = [k for k, i in enumerate(self.arch.deepstack) if span.start <= i < span.stop]
        if batch.patches == 0:  # a batch of text: nothing to compute, nothing to send
            out = Seen(self._nothing(span.last), [self._nothing(True) for _ in mine])
        else:
            out = self.vit(x, batch.grid)
        deep = zip(mine, out.deep, strict=True)
        return {"vit": out.rows, **{deep_key(k): rows for k, rows in deep}}

    def _nothing(self, done: bool) -> Tensor:
        """The rows of no picture."""
        shape = self._border.vision_shape(0, done)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _sound(self, batch: Batch, held: Mapping[str, Tensor]) -> Tensor:
        assert self.audio is not None  # noqa: S101 - the caller has looked
        if batch.lengths.numel() == 0:
            done = self.audio.span.last
            width = self.arch.text_config.hidden_size if done else self.audio.width
            return torch.zeros(0, width, dtype=self._dtype, device=self._device)
        x = held.get("audio", batch.features.new_zeros(0))
        return self.audio(x, batch.features.to(self._dtype), batch.lengths)

    def _embed(self, batch: Batch, held: Mapping[str, Tensor]) -> Tensor:
        """Word embeddings with the encoders' rows at the placeholders."""
        assert self.llm is not None  # noqa: S101 - the caller has looked
        hidden = self._placed(batch, self.llm.embed(batch.ids), held["vit"])
        if "audio" in held and (sound := self.arch.token("audio_token_id")) is not None:
            hidden = _scatter(hidden, batch.ids == sound, held["audio"])
        return hidden

    def _placed(self, batch: Batch, hidden: Tensor, rows: Tensor) -> Tensor:
        """(batch, time, width) with the rows of pictures and videos at their placeholders."""
        images, videos = rows[: batch.image_rows], rows[batch.image_rows :]
        hidden = _scatter(hidden, batch.ids == self.arch.image_token(), images)
        if (video := self.arch.token("video_token_id")) is not None:
            hidden = _scatter(hidden, batch.ids == video, videos)
        return hidden

    def _deep(
        self, batch: Batch, held: Mapping[str, Tensor], hidden: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """What is added behind the text layers here, and where: the rows of deepstack layers."""
        assert self.llm is not None  # noqa: S101 - the caller has looked
        count = len(self.arch.deepstack)
        if not count or not batch.patches:
            return [], None
        seen = batch.ids == self.arch.image_token()
        if (video := self.arch.token("video_token_id")) is not None:
            seen = seen | (batch.ids == video)
        mine = range(min(self.llm.span.start, count), min(self.llm.span.stop, count))
        empty = torch.zeros_like(hidden)
        return [self._placed(batch, empty, held[deep_key(k)])[seen] for k in mine], seen


class _Joined(torch.autograd.Function):
    """A stage's output, joined to all that it received: what a batch of text does not use has the
    gradient zero and not none, for which torch's pipeline (seen in 2.11) ends with an error.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *received: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        ctx.like = [(r.shape, r.dtype, r.device) for r in received]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401 - torch's own
        zeros = [torch.zeros(s, dtype=d, device=on) for s, d, on in ctx.like]
        return (*grads, *zeros)


def _joined(out: Tensor, received: Sequence[Tensor]) -> Tensor:
    return _Joined.apply(out, *received)


def _scatter(hidden: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """Puts the first rows into the marked places; rows beyond them are padding.

    Without rows a placeholder is a word like others, as in transformers: a model may say one.
    """
    if rows.shape[0] == 0 or not bool(where.any()):
        return hidden
    return hidden.masked_scatter(where.unsqueeze(-1), rows.to(hidden.dtype))
