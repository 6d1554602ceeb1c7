"""Models that are like a golden one but for a detail of config.json: in and out, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inprocess import BACK, HF, MM, SOURCE, TARGET, call
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm

LAYERS, PARALLEL = 3, "--cfg.parallel_config."
GRIDS = [f"{PARALLEL}llm_pp_layers", "[1,2]", f"{PARALLEL}vit_pp_layers", "[2,0]"]
WIDE = [*GRIDS, f"{PARALLEL}tp_size", "2", f"{PARALLEL}ep_size", "2"]
L = "language.model.layers."
LORA, HIDDEN, HEADS = 20, 40, 4


def deepseek(
    tmp_path: Path, change: dict[str, Any], tensors: dict[str, torch.Tensor], gone: tuple[str, ...]
) -> Path:
    """A small DeepSeek-VL2 with other tensors and another config.json."""
    hf = make_hf("deepseekvl2", tmp_path / "whole", shards=1)
    found = load_file(hf / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in found.items()
        if not _beyond(name) and not name.endswith(gone) and name not in tensors
    }
    out = tmp_path / "hf"
    out.mkdir()
    config = json.loads((hf / "config.json").read_text())
    config["language_config"] |= {"num_hidden_layers": LAYERS}
    config["vision_config"] |= {"layers": 2}
    for key, value in change.items():
        place = config if key in config else config["language_config"]
        place[key] = value
    (out / "config.json").write_text(json.dumps(config))
    save_file({**kept, **tensors}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _beyond(name: str) -> bool:
    words = name.split(".")
    if name.startswith(L):
        return int(words[3]) >= LAYERS
    return name.startswith("vision.blocks.") and int(words[2]) >= 2


def there_and_back(hf: Path, tmp_path: Path) -> dict[str, Any]:
    """Through three layouts; the content of tp rank 1, the last stage and ep rank 1."""
    mm, back, one, again = (tmp_path / n for n in ("mm", "back", "one", "again"))
    call("DeepSeekVLConverter", "hf_to_mm", HF, hf, MM, mm, *WIDE)
    call("DeepSeekVLConverter", "mm_to_hf", HF, hf, MM, mm, BACK, back)
    assert compare_hf(hf, back) == []
    call("DeepSeekVLConverter", "hf_to_mm", HF, hf, MM, one)
    target = [flag.replace("--cfg.parallel", "--cfg.target_parallel") for flag in WIDE]
    call("DeepSeekVLConverter", "resplit", SOURCE, one, TARGET, again, *target)
    assert compare_mm(mm, again) == []
    path = mm / "release" / "mp_rank_01_001_001" / "model_optim_rng.pt"
    return torch.load(path, weights_only=True)["model"]


def test_queries_through_a_low_rank_matrix(tmp_path: Path) -> None:
    """q_a above the compressed keys, whole on every rank; q_b divided by heads."""
    generator = torch.Generator().manual_seed(1)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    rows = HEADS * (8 + 4)
    tensors = {
        f"{L}{i}.self_attn.{name}.weight": made(*shape)
        for i in range(LAYERS)
        for name, shape in {
            "q_a_proj": (LORA, HIDDEN),
            "q_a_layernorm": (LORA,),
            "q_b_proj": (rows, LORA),
        }.items()
    }
    hf = deepseek(tmp_path, {"q_lora_rank": LORA}, tensors, ("self_attn.q_proj.weight",))
    held = there_and_back(hf, tmp_path)
    whole = load_file(hf / "model.safetensors")
    mm, mine = "text_decoder.decoder.layers.1.self_attention.", f"{L}2.self_attn."
    both = [whole[f"{mine}{x}.weight"] for x in ("q_a_proj", "kv_a_proj_with_mqa")]
    assert torch.equal(held[f"{mm}linear_qkv.weight"], torch.cat(both))
    assert torch.equal(held[f"{mm}q_layernorm.weight"], whole[f"{mine}q_a_layernorm.weight"])
    second = whole[f"{mine}q_b_proj.weight"].chunk(2)[1]
    assert torch.equal(held[f"{mm}linear_qb.weight"], second)


@pytest.mark.parametrize("tag", ["2D", "1D"])
def test_marks_of_tiles_stand_on_every_stage(tag: str, tmp_path: Path) -> None:
    marks = {"1D": ["tile_indicators"], "2D": ["image_newline", "view_seperator"]}[tag]
    tensors = {} if tag == "2D" else {"tile_indicators": torch.randn(11, HIDDEN).bfloat16()}
    gone = ("image_newline", "view_seperator") if tag == "1D" else ()
    hf = deepseek(tmp_path, {"tile_tag": tag}, tensors, gone)
    held = there_and_back(hf, tmp_path)
    whole = load_file(hf / "model.safetensors")
    for mark in marks:
        assert torch.equal(held[mark], whole[mark])


def test_marks_that_config_does_not_tell_are_refused(tmp_path: Path) -> None:
    tensors = {"tile_indicators": torch.randn(11, HIDDEN).bfloat16()}
    hf = deepseek(tmp_path, {}, tensors, ())
    said = call("DeepSeekVLConverter", "hf_to_mm", HF, hf, MM, tmp_path / "mm", check=3).stderr
    assert "tile_indicators" in said


def made(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def test_tiny_has_the_attention_of_a_llama(tmp_path: Path) -> None:
    """q, k and v per head, divided by heads."""
    torch.manual_seed(2)
    square = (HIDDEN, HIDDEN)
    tensors = {
        f"{L}{i}.self_attn.{x}_proj.weight": made(*square) for i in range(LAYERS) for x in "qkvo"
    }
    gone = tuple(f"self_attn.kv_{x}.weight" for x in ("a_proj_with_mqa", "a_layernorm", "b_proj"))
    nothing = {"qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
    change = {"kv_lora_rank": None, "use_mla": False, **nothing}
    hf = deepseek(tmp_path, change, tensors, gone)
    held = there_and_back(hf, tmp_path)
    whole = load_file(hf / "model.safetensors")
    of, mm = f"{L}2.self_attn.", "text_decoder.decoder.layers.1.self_attention."
    parts = [whole[f"{of}{x}_proj.weight"].chunk(HEADS) for x in "qkv"]
    rows = torch.cat([part[head] for head in (2, 3) for part in parts])
    assert torch.equal(held[f"{mm}linear_qkv.weight"], rows)
    assert torch.equal(held[f"{mm}linear_proj.weight"], whole[f"{of}o_proj.weight"].chunk(2, 1)[1])


@pytest.mark.parametrize("there", [True, False])
def test_a_correction_bias_that_config_does_not_tell_of(there: bool, tmp_path: Path) -> None:
    gone = () if there else ("e_score_correction_bias",)
    hf = deepseek(tmp_path, {"topk_method": "greedy"}, {}, gone)
    held = there_and_back(hf, tmp_path)
    assert ("text_decoder.decoder.layers.1.mlp.router.expert_bias" in held) is there


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_text_decoder_that_transformers_saves(lora: int | None, tmp_path: Path) -> None:
    """DeepSeek-V2's own class: names and shapes; VL2's differ by a prefix."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    base = deepseek(tmp_path, {"q_lora_rank": lora}, {}, ("e_score_correction_bias",))
    config = json.loads((base / "config.json").read_text())
    language = config["language_config"] | {"topk_method": "greedy", "scoring_func": "softmax"}
    names = DeepseekV2Config().to_dict().keys() - {"architectures", "model_type", "head_dim"}
    text = {key: value for key, value in language.items() if key in names}
    torch.manual_seed(3)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**text)).bfloat16()
    model.save_pretrained(tmp_path / "text")
    saved = load_file(tmp_path / "text" / "model.safetensors")
    others = load_file(base / "model.safetensors").items()
    kept = {name: t for name, t in others if not name.startswith("language.")}
    whole = {**kept, **{f"language.{name}": t for name, t in saved.items()}}
    save_file(whole, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config | {"language_config": language}))
    there_and_back(base, tmp_path)


def test_both_forms_of_glms_config_are_one_model(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 2}
    flat = make_hf("glm4.1v-9b", tmp_path / "flat", **sizes)
    nested = make_hf("glm4.1v-9b", tmp_path / "nested", nested_config=True, **sizes)
    flags = [f"{PARALLEL}tp_size", "2"]
    for hf in (flat, nested):
        call("GlmConverter", "hf_to_mm", HF, hf, MM, tmp_path / f"mm {hf.name}", *flags)
    assert compare_mm(tmp_path / "mm flat", tmp_path / "mm nested") == []
    back = tmp_path / "back"
    call("GlmConverter", "mm_to_hf", HF, nested, MM, tmp_path / "mm flat", BACK, back)
    assert compare_hf(nested, back) == []
