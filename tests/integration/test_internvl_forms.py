"""InternVL as transformers' own class saves it, and InternVL3.5: one MM form for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import layout
from inprocess import BACK, HF, MM, SOURCE, TARGET, call
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm
from nights import in_turns, night
from tinyfamilies import make_intern, native_intern

KINDS = ("intern-qwen2", "intern-qwen3", "intern-llama")
NAME = "InternVLConverter"
LAYOUTS = {
    "one rank": layout("[4]", "[3]", 1),
    "tp 2 pp 2": layout("[1,3]", "[3,0]", 2),
    "vpp 2": layout("[[0,1],[1,2]]", "[[2,1],[0,0]]", 1),
}


@pytest.mark.parametrize(("kind", "tied"), in_turns([*KINDS], [False, True]))
def test_both_forms_of_one_model_are_the_same_in_mm(kind: str, tied: bool, tmp_path: Path) -> None:
    """And each comes back from the MM files of the other."""
    native = tmp_path / "native"
    native_intern(kind, tied=tied).save_pretrained(native, max_shard_size="100KB")
    chat = make_intern(kind, tmp_path / "chat", tied=tied)
    for number, flags in enumerate(LAYOUTS.values()):
        made = {hf: tmp_path / f"{hf.name}{number}" for hf in (native, chat)}
        for hf, mm in made.items():
            call(NAME, "hf_to_mm", HF, hf, MM, mm, *flags)
        assert compare_mm(made[chat], made[native]) == []
        for hf, mm in ((native, made[chat]), (chat, made[native])):
            back = tmp_path / f"back{number}{hf.name}"
            call(NAME, "mm_to_hf", HF, hf, MM, mm, BACK, back)
            assert compare_hf(hf, back) == []


@pytest.mark.parametrize("model", ["internvl3.5-1b", night("internvl3.5-8b")])
def test_internvl35_in_any_layout(model: str, tmp_path: Path) -> None:
    """Qwen3's norms of q and k, no biases: by hand, and from layout to layout."""
    hf = make_hf(model, tmp_path / "hf", layers=4, vit_layers=3)
    for number, (name, flags) in enumerate(LAYOUTS.items()):
        mm, back = tmp_path / name, tmp_path / f"back{number}"
        call("AutoConverter", "hf_to_mm", HF, hf, MM, mm, *flags)
        call(NAME, "mm_to_hf", HF, hf, MM, mm, BACK, back)
        assert compare_hf(hf, back) == []
        target = [flag.replace("--cfg.parallel", "--cfg.target_parallel") for flag in flags]
        other = tmp_path / f"other{number}"
        call(NAME, "resplit", SOURCE, tmp_path / "one rank", TARGET, other, *target)
        assert compare_mm(mm, other) == []
    whole = {k: v for p in hf.glob("*.safetensors") for k, v in load_file(p).items()}
    file = tmp_path / "one rank" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    held = torch.load(file, weights_only=True)["model"]
    layer, mm_layer = "language_model.model.layers.2.", "text_decoder.decoder.layers.2."
    groups = 8 if model == "internvl3.5-1b" else 4
    parts = [whole[f"{layer}self_attn.{x}_proj.weight"].chunk(groups) for x in "qkv"]
    rows = torch.cat([part[g] for g in range(groups) for part in parts])
    assert torch.equal(held[f"{mm_layer}self_attention.linear_qkv.weight"], rows)
    norm = whole[f"{layer}self_attn.q_norm.weight"]
    assert torch.equal(held[f"{mm_layer}self_attention.q_layernorm.weight"], norm)
    assert (f"{mm_layer}output_layer.weight" in held) is False


def test_experts_are_refused_and_pointed_to_their_command(tmp_path: Path) -> None:
    hf = make_hf("internvl3.5-30b-a3b", tmp_path / "hf", vit_layers=1)
    said = call(NAME, "hf_to_mm", HF, hf, MM, tmp_path / "mm", check=3).stderr
    assert "Qwen3MoeForCausalLM" in said
    assert "moe_expert" in said


@pytest.mark.parametrize("verb", ["hf_to_mm", "mm_to_hf", "resplit", "-h"])
def test_videoalign_is_refused_with_the_reason(verb: str) -> None:
    said = call("VideoAlignConverter", verb, "--cfg.pt_path", "model.pth", check=2).stderr
    for words in ("VideoAlignConverter is not served", "Qwen2VLConverter", "rm_head", "LoRA"):
        assert words in said


def test_a_native_text_decoder_that_is_not_known_is_named(tmp_path: Path) -> None:
    native = tmp_path / "native"
    native_intern("intern-llama").save_pretrained(native)
    config = json.loads((native / "config.json").read_text())
    config["text_config"]["model_type"] = "mistral"
    (native / "config.json").write_text(json.dumps(config))
    said = call(NAME, "hf_to_mm", HF, native, MM, tmp_path / "mm", check=3).stderr
    assert "'mistral'" in said
    assert "qwen3" in said
