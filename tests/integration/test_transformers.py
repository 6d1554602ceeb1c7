"""Checkpoints that the transformers library wrote, there and back, and loaded by it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from api import Shape, to_hf, to_mm
from mmconvert.playground.checkpoints import NEW_NAMES, renamed
from mmread import MANIFEST, compare_mm, files_in
from nights import in_turns
from tinymodels import CONVERTERS, inputs, save, tiny_model

# TP 2, PP 2, VPP 2: the encoder crosses a virtual stage, the text decoder two.
LAYOUT = Shape(vit=[[1, 2], [0, 0]], llm=[[0, 1], [2, 1]], tp=2)
FOLDERS = {"mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"}

SPELT_ANEW = ("qwen2_vl", "qwen2_5_vl")  # by transformers 4.52
RENAMED = pytest.mark.parametrize("kind", SPELT_ANEW)
DENSE = pytest.mark.parametrize("kind", [kind for kind in CONVERTERS if "moe" not in kind])
TIED, SIZES = (False, True), ("5GB", "60KB")


def assert_same_files(want: Path, got: Path) -> None:
    """Every file of one folder is in the other, byte for byte, and no other file is."""
    assert files_in(got) - {MANIFEST} == files_in(want)
    different = [p for p in files_in(want) if (want / p).read_bytes() != (got / p).read_bytes()]
    assert different == []


def there_and_back(kind: str, source: Path, tmp_path: Path) -> Path:
    """The HF folder that comes of HF -> MM -> HF."""
    mm, back = tmp_path / "mm", tmp_path / "back"
    to_mm(CONVERTERS[kind], source, mm, LAYOUT)
    assert {p.name for p in (mm / "release").iterdir()} == FOLDERS
    to_hf(CONVERTERS[kind], mm, source, back)
    return back


def load(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The folder as the model's own class loads it; nothing may be missing or left over."""
    loaded, info = type(model).from_pretrained(
        folder, output_loading_info=True, dtype=dtype, attn_implementation="eager"
    )
    problems = {key: found for key, found in info.items() if found}
    assert problems == {}
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    return loaded.eval()


def logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def assert_same_model(model: Any, source: Path, back: Path) -> None:
    """Both folders are loaded, as `Module.to` also rounds buffers that loading does not."""
    batch = inputs()
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    want, got = (logits(load(model, folder, model.dtype), batch) for folder in (source, back))
    assert want.float().std() > 0.1  # the weights matter
    assert torch.equal(got, want)


@RENAMED
def test_the_inner_model_saved_alone(kind: str, tmp_path: Path) -> None:
    """As AutoModel saves it; the class with a head loads that too, as the head is tied."""
    model = tiny_model(kind, tied=True)
    source = save(model, tmp_path / "source")
    inner = save(model.model, tmp_path / "inner")
    assert not any(n.startswith("model.") for n in load_file(inner / "model.safetensors"))
    assert type(model).from_pretrained(inner, output_loading_info=True)[1]["missing_keys"] == set()
    to_mm(CONVERTERS[kind], source, tmp_path / "want", LAYOUT)
    to_mm(CONVERTERS[kind], inner, tmp_path / "mm", LAYOUT)
    assert compare_mm(tmp_path / "want", tmp_path / "mm") == []
    to_hf(CONVERTERS[kind], tmp_path / "mm", inner, tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (inner / name).read_bytes()


@pytest.mark.parametrize(("kind", "tied", "size"), in_turns(tuple(CONVERTERS), TIED, SIZES))
def test_back_byte_for_byte(kind: str, tied: bool, size: str, tmp_path: Path) -> None:
    """The folder comes back as it was, and the library loads it to the same logits."""
    dtype = torch.bfloat16 if size == "60KB" else torch.float32
    model = tiny_model(kind, tied=tied, dtype=dtype)
    source = save(model, tmp_path / "source", size)
    weights = [name for name in files_in(source) if name.endswith(".safetensors")]
    assert (len(weights) > 2) == (size == "60KB")
    back = there_and_back(kind, source, tmp_path)
    assert_same_files(source, back)
    assert_same_model(model, source, back)


def rewrite_names(source: Path, out: Path) -> Path:
    """The checkpoint with every tensor under its name of transformers 4.52 and later."""
    out.mkdir()
    for name in sorted(files_in(source)):
        if name.endswith(".safetensors"):
            tensors = {renamed(key): t for key, t in load_file(source / name).items()}
            save_file(tensors, out / name, metadata={"format": "pt"})
        elif name.endswith(".index.json"):
            index = json.loads((source / name).read_text())
            index["weight_map"] = {renamed(k): f for k, f in index["weight_map"].items()}
            (out / name).write_text(json.dumps(index, indent=2))
        else:
            (out / name).write_bytes((source / name).read_bytes())
    return out


def tensor_names(folder: Path) -> set[str]:
    paths = [folder / name for name in files_in(folder) if name.endswith(".safetensors")]
    return {key for path in paths for key in load_file(path)}


@pytest.mark.parametrize(("kind", "tied", "size"), in_turns(SPELT_ANEW, TIED, SIZES))
def test_names_of_later_versions(kind: str, tied: bool, size: str, tmp_path: Path) -> None:
    """`model.language_model.*` and `model.visual.*` come back under these names."""
    model = tiny_model(kind, tied=tied)
    hub = save(model, tmp_path / "hub", size)
    source = rewrite_names(hub, tmp_path / "source")
    prefixes = tuple(new for _, new in NEW_NAMES)
    others = {name for name in tensor_names(source) if not name.startswith(prefixes)}
    assert others == (set() if tied else {"lm_head.weight"})
    back = there_and_back(kind, source, tmp_path)
    assert_same_files(source, back)
    assert_same_model(model, hub, back)
    # Both spellings are one model: their MM checkpoints are the same files.
    again = tmp_path / "again"
    to_mm(CONVERTERS[kind], hub, again, LAYOUT)
    for path in sorted(again.rglob("*.pt")):
        other = tmp_path / "mm" / path.relative_to(again)
        assert other.read_bytes() == path.read_bytes(), path.name


@DENSE
def test_trained_weights_reach_the_library(kind: str, tmp_path: Path) -> None:
    """What is changed in the MM checkpoint, and nothing else, is changed in what is loaded.

    Without it a conversion that copied the original would pass all the tests above.
    """
    model = tiny_model(kind)
    source = save(model, tmp_path / "source")
    mm, back = tmp_path / "mm", tmp_path / "back"
    to_mm(CONVERTERS[kind], source, mm, LAYOUT)
    name = "text_decoder.decoder.layers.1.mlp.linear_fc2.weight"  # layer 2 of the model
    for tp in range(2):
        path = mm / "release" / f"mp_rank_{tp:02d}_000" / "model_optim_rng.pt"
        content = torch.load(path, weights_only=True)
        content["model1"][name] *= 2
        torch.save(content, path)
    to_hf(CONVERTERS[kind], mm, source, back)
    loaded = load(model, back, torch.float32)
    before, after = model.state_dict(), loaded.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"model.language_model.layers.2.mlp.down_proj.weight"}
    (key,) = changed
    assert torch.equal(after[key], before[key] * 2)
