"""The one rank and scaling that an adapter has in MM format, whatever its layers have in PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp

from mmconvert.adapters import Settings
from mmconvert.errors import RequestError
from mmconvert.formats.peft.folder import LoraPair
from mmconvert.formats.peft.side import Packed, Uniform
from mmconvert.names import number, summarise


def uniform(found: Sequence[Packed], settings: Settings, *, fold: bool) -> Uniform:
    """The rank and the scaling of all layers.

    Args:
        fold: layers of lower rank are padded, and their scaling becomes a part of B.

    Raises:
        RequestError: layers of several ranks or scalings.
    """
    parts = [part for layer in found for part in layer.found]
    scales = {part.scale for part in parts}
    ranks = {part.rank for part in parts}
    rank = max(layer.rank for layer in found)
    several = len(scales) > 1 or len(ranks) > 1 or settings.rslora
    if several and fold:
        return Uniform(rank, _common_scale(parts, rank, settings))
    if several:
        what = f"ranks {sorted(ranks)}, scalings {sorted(filter(None, scales))}"
        raise RequestError(
            f"the adapter's layers have {what}"
            + (", by rslora" if settings.rslora else "")
            + "; MM format knows one lora_r and one lora_alpha, and scales by alpha / r",
            "one rank and one scaling for all layers",
            "give --cfg.fold_scaling True: lower ranks are padded, scalings become a part of B; or "
            "merge the adapter into the model (lora_merge)",
        )
    scale, own = scales.pop(), ranks.pop()
    while scale is not None and not float(scale * rank).is_integer() and rank % own:
        rank += 1
    return Uniform(rank, scale)


def _common_scale(parts: Sequence[LoraPair], rank: int, settings: Settings) -> float:
    """A scaling by which most B stay exact, and most of these as they are; alpha is whole."""
    own = [(settings.scale(part.path, part.rank), part) for part in parts]
    found = {scale for scale, _ in own} | {1.0}
    usable = [s for s in found if s and float(s * rank).is_integer()]

    def fit(scale: float) -> tuple[int, int, float]:
        exact = sum(is_exact(s / scale, part) for s, part in own)
        return exact, sum(s == scale for s, _ in own), -scale

    return max(usable, key=fit)


def is_exact(factor: float, part: LoraPair) -> bool:
    """Whether a factor changes exponents alone: a power of two, and none that makes fp16's small
    numbers smaller.
    """
    return abs(frexp(factor)[0]) in (0.0, 0.5) and (factor >= 1 or part.b.dtype != "F16")


def fold_notes(found: Sequence[Packed], of: Uniform) -> list[str]:
    """What folding did to which layers, in words."""
    parts = [part for layer in found for part in layer.found]
    scaled = [part for part in parts if of.factor(part) != 1]
    rounded = [part.path for part in scaled if not is_exact(of.factor(part), part)]
    padded = [layer for layer in found if layer.rank < of.rank]
    words: list[str] = []
    if padded and of.rank == max(part.rank for part in parts):  # else growth is told of
        words.append(
            f"warning: {number(padded, 'layer')} of lower rank padded to {of.rank}: the ranks "
            "added are zero, and stay so in further training"
        )
    if len(scaled) > len(rounded):
        count = number(range(len(scaled) - len(rounded)), "layer")
        words.append(f"B of {count} is multiplied with a power of two, which is exact")
    if rounded:
        words.append(
            f"warning: B of {number(rounded, 'layer')} is multiplied with its scaling and rounded "
            f"once: {summarise(rounded, 3)}"
        )
    return words
