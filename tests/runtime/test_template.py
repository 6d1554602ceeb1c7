"""Ids and labels against the template that MindSpeed-MM trains Qwen models with.

There, each turn is one text that is tokenised alone: the system text with its marks, a question
with the marks around it and the start of the answer, an answer with its end and a newline
(LLaMA-Factory's ``qwen2_vl``). What is learnt is the answer's text.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Glm4vForConditionalGeneration,
    Glm4vProcessor,
    PreTrainedTokenizerFast,
)

import talking
from mmconvert.errors import RequestError
from mmconvert.runtime import reference
from mmconvert.runtime.batch import IGNORED
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.families import architecture
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample
from tinymodels import END, START, VIDEO

# How Qwen's tokenizer cuts a text before it merges: runs of newlines and of blanks are one piece.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
AWKWARD = [
    [("user", "Hello."), ("assistant", "Hi.")],
    [("user", "\nHello"), ("assistant", "\nHi\n")],
    [("user", "\n\n  Hello  "), ("assistant", "  Hi  \n\n")],
    [("user", ""), ("assistant", "")],
    [("user", "user\n"), ("assistant", "assistant\n")],
    [("system", "\nBe brief.\n"), ("user", " a\n\n\nb "), ("assistant", "c")],
    [("user", "one"), ("assistant", "1"), ("user", "\ntwo"), ("assistant", "\n2")],
    [("user", "né漢字\u200d🙂"), ("assistant", "e\u0301\t\r\n")],
    [("user", "a<|im_end|>b"), ("assistant", "c<|im_start|>d")],
]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has merges over newlines and blanks."""
    folder = talking.make("qwen2_vl", tmp_path_factory.mktemp("template") / "hf")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1
    )
    words.train_from_iterator(["\n\n", "\n\n\n", "  ", "user\n\n", " a\n\n"] * 9, trainer)
    words.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    made: Any = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")
    made.save_pretrained(folder)
    return folder


def by_template(tokenizer: Any, messages: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """(ids, labels) of the template, text by text."""
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, *, learnt: bool) -> None:
        found = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(found)
        labels.extend(found if learnt else [IGNORED] * len(found))

    if messages[0][0] != "system":
        messages = [("system", "You are a helpful assistant."), *messages]
    for role, text in messages:
        if role == "system":
            add(f"<|im_start|>system\n{text}<|im_end|>\n", learnt=False)
        elif role == "user":
            add(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", learnt=False)
        else:
            add(f"{text}<|im_end|>\n", learnt=True)
    return ids, labels


GLM = {
    "one question": (
        [("user", "Hi"), ("assistant", "Ho")],
        "[gMASK]<sop><|user|>\nHi<|assistant|>",
        "\nHo<|endoftext|>",
    ),
    "two questions": (
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        "[gMASK]<sop><|system|>\ns<|user|>\na<|assistant|><|user|>\nc<|assistant|>",
        "\nb\nd<|endoftext|>",
    ),
}


@pytest.mark.parametrize("name", GLM)
def test_glm_has_a_form_of_its_own(name: str, tmp_path: Path) -> None:
    """LLaMA-Factory's ``glm4v``: what opens the next message ends an answer."""
    hf = talking.make("glm4v", tmp_path / "hf")
    speaker = Speaker(architecture(hf), hf)
    messages, asked, learnt = GLM[name]
    batch = speaker.batch(Sample(messages), answer=False)
    ids, learns = batch.ids[0], batch.labels[0] != IGNORED
    assert speaker.tokenizer.decode(ids[~learns]) == asked
    assert speaker.tokenizer.decode(ids[learns]) == learnt
    assert torch.equal(batch.labels[0][learns], ids[learns])
    ends = (speaker.tokenizer.convert_tokens_to_ids(w) for w in ("<|user|>", "<|endoftext|>"))
    assert set(ends) <= speaker.stop


def test_the_frames_of_qwen3_stand_behind_their_times(tmp_path: Path) -> None:
    """As Qwen3-VL's processor has them: two frames a time, the one between both."""
    hf = talking.make("qwen3_vl", tmp_path / "hf")
    speaker = Speaker(architecture(hf), hf)
    frames = tmp_path / "film"
    frames.mkdir()
    for i, colour in enumerate(talking.COLOURS):
        talking.picture(frames / f"{i}.png", colour)
    batch = speaker.batch(Sample([("user", "<video>?")], videos=[frames]), answer=True)
    video = [START, *[VIDEO] * 4, END]
    times = [speaker.tokenizer.encode(f"<{t} seconds>") for t in ("0.2", "1.2")]  # 0, 0.5; 1, 1.5
    before = speaker.tokenizer.encode("<|im_start|>user\n")
    after = speaker.tokenizer.encode("?<|im_end|>\n<|im_start|>assistant\n")
    assert batch.ids[0].tolist() == [*before, *times[0], *video, *times[1], *video, *after]
    assert batch.grid.tolist() == [[2, 4, 4]]


@pytest.mark.parametrize("messages", AWKWARD)
def test_ids_and_labels_are_the_templates(messages: list[tuple[str, str]], hf: Path) -> None:
    speaker = Speaker(architecture(hf), hf)
    batch = speaker.batch(Sample(messages), answer=False)
    ids, labels = by_template(speaker.tokenizer, messages)
    assert batch.ids[0].tolist() == ids
    assert batch.labels[0].tolist() == labels


THOUGHTS = {
    "none": ("Yes.", True, "", "<think>\n\n</think>\n\nYes.<|im_end|>\n"),
    "one": ("<think>\nWhy?\n</think>\n\nYes.", True, "",
            "<think>\nWhy?\n</think>\n\nYes.<|im_end|>\n"),
    "none is wanted": ("<think>\nWhy?\n</think>\n\nYes.", False, "<think>\n\n</think>\n\n",
                       "Yes.<|im_end|>\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", THOUGHTS)
def test_the_template_qwen3_vl_learns_that_there_is_no_thought(name: str, hf: Path) -> None:
    """As MindSpeed-MM 2.2.0 encodes them; ``qwen3_vl_nothink`` has the answer alone."""
    answer, thinking, asked, learnt = THOUGHTS[name]
    sample = Sample([("user", "a"), ("assistant", answer)])
    prepare = Prepare(template="qwen3_vl", thinking=thinking)
    speaker = Speaker(architecture(hf), hf, prepare)
    batch = speaker.batch(sample, answer=False)
    learns = batch.labels[0] != IGNORED
    assert speaker.tokenizer.decode(batch.ids[0][learns]) == learnt
    front = f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{asked}"
    assert speaker.tokenizer.decode(batch.ids[0][~learns]) == front
    plain = Speaker(architecture(hf), hf, Prepare(template="qwen3_vl_nothink"))
    assert plain.words(plain.batch(sample, answer=False).ids[0].tolist()).endswith(f"{answer}\n")


def test_the_newline_can_be_left_out_of_what_is_learnt(hf: Path) -> None:
    speaker = Speaker(architecture(hf), hf, Prepare(newline=False))
    batch = speaker.batch(Sample([("user", "a"), ("assistant", "b")]), answer=False)
    learnt = batch.labels[0][batch.labels[0] != IGNORED].tolist()
    assert speaker.tokenizer.decode(learnt) == "b<|im_end|>"


def test_the_tokenizer_joins_what_the_template_joins(hf: Path) -> None:
    """Else the awkward texts would show nothing."""
    tokenizer = Speaker(architecture(hf), hf).tokenizer
    joined = tokenizer.encode("user\n\nHello", add_special_tokens=False)
    apart = [
        *tokenizer.encode("user\n", add_special_tokens=False),
        *tokenizer.encode("\nHello", add_special_tokens=False),
    ]
    assert joined != apart


def test_the_frames_of_glm_are_pictures_with_their_seconds(tmp_path: Path) -> None:
    """Ids of transformers' processor, and logits of its model, which gets the same as a video."""
    hf = talking.make("glm4v", tmp_path / "hf")
    arch = architecture(hf)
    frames = tmp_path / "film"
    frames.mkdir()
    for i in range(5):  # an odd one: the last pair has it twice
        talking.picture(frames / f"{i}.png", talking.COLOURS[i % 4])
    speaker = Speaker(arch, hf, Prepare(video_rate=1.0))
    batch = speaker.batch(Sample([("user", "<video>?")], videos=[frames]), answer=True)
    made: Any = object.__new__(Glm4vProcessor)
    made.video_processor, made.image_token = SimpleNamespace(merge_size=2), "I"
    grid = torch.tensor([[3, 4, 4]])
    told = {"video_grid_thw": grid, "video_metadata": [
        SimpleNamespace(fps=1.0, timestamps=[0.0, 1.0, 2.0, 3.0, 4.0, 4.0])
    ]}  # fmt: skip
    expected = made.replace_video_token(told, 0)
    words = {arch.image_token(): "I", START: "<|begin_of_image|>", END: "<|end_of_image|>"}
    ids = batch.ids[0].tolist()
    first, last = ids.index(START), len(ids) - ids[::-1].index(END)
    said = "".join(words.get(i) or speaker.tokenizer.decode([i]) for i in ids[first : last + 1])
    assert said == expected
    model = Glm4vForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = reference.forward(arch, model, batch)
        theirs = model(
            input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids),
            pixel_values_videos=batch.pixels, video_grid_thw=grid, use_cache=False,
            mm_token_type_ids=2 * (batch.ids == arch.image_token()).int(),
        ).logits  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    both = Sample([("user", "<image><video>?")], [frames / "0.png"], [frames])
    with pytest.raises(RequestError, match="pictures and a video"):
        speaker.batch(both, answer=True)
