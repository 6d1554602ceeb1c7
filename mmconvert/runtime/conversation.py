"""Conversations as token ids: the text around pictures, videos and sounds, and what is learnt."""

# Some functions of transformers have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmconvert.errors import RequestError
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.filetokens import FileTokens, Spelled
from mmconvert.runtime.inputs import assemble
from mmconvert.runtime.media import Media
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import AUDIO, IMAGE, PLACE, VIDEO, Sample
from mmconvert.runtime.template import Turn, line, template_of
from mmconvert.runtime.words import Words

THOUGHT = re.compile("<think>.*?</think>", re.DOTALL)


class Speaker:
    """Turns conversations into batches, and ids into words.

    Pieces of text are tokenised as LLaMA-Factory's templates have them, which MindSpeed-MM trains
    Qwen models with: ``user`` and its newline go with the words behind them, an answer stands
    alone.

    Args:
        hf_dir: has the tokenizer.

    Raises:
        RequestError: there is no usable tokenizer, or it does not fit the model.
    """

    def __init__(self, arch: Architecture, hf_dir: Path, prepare: Prepare | None = None) -> None:
        self.prepare = prepare or Prepare()
        self.arch = arch
        self._template = template_of(arch, hf_dir, self.prepare.template)
        self._words = Words(arch, hf_dir)
        form = self._template
        words = form.closings if form.openings else ("<|im_start|>", "<|im_end|>")
        known = [self._words.special(word) for word in words]
        self._start: int | None = None if form.openings else known[0]
        self._end: int | None = None if form.openings else known[1]
        self._closings = set(known if form.openings else known[1:])
        self._files = FileTokens(
            arch, Media(arch, hf_dir, self.prepare), self._words, weave=self.prepare.sound_in_video
        )

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers' tokenizer
        """The tokenizer itself."""
        return self._words.tokenizer

    @property
    def stop(self) -> set[int]:
        """Ids that end an answer."""
        last = self._words.tokenizer.eos_token_id
        return self._closings | ({last} if isinstance(last, int) else set())

    def words(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._words.tokenizer.decode(list(ids), skip_special_tokens=True))

    def batch(self, sample: Sample, answer: bool, *, goes_on: bool = False) -> Batch:
        """A batch of one conversation.

        Args:
            answer: end with the start of an answer, as for generating; else with what was said.
            goes_on: it stands behind an answer without its end, in place of the beginning.

        Raises:
            RequestError: files and places do not match, or the model has no such encoder.
        """
        sample, media, tokens = self._files.read(sample)
        files = [ids for each in tokens.values() for ids in each]
        rows = sum(i in self.arch.places for ids in files for i in ids)
        ids, labels = line(
            self._turns(sample, tokens, answer=answer, goes_on=goes_on),
            0 if answer else self.prepare.length,
            by_turn=self._template.by_turn,
            everything=self.prepare.learn_questions,
            last=self.prepare.learn_last,
        )
        left = sum(map(len, tokens.values()))
        if left:
            raise RequestError(
                f"{sample.name}: {left} more files than places for them in the text",
                "one <image> for each picture",
            )
        self._check_length(sample, ids, rows)
        return assemble(self.arch, torch.tensor([ids]), torch.tensor([labels]), *media)

    def _turns(self, sample: Sample, tokens: Spelled, *, answer: bool, goes_on: bool) -> list[Turn]:
        """The turns of a conversation: questions, each with the answer behind it."""
        form, messages = self._template, list(sample.messages)
        if not goes_on and form.system and messages[0][0] != "system":
            messages.insert(0, ("system", form.system))
        turns = [Turn(self._beginning(goes_on=goes_on))]
        for role, text in messages:
            learnt = role == "assistant"
            if turns[-1].answer and not learnt:
                turns.append(Turn())
            turn = turns[-1]
            opening, word = self._opening(role)
            turn.add(opening, answer=bool(turn.answer))
            if learnt and not form.openings:
                turn.add(self._words.ids(word), answer=bool(turn.answer))
            else:  # one text: a question that begins with a newline may make one token of both
                text = word + text
            if learnt and form.thought:
                text = self._thought(turn, text)
            for ids in self._pieces(text, tokens):
                turn.add(ids, answer=learnt, learnt=learnt)
            if self._end is not None:
                turn.add([self._end], answer=learnt, learnt=learnt)
            newline = learnt and self.prepare.newline and not self.arch.intern
            turn.add(self._words.ids(form.between), answer=learnt, learnt=newline)
        if answer:
            opening, word = self._opening("assistant")
            turns.append(Turn([*opening, *self._words.ids(word)]))
        elif form.openings and turns[-1].answer:  # elsewhere the next message ends an answer
            turns[-1].add([self._words.tokenizer.eos_token_id], answer=True, learnt=True)
        return turns

    def _beginning(self, *, goes_on: bool) -> list[int]:
        """What stands before the first message, or behind an answer without its end."""
        form = self._template
        if goes_on:
            return [] if self._end is None else [self._end, *self._words.ids(form.between)]
        first = self._words.tokenizer.bos_token_id
        begin = [first] if form.begin and isinstance(first, int) else []
        return [*begin, *(self._words.special(word) for word in form.beginning)]

    def _thought(self, turn: Turn, text: str) -> str:
        """Puts the thought that is none before an answer without one; the answer as it is learnt.

        Source: ``ReasoningTemplate`` of LLaMA-Factory: without ``enable_thinking`` thoughts are
        left out, and the empty one belongs to the question.
        """
        thinking = self.prepare.thinking
        if not thinking:
            text = THOUGHT.sub("", text).lstrip("\n")
        if "<think>" not in text and "</think>" not in text:
            none = self._words.ids(self._template.thought)
            turn.add(none, answer=thinking or bool(turn.answer), learnt=thinking)
        return text

    def _opening(self, role: str) -> tuple[list[int], str]:
        """The token that opens a message, and the text behind it."""
        if self._start is None:
            return [self._words.special(self._template.openings[role])], "\n"
        return [self._start], f"{role}\n"

    def _check_length(self, sample: Sample, ids: Sequence[int], rows: int) -> None:
        """The model has positions for all ids, and no picture was cut through."""
        most = getattr(self.arch.text_config, "max_position_embeddings", None)
        if most is not None and len(ids) > most:
            raise RequestError(
                f"{sample.name} has {len(ids)} tokens",
                f"at most {most}, by max_position_embeddings of config.json",
                "fewer or smaller pictures, or fewer words",
            )
        if self.prepare.length and sum(i in self.arch.places for i in ids) != rows:
            raise RequestError(
                f"{sample.name} is longer than {self.prepare.length} tokens, and its pictures or "
                "sounds would be cut off in the middle",
                "a sample whose files fit in --seq_length",
            )

    def plain(self, text: str) -> Batch:
        """A batch of a text that is to be continued as it is.

        Raises:
            RequestError: there is nothing to continue.
        """
        ids = self._words.ids(text)
        if not ids:
            raise RequestError("the prompt is empty", "a text to continue")
        _, media, _ = self._files.read(Sample([("user", text)]))
        both = torch.tensor([ids])
        return assemble(self.arch, both, both.clone(), *media)

    def _pieces(self, text: str, tokens: Spelled) -> Iterator[list[int]]:
        """The ids of a text, those of a file where one stands."""
        at = 0
        for found in PLACE.finditer(text):
            yield self._words.ids(text[at : found.start()])
            kind, at = found[1], found.end()
            if not tokens[kind]:
                raise RequestError(
                    f"a conversation has more <{kind}> places than files",
                    f"a file for each <{kind}>, and a model that takes it",
                )
            yield tokens[kind].pop(0)
        yield self._words.ids(text[at:])


def prompt(
    text: str, images: Sequence[Any], audios: Sequence[Any], videos: Sequence[Path] = ()
) -> Sample:
    """A question about files, which stand before the words where no place is marked."""
    marked = {m[1] for m in PLACE.finditer(text)}
    files = {IMAGE: images, VIDEO: videos, AUDIO: audios}
    front = "".join(f"<{kind}>" * len(some) for kind, some in files.items() if kind not in marked)
    return Sample([("user", front + text)], images, videos, audios)
