"""Checkpoints that are whole and cannot be converted as they stand: one cause, the right way out.

The conversion and `doctor` say the same of each; neither advises what loses data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mmconvert
from commands import edit_index, edit_json, edit_rank, edit_single, read_single
from inprocess import HF, MM, call, to_hf, to_mm, to_other
from mmconvert.errors import CheckpointError
from mmconvert.playground.checkpoints import make_hf, nested_config, renamed
from mmread import INDEX

MODEL = "qwen2vl-2b"
PROJ = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Tensors = dict[str, Tensor]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers each in one weight file; not to be changed."""
    out = tmp_path_factory.mktemp("plain") / "hf"
    return make_hf(MODEL, out, shards=1, layers=2, vit_layers=2)


@pytest.fixture
def hf(plain: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(plain, tmp_path / "hf"))


@pytest.fixture
def mm(plain: Path, tmp_path: Path) -> Path:
    """`plain` in MM format, on two tp ranks."""
    to_mm(MODEL, plain, tmp_path / "mm", "--cfg.parallel_config.tp_size", "2")
    return tmp_path / "mm"


def as_pickle(hf: Path) -> None:
    """The weights in pytorch_model.bin instead."""
    tensors = {name: t.clone() for name, t in read_single(hf).items()}
    torch.save(tensors, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()


def error_of(done: Any) -> Json:
    """The error of a command that was called with --json; no traceback, exit code 3."""
    assert done.returncode == 3, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert "Traceback" not in done.stderr
    return found


def findings(path: Path, *flags: str) -> list[Json]:
    """The errors that doctor lists."""
    done = call("doctor", path, "--json", *flags, check=None)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["healthy"] else 3)
    return [f for f in report["findings"] if f["severity"] == "error"]


def says(error: Json, cause: str, path: Path, *words: str) -> None:
    """The conversion's error and doctor's one finding are the same, and say all the words."""
    (found,) = findings(path)
    assert (found["id"], found["what"], found["fix"]) == (cause, error["what"], error["fix"])
    tells(error, cause, *words)


def tells(error: Json, cause: str, *words: str) -> None:
    """The conversion's error says all the words."""
    assert error.get("cause") == cause, error
    text = " ".join((error["what"], error["expected"], error["fix"]))
    assert [word for word in words if word not in text] == [], text
    assert "--drop" not in text
    assert "download" not in error["fix"]


def converting(hf: Path, *flags: str) -> Json:
    """The error of hf_to_mm; nothing is written."""
    out = hf.parent / "out"
    found = error_of(to_mm(MODEL, hf, out, *flags, "--json", check=None))
    assert not out.exists()
    return found


def going_back(mm: Path, plain: Path, *flags: str) -> Json:
    """The error of mm_to_hf, which is that of resplit."""
    out = mm.parent / "back"
    found = error_of(to_hf(MODEL, mm, plain, out, *flags, "--json", check=None))
    assert error_of(to_other(MODEL, mm, out, *flags, "--json", check=None)) == found
    assert not out.exists()
    return found


# ------------------------------------------------------------------------------ quantised
def each_proj(make: Callable[[str, Tensor], Tensors]) -> Callable[[Tensors], None]:
    """An edit that puts what `make` returns into the place of every text linear."""

    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            base = name.removesuffix(".weight")
            if base != name and name.startswith("model.layers") and base.split(".")[-1] in PROJ:
                tensors.update(make(base, tensors.pop(name)))

    return edit


def int8(base: str, weight: Tensor) -> Tensors:
    scb = torch.ones(weight.shape[0])
    kind = torch.zeros((), dtype=torch.uint8)
    return {
        f"{base}.weight": weight.to(torch.int8),
        f"{base}.SCB": scb,
        f"{base}.weight_format": kind,
    }


def four_bit(kind: str) -> Callable[[str, Tensor], Tensors]:
    def make(base: str, weight: Tensor) -> Tensors:
        return {
            f"{base}.weight": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
            f"{base}.weight.absmax": torch.ones(weight.numel() // 64 + 1),
            f"{base}.weight.quant_map": torch.ones(16),
            f"{base}.weight.quant_state.bitsandbytes__{kind}": torch.zeros(9, dtype=torch.uint8),
        }

    return make


def fp8(*scales: str) -> Callable[[str, Tensor], Tensors]:
    def make(base: str, weight: Tensor) -> Tensors:
        found = {f"{base}.{scale}": torch.ones(1, 1) for scale in scales}
        return {f"{base}.weight": weight.to(torch.float8_e4m3fn), **found}

    return make


def packed(*kinds: str) -> Callable[[str, Tensor], Tensors]:
    """What replaces a weight, under other names."""

    def make(base: str, weight: Tensor) -> Tensors:
        return {f"{base}.{kind}": torch.ones(4, 4, dtype=torch.int32) for kind in kinds}

    return make


def integers(dtype: torch.dtype) -> Callable[[str, Tensor], Tensors]:
    return lambda base, weight: {f"{base}.weight": weight.to(dtype)}


def said(**keys: object) -> Json:
    return {"quantization_config": keys}


QUANTISED: Mapping[str, tuple[Callable[[str, Tensor], Tensors], Json, str]] = {
    "bnb-int8": (
        int8,
        said(quant_method="bitsandbytes", load_in_8bit=True),
        "(bitsandbytes, 8 bit)",
    ),
    "bnb-int8-silent": (int8, {}, "(bitsandbytes, 8 bit)"),
    "bnb-nf4": (
        four_bit("nf4"),
        said(quant_method="bitsandbytes", load_in_4bit=True),
        "(bitsandbytes nf4, 4 bit)",
    ),
    "bnb-fp4-silent": (four_bit("fp4"), {}, "(bitsandbytes fp4, 4 bit)"),
    "fp8-blocks": (fp8("weight_scale_inv"), said(quant_method="fp8"), "(fp8)"),
    "fp8-silent": (fp8("weight_scale", "input_scale"), {}, "(fp8)"),
    "fp8-bare": (fp8(), {}, "(fp8, without scales)"),
    "compressed": (
        packed("weight_packed", "weight_scale", "weight_shape"),
        said(quant_method="compressed-tensors", format="pack-quantized"),
        "(compressed-tensors)",
    ),
    "compressed-silent": (packed("weight_packed", "weight_scale"), {}, "(compressed-tensors)"),
    "compressed-int8": (
        lambda base, w: {
            f"{base}.weight": w.to(torch.int8),
            f"{base}.weight_scale": torch.ones(1),
        },
        {"compression_config": {"quant_method": "compressed-tensors"}},
        "(compressed-tensors)",
    ),
    "hqq": (packed("W_q", "scale", "zero"), said(quant_method="hqq", nbits=4), "(HQQ, 4 bit)"),
    "hqq-silent": (packed("W_q", "scale", "zero"), {}, "(HQQ)"),
    "gptq": (
        packed("qweight", "qzeros", "scales", "g_idx"),
        said(quant_method="gptq", bits=4, checkpoint_format="gptq_v2"),
        "(GPTQ, 4 bit)",
    ),
    "awq": (
        packed("qweight", "qzeros", "scales"),
        said(quant_method="awq", bits=4),
        "(AWQ, 4 bit)",
    ),
    "awq-silent": (packed("qweight", "qzeros", "scales"), {}, "(GPTQ, AWQ)"),
    "mlx": (
        lambda base, w: {
            f"{base}.weight": w[:, :4].to(torch.uint32),
            f"{base}.scales": torch.ones(4),
            f"{base}.biases": torch.ones(4),
        },
        {"quantization": {"group_size": 64, "bits": 4}},
        "(MLX, 4 bit)",
    ),
    "of names that nobody knows": (
        packed("weight_qdata"),
        said(quant_method="torchao"),
        "(torchao)",
    ),
    "quanto": (packed("weight._data", "weight._scale"), {}, "(quanto)"),
    "ascend": (
        lambda base, w: {
            f"{base}.weight": w.to(torch.int8),
            f"{base}.weight_offset": torch.ones(1),
        },
        {},
        "(msModelSlim)",
    ),
    "scales of a cache": (
        lambda base, w: {f"{base}.weight": w, f"{base}.k_scale": torch.ones(1)},
        {},
        "(with scales)",
    ),
    "scales of a tool that nobody knows": (
        lambda base, w: {f"{base}.weight": w, f"{base}.weight_quantizer._amax": torch.ones(1)},
        {},
        "(with scales)",
    ),
    "int8-bare": (integers(torch.int8), {}, "(bare integers: I8)"),
    "int32-bare": (integers(torch.int32), {}, "(bare integers: I32)"),
    "uint8-bare": (integers(torch.uint8), {}, "(bare integers: U8)"),
    "unnamed": (int8, said(load_in_8bit=True), "(bitsandbytes, 8 bit)"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_checkpoint_is_one_refusal(kind: str, hf: Path) -> None:
    make, config, label = QUANTISED[kind]
    edit_single(hf, each_proj(make))
    edit_json(hf / "config.json", lambda c: c.update(config))
    error = converting(hf)
    words = ("tensors of a quantised checkpoint", label, "fp32, fp16 or bf16", "unquantised")
    says(error, "quantised", hf, *words)
    patterns = ("*.SCB", "*weight_format", "*.absmax", "*quant_*", "*scale*", "*zero*", "*_proj.q*")
    drop = [word for pattern in patterns for word in ("--drop", pattern)]
    assert converting(hf, *drop, "--dtype", "bf16")["cause"] == "quantised"


def test_what_a_section_of_config_says_counts(hf: Path) -> None:
    edit_single(hf, each_proj(packed("qweight", "qzeros", "scales")))
    config = nested_config(json.loads((hf / "config.json").read_text()))
    config["text_config"] |= said(quant_method="gptq", bits=8)
    (hf / "config.json").write_text(json.dumps(config))
    says(converting(hf), "quantised", hf, "(GPTQ, 8 bit)")


def test_one_integer_weight_is_enough(hf: Path) -> None:
    name = "visual.blocks.1.attn.qkv.weight"
    edit_single(hf, lambda t: t.update({name: t[name].to(torch.int8)}))
    says(converting(hf), "quantised", hf, "1 tensor of", f"{name} (I8)")


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0"])
def test_a_dtype_of_quantised_weights_alone(hf: Path, dtype: str) -> None:
    """No torch here writes them into safetensors: the header is edited."""
    path = hf / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].replace(b'"BF16"', f'"{dtype}"'.encode(), 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    says(converting(hf), "quantised", hf, f"({dtype})")


def test_quantised_pickles(hf: Path) -> None:
    edit_single(hf, each_proj(int8))
    as_pickle(hf)
    says(converting(hf), "quantised", hf, "(bitsandbytes, 8 bit)")


def test_integer_weights_in_mm(mm: Path, plain: Path) -> None:
    name = "text_decoder.decoder.layers.1.mlp.linear_fc2.weight"

    def edit(content: Json) -> None:
        content["model"][name] = content["model"][name].to(torch.int8)

    edit_rank(mm, "mp_rank_01", edit)
    says(going_back(mm, plain), "quantised", mm, "1 tensor", f"{name} (I8)")


def test_a_weight_file_by_itself(hf: Path) -> None:
    edit_single(hf, each_proj(int8))
    (found,) = findings(hf / "model.safetensors")
    assert found["id"] == "quantised"
    assert "bitsandbytes, 8 bit" in found["what"]


def test_a_quantization_config_over_plain_weights(plain: Path, hf: Path, tmp_path: Path) -> None:
    """A merged QLoRA: noted, and converted as if the key were not there."""
    config = said(quant_method="bitsandbytes", load_in_4bit=True)
    edit_json(hf / "config.json", lambda c: c.update(config))
    done = to_mm(MODEL, hf, tmp_path / "a")
    assert "quantization_config (bitsandbytes, 4 bit)" in done.stderr
    assert "no weight is quantised" in done.stderr
    to_mm(MODEL, plain, tmp_path / "b")
    file = "release/mp_rank_00/model_optim_rng.pt"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    report = json.loads(call("doctor", hf, "--json").stdout)
    (found,) = report["findings"]
    assert found["id"] == "quantization-config-left"
    assert found["what"].startswith("config.json has a quantization_config (bitsandbytes, 4 bit)")


# ------------------------------------------------------------------------------ adapters
def wrap(tensors: Tensors) -> None:
    """As a state dict of a PeftModel's inner model is."""
    for name in [n for n in tensors if n.endswith(("q_proj.weight", "v_proj.weight"))]:
        base = name.removesuffix(".weight")
        weight = tensors.pop(name)
        tensors[f"{base}.base_layer.weight"] = weight
        tensors[f"{base}.lora_A.default.weight"] = torch.ones(4, weight.shape[1])
        tensors[f"{base}.lora_B.default.weight"] = torch.ones(weight.shape[0], 4)


def alone(hf: Path) -> Tensors:
    """An adapter's tensors."""
    return {
        f"base_model.model.{n.removesuffix('.weight')}.lora_A.weight": torch.ones(4, t.shape[1])
        for n, t in read_single(hf).items()
        if n.endswith("q_proj.weight")
    }


PEFT = {"base_model_name_or_path": "Org/Base", "peft_type": "LORA", "r": 4}


def test_wrapped_weights_of_an_adapter(hf: Path) -> None:
    edit_single(hf, wrap)
    says(converting(hf), "unmerged-adapter", hf, "(q_proj, v_proj)", "merge_and_unload")
    says(converting(hf, "--drop", "*lora*"), "unmerged-adapter", hf, "base model first")


def test_lora_matrices_beside_whole_weights(hf: Path) -> None:
    """As old versions of PEFT named them: without base_layer."""
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_single(hf, lambda t: t.update({name: torch.ones(4, 4)}))
    says(converting(hf), "unmerged-adapter", hf, "1 tensor of an unmerged LoRA adapter (q_proj)")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_alone(hf: Path, name: str, config: bool) -> None:
    tensors = alone(hf)
    if name.endswith(".bin"):
        torch.save(tensors, hf / name)
    else:
        save_file(tensors, hf / name)
    (hf / "adapter_config.json").write_text(json.dumps(PEFT))
    (hf / "model.safetensors").unlink()
    if not config:
        (hf / "config.json").unlink()
    says(converting(hf), "unmerged-adapter", hf, "alone", "Org/Base", "merge_and_unload")


def test_an_adapter_in_the_place_of_the_model(hf: Path) -> None:
    save_file(alone(hf), hf / "model.safetensors")
    says(converting(hf), "unmerged-adapter", hf, "(q_proj)")


def test_modules_that_peft_trains_whole(hf: Path) -> None:
    """Neither of the two copies may be dropped: one of them is what was trained."""
    base = "model.embed_tokens"

    def wrap(tensors: Tensors) -> None:
        weight = tensors.pop(f"{base}.weight")
        tensors[f"{base}.original_module.weight"] = weight
        tensors[f"{base}.modules_to_save.default.weight"] = weight + 1

    edit_single(hf, wrap)
    says(converting(hf), "unmerged-adapter", hf, "embed_tokens", "merge")


def test_lora_in_mm(mm: Path, plain: Path) -> None:
    name = "text_decoder.decoder.layers.0.self_attention.linear_qkv.lora_A.default.weight"
    for rank in ("mp_rank_00", "mp_rank_01"):
        edit_rank(mm, rank, lambda c: c["model"].update({name: torch.ones(4, 4)}))
    says(going_back(mm, plain), "unmerged-adapter", mm, "(linear_qkv)")


# ------------------------------------------------------------------------------ ZeRO-3
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("part", ["", "model.layers."])
def test_weights_that_zero_3_did_not_gather(hf: Path, pickled: bool, part: str) -> None:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = torch.empty(0) if name.startswith(part) else tensors[name]

    edit_single(hf, edit)
    if pickled:
        as_pickle(hf)
    says(converting(hf), "empty-tensors", hf, "are empty", "ZeRO-3", "zero_to_fp32.py")


# ------------------------------------------------------------------------------ prefixes
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "model.module.", "actor."],
)
def test_names_behind_a_prefix(hf: Path, prefix: str) -> None:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    edit_single(hf, edit)
    says(converting(hf), "wrapped-names", hf, f"every name begins with {prefix},", "wrapper")


@pytest.mark.parametrize(
    "word", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_names_with_a_wrapper_within(hf: Path, word: str) -> None:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            head, _, tail = name.partition(".")
            tensors[f"{head}.{word}.{tail}"] = tensors.pop(name)

    edit_single(hf, edit)
    says(converting(hf), "wrapped-names", hf, f"names have {word}. in them")


def test_the_names_of_new_transformers_are_no_wrapper(
    plain: Path, hf: Path, tmp_path: Path
) -> None:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[renamed(name)] = tensors.pop(name)

    edit_single(hf, edit)
    to_mm(MODEL, hf, tmp_path / "mm")


@pytest.mark.parametrize("prefix", ["module.", "model.module.", "_orig_mod."])
def test_a_prefix_in_mm(mm: Path, plain: Path, prefix: str) -> None:
    def edit(content: Json) -> None:
        content["model"] = {prefix + name: t for name, t in content["model"].items()}

    for rank in ("mp_rank_00", "mp_rank_01"):
        edit_rank(mm, rank, edit)
    says(going_back(mm, plain), "wrapped-names", mm, f"every name begins with {prefix}")


@pytest.mark.parametrize("leaf", ["weight1", "linear_fc2.weight3"])
def test_grouped_experts_in_mm(mm: Path, plain: Path, leaf: str) -> None:
    name = f"text_decoder.decoder.layers.0.mlp.experts.{leaf}"
    for rank in ("mp_rank_00", "mp_rank_01"):
        edit_rank(mm, rank, lambda content: content["model"].update({name: torch.ones(4, 4)}))
    says(going_back(mm, plain), "grouped-experts", mm, name, "--moe-grouped-gemm")


@pytest.mark.parametrize("key", ["state_dict", "module", ""])
def test_weights_under_another_key(mm: Path, plain: Path, key: str) -> None:
    def edit(content: Json) -> None:
        weights = content.pop("model")
        content.update({key: weights} if key else weights)

    for rank in ("mp_rank_00", "mp_rank_01"):
        edit_rank(mm, rank, edit)
    error = going_back(mm, plain)
    words = ("holds no model, but", "checkpoint_version", f"under '{key}'" if key else "at its top")
    assert all(word in error["what"] for word in words), error
    listed = findings(mm)
    assert [f["id"] for f in listed] == ["chunk-keys"]  # not one for each rank
    assert listed[0]["fix"] == error["fix"]
    assert "copy" not in error["fix"]


@pytest.mark.parametrize("key", ["state_dict", "module", "model"])
def test_a_pickle_with_weights_under_a_key(hf: Path, key: str) -> None:
    as_pickle(hf)
    weights = torch.load(hf / "pytorch_model.bin")
    torch.save({key: weights, "epoch": 3}, hf / "pytorch_model.bin")
    says(converting(hf), "nested-weights", hf, f"under {key!r}", "epoch")


# ------------------------------------------------------------------------------ other folders
def empty_files(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


def without_weights(hf: Path) -> Path:
    (hf / "model.safetensors").unlink()
    return hf


@pytest.mark.parametrize("config", [True, False])
def test_a_deepspeed_checkpoint(hf: Path, config: bool) -> None:
    states = ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    empty_files(without_weights(hf) / "global_step500", *states)
    empty_files(hf, "latest", "zero_to_fp32.py")
    if not config:
        (hf / "config.json").unlink()
    script = f"python {hf / 'zero_to_fp32.py'} {hf} OUT"
    says(converting(hf), "deepspeed-checkpoint", hf, "global_step500", script)
    step = hf / "global_step500"
    says(converting(step), "deepspeed-checkpoint", step, script)


def test_global_steps_beside_weights_are_no_matter(hf: Path, tmp_path: Path) -> None:
    empty_files(hf / "global_step500", "mp_rank_00_model_states.pt")
    to_mm(MODEL, hf, tmp_path / "mm")


def test_a_folder_of_fsdp(hf: Path) -> None:
    inner = without_weights(hf) / "pytorch_model_fsdp_0"
    empty_files(inner, ".metadata", "__0_0.distcp")
    says(converting(hf), "fsdp-checkpoint", hf, f"accelerate merge-weights {inner} OUT")
    shutil.rmtree(inner)
    empty_files(hf, "pytorch_model_fsdp.bin")
    says(converting(hf), "fsdp-checkpoint", hf, "pytorch_model.bin")


def test_a_folder_of_verl(hf: Path) -> None:
    empty_files(without_weights(hf), *(f"model_world_size_2_rank_{r}.pt" for r in range(2)))
    says(converting(hf), "fsdp-checkpoint", hf, "verl.model_merger", f"--local_dir {hf}")


def test_a_folder_of_llama_cpp(hf: Path) -> None:
    empty_files(without_weights(hf), "model-Q4_K_M.gguf")
    says(converting(hf), "quantised", hf, "GGUF", "unquantised")


def test_a_folder_of_distcp(hf: Path) -> None:
    empty_files(without_weights(hf), ".metadata", "__0_0.distcp", "__1_0.distcp")
    words = ("__0_0.distcp", f"dcp_to_hf --load_dir {hf}")
    says(converting(hf), "distributed-checkpoint", hf, *words)


@pytest.mark.parametrize("where", ["iter_0000500", "release", "."])
@pytest.mark.parametrize("tracker", [True, False])
def test_torch_dist(plain: Path, tmp_path: Path, where: str, tracker: bool) -> None:
    root = tmp_path / "save"
    empty_files(root / where, ".metadata", "__0_0.distcp", "common.pt", "metadata.json")
    if tracker and where != ".":
        word = "500" if where.startswith("iter") else where
        (root / "latest_checkpointed_iteration.txt").write_text(word)
    words = ("torch_dist", "__0_0.distcp", "does not read", "--ckpt-format torch")
    words += ("torch_dist_to_hf", "torch_dist_to_mm")
    tells(going_back(root, plain), "distributed-checkpoint", *words)
    inspected = error_of(call("inspect", root / where, "--json", check=None))
    assert ".metadata" in inspected["what"]  # which is empty


def test_a_newer_torch_dist_beside_rank_folders(mm: Path, plain: Path) -> None:
    empty_files(mm / "iter_0000005", ".metadata", "__0_0.distcp", "common.pt")
    (mm / "latest_checkpointed_iteration.txt").write_text("5")
    says(going_back(mm, plain), "distributed-checkpoint", mm, "iter_0000005")


def test_unified_safetensors(hf: Path) -> None:
    (hf / "config.json").unlink()
    empty_files(without_weights(hf), "part0.safetensors", "param_name_map.json")
    says(converting(hf), "unified-safetensors", hf, "unified_safetensors", "part0.safetensors")
    words = ("--cfg.source_dir", hf, "--cfg.target_dir", hf.parent / "back", "--json")
    error = error_of(call("QwenVLConverter", "resplit", *words, check=None))
    assert error["cause"] == "unified-safetensors"
    empty_files(hf, "part1.safetensors")
    says(converting(hf), "unified-safetensors", hf, "part1.safetensors", "rank_R")


def test_one_level_too_high(hf: Path, tmp_path: Path) -> None:
    top = tmp_path / "runs"
    for number in (500, 1000):
        shutil.copytree(hf, top / f"checkpoint-{number}")
    words = ("checkpoint-500, checkpoint-1000", f"give {top / 'checkpoint-1000'}")
    says(converting(top), "one-level-high", top, *words)
    shutil.copy(hf / "config.json", top)
    says(converting(top), "one-level-high", top, *words)


def test_the_cache_of_the_hub(hf: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--Org--Name"
    for name in ("aa", "bb"):
        shutil.copytree(hf, model / "snapshots" / name)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("aa")
    for folder in (model, model / "snapshots"):
        says(converting(folder), "one-level-high", folder, f"give {model / 'snapshots/aa'}")


def test_mm_one_level_too_high_or_low(mm: Path, plain: Path, tmp_path: Path) -> None:
    top = tmp_path / "all"
    top.mkdir()
    shutil.move(mm, top / "run")
    says(going_back(top, plain), "one-level-high", top, f"give {top / 'run'}")
    rank = top / "run/release/mp_rank_01"
    says(going_back(rank, plain), "one-level-low", rank, f"give {top / 'run'}")


# ------------------------------------------------------------------------------ the index
def test_an_index_of_another_save(plain: Path, tmp_path: Path) -> None:
    """The only weights are never moved away."""
    hf = make_hf(MODEL, tmp_path / "hf", shards=2, layers=2, vit_layers=2)
    edit_index(hf, lambda m: m.update({k: v.replace("of-00002", "of-00005") for k, v in m.items()}))
    error = converting(hf)
    says(
        error,
        "stale-index",
        hf,
        "none of which is there",
        "belongs to another save",
        "move it away",
    )
    (found,) = findings(hf)
    assert found["command"] == f"mv {hf / INDEX} {hf / INDEX}.old"


def test_an_index_of_another_save_beside_whole_weights(hf: Path, tmp_path: Path) -> None:
    """Read as transformers does, with a note; doctor sets the index aside."""
    other = {"a": "model-00001-of-00002.safetensors"}
    (hf / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": other}))
    assert f"not read: {INDEX}" in to_mm(MODEL, hf, tmp_path / "mm").stderr
    (found,) = json.loads(call("doctor", hf, "--json").stdout)["findings"]
    assert found["id"] == "index-not-read"
    assert found["command"] == f"mv {hf / INDEX} {hf / INDEX}.old"


def test_an_index_beside_a_pickle(hf: Path, tmp_path: Path) -> None:
    as_pickle(hf)
    other = {"a": "model-00001-of-00002.safetensors"}
    (hf / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": other}))
    says(converting(hf), "stale-index", hf, "pytorch_model.bin instead", "move it away")
    (hf / INDEX).rename(hf / f"{INDEX}.old")
    to_mm(MODEL, hf, tmp_path / "mm")


def test_a_part_of_the_model_in_front_of_the_index(tmp_path: Path) -> None:
    """The file that is in the way is to go, and not the files of the index, which are the model."""
    hf = make_hf(MODEL, tmp_path / "hf", shards=2, layers=2, vit_layers=2)
    shutil.copy(hf / "model-00001-of-00002.safetensors", hf / "model.safetensors")
    error = converting(hf)
    assert "tensors that model.safetensors.index.json lists" in error["what"]
    done = call("doctor", hf, "--json", check=3)
    (found,) = json.loads(done.stdout)["findings"]
    assert (found["id"], found["what"]) == ("partial-weight-file", error["what"])
    assert found["command"] == f"mv {hf / 'model.safetensors'} {hf / 'model.safetensors'}.old"
    (hf / "model.safetensors").rename(hf / "model.safetensors.old")
    to_mm(MODEL, hf, tmp_path / "mm")


def test_files_of_the_index_that_are_missing(tmp_path: Path) -> None:
    """Some are there: the index is right, and the others must be fetched."""
    hf = make_hf(MODEL, tmp_path / "hf", shards=2, layers=2, vit_layers=2)
    (hf / "model-00001-of-00002.safetensors").unlink()
    assert "download" in converting(hf)["fix"]
    assert [f["id"] for f in findings(hf)] == ["missing-weight-file"]


# ------------------------------------------------------------------------------ the head
def test_an_output_layer_that_may_be_the_embedding(hf: Path, tmp_path: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=False))
    error = converting(hf)
    assert "1 tensor missing: lm_head.weight" in error["what"]
    assert "set tie_word_embeddings true in config.json, if" in error["fix"]
    (found,) = findings(hf)
    assert (found["id"], found["fix"]) == ("missing-tensor", error["fix"])
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=True))
    to_mm(MODEL, hf, tmp_path / "mm")


def test_more_than_the_output_layer_is_missing(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=False))
    edit_single(hf, lambda t: t.pop("model.norm.weight"))
    assert "tie_word_embeddings" not in converting(hf)["fix"]


def test_every_command_says_it(hf: Path, tmp_path: Path) -> None:
    """Not the conversions alone."""
    edit_single(hf, each_proj(int8))
    for words in (("verify", hf, hf), ("diff", hf, hf), ("roundtrip", hf)):
        done = call(*words, "--json", check=None)
        assert "quantised checkpoint" in done.stdout, (words, done.stdout, done.stderr)
    done = call("Qwen2VLConverter", "hf_to_mm", HF, hf, MM, tmp_path / "x", "--dry_run", check=3)
    assert "quantised checkpoint" in done.stderr


@pytest.mark.parametrize("tool", ["inspect", "verify", "diff", "roundtrip", "suggest"])
def test_every_tool_says_what_a_folder_is(tool: str, plain: Path, tmp_path: Path) -> None:
    """Not that it is no MM checkpoint, which nobody said."""
    top = tmp_path / "all"
    shutil.copytree(plain, top / "checkpoint-500")
    more = {"verify": [plain], "diff": [plain], "suggest": ["--pp", "2"]}.get(tool, [])
    done = call(tool, top, *more, check=3)
    assert f"give {top / 'checkpoint-500'}" in done.stderr, done.stderr
    (top / "checkpoint-500/config.json").unlink()
    done = call(tool, top / "checkpoint-500", *more, check=3)
    assert "has no config.json" in done.stderr, done.stderr


def test_a_hugging_face_folder_in_the_place_of_mm(plain: Path, tmp_path: Path) -> None:
    done = to_other(MODEL, plain, tmp_path / "out", check=3)
    assert "it is a Hugging Face checkpoint: give it as hf_dir" in done.stderr


def test_open_says_it_too(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "all/checkpoint-500")
    with pytest.raises(CheckpointError, match=r"below it: checkpoint-500"):
        mmconvert.open(tmp_path / "all")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git LFS"),
        (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "an HTML page"),
    ],
    ids=["pointer", "page"],
)
def test_what_a_download_leaves(content: bytes, words: str, hf: Path, mm: Path) -> None:
    """Every kind of file in its place says what it is; so does `open`."""
    ckpt = hf.with_name("x.ckpt")
    ckpt.write_bytes(content)
    for rank in mm.rglob("*.pt"):
        rank.write_bytes(content)
    (hf / "model.safetensors").write_bytes(content)
    for path in (hf, mm, ckpt, hf / "model.safetensors"):
        assert words in error_of(call("inspect", path, "--json", check=3))["what"]
    for path in (hf, mm, ckpt):
        with pytest.raises(CheckpointError, match=words):
            mmconvert.open(path)
    (hf / "config.json").write_bytes(content)
    assert words in error_of(call("suggest", hf, "--pp", "1", "--json", check=3))["what"]
    assert any(words in finding["what"] for finding in findings(hf))
