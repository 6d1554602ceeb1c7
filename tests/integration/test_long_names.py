"""Names that no file system takes, for every path that a command is given: exit code 2 or 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inprocess import BACK, HF, MM, SOURCE, TARGET, call, to_mm
from mmconvert.executor import journal
from mmconvert.playground.checkpoints import make_hf
from nights import night

QWEN = "Qwen2VLConverter"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("whole")
    hf = make_hf("qwen2vl-2b", folder / "hf", layers=2, vit_layers=1)
    to_mm("qwen2vl-2b", hf, folder / "mm")
    return hf, folder / "mm"


@pytest.mark.parametrize("name", ["n" * 256, night("é" * 200), "x/" * 2100], ids=len)
def test_every_path_of_every_command(name: str, whole: tuple[Path, Path], tmp_path: Path) -> None:
    (hf, mm), odd, out = whole, tmp_path / name, tmp_path / "out"
    for words in (
        *(("inspect", odd), ("doctor", odd), ("verify", odd, mm), ("diff", mm, odd)),
        *(("suggest", odd, "--pp", "1"), ("roundtrip", odd)),
        *((QWEN, "hf_to_mm", HF, odd, MM, out), (QWEN, "hf_to_mm", HF, hf, MM, odd)),
        *((QWEN, "mm_to_hf", HF, hf, MM, odd, BACK, out), (QWEN, "hf_to_mm", "--config", odd)),
        *((QWEN, "mm_to_hf", HF, hf, MM, mm, BACK, odd), ("AutoConverter", "hf_to_mm", HF, odd)),
        (QWEN, "resplit", SOURCE, odd, TARGET, out),
        ("data", "llava-to-mllm", "--llava_json_path", odd, "--output_json_path", out),
    ):
        assert call(*words, check=None).returncode in (2, 3), words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 236, "n" * 245, "é" * 127], ids=lambda n: len(n.encode()))
def test_the_longest_names_that_a_file_system_takes(
    name: str, whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is made beside the output finds room for its name, and a rerun finds it again."""
    (hf, mm), out = whole, tmp_path / name
    done = journal.Journal.add

    def stop(self: journal.Journal, *args: Any) -> None:
        done(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", stop)
        assert "goes on where" in to_mm("qwen2vl-2b", hf, out, check=130).stderr
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".mmconvert-partial")
    found = json.loads(call("doctor", out, "--json", check=3).stdout)["findings"]
    assert "unfinished-output" in [finding["id"] for finding in found]
    result = json.loads(to_mm("qwen2vl-2b", hf, out, "--json").stdout)
    assert result["resumed_bytes"] > 0
    call("verify", mm, out)
    to_mm("qwen2vl-2b", hf, out, "--overwrite")
    assert list(tmp_path.iterdir()) == [out]


def test_long_names_of_files(whole: tuple[Path, Path], tmp_path: Path) -> None:
    hf, _ = whole
    name = "n" * 250
    call("inspect", hf, "--svg", tmp_path / f"{name}.svg")
    lists = ("--llm-pp-layers", "[2]", "--vit-pp-layers", "[1]")
    call("model_json", hf, *lists, "--output", tmp_path / f"{name}.json")
    (tmp_path / "in.json").write_text("[]")
    words = ("--llava_json_path", tmp_path / "in.json", "--output_json_path")
    call("data", "llava-to-mllm", *words, tmp_path / f"{name}.txt", check=None)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
