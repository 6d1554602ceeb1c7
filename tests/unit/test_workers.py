"""Jobs in forked processes: what they return and raise, and that none outlives its parent."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import QWEN2VL, layout
from mmconvert.errors import LostProcessError, TensorError
from mmconvert.executor import jobs, workers
from mmconvert.executor.fileio import Files
from mmconvert.executor.jobs import Job, JobQueue
from mmconvert.executor.workers import run_in_processes
from mmconvert.playground.checkpoints import make_hf

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")

# The command, whose processes fork however little there is to do, and are slow if told so.
COMMAND = """
import sys, time
from mmconvert.executor import jobs, workers
jobs.FORK_LEAST = 0
pause = float(sys.argv.pop(1))
done = workers._done
workers._done = lambda job, files: (time.sleep(pause), done(job, files))[1]
from mmconvert.cli import main
sys.exit(main())
"""


def run(bodies: list[Callable[[Files], Any]], count: int = 2) -> list[Any]:
    work = [Job((f"file{i % 2}",), ("", i), 1, body) for i, body in enumerate(bodies)]
    found: dict[int, Any] = {}
    run_in_processes(
        work, JobQueue(work), count, lambda job, result: found.update({job.place[1]: result})
    )
    return [found[i] for i in range(len(bodies))]


def test_every_result_comes_back_from_processes_of_their_own() -> None:
    def body(number: int) -> Callable[[Files], Any]:
        def run(_: Files) -> Any:
            time.sleep(0.01)  # so that no process can do all of them
            return number, os.getpid(), b"x" * 100_000 * number

        return run

    found = run([body(i) for i in range(9)], 3)
    assert [(number, len(data)) for number, _, data in found] == [
        (i, 100_000 * i) for i in range(9)
    ]
    pids = {pid for _, pid, _ in found}
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert not any(_lives(pid) for pid in pids)


def test_an_error_keeps_its_kind_and_its_words() -> None:
    def fail(_: Files) -> None:
        raise TensorError("what", "expected", "fix", cause="nan", path=Path("p"), tensors=["t"])

    with pytest.raises(TensorError) as found:
        run([fail, lambda _: None])
    error = found.value
    assert (error.lines(), error.cause, error.path, error.tensors) == (
        ["what", "expected: expected", "to fix: fix"],
        *("nan", Path("p"), ("t",)),
    )


def test_a_fault_of_ours_brings_its_traceback() -> None:
    def fail(_: Files) -> None:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(RuntimeError, match="ZeroDivisionError: by nothing") as found:
        run([fail])
    assert "in fail" in str(found.value.__cause__)


def test_a_process_that_is_killed_is_told() -> None:
    def die(_: Files) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LostProcessError, match="exit code -9"):
        run([lambda _: time.sleep(0.2), die])


@pytest.mark.parametrize("allowed", [0, 2])
def test_where_few_processes_are_allowed_those_do_it(
    allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, forks, before = os.fork, iter(range(allowed)), os.listdir("/proc/self/fd")

    def limited() -> int:
        if next(forks, None) is None:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    monkeypatch.setattr(jobs, "FORK_LEAST", 0)
    monkeypatch.setattr(workers, "can_fork", lambda: True)
    found: list[int] = []
    slow = [Job((), ("", i), 1, lambda _: time.sleep(0.01) or os.getpid()) for i in range(9)]
    jobs.run_jobs(slow, 4, lambda job, pid: found.append(pid))
    assert len(found) == 9
    assert (set(found) == {os.getpid()}) if not allowed else (os.getpid() not in found)
    assert len(set(found)) == max(1, allowed)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_no_process_is_forked_beside_threads_of_others() -> None:
    import threading

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert not workers.can_fork()
    finally:
        stop.set()
        thread.join()


def _lives(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return words.rpartition(")")[2].split()[0] != "Z"


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    return make_hf("qwen2vl-2b", folder / "hf", layers=4, vit_layers=2)


def _words(hf: Path, out: Path) -> list[str]:
    words = [QWEN2VL, "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", out]
    return [*map(str, words), *layout("[2,2]", "[2,0]", 2)]


def _content(mm: Path) -> dict[str, bytes]:
    return {str(path.relative_to(mm)): path.read_bytes() for path in sorted(mm.rglob("*.pt"))}


def _start(words: list[str], pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, str(pause), *words, "--workers", "3"]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def _ended(process: subprocess.Popen[str], code: int) -> None:
    said = process.communicate(timeout=120)
    assert process.returncode == code, said


def _forked(process: subprocess.Popen[str]) -> list[int]:
    """Its children, as soon as there are some."""
    until = time.monotonic() + 60
    while not (found := _children(process.pid)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    return found


def _gone(pids: list[int]) -> bool:
    until = time.monotonic() + 20
    while any(map(_lives, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_is_stopped_leaves_no_process_and_a_rerun_finishes(
    number: signal.Signals, hf: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    _ended(_start(_words(hf, whole)), 0)
    process = _start(_words(hf, out), pause=0.05)
    pids = _forked(process)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _ended(process, -9 if number is signal.SIGKILL else 130)
    assert _gone(pids)
    assert not out.exists()
    _ended(_start(_words(hf, out)), 0)
    assert _content(out) == _content(whole)


def test_differences_are_found_whichever_process_meets_them(hf: Path, tmp_path: Path) -> None:
    hf, out = Path(shutil.copytree(hf, tmp_path / "hf")), tmp_path / "out"
    _ended(_start(_words(hf, out)), 0)
    _ended(_start(["verify", str(hf), str(out)]), 0)
    weights = next(hf.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(data)
    _ended(_start(["verify", str(hf), str(out)]), 1)
