"""Damaged checkpoints end in success or in an error, never in a crash, a hang or a loss.

What is damaged and how an outcome is judged: see mutations.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mutations
from mutations import KINDS, MODELS, Base, linked, make_base, mutate, try_one
from painting import tries

SLOW_RUNS = 4000
WORKERS = 2


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """The undamaged models."""
    folder = tmp_path_factory.mktemp("bases")
    return {model: make_base(model, folder / model) for model in MODELS}


@tries(40, nightly=120)
@given(seed=st.integers(0, 2**32))
def test_damaged_checkpoints(bases: dict[str, Base], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        outcome = try_one(Random(seed), bases, work)
        assert not outcome.fault, outcome


def test_undamaged_checkpoints_succeed(
    bases: dict[str, Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge finds no fault with what is right, and a conversion that loses a tensor it does."""
    monkeypatch.setattr(mutations, "KINDS", dict.fromkeys(mutations.VERBS, (_nothing,)))
    for number in range(12):
        work = tmp_path / str(number)
        work.mkdir()
        outcome = try_one(Random(number), bases, work)
        assert (outcome.code, outcome.fault) == (0, ""), outcome
    one = {verb: {"x": {"y"}} for verb in mutations.VERBS}
    expected = {model: base._replace(expected=one) for model, base in bases.items()}
    monkeypatch.setattr(mutations, "VERBS", ("resplit",))
    (tmp_path / "work").mkdir()
    assert "instead of 1" in try_one(Random(0), expected, tmp_path / "work").fault


def _nothing(random: Random, hf: Path, mm: Path) -> None:
    del random, hf, mm


def test_a_mutation_fails_on_ruins_alone(bases: dict[str, Base], tmp_path: Path) -> None:
    """Every kind damages a whole checkpoint; one that finds it damaged already may give up."""
    kinds = sorted({kind for kinds in KINDS.values() for kind in kinds}, key=lambda k: k.__name__)
    base, gave_up = bases["qwen2vl-2b"], 0
    for number, kind in enumerate(kinds):
        for then in kinds:
            folder = tmp_path / kind.__name__ / then.__name__
            hf, mm = linked(base.hf, folder / "hf"), linked(base.mm, folder / "mm")
            gave_up += mutate(Random(number), [kind, then], hf, mm) < 2
            shutil.rmtree(folder)
    assert gave_up


@pytest.mark.nightly
def test_damaged_checkpoints_often(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of bounded memory; one conversion that takes too long is a fault too."""
    seed = 1 if settings().derandomize else Random().randrange(2**32)
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    workers = []
    for number in range(WORKERS):
        words = [str(seed + number), str(SLOW_RUNS // WORKERS), str(tmp_path / str(number))]
        command = [sys.executable, mutations.__file__ or "", *words]
        workers.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    ended: Counter[str] = Counter()
    faults = []
    for worker in workers:
        out, _ = worker.communicate(timeout=3600)
        assert worker.returncode == 0, f"a worker ended with {worker.returncode} (seed {seed})"
        report = json.loads(out.splitlines()[-1])
        ended.update(report["ended"])
        faults += report["faults"]
    with capsys.disabled():
        print(f"\n{sum(ended.values())} mutations, seed {seed}: {dict(sorted(ended.items()))}")
    assert sum(ended.values()) == SLOW_RUNS
    assert not faults, f"seed {seed}: {len(faults)} faults, such as {faults[:5]}"
