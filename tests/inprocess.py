"""The command line called in this process: the exit code is what `main` returns."""

from __future__ import annotations

import io
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import TextIO

from mmconvert.cli import main

Done = CompletedProcess[str]
CRASHED = 70  # an exception left `main`: what a process would show as a traceback

CONVERTERS = {
    "qwen2vl": "Qwen2VLConverter",
    "qwen2.5vl": "Qwen2_5_VLConverter",
    "qwen2.5omni": "Qwen2_5_OmniConverter",
    "internvl": "InternVLConverter",
}
HF, MM, BACK = "--cfg.hf_config.hf_dir", "--cfg.mm_dir", "--cfg.save_hf_dir"
SOURCE, TARGET = "--cfg.source_dir", "--cfg.target_dir"


def converter_of(model: str) -> str:
    """The converter of a model of the playground's catalogue."""
    return next(c for prefix, c in CONVERTERS.items() if model.startswith(prefix))


@contextmanager
def same_signals() -> Iterator[None]:
    """`main` answers signals; the tests' process keeps its own answers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, answer in before.items():
            signal.signal(number, answer)


def captured(args: Sequence[str]) -> Done:
    """Run one command line: its exit code, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    code = run_into(out, err, args)
    return Done(args, code, out.getvalue(), err.getvalue())


def run_into(out: TextIO, err: TextIO, args: Sequence[str]) -> int:
    """Run one command line that prints to these streams; its exit code."""
    with redirect_stdout(out), redirect_stderr(err), same_signals():
        try:
            return main(list(args))
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else 1
        except Exception:
            traceback.print_exc()
            return CRASHED


def call(*words: str | Path, check: int | None = 0) -> Done:
    """Run one command line.

    Args:
        check: the exit code that is expected; None takes any but a crash.
    """
    done = captured([str(word) for word in words])
    code = done.returncode
    if code == CRASHED or check not in (None, code):
        raise AssertionError(
            f"exit code {code}, expected {check}: mm-convert {' '.join(done.args)}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


def to_mm(model: str, hf: Path, mm: Path, *flags: str, check: int | None = 0) -> Done:
    """hf_to_mm of a model of the catalogue."""
    return call(converter_of(model), "hf_to_mm", HF, hf, MM, mm, *flags, check=check)


def to_hf(model: str, mm: Path, hf: Path, out: Path, *flags: str, check: int | None = 0) -> Done:
    """mm_to_hf of a model of the catalogue."""
    words = (HF, hf, MM, mm, BACK, out, *flags)
    return call(converter_of(model), "mm_to_hf", *words, check=check)


def to_other(model: str, mm: Path, out: Path, *flags: str, check: int | None = 0) -> Done:
    """Resplit of a model of the catalogue."""
    return call(converter_of(model), "resplit", SOURCE, mm, TARGET, out, *flags, check=check)
