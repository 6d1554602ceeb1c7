"""The generator of test checkpoints must not drift: the golden records rest on its values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mmconvert.playground.checkpoints import MODELS, NEW_NAMES, make_hf, nested_config, renamed
from mmread import compare_hf, read_weight_file, weight_files

WEIGHTS = {
    "qwen2vl-2b": "272f01f45ad8f60d50dd94ee75151291",
    "qwen2vl-7b": "d0b0f7d339a44fa2e2ceb272fbb3b36a",
    "qwen2.5vl-3b": "90dc98362343ec5ad3dc67e4db3d285a",
    "qwen2.5vl-7b": "5199fdd6e4f4ed899fbb1636df27ddfa",
    "qwen2.5-7b": "65ddb347c6c85f000d872e1f135d17f8",
    "qwen2.5omni-7b": "bac0319058bc12fe49025da86b210f9a",
    "internvl2-1b": "7d3c36a83145aa676492029b540634e2",
    "internvl2-2b": "dabb8f0bf2fceff93f5bc500f3e7748e",
    "internvl2-8b": "7769575d79bc70d1ae2d4346938f5df3",
    "internvl2-76b": "b3ff9b0f86498277c9e4864e436a9c85",
    "internvl2.5-4b": "3e5f10ede9a8769dccd10babe3138c17",
    "internvl3-8b": "60852ae8ba9eb579c4801ff319752a41",
    "qwen3vl-4b": "22fb03848704954fcef05194d7071e21",
    "qwen3vl-8b": "da5230c605dac22cf82181328aaec23e",
    "qwen3vl-30b-a3b": "4ed6edba0a84134c459fd61dc0b7a5a0",
    "glm4.1v-9b": "8b5bcce4f6cad487fae527fed88b4291",
    "deepseekvl2": "2395b88051bff6a76da7ee650f9c98ef",
    "internvl3.5-1b": "d52e3da610faef8770ba25405b3a8279",
    "internvl3.5-8b": "5ce2574910a51612748e6f948dd174c9",
    "internvl3.5-30b-a3b": "cb2ba2151f321b8738106cdea4c20b8e",
    "glm4.5v": "156acf2311a45868eac77a211bec4cd8",
    "qwen3omni-30b-a3b": "4dc72fc395e68c368be34795dccca8ff",
}
OVERRIDES: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2vl-2b", {"shards": 1}, "6e30849ddbf7bdc0d57785c1caadb576"),
    (
        "qwen2.5vl-7b",
        {"layers": 3, "vocab_size": 301, "tie": True, "seed": "x"},
        "0931ee72bb2005b5f6e6ffa65079461a",
    ),
    (
        "qwen2vl-2b",
        {"rename": NEW_NAMES, "extra": [("model.foo", (3, 5))]},
        "b9d6697371460f73b734bde3fba9540f",
    ),
]


def digest(folder: Path) -> str:
    """A digest of the names and bytes of a folder's weight files."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:32]


def test_every_model_has_a_digest() -> None:
    assert set(WEIGHTS) == set(MODELS)


@pytest.mark.parametrize("model", WEIGHTS)
def test_weights(model: str, tmp_path: Path) -> None:
    assert digest(make_hf(model, tmp_path)) == WEIGHTS[model]


@pytest.mark.parametrize(("model", "options", "expected"), OVERRIDES)
def test_overrides(model: str, options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert digest(make_hf(model, tmp_path, **options)) == expected


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no size"):
        make_hf("qwen2vl-2b", tmp_path, depth=3)


def test_new_names_with_the_same_values(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 2, "shards": 1}
    old = make_hf("qwen2vl-2b", tmp_path / "old", **sizes)
    new = make_hf("qwen2vl-2b", tmp_path / "new", rename=NEW_NAMES, same_values=True, **sizes)
    assert compare_hf(old, new)
    _, before = read_weight_file(old / "model.safetensors")
    _, after = read_weight_file(new / "model.safetensors")
    assert after == {renamed(name): row for name, row in before.items()}
    assert "model.language_model.layers.1.mlp.up_proj.weight" in after
    assert "model.visual.blocks.1.attn.qkv.bias" in after


def test_nested_config(tmp_path: Path) -> None:
    hf = make_hf("qwen2.5vl-3b", tmp_path, layers=2, edit_config=nested_config)
    config = json.loads((hf / "config.json").read_text())
    text = config["text_config"]
    assert (text["num_hidden_layers"], text["num_key_value_heads"], text["dtype"]) == (
        2,
        2,
        "bfloat16",
    )
    assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is True
    assert "torch_dtype" not in config
    assert "num_key_value_heads" not in config
    assert len(weight_files(hf)) == 2
