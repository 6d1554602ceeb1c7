"""The command line against recorded conversions.

A record holds the steps of one layout: the arguments of each command and what comes of it.
`{hf}` in the arguments stands for the generated checkpoint, `{mm}` for the latest output of
hf_to_mm, `{out}` for the folder to be written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import pytest

from cli import run_cli
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm, compare_record, compare_side_files
from nights import night

RECORDS = Path(__file__).parent / "records"
LATER_FAMILIES = {"InternVLConverter", "Qwen2_5_OmniConverter"}
IMPOSSIBLE = {"qwen2vl-7b/bad_llm_layers": ("27", "28"), "qwen2vl-7b/bad_tp8": ("4", "8")}
"""Requests that must be refused, and the numbers that the message must name."""

LAYOUT_FLAG = "--cfg.parallel_config."
TARGET_FLAG = "--cfg.target_parallel_config."
FOLDER_FLAGS = {"--cfg.mm_dir", "--cfg.hf_config.hf_dir", "--cfg.save_hf_dir"}

Step = dict[str, Any]


class Record(NamedTuple):
    """A record file."""

    id: str
    model: str
    hf_options: dict[str, Any]
    steps: list[Step]

    @property
    def converter(self) -> str:
        return self.steps[0]["argv"][0]

    @property
    def good(self) -> bool:
        """Whether the first step writes a checkpoint."""
        return self.steps[0]["expect"] == "record"

    @property
    def flags(self) -> dict[str, str]:
        """The flags of the first step, hf_to_mm, that name no folder."""
        pairs = _pairs(self.steps[0])
        return {k: v for k, v in pairs.items() if k not in FOLDER_FLAGS}

    @property
    def other_flags(self) -> list[str]:
        """Those of them that are not about the layout, such as the canonical structure."""
        return _joined({k: v for k, v in self.flags.items() if not k.startswith(LAYOUT_FLAG)})


def _pairs(step: Step) -> dict[str, str]:
    flags = step["argv"][2:]
    return dict(zip(flags[::2], flags[1::2], strict=True))


def _joined(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


def _load(path: Path) -> Record:
    case = json.loads(path.read_text(encoding="utf-8"))
    name = path.relative_to(RECORDS).with_suffix("").as_posix()
    return Record(name, case["model"], case["hf"], case["steps"])


ALL = [_load(path) for path in sorted(RECORDS.glob("*/*.json"))]
GOOD = [record for record in ALL if record.good]
ONE_WAY = [r for r in GOOD if not any(step["step"] == "mm_to_hf" for step in r.steps)]


# Going back without flags: what has no step of its own that goes back, and a layout of each kind;
# the others with flags, and all both ways nightly.
KINDS = {
    *("qwen2vl-7b/tp4_vit_tp2", "qwen2.5vl-7b/canonical_tp1_pp2", "internvl2-8b/tp2_pp2"),
    *("qwen2.5omni-7b/tp4_vit_tp1_audio_tp1", "qwen3vl-30b-a3b/tp1_ep2", "glm4.1v-9b/tp1_pp4"),
    "deepseekvl2/tp2_pp1_ep2",
}
WITHOUT_FLAGS = {record.id for record in ONE_WAY} | KINDS
WITH_FLAGS = {record.id for record in ALL} - KINDS


def records(chosen: list[Record], today: Container[str] = ()) -> pytest.MarkDecorator:
    """Each of the chosen records; where `today` is given, nightly those that are not in it."""
    cases = [record if not today or record.id in today else night(record) for record in chosen]
    return pytest.mark.parametrize("record", cases, ids=lambda record: record.id)


class Workshop:
    """Makes each input once: generated HF folders, and what hf_to_mm makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Path] = {}
        self.runs: dict[str, CompletedProcess[str]] = {}

    def hf(self, record: Record) -> Path:
        """The generated source checkpoint of a record."""
        key = f"{record.model}-{json.dumps(record.hf_options, sort_keys=True)}"
        if key not in self.made:
            out = self.folder / f"hf{len(self.made)}"
            self.made[key] = make_hf(record.model, out, **record.hf_options)
        return self.made[key]

    def mm(self, record: Record) -> Path:
        """The output of a record's hf_to_mm step."""
        out = self.folder / "mm" / record.id
        if record.id not in self.runs:
            argv = filled(record.steps[0]["argv"], hf=self.hf(record), out=out)
            self.runs[record.id] = run_cli(*argv)
        done = self.runs[record.id]
        assert done.returncode == 0, f"hf_to_mm: exit code {done.returncode}\n{done.stderr}"
        return out


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("golden")
    yield Workshop(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """An output folder that is not there yet, alone in its parent."""
    parent = tmp_path / "parent"
    parent.mkdir()
    yield parent / "out"
    shutil.rmtree(parent, ignore_errors=True)


@pytest.fixture(autouse=True)
def _family_is_there(request: pytest.FixtureRequest) -> None:
    """Skip the families that are still to come; all others must be registered."""
    from mmconvert.converters import registry

    if "record" not in request.fixturenames:
        return
    converter = request.getfixturevalue("record").converter
    if converter in LATER_FAMILIES and converter not in registry():
        pytest.skip(f"{converter} is not registered")


def filled(argv: list[str], **folders: Path) -> list[str]:
    """The arguments with `{name}` replaced by the folder of that name."""
    names = {f"{{{name}}}": str(folder) for name, folder in folders.items()}
    return [names.get(word, word) for word in argv]


def assert_none(differences: list[str]) -> None:
    """Fail with the first of the differences, if there are any."""
    rest = len(differences) - 20
    lines = differences[:20] + ([f"... and {rest} more"] if rest > 0 else [])
    assert not differences, "\n".join(lines)


def assert_refused(done: CompletedProcess[str], out: Path) -> None:
    """A clear error and nothing written, not even beside the output folder."""
    assert done.returncode != 0, done.stdout
    assert done.stderr.strip(), "no error message"
    assert "Traceback" not in done.stderr, done.stderr
    assert list(out.parent.iterdir()) == []


# ----------------------------------------------------------- one check for each expectation
def check_record(record: Record, step: Step, workshop: Workshop, out: Path) -> None:
    if step is record.steps[0]:
        assert_none(compare_record(step, workshop.mm(record)))
        return
    folders = {"hf": workshop.hf(record), "mm": workshop.mm(record), "out": out}
    run_cli(*filled(step["argv"], **folders), check=0)
    assert_none(compare_record(step, out))


def check_identical(record: Record, step: Step, workshop: Workshop, out: Path) -> None:
    hf = workshop.hf(record)
    run_cli(*filled(step["argv"], hf=hf, mm=workshop.mm(record), out=out), check=0)
    assert_none(compare_hf(hf, out) + compare_side_files(hf, out))


def check_error(record: Record, step: Step, workshop: Workshop, out: Path) -> None:
    folders = {"hf": workshop.hf(record), "out": out}
    if "{mm}" in step["argv"]:
        folders["mm"] = workshop.mm(record)
    assert_refused(run_cli(*filled(step["argv"], **folders)), out)


def check_undefined(record: Record, step: Step, workshop: Workshop, out: Path) -> None:
    """Where the reference is wrong: an impossible request, or a resplit."""
    if record.id in IMPOSSIBLE:
        done = run_cli(*filled(step["argv"], hf=workshop.hf(record), out=out))
        assert_refused(done, out)
        assert done.returncode == 2, done.stderr
        for number in IMPOSSIBLE[record.id]:
            assert re.search(rf"(?<!\d){number}(?!\d)", done.stderr), done.stderr
        return
    assert step["step"] == "resplit", f"nothing is said about {step['step']} of {record.id}"
    run_cli(*filled(step["argv"], mm=workshop.mm(record), out=out), check=0)
    fresh = out.with_name("fresh")
    layout = {
        key.replace(TARGET_FLAG, LAYOUT_FLAG): f"[{value}]" if "pp_layers" in key else value
        for key, value in _pairs(step).items()
        if key.startswith(TARGET_FLAG)
    }
    folders = {"--cfg.mm_dir": str(fresh), "--cfg.hf_config.hf_dir": str(workshop.hf(record))}
    argv = [record.converter, "hf_to_mm", *_joined({**folders, **layout}), *record.other_flags]
    run_cli(*argv, check=0)
    assert_none(compare_mm(fresh, out))


CHECKS: dict[str, Callable[[Record, Step, Workshop, Path], None]] = {
    "record": check_record,
    "identical": check_identical,
    "error": check_error,
    "undefined": check_undefined,
}


def _check(record: Record, kind: str, workshop: Workshop, out: Path) -> None:
    steps = [step for step in record.steps if step["step"] == kind]
    for number, step in enumerate(steps):
        target = out if number == 0 else out.parent / f"{number}" / "out"
        target.parent.mkdir(exist_ok=True)
        CHECKS[step["expect"]](record, step, workshop, target)


def _with_step(kind: str) -> list[Record]:
    return [record for record in ALL if any(step["step"] == kind for step in record.steps)]


# ------------------------------------------------------------------------------- the tests
def test_the_records_are_there() -> None:
    """Each starts with its only hf_to_mm step, and every expectation can be checked."""
    assert len(ALL) >= 21
    kinds = {step["step"] for record in ALL for step in record.steps}
    assert kinds == {"hf_to_mm", "mm_to_hf", "resplit"}
    assert {step["expect"] for record in ALL for step in record.steps} <= set(CHECKS)
    for record in ALL:
        steps = [step["step"] for step in record.steps]
        assert steps[0] == "hf_to_mm", record.id
        assert steps.count("hf_to_mm") == 1, record.id


@records(_with_step("hf_to_mm"))
def test_hf_to_mm(record: Record, workshop: Workshop, out: Path) -> None:
    _check(record, "hf_to_mm", workshop, out)


@records(_with_step("mm_to_hf"), today=WITH_FLAGS)
def test_mm_to_hf(record: Record, workshop: Workshop, out: Path) -> None:
    _check(record, "mm_to_hf", workshop, out)


@records(_with_step("resplit"))
def test_resplit(record: Record, workshop: Workshop, out: Path) -> None:
    _check(record, "resplit", workshop, out)


def _back(record: Record, flags: list[str], workshop: Workshop, out: Path) -> None:
    hf = workshop.hf(record)
    folders = {"--cfg.save_hf_dir": out, "--cfg.mm_dir": workshop.mm(record)}
    folders["--cfg.hf_config.hf_dir"] = hf
    words = [str(word) for pair in folders.items() for word in pair]
    run_cli(record.converter, "mm_to_hf", *words, *flags, check=0)
    assert_none(compare_hf(hf, out) + compare_side_files(hf, out))


@records(GOOD, today=WITHOUT_FLAGS)
def test_back_without_layout_flags(record: Record, workshop: Workshop, out: Path) -> None:
    """The layout is read off the checkpoint."""
    _back(record, record.other_flags, workshop, out)


@records(ONE_WAY)
def test_back_with_nested_lists(record: Record, workshop: Workshop, out: Path) -> None:
    """Virtual pipeline stages go back under the lists that they were made with."""
    _back(record, _joined(record.flags), workshop, out)
