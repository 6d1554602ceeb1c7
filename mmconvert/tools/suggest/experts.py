"""The expert-parallel size of a suggestion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmconvert.errors import LayoutError
from mmconvert.formats.mm.instances import experts_of
from mmconvert.formats.model import Model
from mmconvert.sharding.spans import divisors
from mmconvert.words import amount

if TYPE_CHECKING:
    from mmconvert.tools.suggest.suggestion import Goal

# Bytes of a parameter on each rank in training: bf16 weight and fp32 gradient, as Megatron holds
# them with a distributed optimizer, whose own 12 bytes are divided over the replicas.
STATE = 2 + 4
SHARE = 0.5  # of a device's memory that these may take; activations need the rest


def ep_sizes(model: Model, asked: int) -> list[int]:
    """The expert-parallel sizes to choose from, small ones first; empty without experts.

    Raises:
        LayoutError: a size that is asked for and does not divide the experts.
    """
    counts = [n for n in experts_of(model.modules, model.dims).values() if n]
    if not counts:
        if asked > 1:
            raise LayoutError(
                f"--ep is {asked}; {model.family.name} has no experts", "1", "leave the flag out"
            )
        return []
    good = [n for n in range(1, min(counts) + 1) if all(count % n == 0 for count in counts)]
    if not asked:
        return good
    if asked not in good:
        raise LayoutError(
            f"--ep is {asked}; {model.family.name} has {counts[0]} experts in a layer",
            f"a size that divides {counts[0]}: one of {divisors(counts[0])}",
            "leave it out: a size is proposed",
        )
    return [asked]


def about_ep(ep: int, most: int, expected: Goal) -> str:
    """Why this size, for people.

    Args:
        most: bytes of the fullest rank.
    """
    fits = most <= expected.device_memory * SHARE
    held = f"weights and gradients of the fullest rank take {amount(most)}"
    device = f"half of a device's {amount(expected.device_memory)}"
    if expected.ep:
        return f"with ep {ep} {held}" + ("" if fits else f", more than {device}")
    if not fits:
        return f"warning: even with ep {ep} {held}, more than {device}"
    return f"ep {ep} is the smallest size with which {held}, at most {device}"
