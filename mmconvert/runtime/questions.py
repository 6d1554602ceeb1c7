"""Questions to a checkpoint: many, answered side by side, or a chat."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from mmconvert.errors import MMConvertError
from mmconvert.runtime.answers import AnsweringModel, Reply, Say, Wording
from mmconvert.runtime.asking import Ended, Step
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.generation import PromptBatch
from mmconvert.runtime.inputs import side_by_side
from mmconvert.runtime.samples import Sample

AHEAD = 8  # batches whose prompts are read, and sorted by length, together
ROOM = 1 << 14  # tokens of the prompts that are answered side by side, padding counted


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
