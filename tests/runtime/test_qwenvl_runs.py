"""Qwen-VL answers and is validated, from Hugging Face folders, .ckpt files and rank folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import qwenvlgolden as golden
from cli import run_cli
from mmconvert.playground.checkpoints import make_hf
from mmconvert.runtime.qwenvl import answer, validation
from mmconvert.runtime.qwenvl.prompts import Prompt
from qwenvl import devices, hf_to_ms, make_qwenvl, resplit_ms
from qwenvlgolden import recorded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, x.ckpt, ranks and a.png."""
    made = tmp_path_factory.mktemp("qwenvl")
    golden.make(made / "hf")
    hf_to_ms(made / "hf", made / "x.ckpt", "--cfg.dtype", "fp32")
    resplit_ms(made / "x.ckpt", made / "ranks", *devices(model_parallel=2, pipeline_stage=3))
    Image.fromarray(golden.arrays()["in_0"]).save(made / "a.png")
    return made


def test_greedy_tokens_are_mindformers_own(folder: Path) -> None:
    model = golden.load(folder / "hf", "mindformers")
    expected = recorded("gen_text")
    found = answer.generate(model, Prompt(expected[None, :-8], None, None), 8, set(), print)
    assert found == [expected[-8:].tolist()]
    expected, slots = recorded("gen_one"), recorded("one_pos")[0]
    asked = Prompt(expected[None, :-8], recorded("pixels")[:1], slots)
    rows = answer.generate(model, asked.rows(2, torch.device("cpu")), 8, set(), print)
    assert rows == [expected[-8:].tolist()] * 2


def test_an_answer_is_the_same_from_every_source(folder: Path) -> None:
    said: list[str] = []
    hf, words = folder / "hf", "Picture it: é?"
    asked = answer.question(hf, None, None, words, [folder / "a.png"], 8, "hub")
    found = answer.ask(asked, "fp32", said.append, print)
    assert "".join(said) == found[0].text != ""
    for source in ("x.ckpt", "ranks"):
        other = replace(asked, checkpoint=folder / source)
        assert answer.ask(other, "fp32", said.append, print) == found


def test_an_answer_ends_at_the_end_token_and_at_the_limit(folder: Path) -> None:
    model = golden.load(folder / "hf", "mindformers")
    ids = recorded("gen_text")
    asked = Prompt(ids[None, :-8], None, None)
    third = int(ids[-6])
    heard: list[int] = []
    found = answer.generate(model, asked, 8, {third}, heard.append)
    assert found == [ids[-8:-6].tolist()]
    assert heard == ids[-8:-5].tolist()


def test_generate_on_the_command_line(folder: Path) -> None:
    words = ["generate", "--hf_dir", folder / "hf", "--mm_dir", folder / "ranks"]
    words += ["--image", folder / "a.png", "--prompt", "Describe it.", "--max_new_tokens", 4]
    done = run_cli(*words, "--json", check=0)
    asked = answer.question(folder / "hf", None, None, "Describe it.", [folder / "a.png"], 4, "hub")
    expected = answer.ask(asked, "fp32", print, print)
    assert json.loads(done.stdout) == expected[0].as_dict()
    assert (expected[0].end, len(expected[0].tokens)) == ("length", 4)


def test_validate_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    words = ["validate", "--mm_dir", folder / "x.ckpt"]
    done = run_cli(*words, "--hf_dir", folder / "hf", "--json", check=0)
    assert json.loads(done.stdout)["passed"]


def test_a_damaged_layer_is_named(folder: Path, tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.w2.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3] *= -1

    other = make_qwenvl(tmp_path / "hf", golden.RECORDED, edit=damage)
    (other / "qwen.tiktoken").write_bytes((golden.FOLDER / "bytes.tiktoken").read_bytes())
    report = validation.validate(
        folder / "ranks", other, None, "", [folder / "a.png"], "fp32", 0.0, "hub", print
    )
    assert not report.passed
    assert report.parting is not None
    assert report.parting.label == "text layer 1"
    assert report.checks[0].note == name


def test_a_file_in_half_precision_is_compared_as_it_is_stored(folder: Path, tmp_path: Path) -> None:
    hf_to_ms(folder / "hf", tmp_path / "half.ckpt", "--cfg.dtype", "fp16")
    report = validation.validate(
        tmp_path / "half.ckpt", folder / "hf", None, "", [], "fp32", 0.0, "mindformers", print
    )
    assert report.passed
    assert "float16" in report.notes[0]


def test_flags_of_qwenvl_are_for_it_alone(tmp_path: Path) -> None:
    make_hf("qwen2vl-2b", tmp_path / "hf")
    words = ["generate", "--hf_dir", tmp_path / "hf", "--mm_dir", tmp_path, "--prompt", "Hi"]
    done = run_cli(*words, "--like", "mindformers", check=2)
    assert "--like is for Qwen-VL only" in done.stderr


def test_an_answer_in_half_precision_and_a_video_that_is_refused(folder: Path) -> None:
    words = ["generate", "--hf_dir", folder / "hf", "--prompt", "Hi", "--max_new_tokens", "2"]
    assert json.loads(run_cli(*words, "--dtype", "bf16", "--json", check=0).stdout)["text"]
    done = run_cli(*words, "--video", folder / "a.png", check=2)
    assert "pictures alone" in done.stderr


def test_the_form_of_a_chat_is_that_of_generation_config(folder: Path, tmp_path: Path) -> None:
    assert answer.form_of(folder / "hf") == "plain"
    (tmp_path / "generation_config.json").write_text('{"chat_format": "chatml"}')
    assert answer.form_of(tmp_path) == "chat"
    assert answer.form_of(tmp_path / "none") == "plain"
