"""The dry run of a large dense model: what start and plan cost where no byte moves.

    python benchmarks/giant.py [--rounds 5] [--folder DIR]

Qwen2-VL-72B, its real sizes in sparse files (144 GB of holes), to tp 8, pp 4. The second line
leaves the probe out, which moves a sample of the bytes to tell how long the whole will take.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import sys
from pathlib import Path

import shapes
from timing import CONVERTER, Timing, machine, run

SIZES = {"HIDDEN": 8192, "FFN": 29568, "LAYERS": 80, "HEADS": 64, "GROUPS": 8, "VOCAB": 152064}
FILES = 38
LAYOUT = [
    *("--cfg.parallel_config.llm_pp_layers", "[19,20,21,20]"),
    *("--cfg.parallel_config.vit_pp_layers", "[32,0,0,0]"),
    *("--cfg.parallel_config.tp_size", "8"),
]


def write(folder: Path) -> int:
    """Writes the sparse checkpoint; returns its bytes."""
    for name, size in SIZES.items():
        setattr(shapes, name, size)
    total = shapes.write_checkpoint(folder, FILES, sparse=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": SIZES["HIDDEN"],
        "intermediate_size": SIZES["FFN"],
        "num_attention_heads": SIZES["HEADS"],
        "num_key_value_heads": SIZES["GROUPS"],
        "vocab_size": SIZES["VOCAB"],
    }
    config["vision_config"]["hidden_size"] = SIZES["HIDDEN"]
    (folder / "config.json").write_text(json.dumps(config))
    return total


def without_probe(words: list[str]) -> None:
    """Runs the command in this process; how long the whole will take is not asked."""
    import mmconvert.estimate

    mmconvert.estimate.PROBE_SECONDS = 0
    sys.argv = ["mm-convert", *words]
    runpy.run_module("mmconvert", run_name="__main__")


def main() -> None:
    """Generates, times, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    hf = args.folder.resolve() / "hf-72b"
    shutil.rmtree(hf, ignore_errors=True)
    total = write(hf)
    paths = ["--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(args.folder / "mm-72b")]
    words = [CONVERTER, "hf_to_mm", *paths, *LAYOUT, "--dry-run", "--quiet"]
    cases = {
        "dry run": [sys.executable, "-m", "mmconvert", *words],
        "without the probe": [sys.executable, __file__, "unprobed", *words],
    }
    print(f"{machine()}\nQwen2-VL-72B, {total / 1e9:.0f} GB, {' '.join(LAYOUT)}")
    for name, command in cases.items():
        found: Timing = min(run(command) for _ in range(args.rounds))
        print(f"{name}: {found.seconds:.2f} s, user {found.user:.2f}, {found.peak_mib:.0f} MiB")
    shutil.rmtree(hf)


if __name__ == "__main__":
    if sys.argv[1:2] == ["unprobed"]:
        without_probe(sys.argv[2:])
    else:
        main()
