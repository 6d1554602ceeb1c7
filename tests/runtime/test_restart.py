"""A training that was stopped goes on to the bit, in the layouts and dtypes where it could not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import talking
import tinyfamilies
from cli import run_cli
from commands import mm_to_hf, rank_files
from mmconvert.errors import CheckpointError, DatasetError, OutputError
from mmconvert.runtime import commands, loop
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.beginning import Load
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.encoding import Encoder
from mmconvert.runtime.journal import Line
from mmconvert.runtime.samples import SampleSource
from mmconvert.runtime.trainplan import TrainingPlan
from nights import night, nightly

STEPS, HALF = 4, 2


class Case(NamedTuple):
    """A layout, and how it trains."""

    layout: tuple[str, str, int]
    tied: bool = False
    dtype: str = "fp32"
    frozen: tuple[str, ...] = ()


CASES = {
    "tp 2": Case(("[4]", "[3]", 2)),
    "tied over two stages, bf16": Case(("[1,3]", "[3,0]", 1), True, "bf16"),
    "tp 2 pp 2, tied, bf16": Case(("[1,3]", "[3,0]", 2), True, "bf16"),
    "vpp 2, tied, embedding frozen": Case(
        ("[[2],[2]]", "[[3],[0]]", 1), True, frozen=("text_decoder.embedding",)
    ),
    "a tied embedding frozen over two stages": Case(
        ("[1,3]", "[3,0]", 1), True, frozen=("text_decoder.output_layer",)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(CASES, but=("tied over two stages, bf16",)))
def test_a_restart_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    hf = talking.make("qwen2_vl", tmp_path / "hf", tied=case.tied)
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", *case.layout)
    data = [talking.write_data(tmp_path)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    what = talking.plan(whole, STEPS, save_every=HALF, frozen=case.frozen)
    all_of_it = talking.learn(mm, hf, data, what, dtype=case.dtype)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / f"iter_{STEPS:07d}")
    (cut / "latest_checkpointed_iteration.txt").write_text(str(HALF))
    what = talking.plan(cut, STEPS, save_every=HALF, frozen=case.frozen)
    rest = talking.learn(mm, hf, data, what, dtype=case.dtype, resume=True)
    assert rest == all_of_it[HALF:]
    assert len({line[1] for line in all_of_it}) == STEPS
    for rank, path in rank_files(whole).items():
        one = torch.load(path, weights_only=True)
        two = torch.load(rank_files(cut)[rank], weights_only=True)
        assert talking.same(one, two), rank
    if case.frozen:  # both copies stay, whichever was named
        first, last = _ends(whole)
        start, _ = _ends(mm)
        assert torch.equal(first, start)
        assert torch.equal(last, start)
    elif case.tied:
        first, last = _ends(whole)
        assert torch.equal(first, last)  # one gradient, one value


def _ends(mm: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Word embedding and output layer of tp rank 0; one tensor where there is one."""
    found: dict[str, torch.Tensor] = {}
    for rank, path in rank_files(mm).items():
        if rank.startswith("mp_rank_00"):
            content = torch.load(path, weights_only=False)
            for part in (v for k, v in content.items() if k.startswith("model")):
                found |= {n: t for n, t in part.items() if isinstance(t, torch.Tensor)}
    first = found["text_decoder.embedding.word_embeddings.weight"]
    return first, found.get("text_decoder.output_layer.weight", first)


@pytest.mark.slow
def test_what_is_saved_is_a_checkpoint_for_the_other_commands(tmp_path: Path) -> None:
    """inspect, verify, doctor, mm_to_hf and resplit take it; the values come back whole."""
    hf = talking.make("qwen2_vl", tmp_path / "hf", tied=True)
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[[1],[3]]", "[[3],[0]]", 2)
    save, back = tmp_path / "save", tmp_path / "back"
    data = [talking.write_data(tmp_path)]
    talking.learn(mm, hf, data, talking.plan(save, 2, save_every=1))
    assert [p.name for p in sorted(save.glob("iter_*"))] == ["iter_0000001", "iter_0000002"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    names = {"iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"}
    assert {p.name for p in save.iterdir()} == names | {"loss.jsonl", "loss.svg"}
    told = json.loads(run_cli("inspect", save, "--json", check=0).stdout)
    assert told["iteration"] == "2"
    assert told["layout"]["llm_pp_layers"] == [[1], [3]]
    assert told["layout"]["vit_pp_layers"] == [[3], [0]]
    run_cli("doctor", save, check=0)
    run_cli("verify", hf, save, check=1)  # it has learnt
    mm_to_hf(save, hf, back)
    run_cli("verify", back, save, check=0)
    report = talking.commands.validate(save, back, "", (), (), "fp32", 0.0, lambda event: None)
    assert report.passed, report.as_dict()


@pytest.mark.slow
def test_a_restart_with_other_frozen_parts_is_refused(tmp_path: Path) -> None:
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[4]", "[3]")
    data, save = [talking.write_data(tmp_path)], tmp_path / "save"
    talking.learn(mm, hf, data, talking.plan(save, 1))
    what = talking.plan(save, 2, frozen=("image_encoder",))
    with pytest.raises(CheckpointError, match="does not fit the parameters that learn") as caught:
        talking.learn(mm, hf, data, what, resume=True)
    assert "--no_load_optim" in (caught.value.fix or "")
    words = ("--mm_dir", mm, "--hf_dir", hf, "--data", data[0], "--save", save, "--resume")
    more = ("--freeze", "image_encoder", "--no_load_optim", "--train_iters", "2")
    done = run_cli("finetune", *words, *more, check=0)
    assert "the moments start at zero" in done.stderr
    assert "iteration      2/2" in done.stdout


# ------------------------------------------------------------------------- what a restart says
def said_by(mm: Path, hf: Path, data: Path, what: TrainingPlan, **more: Any) -> list[str]:
    heard: list[str] = []
    commands.finetune(
        None, hf, Data((SampleSource((data,)),)), what, "fp32", False,
        lambda event: heard.append(str(event)), load=Load(mm, **more),
    )  # fmt: skip
    return heard


@pytest.mark.slow
def test_load_goes_on_from_an_iteration_and_says_what_has_changed(tmp_path: Path) -> None:
    """Without optimizer state too: --freeze is written down in every checkpoint."""
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[4]", "[3]")
    data, save = talking.write_data(tmp_path), tmp_path / "save"
    what = replace(talking.plan(save, 4, save_every=1), save_optimizer=False)
    whole = talking.learn(mm, hf, [data], what)
    frozen = talking.plan(tmp_path / "other", 4, frozen=("image_encoder",))
    heard = said_by(save, hf, data, frozen, iteration=2)
    assert any("--freeze was [] and is ['image_encoder']" in line for line in heard)
    assert any("no optimizer state" in line for line in heard)
    assert "going on from iteration 2" in heard
    # moments and schedule anew: the warm-up's first rate is 0, and the weights are those saved
    again = talking.plan(tmp_path / "anew", 4)
    lines: list[Line] = []
    commands.finetune(
        None, hf, Data((SampleSource((data,)),)), again, "fp32", False,
        lambda event: lines.append(event) if isinstance(event, Line) else None,
        load=Load(save, 2), optimizer=False,
    )  # fmt: skip
    assert [(line.iteration, line.rate) for line in lines] == [(3, 0.0), (4, 1.5e-3)]
    assert lines[0].loss == pytest.approx(whole[2][1], rel=1e-6)
    # a folder with later iterations is not written into
    with pytest.raises(OutputError, match="holds iter_0000003, later than"):
        said_by(save, hf, data, talking.plan(save, 4), iteration=2)
    with pytest.raises(CheckpointError, match="has no iteration 9"):
        said_by(save, hf, data, talking.plan(tmp_path / "none", 4), iteration=9)


@pytest.mark.slow
def test_iteration_and_schedule_survive_a_resplit(tmp_path: Path) -> None:
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[4]", "[3]")
    data, save, other = talking.write_data(tmp_path), tmp_path / "save", tmp_path / "other"
    what = talking.plan(save, 4, save_every=2)
    whole = talking.learn(mm, hf, [data], what)
    layout = ("--cfg.target_parallel_config.llm_pp_layers", "[1,3]")
    layout += ("--cfg.target_parallel_config.vit_pp_layers", "[3,0]")
    layout += ("--cfg.target_parallel_config.tp_size", "1")
    where = ("--cfg.source_dir", save / "iter_0000002", "--cfg.target_dir", other)
    run_cli("Qwen2VLConverter", "resplit", *where, *layout, check=0)
    again = ("--cfg.source_dir", other, "--cfg.target_dir", tmp_path / "again")
    done = run_cli("Qwen2VLConverter", "resplit", *again, *layout, check=0)
    assert "a release, which starts at iteration 0" in done.stderr  # for Megatron
    assert "mm-convert finetune goes on from iteration 2" in done.stderr
    other = tmp_path / "again"  # a second time
    lines: list[Line] = []
    commands.finetune(
        None, hf, Data((SampleSource((data,)),)), talking.plan(tmp_path / "rest", 4), "fp32", False,
        lambda event: lines.append(event) if isinstance(event, Line) else None, load=Load(other),
    )  # fmt: skip
    assert [line.iteration for line in lines] == [3, 4]
    assert [line.rate for line in lines] == [line[2] for line in whole[2:]]
    assert lines[0].loss == pytest.approx(whole[2][1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "alone"), [(1, (1,)), night(1, (0,)), night(2, (1, 2))])
def test_a_sample_that_one_process_alone_cannot_read_is_left_out_by_all(
    tp: int, alone: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[1,3]", "[3,0]", tp)
    data, plain = talking.write_data(tmp_path), Encoder.get

    def learnt(name: str, ranks: set[int]) -> talking.Curve:
        def get(self: Encoder, index: int) -> Batch | DatasetError:
            if index == 1 and dist.get_rank() in ranks:
                return DatasetError("a file that is not there")
            return plain(self, index)

        monkeypatch.setattr(Encoder, "get", get)
        return talking.learn(mm, hf, [data], talking.plan(tmp_path / name, 2))

    every = learnt("every", {0, 1, 2, 3})
    assert len(every) == 2
    for rank in alone:
        assert learnt(f"rank {rank}", {rank}) == every
    assert learnt("none", set()) != every


@pytest.mark.slow
def test_without_an_interval_the_clock_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in the place of the one before; that at the end stands beside the last of them."""
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[1,3]", "[3,0]")
    data, save = talking.write_data(tmp_path), tmp_path / "save"
    seen: list[list[str]] = []

    def hear(event: object) -> None:
        seen.append(sorted(path.name for path in save.glob("iter_*")))

    assert loop.SAVE_EVERY == 1800
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)  # as if each step took half an hour
    what = talking.plan(save, 3, save_every=None)
    commands.finetune(mm, hf, Data((SampleSource((data,)),)), what, "fp32", False, hear)
    left = sorted(path.name for path in save.glob("iter_*"))
    assert left == ["iter_0000002", "iter_0000003"]
    assert any("iter_0000001" in names for names in seen)
