"""megatron-core loads and runs the text decoder of a converted Qwen3-VL with experts.

Its layers have local experts (SequentialMLP), one rank and two expert-parallel ones. The words
alone are read, so that the interleaved positions of Qwen3-VL are plain ones.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

import tinymoe
from inprocess import HF, MM, call
from megatron_experts import ExpertCase, run
from megatron_text import WORLD

SIZES = [(1, 1), (1, 2), (2, 1)]
NAMES = [f"tp{tp} ep{ep}" for tp, ep in SIZES]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, dict[str, list[Any]]]:
    """The logits of transformers; by case and rank what did not fit, and the logits."""
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed (it is in the extra dev)")
    folder: Path = tmp_path_factory.mktemp("megatron")
    model = tinymoe.qwen3vl_moe()
    hf = tinymoe.save(model, folder / "hf")
    ids = torch.randint(5, 120, (2, 18), generator=torch.Generator().manual_seed(3))
    torch.save(ids, folder / "ids.pt")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    cases: list[ExpertCase] = []
    for tp, ep in SIZES:
        case = ExpertCase(folder / f"mm{tp}{ep}", tp, ep)
        sizes = ("--cfg.parallel_config.tp_size", tp, "--cfg.parallel_config.ep_size", ep)
        call("AutoConverter", "hf_to_mm", HF, hf, MM, case.mm, *map(str, sizes))
        cases.append(case)
    import_module("megatron.core.models.gpt")  # once; the ranks are forked
    torch.set_num_threads(1)  # threads do not survive that
    text = model.config.text_config.to_dict()
    start_processes(run, (folder, text, cases), nprocs=WORLD, start_method="fork")
    return expected, {
        case.name: [
            torch.load(folder / f"{case.name}.{rank}.pt", weights_only=True)
            for rank in range(WORLD)
        ]
        for case in cases
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_megatron_loads_the_experts(
    outcomes: tuple[torch.Tensor, dict[str, list[Any]]], name: str
) -> None:
    for missing, unexpected, _ in outcomes[1][name]:
        assert unexpected == []
        assert [key for key in missing if not key.endswith("._extra_state")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_megatron_gives_the_same_logits(
    outcomes: tuple[torch.Tensor, dict[str, list[Any]]], name: str
) -> None:
    expected, found = outcomes
    assert expected.std() > 0.3
    for *_, logits in found[name]:
        largest = (logits - expected).abs().max().item()
        assert largest < TOLERANCE * (10 if name == "tp2 ep1" else 1), largest
