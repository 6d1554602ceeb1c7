"""The command ``generate``: an MM checkpoint answers a prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.scriptflags import (
    Script,
    check_layout,
    check_only_qwenvl,
    needed,
    read_script,
)
from mmconvert.config import MaybePath
from mmconvert.errors import RequestError
from mmconvert.sharding.layout import Layout

LONGEST = 128  # tokens of an answer
Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]


@dataclass(frozen=True)
class Generated:
    """What to ask whom."""

    mm_dir: MaybePath = None
    """The MM checkpoint; it runs in its own layout, one process for each rank. Of Qwen-VL a .ckpt
    file or rank folders, in one process; not given: the weights of hf_dir."""
    hf_dir: MaybePath = None
    """The Hugging Face folder with config.json, tokenizer and processor of the model."""
    prompt: str = ""
    """The question; <image>, <video> and <audio> may mark the places of the files."""
    mm_model: MaybePath = None
    """MindSpeed-MM's inference_*.json: the question, its files, and hf_dir; flags come first."""
    image: Files = ()
    """Pictures."""
    video: Files = ()
    """Videos: files (extra media), folders of pictures, or animated pictures."""
    audio: Files = ()
    """Sounds, for Qwen2.5-Omni: PCM WAV; others, and those of videos, with the extra media."""
    max_new_tokens: int = 0
    """The most tokens of the answer; 0: 128, or as the inference file says."""
    dtype: Literal["", "fp32", "bf16"] = ""
    """What is computed in; not given: fp32, or as the inference file says."""
    vocab_file: MaybePath = None
    """The tokenizer of Qwen-VL: qwen.tiktoken; not given: that in hf_dir."""
    like: Literal["hub", "mindformers"] = "hub"
    """Whose numbers Qwen-VL has where the two differ: position tables, tokens, long texts."""
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
    from mmconvert.cli.tools.finetune import Finetuned

    script = read_script(words, [f.name for f in fields(Generated)], fields(Finetuned))
    asked = read_plain(Generated, script.words, prog, f"{text}\n\nexample:\n  {example}")
    from mmconvert.runtime import needs

    needs.require(asked.device)
    return _answer(asked, script)


def _answer(asked: Generated, script: Script) -> int:
    """Answers, with torch at hand."""
    from mmconvert.runtime import commands
    from mmconvert.runtime.inferencejson import read_inference
    from mmconvert.runtime.launch import leads
    from mmconvert.runtime.prepare import Prepare
    from mmconvert.runtime.qwenvl import answer as qwenvl

    file = read_inference(asked.mm_model) if asked.mm_model is not None else None
    prepare = Prepare(video_frames=file.frames) if file and file.frames else Prepare()
    how = commands.How(prepare)
    if file is not None:

        def expected(layout: Layout) -> None:
            check_layout(layout, file.model, script)

        plain = file.plain and not (asked.prompt or asked.image or asked.video or asked.audio)
        how = commands.How(prepare, file.penalty, plain, expected)
        asked = replace(
            asked,
            mm_dir=asked.mm_dir or file.mm_dir,
            hf_dir=asked.hf_dir or file.hf_dir,
            prompt=asked.prompt or file.prompt,
            image=asked.image or file.images,
            video=asked.video or file.videos,
            max_new_tokens=asked.max_new_tokens or file.most,
            dtype=asked.dtype or cast("Literal['', 'fp32', 'bf16']", file.dtype),
        )
    if not asked.prompt:
        raise RequestError("there is no question", "--prompt, or --mm_model inference.json")
    speaks = leads()

    def say(part: str) -> None:
        if speaks and not asked.json:
            print(part, end="", flush=True)

    for note in script.notes() if speaks else ():
        print(note, file=sys.stderr)
    hf_dir = needed(asked.hf_dir, "--hf_dir", "generate")
    if qwenvl.serves(hf_dir):
        return _qwenvl(asked, hf_dir, say)
    check_only_qwenvl(asked.vocab_file, asked.like)
    answer = commands.generate(
        needed(asked.mm_dir, "--mm_dir (or --load)", "generate"), hf_dir,
        asked.prompt, asked.image, asked.video, asked.audio,
        asked.max_new_tokens or LONGEST, asked.dtype or "fp32", say, how,
    )  # fmt: skip
    if speaks:
        print(json.dumps({"text": answer}) if asked.json else "")
    return 0


def _qwenvl(asked: Generated, hf_dir: Path, say: Callable[[str], None]) -> int:
    """Qwen-VL answers, in this process."""
    from mmconvert.runtime.qwenvl import answer as qwenvl

    if asked.video or asked.audio:
        raise RequestError("Qwen-VL takes pictures alone", "no --video and no --audio")
    most = asked.max_new_tokens or LONGEST
    question = qwenvl.question(
        hf_dir, asked.mm_dir, asked.vocab_file, asked.prompt, asked.image, most, asked.like
    )
    answers = qwenvl.ask(question, asked.dtype or "fp32", say, noted)
    print(json.dumps({"text": answers[0]}) if asked.json else "")
    return 0


def noted(event: object) -> None:
    """A note, beside the answer."""
    print(event, file=sys.stderr)
