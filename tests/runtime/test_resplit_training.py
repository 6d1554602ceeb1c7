"""A training goes on in another layout as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import talking
import tinyfamilies
from commands import rank_files, resplit, target
from mmconvert.runtime import commands
from mmconvert.runtime.beginning import Load
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.journal import Line
from mmconvert.runtime.samples import SampleSource
from nights import nightly

STEPS, HALF = 4, 2


class Case(NamedTuple):
    """From which layout to which, and how it trains."""

    first: tuple[str, str, int]
    second: tuple[str, str, int]
    tied: bool = False
    dtype: str = "fp32"
    frozen: tuple[str, ...] = ()


CASES = {
    "fp32, tp 1 to tp 2": Case(("[4]", "[3]", 1), ("[4]", "[3]", 2)),
    "fp32, tp 1 to tp 2 pp 2": Case(("[4]", "[3]", 1), ("[1,3]", "[3,0]", 2)),
    "bf16, pp 2 to virtual stages, tied": Case(
        ("[1,3]", "[3,0]", 1), ("[[1,1],[1,1]]", "[[3,0],[0,0]]", 1), True, "bf16"
    ),
    "fp32, a frozen stage": Case(
        ("[0,4]", "[3,0]", 1), ("[4]", "[3]", 1), frozen=("image_encoder",)
    ),
}
TODAY = ("fp32, tp 1 to tp 2", "bf16, pp 2 to virtual stages, tied")


def learn(hf: Path, folder: Path, data: Path, what: Any, dtype: str) -> tuple[talking.Curve, list]:
    """Goes on from a checkpoint; iteration, loss, learning rate and norm; and what else it says."""
    found: talking.Curve = []
    said: list[str] = []

    def hear(event: object) -> None:
        if isinstance(event, Line) and event.loss is not None:
            found.append((event.iteration, event.loss, event.rate, event.norm))
        elif isinstance(event, str):
            said.append(event)

    source = Data((SampleSource((data,)),))
    commands.finetune(None, hf, source, what, dtype, False, hear, load=Load(folder))
    return found, said


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(CASES, but=TODAY))
def test_training_goes_on_in_another_layout(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    hf = talking.make("qwen2_vl", tmp_path / "hf", tied=case.tied)
    start = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", *case.first)
    data = talking.write_data(tmp_path)
    whole = tmp_path / "whole"
    what = talking.plan(whole, STEPS, save_every=HALF, frozen=case.frozen)
    alone = talking.learn(start, hf, [data], what, dtype=case.dtype)
    shutil.rmtree(whole / f"iter_{STEPS:07d}")
    (whole / "latest_checkpointed_iteration.txt").write_text(str(HALF))
    other = tmp_path / "other"
    known = ["--cfg.hf_config.hf_dir", str(hf)]
    resplit(whole, other, *target(*case.second), "--optimizer", *known)
    assert (other / "latest_checkpointed_iteration.txt").read_text() == str(HALF)
    what = talking.plan(tmp_path / "rest", STEPS, frozen=case.frozen)
    rest, said = learn(hf, other, data, what, case.dtype)
    assert [line for line in said if line.startswith("warning")] == []
    tolerance = 1e-6 if case.dtype == "fp32" else 2e-3  # a bf16 reduction has another order
    losses = [line[1] for line in alone[HALF:]]
    assert [line[1] for line in rest] == pytest.approx(losses, rel=tolerance)
    assert [line[2] for line in rest] == [line[2] for line in alone[HALF:]]
    back = tmp_path / "back"
    resplit(other, back, *target(*case.first), "--optimizer", *known)
    for rank, path in rank_files(whole).items():
        one, two = (torch.load(p, weights_only=True) for p in (path, rank_files(back)[rank]))
        assert talking.same(one, two), rank
