"""Qwen-VL to MindSpore against the record of what MindFormers' own script writes.

The record holds, for each dtype, shape, type and SHA-256 (16 digits) of every tensor of its .ckpt,
in the order of the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mmconvert.formats.containers.ckpt import DTYPES, read_ckpt
from qwenvl import hf_to_ms, make_qwenvl

RECORD = json.loads(Path(__file__).with_name("qwenvl-small.json").read_text())
KIND = {dtype: kind for kind, dtype in DTYPES.items()}


def described(path: Path) -> list[tuple[str, list[object]]]:
    """A file as the record describes it."""
    content = path.read_bytes()
    return [
        (
            t.name,
            [
                list(t.shape),
                KIND[t.dtype],
                hashlib.sha256(content[t.offset : t.offset + t.nbytes]).hexdigest()[:16],
            ],
        )
        for t in read_ckpt(path).tensors
    ]


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("dtype", RECORD)
def test_as_mindformers_writes_it(dtype: str, pickled: bool, tmp_path: Path) -> None:
    """Same tensors, values, dtype and order, from both forms of the source."""
    hf = make_qwenvl(tmp_path / "hf", pickled=pickled)
    hf_to_ms(hf, tmp_path / "x.ckpt", "--cfg.dtype", dtype)
    assert described(tmp_path / "x.ckpt") == list(RECORD[dtype].items())


def test_the_record_is_of_the_whole_model() -> None:
    assert {dtype: len(tensors) for dtype, tensors in RECORD.items()} == {
        "fp32": 93,
        "fp16": 93,
        "bf16": 93,
    }
