"""Fine-tuning of MM checkpoints: what each process learns, evaluates and saves."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmconvert.adapters import MM_A
from mmconvert.formats.mm.optimizer.order import registered
from mmconvert.names import number
from mmconvert.runtime import engine as engines
from mmconvert.runtime import iterations
from mmconvert.runtime.agreement import agree
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.checking import BackgroundCheck
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.dataset import Feed, SampleOrder, Share
from mmconvert.runtime.experts import about_routers
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.freezing import freeze, freeze_base
from mmconvert.runtime.launch import Emit
from mmconvert.runtime.loop import Known, Loop, ProcessPlace, check_numbers
from mmconvert.runtime.lora import LoraPlan, arguments, kept
from mmconvert.runtime.media import Media
from mmconvert.runtime.mmfiles import LoadableCheckpoint
from mmconvert.runtime.optimizer import Optimizer
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.stopping import Stop
from mmconvert.runtime.trainplan import FLAGS, Start, TrainingOutcome, TrainingPlan
from mmconvert.runtime.validation import DTYPES
from mmconvert.sharding.layout import Rank


@dataclass(frozen=True)
class Training:
    """The job of every process of a fine-tuning."""

    arch: Architecture
    stored: LoadableCheckpoint
    hf_dir: Path
    train: Sequence[Sample]
    check: Sequence[Sample]
    plan: TrainingPlan
    dtype: str
    start: Start
    prepare: Prepare = field(default_factory=Prepare)
    strict: bool = False

    stops_gently = True  # a SIGTERM is passed on to it, and it ends by itself

    def __call__(self, device: torch.device, emit: Emit) -> TrainingOutcome:
        """Trains; emits notes and lines."""
        plan = self.plan
        wants = {FLAGS.get(key, key): value for key, value in plan.settings().items()}
        wants |= {"--train_iters": plan.steps, "--dtype": self.dtype, "--resume": self.start}
        wants |= {"--save_interval": plan.save_every, "--eval_interval": plan.evaluate_every}
        wants |= {"the number of samples": len(self.train), "the replicas": plan.replicas}
        folders = {"--save": plan.save, "--hf_dir": self.hf_dir, "--mm_dir": self.stored.folder}
        agree(wants, folders)
        stop = Stop()
        with stop.listening():
            return TrainingRun(self, device, emit, stop).train()


class TrainingRun:
    """A fine-tuning under way in this process."""

    def __init__(self, job: Training, device: torch.device, emit: Emit, stop: Stop) -> None:
        plan = job.plan
        self._job, self._plan, self._emit, self._stop = job, plan, emit, stop
        torch.manual_seed(plan.seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        run = engines.load(job.arch, job.stored, device, DTYPES[job.dtype], plan.replicas)
        learning = freeze_base(run) if plan.lora is not None else freeze(run, plan.frozen)
        for stage in run.stages:
            stage.recompute(plan.recompute)
        self._run, self._optimizer = run, Optimizer(run, plan.recipe)
        self._origin = 0  # the iteration that the schedule starts from
        self._first = self._take_up() if job.start.resumed else 0
        run.extras = {}  # they keep the file they came from in memory
        copies = f" in {plan.replicas} replicas" if plan.replicas > 1 else ""
        emit(
            f"{number(run.mesh.stages, 'stage')} on "
            f"{number(dist.get_world_size(), 'process', 'processes')}{copies}, {device}; "
            f"{number(learning, 'tensor learns', 'tensors learn')}"
        )
        if job.arch.experts:
            emit(about_routers(job.arch.text_config))
        speaker = Speaker(job.arch, job.hf_dir, job.prepare)
        mesh = run.mesh
        share = Share(mesh.replica, mesh.replicas)

        def feed(
            samples: Sequence[Sample], order: SampleOrder, seed: int, say: Emit | None
        ) -> Feed:
            return Feed(
                speaker, samples, plan.size, plan.count, order, seed, share, say,
                strict=job.strict, threads=plan.workers,
            )  # fmt: skip

        self._feed = feed(job.train, plan.order, plan.seed, None)  # of all replicas: the loop's
        self.bad = self._feed.bad
        self._check = feed(job.check, "once", 0, emit) if job.check else None
        self.evaluates = self._check is not None

    def train(self) -> TrainingOutcome:
        """All steps, or as many as there is time for."""
        job, mesh = self._job, self._run.mesh
        told = frozenset(i for i, sample in enumerate(job.train) if sample.fault)
        place = ProcessPlace(
            mesh.device, mesh.lead, mesh.rank == Rank(0), dist.get_world_size() // mesh.replicas
        )
        look = Media(job.arch, job.hf_dir, job.prepare).look
        loop = Loop(
            self._plan, self, place, self._first, self._emit, self._stop,
            Known(told, job.strict), BackgroundCheck(job.train, self._feed.first_pass(), look),
        )  # fmt: skip
        return loop.train()

    def read(self, step: int) -> list[Batch]:
        """The micro-batches of this replica in a step."""
        return self._feed.step(step)

    def tokens(self, step: int) -> int:
        """Tokens of these, padding not counted."""
        return self._feed.tokens(step)

    def update(self, step: int, batches: list[Batch]) -> tuple[float, float, float]:
        """(loss, learning rate, gradient norm) of an update."""
        run = self._run
        loss = run.train([batch.to(run.mesh.device) for batch in batches], self._plan.loss)
        norm = self._optimizer.norm()
        check_numbers(step, loss, norm)  # before the weights are lost too
        return loss, self._optimizer.step(step - self._origin, norm), norm

    def evaluate(self) -> float:
        """Mean loss over the validation data, or its first batches."""
        check = self._check
        assert check is not None  # noqa: S101 - it evaluates
        total = counted = 0.0
        for step in range(min(check.steps, self._plan.evaluate_steps)):
            batches = [batch.to(self._run.mesh.device) for batch in check.step(step)]
            loss, count = self._run.loss(batches, self._plan.loss)
            total, counted = total + loss, counted + count
        if (group := self._run.mesh.data) is not None:
            both = torch.tensor([total, counted], device=self._run.mesh.device)
            dist.all_reduce(both, group=group)
            total, counted = both.tolist()
        return total / max(1.0, counted)

    # -------------------------------------------------------------------------------- saving
    def write(self, number: int) -> Path:
        """Writes the checkpoint of an iteration: whole, or not at all; its folder."""
        plan, mesh, layout = self._plan, self._run.mesh, self._job.stored.layout
        content: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": number}
        for virtual, stage in enumerate(self._run.stages):
            tree = {name: p.detach().cpu() for name, p in stage.shard.tree.state_dict().items()}
            tree = {name: tree[name] for name in registered(tree)}
            content[layout.part(virtual)] = tree if plan.lora is None else kept(tree)
        if plan.lora is not None:
            content["args"] = self._arguments(plan.lora)
        content["training"] = self._settings()
        if plan.save_optimizer:
            state = self._optimizer.state()
            content |= {} if state is None else {"optimizer": state}
            batch = plan.size * plan.count
            content["opt_param_scheduler"] = self._optimizer.scheduled(
                number - self._origin, batch, plan.steps
            )
        if mesh.lead:
            iterations.begin(plan.save, number)
        dist.barrier()
        if mesh.replica == 0:
            iterations.write_rank(plan.save, number, layout, mesh.rank, content)
        dist.barrier()
        if mesh.lead:
            iterations.finish(plan.save, number)
        return iterations.iteration_folder(plan.save, number)

    def _arguments(self, lora: LoraPlan) -> Namespace:
        names = [name for name, _, _ in self._run.parameters() if name.endswith(MM_A)]
        trained = [name.removesuffix(MM_A) for name in names]
        return arguments(lora, trained, str(self._job.stored.folder))

    def _settings(self) -> dict[str, Any]:
        """What decides the curve: the plan, the dtype and the samples."""
        said = [[list(s.messages), [f.name for f in s.files()]] for s in self._job.train]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        samples = f"{number(said, 'sample')} ({digest})"
        prepare = asdict(self._job.prepare)
        settings = {**self._plan.settings(), "dtype": self._job.dtype, "samples": samples}
        return {**settings, "prepare": json.dumps(prepare)}

    def _take_up(self) -> int:
        """Restores the optimizer; the iteration to go on from."""
        emit, number = self._emit, self._job.stored.iteration
        state = self._run.extras.get("optimizer")
        if not self._job.start.optimizer:
            self._origin = number
            emit("the moments start at zero, the schedule at its first step (--no_load_optim)")
        elif state is not None or not self._optimizer.named:
            self._optimizer.restore(state)
        else:
            emit("warning: the checkpoint has no optimizer state; its moments start at zero")
        before = self._run.extras.get("training")
        if isinstance(before, dict):
            for key, value in self._settings().items():
                if key in before and before[key] != value:
                    emit(f"warning: {FLAGS[key]} was {before[key]} and is {value}: another curve")
        else:
            emit(
                "warning: the checkpoint does not say how it was trained: settings that have "
                "changed since are not reported"
            )
        emit(f"going on from iteration {number}")
        return number
