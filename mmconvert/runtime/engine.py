"""Runs a loaded checkpoint: forward and training step over its own layout."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from mmconvert.runtime import losses as averages
from mmconvert.runtime import mesh as meshes
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.border import Border
from mmconvert.runtime.collectives import sum_over
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.losses import LossType
from mmconvert.runtime.mesh import Mesh
from mmconvert.runtime.mmfiles import LoadableCheckpoint, chunk_tensors, read_rank
from mmconvert.runtime.packed import PartOf
from mmconvert.runtime.pipeline import LossFunction, pipeline_stage, schedule
from mmconvert.runtime.stage import Stage


class Engine:
    """One process's part of a model in its parallel layout.

    Attributes:
        stages: the model chunks of this pipeline rank.
        mesh: this process among the others.
    """

    def __init__(
        self, arch: Architecture, stored: LoadableCheckpoint, mesh: Mesh, dtype: torch.dtype
    ) -> None:
        self.arch, self.mesh, self.dtype = arch, mesh, dtype
        self.stored = stored
        layout = stored.layout
        content = read_rank(stored, mesh.rank)
        self.extras = {k: v for k, v in content.items() if not k.startswith("model")}
        self.stages: list[Stage] = []
        for virtual in range(layout.vpp_size):
            part = layout.part(virtual)
            where = f"{layout.folder(mesh.rank)} {part}"
            number = virtual * layout.pp_size + mesh.rank.pp
            tensors = chunk_tensors(content, part)
            rows = stored.vocabulary
            self.stages.append(Stage(arch, mesh, number, tensors, dtype, where, rows, stored.lora))
        self.border = Border(arch, layout, dtype)
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._tie()

    def _tie(self) -> None:
        """Finds the copies of a tied word embedding: their gradients belong together."""
        self.embedding = next(
            (s.text.embedding for s in self.stages if s.text and s.text.span.first), None
        )
        self.head = next(
            (s.text.head_weight for s in self.stages if s.text and s.text.span.last), None
        )

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, Stage]]:
        """Every parameter once, with its MM name and stage."""
        for stage in self.stages:
            for name, parameter in stage.shard.tree.named_parameters():
                yield name, parameter, stage

    # -------------------------------------------------------------------------- computing
    def logits(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Logits (batch, time, vocabulary) of each micro-batch, on every process."""
        with torch.no_grad():
            outs = self._run(batches, None, None)
        found: list[Tensor] = []
        vocab = self.arch.text_config.vocab_size
        for i, batch in enumerate(batches):
            shape = (*batch.ids.shape, vocab)
            out = outs[i] if outs else torch.empty(shape, dtype=self.dtype, device=self.mesh.device)
            out = out.contiguous()
            self.mesh.share_from_last(out)
            found.append(out)
        return found

    def last_logits(self, batch: Batch) -> Tensor | None:
        """(rows, vocabulary) of what follows a batch, on the last pipeline rank; else None."""
        with torch.no_grad():
            outs = self._run([replace(batch, last=True)], None, None)
        return outs[0][:, -1] if outs else None

    def remember(self, keep: bool) -> None:
        """Begins or drops the KV caches of all stages."""
        for stage in self.stages:
            both = keep and stage.text is not None
            stage.cache = transformers.DynamicCache() if both else None

    def only_answer(self) -> None:
        """Gives up what only learning and saving need; packed rows are put as they compute."""
        self.extras = {}
        for stage in self.stages:
            stage.shard.tree = nn.Module()
            stage.shard.bindings, stage.shard.void = [], []
            for layer in stage.modules():
                if isinstance(layer, PartOf):
                    layer.unpack()

    def loss(self, batches: Sequence[Batch], kind: LossType = "per_token") -> tuple[float, float]:
        """Loss of this replica's micro-batches, without gradients, and what they count.

        Their quotient is the average; both may be added up over many calls.
        """
        total = torch.zeros((), device=self.mesh.device)
        with torch.no_grad():
            outs = self._run(batches, None, None)
            for out, batch in zip(outs, batches, strict=False):
                if batch.learnt:
                    total += averages.weighted(out, batch.labels, kind)
        self.mesh.share_from_last(total)
        return float(total), sum(averages.size(b.labels, kind) for b in batches if b.learnt)

    def train(self, batches: Sequence[Batch], kind: LossType = "per_token") -> float:
        """Mean loss over all replicas, with gradients (:meth:`gradient`) ready for an optimizer.

        Args:
            batches: this replica's micro-batches, as many as the others'; of one shape
                (:func:`mmconvert.runtime.batch.alike`).
        """
        for _, parameter, _ in self.parameters():
            parameter.grad = None
        for held in self._sums.values():
            held.zero_()
        count = self._count(sum(averages.size(b.labels, kind) for b in batches), kind)
        losses: list[Tensor] = []

        def mean(logits: Tensor, index: Tensor) -> Tensor:
            return averages.weighted(logits, batches[int(index)].labels, kind) / count

        self._run(batches, mean, losses)
        total = torch.zeros((), device=self.mesh.device)
        for one in losses:
            total += one.detach()
        self.mesh.share_from_last(total)
        self._settle()
        if self.mesh.data is not None:
            dist.all_reduce(total, group=self.mesh.data)
        return float(total)

    def _count(self, mine: int, kind: LossType) -> int:
        """What the micro-batches of all replicas count."""
        if self.mesh.data is None or kind != "per_token":
            return max(1, mine * self.mesh.replicas)
        total = torch.tensor(mine, device=self.mesh.device)
        dist.all_reduce(total, group=self.mesh.data)
        return max(1, int(total))

    # -------------------------------------------------------------------------- gradients
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of all micro-batches: ``grad``, or its sum in fp32."""
        held = self._sums.get(parameter)
        return parameter.grad if held is None else held

    def sum_in_fp32(self) -> None:
        """Adds gradients of coarser parameters up in fp32, micro-batch by micro-batch."""

        def add(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)  # noqa: S101 - they alone have the hook
            assert parameter.grad is not None  # noqa: S101 - it has just been made
            self._sums[parameter].add_(parameter.grad)
            parameter.grad = None

        for _, parameter, _ in self.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                self._sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
                parameter.register_post_accumulate_grad_hook(add)

    def _settle(self) -> None:
        """Makes gradients whole: tied copies, replicas; and those zero that must stay so."""
        for _, parameter, _ in self.parameters():
            if parameter.requires_grad and self.gradient(parameter) is None:
                parameter.grad = torch.zeros_like(parameter)
        for stage in self.stages:
            for _, parameter, part in stage.shard.void:
                if (grad := self.gradient(parameter)) is not None:
                    part(grad).zero_()
        if self.arch.tied:
            self._sum_tied()
        if self.mesh.data is not None:
            found = [self.gradient(p) for _, p, _ in self.parameters()]
            sum_over([grad for grad in found if grad is not None], self.mesh.data)

    def _sum_tied(self) -> None:
        first, last = self.embedding, self.head
        if first is last and first is not None:
            return
        grads = [self.gradient(p) for p in (first, last) if p is not None]
        mine = [grad for grad in grads if grad is not None]
        group = self.mesh.tied
        if len(mine) == 2:  # both copies here, in two chunks
            mine[0].add_(mine[1])
            mine[1].copy_(mine[0])
        elif mine and group is not None:
            dist.all_reduce(mine[0], group=group)

    def _run(
        self, batches: Sequence[Batch], loss: LossFunction | None, losses: list[Tensor] | None
    ) -> list[Tensor]:
        """Runs all micro-batches; the logits of each on the last pipeline rank, else nothing."""
        for stage in self.stages:
            stage.batches = batches
        if self.mesh.layout.pp_size == 1:
            return self._run_alone(batches, loss, losses)
        count, grad = len(batches), loss is not None
        pipe = [
            pipeline_stage(stage, self.mesh, self.border, batches[0], grad) for stage in self.stages
        ]
        order = schedule(pipe, self.mesh, count, loss)
        index = torch.arange(count)
        first = (index,) if self.mesh.rank.pp == 0 else ()
        last = self.mesh.rank.pp == self.mesh.layout.pp_size - 1
        if loss is not None:
            order.step(
                *first,
                mb=index,
                target=index if last else None,
                losses=losses,
                return_outputs=False,
            )
            return []
        order.step(*first, mb=index)
        return list(pipe[-1].output_chunks) if last else []

    def _run_alone(
        self, batches: Sequence[Batch], loss: LossFunction | None, losses: list[Tensor] | None
    ) -> list[Tensor]:
        outs: list[Tensor] = []
        for i in range(len(batches)):
            index = torch.tensor([i])
            out: Any = (index,)
            for stage in self.stages:
                out = stage(*(out if isinstance(out, tuple) else (out,)), mb=index)
            if loss is None:
                outs.append(out)
                continue
            one = loss(out, index)
            one.backward()
            assert losses is not None  # noqa: S101 - goes with the loss
            losses.append(one)
        return outs


def load(
    arch: Architecture,
    stored: LoadableCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
    replicas: int = 1,
) -> Engine:
    """Loads this process's rank file; every process of the run calls this."""
    return Engine(arch, stored, meshes.build(stored.layout, device, replicas), dtype)


def load_folder(hf_dir: Path, mm_dir: Path) -> tuple[Architecture, LoadableCheckpoint]:
    """The model and the layout of a checkpoint; reads no weights."""
    from mmconvert.runtime.families import architecture
    from mmconvert.runtime.mmfiles import find

    arch = architecture(hf_dir)
    return arch, find(mm_dir, arch)
