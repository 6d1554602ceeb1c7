"""Parts of one tensor in several dtypes: cast once each with ``--dtype``, refused without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmconvert
from commands import Tensors, edit_rank, edit_single, layout, none, refused
from inprocess import call, to_hf, to_mm, to_other
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_mm
from nights import in_turns

MODELS: dict[str, dict[str, Any]] = {
    "qwen2vl-2b": {"layers": 2, "vit_layers": 1},
    "qwen2.5vl-3b": {"layers": 2, "vit_layers": 1},
    "qwen2.5omni-7b": {"layers": 1, "vit_layers": 1, "audio_layers": 1},
    "internvl2-2b": {"layers": 1, "vit_layers": 1},
}
MIXES = {  # words in the names of tensors that are not BF16 -> their dtype
    "q": {"q_proj": torch.float32},
    "v, by the others first": {"v_proj": torch.float64},
    "gate and up": {"up_proj": torch.float32, "gate_proj": torch.float16},
    "three dtypes": {"q_proj": torch.float32, "k_proj": torch.float16},
    "whole modules": {"visual": torch.float32, "vision": torch.float32},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fine(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another dtype, with values that BF16 does not hold if it can."""
    if not dtype.is_floating_point:
        return tensor.to(dtype)
    return tensor.to(dtype) * (1 + 1 / 1000) + len(name) / 1e5


def mix(hf: Path, kinds: dict[str, torch.dtype]) -> None:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            for word, dtype in kinds.items():
                if word in name:
                    tensors[name] = fine(name, tensors[name], dtype)

    edit_single(hf, edit)


def cast_by_torch(hf: Path, to: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(hf, to)
    edit_single(to, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    return to


@pytest.mark.parametrize(
    ("model", "kinds", "dtype"), in_turns(["qwen2vl-2b", "qwen2.5omni-7b"], [*MIXES], [*DTYPES])
)
def test_each_part_is_cast_once(model: str, kinds: str, dtype: str, tmp_path: Path) -> None:
    """The bytes of a checkpoint that torch has cast before, tensor by tensor."""
    hf = make_hf(model, tmp_path / "hf", shards=1, **MODELS[model])
    mix(hf, MIXES[kinds])
    want = cast_by_torch(hf, tmp_path / "want", DTYPES[dtype])
    to_mm(model, want, tmp_path / "plain")
    to_mm(model, hf, tmp_path / "mm", "--dtype", dtype)
    none(compare_mm(tmp_path / "plain", tmp_path / "mm"))


@pytest.mark.parametrize("model", MODELS)
def test_refused_without_it(model: str, tmp_path: Path) -> None:
    hf = make_hf(model, tmp_path / "hf", shards=1, **MODELS[model])
    mix(hf, {"k_proj": torch.float32, "feed_forward.w3": torch.float32, "attn.k.": torch.float32})
    out = tmp_path / "mm"
    refused(to_mm(model, hf, out, check=None), 3, "--dtype bf16", "F32", "BF16", out=out)
    to_mm(model, hf, out, "--dtype", "bf16")


def test_divided_over_ranks(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=4, vit_layers=2)
    mix(hf, MIXES["three dtypes"] | MIXES["gate and up"] | {"embed": torch.float32})
    want = cast_by_torch(hf, tmp_path / "want", torch.bfloat16)
    flags = layout("[[1,1],[1,1]]", "[[2,0],[0,0]]", 2)
    to_mm("qwen2vl-2b", want, tmp_path / "plain", *flags)
    to_mm("qwen2vl-2b", hf, tmp_path / "mm", *flags, "--dtype", "bf16")
    none(compare_mm(tmp_path / "plain", tmp_path / "mm"))


def test_integers_are_not_united(tmp_path: Path) -> None:
    """A cast would not help: packed weights are no numbers by themselves."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=1, vit_layers=1)
    mix(hf, {"k_proj": torch.int8})
    done = to_mm("qwen2vl-2b", hf, tmp_path / "mm", "--dtype", "bf16", check=None)
    refused(done, 3, "k_proj", out=tmp_path / "mm")


def test_they_come_back(tmp_path: Path) -> None:
    """hf_dir gives names and files; what it was in before does not matter."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=1, vit_layers=1)
    mix(hf, MIXES["q"])
    want = cast_by_torch(hf, tmp_path / "want", torch.bfloat16)
    to_mm("qwen2vl-2b", hf, tmp_path / "mm", "--dtype", "bf16")
    to_hf("qwen2vl-2b", tmp_path / "mm", hf, tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").stat().st_size
    expected, found = (load_file(f / "model.safetensors") for f in (want, tmp_path / "back"))
    assert expected.keys() == found.keys()
    assert all(
        torch.equal(expected[n], found[n]) and expected[n].dtype == found[n].dtype for n in found
    )


# ------------------------------------------------------------------------------- tied heads
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """The embedding in F32; a head in BF16 that is the embedding rounded."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=2, vit_layers=1)
    mix(hf, {EMBEDDING: torch.float32})
    edit_single(hf, lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()}))
    return hf


def test_a_tied_head(tied: Path, tmp_path: Path) -> None:
    want = cast_by_torch(tied, tmp_path / "want", torch.bfloat16)
    flags = layout("[1,1]", "[1,0]", 2)
    to_mm("qwen2vl-2b", want, tmp_path / "plain", *flags)
    to_mm("qwen2vl-2b", tied, tmp_path / "mm", *flags, "--dtype", "bf16")
    none(compare_mm(tmp_path / "plain", tmp_path / "mm"))


def test_a_tied_head_is_refused_without_it(tied: Path, tmp_path: Path) -> None:
    done = to_mm("qwen2vl-2b", tied, tmp_path / "mm", check=None)
    refused(done, 3, "1 tensor made of parts", "--dtype bf16", out=tmp_path / "mm")


def test_a_tied_head_that_is_another_tensor(tied: Path, tmp_path: Path) -> None:
    """In fp32 the rounded head is not the embedding; and a changed one is not in bf16 either."""
    done = to_mm("qwen2vl-2b", tied, tmp_path / "mm", "--dtype", "fp32", check=None)
    refused(done, 3, "copies of one tensor differ", HEAD, out=tmp_path / "mm")
    edit_single(tied, lambda t: t[HEAD][7, 5].add_(1))
    done = to_mm("qwen2vl-2b", tied, tmp_path / "mm", "--dtype", "bf16", check=None)
    refused(done, 3, "copies of one tensor differ", "[7, 5]", out=tmp_path / "mm")


def test_a_tied_head_of_the_last_stage(tmp_path: Path) -> None:
    """MM to HF and to another layout: the copy on the last stage was saved in F32."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=2, vit_layers=1)
    mm = tmp_path / "mm"
    to_mm("qwen2vl-2b", hf, mm, *layout("[1,1]", "[1,0]"))
    name = "text_decoder.output_layer.weight"
    edit_rank(mm, "mp_rank_00_001", lambda c: c["model"].update({name: c["model"][name].float()}))
    refused(to_hf("qwen2vl-2b", mm, hf, tmp_path / "back", check=None), 3, "--dtype")
    to_hf("qwen2vl-2b", mm, hf, tmp_path / "back", "--dtype", "bf16")
    expected, found = (load_file(f / "model.safetensors") for f in (hf, tmp_path / "back"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    flags = ("--cfg.hf_config.hf_dir", str(hf))
    refused(to_other("qwen2vl-2b", mm, tmp_path / "mm2", *flags, check=None), 3, "--dtype")
    to_other("qwen2vl-2b", mm, tmp_path / "mm2", *flags, "--dtype", "fp32")


# ------------------------------------------------------------------------------------ tp ranks
SHARD = "text_decoder.decoder.layers.1.mlp.linear_fc2.weight"
COPY = "text_decoder.decoder.layers.0.input_layernorm.weight"


@pytest.fixture
def ranks(tmp_path: Path) -> tuple[Path, Path]:
    """Two tp ranks, of which the second was saved with a shard and a copy in F32."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=2, vit_layers=1)
    to_mm("qwen2vl-2b", hf, tmp_path / "mm", *layout("[2]", "[1]", 2))

    def widen(content: dict[str, Any]) -> None:
        content["model"] |= {name: content["model"][name].float() for name in (SHARD, COPY)}

    edit_rank(tmp_path / "mm", "mp_rank_01", widen)
    return hf, tmp_path / "mm"


def test_tp_ranks_are_united(ranks: tuple[Path, Path], tmp_path: Path) -> None:
    hf, mm = ranks
    done = to_hf("qwen2vl-2b", mm, hf, tmp_path / "back", check=None)
    refused(done, 3, "2 tensors made of parts", "mp_rank_01", "F32", "--dtype bf16")
    to_hf("qwen2vl-2b", mm, hf, tmp_path / "back", "--dtype", "bf16")
    expected, found = (load_file(f / "model.safetensors") for f in (hf, tmp_path / "back"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    edit_rank(mm, "mp_rank_01", lambda c: c["model"][COPY].add_(1))
    done = to_hf("qwen2vl-2b", mm, hf, tmp_path / "other", "--dtype", "bf16", check=None)
    refused(done, 3, "copies of one tensor differ", COPY, out=tmp_path / "other")
    edit_rank(mm, "mp_rank_01", lambda c: c["model"].update({SHARD: c["model"][SHARD].int()}))
    done = to_hf("qwen2vl-2b", mm, hf, tmp_path / "other", "--dtype", "bf16", check=None)
    refused(done, 3, SHARD, "I32", out=tmp_path / "other")


def test_others_that_read_such_ranks(ranks: tuple[Path, Path]) -> None:
    hf, mm = ranks
    call("verify", hf, mm, check=1)  # dtypes differ; values do not
    call("diff", hf, mm)
    call("inspect", mm)
    opened = mmconvert.open(mm)
    assert opened[SHARD.replace("layers.1", "layers.0")].dtype == torch.bfloat16
    with pytest.raises(mmconvert.TensorError, match=r"mp_rank_01.* is F32"):
        _ = opened[SHARD]


# -------------------------------------------------------------------------- who else reads them
def test_doctor_says_so_once(tied: Path) -> None:
    mix(tied, MIXES["three dtypes"])
    found = json.loads(call("doctor", tied, "--json", check=None).stdout)["findings"]
    assert [f["id"] for f in found if f["severity"] == "error"] == ["mixed-dtypes"]
    assert "--dtype" in found[0]["fix"]


def test_others_that_read_mixed_dtypes(tied: Path, tmp_path: Path) -> None:
    """verify and diff compare them, suggest counts them; one rank cannot be loaded of them."""
    mix(tied, MIXES["q"])
    other = tmp_path / "other"
    shutil.copytree(tied, other)
    call("verify", tied, other)
    call("diff", tied, other)
    call("suggest", tied, "--pp", "2")
    edit_single(other, lambda t: t["model.layers.0.self_attn.q_proj.weight"][1, 1].add_(1))
    call("verify", tied, other, check=1)
    with pytest.raises(mmconvert.errors.TensorError, match="several dtypes"):
        mmconvert.load_rank(tied, None, 0, 0)


def test_a_cast_by_hand_is_the_same(tmp_path: Path) -> None:
    """What the error's way out gives, value by value."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=1, vit_layers=1)
    mix(hf, MIXES["q"])
    to_mm("qwen2vl-2b", hf, tmp_path / "mm", "--dtype", "fp32")
    packed = mmconvert.open(tmp_path / "mm")[
        "text_decoder.decoder.layers.0.self_attention.linear_qkv.weight"
    ]
    q = load_file(hf / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert q.dtype == packed.dtype == torch.float32
    assert torch.equal(packed[: 6 * 6], q[: 6 * 6])
    assert not torch.equal(q, q.bfloat16().float())


def test_files_that_only_torch_writes(tmp_path: Path) -> None:
    """The same in pytorch_model.bin."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=1, vit_layers=1)
    mix(hf, MIXES["q"])
    to_mm("qwen2vl-2b", hf, tmp_path / "a", "--dtype", "bf16")
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    to_mm("qwen2vl-2b", hf, tmp_path / "b", "--dtype", "bf16")
    none(compare_mm(tmp_path / "a", tmp_path / "b"))
