"""Answers to many prompts, words that are drawn, and conversations that go on in the cache."""

from __future__ import annotations

import io
import json
import os
import select
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Qwen2VLImageProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import talking
import tinyfamilies
import tinymodels as tiny
from cli import run_cli, standing_in
from forked import Forked
from inprocess import call
from mmconvert.cli import main
from mmconvert.errors import DatasetError, MMConvertError
from mmconvert.runtime import commands
from mmconvert.runtime.answers import How, Reply, Wording
from mmconvert.runtime.conversation import prompt
from mmconvert.runtime.promptfile import read_prompts
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.sampling import Chooser, Sampling, probabilities
from nights import night, nightly

END = talking.SPECIALS.index("<|im_end|>") + 256
KINDS = ("qwen2_vl", "qwen3_vl_moe", "glm4v", "omni", "intern-qwen2")
HOT = Sampling(temperature=1.0, top_p=0.95, seed=7)


class Work(NamedTuple):
    """A model whose words differ, in three layouts."""

    folder: Path
    model: Any

    def mm(self, layout: str = "tp2pp2") -> Path:
        return self.folder / layout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("answers")
    hf = talking.make("qwen2_vl", folder / "hf")
    model = tinyfamilies.randomise(tiny.tiny_model("qwen2_vl"), 11)
    model.save_pretrained(hf)
    tinyfamilies.convert("qwen2_vl", hf, folder / "tp2pp2", "[1,3]", "[3,0]", 2)
    tinyfamilies.convert("qwen2_vl", hf, folder / "one", "[4]", "[3]", 1)
    tinyfamilies.convert("qwen2_vl", hf, folder / "vpp", "[[1,1],[1,1]]", "[[3,0],[0,0]]", 1)
    talking.write_data(folder)
    return Work(folder, model)


def questions(folder: Path, sounds: Sequence[Path] = ()) -> list[Sample]:
    """Of several lengths, with one picture, with two, and with none."""
    red, blue = folder / "red.png", folder / "blue.png"
    return [
        prompt("What is this?", [red], ()),
        prompt("Hi", (), ()),
        prompt("Which of <image> and <image> is the darker one?", [red, blue], sounds),
        prompt("A question", [blue], ()),
    ]


def answered(mm: Path, hf: Path, asked: Sequence[Sample], how: How) -> list[Reply]:
    found: list[Reply] = []

    def hear(number: int, reply: Reply) -> None:
        assert number == len(found)
        found.append(reply)

    commands.generate_all(mm, hf, asked, hear, lambda words: None, how)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly(KINDS, but=("qwen2_vl", "qwen3_vl_moe")))
def test_prompts_side_by_side_are_answered_as_each_alone(
    kind: str, work: Work, tmp_path: Path
) -> None:
    mm, hf = work.mm("one"), work.folder / "hf"
    sounds: list[Path] = []
    if kind != "qwen2_vl":
        hf = talking.make(kind, tmp_path / "hf")
        layers = ("[4]", "[3]") if kind == "qwen3_vl_moe" else ("[1,3]", "[3,0]")
        mm = tinyfamilies.convert(kind, hf, tmp_path / "mm", *layers, 1)
    if kind == "omni":
        sounds = [talking.sound(tmp_path / "tone.wav", 440)]
    asked = questions(work.folder, sounds)
    together = answered(mm, hf, asked, How(most=6))
    for sample, reply in zip(asked, together, strict=True):
        assert commands.generate(mm, hf, sample, how=How(most=6)) == reply
    assert len({reply.tokens for reply in together}) > 1
    assert answered(mm, hf, asked, How(most=6, rows=2)) == together


# ------------------------------------------------------------------------------ drawing
@pytest.mark.parametrize(
    "how",
    [Sampling(1.0, 0.7), Sampling(1.0, 1.5, 0, 0.6), Sampling(1.0, 0.9, 5, 0.8)],
    ids=["temperature", "top_p", "top_k"],
)
def test_words_are_drawn_as_transformers_draws_them(how: Sampling) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 3
    ids: Any = torch.zeros(3, 1, dtype=torch.int64)
    expected: Any = TemperatureLogitsWarper(how.temperature)(ids, logits.double())
    if how.top_k:
        expected = TopKLogitsWarper(how.top_k)(ids, expected)
    if how.top_p < 1:
        expected = TopPLogitsWarper(how.top_p)(ids, expected)
    expected = expected.softmax(-1)
    found = probabilities(logits, how)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)
    times = 4000
    chooser = Chooser(how, range(times))
    drawn = chooser.choose(logits[:1].expand(times, -1)).bincount(minlength=50) / times
    assert float((drawn - expected[0]).abs().max()) < 0.03
    assert set(drawn.nonzero().flatten().tolist()) <= set(expected[0].nonzero().flatten().tolist())


@pytest.mark.slow
def test_the_same_seed_draws_the_same_words_in_every_layout_and_batch(work: Work) -> None:
    hf, asked = work.folder / "hf", questions(work.folder)
    how = How(most=6, choice=HOT)
    found = answered(work.mm(), hf, asked, how)
    assert answered(work.mm("one"), hf, asked, how) == found
    assert answered(work.mm("vpp"), hf, asked, How(most=6, choice=HOT, rows=1)) == found
    other = How(most=6, choice=Sampling(temperature=1.0, top_p=0.95, seed=8))
    assert answered(work.mm("one"), hf, asked, other) != found
    cold = How(most=6, choice=Sampling(temperature=1.0, top_k=1))
    assert answered(work.mm("one"), hf, asked, cold) == answered(
        work.mm("one"), hf, asked, How(most=6)
    )


# --------------------------------------------------------------------------- conversations
class Talk:
    """What transformers says in a conversation, all of it computed anew for each answer."""

    def __init__(self, work: Work, most: int) -> None:
        self._hf, self._model, self._most = work.folder / "hf", work.model, most
        self._words: Any = AutoTokenizer.from_pretrained(self._hf)
        self._ids: list[int] = []
        self._pictures: list[Any] = []

    def text(self, words: str) -> list[int]:
        return self._words(words, add_special_tokens=False)["input_ids"]

    def say(self, question: str, picture: Path | None = None) -> list[int]:
        begin = "<|im_end|>\n" if self._ids else (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        )  # fmt: skip
        self._ids += self.text(f"{begin}<|im_start|>user\n")
        if picture is not None:
            self._ids += [tiny.START, *[tiny.IMAGE] * 4, tiny.END]
            self._pictures.append(picture)
        self._ids += self.text(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        ids = torch.tensor([self._ids])
        more: dict[str, Any] = {}
        if self._pictures:
            from PIL import Image

            processor: Any = Qwen2VLImageProcessor.from_pretrained(self._hf)
            pictures = [Image.open(path).convert("RGB") for path in self._pictures]
            more |= processor(images=pictures, return_tensors="pt")
        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                mm_token_type_ids=(ids == tiny.IMAGE).int(), max_new_tokens=self._most,
                eos_token_id=END, **more,
            )  # fmt: skip
        answer = out[0, len(self._ids) :].tolist()
        self._ids += [token for token in answer if token != END]
        return [token for token in answer if token != END]


def chatted(work: Work, layout: str, turns: list[tuple[Sample, bool]], how: How) -> list[Reply]:
    found: list[Reply] = []
    waiting = iter(turns)
    said: list[str] = []
    commands.chat(
        work.mm(layout), work.folder / "hf", lambda: next(waiting, None),
        said.append, found.append, lambda error: pytest.fail(error.what), how,
    )  # fmt: skip
    assert "".join(said) == "".join(reply.text for reply in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2pp2", night("vpp")])
def test_a_conversation_in_the_cache_is_that_of_transformers(layout: str, work: Work) -> None:
    red, blue = work.folder / "red.png", work.folder / "blue.png"
    turns = [
        (prompt("Hi", (), ()), True),
        (prompt("What is this?", [red], ()), False),
        (prompt("And this?", [blue], ()), False),
        (prompt("Which was first?", (), ()), False),
        (prompt("Hi", (), ()), True),  # nothing of what was said before is known
    ]
    theirs, again = Talk(work, 7), Talk(work, 7)
    expected = [
        theirs.say("Hi"),
        theirs.say("What is this?", red),
        theirs.say("And this?", blue),
        theirs.say("Which was first?"),
        again.say("Hi"),
    ]
    found = chatted(work, layout, turns, How(most=7))
    assert [[*reply.tokens] for reply in found] == expected
    assert len({*map(tuple, expected)}) > 2
    assert found[0] == found[4]
    assert found[3].prompt_tokens > found[2].prompt_tokens > found[1].prompt_tokens


@pytest.mark.slow
def test_an_answer_ends_at_its_end_or_where_the_positions_do(work: Work, tmp_path: Path) -> None:
    hf, mm = work.folder / "hf", work.mm("one")
    sample = prompt("What is this?", [work.folder / "red.png"], ())
    how = How(most=8, choice=HOT)
    free = commands.generate(mm, hf, sample, how=how)
    assert (free.end, len(free.tokens)) == ("length", 8)
    at = next(i for i, token in enumerate(free.tokens) if i > 1 and token not in free.tokens[:i])

    def changed(name: str, key: str, value: object) -> Path:
        other = tmp_path / key
        other.mkdir()
        for path in hf.iterdir():
            content = path.read_bytes()
            if path.name == name:
                settings = json.loads(content)
                (settings.get("text_config", settings) if key != "eos_token" else settings)[key] = (
                    value
                )
                content = json.dumps(settings).encode()
            (other / path.name).write_bytes(content)
        return other

    words: Any = AutoTokenizer.from_pretrained(hf)
    end = words.convert_ids_to_tokens(free.tokens[at])
    ended = commands.generate(
        mm, changed("tokenizer_config.json", "eos_token", end), sample, how=how
    )
    assert (ended.end, ended.tokens) == ("eos", free.tokens[:at])
    short = changed("config.json", "max_position_embeddings", free.prompt_tokens + 5)
    ended = commands.generate(mm, short, sample, how=how)
    assert (ended.end, ended.tokens) == ("context", free.tokens[:5])
    # beside it, another prompt has its whole answer
    both = answered(mm, short, [sample, prompt("Hi", (), ())], how)
    assert [(reply.end, len(reply.tokens)) for reply in both] == [("context", 5), ("length", 8)]


# ----------------------------------------------------------------------------- command line
def test_a_file_of_prompts(work: Work) -> None:
    lines = [
        "What is this?",
        "",
        json.dumps({"prompt": "Which?", "image": "red.png", "colour": "red"}),
        json.dumps({"prompt": "<image> or <image>?", "images": ["red.png", "blue.png"]}),
    ]
    path = work.folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    samples, notes = read_prompts(path)
    assert [len(s.images) for s in samples] == [0, 1, 2]
    assert [s.messages[0][1] for s in samples] == [
        "What is this?", "<image>Which?", "<image> or <image>?",
    ]  # fmt: skip
    assert notes == ["note: keys of the prompts that are not read: colour"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no prompts"),
        (b"ok\n{not JSON}", "line 2 is not valid JSON"),
        (b'{"prompt": 3}', "prompt is 3"),
        (b'{"prompt": "x", "image": "gone.png"}', "gone.png is missing"),
        (b'{"prompt": "x", "image": [1]}', "image is \\[1\\]"),
        (b"\xff\xfe\xff", "is not text"),
    ],
    ids=["empty", "JSON", "prompt", "missing", "names", "bytes"],
)
def test_a_wrong_line_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=said):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.slow
def test_prompts_on_the_command_line(work: Work) -> None:
    (work.folder / "two.txt").write_text('Hi\n{"prompt": "Which?", "image": "red.png"}\n')
    both = ("--mm_dir", "tp2pp2", "--hf_dir", "hf", "--max_new_tokens", "4")
    done = run_cli("generate", *both, "--prompts", "two.txt", "--json", cwd=work.folder, check=0)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    one = run_cli("generate", *both, "--prompt", "Hi", "--json", cwd=work.folder, check=0)
    assert found[0] == {"number": 1, "prompt": "Hi", **json.loads(one.stdout)}
    assert found[1]["prompt"] == "<image>Which?"
    assert (found[1]["answer_tokens"], found[1]["end"]) == (4, "length")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompts", "two.txt", "--image", "red.png"), "--prompts is given, and --image"),
        (("--prompt", "Hi", "--top_p", "0.5"), "--top_p is given"),
        (("--prompt", "Hi", "--temperature", "inf"), "--temperature is inf"),
        (("--prompt", "Hi", "--batch_size", "0"), "--batch_size is 0"),
        ((), "there is no question"),
    ],
)
def test_what_cannot_be_asked(words: tuple[str, ...], said: str) -> None:
    assert said in call("generate", "--mm_dir", "mm", "--hf_dir", "hf", *words, check=2).stderr


@pytest.mark.slow
def test_a_chat_on_a_terminal(work: Work) -> None:
    words = ("--mm_dir", "one", "--hf_dir", "hf", "--max_new_tokens", "4", "--chat")
    with standing_in(work.folder):
        process = Forked(lambda: main(["generate", *words]), terminal=True)
    shown, ours = b"", process.stdout.fileno()

    def until(prompts: int) -> None:
        nonlocal shown
        end = time.monotonic() + 200
        while shown.count(b"> ") < prompts:
            assert time.monotonic() < end, shown
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 1000)

    try:
        for number, line in enumerate((b"Hi\n", b"/image red.png\n", b"Which?\n", b"/image no\n")):
            until(number + 1)
            os.write(ours, line)
        until(5)
        os.write(ours, b"\x04")  # Ctrl-D
        code, errors = process.ends()
    finally:
        process.close()
    assert code == 0, errors
    assert "Ctrl-D ends" in errors and "error: no is not a file" in errors
    turns = [
        (prompt("Hi", (), ()), True),
        (prompt("Which?", [work.folder / "red.png"], ()), False),
    ]
    for reply in chatted(work, "one", turns, How(most=4)):
        assert reply.text.replace("\n", "\r\n").encode() in shown


@pytest.mark.slow
def test_a_chat_through_a_pipe_goes_on_after_a_wrong_question(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work.folder / "torn.png").write_bytes(b"\x89PNG\r\n")
    words = ("--mm_dir", "one", "--hf_dir", "hf", "--max_new_tokens", "4", "--chat", "--json")
    monkeypatch.setattr("sys.stdin", io.StringIO("/image torn.png\nWhat?\nHi\n/new\nHi\n"))
    process = run_cli("generate", *words, cwd=work.folder, check=0)
    found = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(found) == 2
    assert found[0] == found[1]
    assert "torn.png" in process.stderr


def test_pieces_of_characters_are_held_back() -> None:
    said: list[str] = []
    content = "é日 x\n y".encode()
    wording = Wording(lambda ids: bytes(ids).decode(errors="replace"), said.append)
    for byte in content:
        wording.hear(byte)
    assert wording.end() == "".join(said) == content.decode()
    assert said[:2] == ["é", "日"]


def test_a_model_that_is_not_there(work: Work) -> None:
    with pytest.raises(MMConvertError, match="gone"):
        commands.generate(work.folder / "gone", work.folder / "hf", prompt("Hi", (), ()))
