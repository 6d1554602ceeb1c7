"""Fine-tuning of Qwen-VL, its third stage: the encoder is frozen, resampler and text learn."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmconvert.errors import DatasetError, RequestError
from mmconvert.names import number
from mmconvert.runtime import losses, mmfiles
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.device import device
from mmconvert.runtime.journal import Interval, Line, TrainingLog
from mmconvert.runtime.qwenvl import saving, weights
from mmconvert.runtime.qwenvl.learning import Encoded, Lesson, Teacher
from mmconvert.runtime.qwenvl.model import QwenVLModel
from mmconvert.runtime.qwenvl.sizes import Positions
from mmconvert.runtime.qwenvl.tokenizer import Tokenizer
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.stopping import Stop
from mmconvert.runtime.trainplan import SAVE_EVERY, TrainingOutcome, TrainingPlan

VISUAL = "transformer.visual."
# What learns of the vision encoder with MindFormers' freeze_vision True, freeze_resampler False.
RESAMPLER = tuple(f"{VISUAL}attn_pool.{name}." for name in ("kv_proj", "attn", "ln_q", "ln_kv"))


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


def freeze(model: QwenVLModel, prefixes: Sequence[str]) -> list[str]:
    """Stops the vision encoder, and what the prefixes name, from learning; names of what learns.

    Raises:
        RequestError: a prefix that fits no parameter, or nothing is left to learn.
    """
    names = dict(model.named_parameters())
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise RequestError(
                f"--freeze {prefix} fits no parameter",
                "the beginning of a name on the hub, such as transformer.wte",
            )
    for name, parameter in names.items():
        frozen = name.startswith(VISUAL) and not name.startswith(RESAMPLER)
        parameter.requires_grad_(not (frozen or name.startswith(tuple(prefixes))))
    learning = [name for name, parameter in names.items() if parameter.requires_grad]
    if not learning:
        raise RequestError("everything is frozen", "something that can learn")
    return learning


def loss_of(model: QwenVLModel, lesson: Lesson, kind: losses.LossType) -> torch.Tensor:
    """The loss of a micro-batch, not yet divided by the sizes of all."""
    keep = lesson.keep if model.sizes.positions == "mindformers" else None
    logits = model(lesson.ids, lesson.pixels, lesson.slots, keep)
    return losses.weighted(logits, lesson.labels, kind)


class QwenVLTrainingRun:
    """A fine-tuning under way."""

    def __init__(
        self,
        source: QwenVLSource,
        samples: Sequence[Sample],
        check: Sequence[Sample],
        plan: TrainingPlan,
        dtype: str,
        emit: Callable[[object], None],
        *,
        resume: bool,
    ) -> None:
        self._source, self._samples, self._check = source, samples, check
        self._plan, self._emit, self._stop = plan, emit, Stop()
        self._half = dtype == "bf16"
        self._where = device()
        torch.manual_seed(plan.seed)
        self._count = max(1, plan.count)
        sizes = weights.sizes_of(source.hf_dir, source.like)
        self._settings = self._decides(dtype)
        last = mmfiles.last_saved(plan.save) if resume else None
        if last is None and mmfiles.last_saved(plan.save) is not None:
            raise RequestError(
                f"{plan.save} holds checkpoints already", "another --save, or --resume"
            )
        folder = mmfiles.iteration_folder(plan.save, last) if last is not None else None
        state = saving.restored(folder, self._settings) if folder is not None else {}
        start = source.checkpoint if folder is None else folder
        self._model = weights.load(sizes, start, torch.float32, self._where, emit)
        self._model.recompute = bool(plan.recompute)
        learning = freeze(self._model, plan.frozen)
        self._adam = self._optimizer()
        if state:
            self._adam.load_state_dict(state["optimizer"])
        self._first = self._saved = last or 0
        self._teacher = Teacher(Tokenizer.read(source.vocab, source.like), sizes, source.length)
        self._bad: set[int] = set()
        self._journal = TrainingLog(plan.save, self._first, plan.log_axis)
        emit(f"one process, {self._where}; {number(learning, 'tensor learns', 'tensors learn')}")

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

    def train(self) -> TrainingOutcome:
        """All steps, or as many as there is time for."""
        plan, loss, clock, rolling = self._plan, float("nan"), time.monotonic(), 0
        interval = Interval(plan.log_every)
        with self._stop.listening():
            for step in range(self._first, plan.steps):
                number = step + 1
                try:
                    line = self._step(step)
                except DatasetError:  # before the update: what has been learnt is whole
                    if step > self._saved:
                        self._save(step)
                    raise
                loss = line.loss or 0.0
                self._journal.add(line)
                if (mean := interval.add(line)) is not None:
                    self._emit(mean)
                if self._check and plan.evaluates(number):
                    line = Line(number, evaluation=self._evaluate())
                    self._emit(line)
                    self._journal.add(line)
                late = plan.save_every is None and time.monotonic() - clock > SAVE_EVERY
                due = late or (plan.save_every and number % plan.save_every == 0)
                if number == plan.steps or due or self._stop.asked:
                    self._save(number)
                    clock = time.monotonic()
                    if late and rolling:
                        mmfiles.remove(plan.save, rolling)
                    rolling = number if late else rolling
                if self._stop.asked:
                    return TrainingOutcome(loss, number, stopped=number < plan.steps)
        self._journal.picture()
        return TrainingOutcome(loss, plan.steps, stopped=False)

    def _step(self, step: int) -> Line:
        """One update."""
        began, plan = time.perf_counter(), self._plan
        self._model.train()
        lessons = [self._lesson(step * self._count + i) for i in range(self._count)]
        total = sum(losses.size(lesson.labels, plan.loss) for lesson in lessons)
        whole = 0.0
        for lesson in lessons:
            with torch.autocast(self._where.type, torch.bfloat16, enabled=self._half):
                loss = loss_of(self._model, lesson.to(self._where), plan.loss) / max(1, total)
            loss.backward()
            whole += float(loss.detach())
        learning = [p for p in self._model.parameters() if p.requires_grad]
        limit = plan.recipe.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(learning, limit, foreach=False))
        if not (math.isfinite(whole) and math.isfinite(norm)):
            raise RequestError(
                f"iteration {step + 1}: the loss is {whole}, the gradient norm {norm}",
                "numbers; the weights of this iteration are not saved",
                "a smaller --lr, or --clip_grad; --resume goes on from the last checkpoint",
            )
        rate = plan.recipe.schedule.at(step)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        tokens = sum(int(lesson.keep.sum()) for lesson in lessons)
        samples = self._count * plan.size
        return Line(step + 1, whole, None, rate, norm, seconds, tokens / seconds, samples)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean loss over the validation data, or its first batches."""
        plan, total, counted = self._plan, 0.0, 0
        self._model.eval()
        most = plan.evaluate_steps * self._count * plan.size
        for first in range(0, min(most, len(self._check)), plan.size):
            picked = self._check[first : min(first + plan.size, most)]
            lesson = self._teacher.joined([self._teacher.encode(sample) for sample in picked])
            with torch.autocast(self._where.type, torch.bfloat16, enabled=self._half):
                total += float(loss_of(self._model, lesson.to(self._where), plan.loss))
            counted += losses.size(lesson.labels, plan.loss)
        return total / max(1, counted)

    # ---------------------------------------------------------------------------- the samples
    def _lesson(self, number: int) -> Lesson:
        """A micro-batch of the endless row of passes; a sample that cannot be used gives its
        place to the next.
        """
        size = self._plan.size
        return self._teacher.joined([self._at(number * size + i) for i in range(size)])

    def _at(self, place: int) -> Encoded:
        count = len(self._samples)
        order = self._order(place // count)
        for further in range(count):
            index = order[(place + further) % count]
            if index in self._bad:
                continue
            try:
                return self._teacher.encode(self._samples[index])
            except DatasetError as error:
                if self._source.strict:
                    raise
                self._bad.add(index)
                self._emit(f"warning: left out, {len(self._bad)} so far: {error.what}")
        raise DatasetError("no sample can be used", "pictures and texts that fit --seq_length")

    def _order(self, epoch: int) -> list[int]:
        count, kind = len(self._samples), self._plan.order
        if kind in ("file", "once"):
            return list(range(count))
        seed = epoch + (self._plan.seed if kind == "seed" else 0)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    # -------------------------------------------------------------------------------- saving
    def _decides(self, dtype: str) -> dict[str, Any]:
        """What decides the curve, and must be the same after a restart."""
        said = [[list(s.messages), [f.name for f in s.files()]] for s in self._samples]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        more = {"dtype": dtype, "samples": digest, "length": self._source.length}
        return {**self._plan.settings(), **more, "like": self._source.like}

    def _save(self, number: int) -> None:
        state: dict[str, Any] = {}
        if self._plan.save_optimizer:
            state = {"optimizer": self._adam.state_dict(), "settings": self._settings}
        self._journal.sync()
        source, held = self._source, self._model.state_dict()
        like = (source.hf_dir, source.vocab)
        self._emit(f"saved {saving.save(self._plan.save, number, held, state, like)}")
        self._saved = number


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
    samples, kept = data.read(plan.seed, emit)
    if not samples:
        raise DatasetError("there are no samples", "at least one conversation")
    return QwenVLTrainingRun(source, samples, kept, plan, dtype, emit, resume=resume).train()
