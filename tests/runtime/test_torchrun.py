"""``torchrun -m mmconvert finetune``: the same curve and weights as the command's own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import talking
import tinyfamilies
from commands import rank_files

pytestmark = pytest.mark.nightly


def torchrun(number: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number)]
    return subprocess.run(
        [*command, "--standalone", "-m", "mmconvert", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_torchrun_trains_as_the_command_does(tmp_path: Path) -> None:
    hf = talking.make("qwen2_vl", tmp_path / "hf", tied=True)
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[1,3]", "[3,0]")
    data = talking.write_data(tmp_path)
    save, alone = tmp_path / "save", tmp_path / "alone"
    rate = ("--lr", "3e-3", "--warmup_iters", "2", "--weight_decay", "0.01", "--seed", "5")
    words = ("finetune", "--mm_dir", mm, "--hf_dir", hf, "--data", data, "--train_iters", "3")
    done = torchrun(2, *words, *rate, "--save", save)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("iteration")]
    curve = talking.learn(mm, hf, [data], talking.plan(alone, 3))
    assert len(lines) == len(curve) == 3  # one process speaks
    assert [f"loss {line[1]:.6f}" for line in curve] == [x.split(" | ")[1] for x in lines]
    for rank, path in rank_files(alone).items():
        ours = torch.load(path, weights_only=True)["model"]
        theirs = torch.load(rank_files(save)[rank], weights_only=True)["model"]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    # Another number of processes than the checkpoint has ranks; a fault of one process alone.
    wrong = torchrun(1, "validate", "--mm_dir", mm, "--hf_dir", hf)
    assert wrong.returncode == 1  # torchrun's own
    assert "error: torchrun started 1 process" in wrong.stderr
    content = torch.load(rank_files(mm)["mp_rank_00_001"], weights_only=True)
    del content["model"]["text_decoder.decoder.final_layernorm.weight"]
    torch.save(content, rank_files(mm)["mp_rank_00_001"])
    broken = torchrun(2, "validate", "--mm_dir", mm, "--hf_dir", hf)
    assert broken.returncode == 1
    assert "text_decoder.decoder.final_layernorm.weight is missing" in broken.stderr
    assert "a fault of mmconvert itself" not in broken.stderr


@pytest.mark.parametrize(
    ("own", "named"),
    [(["--lr", "1.0"], "--lr"), (["--save", "other"], "--save")],
    ids=["learning rate", "folder"],
)
def test_processes_that_disagree(own: list[str], named: str, tmp_path: Path) -> None:
    """No step is done: the checkpoint would be of neither request."""
    hf = talking.make("qwen2_vl", tmp_path / "hf", tied=True)
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[1,3]", "[3,0]")
    data = talking.write_data(tmp_path)
    words = ("finetune", "--mm_dir", mm, "--hf_dir", hf, "--data", data, "--train_iters", "3")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    program = Path(__file__).parents[1] / "differing.py"
    done = subprocess.run(
        [*command, "--standalone", str(program), "-2", *map(str, words), "--save", "save", *own],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    assert "the processes of this run disagree" in done.stderr, done.stderr
    assert named in done.stderr
    assert not list(tmp_path.glob("*/iter_*"))
    assert not (tmp_path / "other").exists()
