"""The learning rate of each step, as Megatron's scheduler has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Style = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes (megatron/core/optimizer_param_scheduler.py, 0.12).

    The first step has the rate of step 0 of the warm-up, so a warm-up from 0 does not move the
    weights in it; ``least`` is reached one step after the last.

    Attributes:
        rate: the highest.
        least: where it ends.
        warmup: steps in which it rises, not rounded.
        start: where the warm-up starts.
        steps: steps until ``least``, the warm-up among them.
        style: the way down.
    """

    rate: float
    least: float
    warmup: float
    steps: int
    start: float = 0.0
    style: Style = "cosine"

    def at(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        if self.warmup > 0 and step <= self.warmup:
            return self.start + (self.rate - self.start) * step / self.warmup
        if self.style == "constant":
            return self.rate
        if step > self.steps:
            return self.least
        done = (step - self.warmup) / max(1e-9, self.steps - self.warmup)
        left = 1 - done if self.style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.least + (self.rate - self.least) * left
