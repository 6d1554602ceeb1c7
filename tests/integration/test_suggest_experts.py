"""suggest counts experts: parameters, those that work on a token, and an expert-parallel size."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from inprocess import HF, MM, call
from mmconvert.modeljson.write import script_flags
from mmconvert.playground.checkpoints import make_hf
from mmconvert.sharding.layout import Layout

LARGE: dict[str, Any] = {
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "text_config": {
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    "vision_config": {"out_hidden_size": 4096, "num_position_embeddings": 2304, "patch_size": 16},
}


def suggested(folder: Path, *words: str) -> dict[str, Any]:
    return json.loads(call("suggest", folder, "--json", *words).stdout)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Qwen3-VL-235B-A22B as its config.json alone."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(LARGE))
    return tmp_path / "large"


def test_the_name_of_a_large_model_is_what_is_counted(large: Path) -> None:
    """235B-A22B; on 64 ranks of 64 GB each ep rank holds 16 of 128 experts."""
    found = suggested(large, "--pp", "4", "--tp", "2")
    assert found["parameters"] // 10**9 == 235
    assert found["active_parameters"] // 10**9 == 22
    assert found["parallel_config"]["ep_size"] == 8
    assert found["command"].endswith("--cfg.parallel_config.ep_size 8")
    assert found["parallel_config"]["vit_pp_layers"] == [27, 0, 0, 0]
    sizes = [
        suggested(large, "--pp", "4", "--tp", "2", "--device-memory", n) for n in ("32", "999")
    ]
    assert [s["parallel_config"]["ep_size"] for s in sizes] == [32, 1]


@pytest.mark.parametrize("model", ["qwen3vl-30b-a3b", "deepseekvl2"])
def test_every_parameter_is_counted_once(model: str, tmp_path: Path) -> None:
    sizes = {} if model == "deepseekvl2" else {"deepstack": [0, 1, 2], "vit_layers": 3}
    hf = make_hf(model, tmp_path / "hf", **sizes)
    count = experts = 0
    for path in hf.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                shape = file.get_slice(name).get_shape()
                count += prod(shape)
                experts += prod(shape) if ".experts." in name else 0
    found = suggested(hf, "--pp", "1")
    assert found["parameters"] == count
    config = json.loads((hf / "config.json").read_text())
    text = config.get("text_config") or config["language_config"]
    if "num_experts_per_tok" in text:
        assert found["active_parameters"] == count - experts * 14 // 16
    ranks = suggested(hf, "--pp", "1", "--ep", "4")["ranks"]
    assert sum(rank["parameters"] for rank in ranks) == count - experts * 3 // 4


def test_sizes_of_config_alone_are_those_of_the_files(tmp_path: Path) -> None:
    hf = make_hf("qwen3vl-30b-a3b", tmp_path / "hf")
    keys = ("parameters", "active_parameters", "ranks", "parallel_config")
    a, b = (suggested(hf, "--pp", "2", *more) for more in ((), ("--config-only",)))
    assert {k: a[k] for k in keys} == {k: b[k] for k in keys}


def test_an_ep_that_does_not_divide_is_refused(large: Path, tmp_path: Path) -> None:
    said = call("suggest", large, "--pp", "1", "--ep", "3", check=2).stderr
    assert "[1, 2, 4, 8, 16, 32, 64, 128]" in said
    dense = make_hf("qwen3vl-4b", tmp_path / "dense", layers=2, vit_layers=1, deepstack=[0])
    assert "no experts" in call("suggest", dense, "--pp", "1", "--ep", "2", check=2).stderr


def test_the_printed_command_runs(tmp_path: Path) -> None:
    hf = make_hf("qwen3vl-30b-a3b", tmp_path / "hf")
    found = suggested(hf, "--pp", "2", "--ep", "4")
    pairs = found["parallel_config"].items()
    words = [w for k, v in pairs for w in (f"--cfg.parallel_config.{k}", json.dumps(v))]
    call("AutoConverter", "hf_to_mm", HF, hf, MM, tmp_path / "mm", *words, "--dry-run")
    layout = Layout({"llm": 2}, {"llm": ((3, 3),)}, 4, decoder="llm")
    assert "--expert-model-parallel-size 4" in script_flags({}, layout)
    assert "-ep4 " in call("suggest", hf, "--pp", "2", "--ep", "4", check=0).stdout
