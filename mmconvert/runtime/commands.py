"""The commands of the runtime, without their printing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmconvert.causes.quantised import left_over
from mmconvert.errors import RequestError
from mmconvert.names import number
from mmconvert.runtime import engine as engines
from mmconvert.runtime import inputs
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.beginning import Load, beginning, fitted
from mmconvert.runtime.conversation import Speaker, prompt
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.families import Architecture, read_config
from mmconvert.runtime.launch import Emit, launch, leads
from mmconvert.runtime.mmfiles import LoadableCheckpoint
from mmconvert.runtime.pictures import drawn_picture
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.sounds import drawn_sound
from mmconvert.runtime.training import Training, TrainingOutcome, TrainingPlan
from mmconvert.runtime.validation import DTYPES, Validation
from mmconvert.runtime.verdict import ValidationReport
from mmconvert.sharding.layout import Layout

Note = Callable[[object], None]
PROMPT = "What is in this picture?"


def validate(
    mm_dir: Path,
    hf_dir: Path,
    words: str,
    images: Sequence[Path],
    sounds: Sequence[Path],
    dtype: str,
    tolerance: float,
    note: Note,
) -> ValidationReport:
    """Runs an MM checkpoint and an HF folder on the same inputs.

    Raises:
        MMConvertError: a checkpoint is missing or damaged, or the inputs do not fit the model.
    """
    if not 0 <= tolerance < 1:
        raise RequestError(f"--tolerance is {tolerance}", "a number from 0 to 1")
    arch, stored = load_folder(hf_dir, mm_dir)
    if left := left_over(read_config(hf_dir)):
        note(f"warning: {left}")
    batch, about = _question(arch, hf_dir, words, images, sounds, note)
    job = Validation(arch, stored, hf_dir, batch, about, dtype, tolerance)
    report = launch(job, stored.world, note)
    assert isinstance(report, ValidationReport)  # noqa: S101 - what the job returns
    return report


def _question(
    arch: Architecture,
    hf_dir: Path,
    words: str,
    images: Sequence[Path],
    sounds: Sequence[Path],
    note: Note,
) -> tuple[Batch, str]:
    """What to compute on, and in words what it is."""
    asked = bool(words or images or sounds)
    try:
        speaker = Speaker(arch, hf_dir)
        pictures: list[object] = [*images] or [drawn_picture()]
        heard: list[object] = [*sounds]
        if arch.kind == "qwen2_5_omni" and not heard:  # an encoder that is not run is not checked
            heard = [drawn_sound()]
        batch = speaker.batch(prompt(words or PROMPT, pictures, heard), answer=True)
    except RequestError as error:
        if asked:
            raise
        note(f"{error.what}; computing on made-up ids")
        return inputs.synthetic(arch), "made-up ids and pixels"
    # A prompt has no answer to learn, so the loss is that of its own words.
    whole = inputs.assemble(
        arch,
        batch.ids,
        batch.ids.clone(),
        batch.pixels,
        batch.grid,
        batch.image_rows,
        batch.features,
        batch.lengths,
    )
    what = number(images, "picture") if images else "a built-in picture"
    if heard:
        what += f", {number(sounds, 'sound')}" if sounds else ", a built-in sound"
    return whole, f"{batch.ids.shape[1]} tokens: {what}, {words or PROMPT!r}"


@dataclass(frozen=True)
class Answering:
    """The job of every process that answers a prompt."""

    arch: Architecture
    stored: LoadableCheckpoint
    batch: Batch
    most: int
    stop: frozenset[int]
    dtype: str
    penalty: float = 1.0

    def __call__(self, device: torch.device, emit: Emit) -> list[int]:
        """Emits tokens as they come; returns all."""
        run = engines.load(self.arch, self.stored, device, DTYPES[self.dtype])
        return run.generate(self.batch.to(device), self.most, set(self.stop), emit, self.penalty)


@dataclass(frozen=True)
class How:
    """How a prompt is answered.

    Attributes:
        prepare: how files become tensors.
        penalty: of words that have been said; 1 for none.
        plain: the prompt is continued as it is, without the form of a chat.
        expected: looks at the checkpoint's layout before anything is done.
    """

    prepare: Prepare = field(default_factory=Prepare)
    penalty: float = 1.0
    plain: bool = False
    expected: Callable[[Layout], None] | None = None


def generate(
    mm_dir: Path,
    hf_dir: Path,
    words: str,
    images: Sequence[Path],
    videos: Sequence[Path],
    sounds: Sequence[Path],
    most: int,
    dtype: str,
    say: Callable[[str], None],
    how: How = How(),
) -> str:
    """The answer of an MM checkpoint to a prompt, greedily; ``say`` gets its words as they come.

    Raises:
        MMConvertError: as :func:`validate`.
    """
    if most < 1:
        raise RequestError(f"--max_new_tokens is {most}", "a number of at least 1")
    if not how.penalty > 0:
        raise RequestError(f"a repetition penalty of {how.penalty}", "a number above 0")
    arch, stored = load_folder(hf_dir, mm_dir)
    if how.expected is not None:
        how.expected(stored.layout)
    speaker = Speaker(arch, hf_dir, how.prepare)
    asked = prompt(words, images, sounds, videos)
    batch = speaker.plain(words) if how.plain else speaker.batch(asked, answer=True)
    found: list[int] = []
    said = ""

    def hear(token: object) -> None:
        nonlocal said
        assert isinstance(token, int)  # noqa: S101 - what the job emits
        found.append(token)
        text = speaker.words(found)
        if not text.endswith("\ufffd"):  # half of a character: its other bytes follow
            say(text[len(said) :])
            said = text

    job = Answering(arch, stored, batch, most, frozenset(speaker.stop), dtype, how.penalty)
    launch(job, stored.world, hear)
    text = speaker.words(found)
    say(text[len(said) :])
    return text


def _unheard(event: object) -> None:
    """What another process than the one that speaks says of data that all of them read."""
    del event


def finetune(
    mm_dir: Path | None,
    hf_dir: Path,
    data: Data,
    plan: TrainingPlan,
    dtype: str,
    resume: bool,
    on_event: Note,
    expected: Callable[[Layout], None] | None = None,
    load: Load | None = None,
) -> TrainingOutcome:
    """Fine-tunes an MM checkpoint.

    Args:
        data: what to learn from, and what to evaluate on.
        expected: looks at the checkpoint's layout before anything is done.
        resume: go on from the newest checkpoint in ``plan.save``, if there is one.
        load: what to start from in place of ``mm_dir``.

    Raises:
        MMConvertError: as :func:`validate`; OutputError: the folder holds a checkpoint already.
    """
    arch, stored, start = beginning(mm_dir, hf_dir, plan, resume, load)
    if expected is not None:
        expected(stored.layout)
    samples, kept = data.read(plan.seed, on_event if leads() else _unheard)
    plan = fitted(plan, stored)
    job = Training(
        arch, stored, hf_dir, samples, kept, plan, dtype, start, data.prepare, data.strict
    )
    ended = launch(job, stored.world * plan.replicas, on_event)
    assert isinstance(ended, TrainingOutcome)  # noqa: S101 - what the job returns
    return ended
