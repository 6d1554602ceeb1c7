"""The tutorial does what its page says; so do the commands of the runtime's page."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

import talking
import tinyfamilies
from inprocess import call

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "tutorial.py"
PAGE, RUNTIME = (ROOT / "docs" / f"{name}.md" for name in ("tutorial", "runtime"))
MORE = {"generate": ("--max_new_tokens", "2"), "finetune": ("--train_iters", "2")}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def script() -> ModuleType:
    spec = spec_from_file_location("tutorial", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown() -> str:
    """What the page shows as the script's output."""
    return next(text for kind, text in FENCE.findall(PAGE.read_text()) if kind == "text")


def test_the_page_shows_the_commands_that_run() -> None:
    tutorial = script()
    expected = [f"$ {tutorial.shown(words)}\n" for _, words in tutorial.STEPS]
    places = [shown().find(command) for command in expected]
    assert -1 not in places
    assert places == sorted(places)
    assert shown().count("$ mm-convert") == len(expected)
    assert all(caption in shown() for caption in tutorial.CAPTIONS.values())
    assert (PAGE.parent / "images" / "tutorial-loss.svg").is_file()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(SystemExit, match="holds other things"):
        script().emptied(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_pictures_that_are_not_there_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)  # what Python keeps of a package it has not
    with pytest.raises(SystemExit, match="pip install scikit-image"):
        script().pictures(tmp_path / "pictures")


def same_lines(text: str) -> list[str]:
    """The lines without what differs from run to run: numbers with a point, and random words."""
    kept: list[str] = []
    babble = False
    for raw in text.strip().splitlines():
        line = re.sub(r"^(\w+) {2,}\S.*? {2,}(\S.*)$", r"\1 \2", raw) if ".png" not in raw else raw
        line = re.sub(r"\d+\.\d+(e[+-]\d+)?|\d+ (tokens/s|s\b)|position \d+", "N", line)
        line = re.sub(r"(\d+ parameters; most at ).*", r"\1", line)
        line = re.sub(r"\S*tutorial-output|/\S*/trained", "OUT", line)
        if babble and not line.startswith("---"):
            continue
        kept.append(re.sub(r"\s+", " ", line).strip())
        babble = "knows nothing" in line or (babble and not line.startswith("---"))
    return [line for line in kept if line]


@pytest.mark.nightly
def test_the_tutorial_does_what_its_page_says(tmp_path: Path) -> None:
    work = tmp_path / "tutorial-output"
    command = [sys.executable, str(SCRIPT), str(work)]
    done = subprocess.run(
        command, env=ENV, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    got, expected = same_lines(done.stdout), same_lines(shown())
    assert [line for line in got if "loss curve" not in line] == [
        line for line in expected if "loss curve" not in line
    ]
    captions = script().CAPTIONS
    table = done.stdout.rpartition("--- 8.")[2]
    assert all(re.search(rf"^{name} .*{re.escape(said)}$", table, re.M) for name, said in
               captions.items())  # fmt: skip

    written = (work / "trained" / "loss.jsonl").read_text()
    lines = [json.loads(text) for text in written.splitlines()]
    assert len(lines) == 100
    assert lines[0]["loss"] > 5
    assert lines[-1]["loss"] < 0.05
    picture = ElementTree.parse(work / "trained" / "loss.svg").getroot()
    points = [e.get("points", "") for e in picture.iter() if e.tag.endswith("polyline")]
    assert [len(line.split()) for line in points] == [100]
    # What came back is another model than what went in, of the same names and shapes.
    old, new = (
        Qwen2VLForConditionalGeneration.from_pretrained(work / name, dtype=torch.float32)
        for name in ("hf", "hf_trained")
    )
    assert all(
        a.shape == b.shape and not torch.equal(a, b)
        for (_, a), (_, b) in zip(old.named_parameters(), new.named_parameters(), strict=True)
    )


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about a model of their own
def test_adapters_teach_the_trained_model_other_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At TP2 PP2: the captions change places, by adapters alone. The runtime, PEFT, and models that
    were merged in either format say them word for word.
    """
    pytest.importorskip("peft")
    tutorial = script()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ENV["PYTHONPATH"])
    tutorial.pictures(Path("pictures"))
    tutorial.conversations(Path("captions.json"))
    tutorial.model(Path("hf"))
    for step in (0, 3, 5):  # to MM, trained, and back
        tutorial.mm_convert(tmp_path, tutorial.STEPS[step][1])
    words = list(tutorial.CAPTIONS.values())
    expected = [*words[1:], words[0]]
    items = json.loads(Path("captions.json").read_text())
    for item, caption in zip(items, expected, strict=True):
        item["messages"][1]["content"] = caption
    Path("others.json").write_text(json.dumps(items))
    here, there = ("--mm_dir", "trained", "--hf_dir", "hf_trained"), Path("hf_trained")
    schedule = "--train_iters 60 --micro_batch_size 3 --global_batch_size 6 --lr 5e-3 --min_lr 5e-4"
    targets = "--lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2"
    asked = (*schedule.split(), "--warmup_iters", "5", "--lora-r", "8", *targets.split())
    call("finetune", *here, "--data", "others.json", "--save", "lora", *asked)
    assert tutorial.transformers_says(there, Path("pictures")) == words
    assert tutorial.runtime_says(Path("trained"), there, Path("lora")) == expected

    converter = "Qwen2VLConverter"
    back = ("--cfg.mm_dir", "lora", "--cfg.hf_config.hf_dir", there, "--cfg.save_hf_dir", "adapter")
    call(converter, "lora_mm_to_hf", *back)
    assert tutorial.transformers_says(there, Path("pictures"), Path("adapter")) == expected
    for base, adapter, out in (("hf_trained", "adapter", "one"), ("trained", "lora", "two")):
        given = ("--cfg.base_dir", base, "--cfg.lora_dir", adapter, "--cfg.save_dir", out)
        call(converter, "lora_merge", *given, "--cfg.hf_config.hf_dir", there)
    call("verify", "one", "two")
    assert tutorial.transformers_says(Path("one"), Path("pictures")) == expected
    assert tutorial.runtime_says(Path("two"), Path("one")) == expected


def test_the_commands_of_the_runtimes_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand there, but for the number of steps."""
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[1,3]", "[3,0]")
    talking.write_data(tmp_path, "train.json")
    talking.picture(tmp_path / "cat.png", "red")
    monkeypatch.chdir(tmp_path)
    text = next(t for kind, t in FENCE.findall(RUNTIME.read_text()) if kind == "sh")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    commands = [words[1:] for words in lines if words[:1] == ["mm-convert"]]
    assert [words[0] for words in commands] == ["validate", "generate", "finetune"]
    told = [call(*words, *MORE.get(words[0], ())).stdout for words in commands]
    assert "equal: both compute the same" in told[0]
    assert "iteration      2/2" in told[2]
    assert (tmp_path / "trained" / "latest_checkpointed_iteration.txt").read_text() == "2"
