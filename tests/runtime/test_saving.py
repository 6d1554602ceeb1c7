"""Checkpoints of a training outlive a loss of power, and one that is replaced goes last."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import RANK_FILE
from filesystems import disk
from mmconvert.cli.tools import finetune
from mmconvert.runtime import iterations
from mmconvert.sharding.layout import Layout
from syncing import recorded

TRACKER = "latest_checkpointed_iteration.txt"
LAYOUT = Layout({"vit": 1, "llm": 1}, {"vit": ((1, 0),), "llm": ((1, 1),)}, decoder="llm")


def save(folder: Path, iteration: int, value: float) -> Path:
    """What the processes of a training do when they save; returns the iteration's folder."""
    iterations.begin(folder, iteration)
    for rank in LAYOUT.ranks():
        content: Mapping[str, Any] = {"model": {"weight": torch.full((1000,), value)}}
        iterations.write_rank(folder, iteration, LAYOUT, rank, content)
    iterations.finish(folder, iteration)
    return iterations.iteration_folder(folder, iteration)


def values(folder: Path) -> set[float]:
    """The values of all rank files."""
    files = sorted(folder.glob(f"*/{RANK_FILE}"))
    assert len(files) == 2
    return {torch.load(path)["model"]["weight"].unique().item() for path in files}


def test_the_order_of_sync_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is safe before it is named, and named before the tracker file names it."""
    with recorded(monkeypatch) as record:
        found = save(tmp_path, 3, 1.0)
    record.check(found)
    record.check(tmp_path / TRACKER)
    renames = [path for call, path in record.calls if call == "rename"]
    assert renames == [str(found), str(tmp_path / TRACKER)]
    assert values(found) == {1.0}


def test_an_iteration_that_is_written_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former one is removed when the tracker file is safe."""
    found = save(tmp_path, 3, 1.0)
    with recorded(monkeypatch) as record:
        save(tmp_path, 3, 2.0)
    former = tmp_path / ".iter_0000003.old"
    record.check(found, old=former)
    tracker = record.calls.index(("rename", str(tmp_path / TRACKER)))
    assert record.calls.index(("remove", str(former))) > tracker
    assert values(found) == {2.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == [found.name, TRACKER]


@pytest.mark.parametrize("there", [False, True])
def test_killed_between_two_renames(there: bool, tmp_path: Path) -> None:
    """The former one comes back, or goes, when that iteration is begun again."""
    found = save(tmp_path, 3, 1.0)
    former = tmp_path / ".iter_0000003.old"
    found.rename(former)
    if there:
        save(tmp_path, 3, 2.0)
    iterations.begin(tmp_path, 3)
    assert values(found) == {2.0 if there else 1.0}
    assert not former.exists()


@pytest.mark.slow
def test_a_lost_machine_keeps_the_checkpoint(tmp_path: Path) -> None:
    with disk(tmp_path / "disk.img", tmp_path / "disk") as here:
        os.sync()
        save(here, 3, 1.0)
        save(here, 6, 2.0)
        copy = ["cp", "--sparse=always", str(tmp_path / "disk.img"), str(tmp_path / "lost.img")]
        subprocess.run(copy, check=True)
    with disk(tmp_path / "lost.img", tmp_path / "lost") as lost:
        assert (lost / TRACKER).read_text() == "6"
        assert values(lost / "iter_0000003") == {1.0}
        assert values(lost / "iter_0000006") == {2.0}


@pytest.mark.parametrize("saved", [None, 7])
def test_what_an_interruption_says(
    saved: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of checkpoints only where there are some; the training itself is not needed for it."""
    if saved is not None:
        (tmp_path / TRACKER).write_text(str(saved))

    def stopped(*args: object, **more: object) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    monkeypatch.setattr("mmconvert.runtime.commands.finetune", stopped)
    (tmp_path / "data.json").write_text("[]")
    words = ["--mm_dir", "mm", "--hf_dir", "hf", "--data", str(tmp_path / "data.json")]
    assert finetune.run([*words, "--save", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    if saved is None:
        assert said == "interrupted: no checkpoint was saved yet\n"
    else:
        assert "is that of iteration 7; --resume goes on from it" in said
