"""Any model in any layout: there and back, from layout to layout, and the plan in between.

Sizes, layer counts, stage grids and tensor-parallel sizes are drawn at random. What is written
is read with the public libraries (see mmread.py); plans are checked by painting arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import Shape, to_hf, to_mm, to_other
from mmconvert.errors import LayoutError, MMConvertError
from mmconvert.plan.plan import Copy, Plan
from mmconvert.plan.proof import prove
from mmconvert.playground.checkpoints import NEW_NAMES, make_hf, nested_config
from mmread import MANIFEST, compare_mm, files_in
from painting import DRY, NORMAL, assert_none, folder, painted, tries

CONVERTERS = {"qwen2vl-7b": "Qwen2VLConverter", "qwen2.5vl-7b": "Qwen2_5_VLConverter"}


# ------------------------------------------------------------------------------ what is drawn
@dataclass(frozen=True)
class Case:
    """A model and two layouts for it."""

    model: str
    sizes: dict[str, Any]
    weight_files: int
    new_names: bool
    nested: bool
    canonical: bool
    a: Shape
    b: Shape

    @property
    def converter(self) -> str:
        return CONVERTERS[self.model]

    def write(self, out: Path) -> Path:
        """The HF checkpoint."""
        return make_hf(
            self.model,
            out,
            shards=self.weight_files,
            rename=NEW_NAMES if self.new_names else (),
            edit_config=nested_config if self.nested else None,
            **self.sizes,
        )


def _grid(stages: list[int], pp: int, vpp: int, allowed: list[int]) -> list[list[int]]:
    """The stage grid of a module whose layers choose from the `allowed` stages."""
    counts = [0] * (pp * vpp)
    for stage in stages:
        counts[allowed[stage % len(allowed)]] += 1
    return [counts[v * pp : (v + 1) * pp] for v in range(vpp)]


@st.composite
def shapes(draw: st.DrawFn, vit_layers: int, layers: int, tp_sizes: tuple[int, ...]) -> Shape:
    """A valid layout: zeros anywhere, no text layer before the stage on which the encoder ends."""
    pp, vpp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    border = draw(st.integers(0, pp * vpp - 1))
    before, after = list(range(border + 1)), list(range(border, pp * vpp))
    choice = st.integers(0, pp * vpp - 1)
    vit = draw(st.lists(choice, min_size=vit_layers, max_size=vit_layers))
    llm = draw(st.lists(choice, min_size=layers, max_size=layers))
    tp = draw(st.sampled_from(tp_sizes))
    vit_tp = draw(st.sampled_from((0, *tp_sizes)))
    return Shape(_grid(vit, pp, vpp, before), _grid(llm, pp, vpp, after), tp, vit_tp)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model = draw(st.sampled_from(sorted(CONVERTERS)))
    tp_sizes = draw(st.sampled_from([(1, 2, 4), (1, 2, 4), (1, 3)]))
    largest = tp_sizes[-1]
    few = st.integers(1, 3)
    vit_layers, layers = draw(few), draw(st.integers(1, 4))
    kv = largest * draw(st.integers(1, 2))
    heads = kv * draw(few)
    head_dim = draw(st.integers(1, 3))
    vit_heads = largest * draw(st.integers(1, 2))
    sizes = {
        "layers": layers,
        "heads": heads,
        "kv": kv,
        "head_dim": head_dim,
        "hidden": heads * head_dim,
        "inter": largest * draw(st.integers(1, 4)),
        "vocab_size": largest * draw(st.integers(1, 5)),
        "vit_layers": vit_layers,
        "vit_heads": vit_heads,
        "vit_dim": vit_heads * draw(st.integers(1, 2)),
        "tie": draw(st.booleans()),
    }
    if model == "qwen2.5vl-7b":
        sizes["vit_inter"] = largest * draw(st.integers(1, 4))
    return Case(
        model,
        sizes,
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(shapes(vit_layers, layers, tp_sizes)),
        draw(shapes(vit_layers, layers, tp_sizes)),
    )


# ------------------------------------------------------------------- (a) and (c), there and back
def check_round_trip(case: Case) -> None:
    with folder() as tmp:
        hf, mm, back = case.write(tmp / "hf"), tmp / "mm", tmp / "back"
        there = to_mm(case.converter, hf, mm, case.a, canonical=case.canonical, options=NORMAL)
        assert_none(painted(there.plan))
        assert len(there.plan.sources) == len({t.name for t in there.plan.sources})
        again = to_hf(case.converter, mm, hf, back, options=NORMAL)
        assert_none(painted(again.plan))
        assert again.layout.as_dict() == there.layout.as_dict()
        assert files_in(back) == files_in(hf) | {MANIFEST}
        changed = [p for p in files_in(hf) if (hf / p).read_bytes() != (back / p).read_bytes()]
        assert changed == []


@tries(10)
@given(cases())
def test_back_to_the_same_files(case: Case) -> None:
    """HF -> MM -> HF is the identity, byte for byte, and both plans paint every element."""
    check_round_trip(case)


@pytest.mark.nightly
@tries(300)
@given(cases())
def test_back_to_the_same_files_often(case: Case) -> None:
    check_round_trip(case)


# ------------------------------------------------------- sizes that do not fit the layout
@st.composite
def unfitting(draw: st.DrawFn) -> Case:
    """As `cases`, but neither sizes nor tensor-parallel sizes take heed of each other."""
    model = draw(st.sampled_from(sorted(CONVERTERS)))
    some = st.integers(1, 6)
    kv, head_dim, vit_heads = draw(some), draw(st.integers(1, 2)), draw(some)
    heads = kv * draw(st.integers(1, 2))
    sizes = {
        "layers": 1,
        "heads": heads,
        "kv": kv,
        "head_dim": head_dim,
        "hidden": heads * head_dim,
        "inter": draw(some),
        "vocab_size": draw(st.integers(1, 12)),
        "vit_layers": 1,
        "vit_heads": vit_heads,
        "vit_dim": vit_heads * draw(st.integers(1, 4)),
        "tie": draw(st.booleans()),
    }
    if model == "qwen2.5vl-7b":
        sizes["vit_inter"] = draw(some)
    tp_sizes = (draw(st.integers(1, 4)), draw(st.integers(0, 4)))
    shape = Shape([[1, 0]], [[0, 1]], *tp_sizes)
    canonical = draw(st.booleans())
    return Case(model, sizes, 1, False, False, canonical, shape, shape)


def fits(case: Case) -> bool:
    """Whether the tensor-parallel sizes divide each other and everything that they cut."""
    s, tp = case.sizes, case.a.tp
    vit_tp = case.a.vit_tp or tp
    text = [s["kv"], s["inter"], s["vocab_size"]]
    vision = [s["vit_heads"], s.get("vit_inter", 4 * s["vit_dim"])]
    return (
        max(tp, vit_tp) % min(tp, vit_tp) == 0
        and not any(size % tp for size in text)
        and not any(size % vit_tp for size in vision)
    )


@tries(25, nightly=80)
@given(unfitting())
def test_sizes_fit_or_are_refused(case: Case) -> None:
    """No row is ever lost: what cannot be cut is refused and nothing is written."""
    if fits(case):
        check_round_trip(case)
        return
    with folder() as tmp:
        hf, mm = case.write(tmp / "hf"), tmp / "mm"
        with pytest.raises(LayoutError, match="tp_size"):
            to_mm(case.converter, hf, mm, case.a, canonical=case.canonical, options=NORMAL)
        assert [path.name for path in tmp.iterdir()] == ["hf"]


# ------------------------------------------------------------------------------ (b) resharding
def check_reshard(case: Case, with_hf: bool, with_manifest: bool) -> None:
    with folder() as tmp:
        hf = case.write(tmp / "hf")
        a, b, other = tmp / "a", tmp / "b", tmp / "other"
        for mm, shape in ((a, case.a), (b, case.b)):
            to_mm(case.converter, hf, mm, shape, canonical=case.canonical, options=NORMAL)
        if not with_manifest:
            (a / MANIFEST).unlink()
        known = hf if with_hf else None
        done = to_other(case.converter, a, other, case.b, hf=known, options=NORMAL)
        assert_none(painted(done.plan))
        assert_none(compare_mm(b, other))


@tries(10)
@given(cases(), st.booleans(), st.booleans())
def test_reshard_is_a_direct_conversion(case: Case, with_hf: bool, with_manifest: bool) -> None:
    """From layout to layout: what a conversion from HF would have written, tensor by tensor.

    Also where neither config.json nor mmconvert.json say anything of the source.
    """
    check_reshard(case, with_hf, with_manifest)


@pytest.mark.nightly
@tries(300)
@given(cases(), st.booleans(), st.booleans())
def test_reshard_is_a_direct_conversion_often(
    case: Case, with_hf: bool, with_manifest: bool
) -> None:
    check_reshard(case, with_hf, with_manifest)


# ------------------------------------------------------------------------ (d) broken plans
MOVES = ("src_row", "src_col", "dst_row", "dst_col")
CHANGES = ("removed", "doubled", "shorter", "narrower", *MOVES)


def broken(copies: list[Copy], number: int, change: str, by: int) -> list[Copy]:
    """The copies with one of them changed."""
    chosen = copies[number]
    others = copies[:number] + copies[number + 1 :]
    if change == "removed":
        return others
    if change == "doubled":
        return [*copies, chosen]
    if change == "shorter":
        return [*others, chosen._replace(rows=chosen.rows - 1)]
    if change == "narrower":
        return [*others, chosen._replace(cols=chosen.cols - 1)]
    return [*others, chosen._replace(**{change: getattr(chosen, change) + by})]


def accepted(plan: Plan) -> bool:
    try:
        prove(plan)
    except MMConvertError as error:
        if "the plan is not complete" not in str(error):
            raise
        return False
    return True


def check_broken_plans(case: Case, seed: int) -> None:
    """Each change to a random copy is refused; a changed source, if painting finds it too."""
    rng = np.random.default_rng(seed)
    with folder() as tmp:
        hf, mm = case.write(tmp / "hf"), tmp / "mm"
        plan = to_mm(case.converter, hf, mm, case.a, canonical=case.canonical, options=DRY).plan
        assert not mm.exists()
        assert accepted(plan)
        for change in CHANGES:
            number, by = int(rng.integers(len(plan.copies))), int(rng.choice([-1, 1]))
            copies = broken(plan.copies, number, change, by)
            wrong = replace(plan, copies=copies)
            lines = painted(wrong)
            assert accepted(wrong) == (lines == []), (change, plan.copies[number], by, lines)
            if not change.startswith("src"):
                assert lines, (change, plan.copies[number])
        number = int(rng.integers(len(plan.targets)))
        targets = list(plan.targets)
        targets[number] = targets[number]._replace(dtype="F16")
        assert not accepted(replace(plan, targets=targets))


@tries(10)
@given(cases(), st.integers(0, 2**32))
def test_a_broken_plan_is_refused(case: Case, seed: int) -> None:
    check_broken_plans(case, seed)


@pytest.mark.nightly
@tries(300)
@given(cases(), st.integers(0, 2**32))
def test_a_broken_plan_is_refused_often(case: Case, seed: int) -> None:
    check_broken_plans(case, seed)


def test_the_painting_itself_notices(tmp_path: Path) -> None:
    """The painter is not blind: a copy less, and a source that is read nowhere."""
    hf = make_hf("qwen2vl-7b", tmp_path / "hf", layers=1, vit_layers=1)
    shape = Shape(vit=[[1]], llm=[[1]])
    plan = to_mm("Qwen2VLConverter", hf, tmp_path / "mm", shape, options=DRY).plan
    assert painted(plan) == []
    lines = painted(replace(plan, copies=plan.copies[1:]))
    assert any("written 0" in line for line in lines)
    assert any("are not used" in line for line in lines)
