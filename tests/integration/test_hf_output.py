"""Hugging Face folders in all their forms: what is read, and that it comes back as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import (
    QWEN2VL,
    QWEN25VL,
    Tensors,
    copied,
    edit_index,
    edit_json,
    edit_single,
    hf_to_mm,
    layout,
    litter,
    mm_to_hf,
    none,
    rank_files,
    read_single,
    refused,
    resplit,
    same_hf,
    snapshot,
)
from mmconvert.playground.checkpoints import NEW_NAMES, make_hf, nested_config
from mmread import INDEX, MANIFEST, compare_hf, compare_mm, files_in

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A small tied checkpoint with one weight file, to be changed."""
    return make_hf("qwen2vl-2b", tmp_path / "hf", shards=1, layers=2, vit_layers=1)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small untied checkpoint with three weight files, to be changed."""
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1, "tie": False}
    return make_hf("qwen2vl-2b", tmp_path / "hf", shards=3, **sizes)


def round_trip(hf: Path, tmp_path: Path, *flags: str) -> Path:
    """The folder that comes back from MM format."""
    hf_to_mm(hf, tmp_path / "mm", *flags)
    mm_to_hf(tmp_path / "mm", hf, tmp_path / "back", *flags)
    return tmp_path / "back"


def assert_identical(want: Path, got: Path) -> None:
    """The same files, byte for byte."""
    assert files_in(want) == files_in(got) - {MANIFEST}
    for name in files_in(want):
        assert (want / name).read_bytes() == (got / name).read_bytes(), name


# ------------------------------------------------------------- files, index, side files
def test_everything_comes_back_byte_for_byte(sharded: Path, tmp_path: Path) -> None:
    """Headers, padding, an index in its own style, side files in sub-folders."""
    text = json.dumps(json.loads((sharded / INDEX).read_text()))
    (sharded / INDEX).write_text(text.replace("{", "{ ", 1))
    for name in ("assets/deep/er/logo.txt", "chat_template.jinja", "LICENSE", "empty"):
        (sharded / name).parent.mkdir(parents=True, exist_ok=True)
        (sharded / name).write_text("" if name == "empty" else name)
    assert_identical(sharded, round_trip(sharded, tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_single_file_without_an_index(name: str, single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").rename(single / name)
    back = round_trip(single, tmp_path)
    assert_identical(single, back)
    assert not (back / INDEX).exists()


def test_a_single_file_with_an_index(single: Path, tmp_path: Path) -> None:
    names = read_single(single)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (single / INDEX).write_text(json.dumps(index))
    assert_identical(single, round_trip(single, tmp_path))


def test_a_trained_model_takes_the_place_of_the_original(sharded: Path, tmp_path: Path) -> None:
    """Other values, the same files: what comes back is the MM checkpoint's, not hf_dir's."""
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1, "tie": False}
    trained = make_hf("qwen2vl-2b", tmp_path / "trained", shards=3, seed="trained", **sizes)
    hf_to_mm(trained, tmp_path / "mm", *layout("[1,1]", "[1,0]", 2))
    mm_to_hf(tmp_path / "mm", sharded, tmp_path / "back")
    assert_identical(trained, tmp_path / "back")
    assert compare_hf(sharded, tmp_path / "back")


def test_the_links_of_a_download_cache(sharded: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/NAME -> ../../blobs/DIGEST, folders included."""
    repository = tmp_path / "hub" / "models--Qwen--Tiny"
    blobs, snap = repository / "blobs", repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    for name in sorted(files_in(sharded)):
        data = (sharded / name).read_bytes()
        blob = blobs / hashlib.sha256(data + name.encode()).hexdigest()
        blob.write_bytes(data)
        blob.chmod(0o444)
        link = snap / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    before = snapshot(repository)
    back = round_trip(snap, tmp_path)
    assert_identical(sharded, back)
    assert not any(path.is_symlink() for path in back.rglob("*"))
    assert snapshot(repository) == before


FOREIGN = [
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"),
    *("consolidated.00.pth", "model_optim_rng.pt", "optimizer.pt", "model.gguf"),
    *("original/model.safetensors", ".git/config", ".git/objects/ab/cdef", ".cache/state.json"),
    *(".cache/huggingface/download/x.metadata", "model.safetensors.incomplete"),
    *("__pycache__/code.cpython-311.pyc",),
]


def test_foreign_weights_and_caches_are_left_out(sharded: Path, tmp_path: Path) -> None:
    clean = copied(sharded, tmp_path / "clean")
    for name in FOREIGN:
        (sharded / name).parent.mkdir(parents=True, exist_ok=True)
        (sharded / name).write_text("foreign")
    assert_identical(clean, round_trip(sharded, tmp_path))


def test_a_stray_weight_file_is_neither_read_nor_copied(sharded: Path, tmp_path: Path) -> None:
    """The index alone says what belongs to the model."""
    clean = copied(sharded, tmp_path / "clean")
    other = make_hf(*("qwen2vl-2b", tmp_path / "other", 1, (), (), "other"), layers=2, vit_layers=1)
    shutil.copy(other / "model.safetensors", sharded / "adapter.safetensors")
    shutil.copy(other / "model.safetensors", sharded / "model-00004-of-00003.safetensors")
    assert_identical(clean, round_trip(sharded, tmp_path))


# ------------------------------------------------------------------------------- spelling
def test_new_names(tmp_path: Path) -> None:
    """transformers' names give the same MM checkpoint, and come back as they were."""
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1, "tie": False}
    hub = make_hf("qwen2vl-2b", tmp_path / "hub", **sizes)
    new = make_hf("qwen2vl-2b", tmp_path / "new", rename=NEW_NAMES, same_values=True, **sizes)
    flags = layout("[1,1]", "[1,0]", 2)
    hf_to_mm(hub, tmp_path / "hub_mm", *flags)
    hf_to_mm(new, tmp_path / "new_mm", *flags)
    none(compare_mm(tmp_path / "hub_mm", tmp_path / "new_mm"))
    for original in (hub, new):  # the MM checkpoint does not remember a spelling
        out = tmp_path / f"{original.name}_back"
        mm_to_hf(tmp_path / "hub_mm", original, out)
        assert_identical(original, out)


def test_both_spellings_at_once(single: Path, out: Path) -> None:
    edit_single(single, lambda t: t.update({"model.language_model.norm.weight": torch.ones(72)}))
    done = hf_to_mm(single, out, check=None)
    refused(done, 3, "model.norm.weight", "model.language_model.norm.weight", out=out)


@pytest.mark.parametrize("model", ["qwen2vl-2b", "qwen2.5vl-3b"])
def test_a_nested_config(model: str, tmp_path: Path) -> None:
    converter = QWEN2VL if model == "qwen2vl-2b" else QWEN25VL
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1}
    flat = make_hf(model, tmp_path / "flat", **sizes)
    nested = make_hf(model, tmp_path / "nested", edit_config=nested_config, **sizes)
    flags = layout("[1,1]", "[1,0]", 2)
    hf_to_mm(flat, tmp_path / "flat_mm", *flags, converter=converter)
    hf_to_mm(nested, tmp_path / "nested_mm", *flags, converter=converter)
    none(compare_mm(tmp_path / "flat_mm", tmp_path / "nested_mm"))
    mm_to_hf(tmp_path / "flat_mm", nested, tmp_path / "back", converter=converter)
    assert_identical(nested, tmp_path / "back")


# --------------------------------------------------------------------------------- tied
@pytest.mark.parametrize("lists", [("[2]", "[1]"), ("[1,1]", "[1,0]")], ids=str)
def test_a_tied_model_that_stores_both(
    lists: tuple[str, str], single: Path, tmp_path: Path
) -> None:
    """The same MM checkpoint as without the copy; both come back."""
    hf_to_mm(single, tmp_path / "plain", *layout(*lists, 2))
    edit_single(single, lambda t: t.update({HEAD: t[EMBEDDING]}))
    hf_to_mm(single, tmp_path / "mm", *layout(*lists, 2))
    none(compare_mm(tmp_path / "plain", tmp_path / "mm"))
    mm_to_hf(tmp_path / "mm", single, tmp_path / "back")
    same_hf(single, tmp_path / "back")
    assert HEAD in read_single(tmp_path / "back")


def test_a_tied_model_whose_copies_differ(single: Path, out: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][17, 5] = 96

    edit_single(single, edit)
    done = hf_to_mm(single, out, check=None)
    refused(done, 3, HEAD, EMBEDDING, "17", "5", "96", out=out)
    assert "ranks" not in done.stderr or HEAD in done.stderr


def test_an_untied_model_without_its_head(single: Path, out: Path) -> None:
    edit_json(single / "config.json", lambda c: c.update({"tie_word_embeddings": False}))
    refused(hf_to_mm(single, out, check=None), 3, HEAD, out=out)


@pytest.mark.parametrize("head", [True, False])
def test_a_config_that_says_nothing_of_tying(head: bool, single: Path, tmp_path: Path) -> None:
    """The tensors tell."""
    edit_json(single / "config.json", lambda c: c.pop("tie_word_embeddings"))
    if head:
        edit_single(single, lambda t: t.update({HEAD: t[EMBEDDING] * 2}))
    back = round_trip(single, tmp_path)
    same_hf(single, back)
    names = torch.load(rank_files(tmp_path / "mm")["mp_rank_00"])["model"]
    assert ("text_decoder.output_layer.weight" in names) is head


# -------------------------------------------------------------------- tensors too many
def test_an_unknown_tensor(single: Path, out: Path, tmp_path: Path) -> None:
    """An error that names it, in both directions; --drop leaves it out and says so."""
    hf_to_mm(single, tmp_path / "plain")
    with_score = copied(single, tmp_path / "with_score")
    edit_single(with_score, lambda t: t.update({"score.weight": torch.ones(2, 72)}))
    refused(hf_to_mm(with_score, out, check=None), 3, "score.weight", "--drop", out=out)
    done = hf_to_mm(with_score, out, "--drop", "score.*")
    assert "score.weight" in done.stderr and "score.*" in done.stderr
    none(compare_mm(tmp_path / "plain", out))
    back = tmp_path / "back"
    refused(mm_to_hf(out, with_score, back, check=None), 3, "score.weight", "--drop", out=back)
    done = mm_to_hf(out, with_score, back, "--drop", "score.*")
    assert "score.weight" in done.stderr and "score.*" in done.stderr
    none(compare_hf(single, back))


def test_drop_may_be_repeated(sharded: Path, tmp_path: Path) -> None:
    """The index then lists what is there."""
    clean = copied(sharded, tmp_path / "clean")
    extra = [("score.weight", (2, 72)), ("a.b.0.c", (3,)), ("a.b.1.c", (3,))]
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1, "tie": False}
    hf = make_hf("qwen2vl-2b", tmp_path / "more", shards=3, extra=extra, **sizes)
    back = round_trip(hf, tmp_path, "--drop", "score.*", "--drop=a.b.?.c")
    index = json.loads((back / INDEX).read_text())
    names = json.loads((clean / INDEX).read_text())["weight_map"]
    assert set(index["weight_map"]) == set(names)
    found: dict[str, torch.Tensor] = {}
    from safetensors.torch import load_file

    for name in sorted(set(index["weight_map"].values())):
        tensors = load_file(back / name)
        assert {index["weight_map"][key] for key in tensors} == {name}
        found |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for name in sorted(set(names.values())):
        for key, value in load_file(clean / name).items():
            assert torch.equal(found[key], value), key


def test_drop_takes_nothing_that_the_model_needs(single: Path, out: Path, tmp_path: Path) -> None:
    """In whichever format the pattern meets it."""
    words = ("which the model needs", "narrow the pattern")
    done = hf_to_mm(single, out, "--drop", "*.layers.1.*", check=None)
    refused(done, 2, "--drop *.layers.1.* fits", *words, out=out)
    hf_to_mm(single, tmp_path / "mm")
    done = mm_to_hf(tmp_path / "mm", single, out, "--drop", "text_decoder.*norm*", check=None)
    refused(done, 2, "--drop text_decoder.*norm* fits", *words, out=out)


def test_a_name_with_its_closest_known_one(single: Path, out: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.gate_projection.weight"] = torch.ones(2)

    edit_single(single, edit)
    done = hf_to_mm(single, out, check=None)
    refused(done, 3, "gate_projection", "mlp.gate_proj.weight", out=out)


def test_buffers_are_dropped_by_the_table(single: Path, tmp_path: Path) -> None:
    """And do not come back: no tensor is left as a hole."""
    clean = copied(single, tmp_path / "clean")
    names = [
        *(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)),
        *("model.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"),
    ]
    edit_single(single, lambda t: t.update({name: torch.ones(3) for name in names}))
    done = hf_to_mm(single, tmp_path / "mm")
    assert "inv_freq" in done.stderr
    hf_to_mm(clean, tmp_path / "plain")
    none(compare_mm(tmp_path / "plain", tmp_path / "mm"))
    mm_to_hf(tmp_path / "mm", single, tmp_path / "back")
    none(compare_hf(clean, tmp_path / "back"))


# ----------------------------------------------------------- weights that do not fit
LOST = {
    "gate without up": "model.layers.1.mlp.up_proj.weight",
    "up without gate": "model.layers.0.mlp.gate_proj.weight",
    "q and k without v": "model.layers.1.self_attn.v_proj.bias",
    "a norm": "visual.blocks.0.norm1.bias",
    "the embedding": EMBEDDING,
}


@pytest.mark.parametrize("name", LOST.values(), ids=LOST.keys())
def test_a_missing_tensor(name: str, single: Path, out: Path) -> None:
    edit_single(single, lambda tensors: tensors.pop(name))
    refused(hf_to_mm(single, out, check=None), 3, name, out=out)


def test_a_missing_layer(single: Path, out: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.1.")]:
            del tensors[name]

    edit_single(single, edit)
    refused(hf_to_mm(single, out, check=None), 3, "model.layers.1.", "12 tensors", out=out)


MISFITS: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "another width": (
        lambda t: t.update({"model.norm.weight": torch.ones(71).bfloat16()}),
        ("model.norm.weight", "71", "72"),
    ),
    "another height": (
        lambda t: t.update({EMBEDDING: torch.ones(300, 72).bfloat16()}),
        (EMBEDDING, "300", "304"),
    ),
    "another dtype in one pair": (
        lambda t: t.update({n: t[n].float() for n in ("model.layers.0.mlp.up_proj.weight",)}),
        ("model.layers.0.mlp.up_proj.weight", "F32", "BF16"),
    ),
    "a layer too many": (
        lambda t: t.update(
            {n.replace("layers.1", "layers.2"): v for n, v in [*t.items()] if "layers.1." in n}
        ),
        ("layers.2.", "2"),
    ),
}


@pytest.mark.parametrize(("edit", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_weights_of_another_model(
    edit: Callable[[Tensors], object], words: tuple[str, ...], single: Path, out: Path
) -> None:
    edit_single(single, edit)
    refused(hf_to_mm(single, out, check=None), 3, *words, out=out)


def test_mm_and_hf_of_different_models(tied_mm22: Path, single: Path, out: Path) -> None:
    done = mm_to_hf(tied_mm22, single, out, check=None)
    refused(done, 3, "2", "4", out=out)


# ------------------------------------------------------------------------ damaged folders
INDEXES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a missing weight file": (
        lambda hf: (hf / "model-00002-of-00003.safetensors").unlink(),
        ("model-00002-of-00003.safetensors",),
    ),
    "an entry without a tensor": (
        lambda hf: edit_index(hf, lambda m: m.update(ghost=next(iter(m.values())))),
        ("ghost",),
    ),
    "a tensor without an entry": (
        lambda hf: edit_index(hf, lambda m: m.pop("model.norm.weight")),
        ("model.norm.weight",),
    ),
    "a tensor in another file": (
        lambda hf: edit_index(
            hf, lambda m: m.update({EMBEDDING: "model-00003-of-00003.safetensors"})
        ),
        (EMBEDDING,),
    ),
    "a path upwards": (
        lambda hf: edit_index(hf, lambda m: m.update({EMBEDDING: "../secret.safetensors"})),
        ("../secret.safetensors",),
    ),
    "an absolute path": (
        lambda hf: edit_index(hf, lambda m: m.update({EMBEDDING: "/secret.safetensors"})),
        ("/secret.safetensors",),
    ),
    "a path downwards": (
        lambda hf: edit_index(hf, lambda m: m.update({EMBEDDING: "a/secret.safetensors"})),
        ("a/secret.safetensors",),
    ),
    "no file name": (
        lambda hf: edit_index(hf, lambda m: m.update({EMBEDDING: 7})),
        (EMBEDDING, "7"),
    ),
    "no index": (lambda hf: (hf / INDEX).unlink(), (INDEX,)),
    "no JSON": (lambda hf: (hf / INDEX).write_text("{"), (INDEX,)),
    "no weight map": (lambda hf: (hf / INDEX).write_text("{}"), (INDEX, "weight_map")),
    "a shortened weight file": (
        lambda hf: _shorten(hf / "model-00002-of-00003.safetensors"),
        ("model-00002-of-00003.safetensors",),
    ),
    "no config": (lambda hf: (hf / "config.json").unlink(), ("config.json",)),
    "a damaged config": (lambda hf: (hf / "config.json").write_text("{'a': 1}"), ("config.json",)),
    "only *.bin files": (lambda hf: _as_bin(hf), ("pytorch_model.bin",)),
    "no weights": (lambda hf: _without_weights(hf), ("safetensors",)),
    "a pointer of git lfs": (
        lambda hf: (hf / "model-00001-of-00003.safetensors").write_text("version https://git-"),
        ("model-00001-of-00003.safetensors",),
    ),
}


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _without_weights(hf: Path) -> None:
    for path in hf.glob("*.safetensors*"):
        path.unlink()


def _as_bin(hf: Path) -> None:
    _without_weights(hf)
    (hf / "pytorch_model.bin").write_text("x")


@pytest.mark.parametrize(("damage", "words"), INDEXES.values(), ids=INDEXES.keys())
def test_damaged_folders(
    damage: Callable[[Path], object], words: tuple[str, ...], sharded: Path, out: Path
) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "secret.safetensors")
    damage(sharded)
    refused(hf_to_mm(sharded, out, check=None), 3, *words, out=out)


@pytest.mark.parametrize("state", ["absent", "a file", "empty", "mm"])
def test_no_hf_folder(state: str, tied_mm22: Path, out: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    if state == "a file":
        hf.write_text("x")
    elif state == "empty":
        hf.mkdir()
    elif state == "mm":
        copied(tied_mm22, hf)
    named = "config.json" if hf.is_dir() else "hf_dir"
    refused(hf_to_mm(hf, out, check=None), 3, str(hf), named, out=out)
    if state == "absent":
        refused(mm_to_hf(tied_mm22, hf, out, check=None), 3, str(hf), out=out)


# ----------------------------------------------------------------------- wrong converter
def test_the_wrong_converter(tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path) -> None:
    """The message says which one fits."""
    done = hf_to_mm(tied_hf, out, converter=QWEN25VL, check=None)
    refused(done, 3, "qwen2_vl", QWEN2VL, out=out)
    done = mm_to_hf(tied_mm22, tied_hf, out, converter=QWEN25VL, check=None)
    refused(done, 3, QWEN2VL, out=out)
    done = resplit(tied_mm22, out, converter=QWEN25VL, check=None)
    refused(done, 3, QWEN2VL, out=out)
    other = make_hf("qwen2.5vl-3b", tmp_path / "other", layers=2, vit_layers=1)
    refused(hf_to_mm(other, out, check=None), 3, "qwen2_5_vl", QWEN25VL, out=out)


def test_a_model_that_no_converter_serves(single: Path, out: Path) -> None:
    edit_json(single / "config.json", lambda c: c.update({"model_type": "llama"}))
    refused(hf_to_mm(single, out, check=None), 3, "llama", out=out)


def test_the_code_of_a_checkpoint_is_not_run(single: Path, tmp_path: Path) -> None:
    """Not even with --cfg.trust_remote_code True; it is a side file like any other."""
    edit_json(
        single / "config.json",
        lambda c: c.update({"auto_map": {"AutoConfig": "configuration_evil.Evil"}}),
    )
    marker = tmp_path / "marker"
    (single / "configuration_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (single / "sitecustomize.py").write_text(f"open({str(marker)!r}, 'w')\n")
    back = round_trip(single, tmp_path, "--cfg.trust_remote_code", "True")
    assert_identical(single, back)
    assert not marker.exists()
    assert litter(back) == []
