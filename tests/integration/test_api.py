"""The functions for Python programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mmconvert
from mmconvert.playground.checkpoints import make_hf
from mmconvert.sharding.layout import Layout
from mmread import compare_hf

LAYOUT = {
    "llm_pp_layers": [[0, 1], [1, 1]],
    "vit_pp_layers": [[1, 1], [0, 0]],
    "tp_size": 2,
}
SMALL: dict[str, Any] = {"layers": 3, "vit_layers": 2}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf("qwen2vl-2b", tmp_path_factory.mktemp("api") / "hf", **SMALL)


def test_there_and_back_and_elsewhere(hf: Path, tmp_path: Path) -> None:
    result = mmconvert.hf_to_mm(hf, tmp_path / "mm", LAYOUT)
    assert isinstance(result.layout, Layout) and result.layout.vpp_size == 2
    assert mmconvert.verify(hf, tmp_path / "mm").differences == []
    found = mmconvert.inspect(str(tmp_path / "mm"))
    assert (found.kind, found.family, found.layout) == ("mm", "Qwen2-VL", result.layout)
    mmconvert.reshard(tmp_path / "mm", tmp_path / "mm1", {"tp_size": 1})
    mmconvert.mm_to_hf(tmp_path / "mm1", hf, tmp_path / "back")
    assert compare_hf(hf, tmp_path / "back") == []


@pytest.mark.parametrize("model", ["qwen2vl-2b", "qwen2.5omni-7b", "internvl2-76b"])
def test_load_rank_is_what_the_rank_file_holds(model: str, tmp_path: Path) -> None:
    audio: dict[str, Any] = {"audio_layers": 1} if "omni" in model else {}
    hf = make_hf(model, tmp_path / "hf", **SMALL, **audio)
    layout = LAYOUT | ({"audio_pp_layers": [[1, 0], [0, 0]]} if audio else {})
    mmconvert.hf_to_mm(hf, tmp_path / "mm", layout)
    seen = 0
    for tp in range(2):
        for pp in range(2):
            folder = tmp_path / f"mm/release/mp_rank_{tp:02d}_{pp:03d}"
            file = torch.load(folder / "model_optim_rng.pt", weights_only=True)
            for virtual in range(2):
                stored = file[f"model{virtual}"]
                loaded = mmconvert.load_rank(hf, layout, tp, pp, virtual)
                assert loaded.keys() == stored.keys()
                for name, tensor in loaded.items():
                    assert tensor.dtype == stored[name].dtype
                    assert torch.equal(tensor, stored[name]), name
                    seen += 1
    assert seen > 50


def test_load_rank_of_experts(tmp_path: Path) -> None:
    """Each expert-parallel rank has its own experts, transposed out of the stacks of the hub."""
    hf = make_hf("qwen3vl-30b-a3b", tmp_path / "hf", layers=2, vit_layers=1, deepstack=[0])
    layout = {"tp_size": 2, "ep_size": 4}
    mmconvert.hf_to_mm(hf, tmp_path / "mm", layout)
    for tp, ep in ((0, 0), (1, 2)):
        path = tmp_path / f"mm/release/mp_rank_{tp:02d}_{ep:03d}/model_optim_rng.pt"
        stored = torch.load(path, weights_only=True)["model"]
        loaded = mmconvert.load_rank(hf, layout, tp, 0, ep_rank=ep)
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())
    with pytest.raises(mmconvert.LayoutError, match="ep rank 4"):
        mmconvert.load_rank(hf, layout, 0, 0, ep_rank=4)


def test_what_does_not_exist_is_refused(hf: Path) -> None:
    with pytest.raises(mmconvert.LayoutError, match="tp rank 2"):
        mmconvert.load_rank(hf, LAYOUT, 2, 0)
    with pytest.raises(mmconvert.LayoutError, match="pp_sizes"):
        mmconvert.load_rank(hf, {"pp_sizes": 3}, 0, 0)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmconvert.nothing


def test_importing_the_package_loads_neither_numpy_nor_torch() -> None:
    code = "import sys, mmconvert; sys.exit(any(m in sys.modules for m in ('numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
