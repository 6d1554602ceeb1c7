"""Merging an adapter of rank 16 into a Qwen2-VL-2B-shaped model, beside cp.

    python benchmarks/merge.py [--layers 1.0] [--rounds 3] [--folder DIR]

Writes the base model (4.4 GB with all layers) and an adapter of every linear layer of the text
decoder and the vision encoder. Times are of whole commands; ``user`` is processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import shapes
from timing import ENVIRONMENT, machine, read

RANK = 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEAR += ("qkv", "attn.proj", "fc1", "fc2")


def make(folder: Path, layers: float) -> tuple[Path, Path]:
    """The base model and the adapter below ``folder``."""
    hf, adapter = folder / "hf", folder / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    random = np.random.default_rng(0)
    values = random.standard_normal(8 << 20).astype("<f4") * np.float32(0.02)
    noise = (values.view("<u4") >> 16).astype("<u2").tobytes()  # numbers, as random bits are not
    shapes.write_checkpoint(hf, layers=layers)
    names: dict[str, tuple[int, ...]] = {}
    for file in sorted(hf.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__")
        run = {name: tuple(entry["shape"]) for name, entry in header.items()}
        shapes.write_weights(file, run, noise)
        names |= run
    halves: dict[str, tuple[int, ...]] = {}
    for name, shape in names.items():
        stem = name.removesuffix(".weight")
        if stem != name and stem.endswith(LINEAR) and len(shape) == 2:
            halves[f"base_model.model.{stem}.lora_A.weight"] = (RANK, shape[1])
            halves[f"base_model.model.{stem}.lora_B.weight"] = (shape[0], RANK)
    adapter.mkdir()
    shapes.write_weights(adapter / "adapter_model.safetensors", halves, noise)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": LINEAR}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return hf, adapter


def timed(command: list[str]) -> str:
    """Runs a command: what it took, in words."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return (
        f"{time.perf_counter() - began:6.2f} s, user {usage.ru_utime:6.2f} s, "
        f"system {usage.ru_stime:5.2f} s, peak {usage.ru_maxrss / 1024:.0f} MiB"
    )


def main() -> None:
    """Times both, alternating."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data" / "merge")
    parser.add_argument("--workers", default="")
    given = parser.parse_args()
    print(machine())
    hf, adapter = make(given.folder, given.layers)
    size = sum(file.stat().st_size for file in hf.iterdir())
    print(f"base {size / 1e9:.2f} GB, adapter of rank {RANK}")
    out = given.folder / "out"
    merge = [sys.executable, "-m", "mmconvert", "AutoConverter", "lora_merge"]
    merge += ["--cfg.base_dir", str(hf), "--cfg.lora_dir", str(adapter)]
    merge += ["--cfg.save_dir", str(out), "--no-sync", "--quiet"]
    merge += ["--workers", given.workers] if given.workers else []
    for _ in range(given.rounds):
        for name, command in (("cp -r", ["cp", "-r", str(hf), str(out)]), ("lora_merge", merge)):
            read(hf)
            print(f"{name:10} {timed(command)}", flush=True)
            shutil.rmtree(out)
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
