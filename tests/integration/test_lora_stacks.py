"""Adapters of experts that lie in one tensor: PEFT's ``target_parameters``, and PEFT as judge."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from commands import layout, refused
from inprocess import call
from lora import Tensors, adapter, merge, randomised, run, same, save_adapter, weights
from mmread import compare_hf, compare_mm
from tinymoe import qwen3vl_moe

pytest.importorskip("peft")

QWEN = "Qwen3VLMegatronConverter"
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYOUTS = {
    "ep2": layout("[1,2]", "[3,0]", 1, "ep_size=2"),
    "tp2": layout("[[1,1],[1,0]]", "[[3,0],[0,0]]", 2),
}


def model_of(base: Path, dtype: torch.dtype) -> Any:
    from transformers import Qwen3VLMoeForConditionalGeneration

    return Qwen3VLMoeForConditionalGeneration.from_pretrained(base, dtype=dtype)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacks") / "base"
    qwen3vl_moe().save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, **config: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    given = {"target_modules": ["o_proj"], "target_parameters": STACKS, **config}
    asked = LoraConfig(r=4, lora_alpha=8, **given)
    made: Any = get_peft_model(model_of(base, torch.float32), asked)
    randomised(made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peft(base: Path) -> Path:
    return trained(base, base.parent / "peft")


def loaded(base: Path, folder: Path) -> Any:
    """PEFT's model; a missing or an unexpected key is an error."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found: Any = PeftModel.from_pretrained(model_of(base, torch.float32), folder)
    assert not [str(w.message) for w in said if "adapter keys" in str(w.message)]
    return found


def test_merging_is_as_pefts(base: Path, peft: Path, tmp_path: Path) -> None:
    loaded(base, peft).merge_and_unload().save_pretrained(tmp_path / "expected")
    merge(QWEN, base, [peft], tmp_path / "out")
    expected, got, before = (weights(p) for p in (tmp_path / "expected", tmp_path / "out", base))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6)
        changes = any(word in name for word in ("o_proj", "experts"))
        assert torch.equal(before[name], tensor) != ("language_model" in name and changes)


@pytest.mark.parametrize("where", LAYOUTS)
def test_there_and_back(where: str, base: Path, peft: Path, tmp_path: Path) -> None:
    """Each expert has A and B of its own in MM format; PEFT gets its own bytes back."""
    mm, back, flags = tmp_path / "mm", tmp_path / "back", LAYOUTS[where]
    there = ("--cfg.hf_config.hf_dir", peft, "--cfg.mm_dir", mm, "--cfg.base_hf_dir", base)
    run(QWEN, "lora_hf_to_mm", *there, *flags)
    rank = min((mm / "release").iterdir()) / "model_optim_rng.pt"
    content = torch.load(rank, weights_only=False)
    part = content.get("model") or content["model0"]
    fc2 = "text_decoder.decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.lora_B"
    mine = adapter(peft)
    b = mine["base_model.model.model.language_model.layers.0.mlp.experts.lora_B.weight"]
    assert torch.equal(part[f"{fc2}.default.weight"], b.reshape(32, 4, 8)[:, :, 3])

    said = run(QWEN, "lora_mm_to_hf", "--cfg.mm_dir", mm, "--cfg.save_hf_dir", back,
               "--cfg.hf_config.hf_dir", base).stderr  # fmt: skip
    assert "target_parameters" in said
    same(mine, adapter(back))
    config = json.loads((back / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj"]
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
    same(one := dict(loaded(base, back).named_parameters()), one)
    call("verify", peft, mm)

    whole, merged = tmp_path / "whole", tmp_path / "merged"
    merge(QWEN, base, [peft], merged)
    run(QWEN, "hf_to_mm", "--cfg.hf_config.hf_dir", base, "--cfg.mm_dir", whole, *flags)
    expected = ("--cfg.hf_config.hf_dir", merged, "--cfg.mm_dir", tmp_path / "expected", *flags)
    run(QWEN, "hf_to_mm", *expected)
    for name, lora in (("both", mm), ("other", peft)):
        merge(QWEN, whole, [lora], tmp_path / name)
        assert compare_mm(tmp_path / "expected", tmp_path / name) == []
    merge(QWEN, base, [mm], tmp_path / "hf")
    assert compare_hf(merged, tmp_path / "hf") == []
    call("diff", base, merged, "--lora", peft)


def exchanged(mine: Tensors) -> Tensors:
    """As PEFT has it where stacks have their inputs first: A and B of the transposed product."""
    found = dict(mine)
    for name, a in mine.items():
        if "experts" not in name or "lora_A" not in name:
            continue
        b = mine[name.replace("lora_A", "lora_B")]
        each = b.reshape(b.shape[0], 4, 8).permute(2, 1, 0)  # experts, rank, outputs
        found[name] = each.reshape(32, -1).contiguous()
        other = a.reshape(8, 4, -1).permute(2, 1, 0)  # inputs, rank, experts
        found[name.replace("lora_A", "lora_B")] = other.reshape(-1, 32).contiguous()
    return found


def test_transformers_4(base: Path, peft: Path, tmp_path: Path) -> None:
    """Base and adapter of transformers 4.57, whose stacks have their inputs first."""
    old = save_adapter(tmp_path / "old", exchanged(adapter(peft)))
    call("verify", peft, old)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_bytes((base / "config.json").read_bytes())
    turned = {
        name: tensor.transpose(1, 2).contiguous() if "experts" in name else tensor
        for name, tensor in weights(base).items()
    }
    save_file(turned, hub / "model.safetensors", metadata={"format": "pt"})
    merge(QWEN, base, [peft], tmp_path / "merged")
    merge(QWEN, hub, [old], tmp_path / "out")
    expected = weights(tmp_path / "merged")
    for name, tensor in weights(tmp_path / "out").items():
        there = expected[name].transpose(1, 2) if "experts" in name else expected[name]
        assert torch.equal(tensor, there)
    mm = ("--cfg.mm_dir", tmp_path / "mm", "--cfg.base_hf_dir", base)
    run(QWEN, "lora_hf_to_mm", "--cfg.hf_config.hf_dir", old, *mm)
    call("verify", peft, tmp_path / "mm")


def test_one_stack_and_names(base: Path, tmp_path: Path) -> None:
    mine = trained(base, tmp_path / "a", target_modules=[], target_parameters=STACKS[1:])
    words = ("--lora_dir", mine, "--save_dir", tmp_path / "b", "--names", "fsdp2")
    call("rename_lora", *words)
    words = ("--lora_dir", tmp_path / "b", "--save_dir", tmp_path / "c", "--names", "new")
    call("rename_lora", *words)
    same(adapter(mine), adapter(tmp_path / "c"))
    call("doctor", mine, "--hf_dir", base)
    mm = ("--cfg.mm_dir", tmp_path / "mm")
    said = {"target_parameters": STACKS[1:]}
    alone = (
        "--cfg.hf_config.hf_dir",
        save_adapter(tmp_path / "e", adapter(mine), None, **said),
        *mm,
    )
    refused(run(QWEN, "lora_hf_to_mm", *alone, check=3), 3, "may be of each", "--cfg.base_hf_dir")
    run(QWEN, "lora_hf_to_mm", *alone, "--cfg.base_hf_dir", base)
    run(QWEN, "lora_mm_to_hf", *mm, "--cfg.save_hf_dir", tmp_path / "d")
    same(adapter(mine), adapter(tmp_path / "d"))
    config = json.loads((tmp_path / "d/adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == ([], ["down_proj"])
    loaded(base, tmp_path / "d")


def test_stacks_that_do_not_fit(base: Path, peft: Path, tmp_path: Path) -> None:
    mine, out = adapter(peft), tmp_path / "mm"
    there = ("--cfg.mm_dir", out, "--cfg.base_hf_dir", base)

    def refuse(tensors: Tensors, *words: str, **config: Any) -> None:
        folder = save_adapter(tmp_path / "bad", tensors, None, **config)
        done = run(QWEN, "lora_hf_to_mm", "--cfg.hf_config.hf_dir", folder, *there, check=3)
        refused(done, 3, *words, out=out)

    refuse(mine, "gives it the rank 5", r=5)
    stack = next(name for name in mine if "experts.lora_A" in name)
    refuse({n: t for n, t in mine.items() if n != stack}, "is unpaired", "lora_A")
    refuse({**mine, stack: mine[stack][:, :-1].contiguous()}, "fits no parameter", "down_proj")
