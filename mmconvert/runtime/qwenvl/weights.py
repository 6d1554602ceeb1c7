"""Reads a Qwen-VL's weights into the hub's names, from Hugging Face or MindSpore checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmconvert.config import Options
from mmconvert.converters.qwenvl import FAMILY
from mmconvert.errors import CheckpointError, ReplicaError, TensorError
from mmconvert.executor import compare
from mmconvert.executor.differences import in_words
from mmconvert.executor.fileio import open_files
from mmconvert.formats.hf.folder import read_config
from mmconvert.formats.hf.model import hf_model
from mmconvert.formats.hf.side import hf_side, hf_target
from mmconvert.formats.mindspore.folder import is_ms
from mmconvert.formats.mindspore.model import check_complete, ms_model
from mmconvert.formats.reading import watched
from mmconvert.loading import read_target, torch_tensor
from mmconvert.plan.build import build, in_dtype
from mmconvert.plan.plan import Copy, Plan, Side
from mmconvert.plan.proof import prove
from mmconvert.runtime.processes import Emit
from mmconvert.runtime.qwenvl.model import QwenVLModel
from mmconvert.runtime.qwenvl.sizes import Positions, Sizes
from mmconvert.stored import StoredTensor

ENCODER = next(m.key for m in FAMILY.table(FAMILY.variants[0]) if m.role == "encoder")


def sizes_of(hf_dir: Path, positions: Positions = "hub") -> Sizes:
    """The sizes in a folder's config.json.

    Raises:
        CheckpointError: it is missing, or of another model.
    """
    return Sizes.of(read_config(hf_dir), str(hf_dir / "config.json"), positions)


def dims_of(sizes: Sizes) -> dict[str, int]:
    """The sizes as the table of the family counts them."""
    config = {
        "vocab_size": sizes.vocab, "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads, "num_hidden_layers": sizes.layers,
        "intermediate_size": 2 * sizes.inner,
        "visual": {
            "width": sizes.width, "heads": sizes.vision_heads, "layers": sizes.vision_layers,
            "output_dim": sizes.hidden,
        },
    }  # fmt: skip
    return {**FAMILY.dims(config), f"{ENCODER}.ffn": sizes.vision_inner}


def skeleton(sizes: Sizes, dtype: torch.dtype) -> QwenVLModel:
    """The model, its parameters without data."""
    with torch.device("meta"):
        return QwenVLModel(sizes).to(dtype).eval()


@watched
def load(
    sizes: Sizes,
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    note: Emit = lambda _: None,
    stored: Mapping[str, torch.dtype] | None = None,
) -> QwenVLModel:
    """The model with the weights of a checkpoint.

    Args:
        path: a Hugging Face folder, a ``.ckpt`` or safetensors file of MindSpore, or a folder of
            ``rank_R`` folders with their strategy files.
        note: gets what is worth knowing of the checkpoint.
        stored: dtypes that tensors are rounded to first.

    Raises:
        CheckpointError: files are missing or damaged; TensorError: tensors that do not make this
            model; ReplicaError: copies of one tensor differ.
    """
    model = skeleton(sizes, dtype)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors(model, path, note):
        state[name] = tensor.to((stored or {}).get(name, tensor.dtype)).to(device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def tensors(model: QwenVLModel, path: Path, note: Emit) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint under its name on the hub, as it is stored."""
    expected = {
        name: StoredTensor(name, "F32", tuple(p.shape), path, 0)
        for name, p in model.state_dict().items()
    }
    dims = dims_of(model.sizes)
    modules = FAMILY.modules(FAMILY.variants[0])
    src, notes = _source(path, dims)
    for text in notes:
        note(text)
    headers = hf_side(modules, dims, expected)
    for key, whole in headers.wholes.items():
        if key in src.wholes and src.wholes[key].shape != whole.shape:
            raise TensorError(
                f"{path}: {key.name()} is {list(src.wholes[key].shape)} as a whole; config.json "
                f"asks for {list(whole.shape)}",
                "a checkpoint and a config.json of one model",
            )
    plan = build(src, hf_target(headers, in_dtype(src.wholes, "")), [], "")
    prove(plan)
    _compare_replicas(plan)
    copies: dict[int, list[Copy]] = defaultdict(list)
    for c in plan.copies:
        copies[c.dst].append(c)
    with open_files() as files:
        for i, target in enumerate(plan.targets):
            data = read_target(files, plan, i, copies[i])
            yield target.name, torch_tensor(data, target.dtype, target.shape)


def _source(path: Path, dims: Mapping[str, int]) -> tuple[Side, list[str]]:
    """A checkpoint as wholes in the hub's orientation, and its notes."""
    if not (path.is_dir() or is_ms(path)):
        raise CheckpointError(
            f"{path} is not a checkpoint" if path.exists() else f"{path} does not exist",
            "a .ckpt or safetensors file, a folder of rank_R folders, or a Hugging Face folder",
        )
    if not is_ms(path):
        model = hf_model(FAMILY, path, Options())
        return hf_side(model.modules, model.dims, model.hf_tensors), list(model.notes)
    modules = FAMILY.modules(FAMILY.variants[0])
    source = ms_model(path, None, Options(), modules, name=FAMILY.name)
    keys = [key for part in source.parts for key in part]
    check_complete(keys, modules, dict(dims), path)
    rows = [row for module in modules for row in module.all_rows()]
    return source.side(frozenset(row.mm for row in rows if row.transposed)), source.notes


def _compare_replicas(plan: Plan) -> None:
    found = compare.compare(plan.replicas, plan.sources, plan.sources, workers=2)
    if found:
        raise ReplicaError(
            f"copies of one tensor differ: {in_words(found[0])}", "the same values in every copy"
        )


def settled(sizes: Sizes, positions: Positions) -> Sizes:
    """The sizes with MindFormers' numbers beyond the hub's: its positions, no NTK, no logn."""
    hub = positions == "hub"
    return replace(sizes, positions=positions, ntk=sizes.ntk and hub, logn=sizes.logn and hub)
