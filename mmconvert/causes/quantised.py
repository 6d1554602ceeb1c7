"""Quantised checkpoints: recognised by config.json, by the names beside weights, by their dtype."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from mmconvert.errors import FormError
from mmconvert.names import number, summarise
from mmconvert.narrow import is_object
from mmconvert.stored import FLOATS, SCALED, StoredTensor

CAUSE = "quantised"
KEYS = ("quantization_config", "compression_config", "quantization")  # of config.json; MLX's last
EXPECTED = "weights in fp32, fp16 or bf16"
FIX = "take the model's unquantised checkpoint, or let the library that quantised it undo that"

FIX_FP8 = "give --dequantize to convert it as bf16; or take the model's unquantised checkpoint"

BNB8, BNB4 = "bitsandbytes, 8 bit", "bitsandbytes, 4 bit"
PACKED, COMPRESSED, SLIM = "GPTQ, AWQ", "compressed-tensors", "msModelSlim"
# The last word of a name that stands in the place of a weight, or beside it -> who writes it.
# Sources: the modules of bitsandbytes, AutoGPTQ and GPTQModel, AutoAWQ, compressed-tensors, HQQ,
# AQLM, TensorRT Model Optimizer, msModelSlim, and FP8Linear of transformers.
MARKS = {
    **dict.fromkeys(("SCB", "CB", "weight_format"), BNB8),
    **dict.fromkeys(("absmax", "quant_map", "nested_absmax", "nested_quant_map"), BNB4),
    **dict.fromkeys(("qweight", "qzeros", "scales", "g_idx"), PACKED),
    **dict.fromkeys(("weight_scale", "weight_scale_inv", "input_scale", "activation_scale"), ""),
    **dict.fromkeys(("weight_packed", "weight_shape", "weight_zero_point"), COMPRESSED),
    **dict.fromkeys(("weight_g_idx", "weight_global_scale", "input_global_scale"), COMPRESSED),
    **dict.fromkeys(("weight_offset", "input_offset", "deq_scale", "quant_bias"), SLIM),
    **dict.fromkeys(("codes", "codebooks"), "AQLM"),
    **dict.fromkeys(("_data", "_scale"), "quanto"),
    **dict.fromkeys(("gate_up_proj_blocks", "down_proj_blocks"), "MXFP4"),
    "weight_scale_2": "ModelOpt",
    "weight_scales": "EETQ",
    "W_q": "HQQ",
}
# What stands beside weights or activations under the names of tools that are not listed above:
# k_scale and v_scale of a KV cache, smooth_scale, weight_quantizer._amax ...
SCALES = re.compile(
    r"(?:[\w.]*\.)?(?:\w+_scale_inv|\w*quantizer\.\w+|(?:[qkv]|kv|kv_cache|weight|input|output|act|smooth|prob_output)"
    r"_(?:scales?|scaling_factor|zero_points?|zeros|offset)|scaling_factor|zero_point)"
)
STATE = ".quant_state.bitsandbytes__"  # then nf4 or fp4
METHODS = {"gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ"}
SECTIONS = 3  # how deep sections of config.json are looked through
# Names of dtypes that only quantised weights have and no plan moves (safetensors format).
LOW_BIT = frozenset(
    {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I4", "U4"}
)


def quantised(
    others: Iterable[StoredTensor],
    weights: Iterable[StoredTensor],
    config: Mapping[str, object],
) -> FormError | None:
    """Whether weights are quantised: a ``quantization_config`` over plain weights is no sign.

    Args:
        weights: the tensors that the model's table knows.
        others: the tensors that it does not.
        config: config.json; empty where there is none.
    """
    said = said_method(config)
    marks: dict[str, str] = {}
    for tensor in others:
        label = _mark(tensor.name)
        if label is not None or (said and tensor.dtype not in FLOATS):
            marks[tensor.name] = label or ""
    low = {t.name: t.dtype for t in weights if t.dtype not in FLOATS | {SCALED}}
    if not marks and not low:
        return None
    found = max(marks.values(), key=len, default="")  # the one that says most
    label = _label(said, found or _by_dtype(set(low.values()), bool(marks)))
    in_blocks = set(low.values()) <= {"F8_E4M3"} and all(n.endswith("_scale_inv") for n in marks)
    named = [*marks, *(f"{name} ({dtype})" for name, dtype in low.items())]
    return _error(named, label, in_blocks=bool(marks) and in_blocks)


def low_bit_dtype(path: Path, name: str, dtype: object) -> FormError | None:
    """The refusal of a dtype that no weight file but a quantised one has; None for others."""
    if not isinstance(dtype, str) or dtype not in LOW_BIT:
        return None
    return _error([f"{name} ({dtype})"], dtype, f"{path}: ")


def left_over(config: Mapping[str, object]) -> str:
    """The note on a ``quantization_config`` where no weight is quantised; "" without one."""
    method = said_method(config)
    return method and (
        f"config.json has a quantization_config ({method}), but no weight is quantised: "
        "the entry is ignored; take it out of config.json, because from_pretrained would obey it"
    )


def without_method(config: Mapping[str, object], depth: int = SECTIONS) -> dict[str, object]:
    """config.json as it would be had nobody quantised the model."""
    return {
        key: without_method(value, depth - 1) if depth and is_object(value) else value
        for key, value in config.items()
        if key not in KEYS
    }


def said_method(config: Mapping[str, object], depth: int = SECTIONS) -> str:
    """How config.json or a section of it says that weights are quantised; "" if it does not."""
    for key in KEYS:
        said = config.get(key)
        if is_object(said):
            return _in_words(said, "MLX" if key == "quantization" else "")
    sections = [part for part in config.values() if is_object(part)] if depth else []
    return next((words for part in sections if (words := said_method(part, depth - 1))), "")


def _in_words(said: Mapping[str, object], by: str) -> str:
    method = str(said.get("quant_method") or by or "of an unnamed method")[:40]
    bits = next((said[k] for k in ("bits", "w_bit", "nbits") if isinstance(said.get(k), int)), None)
    bits = 8 if said.get("load_in_8bit") is True else bits
    bits = 4 if said.get("load_in_4bit") is True else bits
    if method == "of an unnamed method" and ("load_in_8bit" in said or "load_in_4bit" in said):
        method = "bitsandbytes"
    return METHODS.get(method, method) + (f", {bits} bit" if bits else "")


def is_mark(name: str) -> bool:
    """Whether only quantised checkpoints have such a name."""
    return _mark(name) is not None


def _mark(name: str) -> str | None:
    """Who writes such a name; "" if many do, None if it is no sign of quantisation."""
    if STATE in name:
        return f"bitsandbytes {name.rpartition(STATE)[2][:8]}, 4 bit"
    return MARKS.get(name.rpartition(".")[2], "" if SCALES.fullmatch(name) else None)


def _by_dtype(dtypes: Collection[str], scaled: bool) -> str:
    if any(dtype.startswith("F8") for dtype in dtypes):
        return "fp8" if scaled else "fp8, without scales"
    if not dtypes:
        return "with scales"
    return f"{'' if scaled else 'bare '}integers: {', '.join(sorted(dtypes))}"


def _label(said: str, found: str) -> str:
    """What config.json says, unless the names say the same and more."""
    same = found.startswith(said.partition(",")[0])
    return found if same and len(found) >= len(said) else said or found


def _error(
    names: Collection[str], label: str, where: str = "", *, in_blocks: bool = False
) -> FormError:
    what = (
        f"{where}{number(names, 'tensor')} of a quantised checkpoint ({label}): {summarise(names)}"
    )
    return FormError(CAUSE, what, EXPECTED, FIX_FP8 if in_blocks else FIX)
