"""Commands over tiny checkpoints, and what the integration tests ask of their outcome."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from subprocess import CompletedProcess

import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from mmread import INDEX, compare_hf, compare_side_files

Done = CompletedProcess[str]
Tensors = dict[str, torch.Tensor]

QWEN2VL = "Qwen2VLConverter"
QWEN25VL = "Qwen2_5_VLConverter"
RANK_FILE = "model_optim_rng.pt"
LAYOUT = "--cfg.parallel_config."


def layout(llm: str, vit: str, tp: int | str = 1, *more: str, prefix: str = LAYOUT) -> list[str]:
    """The flags of a layout; `more` are further ``key=value`` words."""
    flags = [f"{prefix}llm_pp_layers", llm, f"{prefix}vit_pp_layers", vit]
    flags += [f"{prefix}tp_size", str(tp)]
    for word in more:
        key, value = word.split("=")
        flags += [f"{prefix}{key}", value]
    return flags


def target(llm: str, vit: str, tp: int | str = 1, *more: str) -> list[str]:
    """The flags of the layout that resplit is to write."""
    return layout(llm, vit, tp, *more, prefix="--cfg.target_parallel_config.")


def hf_to_mm(
    hf: Path, mm: Path, *flags: str, converter: str = QWEN2VL, check: int | None = 0
) -> Done:
    words = ["--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", mm, *flags]
    return run_cli(converter, "hf_to_mm", *words, check=check)


def mm_to_hf(
    mm: Path, hf: Path, out: Path, *flags: str, converter: str = QWEN2VL, check: int | None = 0
) -> Done:
    words = ["--cfg.mm_dir", mm, "--cfg.hf_config.hf_dir", hf, "--cfg.save_hf_dir", out, *flags]
    return run_cli(converter, "mm_to_hf", *words, check=check)


def resplit(
    mm: Path, out: Path, *flags: str, converter: str = QWEN2VL, check: int | None = 0
) -> Done:
    words = ["--cfg.source_dir", mm, "--cfg.target_dir", out, *flags]
    return run_cli(converter, "resplit", *words, check=check)


# ------------------------------------------------------------------------------ outcomes
def none(differences: Iterable[str]) -> None:
    """Fail with the first of the differences, if there are any."""
    listed = list(differences)
    assert not listed, "\n".join(listed[:20])


def same_hf(want: Path, got: Path) -> None:
    """The weights, their map and the side files are those of `want`."""
    none(compare_hf(want, got) + compare_side_files(want, got))


def refused(done: Done, code: int, *expected: str, out: Path | None = None) -> None:
    """A clear error with the exit code `code` that says all of `expected`; nothing written.

    A number in `expected` must stand alone.
    """
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout == "", done.stdout
    plain = " ".join(done.stderr.split())
    for word in expected:
        pattern = rf"(?<![\w.]){word}(?!\w)" if word.isdigit() else re.escape(word)
        assert re.search(pattern, plain), f"{word!r} is not in: {done.stderr}"
    if out is not None:
        untouched(out)


def litter(out: Path) -> list[str]:
    """What stands beside `out` under names that a conversion makes up."""
    parent = out.parent
    return [p.name for p in parent.iterdir() if p.name.startswith(".")] if parent.is_dir() else []


def untouched(out: Path) -> None:
    """`out` is not there, and no staging folder either."""
    assert not out.exists(), f"{out} was written"
    assert litter(out) == []


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Every path below a folder with its mode, time and content."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        content: bytes | str = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        found[name] = (status.st_mode, status.st_mtime_ns, content)
    return found


# --------------------------------------------------------------------------- checkpoints
def rank_files(mm: Path) -> dict[str, Path]:
    """The rank files of an MM checkpoint by the name of their folder."""
    return {path.parent.name: path for path in sorted(mm.rglob(RANK_FILE))}


def edit_rank(mm: Path, rank: str, edit: Callable[[dict], object]) -> None:
    """Change the content of one rank file in place."""
    path = rank_files(mm)[rank]
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def read_single(hf: Path) -> Tensors:
    """The tensors of a checkpoint with one weight file."""
    return load_file(hf / "model.safetensors")


def edit_single(hf: Path, edit: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint with one weight file."""
    tensors = read_single(hf)
    edit(tensors)
    tensors = {name: t.clone().contiguous() for name, t in tensors.items()}
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def edit_index(hf: Path, edit: Callable[[dict], object]) -> None:
    """Change the weight map of a checkpoint in place."""
    edit_json(hf / INDEX, lambda index: edit(index["weight_map"]))


def copied(folder: Path, to: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(folder, to)
    return to


def install(folder: Path) -> Path:
    """A folder with the command ``mm-convert`` in it, to be put on the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "mm-convert"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mmconvert "$@"\n')
    script.chmod(0o755)
    return folder
