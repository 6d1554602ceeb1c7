"""moe_expert: experts merged, split, transposed; against records and transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tinymoe
from inprocess import call
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_side_files, row_of, weight_files

RECORDS = Path(__file__).parents[1] / "golden" / "experts"
MODELS = ("glm4.5v", "internvl3.5-30b-a3b", "qwen3omni-30b-a3b", "qwen3vl-30b-a3b")
SMALL: dict[str, dict[str, Any]] = {
    "qwen3vl-30b-a3b": {"layers": 2, "vit_layers": 1, "deepstack": [0]}
}


def moe_expert(style: str, hf: Path, out: Path, *more: str, check: int = 0) -> str:
    words = ("--style", style, "--hf_dir", hf, "--save_dir", out, *more)
    return call("moe_expert", *words, check=check).stderr


def model(name: str, out: Path) -> Path:
    return make_hf(name, out, **SMALL.get(name, {}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the files that the index lists, or of all."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values())
    assert names == weight_files(folder)
    found: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        found |= load_file(folder / name)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_the_record_of_glm45v(tmp_path: Path) -> None:
    """MindSpeed-MM's own merge: names, shapes, values and files; split gives all back."""
    steps = json.loads((RECORDS / "glm4.5v.json").read_text())["steps"]
    hf, merged, back = make_hf("glm4.5v", tmp_path / "hf"), tmp_path / "merged", tmp_path / "back"
    places = {"{hf}": str(hf), "{mm}": str(merged)}
    for step, out in zip(steps, (merged, back), strict=True):
        call(*(places.get(word, str(out) if word == "{out}" else word) for word in step["argv"]))
    weight_map = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: row_of(tensor) for name, tensor in tensors(merged).items()}
    expected = {
        name: (tuple(shape), digest, file) for name, shape, digest, file in steps[0]["tensors"]
    }
    assert {n: (*r[1:], weight_map[n]) for n, r in found.items()} == expected
    assert same(tensors(hf), tensors(back))
    assert compare_side_files(hf, back) == []


def test_the_record_of_internvl35(tmp_path: Path) -> None:
    """What MindSpeed-MM writes as DCP is the same merge under a prefix."""
    steps = json.loads((RECORDS / "internvl3.5-30b-a3b.json").read_text())["steps"]
    hf, merged = make_hf("internvl3.5-30b-a3b", tmp_path / "hf"), tmp_path / "merged"
    moe_expert("merge", hf, merged, "--max_shard_size", "500KB")
    found = {f"model.{name}": row_of(tensor)[1:] for name, tensor in tensors(merged).items()}
    expected = {n: (tuple(shape), digest) for n, shape, digest in steps[0]["tensors"]["model"]}
    assert found == expected


@pytest.mark.parametrize("name", MODELS)
def test_all_styles_there_and_back(name: str, tmp_path: Path) -> None:
    """From a tensor for each expert through every form and back, by the side of plain torch."""
    hf, single, merged = model(name, tmp_path / "hf"), tmp_path / "single", tmp_path / "merged"
    if name == "qwen3vl-30b-a3b":
        moe_expert("split", hf, single)
    else:
        single = hf
    moe_expert("merge", single, merged)
    five, four, back = (tmp_path / n for n in ("five", "four", "back"))
    moe_expert("transformers5", merged, five)
    moe_expert("transformers4", five, four)
    moe_expert("split", five, back)
    whole = tensors(single)
    assert same(whole, tensors(back))
    one = next(n for n in tensors(five) if n.endswith(".1.mlp.experts.gate_up_proj"))
    prefix = one.removesuffix(".gate_up_proj")
    count = len({n for n in whole if n.startswith(f"{prefix}.") and "gate_proj" in n})
    pairs = [
        torch.cat([whole[f"{prefix}.{e}.{x}_proj.weight"] for x in ("gate", "up")])
        for e in range(count)
    ]
    assert count > 1
    assert torch.equal(tensors(five)[one], torch.stack(pairs))
    stack = torch.stack([pair.T for pair in pairs])
    assert torch.equal(tensors(four)[one], stack)
    assert torch.equal(tensors(merged)[one.removeprefix("thinker.")].reshape(stack.shape), stack)
    if name == "qwen3vl-30b-a3b":
        assert same(tensors(hf), tensors(merged))


@pytest.mark.parametrize(
    "kind", ["glm45v", "internvl_moe", "omni3", "omni3_thinker", "qwen3vl_moe"]
)
def test_transformers_loads_what_is_written(kind: str, tmp_path: Path) -> None:
    """Its own save_pretrained, split again after a merge, or with stacks as a version has them."""
    made = getattr(tinymoe, kind)()
    hf, last = tinymoe.save(made, tmp_path / "hf"), tmp_path / "merged"
    moe_expert("transformers4" if kind == "qwen3vl_moe" else "merge", hf, last)
    styles = ["transformers5"] if kind == "qwen3vl_moe" else ["split", "transformers5"]
    for folder in [last] if kind == "qwen3vl_moe" else []:
        assert _equal(made, folder)
    for style in styles:
        moe_expert(style, last, tmp_path / style)
        assert _equal(made, tmp_path / style)


def _equal(made: Any, folder: Path) -> bool:
    loaded = type(made).from_pretrained(folder).state_dict()
    own = made.state_dict()
    return own.keys() == loaded.keys() and all(torch.equal(own[k], loaded[k]) for k in own)


def test_the_correction_bias_keeps_its_dtype(tmp_path: Path) -> None:
    hf = make_hf("glm4.5v", tmp_path / "hf")
    moe_expert("merge", hf, tmp_path / "out", "--dtype", "fp16")
    found = tensors(tmp_path / "out")
    bias = {n: t.dtype for n, t in found.items() if n.endswith("e_score_correction_bias")}
    assert len(bias) == 3
    assert set(bias.values()) == {torch.float32}
    assert {t.dtype for n, t in found.items() if n not in bias} == {torch.float16}


def changed(hf: Path, change: Any) -> None:
    """Changes the tensors of a checkpoint of one file."""
    path = hf / "model.safetensors"
    content = load_file(path)
    change(content)
    save_file(content, path, metadata={"format": "pt"})


E = "model.language_model.layers.2.mlp.experts"


def lacks_one(content: dict[str, torch.Tensor]) -> None:
    del content[f"{E}.3.up_proj.weight"]


def one_more(content: dict[str, torch.Tensor]) -> None:
    content[f"{E}.8.up_proj.weight"] = content[f"{E}.3.up_proj.weight"].clone()


def in_a_dense_layer(content: dict[str, torch.Tensor]) -> None:
    content[f"{E.replace('2', '0')}.0.up_proj.weight"] = content[f"{E}.3.up_proj.weight"].clone()


def another_name(content: dict[str, torch.Tensor]) -> None:
    content[f"{E}.3.up_proj.bias"] = torch.zeros(16, dtype=torch.bfloat16)


def another_size(content: dict[str, torch.Tensor]) -> None:
    content[f"{E}.3.up_proj.weight"] = torch.zeros(15, 48, dtype=torch.bfloat16)


def both_forms(content: dict[str, torch.Tensor]) -> None:
    content[f"{E}.gate_up_proj"] = torch.zeros(8 * 48, 32, dtype=torch.bfloat16)


def in_fp8(content: dict[str, torch.Tensor]) -> None:
    content[f"{E}.3.up_proj.weight_scale_inv"] = torch.ones(1, 1)


FAULTS = {
    lacks_one: ("1 tensor missing", f"{E}.3.up_proj.weight"),
    one_more: ("beyond", "8 experts"),
    in_a_dense_layer: ("beyond",),
    another_name: ("no place", f"{E}.3.up_proj.bias"),
    another_size: ("15 rows", "16"),
    both_forms: ("of their own and merged ones",),
    in_fp8: ("quantised", "weight_scale_inv"),
}


@pytest.mark.parametrize("change", FAULTS, ids=lambda change: change.__name__)
def test_what_does_not_fit_is_refused(change: Any, tmp_path: Path) -> None:
    hf = make_hf("glm4.5v", tmp_path / "hf", shards=1)
    changed(hf, change)
    said = moe_expert("merge", hf, tmp_path / "out", check=3)
    for words in FAULTS[change]:
        assert words in said
    assert not (tmp_path / "out").exists()


def test_what_is_done_already_is_said(tmp_path: Path) -> None:
    hf, merged = make_hf("glm4.5v", tmp_path / "hf"), tmp_path / "merged"
    moe_expert("merge", hf, merged)
    out = tmp_path / "out"
    assert "merged already" in moe_expert("merge", merged, out, check=2)
    assert "split already" in moe_expert("split", hf, out, check=2)
    assert "not merged" in moe_expert("transformers5", hf, out, check=2)
    moe_expert("transformers5", merged, out)
    assert "already" in moe_expert("transformers5", out, tmp_path / "more", check=2)


def test_other_models_are_refused(tmp_path: Path) -> None:
    dense = make_hf("internvl2-2b", tmp_path / "dense", layers=1, vit_layers=1)
    assert "without experts" in moe_expert("merge", dense, tmp_path / "out", check=3)
    plain = make_hf("qwen2vl-2b", tmp_path / "plain", layers=1, vit_layers=1)
    assert "'qwen2_vl'" in moe_expert("merge", plain, tmp_path / "out", check=3)


def test_dry_run_and_overwrite(tmp_path: Path) -> None:
    hf, out = make_hf("glm4.5v", tmp_path / "hf"), tmp_path / "out"
    moe_expert("merge", hf, out, "--dry-run")
    assert not out.exists()
    moe_expert("merge", hf, out)
    assert "exists" in moe_expert("merge", hf, out, check=2)
    moe_expert("merge", hf, out, "--overwrite")
