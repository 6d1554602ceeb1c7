"""Fine-tuning: the loop of steps, evaluations and checkpoints that every process runs."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist

from mmconvert.adapters import MM_A
from mmconvert.errors import DatasetError, MMConvertError, RequestError
from mmconvert.names import number
from mmconvert.runtime import engine as engines
from mmconvert.runtime import mmfiles
from mmconvert.runtime.agreement import agree
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.checking import Inspection
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.dataset import Feed, Order, Share
from mmconvert.runtime.experts import about_routers
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.journal import Interval, Line, TrainingLog
from mmconvert.runtime.launch import Emit
from mmconvert.runtime.lora import LoraPlan, arguments, kept
from mmconvert.runtime.losses import LossType
from mmconvert.runtime.media import Media
from mmconvert.runtime.mmfiles import LoadableCheckpoint
from mmconvert.runtime.optimizer import Optimizer, Recipe, freeze, freeze_base
from mmconvert.runtime.parameters import gather
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.validation import DTYPES
from mmconvert.sharding.layout import Rank

SAVE_EVERY = 1800.0  # seconds between checkpoints where no interval is given
# Settings by the names of their flags.
FLAGS = {
    "rate": "--lr", "least": "--min_lr", "warmup": "the warm-up", "start": "--lr_warmup_init",
    "steps": "--train_iters or --lr_decay_iters", "style": "--lr_decay_style",
    "decay": "--weight_decay", "beta1": "--adam_beta1", "beta2": "--adam_beta2",
    "epsilon": "--adam_eps", "clip": "--clip_grad", "size": "--micro_batch_size",
    "count": "the number of micro-batches", "seed": "--seed", "frozen": "--freeze",
    "dtype": "--dtype", "samples": "the training data", "loss": "--loss_type",
    "order": "--order", "lora": "--lora_r, --lora_alpha or --lora_target_modules",
    "prepare": "how samples are prepared",
}  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """What a fine-tuning does.

    Attributes:
        save: the folder of checkpoints.
        steps: the last iteration.
        save_every: iterations between checkpoints; 0 for the last alone, None for every
            :data:`SAVE_EVERY` seconds.
        evaluate_every, log_every: in iterations; 0 for never.
        evaluate_steps: global batches of an evaluation at most.
        size: samples of a micro-batch.
        count: micro-batches of a step, over all replicas.
        frozen: beginnings of MM names that do not learn.
        recompute: compute each layer's inside again in the backward pass, to save memory: of all
            modules, or of some by their keys.
        replicas: copies of the model that share the micro-batches of a step.
        workers: threads of each process that encode samples ahead of their step.
        lora: what is adapted, if adapters alone learn.
        log_axis: the picture of the losses has a logarithmic axis.
    """

    save: Path
    steps: int
    save_every: int | None
    evaluate_every: int
    evaluate_steps: int
    log_every: int
    size: int
    count: int
    seed: int
    frozen: tuple[str, ...]
    save_optimizer: bool
    recipe: Recipe
    loss: LossType = "default"
    order: Order = "epoch"
    recompute: bool | frozenset[str] = False
    replicas: int = 1
    workers: int = 1
    lora: LoraPlan | None = None
    log_axis: bool = False

    def evaluates(self, iteration: int) -> bool:
        """Whether there is an evaluation after an iteration: at its turn, and after the last."""
        every = self.evaluate_every
        return bool(every) and (iteration % every == 0 or iteration == self.steps)

    def settings(self) -> dict[str, Any]:
        """What decides the curve, beside data and dtype: must be the same after a restart."""
        recipe = asdict(self.recipe)
        del recipe["sharded"]
        return {
            **recipe.pop("schedule"), **recipe, "size": self.size, "count": self.count,
            "seed": self.seed, "frozen": list(self.frozen), "loss": self.loss,
            "order": self.order, "lora": None if self.lora is None else self.lora.settings(),
        }  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Attributes:
        resumed: go on from a numbered checkpoint, at its iteration.
        optimizer: take over its optimizer and its place in the schedule.
    """

    resumed: bool = False
    optimizer: bool = True


class Stop:
    """Whether somebody has asked this process to stop, by SIGTERM."""

    asked = False

    @contextmanager
    def listening(self) -> Generator[None]:
        """Notes the signal while it is open, for the end of the step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda number, frame: self._note())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self) -> None:
        self.asked = True


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


@dataclass(frozen=True)
class TrainingOutcome:
    """How a training ended.

    Attributes:
        loss: of the last step.
        iteration: the last one that is done.
        stopped: whether it was asked to stop.
    """

    loss: float
    iteration: int
    stopped: bool


class Agreed(NamedTuple):
    """What all processes know after a step.

    Attributes:
        stop: one of them was asked to stop.
        late: the last checkpoint is old.
        due: it is time for one.
    """

    stop: bool
    late: bool
    due: bool


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
        self._rolling = 0  # the last checkpoint that the clock made
        self._tokens = self._next_tokens = 0
        self._ahead: list[Batch] | MMConvertError = []
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
        self._left_out = 0  # samples, counted by each replica for itself
        self._told = {i for i, sample in enumerate(job.train) if sample.fault}

        def feed(samples: Sequence[Sample], order: Order, seed: int, say: Emit | None) -> Feed:
            return Feed(
                speaker, samples, plan.size, plan.count, order, seed, share, say,
                strict=job.strict, threads=plan.workers,
            )  # fmt: skip

        self._feed = feed(job.train, plan.order, plan.seed, None)  # of all replicas: _agree
        self._check = feed(job.check, "once", 0, emit) if job.check else None
        self._journal = TrainingLog(plan.save, self._first, plan.log_axis) if mesh.lead else None
        self._saved, self._clock = self._first, time.monotonic()
        media = Media(job.arch, job.hf_dir, job.prepare)
        self._inspection = Inspection(job.train, self._feed.first_pass(), media.look)
        if mesh.lead:
            self._inspection.start()

    def train(self) -> TrainingOutcome:
        """All steps, or as many as there is time for."""
        try:
            return self._steps()
        finally:
            self._inspection.end()

    def _steps(self) -> TrainingOutcome:
        plan, loss = self._plan, float("nan")
        interval = Interval(plan.log_every)
        self._ahead = self._read(self._first)
        done = self._agree(self._first)
        for step in range(self._first, plan.steps):
            number = step + 1
            loss, rate, norm, seconds = self._step(step)
            self._ahead = self._read(number)
            done = self._agree(number)
            line = Line(
                number, loss, None, rate, norm, seconds, self._tokens / seconds,
                plan.size * plan.count,
            )  # fmt: skip
            self._write_down(line)
            if (mean := interval.add(line)) is not None:
                self._emit(mean)
            if self._check and plan.evaluates(number):
                line = Line(number, evaluation=self._evaluate(self._check))
                self._emit(line)
                self._write_down(line)
            if number == plan.steps or done.stop or done.due:
                self._save(number, rolling=done.late and number < plan.steps)
            if done.stop:
                return TrainingOutcome(loss, number, stopped=number < plan.steps)
        if self._journal is not None:
            self._journal.picture()
        return TrainingOutcome(loss, plan.steps, stopped=False)

    def _write_down(self, line: Line) -> None:
        if self._journal is not None:
            self._journal.add(line)

    def _read(self, step: int) -> list[Batch] | MMConvertError:
        """The micro-batches of this replica in a step, or why there are none."""
        if step == self._plan.steps:
            return []
        try:
            return self._feed.step(step)
        except DatasetError as error:
            return error

    def _agree(self, number: int) -> Agreed:
        """What all processes know of each other after iteration ``number``.

        Raises:
            MMConvertError: one of them could not read the samples of the next step; what has been
                learnt is saved.
        """
        self._hear()
        mesh, every = self._run.mesh, self._plan.save_every
        late = every is None and mesh.lead and time.monotonic() - self._clock > SAVE_EVERY
        wrong = isinstance(self._ahead, MMConvertError)
        speaks = mesh.rank == Rank(0)  # one process of a replica, for its tokens
        tokens = 0 if wrong or not speaks or not self._ahead else self._feed.tokens(number)
        bad = len(self._feed.bad) if speaks else 0
        mine = crc32(repr(sorted(self._feed.bad)).encode())
        flags = torch.tensor(
            [self._stop.asked, late, wrong, tokens, bad, mine, mine if speaks else 0],
            device=mesh.device,
        )
        dist.all_reduce(flags)
        stop, late, wrong, tokens, bad, every_process, every_replica = flags.tolist()
        size = dist.get_world_size() // mesh.replicas
        if not wrong and every_process != size * every_replica:  # read on some processes alone
            for one in gather(self._feed.bad):
                self._feed.bad |= one
            self._ahead = self._read(number)
            return self._agree(number)
        if bad != self._left_out:
            self._left_out = bad
            self._tell_left_out()
        if wrong:
            mine = self._ahead if isinstance(self._ahead, MMConvertError) else None
            found = [error for error in gather(mine) if error is not None]
            self._rescue(number)
            raise found[0]
        self._tokens, self._next_tokens = self._next_tokens, tokens
        return Agreed(bool(stop), bool(late), bool(late or (every and number % every == 0)))

    def _hear(self) -> None:
        """Names samples that were found useless in the background, before their turn."""
        for sample, what in self._inspection.news().items():
            if self._job.strict:
                self._ahead = DatasetError(what, "files that can be decoded")
            elif sample not in self._told:
                self._told.add(sample)
                self._emit(f"warning: left out, {len(self._told)} so far: {what}")

    def _tell_left_out(self) -> None:
        """Names the samples that turned out to be useless, on whichever process."""
        found: dict[int, str] = {}
        for one in gather(self._feed.bad):
            found |= one
        for sample in sorted(found.keys() - self._told):
            self._told.add(sample)
            self._emit(f"warning: left out, {len(self._told)} so far: {found[sample]}")

    def _step(self, step: int) -> tuple[float, float, float, float]:
        """(loss, learning rate, gradient norm, seconds) of an update."""
        began = time.perf_counter()
        run = self._run
        assert isinstance(self._ahead, list)  # noqa: S101 - else all processes have stopped
        moved = [batch.to(run.mesh.device) for batch in self._ahead]
        loss = run.train(moved, self._plan.loss)
        norm = self._optimizer.norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):  # before the weights are lost too
            raise RequestError(
                f"iteration {step + 1}: the loss is {loss}, the gradient norm {norm}",
                "numbers; the weights of this iteration are not saved",
                "a smaller --lr, or --clip_grad; --resume goes on from the last checkpoint",
            )
        rate = self._optimizer.step(step - self._origin, norm)
        return loss, rate, norm, time.perf_counter() - began

    def _evaluate(self, check: Feed) -> float:
        """Mean loss over the validation data, or its first batches."""
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
    def _rescue(self, number: int) -> None:
        """Saves what has been learnt before an error that all processes know of ends the run."""
        if number > self._saved:
            self._save(number)

    def _save(self, number: int, rolling: bool = False) -> None:
        """Writes the checkpoint of an iteration: whole, or not at all.

        Args:
            rolling: it was due by the clock, and takes the place of the last such one.
        """
        plan, mesh, layout = self._plan, self._run.mesh, self._job.stored.layout
        content: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": number}
        for virtual, stage in enumerate(self._run.stages):
            tree = {name: p.detach().cpu() for name, p in stage.shard.tree.state_dict().items()}
            content[layout.part(virtual)] = tree if plan.lora is None else kept(tree)
        if plan.lora is not None:
            content["args"] = self._arguments(plan.lora)
        content["training"] = self._settings()
        if plan.save_optimizer:
            content["optimizer"] = self._optimizer.state()
        if self._journal is not None:
            self._journal.sync()
        if mesh.lead:
            mmfiles.begin(plan.save, number)
        dist.barrier()
        if mesh.replica == 0:
            mmfiles.write_rank(plan.save, number, layout, mesh.rank, content)
        dist.barrier()
        if mesh.lead:
            mmfiles.finish(plan.save, number)
            if rolling and self._rolling:
                mmfiles.remove(plan.save, self._rolling)
        dist.barrier()
        self._rolling = number if rolling else self._rolling
        self._saved, self._clock = number, time.monotonic()
        self._emit(f"saved {mmfiles.iteration_folder(plan.save, number)}")

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
        elif isinstance(state, dict):
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
                "warning: the checkpoint does not say how it was trained; what has changed since "
                "cannot be told"
            )
        emit(f"going on from iteration {number}")
        return number
