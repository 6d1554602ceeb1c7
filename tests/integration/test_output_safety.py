"""Outputs are complete or not there: refusals, interruptions, full disks, two at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import mmconvert
from commands import (
    QWEN2VL,
    Done,
    copied,
    hf_to_mm,
    layout,
    litter,
    mm_to_hf,
    none,
    rank_files,
    refused,
    resplit,
    same_hf,
    snapshot,
    target,
    untouched,
)
from filesystems import file_system
from mmconvert import Options
from mmconvert.errors import OutputError
from mmconvert.events import Events
from mmconvert.executor.output import Output
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_mm, modes

Convert = Callable[..., Done]
WAIT = 120.0  # seconds until a test that waits for a process gives up


class Inputs:
    """The folders of a conversion, and the conversion."""

    def __init__(self, verb: str, hf: Path, mm: Path) -> None:
        self.verb, self.hf, self.mm = verb, hf, mm

    @property
    def folders(self) -> list[Path]:
        """What the conversion reads."""
        return {"hf_to_mm": [self.hf], "mm_to_hf": [self.hf, self.mm]}.get(self.verb, [self.mm])

    def run(self, out: Path, *flags: str, check: int | None = 0) -> Done:
        if self.verb == "hf_to_mm":
            return hf_to_mm(self.hf, out, *layout("[2,2]", "[2,0]"), *flags, check=check)
        if self.verb == "mm_to_hf":
            return mm_to_hf(self.mm, self.hf, out, *flags, check=check)
        return resplit(self.mm, out, *target("[2,2]", "[2,0]"), *flags, check=check)

    def check(self, out: Path) -> None:
        """`out` is what the conversion is to write, and nothing stands beside it."""
        if self.verb == "mm_to_hf":
            same_hf(self.hf, out)
            files = {path.name for path in out.rglob("*")}
            assert files == {path.name for path in self.hf.rglob("*")} | {"mmconvert.json"}
        else:
            assert list(rank_files(out)) == ["mp_rank_00_000", "mp_rank_00_001"]
            assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
            assert {p.name for p in out.iterdir()} == {
                *("release", "mmconvert.json", "latest_checkpointed_iteration.txt")
            }
        assert litter(out) == []


@pytest.fixture(params=["hf_to_mm", "mm_to_hf", "resplit"])
def inputs(request: pytest.FixtureRequest, tied_hf: Path, tied_mm22: Path) -> Inputs:
    """Each direction; its inputs are shared."""
    return Inputs(request.param, tied_hf, tied_mm22)


@pytest.fixture
def own_inputs(inputs: Inputs, tmp_path: Path) -> Inputs:
    """Each direction; its inputs are copies."""
    hf, mm = copied(inputs.hf, tmp_path / "in" / "hf"), copied(inputs.mm, tmp_path / "in" / "mm")
    return Inputs(inputs.verb, hf, mm)


# ---------------------------------------------------------------------- existing outputs
def test_an_existing_output_is_refused(inputs: Inputs, out: Path) -> None:
    copied(inputs.folders[0], out)
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    refused(inputs.run(out, check=None), 2, str(out), "--overwrite")
    assert snapshot(out) == before
    assert litter(out) == []


def test_overwrite_replaces_everything(inputs: Inputs, out: Path) -> None:
    copied(inputs.folders[0], out)
    (out / "release" / "mp_rank_03").mkdir(parents=True)
    (out / "release" / "old.txt").write_text("of the old checkpoint")
    (out / "release" / "mp_rank_03" / "model_optim_rng.pt").write_text("old")
    inputs.run(out, "--overwrite")
    inputs.check(out)


NO_CHECKPOINTS = {
    "photographs": ["summer/1.jpg", "winter/2.jpg"],
    "a program with a config.json": ["config.json", "main.py", "src/app.py"],
    "a program with a release folder": ["release/notes.txt", "setup.py"],
    "a folder of checkpoints": ["first/config.json", "first/model.safetensors", "notes.txt"],
    "a file with a telling name": ["my_mp_rank_notes.txt", "thesis.tex"],
}


@pytest.mark.parametrize("names", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS.keys())
def test_overwrite_removes_checkpoints_only(names: list[str], tied_hf: Path, out: Path) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    before = snapshot(out)
    refused(hf_to_mm(tied_hf, out, "--overwrite", check=None), 2, str(out))
    assert snapshot(out) == before
    assert litter(out) == []


def test_an_empty_folder_is_fine(inputs: Inputs, out: Path) -> None:
    out.mkdir()
    inputs.run(out)
    inputs.check(out)


def test_a_refusal_leaves_no_parents(inputs: Inputs, out: Path) -> None:
    """A request that cannot work makes no folders on its way."""
    bad = {
        "hf_to_mm": layout("[1]", "[2]"),
        "mm_to_hf": layout("[1]", "[2]"),
        "resplit": target("[1]", "[2]"),
    }[inputs.verb]
    done = inputs.run(out / "a" / "b", *bad, check=None)
    refused(done, done.returncode, "pp_layers")
    assert done.returncode != 0
    untouched(out)


# ---------------------------------------------------------------- outputs and their inputs
def test_the_output_is_an_input(own_inputs: Inputs) -> None:
    for folder in own_inputs.folders:
        before = snapshot(folder)
        refused(own_inputs.run(folder, "--overwrite", check=None), 2, str(folder))
        assert snapshot(folder) == before


def test_the_output_holds_an_input(own_inputs: Inputs, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    refused(own_inputs.run(tmp_path / "in", "--overwrite", check=None), 2, str(tmp_path / "in"))
    assert snapshot(tmp_path) == before


def test_the_output_lies_in_an_input(own_inputs: Inputs, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    for folder in own_inputs.folders:
        refused(own_inputs.run(folder / "new" / "out", check=None), 2, str(folder))
    assert snapshot(tmp_path) == before


def test_links_do_not_hide_an_input(own_inputs: Inputs, tmp_path: Path) -> None:
    for number, folder in enumerate(own_inputs.folders):
        link = tmp_path / f"link{number}"
        link.symlink_to(folder, target_is_directory=True)
        before = snapshot(folder)
        refused(own_inputs.run(link / "out" if number else link, "--overwrite", check=None), 2)
        assert snapshot(folder) == before
        assert link.is_symlink()


# ------------------------------------------------------------------------- odd targets
def test_the_target_is_a_file(inputs: Inputs, out: Path) -> None:
    out.write_text("mine")
    refused(inputs.run(out, "--overwrite", check=None), 2, str(out), "file")
    assert out.read_text() == "mine"
    assert litter(out) == []


@pytest.mark.parametrize("state", ["empty", "not there", "full"])
def test_the_target_is_a_link(state: str, tied_hf: Path, tied_mm22: Path, out: Path) -> None:
    """The folder that it points to is written; the link stays."""
    real = out.parent / "elsewhere" / "real"
    real.parent.mkdir()
    if state == "empty":
        real.mkdir()
    elif state == "full":
        copied(tied_mm22, real)
    out.symlink_to(real, target_is_directory=True)
    inputs = Inputs("hf_to_mm", tied_hf, tied_mm22)
    if state == "full":
        before = snapshot(real)
        refused(inputs.run(out, check=None), 2, "--overwrite")
        assert snapshot(real) == before
        inputs.run(out, "--overwrite")
    else:
        inputs.run(out)
    assert out.is_symlink()
    assert real.is_dir() and not real.is_symlink()
    inputs.check(real)
    inputs.check(out)


def test_parents_are_created(inputs: Inputs, out: Path) -> None:
    deep = out / "a" / "b" / "c"
    inputs.run(deep)
    inputs.check(deep)


@pytest.mark.parametrize("parent", ["a file", "a folder of the kernel"])
def test_a_parent_that_cannot_be_written(parent: str, inputs: Inputs, tmp_path: Path) -> None:
    """Both fail for root as well."""
    if parent == "a file":
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
    elif Path("/proc/self").is_dir():
        out = Path("/proc/mmconvert-test/out")
    else:
        pytest.skip("there is no /proc")
    refused(inputs.run(out, check=None), 2, str(out.parent))
    assert sorted(p.name for p in tmp_path.iterdir()) == (["file"] if parent == "a file" else [])


# ------------------------------------------------------------------------------- modes
@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_modes(mask: int, inputs: Inputs, out: Path) -> None:
    """Folders 0750 and files 0640, whatever the umask."""
    before = os.umask(mask)
    try:
        inputs.run(out)
    finally:
        os.umask(before)
    folders, files = modes(out)
    assert set(folders.values()) == {"750"}
    assert set(files.values()) == {"640"}


def test_modes_of_read_only_sources(tied_hf: Path, tied_mm22: Path, out: Path) -> None:
    hf = copied(tied_hf, out.parent / "hf")
    for path in hf.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    mm_to_hf(tied_mm22, hf, out)
    assert set(modes(out)[1].values()) == {"640"}
    assert set(modes(out)[0].values()) == {"750"}


# -------------------------------------------------------------------- stopping a run
MEGABYTE = 1 << 20


def big_hf(out: Path, megabytes: int) -> Path:
    """A checkpoint whose word embedding is a hole of this size; the last tensor of its file."""
    make_hf("qwen2vl-2b", out, shards=1, layers=2, vit_layers=2)
    name = "model.embed_tokens.weight"
    weights = out / "model.safetensors"
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata, embedding = header.pop("__metadata__"), header.pop(name)
    kept, end = b"", 0
    for entry in header.values():
        begin, stop = entry["data_offsets"]
        kept += data[begin:stop]
        entry["data_offsets"] = [end, end := end + stop - begin]
    width = embedding["shape"][1]
    rows = megabytes * MEGABYTE // (2 * width) // 8 * 8
    size = rows * width * 2
    header[name] = {"dtype": "BF16", "shape": [rows, width], "data_offsets": [end, end + size]}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    with weights.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + kept)
        file.truncate(8 + len(text) + end + size)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return out


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Large enough that a run can be caught in the middle; it takes no room on the disk."""
    folder = tmp_path_factory.mktemp("big")
    yield big_hf(folder / "hf", 768)
    shutil.rmtree(folder, ignore_errors=True)


def launched(hf: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    """A conversion in the background."""
    words = ["--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(out), *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "mmconvert", QWEN2VL, "hf_to_mm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def started(
    hf: Path, out: Path, *flags: str, keep: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A conversion in the background; killed at the end if it still runs, what it wrote removed."""
    process = launched(hf, out, *flags)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        if not keep:
            shutil.rmtree(out, ignore_errors=True)


def caught(process: subprocess.Popen[str], out: Path) -> None:
    """Stop the process once it has begun to write; it is then in the middle of its work."""
    end = time.monotonic() + WAIT
    while not any(p.stat().st_size for p in out.parent.rglob("model_optim_rng.pt") if p.exists()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing was written"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    assert process.poll() is None
    assert not out.exists() or not list(out.rglob("model_optim_rng.pt")), "it was too fast"


def ended(process: subprocess.Popen[str]) -> Done:
    """Let a stopped process go on, and wait for it."""
    os.kill(process.pid, signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=WAIT)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def kept(out: Path, said: str) -> list[str]:
    """What stands beside an output by the message of an interruption: a job may have been done."""
    return [f".{out.name}.mmconvert-partial"] if "goes on where it was stopped" in said else []


def stopped(done: Done, out: Path) -> None:
    """The message is true: the output is not there, and what is kept is what it speaks of."""
    refused(done, 130, f"interrupted: {out} is as it was before")
    assert not out.exists()
    assert litter(out) == kept(out, done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interruption(number: signal.Signals, big: Path, out: Path) -> None:
    with started(big, out, "--workers", "1") as process:
        caught(process, out)
        process.send_signal(number)
        stopped(ended(process), out)


def test_signals_while_the_first_is_told(big: Path, out: Path) -> None:
    """Impatient users, and process managers that signal twice: one message, no traceback."""
    for seed in range(3):
        pause = random.Random(seed)
        with started(big, out, "--workers", "1", "--json") as process:
            caught(process, out)
            process.send_signal(signal.SIGINT)
            os.kill(process.pid, signal.SIGCONT)
            for _ in range(200):
                if process.poll() is not None:
                    break
                process.send_signal(pause.choice([signal.SIGINT, signal.SIGTERM]))
                time.sleep(pause.random() * 0.004)
            _, said = process.communicate(timeout=WAIT)
            assert "Traceback" not in said and "interrupted" in said
            # a signal may come after the last word of the program, when Python itself is ending
            assert process.returncode in (130, -signal.SIGINT, -signal.SIGTERM)
        shutil.rmtree(out.with_name(f".{out.name}.mmconvert-partial"), ignore_errors=True)


def test_a_signal_ends_a_message_that_nobody_reads(tmp_path: Path) -> None:
    """Told into a pipe that is full; the second signal ends it after a second."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    words = [sys.executable, "-m", "mmconvert", "inspect", tmp_path / "none"]
    process = subprocess.Popen(words, stderr=write_end, stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
        assert process.returncode in (130, -signal.SIGINT)
    finally:
        process.kill()
        os.close(read_end)
        os.close(write_end)


def test_an_interruption_keeps_the_old_checkpoint(big: Path, tied_mm22: Path, out: Path) -> None:
    old = copied(tied_mm22, out.parent / "kept")
    old.rename(out)
    before = snapshot(out)
    with started(big, out, "--overwrite") as process:
        end = time.monotonic() + WAIT
        while not list(out.parent.glob(".out*/release/*/*.pt")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        done = ended(process)
        assert done.returncode == 130
        assert snapshot(out) == before
        assert litter(out) == kept(out, done.stderr)


def test_an_interruption_in_json(big: Path, out: Path) -> None:
    with started(big, out, "--json", "--workers", "1") as process:
        caught(process, out)
        process.send_signal(signal.SIGTERM)
        done = ended(process)
        assert done.returncode == 130
        told = json.loads(done.stdout)
        assert (told["error"], told["exit_code"]) == ("Interrupted", 130)
        assert told["what"] == f"interrupted: {out} is as it was before"
        assert not out.exists()
        assert litter(out) == kept(out, told["fix"])


def test_an_interruption_of_mm_to_hf(tmp_path: Path) -> None:
    """The other writer; signalled a little after it begins, whatever it does then."""
    hf, mm, out = tmp_path / "hf", tmp_path / "mm", tmp_path / "parent" / "out"
    out.parent.mkdir()
    hf_to_mm(big_hf(hf, 256), mm)
    words = ["--cfg.mm_dir", mm, "--cfg.hf_config.hf_dir", hf, "--cfg.save_hf_dir", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmconvert", QWEN2VL, "mm_to_hf", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + WAIT
        while not list(out.parent.glob(".out*/model.safetensors")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        stopped(ended(process), out)
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(mm)


@pytest.mark.slow
def test_kills_at_any_moment(tmp_path: Path, out: Path) -> None:
    """The target is always the old checkpoint or the new one; the next run completes."""
    hf = big_hf(tmp_path / "hf", 48)
    new, old = tmp_path / "new", tmp_path / "old"
    began = time.monotonic()
    hf_to_mm(hf, new)
    whole = time.monotonic() - began
    hf_to_mm(make_hf("qwen2vl-2b", tmp_path / "small", layers=1, vit_layers=1), old)
    copied(old, out)
    chance = random.Random(7)
    marks = {"old": False, "new": False}
    for _ in range(5):
        with started(hf, out, "--overwrite", keep=True) as process:
            time.sleep(whole * chance.uniform(0.3, 1.1))
            process.kill()
            process.communicate()
        places = [p for p in (out, out.parent / ".out.mmconvert-old") if p.is_dir()]
        assert places, "both checkpoints are gone"
        state = "new" if not compare_mm(new, places[0]) else "old"
        marks[state] = True
        none(compare_mm(new if state == "new" else old, places[0]))
    hf_to_mm(hf, out, "--overwrite")
    none(compare_mm(new, out))
    assert litter(out) == []


def test_the_rest_of_a_killed_run_is_removed(big: Path, tied_hf: Path, out: Path) -> None:
    with started(big, out) as process:
        caught(process, out)
        process.kill()
        process.communicate()
        assert litter(out) != []
        hf_to_mm(tied_hf, out)
        assert len(rank_files(out)) == 1
        assert litter(out) == []


# ---------------------------------------------------------------------- two at once
def test_a_second_run_is_refused(big: Path, tied_hf: Path, out: Path) -> None:
    """And the first one does not notice."""
    with started(big, out) as process:
        caught(process, out)
        refused(hf_to_mm(tied_hf, out, check=None), 2, "another conversion", str(out))
        refused(hf_to_mm(tied_hf, out, "--overwrite", check=None), 2, "another conversion")
        done = ended(process)
        assert done.returncode == 0, done.stderr
        assert len(rank_files(out)) == 1
        assert litter(out) == []


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_two_at_the_same_time(
    flags: Sequence[str], tied_hf: Path, tied_mm: Path, out: Path
) -> None:
    """Exactly one wins; with --overwrite they may also come one after the other."""
    for _ in range(2):
        with both_started(tied_hf, out, flags) as runs:
            for run in runs:
                run.wait(WAIT)
            codes = sorted(run.returncode for run in runs)
            texts = [run.communicate() for run in runs]
        assert codes in ([[0, 2], [0, 0]] if flags else [[0, 2]]), texts
        assert not any("Traceback" in text for _, text in texts), texts
        none(compare_mm(tied_mm, out))
        assert litter(out) == []
        if not flags:
            shutil.rmtree(out)


def test_what_is_replaced_may_be_replaced_by_another_meanwhile(
    tied_hf: Path, tied_mm: Path, out: Path
) -> None:
    """A file that changes while it is read is an error only if what is written depends on it."""

    class Other(Events):
        def start(self, what: str, nbytes: int) -> None:
            shutil.rmtree(out)
            copied(tied_mm, out)

    copied(tied_mm, out)
    mmconvert.hf_to_mm(tied_hf, out, options=Options(overwrite=True), events=Other())
    none(compare_mm(tied_mm, out))


@pytest.mark.parametrize("name", ["thesis.doc", "notes", ".git"])
def test_overwrite_leaves_what_no_conversion_writes(
    name: str, tied_hf: Path, tied_mm: Path, out: Path
) -> None:
    """An MM folder with something else in it is not replaced: that would be lost."""
    copied(tied_mm, out)
    (out / name).mkdir()
    before = snapshot(out)
    done = hf_to_mm(tied_hf, out, "--overwrite", check=None)
    refused(done, 2, name, "no conversion writes")
    assert snapshot(out) == before
    (out / name).rmdir()
    hf_to_mm(tied_hf, out, "--overwrite")
    none(compare_mm(tied_mm, out))


@contextmanager
def both_started(
    hf: Path, out: Path, flags: Sequence[str]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Two conversions, begun together."""
    runs = [launched(hf, out, *flags) for _ in range(2)]
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.communicate()  # closes its pipes too


# ------------------------------------------------------------------ disks and sources
@pytest.mark.parametrize("verb", ["hf_to_mm", "mm_to_hf"])
@pytest.mark.parametrize("kilobytes", [1, 100])
def test_a_limit_on_file_sizes(
    kilobytes: int, verb: str, tied_hf: Path, tied_mm22: Path, out: Path
) -> None:
    """As on a disk that takes no more: what is written first and what comes later fail alike."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = {
        "hf_to_mm": ["--cfg.mm_dir", out],
        "mm_to_hf": ["--cfg.save_hf_dir", out, "--cfg.mm_dir", tied_mm22],
    }[verb]
    words = [*words, "--cfg.hf_config.hf_dir", tied_hf]
    done = subprocess.run(
        [sys.executable, "-m", "mmconvert", QWEN2VL, verb, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, limits[1])),
    )
    refused(done, 2, "large", out=out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 GB."""
    with file_system(tmp_path / "disk", "1000m") as folder:
        yield folder


def test_a_disk_that_is_too_small(small_disk: Path, tmp_path: Path) -> None:
    """Known beforehand: not a byte is written."""
    done = hf_to_mm(big_hf(tmp_path / "hf", 1200), small_disk / "out", check=None)
    refused(done, 2, "GB free", out=small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up(small_disk: Path, big: Path) -> None:
    out = small_disk / "out"
    with started(big, out, "--workers", "1") as process:
        caught(process, out)
        filler = small_disk / "filler"
        process.send_signal(signal.SIGSTOP)  # so that what is free stays so until it is taken
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - MEGABYTE)
        process.send_signal(signal.SIGCONT)
        refused(ended(process), 2, "No space left", out=out)
        assert list(small_disk.iterdir()) == [filler]


def test_a_source_that_shrinks(tmp_path: Path, out: Path) -> None:
    """Cut off after the plan was made: an error, and nothing of it is left."""
    hf = big_hf(tmp_path / "hf", 768)
    with started(hf, out, "--workers", "1") as process:
        caught(process, out)
        os.truncate(hf / "model.safetensors", 200_000)
        refused(ended(process), 3, str(hf / "model.safetensors"), out=out)


# ---------------------------------------------------------------- between two renames
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError], ids=lambda k: k.__name__)
def test_stopped_while_replacing(kind: type[BaseException], tied_mm22: Path, out: Path) -> None:
    """The old checkpoint was moved aside, the new one not yet in its place: the old comes back."""

    def half_a_commit() -> None:
        with Output(out, [], overwrite=True) as output:
            (output.folder / "new").write_text("complete")
            out.rename(out.with_name(".out.mmconvert-old"))
            raise kind

    copied(tied_mm22, out)
    before = snapshot(out)
    with pytest.raises((kind, OutputError)):
        half_a_commit()
    assert snapshot(out) == before
    assert litter(out) == []
