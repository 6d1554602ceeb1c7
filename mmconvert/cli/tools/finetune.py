"""The command ``finetune``: trains an MM checkpoint on conversations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.progress import INTERRUPTED, TrainingScreen
from mmconvert.cli.scriptflags import (
    Script,
    check_layout,
    check_only_qwenvl,
    check_sizes,
    needed,
    read_script,
)
from mmconvert.cli.scripttable import DEFAULTS
from mmconvert.cli.training import check, data_of, plan_of
from mmconvert.config import MaybePath
from mmconvert.errors import RequestError
from mmconvert.modeljson.file import read_model_json
from mmconvert.sharding.layout import Layout

if TYPE_CHECKING:
    from mmconvert.runtime.beginning import Load
    from mmconvert.runtime.dataset import Data
    from mmconvert.runtime.trainplan import TrainingOutcome, TrainingPlan


@dataclass(frozen=True)
class Finetuned:
    """What to train, on what, and how."""

    mm_dir: MaybePath = None
    """The MM checkpoint whose weights to start from; it trains in its own layout, one process for
    each rank, or replicas of these. Of Qwen-VL a .ckpt file or rank folders, whole in each process;
    not given: the weights of hf_dir."""
    hf_dir: MaybePath = None
    """The Hugging Face folder with config.json, tokenizer and processor of the model."""
    data: str = ""
    """Conversation files (JSON lists or lines, in any dialect), joined by commas."""
    save: MaybePath = None
    """The folder for checkpoints (iter_*), loss.jsonl and loss.svg."""
    mm_data: MaybePath = None
    """MindSpeed-MM's data.json, in place of --data, and of --hf_dir where it names that folder."""
    mm_model: MaybePath = None
    """MindSpeed-MM's model.json: what is frozen; its layer lists must be the checkpoint's."""
    dataset_dir: MaybePath = None
    """The folder that the paths in --data start from; also tried are the data file's own folder
    and the working directory."""
    vocab_file: MaybePath = None
    """The tokenizer of Qwen-VL: qwen.tiktoken; not given: that in hf_dir."""
    like: Literal["hub", "mindformers"] = "hub"
    """Whose numbers Qwen-VL has where the two differ: position tables, tokens."""
    seq_length: int = 0
    """Tokens of a sample; longer ones are cut, turn by turn. 0: no limit."""
    use_audio_in_video: bool = False
    """Put the sound of a video between its frames (Qwen2.5-Omni): that which audios names, else
    the video's own."""
    strict: bool = False
    """End with an error at a sample that cannot be used; else it is left out and counted."""
    train_iters: int = 100
    """Iterations in all."""
    save_interval: int = -1
    """Iterations between checkpoints; 0 for the last alone. -1: every half hour, each in the place
    of the one before. The last is always saved, and what there is on SIGTERM and on an error."""
    eval_interval: int = 0
    """Iterations between evaluations; 0 for none."""
    eval_iters: int = 25
    """Global batches of an evaluation at most."""
    val_data: str = ""
    """Conversation files for evaluations, joined by commas."""
    val_rate: float = 0.0
    """The share of --data to set aside for evaluations."""
    max_samples: int = 0
    """The most samples to take from --data; 0 for all."""
    log_interval: int = 1
    """Iterations between lines; a line has the mean loss since the one before."""
    log_axis: bool = False
    """Draw the losses of loss.svg on a logarithmic axis."""
    log_tps: bool = False
    """Say tokens per second too; padding is not counted."""
    lr: float = 1e-5
    """The highest learning rate."""
    min_lr: float = 0.0
    """The learning rate that is reached after the last iteration."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls."""
    lr_decay_iters: int = 0
    """Iterations until --min_lr; 0 takes --train_iters."""
    warmup_iters: int = 0
    """Iterations in which the learning rate rises, the first at --lr_warmup_init."""
    lr_warmup_fraction: float = 0.0
    """The same as a share of --lr_decay_iters, not rounded."""
    lr_warmup_init: float = 0.0
    """Where the warm-up starts."""
    weight_decay: float = 0.0
    """Of AdamW; not on biases, nor on what has one dimension."""
    adam_beta1: float = 0.9
    """Of AdamW."""
    adam_beta2: float = 0.999
    """Of AdamW."""
    adam_eps: float = 1e-8
    """Of AdamW."""
    clip_grad: float = 1.0
    """The largest gradient norm; 0 for no limit."""
    micro_batch_size: int = 1
    """Samples that go through the model together."""
    global_batch_size: int = 0
    """Samples of an iteration: a multiple of --micro_batch_size; 0 takes as many micro-batches as
    there are pipeline ranks."""
    seed: int = 42
    """Decides what --val_rate draws, and the order of the samples with --order seed."""
    order: Literal["epoch", "seed", "file"] = "epoch"
    """The order of the samples: drawn for each pass, by its number alone as MindSpeed-MM does or by
    --seed too, or that of the files."""
    loss_type: Literal["default", "per_sample", "per_token"] = "default"
    """The average: of each micro-batch, then over them; of each sample first; or over all learnt
    tokens of an iteration."""
    calculate_per_sample_loss: bool = False
    """As --loss_type per_sample."""
    calculate_per_token_loss: bool = False
    """As --loss_type per_token."""
    skip_newline: bool = False
    """Do not learn the newline after an answer, which MindSpeed-MM learns for Qwen models."""
    freeze: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Parts that do not learn: beginnings of MM names, such as image_encoder."""
    lora_target_modules: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Train adapters (LoRA) of these linear layers alone: module names or their ends, such as
    linear_qkv linear_proj linear_fc1 linear_fc2."""
    lora_r: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16
    """Their scaling times the rank."""
    lora_dropout: float = 0.0
    """Accepted: 0."""
    load_base_model: MaybePath = None
    """The base model of the adapters, where --load names adapters to go on from."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What is computed in; bf16 keeps fp32 copies of the weights, and so does fp16, which is for
    Qwen-VL alone and scales the loss."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """What to compute on; auto takes the accelerator that is there, else the CPU."""
    recompute_granularity: Literal["", "full", "selective"] = ""
    """full: keep only each layer's input for the backward pass, and compute the rest again;
    selective has no effect: attention keeps little anyway."""
    data_parallel_size: int = 0
    """Replicas that share the samples of an iteration. 0: with torchrun as many as its processes
    make, else one for each device that is free, on a CPU one."""
    use_distributed_optimizer: bool = False
    """Divide fp32 copies and moments over the replicas."""
    num_workers: int = 1
    """Threads of each process that read and encode samples ahead of their step."""
    no_save_optim: bool = False
    """Leave the optimizer out of the checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in --save, if there is one."""
    load: MaybePath = None
    """In place of --mm_dir, as Megatron has it: go on from the iteration that the tracker file of
    this folder names; begin where that is release."""
    ckpt_step: int = 0
    """Another iteration of --load."""
    distributed_timeout_minutes: int = 30
    """How long a process may wait for the others before the run ends."""
    no_load_optim: bool = False
    """Take weights and iteration alone; moments and schedule start anew."""
    no_load_rng: bool = False
    """Accepted: no random numbers are drawn."""
    finetune: bool = False
    """Take the weights of --load alone, and start at iteration 0."""
    json: bool = False
    """Print each line, the result or the error as JSON."""
    quiet: bool = False
    """Print nothing but the result."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Trains; lines are printed as they come."""
    prog = "mm-convert finetune"
    text = (
        "Trains an MM checkpoint on conversations in its own layout: AdamW, cosine schedule, "
        "deterministic, dropout off. The checkpoints are MM checkpoints. The flags of "
        "MindSpeed-MM's finetune_*.sh are taken too, under their own names."
    )
    example = f"{prog} --mm_dir MM_DIR --hf_dir HF_DIR --data train.json --save OUT --lr 1e-5"
    script = read_script(words, [f.name for f in fields(Finetuned)])
    if script.given:
        script.fill(DEFAULTS)
    asked = read_plain(Finetuned, script.words, prog, f"{text}\n\nexample:\n  {example}")
    check(asked, script)
    from mmconvert.runtime import needs

    needs.require(asked.device, asked.distributed_timeout_minutes)
    return _train(asked, script)


def _train(asked: Finetuned, script: Script) -> int:
    """Trains, with torch at hand."""
    from mmconvert.formats.hf.folder import read_config
    from mmconvert.runtime import commands
    from mmconvert.runtime.launch import leads
    from mmconvert.runtime.qwenvl import answer

    save = needed(asked.save, "--save", "finetune")
    screen = TrainingScreen(
        save, asked.train_iters, asked.json, asked.quiet, script.given, asked.log_tps
    )  # fmt: skip
    model = read_model_json(script.model) if script.model is not None else None
    hf_dir, data, notes = data_of(asked)
    evaluate = asked.eval_interval if data.check or data.rate else 0
    plan = plan_of(asked, save, evaluate, model)
    sizes = check_sizes(model, read_config(hf_dir)) if model is not None else []
    if leads():
        for note in (*script.notes(), *notes, *sizes):
            screen.tell(note)

    def expected(layout: Layout) -> None:
        check_layout(layout, model, script)

    try:
        if answer.serves(hf_dir):
            ended = _qwenvl(asked, hf_dir, data, plan, screen)
        else:
            check_only_qwenvl(asked.vocab_file, asked.like, asked.dtype)
            begin = asked.mm_dir or asked.load or asked.load_base_model
            needed(begin, "--mm_dir (or --load)", "finetune")
            start, load = _beginning(asked)
            ended = commands.finetune(
                start, hf_dir, data, plan, asked.dtype, asked.resume, screen.tell,
                expected if script.given or script.sizes else None, load,
                optimizer=not asked.no_load_optim,
            )  # fmt: skip
    except KeyboardInterrupt:
        return screen.interrupted("interrupted") if leads() else INTERRUPTED
    if not leads():
        return INTERRUPTED if ended.stopped else 0
    return screen.end(ended)


def _qwenvl(
    asked: Finetuned, hf_dir: Path, data: Data, plan: TrainingPlan, screen: TrainingScreen
) -> TrainingOutcome:
    """Trains a Qwen-VL."""
    from mmconvert.runtime.qwenvl import answer, training

    if asked.load is not None:
        raise RequestError("Qwen-VL is not trained from MM checkpoints", "--resume, not --load")
    source = training.QwenVLSource(
        hf_dir, asked.mm_dir or hf_dir, asked.vocab_file or hf_dir / answer.RANKS, asked.like,
        data.prepare.length, data.strict,
    )  # fmt: skip
    return training.finetune(source, data, plan, asked.dtype, screen.tell, resume=asked.resume)


def _beginning(asked: Finetuned) -> tuple[Path | None, Load | None]:
    """The checkpoint whose weights are the start, and the run that is gone on with."""
    from mmconvert.runtime.beginning import Load

    if asked.load is None:
        return asked.mm_dir or asked.load_base_model, None
    if asked.finetune:
        return asked.load, None
    base = asked.mm_dir or asked.load_base_model
    return base, Load(asked.load, asked.ckpt_step)
