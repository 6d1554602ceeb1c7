"""``hf_to_dcp`` and ``dcp_to_hf`` against recorded conversions, as torch loads what they write."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cli import run_cli
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf

RECORDS = sorted((Path(__file__).parent / "dcp_records").glob("*.json"))


def loaded(folder: Path, out: Path) -> dict[str, Any]:
    """What torch.distributed.checkpoint loads."""
    dcp_to_torch_save(folder, out)
    return torch.load(out, weights_only=False)


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def rows(tensors: dict[str, torch.Tensor]) -> list[list[Any]]:
    short = {torch.bfloat16: [], torch.float32: ["f32"]}
    return sorted([name, list(t.shape), digest(t), *short[t.dtype]] for name, t in tensors.items())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record(path: Path, tmp_path: Path) -> None:
    case = json.loads(path.read_text())
    hf = make_hf(case["model"], tmp_path / "hf", **case["hf"])
    mm, out = tmp_path / "mm", tmp_path / "back"
    there, back = case["steps"]
    words = {"{hf}": hf, "{out}": mm}
    assert run_cli(*(str(words.get(w, w)) for w in there["argv"])).returncode == 0
    files = sorted(str(p.relative_to(mm)) for p in mm.rglob("*") if p.is_file())
    assert sorted({*files} - {"mmconvert.json"}) == sorted(there["files"])
    assert (mm / "latest_checkpointed_iteration.txt").read_text() == there["latest"]
    found = loaded(mm / "release", tmp_path / "torch.pt")
    assert {k: v for k, v in found.items() if k != "model"} == there["top"]
    assert rows(found["model"]) == sorted(there["tensors"]["model"])

    argv = [w.replace("{hf}", str(hf)).replace("{mm}", str(mm)) for w in back["argv"]]
    done = run_cli(*(w.replace("{out}", str(out)) for w in argv))
    assert done.returncode == 0, done.stderr
    assert compare_hf(hf, out) == []
