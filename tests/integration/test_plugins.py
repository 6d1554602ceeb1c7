"""Families of other packages that are broken: one error for who asks for them, a note else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import run_cli
from mmconvert import converters
from mmconvert.playground.checkpoints import make_hf

GOOD = """
from dataclasses import replace
from mmconvert.converters.qwen2vl import FAMILY as QWEN
FAMILY = replace(QWEN, name="Broken", converter="BrokenConverter",
                 model_types=frozenset({"qwen2_vl_of_mine"}))
"""
AT_IMPORT = {
    "raises": "raise ValueError('my fault')",
    "is no Python": "def (",
    "is not there": None,
    "misses a library": "import a_library_of_mine",
    "exits": "import sys; sys.exit(5)",
    "has no family": "OTHER = 1",
    "is something else": "FAMILY = 5",
    "has no table": GOOD + "FAMILY = replace(FAMILY, modules=lambda variant: 1 / 0)",
    "has a table of text": GOOD + "FAMILY = replace(FAMILY, modules=lambda variant: ('x',))",
    "has no function": GOOD + "FAMILY = replace(FAMILY, modules=5)",
    "has numbers for types": GOOD + "FAMILY = replace(FAMILY, model_types=frozenset({5}))",
    "has no types": GOOD + "FAMILY = replace(FAMILY, model_types=None)",
    "has no variants": GOOD + "FAMILY = replace(FAMILY, variants=5)",
}
AT_USE = {
    "dims raises": "FAMILY = replace(FAMILY, dims=lambda config: config['no such key'])",
    "dims is None": "FAMILY = replace(FAMILY, dims=lambda config: None)",
    "text_config exits": "FAMILY = replace(FAMILY, text_config=lambda config: exit(3))",
    "traits raise": "FAMILY = replace(FAMILY, traits=lambda config: [].pop())",
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process: no package has been imported, and nothing was left out."""
    monkeypatch.setattr(converters, "BROKEN", {})
    yield
    sys.modules.pop("broken_family", None)


def install(folder: Path, code: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has commands find the package."""
    info = folder / "site" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    point = "[mmconvert.families]\nBrokenConverter = broken_family:FAMILY\n"
    (info / "entry_points.txt").write_text(point)
    if code is not None:
        (folder / "site" / "broken_family.py").write_text(code)
    monkeypatch.syspath_prepend(folder / "site")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf("qwen2vl-2b", tmp_path_factory.mktemp("hf") / "hf", layers=2, vit_layers=1)


@pytest.mark.parametrize("code", AT_IMPORT.values(), ids=AT_IMPORT.keys())
def test_a_package_that_cannot_be_loaded(
    code: str | None, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, code, monkeypatch)
    words = ("hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "mm", "--dry-run")
    done = run_cli("BrokenConverter", *words, check=2)
    assert "BrokenConverter" in done.stderr and "Traceback" not in done.stderr
    done = run_cli("AutoConverter", *words, "--json", check=0)
    assert json.loads(done.stdout)["written"] is False
    assert done.stderr.count("note: left out: ") == 1 and "BrokenConverter" in done.stderr


@pytest.mark.parametrize("code", AT_USE.values(), ids=AT_USE.keys())
def test_a_family_that_fails_when_it_is_used(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, GOOD + code, monkeypatch)
    hf = make_hf(
        "qwen2vl-2b",
        tmp_path / "hf",
        edit_config=lambda config: config | {"model_type": "qwen2_vl_of_mine"},
        layers=2,
        vit_layers=1,
    )
    words = ("hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "mm", "--dry-run")
    done = run_cli("BrokenConverter", *words, check=2)
    assert "BrokenConverter" in done.stderr and "fails in" in done.stderr
    assert "Traceback" not in done.stderr
