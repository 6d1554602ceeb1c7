"""Runs commands and measures them: wall time, and the peak memory that the kernel reports."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shapes import write_checkpoint

# As installed packages are: compiled once, not at every start.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT.setdefault("OMP_NUM_THREADS", "1")  # torchrun sets it too, and says so at length
CONVERTER = "Qwen2VLConverter"
LAYOUT = [
    *("--cfg.parallel_config.llm_pp_layers", "[12,16]"),
    *("--cfg.parallel_config.vit_pp_layers", "[32,0]"),
    *("--cfg.parallel_config.tp_size", "2"),
]


class Timing(NamedTuple):
    """One run of a command."""

    seconds: float
    peak_mib: float
    user: float
    system: float


def run(command: Sequence[str]) -> Timing:
    """Runs a command to its end; fails if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return Timing(seconds, usage.ru_maxrss / 1024, usage.ru_utime, usage.ru_stime)


def read(folder: Path) -> None:
    """Brings the files of a folder into the page cache, and what is unwritten to the disk."""
    with open(os.devnull, "wb", buffering=0) as nowhere:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb", buffering=0) as source:
                while block := source.read(1 << 20):
                    nowhere.write(block)
    os.sync()


def checkpoint(folder: Path) -> Path:
    """The Hugging Face checkpoint below ``folder``, made if it is not there."""
    hf = folder / "hf"
    if not (hf / "model.safetensors.index.json").is_file():
        write_checkpoint(hf)
    return hf


def machine(folder: Path | None = None) -> str:
    """What was measured on, and on which file system."""
    from mmconvert.disks import kind_of
    from mmconvert.executor.jobs import cores

    system = f", {kind_of(folder / 'file') or 'an unknown file system'}" if folder else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return (
        f"machine: {cores()} cores, {memory} GiB{system}, "
        f"{platform.system()} {platform.release()}, "
        f"Python {sys.version.split()[0]}, numpy {__import__('numpy').__version__}"
    )
