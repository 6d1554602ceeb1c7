"""Contracts of every family, taken from the registry: a new family is tested by being there.

It needs a line in MODELS, the catalogue entries of the playground that it converts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmconvert import converters
from mmconvert.config import CommonModelConfig, HFConfig, HFToMM, MMToHF, Options, ParallelConfig
from mmconvert.converters.checks import check_family
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import ZEROS, Module, Row, hf_templates
from mmconvert.directions.mm import hf_to_mm, mm_to_hf
from mmconvert.errors import RequestError
from mmconvert.names import NO_LAYER
from mmconvert.playground.checkpoints import MODELS as CATALOGUE
from mmconvert.playground.checkpoints import NEW_NAMES, make_hf, renamed
from mmconvert.sharding.layout import grid_flag
from mmconvert.testing import contract
from mmread import MANIFEST, compare_hf, compare_side_files, files_in, read_mm

MODELS: dict[str, tuple[str, ...]] = {
    "Qwen2VLConverter": ("qwen2vl-7b", "qwen2vl-2b"),
    "Qwen2_5_VLConverter": ("qwen2.5vl-7b", "qwen2.5vl-3b"),
    "Qwen2_5_OmniConverter": ("qwen2.5omni-7b",),
    "InternVLConverter": ("internvl2-1b", "internvl2-2b", "internvl2-76b", "internvl3.5-8b"),
    "Qwen3VLMegatronConverter": ("qwen3vl-8b", "qwen3vl-30b-a3b"),
    "GlmConverter": ("glm4.1v-9b",),
    "DeepSeekVLConverter": ("deepseekvl2",),
}
LEFT = "left out or carried"
FAMILIES = converters.registry()


class Table(NamedTuple):
    """A family's table in one variant, for one of its models."""

    name: str
    model: str
    tied: bool
    canonical: bool
    vit_qkv: str

    @property
    def variant(self) -> Variant:
        traits = FAMILIES[self.name].traits(config_of(self.model))
        return Variant(self.tied, self.canonical, self.vit_qkv, traits=traits)

    @property
    def modules(self) -> tuple[Module, ...]:
        return FAMILIES[self.name].modules(self.variant)

    @property
    def id(self) -> str:
        words = ["tied" if self.tied else "untied", "canonical" if self.canonical else "fused"]
        return " ".join([self.model, *words, self.vit_qkv])


SAMPLES = [(name, model) for name in FAMILIES for model in MODELS.get(name, ())]
TABLES = [
    Table(name, model, tied, canonical, vit_qkv)
    for name, model in SAMPLES
    for tied in (False, True)
    for canonical in ((False, True) if FAMILIES[name].canonical else (False,))
    for vit_qkv in ("interleaved", "concatenated")
]
each_family = pytest.mark.parametrize("name", FAMILIES)
each_table = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.id)
each_model = pytest.mark.parametrize(("name", "model"), SAMPLES)


def all_rows(modules: tuple[Module, ...]) -> list[tuple[Module, Row]]:
    return [(m, r) for m in modules for r in m.all_rows()]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One generated checkpoint for each model."""
    folder = tmp_path_factory.mktemp("models")
    models = {model for name in FAMILIES for model in MODELS.get(name, ())}
    return {model: make_hf(model, folder / model, **fewer(model)) for model in sorted(models)}


def fewer(model: str) -> dict[str, Any]:
    """Fewer layers than the catalogue has; numbers of two digits, for which order matters, stay."""
    sizes = {"layers": 12, "vit_layers": 4, "audio_layers": 2, "deepstack": [0, 1, 3]}
    if model.startswith("deepseek"):
        del sizes["layers"]  # its experts are listed layer by layer
    return {name: size for name, size in sizes.items() if name in CATALOGUE[model].sizes}


def config_of(model: str) -> dict[str, Any]:
    """The config.json that the playground writes for a model of so many layers."""
    entry = CATALOGUE[model]
    return entry.config({**entry.sizes, **fewer(model)})


def sources_of(row: Row) -> list[str]:
    """The HF names of a row, without parts that only MM stores."""
    return [name for name in row.hf if name != ZEROS]


def tensor_names(folder: Path) -> list[str]:
    """Names as the files' own headers list them."""
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        names += [name for name in header if name != "__metadata__"]
    return names


# -------------------------------------------------------------------------------- registry
def test_every_family_has_a_model_to_test_it_with() -> None:
    assert FAMILIES
    assert [name for name in FAMILIES if not MODELS.get(name)] == [], "add them to MODELS"
    assert set(converters.BUILT_IN) <= set(FAMILIES)


@each_family
def test_a_family_is_found_by_its_name(name: str) -> None:
    family = FAMILIES[name]
    assert family.converter == name
    assert converters.load(name) is family
    assert family.name
    assert family.model_types


def test_no_two_families_claim_one_model_type() -> None:
    found = Counter(kind for family in FAMILIES.values() for kind in family.model_types)
    assert {kind: count for kind, count in found.items() if count > 1} == {}


def test_an_unknown_converter_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="NoConverter") as caught:
        converters.load("NoConverter")
    assert all(name in caught.value.expected for name in FAMILIES)


# ---------------------------------------------------------------------------------- tables
@each_table
def test_names_are_unique(table: Table) -> None:
    """One row for an MM name, and one for an HF name, but for a tied output layer."""
    rows = [row for _, row in all_rows(table.modules)]
    mm = Counter(row.mm for row in rows)
    assert [name for name, count in mm.items() if count > 1] == []
    hf = Counter(name for row in rows if not row.tied_to for name in sources_of(row))
    assert [name for name, count in hf.items() if count > 1] == []
    tied = [row for row in rows if row.tied_to]
    assert bool(tied) == table.tied
    for row in tied:
        (origin,) = [other for other in rows if other.mm == row.tied_to]
        assert (row.shard, row.rows, row.cols) == (origin.shard, origin.rows, origin.cols)
        assert not origin.tied_to


@each_table
def test_modules_are_in_the_order_of_the_pipeline(table: Table) -> None:
    """Encoders first, the text decoder last, each with its own names and known flags."""
    family, modules = FAMILIES[table.name], table.modules
    keys = tuple(m.key for m in modules)
    assert keys == family.module_keys
    assert keys[-1] == "llm"
    assert len(set(keys)) == len(keys)
    for module, row in all_rows(modules):
        assert row.mm.startswith(module.label + ".") or row in module.everywhere, row.mm


@each_model
def test_variants_of_a_model_are_of_the_same_hf_tensors(name: str, model: str) -> None:
    mine = [table.modules for table in TABLES if table.model == model]
    hf = {frozenset(n for _, r in all_rows(m) for n in sources_of(r)) for m in mine}
    assert len(hf) == 1
    names = {frozenset(r.mm for _, r in all_rows(m)) for m in mine}
    assert len(names) == (2 if FAMILIES[name].canonical else 1)


# ------------------------------------------------------------------------- a sample of each
@each_model
def test_the_contract_of_all_families(name: str, model: str, sources: dict[str, Path]) -> None:
    contract(FAMILIES[name], sources[model])


@each_family
def test_a_table_is_not_wrong_as_it_stands(name: str) -> None:
    check_family(FAMILIES[name])


def claims(family: Family, modules: tuple[Module, ...], name: str) -> set[tuple[str, int]]:
    """Every row (and layer) that claims an HF name, looked for one by one."""
    found: set[tuple[str, int]] = set()
    for _, row in all_rows(modules):
        for template in sources_of(row):
            pattern = re.escape(template)
            for field in ("layer", "expert", "index"):
                pattern = pattern.replace(rf"\{{{field}\}}", rf"(?P<{field}>0|[1-9][0-9]*)")
            if hit := re.fullmatch(pattern, name):
                numbers = hit.groupdict()
                layer = numbers.get("layer", numbers.get("index", NO_LAYER))
                found.add((row.mm, int(layer)))
    if family.why_dropped(name) or family.why_carried(name):
        found.add((LEFT, NO_LAYER))
    return found


@each_model
@pytest.mark.parametrize("new_names", [False, True], ids=["hub names", "later names"])
def test_every_tensor_is_claimed_once(
    name: str, model: str, new_names: bool, sources: dict[str, Path]
) -> None:
    """By one row or a reason to leave or carry it."""
    family = FAMILIES[name]
    config = config_of(model)
    rename = NEW_NAMES if family.spellings and new_names else ()
    names = [family.hub_name(renamed(n, rename)) for n in tensor_names(sources[model])]
    assert len(names) > 100
    tied = not any(n.endswith(("lm_head.weight", ".output.weight")) for n in names)
    modules = family.modules(Variant(tied=tied, traits=family.traits(config)))
    found = {n: claims(family, modules, n) for n in names}
    assert {n: rows for n, rows in found.items() if len(rows) != 1} == {}
    for tensor, rows in found.items():
        by_index = hf_templates(modules).find(tensor)
        ((row, layer),) = rows
        assert (by_index is None) == (row == LEFT)
        assert by_index is None or (by_index[0].mm, by_index[1]) == (row, layer)


def split_in_two(count: int, first: bool) -> list[int]:
    """An encoder's layers end on the first stage of two, the text decoder's on the second."""
    return [count, 0] if first else [1, count - 1]


@each_model
@pytest.mark.parametrize(
    "canonical",
    [False, pytest.param(True, marks=pytest.mark.nightly)],
    ids=["fused", "canonical"],
)
def test_there_and_back(
    name: str, model: str, canonical: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    """HF -> MM -> HF at TP 2 PP 2: two tensor-parallel ranks with all names, the same weights."""
    family, hf = FAMILIES[name], sources[model]
    dims = family.dims(config_of(model))
    if canonical and not family.canonical:
        pytest.skip(f"{family.name} has no canonical structure")
    flags: dict[str, Any] = {
        grid_flag(key): (tuple(split_in_two(dims[f"{key}.layers"], key != family.decoder)),)
        for key in family.module_keys
    }
    mm, back = tmp_path / "mm", tmp_path / "back"
    parallel = ParallelConfig(tp_size=2, **flags)
    common = CommonModelConfig(enable_canonical_hf_struct=canonical)
    done = hf_to_mm(family, HFToMM(mm, HFConfig(hf), parallel, common), Options())
    assert done.plan.targets
    files, odd = read_mm(mm)
    assert odd == []
    assert len(files) == 4
    for stage in (0, 1):
        one, two = (
            files[f"release/mp_rank_{tp:02d}_{stage:03d}/model_optim_rng.pt"].parts["model"]
            for tp in range(2)
        )
        assert one
        assert {n: r.dtype for n, r in one.items()} == {n: r.dtype for n, r in two.items()}
    mm_to_hf(family, MMToHF(back, mm, HFConfig(hf)), Options())
    assert compare_hf(hf, back) + compare_side_files(hf, back) == []
    assert files_in(back) == files_in(hf) | {MANIFEST}
