"""Runs that end badly: killed, interrupted, given what is wrong. All end, with one error."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import talking
import tinyfamilies
from cli import run_cli
from commands import RANK_FILE, copied, rank_files, refused
from forked import Forked
from inprocess import call
from mmconvert.cli import main
from mmconvert.errors import CheckpointError, LostProcessError, RequestError
from mmconvert.runtime import commands, needs, trouble
from mmconvert.runtime.launch import Emit, launch
from mmconvert.runtime.verdict import ValidationReport

pytestmark = pytest.mark.slow


class Work(NamedTuple):
    """A model, its MM form on two stages, that of two tp ranks on each, and data."""

    folder: Path
    hf: Path
    mm: Path
    four: Path
    data: Path

    def words(self, command: str, *more: str | Path) -> list[str]:
        return [command, "--mm_dir", str(self.mm), "--hf_dir", str(self.hf), *map(str, more)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("faults")
    hf = talking.make("qwen2_vl", folder / "hf")
    mm, four = (
        tinyfamilies.convert("qwen2_vl", hf, folder / name, "[1,3]", "[3,0]", tp)
        for name, tp in (("mm", 1), ("four", 2))
    )
    return Work(folder, hf, mm, four, talking.write_data(folder))


# ------------------------------------------------------------------------ a training under way
@contextmanager
def training(work: Work, save: Path) -> Iterator[Forked]:
    """A long training that has done its first steps and saved one."""
    words = work.words("finetune", "--data", work.data, "--save", save)
    words += ["--train_iters", "5000", "--save_interval", "3"]
    with closing(Forked(lambda: main(words))) as process:
        for line in process.stdout:
            if "4/5000" in line:
                break
        yield process


def workers(process: Forked) -> list[int]:
    """The two processes that compute."""
    found = [pid for pid in process.members() if pid != process.pid]
    assert len(found) == 2
    return found


def ends(process: Forked) -> tuple[int, str]:
    """Exit code and stderr; no process of the run is left soon after."""
    code, errors = process.ends()
    assert "Traceback" not in errors
    return code, errors


def whole_checkpoint(save: Path) -> None:
    """What the tracker file names is there, whole."""
    number = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert len(list((save / f"iter_{number:07d}").glob(f"*/{RANK_FILE}"))) == 2
    run_cli("inspect", save, check=0)


def test_an_interruption_leaves_whole_checkpoints_and_no_process(
    work: Work, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    with training(work, save) as process:
        workers(process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C: to all of them
        code, errors = ends(process)
    assert code == 130
    assert errors.count("interrupted") == 1
    assert "--resume" in errors
    whole_checkpoint(save)


def test_sigterm_saves_what_has_been_learnt_and_ends(work: Work, tmp_path: Path) -> None:
    save = tmp_path / "save"
    with training(work, save) as process:
        os.kill(process.pid, signal.SIGTERM)
        code, errors = ends(process)
    assert code == 130
    assert "stopped after iteration" in errors
    whole_checkpoint(save)
    number = (save / "latest_checkpointed_iteration.txt").read_text()
    assert f"that of iteration {number}" in errors
    last = (save / "loss.jsonl").read_text().splitlines()[-1]
    assert f'"iteration": {number},' in last


class Stops:
    """A job whose second process is stopped, as by a debugger; the first one waits for it."""

    def __call__(self, device: torch.device, emit: Emit) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


def test_a_stopped_process_is_told_of_and_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "SILENT", 1.0)
    monkeypatch.setattr(trouble, "BEAT", 0.2)
    heard: list[str] = []
    with pytest.raises(LostProcessError, match=r"process 1 of the run .* is stopped"):
        launch(Stops(), 2, lambda event: heard.append(str(event)))
    assert len(heard) == 1
    assert "kill -CONT" in heard[0]


class Hungry:
    """A job whose second process wants more memory than there is."""

    def __call__(self, device: torch.device, emit: Emit) -> None:
        if dist.get_rank() == 1:
            torch.empty(1 << 50)
        dist.barrier()


def test_too_little_memory_is_no_fault_of_ours() -> None:
    with pytest.raises(RequestError, match="process 1 of the run has run out of memory") as caught:
        launch(Hungry(), 2, lambda event: None)
    assert "--recompute_granularity full" in caught.value.fix


def test_a_killed_worker_ends_the_run_with_one_error(work: Work, tmp_path: Path) -> None:
    with training(work, tmp_path / "save") as process:
        os.kill(workers(process)[1], signal.SIGKILL)
        code, errors = ends(process)
    assert code == 2
    assert errors.count("error:") == 1
    assert "was killed" in errors
    whole_checkpoint(tmp_path / "save")


def test_workers_end_when_their_parent_is_killed(work: Work, tmp_path: Path) -> None:
    with training(work, tmp_path / "save") as process:
        workers(process)
        os.kill(process.pid, signal.SIGKILL)
        code, _ = ends(process)
    assert code == -signal.SIGKILL


# ------------------------------------------------------------------------------ wrong inputs
def validated(mm: Path, hf: Path) -> ValidationReport:
    return commands.validate(mm, hf, "", (), (), "fp32", 0.0, lambda event: None)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "omni", "intern-qwen2"])
def test_a_folder_of_another_family_is_refused(kind: str, work: Work, tmp_path: Path) -> None:
    """The numbers of layers are those of the checkpoint; names and shapes are not."""
    hf = tinyfamilies.make(kind, tmp_path / "hf")
    with pytest.raises(CheckpointError) as caught:
        validated(work.mm, hf)
    assert "hf_dir" in caught.value.fix


def test_another_model_of_the_family_is_different(work: Work, tmp_path: Path) -> None:
    hf = tinyfamilies.make("qwen2_vl", tmp_path / "hf", tied=True)
    report = validated(work.mm, hf)  # its output layer is the embedding
    assert not report.passed
    assert report.parting is not None
    assert report.parting.label == "text_decoder output_layer"


def test_a_truncated_rank_file_is_named(work: Work, tmp_path: Path) -> None:
    mm = copied(work.four, tmp_path / "mm")
    path = rank_files(mm)["mp_rank_01_001"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="mp_rank_01_001"):
        validated(mm, work.hf)


def test_a_missing_rank_folder_is_named(work: Work, tmp_path: Path) -> None:
    mm = copied(work.four, tmp_path / "mm")
    path = rank_files(mm)["mp_rank_01_001"]
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(CheckpointError, match=r"missing: mp_rank_01_001 \(tp 1 pp 1\)"):
        validated(mm, work.hf)


def test_an_interrupted_answer_says_nothing_of_conversions(work: Work) -> None:
    words = work.words("generate", "--prompt", "x", "--max_new_tokens", "100000")
    with closing(Forked(lambda: main(words))) as process:
        assert process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)
        code, errors = ends(process)
    assert code == 130
    assert errors.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("validate", "--tolerance", "2"), 2, "--tolerance is 2.0"),
        (("generate", "--prompt", "hi", "--image", "gone.png"), 2, "gone.png"),
        (("finetune", "--data", "gone.json", "--save", "new"), 3, "gone.json"),
        (("finetune", "--data", "data.json", "--save", "data.json"), 2, "data.json"),
        (("validate", "--device", "npu"), 2, "torch_npu is not installed"),
    ],
    ids=["tolerance", "picture", "data", "save is a file", "no NPU"],
)
def test_a_wrong_word_is_one_clear_error(
    more: tuple[str, ...], code: int, said: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work.folder)
    monkeypatch.setenv("MMCONVERT_DEVICE", "auto")  # and it is put back
    done = call(*work.words(*more), check=None)
    refused(done, code, said)
    assert done.stderr.count("error: ") == 1
    assert not (work.folder / "new").exists()


def waits(device: torch.device, emit: object) -> float:
    """The seconds that this process waits for the others, as torch has them."""
    group: Any = dist.group.WORLD
    return float(group._get_backend(device).options._timeout.total_seconds())


def test_processes_wait_as_long_as_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(needs.TIMEOUT, raising=False)
    assert launch(waits, 2, print) == 30 * 60
    monkeypatch.setenv(needs.TIMEOUT, "7")
    assert launch(waits, 2, print) == 7 * 60
