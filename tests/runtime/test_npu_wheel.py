"""Every command computes on the CPU where the real torch_npu is installed, and CANN is not.

MMCONVERT_NPU_WHEEL=$(make --silent npu-wheel) .venv/bin/pytest -m npu_wheel
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, mm (two ranks), data.json, and a Qwen-VL in vl."""
    folder = tmp_path_factory.mktemp("npu")
    hf = talking.make("qwen2_vl", folder / "hf")
    tinyfamilies.convert("qwen2_vl", hf, folder / "mm", "[1,3]", "[3,0]")
    talking.write_data(folder)
    golden.make(folder / "vl")
    return folder


def run(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **WITH, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_torch_and_transformers_themselves_die_of_it() -> None:
    """Else the rest of this page proves nothing."""
    dead = run("import torch")
    assert "Failed to load the backend extension: torch_npu" in dead.stderr
    program = "import transformers\nfrom transformers import Qwen2VLForConditionalGeneration"
    dead = run(program, **{AUTOLOAD: "0"})
    assert "ImportError: libhccl.so" in dead.stderr


@devices
def test_commands_compute_on_the_cpu(work: Path, device: str, tmp_path: Path) -> None:
    both = ("--mm_dir", "mm", "--hf_dir", "hf", "--device", device)
    done = run_cli("validate", *both, "--json", cwd=work, env=WITH, check=0)
    assert json.loads(done.stdout)["passed"]
    words = ("--prompt", "Hi", "--image", "red.png", "--max_new_tokens", "4")
    run_cli("generate", *both, *words, cwd=work, env=WITH, check=0)
    words = ("--data", "data.json", "--save", tmp_path / "out", "--train_iters", "2")
    done = run_cli("finetune", *both, *words, cwd=work, env=WITH, check=0)
    assert (tmp_path / "out" / "iter_0000002" / "mp_rank_00_001").is_dir()


@devices
def test_qwenvl_computes_on_the_cpu(work: Path, device: str) -> None:
    words = ("--hf_dir", "vl", "--prompt", "Hi", "--max_new_tokens", "2", "--device", device)
    run_cli("generate", *words, cwd=work, env=WITH, check=0)
    run_cli("predict", "single", "vl", "vl", "vl/qwen.tiktoken", "red.png", "Hi", "1", "1",
            "--device", device, "--predict_length", "300", cwd=work, env=WITH, check=0)  # fmt: skip


def test_conversions_do_not_look_at_it(work: Path, tmp_path: Path) -> None:
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


def test_a_python_program_computes_on_the_cpu(work: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from mmconvert.runtime import commands\n"
        f"mm, hf = Path({str(work / 'mm')!r}), Path({str(work / 'hf')!r})\n"
        "from mmconvert.runtime.conversation import prompt\n"
        "print(commands.generate(mm, hf, prompt('Hi', (), ())))\n"
    )
    done = run(program)
    assert done.returncode == 0, done.stderr
