"""``torchrun -m mmconvert``: several processes, one plan, one output, one failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import QWEN2VL, Done, copied, layout, litter, snapshot, target
from mmconvert.playground.checkpoints import make_hf
from stopping import command, noted

HF, MM = "--cfg.hf_config.hf_dir", "--cfg.mm_dir"
FLAGS = ("--dtype", "fp16", "--digests", "--json")


class Work(NamedTuple):
    """A conversion without its output, and what one process writes."""

    words: tuple[str | Path, ...]
    out_flag: str
    alone: Path
    report: dict


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """All directions over a model of which a cast to fp16 loses some values."""
    folder = tmp_path_factory.mktemp("works")
    hf = make_hf("qwen2vl-2b", folder / "hf", layers=4, vit_layers=2, shards=3, vocab_size=64 << 10)
    for path in hf.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "norm" in name or "embed_tokens" in name:
                tensor.view(-1)[0] = 1e30
        save_file(tensors, path, metadata={"format": "pt"})
    mm = folder / "mm"
    pipe = layout("[2,2]", "[2,0]", 2)
    run_cli(QWEN2VL, "hf_to_mm", HF, hf, MM, mm, *pipe, check=0)
    plain: dict[str, tuple[tuple[str | Path, ...], str]] = {
        "hf_to_mm": ((QWEN2VL, "hf_to_mm", HF, hf, *pipe), MM),
        "mm_to_hf": ((QWEN2VL, "mm_to_hf", HF, hf, MM, mm), "--cfg.save_hf_dir"),
        "resplit": (
            (QWEN2VL, "resplit", "--cfg.source_dir", mm, *target("[1,1,2]", "[2,0,0]")),
            "--cfg.target_dir",
        ),
    }
    found: dict[str, Work] = {}
    for verb, (words, flag) in plain.items():
        out = folder / f"alone_{verb}"
        done = run_cli(*words, flag, out, *FLAGS, check=0)
        found[verb] = Work(words, flag, out, json.loads(done.stdout))
    return found


def launch(
    size: int, *words: str | Path, stop: list[str] | None = None, stop_rank: int = 0
) -> Done:
    """Run torchrun on this machine.

    Args:
        stop: instead of ``-m mmconvert``; see `stopping.command`.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start = stop or ["-m", "mmconvert", *map(str, words)]
    return subprocess.run(
        [*torchrun, "--nproc-per-node", str(size), *start],
        env={**os.environ, "STOP_RANK": str(stop_rank), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def check(out: Path, work: Work) -> None:
    """`out` is, byte for byte, what one process writes; its manifest but for times too."""
    expected, found = (
        {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (work.alone, out)
    )
    manifests = [json.loads(files.pop("mmconvert.json")) for files in (expected, found)]
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    for content in manifests:
        content["files"] = {name: size for name, (size, *_) in content["files"].items()}
    assert manifests[0] == manifests[1]
    assert manifests[0]["digests"] and manifests[0]["cast"]["overflowed"]
    assert litter(out) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "size"),
    [
        pytest.param("hf_to_mm", 2, marks=pytest.mark.nightly),
        ("mm_to_hf", 2),
        pytest.param("mm_to_hf", 4, marks=pytest.mark.nightly),
        pytest.param("resplit", 2, marks=pytest.mark.nightly),
    ],
)
def test_as_one_process(verb: str, size: int, works: dict[str, Work], out: Path) -> None:
    """The output, the manifest and the report; one of them speaks."""
    work = works[verb]
    done = launch(size, *work.words, work.out_flag, out, *FLAGS)
    assert done.returncode == 0, done.stderr
    check(out, work)
    report = json.loads(done.stdout)  # one object, nothing beside it
    same = set(report) - {"seconds", "output"}
    assert {key: report[key] for key in same} == {key: work.report[key] for key in same}
    assert done.stderr.count("overflowed to infinity") == 1


@pytest.mark.nightly
def test_an_existing_output(works: dict[str, Work], out: Path) -> None:
    work = works["hf_to_mm"]
    out.mkdir()
    (out / "mine.txt").write_text("x")
    before = snapshot(out)
    done = launch(2, *work.words, work.out_flag, out)
    assert done.returncode != 0
    assert "exists and is not empty" in done.stderr and "exitcode  : 2" in done.stderr
    assert done.stdout == ""
    assert snapshot(out) == before
    assert litter(out) == []


@pytest.mark.nightly  # without torchrun: test_ranks
def test_one_that_fails(works: dict[str, Work], out: Path) -> None:
    """A process that cannot write: nothing is left, and the leader says who it was."""
    work = works["hf_to_mm"]
    stop = command(0, "after", 1, *work.words, work.out_flag, out, "--workers", "1")
    done = launch(2, stop=stop, stop_rank=1)
    assert done.returncode != 0
    assert "too large" in done.stderr, done.stderr
    assert "process 1: " in done.stderr, done.stderr
    assert not out.exists()
    assert litter(out) == []


@pytest.mark.nightly  # without torchrun: test_ranks
def test_one_that_is_killed(works: dict[str, Work], out: Path) -> None:
    """Nothing under the final name; three processes, and then one, go on where two stopped."""
    work = works["hf_to_mm"]
    words = (*work.words, work.out_flag, out, *FLAGS)
    stop = command(signal.SIGKILL, "after", 1, *words, "--workers", "1")
    done = launch(2, stop=stop, stop_rank=1)
    assert done.returncode != 0
    assert not out.exists()
    before = noted(out)
    assert before >= 1, done.stderr
    stop = command(signal.SIGTERM, "after", 1, *words, "--workers", "1")
    done = launch(3, stop=stop)
    assert done.returncode != 0
    assert not out.exists()
    assert noted(out) > before, done.stderr
    done = run_cli(*words, check=0)
    check(out, work)
    report = json.loads(done.stdout)
    assert report["resumed_bytes"] > 0
    assert report["cast"] == work.report["cast"]


@pytest.mark.nightly
def test_several_go_on_where_one_stopped(works: dict[str, Work], out: Path) -> None:
    work = works["mm_to_hf"]
    words = (*work.words, work.out_flag, out, *FLAGS)
    program = command(signal.SIGKILL, "after", 2, *words, "--workers", "1")
    subprocess.run([sys.executable, *program], capture_output=True, timeout=120, check=False)
    assert noted(out) == 2
    done = launch(2, *words)
    assert done.returncode == 0, done.stderr
    check(out, work)
    assert json.loads(done.stdout)["resumed_bytes"] > 0
    assert done.stderr.count("interrupted run of the same request") == 1


# ----------------------------------------------------------------- processes that disagree
def disagreed(done: Done, out: Path, *words: str) -> None:
    """Every process refuses, before anything is written; the message names what differs."""
    assert done.returncode != 0
    assert "the processes of this run disagree" in done.stderr, done.stderr
    for word in (*words, "exitcode  : 2"):
        assert word in done.stderr, done.stderr
    assert "fault of mmconvert" not in done.stderr
    assert not out.exists()
    assert litter(out) == []


@pytest.mark.nightly  # without torchrun: test_ranks
@pytest.mark.parametrize(
    ("verb", "own", "named"),
    [
        ("hf_to_mm", ["--dry-run"], "--dry-run"),
        ("mm_to_hf", ["--dtype", "bf16"], "--dtype"),
        ("resplit", ["--cfg.target_parallel_config.tp_size", "2"], "target_parallel_config.tp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_request(
    verb: str, own: list[str], named: str, works: dict[str, Work], out: Path
) -> None:
    work = works[verb]
    program = Path(__file__).parents[1] / "differing.py"
    words = [str(program), f"-{len(own)}", *map(str, (*work.words, work.out_flag, out)), *own]
    disagreed(launch(2, stop=words), out, named)


@pytest.mark.nightly  # without torchrun: test_ranks
@pytest.mark.parametrize("change", ["another value", "another folder"])
def test_another_source(change: str, works: dict[str, Work], tmp_path: Path, out: Path) -> None:
    """A fine-tuned copy has the same sizes and headers: its path tells. Behind one path, as on
    disks of two machines, sizes and headers do.
    """
    verb, hf = QWEN2VL, Path(works["hf_to_mm"].words[3])
    other = copied(hf, tmp_path / "other")
    if change == "another value":
        path = sorted(other.glob("*.safetensors"))[0]
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] = 1.0
        save_file(tensors, path, metadata={"format": "pt"})
    words = [verb, "hf_to_mm", MM, str(out), HF, str(hf), HF, str(other)]
    program = Path(__file__).parents[1] / "differing.py"
    disagreed(launch(2, stop=[str(program), "2", *words]), out, "hf_config.hf_dir", str(other))


@pytest.mark.nightly
def test_a_tool(works: dict[str, Work]) -> None:
    done = launch(2, "inspect", works["hf_to_mm"].alone)
    assert done.returncode != 0
    assert "runs in one process" in done.stderr
    assert done.stdout == ""


# ------------------------------------------------------------- not started by torchrun
ENVIRONMENT = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "8",
    "RANK": "5",
    "LOCAL_RANK": "5",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_mm_convert_called_by_a_program_of_torchrun(works: dict[str, Work], out: Path) -> None:
    """The command (its entry point) works alone: it is no process of that program."""
    code = "import sys; from mmconvert.cli import main; sys.exit(main())"
    work = works["mm_to_hf"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, (*work.words, work.out_flag, out, *FLAGS))],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] is True
    check(out, work)


@pytest.mark.parametrize(
    "env",
    [{"WORLD_SIZE": "8", "RANK": "5"}, {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}],
    ids=["another launcher", "one process"],
)
def test_one_process_needs_no_group(env: dict[str, str], works: dict[str, Work], out: Path) -> None:
    """Nor torch: it cannot be imported here."""
    work = works["hf_to_mm"]
    fake = out.parent / "modules" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('there is no torch')\n")
    path = os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")])
    words = (*work.words, work.out_flag, out, *FLAGS)
    run_cli(*words, env={**env, "PYTHONPATH": path}, check=0)
    check(out, work)


def test_torchrun_s_variables_without_torch(works: dict[str, Work], out: Path) -> None:
    """The processes need torch for nothing: it cannot be imported here."""
    fake = out.parent / "modules" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('there is no torch')\n")
    path = os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")])
    work = works["hf_to_mm"]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mmconvert",
                *map(str, (*work.words, work.out_flag, out, *FLAGS)),
            ],
            env={**os.environ, **ENVIRONMENT, "WORLD_SIZE": "2", "RANK": rank, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
        )
        for rank in "01"
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    check(out, work)


@pytest.mark.nightly
def test_variables_that_make_no_sense(works: dict[str, Work], out: Path) -> None:
    work = works["hf_to_mm"]
    env = {**ENVIRONMENT, "WORLD_SIZE": "junk"}
    done = run_cli(*work.words, work.out_flag, out, env=env, check=2)
    assert "Traceback" not in done.stderr, done.stderr
    assert not out.exists()
