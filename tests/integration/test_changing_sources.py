"""Sources that change while they are converted: noticed, whatever was changed and how."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import QWEN2VL, copied, rank_files, untouched
from mmconvert import converters
from mmconvert.config import HFConfig, HFToMM, MMToHF, Options, ParallelConfig, Resplit
from mmconvert.config.mindspore import DeviceConfig, HFToMS, MSResplit
from mmconvert.directions import mindspore
from mmconvert.directions.mm import hf_to_mm, mm_to_hf, resplit
from mmconvert.errors import CheckpointError, ReplicaError
from mmconvert.events import Events
from mmconvert.tools.comparison.diff import diff
from mmconvert.tools.comparison.verification import verify
from nights import in_turns
from qwenvl import make_qwenvl


class At(Events):
    """Does something when a phase of a conversion begins."""

    def __init__(self, phase: str, work: Callable[[], object]) -> None:
        self.phase, self.work, self.done = phase, work, False

    def start(self, what: str, nbytes: int) -> None:
        if what == self.phase and not self.done:
            self.done = True
            self.work()


def replaced(path: Path) -> None:
    """By rename: another file of the same size, the same time and other bytes."""
    before = path.stat()
    new = path.with_name("new")
    new.write_bytes(bytes(len(path.read_bytes())))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(path)


def written(path: Path) -> None:
    """In place, its time set back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"....")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def same_bytes(path: Path) -> None:
    """Another file with the same bytes: whoever replaces files may have replaced others too."""
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    new.rename(path)


def removed(path: Path) -> None:
    path.unlink()


CHANGES = [replaced, written, same_bytes, removed]


def refused(path: Path, out: Path, events: At, conversion: Callable[[], object]) -> None:
    """The conversion names the file and leaves nothing."""
    with pytest.raises(CheckpointError) as caught:
        conversion()
    assert events.done, "the file was never changed"
    if not isinstance(caught.value, ReplicaError):  # replaced before replicas were compared
        assert str(path) in str(caught.value)
    untouched(out)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "weights"])
def test_hf_to_mm(
    name: str, change: Callable[[Path], None], tied_hf: Path, tmp_path: Path, out: Path
) -> None:
    hf = copied(tied_hf, tmp_path / "hf")
    path = sorted(hf.glob("*.safetensors"))[1] if name == "weights" else hf / name
    events = At("converting", lambda: change(path))
    cfg = HFToMM(out, HFConfig(hf))
    refused(path, out, events, lambda: hf_to_mm(converters.load(QWEN2VL), cfg, None, events))


@pytest.mark.parametrize(
    ("phase", "change", "name"),
    in_turns(
        ["comparing replicas", "converting"],
        CHANGES[:2],
        ["rank file", "latest_checkpointed_iteration.txt", "mmconvert.json", "config.json"],
    ),
)
def test_mm_to_hf(
    name: str,
    change: Callable[[Path], None],
    phase: str,
    tied_hf: Path,
    tied_mm22: Path,
    tmp_path: Path,
    out: Path,
) -> None:
    """Also between a comparison of replicas and the copying: what was compared is gone."""
    hf, mm = copied(tied_hf, tmp_path / "hf"), copied(tied_mm22, tmp_path / "mm")
    path = (hf if name == "config.json" else mm) / name
    path = list(rank_files(mm).values())[-1] if name == "rank file" else path
    events = At(phase, lambda: change(path))
    cfg = MMToHF(out, mm, HFConfig(hf))
    options = Options(replicas="first" if phase == "comparing replicas" else "check")
    refused(path, out, events, lambda: mm_to_hf(converters.load(QWEN2VL), cfg, options, events))


@pytest.mark.parametrize("change", CHANGES[:3], ids=lambda c: c.__name__)
def test_side_files(
    change: Callable[[Path], None], tied_hf: Path, tied_mm22: Path, tmp_path: Path, out: Path
) -> None:
    """They are copied before the weights, and belong to them."""
    hf = copied(tied_hf, tmp_path / "hf")
    path = hf / "deep" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("a b c d e")
    events = At("converting", lambda: change(path))
    cfg = MMToHF(out, tied_mm22, HFConfig(hf))
    refused(path, out, events, lambda: mm_to_hf(converters.load(QWEN2VL), cfg, None, events))


def test_resplit_with_digests(tied_mm22: Path, tmp_path: Path, out: Path) -> None:
    """While the output is read once more."""
    mm = copied(tied_mm22, tmp_path / "mm")
    path = next(iter(rank_files(mm).values()))
    events = At("digests", lambda: replaced(path))
    cfg, options = Resplit(mm, out, ParallelConfig()), Options(digests=True)
    refused(path, out, events, lambda: resplit(converters.load(QWEN2VL), cfg, options, events))


@pytest.mark.parametrize("name", ["rank_1/checkpoint_1.ckpt", "strategy/ckpt_strategy_rank_0.ckpt"])
def test_mindspore(name: str, tmp_path: Path, out: Path) -> None:
    """Weights of ranks, and their strategy files."""
    family = converters.load("QwenVLConverter")
    hf, ranks = make_qwenvl(tmp_path / "hf"), tmp_path / "ranks"
    mindspore.hf_to_ms(
        family, HFToMS(ranks, HFConfig(hf), parallel_config=DeviceConfig(model_parallel=2))
    )
    events = At("converting", lambda: written(ranks / name))
    file = out.with_suffix(".ckpt")
    cfg = MSResplit(ranks, file)
    refused(ranks / name, file, events, lambda: mindspore.resplit(family, cfg, None, events))


def test_what_is_not_read_may_change(tied_mm22: Path, tmp_path: Path, out: Path) -> None:
    """Training goes on beside: its log grows, and the next iteration appears."""
    mm = copied(tied_mm22, tmp_path / "mm")

    def train() -> None:
        (mm / "train.log").write_text("loss 1.0")
        (mm / "iter_0000010").mkdir()

    events = At("converting", train)
    resplit(converters.load(QWEN2VL), Resplit(mm, out, ParallelConfig()), None, events)
    assert events.done
    assert out.is_dir()


def test_one_conversion_does_not_watch_for_another(
    tied_hf: Path, tied_mm22: Path, tmp_path: Path, out: Path
) -> None:
    """What an earlier call has read is no matter any more."""
    hf = copied(tied_hf, tmp_path / "hf")
    hf_to_mm(converters.load(QWEN2VL), HFToMM(tmp_path / "first", HFConfig(hf)))
    written(sorted(hf.glob("*.safetensors"))[0])
    resplit(converters.load(QWEN2VL), Resplit(tied_mm22, out, ParallelConfig()))
    assert out.is_dir()


@pytest.mark.parametrize(
    ("tool", "phase"), [(verify, "comparing"), (diff, "measuring")], ids=["verify", "diff"]
)
def test_comparisons(
    tool: Callable[..., object], phase: str, tied_hf: Path, tied_mm: Path, tmp_path: Path
) -> None:
    """Nothing is said of a checkpoint that was replaced while it was compared."""
    hf = copied(tied_hf, tmp_path / "hf")
    tool(hf, tied_mm, None, Events())
    path = sorted(hf.glob("*.safetensors"))[-1]
    with pytest.raises(CheckpointError, match="has changed while it was read") as caught:
        tool(hf, tied_mm, None, At(phase, lambda: same_bytes(path)))
    assert str(path) in str(caught.value)
