"""What is said to be done outlives a loss of power: synced, then named, then the old one goes."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import inprocess
from commands import QWEN2VL, copied, layout, refused, snapshot, target
from filesystems import disk
from mmconvert.durable import EarlySync
from mmread import compare_mm
from qwenvl import make_qwenvl
from syncing import Record, recorded

HF, MM, BACK = inprocess.HF, inprocess.MM, inprocess.BACK
SOURCE, TARGET = inprocess.SOURCE, inprocess.TARGET
QWENVL = "QwenVLConverter"
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks /proc of Linux")


@pytest.fixture(scope="module")
def qwenvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that MindSpore's converter takes."""
    return make_qwenvl(tmp_path_factory.mktemp("qwenvl") / "hf")


@pytest.fixture(scope="module")
def ms_file(qwenvl: Path) -> Path:
    """It as one MindSpore file."""
    out = qwenvl.with_name("one.ckpt")
    inprocess.call(QWENVL, "hf_to_ms", HF, qwenvl, "--cfg.ms_path", out)
    return out


def writing(
    form: str, out: Path, request: pytest.FixtureRequest
) -> tuple[Path, tuple[str | Path, ...]]:
    """The path that a conversion writes, and its command line."""
    get: Callable[[str], Path] = request.getfixturevalue
    if form in ("hf_to_mm", "hf_to_mm, several stages"):
        flags = layout("[2,2]", "[2,0]") if "stages" in form else ()
        return out, (QWEN2VL, "hf_to_mm", HF, get("tied_hf"), MM, out, *flags)
    if form == "mm_to_hf":
        return out, (QWEN2VL, form, HF, get("tied_hf"), MM, get("tied_mm22"), BACK, out)
    if form == "resplit":
        return out, (QWEN2VL, form, SOURCE, get("tied_mm22"), TARGET, out, *target("[4]", "[2]"))
    if form == "hf_to_ms, a file with a checksum":
        file = out.with_suffix(".ckpt")
        return file, (QWENVL, "hf_to_ms", HF, get("qwenvl"), "--cfg.ms_path", file, "--crc")
    if form == "ms_to_hf":
        words = ("--cfg.ms_path", get("ms_file"), HF, get("qwenvl"), BACK, out)
        return out, (QWENVL, "ms_to_hf", *words)
    prefix = "--cfg.target_parallel_config."
    words = (f"{prefix}model_parallel", "2", f"{prefix}pipeline_stage", "3")
    return out, (QWENVL, "resplit", SOURCE, get("ms_file"), TARGET, out, *words)


FORMS = (
    *("hf_to_mm", "hf_to_mm, several stages", "mm_to_hf", "resplit"),
    *("hf_to_ms, a file with a checksum", "ms_to_hf", "resplit of MindSpore"),
)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_sync_and_rename(
    form: str, out: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder is on the disk as it is before it gets its name; then its name is."""
    final, words = writing(form, out, request)
    with recorded(monkeypatch) as record:
        inprocess.call(*words)
    record.check(final)
    assert len([call for call in record.calls if call == ("rename", str(final))]) == 1


@pytest.mark.parametrize("form", FORMS)
def test_what_is_replaced_goes_last(
    form: str, out: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, words = writing(form, out, request)
    inprocess.call(*words)
    with recorded(monkeypatch) as record:
        inprocess.call(*words, "--overwrite")
    record.check(final, old=None if final.is_file() else out.with_name(".out.mmconvert-old"))


def test_new_folders_above_are_safe_too(
    tied_hf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = out / "a" / "b"
    with recorded(monkeypatch) as record:
        inprocess.to_mm("qwen2vl-2b", tied_hf, deep)
    record.check(deep)
    for folder in (out / "a", out, out.parent):
        assert ("sync", str(folder)) in record.calls


@pytest.mark.parametrize("form", FORMS)
def test_no_sync(
    form: str, out: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For benchmarks: not one call."""
    final, words = writing(form, out, request)
    with recorded(monkeypatch) as record:
        inprocess.call(*words, "--no-sync")
    assert final.exists()
    assert [call for call in record.calls if call[0] == "sync"] == []


def failing(monkeypatch: pytest.MonkeyPatch, when: Callable[[str], bool]) -> None:
    """From now on the disk loses what `when` is true of; it tells so when asked to sync it."""
    fsync = os.fsync

    def fail(fd: int) -> None:
        if when(os.readlink(f"/proc/self/fd/{fd}")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("what", ["model_optim_rng.pt", "mmconvert.json", "release"])
def test_a_disk_that_fails(
    what: str, tied_hf: Path, tied_mm22: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, and the old checkpoint is what it was."""
    copied(tied_mm22, out)
    before = snapshot(out)
    failing(monkeypatch, lambda path: path.endswith(what))
    done = inprocess.to_mm("qwen2vl-2b", tied_hf, out, "--overwrite", check=None)
    refused(done, 2, os.strerror(errno.EIO))
    assert snapshot(out) == before
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_disk_that_loses_the_name(
    tied_hf: Path, tied_mm: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what is true: the output is there."""
    failing(monkeypatch, lambda path: path == str(out.parent))
    done = inprocess.to_mm("qwen2vl-2b", tied_hf, out, check=None)
    refused(done, 2, "is complete, but its name may not outlive a loss of power")
    assert not compare_mm(tied_mm, out)


def test_a_failure_while_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk tells of a lost block once: the early sync must not swallow it."""
    told: list[str] = []

    def once(path: str) -> bool:
        told.append(path)
        return len(told) == 1

    failing(monkeypatch, once)
    (tmp_path / "file").write_text("x")
    early = EarlySync()
    early.__enter__()
    early.wrote([str(tmp_path / "file")])
    while not told:
        time.sleep(0.001)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        early.__exit__(None, None, None)


# ------------------------------------------------------------------------- a lost machine
def after_a_loss(image: Path, folder: Path, name: str) -> Path:
    """What the disk holds if the machine is lost now: its image, as it is, mounted elsewhere."""
    subprocess.run(["cp", "--sparse=always", str(image), str(folder / "lost.img")], check=True)
    with disk(folder / "lost.img", folder / "lost") as lost:
        return copied(lost / name, folder / "found")


def same_files(a: Path, b: Path) -> None:
    """Two folders hold the same files with the same bytes."""
    names = sorted(p.relative_to(a).as_posix() for p in a.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(b).as_posix() for p in b.rglob("*") if p.is_file())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def run(*words: str | Path) -> None:
    """A conversion in a process of its own."""
    subprocess.run([sys.executable, "-m", "mmconvert", *map(str, words)], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_a_lost_machine_keeps_what_was_done(
    old: bool, tied_hf: Path, tied_mm: Path, tied_mm22: Path, tmp_path: Path
) -> None:
    """The file system's image right after exit code 0 holds the whole checkpoint."""
    with disk(tmp_path / "disk.img", tmp_path / "disk") as here:
        if old:
            copied(tied_mm22, here / "mm")
            os.sync()
        run(QWEN2VL, "hf_to_mm", HF, tied_hf, MM, here / "mm", *(["--overwrite"] if old else []))
        found = after_a_loss(tmp_path / "disk.img", tmp_path, "mm")
        same_files(here / "mm", found)
    assert not compare_mm(tied_mm, found)


def test_the_record_sees_what_is_not_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was written to after its sync, and one that never was, are told."""
    (tmp_path / "new").mkdir()
    with recorded(monkeypatch) as record:
        for name in ("a", "b"):
            (tmp_path / "new" / name).write_text("x")
        fd = os.open(tmp_path / "new" / "a", os.O_WRONLY | os.O_APPEND)
        os.fsync(fd)
        os.write(fd, b"more")
        os.close(fd)
        os.rename(tmp_path / "new", tmp_path / "final")
    assert sorted(record.unsafe[str(tmp_path / "final")]) == [".", "a", "b"]
    with pytest.raises(AssertionError):
        record.check(tmp_path / "final")
    assert isinstance(record, Record)


# --------------------------------------------------------------------------- other outputs
def test_data_files_and_reports(
    tied_hf: Path, tied_mm22: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that tools write are on the disk before they get their name, too."""
    data = out.with_name("llava.json")
    turns = [{"from": "human", "value": "What is a cat?"}, {"from": "gpt", "value": "An animal."}]
    data.write_text(json.dumps([{"id": "1", "conversations": turns}]))
    made = out / "made.json"
    flags = ("--llava_json_path", data, "--output_json_path", made)
    lines: dict[Path, tuple[str | Path, ...]] = {
        made: ("data", "llava-to-mllm", *flags),
        out / "page.html": ("inspect", tied_mm22, "--html", out / "page.html"),
        out / "trip.xml": ("roundtrip", tied_hf, "--junit", out / "trip.xml"),
    }
    for path, words in lines.items():
        with recorded(monkeypatch) as record:
            inprocess.call(*words)
        record.check(path)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in lines)
