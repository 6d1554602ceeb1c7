"""One weight file by itself: ``inspect`` says whose it is, ``mmconvert.open`` reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmconvert
from commands import layout, rank_files, refused
from inprocess import call, to_mm
from mmconvert.playground.checkpoints import make_hf
from mmread import tensor_data
from qwenvl import make_qwenvl

SIZES: dict[str, Any] = {"layers": 1, "vit_layers": 1}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf("qwen2vl-2b", tmp_path_factory.mktemp("single") / "hf", shards=2, **SIZES)


def inspected(path: Path) -> dict[str, Any]:
    return json.loads(call("inspect", path, "--json").stdout)


def opened(path: Path, want: dict[str, torch.Tensor]) -> None:
    """Every tensor, bit by bit."""
    found = mmconvert.open(path)
    assert set(found) == set(want)
    assert all(tensor_data(found[name]) == tensor_data(want[name]) for name in want)


def adapter() -> dict[str, torch.Tensor]:
    prefix = "base_model.model.model.layers.0.self_attn"
    return {f"{prefix}.{x}_proj.lora_{m}.weight": torch.randn(4, 4) for x in "qv" for m in "AB"} | {
        "base_model.model.visual.merger.mlp.0.lora_A.default.weight": torch.ones(2, 2)
    }


def test_a_weight_file_in_its_folder(hf: Path) -> None:
    paths = sorted(hf.glob("*.safetensors"))
    for path in paths:
        found = inspected(path)
        assert (found["kind"], found["family"]) == ("hf_weight_file", "Qwen2-VL")
        assert found["tensors"] == len(load_file(path))
        assert "metadata: format pt" in found["notes"][0]
        opened(path, load_file(path))
    shown = call("inspect", paths[0]).stdout
    assert "Hugging Face weight file, Qwen2-VL" in shown and "MindSpore" not in shown


def test_a_weight_file_alone(hf: Path, tmp_path: Path) -> None:
    """Its family by its names, if only one has them; without metadata; any name."""
    path = tmp_path / "vision.safetensors"
    tensors = {n: t for f in hf.glob("*.safetensors") for n, t in load_file(f).items()}
    save_file({n: t for n, t in tensors.items() if n.startswith("visual.")}, path)
    found = inspected(path)
    assert (found["kind"], found["family"]) == ("hf_weight_file", "Qwen2-VL")
    text = {n: t for n, t in tensors.items() if n.startswith("model.")}
    save_file(text, path)  # as of Qwen2.5-VL
    found = inspected(path)
    assert (found["kind"], found["family"]) == ("hf_weight_file", "")
    opened(path, text)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt"])
def test_a_pickle(name: str, hf: Path, tmp_path: Path) -> None:
    tensors = load_file(min(hf.glob("*.safetensors")))
    torch.save(tensors, tmp_path / name)
    found = inspected(tmp_path / name)
    assert (found["kind"], found["family"]) == ("hf_weight_file", "Qwen2-VL")
    assert found["tensors"] == len(tensors)
    opened(tmp_path / name, tensors)
    if name.endswith(".bin"):
        assert json.loads(call("doctor", tmp_path / name, "--json").stdout)["healthy"]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["adapter_model", "my-lora"])
def test_an_adapter(form: str, name: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / f"{name}.{form}", adapter()
    if form == "bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"format": "pt"})
    lora = {"base_model_name_or_path": "Org/Base", "peft_type": "LORA", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora))
    found = inspected(path)
    assert found["kind"] == "adapter_file"
    assert (
        "5 tensors for 0, q_proj, v_proj (LORA, rank 4, of the base model Org/Base"
        in (found["notes"][-1])
    )
    opened(path, tensors)
    if name == "adapter_model":  # its folder is the same
        *same, alone = inspected(tmp_path)["notes"]  # the folder's reader looks for both halves
        assert same == found["notes"]
        assert "is unpaired: there is no lora_B" in alone
        opened(tmp_path, tensors)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert inspected(path)["kind"] == "adapter_file"


def test_mindspore_files_are_still_theirs(tmp_path: Path) -> None:
    """By metadata, by Qwen-VL's names in MindSpore; a .ckpt of torch is none."""
    hf = make_qwenvl(tmp_path / "hf")
    words = ("QwenVLConverter", "hf_to_ms", "--cfg.hf_config.hf_dir", hf, "--cfg.ms_path")
    for end in ("ckpt", "safetensors"):
        path = tmp_path / f"ms.{end}"
        call(*words, path)
        assert inspected(path)["kind"] == "ms_file"
        opened(path, dict(mmconvert.open(path)))
    tensors = load_file(tmp_path / "ms.safetensors")
    opened(tmp_path / "ms.ckpt", tensors)
    save_file(tensors, tmp_path / "plain.safetensors")
    assert inspected(tmp_path / "plain.safetensors")["kind"] == "ms_file"
    save_file({"any.name": torch.ones(2)}, tmp_path / "any.safetensors", {"format": "ms"})
    assert inspected(tmp_path / "any.safetensors")["kind"] == "ms_file"
    for path in hf.glob("*.safetensors"):
        assert inspected(path)["kind"] == "hf_weight_file"
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "lightning.ckpt")
    assert inspected(tmp_path / "lightning.ckpt")["kind"] == "hf_weight_file"


def test_rank_files_are_still_theirs(hf: Path, tmp_path: Path) -> None:
    to_mm("qwen2vl-2b", hf, tmp_path / "mm", *layout("[1]", "[1]", 2))
    for path in rank_files(tmp_path / "mm").values():
        copy = tmp_path / "copy.bin"
        shutil.copy(path, copy)
        for file in (path, copy):
            assert inspected(file)["kind"] == "mm_rank_file"
            opened(file, torch.load(path)["model"])


NONE: dict[str, bytes] = {
    "empty.safetensors": b"",
    "text.safetensors": b"no header at all",
    "empty.bin": b"",
    "text.pt": b"text",
    "x.ckpt": b"\xff\xff\xff",
}


@pytest.mark.parametrize("name", NONE)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(NONE[name])
    refused(call("inspect", tmp_path / name, check=None), 3, name)
    with pytest.raises(mmconvert.errors.CheckpointError, match=name):
        mmconvert.open(tmp_path / name)
