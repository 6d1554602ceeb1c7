"""Megatron's own optimizers go on from a resplit checkpoint as if nothing had happened.

Megatron trains in one layout and saves; the checkpoint is resplit with its optimizer; Megatron
loads that in the other layout and takes one more step. What it saves then must be, to the bit and
in every number of its groups, what a resplit of the unsplit run's next checkpoint gives. All
differences are 0 (megatron-core 0.16.1, torch 2.13).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from api import Shape, to_mm
from commands import RANK_FILE, resplit, target
from megatron_text import WORLD
from megatron_training import Run, work
from nights import nightly
from tinymodels import VIT_LAYERS, save, tiny_model

CONVERTER = "Qwen2VLConverter"
STEPS = 3
Grid = list[list[int]]


class Form(NamedTuple):
    """A layout: text layers by virtual stage and pipeline rank, and the tensor-parallel size."""

    llm: Grid
    tp: int = 1

    @property
    def vit(self) -> Grid:
        """The vision encoder on the first stage."""
        return [[VIT_LAYERS if not (v or p) else 0 for p in range(len(row))]
                for v, row in enumerate(self.llm)]  # fmt: skip


ONE, TP2 = Form([[4]]), Form([[4]], 2)
PP2, VPP2 = Form([[1, 3]]), Form([[1, 1], [1, 1]])


class Case(NamedTuple):
    """From which layout to which, and how Megatron trains."""

    first: Form
    second: Form
    distributed: bool = False
    tied: bool = False
    frozen: tuple[str, ...] = ()
    bucket: int = 0


CASES = {
    "tp 1 to tp 2": Case(ONE, TP2),
    "tp 2 to pp 2, tied": Case(TP2, PP2, tied=True),
    "pp 2 to one rank, frozen encoder": Case(PP2, ONE, frozen=("image_encoder.encoder",)),
    "one rank to virtual stages": Case(ONE, VPP2),
    "virtual stages to tp 2, tied": Case(VPP2, TP2, tied=True),
    "distributed: tp 1 to tp 2": Case(ONE, TP2, True),
    "distributed: tp 2 to pp 2, tied": Case(TP2, PP2, True, True),
    "distributed: pp 2 to one rank, tied": Case(PP2, ONE, True, True),
    "distributed: one rank to virtual stages": Case(ONE, VPP2, True),
    "distributed: buckets, frozen": Case(ONE, PP2, True, frozen=("image_encoder.encoder",),
                                         bucket=30_000),
    "distributed: buckets to tp 2": Case(PP2, TP2, True, bucket=30_000),
}  # fmt: skip
# Both optimizers, tensor ranks, stages and virtual stages on either side, tied, frozen, in buckets.
TODAY = (
    *("tp 2 to pp 2, tied", "pp 2 to one rank, frozen encoder", "virtual stages to tp 2, tied"),
    *("distributed: tp 2 to pp 2, tied", "distributed: one rank to virtual stages"),
    *("distributed: buckets, frozen", "distributed: buckets to tp 2"),
)


class Trained(NamedTuple):
    """What Megatron saved after its step in the other layout, and what it should have."""

    found: Path
    expected: Path


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    """The cases that are to be tried, trained by as few processes as there can be."""
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed (it is in the extra dev)")
    import_module("megatron.core.models.gpt")  # once; the ranks are forked
    import_module("megatron.core.optimizer")
    torch.set_num_threads(1)  # threads do not survive that
    folder = tmp_path_factory.mktemp("megatron")
    hf: dict[bool, Path] = {}
    text: dict[str, Any] = {}
    for tied in (False, True):
        model = tiny_model("qwen2_vl", tied=tied, dtype=torch.bfloat16)
        hf[tied] = save(model, folder / f"hf{tied}")
        text = model.config.text_config.to_dict()
    first: list[Run] = []
    second: list[Run] = []
    found: dict[str, Trained] = {}
    asked = {item.name for item in request.session.items}
    cases = {n: c for n, c in CASES.items() if f"{test_megatron_goes_on.__name__}[{n}]" in asked}
    for number, (name, case) in enumerate(cases.items()):
        here = folder / str(number)
        here.mkdir()
        to_mm(CONVERTER, hf[case.tied], here / "mm", Shape(case.first.vit, *case.first))
        how = (case.distributed, case.tied, case.frozen, case.bucket)
        for steps in (STEPS, STEPS + 1):
            first.append(Run(here / "mm", here / f"a{steps}", *case.first, steps, *how))
        second.append(Run(here / f"b{STEPS}", here / "b", *case.second, 1, *how))
        found[name] = Trained(here / "b", here / f"b{STEPS + 1}")
    _train(folder / "first", text, first)
    for run, case in zip(second, cases.values(), strict=True):
        for steps in (STEPS, STEPS + 1):
            source, to = run.target.parent / f"a{steps}", run.target.parent / f"b{steps}"
            known = ["--cfg.hf_config.hf_dir", str(hf[case.tied])]
            resplit(source, to, *_flags(case.second), "--optimizer", *known)
    _train(folder / "second", text, second)
    return found


def _flags(form: Form) -> list[str]:
    llm, vit = (str(grid).replace(" ", "") for grid in (form.llm, form.vit))
    return target(llm, vit, form.tp)


def _train(folder: Path, text: dict[str, Any], runs: list[Run]) -> None:
    folder.mkdir()
    start_processes(work, (folder, text, runs), nprocs=WORLD, start_method="fork")


def _load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=path.name != RANK_FILE)


def _differences(a: object, b: object, where: str = "") -> Iterator[str]:
    """Everything in which two trees of containers, numbers and tensors differ."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            largest = (a.double() - b.double()).abs().max() if a.shape == b.shape else "shape"
            yield f"{where}: {largest}"
    elif isinstance(a, dict) and isinstance(b, dict):
        if set(a) != set(b) or (where.startswith("['model") and list(a) != list(b)):
            yield f"{where}: {list(a)[:9]} and {list(b)[:9]}"
        for key in a.keys() & b.keys():
            yield from _differences(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (one, two) in enumerate(zip(a, b, strict=True)):
            yield from _differences(one, two, f"{where}[{i}]")
    elif a != b:
        yield f"{where}: {a!r} and {b!r}"


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(CASES, but=TODAY))
def test_megatron_goes_on(trained: dict[str, Trained], name: str) -> None:
    found, expected = trained[name]
    files = sorted(path.relative_to(found) for path in found.rglob("*.pt"))
    assert files == sorted(path.relative_to(expected) for path in expected.rglob("*.pt"))
    assert len(files) == len(list(found.rglob(RANK_FILE))) * (1 + CASES[name].distributed)
    for file in files:
        a, b = _load(found / file), _load(expected / file)
        for content in (a, b):
            content.pop("rng_state", None)
            content.pop("args", None)
            for part in [key for key in content if str(key).startswith("model")]:
                content[part] = {n: t for n, t in content[part].items() if t is not None}
        assert list(_differences(a, b)) == []
