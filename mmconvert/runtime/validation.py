"""Is an MM checkpoint the model of an HF folder? Runs both on the same inputs and compares."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmconvert.names import number
from mmconvert.runtime import engine as engines
from mmconvert.runtime import reference
from mmconvert.runtime.batch import Batch, loss_sum
from mmconvert.runtime.choices import Ties, listening
from mmconvert.runtime.engine import Engine
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.generation import Generation, PromptBatch
from mmconvert.runtime.hfweights import Weights
from mmconvert.runtime.launch import Emit
from mmconvert.runtime.mmfiles import LoadableCheckpoint
from mmconvert.runtime.parameters import (
    compare_gradients,
    compare_weights,
    from_lead,
    gather,
    sample,
)
from mmconvert.runtime.verdict import GRADIENTS, TOLERANCE, Check, Parting, ValidationReport

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GREEDY = 20  # tokens that are generated on both sides


@dataclass(frozen=True)
class Validation:
    """The job of every process of a validation.

    Attributes:
        batch: one sample to compute on.
        tolerance: 0 takes the one of :data:`TOLERANCE`.
        adapter: PEFT's folder of the adapters that the checkpoint runs with.
    """

    arch: Architecture
    stored: LoadableCheckpoint
    hf_dir: Path
    batch: Batch
    inputs: str
    dtype: str
    tolerance: float
    adapter: Path | None = None

    def __call__(self, device: torch.device, emit: Emit) -> ValidationReport:
        """Compares; every process returns the same report."""
        dtype = DTYPES[self.dtype]
        run = engines.load(self.arch, self.stored, device, dtype)
        batch = self.batch.to(device)
        stages = number(run.mesh.stages, "stage")
        processes = number(self.stored.world, "process", "processes")
        emit(f"loaded {stages} on {processes}, {device}")
        sample(run)
        logits = run.logits([batch])[0]
        loss = run.train([batch])
        with listening(run) as choices:
            tokens = Generation(run).answer(PromptBatch(batch, GREEDY))[0]
        run.remember(False)  # what comes next has no past
        emit("computed; now transformers")
        model = weights = ties = None
        checks: list[Check] = []
        if run.mesh.lead:
            model, weights = reference.load_reference(
                self.arch, self.hf_dir, dtype, device, self.adapter
            )
            ties = Ties(self.arch.parts(model), choices, batch.ids.numel(), self._limit())
            checks = self._outputs(model, batch, logits, loss, tokens)
        checks = from_lead(checks)
        checks.append(self._gradients(run, model))
        checks.append(self._weights(run, model, weights))
        checks += self._void(run)
        parting = None
        if not all(check.passed for check in checks[:2]):
            emit("different; looking for the place")
            parting = find_parting(self.arch, run, model, batch, self._limit())
        notes = [
            f"both sides read {self.hf_dir / 'config.json'}: a wrong number in it alone, "
            "such as an epsilon or a rope_theta, makes no difference here"
        ]
        if self.arch.experts:
            notes.append("no auxiliary loss of routers is in the loss, on either side")
            notes += from_lead([] if ties is None else ties.note())
        layout = self.stored.layout.describe()
        return ValidationReport(layout, self.inputs, self.dtype, checks, parting, notes)

    def _limit(self) -> float:
        many = self.stored.layout.tp_folders * self.stored.layout.ep > 1
        return self.tolerance or TOLERANCE[self.dtype, many]

    def _outputs(
        self,
        model: Any,  # noqa: ANN401 - HF's model
        batch: Batch,
        logits: Tensor,
        loss: float,
        tokens: list[int],
    ) -> list[Check]:
        """Logits, loss and tokens, on process 0. Leaves gradients in the model."""
        their_logits = reference.forward(self.arch, model, batch)
        reference_loss = loss_sum(their_logits, batch.labels) / max(1, batch.learnt)
        reference_loss.backward()
        expected = float(reference_loss.detach())
        limit = self._limit()
        difference = (logits.float() - their_logits.detach().float()).abs()
        scale = max(1.0, float(their_logits.detach().abs().max()))
        place = int(difference.amax(-1).argmax())
        checks = [
            Check("logits", float(difference.max()) / scale, limit,
                  f"largest at position {place} of {batch.ids.shape[1]}"),
            Check("loss", abs(loss - expected) / max(1.0, expected), limit,
                  f"{loss:.6f}, transformers {expected:.6f}"),
        ]  # fmt: skip
        checks.append(self._tokens(model, batch, tokens, limit * scale))
        return checks

    def _tokens(
        self,
        model: Any,  # noqa: ANN401 - HF's model
        batch: Batch,
        ours: list[int],
        slack: float,
    ) -> Check:
        """The greedy tokens, one by one what transformers says behind those before it.

        Until the first difference that is what it would generate itself, in one pass.
        """
        said = reference.continued(self.arch, model, batch, ours)
        theirs = said.argmax(-1).tolist()
        same = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), GREEDY
        )
        if same == GREEDY:
            return Check("greedy tokens", 0.0, 0.0, f"{GREEDY} of {GREEDY} equal")
        margin = float(said[same, theirs[same]] - said[same, ours[same]])
        note = f"token {same}: {ours[same]}, transformers {theirs[same]}"
        if margin <= 2 * slack:  # both logits may be off by the tolerance
            return Check("greedy tokens", 0.0, 0.0, f"{note}, a tie: {margin:.1e} apart")
        return Check("greedy tokens", float(GREEDY - same), 0.0, note)

    def _gradients(self, run: Engine, model: Any) -> Check:  # noqa: ANN401 - HF's model
        """Gradients of the first and last layers and of what stands outside of layers."""
        found = compare_gradients(self.arch, run, model)
        worst, name = max(found, default=(0.0, ""))
        return Check(
            "gradients",
            worst,
            GRADIENTS * self._limit(),
            f"{len(found)} parameters; most at {name}",
        )

    def _weights(self, run: Engine, model: Any, weights: Weights | None) -> Check:  # noqa: ANN401 - HF's model
        """Every parameter, used by these inputs or not."""
        theirs = None if weights is None else weights.stored
        found = compare_weights(self.arch, run, model, theirs)
        worst, name = max(found)
        note = f"{len(found)} parameters" + (f"; most at {name}" if worst else "")
        limit = self.tolerance or TOLERANCE[self.dtype, False]  # no sum is in them
        return Check("weights", worst, limit, note)

    def _void(self, run: Engine) -> list[Check]:
        """The k biases that transformers has not: they change nothing, but would be lost."""
        most = 0.0
        for stage in run.stages:
            for _, parameter, part in stage.shard.void:
                most = max(most, float(part(parameter.detach()).abs().max()))
        most = max(gather(most))
        return (
            [Check("k biases that are zero", most, 0.0)]
            if any(gather(any(s.shard.void for s in run.stages)))
            else []
        )


# --------------------------------------------------------------------------- where they part
def find_parting(
    arch: Architecture,
    run: Engine,
    model: Any,  # noqa: ANN401 - HF's model
    batch: Batch,
    limit: float,
) -> Parting | None:
    """The first place, in the order of computing, where hidden states differ from transformers'."""
    held: dict[tuple[str, str], Tensor] = {}
    with _recorded([(p.hf, p.module) for s in run.stages for p in s.points], held):
        run.logits([batch])
    listed = [(s.number, i, p.label, p.hf) for s in run.stages for i, p in enumerate(s.points)]
    order = sorted({item for some in gather(listed) for item in some})
    theirs: dict[tuple[str, str], Tensor] = {}
    if run.mesh.lead:
        parts = arch.parts(model)
        with _recorded([(hf, parts.find(*hf)) for *_, hf in order], theirs), torch.no_grad():
            reference.forward(arch, model, batch)
    for _, _, label, hf in order:
        shape = from_lead(tuple(theirs[hf].shape) if hf in theirs else None)
        if shape is None:
            continue
        expected = theirs.get(hf, torch.empty(shape, device=run.mesh.device))
        dist.broadcast(expected, src=0)
        size, apart = float(expected.abs().max()), 0.0
        if hf in held:
            ours = held[hf].reshape(-1)
            same = ours.numel() == expected.numel()
            apart = float((ours - expected.reshape(-1)).abs().max()) if same else float("inf")
        apart = apart if apart == apart else float("inf")
        found = gather((apart, run.mesh.rank.tp))
        most = max(a for a, _ in found)
        bound = limit * max(1.0, size)
        if most > bound:
            ranks = sorted({tp for a, tp in found if a > bound})
            return Parting(label, most, size, ranks)
    return None


class _recorded:  # noqa: N801 - used as a function
    """Keeps the outputs of modules while it is open."""

    def __init__(
        self,
        modules: Sequence[tuple[tuple[str, str], nn.Module]],
        into: dict[tuple[str, str], Tensor],
    ) -> None:
        self._modules, self._into = modules, into

    def __enter__(self) -> None:
        self._hooks = [m.register_forward_hook(self._keeper(name)) for name, m in self._modules]

    def __exit__(self, *problem: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, name: tuple[str, str]) -> Any:  # noqa: ANN401 - a hook
        def keep(module: nn.Module, args: object, out: Any) -> None:  # noqa: ANN401 - tuple or tensor
            del module, args
            tensor = out[0] if isinstance(out, tuple) else out
            self._into[name] = tensor.detach().float().contiguous()

        return keep
