"""``null`` in headers and in config.json: read as safetensors and transformers read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from commands import none
from inprocess import call, converter_of, to_hf, to_mm
from mmconvert import converters
from mmconvert.errors import CheckpointError
from mmconvert.formats.hf.model import config_model
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_mm

SIZES: dict[str, Any] = {"layers": 1, "vit_layers": 1}


def rewrite_header(path: Path, metadata: object) -> None:
    """Another ``__metadata__`` in a weight file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = {**json.loads(raw[8:end]), "__metadata__": metadata}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def test_no_metadata(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, **SIZES)
    to_mm("qwen2vl-2b", hf, tmp_path / "want")
    rewrite_header(hf / "model.safetensors", None)
    with safe_open(hf / "model.safetensors", "np") as file:
        assert file.metadata() is None
    to_mm("qwen2vl-2b", hf, tmp_path / "mm")
    none(compare_mm(tmp_path / "want", tmp_path / "mm"))
    to_hf("qwen2vl-2b", tmp_path / "mm", hf, tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    to_hf("qwen2vl-2b", tmp_path / "mm", hf, tmp_path / "many", "--max-shard-size", "100KB")
    call("verify", hf, tmp_path / "many")
    assert json.loads(call("doctor", hf, "--json").stdout)["healthy"]


@pytest.mark.parametrize("value", [[], "pt", 1, {"format": None}, {"format": 1}, True], ids=repr)
def test_metadata_that_is_none_of_both(value: object, tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, **SIZES)
    rewrite_header(hf / "model.safetensors", value)
    assert "__metadata__" in to_mm("qwen2vl-2b", hf, tmp_path / "mm", check=3).stderr


CLASSES = {
    "qwen2vl-2b": "Qwen2VLConfig",
    "qwen2.5vl-7b": "Qwen2_5_VLConfig",
    "qwen2.5omni-7b": "Qwen2_5OmniConfig",
}
NULLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "qwen2vl-2b": (("text_config",), ("vision_config",)),
    "qwen2.5vl-7b": (("text_config",), ("vision_config",)),
    "qwen2.5omni-7b": (
        *((("thinker_config", key)) for key in ("text_config", "vision_config", "audio_config")),
        ("thinker_config",),
    ),
}
# Our dimension -> the part and the attribute of transformers' config.
SAME = {
    "llm.layers": ("text_config", "num_hidden_layers"),
    "llm.heads": ("text_config", "num_attention_heads"),
    "llm.query_groups": ("text_config", "num_key_value_heads"),
    "llm.hidden": ("text_config", "hidden_size"),
    "vit.layers": ("vision_config", "depth"),
    "vit.heads": ("vision_config", "num_heads"),
    "audio.layers": ("audio_config", "encoder_layers"),
    "audio.width": ("audio_config", "d_model"),
}


@pytest.mark.parametrize("absent", [False, True], ids=["null", "absent"])
@pytest.mark.parametrize(
    ("model", "place"), [(model, place) for model, places in NULLS.items() for place in places]
)
def test_parts_of_the_config(
    model: str, place: tuple[str, ...], absent: bool, tmp_path: Path
) -> None:
    """Sizes are those of transformers' own class."""
    import transformers

    sizes: dict[str, Any] = SIZES | ({"audio_layers": 1} if "omni" in model else {})
    hf = make_hf(model, tmp_path / "hf", shards=1, **sizes)
    config: dict[str, Any] = json.loads((hf / "config.json").read_text())
    part = config
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = None
    if absent:
        del part[place[-1]]
    (hf / "config.json").write_text(json.dumps(config))
    dims = config_model(converters.load(converter_of(model)), hf).dims
    theirs = getattr(transformers, CLASSES[model]).from_dict(config)
    theirs = getattr(theirs, "thinker_config", theirs)
    expected = {
        dim: getattr(getattr(theirs, part), name)
        for dim, (part, name) in SAME.items()
        if hasattr(theirs, part)
    }
    assert {dim: dims[dim] for dim in expected} == expected


def test_a_null_text_config_converts(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, **SIZES)
    to_mm("qwen2vl-2b", hf, tmp_path / "want")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "text_config": None}))
    to_mm("qwen2vl-2b", hf, tmp_path / "mm")
    none(compare_mm(tmp_path / "want", tmp_path / "mm"))
    assert json.loads(call("doctor", hf, "--json").stdout)["healthy"]


@pytest.mark.parametrize("model", ["qwen2vl-2b", "qwen2.5vl-7b"])
def test_no_number_of_query_groups(model: str, tmp_path: Path) -> None:
    """null is one for each head; absent is the class's own default."""
    import transformers

    hf = make_hf(model, tmp_path / "hf", shards=1, **SIZES)
    config = json.loads((hf / "config.json").read_text())
    family = converters.load(converter_of(model))
    for value in (None, "absent"):
        config["num_key_value_heads"] = value
        if value == "absent":
            del config["num_key_value_heads"]
        (hf / "config.json").write_text(json.dumps(config))
        theirs = getattr(transformers, CLASSES[model]).from_dict(config).text_config
        assert config_model(family, hf).dims["llm.query_groups"] == theirs.num_key_value_heads


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_parts_that_are_no_objects(key: str, tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, **SIZES)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, key: []}))
    with pytest.raises(CheckpointError, match=f"{key} is not an object"):
        config_model(converters.load("Qwen2VLConverter"), hf)
