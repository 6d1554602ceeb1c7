"""Times whole conversions beside `cp -r` of the same checkpoint, alternating, over many rounds.

    python benchmarks/convert.py [--rounds 8] [--sync-rounds 3] [--seconds 280] [--folder DIR]

A Qwen2-VL-2B-shaped checkpoint (4.4 GB in two weight files) is generated once, outside the time.
Each round runs `cp -r`, hf_to_mm (TP2 PP2) and mm_to_hf one after the other, with `--no-sync`,
since `cp` does not wait for the disk either. What a command has written is deleted before the next.
Then come rounds that end when all is on the disk: `cp -r` and `sync` of the files, and the two
conversions as they are. After ``--seconds`` no further round begins.

Best and median are given. A virtual machine whose host takes memory back makes single runs several
times slower at random: the best of many is what a machine that owns its memory shows, if it
repeats (the best three are given for that). Times are of whole commands, start-up included; user,
system and the split are those of the best run. The split: ``start`` until the request is read,
``plan`` until the first byte is moved, ``move``, ``sync``, and ``commit`` with the process's end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from split import PARTS
from timing import CONVERTER, LAYOUT, Timing, checkpoint, machine, read, run

SPLIT = Path(__file__).with_name("split.py")
LOOSE, SAFE = "as cp does", "until all is on the disk"

Round = dict[str, tuple[Timing, list[float]]]  # by command: what it took, and its PARTS


def timed(words: list[str]) -> tuple[Timing, list[float]]:
    """A conversion, and how long each of its PARTS took."""
    with tempfile.NamedTemporaryFile() as file:
        began = time.monotonic()
        timing = run([sys.executable, str(SPLIT), file.name, *words])
        ended = time.monotonic()
        marks = [began, *json.loads(Path(file.name).read_text())[1:], ended]
    return timing, [b - a for a, b in pairwise(marks)]


def one_round(
    hf: Path, mm: Path, out: Path, *, sync: bool
) -> dict[str, tuple[Timing, list[float]]]:
    """`cp -r` and both conversions, by what to call each."""
    more = [] if sync else ["--no-sync"]
    config = ["--cfg.hf_config.hf_dir", str(hf)]
    there = [CONVERTER, "hf_to_mm", *config, "--cfg.mm_dir", str(out), *LAYOUT, "--quiet", *more]
    back = [CONVERTER, "mm_to_hf", *config, "--cfg.mm_dir", str(mm), "--quiet", *more]
    copy = f'cp -r "{hf}" "{out}"' + (f' && find "{out}" -type f -exec sync {{}} +' if sync else "")
    found: Round = {}
    read(hf)
    found["`cp -r`, `sync`" if sync else "`cp -r`"] = run(["sh", "-c", copy]), []
    shutil.rmtree(out)
    found["hf_to_mm"] = timed(there)
    shutil.rmtree(out)
    read(mm)
    found["mm_to_hf"] = timed([*back, "--cfg.save_hf_dir", str(out)])
    shutil.rmtree(out)
    return found


def report(rounds: list[Round]) -> str:
    """The figures as a markdown table."""
    lines = ["| command | best (next two) | ratio | median | user | system | peak |"]
    lines[0] += "".join(f" {part} |" for part in PARTS)
    lines.append("|---" * (7 + len(PARTS)) + "|")
    first = min(next(iter(r.values()))[0].seconds for r in rounds)
    for name in rounds[0]:
        runs = sorted((r[name] for r in rounds), key=lambda one: one[0].seconds)
        best, parts = runs[0]
        after = ", ".join(f"{t.seconds:.2f}" for t, _ in runs[1:3])
        lines.append(
            f"| {name} | **{best.seconds:.2f}** ({after}) | {best.seconds / first:.2f} "
            f"| {statistics.median(t.seconds for t, _ in runs):.2f} | {best.user:.2f} "
            f"| {best.system:.2f} | {max(t.peak_mib for t, _ in runs):.0f} MiB |"
            + "".join(f" {seconds:.2f} |" for seconds in parts or [])
            + ("" if parts else " |" * len(PARTS))
        )
    return "\n".join(lines)


def main() -> None:
    """Generates, times, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sync-rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    folder = args.folder.resolve()
    hf, mm, out = checkpoint(folder), folder / "mm", folder / "out"
    shutil.rmtree(out, ignore_errors=True)  # of an interrupted run
    if not mm.exists():
        words = [CONVERTER, "hf_to_mm", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(mm)]
        run([sys.executable, "-m", "mmconvert", *words, *LAYOUT, "--quiet"])
    print(machine(folder))
    every: dict[str, Any] = {}
    for name, count in (
        ("as cp does", args.rounds),
        ("until all is on the disk", args.sync_rounds),
    ):
        rounds: list[Round] = []
        while len(rounds) < count and (not rounds or time.monotonic() < end):
            rounds.append(one_round(hf, mm, out, sync=name == SAFE))
        every[name] = rounds
        if rounds:
            print(f"\n{name}, {len(rounds)} rounds, seconds:\n\n{report(rounds)}", flush=True)
        os.sync()
    if args.json:
        args.json.write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
