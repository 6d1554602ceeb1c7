"""A checkpoint that can be asked, and its answers in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmconvert.errors import RequestError
from mmconvert.runtime.asking import Ended, Step, converse
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.generation import PromptBatch
from mmconvert.runtime.lora import LoraFolders
from mmconvert.runtime.mmfiles import LoadableCheckpoint, with_adapters
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.sampling import Sampling
from mmconvert.sharding.layout import Layout

Say = Callable[[str], None]
Ending = Literal["eos", "length", "context"]


@dataclass(frozen=True)
class How:
    """How prompts are answered.

    Attributes:
        prepare: how files become tensors.
        choice: how words are chosen.
        plain: a prompt is continued as it is, without the form of a chat.
        most: tokens of an answer at most.
        dtype: what is computed in, ``fp32`` or ``bf16``.
        rows: prompts that are answered side by side.
        expected: looks at the checkpoint's layout before anything is done.
        lora: adapters that the checkpoint answers with.
    """

    prepare: Prepare = field(default_factory=Prepare)
    choice: Sampling = field(default_factory=Sampling)
    plain: bool = False
    most: int = 128
    dtype: str = "fp32"
    rows: int = 8
    expected: Callable[[Layout], None] | None = None
    lora: LoraFolders | None = None

    def check(self) -> None:
        """Raises RequestError: a number that makes no sense."""
        self.choice.check()
        for flag, number in (("--max_new_tokens", self.most), ("--batch_size", self.rows)):
            if number < 1:
                raise RequestError(f"{flag} is {number}", "a number of at least 1")


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without special tokens.
        tokens: its ids, without the one that ends it.
        prompt_tokens: tokens of the prompt; in a chat, of all that stands before the answer.
        end: why it ended: the model ended it, it has --max_new_tokens, or the model has no
            positions for more.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    end: Ending

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": len(self.tokens),
            "end": self.end,
        }


class Wording:
    """The text of ids as they come, in whole characters.

    Args:
        words: text of ids.
        say: gets each piece.
    """

    def __init__(self, words: Callable[[Sequence[int]], str], say: Say) -> None:
        self._words, self._say = words, say
        self._ids: list[int] = []
        self._start = self._read = 0  # ids of the last piece: spaces may depend on them

    def hear(self, token: int) -> None:
        """Takes one id more."""
        self._ids.append(token)
        piece = self._piece()
        if piece and not piece.endswith("\ufffd"):  # half of a character: its others follow
            self._say(piece)
            self._start, self._read = self._read, len(self._ids)

    def end(self) -> str:
        """Says what is left; the whole text."""
        if piece := self._piece():
            self._say(piece)
        return self._words(self._ids)

    def _piece(self) -> str:
        before = self._words(self._ids[self._start : self._read])
        return self._words(self._ids[self._start :])[len(before) :]


class AnsweringModel:
    """A checkpoint that can be asked.

    Raises:
        MMConvertError: it is missing or damaged, or the model has no usable tokenizer.
    """

    def __init__(self, mm_dir: Path, hf_dir: Path, how: How) -> None:
        how.check()
        self.how = how
        self.arch: Architecture
        self.stored: LoadableCheckpoint
        self.arch, self.stored = load_folder(hf_dir, mm_dir)
        if how.expected is not None:
            how.expected(self.stored.layout)
        if how.lora is not None:
            self.stored = with_adapters(self.stored, how.lora.mm, how.lora.alpha)
        self.speaker = Speaker(self.arch, hf_dir, how.prepare)
        self.stop = frozenset(self.speaker.stop)

    def prompt(self, sample: Sample) -> Batch:
        """A prompt of one sample, ready to be answered."""
        if self.how.plain:
            return self.speaker.plain(sample.messages[-1][1])
        return self.speaker.batch(sample, answer=True)

    def room(self, read: int) -> int:
        """Tokens that an answer may have behind those that were read.

        Raises:
            RequestError: none.
        """
        most = getattr(self.arch.text_config, "max_position_embeddings", None)
        if most is None:
            return self.how.most
        if read >= most:
            raise RequestError(
                f"the conversation has {read} tokens, the model positions for {most}",
                "room for an answer", "a shorter one",
            )  # fmt: skip
        return min(self.how.most, most - read)

    def reply(self, text: str, tokens: Sequence[int], read: int) -> Reply:
        """An answer behind ``read`` tokens."""
        if tokens and tokens[-1] in self.stop:
            return Reply(text, tuple(tokens[:-1]), read, "eos")
        full: Ending = "length" if len(tokens) == self.how.most else "context"
        return Reply(text, tuple(tokens), read, full)

    def run(
        self, ask: Callable[[], PromptBatch | None], hear: Callable[[Step | Ended], None]
    ) -> None:
        """As :func:`mmconvert.runtime.asking.converse`."""
        how = self.how
        converse(self.arch, self.stored, self.stop, how.dtype, how.choice, ask, hear)
