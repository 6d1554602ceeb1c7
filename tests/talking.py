"""Tiny models that can talk: a tokenizer of bytes, processors, data, and a plan to learn it."""

from __future__ import annotations

import json
import math
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, WhisperFeatureExtractor

import tinyfamilies
from mmconvert.runtime import commands
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.journal import Line
from mmconvert.runtime.optimizer import Recipe
from mmconvert.runtime.samples import SampleSource
from mmconvert.runtime.schedule import Schedule
from mmconvert.runtime.trainplan import TrainingPlan

SIDE = 56  # pixels of a picture: 4 x 4 patches, 4 image tokens
COLOURS = ("red", "green", "blue", "black")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
Curve = list[tuple[int, float, float, float]]


def make(kind: str, folder: Path, **options: Any) -> Path:
    """A tiny model of a family with tokenizer and processors."""
    hf = tinyfamilies.make(kind, folder, **options)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([*SPECIALS, *(GLM if kind == "glm4v" else ())])
    last = "<|endoftext|>" if kind == "glm4v" else "<|im_end|>"
    made: Any = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=last)
    made.save_pretrained(hf)
    if not kind.startswith("intern"):
        processor: Any = Qwen2VLImageProcessor(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)
        settings = processor.to_dict()
        if kind.startswith("omni"):
            settings |= ears().to_dict()
        (hf / "preprocessor_config.json").write_text(json.dumps(settings, default=str))
    return hf


def ears() -> Any:
    """The feature extractor of the tiny Omni: 8 mel bins, sounds of a second at most."""
    return WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def picture(path: Path, name: str) -> Path:
    """A picture with some structure, so that its place matters."""
    image = Image.new("RGB", (SIDE, SIDE), name)
    image.paste("white", (0, 0, SIDE // 2, SIDE // 3))
    image.paste("orange", (SIDE // 2, SIDE // 2, SIDE, SIDE))
    image.save(path)
    return path


def sound(path: Path, pitch: float, seconds: float = 0.5) -> Path:
    """A tone as 16 bit PCM at 16 kHz."""
    samples = [
        round(9000 * math.sin(2 * math.pi * pitch * i / 16000)) for i in range(int(seconds * 16000))
    ]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(b"".join(s.to_bytes(2, "little", signed=True) for s in samples))
    return path


def talk(question: str, answer: str, **files: list[str]) -> dict[str, object]:
    """An entry of a data file."""
    said = [("user", question), ("assistant", answer)]
    return {**files, "messages": [{"role": role, "content": text} for role, text in said]}


def write_data(folder: Path, name: str = "data.json") -> Path:
    """Four pictures with their colours."""
    items: list[dict[str, object]] = []
    for colour in COLOURS:
        picture(folder / f"{colour}.png", colour)
        items.append(talk("<image>Which?", colour, images=[f"{colour}.png"]))
    (folder / name).write_text(json.dumps(items))
    return folder / name


def plan(save: Path, steps: int, **other: Any) -> TrainingPlan:
    """Two micro-batches of one sample a step unless said otherwise."""
    schedule = Schedule(other.pop("rate", 3e-3), 0.0, other.pop("warmup", 2), steps)
    decay, sharded = other.pop("decay", 0.01), other.pop("sharded", False)
    recipe = Recipe(schedule, decay, 0.9, 0.999, 1e-8, other.pop("clip", 1.0), sharded)
    given: dict[str, Any] = {"save_every": 0, "evaluate_every": 0, "evaluate_steps": 25}
    given |= {"log_every": 1, "size": 1, "count": 2, "seed": 5, "frozen": ()}
    return TrainingPlan(save, steps, **{**given, **other}, save_optimizer=True, recipe=recipe)


def learn(
    mm: Path,
    hf: Path,
    data: Sequence[Path],
    what: TrainingPlan,
    *,
    dtype: str = "fp32",
    resume: bool = False,
) -> Curve:
    """Fine-tunes in forked processes; iteration, loss, learning rate and gradient norm."""
    found: Curve = []

    def hear(event: object) -> None:
        if isinstance(event, Line) and event.loss is not None:
            found.append((event.iteration, event.loss, event.rate, event.norm))

    commands.finetune(mm, hf, Data((SampleSource(tuple(data)),)), what, dtype, resume, hear)
    return found


def same(a: object, b: object) -> bool:
    """Whether two contents of rank files are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b
