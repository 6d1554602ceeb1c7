"""Standard streams and terminals of every kind: closed, full, narrow; and what is printed there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli import run_cli
from commands import QWEN2VL, hf_to_mm
from mmconvert.playground.checkpoints import make_hf
from nights import night

FULL = Path("/dev/full")  # Linux, full(4): every write fails as on a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="only Linux has /dev/full")


def shell(redirections: str, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line with redirections of the shell, such as ``>&-``."""
    command = [sys.executable, "-m", "mmconvert", *map(str, words)]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *command],
        env={**os.environ, "PYTHONUNBUFFERED": "", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def conversion(hf: Path, out: Path) -> list[str | Path]:
    return [QWEN2VL, "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", out]


# ------------------------------------------------------------------------------ closed streams
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_conversion_without_standard_streams(closed: str, tied_hf: Path, out: Path) -> None:
    done = shell(closed, *conversion(tied_hf, out))
    assert (done.returncode, "fault" in done.stderr) == (0, False), done.stderr
    run_cli("verify", tied_hf, out, check=0)


@pytest.mark.parametrize("closed", [night(">&-"), night("2>&-"), ">&- 2>&-"])
def test_exit_codes_without_standard_streams(closed: str, tied_hf: Path, out: Path) -> None:
    assert shell(closed, "inspect", tied_hf).returncode == 0
    assert shell(closed, "verify", tied_hf, out).returncode == 3


# -------------------------------------------------------------------------------- full streams
@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["words", "json"])
def test_a_full_standard_output(
    flags: list[str], unbuffered: str, tied_hf: Path, out: Path
) -> None:
    words = [*conversion(tied_hf, out), *flags]
    done = shell(f">{FULL}", *words, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2, done.stderr
    assert "could not be printed" in done.stderr
    assert "nothing was left" not in done.stderr, "the checkpoint is there"
    assert "Exception ignored" not in done.stderr
    run_cli("verify", tied_hf, out, check=0)


@needs_full
def test_a_full_standard_error_stops_no_conversion(tied_hf: Path, out: Path) -> None:
    words = [*conversion(tied_hf, out), "--drop", "no such tensor"]  # which gives a note
    done = shell(f"2>{FULL}", *words)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("wrote ")
    again = shell(f"2>{FULL}", *words)
    assert again.returncode == 2, "what exists is not overwritten; 1 would mean a difference"


# ---------------------------------------------------------------------------- narrow terminals
@pytest.mark.parametrize("columns", ["1", night("5"), "20"])
def test_a_narrow_terminal(
    columns: str, tied_hf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    help_text = run_cli(QWEN2VL, "hf_to_mm", "-h", check=0).stdout
    assert "--cfg.mm_dir" in help_text
    assert "--cfg.mm_dir" in run_cli(QWEN2VL, "hf_to_mm", check=2).stderr
    hf_to_mm(tied_hf, out)
    for words in (["inspect", out], ["suggest", tied_hf, "--pp", "2"]):
        assert "rank" in run_cli(*words, check=0).stdout


def test_headings_keep_whole_words(
    tied_hf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 60 columns, numbers with their units too."""
    hf_to_mm(tied_hf, out)
    monkeypatch.setenv("COLUMNS", "60")
    for words in (["inspect", out], ["suggest", tied_hf, "--pp", "2", "--tp", "2"]):
        shown = run_cli(*words, check=0).stdout
        assert "…" not in shown
    assert {"parameters", "weights", "layers", "TFLOP"} <= set(shown.split())
    assert re.search(r"\d kB$", shown, re.MULTILINE)


# ----------------------------------------------------------------------- names from strangers
def test_a_terminal_obeys_no_name(out: Path, tmp_path: Path) -> None:
    evil = "evil\x1b[2J\nerror: \u202ella"
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", extra=[(evil, [2])], layers=4, vit_layers=2)
    done = hf_to_mm(hf, out, check=3)
    assert "evil\\x1b[2J\\nerror: \\u202ella" in done.stderr
    noted = hf_to_mm(hf, out, "--drop", "evil*", check=0).stderr
    assert "evil" in noted, "a note says what is left out"
    for printed in (done.stderr, noted):
        assert all(line.isprintable() for line in printed.splitlines()), repr(printed)
    told = json.loads(hf_to_mm(hf, tmp_path / "other", "--json", check=3).stdout)
    assert evil in told["what"], "JSON escapes by itself"


def test_a_terminal_obeys_no_name_of_an_output(tied_hf: Path, tmp_path: Path) -> None:
    name = "evil\x1b[2J\nwrote \u202ella"
    (tmp_path / "in").mkdir()
    for words in (
        (QWEN2VL, "hf_to_mm", "--cfg.hf_config.hf_dir", tied_hf, "--cfg.mm_dir", tmp_path / name),
        ("inspect", tied_hf, "--svg", tmp_path / f"{name}.svg"),
        ("inspect", tied_hf, "--html", tmp_path / f"{name}.html"),
        ("diff", tied_hf, tied_hf, "--html", tmp_path / f"{name}2.html"),
        ("model_json", tied_hf, "--llm-pp-layers", "[4]", "--vit-pp-layers", "[2]", "--output",
         tmp_path / f"{name}.json"),
        ("playground", tmp_path / f"{name}-play"),
    ):  # fmt: skip
        printed = run_cli(*words, check=0).stdout
        assert "evil\\x1b[2J\\nwrote \\u202ella" in printed, words
        assert all(line.isprintable() for line in printed.splitlines()), repr(printed)


# ------------------------------------------------------------------------------- empty folders
@pytest.mark.parametrize("flag", ["--cfg.mm_dir", "--cfg.hf_config.hf_dir"])
def test_a_folder_flag_that_is_empty(flag: str, tied_hf: Path, tmp_path: Path) -> None:
    folders = {"--cfg.mm_dir": "out", "--cfg.hf_config.hf_dir": str(tied_hf)} | {flag: ""}
    words = [word for pair in folders.items() for word in pair]
    here = tmp_path / "here"
    here.mkdir()
    done = run_cli(QWEN2VL, "hf_to_mm", *words, cwd=here, check=2, process=True)
    assert f"{flag} is empty" in done.stderr
    assert list(here.iterdir()) == []
