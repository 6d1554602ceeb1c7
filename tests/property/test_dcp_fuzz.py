"""Damaged DCP and torch_dist folders end in success or in one error; never in a crash or a hang."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import run_cli
from mmconvert.playground.checkpoints import make_hf
from painting import tries

SECONDS = 60  # far more than any of these takes: what is endless is found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model in each form."""
    folder = tmp_path_factory.mktemp("folders")
    hf = make_hf("qwen2.5vl-7b", folder / "hf", layers=1, vit_layers=1)
    for to in ("dcp", "torch_dist"):
        own = ("--cfg.hf_config.hf_dir", "--cfg.dcp_dir")
        source, target = own if to == "dcp" else ("--cfg.source", "--cfg.target")
        run_cli("AutoConverter", f"hf_to_{to}", source, hf, target, folder / to, check=0)
    return {"hf": hf, "dcp": folder / "dcp", "torch_dist": folder / "torch_dist"}


def damaged(random: Random, data: bytearray) -> bytearray:
    """One change at one place."""
    at = random.randrange(len(data))
    how = random.choice(("bit", "cut", "insert", "zeros", "huge", "twice", "swap"))
    if how == "bit":
        data[at] ^= 1 << random.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = random.randbytes(random.randrange(1, 9))
    elif how == "zeros":
        data[at : at + 8] = bytes(min(8, len(data) - at))
    elif how == "huge":
        data[at : at + 4] = b"\xff\xff\xff\x7f"
    elif how == "twice":
        data[at:at] = data[max(0, at - 64) : at]
    else:
        data[at : at + 64], data[:64] = data[:64], data[at : at + 64]
    return data


def check(folders: dict[str, Path], kind: str, seed: int) -> None:
    """Damages a copy, and asks everyone what they say of it."""
    random = Random(seed)
    with tempfile.TemporaryDirectory() as place:
        copy, out = Path(place) / "copy", Path(place) / "out"
        shutil.copytree(folders[kind] / "release", copy)
        path = copy / random.choice([".metadata"] * 3 + sorted(p.name for p in copy.iterdir()))
        path.write_bytes(damaged(random, bytearray(path.read_bytes())))
        hf, began = folders["hf"], time.monotonic()
        original = ("--cfg.hf_config.hf_dir", hf)
        to_hf = ("AutoConverter", f"{kind}_to_hf", *original)
        to_hf += ("--cfg.dcp_dir", copy) if kind == "dcp" else ("--cfg.source", copy)
        to_hf += ("--cfg.save_hf_dir", out) if kind == "dcp" else ("--cfg.target", out)
        for words in (("inspect", copy), ("doctor", copy), ("verify", copy, hf), to_hf):
            done = run_cli(*words)
            assert done.returncode in (0, 1, 2, 3), (seed, words, done.stderr)
            assert "Traceback" not in done.stderr
            if words is to_hf and done.returncode:
                assert not out.exists()
                assert "error: " in done.stderr
                assert "expected: " in done.stderr
        assert time.monotonic() - began < SECONDS, seed


@tries(8)
@given(kind=st.sampled_from(("dcp", "torch_dist")), seed=st.integers(0, 2**32))
def test_damaged_folders(folders: dict[str, Path], kind: str, seed: int) -> None:
    check(folders, kind, seed)


@pytest.mark.nightly
@tries(600)
@given(kind=st.sampled_from(("dcp", "torch_dist")), seed=st.integers(0, 2**32))
def test_many_damaged_folders(folders: dict[str, Path], kind: str, seed: int) -> None:
    check(folders, kind, seed)
