"""An interrupted conversion goes on where it stopped, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import QWEN2VL, Done, copied, layout, litter, refused, target, untouched
from filesystems import file_system
from journals import JOURNALS, a_folder
from mmconvert.executor.journal import PREFIX
from mmconvert.playground.checkpoints import make_hf
from mmconvert.words import amount
from nights import night, nightly
from stopping import noted, staging, stopped

ROWS = 128 << 10  # of the word embedding, 18 MiB: larger than what is put together in one job
LOST = 1e30  # past what float16 holds


class Work(NamedTuple):
    """A conversion without its output."""

    converter: str
    verb: str
    inputs: tuple[str | Path, ...]
    out_flag: str

    def words(self, out: Path | str, *flags: str) -> list[str | Path]:
        return [self.converter, self.verb, *self.inputs, self.out_flag, out, *flags]

    def run(self, out: Path, *flags: str, check: int | None = 0) -> Done:
        return run_cli(*self.words(out, *flags), check=check)


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """Each direction over one model of 19 MB, whose values a cast to fp16 partly loses."""
    folder = tmp_path_factory.mktemp("works")
    hf = make_hf("qwen2vl-2b", folder / "hf", layers=4, vit_layers=2, vocab_size=ROWS, shards=3)
    for path in hf.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(("norm.weight", "norm1.weight", "proj.weight")):
                tensor.view(-1)[0] = LOST
        save_file(tensors, path, metadata={"format": "pt"})
    to_mm = Work(
        *(QWEN2VL, "hf_to_mm"),
        ("--cfg.hf_config.hf_dir", hf, *layout("[2,2]", "[2,0]", 2)),
        "--cfg.mm_dir",
    )
    mm = folder / "mm"
    to_mm.run(mm)
    to_hf = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", mm)
    other = ("--cfg.source_dir", mm, *target("[1,1,1,1]", "[2,0,0,0]"))
    return {
        "hf_to_mm": to_mm,
        "mm_to_hf": Work(QWEN2VL, "mm_to_hf", to_hf, "--cfg.save_hf_dir"),
        "resplit": Work(QWEN2VL, "resplit", other, "--cfg.target_dir"),
    }


class Goal(NamedTuple):
    """What an undisturbed run writes and reports."""

    files: dict[str, bytes]
    report: dict[str, object]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds times."""
    found = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    assert "mmconvert.json" in found
    return {name: data for name, data in found.items() if name != "mmconvert.json"}


def report(done: Done) -> dict[str, object]:
    return json.loads(done.stdout)


Ask = Callable[[str, str], Goal]


@pytest.fixture(scope="module")
def undisturbed(works: dict[str, Work], tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """What a verb writes with a dtype; made when first asked for."""
    known: dict[tuple[str, str], Goal] = {}

    def ask(verb: str, dtype: str) -> Goal:
        if (verb, dtype) not in known:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            done = works[verb].run(out, "--dtype", dtype, "--json")
            known[verb, dtype] = Goal(files_of(out), report(done))
            shutil.rmtree(out)
        return known[verb, dtype]

    return ask


def check(out: Path, expected: Goal, done: Done | None = None) -> None:
    """`out` is what an undisturbed run writes, nothing stands beside it, the report is the same."""
    found = files_of(out)
    assert found.keys() == expected.files.keys()
    assert [name for name in found if found[name] != expected.files[name]] == []
    assert litter(out) == []
    if done is not None:
        got = report(done)
        for key in ("cast", "bytes", "tensors", "copies", "files"):
            assert got[key] == expected.report[key], key


# ------------------------------------------------------------------------- kills
POINTS = {
    # verb, dtype, place, jobs that are noted then
    "first job": ("hf_to_mm", "keep", "after", 1),
    "large tensors": ("hf_to_mm", "keep", "after", 10),
    "between job and note": ("hf_to_mm", "fp16", "before", 2),
    "large tensors, cast": ("hf_to_mm", "fp16", "before", 6),
    "to hf": ("mm_to_hf", "keep", "after", 2),
    "to hf, cast": ("mm_to_hf", "fp16", "before", 2),
    "resplit": ("resplit", "keep", "after", 2),
    "resplit, cast": ("resplit", "fp32", "after", 3),
}
POINTS_TODAY = ("first job", "large tensors, cast", "to hf", "resplit, cast")


@pytest.mark.parametrize("point", nightly(POINTS, but=POINTS_TODAY))
def test_a_killed_run_goes_on(
    point: str,
    works: dict[str, Work],
    undisturbed: Ask,
    out: Path,
) -> None:
    verb, dtype, place, count = POINTS[point]
    flags = ("--dtype", dtype)
    stopped(*works[verb].words(out, *flags, "--workers", "1"), place=place, count=count)
    assert not out.exists()
    assert noted(out) == count
    done = works[verb].run(out, *flags, "--json")
    expected = undisturbed(verb, dtype)
    check(out, expected, done)
    moved, whole = report(done)["resumed_bytes"], report(done)["bytes"]
    assert isinstance(moved, int) and isinstance(whole, int)
    assert 0 < moved < whole
    assert expected.report["resumed_bytes"] == 0
    share = f"({100 * moved / whole:.0f} %)"
    assert "note: an interrupted run of the same request left" in done.stderr
    assert f"{amount(moved)} {share}" in done.stderr


def test_the_speed_is_that_of_this_run(works: dict[str, Work], out: Path) -> None:
    """Three quarters were there already, so they were not moved in these hundredths of seconds."""
    work = works["hf_to_mm"]
    stopped(*work.words(out, "--workers", "1"), count=11)
    words = work.run(out).stdout.splitlines()[0].split()
    size, seconds = float(words[words.index("MB") - 1]), float(words[words.index("in") + 1])
    factor = {"kB/s": 1e-3, "MB/s": 1, "GB/s": 1e3}[words[-1]]
    assert float(words[-2]) * factor * seconds < size / 2, words


def test_the_report_counts_what_was_lost_before(
    works: dict[str, Work], undisturbed: Ask, out: Path
) -> None:
    """Not vacuous: this cast does lose values, in jobs before and after the kill."""
    expected = undisturbed("hf_to_mm", "fp16").report["cast"]
    assert isinstance(expected, dict)
    assert len(expected["overflowed"]) > 10
    work = works["hf_to_mm"]
    stopped(*work.words(out, "--dtype", "fp16", "--workers", "1"), count=3)
    journal = b"".join(p.read_bytes() for p in staging(out).glob(f"{PREFIX}.*"))
    assert journal.count(b"norm1.weight") or journal.count(b"layernorm.weight")
    plain = work.run(out, "--dtype", "fp16")
    total = sum(expected["overflowed"].values())
    assert f"{total} values overflowed" in plain.stderr
    assert json.loads((out / "mmconvert.json").read_text())["cast"] == expected


def test_killed_again_and_again(works: dict[str, Work], undisturbed: Ask, out: Path) -> None:
    """Each run keeps what the ones before have done; a line cut off costs its own job only."""
    work = works["hf_to_mm"]
    expected = undisturbed("hf_to_mm", "fp16")
    last = 0
    for round_ in range(3):
        stopped(*work.words(out, "--dtype", "fp16", "--workers", "1"))
        assert noted(out) == last + 1
        last = noted(out)
        journal = next(staging(out).glob(f"{PREFIX}.*"))
        with journal.open("ab") as file:
            file.write([b"0123456789ab", b'0123456789abcdef01234567 {"a": [1,', b""][round_])
    done = work.run(out, "--dtype", "fp16", "--json")
    check(out, expected, done)


def test_a_kill_from_outside(works: dict[str, Work], undisturbed: Ask, out: Path) -> None:
    """At whatever moment it comes."""
    work = works["hf_to_mm"]
    words = [sys.executable, "-m", "mmconvert", *map(str, work.words(out, "--workers", "1"))]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if list(out.parent.rglob(f"{PREFIX}.*")):
            process.kill()
        time.sleep(0.001)
    process.kill()
    process.wait()
    if not out.exists():  # it may have been faster
        work.run(out)
    check(out, undisturbed("hf_to_mm", "keep"))


# --------------------------------------------------------------------- interruptions
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interruption_keeps_what_is_done(
    number: signal.Signals, works: dict[str, Work], undisturbed: Ask, out: Path
) -> None:
    work = works["mm_to_hf"]
    deep = out / "new" / "parent"
    done = stopped(*work.words(deep, "--workers", "1"), number=number, count=2)
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr
    assert not deep.exists()
    assert noted(deep) == 2
    again = work.run(deep, "--json")
    assert report(again)["resumed_bytes"] != 0
    check(deep, undisturbed("mm_to_hf", "keep"), again)


def test_an_interruption_before_anything_is_done(works: dict[str, Work], out: Path) -> None:
    """Nothing to keep, so nothing stays, new parents included."""
    deep = out / "new" / "parent"
    words = works["hf_to_mm"].words(deep, "--workers", "1")
    stopped(*words, number=signal.SIGINT, place="before", count=0)
    untouched(out)


def test_a_failure_keeps_nothing(works: dict[str, Work], out: Path) -> None:
    """A resumed run that meets a limit on file sizes."""
    resource = pytest.importorskip("resource")
    work = works["hf_to_mm"]
    stopped(*work.words(out, "--workers", "1"), count=2)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    done = subprocess.run(
        [sys.executable, "-m", "mmconvert", *map(str, work.words(out))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard)),
    )
    assert "left" in done.stderr or done.stderr.startswith("error")
    assert done.returncode == 2, done.stderr
    untouched(out)


def test_overwriting_may_be_interrupted(
    works: dict[str, Work], undisturbed: Ask, out: Path
) -> None:
    """The old checkpoint stays until the new one is complete."""
    work = works["hf_to_mm"]
    old = copied(Path(str(works["resplit"].inputs[1])), out)
    before = files_of(old)
    stopped(*work.words(out, "--overwrite", "--workers", "1"), count=3)
    assert files_of(out) == before
    refused(work.run(out, check=None), 2, "--overwrite")  # and this does not throw away the rest
    assert noted(out) == 3
    done = work.run(out, "--overwrite", "--json")
    assert report(done)["resumed_bytes"] != 0
    check(out, undisturbed("hf_to_mm", "keep"), done)


# ------------------------------------------------------------------ the same request?
def resumed(done: Done) -> bool:
    return "interrupted run of the same request" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [["--workers", "3"], ["--digests"], ["--overwrite"], ["--quiet"]],
    ids=lambda flags: flags[0],
)
def test_what_does_not_matter(
    flags: list[str], works: dict[str, Work], undisturbed: Ask, out: Path
) -> None:
    work = works["hf_to_mm"]
    stopped(*work.words(out, "--workers", "1"), count=2)
    done = work.run(out, *flags, "--json")
    assert report(done)["resumed_bytes"] != 0
    check(out, undisturbed("hf_to_mm", "keep"))


@pytest.mark.parametrize("change", ["dtype", "layout", "verb"])
def test_another_request_starts_afresh(
    change: str, works: dict[str, Work], undisturbed: Ask, out: Path, tmp_path: Path
) -> None:
    work = works["hf_to_mm"]
    stopped(*work.words(out, "--workers", "1"), count=3)
    if change == "dtype":
        done = work.run(out, "--dtype", "fp16")
        check(out, undisturbed("hf_to_mm", "fp16"))
    elif change == "verb":
        done = works["mm_to_hf"].run(out)
        check(out, undisturbed("mm_to_hf", "keep"))
    else:
        other = ["--cfg.hf_config.hf_dir", work.inputs[1], *layout("[3,1]", "[2,0]", 2)]
        words = [QWEN2VL, "hf_to_mm", *other, "--cfg.mm_dir"]
        done = run_cli(*words, out, check=0)
        run_cli(*words, tmp_path / "fresh", check=0)
        assert files_of(out) == files_of(tmp_path / "fresh")
        assert litter(out) == []
    assert not resumed(done)


@pytest.fixture
def own(works: dict[str, Work], tmp_path: Path) -> Work:
    """hf_to_mm of a copy of the source, which the test may change."""
    work = works["hf_to_mm"]
    hf = copied(Path(work.inputs[1]), tmp_path / "hf")
    return work._replace(inputs=("--cfg.hf_config.hf_dir", hf, *work.inputs[2:]))


def rewrite(path: Path, *, same_time: bool) -> None:
    """Change one tensor in place."""
    status = path.stat()
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor += 1
    with path.open("r+b") as file:  # the file stays the same one
        copy = path.with_suffix(".new")
        save_file(tensors, copy, metadata={"format": "pt"})
        file.write(copy.read_bytes())
        copy.unlink()
    assert path.stat().st_size == status.st_size
    if same_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_mtime_ns == status.st_mtime_ns


@pytest.mark.parametrize("same_time", [False, True], ids=["new time", "old time"])
def test_a_changed_source_starts_afresh(
    same_time: bool, own: Work, out: Path, tmp_path: Path
) -> None:
    """Also one whose size and time say nothing, as after a copy that keeps times."""
    stopped(*own.words(out, "--workers", "1"), count=3)
    for path in Path(own.inputs[1]).glob("*.safetensors"):
        rewrite(path, same_time=same_time)
    done = own.run(out)
    assert not resumed(done)
    own.run(tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")
    assert litter(out) == []


def test_a_source_that_is_gone(own: Work, works: dict[str, Work], out: Path) -> None:
    """A clear error; the next conversion into this folder tidies up."""
    stopped(*own.words(out, "--workers", "1"), count=2)
    shutil.rmtree(own.inputs[1])
    refused(own.run(out, check=None), 3, str(own.inputs[1]))
    assert not out.exists()
    works["hf_to_mm"].run(out)
    assert litter(out) == []


def test_side_files_are_those_of_now(
    works: dict[str, Work], undisturbed: Ask, out: Path, tmp_path: Path
) -> None:
    """What was taken out of hf_dir, or changed in it, since the kill."""
    work = works["mm_to_hf"]
    hf = copied(Path(work.inputs[1]), tmp_path / "hf")
    work = work._replace(inputs=("--cfg.hf_config.hf_dir", hf, *work.inputs[2:]))
    (hf / "extra.txt").write_text("there at first")
    stopped(*work.words(out, "--workers", "1"), count=1)
    (hf / "extra.txt").unlink()
    (hf / "merges.txt").write_text("other\n")
    work.run(out)
    assert not (out / "extra.txt").exists()
    assert (out / "merges.txt").read_text() == "other\n"
    assert litter(out) == []


def test_odd_names(works: dict[str, Work], undisturbed: Ask, tmp_path: Path) -> None:
    """Spaces, a line break, other scripts, bytes that are no UTF-8; and relative paths."""
    place = tmp_path / "a b\nc" / "模型 é" / os.fsdecode(b"\xff\xfe")
    place.mkdir(parents=True)
    source = Path(works["hf_to_mm"].inputs[1])
    copied(source, place / "h f")
    words = [QWEN2VL, "hf_to_mm", "--cfg.hf_config.hf_dir", "h f", *works["hf_to_mm"].inputs[2:]]
    words = [*words, "--cfg.mm_dir", "out é", "--dtype", "fp16"]
    stopped(*words, "--workers", "1", count=3, cwd=place)
    done = run_cli(*words, "--json", cwd=place, check=0)
    assert report(done)["resumed_bytes"] != 0
    check(place / "out é", undisturbed("hf_to_mm", "fp16"), done)


# ------------------------------------------------------------- what is left is damaged
# Each of them is read in test_journal.py too, without a conversion.
JOURNALS_TODAY = ("another request", "another start of the machine", "too many losses", "a folder")


@pytest.mark.parametrize("damage", nightly(JOURNALS, but=JOURNALS_TODAY))
def test_a_damaged_journal_counts_for_nothing(
    damage: str, works: dict[str, Work], undisturbed: Ask, out: Path
) -> None:
    """So does one of another start of the machine: a crash may have lost what it tells of."""
    work = works["resplit"]
    stopped(*work.words(out, "--dtype", "fp32", "--workers", "1"), count=3)
    JOURNALS[damage](next(staging(out).glob(f"{PREFIX}.*")))
    done = work.run(out, "--dtype", "fp32", "--json")
    assert report(done)["resumed_bytes"] == 0
    check(out, undisturbed("resplit", "fp32"), done)


@pytest.mark.parametrize(
    "line",
    [night(b"abc\n"), b"0" * 24 + b"\n", night(b'0 {"a": [5, 5]}\n'), b"cut off"],
    ids=repr,
)
def test_lines_of_no_job_of_ours(
    line: bytes, works: dict[str, Work], undisturbed: Ask, out: Path
) -> None:
    """They do no harm, nor does a last line that was cut off."""
    work = works["resplit"]
    stopped(*work.words(out, "--dtype", "fp32", "--workers", "1"), count=3)
    with next(staging(out).glob(f"{PREFIX}.*")).open("ab") as file:
        file.write(line)
    done = work.run(out, "--dtype", "fp32", "--json")
    assert report(done)["resumed_bytes"] != 0
    check(out, undisturbed("resplit", "fp32"), done)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def grown(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4096)


def linked(path: Path) -> None:
    """As a stranger may do in a folder that is open to all."""
    elsewhere = path.parents[4] / "elsewhere.pt"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def folder_linked(path: Path) -> None:
    elsewhere = path.parents[4] / "elsewhere"
    path.parent.rename(elsewhere)
    path.parent.symlink_to(elsewhere, target_is_directory=True)


FILES = {
    "removed": Path.unlink,
    "cut off": cut,
    "grown": grown,
    "a folder": a_folder,
    "a link": linked,
    "in a linked folder": folder_linked,
}


@pytest.mark.parametrize("damage", FILES.values(), ids=FILES.keys())
def test_damaged_files_are_made_anew(
    damage: Callable[[Path], object], works: dict[str, Work], undisturbed: Ask, out: Path
) -> None:
    """A file that is gone, as after a clean-up by age, would be filled with zeros."""
    work = works["hf_to_mm"]
    stopped(*work.words(out, "--workers", "1"), count=4)
    for path in sorted(staging(out).rglob("*.pt")):
        damage(path)
        break
    outside = {p.name: p.read_bytes() for p in out.parent.rglob("elsewhere*") if p.is_file()}
    done = work.run(out, "--json")
    assert report(done)["resumed_bytes"] == 0
    check(out, undisturbed("hf_to_mm", "keep"), done)
    assert {p.name: p.read_bytes() for p in out.parent.rglob("elsewhere*") if p.is_file()} == (
        outside
    )


def test_the_staging_folder_is_a_link(works: dict[str, Work], out: Path) -> None:
    """What it points to is not ours to empty."""
    precious = out.parent / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    staging(out).symlink_to(precious, target_is_directory=True)
    refused(works["hf_to_mm"].run(out, check=None), 2, str(staging(out)), "link")
    assert [p.name for p in precious.iterdir()] == ["thesis.tex"]
    assert not out.exists()


# ---------------------------------------------------------------------- two at once, disks
def test_two_resume_at_once(works: dict[str, Work], undisturbed: Ask, out: Path) -> None:
    """One goes on, the other is refused; or it comes later and finds the output."""
    work = works["hf_to_mm"]
    stopped(*work.words(out, "--workers", "1"), count=2)
    words = [sys.executable, "-m", "mmconvert", *map(str, work.words(out))]
    runs = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    texts = [run.communicate(timeout=120) for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], texts
    assert not any("Traceback" in err for _, err in texts)
    check(out, undisturbed("hf_to_mm", "keep"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 150 MB."""
    with file_system(tmp_path / "disk", "150m") as folder:
        yield folder


def test_room_that_the_interrupted_run_took(
    works: dict[str, Work], undisturbed: Ask, disk: Path
) -> None:
    """On a disk with room for one checkpoint, not two: a new one and the 64 MB for all else."""
    work, out = works["hf_to_mm"], disk / "out"
    filler = disk / "filler"
    with filler.open("wb") as file:
        needed = 45_000_000 + (64 << 20)
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - needed)
    stopped(*work.words(out, "--workers", "1"), count=10)
    assert shutil.disk_usage(disk).free < needed - 10_000_000
    done = work.run(out, "--json")
    assert report(done)["resumed_bytes"] != 0
    filler.unlink()
    check(out, undisturbed("hf_to_mm", "keep"), done)


def test_a_source_that_is_written_to(own: Work, out: Path, tmp_path: Path) -> None:
    """During the conversion: some of it may be copied already, so nothing of it is kept."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from mmconvert import cli\n"
        "from mmconvert.executor.journal import Journal\n"
        "note = Journal.add\n"
        "def add(self, job, losses):\n"
        f"    os.utime({str(min(Path(own.inputs[1]).glob('*.safetensors')))!r})\n"
        "    note(self, job, losses)\n"
        "Journal.add = add\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, str(program), *map(str, own.words(out))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    refused(done, 3, "has changed while it was read", out=out)


def test_weights_are_real(works: dict[str, Work], undisturbed: Ask) -> None:
    """What the tests above compare is not empty: a lost job would leave zeros."""
    files = undisturbed("hf_to_mm", "keep").files
    for name, data in files.items():
        if name.endswith(".pt"):
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            zeros = (content.view(-1) == 0).float().mean()
            assert zeros < 0.02, name
