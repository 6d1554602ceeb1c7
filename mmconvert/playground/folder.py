"""The whole playground: the checkpoints that the pages use, made one after the other."""

# numpy's own types are written for a newer Python than the oldest that is served here.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmconvert.api import hf_to_mm
from mmconvert.config import Options
from mmconvert.durable import sync_tree
from mmconvert.errors import RequestError, cannot_write
from mmconvert.formats.hf.folder import read_config
from mmconvert.modeljson.keys import model_keys
from mmconvert.playground.adapter import make_adapter
from mmconvert.playground.checkpoints import make_hf
from mmconvert.playground.media import make_data
from mmconvert.playground.qwenvl import make_qwenvl
from mmconvert.playground.talker import make_talker
from mmconvert.playground.values import Array, Change, as_trained, change
from mmconvert.playground.weights import write_json

FOUR_STAGES: Mapping[str, object] = {
    "llm_pp_layers": [1, 10, 10, 7],
    "vit_pp_layers": [32, 0, 0, 0],
    "tp_size": 2,
}
TWO_STAGES: Mapping[str, object] = {
    "llm_pp_layers": [12, 16],
    "vit_pp_layers": [32, 0],
    "tp_size": 2,
}
HEADS = 16  # of the vision encoder


class PlaygroundItem(NamedTuple):
    """One thing in the playground: its name, what it is, and what makes it in a folder."""

    name: str
    about: str
    make: Callable[[Path], object]


def _family(name: str, model: str, about: str) -> PlaygroundItem:
    def make(folder: Path) -> None:
        make_hf(model, folder / name)

    return PlaygroundItem(name, about, make)


def _extra(folder: Path) -> None:
    make_hf("qwen2vl-2b", folder / "hf_extra", extra=[("value_head.weight", (1, 72))])


def _qwenvl(folder: Path) -> None:
    make_qwenvl(folder / "hf_qwenvl")


def _talker(folder: Path) -> None:
    make_talker(folder / "hf_tiny")


def _adapter(folder: Path) -> None:
    make_adapter(folder / "hf", folder / "adapter")


def _base(folder: Path) -> None:
    make_hf("qwen2vl-2b", folder / "base", layers=12, vit_layers=8)


def _trained(folder: Path) -> None:
    """Later layers moved more, the vision encoder frozen; exact steps, so always the same."""
    shutil.copytree(folder / "base", folder / "trained")

    def moved(name: str, values: Array) -> Array | None:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if not (layer or "merger.mlp" in name) or "norm" in name:
            return None
        rate = 2.0**-11 * (1 + int(layer[1]) if layer else 2)
        steps = ((np.arange(values.size) * 31) % 17 - 8).reshape(values.shape)
        return values + (steps * rate / 4).astype(np.float32)

    change(folder / "trained", moved)


def _changed(folder: Path, name: str, layout: Mapping[str, object], rule: Change) -> Path:
    """An MM checkpoint of ``hf`` after a change of its tensors, without a manifest."""
    hf = folder / f"{name}_hf"
    shutil.copytree(folder / "hf", hf)
    change(hf, rule)
    hf_to_mm(hf, folder / name, dict(layout), options=Options(no_sync=True))
    shutil.rmtree(hf)
    return folder / name


def _save_dir(folder: Path) -> None:
    """Two iterations, as training leaves them: a matrix of one tp rank is not that of ``hf``."""

    def second_half(name: str, values: Array) -> Array | None:
        if name != "visual.blocks.0.mlp.fc1.weight":
            return None
        rows = np.arange(len(values))[:, None]
        return np.where(rows >= len(values) // 2, values + 1, values)

    mm = _changed(folder, "save_dir", TWO_STAGES, second_half)
    (mm / "mmconvert.json").unlink()
    for iteration in (1000, 2000):
        shutil.copytree(mm / "release", mm / f"iter_{iteration:07d}")
        for rank in (mm / f"iter_{iteration:07d}").glob("*/*.pt"):
            as_trained(rank, iteration)
    shutil.rmtree(mm / "release")
    (mm / "latest_checkpointed_iteration.txt").write_text("2000")


def _drifted(folder: Path) -> None:
    """A norm that has gone apart on two tensor-parallel ranks."""

    def up(name: str, values: Array) -> Array | None:
        return values + 1 if name == "model.layers.11.input_layernorm.weight" else None

    hf_to_mm(folder / "hf", folder / "mm_drifted", dict(FOUR_STAGES), options=Options(no_sync=True))
    other = _changed(folder, "other", FOUR_STAGES, up)
    rank = "release/mp_rank_01_002/model_optim_rng.pt"
    os.replace(other / rank, folder / "mm_drifted" / rank)
    shutil.rmtree(other)


def _faulty(folder: Path) -> None:
    """The vision encoder's q, k and v one below the other, as the reference 2.2.0 wrote them."""

    def below(name: str, values: Array) -> Array | None:
        if not re.match(r"visual\.blocks\.\d+\.attn\.qkv\.", name):
            return None
        by_head: Array = values.reshape(HEADS, 3, -1)
        return np.swapaxes(by_head, 0, 1).reshape(values.shape)

    mm = _changed(folder, "mm_2.2.0", {}, below)
    (mm / "mmconvert.json").unlink()


def _model_json(folder: Path) -> None:
    write_json(folder / "model.json", model_keys(read_config(folder / "hf")))


ITEMS = (
    _family("hf", "qwen2vl-2b", "Qwen2-VL-2B, narrow as all of these: 28 text, 32 vision layers"),
    _family("hf25", "qwen2.5vl-7b", "Qwen2.5-VL-7B"),
    _family("hf_omni", "qwen2.5omni-7b", "Qwen2.5-Omni-7B"),
    _family("hf_internvl", "internvl2-8b", "InternVL2-8B"),
    _family("hf_qwen3vl", "qwen3vl-8b", "Qwen3-VL-8B"),
    _family("hf_experts", "qwen3vl-30b-a3b", "Qwen3-VL-30B-A3B, with 16 experts"),
    _family("hf_glm", "glm4.1v-9b", "GLM-4.1V-9B"),
    _family("hf_glm45v", "glm4.5v", "GLM-4.5V, with a tensor for each expert"),
    _family("hf_deepseek", "deepseekvl2", "DeepSeek-VL2"),
    PlaygroundItem("hf_qwenvl", "Qwen-VL", _qwenvl),
    PlaygroundItem("hf_extra", "hf with a tensor that no table knows", _extra),
    PlaygroundItem("hf_tiny", "a Qwen2-VL that can be run", _talker),
    PlaygroundItem("base", "a Qwen2-VL with 12 text and 8 vision layers", _base),
    PlaygroundItem("trained", "base after training", _trained),
    PlaygroundItem("save_dir", "what training saves: TP 2, PP 2, two iterations", _save_dir),
    PlaygroundItem("mm_drifted", "an MM checkpoint whose copies of a norm differ", _drifted),
    PlaygroundItem("mm_2.2.0", "an MM checkpoint with the fault of the reference's 2.2.0", _faulty),
    PlaygroundItem(
        "adapter", "a LoRA adapter for hf", _adapter
    ),
    PlaygroundItem(
        "data", "pictures, train.json; data.json, llava.json and coco beside it", make_data
    ),
    PlaygroundItem("model.json", "MindSpeed-MM's file for hf", _model_json),
)  # fmt: skip


def make_playground(out: Path) -> int:
    """Writes everything; all of it or nothing.

    Returns:
        the bytes that were written.

    Raises:
        RequestError: something is there already.
        OutputError: the file system refuses.
    """
    if os.path.lexists(out):
        raise RequestError(
            f"{out} exists", "a folder that does not exist yet", "choose another name"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as waiting:
            folder = Path(waiting) / out.name
            folder.mkdir()
            for item in ITEMS:
                item.make(folder)
            sync_tree(folder)
            folder.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
