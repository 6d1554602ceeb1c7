"""The vision encoder of Qwen-VL and its resampler: a picture becomes 256 rows of the text model.

Modules have the hub's names (``transformer.visual``), so that a state dict fits as it is. The
numbers are those of the hub's ``visual.py`` and of MindFormers 1.3.1 ``research/qwenvl/qwenvl.py``,
which differ in one thing: how position tables are stretched to the grid of the patches.
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.runtime.qwenvl.sizes import GRID, HEAD, PATCH, QUERIES, Positions, Sizes

EPS = 1e-6  # of all norms
A = -0.75  # of the bicubic kernel
STEPS = 1024  # MindSpore's kernel takes its weights from a table of so many steps


def stretch(table: Tensor, patches: int, positions: Positions) -> Tensor:
    """A position table brought to another grid: bicubic, separable, edges repeated, in fp32.

    Args:
        table: (256, channels), a 16 x 16 grid by rows.
        patches: number of grid points asked for, a square.

    Returns:
        (patches, channels), in the table's dtype.
    """
    side = math.isqrt(patches)
    if side == GRID:
        return table
    weights = _bicubic(side, positions).to(table.device)
    grid = table.float().view(GRID, GRID, -1)
    found = torch.einsum("yr,xc,rcw->yxw", weights, weights, grid)
    return found.flatten(0, 1).to(table.dtype)


def _bicubic(side: int, positions: Positions) -> Tensor:
    """(side, 16) weights of the table's points for each point asked for.

    The hub's ``F.interpolate`` puts pixel centres at a half, MindSpore's op pixel 0 upon pixel 0.
    """
    weights = torch.zeros(side, GRID, dtype=torch.float64)
    for i in range(side):
        place = (i + 0.5) * GRID / side - 0.5 if positions == "hub" else i * GRID / side
        first = math.floor(place)
        part = place - first
        if positions == "mindformers":
            part = round(part * STEPS) / STEPS
        for offset in range(-1, 3):
            point = min(max(first + offset, 0), GRID - 1)
            weights[i, point] += _kernel(abs(part - offset))
    return weights.float()


def _kernel(x: float) -> float:
    if x <= 1:
        return ((A + 2) * x - (A + 3)) * x * x + 1
    return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A if x < 2 else 0.0


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(batch, time, heads * size) -> (batch, heads, time, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class VisionAttention(nn.Module):
    """Self-attention of a block; rows of ``in_proj`` are q, k, v of the first head, and so on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        packed = self.in_proj(x).unflatten(-1, (self.heads, 3, -1))
        q, k, v = (part.transpose(1, 2) for part in packed.unbind(-2))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisionBlock(nn.Module):
    """One layer of the encoder."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.width, EPS)
        self.attn = VisionAttention(sizes.width, sizes.vision_heads)
        self.ln_2 = nn.LayerNorm(sizes.width, EPS)
        self.mlp = VisionMLP(sizes.width, sizes.vision_inner)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionBlocks(nn.Module):
    """The layers, under the name that they have in the checkpoint."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(sizes) for _ in range(sizes.vision_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        for block in self.resblocks:
            x = block(x)
        return x


class CrossAttention(nn.Module):
    """The resampler's attention; rows of ``in_proj`` are all of q, of k, of v."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (batch, queries, width), k and v (batch, time, width) -> as q."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        heads = q.shape[-1] // HEAD
        q, k, v = (
            heads_of(F.linear(x, w, b), heads)
            for x, w, b in zip((q, k, v), weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """256 learnt queries look at the patches. Values have no positions; queries are as stored."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden
        self.positions: Positions = sizes.positions
        self.pos_embed = nn.Parameter(torch.empty(QUERIES, width))
        self.query = nn.Parameter(torch.empty(QUERIES, width))
        same = sizes.width == width
        self.kv_proj = nn.Identity() if same else nn.Linear(sizes.width, width, bias=False)
        self.attn = CrossAttention(width)
        self.ln_q = nn.LayerNorm(width, EPS)
        self.ln_kv = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, vision width) -> (batch, 256, hidden)."""
        x = self.ln_kv(self.kv_proj(x))
        q = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        return self.attn(q, x + stretch(self.pos_embed, x.shape[1], self.positions), x)


class Vision(nn.Module):
    """The whole encoder: pixels in, rows of the text model out."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.positions: Positions = sizes.positions
        self.positional_embedding = nn.Parameter(torch.empty(GRID * GRID, sizes.width))
        self.proj = nn.Parameter(torch.empty(sizes.hidden, sizes.hidden))
        self.conv1 = nn.Conv2d(3, sizes.width, PATCH, PATCH, bias=False)
        self.ln_pre = nn.LayerNorm(sizes.width, EPS)
        self.transformer = VisionBlocks(sizes)
        self.attn_pool = Resampler(sizes)
        self.ln_post = nn.LayerNorm(sizes.hidden, EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (n, 3, side, side), normalised -> (n, 256, hidden)."""
        x = self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = x + stretch(self.positional_embedding, x.shape[1], self.positions)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(self.attn_pool(x)) @ self.proj
