"""Conversations as token ids: the text around pictures, videos and sounds, and what is learnt."""

# Some functions of transformers have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mmconvert.errors import RequestError
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.inputs import assemble, audio_tokens
from mmconvert.runtime.media import Media
from mmconvert.runtime.pictures import open_picture
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import PLACE, Sample
from mmconvert.runtime.template import Turn, line, template_of

VIDEO = re.compile("<video>")
# Around a placeholder in InternVL's text; the Qwen families have theirs in config.json.
INTERN_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")


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
        self._alone = threading.Lock()
        self.arch, self.media = arch, Media(arch, hf_dir, self.prepare)
        self._template = template_of(arch, hf_dir, self.prepare.template)
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                hf_dir, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a broken tokenizer makes of itself
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RequestError(
                f"{hf_dir} has no tokenizer that transformers can load: {reason}",
                "the tokenizer files of the model",
            ) from None
        start, end = (self._special(word) for word in ("<|im_start|>", "<|im_end|>"))
        self._start, self._end = start, end
        if arch.intern:
            around = [self._special(word) for word in INTERN_TOKENS]
            arch.config.image_token_id = around[1]
            self._around = {"image": ([around[0]], around[1], [around[2]])}
        else:
            self._around = {kind: self._qwen_tokens(kind) for kind in ("image", "video", "audio")}

    def _special(self, word: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(word)
        vocab = self.arch.text_config.vocab_size
        if not isinstance(found, int) or found == self.tokenizer.unk_token_id or found >= vocab:
            raise RequestError(
                f"the tokenizer has no {word} below the model's {vocab} ids",
                "the tokenizer of this model, with the tokens of ChatML",
            )
        return found

    def _qwen_tokens(self, kind: str) -> tuple[list[int], int | None, list[int]]:
        side = "audio" if kind == "audio" else "vision"
        ends = [self.arch.token(f"{side}_{end}_token_id") for end in ("start", "end")]
        place = self.arch.token(f"{kind}_token_id")
        return [ends[0]] if ends[0] else [], place, [ends[1]] if ends[1] else []

    @property
    def stop(self) -> set[int]:
        """Ids that end an answer."""
        last = self.tokenizer.eos_token_id
        return {self._end} | ({last} if isinstance(last, int) else set())

    def words(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _text(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{ascii(text)[:60]} is no text: it has half of a surrogate pair", "Unicode text"
            ) from None
        with self._alone:  # tokenizers have one state for all threads
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = max(ids, default=0)
        if most >= self.arch.text_config.vocab_size:
            raise RequestError(
                f"the tokenizer gives id {most}, the model has {self.arch.text_config.vocab_size}",
                "the tokenizer of this model",
            )
        if self.arch.places & set(ids):
            raise RequestError(
                f"a placeholder of the tokenizer stands in a text: {text[:60]!r}",
                "<image>, <video> or <audio> where a file belongs",
            )
        return list(ids)

    def batch(self, sample: Sample, answer: bool) -> Batch:
        """A batch of one conversation.

        Args:
            answer: end with the start of an answer, as for generating; else with what was said.

        Raises:
            RequestError: files and places do not match, or the model has no such encoder.
        """
        sample, media, tokens = self._media(sample)
        rows = sum(sum(each) for each in tokens.values())
        ids, labels = line(
            self._turns(sample, tokens, answer=answer),
            0 if answer else self.prepare.length,
            by_turn=self._template.by_turn,
            everything=self.prepare.learn_questions,
            last=self.prepare.learn_last,
        )
        left = sum(map(len, tokens.values()))
        if left:
            raise RequestError(f"{sample.name}: {left} more files than places", "<image> for each")
        self._check_length(sample, ids, rows)
        return assemble(self.arch, torch.tensor([ids]), torch.tensor([labels]), *media)

    def _turns(self, sample: Sample, tokens: dict[str, list[int]], *, answer: bool) -> list[Turn]:
        """The turns of a conversation: questions, each with the answer behind it."""
        form, messages = self._template, list(sample.messages)
        if form.system and messages[0][0] != "system":
            messages.insert(0, ("system", form.system))
        turns = [Turn()]
        first = self.tokenizer.bos_token_id
        if form.begin and isinstance(first, int):
            turns[0].add([first], answer=False)
        for role, text in messages:
            learnt = role == "assistant"
            if turns[-1].answer and not learnt:
                turns.append(Turn())
            turn = turns[-1]
            turn.add([self._start], answer=bool(turn.answer))
            if learnt:
                turn.add(self._text(f"{role}\n"), answer=bool(turn.answer))
            else:  # one text: a question that begins with a newline may make one token of both
                text = f"{role}\n{text}"
            for ids in self._pieces(text, tokens):
                turn.add(ids, answer=learnt, learnt=learnt)
            turn.add([self._end], answer=learnt, learnt=learnt)
            newline = learnt and self.prepare.newline and not self.arch.intern
            turn.add(self._text(form.between), answer=learnt, learnt=newline)
        if answer:
            turns.append(Turn([self._start, *self._text("assistant\n")]))
        return turns

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
                "sounds would be cut through",
                "a sample whose files fit in --seq_length",
            )

    def plain(self, text: str) -> Batch:
        """A batch of a text that is to be continued as it is.

        Raises:
            RequestError: there is nothing to continue.
        """
        ids = self._text(text)
        if not ids:
            raise RequestError("the prompt is empty", "a text to continue")
        _, media, _ = self._media(Sample([("user", text)]))
        both = torch.tensor([ids])
        return assemble(self.arch, both, both.clone(), *media)

    def _pieces(self, text: str, tokens: dict[str, list[int]]) -> Iterator[list[int]]:
        """The ids of a text, those of a file where one stands."""
        at = 0
        for found in PLACE.finditer(text):
            yield self._text(text[at : found.start()])
            kind, at = found[1], found.end()
            before, place, after = self._around.get(kind, ([], None, []))
            if place is None or not tokens[kind]:
                raise RequestError(
                    f"a conversation has more <{kind}> places than files",
                    f"a file for each <{kind}>, and a model that takes it",
                )
            yield [*before, *[place] * tokens[kind].pop(0), *after]
        yield self._text(text[at:])

    def _media(
        self, sample: Sample
    ) -> tuple[Sample, tuple[Tensor, Tensor, int, Tensor, Tensor], dict[str, list[int]]]:
        """A sample with places for all it has, the tensors of its files, as ``assemble`` takes
        them, and the tokens of each file.
        """
        tokens: dict[str, list[int]] = {"image": [], "video": [], "audio": []}
        parts: list[tuple[Tensor, Tensor]] = []
        if sample.images:
            pictures = [open_picture(i) if isinstance(i, Path) else i for i in sample.images]
            pixels, grid, tokens["image"] = self.media.images(pictures)
            parts.append((pixels, grid))
        sounds = [self.media.sound(path) for path in sample.audios]
        if sounds and self.arch.kind != "qwen2_5_omni":
            raise RequestError(
                f"{sample.name} has a sound", "Qwen2.5-Omni, the only family that hears"
            )
        if sample.videos and self.arch.intern:
            sample = self._stills(sample, parts, tokens)
        elif sample.videos:
            self._films(sample, parts, tokens)
        tokens["audio"] = [audio_tokens(s.shape[1]) for s in sounds]
        empty = self.no_pixels()
        tensors = (
            torch.cat([p for p, _ in parts]) if parts else empty,
            torch.cat([g for _, g in parts]) if parts else torch.zeros(0, 3, dtype=torch.int64),
            sum(tokens["image"]),
            torch.cat(sounds, dim=1) if sounds else torch.zeros(self._mel(), 0),
            torch.tensor([s.shape[1] for s in sounds], dtype=torch.int64),
        )
        return sample, tensors, tokens

    def _films(
        self,
        sample: Sample,
        parts: list[tuple[Tensor, Tensor]],
        tokens: dict[str, list[int]],
    ) -> None:
        """Adds the frames of videos."""
        for video in sample.videos:
            pixels, grid, count = self.media.video(self.media.frames(video))
            parts.append((pixels, grid))
            tokens["video"].append(count)

    def _stills(
        self, sample: Sample, parts: list[tuple[Tensor, Tensor]], tokens: dict[str, list[int]]
    ) -> Sample:
        """InternVL's videos: each frame is a picture of one tile, and is numbered in the text."""
        if sample.images:
            raise RequestError(
                f"{sample.name} has pictures and a video", "one of both, as InternVL takes them"
            )
        counts: list[int] = []
        for video in sample.videos:
            frames = self.media.frames(video)
            pixels, grid, each = self.media.stills(frames)
            parts.append((pixels, grid))
            tokens["image"] += each
            counts.append(len(frames))

        def numbered(found: re.Match[str]) -> str:
            del found
            count = counts.pop(0) if counts else 0
            return "\n".join(f"Frame{i + 1}: <image>" for i in range(count))

        messages = [(role, VIDEO.sub(numbered, text)) for role, text in sample.messages]
        return replace(sample, messages=messages, videos=())

    def _mel(self) -> int:
        audio = getattr(self.arch.config, "audio_config", None)
        return 1 if audio is None else int(audio.num_mel_bins)

    def no_pixels(self) -> Tensor:
        """Pixels of no picture, in the shape that pictures have."""
        vision = self.arch.config.vision_config
        if self.arch.intern:
            return torch.zeros(0, vision.num_channels, *vision.image_size)
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        return torch.zeros(0, channels * vision.temporal_patch_size * vision.patch_size**2)


def prompt(
    text: str, images: Sequence[Any], audios: Sequence[Any], videos: Sequence[Path] = ()
) -> Sample:
    """A question about files, which stand before the words where no place is marked."""
    marked = {m[1] for m in PLACE.finditer(text)}
    files = {"image": images, "video": videos, "audio": audios}
    front = "".join(f"<{kind}>" * len(some) for kind, some in files.items() if kind not in marked)
    return Sample([("user", front + text)], images, videos, audios)
