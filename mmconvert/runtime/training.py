"""Fine-tuning: the loop of steps, evaluations and checkpoints that every process runs."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmconvert import durable
from mmconvert.errors import RequestError, cannot_write
from mmconvert.runtime import engine as engines
from mmconvert.runtime import mmfiles
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.curve import Series, draw
from mmconvert.runtime.dataset import Feed
from mmconvert.runtime.engine import Engine
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.launch import Emit
from mmconvert.runtime.mmfiles import Stored
from mmconvert.runtime.optimizer import Optimizer, Recipe, freeze
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.validation import DTYPES
from mmconvert.runtime.verdict import finite

LOG, PICTURE = "loss.jsonl", "loss.svg"
# Settings by the names of their flags.
FLAGS = {
    "rate": "--lr", "least": "--min_lr", "warmup": "--warmup_iters", "steps": "--train_iters",
    "decay": "--weight_decay", "beta1": "--adam_beta1", "beta2": "--adam_beta2",
    "epsilon": "--adam_eps", "clip": "--clip_grad", "size": "--micro_batch_size",
    "count": "the number of micro-batches", "seed": "--seed", "frozen": "--freeze",
    "dtype": "--dtype", "samples": "the training data",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a fine-tuning does.

    Attributes:
        save: the folder of checkpoints.
        steps: the last iteration.
        save_every, evaluate_every, log_every: in iterations; 0 for never.
        evaluate_steps: global batches of an evaluation at most.
        size: samples of a micro-batch.
        count: micro-batches of a step.
        frozen: beginnings of MM names that do not learn.
    """

    save: Path
    steps: int
    save_every: int
    evaluate_every: int
    evaluate_steps: int
    log_every: int
    size: int
    count: int
    seed: int
    frozen: tuple[str, ...]
    save_optimizer: bool
    recipe: Recipe

    def settings(self) -> dict[str, Any]:
        """What decides the curve, beside data and dtype: must be the same after a restart."""
        return {
            **asdict(self.recipe), "size": self.size, "count": self.count, "seed": self.seed,
            "frozen": list(self.frozen),
        }  # fmt: skip


@dataclass(frozen=True)
class Line:
    """What is said of one iteration.

    Attributes:
        loss: mean over the tokens that are learnt; None at an evaluation.
        evaluation: the same over the validation data; None else.
        seconds: of the step.
        tokens: a second, padding not counted.
    """

    iteration: int
    loss: float | None = None
    evaluation: float | None = None
    rate: float = 0.0
    norm: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The line as JSON; an evaluation that is no number is null."""
        kept = {k: v for k, v in asdict(self).items() if v is not None}
        return {k: finite(v) if isinstance(v, float) else v for k, v in kept.items()}


@dataclass(frozen=True)
class Training:
    """The job of every process of a fine-tuning."""

    arch: Architecture
    stored: Stored
    hf_dir: Path
    train: Sequence[Sample]
    check: Sequence[Sample]
    plan: Plan
    dtype: str
    resumed: bool
    prepare: Prepare = field(default_factory=Prepare)

    def __call__(self, device: torch.device, emit: Emit) -> float:
        """Trains; emits notes and lines; returns the last loss."""
        plan = self.plan
        torch.manual_seed(plan.seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        run = engines.load(self.arch, self.stored, device, DTYPES[self.dtype])
        learning = freeze(run, plan.frozen)
        optimizer = Optimizer(run, plan.recipe)
        start = self._take_up(run, optimizer, emit) if self.resumed else 0
        emit(
            f"{run.mesh.stages} stages on {self.stored.world} processes, {device}; "
            f"{learning} tensors learn"
        )
        speaker = Speaker(self.arch, self.hf_dir, self.prepare)
        feed = Feed(speaker, self.train, plan.size, plan.count, plan.seed)
        check = Feed(speaker, self.check, plan.size, plan.count, None) if self.check else None
        journal = Journal(plan.save, start) if run.mesh.lead else None
        loss = float("nan")
        for step in range(start, plan.steps):
            number = step + 1
            loss, line = self._step(run, optimizer, feed, step)
            if journal is not None:
                journal.add(line)
            if plan.log_every and number % plan.log_every == 0:
                emit(line)
            if check and plan.evaluate_every and number % plan.evaluate_every == 0:
                line = Line(number, evaluation=self._evaluate(run, check))
                emit(line)
                if journal is not None:
                    journal.add(line)
            if number == plan.steps or (plan.save_every and number % plan.save_every == 0):
                if journal is not None:
                    journal.sync()
                self._save(run, optimizer, number)
                emit(f"saved {mmfiles.iteration_folder(plan.save, number)}")
        if journal is not None:
            journal.picture()
        return loss

    def _step(self, run: Engine, optimizer: Optimizer, feed: Feed, step: int) -> tuple[float, Line]:
        began = time.perf_counter()
        batches = feed.step(step)
        moved = [batch.to(run.mesh.device) for batch in batches]
        loss = run.train(moved)
        norm = optimizer.norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):  # before the weights are lost too
            raise RequestError(
                f"iteration {step + 1}: the loss is {loss}, the gradient norm {norm}",
                "numbers; the weights of this iteration are not saved",
                "a smaller --lr, or --clip_grad; --resume goes on from the last checkpoint",
            )
        rate = optimizer.step(step, norm)
        took = time.perf_counter() - began
        return loss, Line(step + 1, loss, None, rate, norm, took, feed.tokens(step) / took)

    def _evaluate(self, run: Engine, check: Feed) -> float:
        """Mean loss over the validation data, or its first batches."""
        total = weight = 0.0
        for step in range(min(check.steps, self.plan.evaluate_steps)):
            batches = [batch.to(run.mesh.device) for batch in check.step(step)]
            learnt = sum(b.learnt for b in batches)
            total += run.loss(batches) * learnt
            weight += learnt
        return total / max(1.0, weight)

    def _save(self, run: Engine, optimizer: Optimizer, number: int) -> None:
        """Writes the checkpoint of an iteration: whole, or not at all."""
        plan, layout = self.plan, self.stored.layout
        if run.mesh.lead:
            mmfiles.begin(plan.save, number)
        dist.barrier()
        content: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": number}
        for virtual, stage in enumerate(run.stages):
            tree = {name: p.detach().cpu() for name, p in stage.shard.tree.state_dict().items()}
            content[layout.part(virtual)] = tree
        if plan.save_optimizer:
            content["optimizer"] = optimizer.state()
            content["training"] = self._settings()
        mmfiles.write_rank(plan.save, number, layout, run.mesh.rank, content)
        dist.barrier()
        if run.mesh.lead:
            mmfiles.finish(plan.save, number)
        dist.barrier()

    def _settings(self) -> dict[str, Any]:
        """What decides the curve: the plan, the dtype and the samples."""
        said = [[list(s.messages), [f.name for f in s.files()]] for s in self.train]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        samples = f"{len(said)} samples ({digest})"
        return {**self.plan.settings(), "dtype": self.dtype, "samples": samples}

    def _take_up(self, run: Engine, optimizer: Optimizer, emit: Emit) -> int:
        """Restores the optimizer; the iteration to go on from."""
        state = run.extras.get("optimizer")
        if isinstance(state, dict):
            optimizer.restore(state)
        else:
            emit("warning: the checkpoint has no optimizer state; its moments start at zero")
        before = run.extras.get("training")
        if isinstance(before, dict):
            for key, value in self._settings().items():
                if key in before and before[key] != value:
                    emit(f"warning: {FLAGS[key]} was {before[key]} and is {value}: another curve")
        emit(f"going on from iteration {self.stored.iteration}")
        return self.stored.iteration


class Journal:
    """The lines of a training in a file, and their picture.

    Args:
        start: the iteration that a restart goes on from; later lines are dropped.
    """

    def __init__(self, save: Path, start: int) -> None:
        self._save, self._path = save, save / LOG
        self._lines: list[dict[str, Any]] = []
        try:
            save.mkdir(parents=True, exist_ok=True)
            if start and self._path.is_file():
                for text in self._path.read_text(encoding="utf-8").splitlines():
                    line = json.loads(text)
                    if line["iteration"] <= start:
                        self._lines.append(line)
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            durable.replace_file(self._path, text.encode())
        except OSError as error:
            raise cannot_write(self._path, error) from None
        except (ValueError, TypeError, KeyError):
            self._lines = []  # a journal that somebody edited: the curve begins here

    def add(self, line: Line) -> None:
        """Writes a line down."""
        kept = line.as_dict()
        self._lines.append(kept)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(kept) + "\n")
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def sync(self) -> None:
        """Brings the lines to the disk: a checkpoint has no less of a curve than it was."""
        try:
            durable.sync_file(self._path)
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def picture(self) -> None:
        """Draws the loss."""
        lines: dict[str, Series] = {
            name: [
                (line["iteration"], line[key]) for line in self._lines if line.get(key) is not None
            ]
            for name, key in (("training", "loss"), ("validation", "evaluation"))
        }
        path = self._save / PICTURE
        try:
            durable.replace_file(path, draw("loss", lines).encode())
        except OSError as error:
            raise cannot_write(path, error) from None
