"""Fine-tuning of Qwen-VL, its third stage: the encoder is frozen, resampler and text learn.

Each process has the whole model; several are replicas that share the micro-batches of a step.
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmconvert.errors import DatasetError, RequestError
from mmconvert.names import number
from mmconvert.runtime import iterations, losses
from mmconvert.runtime.agreement import agree
from mmconvert.runtime.beginning import fitted
from mmconvert.runtime.checking import BackgroundCheck, look_at_pictures
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.launch import launch, leads
from mmconvert.runtime.loop import Known, Loop, ProcessPlace, check_numbers
from mmconvert.runtime.processes import Emit
from mmconvert.runtime.qwenvl import saving, weights
from mmconvert.runtime.qwenvl.freezing import freeze
from mmconvert.runtime.qwenvl.learning import Lesson, Lessons, Teacher
from mmconvert.runtime.qwenvl.model import QwenVLModel
from mmconvert.runtime.qwenvl.scaling import LossScale
from mmconvert.runtime.qwenvl.sizes import Positions
from mmconvert.runtime.qwenvl.tokenizer import Tokenizer
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.stopping import Stop
from mmconvert.runtime.trainplan import FLAGS, TrainingOutcome, TrainingPlan


@dataclass(frozen=True)
class QwenVLSource:
    """Where a training begins.

    Attributes:
        hf_dir: config.json and side files.
        checkpoint: the weights.
        vocab: the ranks of the tokenizer.
        length: tokens of a sample at most; 0 for no limit.
        strict: a sample that cannot be used is an error; else it is left out.
    """

    hf_dir: Path
    checkpoint: Path
    vocab: Path
    like: Positions = "hub"
    length: int = 0
    strict: bool = False


def loss_of(model: QwenVLModel, lesson: Lesson, kind: losses.LossType) -> torch.Tensor:
    """The loss of a micro-batch, not yet divided by the sizes of all."""
    keep = lesson.keep if model.sizes.positions == "mindformers" else None
    logits = model(lesson.ids, lesson.pixels, lesson.slots, keep)
    return losses.weighted(logits, lesson.labels, kind)


@dataclass(frozen=True)
class QwenVLTraining:
    """The job of every process of a fine-tuning of Qwen-VL."""

    source: QwenVLSource
    train: Sequence[Sample]
    check: Sequence[Sample]
    plan: TrainingPlan
    dtype: str
    resume: bool

    stops_gently = True  # a SIGTERM is passed on to it, and it ends by itself

    def __call__(self, device: torch.device, emit: Emit) -> TrainingOutcome:
        """Trains; emits notes and lines."""
        plan, source = self.plan, self.source
        wants = {FLAGS.get(key, key): value for key, value in plan.settings().items()}
        wants |= {"--train_iters": plan.steps, "--dtype": self.dtype, "--resume": self.resume}
        wants |= {"the number of samples": len(self.train), "the replicas": plan.replicas}
        folders = {"--save": plan.save, "--hf_dir": source.hf_dir, "--mm_dir": source.checkpoint}
        agree(wants, folders)
        stop = Stop()
        with stop.listening():
            return QwenVLTrainingRun(self, device, emit, stop).train()


class QwenVLTrainingRun:
    """A fine-tuning under way in this process."""

    def __init__(self, job: QwenVLTraining, device: torch.device, emit: Emit, stop: Stop) -> None:
        source, plan = job.source, job.plan
        self._job, self._plan, self._emit, self._stop = job, plan, emit, stop
        self._where, self._rank = device, dist.get_rank()
        torch.manual_seed(plan.seed)
        sizes = weights.sizes_of(source.hf_dir, source.like)
        self._settings = self._decides()
        last = iterations.last_saved(plan.save) if job.resume else None
        folder = iterations.iteration_folder(plan.save, last) if last is not None else None
        state = saving.restored(folder, self._settings) if folder is not None else {}
        start = source.checkpoint if folder is None else folder
        self._model = weights.load(sizes, start, torch.float32, device, emit)
        self._model.recompute = bool(plan.recompute)
        learning = freeze(self._model, plan.frozen)
        self._learning = [p for p in self._model.parameters() if p.requires_grad]
        self._adam = self._optimizer()
        self._scale = LossScale(device, enabled=job.dtype == "fp16")
        if state:
            self._adam.load_state_dict(state["optimizer"])
            self._scale.restore(state.get("scale"))
        self._first = last or 0
        teacher = Teacher(Tokenizer.read(source.vocab, source.like), sizes, source.length)
        self._lessons = Lessons(teacher, job.train, plan.order, plan.seed, strict=source.strict)
        self._checks = Lessons(teacher, job.check, "once", 0, strict=source.strict)
        self.bad, self.evaluates = self._lessons.bad, bool(job.check)
        self._tokens: dict[int, int] = {}
        emit(
            f"{number(plan.replicas, 'process', 'processes')}, {device}; "
            f"{number(learning, 'tensor learns', 'tensors learn')}"
        )

    def train(self) -> TrainingOutcome:
        """All steps, or as many as there is time for."""
        job, place = self._job, ProcessPlace(self._where, self._rank == 0, speaks=True)
        told = frozenset(i for i, sample in enumerate(job.train) if sample.fault)
        known = Known(told, job.source.strict)
        first = self._lessons.first_pass()
        look = BackgroundCheck(job.train, first, look_at_pictures)
        loop = Loop(self._plan, self, place, self._first, self._emit, self._stop, known, look)
        return loop.train()

    def _optimizer(self) -> torch.optim.AdamW:
        recipe = self._plan.recipe
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": recipe.decay}, {"params": [], "weight_decay": 0.0},
        ]  # fmt: skip
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                plain = parameter.dim() < 2 or name.endswith("bias")
                groups[plain]["params"].append(parameter)
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            recipe.schedule.rate, (recipe.beta1, recipe.beta2), recipe.epsilon, foreach=False,
        )  # fmt: skip

    # ------------------------------------------------------------------------------- learning
    def read(self, step: int) -> list[Lesson]:
        """The micro-batches of this replica in a step."""
        plan = self._plan
        mine = range(step * plan.count + self._rank, (step + 1) * plan.count, plan.replicas)
        lessons = [self._lessons.at(number, plan.size) for number in mine]
        self._tokens = {step: sum(int(lesson.keep.sum()) for lesson in lessons)}
        return lessons

    def tokens(self, step: int) -> int:
        """Tokens of these, padding not counted."""
        return self._tokens[step]

    def update(self, step: int, batches: list[Lesson]) -> tuple[float, float, float]:
        """(loss, learning rate, gradient norm) of an update."""
        plan = self._plan
        self._model.train()
        (total,) = self._summed([sum(losses.size(one.labels, plan.loss) for one in batches)])
        whole = 0.0
        for lesson in batches:
            with self._computing():
                loss = loss_of(self._model, lesson.to(self._where), plan.loss) / max(1.0, total)
            self._scale.times(loss).backward()
            whole += float(loss.detach())
        (whole,) = self._summed([whole])
        self._sum_gradients()
        rate = plan.recipe.schedule.at(step)
        finite = self._scale.divide(self._learning)
        limit = plan.recipe.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self._learning, limit, foreach=False))
        if self._scale.learns(finite=finite):
            check_numbers(step, whole, norm)
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
        else:
            self._emit(f"note: iteration {step + 1} overflows in fp16 and is left out")
        self._adam.zero_grad(set_to_none=True)
        return whole, rate, norm

    def _computing(self) -> torch.autocast:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._job.dtype)
        return torch.autocast(self._where.type, half or torch.bfloat16, enabled=half is not None)

    def _summed(self, values: Sequence[float]) -> list[float]:
        """Numbers, over all replicas."""
        both = torch.tensor(values, dtype=torch.float64 if self._where.type == "cpu" else None)
        both = both.to(self._where)
        dist.all_reduce(both)
        return both.tolist()

    def _sum_gradients(self) -> None:
        """Over all replicas; what no replica has used has none."""
        if self._plan.replicas == 1:
            return
        used = torch.tensor([float(p.grad is not None) for p in self._learning])
        used = used.to(self._where)
        dist.all_reduce(used)
        for parameter, count in zip(self._learning, used.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the validation data, or its first batches."""
        plan, total, counted = self._plan, 0.0, 0
        self._model.eval()
        most = plan.evaluate_steps * plan.count * plan.size
        for lesson in self._checks.once(plan.size, most)[self._rank :: plan.replicas]:
            with self._computing():
                total += float(loss_of(self._model, lesson.to(self._where), plan.loss))
            counted += losses.size(lesson.labels, plan.loss)
        total, sizes = self._summed([total, counted])
        return total / max(1.0, sizes)

    # -------------------------------------------------------------------------------- saving
    def _decides(self) -> dict[str, Any]:
        """What decides the curve, and must be the same after a restart."""
        job = self._job
        said = [[list(s.messages), [f.name for f in s.files()]] for s in job.train]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        more = {"dtype": job.dtype, "samples": digest, "length": job.source.length}
        return {**self._plan.settings(), **more, "like": job.source.like}

    def write(self, number: int) -> Path:
        """Writes the checkpoint of an iteration, on process 0."""
        save = self._plan.save
        if self._rank:
            return iterations.iteration_folder(save, number)
        state: dict[str, Any] = {}
        if self._plan.save_optimizer:
            state = {"optimizer": self._adam.state_dict(), "settings": self._settings}
            state["scale"] = self._scale.state()
        source, held = self._job.source, self._model.state_dict()
        return saving.save(save, number, held, state, (source.hf_dir, source.vocab))


def finetune(
    source: QwenVLSource,
    data: Data,
    plan: TrainingPlan,
    dtype: str,
    emit: Callable[[object], None],
    *,
    resume: bool,
) -> TrainingOutcome:
    """Fine-tunes a Qwen-VL.

    Raises:
        MMConvertError: a checkpoint, the data or the settings cannot be used.
    """
    samples, kept = data.read(plan.seed, emit if leads() else lambda event: None)
    if not samples:
        raise DatasetError("there are no samples", "at least one conversation")
    if not (resume or iterations.last_saved(plan.save) is None):
        raise RequestError(f"{plan.save} holds checkpoints already", "another --save, or --resume")
    plan = fitted(plan)
    job = QwenVLTraining(source, samples, kept, plan, dtype, resume)
    ended = launch(job, plan.replicas, emit)
    assert isinstance(ended, TrainingOutcome)  # noqa: S101 - what the job returns
    return ended
