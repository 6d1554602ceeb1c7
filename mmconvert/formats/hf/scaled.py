"""fp8 weights with a scale for each block, as DeepSeek and Qwen publish them.

Beside ``X.weight`` (F8_E4M3) stands ``X.weight_scale_inv``; a value is the product of both. Merged
experts ``X`` have ``X_scale_inv``. Source: FP8Linear of transformers, DeepSeek-V3's weight notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmconvert.causes.quantised import KEYS
from mmconvert.errors import TensorError
from mmconvert.names import number, summarise
from mmconvert.narrow import is_array, is_object
from mmconvert.stored import FLOATS, SCALED, Scales, StoredTensor

SUFFIX = "_scale_inv"
FP8 = "F8_E4M3"
BLOCK = (128, 128)


def dequantised(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, object], folder: Path
) -> dict[str, StoredTensor]:
    """The tensors with each fp8 weight and its scales as one.

    Raises:
        TensorError: a weight without scales, scales without a weight, or of another shape.
    """
    block = _block(config, folder)
    found = {name: t for name, t in tensors.items() if not name.endswith(SUFFIX)}
    scales = {name.removesuffix(SUFFIX): t for name, t in tensors.items() if name.endswith(SUFFIX)}
    odd = [name for name in scales if name not in found or found[name].dtype != FP8]
    odd += [name for name, t in found.items() if t.dtype == FP8 and name not in scales]
    if odd:
        raise TensorError(
            f"{folder}: {number(odd, 'tensor')} with scales and no fp8 weight, or the other way "
            f"round: {summarise(odd)}",
            f"X.weight in {FP8} beside X.weight{SUFFIX}",
            "download the weight files again",
        )
    for name, scale in scales.items():
        _check(found[name], scale, block)
        found[name] = found[name]._replace(dtype=SCALED, scales=Scales(scale, *block))
    return found


def note(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """What to say of weights that are dequantised."""
    scaled = [name for name, tensor in tensors.items() if tensor.scales]
    return [f"{number(scaled, 'weight')} in fp8 dequantised by their scales"] if scaled else []


def _block(config: Mapping[str, object], folder: Path) -> tuple[int, int]:
    """Rows and columns of a block."""
    said = [value for key in KEYS if is_object(value := config.get(key))]
    size = next((part["weight_block_size"] for part in said if "weight_block_size" in part), None)
    if size is None:
        return BLOCK
    if is_array(size) and len(size) == 2:
        rows, cols = size
        if isinstance(rows, int) and isinstance(cols, int) and rows > 0 and cols > 0:
            return rows, cols
    raise TensorError(
        f"{folder / 'config.json'}: quantization_config.weight_block_size is {size!r:.80}",
        "rows and columns of a block, such as [128, 128]",
    )


def _check(weight: StoredTensor, scale: StoredTensor, block: tuple[int, int]) -> None:
    """Raises TensorError for scales that are not one for each block."""
    *outer, rows, cols = weight.shape if len(weight.shape) in (2, 3) else (0, 0)
    expected = (*outer, -(-rows // block[0]), -(-cols // block[1]))
    if len(weight.shape) not in (2, 3) or scale.shape != expected or scale.dtype not in FLOATS:
        raise TensorError(
            f"{scale.name} is {scale.dtype} {list(scale.shape)} beside {weight.name} "
            f"{list(weight.shape)}",
            f"a floating-point scale for each block of {block[0]} × {block[1]}",
            "weights and config.json of one checkpoint",
        )
