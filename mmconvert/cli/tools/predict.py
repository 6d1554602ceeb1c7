"""The command ``predict``: Qwen-VL answers, with the arguments of MindFormers' own script."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.settings import read_yaml
from mmconvert.errors import RequestError

if TYPE_CHECKING:
    from mmconvert.runtime.qwenvl.sizes import Sizes

Word = tyro.conf.Positional


@dataclass(frozen=True)
class Predicted:
    """The eight arguments of run_qwenvl_predict.sh, in their order, and flags of ours."""

    parallel: Word[Literal["single", "parallel"]]
    """single, or parallel for several devices; here one device computes in both cases."""
    config_path: Word[Path]
    """MindFormers' predict_qwenvl_*.yaml, or a folder with the hub's config.json."""
    ckpt_path: Word[Path]
    """A .ckpt file, rank folders, or a Hugging Face folder."""
    tokenizer: Word[Path]
    """qwen.tiktoken."""
    image_path: Word[str]
    """The picture."""
    prompt: Word[str]
    """What to say about it."""
    batch_size: Word[int] = 1
    """How many times to ask, side by side."""
    device_num: Word[int] = 1
    """Number of devices; read, and without effect."""
    predict_length: int = 512
    """Tokens of prompt and answer at most; the seq_length of the configuration, if that is more."""
    like: Literal["hub", "mindformers"] = "mindformers"
    """Whose numbers to have where the hub's code and MindFormers differ."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What is computed in."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """What to compute on; auto takes the accelerator that is there, else the CPU."""
    json: bool = False
    """Print the answers, or the error, as JSON."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Answers, greedily; the words of the first row are printed as they come."""
    prog = "mm-convert predict"
    text = (
        "Qwen-VL answers a prompt on a picture, with the arguments of MindFormers' "
        "run_qwenvl_predict.sh: the prompt is continued as it is, greedily."
    )
    example = f"{prog} single predict_qwenvl_9.6b.yaml X.ckpt qwen.tiktoken a.png 'Describe it:' 1"
    asked = read_plain(Predicted, words, prog, f"{text}\n\nexample:\n  {example}")
    _check(asked)
    from mmconvert.runtime import needs

    needs.require(asked.device)
    from mmconvert.runtime.qwenvl import answer

    if asked.parallel == "parallel" and asked.device_num > 1:
        print("note: computed on one device; slices are put together in memory", file=sys.stderr)
    sizes = _sizes(asked)
    total = max(asked.predict_length, sizes.trained)
    question = answer.Question(
        sizes, asked.ckpt_path, asked.tokenizer, asked.prompt, [Path(asked.image_path)],
        total, "plain", total, asked.batch_size,
    )  # fmt: skip

    def say(part: str) -> None:
        if not asked.json:
            print(part, end="", flush=True)

    head = f"Picture 1: <img>{asked.image_path}</img>\n{asked.prompt}"
    say(head)
    answers = answer.ask(question, asked.dtype, say, lambda note: print(note, file=sys.stderr))
    if asked.json:
        print(json.dumps([{"prompt": head} | reply.as_dict() for reply in answers]))
        return 0
    print()
    for reply in answers[1:]:
        print(head + reply.text)
    return 0


def _check(asked: Predicted) -> None:
    for name in ("batch_size", "device_num", "predict_length"):
        if getattr(asked, name) < 1:
            raise RequestError(f"{name} is {getattr(asked, name)}", "a number of at least 1")
    if "://" in asked.image_path:
        raise RequestError(
            f"{asked.image_path} is not a file", "a picture on this machine: nothing is downloaded",
            "download it, and give its path",
        )  # fmt: skip


def _sizes(asked: Predicted) -> Sizes:
    from mmconvert.runtime.qwenvl import weights
    from mmconvert.runtime.qwenvl.sizes import Sizes

    path = asked.config_path
    if path.suffix not in (".yaml", ".yml"):
        folder = path.parent if path.name == "config.json" else path
        return weights.sizes_of(folder, asked.like)
    return Sizes.of_yaml(read_yaml(path, "CONFIG_PATH"), str(path), asked.like)
