"""The command ``generate``: an MM checkpoint answers a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain

Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]


@dataclass(frozen=True)
class Generated:
    """What to ask whom."""

    mm_dir: Path
    """The MM checkpoint; it runs in its own layout, one process for each rank."""
    hf_dir: Path
    """The Hugging Face folder with config.json, tokenizer and processor of the model."""
    prompt: str
    """The question; <image>, <video> and <audio> may mark the places of the files."""
    image: Files = ()
    """Pictures."""
    video: Files = ()
    """Videos: folders of pictures, or animated pictures."""
    audio: Files = ()
    """Sounds (WAV), for Qwen2.5-Omni."""
    max_new_tokens: int = 128
    """The most tokens of the answer."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What is computed in."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """What to compute on; auto takes the accelerator that is there, else the CPU."""
    json: bool = False
    """Print the answer, or the error, as JSON."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Answers, greedily; words are printed as they come."""
    prog = "mm-convert generate"
    text = "An MM checkpoint answers a prompt: greedily, in its own layout, words as they come."
    example = f'{prog} --mm_dir MM_DIR --hf_dir HF_DIR --image cat.png --prompt "What is this?"'
    asked = read_plain(Generated, words, prog, f"{text}\n\nexample:\n  {example}")
    from mmconvert.runtime import needs

    needs.require(asked.device)
    from mmconvert.runtime import commands
    from mmconvert.runtime.launch import leads

    speaks = leads()

    def say(part: str) -> None:
        if speaks and not asked.json:
            print(part, end="", flush=True)

    answer = commands.generate(
        asked.mm_dir, asked.hf_dir, asked.prompt, asked.image, asked.video, asked.audio,
        asked.max_new_tokens, asked.dtype, say,
    )  # fmt: skip
    if speaks:
        print(json.dumps({"text": answer}) if asked.json else "")
    return 0
