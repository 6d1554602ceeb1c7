"""``--ranks I/N``: several processes share one run, whoever has started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cli import run_cli
from commands import QWEN2VL, copied, layout, litter
from mmconvert.errors import RequestError
from mmconvert.executor import group
from mmconvert.executor.ranks import ALONE, Ranks, of_environment, of_flag
from mmconvert.playground.checkpoints import make_hf
from nights import night
from stopping import command, noted

HF, MM = "--cfg.hf_config.hf_dir", "--cfg.mm_dir"
PIPE = layout("[2,2]", "[2,0]", 2)
Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "hf"
    return make_hf("qwen2vl-2b", folder, layers=4, vit_layers=2, shards=3, vocab_size=64 << 10)


@pytest.fixture(scope="module")
def alone(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "mm"
    run_cli(*words(hf, out), check=0)
    return out


def words(hf: Path, out: Path, *more: str) -> list[str]:
    given = [QWEN2VL, "hf_to_mm", HF, hf, MM, out, *PIPE, "--workers", "1", "--json", *more]
    return list(map(str, given))


def start(program: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
    """A process; what it prints is in its streams."""
    return subprocess.Popen(
        [sys.executable, *program],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes: Sequence[Process]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    found = [process.communicate(timeout=120) for process in processes]
    return [(p.returncode, *streams) for p, streams in zip(processes, found, strict=True)]


def shared(hf: Path, out: Path, size: int) -> list[Process]:
    """Processes that share a conversion."""
    return [
        start(["-m", "mmconvert", *words(hf, out, "--ranks", f"{rank}/{size}")])
        for rank in range(size)
    ]


def same(out: Path, alone: Path) -> None:
    """Byte for byte what one process writes, and nothing beside it."""
    expected, found = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.pt")} for f in (alone, out)
    )
    assert expected == found
    assert litter(out) == []


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_as_one_process(size: int, hf: Path, alone: Path, out: Path) -> None:
    """The output; the first one speaks, and they leave nothing behind."""
    done = ended(shared(hf, out, size))
    assert [code for code, _, _ in done] == [0] * size, done
    assert json.loads(done[0][1])["written"] is True
    assert [said for _, said, _ in done[1:]] == [""] * (size - 1)
    same(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [night(0), 1])
def test_one_that_is_killed(killed: int, hf: Path, alone: Path, out: Path) -> None:
    """The other says so; both, started again, go on where they stopped."""
    processes: list[Process] = []
    for rank in range(2):
        line = words(hf, out, "--ranks", f"{rank}/2")
        stop = command(signal.SIGKILL, "after", 1, *line)
        processes.append(start(stop, {"RANK": str(rank), "STOP_RANK": str(killed)}))
    done = ended(processes)
    assert done[killed][0] == -signal.SIGKILL
    code, _, said = done[1 - killed]
    assert code == 2
    assert f"process {killed} of this run is lost" in said and "same command goes on" in said
    assert not out.exists()
    assert noted(out) >= 1
    done = ended(shared(hf, out, 2))
    assert [code for code, _, _ in done] == [0, 0], done
    assert json.loads(done[0][1])["resumed_bytes"] > 0
    same(out, alone)


@pytest.mark.slow
def test_all_killed_while_they_wait(hf: Path, alone: Path, out: Path) -> None:
    """Cards that nobody took away mislead nobody."""
    first = start(["-m", "mmconvert", *words(hf, out, "--ranks", "1/3")])
    folder = out.with_name(f".{out.name}.mmconvert-ranks")
    end = time.monotonic() + 60
    while not (folder / "1").is_file() and time.monotonic() < end:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    assert (folder / "1").is_file()
    done = ended(shared(hf, out, 2))
    assert [code for code, _, _ in done] == [0, 0], done
    same(out, alone)


def test_one_that_does_not_come(hf: Path, out: Path) -> None:
    line = words(hf, out, "--ranks", "0/3", "--ranks-timeout", "1")
    done = run_cli(*line, check=2)
    for word in ("processes 1, 2 of 3 did not come within 1 s", "--ranks-timeout SECONDS"):
        assert word in done.stderr, done.stderr
    assert not out.exists()
    assert litter(out) == []


@pytest.mark.slow
def test_processes_that_want_different_things(hf: Path, out: Path) -> None:
    lines = [words(hf, out, "--ranks", "0/2"), words(hf, out, "--ranks", "1/2", "--dtype", "bf16")]
    done = ended([start(["-m", "mmconvert", *line]) for line in lines])
    for code, _, said in done:
        assert code == 2
        assert "the processes of this run disagree: --dtype" in said
    other = copied(hf, out.with_name("other"))  # as another fine-tuning of one model
    lines = [words(folder, out, "--ranks", f"{r}/2") for r, folder in ((0, hf), (1, other))]
    for code, _, said in ended([start(["-m", "mmconvert", *line]) for line in lines]):
        assert code == 2
        assert "the processes of this run disagree" in said
        assert "hf_config.hf_dir" in said and str(other) in said
    lines = [
        words(hf, out, "--ranks", f"{r}/{n}", "--ranks-timeout", "3") for r, n in ((0, 2), (1, 3))
    ]
    done = ended([start(["-m", "mmconvert", *line]) for line in lines])
    assert {code for code, _, _ in done} == {2}
    assert "expects" in done[0][2] + done[1][2]
    assert not out.exists()
    assert litter(out) == []


@pytest.mark.slow
def test_one_that_fails(hf: Path, out: Path) -> None:
    """It cannot write: nothing is left, and the first one says which it was."""
    processes: list[Process] = []
    for rank in range(2):
        stop = command(0, "after", 1, *words(hf, out, "--ranks", f"{rank}/2"))
        processes.append(start(stop, {"RANK": str(rank), "STOP_RANK": "1"}))
    done = ended(processes)
    assert [code for code, _, _ in done] == [2, 2], done
    assert "process 1: " in done[0][2] and "too large" in done[0][2]
    assert not out.exists()
    assert litter(out) == []


# --------------------------------------------------------------------- launchers' variables
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
STEP = {**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ALONE),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, Ranks(2, 3, certain=False)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, Ranks(0, 2, certain=False)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, ALONE),
        ({"PMI_RANK": "2", "PMI_SIZE": "2"}, ALONE),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, ALONE),
        (STEP, Ranks(1, 4, certain=False)),
        (SLURM, ALONE),  # the script of a job: no step of several tasks
        ({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # salloc's shell
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Ranks(1, 2, certain=False)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ALONE),  # of whatever program sets them
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2)),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1"}, ALONE),
    ],
)
def test_variables(variables: dict[str, str], expected: Ranks) -> None:
    assert of_environment(variables, launched=True) == expected
    called = ALONE if "TORCHELASTIC_RUN_ID" in variables else expected
    assert of_environment(variables, launched=False) == called


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "1/2/3", "1 /2"])
def test_flags_that_make_no_sense(text: str) -> None:
    with pytest.raises(RequestError, match="--ranks"):
        of_flag(text)
    assert of_flag("1/2") == (1, 2, True)


@pytest.mark.slow
def test_tasks_of_slurm(hf: Path, alone: Path, out: Path) -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    program = ["-c", "import sys; from mmconvert.cli import main; sys.exit(main())"]
    done = ended(
        [start([*program, *words(hf, out)], {**step, "SLURM_PROCID": rank}) for rank in "01"]
    )
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[1][1] == ""
    same(out, alone)


def test_one_task_in_an_allocation(hf: Path, alone: Path, out: Path) -> None:
    """It waits for nobody; nor does a tool, wherever it runs."""
    begun = time.monotonic()
    run_cli(*words(hf, out), env=SLURM, check=0)
    run_cli("verify", hf, out, env=STEP, check=0)
    assert time.monotonic() - begun < 60  # no GRACE, let alone --ranks-timeout
    same(out, alone)


@pytest.mark.slow
def test_a_task_whose_others_do_something_else(
    hf: Path, alone: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on alone after a moment, and says so."""
    monkeypatch.setattr("mmconvert.executor.rendezvous.GRACE", 0.5)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    done = run_cli(*words(hf, out), check=0)
    assert "none of the other processes has come, of 4: this one goes on alone" in done.stderr
    group.join(out, "", 1, pytest.fail)  # what is called later in this process waits for nobody
    same(out, alone)
