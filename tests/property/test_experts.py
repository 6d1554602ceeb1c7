"""Experts, and rows that stand in some layers or on every stage: any model in any layout.

What is written is compared, tensor by tensor, with a model that plain torch cut (experts.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts import FAMILY, KINDS, Shape, Sizes, differences, mm_of, read_mm, write_hf
from mmconvert.config import HFConfig, HFToMM, MMToHF, OptionalHFConfig, ParallelConfig, Resplit
from mmconvert.directions.mm import hf_to_mm, mm_to_hf, resplit
from mmconvert.errors import CheckpointError, LayoutError, MMConvertError, ReplicaError, TensorError
from mmread import MANIFEST, compare_hf
from painting import DRY, NORMAL, assert_none, folder, painted, tries


@st.composite
def sizes(draw: st.DrawFn, tp: int) -> Sizes:
    """A model whose sizes tp divides."""
    few = st.integers(1, 2)
    vit_layers, layers = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    moe = draw(st.sets(st.integers(0, layers - 1)))
    deep = draw(st.sets(st.integers(0, vit_layers - 1)))
    return Sizes(
        kind=draw(st.sampled_from(KINDS)),
        vit_layers=vit_layers,
        layers=layers,
        moe=tuple(sorted(moe)),
        deep=tuple(sorted(deep)),
        experts=draw(st.sampled_from((1, 2, 3, 4, 6, 8))),
        groups=tp * draw(few),
        heads=draw(few),
        ffn=tp * draw(few),
        expert_ffn=tp * draw(few),
        hidden=draw(st.integers(1, 4)),
        vit_width=tp * draw(few),
        vocab=tp * draw(few),
        tied=draw(st.booleans()),
    )


@st.composite
def shapes(draw: st.DrawFn, s: Sizes, tp: int) -> Shape:
    """A layout that the model allows."""
    pp, vpp = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    border = draw(st.integers(0, pp * vpp - 1))

    def grid(count: int, first: int, last: int) -> tuple[tuple[int, ...], ...]:
        counts = [0] * (pp * vpp)
        for stage in draw(st.lists(st.integers(first, last), min_size=count, max_size=count)):
            counts[stage] += 1
        return tuple(tuple(counts[v * pp : (v + 1) * pp]) for v in range(vpp))

    vit, llm = grid(s.vit_layers, 0, border), grid(s.layers, border, pp * vpp - 1)
    allowed = st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0])
    ep = draw(st.sampled_from([n for n in range(1, 9) if s.experts % n == 0])) if s.moe else 1
    return Shape(vit, llm, draw(allowed), draw(allowed), ep)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sizes, Shape, Shape]:
    tp = draw(st.sampled_from((1, 2, 4)))
    model = draw(sizes(tp))
    return model, draw(shapes(model, tp)), draw(shapes(model, tp))


def to_mm(hf: Path, mm: Path, shape: Shape) -> None:
    done = hf_to_mm(FAMILY, HFToMM(mm, HFConfig(hf), shape.config()), NORMAL)
    assert_none(painted(done.plan))


def check(model: Sizes, a: Shape, b: Shape, *, known: bool) -> None:
    """There, back, and to another layout; `known`: hf_dir and the manifest are at hand."""
    with folder() as tmp:
        hf, mm, back, other = write_hf(model, tmp / "hf"), *(tmp / n for n in ("a", "hf2", "b"))
        to_mm(hf, mm, a)
        assert_none(differences(mm_of(model, a), read_mm(mm)))
        # The tied head of one stage, and what else the layout is: read off the folder.
        done = mm_to_hf(FAMILY, MMToHF(back, mm, HFConfig(hf)), NORMAL)
        assert_none(painted(done.plan))
        assert_none(compare_hf(hf, back))
        if not known:
            (mm / MANIFEST).unlink()
        cfg = Resplit(
            mm,
            other,
            ParallelConfig(),
            b.config(),
            hf_config=OptionalHFConfig(hf if known else None),
        )
        moved = resplit(FAMILY, cfg, NORMAL)
        assert_none(painted(moved.plan))
        assert_none(differences(mm_of(model, b), read_mm(other)))


@tries(10)
@given(cases())
def test_any_model_in_any_layout(case: tuple[Sizes, Shape, Shape]) -> None:
    check(*case, known=True)


@pytest.mark.nightly
@tries(400)
@given(cases())
def test_any_model_in_any_layout_often(case: tuple[Sizes, Shape, Shape]) -> None:
    check(*case, known=True)


MODEL = Sizes("stacked transposed", 3, 4, (1, 2, 3), (0, 2), 6, 2, 2, 4, 4, 3, 4, 8)
WIDE = Shape(((2, 1),), ((0, 4),), 2, 1, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_read_off_the_folder_alone(kind: str) -> None:
    """Number of experts, layers with and without them: no config.json, no mmconvert.json."""
    model = Sizes(**{**MODEL.__dict__, "kind": kind})
    check(
        model, Shape(((2, 1),), ((0, 4),), 1, 1, 3), Shape(((3,),), ((4,),), 1, 1, 2), known=False
    )


@pytest.mark.parametrize(
    ("shape", "folders"),
    [
        (Shape(((3,),), ((4,),), ep=2), ("mp_rank_00_000", "mp_rank_00_001")),
        (Shape(((3, 0),), ((0, 4),)), ("mp_rank_00_000", "mp_rank_00_001")),
        (Shape(((3, 0),), ((0, 4),), ep=2), ("mp_rank_00_000_000", "mp_rank_00_001_001")),
    ],
    ids=["ep", "pp", "pp and ep"],
)
def test_ep_is_told_from_pp_by_content(
    shape: Shape, folders: tuple[str, ...], tmp_path: Path
) -> None:
    hf, mm = write_hf(MODEL, tmp_path / "hf"), tmp_path / "mm"
    to_mm(hf, mm, shape)
    names = {path.name for path in (mm / "release").iterdir()}
    assert names >= set(folders)
    done = mm_to_hf(FAMILY, MMToHF(tmp_path / "back", mm, HFConfig(hf), shape.config()), DRY)
    assert done.layout.as_dict().get("ep_size", 1) == shape.ep
    wrong = ParallelConfig(ep_size=3)
    with pytest.raises(CheckpointError, match=f"ep_size says 3, the checkpoint holds {shape.ep}"):
        mm_to_hf(FAMILY, MMToHF(tmp_path / "back", mm, HFConfig(hf), wrong), DRY)


@pytest.mark.parametrize("ep", [4, 5, 12, -1])
def test_an_ep_size_that_loses_experts_is_refused(ep: int, tmp_path: Path) -> None:
    hf = write_hf(MODEL, tmp_path / "hf")
    shape = Shape(((3,),), ((4,),), ep=ep)
    with pytest.raises(LayoutError, match=r"one of \[1, 2, 3, 6\]"):
        hf_to_mm(FAMILY, HFToMM(tmp_path / "mm", HFConfig(hf), shape.config()))
    assert not (tmp_path / "mm").exists()


def rank_file(mm: Path, name: str) -> Path:
    return mm / "release" / name / "model_optim_rng.pt"


def edited(path: Path, change: object) -> None:
    content = torch.load(path, weights_only=True)
    assert callable(change)
    change(content["model"])
    torch.save(content, path)


ROUTER = "text_decoder.layers.{}.mlp.router"
FC1 = "text_decoder.layers.1.mlp.local_experts.1.fc1"
FAULTS: dict[str, tuple[object, type[MMConvertError], str]] = {
    "a copy that differs on one ep rank": (
        lambda part: part["text_decoder.norm"].add_(1),
        ReplicaError,
        "text_decoder.norm",
    ),
    "a router that differs": (
        lambda part: part["text_decoder.layers.1.mlp.router"].mul_(2),
        ReplicaError,
        "router",
    ),
    "an expert that is missing": (lambda part: part.pop(FC1), TensorError, r"missing|experts"),
    "an expert too many": (
        lambda part: part.update({FC1.replace("experts.1", "experts.2"): part[FC1].clone()}),
        MMConvertError,
        "experts",
    ),
    "a layer without its experts": (
        lambda part: [part.pop(n) for n in list(part) if "layers.2.mlp.local_experts" in n],
        TensorError,
        r"mp_rank_01_001_002\) lacks 4 tensors",
    ),
    "half of a matrix": (
        lambda part: part.update({FC1: part[FC1][:1].clone()}),
        MMConvertError,
        "local_experts",
    ),
    "a row on a layer that has none": (
        lambda part: part.update(
            {"text_decoder.layers.0.mlp.router": part["text_decoder.layers.1.mlp.router"].clone()}
        ),
        TensorError,
        r"mp_rank_01_001_002\) holds 1 tensor too many",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_ep_rank_is_named(fault: str, tmp_path: Path) -> None:
    hf, mm = write_hf(MODEL, tmp_path / "hf"), tmp_path / "mm"
    to_mm(hf, mm, WIDE)
    change, error, words = FAULTS[fault]
    edited(rank_file(mm, "mp_rank_01_001_002"), change)
    with pytest.raises(error, match=words):
        mm_to_hf(FAMILY, MMToHF(tmp_path / "back", mm, HFConfig(hf)), NORMAL)
    assert not (tmp_path / "back").exists()


def test_a_missing_ep_folder_is_named(tmp_path: Path) -> None:
    hf, mm = write_hf(MODEL, tmp_path / "hf"), tmp_path / "mm"
    to_mm(hf, mm, WIDE)
    lost = mm / "release" / "mp_rank_01_000_001"
    (lost / "model_optim_rng.pt").unlink()
    lost.rmdir()
    with pytest.raises(CheckpointError, match="tp 1 pp 0 ep 1"):
        mm_to_hf(FAMILY, MMToHF(tmp_path / "back", mm, HFConfig(hf)), NORMAL)


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    hf = write_hf(MODEL, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "experts": 5}))
    with pytest.raises(TensorError, match=r"5 experts|has 6 rows"):
        hf_to_mm(FAMILY, HFToMM(tmp_path / "mm", HFConfig(hf)))
