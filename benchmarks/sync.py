"""What it costs that a conversion waits for the disk, beside `cp` and `sync`.

    python benchmarks/sync.py [--rounds 5] [--layers 1.0] [--folder DIR]

Each round times, from warm files and with nothing left to write back: `cp -r` and then `sync -f`;
hf_to_mm (TP2 PP2), which syncs while it copies; hf_to_mm with --no-sync and then `sync -f`. Seconds
are until everything is on the disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from shapes import write_checkpoint
from timing import CONVERTER, machine, read, run


def one_round(hf: Path, work: Path, layout: list[str]) -> dict[str, float]:
    """Seconds of each command, with what it leaves to be written."""
    out = work / "out"
    convert = [sys.executable, "-m", "mmconvert", CONVERTER, "hf_to_mm", "--quiet", *layout]
    convert += ["--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(out)]
    commands = {
        "cp -r, sync -f": [["cp", "-r", str(hf), str(out)], ["sync", "-f", str(out)]],
        "hf_to_mm": [convert],
        "hf_to_mm --no-sync, sync -f": [[*convert, "--no-sync"], ["sync", "-f", str(out)]],
    }
    found: dict[str, float] = {}
    for name, lines in commands.items():
        shutil.rmtree(out, ignore_errors=True)
        read(hf)
        found[name] = sum(run(line).seconds for line in lines)
    shutil.rmtree(out)
    return found


def main() -> None:
    """Generates, times, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers to keep")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    work = args.folder.resolve() / f"sync-{args.layers}"
    hf = work / "hf"
    if not (hf / "model.safetensors.index.json").is_file():
        write_checkpoint(hf, layers=args.layers)
    text, vision = max(1, int(28 * args.layers)), max(1, int(32 * args.layers))
    layout = [
        *("--cfg.parallel_config.llm_pp_layers", f"[{text // 2},{text - text // 2}]"),
        *("--cfg.parallel_config.vit_pp_layers", f"[{vision},0]"),
        *("--cfg.parallel_config.tp_size", "2"),
    ]
    one_round(hf, work, layout)  # warms the machine; not counted
    rounds = [one_round(hf, work, layout) for _ in range(args.rounds)]
    print(f"command: python benchmarks/sync.py --rounds {args.rounds} --layers {args.layers}")
    print(f"{machine()}\n\n| until all is on the disk | seconds (median, all) |\n|---|---|")
    for name in rounds[0]:
        seconds = sorted(r[name] for r in rounds)
        every = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"| {name} | **{statistics.median(seconds):.2f}** ({every}) |")


if __name__ == "__main__":
    main()
