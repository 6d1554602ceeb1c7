"""Qwen-VL's files and layouts against the real MindSpore; see test_mindspore.py."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmconvert.formats.containers.ckpt import DTYPES, read_ckpt
from mmconvert.formats.mindspore.strategy import read_strategy
from msask import MARKS, ask
from qwenvl import devices, hf_to_ms, make_qwenvl, resplit_ms

pytestmark = MARKS

KIND = {dtype: kind for kind, dtype in DTYPES.items()}
LAYOUTS: dict[str, dict[str, int | str]] = {
    "mp2": {"model_parallel": 2},
    "mp4": {"model_parallel": 4},
    "dp2mp2": {"data_parallel": 2, "model_parallel": 2},
    "vocab_emb_dp": {"data_parallel": 2, "model_parallel": 2, "vocab_emb_dp": "True"},
    "dp2mp2 optimizer": {
        "data_parallel": 2,
        "model_parallel": 2,
        "optimizer_parallel": "True",
        "optimizer_threshold": 0,
    },
    "dp4 optimizer": {
        "data_parallel": 4,
        "optimizer_parallel": "True",
        "optimizer_threshold": 1,
    },
    "pp3mp2": {"pipeline_stage": 3, "model_parallel": 2},
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwenvl(tmp_path_factory.mktemp("qwenvl") / "hf")


def held(path: Path) -> dict[str, list[Any]]:
    """A file as the oracle describes it."""
    content = path.read_bytes()
    return {
        t.name: [
            KIND[t.dtype],
            list(t.shape),
            hashlib.sha256(content[t.offset : t.offset + t.nbytes]).hexdigest()[:16],
        ]
        for t in read_ckpt(path).tensors
    }


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_our_file_is_the_one_of_save_checkpoint(dtype: str, hf: Path, tmp_path: Path) -> None:
    for name, more in (("plain", []), ("crc", ["--crc"])):
        hf_to_ms(hf, tmp_path / f"our_{name}.ckpt", "--cfg.dtype", dtype, *more)
    ask("save", tmp_path / "our_plain.ckpt", tmp_path)
    for name in ("plain", "crc"):
        theirs = (tmp_path / f"{name}.ckpt").read_bytes()
        assert (tmp_path / f"our_{name}.ckpt").read_bytes() == theirs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transform_checkpoints_both_ways(layout: str, hf: Path, tmp_path: Path) -> None:
    """Our slices and strategies to full, and full to slices with our strategies."""
    full = tmp_path / "full" / "rank_0" / "full.ckpt"
    hf_to_ms(hf, full)
    ours = tmp_path / "ours"
    resplit_ms(full, ours, *devices(**LAYOUTS[layout]))
    strategy = ours / "strategy" / "ckpt_strategy_rank_0.ckpt"
    if "pipeline_stage" in LAYOUTS[layout]:
        strategy = tmp_path / "merged.ckpt"
        shutil.copytree(ours / "strategy", tmp_path / "parts")
        (tmp_path / "parts" / "merged_ckpt_strategy.ckpt").unlink()
        assert ask("merge", tmp_path / "parts", strategy) == {"ok": True}
        merged = ours / "strategy" / "merged_ckpt_strategy.ckpt"
        assert read_strategy(strategy) == read_strategy(merged)  # items in another order
    got = ask("transform", ours, tmp_path / "back", strategy, "-")
    assert got == {"rank_0": held(full)}
    got = ask("transform", tmp_path / "full", tmp_path / "slices", "-", strategy)
    expected = {path.parent.name: held(path) for path in ours.glob("rank_*/*.ckpt")}
    assert got == expected
    # What MindSpore has sliced comes back through us.
    given = ["--cfg.source_strategy", str(strategy)]
    resplit_ms(tmp_path / "slices", tmp_path / "again.ckpt", *given)
    assert (tmp_path / "again.ckpt").read_bytes() == full.read_bytes()
