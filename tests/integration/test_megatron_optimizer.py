"""Megatron's own optimizers go on from a resplit checkpoint as if nothing had happened.

Megatron trains in one layout and saves; the checkpoint is resplit with its optimizer; Megatron
loads that in the other layout and takes one more step. What it saves then must be, to the bit and
in every number of its groups, what a resplit of the unsplit run's next checkpoint gives. All
differences are 0 (megatron-core 0.16.1, and 0.12.1 by `make megatron12`; torch 2.13).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

import mmconvert
import tinymoe
from cli import run_cli
from commands import RANK_FILE, hf_to_mm, layout, resplit, target
from megatron_training import Run, work
from mmconvert.config import Options
from nights import nightly
from tinymodels import VIT_LAYERS, save, tiny_model

STEPS = 3
Grid = list[list[int]]


class Form(NamedTuple):
    """A layout: text layers by virtual stage and pipeline rank, sizes of tp and ep."""

    llm: Grid
    tp: int = 1
    ep: int = 1
    vision: int = VIT_LAYERS

    def flags(self) -> tuple[str, str, int, str]:
        """The layout in flags; the vision encoder is on the first stage."""
        vit = [[self.vision if not (v or p) else 0 for p in range(len(row))]
               for v, row in enumerate(self.llm)]  # fmt: skip
        llm, vision = (str(grid).replace(" ", "") for grid in (self.llm, vit))
        return llm, vision, self.tp, f"ep_size={self.ep}"


ONE, TP2 = Form([[4]]), Form([[4]], 2)
PP2, VPP2 = Form([[1, 3]]), Form([[1, 1], [1, 1]])
EP1, EP2, EP4 = (Form([[3]], 1, ep, 3) for ep in (1, 2, 4))
TP2_EP2, PP2_EP2 = Form([[3]], 2, 2, 3), Form([[1, 2]], 1, 2, 3)
PP2_EP1 = Form([[1, 2]], 1, 1, 3)
VPP2_EP2 = Form([[1, 1], [1, 0]], 1, 2, 3)


class Case(NamedTuple):
    """From which layout to which, and how Megatron trains.

    Attributes:
        then: the kind of optimizer that goes on, where it is another; it is fused.
        fused: with its step in the groups; not given: where it is distributed.
        dense: the first text layer has no experts, and is alone on its stage.
    """

    first: Form
    second: Form
    distributed: bool = False
    tied: bool = False
    frozen: tuple[str, ...] = ()
    bucket: int = 0
    then: str = ""
    fused: bool | None = None
    dense: bool = False

    @property
    def ends_distributed(self) -> bool:
        """Whether the optimizer that goes on is distributed."""
        return self.then == "distributed" if self.then else self.distributed


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
    "plain, torch's, to distributed, tied": Case(TP2, PP2, tied=True, then="distributed"),
    "plain, fused, to distributed, buckets": Case(PP2, ONE, frozen=("image_encoder.encoder",),
                                                  bucket=30_000, then="distributed", fused=True),
    "distributed to plain, tied": Case(VPP2, TP2, True, tied=True, then="plain", fused=True),
}  # fmt: skip


# Both optimizers, tensor ranks, stages and virtual stages on either side, tied, frozen, in buckets,
# and from one optimizer to the other.
TODAY = (
    *("virtual stages to tp 2, tied", "distributed: one rank to virtual stages"),
    *("distributed: buckets, frozen", "plain, torch's, to distributed, tied"),
    "distributed to plain, tied",
)
# On four processes, so that experts have a data-parallel group of their own.
EXPERTS = {
    "ep 2 to one rank": Case(EP2, EP1),
    "one rank to tp 2 ep 2": Case(EP1, TP2_EP2),
    "tp 2 ep 2 to ep 4, frozen encoder": Case(TP2_EP2, EP4, frozen=("image_encoder.encoder",)),
    "ep 2 to pp 2 ep 2": Case(EP2, PP2_EP2),
    "distributed: ep 2 to one rank": Case(EP2, EP1, True),
    "distributed: one rank to ep 4": Case(EP1, EP4, True),
    "distributed: ep 2 to tp 2 ep 2": Case(EP2, TP2_EP2, True),
    "distributed: tp 2 ep 2 to pp 2 ep 2": Case(TP2_EP2, PP2_EP2, True),
    "distributed: pp 2 ep 2 to virtual stages, buckets": Case(PP2_EP2, VPP2_EP2, True,
                                                              bucket=10_000),
    "a stage without experts": Case(PP2_EP1, PP2_EP2, dense=True),
    "distributed: a stage without experts": Case(PP2_EP2, PP2_EP1, True, dense=True),
    "distributed: another stage without experts": Case(PP2_EP1, PP2_EP2, True, dense=True),
    "distributed to plain: ep 2 to tp 2 ep 2": Case(EP2, TP2_EP2, True, then="plain", fused=True),
    "plain to distributed: ep 4 to ep 2": Case(EP4, EP2, then="distributed", fused=True),
}  # fmt: skip


EXPERTS_TODAY = ("one rank to tp 2 ep 2", "distributed: tp 2 ep 2 to pp 2 ep 2")


class Trained(NamedTuple):
    """What Megatron saved in the first layout, and what resplit made of it; what Megatron saved
    after its step in the other layout, and what it should have.
    """

    source: Path
    resplit: Path
    found: Path
    expected: Path


class Source(NamedTuple):
    """A Hugging Face checkpoint, and the settings of its text decoder."""

    hf: Path
    text: dict[str, Any]


def _is_old() -> bool:
    """Whether this is Megatron before 0.13, whose step waits for ever where a stage alone has no
    experts: each optimizer of the others asks it for its norm.
    """
    from megatron.core import package_info

    version: tuple[int, int] = (int(package_info.MAJOR), int(package_info.MINOR))
    return version < (0, 13)


def _needs_megatron() -> None:
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed (it is in the extra dev)")
    import_module("megatron.core.models.gpt")  # once; the ranks are forked
    import_module("megatron.core.optimizer")
    torch.set_num_threads(1)  # threads do not survive that


def _asked(
    request: pytest.FixtureRequest, test: Callable[..., None], cases: dict[str, Case]
) -> dict[str, Case]:
    """The cases that are to be tried: they are trained by as few processes as there can be."""
    asked = {item.name for item in request.session.items}
    return {n: case for n, case in cases.items() if f"{test.__name__}[{n}]" in asked}


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    _needs_megatron()
    folder = tmp_path_factory.mktemp("megatron")
    sources: list[Source] = []
    for tied in (False, True):
        model = tiny_model("qwen2_vl", tied=tied, dtype=torch.bfloat16)
        sources.append(Source(save(model, folder / f"hf{tied}"), _text(model)))
    return _trained(folder, _asked(request, test_megatron_goes_on, CASES), sources, world=2)


@pytest.fixture(scope="module")
def experts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    _needs_megatron()
    folder = tmp_path_factory.mktemp("megatron_experts")
    sources: list[Source] = []
    for dense in ([], [0]):
        model = tinymoe.qwen3vl_moe(mlp_only_layers=dense).bfloat16()
        sources.append(Source(tinymoe.save(model, folder / f"hf{len(dense)}"), _text(model)))
    cases = _asked(request, test_megatron_goes_on_with_experts, EXPERTS)
    cases = {name: case for name, case in cases.items() if not (case.dense and _is_old())}
    return _trained(folder, cases, sources, world=4)


def _text(model: Any) -> dict[str, Any]:
    return model.config.text_config.to_dict()


def _trained(
    folder: Path, cases: dict[str, Case], sources: list[Source], world: int
) -> dict[str, Trained]:
    """Trains in the first layouts, resplits, trains in the second ones.

    Args:
        sources: of two models; the second is tied, or has a layer without experts.
    """
    first: list[Run] = []
    second: list[Run] = []
    found: dict[str, Trained] = {}
    for number, (name, case) in enumerate(cases.items()):
        here = folder / str(number)
        here.mkdir()
        hf = sources[case.tied or case.dense].hf
        hf_to_mm(hf, here / "mm", *layout(*case.first.flags()), converter="AutoConverter")
        how = (case.tied, case.frozen, case.bucket)
        fused = case.distributed if case.fused is None else case.fused
        a, kind = case.first, case.distributed
        to, later = (here / f"a{steps}" for steps in (STEPS, STEPS + 1))
        run = Run(here / "mm", to, a.llm, a.tp, STEPS, kind, *how, a.ep, fused, later)
        first.append(run)
        b, kind = case.second, case.ends_distributed
        run = Run(
            here / f"b{STEPS}",
            here / "b",
            b.llm,
            b.tp,
            1,
            kind,
            *how,
            b.ep,
            fused or bool(case.then),
        )
        second.append(run)
        files = (f"a{STEPS}", f"b{STEPS}", "b", f"b{STEPS + 1}")
        found[name] = Trained(*(here / file for file in files))
    _train(folder / "first", world, sources[0].text, first)
    for run, case in zip(second, cases.values(), strict=True):
        for steps in (STEPS, STEPS + 1):
            source, to = run.target.parent / f"a{steps}", run.target.parent / f"b{steps}"
            known = ["--cfg.hf_config.hf_dir", str(sources[case.tied or case.dense].hf)]
            flags = [*target(*case.second.flags()), "--optimizer", *known]
            flags += ["--optimizer-kind", case.then] if case.then else []
            resplit(source, to, *flags, converter="AutoConverter")
    _train(folder / "second", world, sources[0].text, second)
    return found


def _train(folder: Path, world: int, text: dict[str, Any], runs: list[Run]) -> None:
    folder.mkdir()
    start_processes(work, (folder, world, text, runs), nprocs=world, start_method="fork")


def _load(path: Path) -> Any:
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
    _same(trained[name], distributed=CASES[name].ends_distributed)
    _tools_agree(trained[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(EXPERTS, but=EXPERTS_TODAY))
def test_megatron_goes_on_with_experts(experts: dict[str, Trained], name: str) -> None:
    if name not in experts:
        pytest.skip("Megatron before 0.13 cannot train with a stage without experts")
    _same(experts[name], distributed=EXPERTS[name].ends_distributed)
    _tools_agree(experts[name])


def _same(pair: Trained, *, distributed: bool) -> None:
    """What Megatron saved is what it should have saved, to the bit."""
    found, expected = pair.found, pair.expected
    files = sorted(path.relative_to(found) for path in found.rglob("*.pt"))
    assert files == sorted(path.relative_to(expected) for path in expected.rglob("*.pt"))
    assert len(files) == len(list(found.rglob(RANK_FILE))) * (1 + distributed)
    for file in files:
        a, b = _load(found / file), _load(expected / file)
        if file.name == RANK_FILE:
            for content in (a, b):
                content.pop("rng_state", None)
                content.pop("args", None)
                for part in [key for key in content if str(key).startswith("model")]:
                    content[part] = {n: t for n, t in content[part].items() if t is not None}
        assert list(_differences(a, b)) == []


def _tools_agree(pair: Trained) -> None:
    """verify finds the state of the source in the result, and doctor nothing in either."""
    verdict = mmconvert.verify(pair.source, pair.resplit, options=Options(optimizer=True))
    assert verdict.equal, (verdict.differences[:2], verdict.training)
    for path in (pair.source, pair.resplit):
        said = run_cli("doctor", path, check=0).stdout
        assert "checked: optimizer state" in said and "0 warnings" in said, said
