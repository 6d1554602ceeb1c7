"""Qwen-VL answers a prompt."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mmconvert.errors import RequestError
from mmconvert.runtime.answers import Reply, Wording
from mmconvert.runtime.device import device
from mmconvert.runtime.processes import Emit
from mmconvert.runtime.qwenvl import prompts, weights
from mmconvert.runtime.qwenvl.model import Cache, QwenVLModel
from mmconvert.runtime.qwenvl.prompts import Prompt
from mmconvert.runtime.qwenvl.sizes import Positions, Sizes
from mmconvert.runtime.qwenvl.tokenizer import END, END_TURN, START_TURN, Tokenizer
from mmconvert.runtime.sampling import Chooser, Sampling

PromptForm = Literal["chat", "plain"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANKS = "qwen.tiktoken"


@dataclass(frozen=True)
class Question:
    """What to ask whom.

    Attributes:
        sizes: of the model.
        checkpoint: a Hugging Face folder, a ``.ckpt`` file or rank folders.
        vocab: the ranks of the tokenizer.
        most: tokens of the answer at most.
        total: tokens of prompt and answer together at most; 0 for no limit.
        form: ``plain`` continues the prompt as it is, as the base model and MindFormers do.
        rows: how many times it is asked, side by side.
    """

    sizes: Sizes
    checkpoint: Path
    vocab: Path
    words: str
    pictures: Sequence[Path]
    most: int
    form: PromptForm
    total: int = 0
    rows: int = 1


def serves(hf_dir: Path) -> bool:
    """Whether a folder's config.json is that of a Qwen-VL."""
    try:
        content = json.loads((hf_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # others say what is wrong with it
        return False
    return (
        isinstance(content, dict) and content.get("model_type") == "qwen" and ("visual" in content)
    )


def form_of(hf_dir: Path) -> PromptForm:
    """``chat`` where generation_config.json says chatml, as Qwen-VL-Chat's does."""
    try:
        content = json.loads((hf_dir / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "plain"
    chatml = isinstance(content, dict) and content.get("chat_format") == "chatml"
    return "chat" if chatml else "plain"


def ask(
    question: Question,
    dtype: str,
    say: Callable[[str], None],
    note: Emit,
    choice: Sampling | None = None,
) -> list[Reply]:
    """The answers, one for each row; ``say`` gets the words of the first as they come.

    Raises:
        MMConvertError: the checkpoint, the tokenizer or a picture cannot be used.
    """
    sizes = question.sizes
    tokenizer = Tokenizer.read(question.vocab, sizes.positions)
    text = prompts.written(question.words, len(question.pictures))
    stop = {tokenizer.special[END]}
    if question.form == "chat":
        text = prompts.chat(text)
        stop |= {tokenizer.special[END_TURN], tokenizer.special[START_TURN]}
    asked = prompts.prompt(tokenizer, sizes, text, question.pictures)
    most, length = question.most, asked.ids.shape[1]
    if question.total:
        most = min(most, question.total - length)
    if most < 1:
        raise RequestError(
            f"the prompt has {length} tokens, the limit is {question.total} with the answer",
            "a shorter prompt, or fewer pictures (258 tokens each)",
        )
    where = device()
    model = weights.load(sizes, question.checkpoint, DTYPES[dtype], where, note)
    wording = Wording(tokenizer.decode, say)

    def hear(token: int) -> None:
        if token not in stop:
            wording.hear(token)

    chooser = Chooser(choice or Sampling(), range(question.rows))
    rows = generate(model, asked.rows(question.rows, where), most, stop, hear, chooser)
    wording.end()
    return [_reply(tokenizer.decode(row), row, length, most, question) for row in rows]


def _reply(text: str, tokens: list[int], length: int, most: int, question: Question) -> Reply:
    """An answer without the token that ends it, for which there is room then."""
    if len(tokens) < most:
        return Reply(text, tuple(tokens), length, "eos")
    return Reply(text, tuple(tokens), length, "length" if most == question.most else "context")


@torch.no_grad()
def generate(
    model: QwenVLModel,
    asked: Prompt,
    most: int,
    stop: set[int],
    hear: Callable[[int], None],
    chooser: Chooser | None = None,
) -> list[list[int]]:
    """Tokens of each row, without the one that ends it; ``hear`` gets the first row's."""
    rows = len(asked.ids)
    found: list[list[int]] = [[] for _ in range(rows)]
    ended = [False] * rows
    cache, ids = Cache(), asked.ids
    pixels, slots = asked.pixels, asked.slots
    chooser = chooser or Chooser(Sampling(), range(rows))  # the best word each time
    for _ in range(most):
        chooser.read(ids, None, model.sizes.vocab)
        ids = chooser.choose(model(ids, pixels, slots, cache=cache, last=True)[:, -1])[:, None]
        pixels = slots = None
        for row, token in enumerate(ids[:, 0].tolist()):
            if ended[row]:
                continue
            if row == 0:
                hear(token)
            ended[row] = token in stop
            if not ended[row]:
                found[row].append(token)
        if all(ended):
            break
    return found


def question(
    hf_dir: Path,
    checkpoint: Path | None,
    vocab: Path | None,
    words: str,
    pictures: Sequence[Path],
    most: int,
    like: Positions,
) -> Question:
    """A question to the model whose config.json stands in a folder."""
    if most < 1:
        raise RequestError(f"--max_new_tokens is {most}", "a number of at least 1")
    form: PromptForm = form_of(hf_dir) if like == "hub" else "plain"
    return Question(
        weights.sizes_of(hf_dir, like), checkpoint or hf_dir, vocab or hf_dir / RANKS,
        words, pictures, most, form,
    )  # fmt: skip
