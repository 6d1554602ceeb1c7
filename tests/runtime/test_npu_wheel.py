"""Every command computes on the CPU where the real torch_npu is installed, and CANN is not.

MMCONVERT_NPU_WHEEL=$(make --silent npu-wheel) .venv/bin/pytest -m npu_wheel
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import qwenvlgolden as golden
import talking
import tinyfamilies
from cli import run_cli
from mmconvert.runtime.needs import AUTOLOAD

WHEEL = os.environ.get("MMCONVERT_NPU_WHEEL", "")
WITH = {"PYTHONPATH": WHEEL and os.path.abspath(WHEEL), "OMP_NUM_THREADS": "1"}
pytestmark = [
    pytest.mark.npu_wheel,
    pytest.mark.slow,
    pytest.mark.skipif(not WHEEL, reason="MMCONVERT_NPU_WHEEL names no folder with torch_npu"),
]
devices = pytest.mark.parametrize("device", ["auto", "cpu"])
# A program that asks for an answer, and goes on with commands.
PROGRAM = """
import json, sys
from pathlib import Path
from mmconvert.runtime import commands
from mmconvert.runtime.conversation import prompt
print(commands.generate(Path("mm"), Path("hf"), prompt("Hi", (), ())))
from mmconvert.cli import main
for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(f"{words}: {code}")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, mm (two ranks), data.json, and a Qwen-VL in vl."""
    folder = tmp_path_factory.mktemp("npu")
    hf = talking.make("qwen2_vl", folder / "hf")
    tinyfamilies.convert("qwen2_vl", hf, folder / "mm", "[1,3]", "[3,0]")
    talking.write_data(folder)
    golden.make(folder / "vl")
    return folder


def run(
    program: str, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        env={**os.environ, **WITH, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_torch_itself_dies_of_it() -> None:
    """Else the rest of this page proves nothing."""
    dead = run("import torch")
    assert "Failed to load the backend extension: torch_npu" in dead.stderr


@pytest.mark.nightly
def test_transformers_itself_dies_of_it() -> None:
    program = "import transformers\nfrom transformers import Qwen2VLForConditionalGeneration"
    dead = run(program, env={AUTOLOAD: "0"})
    assert "ImportError: libhccl.so" in dead.stderr


def asked(device: str, save: Path) -> dict[str, list[str]]:
    """Each command that computes."""
    both = ["--mm_dir", "mm", "--hf_dir", "hf", "--device", device]
    words = ["--prompt", "Hi", "--max_new_tokens"]
    vocabulary = ["vl/qwen.tiktoken", "red.png", "Hi", "1", "1"]
    return {
        "validate": ["validate", *both, "--json"],
        "generate": ["generate", *both, "--image", "red.png", *words, "4"],
        "finetune": ["finetune", *both, "--data", "data.json", "--save", str(save),
                     "--train_iters", "2"],
        "generate, Qwen-VL": ["generate", "--hf_dir", "vl", *words, "2", "--device", device],
        "predict": ["predict", "single", "vl", "vl", *vocabulary, "--device", device,
                    "--predict_length", "300"],
    }  # fmt: skip


COMMANDS = tuple(asked("auto", Path()))


def test_a_program_and_all_commands_compute_on_the_cpu(work: Path, tmp_path: Path) -> None:
    """In one process, which imports torch and transformers once."""
    words = list(asked("auto", tmp_path / "out").values())
    done = run(PROGRAM, json.dumps(words), cwd=work)
    assert done.returncode == 0, done.stderr
    assert '"passed": true' in done.stdout
    assert (tmp_path / "out" / "iter_0000002" / "mp_rank_00_001").is_dir()


@pytest.mark.nightly
@devices
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_computes_on_the_cpu(
    command: str, device: str, work: Path, tmp_path: Path
) -> None:
    words = asked(device, tmp_path / "out")[command]
    run_cli(*words, cwd=work, env=WITH, check=0)


def test_conversions_do_not_look_at_it(work: Path, tmp_path: Path) -> None:
    words = ("Qwen2VLConverter", "mm_to_hf", "--cfg.mm_dir", "mm", "--cfg.hf_config.hf_dir", "hf")
    run_cli(*words, "--cfg.save_hf_dir", tmp_path / "hf", cwd=work, env=WITH, check=0)
    run_cli("verify", "hf", tmp_path / "hf", cwd=work, env=WITH, check=0)


@pytest.mark.nightly
def test_conversions_by_torchrun_do_not_look_at_it(work: Path, tmp_path: Path) -> None:
    words = ("Qwen2VLConverter", "mm_to_hf", "--cfg.mm_dir", "mm", "--cfg.hf_config.hf_dir", "hf")
    run_cli(*words, "--cfg.save_hf_dir", tmp_path / "hf", cwd=work, env=WITH, check=0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = (*words, "--cfg.save_hf_dir", str(tmp_path / "two"))
    done = subprocess.run(
        [*torchrun, "--standalone", "-m", "mmconvert", *words],
        cwd=work,
        env={**os.environ, **WITH, AUTOLOAD: "0"},  # torchrun itself imports torch
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    index = "model.safetensors"
    assert (tmp_path / "hf" / index).read_bytes() == (tmp_path / "two" / index).read_bytes()


def test_an_npu_that_is_asked_for_and_not_there(work: Path) -> None:
    words = ("--mm_dir", "mm", "--hf_dir", "hf", "--device", "npu")
    done = run_cli("validate", *words, cwd=work, env=WITH, check=2)
    assert "libascendcl.so cannot be loaded" in done.stderr
