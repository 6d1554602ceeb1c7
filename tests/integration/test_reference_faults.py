"""What goes wrong in the reference tool, line by line: here it is right, or refused aloud.

The numbers are those of the list of faults that was found by running the reference converter
(MindSpeed-MM 2.0.0, 2.2.0 and 26.1.0). A test's name begins with its number. What is expected is
worked out here with torch, or with the reference's own rule, not with mmconvert.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import copied, edit_json, edit_rank, none, rank_files, same_hf
from inprocess import (
    BACK,
    CONVERTERS,
    HF,
    MM,
    SOURCE,
    TARGET,
    Done,
    call,
    converter_of,
    to_hf,
    to_mm,
    to_other,
)
from mmconvert.playground.checkpoints import NEW_NAMES, make_hf, nested_config
from mmread import INDEX, MANIFEST, TRACKER, compare_hf, compare_mm, weight_files
from nights import in_turns, nightly

NOT_OURS = {
    13: "no family with experts is served; an ep_size other than 1 is refused",
    14: "GLM-4.1V is not served",
    19: "Qwen3-Omni is not served",
    20: "Qwen3-VL is not served",
    21: "Qwen3-VL with experts is not served",
    25: "hf_to_mm_dcp and VideoAlign are not served",
}

Tensors = dict[str, torch.Tensor]
T, V = "text_decoder.decoder.layers", "image_encoder.encoder.blocks.layers"
I = "image_encoder.encoder.encoder.layers"  # noqa: E741 - InternVL's vision layers
A = "audio_encoder.encoder.blocks.layers"
HEAD = "text_decoder.output_layer.weight"
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
NORM = "text_decoder.decoder.final_layernorm.weight"

QWEN = ("qwen2vl-7b", "qwen2.5vl-7b")
TIED = ("qwen2vl-2b", "qwen2.5vl-3b", "internvl2.5-4b")
MODELS = (*QWEN, "qwen2.5omni-7b", "internvl2-76b")
LAYERS, VIT_LAYERS, AUDIO_LAYERS = 4, 2, 2
OMNI_NEW_NAMES = (
    ("thinker.visual.", "thinker.model.visual."),
    ("thinker.audio_tower.", "thinker.model.audio_tower."),
    ("thinker.model.", "thinker.model.language_model."),
)


def sizes_of(model: str) -> dict[str, Any]:
    """Few layers of each kind that the model has."""
    sizes = {"layers": LAYERS, "vit_layers": VIT_LAYERS}
    return {**sizes, "audio_layers": AUDIO_LAYERS} if "omni" in model else sizes


def small(model: str, out: Path, **more: Any) -> Path:
    """The model with few layers."""
    return make_hf(model, out, **{**sizes_of(model), **more})


def flags(
    llm: str,
    vit: str,
    tp: int = 1,
    vit_tp: int = 0,
    *,
    audio: str = "",
    audio_tp: int = 0,
    of: str = "",
) -> list[str]:
    """The flags of a layout; `of` is ``target_`` or ``source_`` for resplit."""
    given = {"llm_pp_layers": llm, "vit_pp_layers": vit, "audio_pp_layers": audio, "tp_size": tp}
    given |= {"vit_tp_size": vit_tp, "audio_tp_size": audio_tp}
    prefix = f"--cfg.{of}parallel_config."
    return [word for k, v in given.items() if v for word in (prefix + k, str(v))]


# name -> (llm, vit, tp, vit_tp, audio_tp); the audio encoder stands where the vision encoder does
LAYOUTS: dict[str, tuple[str, str, int, int, int]] = {
    "tp1": ("[4]", "[2]", 1, 0, 0),
    "tp2": ("[4]", "[2]", 2, 0, 0),
    "tp4": ("[4]", "[2]", 4, 0, 0),
    "tp4_vit1": ("[4]", "[2]", 4, 1, 2),
    "tp2_vit4": ("[4]", "[2]", 2, 4, 1),
    "pp2": ("[2,2]", "[2,0]", 1, 0, 0),
    "vpp2": ("[[0,2],[1,1]]", "[[2,0],[0,0]]", 1, 0, 0),
}


def layout_of(name: str, model: str, of: str = "") -> list[str]:
    """The flags of a layout of LAYOUTS."""
    llm, vit, tp, vit_tp, audio_tp = LAYOUTS[name]
    if "omni" not in model:
        return flags(llm, vit, tp, vit_tp, of=of)
    return flags(llm, vit, tp, vit_tp, audio=vit, audio_tp=audio_tp, of=of)


def hf_tensors(hf: Path) -> Tensors:
    """All tensors of a Hugging Face checkpoint, read by the public library."""
    return {k: v for name in sorted(weight_files(hf)) for k, v in load_file(hf / name).items()}


def mm_tensors(mm: Path, rank: str, part: str = "model") -> Tensors:
    """The tensors of a model chunk, read by torch."""
    return torch.load(rank_files(mm)[rank], weights_only=True)[part]


def refused(done: Done, code: int, *expected: str, out: Path | None = None) -> None:
    """An error with that exit code that says all of `expected`, and nothing written."""
    said = " ".join(done.stderr.split())
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert re.search("^error: ", done.stderr, re.MULTILINE), said
    for word in expected:
        assert word in said, f"{word!r} is not in: {said}"
    if out is not None:
        assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def per_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """q, k, v below each other -> q1 k1 v1 q2 k2 v2 ..., as Megatron's SelfAttention reads it."""
    thirds = tensor.view(3, heads, tensor.shape[0] // (3 * heads), *tensor.shape[1:])
    return thirds.transpose(0, 1).reshape(tensor.shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every value."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def hf_of(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes small models, each once; they must not be changed."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("hf")

    def make(model: str) -> Path:
        if model not in made:
            made[model] = small(model, folder / model)
        return made[model]

    return make


@pytest.fixture(scope="module")
def mm_of(tmp_path_factory: pytest.TempPathFactory, hf_of: Maker) -> Maker:
    """Converts them into the layouts of LAYOUTS, each once; they must not be changed."""
    folder = tmp_path_factory.mktemp("mm")

    def make(model: str, layout: str) -> Path:
        mm = folder / f"{model}-{layout}"
        if not mm.exists():
            to_mm(model, hf_of(model), mm, *layout_of(layout, model))
        return mm

    return make


def without_manifest(mm: Path, to: Path) -> Path:
    """The checkpoint as another tool would have written it."""
    shutil.copytree(mm, to)
    (to / MANIFEST).unlink()
    return to


# ============================================================================ wrong weights
@pytest.mark.parametrize(("model", "layout"), in_turns(QWEN, ["tp1", "tp2", "tp4"]))
def test_line_01_vision_qkv_is_interleaved_per_head(
    model: str, layout: str, hf_of: Maker, mm_of: Maker
) -> None:
    tp, hf, mm = LAYOUTS[layout][2], hf_tensors(hf_of(model)), mm_of(model, layout)
    for kind in ("weight", "bias"):
        for layer in range(VIT_LAYERS):
            plain = hf[f"visual.blocks.{layer}.attn.qkv.{kind}"]
            whole = per_head(plain, 16)
            assert not same(whole, plain)
            for rank, shard in enumerate(whole.chunk(tp)):
                found = mm_tensors(mm, f"mp_rank_{rank:02d}")
                assert same(found[f"{V}.{layer}.self_attention.linear_qkv.{kind}"], shard)


@pytest.mark.parametrize(("model", "tp"), in_turns(QWEN, [1, 2]))
def test_line_01_checkpoints_with_that_fault_are_repaired(
    model: str, tp: int, hf_of: Maker, tmp_path: Path
) -> None:
    """What 2.2.0 wrote is read with --vit-qkv concatenated, by mm_to_hf and by resplit."""
    hf, faulty = hf_of(model), tmp_path / "faulty"
    tensors = hf_tensors(hf)
    to_mm(model, hf, faulty, *flags("[4]", "[2]", tp))
    right = copied(faulty, tmp_path / "right")

    def as_220(content: dict, rank: int) -> None:
        for layer in range(VIT_LAYERS):
            for kind in ("weight", "bias"):
                whole = tensors[f"visual.blocks.{layer}.attn.qkv.{kind}"]
                name = f"{V}.{layer}.self_attention.linear_qkv.{kind}"
                content["model"][name] = whole.chunk(tp)[rank].clone()

    for rank in range(tp):
        edit_rank(faulty, f"mp_rank_{rank:02d}", lambda content, rank=rank: as_220(content, rank))
    (faulty / MANIFEST).unlink()
    said = ("--vit-qkv", "concatenated")
    to_hf(model, faulty, hf, tmp_path / "back", *said)
    same_hf(hf, tmp_path / "back")
    words = [*flags("[4]", "[2]", tp, of="target_"), *said, HF, str(hf)]
    to_other(model, faulty, tmp_path / "resplit", *words)
    none(compare_mm(right, tmp_path / "resplit"))
    call("verify", hf, faulty, *said)
    call("verify", hf, faulty, check=1)
    to_hf(model, faulty, hf, tmp_path / "wrong")
    assert compare_hf(hf, tmp_path / "wrong"), "the fault must show without the flag"


DEEP: dict[str, tuple[str, dict[str, Any], list[int], list[int], int]] = {
    # model, sizes, flat llm stages, flat vit stages, pp
    "internvl2-76b pp16": (
        "internvl2-76b",
        {},
        [0, 0, 0, 1, 5, 6, 7, 7, 7, 7, 7, 7, 7, 7, 6, 6],
        [11, 12, 12, 10] + 12 * [0],
        16,
    ),
    "internvl2-8b vpp3": (
        "internvl2-8b",
        {},
        [0, 0, 0, 1, 4, 4, 4, 4, 4, 4, 4, 3],
        [6, 7, 7, 4] + 8 * [0],
        4,
    ),
    "qwen2vl-7b vpp2, late": (
        "qwen2vl-7b",
        {"layers": 4, "vit_layers": 3},
        [0, 0, 0, 4],
        [0, 3, 0, 0],
        2,
    ),
    "omni spread": (
        "qwen2.5omni-7b",
        {"layers": 5, "vit_layers": 4, "audio_layers": 4},
        [0, 0, 3, 2],
        [0, 3, 1, 0],
        4,
    ),
}
DEEP_TODAY = ("internvl2-8b vpp3", "qwen2vl-7b vpp2, late", "omni spread")


def _stages(counts: list[int]) -> tuple[int, int]:
    held = [stage for stage, count in enumerate(counts) if count]
    return held[0], held[-1]


@pytest.mark.parametrize("case", nightly(DEEP, but=DEEP_TODAY))
def test_line_02_encoders_that_start_late_are_placed_by_the_lists(
    case: str, tmp_path: Path
) -> None:
    """Every tensor is stored once, on its stage; the first and last weights on theirs."""
    model, sizes, llm, vit, pp = DEEP[case]
    hf, mm = make_hf(model, tmp_path / "hf", **sizes), tmp_path / "mm"
    rows = len(llm) // pp
    texts, images = (
        str([c[v * pp : (v + 1) * pp] for v in range(rows)]).replace(" ", "") for c in (llm, vit)
    )
    audio = images if "omni" in model else ""
    to_mm(model, hf, mm, *flags(texts, images, audio=audio))
    prefixes = {"text_decoder": llm, "image_encoder": vit}
    if audio:
        prefixes["audio_encoder"] = vit
    ends = {
        "text_decoder": ("text_decoder.embedding.", "text_decoder.output_layer."),
        "image_encoder": ("image_encoder.encoder.(patch_embed|embeddings)", "image_encoder.proj"),
        "audio_encoder": (r"audio_encoder.encoder.conv1", "audio_encoder.encoder.ln_post"),
    }
    for stage in range(len(llm)):
        part = f"model{stage // pp}" if rows > 1 else "model"
        names = list(mm_tensors(mm, f"mp_rank_00_{stage % pp:03d}", part))
        for prefix, counts in prefixes.items():
            pattern = re.compile(rf"{prefix}\..*layers\.(\d+)\.")
            found = {int(m[1]) for name in names if (m := pattern.match(name))}
            assert found == set(range(counts[stage])), (stage, prefix)
            for end, at in zip(ends[prefix], _stages(counts), strict=True):
                held = any(re.match(end, name) for name in names)
                assert held == (stage == at), (stage, end)
    to_hf(model, mm, hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")


@pytest.mark.parametrize(
    ("model", "tp"), in_turns(["internvl2-76b", "internvl2-2b", "internvl2-1b"], [4, 2, 8])
)
def test_line_03_internvl_comes_back_from_any_tp_size(model: str, tp: int, tmp_path: Path) -> None:
    """Uneven vocabulary; 25 heads over 4 and 8 ranks with the 6B vision encoder."""
    kv = {"internvl2-1b": 2, "internvl2-2b": 8, "internvl2-76b": 8}[model]
    llm_tp = min(tp, kv)
    hf = make_hf(model, tmp_path / "hf", layers=2, vit_layers=2)
    to_mm(model, hf, tmp_path / "mm", *flags("[2]", "[2]", llm_tp, tp))
    to_hf(model, tmp_path / "mm", hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")


@pytest.mark.parametrize("tp", [4, 8])
def test_line_03_uneven_heads_and_vocabulary_are_cut_by_the_reference_rule(
    tp: int, tmp_path: Path
) -> None:
    """The first n % tp ranks hold one more; q, k and v of a rank stand below each other."""
    hf = make_hf("internvl2-76b", tmp_path / "hf", layers=2, vit_layers=2)
    to_mm("internvl2-76b", hf, tmp_path / "mm", *flags("[2]", "[2]", tp))
    tensors = hf_tensors(hf)

    def cut(total: int) -> list[int]:
        return [total // tp + (rank < total % tp) for rank in range(tp)]

    qkv = tensors["vision_model.encoder.layers.1.attn.qkv.weight"].view(3, 50, 50)
    thirds = qkv.split([2 * n for n in cut(25)], dim=1)
    proj = tensors["vision_model.encoder.layers.1.attn.proj.weight"]
    columns = proj.split([2 * n for n in cut(25)], dim=1)
    words = tensors["language_model.model.embed_tokens.weight"].split(cut(265))
    heads = tensors["language_model.lm_head.weight"].split(cut(265))
    for rank in range(tp):
        found = mm_tensors(tmp_path / "mm", f"mp_rank_{rank:02d}")
        assert same(found[f"{I}.1.self_attention.linear_qkv.weight"], thirds[rank].reshape(-1, 50))
        assert same(found[f"{I}.1.self_attention.linear_proj.weight"], columns[rank].contiguous())
        assert same(found[EMBEDDING], words[rank])
        assert same(found[HEAD], heads[rank])


RENAMES = {"qwen2vl-7b": NEW_NAMES, "qwen2.5vl-7b": NEW_NAMES, "qwen2.5omni-7b": OMNI_NEW_NAMES}


@pytest.mark.parametrize("model", RENAMES)
def test_line_04_new_style_names(model: str, mm_of: Maker, tmp_path: Path) -> None:
    """The same MM checkpoint, and back in the spelling of hf_dir."""
    hf = small(model, tmp_path / "hf", rename=RENAMES[model], same_values=True)
    to_mm(model, hf, tmp_path / "mm", *layout_of("tp2", model))
    none(compare_mm(mm_of(model, "tp2"), tmp_path / "mm"))
    to_hf(model, tmp_path / "mm", hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")


@pytest.mark.parametrize("model", MODELS)
def test_line_04_a_tensor_that_nothing_maps_is_an_error(model: str, tmp_path: Path) -> None:
    hf, out = small(model, tmp_path / "hf", extra=[("mystery.weight", (4, 4))]), tmp_path / "out"
    done = to_mm(model, hf, out, *layout_of("tp1", model), check=None)
    refused(done, 3, "mystery.weight", out=out)


@pytest.mark.parametrize("model", MODELS)
def test_line_05_a_missing_weight_file(model: str, tmp_path: Path) -> None:
    hf, out = small(model, tmp_path / "hf", shards=3), tmp_path / "out"
    (hf / "model-00002-of-00003.safetensors").unlink()
    done = to_mm(model, hf, out, *layout_of("tp1", model), check=None)
    refused(done, 3, "model-00002-of-00003.safetensors", out=out)


HALVES = {
    "qwen2vl-7b": "model.layers.1.mlp.up_proj.weight",
    "qwen2.5vl-7b": "visual.blocks.1.mlp.gate_proj.bias",
    "qwen2.5omni-7b": "thinker.audio_tower.layers.1.self_attn.v_proj.bias",
    "internvl2-76b": "language_model.model.layers.1.self_attn.k_proj.weight",
    "internvl2-2b": "language_model.model.layers.1.feed_forward.w3.weight",
}


def drop_tensor(hf: Path, *names: str) -> None:
    """Remove tensors from a checkpoint with one weight file."""
    tensors = load_file(hf / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model", HALVES)
def test_line_05_half_of_a_fused_tensor_is_an_error(model: str, tmp_path: Path) -> None:
    """The index does not tell: there is none."""
    hf, out = small(model, tmp_path / "hf", shards=1), tmp_path / "out"
    drop_tensor(hf, HALVES[model])
    done = to_mm(model, hf, out, *layout_of("tp1", model), check=None)
    refused(done, 3, HALVES[model], out=out)


@pytest.mark.parametrize(
    ("model", "name"),
    in_turns(MODELS, ["a.safetensors", "model-00001-of-00009.safetensors", "z.pt"], one_in=3),
)
def test_line_06_stray_files_change_nothing(
    model: str, name: str, mm_of: Maker, hf_of: Maker, tmp_path: Path
) -> None:
    """A second, complete set of other values beside the one that the index names."""
    hf = copied(hf_of(model), tmp_path / "hf")
    other = small(model, tmp_path / "other", seed="other", shards=1)
    shutil.copy(other / "model.safetensors", hf / name)
    to_mm(model, hf, tmp_path / "mm", *layout_of("tp1", model))
    none(compare_mm(mm_of(model, "tp1"), tmp_path / "mm"))


ODD: dict[str, tuple[str, dict[str, Any], list[str], tuple[str, ...]]] = {
    "vocabulary": ("qwen2vl-7b", {"vocab_size": 301}, flags("[4]", "[2]", 2), ("301", "tp_size")),
    "text ffn": ("qwen2.5vl-7b", {"inter": 150}, flags("[4]", "[2]", 4), ("150", "tp_size")),
    "vision ffn": ("qwen2.5vl-7b", {"vit_inter": 57}, flags("[4]", "[2]", 1, 8), ("57", "vit_tp")),
    "vision heads": ("qwen2vl-7b", {"vit_heads": 4}, flags("[4]", "[2]", 1, 8), ("4", "vit_tp")),
    "audio heads": (
        "qwen2.5omni-7b",
        {},
        flags("[4]", "[2]", 4, audio="[2]", audio_tp=8),
        ("20", "audio_tp_size 8"),
    ),
    "InternVL text ffn": ("internvl2-76b", {"inter": 98}, flags("[4]", "[2]", 4), ("98",)),
    "InternVL query groups": ("internvl2-1b", {}, flags("[4]", "[2]", 4), ("2", "tp_size 4")),
    "fewer heads than ranks": (
        "internvl2-76b",
        {"vit_heads": 5},
        flags("[4]", "[2]", 8),
        ("5", "8", "vit_tp_size"),
    ),
}


@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
def test_line_07_nothing_is_cut_off(
    case: tuple[str, dict[str, Any], list[str], tuple[str, ...]], tmp_path: Path
) -> None:
    model, sizes, layout, words = case
    hf, out = small(model, tmp_path / "hf", **sizes), tmp_path / "out"
    refused(to_mm(model, hf, out, *layout, check=None), 2, *words, out=out)
    tp1 = layout_of("tp1", model)
    to_mm(model, hf, tmp_path / "mm", *tp1)
    there = [word.replace("cfg.parallel", "cfg.target_parallel") for word in layout]
    refused(to_other(model, tmp_path / "mm", out, *there, check=None), 2, *words, out=out)


CANONICAL = "--cfg.common_model_config.enable_canonical_hf_struct"


@pytest.mark.parametrize(("model", "tp"), in_turns(QWEN, [2, 4]))
def test_line_08_canonical_vision_qkv_is_cut_by_heads_of_each(
    model: str, tp: int, hf_of: Maker, tmp_path: Path
) -> None:
    """Each rank's rows are q, k and v of its heads below each other."""
    hf, mm = hf_of(model), tmp_path / "mm"
    to_mm(model, hf, mm, *flags("[4]", "[2]", tp), CANONICAL, "True")
    tensors = hf_tensors(hf)
    for kind in ("weight", "bias"):
        whole = tensors[f"visual.blocks.1.attn.qkv.{kind}"]
        q, k, v = whole.chunk(3)
        for rank in range(tp):
            expected = torch.cat([x.chunk(tp)[rank] for x in (q, k, v)])
            found = mm_tensors(mm, f"mp_rank_{rank:02d}")
            assert same(found[f"{V}.1.self_attention.linear_qkv.{kind}"], expected)
    to_hf(model, mm, hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")


@pytest.mark.parametrize("model", QWEN)
def test_line_08_what_the_reference_cut_is_repaired(
    model: str, hf_of: Maker, tmp_path: Path
) -> None:
    """Plain rows of the whole qkv on each rank: --vit-qkv concatenated."""
    hf, faulty, right = hf_of(model), tmp_path / "faulty", tmp_path / "right"
    words = flags("[4]", "[2]", 2)
    to_mm(model, hf, right, *words, CANONICAL, "True")
    shutil.copytree(right, faulty)
    (faulty / MANIFEST).unlink()
    tensors = hf_tensors(hf)

    def as_reference(content: dict, rank: int) -> None:
        for layer in range(VIT_LAYERS):
            for kind in ("weight", "bias"):
                whole = tensors[f"visual.blocks.{layer}.attn.qkv.{kind}"]
                name = f"{V}.{layer}.self_attention.linear_qkv.{kind}"
                content["model"][name] = whole.chunk(2)[rank].clone()

    for rank in range(2):
        edit_rank(faulty, f"mp_rank_{rank:02d}", lambda c, rank=rank: as_reference(c, rank))
    said = ("--vit-qkv", "concatenated")
    to_hf(model, faulty, hf, tmp_path / "back", *said)
    same_hf(hf, tmp_path / "back")
    there = flags("[4]", "[2]", 2, of="target_")
    to_other(model, faulty, tmp_path / "out", *there, *said, HF, str(hf))
    none(compare_mm(right, tmp_path / "out"))


@pytest.mark.parametrize(
    ("source", "target", "model", "manifest"),
    in_turns(["tp1", "pp2", "tp4_vit1"], ["tp2", "vpp2", "tp4"], QWEN, [True, False], one_in=4),
)
def test_line_09_resplit_of_a_canonical_checkpoint(
    model: str, source: str, target: str, manifest: bool, hf_of: Maker, tmp_path: Path
) -> None:
    hf, canonical = hf_of(model), (CANONICAL, "True")
    to_mm(model, hf, tmp_path / "mm", *layout_of(source, model), *canonical)
    to_mm(model, hf, tmp_path / "expected", *layout_of(target, model), *canonical)
    if not manifest:
        (tmp_path / "mm" / MANIFEST).unlink()
    to_other(model, tmp_path / "mm", tmp_path / "out", *layout_of(target, model, "target_"))
    none(compare_mm(tmp_path / "expected", tmp_path / "out"))


@pytest.mark.parametrize(("model", "manifest"), in_turns(TIED, [True, False]))
def test_line_10_resplit_of_tied_embeddings(
    model: str, manifest: bool, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """An output layer on the last stage exactly where the embedding is on another.

    Every pair with a manifest or without one; the models take turns.
    """
    more = [HF, str(hf_of(model))] if model.startswith("internvl") and not manifest else []
    layouts = ("tp1", "pp2", "vpp2", "tp2")
    for number, source in enumerate(layouts):
        mm = mm_of(model, source)
        mm = mm if manifest else without_manifest(mm, tmp_path / source)
        for target in layouts[(number + TIED.index(model) + manifest) % 2 :: 2]:
            out = tmp_path / f"{source}-{target}"
            to_other(model, mm, out, *layout_of(target, model, "target_"), *more)
            none(compare_mm(mm_of(model, target), out))
    hf = hf_tensors(hf_of(model))
    name = next(n for n in hf if n.endswith("embed_tokens.weight"))
    assert HEAD not in mm_tensors(mm_of(model, "tp1"), "mp_rank_00")
    assert same(mm_tensors(mm_of(model, "pp2"), "mp_rank_00_001")[HEAD], hf[name])
    last = mm_tensors(mm_of(model, "vpp2"), "mp_rank_00_001", "model1")
    assert same(last[HEAD], hf[name])


@pytest.mark.parametrize("model", TIED)
def test_line_10_tied_on_one_rank_with_virtual_stages(model: str, tmp_path: Path) -> None:
    hf, mm = small(model, tmp_path / "hf"), tmp_path / "mm"
    to_mm(model, hf, mm, *flags("[[2],[2]]", "[[2],[0]]"))
    first, last = (mm_tensors(mm, "mp_rank_00", part) for part in ("model0", "model1"))
    assert HEAD not in first and same(last[HEAD], first[EMBEDDING])
    to_hf(model, mm, hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")


@pytest.mark.parametrize("model", TIED)
def test_line_10_what_the_reference_resplit_is_read(
    model: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """Without an output layer on the last of two stages, or with a superfluous one."""
    hf, less, more = hf_of(model), tmp_path / "less", tmp_path / "more"
    without_manifest(mm_of(model, "pp2"), less)
    edit_rank(less, "mp_rank_00_001", lambda content: content["model"].pop(HEAD))
    without_manifest(mm_of(model, "tp1"), more)

    def add(content: dict) -> None:
        content["model"][HEAD] = content["model"][EMBEDDING].clone()

    edit_rank(more, "mp_rank_00", add)
    for mm in (less, more):
        to_hf(model, mm, hf, mm.with_suffix(".back"))
        same_hf(hf, mm.with_suffix(".back"))
        out = mm.with_suffix(".out")
        to_other(model, mm, out, *layout_of("vpp2", model, "target_"), HF, str(hf))
        none(compare_mm(mm_of(model, "vpp2"), out))


MISSING = {
    "qwen2vl-7b": (f"{V}.1.mlp.linear_fc2.bias", f"{T}.3.mlp.linear_fc1.weight", NORM),
    "qwen2.5vl-7b": (f"{V}.0.pre_mlp_layernorm.weight", f"{T}.0.self_attention.linear_qkv.bias"),
    "qwen2.5omni-7b": (
        f"{A}.1.mlp.linear_fc1.bias",
        f"{A}.0.self_attention.linear_qkv.weight",
        "audio_encoder.encoder.conv2.weight",
        "audio_encoder.encoder.audio_bos_eos_token.weight",
        "image_encoder.projector.encoder.linear_fc1.weight",
        NORM,
        EMBEDDING,
    ),
    "internvl2-76b": (f"{I}.1.ls1", "image_encoder.projector.linear_fc2.bias", NORM),
}


@pytest.mark.parametrize(
    ("named", "manifest"),
    in_turns([(m, name) for m, names in MISSING.items() for name in names], [True, False]),
)
def test_line_11_a_tensor_missing_on_the_mm_side_is_an_error(
    named: tuple[str, str], manifest: bool, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    model, name = named
    mm, out = copied(mm_of(model, "tp2"), tmp_path / "mm"), tmp_path / "out"
    for rank in rank_files(mm):
        edit_rank(mm, rank, lambda content: content["model"].pop(name))
    if not manifest:
        (mm / MANIFEST).unlink()
    refused(to_hf(model, mm, hf_of(model), out, check=None), 3, name, out=out)
    words = layout_of("tp1", model, "target_")
    refused(to_other(model, mm, out, *words, check=None), 3, name, out=out)


@pytest.mark.parametrize("model", ["qwen2vl-7b", "internvl2-76b"])
@pytest.mark.parametrize(("layout", "manifest"), [("pp2", True), ("pp2", False), ("tp1", True)])
def test_line_11_a_missing_output_layer_does_not_make_a_tied_model(
    model: str, layout: str, manifest: bool, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """On another stage than the embedding there is always one; mmconvert.json tells the rest."""
    mm, out = copied(mm_of(model, layout), tmp_path / "mm"), tmp_path / "out"
    edit_rank(mm, list(rank_files(mm))[-1], lambda content: content["model"].pop(HEAD))
    if not manifest:
        (mm / MANIFEST).unlink()
    refused(to_hf(model, mm, hf_of(model), out, check=None), 3, HEAD, out=out)
    words = layout_of("vpp2", model, "target_")
    done = to_other(model, mm, out, *words, check=None)
    assert done.returncode == 3 or "tied" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["audio_encoder", "image_encoder", "text_decoder"])
def test_line_11_a_whole_module_missing_is_an_error(
    module: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    model = "qwen2.5omni-7b"
    mm, out = copied(mm_of(model, "tp1"), tmp_path / "mm"), tmp_path / "out"

    def edit(content: dict) -> None:
        for name in [n for n in content["model"] if n.startswith(module)]:
            del content["model"][name]

    edit_rank(mm, "mp_rank_00", edit)
    done = to_hf(model, mm, hf_of(model), out, check=None)
    assert done.returncode in (2, 3)
    refused(done, done.returncode, out=out)


def test_line_11_only_the_talker_and_token2wav_come_from_the_original(
    mm_of: Maker, tmp_path: Path
) -> None:
    """Everything else comes from the MM checkpoint, audio too, with no list of audio layers."""
    model = "qwen2.5omni-7b"
    other = small(model, tmp_path / "other", seed="other", shards=2)
    done = to_hf(model, mm_of(model, "tp1"), other, tmp_path / "back", *flags("[4]", "[2]"))
    assert "copied from hf_dir" in done.stderr
    expected, plain = hf_tensors(small(model, tmp_path / "hf")), hf_tensors(other)
    found = hf_tensors(tmp_path / "back")
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        carried = name.startswith(("talker.", "token2wav."))
        assert same(tensor, plain[name] if carried else expected[name]), name
    assert sum(name.startswith("talker.") for name in found) > 20
    assert sum(name.startswith("token2wav.") for name in found) > 10


def test_line_11_the_talker_stays_out_of_mm(mm_of: Maker) -> None:
    names = mm_tensors(mm_of("qwen2.5omni-7b", "tp1"), "mp_rank_00")
    assert not [n for n in names if "talker" in n or "token2wav" in n]


@pytest.mark.parametrize(
    "model", nightly([*MODELS, "internvl2-2b"], but=("qwen2vl-7b", "qwen2.5omni-7b", MODELS[-1]))
)
def test_line_12_the_folders_tell_the_tp_size(model: str, tmp_path: Path) -> None:
    """Without a flag it comes back; with a wrong one it is an error that names both."""
    hf, mm, out = small(model, tmp_path / "hf"), tmp_path / "mm", tmp_path / "out"
    to_mm(model, hf, mm, *layout_of("tp4", model))
    (mm / MANIFEST).unlink()
    wrong = ("--cfg.parallel_config.tp_size", "1")
    refused(to_hf(model, mm, hf, out, *wrong, check=None), 3, "tp_size says 1", "4", out=out)
    to_hf(model, mm, hf, out)
    same_hf(hf, out)


VIT_ONLY = ("--cfg.save_vit_only", "True")


@pytest.mark.parametrize(
    ("model", "layout"), in_turns([*MODELS, *TIED], ["tp1", "tp2", "pp2", "vpp2"], one_in=4)
)
def test_line_15_save_vit_only(
    model: str, layout: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """The encoders and projectors as in the full checkpoint, and nothing of the text decoder."""
    out, again = tmp_path / "out", tmp_path / "again"
    to_mm(model, hf_of(model), out, *layout_of(layout, model), *VIT_ONLY)
    to_other(model, mm_of(model, "tp1"), again, *layout_of(layout, model, "target_"), *VIT_ONLY)
    encoders = ("image_encoder.", "audio_encoder.")
    total = 0
    for rank, path in rank_files(mm_of(model, layout)).items():
        full = torch.load(path, weights_only=True)
        for made in (out, again):
            found = torch.load(rank_files(made)[rank], weights_only=True)
            assert found.keys() == full.keys()
            for part in (key for key in full if key.startswith("model")):
                expected = {n for n in full[part] if n.startswith(encoders)}
                assert set(found[part]) == expected
                assert all(same(found[part][name], full[part][name]) for name in expected)
                total += len(expected)
    assert total > 40
    assert rank_files(out).keys() == rank_files(mm_of(model, layout)).keys()


FIFTHS = [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 5))]


@pytest.mark.parametrize(
    ("model", "source", "manifest"),
    in_turns([*MODELS, "internvl2-2b"], [*LAYOUTS], [True, False], one_in=4),
)
@pytest.mark.parametrize("fifth", FIFTHS)
def test_line_16_resplit_between_all_layouts(
    model: str, source: str, manifest: bool, fifth: int, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """Equal to the direct conversion; the source's layout is not named.

    Every layout is tried with half of the models and to others; nightly every pair with every
    model, with and without a manifest.

    Without mmconvert.json and without hf_dir, InternVL's 16 or 25 vision heads are an unknown
    number, as shapes do not tell it: cutting them is refused, and hf_dir cures that.
    """
    mm = mm_of(model, source)
    mm = mm if manifest else without_manifest(mm, tmp_path / "mm")
    uneven = model.startswith("internvl") and not manifest
    turn = [*MODELS, "internvl2-2b"].index(model) + list(LAYOUTS).index(source) + fifth
    for target in list(LAYOUTS)[turn % 5 :: 5]:
        out, words = tmp_path / target, layout_of(target, model, "target_")
        if uneven and max(LAYOUTS[target][2:4]) > 1 and target != "tp4_vit1":
            done = to_other(model, mm, out, *words, check=None)
            refused(done, 2, "heads", "not known", "hf_dir", out=out)
            words += [HF, str(hf_of(model))]
        to_other(model, mm, out, *words)
        none(compare_mm(mm_of(model, target), out))


def test_line_16_flags_that_would_be_ignored_are_refused(
    hf_of: Maker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The reference took --cfg.llm_hf_config.hf_dir and did nothing with it."""
    out = tmp_path / "out"
    words = [*layout_of("tp1", "qwen2vl-7b"), "--cfg.llm_hf_config.hf_dir", str(tmp_path)]
    done = to_mm("qwen2vl-7b", hf_of("qwen2vl-7b"), out, *words, check=None)
    said = done.stdout + done.stderr + "".join(capfd.readouterr())
    assert done.returncode == 2 and "llm_hf_config" in said, said
    assert not out.exists()


@pytest.mark.parametrize("model", QWEN)
def test_line_16_llm_hf_dir_replaces_the_text_decoder_only(model: str, tmp_path: Path) -> None:
    """The reference dropped the projector with it."""
    hf = small(model, tmp_path / "hf")
    llm = make_hf("qwen2.5-7b", tmp_path / "llm", layers=LAYERS, seed="llm")
    words = ("--cfg.common_model_config.llm_hf_dir", str(llm))
    to_mm(model, hf, tmp_path / "mm", *flags("[4]", "[2]"), *words)
    to_mm(model, hf, tmp_path / "plain", *flags("[4]", "[2]"))
    found, plain = (mm_tensors(tmp_path / n, "mp_rank_00") for n in ("mm", "plain"))
    assert found.keys() == plain.keys()
    assert same(found[EMBEDDING], hf_tensors(llm)["model.embed_tokens.weight"])
    for name in found:
        assert same(found[name], plain[name]) == name.startswith("image_encoder."), name


def untimed(file: Path) -> bytes:
    """What a file holds; of a manifest without times and inodes of the files it lists."""
    if file.name != "mmconvert.json":
        return file.read_bytes()
    manifest = json.loads(file.read_bytes())
    for listed in ("files", "source"):
        manifest[listed] = {name: state[0] for name, state in manifest[listed].items()}
    return json.dumps(manifest).encode()


class Backwards:
    """Lists folders the other way round, and counts how often it was asked."""

    def __init__(self) -> None:
        self.listdir, self.scandir, self.asked = os.listdir, os.scandir, 0

    def names(self, *args: Any) -> list[str]:
        self.asked += 1
        return sorted(self.listdir(*args), reverse=True)

    def entries(self, *args: Any) -> Scan:
        self.asked += 1
        with self.scandir(*args) as entries:
            return Scan(sorted(entries, key=lambda e: e.name, reverse=True))


class Scan:
    """What os.scandir returns."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        self.left = iter(entries)

    def __enter__(self) -> Iterator[Any]:
        return self.left

    def __exit__(self, *args: object) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return self.left

    def __next__(self) -> Any:
        return next(self.left)

    def close(self) -> None: ...


def test_line_17_the_order_of_a_folder_does_not_matter(
    hf_of: Maker, mm_of: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes when the file system lists names the other way round."""
    hf, backwards = hf_of("qwen2vl-7b"), Backwards()
    words = layout_of("tp2", "qwen2vl-7b")
    to_mm("qwen2vl-7b", hf, tmp_path / "mm", *words)
    to_hf("qwen2vl-7b", tmp_path / "mm", hf, tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", backwards.names)
        patch.setattr(os, "scandir", backwards.entries)
        to_mm("qwen2vl-7b", hf, tmp_path / "mm2", *words)
        to_hf("qwen2vl-7b", tmp_path / "mm", hf, tmp_path / "hf2")
    assert backwards.asked > 2
    for a, b in (("mm", "mm2"), ("hf", "hf2")):
        files = sorted(p.relative_to(tmp_path / a) for p in (tmp_path / a).rglob("*.*"))
        assert files == sorted(p.relative_to(tmp_path / b) for p in (tmp_path / b).rglob("*.*"))
        for file in files:
            if (tmp_path / a / file).is_file():
                first, second = (untimed(tmp_path / side / file) for side in (a, b))
                assert first == second, file


@pytest.mark.parametrize("model", nightly(MODELS, but=MODELS[1:3]))
def test_line_18_old_rank_folders_never_stay(
    model: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    hf, mm = hf_of(model), tmp_path / "mm"
    to_mm(model, hf, mm, *layout_of("tp4", model))
    before = sorted(mm.rglob("*"))
    done = to_mm(model, hf, mm, *layout_of("pp2", model), check=None)
    refused(done, 2, str(mm), "--overwrite")
    assert sorted(mm.rglob("*")) == before
    to_mm(model, hf, mm, *layout_of("pp2", model), "--overwrite")
    none(compare_mm(mm_of(model, "pp2"), mm))


def test_line_18_unknown_tensors_are_named_and_dropped_only_by_hand(tmp_path: Path) -> None:
    hf = small("qwen2vl-7b", tmp_path / "hf", extra=[("reward_head.weight", (2, 8))])
    words = layout_of("tp1", "qwen2vl-7b")
    done = to_mm("qwen2vl-7b", hf, tmp_path / "out", *words, check=None)
    refused(done, 3, "reward_head.weight", "--drop", out=tmp_path / "out")
    done = to_mm("qwen2vl-7b", hf, tmp_path / "mm", *words, "--drop", "reward_head.*")
    assert "reward_head.weight" in done.stderr


# ============================================================= errors where none should be
@pytest.mark.parametrize(
    ("model", "said", "manifest"),
    in_turns(MODELS, ["nothing", "nested", "tp"], [True, False], one_in=4),
)
def test_line_22_virtual_stages_go_back(
    model: str, said: str, manifest: bool, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    mm = mm_of(model, "vpp2")
    mm = mm if manifest else without_manifest(mm, tmp_path / "mm")
    words = {"nothing": [], "nested": layout_of("vpp2", model), "tp": flags("", "", 1)}[said]
    to_hf(model, mm, hf_of(model), tmp_path / "back", *words)
    same_hf(hf_of(model), tmp_path / "back")


@pytest.mark.parametrize(("model", "form"), in_turns(MODELS, ["no index", "index"]))
def test_line_23_a_single_weight_file(model: str, form: str, tmp_path: Path) -> None:
    hf = small(model, tmp_path / "hf", shards=1)
    if form == "index":
        names = load_file(hf / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(names), "model.safetensors")}
        (hf / INDEX).write_text(json.dumps(index))
    to_mm(model, hf, tmp_path / "mm", *layout_of("tp2", model))
    to_hf(model, tmp_path / "mm", hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")


@pytest.mark.parametrize(("tps", "vit_tp"), in_turns([(4, 1), (1, 2), (2, 4)], [0, 1, 2]))
def test_line_24_zero_means_tp_size(
    tps: tuple[int, int], vit_tp: int, hf_of: Maker, tmp_path: Path
) -> None:
    model, (tp, audio_tp) = "qwen2.5omni-7b", tps
    words = flags("[4]", "[2]", tp, vit_tp, audio="[2]", audio_tp=audio_tp)
    to_mm(model, hf_of(model), tmp_path / "mm", *words, "--cfg.parallel_config.ep_size", "1")
    vit = vit_tp or tp
    qkv = f"{V}.0.self_attention.linear_qkv.weight"
    qkv2 = f"{A}.0.self_attention.linear_qkv.weight"
    text = f"{T}.0.self_attention.linear_proj.weight"
    found = mm_tensors(tmp_path / "mm", "mp_rank_00")
    assert len(rank_files(tmp_path / "mm")) == max(tp, vit, audio_tp)
    assert found[qkv].shape[0] == 192 // vit
    assert found[qkv2].shape[0] == 120 // audio_tp
    assert found[text].shape[1] == 168 // tp
    to_hf(model, tmp_path / "mm", hf_of(model), tmp_path / "back", *words)
    same_hf(hf_of(model), tmp_path / "back")


@pytest.mark.parametrize("model", [*QWEN, "qwen2vl-2b"])
def test_line_26_a_nested_text_config(
    model: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """As transformers 5 writes it: text sizes under text_config."""
    hf = small(model, tmp_path / "hf", edit_config=nested_config)
    assert "num_key_value_heads" not in json.loads((hf / "config.json").read_text())
    to_mm(model, hf, tmp_path / "mm", *layout_of("tp2", model))
    none(compare_mm(mm_of(model, "tp2"), tmp_path / "mm"))
    to_hf(model, tmp_path / "mm", hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")


def test_line_26_omni_without_audio_layers(hf_of: Maker, tmp_path: Path) -> None:
    """A list for the other modules but none for audio is an error that names the flag."""
    model, out = "qwen2.5omni-7b", tmp_path / "out"
    done = to_mm(model, hf_of(model), out, *flags("[2,2]", "[2,0]"), check=None)
    refused(done, 2, "audio_pp_layers", out=out)


@pytest.mark.parametrize(("model", "text"), in_turns(MODELS, ["release\n", "release\r\n", "7\n"]))
def test_line_27_a_newline_in_the_tracker_file(
    model: str, text: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    mm = copied(mm_of(model, "pp2"), tmp_path / "mm")
    (mm / TRACKER).write_bytes(text.encode())
    if "7" in text:
        (mm / "release").rename(mm / "iter_0000007")
    to_hf(model, mm, hf_of(model), tmp_path / "back")
    same_hf(hf_of(model), tmp_path / "back")


WRONG_LISTS = {
    "other numbers": ("[1,3]", "[2,0]", 3, ("llm_pp_layers", "[1,3]", "[2,2]")),
    "too few stages": ("[4]", "[2]", 3, ("vit_pp_layers", "[2]", "[2,0]")),
    "too many layers": ("[2,3]", "[2,0]", 3, ("llm_pp_layers", "[2,3]", "[2,2]")),
    "nested": ("[[1,1],[1,1]]", "[[2,0],[0,0]]", 3, ("[[2,0],[0,0]]", "[2,0]")),
    "vision": ("[2,2]", "[1,1]", 3, ("vit_pp_layers", "[1,1]", "[2,0]")),
}


@pytest.mark.parametrize(("model", "case"), in_turns(MODELS, [*WRONG_LISTS], one_in=4))
def test_line_28_wrong_lists_are_told_from_right_ones(
    model: str, case: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """Plain English with both lists, before anything is written."""
    llm, vit, code, words = WRONG_LISTS[case]
    out, mm = tmp_path / "out", mm_of(model, "pp2")
    done = to_hf(model, mm, hf_of(model), out, *flags(llm, vit), check=None)
    refused(done, code, *words, out=out)
    assert done.stderr.isascii() and "Traceback" not in done.stderr
    source = flags(llm, vit, of="source_")
    done = to_other(model, mm, out, *source, *layout_of("tp1", model, "target_"), check=None)
    refused(done, code, *words, out=out)


@pytest.mark.parametrize(("model", "given"), in_turns(MODELS, ["[4]", "[[4]]", "[ 4 ]"]))
def test_line_28_flat_and_nested_lists_mean_the_same(
    model: str, given: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    vit = given.replace("4", "2")
    audio = vit if "omni" in model else ""
    to_mm(model, hf_of(model), tmp_path / "mm", *flags(given, vit, 2, audio=audio))
    none(compare_mm(mm_of(model, "tp2"), tmp_path / "mm"))
    to_hf(
        model, mm_of(model, "tp2"), hf_of(model), tmp_path / "b", *flags(given, vit, 0, audio=audio)
    )
    same_hf(hf_of(model), tmp_path / "b")


class Payload:
    """What a hostile file holds: unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("model", nightly(MODELS, but=MODELS[2:]))
def test_line_29_reading_runs_nothing(
    model: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """No verb, and not verify either."""
    mm, marker = copied(mm_of(model, "tp1"), tmp_path / "mm"), tmp_path / "marker"
    path = rank_files(mm)["mp_rank_00"]
    content = torch.load(path, weights_only=True)
    torch.save({**content, "args": Payload(marker)}, path)
    hf, out = hf_of(model), tmp_path / "out"
    to_hf(model, mm, hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")
    to_other(model, mm, tmp_path / "other", *layout_of("tp1", model, "target_"))
    none(compare_mm(mm_of(model, "tp1"), tmp_path / "other"))
    call("verify", hf, mm)
    torch.save({**content, "model": {**content["model"], NORM: Payload(marker)}}, path)
    refused(to_hf(model, mm, hf, out, check=None), 3, NORM, out=out)
    refused(call("verify", hf, mm, check=None), 3, NORM)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload itself must work"


@pytest.mark.parametrize(
    ("model", "layout"), in_turns(["qwen2.5vl-7b", "qwen2.5omni-7b"], ["tp2", "tp4"])
)
def test_line_30_the_projector_is_cut_by_plain_rows(
    model: str, layout: str, hf_of: Maker, mm_of: Maker
) -> None:
    """2.0.0 cut it like gate and up."""
    tp, prefix = LAYOUTS[layout][2], "thinker." if "omni" in model else ""
    for kind in ("weight", "bias"):
        whole = hf_tensors(hf_of(model))[f"{prefix}visual.merger.mlp.0.{kind}"]
        for rank, shard in enumerate(whole.chunk(tp)):
            found = mm_tensors(mm_of(model, layout), f"mp_rank_{rank:02d}")
            assert same(found[f"image_encoder.projector.encoder.linear_fc1.{kind}"], shard)


# ============================================================================ found besides
def test_found_besides_no_torch_and_no_npu_stack_is_needed(
    hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """All three directions and verify with torch and its like made impossible to import."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    names = ("torch", "torch_npu", "mindspeed", "mindspeed_mm", "megatron", "transformers")
    for name in names:
        (blocked / f"{name}.py").write_text(f'raise ImportError("{name} was imported")\n')
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blocked), *filter(None, sys.path)])}
    model = "qwen2.5omni-7b"
    converter, hf, mm = converter_of(model), hf_of(model), mm_of(model, "tp2")
    commands: list[list[str | Path]] = [
        [converter, "hf_to_mm", HF, hf, MM, tmp_path / "mm", *layout_of("tp2", model)],
        [converter, "mm_to_hf", HF, hf, MM, mm, BACK, tmp_path / "back"],
        [converter, "resplit", SOURCE, mm, TARGET, tmp_path / "other"],
        ["verify", hf, mm],
    ]
    commands[2] += layout_of("pp2", model, "target_")
    for words in commands:
        subprocess.run([sys.executable, "-m", "mmconvert", *words], env=env, check=True, timeout=60)
    same_hf(hf, tmp_path / "back")
    none(compare_mm(mm, tmp_path / "mm") + compare_mm(mm_of(model, "pp2"), tmp_path / "other"))


@pytest.mark.parametrize("model", MODELS)
def test_found_besides_an_unknown_mm_tensor_is_an_error(
    model: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    mm, out = copied(mm_of(model, "tp1"), tmp_path / "mm"), tmp_path / "out"
    name = "text_decoder.mystery.weight"
    edit_rank(mm, "mp_rank_00", lambda content: content["model"].update({name: torch.ones(3)}))
    refused(to_hf(model, mm, hf_of(model), out, check=None), 3, name, out=out)
    words = layout_of("tp2", model, "target_")
    refused(to_other(model, mm, out, *words, check=None), 3, name, out=out)


@pytest.mark.parametrize(("model", "layout"), in_turns(QWEN, ["tp1", "tp4", "vpp2"]))
def test_found_besides_verify_knows_the_canonical_structure(
    model: str, layout: str, hf_of: Maker, tmp_path: Path
) -> None:
    """The reference has no way to check what it wrote."""
    hf, mm = hf_of(model), tmp_path / "mm"
    to_mm(model, hf, mm, *layout_of(layout, model), CANONICAL, "True")
    call("verify", hf, mm)
    call("verify", mm, hf)

    def edit(content: dict) -> None:
        content[min(k for k in content if k.startswith("model"))][f"{V}.0.mlp.linear_fc2.bias"][
            0
        ] += 1

    edit_rank(mm, next(iter(rank_files(mm))), edit)
    call("verify", hf, mm, check=1)


def test_found_besides_other_weights_are_not_copied(
    hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    hf = copied(hf_of("internvl2-76b"), tmp_path / "hf")
    (hf / "pytorch_model.bin").write_bytes(b"0" * 100)
    (hf / ".cache" / "huggingface").mkdir(parents=True)
    (hf / ".cache" / "huggingface" / "x.metadata").write_text("x")
    to_hf("internvl2-76b", mm_of("internvl2-76b", "tp1"), hf, tmp_path / "back")
    same_hf(hf_of("internvl2-76b"), tmp_path / "back")
    names = {path.name for path in (tmp_path / "back").rglob("*")}
    assert not names & {"pytorch_model.bin", ".cache", "x.metadata"}


# ======================================================================= zeros and replicas
def k_bias(content: dict, value: float) -> None:
    """Write into the k part of the first head of the audio encoder's packed bias."""
    content["model"][f"{A}.1.self_attention.linear_qkv.bias"][2 + 1] = value


def test_omni_k_bias_is_zero_and_must_stay_so(hf_of: Maker, mm_of: Maker, tmp_path: Path) -> None:
    """HF has no place for it: losing it silently would change the model."""
    model, out = "qwen2.5omni-7b", tmp_path / "out"
    hf, mm = hf_of(model), copied(mm_of(model, "tp2"), tmp_path / "mm")
    bias = mm_tensors(mm, "mp_rank_00")[f"{A}.1.self_attention.linear_qkv.bias"].view(10, 3, 2)
    assert bias[:, 1].abs().max() == 0 and bias[:, 0].abs().min() > 0 < bias[:, 2].abs().min()
    edit_rank(mm, "mp_rank_01", lambda content: k_bias(content, 0.5))
    done = to_hf(model, mm, hf, out, check=None)
    refused(done, 3, f"{A}.1.self_attention.linear_qkv.bias", "zero", "--replicas", out=out)
    done = to_hf(model, mm, hf, out, "--replicas", "first")
    assert "warning" in done.stderr and "linear_qkv.bias" in done.stderr
    same_hf(hf, out)
    assert call("verify", hf, mm, check=None).returncode == 1


@pytest.mark.parametrize("value", [-0.0, float("nan")])
def test_omni_k_bias_that_is_almost_zero(
    value: float, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """Minus zero is zero (training may leave it); not a number is not."""
    model = "qwen2.5omni-7b"
    mm = copied(mm_of(model, "tp1"), tmp_path / "mm")
    edit_rank(mm, "mp_rank_00", lambda content: k_bias(content, value))
    done = to_hf(model, mm, hf_of(model), tmp_path / "out", check=None)
    if value == 0:
        assert done.returncode == 0, done.stderr
    else:
        refused(done, 3, "linear_qkv.bias", out=tmp_path / "out")


def test_omni_k_bias_survives_a_resplit(hf_of: Maker, mm_of: Maker, tmp_path: Path) -> None:
    """MM -> MM has a place for it: the value is kept, not cleared."""
    model = "qwen2.5omni-7b"
    mm = copied(mm_of(model, "tp1"), tmp_path / "mm")
    edit_rank(mm, "mp_rank_00", lambda content: k_bias(content, 0.5))
    to_other(model, mm, tmp_path / "out", *layout_of("tp2", model, "target_"))
    found = mm_tensors(tmp_path / "out", "mp_rank_00")
    assert found[f"{A}.1.self_attention.linear_qkv.bias"][3] == 0.5


# ============================================================== what is beside the tensors
@pytest.mark.parametrize(("model", "value"), in_turns(MODELS, [True, 1, "yes"], one_in=3))
def test_a_manifest_never_overrules_the_tensors(
    model: str, value: object, mm_of: Maker, tmp_path: Path
) -> None:
    """mmconvert.json says that only encoders are there; a text decoder is there too."""
    mm, out = copied(mm_of(model, "tp2"), tmp_path / "mm"), tmp_path / "out"
    edit_json(mm / MANIFEST, lambda content: content.update(save_vit_only=value))
    done = to_other(model, mm, out, *layout_of("pp2", model, "target_"), check=None)
    if done.returncode == 0:
        none(compare_mm(mm_of(model, "pp2"), out))
    else:
        refused(done, 3, out=out)


IN_LITTLE_MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from mmconvert.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["mp_rank_99999_99999", "mp_rank_99999", "mp_rank_00_99999"])
def test_one_rank_folder_with_a_huge_number(
    name: str, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    """The ranks between are not listed one by one: they would be ten thousand million."""
    model = "qwen2vl-7b"
    layout = "tp1" if name.count("_") == 2 else "pp2"
    mm, out = copied(mm_of(model, layout), tmp_path / "mm"), tmp_path / "out"
    (mm / "release" / name).mkdir()
    words = [converter_of(model), "mm_to_hf", HF, hf_of(model), MM, mm, BACK, out]
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    refused(done, 3, "1 rank folder too many", name, out=out)
    assert len(done.stderr) < 1000


# ======================================================================== wrong converters
@pytest.mark.parametrize(
    ("model", "kind", "manifest"),
    in_turns(MODELS, [*CONVERTERS], [True, False], one_in=4),
)
def test_the_wrong_converter_names_the_right_one(
    model: str, kind: str, manifest: bool, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    if model.startswith(kind):
        return
    right, out = converter_of(model), tmp_path / "out"
    mm = mm_of(model, "tp2")
    mm = mm if manifest else without_manifest(mm, tmp_path / "mm")
    done = to_mm(kind, hf_of(model), out, *layout_of("tp1", model), check=None)
    assert done.returncode in (2, 3)
    if manifest:
        refused(done, 3, right, out=out)
        done = to_hf(kind, mm, hf_of(model), out, check=None)
        refused(done, 3, right, out=out)
    audio = "[2]" if kind == "qwen2.5omni" else ""
    words = flags("[4]", "[2]", audio=audio, of="target_")
    done = to_other(kind, mm, out, *words, check=None)
    assert done.returncode in (2, 3)
    refused(done, done.returncode, *([right] if manifest else []), out=out)


@pytest.mark.parametrize(("model", "manifest"), in_turns(MODELS, [True, False]))
def test_the_family_can_be_left_to_the_checkpoint(
    model: str, manifest: bool, hf_of: Maker, mm_of: Maker, tmp_path: Path
) -> None:
    hf, mm = hf_of(model), mm_of(model, "tp2")
    mm = mm if manifest else without_manifest(mm, tmp_path / "mm")
    call("AutoConverter", "hf_to_mm", HF, hf, MM, tmp_path / "a", *layout_of("tp2", model))
    none(compare_mm(mm_of(model, "tp2"), tmp_path / "a"))
    call("AutoConverter", "mm_to_hf", HF, hf, MM, mm, BACK, tmp_path / "b")
    same_hf(hf, tmp_path / "b")
    words = [SOURCE, mm, TARGET, tmp_path / "c", *layout_of("pp2", model, "target_")]
    call("AutoConverter", "resplit", *words)
    none(compare_mm(mm_of(model, "pp2"), tmp_path / "c"))


# ------------------------------------------------------------------------------- the list
def test_every_line_has_a_test_or_a_reason() -> None:
    numbers = {int(m[1]) for name in globals() if (m := re.match(r"test_line_(\d\d)_", name))}
    assert numbers | NOT_OURS.keys() == set(range(1, 31))
    assert not numbers & NOT_OURS.keys()
