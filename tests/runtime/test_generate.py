"""Answers about pictures and sounds are those of transformers' ``generate``, in every family.

The other side knows nothing of the runtime: the model object that the checkpoint was written from,
transformers' own processors, and ids put together here. The Qwen2.5-VL case says a placeholder of
its own accord (id 301), which is a word like others then.
"""

from __future__ import annotations

import inspect
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

import talking
import tinyfamilies
import tinymodels as tiny
from mmconvert.runtime import commands
from mmconvert.runtime.answers import AnsweringModel, How
from mmconvert.runtime.conversation import prompt
from mmconvert.runtime.sampling import Sampling
from nights import night

MOST = 8
QUESTION = "What is this?"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


class Case(NamedTuple):
    """A family in a layout, and its model as transformers has it."""

    kind: str
    layout: tuple[Any, ...]
    model: Callable[[], Any]
    penalty: float = 1.0


def lively() -> Any:
    """A Qwen2-VL of other weights: with those of the rest of the tests it repeats one word."""
    return tinyfamilies.randomise(tiny.tiny_model("qwen2_vl"), 11)


CASES = [
    Case("qwen2_vl", ("[1,3]", "[3,0]", 2), lively),
    Case("qwen2_vl", ("[1,3]", "[3,0]", 1), lively, 1.3),
    Case("qwen2_5_vl", ("[0,4]", "[2,1]", 1), lambda: tiny.tiny_model("qwen2_5_vl")),
    night(Case("qwen3_vl", ("[0,4]", "[2,1]", 2), lambda: tiny.tiny_model("qwen3_vl"))),
    Case("qwen3_vl_moe", ("[4]", "[3]", 1, "ep_size=2"), lambda: tiny.tiny_model("qwen3_vl_moe")),
    Case("glm4v", ("[1,3]", "[3,0]", 1), lambda: tiny.tiny_model("glm4v")),
    Case("omni", ("[[0,1],[1,2]]", "[[2,1],[0,0]]", 1), tinyfamilies.omni_thinker),
    night(
        Case("intern-qwen2", ("[4]", "[3]", 2), lambda: tinyfamilies.native_intern("intern-qwen2"))
    ),
    night(
        Case(
            "intern-llama",
            ("[2,2]", "[3,0]", 1),
            lambda: tinyfamilies.native_intern("intern-llama"),
        )
    ),
    Case(
        "intern-internlm2",
        ("[4]", "[3]", 2),
        lambda: tinyfamilies.native_intern("intern-internlm2"),
    ),
]


def intern_tile(path: Path) -> torch.Tensor:
    """The one tile of a picture, normalised as ImageNet's: InternVL's own preprocessing."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    scaled = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return torch.from_numpy(scaled.transpose(2, 0, 1).astype(np.float32))[None]


def asked(kind: str, hf: Path, image: Path, sounds: list[Path]) -> dict[str, Any]:
    """What transformers' ``generate`` is given."""
    speaker: Any = AutoTokenizer.from_pretrained(hf)
    inputs: dict[str, Any] = {}
    middle: list[int] = []
    if kind.startswith("intern"):
        inputs["pixel_values"] = intern_tile(image)
        middle = speaker("<img>" + "<IMG_CONTEXT>" * 4 + "</img>")["input_ids"]
        system = ""
    else:
        processor: Any = Qwen2VLImageProcessor.from_pretrained(hf)
        with Image.open(image) as picture:
            inputs |= processor(images=[picture.convert("RGB")], return_tensors="pt")
        middle = [tiny.START, *[tiny.IMAGE] * 4, tiny.END]
        system = "" if "3" in kind else SYSTEM  # Qwen3-VL has none of its own
    for path in sounds:
        with wave.open(str(path)) as file:
            raw = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768
        heard = talking.ears()(
            raw, sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
        )
        inputs["input_features"] = heard["input_features"]
        inputs["feature_attention_mask"] = heard["attention_mask"]
        frames = int(heard["attention_mask"].sum())
        tokens = ((frames - 1) // 2 + 1 - 2) // 2 + 1  # a convolution of stride 2, pooled in pairs
        middle += [tinyfamilies.AUDIO_START, *[tinyfamilies.AUDIO] * tokens, tinyfamilies.AUDIO_END]
    words = (f"{system}<|im_start|>user\n", f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    if kind == "glm4v":
        words = ("[gMASK]<sop><|user|>\n", f"{QUESTION}<|assistant|>\n")
    before, after = (speaker(w, add_special_tokens=False)["input_ids"] for w in words)
    ids = torch.tensor([[*before, *middle, *after]])
    if kind.startswith(("qwen", "glm")):
        inputs["mm_token_type_ids"] = (ids == tiny.IMAGE).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.penalty}")
def test_greedy_tokens_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    hf = talking.make(case.kind, tmp_path / "hf")
    model = case.model()
    if case.kind == "qwen2_vl":
        model.save_pretrained(hf)
    mm = tinyfamilies.convert(case.kind, hf, tmp_path / "mm", *case.layout)
    image = talking.picture(tmp_path / "picture.png", "green")
    sounds = [talking.sound(tmp_path / "tone.wav", 440)] if case.kind == "omni" else []
    if case.kind.startswith("intern"):
        model.config.image_token_id = talking.SPECIALS.index("<IMG_CONTEXT>") + 256
        model.model.config.image_token_id = model.config.image_token_id
    inputs = asked(case.kind, hf, image, sounds)
    how = How(most=MOST, choice=Sampling(case.penalty))
    model_here = AnsweringModel(mm, hf, how)
    stop = sorted(model_here.stop)
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=MOST, do_sample=False, eos_token_id=stop,
            repetition_penalty=case.penalty,
        )  # fmt: skip
    expected = out[0, inputs["input_ids"].shape[1] :].tolist()

    question = prompt(QUESTION, [image], sounds)
    assert torch.equal(model_here.prompt(question).ids, inputs["input_ids"])
    said: list[str] = []
    reply = commands.generate(mm, hf, question, said.append, how)
    assert [*reply.tokens] == expected[: len(reply.tokens)]
    assert (reply.end == "eos") == (expected[-1] in stop)
    assert len(reply.tokens) == len(expected) - (expected[-1] in stop)
    assert "".join(said) == reply.text  # as they came
    assert reply.prompt_tokens == inputs["input_ids"].shape[1]
    assert len(set(expected)) > 3  # each token depends on those before


@pytest.mark.slow
def test_validate_takes_a_picture_and_a_sound(tmp_path: Path) -> None:
    hf = talking.make("omni", tmp_path / "hf")
    mm = tinyfamilies.convert("omni", hf, tmp_path / "mm", "[1,3]", "[3,0]")
    image = talking.picture(tmp_path / "picture.png", "blue")
    tone = talking.sound(tmp_path / "tone.wav", 330, 0.3)
    report = commands.validate(
        mm, hf, "Which tone?", [image], [tone], "fp32", 0.0, lambda event: None
    )
    assert report.passed, report.as_dict()
    assert report.inputs.endswith("1 picture, 1 sound, 'Which tone?'")


@pytest.mark.slow
def test_the_cache_goes_under_the_name_that_transformers_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``past_key_values`` is ``cache`` from 5.24 on; a name that nobody reads is no cache."""
    kind: Any = Qwen2VLTextModel
    plain = kind.forward
    if "past_key_values" not in inspect.signature(plain).parameters:
        pytest.skip("this transformers has the new name itself")

    def renamed(
        self: Any, input_ids: Any = None, position_ids: Any = None, cache: Any = None, **more: Any
    ) -> Any:
        assert "past_key_values" not in more
        assert cache is not None  # while an answer is generated
        return plain(self, input_ids, position_ids=position_ids, past_key_values=cache, **more)

    hf = talking.make("qwen2_vl", tmp_path / "hf")
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[4]", "[3]")

    def answer() -> str:
        return commands.generate(mm, hf, prompt(QUESTION, (), ()), how=How(most=MOST)).text

    expected = answer()
    monkeypatch.setattr(kind, "forward", renamed)
    assert answer() == expected
    assert len(expected) > 0
