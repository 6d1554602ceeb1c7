"""The loss of a training in fp16, scaled so that small gradients are not lost."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmconvert.errors import RequestError

# DynamicLossScaleUpdateCell of MindFormers' finetune_qwenvl_*.yaml.
START, FACTOR, WINDOW = 65536.0, 2.0, 1000


class LossScale:
    """Multiplies losses and divides gradients by a scale, that halves where these overflow.

    Args:
        enabled: else the scale is 1, and stays that.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._device, self._enabled = device, enabled
        self._scale: float = START if enabled else 1.0
        self._good = 0

    def times(self, loss: Tensor) -> Tensor:
        """A loss, scaled."""
        return loss * self._scale if self._enabled else loss

    def divide(self, learning: Sequence[nn.Parameter]) -> bool:
        """Brings gradients back to their size; whether all are numbers."""
        if not self._enabled:
            return True
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        for parameter in learning:
            if parameter.grad is not None:
                parameter.grad.div_(self._scale)
                finite &= parameter.grad.isfinite().all()
        return bool(finite)

    def learns(self, *, finite: bool) -> bool:
        """Whether an update is made; the scale follows.

        Raises:
            RequestError: gradients overflow without any scale.
        """
        if not self._enabled:
            return True
        if not finite:
            if self._scale <= 1:
                raise RequestError(
                    "gradients overflow in fp16 at every scale", "--dtype bf16 or fp32"
                )
            self._scale, self._good = self._scale / FACTOR, 0
            return False
        self._good += 1
        if self._good == WINDOW:
            self._scale, self._good = self._scale * FACTOR, 0
        return True

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self._scale, float(self._good)]

    def restore(self, state: object) -> None:
        """Takes over what :meth:`state` gave."""
        if self._enabled and isinstance(state, list):
            scale, good = cast("list[float]", state)
            self._scale, self._good = scale, int(good)
