"""The command ``validate``: does an MM checkpoint compute what the HF folder computes?"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.loradir import adapters
from mmconvert.cli.scriptflags import check_only_qwenvl
from mmconvert.config import MaybeFloat, MaybePath
from mmconvert.errors import RequestError
from mmconvert.words import one_line

if TYPE_CHECKING:
    from mmconvert.runtime.verdict import ValidationReport

DIFFERENT = 1


@dataclass(frozen=True)
class Validated:
    """What to compare, and on what."""

    mm_dir: Path
    """The MM checkpoint; it runs in its own layout, one process for each rank. Of Qwen-VL a .ckpt
    file or rank folders, in one process."""
    hf_dir: Path
    """The Hugging Face folder with the same model; it runs in one process."""
    prompt: str = ""
    """The words to compute on; empty takes a built-in prompt, or made-up ids where the folder has
    no tokenizer."""
    image: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Pictures for the prompt; none takes a built-in one."""
    audio: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Sounds for the prompt (WAV), for Qwen2.5-Omni."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What both sides compute in."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """What to compute on; auto takes the accelerator that is there, else the CPU."""
    vocab_file: MaybePath = None
    """The tokenizer of Qwen-VL: qwen.tiktoken; not given: that in hf_dir."""
    like: Literal["hub", "mindformers"] = "hub"
    """Whose numbers Qwen-VL has where the two differ: position tables, tokens, long texts."""
    lora_dir: MaybePath = None
    """Adapters that the checkpoint gets: of PEFT, or an MM checkpoint of LoRA training."""
    lora_alpha: MaybeFloat = None
    """lora_alpha of their training, where nothing else tells it."""
    tolerance: float = 0.0
    """Largest difference of logits, relative to the largest logit where that is above 1. 0 takes
    fp32: 1e-5 on one tensor-parallel rank, 1e-4 on more; bf16: 2^-8 and 2^-5."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    quiet: bool = False
    """Print nothing but the result."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Compares; exit code 1 if the two differ."""
    text = (
        "Does an MM checkpoint compute what its Hugging Face model computes? Compares logits, "
        "loss, gradients, greedy tokens and weights, and names the first layer that differs."
    )
    prog = "mm-convert validate"
    asked = read_plain(
        Validated, words, prog, f"{text}\n\nexample:\n  {prog} --mm_dir MM_DIR --hf_dir HF_DIR"
    )
    from mmconvert.runtime import needs

    needs.require(asked.device)
    from mmconvert.runtime import commands
    from mmconvert.runtime.launch import leads
    from mmconvert.runtime.qwenvl import answer, validation

    def note(event: object) -> None:
        if not asked.quiet:
            print(one_line(str(event)), file=sys.stderr)

    if answer.serves(asked.hf_dir):
        if asked.lora_dir is not None:
            raise RequestError("Qwen-VL runs without adapters", "no --lora_dir")
        report = validation.validate(
            asked.mm_dir, asked.hf_dir, asked.vocab_file, asked.prompt, asked.image, asked.dtype,
            asked.tolerance, asked.like, note,
        )  # fmt: skip
    else:
        check_only_qwenvl(asked.vocab_file, asked.like)
        with adapters(
            asked.lora_dir, asked.lora_alpha, asked.hf_dir, asked.mm_dir, judged=True
        ) as lora:
            report = commands.validate(
                asked.mm_dir, asked.hf_dir, asked.prompt, asked.image, asked.audio, asked.dtype,
                asked.tolerance, note, lora,
            )  # fmt: skip
    if leads():
        if asked.json:
            print(json.dumps(report.as_dict()))
        else:
            show(report)
    return 0 if report.passed else DIFFERENT


def show(report: ValidationReport) -> None:
    """The report as a table and a verdict."""
    print(f"layout: {report.layout}")
    print(f"inputs: {report.inputs}, {report.dtype}")
    print(f"{'check':<24}{'difference':>12}{'limit':>10}  ")
    for c in report.checks:
        sign = "ok  " if c.passed else "FAIL"
        print(f"{c.name:<24}{c.found:>12.2e}{c.limit:>10.1e}  {sign}  {c.note}")
    for text in report.notes:
        print(f"note: {text}")
    if report.parting is not None:
        p = report.parting
        print(
            f"first difference: {p.label}: {p.difference:.3g} where values reach {p.size:.3g}, "
            f"on tp rank {', '.join(map(str, p.ranks))}"
        )
    print("equal: both compute the same" if report.passed else "different")
