"""The completion script, run by the shell that it is for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cli import run_cli
from commands import refused


def complete(shim: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    asked = " ".join(f"'{word}'" for word in ("mm-convert", *words))
    script = (
        'eval "$(mm-convert completion bash)"\n'
        f"COMP_WORDS=({asked}); COMP_CWORD={len(words)}\n"
        '_mm_convert; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{shim}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_every_word(
    shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complete(shim, "Qwen2V") == ["Qwen2VLConverter"]
    assert complete(shim, "ver") == ["verify"]
    assert complete(shim, "Qwen2VLConverter", "") == ["hf_to_mm", "mm_to_hf", "resplit"]
    assert complete(shim, "QwenVLConverter", "") == ["hf_to_ms", "ms_to_hf", "resplit"]
    flags = complete(shim, "Qwen2VLConverter", "hf_to_mm", "--cfg.parallel_config.vit")
    assert flags == ["--cfg.parallel_config.vit_pp_layers", "--cfg.parallel_config.vit_tp_size"]
    assert complete(shim, "inspect", "--te") == ["--tensors"]
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    assert complete(shim, "inspect", "check") == ["checkpoint"]


def test_other_shells_are_refused() -> None:
    refused(run_cli("completion", "fish"), 2, "fish", "bash or zsh")
    refused(run_cli("completion"), 2, "bash or zsh")
    assert "bashcompinit" in run_cli("completion", "zsh", check=0).stdout
