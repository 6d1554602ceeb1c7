"""The command ``convert_weight``: MindFormers' own spelling of a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mmconvert.cli.arguments import Command, Screen, read_plain
from mmconvert.config import HFConfig, MaybePath, Options
from mmconvert.config.mindspore import HFToMS, MSToHF
from mmconvert.errors import RequestError

PROG = "mm-convert convert_weight"
MODELS = {"qwenvl": "QwenVLConverter"}  # MindFormers' name of a model -> our converter
TEXT = f"""Hugging Face to MindSpore and back, with the flags of MindFormers' convert_weight.py.

examples:
  {PROG} --model qwenvl --input_path HF_DIR --output_path X.ckpt --dtype fp16
  {PROG} --model qwenvl --reversed --input_path X.ckpt --output_path NEW_HF_DIR --hf_dir HF_DIR"""


@dataclass(frozen=True)
class WeightFlags:
    """What to convert."""

    model: str
    """The model: qwenvl."""
    input_path: Path
    """Hugging Face folder; with --reversed a .ckpt or safetensors file, or rank folders."""
    output_path: Path
    """File to write, X.ckpt; with --reversed a folder."""
    reversed: bool = False
    """From MindSpore to Hugging Face."""
    hf_dir: MaybePath = None
    """With --reversed: folder of the original model, whose config, tokenizer and weight file names
    the output takes."""
    strategy: MaybePath = None
    """With --reversed and rank folders: strategy file or folder, if not beside them."""
    conversion: Annotated[Options, tyro.conf.OmitArgPrefixes] = field(default_factory=Options)
    screen: Annotated[Screen, tyro.conf.OmitArgPrefixes] = field(default_factory=Screen)


def run(words: list[str]) -> int:
    """Runs one conversion."""
    asked = read_plain(WeightFlags, words, PROG, TEXT)
    if asked.model not in MODELS:
        raise RequestError(
            f"--model {asked.model} is not supported",
            f"one of {', '.join(MODELS)}",
            "other families have converters of their own: see mm-convert -h",
        )
    cfg = _reversed(asked) if asked.reversed else _forward(asked)
    from mmconvert.cli import conversions

    verb = "ms_to_hf" if asked.reversed else "hf_to_ms"
    conversions.run(
        MODELS[asked.model], "mindspore", verb, Command(cfg, asked.conversion, asked.screen)
    )
    return 0


def _forward(asked: WeightFlags) -> HFToMS:
    for flag, value in (("hf_dir", asked.hf_dir), ("strategy", asked.strategy)):
        if value is not None:
            raise RequestError(
                f"--{flag} has a meaning with --reversed only",
                "--input_path HF_DIR --output_path X.ckpt",
                f"leave --{flag} out, or add --reversed",
            )
    return HFToMS(ms_path=asked.output_path, hf_config=HFConfig(asked.input_path))


def _reversed(asked: WeightFlags) -> MSToHF:
    if asked.hf_dir is None:
        raise RequestError(
            "--reversed needs --hf_dir",
            "the folder of the original model: the output takes its config, tokenizer and names",
            "add --hf_dir HF_DIR",
        )
    return MSToHF(
        save_hf_dir=asked.output_path,
        ms_path=asked.input_path,
        hf_config=HFConfig(asked.hf_dir),
        strategy=asked.strategy,
    )
