"""Tiny checkpoints that the integration tests share; they must not be changed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from cli import run_cli
from commands import hf_to_mm, install, layout
from mmconvert.playground.checkpoints import make_hf


@pytest.fixture(scope="session")
def tied_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL with 4 text and 2 vision layers, tied embeddings, two weight files."""
    out = tmp_path_factory.mktemp("tied") / "hf"
    return make_hf("qwen2vl-2b", out, layers=4, vit_layers=2)


@pytest.fixture(scope="session")
def untied_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output layer of its own and three weight files."""
    out = tmp_path_factory.mktemp("untied") / "hf"
    return make_hf("qwen2vl-2b", out, layers=4, vit_layers=2, tie=False, shards=3)


@pytest.fixture(scope="session")
def tied_mm(tied_hf: Path) -> Path:
    """`tied_hf` on one pipeline stage and one tp rank."""
    out = tied_hf.with_name("mm")
    hf_to_mm(tied_hf, out, *layout("[4]", "[2]"))
    return out


@pytest.fixture(scope="session")
def tied_mm22(tied_hf: Path) -> Path:
    """`tied_hf` on two stages of two tp ranks."""
    out = tied_hf.with_name("mm22")
    hf_to_mm(tied_hf, out, *layout("[2,2]", "[2,0]", 2))
    return out


@pytest.fixture(scope="session")
def untied_mm22(untied_hf: Path) -> Path:
    """`untied_hf` on two stages of two tp ranks."""
    out = untied_hf.with_name("mm22")
    hf_to_mm(untied_hf, out, *layout("[2,2]", "[2,0]", 2))
    return out


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command mm-convert."""
    return install(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The playground, made once for all processes of the run; it must not be changed."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made = shared / "playground" / "play"
    with (shared / "playground.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            run_cli("playground", made, check=0)
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that is not there yet, alone in its parent."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "out"
