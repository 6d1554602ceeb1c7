"""MM checkpoints for the runtime: their layout, and one rank's tensors.

The layout is read off names and shapes alone; nothing of the converter's tables is asked.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from mmconvert.adapters import MM_A, of_manifest
from mmconvert.errors import CheckpointError, FormatError
from mmconvert.formats import manifest
from mmconvert.formats.mm.folder import MMCheckpoint, open_mm
from mmconvert.formats.mm.rankfiles import EXTRA_STATE
from mmconvert.formats.mm.ranks import RANK_FILE
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.lora import LoraPlan, is_adapter, plan_of
from mmconvert.sharding.layout import Layout, Rank
from mmconvert.sharding.stages import StageGrid, show, total

EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
# Where the layers of each module stand, in the order of ModuleKeys. InternViT's are one level
# deeper.
LAYERS = (
    re.compile(r"image_encoder\.encoder\.(?:blocks|encoder)\.layers\.(\d{1,4})\."),
    re.compile(r"audio_encoder\.encoder\.blocks\.layers\.(\d{1,4})\."),
    re.compile(r"text_decoder\.decoder\.layers\.(\d{1,4})\."),
)


@dataclass(frozen=True)
class LoadableCheckpoint:
    """An MM checkpoint that the runtime can load.

    Attributes:
        folder: the folder of the rank folders.
        iteration: 0 for a ``release`` that was not resplit from one.
        layout: how it is divided.
        vocabulary: rows of the word embedding and the output layer, those that pad it included.
        lora: what of it is adapted, if anything is.
        adapters: the folder of the rank folders with the adapters; None: there are none yet.
    """

    folder: Path
    iteration: int
    layout: Layout
    vocabulary: int = 0
    lora: LoraPlan | None = None
    adapters: Path | None = None

    @property
    def world(self) -> int:
        """The number of processes that it wants: one for each rank file."""
        return self.layout.tp_folders * self.layout.pp_size * self.layout.ep


def find(mm_dir: Path, arch: Architecture) -> LoadableCheckpoint:
    """Reads the layout of an MM checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or not of this model.
    """
    checkpoint = open_mm(mm_dir)
    model = arch.skeleton(torch.float32)
    parts = arch.parts(model)
    layers = {arch.keys.vision: _layers(parts.visual), arch.keys.text: list(parts.text.layers)}
    if parts.audio is not None:
        layers[arch.keys.sound] = list(parts.audio.layers)
    places = dict(zip(arch.keys, LAYERS, strict=True))
    grids = {key: _grid(checkpoint, key, places[key]) for key in layers}
    for key, grid in grids.items():
        if total(grid) != len(layers[key]):
            raise CheckpointError(
                f"{checkpoint.folder} holds {total(grid)} layers of the {key} module, "
                f"{show(grid)}; config.json says {len(layers[key])}",
                "all layers, and the hf_dir of the checkpoint's own model",
                "give the hf_dir that the checkpoint was made from",
            )
    tp = {k: _tp(checkpoint, k, places[k], *_width(found[0])) for k, found in layers.items()}
    layout = Layout(tp, grids, checkpoint.ep_size, decoder=arch.keys.text)
    layout.check()
    if layout.tp_folders != checkpoint.tp_folders:
        raise CheckpointError(
            f"{checkpoint.folder} has {checkpoint.tp_folders} tp folders; shapes say {dict(tp)}",
            "as many folders as the largest tp size",
            "give the hf_dir of the model that this checkpoint was made from",
        )
    rows = _vocabulary(checkpoint, layout)
    return LoadableCheckpoint(
        checkpoint.folder, manifest.iteration(checkpoint.root, checkpoint.iteration), layout, rows
    )


def _vocabulary(checkpoint: MMCheckpoint, layout: Layout) -> int:
    """Rows of the word embedding on all tensor-parallel ranks; 0 if there is none."""
    rows: dict[tuple[int, int], int] = {}
    for chunk, tensors in checkpoint.parts.items():
        found = tensors.get(EMBEDDING)
        if found is not None and not chunk.rank.ep and chunk.rank.tp < layout.tp[layout.decoder]:
            place = (chunk.virtual, chunk.rank.pp)
            rows[place] = rows.get(place, 0) + found.shape[0]
    return max(rows.values(), default=0)


def _layers(visual: Any) -> list[Any]:  # noqa: ANN401 - an encoder of any model
    return list(visual.blocks if hasattr(visual, "blocks") else visual.vision_tower.encoder.layer)


def _width(layer: Any) -> tuple[str, int]:  # noqa: ANN401 - a layer of any model
    """A matrix that tp divides by columns, and the number of these."""
    mlp = getattr(layer, "mlp", layer)
    for name in ("down_proj", "linear_fc2", "fc2"):
        if hasattr(mlp, name):
            return "mlp.linear_fc2.weight", getattr(mlp, name).in_features
    return "self_attention.linear_proj.weight", layer.self_attn.o_proj.in_features


def _grid(checkpoint: MMCheckpoint, key: str, layer: re.Pattern[str]) -> StageGrid:
    counts: dict[tuple[int, int], int] = {}
    for chunk, tensors in checkpoint.parts.items():
        numbers = {int(m[1]) for name in tensors if (m := layer.match(name))}
        if numbers != set(range(len(numbers))):
            raise CheckpointError(
                f"{checkpoint.folder}: layers {sorted(numbers)} of the {key} module in one chunk",
                "local layers numbered from 0 without a gap",
            )
        place = (chunk.virtual, chunk.rank.pp)
        if counts.setdefault(place, len(numbers)) != len(numbers):
            raise CheckpointError(
                f"{checkpoint.folder}: tp ranks of pp rank {chunk.rank.pp} hold different "
                f"numbers of layers of the {key} module",
                "the same layers on all tp ranks",
            )
    return tuple(
        tuple(counts[v, p] for p in range(checkpoint.pp_size)) for v in range(checkpoint.vpp_size)
    )


def _tp(checkpoint: MMCheckpoint, key: str, layer: re.Pattern[str], matrix: str, width: int) -> int:
    for tensors in checkpoint.parts.values():
        for name, tensor in tensors.items():
            found = layer.match(name)
            if found and name[found.end() :] == matrix and len(tensor.shape) == 2:
                if tensor.shape[1] == 0 or width % tensor.shape[1]:
                    raise CheckpointError(
                        f"{checkpoint.folder}: {name} has {tensor.shape[1]} columns",
                        f"{width} divided by a tp size",
                        "give the hf_dir of the model that this checkpoint was made from",
                    )
                return width // tensor.shape[1]
    raise CheckpointError(
        f"{checkpoint.folder}: no {matrix} in a layer of the {key} module", "a model"
    )


def read_rank(stored: LoadableCheckpoint, rank: Rank) -> dict[str, Any]:
    """The content of a rank file, its data mapped from disk; with that of its adapters, if any.

    Of two files everything but tensors is the adapters'.

    Raises:
        FormatError: it holds objects that are not data, or cannot be read.
    """
    folder = stored.layout.folder(rank)
    content = _read(stored.folder / folder / RANK_FILE)
    if stored.adapters is None:
        return content
    more = _read(stored.adapters / folder / RANK_FILE)
    parts = [stored.layout.part(v) for v in range(stored.layout.vpp_size)]
    return more | {part: {**content[part], **more.get(part, {})} for part in parts}


def _read(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(
            f"{path} cannot be loaded: {reason}",
            "tensors and plain values; other objects in a checkpoint are never loaded",
            "mm-convert AutoConverter resplit to the same layout leaves them out",
        ) from None


def chunk_tensors(content: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """The tensors of one model chunk, without Transformer Engine's extra state."""
    found = content[part]
    return {n: t for n, t in found.items() if not n.endswith(EXTRA_STATE) and isinstance(t, Tensor)}


def with_adapters(
    base: LoadableCheckpoint, mm_dir: Path, alpha: float | None = None
) -> LoadableCheckpoint:
    """A base model with the adapters of another checkpoint, which must have its layout.

    Raises:
        CheckpointError: it holds none, or those of another layout.
    """
    checkpoint = open_mm(mm_dir)
    size = (checkpoint.tp_folders, checkpoint.pp_size, checkpoint.ep_size, checkpoint.vpp_size)
    layout = base.layout
    expected = (layout.tp_folders, layout.pp_size, layout.ep, layout.vpp_size)
    if size != expected:
        raise CheckpointError(
            f"{checkpoint.folder} has tp, pp, ep, vpp of {size}; the base model has {expected}",
            "adapters in the base model's layout",
            "mm-convert ... lora_resplit brings them into it",
        )
    ranks = {
        tensor.shape[0]
        for tensors in checkpoint.parts.values()
        for name, tensor in tensors.items()
        if is_adapter(name) and name.endswith(MM_A)
    }
    first = _read(checkpoint.folder / layout.folder(Rank(0)) / RANK_FILE)
    noted = of_manifest(manifest.read(checkpoint.root)[0] or {})
    given = alpha if alpha is not None or noted is None else noted.alpha
    plan = plan_of(first.get("args"), ranks, given, str(checkpoint.folder))
    number = manifest.iteration(checkpoint.root, checkpoint.iteration)
    return replace(base, lora=plan, adapters=checkpoint.folder, iteration=number)
