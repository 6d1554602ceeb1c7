"""What one micro-batch consists of, and how micro-batches are brought to one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

ODD_ROWS = 3  # of the shortest sound that loses a row in pooling and keeps one
IGNORED = -100  # a label that the loss leaves out, as in torch's cross entropy


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together.

    Attributes:
        ids: (batch, time) token ids.
        labels: (batch, time); IGNORED where nothing is learnt.
        positions: (3, batch, time) for m-RoPE, (batch, time) else.
        pixels: (patches, values of a patch) of images, then of videos; InternVL: (tiles, 3, h, w).
        grid: (images + videos, 3) time, height, width in patches; InternVL: (tiles, 3).
        image_rows: how many of the rows that the vision encoder gives belong to images.
        features: (mel bins, frames) of all sounds, one after the other.
        lengths: (sounds,) frames of each.
        mask: (batch, time) 0 where an id is padding that stands before others, what a cache has
            read included; None where there is none.
        last: only the last position's logits are asked for.
        seconds: (videos,) from one row of a video's grid to the next; None: one second each.
        woven: the sounds stand between the frames of the videos, in their order.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    pixels: Tensor
    grid: Tensor
    image_rows: int
    features: Tensor
    lengths: Tensor
    mask: Tensor | None = None
    last: bool = False
    seconds: Tensor | None = None
    woven: bool = False

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved = {
            f.name: v.to(device)
            for f in fields(self)
            if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    @property
    def patches(self) -> int:
        """Rows or tiles that the vision encoder takes."""
        return self.pixels.shape[0]

    @property
    def sound_rows(self) -> int:
        """Hidden states of the audio encoder before pooling: half of the frames, rounded up."""
        return int(((self.lengths + 1) // 2).sum())

    @property
    def learnt(self) -> int:
        """Number of tokens that the loss counts."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def alike(batches: Sequence[Batch], merge: int, intern: bool) -> list[Batch]:
    """Micro-batches padded to one shape, which a pipeline needs.

    Ids are padded at the end, where causal attention keeps them apart from what counts. Images
    and sounds are padded with one more image or sound, of zeros: its tokens stand in no text.

    Args:
        merge: patches along each side of one image token.
        intern: whether pixels are tiles.
    """
    time = max(b.ids.shape[1] for b in batches)
    patches = _target([b.patches for b in batches], 1 if intern else merge * merge)
    out = [_pad_pixels(pad_text(b, time), patches - b.patches, merge, intern) for b in batches]
    return _alike_sounds(out)


def _alike_sounds(batches: Sequence[Batch]) -> list[Batch]:
    """Micro-batches with as many rows of sound, before pooling and after it.

    Pooling takes pairs, and leaves out the last row of a sound that has an odd number of them. So
    each micro-batch gets as many such sounds as the others have; what is missing then is even.
    """
    odd = [int((((b.lengths + 1) // 2) % 2).sum()) for b in batches]
    grown = list(batches)
    for i, count in enumerate(odd):
        for _ in range(max(odd) - count):
            grown[i] = _pad_sound(grown[i], ODD_ROWS)
    most = max(b.sound_rows for b in grown)
    return [_pad_sound(b, most - b.sound_rows) for b in grown]


def _target(sizes: Sequence[int], unit: int) -> int:
    """A size that all can be padded to: the largest, with room for a whole unit beside it."""
    most = max(sizes)
    return most if all(s == most or most - s >= unit for s in sizes) else most + unit


def pad_text(b: Batch, time: int) -> Batch:
    """The batch with ids padded at the end."""
    more = time - b.ids.shape[1]
    if not more:
        return b
    last = b.positions.amax() + 1 + torch.arange(more)
    tail = last.expand(*b.positions.shape[:-1], more)
    return replace(
        b,
        ids=F.pad(b.ids, (0, more)),
        labels=F.pad(b.labels, (0, more), value=IGNORED),
        positions=torch.cat([b.positions, tail], dim=-1),
    )


def _pad_pixels(b: Batch, more: int, merge: int, intern: bool) -> Batch:
    if not more:
        return b
    grid = [1, 1, 1] if intern else [1, merge, more // merge]
    rows = torch.tensor([grid]).expand(more if intern else 1, 3)
    blank = b.pixels.new_zeros(more, *b.pixels.shape[1:])
    return replace(b, pixels=torch.cat([b.pixels, blank]), grid=torch.cat([b.grid, rows]))


def _pad_sound(b: Batch, more: int) -> Batch:
    if not more:
        return b
    blank = b.features.new_zeros(b.features.shape[0], 2 * more)
    return replace(
        b,
        features=torch.cat([b.features, blank], dim=1),
        lengths=torch.cat([b.lengths, torch.tensor([2 * more])]),
    )


def next_step(batch: Batch, tokens: Tensor, positions: Tensor) -> Batch:
    """The batch of one further token for each row, without pictures or sounds.

    Args:
        tokens, positions: (batch,).
    """
    ids = tokens[:, None]
    mask = batch.mask
    return Batch(
        ids,
        ids,
        positions[:, None].expand(*batch.positions.shape[:-1], 1),
        batch.pixels[:0],
        batch.grid[:0],
        0,
        batch.features[:, :0],
        batch.lengths[:0],
        None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
        batch.last,
    )


def padded_before(b: Batch, time: int) -> Batch:
    """The batch with padding before its ids, which a mask hides."""
    more = time - b.ids.shape[1]
    front = b.ids[:, :1].expand(-1, more)
    return replace(
        b,
        ids=torch.cat([front, b.ids], 1),
        labels=F.pad(b.labels, (more, 0), value=IGNORED),
        positions=F.pad(b.positions, (more, 0)),
        mask=F.pad(torch.ones_like(b.ids), (more, 0)),
    )


def appended(batch: Batch, token: int, position: Tensor) -> Batch:
    """The batch, of one sample, with one further token of text."""
    more = next_step(batch, torch.full_like(batch.ids[:, 0], token), position.reshape(1))
    return replace(
        batch,
        ids=torch.cat([batch.ids, more.ids], 1),
        labels=torch.cat([batch.labels, more.labels], 1),
        positions=torch.cat([batch.positions, more.positions], -1),
    )


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the next token, summed over the learnt ones.

    Args:
        logits: (batch, time, vocabulary).
        labels: (batch, time).
    """
    flat = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
