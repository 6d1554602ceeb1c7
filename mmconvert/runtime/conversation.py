"""Conversations as token ids: the text around pictures, videos and sounds, and what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mmconvert.errors import RequestError
from mmconvert.runtime.batch import IGNORED, Batch
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.inputs import assemble, audio_tokens
from mmconvert.runtime.media import Media, open_picture, open_video
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import PLACE, Sample

SYSTEM = "You are a helpful assistant."  # what the Qwen chat templates begin with
# Around a placeholder in InternVL's text; the Qwen families have theirs in config.json.
INTERN_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")


@dataclass
class _Line:
    """A conversation while it is put together."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], learnt: bool = False) -> None:
        self.ids += ids
        self.labels += ids if learnt else [IGNORED] * len(ids)


class Speaker:
    """Turns conversations into batches, and ids into words.

    Args:
        hf_dir: has the tokenizer.

    Raises:
        RequestError: there is no usable tokenizer, or it does not fit the model.
    """

    def __init__(self, arch: Architecture, hf_dir: Path, prepare: Prepare | None = None) -> None:
        self.prepare = prepare or Prepare()
        self.arch, self.media = arch, Media(arch, hf_dir)
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
        media, tokens = self._media(sample)
        line = _Line()
        messages = list(sample.messages)
        if not self.arch.intern and messages[0][0] != "system":
            messages.insert(0, ("system", SYSTEM))
        for role, text in messages:
            line.add([self._start, *self._text(f"{role}\n")])
            self._message(line, text, tokens, learnt=role == "assistant")
            line.add([self._end], learnt=role == "assistant")
            line.add(self._text("\n"))
        left = sum(map(len, tokens.values()))
        if left:
            raise RequestError(f"{sample.name}: {left} more files than places", "<image> for each")
        if answer:
            line.add([self._start, *self._text("assistant\n")])
        most = getattr(self.arch.text_config, "max_position_embeddings", None)
        if most is not None and len(line.ids) > most:
            raise RequestError(
                f"{sample.name} has {len(line.ids)} tokens",
                f"at most {most}, by max_position_embeddings of config.json",
                "fewer or smaller pictures, or fewer words",
            )
        return assemble(self.arch, torch.tensor([line.ids]), torch.tensor([line.labels]), *media)

    def plain(self, text: str) -> Batch:
        """A batch of a text that is to be continued as it is.

        Raises:
            RequestError: there is nothing to continue.
        """
        ids = self._text(text)
        if not ids:
            raise RequestError("the prompt is empty", "a text to continue")
        media, _ = self._media(Sample([("user", text)]))
        line = torch.tensor([ids])
        return assemble(self.arch, line, line.clone(), *media)

    def _message(self, line: _Line, text: str, tokens: dict[str, list[int]], learnt: bool) -> None:
        at = 0
        for found in PLACE.finditer(text):
            line.add(self._text(text[at : found.start()]), learnt)
            kind, at = found[1], found.end()
            before, place, after = self._around.get(kind, ([], None, []))
            if place is None or not tokens[kind]:
                raise RequestError(
                    f"a conversation has more <{kind}> places than files",
                    f"a file for each <{kind}>, and a model that takes it",
                )
            line.add([*before, *[place] * tokens[kind].pop(0), *after])
            line.add(self._text("\n") if found[0].endswith("\n") else [])
        line.add(self._text(text[at:]), learnt)

    def _media(
        self, sample: Sample
    ) -> tuple[tuple[Tensor, Tensor, int, Tensor, Tensor], dict[str, list[int]]]:
        """Tensors of a sample's files, as ``assemble`` takes them, and the tokens of each file."""
        tokens: dict[str, list[int]] = {"image": [], "video": [], "audio": []}
        pixels, grids = [], []
        if sample.images:
            pictures = [open_picture(i) if isinstance(i, Path) else i for i in sample.images]
            made, grid, tokens["image"] = self.media.images(pictures)
            pixels.append(made)
            grids.append(grid)
        if sample.videos and self.arch.intern:
            raise RequestError(
                f"{sample.name} has a video", "pictures only: InternVL's encoders take these"
            )
        for path in sample.videos:
            made, grid, count = self.media.video(open_video(path))
            pixels.append(made)
            grids.append(grid)
            tokens["video"].append(count)
        if sample.audios and self.arch.kind != "qwen2_5_omni":
            raise RequestError(
                f"{sample.name} has a sound", "Qwen2.5-Omni, the only family that hears"
            )
        sounds = [self.media.sound(path) for path in sample.audios]
        tokens["audio"] = [audio_tokens(s.shape[1]) for s in sounds]
        rows = sum(tokens["image"])
        empty = self.no_pixels()
        return (
            torch.cat(pixels) if pixels else empty,
            torch.cat(grids) if grids else torch.zeros(0, 3, dtype=torch.int64),
            rows,
            torch.cat(sounds, dim=1) if sounds else torch.zeros(self._mel(), 0),
            torch.tensor([s.shape[1] for s in sounds], dtype=torch.int64),
        ), tokens

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
