"""``--dry-run``: it says what a conversion would do, all of which then comes true."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from cli import run_cli
from commands import (
    Done,
    layout,
    litter,
    rank_files,
    refused,
    snapshot,
    target,
    untouched,
)
from filesystems import bind, file_system
from inprocess import BACK, HF, MM, SOURCE, TARGET, call
from mmconvert.playground.checkpoints import make_hf
from mmread import INDEX, MANIFEST, TRACKER, files_in, weight_files
from nights import in_turns, night

OMNI = "Qwen2_5_OmniConverter"
QWEN = "Qwen2VLConverter"
WRITTEN_LAST = {MANIFEST, TRACKER, INDEX}  # small files that the list leaves out


class Case(NamedTuple):
    """A conversion, its output still missing."""

    converter: str
    verb: str
    words: tuple[str | Path, ...]
    out_flag: str

    def run(self, out: Path, *flags: str, check: int | None = 0) -> Done:
        return call(
            *(self.converter, self.verb, *self.words, self.out_flag, out, *flags), check=check
        )

    def json(self, out: Path, *flags: str) -> dict[str, Any]:
        return json.loads(self.run(out, *flags, "--json").stdout)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 2}
    hf = make_hf("qwen2vl-2b", folder / "hf", **sizes)
    omni = make_hf("qwen2.5omni-7b", folder / "omni", shards=2, audio_layers=2, **sizes)
    mm, omni_mm = folder / "mm", folder / "omni_mm"
    pipe = layout("[1,1]", "[2,0]", 2)
    audio = layout("[1,1]", "[2,0]", 2, "audio_pp_layers=[2,0]")
    call(QWEN, "hf_to_mm", HF, hf, MM, mm, *pipe)
    call(OMNI, "hf_to_mm", HF, omni, MM, omni_mm, *audio)
    return {
        "hf_to_mm": Case(QWEN, "hf_to_mm", (HF, hf, *pipe), MM),
        "mm_to_hf": Case(QWEN, "mm_to_hf", (HF, hf, MM, mm), BACK),
        "resplit": Case(QWEN, "resplit", (SOURCE, mm, *target("[2]", "[2]")), TARGET),
        "omni hf_to_mm": Case(OMNI, "hf_to_mm", (HF, omni, *audio), MM),
        "omni mm_to_hf": Case(OMNI, "mm_to_hf", (HF, omni, MM, omni_mm), BACK),
    }


NAMES = ("hf_to_mm", "mm_to_hf", "resplit", "omni hf_to_mm", "omni mm_to_hf")
EVERY = pytest.mark.parametrize("name", NAMES)


# ---------------------------------------------------------------------- nothing is written
@EVERY
def test_nothing_is_written(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """Not beside the target either, nor among the inputs, nor by the probe."""
    inputs = [w for w in cases[name].words if isinstance(w, Path)]
    before = {path: snapshot(path) for path in inputs}
    for out in (tmp_path / "out", tmp_path / "new" / "deep" / "out"):
        found = cases[name].json(out, "--dry-run")
        assert found["written"] is False
        assert list(tmp_path.iterdir()) == []
    assert {path: snapshot(path) for path in inputs} == before


def test_an_interrupted_run_is_left_alone(cases: dict[str, Case], tmp_path: Path) -> None:
    staging = tmp_path / ".out.mmconvert-partial"
    staging.mkdir()
    (staging / "file").write_text("x")
    cases["hf_to_mm"].run(tmp_path / "out", "--dry-run")
    assert (staging / "file").read_text() == "x"


@EVERY
def test_the_probe_leaves_no_open_files(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("there is no /proc")
    cases[name].run(tmp_path / "out", "--dry-run")
    before = len(list(descriptors.iterdir()))
    cases[name].run(tmp_path / "out", "--dry-run")
    assert len(list(descriptors.iterdir())) == before


def test_the_probe_takes_no_room(cases: dict[str, Case], tmp_path: Path) -> None:
    """Watched from outside: no name ever appears, and the room is given back."""
    words = [*cases["mm_to_hf"].words, BACK, tmp_path / "out", "--dry-run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmconvert", QWEN, "mm_to_hf", *map(str, words)],
        stdout=subprocess.DEVNULL,
    )
    seen: set[str] = set()
    while process.poll() is None:
        seen |= set(os.listdir(tmp_path))
    assert process.returncode == 0
    assert seen == set()


# --------------------------------------------------------------------------- it comes true
@pytest.mark.parametrize(("flags", "name"), in_turns([(), ("--dtype", "fp32")], NAMES))
def test_the_files(
    name: str, flags: tuple[str, ...], cases: dict[str, Case], tmp_path: Path
) -> None:
    """Their names, sizes and numbers of tensors are those of the real run."""
    out = tmp_path / "out"
    would = cases[name].json(out, "--dry-run", *flags)
    did = cases[name].json(out, *flags)
    for key in ("files", "dropped", "carried", "fills", "bytes", "tensors", "copies", "layout"):
        assert would[key] == did[key], key
    assert "estimate" not in did and "targets" not in did
    listed = {file["path"]: file for file in would["files"]}
    assert files_in(out) - WRITTEN_LAST == set(listed)
    for path, file in listed.items():
        if path != "config.json" or not flags:  # a cast writes it anew
            assert (out / path).stat().st_size == file["bytes"], path
    held = dict.fromkeys(listed, 0)
    for rank in rank_files(out).values():
        content = torch.load(rank, weights_only=True)
        held[rank.relative_to(out).as_posix()] = len(content["model"])
    for path in weight_files(out):
        held[path] = len(load_file(out / path))
    assert {path: file["tensors"] for path, file in listed.items()} == held


@EVERY
def test_the_targets(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """Each tensor, where it goes, in which dtype and shape, and what it is made of."""
    out = tmp_path / "out"
    would = cases[name].json(out, "--dry-run", "--dtype", "fp16")
    cases[name].run(out, "--dtype", "fp16")
    kinds = {"F16": torch.float16}
    found: dict[tuple[str, str], tuple[torch.dtype, list[int]]] = {}
    for rank in rank_files(out).values():
        for key, tensor in torch.load(rank, weights_only=True)["model"].items():
            found[rank.relative_to(out).as_posix(), key] = (tensor.dtype, list(tensor.shape))
    for path in weight_files(out):
        for key, tensor in load_file(out / path).items():
            found[path, key] = (tensor.dtype, list(tensor.shape))
    told = {(t["file"], t["name"]): (kinds[t["dtype"]], t["shape"]) for t in would["targets"]}
    assert told == found
    assert all(t["from"] for t in would["targets"])


def test_what_a_target_is_made_of(cases: dict[str, Case], tmp_path: Path) -> None:
    would = cases["hf_to_mm"].json(tmp_path / "out", "--dry-run")
    name = "text_decoder.decoder.layers.0.self_attention.linear_qkv.weight"
    targets = [t for t in would["targets"] if t["name"] == name]
    assert len(targets) == 4  # two stages of two tp ranks
    for t in targets:
        layer = 1 if t["file"].split("/")[1].endswith("_001") else 0
        parts = [f"model.layers.{layer}.self_attn.{x}_proj.weight" for x in "qkv"]
        assert [place.split(": ")[1] for place in t["from"]] == parts


# -------------------------------------------------------------------------------- the words
def test_fills_casts_and_carried(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["omni hf_to_mm"]
    plain = case.run(tmp_path / "out", "--dry-run", "--dtype", "fp16").stdout
    would = case.json(tmp_path / "out", "--dry-run", "--dtype", "fp16")
    # The audio encoder's k has no bias: 40 zeros in each layer, whatever the tp size.
    biases = {n: f"audio_encoder.encoder.blocks.layers.{n}" for n in range(2)}
    expected = {f"{b}.self_attention.linear_qkv.bias": 40 for b in biases.values()}
    assert would["fills"] == expected
    assert would["cast"] == {"dtype": "F16", "overflowed": {}, "underflowed": {}}
    assert would["carried"] and all("talker" in n or "token2wav" in n for n in would["carried"])
    assert "filled with zeros: 80 elements of 2 tensors" in plain
    assert f"carried: {len(would['carried'])}: " in plain
    cast = [line for line in plain.splitlines() if line.startswith("cast: ")]
    assert cast and all(line.endswith("-> F16") for line in cast)
    count = sum(int(line.split()[1]) for line in cast)
    assert count == len(would["targets"])


def test_dropped(cases: dict[str, Case], tmp_path: Path) -> None:
    case, pattern = cases["hf_to_mm"], "visual.merger.extra*"
    assert case.json(tmp_path / "out", "--dry-run")["dropped"] == {}
    hf = make_hf(
        *("qwen2vl-2b", tmp_path / "hf"),
        extra=[("visual.merger.extra.weight", (4, 4))],
        layers=2,
        vit_layers=2,
    )
    case = case._replace(words=(HF, hf, *layout("[1,1]", "[2,0]", 2)))
    would = case.json(tmp_path / "out", "--dry-run", "--drop", pattern)
    assert list(would["dropped"].values()) == [["visual.merger.extra.weight"]]
    assert pattern in next(iter(would["dropped"]))
    plain = case.run(tmp_path / "out", "--dry-run", "--drop", pattern).stdout
    assert "dropped: 1 (" in plain and "visual.merger.extra.weight" in plain
    did = case.json(tmp_path / "out", "--drop", pattern)
    assert did["dropped"] == would["dropped"]


@EVERY
def test_the_words(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = cases[name].run(out, "--dry-run").stdout
    would = cases[name].json(out, "--dry-run")
    lines = text.splitlines()
    assert lines[0] == "files:"
    for file in would["files"]:
        assert any(line.split()[0] == file["path"] for line in lines), file
    for label in ("disk: ", "memory: at most about ", "time: "):
        assert sum(line.startswith(label) for line in lines) == 1, label
    assert f"would write {out}" in text
    assert "wrote" not in text


def test_many_files_are_cut_short(cases: dict[str, Case], tmp_path: Path) -> None:
    flags = ("--dry-run", "--max-shard-size", "10KB")
    text = cases["mm_to_hf"].run(tmp_path / "out", *flags).stdout
    would = cases["mm_to_hf"].json(tmp_path / "out", *flags)
    assert len(would["files"]) > 40
    assert f"and {len(would['files']) - 40} more, " in text
    assert len(text.splitlines()) < 60


# ------------------------------------------------------------------------------- estimates
@EVERY
def test_the_estimate(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    would = cases[name].json(tmp_path / "out", "--dry-run")
    guess = would["estimate"]
    assert guess["disk_needed_bytes"] == sum(file["bytes"] for file in would["files"])
    assert guess["disk_needed_bytes"] >= would["bytes"]
    free = shutil.disk_usage(tmp_path).free
    assert abs(guess["disk_free_bytes"] - free) < max(free // 4, 4 << 30)  # others write too
    assert 10 << 20 < guess["peak_memory_bytes"] < 8 << 30
    assert guess["seconds"] is None or 0 <= guess["seconds"] < 60


def test_memory_grows_with_threads(cases: dict[str, Case], tmp_path: Path) -> None:
    few, many = (
        cases["hf_to_mm"].json(tmp_path / "out", "--dry-run", "--workers", workers)["estimate"]
        for workers in ("1", "64")
    )
    assert many["peak_memory_bytes"] > few["peak_memory_bytes"] + (60 << 20)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with file_system(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_disk_that_is_too_small(cases: dict[str, Case], disk: Path) -> None:
    """A warning; what else there is to say is said, and the probe does no harm."""
    done = cases["omni hf_to_mm"].run(disk / "out", "--dry-run")
    assert "warning: " in done.stderr and "MB free" in done.stderr
    assert "files:" in done.stdout and "time: " in done.stdout
    assert list(disk.iterdir()) == []
    assert shutil.disk_usage(disk).used < 100_000
    refused(cases["omni hf_to_mm"].run(disk / "out", check=None), 2, "MB free", out=disk / "out")


def test_a_disk_without_files_that_have_no_name(
    cases: dict[str, Case], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No probe there; the rest is said all the same."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    found = cases["hf_to_mm"].json(out, "--dry-run")
    assert found["estimate"]["seconds"] is None
    text = cases["hf_to_mm"].run(out, "--dry-run").stdout
    assert "time: unknown" in text


# --------------------------------------------------------------------------- what is refused
def test_impossible_requests_are_refused_alike(cases: dict[str, Case], tmp_path: Path) -> None:
    case, out = cases["hf_to_mm"], tmp_path / "out"
    bad = case._replace(words=(*case.words[:2], *layout("[1,1]", "[2,0]", 5)))
    texts = [bad.run(out, *flags, check=2).stderr for flags in ((), ("--dry-run",))]
    assert texts[0] == texts[1] != ""
    out.mkdir()
    (out / "mine.txt").write_text("x")
    texts = [case.run(out, *flags, check=2).stderr for flags in ((), ("--dry-run",))]
    assert texts[0] == texts[1] and "--overwrite" in texts[0]
    assert litter(out) == []


def test_a_damaged_source_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(cases["hf_to_mm"].words[1], hf)
    path = sorted(hf.glob("*.safetensors"))[0]
    os.truncate(path, path.stat().st_size - 1)
    case = cases["hf_to_mm"]._replace(words=(HF, hf))
    refused(case.run(tmp_path / "o" / "out", "--dry-run", check=None), 3, path.name)
    untouched(tmp_path / "o" / "out")


def test_quiet(cases: dict[str, Case], tmp_path: Path) -> None:
    done = cases["hf_to_mm"].run(tmp_path / "out", "--dry-run", "--quiet")
    assert (done.stdout, done.stderr) == ("", "")


# -------------------------------------------------------------- the environment of others
@pytest.mark.parametrize("size", ["8", night("junk")])
def test_a_tool_in_an_environment_of_torchrun(
    size: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    """A launcher's variables, as a program started by torchrun has them, mean nothing to it."""
    env = {"WORLD_SIZE": size, "RANK": "3", "TORCHELASTIC_RUN_ID": "none"}
    folder = cases["hf_to_mm"].words[1]
    program = "import sys; from mmconvert.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", str(folder)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain = run_cli("inspect", folder, env={"WORLD_SIZE": size}, check=0)
    assert plain.stdout == done.stdout


@pytest.mark.parametrize("flags", [["--dry-run"], []], ids=str)
def test_where_nothing_can_be_written(flags: list[str], tied_hf: Path, tmp_path: Path) -> None:
    """The conversion could not write there, and the dry run says so."""
    words = (QWEN, "hf_to_mm", HF, tied_hf, *flags, MM)
    (tmp_path / "shown").mkdir()
    (tmp_path / "file").touch()
    done = call(*words, tmp_path / "file" / "mm", check=None)
    refused(done, 2, str(tmp_path / "file"), "Not a directory")
    with bind(tmp_path / "shown", tmp_path / "mount", "-o", "ro") as mount:
        done = call(*words, mount / "a" / "mm", check=None)
        refused(done, 2, str(mount), "Read-only file system")
