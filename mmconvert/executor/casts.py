"""What casts have lost beyond rounding, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from mmconvert.names import number

SHOWN = 3  # tensors that a note names

# What --dtype says -> safetensors spelling of the dtype.
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


class Loss(NamedTuple):
    """Numbers of values of one tensor.

    Attributes:
        overflowed: finite values that became infinite.
        underflowed: values other than zero that became zero.
    """

    overflowed: int
    underflowed: int


LossByTensor = Mapping[str, Loss]  # of one job


class Losses:
    """Losses by tensor; adding is left to one thread."""

    def __init__(self) -> None:
        self.overflowed: Counter[str] = Counter()
        self.underflowed: Counter[str] = Counter()

    def add(self, found: LossByTensor) -> None:
        """Adds the losses of one job."""
        for name, loss in found.items():
            self.overflowed[name] += loss.overflowed
            self.underflowed[name] += loss.underflowed

    def merge(self, other: Losses) -> None:
        """Adds what another process has lost."""
        self.overflowed += other.overflowed
        self.underflowed += other.underflowed

    def notes(self) -> list[str]:
        """One warning for each kind of loss that happened."""
        kinds = [(self.overflowed, "overflowed to infinity"), (self.underflowed, "became zero")]
        return [_note(counts, what) for counts, what in kinds if counts.total()]

    def as_dict(self) -> dict[str, dict[str, int]]:
        """The losses as JSON: tensor -> number of values, for those that lost any."""
        kinds = {"overflowed": self.overflowed, "underflowed": self.underflowed}
        return {kind: {n: c for n, c in counts.items() if c} for kind, counts in kinds.items()}


def _note(counts: Counter[str], what: str) -> str:
    worst = [(name, count) for name, count in counts.most_common() if count]
    named = ", ".join(f"{name} ({count})" for name, count in worst[:SHOWN])
    more = f" and {len(worst) - SHOWN} more" if len(worst) > SHOWN else ""
    values, tensors = number(counts.total(), "value"), number(worst, "tensor")
    return f"warning: cast: {values} {what}, in {tensors}: {named}{more}"
