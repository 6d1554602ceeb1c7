"""Adapters between PEFT and MM format, and merging: bit for bit where that is possible."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from commands import layout, refused, untouched
from inprocess import call
from lora import (
    Tensors,
    adapter,
    matrices,
    merge,
    products,
    run,
    same,
    save_adapter,
    weights,
)
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm
from stopping import noted, staging, stopped

SMALL: dict[str, Any] = {"layers": 2, "vit_layers": 2}
QWEN25 = "Qwen2_5_VLConverter"
CANONICAL = ("--cfg.common_model_config.enable_canonical_hf_struct", "True")


class Case(NamedTuple):
    """A model of the catalogue in a layout."""

    model: str
    converter: str
    sizes: dict[str, Any] = SMALL
    llm: str = "[1,1]"
    vit: str = "[2,0]"
    tp: int = 2
    more: tuple[str, ...] = ()
    only: str = ""  # what the names of adapted layers must have


THREE = {"layers": 3, "vit_layers": 2}
VPP = ("[[0,1],[1,1]]", "[[2,0],[0,0]]")
QWEN3, DEEPSEEK, OMNI = "Qwen3VLMegatronConverter", "DeepSeekVLConverter", "Qwen2_5_OmniConverter"
HEARS = {**SMALL, "audio_layers": 2}
DEEP, DEEPER = {"layers": 2, "vit_layers": 18}, {"layers": 2, "vit_layers": 25}
CASES = {
    "qwen2vl": Case("qwen2vl-7b", "Qwen2VLConverter", more=("vit_tp_size=1",)),
    "qwen2.5vl": Case("qwen2.5vl-7b", QWEN25),
    "qwen2.5vl vpp": Case("qwen2.5vl-7b", QWEN25, THREE, *VPP),
    "omni": Case("qwen2.5omni-7b", OMNI, HEARS, more=("audio_pp_layers=[2,0]",), only="thinker"),
    "omni hetero tp": Case(
        "qwen2.5omni-7b",
        OMNI,
        HEARS,
        more=("audio_pp_layers=[2,0]", "vit_tp_size=1", "audio_tp_size=1"),
        only="thinker",
    ),
    "internvl2-2b": Case("internvl2-2b", "InternVLConverter"),
    "internvl2-1b": Case("internvl2-1b", "InternVLConverter"),
    "internvl2-1b vpp": Case("internvl2-1b", "InternVLConverter", THREE, *VPP),
    "internvl3.5-1b": Case("internvl3.5-1b", "InternVLConverter"),
    "glm4.1v": Case("glm4.1v-9b", "GlmConverter"),
    "qwen3vl": Case("qwen3vl-4b", QWEN3, DEEP, vit="[18,0]"),
    "qwen3vl vpp": Case("qwen3vl-4b", QWEN3, {**DEEP, "layers": 3}, VPP[0], "[[18,0],[0,0]]"),
    "qwen3vl ep2": Case("qwen3vl-30b-a3b", QWEN3, DEEPER, vit="[25,0]", tp=1, more=("ep_size=2",)),
    "qwen3vl tp2 ep2": Case("qwen3vl-30b-a3b", QWEN3, DEEPER, vit="[25,0]", more=("ep_size=2",)),
    "deepseek": Case("deepseekvl2", DEEPSEEK, {"vit_layers": 2}, "[1,29]", tp=1, only="^language"),
    "deepseek tp2 ep2": Case(
        "deepseekvl2",
        DEEPSEEK,
        {"vit_layers": 2},
        "[1,29]",
        more=("ep_size=2",),
        only=r"^language.model.layers.[0-3]\.",
    ),
}
QUICK = {"qwen2vl", "qwen2.5vl"}
NIGHTLY = pytest.mark.nightly
# Of each model, every value of both sides today.
SQUARES = [
    pytest.param(
        *(name, canonical, shared),
        marks=() if name in QUICK and (name == "qwen2vl") ^ canonical ^ shared else [NIGHTLY],
    )
    for name, case in CASES.items()
    for canonical in (
        (False, True) if "qwen2" in case.model and "omni" not in case.model else (False,)
    )
    for shared in (False, True)
    if name in QUICK or shared is False
]


def old_products(folder: Path) -> Tensors:
    """The products of an adapter that was written, by its own configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return products(adapter(folder), config["lora_alpha"] / config["r"], config["r"])


@pytest.mark.parametrize(("name", "canonical", "shared"), SQUARES)
def test_merging_and_converting_commute(
    name: str, canonical: bool, shared: bool, tmp_path: Path
) -> None:
    """Whichever of base and adapter is in which format, the merged model has the same bits."""
    case = CASES[name]
    converter = case.converter
    hf = make_hf(case.model, tmp_path / "hf", **case.sizes)
    mine = matrices(hf, shared=shared, only=case.only)
    peft = save_adapter(tmp_path / "peft", mine, base_model_name_or_path=str(hf))
    flags = layout(case.llm, case.vit, case.tp, *case.more)
    form = CANONICAL if canonical else ()
    merged = tmp_path / "merged"
    merge(converter, hf, [peft], merged)
    expected = tmp_path / "expected"
    where = ("--cfg.hf_config.hf_dir", merged, "--cfg.mm_dir", expected)
    run(converter, "hf_to_mm", *where, *flags, *form)
    base, mm = tmp_path / "base", tmp_path / "mm"
    run(converter, "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", base, *flags, *form)
    there = ("--cfg.hf_config.hf_dir", peft, "--cfg.mm_dir", mm, "--cfg.base_mm_dir", base)
    said = run(converter, "lora_hf_to_mm", *there).stderr
    assert ("exact as a product" in said) == (not shared and not canonical)

    merge(converter, base, [mm], tmp_path / "both")
    assert compare_mm(expected, tmp_path / "both") == []
    merge(converter, base, [peft], tmp_path / "other")
    assert compare_mm(expected, tmp_path / "other") == []
    merge(converter, hf, [mm], tmp_path / "back")
    assert compare_hf(merged, tmp_path / "back") == []

    again = tmp_path / "again"
    flags_back = ("--cfg.hf_config.hf_dir", hf, "--cfg.save_hf_dir", again, "--cfg.names", "old")
    run(converter, "lora_mm_to_hf", "--cfg.mm_dir", mm, *flags_back)
    one, other = products(mine, 2.0), old_products(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    if shared or canonical:
        same(mine, adapter(again))

    call("verify", peft, mm)
    one_b = next(n for n in mine if n.endswith("lora_B.weight") and "experts" not in n)
    changed = {**mine, one_b: mine[one_b] + 1e-6}
    other = save_adapter(tmp_path / "changed", changed, base_model_name_or_path=str(hf))
    assert len(call("verify", mm, other, check=1).stdout.splitlines()) == 1

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(converter, "lora_resplit", "--cfg.source_dir", mm, "--cfg.target_dir", whole)
    given = [word.replace(".parallel_", ".target_parallel_") for word in flags]
    run(converter, "lora_resplit", "--cfg.source_dir", whole, "--cfg.target_dir", cut, *given)
    assert compare_mm(mm, cut) == []


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf("qwen2.5vl-7b", tmp_path_factory.mktemp("lora") / "hf", **SMALL)


def to_mm(peft: Path, mm: Path, *flags: str | Path, check: int = 0):
    words = ("--cfg.hf_config.hf_dir", peft, "--cfg.mm_dir", mm, *flags)
    return run(QWEN25, "lora_hf_to_mm", *words, check=check)


def test_the_form_of_training_and_its_names(hf: Path, tmp_path: Path) -> None:
    """A whole on every rank beside B's rows, as Megatron's layers have them; new names in PEFT."""
    mine = matrices(hf, only=r"^model\.layers", dtype=torch.bfloat16)
    peft = save_adapter(tmp_path / "peft", mine)
    to_mm(peft, tmp_path / "mm", *layout("[2]", "[2]", 2), *CANONICAL)
    ranks = [
        torch.load(tmp_path / f"mm/release/mp_rank_{tp:02d}/model_optim_rng.pt")["model"]
        for tp in (0, 1)
    ]
    stem = "text_decoder.decoder.layers.1"
    a = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for part in ranks:
        assert torch.equal(part[f"{stem}.self_attention.q_proj.lora_A.default.weight"], mine[a])
        assert not any(".lora_" not in name for name in part)
    b = [part[f"{stem}.self_attention.q_proj.lora_B.default.weight"] for part in ranks]
    assert torch.equal(torch.cat(b), mine[a.replace("lora_A", "lora_B")])
    down = a.replace("self_attn.q_proj", "mlp.down_proj")
    parts = [part[f"{stem}.mlp.linear_fc2.lora_A.default.weight"] for part in ranks]
    assert torch.equal(torch.cat(parts, dim=1), mine[down])

    out = tmp_path / "out"
    run(QWEN25, "lora_mm_to_hf", "--cfg.mm_dir", tmp_path / "mm", "--cfg.save_hf_dir", out)
    new = {
        name.replace("model.layers", "model.language_model.layers"): t for name, t in mine.items()
    }
    same(new, adapter(out))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    # down_proj ... are names of the vision encoder's layers too
    assert config["exclude_modules"] == r"model\.visual\..*"
    assert "down_proj" in config["target_modules"]


def test_errors_say_what_is_wrong(hf: Path, tmp_path: Path) -> None:
    mine = matrices(hf, only=r"layers\.0\.self_attn\.[qv]_proj")
    mm = tmp_path / "mm"

    def refuse(tensors: Tensors, code: int, *expected: str, flags=(), **config) -> None:
        content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
        folder = save_adapter(tmp_path / "bad", tensors, content)
        refused(to_mm(folder, mm, *flags, check=code), code, *expected, out=mm)

    names = list(mine)
    refuse({n: t for n, t in mine.items() if n != names[0]}, 3, "is unpaired")
    refuse(mine, 3, "peft_type is 'LOHA'", peft_type="LOHA")
    refuse(mine, 3, "gives it the rank 5", r=5)
    other = {n.replace("self_attn", "attention"): t for n, t in mine.items()}
    refuse(other, 3, "does not have", "closest known name")
    refuse({"model.layers.0.mlp.up_proj.weight": mine[names[0]]}, 3, "no name has lora_")
    magnitude = {names[0].replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(168)}
    refuse({**mine, **magnitude}, 2, "DoRA", "lora_merge")
    refuse(mine, 2, "rslora", "--cfg.fold_scaling", use_rslora=True)
    fused = ("--cfg.common_model_config.enable_canonical_hf_struct", "False")
    refuse(mine, 3, "base_hf_dir", flags=fused)
    exact = (*fused, "--cfg.base_hf_dir", str(hf), "--cfg.exact_rank", "True")
    refuse(mine, 2, "canonical_model", flags=exact)
    wrong = ("--cfg.common_model_config.new_transformers_weight_key", "True")
    refuse(mine, 3, "new_transformers_weight_key says True", flags=wrong)
    half = {n: t[:, :-1] if "lora_A" in n else t for n, t in mine.items()}
    base = ("--cfg.base_hf_dir", str(hf))
    refuse({n: t.contiguous() for n, t in half.items()}, 3, "columns there", flags=base)


def test_what_belongs_to_a_residual_model_is_told(hf: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", matrices(hf, only="down_proj"), init_lora_weights="pissa")
    assert "residual" in to_mm(folder, tmp_path / "mm").stderr


def test_merging_refuses_what_would_be_wrong(hf: Path, tmp_path: Path) -> None:
    mine, out = matrices(hf, only=r"layers\.0\.self_attn\.q_proj"), tmp_path / "out"
    pissa = save_adapter(tmp_path / "a", mine, init_lora_weights="pissa_niter_4")
    done = merge(QWEN25, hf, [pissa], out, check=3)
    refused(done, 3, "residual", out=out)
    merge(QWEN25, hf, [pissa], tmp_path / "told", "--cfg.base_is_residual", "True")
    nameless = save_adapter(tmp_path / "b", mine)
    (nameless / "adapter_config.json").unlink()
    refused(merge(QWEN25, hf, [nameless], out, check=3), 3, "--cfg.lora_alpha", out=out)
    merge(QWEN25, hf, [nameless], tmp_path / "said", "--cfg.lora_alpha", "8")
    assert compare_hf(tmp_path / "told", tmp_path / "said") == []
    infinite = {n: t.fill_(float("inf")) if "lora_B" in n else t for n, t in mine.items()}
    bad = save_adapter(tmp_path / "c", infinite)
    refused(merge(QWEN25, hf, [bad], out, check=3), 3, "q_proj", "finite", out=out)
    untouched(out)


def of_two_ranks(hf: Path, seed: int = 5) -> Tensors:
    """Adapters of rank 8 for q and rank 4 for the others."""
    small = matrices(hf, only=r"^model\.layers", seed=seed)
    large = matrices(hf, only=r"^model\.layers.*q_proj", r=8, seed=seed + 1)
    return {**small, **large}


@pytest.mark.parametrize("structure", ["canonical", "fused"])
def test_ranks_and_scalings_become_one(structure: str, hf: Path, tmp_path: Path) -> None:
    """Patterns by powers of two: the products are the same numbers, in every layout."""
    mine = of_two_ranks(hf)
    patterns = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 32, "q_proj": 4}}
    peft = save_adapter(tmp_path / "peft", mine, **patterns)
    mm, back = tmp_path / "mm", tmp_path / "back"
    form = (CANONICAL[0], str(structure == "canonical"))
    flags = (*layout("[1,1]", "[2,0]", 2), *form, "--cfg.base_hf_dir", hf)
    said = to_mm(peft, mm, *flags, "--cfg.fold_scaling", "True").stderr
    assert "power of two, which is exact" in said
    assert "rounded once" not in said
    assert "of padding" in said or "padded to 8" in said
    flags = ("--cfg.hf_config.hf_dir", hf, "--cfg.save_hf_dir", back, "--cfg.names", "old")
    run(QWEN25, "lora_mm_to_hf", "--cfg.mm_dir", mm, *flags)
    scales = {"down_proj": 8.0, "q_proj": 0.5}
    ours = old_products(back)
    expected = products(mine, 1.0)
    assert ours.keys() == expected.keys()
    for name, product in expected.items():
        scale = scales.get(name.rpartition(".")[2], 2.0)
        assert torch.equal(ours[name], scale * product), name
    assert isinstance(json.loads((back / "adapter_config.json").read_text())["lora_alpha"], int)
    call("verify", peft, mm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rslora_becomes_a_part_of_b(dtype: torch.dtype, hf: Path, tmp_path: Path) -> None:
    """No power of two: every value of B is the scaled one, rounded once."""
    mine = {n: t.to(dtype) for n, t in of_two_ranks(hf).items()}
    config = {"use_rslora": True, "rank_pattern": {"q_proj": 8}}
    peft = save_adapter(tmp_path / "peft", mine, **config)
    mm, back = tmp_path / "mm", tmp_path / "back"
    said = to_mm(peft, mm, *layout("[2]", "[2]", 2), *CANONICAL, "--cfg.fold_scaling", "True")
    assert "rounded once" in said.stderr
    flags = ("--cfg.hf_config.hf_dir", hf, "--cfg.save_hf_dir", back, "--cfg.names", "old")
    run(QWEN25, "lora_mm_to_hf", "--cfg.mm_dir", mm, *flags)
    config = json.loads((back / "adapter_config.json").read_text())
    one = config["lora_alpha"] / config["r"]
    got = adapter(back)
    for name, b in mine.items():
        if "lora_B" not in name:
            continue
        rank = b.shape[1]
        scaled = (b.float() * torch.tensor(8 / rank**0.5 / one, dtype=torch.float32)).to(dtype)
        assert torch.equal(got[name][:, :rank], scaled), name
        assert not got[name][:, rank:].any()


def test_copies_that_drifted_apart(hf: Path, tmp_path: Path) -> None:
    """Refused; the mean of both, in float32, in each command, and in the merge."""
    mine = matrices(hf, only=r"^model\.layers\.[01]\.(self_attn\.[qo]_proj|mlp\.down_proj)")
    peft, mm, base = save_adapter(tmp_path / "peft", mine), tmp_path / "mm", tmp_path / "base"
    there = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", base)
    run(QWEN25, "hf_to_mm", *there, *layout("[2]", "[2]", 2), *CANONICAL)
    to_mm(peft, mm, "--cfg.base_mm_dir", base)
    path = mm / "release/mp_rank_01/model_optim_rng.pt"
    content = torch.load(path)
    stem = "text_decoder.decoder.layers.1."
    moved = {
        f"{stem}self_attention.q_proj.lora_A.default.weight": "1.self_attn.q_proj.lora_A.weight",
        f"{stem}mlp.linear_fc2.lora_B.default.weight": "1.mlp.down_proj.lora_B.weight",
    }
    means = dict(mine)
    for name, its in moved.items():
        old = content["model"][name].clone()
        content["model"][name] = old * 1.5 + 0.25
        means[f"base_model.model.model.layers.{its}"] = old / 2 + content["model"][name] / 2
    torch.save(content, path)

    out = tmp_path / "out"
    told = ("--cfg.lora_alpha", "8")  # mmconvert.json is of the files as they were
    back = ("--cfg.hf_config.hf_dir", hf, "--cfg.names", "old", *told, "--cfg.mm_dir", mm)
    where = ("--cfg.save_hf_dir", out)
    refused(run(QWEN25, "lora_mm_to_hf", *back, *where, check=3), 3, "--replicas mean", out=out)
    said = run(QWEN25, "lora_mm_to_hf", *back, *where, "--replicas", "mean").stderr
    assert "q_proj.lora_A" in said
    assert "1 more tensor" in said
    assert "their mean is taken" in said
    same(adapter(out), means)
    whole = ("--cfg.source_dir", mm, "--cfg.target_dir", tmp_path / "whole")
    given = [f.replace(".parallel_", ".target_parallel_") for f in layout("[2]", "[2]", 1)]
    run(QWEN25, "lora_resplit", *whole, *given[:2], "--replicas", "mean")
    again = ("--cfg.save_hf_dir", tmp_path / "again")
    run(QWEN25, "lora_mm_to_hf", *back[:-1], tmp_path / "whole", *again)
    same(adapter(tmp_path / "again"), means)

    merge(QWEN25, hf, [mm], tmp_path / "merged", "--replicas", "mean", *told)
    merge(QWEN25, hf, [out], tmp_path / "expected")
    one, other = weights(tmp_path / "merged"), weights(tmp_path / "expected")
    assert one.keys() == other.keys()
    for name, tensor in one.items():  # products are summed in another order
        torch.testing.assert_close(tensor, other[name], rtol=2**-7, atol=1e-6)
    again = ("--cfg.mm_dir", base, "--cfg.hf_config.hf_dir", hf)
    no = run(QWEN25, "mm_to_hf", *again, *where, "--overwrite", "--replicas", "mean", check=2)
    refused(no, 2, "is for adapters")


def test_a_merge_that_is_killed_leaves_nothing(hf: Path, tmp_path: Path) -> None:
    """Nothing has the final name; the same command finishes, with the bits of a quiet run."""
    folder = save_adapter(tmp_path / "a", matrices(hf, only=r"^model\.layers"))
    out = tmp_path / "out"
    words = (QWEN25, "lora_merge", "--cfg.base_dir", hf, "--cfg.lora_dir", folder)
    words = (*words, "--cfg.save_dir", out)
    stopped(*words, count=3)
    assert not out.exists()
    assert noted(out) == 3
    call(*words)
    assert not staging(out).exists()
    merge(QWEN25, hf, [folder], tmp_path / "expected")
    same(weights(tmp_path / "expected"), weights(out))


def test_an_adapter_there_and_back_without_writing(hf: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", matrices(hf))
    found = json.loads(call("roundtrip", folder, "--hf_dir", hf, "--json").stdout)
    assert found["equal"]
    assert [trip["equal"] for trip in found["layouts"]] == [True] * 3
    assert {trip["tensors"] for trip in found["layouts"]} == {len(matrices(hf))}
    refused(call("roundtrip", folder, check=2), 2, "--hf_dir")
    refused(call("roundtrip", hf, "--hf_dir", hf, check=2), 2, "leave --hf_dir out")
    other = make_hf("internvl2-1b", tmp_path / "other", **SMALL)
    grown = save_adapter(tmp_path / "b", matrices(other))
    refused(call("roundtrip", grown, "--hf_dir", other, check=2), 2, "rank 12", "verify")


def test_several_adapters_and_a_scale(hf: Path, tmp_path: Path) -> None:
    """The sum is rounded once: two adapters, the second at half its strength."""
    name = "model.layers.1.mlp.up_proj"
    mine = [matrices(hf, only=rf"^{name}", seed=seed) for seed in (1, 2)]
    folders = [save_adapter(tmp_path / f"a{i}", t) for i, t in enumerate(mine)]
    merge(QWEN25, hf, folders, tmp_path / "out", "--cfg.scale", "0.5")
    deltas = [
        t[f"base_model.model.{name}.lora_B.weight"] @ t[f"base_model.model.{name}.lora_A.weight"]
        for t in mine
    ]
    base = weights(hf)[f"{name}.weight"]
    expected = (base.float() + deltas[0] + deltas[1]).to(base.dtype)
    got = weights(tmp_path / "out")
    assert torch.equal(got[f"{name}.weight"], expected)
    rest = {n: t for n, t in weights(hf).items() if n != f"{name}.weight"}
    assert all(torch.equal(t, got[n]) for n, t in rest.items())


def test_layers_without_adapters_count(hf: Path, tmp_path: Path) -> None:
    """Some layers of some stages are adapted: which these are is not told by the rank files."""
    deep = make_hf("qwen2.5vl-7b", tmp_path / "hf", layers=6, vit_layers=2)
    mine = matrices(deep, only=r"^model\.layers\.[1345]\..*(o|down)_proj")
    peft, mm = save_adapter(tmp_path / "a", mine), tmp_path / "mm"
    grids = layout("[3,3]", "[2,0]", 1)
    to_mm(peft, mm, *grids)
    out = ("--cfg.save_hf_dir", tmp_path / "b", "--cfg.names", "old", "--overwrite")
    back = ("--cfg.mm_dir", mm, "--cfg.hf_config.hf_dir", deep, "--cfg.lora_alpha", "8")
    run(QWEN25, "lora_mm_to_hf", *back, *out)
    same(mine, adapter(tmp_path / "b"))
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert "o_proj" not in config["target_modules"]  # layers 0 and 2 have them too
    (mm / "mmconvert.json").unlink()
    no = run(QWEN25, "lora_mm_to_hf", *back, *out, check=3)
    refused(no, 3, "missing", "without a gap")
    run(QWEN25, "lora_mm_to_hf", *back, *out, *grids[:2])
    same(mine, adapter(tmp_path / "b"))
    late = {name: t for name, t in mine.items() if re.search(r"layers\.[34]", name)}
    to_mm(save_adapter(tmp_path / "c", late), mm, *grids, "--overwrite")
    (mm / "mmconvert.json").unlink()
    no = run(QWEN25, "lora_mm_to_hf", *back, *out, check=3)
    refused(no, 3, "2 of 6 layers have adapters", "llm_pp_layers")


def test_base_and_adapter_in_one_checkpoint(hf: Path, tmp_path: Path) -> None:
    """As MindSpeed-MM's ``lora_save_full_weight`` leaves it: each command takes its part."""
    mine = matrices(hf, only=r"^model\.layers.*(o|down)_proj")
    peft, mm, lora = save_adapter(tmp_path / "a", mine), tmp_path / "mm", tmp_path / "lora"
    grids = layout("[1,1]", "[2,0]", 2)
    run(QWEN25, "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", mm, *grids)
    to_mm(peft, lora, *grids)
    for path in mm.rglob("model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        there = torch.load(lora / path.relative_to(mm), weights_only=False)["model"]
        adapted = {name.rpartition(".lora_")[0] for name in there}
        wrapped: Tensors = {}
        for name, tensor in content["model"].items():
            module, _, leaf = name.rpartition(".")
            wrapped[f"{module}.base_layer.{leaf}" if module in adapted else name] = tensor
        content["model"] = {**wrapped, **there}
        torch.save(content, path)
    (mm / "mmconvert.json").unlink()
    given = ("--cfg.hf_config.hf_dir", hf, "--cfg.lora_alpha", "8")
    out = ("--cfg.save_hf_dir", tmp_path / "b")
    run(QWEN25, "lora_mm_to_hf", "--cfg.mm_dir", mm, *given, *out, "--cfg.names", "old")
    same(mine, adapter(tmp_path / "b"))
    merge(QWEN25, mm, [mm], tmp_path / "one", *given, "--cfg.to", "hf")
    merge(QWEN25, hf, [peft], tmp_path / "two")
    same(weights(tmp_path / "two"), weights(tmp_path / "one"))
    words = ("--cfg.mm_dir", mm, "--cfg.hf_config.hf_dir", hf, "--cfg.save_hf_dir", tmp_path / "c")
    refused(run(QWEN25, "mm_to_hf", *words, check=3), 3, "lora_merge", out=tmp_path / "c")


def test_doctor_says_whether_an_adapter_fits(hf: Path, tmp_path: Path) -> None:
    mine = matrices(hf, only=r"layers\.0\.self_attn\.[qv]_proj", rename=new_name)
    names = list(mine)

    def found(tensors: Tensors, **config: Any) -> dict[str, str]:
        folder = save_adapter(tmp_path / "a", tensors, None, **config)
        if config.get("peft_type") == "":
            (folder / "adapter_config.json").unlink()
        done = call("doctor", folder, "--hf_dir", hf, "--json", check=None)
        return {f["id"]: f["what"] for f in json.loads(done.stdout)["findings"]}

    assert found(mine) == {}
    old = {name.replace(".language_model", ""): t for name, t in mine.items()}
    assert found(old).keys() == {"adapter-names"}
    other = {n: t[:, :-1].contiguous() if "lora_A" in n else t for n, t in mine.items()}
    assert "for a weight of" in found(other)["wrong-shape"]
    beyond = {name.replace("layers.0.", "layers.7."): t for name, t in mine.items()}
    assert "the model has 2 layers" in found(beyond)["wrong-shape"]
    bad = {n: t * float("nan") if n == names[1] else t for n, t in mine.items()}
    assert names[1] in found(bad)["not-finite"]
    idle = {n: -t * 0 if "lora_B" in n else t for n, t in mine.items()}
    assert found(idle).keys() == {"adapter-untrained"}
    folder = save_adapter(tmp_path / "idle", idle)
    assert "never trained" in merge(QWEN25, hf, [folder], tmp_path / "out").stderr
    assert found(mine, init_lora_weights="olora").keys() == {"adapter-residual"}
    assert found(mine, peft_type="").keys() == {"adapter-config"}


def new_name(path: str) -> str:
    """A module's path as transformers has it since 4.52."""
    return path.replace("model.layers", "model.language_model.layers")
