"""What validation measures, and the limits that it measures against."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Largest difference of logits that rounding explains, relative to the largest logit where that is
# above 1. fp32: one rank adds in transformers' order and has to agree almost to the bit; several
# ranks add partial sums in another order. bf16 keeps 8 bits of mantissa, so a value is rounded by
# 2**-9 of itself; with several ranks each row-parallel sum is rounded once more on each rank, and
# the roundings of some dozen layers add up to about 16 of them.
TOLERANCE = {
    ("fp32", False): 1e-5,
    ("fp32", True): 1e-4,
    ("bf16", False): 2**-8,
    ("bf16", True): 2**-5,
}
GRADIENTS = 10  # gradients pass through twice as many sums, and the smallest are differences


def finite(value: float) -> float | None:
    """A number as JSON has it: it knows no NaN and no infinity."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        found: the largest difference, relative as :data:`TOLERANCE` says.
        limit: what it may be.
        note: where it lies, or more of it.
    """

    name: str
    found: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; NaN is not."""
        return self.found <= self.limit

    def as_dict(self) -> dict[str, object]:
        """The check as JSON."""
        return {
            "check": self.name, "difference": finite(self.found), "limit": self.limit,
            "passed": self.passed, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True)
class Parting:
    """Where hidden states first differ.

    Attributes:
        label: module, layer and part of it.
        difference: the largest absolute difference there.
        size: the largest absolute value of transformers' there.
        ranks: the tp ranks where it is so.
    """

    label: str
    difference: float
    size: float
    ranks: list[int]

    def as_dict(self) -> dict[str, object]:
        """The place as JSON."""
        return {
            "where": self.label, "difference": finite(self.difference),
            "largest_value": finite(self.size), "tp_ranks": self.ranks,
        }  # fmt: skip


@dataclass(frozen=True)
class ValidationReport:
    """The outcome of a validation.

    Attributes:
        layout: in the words of the command line.
        inputs: what was computed on.
        checks: every comparison.
        parting: where hidden states part, if the model fails.
    """

    layout: str
    inputs: str
    dtype: str
    checks: list[Check]
    parting: Parting | None = None
    notes: list[str] = field(default_factory=list[str])

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """The report as JSON."""
        return {
            "passed": self.passed,
            "layout": self.layout,
            "inputs": self.inputs,
            "dtype": self.dtype,
            "checks": [check.as_dict() for check in self.checks],
            "first_difference": None if self.parting is None else self.parting.as_dict(),
            "notes": self.notes,
        }
