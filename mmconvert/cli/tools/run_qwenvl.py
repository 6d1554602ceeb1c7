"""The command ``run_qwenvl``: MindFormers' line of fine-tuning, read as one of ``finetune``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.settings import read_yaml
from mmconvert.config import MaybePath
from mmconvert.datasets.jsonlist import read_items
from mmconvert.errors import RequestError
from mmconvert.narrow import is_object

PROG = "mm-convert run_qwenvl"
DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
# Of the template; another value would change what is learnt.
TEMPLATE = {
    "system_message": "You are a helpful assistant.", "user_prompt": "", "assistant_prompt": "",
}  # fmt: skip


@dataclass(frozen=True)
class RunQwenVLFlags:
    """The flags of run_qwenvl.py."""

    config: Path
    """MindFormers' finetune_qwenvl_*.yaml."""
    hf_dir: Path
    """The folder with the model's config.json: the checkpoints take it along."""
    load_checkpoint: MaybePath = None
    """A .ckpt file or rank folders; not given: as the yaml says, else the weights of hf_dir."""
    vocab_file: MaybePath = None
    """qwen.tiktoken; not given: as the yaml says, else that of hf_dir."""
    run_mode: str = "finetune"
    """finetune; predict has a command of its own."""
    save: MaybePath = None
    """The folder for checkpoints; not given: checkpoint in the yaml's output_dir."""
    train_iters: int = 0
    """Iterations; 0: as many as the yaml's epochs have."""
    use_parallel: str = "False"
    """Read, and without effect: data_parallel_size, or torchrun, says how many processes."""
    auto_trans_ckpt: str = "False"
    """Read, and without effect: slices are put together in memory."""
    data_parallel_size: int = 0
    """Processes that share the samples of an iteration, each with the whole model; 0: as in
    finetune."""
    device: str = "auto"
    """What to compute on: auto, cpu, cuda or npu."""
    resume: bool = False
    """Go on from the newest checkpoint."""
    json: bool = False
    """Print each line, the result or the error as JSON."""
    quiet: bool = False
    """Print nothing but the result."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Trains, as ``finetune`` does."""
    text = (
        "Fine-tunes Qwen-VL by MindFormers' configuration: the line of run_qwenvl.py in the guide, "
        "with --hf_dir."
    )
    example = f"{PROG} --config F.yaml --load_checkpoint X.ckpt --vocab_file V --hf_dir HF_DIR"
    asked = read_plain(RunQwenVLFlags, words, PROG, f"{text}\n\nexample:\n  {example}")
    if asked.run_mode != "finetune":
        raise RequestError(f"--run_mode {asked.run_mode}", "finetune", "mm-convert predict -h")
    from mmconvert.cli.tools import finetune

    flags = flags_of(Yaml(read_yaml(asked.config, "--config"), asked.config), asked)
    line = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    line += [f"--{name}" for name in ("resume", "json", "quiet", "debug") if getattr(asked, name)]
    if not asked.quiet and os.environ.get("RANK", "0") == "0":
        print(f"as: mm-convert finetune {' '.join(line)}", file=sys.stderr)
    return finetune.run(line)


class Yaml:
    """A configuration, looked into by paths such as ``optimizer.beta1``."""

    def __init__(self, content: Mapping[Any, object], path: Path) -> None:
        self._content, self.path = content, path

    def get(self, path: str, default: Any) -> Any:  # noqa: ANN401 - a stranger's YAML
        """The value at a path, of the default's type.

        Raises:
            RequestError: it is of another type.
        """
        value: Any = self._content
        for key in path.split("."):
            value = value.get(key) if is_object(value) else None
        if value is None:
            return default
        if isinstance(default, float) and isinstance(value, (int, str)):
            with suppress(ValueError):
                return float(value)  # YAML takes 1e-8 for a word
        if not isinstance(value, type(default)):
            raise RequestError(
                f"{self.path}: {path} is {value!r:.80}", f"a value such as {default!r}"
            )
        return value


def flags_of(yaml: Yaml, asked: RunQwenVLFlags) -> dict[str, object]:
    """The flags of ``finetune`` for a configuration.

    Raises:
        RequestError: it asks for what cannot be done here.
    """
    data = "train_dataset.data_loader.annotation_file"
    template = "train_dataset.modal_to_text_transform.model_transform_template"
    for key, usual in TEMPLATE.items():
        if yaml.get(f"{template}.{key}", usual) != usual:
            raise RequestError(
                f"{yaml.path}: {key} is changed", f"{usual!r}, the only value that is supported",
                "write it into the conversations: a system message is taken from there",
            )  # fmt: skip
    file = yaml.get(data, "")
    if not file:
        raise RequestError(f"{yaml.path} names no training data", f"a file under {data}")
    size = yaml.get("runner_config.batch_size", yaml.get("train_dataset.batch_size", 1))
    batch = size
    for name in ("data_parallel", "micro_batch_num"):
        batch *= yaml.get(f"parallel_config.{name}", 1)
    epochs = yaml.get("runner_config.epochs", 1)
    count = 0 if asked.train_iters else sum(1 for _ in read_items(Path(file)))
    steps = asked.train_iters or epochs * (count // max(1, batch))
    if steps < 1 or size < 1:
        raise RequestError(
            f"{yaml.path}: {count} samples are fewer than a batch of {batch}",
            "at least one batch in an epoch",
            "a smaller runner_config.batch_size or parallel_config.data_parallel",
        )  # fmt: skip
    save = asked.save or Path(yaml.get("output_dir", "./output")) / "checkpoint"
    found: dict[str, object] = {
        "hf_dir": asked.hf_dir, "data": file, "save": save, "device": asked.device,
        "mm_dir": asked.load_checkpoint or yaml.get("load_checkpoint", ""),
        "vocab_file": asked.vocab_file or yaml.get("train_dataset.tokenizer.vocab_file", ""),
        "dataset_dir": yaml.get(f"{template}.dataset_dir", ""),
        "seq_length": yaml.get("train_dataset.modal_to_text_transform.max_length", 2048),
        "micro_batch_size": size, "global_batch_size": batch, "train_iters": steps,
        "save_interval": _interval(yaml),
        "order": "seed" if yaml.get("train_dataset.data_loader.shuffle", True) else "file",
        "seed": yaml.get("train_dataset.seed", 0), "like": "mindformers",
        "dtype": _dtype(yaml), "data_parallel_size": asked.data_parallel_size,
        "lr": yaml.get("lr_schedule.learning_rate", 1e-5),
        "min_lr": yaml.get("lr_schedule.lr_end", 0.0),
        "lr_warmup_init": yaml.get("lr_schedule.warmup_lr_init", 0.0),
        "warmup_iters": yaml.get("lr_schedule.warmup_steps", 0),
        "adam_beta1": yaml.get("optimizer.beta1", 0.9),
        "adam_beta2": yaml.get("optimizer.beta2", 0.999),
        "adam_eps": yaml.get("optimizer.eps", 1e-8),
        "weight_decay": yaml.get("optimizer.weight_decay", 0.0),
        "clip_grad": 1.0 if yaml.get("runner_wrapper.use_clip_grad", True) else 0.0,
    }  # fmt: skip
    if yaml.get("recompute_config.recompute", False):
        found["recompute_granularity"] = "full"
    if not yaml.get("model.model_config.freeze_vision", True):
        raise RequestError(
            f"{yaml.path}: freeze_vision is False",
            "True, as in Qwen-VL's third stage: the vision encoder is not trained here",
        )
    if yaml.get("model.model_config.freeze_resampler", False):
        found["freeze"] = "transformer.visual"
    return {name: value for name, value in found.items() if value != ""}


def _interval(yaml: Yaml) -> int:
    """Iterations between checkpoints."""
    for callback in yaml.get("callbacks", list[Any]()):
        if is_object(callback) and callback.get("type") == "CheckpointMonitor":
            steps = callback.get("save_checkpoint_steps", 0)
            return steps if isinstance(steps, int) and steps >= 0 else 0
    return 0


def _dtype(yaml: Yaml) -> str:
    """What is computed in.

    Raises:
        RequestError: it is none of the known ones.
    """
    named = yaml.get("model.model_config.compute_dtype", "bfloat16")
    if named not in DTYPES:
        raise RequestError(
            f"{yaml.path}: compute_dtype is {named!r}", f"one of {', '.join(DTYPES)}"
        )
    return DTYPES[named]
