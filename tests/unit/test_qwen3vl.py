"""Qwen3-VL's experts as the hub stores them and as transformers 5 saves them; its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmconvert import converters
from mmconvert.config import HFConfig, HFToMM, MMToHF, Options, ParallelConfig
from mmconvert.directions.mm import hf_to_mm, mm_to_hf
from mmconvert.errors import CheckpointError, LayoutError
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm

FAMILY = converters.load("Qwen3VLMegatronConverter")
SMALL = {"layers": 2, "vit_layers": 3, "deepstack": [0, 2]}
WIDE = ParallelConfig(tp_size=2, ep_size=4, llm_pp_layers=((1, 1),), vit_pp_layers=((3, 0),))


def model(folder: Path, **sizes: object) -> Path:
    return make_hf("qwen3vl-30b-a3b", folder, shards=1, **{**SMALL, **sizes})


def output_first(hf: Path, out: Path, names: tuple[str, ...] = ("gate_up", "down")) -> Path:
    """The same model with experts as transformers 5 saves them."""
    out.mkdir()
    for path in hf.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    for path in hf.glob("*.safetensors"):
        tensors = {
            name: t.transpose(1, 2).contiguous()
            if name.endswith(tuple(f".experts.{n}_proj" for n in names))
            else t
            for name, t in load_file(path).items()
        }
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    return out


def test_both_orders_of_stacked_experts_are_one_model(tmp_path: Path) -> None:
    """The same MM files, and each comes back in the order of its hf_dir, or of the other's."""
    hub = model(tmp_path / "hub")
    later = output_first(hub, tmp_path / "later")
    for name, hf in (("a", hub), ("b", later)):
        hf_to_mm(FAMILY, HFToMM(tmp_path / name, HFConfig(hf), WIDE), Options())
    assert compare_mm(tmp_path / "a", tmp_path / "b") == []
    for name, hf in (("a", hub), ("b", later), ("a", later)):
        back = tmp_path / f"back {name} {hf.name}"
        mm_to_hf(FAMILY, MMToHF(back, tmp_path / name, HFConfig(hf)), Options())
        assert compare_hf(hf, back) == []


@pytest.mark.parametrize("moe_inter", [24, 48], ids=["2x = h", "x = h"])
def test_where_one_shape_tells_nothing_the_other_does(moe_inter: int, tmp_path: Path) -> None:
    hub = model(tmp_path / "hub", moe_inter=moe_inter)
    later = output_first(hub, tmp_path / "later")
    for name, hf in (("a", hub), ("b", later)):
        hf_to_mm(FAMILY, HFToMM(tmp_path / name, HFConfig(hf)), Options())
    assert compare_mm(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.parametrize(
    "sizes",
    [
        {"deepstack": []},
        {"deepstack": [1]},
        {"deepstack": [2, 0, 1], "tie": True},
        {"deepstack": [0], "experts": 6, "kv": 2},
    ],
    ids=["no merger", "one", "out of order, tied", "6 experts"],
)
def test_models_of_other_sizes(sizes: dict[str, Any], tmp_path: Path) -> None:
    """Each merger stands with its layer; whatever the sizes, all comes back."""
    hub = model(tmp_path / "hub", **sizes)
    text, vision = ((1, 1), (0, 0)), ((2, 1), (0, 0))
    layout = ParallelConfig(tp_size=2, ep_size=2, llm_pp_layers=text, vit_pp_layers=vision)
    hf_to_mm(FAMILY, HFToMM(tmp_path / "mm", HFConfig(hub), layout), Options())
    mm_to_hf(FAMILY, MMToHF(tmp_path / "back", tmp_path / "mm", HFConfig(hub)), Options())
    assert compare_hf(hub, tmp_path / "back") == []
    whole = load_file(hub / "model.safetensors")
    for number, layer in enumerate(sizes["deepstack"]):
        stage, local = divmod(layer, 2)
        path = tmp_path / "mm" / "release" / f"mp_rank_00_{stage:03d}_000" / "model_optim_rng.pt"
        held = torch.load(path, weights_only=True)["model0"]
        mm = f"image_encoder.encoder.blocks.layers.{local}.deepstack_layer.layernorm.weight"
        expected = whole[f"model.visual.deepstack_merger_list.{number}.norm.weight"]
        assert torch.equal(held[mm], expected)


def test_two_orders_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    mixed = output_first(model(tmp_path / "hub"), tmp_path / "mixed", ("down",))
    with pytest.raises(CheckpointError, match="two ways"):
        hf_to_mm(FAMILY, HFToMM(tmp_path / "mm", HFConfig(mixed)), Options())


def test_an_ep_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    hub = model(tmp_path / "hub")
    cfg = HFToMM(tmp_path / "mm", HFConfig(hub), ParallelConfig(ep_size=3))
    with pytest.raises(LayoutError, match=r"\[1, 2, 4, 8, 16\]"):
        hf_to_mm(FAMILY, cfg, Options())


@pytest.mark.parametrize("value", [[0, 0], [3], [-1], "all", [True], {"0": 1}])
def test_deepstack_indexes_that_make_no_sense_are_refused(value: object, tmp_path: Path) -> None:
    hub = model(tmp_path / "hub")
    config = json.loads((hub / "config.json").read_text())
    config["vision_config"]["deepstack_visual_indexes"] = value
    (hub / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="deepstack_visual_indexes"):
        hf_to_mm(FAMILY, HFToMM(tmp_path / "mm", HFConfig(hub)), Options())


def test_experts_are_cut_by_hand_the_same(tmp_path: Path) -> None:
    """Expert 5 of 16 is local expert 1 of ep rank 1 of 4; gate and up are halved each."""
    hub = model(tmp_path / "hub")
    hf_to_mm(FAMILY, HFToMM(tmp_path / "mm", HFConfig(hub), WIDE), Options())
    whole = load_file(hub / "model.safetensors")
    stack = whole["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    gate, up = stack[5].T.chunk(2)
    folder = tmp_path / "mm" / "release" / "mp_rank_01_001_001"
    part = torch.load(folder / "model_optim_rng.pt", weights_only=True)["model"]
    held = part["text_decoder.decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"]
    assert torch.equal(held, torch.cat([gate.chunk(2)[1], up.chunk(2)[1]]))
