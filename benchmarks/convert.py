"""Times whole conversions against `cp -r` of the same checkpoint, side by side in one run.

    python benchmarks/convert.py [--rounds 5] [--folder DIR] [--json FILE]

A Qwen2-VL-2B-shaped checkpoint (4.4 GB in two weight files) is generated once. Each round times
`cp -r` of it right before hf_to_mm (TP2 PP2) and again right before mm_to_hf, and gives the ratio
of each pair. Before every timed command its inputs are read and everything is written back.

Each round is timed in two states of memory, since that decides more than the commands do:

    as it is   a virtual machine may have given free memory back to its host, and fetches it
               again, at a price, while files are written
    held       two untimed `cp -r` of the inputs, deleted at once, have left more memory that the
               machine holds than any command needs

Times are of whole commands, start-up included; memory is the peak resident size that the kernel
reports for the process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from timing import CONVERTER, LAYOUT, Timing, checkpoint, machine, read, run

CONVERT = [sys.executable, "-m", "mmconvert", CONVERTER]
STATES = ("as it is", "held")

Round = dict[str, Timing]


def settle(reads: Path, scratch: Path, state: str) -> None:
    """Brings cache and memory into the state that a timed command starts from."""
    read(reads)
    if state == "held":
        scratch.mkdir()
        for number in range(2):
            run(["cp", "-r", str(reads), str(scratch / str(number))])
        shutil.rmtree(scratch)


def one_round(hf: Path, work: Path, state: str) -> Round:
    """cp and hf_to_mm, then cp and mm_to_hf."""
    copy, mm, back = work / "copy", work / "mm", work / "back"
    hf_to_mm = ["hf_to_mm", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(mm), *LAYOUT]
    mm_to_hf = ["mm_to_hf", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(mm)]
    mm_to_hf += ["--cfg.save_hf_dir", str(back)]
    found: Round = {}
    for name, flags in (("hf_to_mm", hf_to_mm), ("mm_to_hf", mm_to_hf)):
        settle(hf, copy, state)
        found[f"cp before {name}"] = run(["cp", "-r", str(hf), str(copy)])
        shutil.rmtree(copy)
        settle(hf if name == "hf_to_mm" else mm, copy, state)
        found[name] = run([*CONVERT, *flags, "--no-sync"])  # cp does not wait for the disk
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


def report(rounds: dict[str, list[Round]], starts: dict[str, Timing]) -> str:
    """The figures as markdown tables."""
    lines = ["| memory | command | seconds (median) | peak | ratio to `cp -r` (median, all) |"]
    lines.append("|---|---|---|---|---|")
    for state, timed in rounds.items():
        for name in timed[0]:
            seconds = statistics.median(r[name].seconds for r in timed)
            peak = max(r[name].peak_mib for r in timed)
            ratio = "1"
            if not name.startswith("cp"):
                ratios = [r[name].seconds / r[f"cp before {name}"].seconds for r in timed]
                every = ", ".join(f"{x:.2f}" for x in sorted(ratios))
                ratio = f"**{statistics.median(ratios):.2f}** ({every})"
            lines.append(f"| {state} | {name} | {seconds:.2f} | {peak:.0f} MiB | {ratio} |")
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
    hf = checkpoint(folder)
    for left in ("copy", "mm", "back"):  # of an interrupted run
        shutil.rmtree(folder / left, ignore_errors=True)
    one_round(hf, folder, "as it is")  # warms the page cache and the machine; not counted
    rounds: dict[str, list[Round]] = {state: [] for state in STATES}
    for _ in range(args.rounds):
        for state in STATES:
            rounds[state].append(one_round(hf, folder, state))
    starts = start_up()
    print(f"command: python benchmarks/convert.py --rounds {args.rounds}")
    print(f"{machine()}\n\n{report(rounds, starts)}")
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "start_up": starts}, indent=1))


if __name__ == "__main__":
    main()
