"""What only some systems have is taken away, and the main job is done all the same.

Windows has no positioned calls, no locks of ``fcntl``, no ``fork``, no signals but a few; macOS has
neither ``splice``, ``copy_file_range`` nor ``posix_fallocate``. How paths and renames behave is not
shown.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import copied
from nights import nightly

ROOT = Path(__file__).parents[2]
LINUX_ONLY = (
    *("copy_file_range", "posix_fallocate", "posix_fadvise", "sched_getaffinity", "O_TMPFILE"),
    *("memfd_create", "splice", "RWF_NOWAIT"),
)
POSIX_ONLY = (
    *LINUX_ONLY,
    *("pread", "preadv", "pwrite", "pwritev", "fork", "fchmod", "major", "minor"),
    *(
        "O_DIRECTORY",
        "O_NOFOLLOW",
        "O_CLOEXEC",
        "O_NONBLOCK",
        "getuid",
        "geteuid",
        "mkfifo",
        "chown",
        *("fdatasync", "sync", "killpg", "setsid", "getpgid", "getpgrp", "sysconf"),
        *("lchown", "fchown", "waitid", "register_at_fork", "readv", "writev", "O_SYNC"),
    ),
)
SIGNALS = ("SIGALRM", "alarm", "SIGPIPE", "SIGHUP", "SIGKILL", "pthread_sigmask", "setitimer")
SYSTEMS = {"macOS": (LINUX_ONLY, (), ()), "Windows": (POSIX_ONLY, SIGNALS, ("fcntl", "resource"))}

# Standard library first: its own modules may need what is taken away from ours.
BEGIN = """
import os, signal, sys, subprocess, shutil, tempfile, concurrent.futures, multiprocessing, zipfile
import importlib.metadata, numpy, yaml, rich.console, rich.progress, rich.table, tyro
for module, names in ((os, {names!r}), (signal, {signals!r})):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in {modules!r}:
    sys.modules[name] = None
sys.argv = ["mm-convert"]
from mmconvert.cli import main
"""


def script(system: str, *lines: str) -> str:
    names, signals, modules = SYSTEMS[system]
    return BEGIN.format(names=names, signals=signals, modules=modules) + "\n".join(lines)


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", text]
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder)},
    )  # fmt: skip


def call(*words: str, code: int = 0) -> str:
    return f"assert main({list(words)!r}) == {code}, {words!r}"


@pytest.mark.nightly
@pytest.mark.parametrize("system", SYSTEMS)
def test_tools_and_other_formats(system: str, tmp_path: Path) -> None:
    hf = ("--cfg.hf_config.hf_dir", "play/hf")
    family = "Qwen2VLConverter"
    adapter = ("--cfg.lora_dir", "play/adapter", "--cfg.save_dir", "merged")
    done = run(
        script(
            system,
            call("playground", "play", "--quiet"),
            call("diff", "play/base", "play/trained", "--svg", "diff.svg", code=1),
            call("suggest", "play/hf", "--pp", "4"),
            call("roundtrip", "play/hf"),
            call("model_json", "play/hf", "--output", "model.json"),
            call(family, "lora_merge", "--cfg.base_dir", "play/hf", *adapter),
            call(family, "hf_to_dcp", *hf, "--cfg.dcp_dir", "dcp"),
            call(family, "dcp_to_mm", "--cfg.dcp_dir", "dcp", *hf, "--cfg.mm_dir", "mm"),
            call(family, "resplit", "--cfg.source_dir", "mm", "--cfg.target_dir", "mm2",
                 "--cfg.target_parallel_config.tp_size", "2"),
            call("verify", "play/hf", "mm2"),
            call("QwenVLConverter", "hf_to_ms", "--cfg.hf_config.hf_dir", "play/hf_qwenvl",
                 "--cfg.ms_path", "q.ckpt"),
            call("verify", "play/hf_qwenvl", "q.ckpt"),
            call("moe_expert", "--style", "merge", "--hf_dir", "play/hf_glm45v",
                 "--save_dir", "glm"),
            call("doctor", "dcp"),
        ),
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_several_processes_are_refused_without_locks(playground: Path, tmp_path: Path) -> None:
    copied(playground, tmp_path / "play")
    hf = ("--cfg.hf_config.hf_dir", "play/hf")
    words = ("Qwen2VLConverter", "hf_to_mm", *hf, "--cfg.mm_dir", "mm", "--ranks", "0/2")
    done = run(script("Windows", call(*words, code=2)), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "leave --ranks out" in done.stderr
    assert not (tmp_path / "mm").exists()


@pytest.mark.slow
@pytest.mark.parametrize("system", nightly(SYSTEMS, but=("Windows",)))
def test_a_checkpoint_goes_there_and_back(
    system: str, playground: Path, tied_hf: Path, tmp_path: Path
) -> None:
    copied(tied_hf, tmp_path / "play" / "hf")
    copied(playground / "coco", tmp_path / "play" / "coco")
    shutil.copy(playground / "llava.json", tmp_path / "play")
    hf, mm = ("--cfg.hf_config.hf_dir", "play/hf"), ("--cfg.mm_dir", "mm")
    layout = ("--cfg.parallel_config.tp_size", "2")
    converter = "Qwen2VLConverter"
    done = run(
        script(
            system,
            call(converter, "hf_to_mm", *hf, *mm, *layout, "--dry_run", "--quiet"),
            call(converter, "hf_to_mm", *hf, *mm, *layout, "--digests"),
            call(converter, "hf_to_mm", *hf, *mm, code=2),
            call(converter, "hf_to_mm", *hf, *mm, "--overwrite", "--dtype", "fp32"),
            call("verify", "play/hf", "mm", code=1),
            call(converter, "mm_to_hf", *mm, *hf, "--cfg.save_hf_dir", "back", "--dtype", "bf16"),
            call("verify", "play/hf", "back"),
            call("inspect", "mm", "--html", "report.html"),
            call("doctor", "mm", "--hf_dir", "play/hf"),
            call("data", "llava-to-mllm", "--llava_json_path", "play/llava.json", "--coco_path",
                 "play/coco", "--image_prefix", "train2014/COCO_train2014_",
                 "--output_json_path", "mllm.json"),
        ),
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".mm")]


def test_what_is_taken_away_is_missed(tmp_path: Path) -> None:
    """The script does take things away: a program that needs them fails."""
    done = run(script("Windows", "os.pread(0, 1, 0)"), tmp_path)
    assert "AttributeError" in done.stderr
    done = run(script("Windows", "import fcntl"), tmp_path)
    assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr
