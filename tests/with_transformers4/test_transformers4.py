"""Checkpoints that transformers 4.57 saved, there and back, and loaded by its own classes.

make transformers4
MMCONVERT_TRANSFORMERS4=.transformers4 .venv/bin/pytest -m transformers4
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from safetensors import safe_open

from commands import layout
from inprocess import BACK, HF, MM, SOURCE, TARGET, call
from mmread import compare_hf, compare_mm, compare_side_files
from nights import in_turns, nightly
from tinymodels import CONVERTERS

FOLDER = os.environ.get("MMCONVERT_TRANSFORMERS4", "")
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.transformers4,
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="MMCONVERT_TRANSFORMERS4 names no folder"),
]
NAMES = {**CONVERTERS, **dict.fromkeys(("intern-qwen2", "intern-qwen3"), "InternVLConverter")}
EXPERTS = "model.language_model.layers.0.mlp.experts.gate_up_proj"


class Ask(Protocol):
    def __call__(self, *words: object) -> dict[str, Any]: ...


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """A process with transformers 4.57 that answers."""
    tests = HERE.parent
    path = os.pathsep.join(map(str, (os.path.abspath(FOLDER), tests, tests / "golden")))
    process = subprocess.Popen(
        [sys.executable, str(HERE / "oracle.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )

    def answer(*words: object) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        request = [str(w) if isinstance(w, Path) else w for w in words]
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            head, _, rest = line.partition(" ")
            if head == "ANSWER":
                found = json.loads(rest)
                assert "error" not in found, found["error"]
                return found
        raise AssertionError(f"it ended with {process.wait()}")

    with process:
        yield answer


def shape_of(folder: Path, name: str) -> list[int]:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - no dict
                return list(file.get_slice(name).get_shape())
    raise AssertionError(f"{name} is not in {folder}")


@pytest.mark.parametrize(("kind", "tied"), in_turns(tuple(NAMES), (False, True)))
def test_there_and_back(kind: str, tied: bool, ask: Ask, tmp_path: Path) -> None:
    """Byte for byte, and its own class loads it strictly, to the same tensors."""
    hf, mm, other, back = (tmp_path / name for name in ("hf", "mm", "other", "back"))
    assert ask("save", kind, hf, tied, "100KB")["version"].startswith("4.57")
    if kind == "qwen3_vl_moe":  # inputs first: 8 experts of 64 inputs, 2 x 24 outputs
        assert shape_of(hf, EXPERTS) == [8, 64, 48]
    ep = ("ep_size=2",) if kind == "qwen3_vl_moe" else ()
    call(NAMES[kind], "hf_to_mm", HF, hf, MM, mm, *layout("[1,3]", "[3,0]", 2, *ep), check=0)
    call(NAMES[kind], "mm_to_hf", HF, hf, MM, mm, BACK, back, check=0)
    assert compare_hf(hf, back) + compare_side_files(hf, back) == []
    assert ask("same", hf, back)["differ"] == []
    flags = layout("[4]", "[3]", 1, prefix="--cfg.target_parallel_config.")
    call(NAMES[kind], "resplit", SOURCE, mm, TARGET, other, HF, hf, *flags, check=0)
    call(NAMES[kind], "hf_to_mm", HF, hf, MM, tmp_path / "mm1", *layout("[4]", "[3]"), check=0)
    assert compare_mm(tmp_path / "mm1", other) == []


@pytest.mark.parametrize(
    "kind",
    nightly(
        ("qwen3_vl_moe", "glm45v", "internvl_moe", "omni3", "omni3_thinker"),
        but=("qwen3_vl_moe", "internvl_moe", "omni3"),
    ),
)
def test_experts_in_every_form_that_it_loads(kind: str, ask: Ask, tmp_path: Path) -> None:
    """Version 5's stacks made version 4's; experts merged and split again."""
    hf, one, two = (tmp_path / name for name in ("hf", "one", "two"))
    ask("save", kind, hf, False, "5GB")
    styles = ("transformers5", "transformers4") if kind == "qwen3_vl_moe" else ("merge", "split")
    for style, source, out in zip(styles, (hf, one), (one, two), strict=True):
        words = ("--style", style, "--hf_dir", source, "--save_dir", out)
        call("moe_expert", *words, "--max_shard_size", "60KB", check=0)
    assert ask("same", hf, two)["differ"] == []


def test_what_version_5_saved_reaches_it(ask: Ask, tmp_path: Path) -> None:
    """By way of MM, or of moe_expert: the same tensors in the order of version 4."""
    from tinymodels import save, tiny_model

    hf, later, mm, back = (tmp_path / name for name in ("hf", "later", "mm", "back"))
    four = tmp_path / "four"
    ask("save", "qwen3_vl_moe", hf, False, "5GB")
    save(tiny_model("qwen3_vl_moe"), later)
    assert shape_of(later, EXPERTS) == [8, 48, 64]
    name = CONVERTERS["qwen3_vl_moe"]
    call(name, "hf_to_mm", HF, later, MM, mm, *layout("[4]", "[3]", 2, "ep_size=4"), check=0)
    call(name, "mm_to_hf", HF, hf, MM, mm, BACK, back, check=0)
    words = ("--style", "transformers4", "--hf_dir", later, "--save_dir", four)
    call("moe_expert", *words, check=0)
    shutil.copy(hf / "config.json", four)  # version 4 does not read rope_parameters
    assert ask("same", hf, four, back)["differ"] == []
