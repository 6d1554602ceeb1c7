"""The demo: a small Qwen2-VL goes to MM format at TP2 PP2 VPP2 and comes back byte for byte.

The checkpoint is written by transformers' own `save_pretrained`, the conversions are real runs
of the command line, and the result is loaded by transformers again.
"""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

CONSOLE = Console(width=100)
MANIFEST = "mmconvert.json"


def write_model(folder: Path) -> None:
    """Writes a small Qwen2-VL with random weights, in four weight files."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    text = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
    }
    vision = {"depth": 4, "embed_dim": 64, "num_heads": 4, "hidden_size": 256, "mlp_ratio": 4}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="3MB")


def load_model(folder: Path) -> tuple[int, dict[str, object]]:
    """Loads a checkpoint in transformers: parameters, and what it found missing or unexpected."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    return sum(p.numel() for p in model.parameters()), info


def mm_convert(work: str, *words: str) -> None:
    """Runs the command line in a folder, showing it and what it prints; stops if it fails."""
    shown = " ".join(words).replace(" --", " \\\n    --")
    CONSOLE.print(f"\n$ mm-convert {shown}", markup=False, highlight=False, soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "mmconvert", *words], cwd=work, check=False)
    if done.returncode:
        sys.exit(f"the command ended with exit code {done.returncode}")


def same_files(a: Path, b: Path) -> list[str]:
    """Names of the files that went in; stops the demo unless they came back, byte for byte.

    Beside them lies only the manifest that every output has.
    """
    names = sorted(p.name for p in a.iterdir())
    equal, different, odd = filecmp.cmpfiles(a, b, names, shallow=False)
    if different or odd or {p.name for p in b.iterdir()} != {*names, MANIFEST}:
        sys.exit(f"not the same: {different + odd}")
    return equal


def main() -> None:
    """Tells the story."""
    with tempfile.TemporaryDirectory(prefix="mmconvert-demo-") as work:
        hf, back = Path(work, "hf"), Path(work, "back")
        CONSOLE.rule("1. a checkpoint by transformers' save_pretrained")
        write_model(hf)
        for path in sorted(hf.iterdir()):
            CONSOLE.print(f"  {path.name:<40} {path.stat().st_size:>10,} bytes", highlight=False)

        CONSOLE.rule("2. to MM format, TP2 PP2 VPP2")
        mm_convert(
            work,
            *("Qwen2VLConverter", "hf_to_mm"),
            *("--cfg.hf_config.hf_dir", "hf", "--cfg.mm_dir", "mm"),
            *("--cfg.parallel_config.llm_pp_layers", "[[0,2],[2,2]]"),
            *("--cfg.parallel_config.vit_pp_layers", "[[3,1],[0,0]]"),
            *("--cfg.parallel_config.tp_size", "2"),
        )
        mm_convert(work, "inspect", "mm")

        CONSOLE.rule("3. the same model? every tensor and every copy of it compared")
        mm_convert(work, "verify", "hf", "mm")

        CONSOLE.rule("4. back to Hugging Face; the layout is read off the folder")
        mm_convert(
            work,
            *("Qwen2VLConverter", "mm_to_hf", "--cfg.mm_dir", "mm"),
            *("--cfg.hf_config.hf_dir", "hf", "--cfg.save_hf_dir", "back"),
        )
        files = same_files(hf, back)
        parameters, info = load_model(back)
        problems = {key: value for key, value in info.items() if value}
        if problems:
            sys.exit(f"transformers reports {problems}")
        CONSOLE.rule("5. the report")
        CONSOLE.print(f"  byte for byte the same   {len(files)} of {len(files)} files")
        CONSOLE.print(f"  loaded by transformers   {parameters:,} parameters,", end=" ")
        CONSOLE.print("no missing and no unexpected key")
        CONSOLE.print("\n[bold green]The demo has passed.[/]")


if __name__ == "__main__":
    main()
