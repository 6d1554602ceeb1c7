"""The averages that a training can minimise: what each learnt token counts.

z is the cross entropy of one token. ``default`` averages z in each micro-batch and takes the mean
over micro-batches; ``per_sample`` averages in each sample first; ``per_token`` is the mean over
all learnt tokens of the global batch. They are MindSpeed-MM's (``--calculate-per-sample-loss``,
``--calculate-per-token-loss``).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.runtime.batch import IGNORED

LossType = Literal["default", "per_sample", "per_token"]


def weights(labels: Tensor, kind: LossType) -> Tensor:
    """What each token counts in its micro-batch: (batch, time) labels -> (batch, time - 1)."""
    learnt = (labels[:, 1:] != IGNORED).float()
    if kind == "default":
        return learnt / learnt.sum().clamp(min=1)
    if kind == "per_sample":
        return learnt / learnt.sum(1, keepdim=True).clamp(min=1) / len(labels)
    return learnt


def size(labels: Tensor, kind: LossType) -> int:
    """What a micro-batch counts among the others: one, or its learnt tokens."""
    return int((labels[:, 1:] != IGNORED).sum()) if kind == "per_token" else 1


def weighted(logits: Tensor, labels: Tensor, kind: LossType) -> Tensor:
    """The loss of a micro-batch, not yet divided by the sizes of all.

    Args:
        logits: (batch, time, vocabulary).
        labels: (batch, time).
    """
    flat = logits[:, :-1].float().flatten(0, 1)
    each = F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    return (each * weights(labels, kind).flatten()).sum()
