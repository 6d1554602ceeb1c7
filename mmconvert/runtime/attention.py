"""The packings of q, k and v in MM format, and the layers of transformers that they stand for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmconvert.errors import TensorError
from mmconvert.runtime.bind import Binder, even
from mmconvert.runtime.collectives import share
from mmconvert.runtime.parallel import View, whole


def separate_qkv(binder: Binder, attn: Any, groups: int, mm: str, hf: str) -> None:  # noqa: ANN401 - HF's attention
    """q_proj, k_proj, v_proj of a text layer: Megatron keeps them group by group.

    A query group is one K/V head with its queries; the packed rows are q, k, v of group 0, then
    of group 1, and so on. The canonical structure keeps the three apart.
    """
    even(groups, binder.group, f"query groups of {hf}")
    if f"{mm}.q_proj.weight" in binder.shard.left:
        for name in ("q_proj", "k_proj", "v_proj"):
            binder.column(attn, name, f"{mm}.{name}", f"{hf}.{name}")
        return
    by_group(binder, attn, ("q_proj", "k_proj", "v_proj"), groups, f"{mm}.linear_qkv", hf)


def head_qkv(binder: Binder, attn: Any, names: tuple[str, str, str], mm: str, hf: str) -> None:  # noqa: ANN401 - as above
    """Separate q, k, v of an encoder, packed head by head; the number of heads becomes local."""
    heads = attn.num_heads
    even(heads, binder.group, f"heads of {hf}")
    by_group(binder, attn, names, heads, mm, hf)
    attn.num_heads = heads // binder.group.size


def by_group(
    binder: Binder,
    attn: Any,  # noqa: ANN401 - HF's module
    names: tuple[str, str, str],
    groups: int,
    mm: str,
    hf: str,
) -> None:
    """Three linear layers in one tensor, interleaved by groups of rows."""
    mine = share(groups, binder.group)
    local = mine.stop - mine.start
    heights = [getattr(attn, name).out_features // groups for name in names]
    height = sum(heights)
    parts: dict[str, tuple[View, View]] = {}
    start = 0
    for name, rows in zip(names, heights, strict=True):
        some = slice(start, start + rows)
        span = slice(mine.start * rows, mine.stop * rows)

        def part(t: Tensor, some: slice = some) -> Tensor:
            return t.view(local, height, *t.shape[1:])[:, some].flatten(0, 1)

        def own(t: Tensor, span: slice = span) -> Tensor:
            return t[span]

        parts[f".{name}"] = (part, own)
        start += rows
    pieces = {f".{name}": (attn, name) for name in names}
    biased = next((n for n in names if getattr(attn, n).bias is not None), None)
    first = f".{biased}" if biased else f".{names[0]}"
    ordered = {first: pieces[first], **pieces}
    binder.packed(ordered, mm, hf, local * height, parts)


def packed_qkv(binder: Binder, attn: Any, mm: str, hf: str) -> None:  # noqa: ANN401 - as above
    """One linear layer q, k, v of all heads: Megatron keeps its rows head by head.

    The canonical structure keeps q, k and v of a rank's heads one below the other instead.
    """
    heads, linear = attn.num_heads, attn.qkv
    even(heads, binder.group, f"heads of {hf}")
    mine = share(heads, binder.group)
    local, size = mine.stop - mine.start, linear.out_features // (3 * heads)

    def part(t: Tensor) -> Tensor:
        return t.view(local, 3, size, *t.shape[1:]).transpose(0, 1).flatten(0, 2)

    def own(t: Tensor) -> Tensor:
        return t.view(3, heads, size, *t.shape[1:])[:, mine].flatten(0, 2)

    view = whole if binder.shard.canonical else part
    binder.packed({"": (attn, "qkv")}, mm, hf, 3 * local * size, {"": (view, own)})
    attn.num_heads = local


def per_head_qkv(binder: Binder, attn: Any, mm: str, hf: str) -> None:  # noqa: ANN401 - as above
    """q_proj, k_proj, v_proj of InternViT: a rank has q, k and v of its heads one below the other.

    25 heads (6B) are shared unevenly, and nothing is interleaved.
    """
    heads, names = attn.num_heads, ("q_proj", "k_proj", "v_proj")
    size = attn.q_proj.out_features // heads
    mine = share(heads, binder.group)
    rows = (mine.stop - mine.start) * size
    if rows == 0:
        raise TensorError(f"{heads} heads of {hf} for {binder.group.size} ranks", "a head for each")
    parts: dict[str, tuple[View, View]] = {}
    for i, name in enumerate(names):
        some, span = slice(i * rows, (i + 1) * rows), slice(mine.start * size, mine.stop * size)

        def part(t: Tensor, some: slice = some) -> Tensor:
            return t[some]

        def own(t: Tensor, span: slice = span) -> Tensor:
            return t[span]

        parts[f".{name}"] = (part, own)
    binder.packed({f".{n}": (attn, n) for n in names}, mm, hf, 3 * rows, parts)
    attn.num_heads, attn.embed_dim = mine.stop - mine.start, rows
