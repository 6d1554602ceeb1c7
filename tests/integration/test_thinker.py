"""Qwen2.5-Omni fine-tuned and saved as the thinker alone, by transformers' own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import layout, none
from inprocess import call, to_hf, to_mm, to_other
from mmconvert.playground.checkpoints import make_hf
from mmread import MANIFEST, compare_hf, compare_mm, files_in
from tinyfamilies import make_omni, omni_thinker

MODEL = "qwen2.5omni"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model, with the hub's names."""
    return make_omni(tmp_path_factory.mktemp("omni") / "hf")


@pytest.fixture(scope="module")
def flags(whole: Path) -> list[str]:
    """A layout of two stages for the sizes of the tiny model."""
    thinker = json.loads((whole / "config.json").read_text())["thinker_config"]
    text = thinker["text_config"]["num_hidden_layers"]
    vit, audio = thinker["vision_config"]["depth"], thinker["audio_config"]["encoder_layers"]
    return layout(f"[1,{text - 1}]", f"[{vit},0]", 2, f"audio_pp_layers=[{audio},0]")


def test_as_transformers_saves_it(whole: Path, flags: list[str], tmp_path: Path) -> None:
    """The same MM checkpoint; it returns byte for byte, or into the whole model."""
    hf, mm = tmp_path / "thinker", tmp_path / "mm"
    model = omni_thinker(2)
    model.save_pretrained(hf)
    assert json.loads((hf / "config.json").read_text())["model_type"] == "qwen2_5_omni_thinker"
    to_mm(MODEL, whole, tmp_path / "want", *flags)
    to_mm(MODEL, hf, mm, *flags)
    none(compare_mm(tmp_path / "want", mm))
    to_hf(MODEL, mm, hf, tmp_path / "back")
    assert files_in(tmp_path / "back") - {MANIFEST} == files_in(hf)
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    loaded, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    pairs = zip(model.state_dict().items(), loaded.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    to_hf(MODEL, mm, whole, tmp_path / "whole")
    none(compare_hf(whole, tmp_path / "whole"))


def alone(hf: Path) -> Path:
    """The thinker of a folder, in the hub's names without the prefix."""
    tensors = {
        name.removeprefix("thinker."): tensor
        for name, tensor in load_file(hf / "model.safetensors").items()
        if name.startswith("thinker.")
    }
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    config = json.loads((hf / "config.json").read_text())["thinker_config"]
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_5_omni_thinker"}))
    return hf


def test_in_the_names_of_the_hub(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 2, "audio_layers": 2}
    model = "qwen2.5omni-7b"
    hf = make_hf(model, tmp_path / "hf", shards=1, **sizes)
    to_mm(model, hf, tmp_path / "want", *FLAGS_SMALL)
    alone(hf)
    to_mm(model, hf, tmp_path / "mm", *FLAGS_SMALL)
    none(compare_mm(tmp_path / "want", tmp_path / "mm"))
    call("verify", tmp_path / "mm", hf)
    call("AutoConverter", "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "a")
    call("suggest", hf, "--pp", "2")
    found = call("inspect", hf, "--json").stdout
    assert json.loads(found)["family"] == "Qwen2.5-Omni"
    to_other(model, tmp_path / "mm", tmp_path / "mm2", "--cfg.hf_config.hf_dir", str(hf))


FLAGS_SMALL = layout("[1,1]", "[2,0]", 1, "audio_pp_layers=[2,0]")


def test_doctor_knows_it(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 1, "vit_layers": 1, "audio_layers": 1}
    hf = alone(make_hf("qwen2.5omni-7b", tmp_path / "hf", shards=1, **sizes))
    report = json.loads(call("doctor", hf, "--json").stdout)
    assert report["family"] == "Qwen2.5-Omni"
    assert not {f["id"] for f in report["findings"]} & {"unsupported-model", "other-spelling"}
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    report = json.loads(call("doctor", hf, "--json", check=3).stdout)
    assert [f["id"] for f in report["findings"] if f["severity"] == "error"] == ["missing-tensor"]
