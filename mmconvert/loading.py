"""Loads one rank of an MM layout straight from an HF checkpoint, reading only its bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.family import Family
from mmconvert.errors import LayoutError, TensorError
from mmconvert.executor.blockio import Region, Window, read_region, row_bytes
from mmconvert.executor.fileio import Files, open_files
from mmconvert.formats.hf.model import hf_model
from mmconvert.formats.hf.side import hf_side
from mmconvert.formats.mm.target import mm_target
from mmconvert.formats.model import target_layout
from mmconvert.plan.build import build, in_dtype
from mmconvert.plan.plan import Copy, Plan
from mmconvert.plan.proof import prove
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import ITEM_SIZE

if TYPE_CHECKING:
    from torch import Tensor

# safetensors spelling -> name in torch.
TORCH_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
}


def load_rank(
    family: Family, hf_dir: Path, given: ParallelConfig, place: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    """The state dict of one model chunk.

    Args:
        family: of the checkpoint.
        hf_dir: the HF checkpoint.
        given: the layout.
        place: tp rank, pp rank, virtual stage, ep rank.

    Raises:
        LayoutError: a rank that the layout does not have.
    """
    source = hf_model(family, hf_dir, Options())
    layout = target_layout(source, given, prefix="")
    tp, pp, virtual, ep = place
    sizes = (layout.tp_folders, layout.pp_size, layout.vpp_size, layout.ep)
    if any(not 0 <= rank < size for rank, size in zip(place, sizes, strict=True)):
        raise LayoutError(
            f"tp rank {tp}, pp rank {pp}, virtual stage {virtual}, ep rank {ep} is not in "
            f"{layout.describe()}",
            f"ranks below {sizes}",
        )
    src = hf_side(source.modules, source.dims, source.hf_tensors, transposed=True)
    wholes = in_dtype(src.wholes, "")
    plan = build(src, mm_target(source.modules, source.dims, layout, wholes))
    prove(plan)
    chunk = Chunk(Rank(tp, pp, ep), virtual)
    expected = {i: t for i, t in enumerate(plan.targets) if t.chunk == chunk}
    copies = defaultdict[int, list[Copy]](list)
    for c in plan.copies:
        copies[c.dst].append(c)
    with open_files() as files:
        return {
            t.name: torch_tensor(read_target(files, plan, i, copies[i]), t.dtype, t.shape)
            for i, t in expected.items()
        }


def read_target(files: Files, plan: Plan, number: int, copies: Iterable[Copy]) -> bytearray:
    """The bytes of a target of a plan without casts, put together in memory.

    Args:
        number: of the target.
        copies: those of the plan that write it.
    """
    target = plan.targets[number]
    data = bytearray(target.nbytes)
    line, item = row_bytes(target), ITEM_SIZE[target.dtype]
    for c in copies:
        window = Window(memoryview(data), c.dst_row * line + c.dst_col * item, line)
        region = Region(c.src_row, c.src_col, c.rows, c.cols)
        read_region(files, plan.sources[c.src], region, window)
    return data


def torch_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A torch tensor over these bytes.

    Raises:
        ImportError: torch is not installed. TensorError: a dtype that it does not have.
    """
    import torch

    kind = getattr(torch, TORCH_DTYPES.get(dtype, ""), None)
    if kind is None:
        raise TensorError(f"torch has no dtype for {dtype}", f"one of {', '.join(TORCH_DTYPES)}")
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(data, dtype=kind).reshape(shape)
