"""Questions to a checkpoint, and its answers in words: one, many from a file, or a chat."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmconvert.errors import MMConvertError, RequestError
from mmconvert.runtime.asking import Ended, Step, converse
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.generation import PromptBatch
from mmconvert.runtime.inputs import side_by_side
from mmconvert.runtime.lora import LoraFolders
from mmconvert.runtime.mmfiles import LoadableCheckpoint, with_adapters
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.sampling import Sampling
from mmconvert.sharding.layout import Layout

Say = Callable[[str], None]
End = Literal["eos", "length", "context"]
AHEAD = 8  # batches whose prompts are read, and sorted by length, together
ROOM = 1 << 14  # tokens of the prompts that are answered side by side, padding counted


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
    end: End

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
        full: End = "length" if len(tokens) == self.how.most else "context"
        return Reply(text, tuple(tokens), read, full)

    def run(
        self, ask: Callable[[], PromptBatch | None], hear: Callable[[Step | Ended], None]
    ) -> None:
        """As :func:`mmconvert.runtime.asking.converse`."""
        how = self.how
        converse(self.arch, self.stored, self.stop, how.dtype, how.choice, ask, hear)


def _silent(words: str) -> None:
    del words


class Several:
    """Prompts that are answered side by side, those of about the same length together.

    Args:
        hear: gets each number and reply, in the order of the prompts.
        say: gets the words of a prompt that is answered alone, as they come.
    """

    def __init__(
        self,
        model: AnsweringModel,
        samples: Iterable[Sample],
        hear: Callable[[int, Reply], None],
        say: Say,
    ) -> None:
        self._model, self._hear, self._say = model, hear, say
        self._left = enumerate(samples)
        self._waiting: deque[list[tuple[int, Batch]]] = deque()
        self._now: list[tuple[int, Batch]] = []
        self._wordings: list[Wording] = []
        self._done: dict[int, Reply] = {}
        self._next = 0

    def ask(self) -> PromptBatch | None:
        """The next prompts."""
        if not self._waiting:
            self._waiting.extend(self._read())
        if not self._waiting:
            return None
        self._now = self._waiting.popleft()
        alone = len(self._now) == 1
        say = self._say if alone else _silent
        self._wordings = [Wording(self._model.speaker.words, say) for _ in self._now]
        batch = side_by_side(self._model.arch, [b for _, b in self._now])
        numbers = tuple(number for number, _ in self._now)
        return PromptBatch(batch, self._model.room(batch.ids.shape[1]), numbers)

    def _read(self) -> Iterator[list[tuple[int, Batch]]]:
        """Some more prompts, in groups to be answered side by side."""
        rows = self._model.how.rows
        some = [
            (number, self._model.prompt(sample))
            for _, (number, sample) in zip(range(AHEAD * rows), self._left, strict=False)
        ]
        some.sort(key=lambda one: one[1].ids.shape[1])
        group: list[tuple[int, Batch]] = []
        for one in some:
            time = one[1].ids.shape[1]
            fits = len(group) < rows and (len(group) + 1) * time <= ROOM
            # one that the model's positions cut short must not cut others
            if group and not (fits and self._model.room(time) == self._model.how.most):
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    def hear(self, event: Step | Ended) -> None:
        """Takes tokens, and whole answers."""
        if isinstance(event, Step):
            for wording, token in zip(self._wordings, event.tokens, strict=True):
                if token is not None:
                    wording.hear(token)
            return
        every = zip(self._now, self._wordings, event.answers, strict=True)
        for (number, batch), wording, tokens in every:
            reply = self._model.reply(wording.end(), tokens, batch.ids.shape[1])
            self._done[number] = reply
        while self._next in self._done:
            self._hear(self._next, self._done.pop(self._next))
            self._next += 1


class Chat:
    """A conversation: each question sees what was said before it, which is kept in the KV cache.

    Args:
        read: the next question, a new conversation's (``True``) or not; None is the end.
        say: gets words as they come.
        hear: gets each reply.
        tell: gets what is wrong with a question; the next is read then.
    """

    def __init__(
        self,
        model: AnsweringModel,
        read: Callable[[], tuple[Sample, bool] | None],
        say: Say,
        hear: Callable[[Reply], None],
        tell: Callable[[MMConvertError], None],
    ) -> None:
        self._model, self._read, self._say = model, read, say
        self._hear, self._tell = hear, tell
        self._seen = self._number = 0  # tokens before the answer; questions so far
        self._wording = Wording(model.speaker.words, say)

    def ask(self) -> PromptBatch | None:
        """The next question."""
        while (question := self._read()) is not None:
            sample, anew = question
            goes_on = self._seen > 0 and not anew
            try:
                batch = self._model.speaker.batch(sample, answer=True, goes_on=goes_on)
                seen = batch.ids.shape[1] + (self._seen if goes_on else 0)
                most = self._model.room(seen)
            except MMConvertError as error:
                self._tell(error)
                continue
            self._seen, self._number = seen, self._number + 1
            self._wording = Wording(self._model.speaker.words, self._say)
            return PromptBatch(batch, most, (self._number - 1,), goes_on, followed=True)
        return None

    def hear(self, event: Step | Ended) -> None:
        """Takes tokens, and whole answers."""
        if isinstance(event, Step):
            for token in event.tokens:
                if token is not None:
                    self._wording.hear(token)
            return
        tokens = event.answers[0]
        reply = self._model.reply(self._wording.end(), tokens, self._seen)
        self._seen += len(reply.tokens)  # an end is not read: the next question has its own
        self._hear(reply)
