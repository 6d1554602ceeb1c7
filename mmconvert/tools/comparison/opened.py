"""One of two checkpoints that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmconvert.formats.model import Model
from mmconvert.plan.plan import Side
from mmconvert.sharding.layout import Layout


@dataclass(frozen=True)
class Opened:
    """One of the two.

    Attributes:
        path: as it was given.
        format: the name of its format.
        model: its table and sizes.
        side: its wholes, vision q, k and v interleaved.
        layout: of an MM checkpoint; None for others.
        iteration: of training, where it tells.
        training: see :class:`mmconvert.formats.base.StoredCheckpoint`.
    """

    path: Path
    format: str
    model: Model
    side: Side
    layout: Layout | None
    iteration: str
    training: Mapping[str, object] = field(default_factory=dict[str, object])
