"""The command ``generate``: an MM checkpoint answers a prompt."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.loradir import adapters
from mmconvert.cli.scriptflags import (
    Script,
    check_layout,
    check_only_qwenvl,
    needed,
    read_script,
)
from mmconvert.config import MaybeFloat, MaybePath
from mmconvert.errors import RequestError
from mmconvert.sharding.layout import Layout

if TYPE_CHECKING:
    from mmconvert.cli.tools.answering import AnswerScreen
    from mmconvert.runtime.answers import How
    from mmconvert.runtime.sampling import Sampling

LONGEST = 128  # tokens of an answer
MediaFlag = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]


@dataclass(frozen=True)
class Generated:
    """What to ask whom."""

    mm_dir: MaybePath = None
    """The MM checkpoint; it runs in its own layout, one process for each rank. Of Qwen-VL a .ckpt
    file or rank folders, in one process; not given: the weights of hf_dir."""
    hf_dir: MaybePath = None
    """The Hugging Face folder with config.json, tokenizer and processor of the model."""
    prompt: str = ""
    """The question; <image>, <video> and <audio> may mark the places of the files."""
    prompts: MaybePath = None
    """A file of questions in place of one: on each line a text, or JSON with prompt, image, video
    and audio. They are answered several at a time."""
    chat: bool = False
    """A conversation on the terminal: each line is a question, which sees those before it."""
    mm_model: MaybePath = None
    """MindSpeed-MM's inference_*.json: the question, its files, and hf_dir; flags come first."""
    image: MediaFlag = ()
    """Pictures."""
    video: MediaFlag = ()
    """Videos: files (extra media), folders of pictures, or animated pictures."""
    audio: MediaFlag = ()
    """Sounds, for Qwen2.5-Omni: PCM WAV; others, and those of videos, with the extra media."""
    use_audio_in_video: bool = False
    """Put the sound of a video between its frames (Qwen2.5-Omni): that of --audio, one for each
    video, else the video's own."""
    lora_dir: MaybePath = None
    """Adapters that the checkpoint gets: of PEFT, or an MM checkpoint of LoRA training."""
    lora_alpha: MaybeFloat = None
    """lora_alpha of their training, where nothing else tells it."""
    max_new_tokens: int = 0
    """The most tokens of the answer; 0: 128, or as the inference file says."""
    temperature: float = -1.0
    """Words are drawn at random, the more so the higher it is; 0: the best word each time; not
    given: 0, or as the inference file says."""
    top_p: float = 0.0
    """Draw from the most probable words that have this share of the probability together; not
    given: all."""
    top_k: int = -1
    """Draw from this many of the most probable words; 0, or not given: all."""
    seed: int = 0
    """Of what is drawn: the same seed, the same words, in every layout."""
    batch_size: int = 8
    """The most prompts of a file that are answered side by side."""
    dtype: Literal["", "fp32", "bf16"] = ""
    """What is computed in; not given: fp32, or as the inference file says."""
    vocab_file: MaybePath = None
    """The tokenizer of Qwen-VL: qwen.tiktoken; not given: that in hf_dir."""
    like: Literal["hub", "mindformers"] = "hub"
    """Whose numbers Qwen-VL has where the two differ: position tables, tokens, long texts."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """What to compute on; auto takes the accelerator that is there, else the CPU."""
    json: bool = False
    """Print the answer, or the error, as JSON."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Answers; words are printed as they come."""
    prog = "mm-convert generate"
    text = "An MM checkpoint answers a prompt, in its own layout, words as they come."
    example = f'{prog} --mm_dir MM_DIR --hf_dir HF_DIR --image cat.png --prompt "What is this?"'
    from mmconvert.cli.tools.finetune import Finetuned

    script = read_script(words, [f.name for f in fields(Generated)], fields(Finetuned))
    asked = read_plain(Generated, script.words, prog, f"{text}\n\nexample:\n  {example}")
    from mmconvert.runtime import needs

    needs.require(asked.device)
    return _answer(asked, script)


def _answer(asked: Generated, script: Script) -> int:
    """Answers, with torch at hand."""
    from mmconvert.cli.tools import answering
    from mmconvert.runtime.launch import leads
    from mmconvert.runtime.qwenvl import answer as qwenvl

    asked, how = _how(asked, script)
    hf_dir = needed(asked.hf_dir, "--hf_dir", "generate")
    _check_one(asked)
    screen = answering.AnswerScreen(leads(), asked.json)
    for note in script.notes():
        screen.note(note)
    if qwenvl.serves(hf_dir):
        return _qwenvl(asked, hf_dir, how, screen)
    check_only_qwenvl(asked.vocab_file, asked.like)
    folder = needed(asked.mm_dir, "--mm_dir (or --load)", "generate")
    files = (asked.image, asked.audio, asked.video)
    with adapters(asked.lora_dir, asked.lora_alpha, hf_dir, folder, judged=False) as lora:
        how = replace(how, lora=lora)
        if asked.chat:
            return answering.chat(folder, hf_dir, how, screen, asked.prompt, files)
        if asked.prompts is not None:
            return answering.several(folder, hf_dir, how, screen, asked.prompts)
        return answering.one(folder, hf_dir, how, screen, asked.prompt, files)


def _check_one(asked: Generated) -> None:
    """There is one way of asking."""
    if asked.prompts is not None:
        both = [f"--{name}" for name in ("prompt", "image", "video", "audio", "chat")
                if getattr(asked, name)]  # fmt: skip
        if both:
            raise RequestError(
                f"--prompts is given, and {both[0]}", "one of both", "put files into the lines"
            )
    elif not asked.prompt and not asked.chat:
        raise RequestError(
            "there is no question", "--prompt, --prompts, --chat, or --mm_model inference.json"
        )


def _how(asked: Generated, script: Script) -> tuple[Generated, How]:
    """What is asked, with what the inference file says where flags do not."""
    from mmconvert.runtime.answers import How
    from mmconvert.runtime.inferencejson import read_inference
    from mmconvert.runtime.prepare import Prepare

    how = How()
    if asked.mm_model is not None:
        file = read_inference(asked.mm_model)

        def expected(layout: Layout) -> None:
            check_layout(layout, file.model, script)

        own = bool(asked.prompt or asked.prompts or asked.chat)
        plain = file.plain and not (own or asked.image or asked.video or asked.audio)
        prepare = Prepare(video_frames=file.frames) if file.frames else Prepare()
        how = How(prepare, file.choice, plain, file.most, file.dtype or "fp32", expected=expected)
        asked = replace(
            asked, mm_dir=asked.mm_dir or file.mm_dir, hf_dir=asked.hf_dir or file.hf_dir
        )
        if not asked.prompts and not asked.chat:
            asked = replace(
                asked,
                prompt=asked.prompt or file.prompt,
                image=asked.image or file.images,
                video=asked.video or file.videos,
            )
    how = replace(
        how,
        prepare=replace(how.prepare, sound_in_video=asked.use_audio_in_video),
        most=asked.max_new_tokens or how.most,
        dtype=asked.dtype or how.dtype,
        rows=asked.batch_size,
        choice=_choice(asked, how.choice),
    )
    how.check()
    return asked, how


def _choice(asked: Generated, file: Sampling) -> Sampling:
    """How words are chosen: by the flags, else by the inference file."""
    given = {"temperature": asked.temperature >= 0, "top_p": asked.top_p != 0,
             "top_k": asked.top_k >= 0}  # fmt: skip
    changed = {name: getattr(asked, name) for name, there in given.items() if there}
    choice = replace(file, seed=asked.seed, **changed)
    idle = [f"--{name}" for name in ("top_p", "top_k") if given[name] and not choice.temperature]
    if idle:
        raise RequestError(
            f"{idle[0]} is given, and the best word is taken each time",
            "--temperature given with it",
        )
    return choice


def _qwenvl(asked: Generated, hf_dir: Path, how: How, screen: AnswerScreen) -> int:
    """Qwen-VL answers, in this process."""
    from mmconvert.runtime.qwenvl import answer as qwenvl

    if asked.video or asked.audio:
        raise RequestError("Qwen-VL takes pictures alone", "no --video and no --audio")
    for name in ("chat", "prompts"):
        if getattr(asked, name):
            raise RequestError(
                f"--{name} is not for Qwen-VL", "Qwen2-VL and later, or InternVL", "--prompt"
            )
    question = qwenvl.question(
        hf_dir, asked.mm_dir, asked.vocab_file, asked.prompt, asked.image, how.most, asked.like
    )
    screen.end(qwenvl.ask(question, how.dtype, screen.say, screen.note, how.choice)[0])
    return 0
