"""The commands of the runtime, without their printing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmconvert.errors import RequestError
from mmconvert.runtime import inputs
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.launch import launch
from mmconvert.runtime.validation import Validation
from mmconvert.runtime.verdict import Report

Note = Callable[[object], None]


def validate(
    mm_dir: Path, hf_dir: Path, prompt: str, images: Sequence[Path], sounds: Sequence[Path],
    dtype: str, tolerance: float, note: Note,
) -> Report:
    """Runs an MM checkpoint and an HF folder on the same inputs.

    Raises:
        MMConvertError: a checkpoint is missing or damaged, or the inputs do not fit the model.
    """
    if not 0 <= tolerance < 1:
        raise RequestError(f"--tolerance is {tolerance}", "a number from 0 to 1")
    arch, stored = load_folder(hf_dir, mm_dir)
    batch, about = inputs.synthetic(arch), "made-up ids and pixels"
    job = Validation(arch, stored, hf_dir, batch, about, dtype, tolerance)
    report = launch(job, stored.world, note)
    assert isinstance(report, Report)  # noqa: S101 - what the job returns
    return report
