"""What the flags of ``finetune`` mean: checked, and as the runtime takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.cli.scriptflags import Script, needed
from mmconvert.errors import RequestError

if TYPE_CHECKING:
    from mmconvert.cli.tools.finetune import Finetuned
    from mmconvert.modeljson.file import ModelJson
    from mmconvert.runtime.dataset import Data
    from mmconvert.runtime.lora import LoraPlan
    from mmconvert.runtime.trainplan import TrainingPlan

# Least values, and ranges.
LEAST = {
    "train_iters": 1, "save_interval": -1, "lr_decay_iters": 0, "data_parallel_size": 0,
    "ckpt_step": 0, "eval_interval": 0, "eval_iters": 1, "max_samples": 0, "log_interval": 0,
    "warmup_iters": 0, "micro_batch_size": 1, "global_batch_size": 0, "seq_length": 0,
    "num_workers": 0, "distributed_timeout_minutes": 1,
}  # fmt: skip
NOT_NEGATIVE = ("lr", "min_lr", "lr_warmup_init", "weight_decay", "adam_eps", "clip_grad")
BELOW_ONE = ("adam_beta1", "adam_beta2", "val_rate", "lr_warmup_fraction")
ONE_OF = (
    ("calculate_per_sample_loss", "calculate_per_token_loss"),
    ("warmup_iters", "lr_warmup_fraction"), ("mm_dir", "load"), ("data", "mm_data"),
)  # fmt: skip


def check(asked: Finetuned, script: Script) -> None:
    """What is missing, and numbers that make no sense.

    Raises:
        RequestError: naming the flag.
    """
    needed(asked.mm_dir or asked.load or asked.hf_dir, "--mm_dir (or --load)", "finetune")
    if asked.load_base_model is not None and not asked.lora_target_modules:
        raise RequestError(
            "--load_base_model is given without --lora_target_modules", "both, or neither"
        )
    needed(asked.save, "--save", "finetune")
    if not asked.data and asked.mm_data is None:
        raise RequestError("no training data is given", "--data train.json, or --mm_data data.json")
    _check_numbers(asked)
    for one, two in ONE_OF:
        if getattr(asked, one) and getattr(asked, two):
            raise RequestError(f"--{one} and --{two} are both given", "one of them")
    if asked.global_batch_size % asked.micro_batch_size:
        raise RequestError(
            f"--global_batch_size {asked.global_batch_size} is not a multiple of "
            f"--micro_batch_size {asked.micro_batch_size}",
            "a whole number of micro-batches",
        )
    if not script.given:  # scripts evaluate where data.json has data for it
        _check_evaluation(asked)


def _check_numbers(asked: Finetuned) -> None:
    for name, bound in LEAST.items():
        if getattr(asked, name) < bound:
            raise RequestError(f"--{name} is {getattr(asked, name)}", f"at least {bound}")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(asked, name) < float("inf"):
            raise RequestError(f"--{name} is {getattr(asked, name)}", "a number of at least 0")
    for name in BELOW_ONE:
        if not 0 <= getattr(asked, name) < 1:
            raise RequestError(f"--{name} is {getattr(asked, name)}", "a number from 0 to 1")


def _check_evaluation(asked: Finetuned) -> None:
    if asked.val_data and asked.val_rate:
        raise RequestError("--val_data and --val_rate are both given", "one of them")
    if asked.eval_interval and not (asked.val_data or asked.val_rate):
        raise RequestError(
            "--eval_interval is given without validation data", "--val_data or --val_rate"
        )
    if (asked.val_data or asked.val_rate) and not asked.eval_interval:
        given = "--val_data" if asked.val_data else "--val_rate"
        raise RequestError(
            f"{given} is given without --eval_interval",
            "--eval_interval N, the iterations between two evaluations",
        )


def plan_of(asked: Finetuned, save: Path, evaluate: int, model: ModelJson | None) -> TrainingPlan:
    """The flags, and what model.json says of learning, as the runtime takes them."""
    from mmconvert.runtime.optimizer import Recipe
    from mmconvert.runtime.schedule import Schedule
    from mmconvert.runtime.trainplan import TrainingPlan

    frozen = (*asked.freeze, *(model.frozen() if model is not None else ()))
    recompute = asked.recompute_granularity == "full"
    steps = asked.lr_decay_iters or asked.train_iters
    warmup = asked.warmup_iters or asked.lr_warmup_fraction * steps
    schedule = Schedule(
        asked.lr, asked.min_lr, warmup, steps, asked.lr_warmup_init, asked.lr_decay_style
    )
    recipe = Recipe(
        schedule, asked.weight_decay, asked.adam_beta1, asked.adam_beta2, asked.adam_eps,
        asked.clip_grad, asked.use_distributed_optimizer,
    )  # fmt: skip
    kind = asked.loss_type
    if asked.calculate_per_sample_loss or asked.calculate_per_token_loss:
        kind = "per_token" if asked.calculate_per_token_loss else "per_sample"
    return TrainingPlan(
        save, asked.train_iters, None if asked.save_interval < 0 else asked.save_interval,
        evaluate, asked.eval_iters, asked.log_interval, asked.micro_batch_size,
        asked.global_batch_size // asked.micro_batch_size, asked.seed, frozen,
        not asked.no_save_optim, recipe, kind, asked.order,
        recompute if model is None else model.recomputed(asked.recompute_granularity),
        asked.data_parallel_size, asked.num_workers or 1,
        lora_of(asked, frozen), asked.log_axis,
    )  # fmt: skip


def lora_of(asked: Finetuned, frozen: tuple[str, ...]) -> LoraPlan | None:
    """What is adapted; None where the model itself learns. What is frozen has no adapters."""
    if not asked.lora_target_modules:
        return None
    from mmconvert.runtime.lora import LoraPlan, check

    check(asked.lora_r, asked.lora_alpha, asked.lora_dropout)
    words = (word for given in asked.lora_target_modules for word in given.split(","))
    targets = tuple(word.strip() for word in words if word.strip())
    return LoraPlan(asked.lora_r, asked.lora_alpha, targets, frozen, asked.seed)


def data_of(asked: Finetuned) -> tuple[Path, Data, tuple[str, ...]]:
    """The Hugging Face folder, the data, and what is to be said of them."""
    from mmconvert.runtime.datajson import read_data_json
    from mmconvert.runtime.dataset import Data
    from mmconvert.runtime.prepare import Prepare
    from mmconvert.runtime.samples import SampleSource

    if asked.mm_data is None:
        train, check = _files(asked.data), _files(asked.val_data)
        folders = (asked.dataset_dir,) if asked.dataset_dir is not None else ()
        data = Data(
            (SampleSource(train, asked.max_samples, folders),),
            (SampleSource(check, 0, folders),) if check else (),
            asked.val_rate,
            Prepare(
                length=asked.seq_length,
                newline=not asked.skip_newline,
                sound_in_video=asked.use_audio_in_video,
            ),
            asked.strict,
        )
        return needed(asked.hf_dir, "--hf_dir", "finetune"), data, ()
    found = read_data_json(asked.mm_data)
    hf_dir = asked.hf_dir or found.hf_dir
    if hf_dir is None:
        raise RequestError(
            f"{asked.mm_data} does not name the model's folder",
            "model_name_or_path or from_pretrained",
            "write it there, or give --hf_dir",
        )  # fmt: skip
    newline = not asked.skip_newline
    woven = found.prepare.sound_in_video or asked.use_audio_in_video
    prepare = replace(found.prepare, length=asked.seq_length, newline=newline, sound_in_video=woven)
    data = Data(found.train, found.check, found.rate, prepare, asked.strict)
    return hf_dir, data, found.notes


def _files(listed: str) -> tuple[Path, ...]:
    return tuple(Path(name.strip()) for name in listed.split(",") if name.strip())
