"""fp8 weights with a scale for each block, dequantised: against torch's float8_e4m3fn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inprocess import BACK, HF, MM, call
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_mm
from nights import in_turns

SIZES: dict[str, Any] = {
    "layers": 2,
    "vit_layers": 1,
    "deepstack": [0],
    "hidden": 200,
    "inter": 136,
}
SIZES |= {"moe_inter": 72, "experts": 4}
NAME = "model.language_model.layers.1."


def nearest(exact: torch.Tensor) -> torch.Tensor:
    """float64 to bf16 by looking at the neighbours: nothing here rounds twice."""
    near = exact.float().bfloat16()
    bits = near.view(torch.int16).to(torch.int32)
    around = torch.stack([(bits + step).to(torch.int16) for step in (0, -1, 1)]).view(
        torch.bfloat16
    )
    gaps = (around.double() - exact).abs()
    best = gaps.min(0).values
    even = around.view(torch.int16) & 1
    rank = torch.where(gaps == best, even.double(), torch.inf)
    found = around.gather(0, rank.argmin(0, keepdim=True))[0]
    return torch.where(exact.isfinite() & near.isfinite() & (exact != 0), found, near)


def dequantised(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The values, by torch's own reading of the bytes."""
    rows, cols = weight.shape[-2:]
    whole = scale.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return nearest(weight.double() * whole[..., :rows, :cols])


def quantise(hf: Path, out: Path, block: tuple[int, int] = (128, 128), *, plain: Path) -> None:
    """Two folders of one model: with fp8 text weights of any bytes, and what they mean in bf16."""
    torch.manual_seed(3)
    tensors = load_file(hf / "model.safetensors")
    low, high = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        inner = ("self_attn.", "mlp.experts.", "mlp.down_proj", "mlp.up_proj", "mlp.gate_proj")
        if ".layers." not in name or tensor.ndim < 2 or not any(word in name for word in inner):
            continue
        codes = torch.randint(0, 256, tensor.shape, dtype=torch.uint8)
        codes.flatten()[:256] = torch.arange(256)
        codes[(codes & 127) == 127] = 3  # no NaN: models have none
        rows, cols = (-(-n // b) for n, b in zip(tensor.shape[-2:], block, strict=True))
        shape = (*tensor.shape[:-2], rows, cols)
        scale = torch.randn(shape).abs() * 2.0 ** torch.randint(-20, 20, shape)
        low[name] = codes.view(torch.float8_e4m3fn)
        low[f"{name}_scale_inv"] = scale
        high[name] = dequantised(low[name], scale, block)
    said = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    for folder, content in ((out, low), (plain, high)):
        folder.mkdir()
        for path in hf.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def both(model: str, tmp_path: Path, block: tuple[int, int], **sizes: Any) -> tuple[Path, Path]:
    hf = make_hf(model, tmp_path / "hf", shards=1, **sizes)
    quantise(hf, tmp_path / "fp8", block, plain=tmp_path / "plain")
    return tmp_path / "fp8", tmp_path / "plain"


LAYOUT = ["--cfg.parallel_config.tp_size", "2"]
EP = ["--cfg.parallel_config.ep_size", "2"]
DENSE: dict[str, Any] = {"layers": 2, "vit_layers": 1}


@pytest.mark.parametrize(
    ("block", "model"),
    in_turns([(48, 80), (128, 128)], ["qwen3vl-30b-a3b", "qwen3vl-8b", "qwen2.5vl-7b"]),
)
def test_values_are_torchs_rounded_once(model: str, block: tuple[int, int], tmp_path: Path) -> None:
    """Stacked experts that are transposed, fused and cut: as if bf16 had been there before."""
    sizes = SIZES if "30b" in model else {**DENSE, **({"deepstack": [0]} if "3vl" in model else {})}
    fp8, plain = both(model, tmp_path, block, **sizes)
    flags = [*LAYOUT, *(EP if "30b" in model else [])]
    for hf, more in ((fp8, ["--dequantize"]), (plain, [])):
        done = call(
            "AutoConverter", "hf_to_mm", HF, hf, MM, tmp_path / f"mm {hf.name}", *flags, *more
        )
        assert ("dequantised" in done.stderr) == (hf == fp8)
    assert compare_mm(tmp_path / "mm plain", tmp_path / "mm fp8") == []
    back = tmp_path / "back"
    words = (HF, fp8, MM, tmp_path / "mm fp8", BACK, back, "--dequantize")
    call("AutoConverter", "mm_to_hf", *words)
    expected, found = load_file(plain / "model.safetensors"), load_file(back / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


def test_other_dtypes_are_reached_in_one_step(tmp_path: Path) -> None:
    fp8, _ = both("qwen3vl-30b-a3b", tmp_path, (128, 128), **SIZES)
    words = ("--style", "split", "--hf_dir", fp8, "--save_dir", tmp_path / "out")
    call("moe_expert", *words, "--dequantize", "--dtype", "fp32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    given = load_file(fp8 / "model.safetensors")
    stack, scale = (given[f"{NAME}mlp.experts.down_proj{end}"] for end in ("", "_scale_inv"))
    whole = scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    exact = stack.double() * whole[:, : stack.shape[1], : stack.shape[2]]
    assert torch.equal(found[f"{NAME}mlp.experts.3.down_proj.weight"], exact[3].T.float())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_without_the_flag_it_is_named(tmp_path: Path) -> None:
    fp8, _ = both("qwen3vl-8b", tmp_path, (128, 128), **DENSE, deepstack=[0])
    said = call("AutoConverter", "hf_to_mm", HF, fp8, MM, tmp_path / "mm", check=3).stderr
    assert "quantised" in said
    assert "--dequantize" in said
    assert not (tmp_path / "mm").exists()


@pytest.mark.parametrize("fault", ["no scale", "no weight", "shape", "block", "integers"])
def test_what_does_not_fit_is_refused(fault: str, tmp_path: Path) -> None:
    fp8, _ = both("qwen3vl-8b", tmp_path, (128, 128), **DENSE, deepstack=[0])
    path, name = fp8 / "model.safetensors", f"{NAME}mlp.down_proj.weight"
    content = load_file(path)
    scale = (
        content.pop(f"{name}_scale_inv") if fault == "no scale" else content[f"{name}_scale_inv"]
    )
    if fault == "no weight":
        content[f"{NAME}input_layernorm.weight_scale_inv"] = torch.ones(1)
    elif fault == "shape":
        content[f"{name}_scale_inv"] = torch.ones(scale.shape[0] + 1, scale.shape[1])
    elif fault == "integers":
        content[f"{name}_scale_inv"] = torch.ones(scale.shape, dtype=torch.int32)
    elif fault == "block":
        config = json.loads((fp8 / "config.json").read_text())
        config["quantization_config"]["weight_block_size"] = [128]
        (fp8 / "config.json").write_text(json.dumps(config))
    save_file(content, path, metadata={"format": "pt"})
    words = (HF, fp8, MM, tmp_path / "mm", "--dequantize")
    said = call("AutoConverter", "hf_to_mm", *words, check=3).stderr
    assert "scale" in said or "block" in said
    assert not (tmp_path / "mm").exists()


def test_a_plain_checkpoint_takes_the_flag(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", **DENSE)
    for name, more in (("a", []), ("b", ["--dequantize"])):
        call("AutoConverter", "hf_to_mm", HF, hf, MM, tmp_path / name, *more)
    assert compare_mm(tmp_path / "a", tmp_path / "b") == []
