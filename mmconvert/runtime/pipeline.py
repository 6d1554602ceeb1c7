"""Torch's pipelines over our stages: shapes said beforehand, and the order of micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from mmconvert.runtime.batch import Batch
from mmconvert.runtime.border import Border
from mmconvert.runtime.mesh import Mesh
from mmconvert.runtime.stage import Stage

LossFunction = Callable[[Tensor, Tensor], Tensor]


def pipeline_stage(
    stage: Stage, mesh: Mesh, border: Border, batch: Batch, grad: bool
) -> PipelineStage:
    """A stage with its shapes said beforehand: finding them out would run it once more.

    Args:
        batch: any of the micro-batches, which all have one shape.
        grad: whether gradients travel back.
    """
    number, count = stage.number, mesh.stages
    if number:
        received = border.metas(number - 1, batch, grad)
    else:
        received = (torch.empty(1, dtype=torch.int64, device="meta"),)
    sent = border.metas(number, batch, grad)
    return PipelineStage(
        stage, number, count, mesh.device, input_args=received, output_args=sent, group=mesh.pipe
    )


def schedule(pipe: list[PipelineStage], mesh: Mesh, count: int, loss: LossFunction | None) -> Any:  # noqa: ANN401 - two kinds
    """1F1B and its interleaved form for training where the counts allow, GPipe's order else.

    Args:
        pipe: the stages of this pipeline rank.
        count: number of micro-batches.
        loss: of one micro-batch's logits and its index; None computes no loss.
    """
    ranks = mesh.layout.pp_size
    if len(pipe) == 1:
        kind = Schedule1F1B if loss is not None and count >= ranks else ScheduleGPipe
        return kind(pipe[0], count, loss_fn=loss, scale_grads=False)
    fits = count % max(1, count // ranks) == 0
    many: Any = ScheduleInterleaved1F1B if loss is not None and fits else ScheduleLoopedBFS
    return many(pipe, count, loss_fn=loss, scale_grads=False)
