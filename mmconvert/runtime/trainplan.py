"""What a training does, as it is asked for, and how it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmconvert.runtime.dataset import SampleOrder
from mmconvert.runtime.lora import LoraPlan
from mmconvert.runtime.losses import LossType
from mmconvert.runtime.optimizer import Recipe

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
    order: SampleOrder = "epoch"
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
