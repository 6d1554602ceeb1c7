"""Names that no file system takes, for every path that a command is given: exit code 2 or 3."""

from __future__ import annotations

from pathlib import Path

import pytest

from inprocess import BACK, HF, MM, SOURCE, TARGET, call, to_mm
from mmconvert.playground.checkpoints import make_hf

QWEN = "Qwen2VLConverter"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("whole")
    hf = make_hf("qwen2vl-2b", folder / "hf", layers=2, vit_layers=1)
    to_mm("qwen2vl-2b", hf, folder / "mm")
    return hf, folder / "mm"


@pytest.mark.parametrize("name", ["n" * 256, "é" * 200, "x/" * 3000, "n" * 245], ids=len)
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
