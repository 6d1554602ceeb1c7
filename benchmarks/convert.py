"""Times whole conversions against `cp -r` of the same checkpoint, side by side in one run.

    python benchmarks/convert.py [--rounds 5] [--folder DIR] [--json FILE]

A Qwen2-VL-2B-shaped checkpoint (4.4 GB in two weight files) is generated once. Each round times
`cp -r` of it right before hf_to_mm (TP2 PP2) and again right before mm_to_hf, with the same files
lying on the disk, and gives the ratio of each pair. Every timed command starts from one state:
what it reads is in the page cache, everything is written back to the disk, and two untimed
`cp -r`, deleted at once, have left more memory than any command needs that the machine already
holds (a virtual machine may have given free memory back to its host, and fetching it again costs
more than the copying). Times are of whole commands, start-up included; memory is the peak
resident size that the kernel reports for the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shapes import write_checkpoint

LAYOUT = [
    *("--cfg.parallel_config.llm_pp_layers", "[12,16]"),
    *("--cfg.parallel_config.vit_pp_layers", "[32,0]"),
    *("--cfg.parallel_config.tp_size", "2"),
]
# As installed packages are: compiled once, not at every start.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
CONVERT = [sys.executable, "-m", "mmconvert", "Qwen2VLConverter"]


class Timing(NamedTuple):
    """One run of a command."""

    seconds: float
    peak_mib: float


def settle(hf: Path, reads: Path, scratch: Path) -> None:
    """Brings cache and memory into the state that every timed command starts from."""
    for file in sorted(p for p in reads.rglob("*") if p.is_file()):
        with file.open("rb") as source, open(os.devnull, "wb") as nowhere:
            shutil.copyfileobj(source, nowhere, 1 << 20)
    os.sync()
    scratch.mkdir()
    for number in range(2):
        run(["cp", "-r", str(hf), str(scratch / str(number))])
    shutil.rmtree(scratch)


def run(command: Sequence[str]) -> Timing:
    """Runs a command to its end; fails if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return Timing(seconds, usage.ru_maxrss / 1024)


def one_round(hf: Path, work: Path) -> dict[str, Timing]:
    """cp and hf_to_mm, then cp and mm_to_hf."""
    copy, mm, back = work / "copy", work / "mm", work / "back"
    hf_to_mm = ["hf_to_mm", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(mm), *LAYOUT]
    mm_to_hf = ["mm_to_hf", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(mm)]
    mm_to_hf += ["--cfg.save_hf_dir", str(back)]
    found: dict[str, Timing] = {}
    for name, flags in (("hf_to_mm", hf_to_mm), ("mm_to_hf", mm_to_hf)):
        settle(hf, hf, copy)
        found[f"cp before {name}"] = run(["cp", "-r", str(hf), str(copy)])
        shutil.rmtree(copy)
        settle(hf, hf if name == "hf_to_mm" else mm, copy)
        found[name] = run([*CONVERT, *flags])
    shutil.rmtree(mm)
    shutil.rmtree(back)
    return found


def start_up() -> dict[str, Timing]:
    """Help screens against `import torch`, the best of five each."""
    commands = {
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "mm-convert --help": [sys.executable, "-m", "mmconvert", "--help"],
        "mm-convert Qwen2VLConverter hf_to_mm -h": [*CONVERT, "hf_to_mm", "-h"],
    }
    return {name: min(run(command) for _ in range(5)) for name, command in commands.items()}


def report(rounds: list[dict[str, Timing]], starts: dict[str, Timing]) -> str:
    """The figures as a markdown table."""
    lines = ["| command | seconds (median) | peak memory | ratio to `cp -r` (median, all) |"]
    lines.append("|---|---|---|---|")
    for name in rounds[0]:
        seconds = statistics.median(r[name].seconds for r in rounds)
        peak = max(r[name].peak_mib for r in rounds)
        ratio = "1"
        if not name.startswith("cp"):
            ratios = [r[name].seconds / r[f"cp before {name}"].seconds for r in rounds]
            every = ", ".join(f"{x:.2f}" for x in sorted(ratios))
            ratio = f"**{statistics.median(ratios):.2f}** ({every})"
        lines.append(f"| {name} | {seconds:.2f} | {peak:.0f} MiB | {ratio} |")
    lines += ["", "| start-up | seconds (best of 5) | ratio to `import torch` |", "|---|---|---|"]
    torch = next(iter(starts.values())).seconds
    for name, timing in starts.items():
        lines.append(f"| {name} | {timing.seconds:.2f} | {timing.seconds / torch:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Generates, times, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    args = parser.parse_args()
    folder = args.folder.resolve()
    hf = folder / "hf"
    if not (hf / "model.safetensors.index.json").is_file():
        write_checkpoint(hf)
    for left in ("copy", "mm", "back"):  # of an interrupted run
        shutil.rmtree(folder / left, ignore_errors=True)
    one_round(hf, folder)  # warms the page cache and the machine; not counted
    rounds = [one_round(hf, folder) for _ in range(args.rounds)]
    starts = start_up()
    print(f"command: python benchmarks/convert.py --rounds {args.rounds}")
    print(f"machine: {os.cpu_count()} cores, {platform.system()} {platform.release()}, ", end="")
    print(f"Python {platform.python_version()}, numpy {__import__('numpy').__version__}\n")
    print(report(rounds, starts))
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "start_up": starts}, indent=1))


if __name__ == "__main__":
    main()
