"""The commands of the runtime, without their printing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mmconvert.causes.quantised import left_over
from mmconvert.errors import MMConvertError, RequestError
from mmconvert.names import number
from mmconvert.runtime import inputs
from mmconvert.runtime.answers import AnsweringModel, How, Reply
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.beginning import Load, beginning, fitted
from mmconvert.runtime.conversation import Speaker, prompt
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.families import Architecture, read_config
from mmconvert.runtime.launch import launch, leads
from mmconvert.runtime.lora import LoraFolders
from mmconvert.runtime.media import Media
from mmconvert.runtime.mmfiles import with_adapters
from mmconvert.runtime.pictures import drawn_picture
from mmconvert.runtime.processes import Emit
from mmconvert.runtime.questions import Chat, Several
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.sounds import drawn_sound
from mmconvert.runtime.training import Training
from mmconvert.runtime.trainplan import TrainingOutcome, TrainingPlan
from mmconvert.runtime.validation import Validation
from mmconvert.runtime.verdict import ValidationReport
from mmconvert.sharding.layout import Layout

PROMPT = "What is in this picture?"


def validate(
    mm_dir: Path,
    hf_dir: Path,
    words: str,
    images: Sequence[Path],
    sounds: Sequence[Path],
    dtype: str,
    tolerance: float,
    note: Emit,
    lora: LoraFolders | None = None,
) -> ValidationReport:
    """Runs an MM checkpoint and an HF folder on the same inputs.

    Args:
        lora: adapters that both get.

    Raises:
        MMConvertError: a checkpoint is missing or damaged, or the inputs do not fit the model.
    """
    if not 0 <= tolerance < 1:
        raise RequestError(f"--tolerance is {tolerance}", "a number from 0 to 1")
    arch, stored = load_folder(hf_dir, mm_dir)
    if lora is not None:
        stored = with_adapters(stored, lora.mm, lora.alpha)
    if left := left_over(read_config(hf_dir)):
        note(f"warning: {left}")
    batch, about = _question(arch, hf_dir, words, images, sounds, note)
    adapter = None if lora is None else lora.peft
    job = Validation(arch, stored, hf_dir, batch, about, dtype, tolerance, adapter)
    report = launch(job, stored.world, note)
    assert isinstance(report, ValidationReport)  # noqa: S101 - what the job returns
    return report


def _question(
    arch: Architecture,
    hf_dir: Path,
    words: str,
    images: Sequence[Path],
    sounds: Sequence[Path],
    note: Emit,
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


def generate(
    mm_dir: Path,
    hf_dir: Path,
    asked: Sample,
    say: Callable[[str], None] = lambda words: None,
    how: How | None = None,
) -> Reply:
    """The answer of an MM checkpoint to a prompt; ``say`` gets its words as they come.

    Raises:
        MMConvertError: as :func:`validate`.
    """
    replies: list[Reply] = []
    generate_all(
        mm_dir, hf_dir, [asked], lambda number, reply: replies.append(reply), say, how or How()
    )
    return replies[0]


def generate_all(
    mm_dir: Path,
    hf_dir: Path,
    asked: Iterable[Sample],
    hear: Callable[[int, Reply], None],
    say: Callable[[str], None],
    how: How,
) -> None:
    """The answers of an MM checkpoint to prompts; ``hear`` gets them in their order.

    Raises:
        MMConvertError: as :func:`validate`.
    """
    model = AnsweringModel(mm_dir, hf_dir, how)
    prompts = Several(model, asked, hear, say)
    model.run(prompts.ask, prompts.hear)


def chat(
    mm_dir: Path,
    hf_dir: Path,
    read: Callable[[], tuple[Sample, bool] | None],
    say: Callable[[str], None],
    hear: Callable[[Reply], None],
    tell: Callable[[MMConvertError], None],
    how: How,
) -> None:
    """A conversation with an MM checkpoint: see :class:`mmconvert.runtime.questions.Chat`.

    Raises:
        MMConvertError: as :func:`validate`.
    """
    model = AnsweringModel(mm_dir, hf_dir, how)
    talk = Chat(model, read, say, hear, tell)
    model.run(talk.ask, talk.hear)


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
    on_event: Emit,
    expected: Callable[[Layout], None] | None = None,
    load: Load | None = None,
    optimizer: bool = True,
) -> TrainingOutcome:
    """Fine-tunes an MM checkpoint.

    Args:
        data: what to learn from, and what to evaluate on.
        expected: looks at the checkpoint's layout before anything is done.
        resume: go on from the newest checkpoint in ``plan.save``, if there is one.
        load: what to start from in place of ``mm_dir``.
        optimizer: take over the optimizer's state of what is gone on from.

    Raises:
        MMConvertError: as :func:`validate`; OutputError: the folder holds a checkpoint already.
    """
    arch, stored, start = beginning(mm_dir, hf_dir, plan, resume, load, optimizer)
    if expected is not None:
        expected(stored.layout)
    look = Media(arch, hf_dir, data.prepare).look
    samples, kept = data.read(plan.seed, on_event if leads() else _unheard, look)
    plan = fitted(plan, stored.world, stored.layout.pp_size)
    job = Training(
        arch, stored, hf_dir, samples, kept, plan, dtype, start, data.prepare, data.strict
    )
    ended = launch(job, stored.world * plan.replicas, on_event)
    assert isinstance(ended, TrainingOutcome)  # noqa: S101 - what the job returns
    return ended
