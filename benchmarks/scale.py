"""Times one conversion shared by 1, 2 and 4 processes, side by side in one run.

    python benchmarks/scale.py [--rounds 3] [--processes 1 2 4] [--folder DIR]

Each process has one thread (`--workers 1`), so that the processes alone make the difference. What
they need before they know each other is in the time of a dry run of the same group. One process
without `--ranks`, with one thread and with one for each core, stands beside them.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
from pathlib import Path

from timing import CONVERTER, LAYOUT, checkpoint, machine, read, run

CONVERT = [sys.executable, "-m", "mmconvert", CONVERTER]


def together(command: list[str], processes: int) -> list[str]:
    """A command in several processes of this machine; as it is for 0."""
    if not processes:
        return command
    each = f'{shlex.join(command)} --ranks $i/{processes} & p="$p $!"'
    ranks = " ".join(map(str, range(processes)))
    return ["sh", "-c", f"for i in {ranks}; do {each}; done; for j in $p; do wait $j || exit; done"]


def main() -> None:
    """Generates, times, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    folder = args.folder.resolve()
    hf, mm = checkpoint(folder), folder / "mm"
    words = ["hf_to_mm", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(mm), *LAYOUT]
    words.append("--no-sync")  # what the disk takes would hide the rest
    cases = {"alone, one thread for each core": (0, 0), "alone": (0, 1)}
    cases |= {f"`--ranks`, {n} process{'es' * (n > 1)}": (n, 1) for n in args.processes}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    ready: dict[str, list[float]] = {name: [] for name in cases}
    shutil.rmtree(mm, ignore_errors=True)
    for number in range(args.rounds + 1):  # the first round warms the machine; not counted
        for name, (processes, workers) in cases.items():
            command = [*CONVERT, *words, "--quiet", "--workers", str(workers)]
            read(hf)
            start = run(together([*command, "--dry-run"], processes)).seconds
            whole = run(together(command, processes)).seconds
            shutil.rmtree(mm)
            if number:
                ready[name].append(start)
                seconds[name].append(whole)
    print(f"command: python benchmarks/scale.py --rounds {args.rounds}\n{machine()}\n")
    print("| one thread a process | seconds (median, all) | a dry run |\n|---|---|---|")
    for name, timed in seconds.items():
        every = ", ".join(f"{s:.2f}" for s in sorted(timed))
        start = statistics.median(ready[name])
        print(f"| {name} | **{statistics.median(timed):.2f}** ({every}) | {start:.2f} |")


if __name__ == "__main__":
    main()
