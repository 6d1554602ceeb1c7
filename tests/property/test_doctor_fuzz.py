"""Checkpoints damaged at random: doctor ends with a verdict, and calls nothing healthy that a
conversion refuses. What is damaged and how: see mutations.py.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inprocess import call
from mutations import KINDS, VERBS, Base, bounded, command, linked, make_base, mutate
from painting import tries

MODELS = ("qwen2vl-2b", "internvl2-76b")
VERDICTS = (0, 3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """The undamaged models."""
    folder = tmp_path_factory.mktemp("bases")
    return {model: make_base(model, folder / model) for model in MODELS}


def fault_of(random: Random, bases: dict[str, Base], work: Path) -> str:
    """Damage a checkpoint; what doctor got wrong about it, or ""."""
    base = bases[random.choice(sorted(bases))]
    verb = random.choice(VERBS)
    hf, mm, out = linked(base.hf, work / "hf"), linked(base.mm, work / "mm"), work / "out"
    mutation = random.choice(KINDS[verb])
    mutate(random, [mutation], hf, mm)
    # resplit needs no weights of hf_dir, so mm alone must be healthy enough for it.
    asked: list[list[Any]] = [[hf]] if verb == "hf_to_mm" else [[mm, "--hf_dir", hf]]
    if verb == "mm_to_hf":
        asked.append([hf])
    healthy = True
    with bounded():
        for words in asked:
            done = call("doctor", *words, "--json", "--values", check=None)
            if done.returncode not in VERDICTS:
                return f"{mutation.__name__}: exit code {done.returncode}: {done.stderr}"
            report = json.loads(done.stdout)
            if report.get("healthy") != (done.returncode == 0):
                return f"{mutation.__name__}: {report}"
            if not done.stdout.isascii():
                return f"{mutation.__name__}: raw characters in {done.stdout}"
            shown = call("doctor", *words, check=None).stdout
            if not all(c.isprintable() or c == "\n" for c in shown):
                return f"{mutation.__name__}: raw characters in {shown!r}"
            healthy = healthy and report["healthy"]
        if healthy:
            done = call(*command(base.model, verb, hf, mm, out), check=None)
            if done.returncode:
                return f"{mutation.__name__}: healthy, but {verb} says {done.stderr}"
    return ""


def run(seed: int, bases: dict[str, Base]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        fault = fault_of(Random(seed), bases, work)
        shutil.rmtree(work)
        assert not fault, fault


@tries(10)
@given(seed=st.integers(0, 2**32))
def test_damaged_checkpoints(bases: dict[str, Base], seed: int) -> None:
    run(seed, bases)


@pytest.mark.nightly
@tries(1500)
@given(seed=st.integers(0, 2**32))
def test_damaged_checkpoints_often(bases: dict[str, Base], seed: int) -> None:
    run(seed, bases)
