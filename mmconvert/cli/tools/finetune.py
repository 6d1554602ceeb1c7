"""The command ``finetune``: trains an MM checkpoint on conversations."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.scriptflags import Script, check_layout, needed, read_script
from mmconvert.cli.scripttable import DEFAULTS
from mmconvert.config import MaybePath
from mmconvert.errors import RequestError
from mmconvert.modeljson.file import read_model_json
from mmconvert.sharding.layout import Layout

if TYPE_CHECKING:
    from mmconvert.runtime.beginning import Load
    from mmconvert.runtime.dataset import Data
    from mmconvert.runtime.training import Plan

INTERRUPTED = 130


@dataclass(frozen=True)
class Finetuned:
    """What to train, on what, and how."""

    mm_dir: MaybePath = None
    """The MM checkpoint whose weights to start from; it trains in its own layout, one process for
    each rank, or replicas of these."""
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
    seq_length: int = 0
    """Tokens of a sample; longer ones are cut, or left out without --mm_data. 0: no limit."""
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
    """Iterations between lines."""
    log_tps: bool = False
    """Say tokens per second too; padding is not counted."""
    lr: float = 1e-5
    """The highest learning rate."""
    min_lr: float = 0.0
    """The learning rate that is reached after the last iteration."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """The way down."""
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
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What is computed in; bf16 keeps fp32 copies of the weights."""
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
    _check(asked, script)
    from mmconvert.runtime import needs

    needs.require(asked.device)
    return _train(asked, script)


def _train(asked: Finetuned, script: Script) -> int:
    """Trains, with torch at hand."""
    from mmconvert.runtime import commands
    from mmconvert.runtime.launch import leads

    def tell(event: object) -> None:
        _tell(event, asked)

    model = read_model_json(script.model) if script.model is not None else None
    hf_dir, data, notes = _data(asked)
    evaluate = asked.eval_interval if data.check or data.rate else 0
    frozen = (*asked.freeze, *(model.frozen() if model is not None else ()))
    save = needed(asked.save, "--save", "finetune")
    plan = _plan(asked, save, evaluate, frozen)
    if leads():
        for note in (*script.notes(), *notes):
            tell(note)

    def expected(layout: Layout) -> None:
        check_layout(layout, model, script)

    start, load = _beginning(asked)
    try:
        ended = commands.finetune(
            start, hf_dir, data, plan, asked.dtype, asked.resume, tell,
            expected if script.given else None, load,
        )  # fmt: skip
    except KeyboardInterrupt:
        return _interrupted(asked, "interrupted") if leads() else INTERRUPTED
    code = INTERRUPTED if ended.stopped else 0
    if not leads():
        return code
    if ended.stopped:
        return _interrupted(asked, f"stopped after iteration {ended.iteration}")
    last = {"iteration": ended.iteration, "loss": ended.loss, "save": str(save)}
    print(json.dumps(last) if asked.json else f"done: loss {ended.loss:.6f}, {save}")
    return code


def _tell(event: object, asked: Finetuned) -> None:
    """Lines of the log to stdout, notes to stderr."""
    from mmconvert.runtime.journal import Line

    if not isinstance(event, Line):
        if not asked.quiet:
            print(event, file=sys.stderr)
    elif asked.json:
        print(json.dumps(event.as_dict()), flush=True)
    elif not asked.quiet:
        print(words_of(event, asked), flush=True)


def _beginning(asked: Finetuned) -> tuple[Path | None, Load | None]:
    """The checkpoint whose weights are the start, and the run that is gone on with."""
    from mmconvert.runtime.beginning import Load

    if asked.load is None:
        return asked.mm_dir, None
    if asked.finetune:
        return asked.load, None
    return asked.mm_dir, Load(asked.load, asked.ckpt_step, not asked.no_load_optim)


def _plan(asked: Finetuned, save: Path, evaluate: int, frozen: tuple[str, ...]) -> Plan:
    """The flags as the runtime takes them."""
    from mmconvert.runtime.optimizer import Recipe
    from mmconvert.runtime.schedule import Schedule
    from mmconvert.runtime.training import Plan

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
    return Plan(
        save, asked.train_iters, None if asked.save_interval < 0 else asked.save_interval,
        evaluate, asked.eval_iters, asked.log_interval, asked.micro_batch_size,
        asked.global_batch_size // asked.micro_batch_size, asked.seed, frozen,
        not asked.no_save_optim, recipe, kind, asked.order,
        asked.recompute_granularity == "full", asked.data_parallel_size, asked.num_workers or 1,
    )  # fmt: skip


def _data(asked: Finetuned) -> tuple[Path, Data, tuple[str, ...]]:
    """The Hugging Face folder, the data, and what is to be said of them."""
    from mmconvert.runtime.datajson import read_data_json
    from mmconvert.runtime.dataset import Data
    from mmconvert.runtime.prepare import Prepare
    from mmconvert.runtime.samples import Source

    if asked.mm_data is None:
        train, check = _files(asked.data), _files(asked.val_data)
        data = Data(
            (Source(train, asked.max_samples),),
            (Source(check),) if check else (),
            asked.val_rate,
            Prepare(length=asked.seq_length, newline=not asked.skip_newline),
            asked.strict,
        )
        return needed(asked.hf_dir, "--hf_dir", "finetune"), data, ()
    found = read_data_json(asked.mm_data)
    hf_dir = asked.hf_dir or found.hf_dir
    if hf_dir is None:
        raise RequestError(
            f"{asked.mm_data} names no model folder", "model_name_or_path or from_pretrained",
            "write it there, or give --hf_dir",
        )  # fmt: skip
    newline = not asked.skip_newline
    prepare = replace(found.prepare, length=asked.seq_length, newline=newline)
    data = Data(found.train, found.check, found.rate, prepare, asked.strict)
    return hf_dir, data, found.notes


def _interrupted(asked: Finetuned, how: str) -> int:
    from mmconvert.runtime.mmfiles import last_saved

    last = None if asked.save is None else last_saved(asked.save)
    if last is None:
        what, fix = f"{how}: no checkpoint was saved yet", ""
    else:
        what = f"{how}: the newest checkpoint in {asked.save} is that of iteration {last}"
        fix = "--resume goes on from it"
    if asked.json:
        told = {"error": "Interrupted", "what": what, "expected": "", "fix": fix}
        print(json.dumps(told | {"exit_code": INTERRUPTED}))
    print(f"{what}; {fix}" if fix else what, file=sys.stderr)
    return INTERRUPTED


def _files(listed: str) -> tuple[Path, ...]:
    return tuple(Path(name.strip()) for name in listed.split(",") if name.strip())


def _check(asked: Finetuned, script: Script) -> None:
    """What is missing, and numbers that make no sense."""
    needed(asked.mm_dir or asked.load, "--mm_dir (or --load)", "finetune")
    needed(asked.save, "--save", "finetune")
    if not asked.data and asked.mm_data is None:
        raise RequestError("there is no data", "--data train.json, or --mm_data data.json")
    if asked.data and asked.mm_data is not None:
        raise RequestError("--data and --mm_data are both given", "one of them")
    _check_numbers(asked)
    pairs = (
        ("calculate_per_sample_loss", "calculate_per_token_loss"),
        ("warmup_iters", "lr_warmup_fraction"), ("mm_dir", "load"),
    )  # fmt: skip
    for one, two in pairs:
        if getattr(asked, one) and getattr(asked, two):
            raise RequestError(f"--{one} and --{two} are both given", "one of them")
    if asked.global_batch_size % asked.micro_batch_size:
        raise RequestError(
            f"--global_batch_size {asked.global_batch_size} is no multiple of --micro_batch_size "
            f"{asked.micro_batch_size}",
            "whole micro-batches",
        )
    if not script.given:  # scripts evaluate where data.json has data for it
        _check_evaluation(asked)


def _check_numbers(asked: Finetuned) -> None:
    """The bounds of each number for itself."""
    least = {
        "train_iters": 1, "save_interval": -1, "lr_decay_iters": 0, "data_parallel_size": 0,
        "ckpt_step": 0, "eval_interval": 0, "eval_iters": 1, "max_samples": 0,
        "log_interval": 0, "warmup_iters": 0, "micro_batch_size": 1, "global_batch_size": 0,
        "seq_length": 0, "num_workers": 0,
    }  # fmt: skip
    for name, bound in least.items():
        if getattr(asked, name) < bound:
            raise RequestError(f"--{name} is {getattr(asked, name)}", f"at least {bound}")
    for name in ("lr", "min_lr", "lr_warmup_init", "weight_decay", "adam_eps", "clip_grad"):
        if not 0 <= getattr(asked, name) < float("inf"):
            raise RequestError(f"--{name} is {getattr(asked, name)}", "a number of at least 0")
    for name in ("adam_beta1", "adam_beta2", "val_rate", "lr_warmup_fraction"):
        if not 0 <= getattr(asked, name) < 1:
            raise RequestError(f"--{name} is {getattr(asked, name)}", "a number from 0 to 1")


def _check_evaluation(asked: Finetuned) -> None:
    """Evaluation needs data and an interval."""
    if asked.val_data and asked.val_rate:
        raise RequestError("--val_data and --val_rate are both given", "one of them")
    if asked.eval_interval and not (asked.val_data or asked.val_rate):
        raise RequestError("--eval_interval is given without data", "--val_data or --val_rate")
    if (asked.val_data or asked.val_rate) and not asked.eval_interval:
        given = "--val_data" if asked.val_data else "--val_rate"
        raise RequestError(f"{given} is given without --eval_interval", "when to evaluate")


def words_of(line: object, asked: Finetuned) -> str:
    """A line of the log."""
    from mmconvert.runtime.journal import Line

    assert isinstance(line, Line)  # noqa: S101 - the caller has looked
    head = f"iteration {line.iteration:>6}/{asked.train_iters}"
    if line.loss is None:
        return f"{head} | validation loss {line.evaluation:.6f}"
    tail = f" | {line.tokens:.0f} tokens/s" if asked.log_tps else ""
    return (
        f"{head} | loss {line.loss:.6f} | lr {line.rate:.3e} | grad norm {line.norm:.3f} | "
        f"{line.seconds:.3f} s{tail}"
    )
