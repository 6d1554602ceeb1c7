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
from mmconvert.runtime.border import Border, deep_key, span_of
from mmconvert.runtime.encoders import Point, Seen
from mmconvert.runtime.families import INTERN, Architecture
from mmconvert.runtime.glm import GlmVision
from mmconvert.runtime.intern import InternVision
from mmconvert.runtime.lora import LoraPlan
from mmconvert.runtime.mesh import Mesh
from mmconvert.runtime.qwen3 import Qwen3Vision
from mmconvert.runtime.shard import Shard
from mmconvert.runtime.text import Text
from mmconvert.runtime.vision import QwenVision

VISION = {
    **dict.fromkeys(INTERN, InternVision),
    "qwen3_vl": Qwen3Vision,
    "qwen3_vl_moe": Qwen3Vision,
    "glm4v": GlmVision,
}


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
        self.vision = self.sound = self.text = None
        binders = {key: Binder(shard, key, mesh.tp_groups[key]) for key in grids}
        keys = self._keys = arch.keys
        if (span := spans[keys.vision]) is not None:
            made = VISION.get(arch.kind, QwenVision)
            self.vision = made(binders[keys.vision], parts.visual, span)
        if (span := spans.get(keys.sound)) is not None:
            self.sound = QwenAudio(binders[keys.sound], parts.audio, span, dtype)
        if (span := spans[keys.text]) is not None:
            binder, tied = binders[keys.text], arch.tied
            self.text = Text(binder, mesh.experts, parts.text, parts.owner, span, tied)
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
        return [point for module in self._parts().values() for point in module.points]

    def _parts(self) -> dict[str, Any]:
        """The modules that have layers here, by key, in the order of computing."""
        every = zip(self._keys, (self.vision, self.sound, self.text), strict=True)
        return {key: module for key, module in every if module is not None}

    def recompute(self, which: bool | frozenset[str]) -> None:
        """Keeps, for the backward pass, each layer's input alone, and computes the rest again.

        Args:
            which: the layers of all modules, or of those with these keys.
        """
        some = self._keys if which is True else which or ()
        parts = [part for key, part in self._parts().items() if key in some]
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
        if self.vision is not None:
            held |= self._vision(batch, held)
        if self.sound is not None:
            held[self._keys.sound] = self._sound(batch, held)
        if self.text is not None:
            hidden = held[self._keys.text] if self._keys.text in held else self._embed(batch, held)
            deep, seen = self._deep(batch, held, hidden)
            held[self._keys.text] = self.text(
                hidden, batch.positions, self.cache, deep, seen, batch.mask, batch.last
            )
        if self.text is not None and self.text.span.last:
            out: tuple[Tensor, ...] = (held[self._keys.text],)
        else:
            out = tuple(held[key].contiguous() for key in self._border.keys(self.number))
        if self.number and torch.is_grad_enabled() and any(r.requires_grad for r in received):
            out = (_joined(out[0], received), *out[1:])
        return out[0] if len(out) == 1 else out

    def _vision(self, batch: Batch, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's rows, and those of its deepstack layers."""
        assert self.vision is not None  # noqa: S101 - the caller has looked
        span = self.vision.span
        x = batch.pixels.to(self._dtype) if span.first else held[self._keys.vision]
        mine = [k for k, i in enumerate(self.arch.deepstack) if span.start <= i < span.stop]
        if batch.patches == 0:  # a batch of text: nothing to compute, nothing to send
            out = Seen(self._nothing(span.last), [self._nothing(True) for _ in mine])
        else:
            out = self.vision(x, batch.grid)
        deep = zip(mine, out.deep, strict=True)
        return {self._keys.vision: out.rows, **{deep_key(k): rows for k, rows in deep}}

    def _nothing(self, done: bool) -> Tensor:
        """The rows of no picture."""
        shape = self._border.vision_shape(0, done)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _sound(self, batch: Batch, held: Mapping[str, Tensor]) -> Tensor:
        assert self.sound is not None  # noqa: S101 - the caller has looked
        if batch.lengths.numel() == 0:
            done = self.sound.span.last
            width = self.arch.text_config.hidden_size if done else self.sound.width
            return torch.zeros(0, width, dtype=self._dtype, device=self._device)
        x = held.get(self._keys.sound, batch.features.new_zeros(0))
        return self.sound(x, batch.features.to(self._dtype), batch.lengths)

    def _embed(self, batch: Batch, held: Mapping[str, Tensor]) -> Tensor:
        """Word embeddings with the encoders' rows at the placeholders."""
        assert self.text is not None  # noqa: S101 - the caller has looked
        hidden = self._placed(batch, self.text.embed(batch.ids), held[self._keys.vision])
        if self._keys.sound in held and (sound := self.arch.token("audio_token_id")) is not None:
            hidden = _scatter(hidden, batch.ids == sound, held[self._keys.sound])
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
        assert self.text is not None  # noqa: S101 - the caller has looked
        count = len(self.arch.deepstack)
        if not count or not batch.patches:
            return [], None
        seen = batch.ids == self.arch.image_token()
        if (video := self.arch.token("video_token_id")) is not None:
            seen = seen | (batch.ids == video)
        mine = range(min(self.text.span.start, count), min(self.text.span.stop, count))
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
