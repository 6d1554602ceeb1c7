"""Qwen-VL's text decoder, with pictures in it.

Modules have the hub's names. Up to the training length the hub's ``modeling_qwen.py`` and
MindFormers 1.3.1 compute the same; beyond it the hub's scales the rotary base by the prompt's
length (dynamic NTK) and the queries by their place (logn), and MindFormers does neither.
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use
from torch.utils.checkpoint import checkpoint

from mmconvert.runtime.qwenvl.sizes import Sizes
from mmconvert.runtime.qwenvl.vision import EPS, Vision, heads_of

MASKED = -10000.0  # added to the scores of what must not be seen; a row of such alone sees all


@dataclass
class Cache:
    """Keys and values of what has been read, by layer, and the prompt's share in the angles."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    alpha: float = 1.0

    def __len__(self) -> int:
        """Tokens that have been read."""
        return self.layers[0][0].shape[2] if self.layers else 0


@dataclass(frozen=True)
class Places:
    """What attention needs to know of the tokens of a pass.

    Attributes:
        cos, sin: (time, head size), fp32.
        scale: (time, 1) of the queries, or None for 1.
        mask: (batch, 1, time, seen) added to scores; None: each token sees those before it.
    """

    cos: Tensor
    sin: Tensor
    scale: Tensor | None
    mask: Tensor | None


class RMSNorm(nn.Module):
    """x / rms(x), in fp32, times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return wide.to(x.dtype) * self.weight


def rotate(x: Tensor, places: Places) -> Tensor:
    """Rotates pairs (i, i + half) of (batch, heads, time, size) by their angles."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (wide * places.cos + rotated * places.sin).to(x.dtype)


class CausalAttention(nn.Module):
    """Causal self-attention; rows of ``c_attn`` are all of q, of k, of v."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.c_attn = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        self.c_proj = nn.Linear(sizes.hidden, sizes.hidden, bias=False)

    def forward(self, x: Tensor, places: Places, cache: Cache | None, layer: int) -> Tensor:
        """(batch, time, hidden) -> the same; adds to the cache."""
        q, k, v = (heads_of(part, self.heads) for part in self.c_attn(x).chunk(3, dim=-1))
        q, k = rotate(q, places), rotate(k, places)
        if places.scale is not None:
            q = q * places.scale.to(q.dtype)
        if cache is not None:
            if layer < len(cache.layers):
                before = cache.layers[layer]
                k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
                cache.layers[layer] = k, v
            else:
                cache.layers.append((k, v))
        causal = places.mask is None and q.shape[2] > 1
        mask = None if places.mask is None else places.mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))): the gate is w2."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.w2 = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.c_proj = nn.Linear(sizes.inner, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, hidden) -> the same."""
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Layer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(sizes.hidden)
        self.attn = CausalAttention(sizes)
        self.ln_2 = RMSNorm(sizes.hidden)
        self.mlp = GatedMLP(sizes)

    def forward(self, x: Tensor, places: Places, cache: Cache | None, layer: int) -> Tensor:
        """(batch, time, hidden) -> the same."""
        x = x + self.attn(self.ln_1(x), places, cache, layer)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """What the checkpoint calls ``transformer``: all but the output layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.wte = nn.Embedding(sizes.vocab, sizes.hidden)
        self.h = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.ln_f = RMSNorm(sizes.hidden)
        self.visual = Vision(sizes)


class QwenVLModel(nn.Module):
    """The model: ids and pictures in, logits out."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.recompute = False  # compute each layer again in the backward pass, to save memory
        self.transformer = Transformer(sizes)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)

    def forward(
        self,
        ids: Tensor,
        pixels: Tensor | None = None,
        slots: Tensor | None = None,
        keep: Tensor | None = None,
        cache: Cache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits in fp32.

        Args:
            ids: (batch, time).
            pixels: pictures (n, 3, side, side), normalised; None for text alone.
            slots: (n, 256, 2): row and index of the tokens that each picture's rows stand for.
            keep: (batch, time) false for tokens that none may see; None keeps all.
            cache: what was read before; it grows by this pass.
            last: the logits of the last token alone.

        Returns:
            (batch, time or 1, vocabulary).
        """
        x = self.embed(ids, pixels, slots)
        places = self.places(x, keep, cache)
        for number, layer in enumerate(self.transformer.h):
            if self.recompute and self.training:
                x = checkpoint(layer, x, places, cache, number, use_reentrant=False)
            else:
                x = layer(x, places, cache, number)
        x = self.transformer.ln_f(x)
        return self.lm_head(x[:, -1:] if last else x).float()

    def embed(self, ids: Tensor, pixels: Tensor | None, slots: Tensor | None) -> Tensor:
        """(batch, time, hidden) with the rows of pictures in their places."""
        x = self.transformer.wte(ids)
        if pixels is None or slots is None or not len(pixels):
            return x
        rows = self.transformer.visual(pixels).flatten(0, 1).to(x.dtype)
        row, index = slots.flatten(0, 1).unbind(-1)
        return x.index_put((row, index), rows)

    def places(self, x: Tensor, keep: Tensor | None, cache: Cache | None) -> Places:
        """Angles, scales and mask of the tokens of ``x``."""
        sizes, time = self.sizes, x.shape[1]
        before = len(cache) if cache is not None else 0
        alpha = cache.alpha if cache is not None and before else self._alpha(time)
        if cache is not None:
            cache.alpha = alpha
        size = sizes.hidden // sizes.heads
        base = sizes.base * alpha ** (size / (size - 2))
        steps = torch.arange(0, size, 2, device=x.device).float() / size
        index = torch.arange(before, before + time, device=x.device)
        angles = index.float()[:, None] / base**steps
        angles = torch.cat((angles, angles), dim=-1)
        scale = None
        if sizes.logn and not self.training and before + time > sizes.trained:
            scale = torch.log((index + 1).float()) / math.log(sizes.trained)
            scale = scale.clamp(min=1)[:, None]  # of places up to the training length it is 1
        mask = None
        if keep is not None:
            seen = torch.ones(time, before + time, device=x.device).tril(before)
            mask = MASKED * (1 - keep[:, None, None, :].float() * seen)
        return Places(angles.cos(), angles.sin(), scale, mask)

    def _alpha(self, prompt: int) -> float:
        """What the rotary base grows by for a prompt longer than the training length."""
        if not self.sizes.ntk or self.training or prompt <= self.sizes.trained:
            return 1.0
        return max(2.0 ** math.ceil(math.log2(prompt / self.sizes.trained) + 1) - 1, 1.0)
