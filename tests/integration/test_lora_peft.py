"""PEFT itself: it loads what is written, and merges with the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import layout, refused
from inprocess import call
from lora import adapter, merge, run, same, save_adapter, weights
from tinymodels import save, tiny_model

pytest.importorskip("peft")

QWEN = "Qwen2VLConverter"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2"]
SOME = ["q_proj", "v_proj", "mlp.0", "qkv"]


def model_of(base: Path, dtype: torch.dtype) -> Any:
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=dtype)


def trained(base: Path, dtype: torch.dtype, folder: Path, config: Mapping[str, Any]) -> Path:
    """An adapter as PEFT saves it, its learnt parameters random."""
    from peft import LoraConfig, get_peft_model

    made: Any = get_peft_model(model_of(base, dtype), LoraConfig(r=4, lora_alpha=8, **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    made.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, dtype: torch.dtype, folder: Path, out: Path) -> Path:
    from peft import PeftModel

    PeftModel.from_pretrained(model_of(base, dtype), folder).merge_and_unload().save_pretrained(out)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return out


OPTIONS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "fp32": ({"target_modules": [*LINEAR, *VISION]}, torch.float32),
    "bf16": ({"target_modules": [*LINEAR, *VISION]}, torch.bfloat16),
    "fp16": ({"target_modules": [*LINEAR, *VISION]}, torch.float16),
    "rslora": ({"use_rslora": True}, torch.bfloat16),
    "patterns": (
        {"rank_pattern": {"layers.1.self_attn.q_proj": 8}, "alpha_pattern": {"v_proj": 32}},
        torch.bfloat16,
    ),
    "dora": ({"use_dora": True}, torch.bfloat16),
    "bias": ({"bias": "lora_only"}, torch.bfloat16),
    "lora_bias": ({"lora_bias": True}, torch.bfloat16),
    "modules_to_save": ({"modules_to_save": ["lm_head", "merger.ln_q"]}, torch.bfloat16),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [3, 1, 7]}}, torch.bfloat16),
    "embedding": ({"target_modules": [*SOME, "embed_tokens"]}, torch.float32),
    "convolution": ({"target_modules": [*SOME, "patch_embed.proj"]}, torch.float32),
}


@pytest.mark.filterwarnings("ignore:.*invalid shape", "ignore:Setting `save_embedding")
@pytest.mark.parametrize("option", OPTIONS)
def test_the_bits_are_those_of_peft(option: str, tmp_path: Path) -> None:
    config, dtype = OPTIONS[option]
    base = save(tiny_model("qwen2_vl", dtype=dtype), tmp_path / "base")
    folder = trained(base, dtype, tmp_path / "adapter", {"target_modules": SOME, **config})
    expected = weights(merged_by_peft(base, dtype, folder, tmp_path / "expected"))
    merge(QWEN, base, [folder], tmp_path / "out")
    same(expected, weights(tmp_path / "out"))
    before = weights(base)
    assert sum(not torch.equal(before[n], t) for n, t in expected.items()) >= 12


def test_a_tied_embedding_is_not_merged(tmp_path: Path) -> None:
    base = save(tiny_model("qwen2_vl", tied=True), tmp_path / "base")
    rows, width = weights(base)["model.embed_tokens.weight"].shape
    name = "base_model.model.model.language_model.embed_tokens.lora_embedding_"
    folder = save_adapter(
        tmp_path / "a", {f"{name}A": torch.ones(4, rows), f"{name}B": torch.ones(width, 4)}
    )
    out = tmp_path / "out"
    refused(merge(QWEN, base, [folder], out, check=2), 2, "ties", "--cfg.untie", out=out)


HEADS = {"embed_tokens": "model.language_model.embed_tokens.lora_embedding_", "lm_head": "lm_head."}


@pytest.mark.parametrize("module", HEADS)
def test_a_tied_embedding_is_untied_where_asked(module: str, tmp_path: Path) -> None:
    """One of two uses changes, the other keeps its bits; transformers and MM have both."""
    base = save(tiny_model("qwen2_vl", tied=True), tmp_path / "base")
    before = weights(base)
    word = before["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(1)
    rows, width = word.shape
    sizes = {"A": (4, rows), "B": (width, 4)}
    if module == "lm_head":
        sizes = {"lora_A.weight": (4, width), "lora_B.weight": (rows, 4)}
    made = {k: torch.randn(size, generator=generator) for k, size in sizes.items()}
    folder = save_adapter(
        tmp_path / "a", {f"base_model.model.{HEADS[module]}{k}": t for k, t in made.items()}
    )
    a, b = made.values()
    changed = word + 2 * (b @ a).T if module == "embed_tokens" else word + 2 * (b @ a)
    out = tmp_path / "out"
    refused(merge(QWEN, base, [folder], out, check=2), 2, module, "--cfg.untie", out=out)
    merge(QWEN, base, [folder], out, "--cfg.untie", "True")
    got = weights(tmp_path / "out")
    assert got.keys() == {*before, "lm_head.weight"}
    mine, other = "model.embed_tokens.weight", "lm_head.weight"
    mine, other = (mine, other) if module == "embed_tokens" else (other, mine)
    torch.testing.assert_close(got[mine], changed)
    assert torch.equal(got[other], word)
    model = model_of(tmp_path / "out", torch.float32)
    assert torch.equal(model.lm_head.weight, got["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, got["model.embed_tokens.weight"])

    mm, merged_mm = tmp_path / "mm", tmp_path / "merged_mm"
    flags = layout("[1,3]", "[3,0]", 2)
    run(QWEN, "hf_to_mm", "--cfg.hf_config.hf_dir", base, "--cfg.mm_dir", mm, *flags)
    merge(QWEN, mm, [folder], merged_mm, "--cfg.untie", "True")
    call("verify", tmp_path / "out", merged_mm)
    for one, other in ((base, tmp_path / "out"), (mm, merged_mm), (base, merged_mm), (mm, out)):
        call("diff", one, other, "--lora", folder)
        call("diff", one, other, "--lora", folder, "--lora", folder, check=1)
    back = ("--cfg.to", "hf", "--cfg.hf_config.hf_dir", base, "--cfg.untie", "True")
    merge(QWEN, mm, [folder], tmp_path / "back", *back)
    same(got, weights(tmp_path / "back"))


def test_peft_loads_what_comes_out_of_mm(tmp_path: Path) -> None:
    """No key is missing and none unexpected: PEFT's warning would be an error here. The logits
    are those of the merged model.
    """
    from peft import PeftModel

    base = save(tiny_model("qwen2_vl"), tmp_path / "base")
    folder = trained(base, torch.float32, tmp_path / "a", {"target_modules": [*LINEAR, *VISION]})
    there = ("--cfg.hf_config.hf_dir", folder, "--cfg.mm_dir", tmp_path / "mm")
    fused = ("--cfg.common_model_config.enable_canonical_hf_struct", "False")
    run(QWEN, "lora_hf_to_mm", *there, "--cfg.base_hf_dir", base, *fused)
    back = ("--cfg.mm_dir", tmp_path / "mm", "--cfg.save_hf_dir", tmp_path / "b")
    run(QWEN, "lora_mm_to_hf", *back, "--cfg.hf_config.hf_dir", base)
    plain = model_of(base, torch.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded: Any = PeftModel.from_pretrained(plain, tmp_path / "b")
    assert not [str(w.message) for w in said if "adapter keys" in str(w.message)]
    merge(QWEN, base, [folder], tmp_path / "merged")
    whole = model_of(tmp_path / "merged", torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        one, other = loaded(input_ids=ids).logits, whole(input_ids=ids).logits
        assert not torch.allclose(one, model_of(base, torch.float32)(input_ids=ids).logits)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_names_there_and_back(tmp_path: Path) -> None:
    """Old, new and FSDP2's: the same bytes; PEFT loads an adapter of FSDP2 training then."""
    from peft import PeftModel

    base = save(tiny_model("qwen2_vl"), tmp_path / "base")
    mine = trained(base, torch.float32, tmp_path / "new", {"target_modules": SOME})
    for name, source in (("old", "new"), ("fsdp2", "old"), ("again", "fsdp2")):
        form = "new" if name == "again" else name
        words = ("--lora_dir", tmp_path / source, "--save_dir", tmp_path / name, "--names", form)
        call("rename_lora", *words)
    old = adapter(tmp_path / "old")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in old
    assert "base_model.model.visual.blocks.0.attn.qkv.lora_B.weight" in old
    assert (tmp_path / "fsdp2/lora_adapter.safetensors").is_file()
    same(adapter(mine), adapter(tmp_path / "again"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model_of(base, torch.float32), tmp_path / "again")
    assert not [str(w.message) for w in said if "adapter keys" in str(w.message)]
    # The merge reads all three.
    for name in ("new", "old", "fsdp2"):
        merge(QWEN, base, [tmp_path / name], tmp_path / f"merged-{name}")
    one = weights(tmp_path / "merged-new")
    same(one, weights(tmp_path / "merged-old"))
    same(one, weights(tmp_path / "merged-fsdp2"))


def test_the_scripts_of_mindspeed(tmp_path: Path) -> None:
    """Their own flags, with what they get wrong refused."""
    base = save(tiny_model("qwen2_vl", dtype=torch.float16), tmp_path / "base")
    mine = trained(base, torch.float16, tmp_path / "a", {"target_modules": ["q_proj", "v_proj"]})
    file = mine / "adapter_model.safetensors"
    (mine / "adapter_config.json").unlink()
    words = ("--base_hf_dir", base, "--lora_safetensors", file, "--device", "npu")
    words += ("--lora_alpha", "8", "--lora_r", "4", "--save_merged_hf_dir")
    script = "checkpoint/common/merge_lora_safetensors_to_base.py"
    call(script, *words, tmp_path / "hf", "--lora_target_modules", "q_proj", "v_proj")
    out = tmp_path / "out"
    few = call(script, *words, out, "--lora_target_modules", "q_proj", check=3)
    refused(few, 3, "v_proj", "would be lost", out=out)
    assert weights(tmp_path / "hf")["lm_head.weight"].dtype == torch.float16

    run(QWEN, "hf_to_mm", "--cfg.hf_config.hf_dir", base, "--cfg.mm_dir", tmp_path / "mm")
    there = ("--cfg.hf_config.hf_dir", mine, "--cfg.mm_dir", tmp_path / "lora")
    run(QWEN, "lora_hf_to_mm", *there, "--cfg.base_mm_dir", tmp_path / "mm")
    words = ("--base_save_dir", tmp_path / "mm", "--lora_save_dir", tmp_path / "lora")
    words += ("--lora_target_modules", "linear_qkv", "--lora_r", "8", "--merge_save_dir")
    script = "checkpoint/common/merge_base_lora_weight.py"
    refused(call(script, *words, out, check=3), 3, "--cfg.lora_alpha", out=out)
    call(script, *words, tmp_path / "merged", "--lora_alpha", "16")
    there = ("--cfg.mm_dir", tmp_path / "merged", "--cfg.hf_config.hf_dir", base)
    run(QWEN, "mm_to_hf", *there, "--cfg.save_hf_dir", tmp_path / "back")
    same(weights(tmp_path / "hf"), weights(tmp_path / "back"))
