"""Requests that cannot work are refused with numbers; those that can are carried out exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import (
    QWEN2VL,
    QWEN25VL,
    copied,
    edit_rank,
    hf_to_mm,
    layout,
    litter,
    mm_to_hf,
    none,
    rank_files,
    refused,
    resplit,
    same_hf,
    snapshot,
    target,
    untouched,
)
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_mm

QWEN2_SIZES: dict[str, Any] = {"layers": 4, "vit_layers": 2}

# ------------------------------------------------------------------------- tp sizes
INDIVISIBLE: dict[str, tuple[str, dict[str, Any], list[str], tuple[str, ...]]] = {
    "query groups": (
        "qwen2vl-2b",
        {},
        layout("[4]", "[2]", 4, "vit_tp_size=2"),
        ("4", "2", "tp_size"),
    ),
    "query groups, 3": (
        "qwen2vl-2b",
        {},
        layout("[4]", "[2]", 3, "vit_tp_size=1"),
        ("3", "2", "[1, 2]"),
    ),
    "text ffn": ("qwen2vl-2b", {"inter": 145}, layout("[4]", "[2]", 2), ("2", "145", "[1, 5, 29")),
    "vocabulary": (
        "qwen2vl-2b",
        {"vocab_size": 301},
        layout("[4]", "[2]", 2),
        ("2", "301", "7, 43"),
    ),
    "vision heads": (
        "qwen2vl-2b",
        {"vit_heads": 2, "kv": 4},
        layout("[4]", "[2]", 4),
        ("4", "2", "[1, 2]", "vit_tp_size"),
    ),
    "vision heads alone": (
        "qwen2vl-2b",
        {"vit_heads": 2, "kv": 4},
        layout("[4]", "[2]", 1, "vit_tp_size=4"),
        ("4", "2", "[1, 2]", "vit_tp_size"),
    ),
    "vision ffn": (
        "qwen2.5vl-3b",
        {"vit_inter": 61},
        layout("[4]", "[2]", 2),
        ("2", "61", "[1, 61]", "vit_tp_size"),
    ),
}


@pytest.mark.parametrize(
    ("model", "sizes", "flags", "words"), INDIVISIBLE.values(), ids=INDIVISIBLE.keys()
)
def test_tp_sizes_that_do_not_divide(
    model: str,
    sizes: dict[str, Any],
    flags: list[str],
    words: tuple[str, ...],
    out: Path,
    tmp_path: Path,
) -> None:
    """The number at fault, and the sizes that would do; the latter do."""
    hf = make_hf(model, tmp_path / "hf", **QWEN2_SIZES, **sizes)
    converter = QWEN2VL if model == "qwen2vl-2b" else QWEN25VL
    done = hf_to_mm(hf, out, *flags, converter=converter, check=None)
    refused(done, 2, *words, out=out)
    listed = re.search(r"among \[([\d, ]+)\]", done.stderr)
    assert listed, done.stderr
    if model == "qwen2vl-2b" and sizes:
        return
    mm = tmp_path / "mm"
    hf_to_mm(hf, mm, *layout("[4]", "[2]", 1), converter=converter)
    wrong = [word.replace("cfg.parallel", "cfg.target_parallel") for word in flags]
    refused(resplit(mm, out, *wrong, converter=converter, check=None), 2, *words, out=out)


def test_indivisible_columns_and_rows_are_never_cut_off(out: Path, tmp_path: Path) -> None:
    """An odd vocabulary is fine on one rank: nothing is divided."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", **QWEN2_SIZES, vocab_size=301, inter=145)
    hf_to_mm(hf, out, *layout("[2,2]", "[2,0]", 1, "vit_tp_size=2"))
    mm_to_hf(out, hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")


# ------------------------------------------------------------------------ stage grids
GRIDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "text sum too small": (layout("[2,1]", "[2,0]"), ("llm_pp_layers", "[2,1]", "3", "4")),
    "text sum too large": (layout("[2,3]", "[2,0]"), ("llm_pp_layers", "[2,3]", "5", "4")),
    "vision sum": (layout("[2,2]", "[3,0]"), ("vit_pp_layers", "[3,0]", "3", "2")),
    "virtual sum": (
        layout("[[1,1],[1,2]]", "[[2,0],[0,0]]"),
        ("llm_pp_layers", "[[1,1],[1,2]]", "5", "4"),
    ),
    "a text layer before an encoder ends": (
        layout("[1,3]", "[1,1]"),
        ("llm_pp_layers", "[1,3]", "vit_pp_layers", "[1,1]", "stage 1"),
    ),
    "a text layer before an encoder begins": (
        layout("[4,0]", "[0,2]"),
        ("[4,0]", "[0,2]", "stage 1"),
    ),
    "different stage counts": (layout("[2,2]", "[2]"), ("1 x 2", "1 x 1")),
    "different virtual stages": (
        layout("[[1,1],[1,1]]", "[2,0]"),
        ("llm_pp_layers 2 x 2", "vit_pp_layers 1 x 2"),
    ),
    "negative": (layout("[5,-1]", "[2,0]"), ("llm_pp_layers", "[5,-1]")),
    "no vision layer": (layout("[2,2]", "[0,0]"), ("vit_pp_layers", "[0,0]")),
    "only the text list": (["--cfg.parallel_config.llm_pp_layers", "[2,2]"], ("vit_pp_layers",)),
    "only the vision list": (["--cfg.parallel_config.vit_pp_layers", "[2]"], ("llm_pp_layers",)),
    "tp size 0": (layout("[4]", "[2]", 0), ("tp_size", "0")),
    "tp size -1": (layout("[4]", "[2]", -1), ("tp_size", "-1")),
    "vision tp size -2": (layout("[4]", "[2]", 1, "vit_tp_size=-2"), ("vit_tp_size", "-2")),
    "ep size 2": (layout("[4]", "[2]", 1, "ep_size=2"), ("ep_size", "2", "1")),
    "sizes that do not fit each other": (
        layout("[4]", "[2]", 2, "vit_tp_size=3"),
        ("tp_size", "3", "2"),
    ),
    "an audio list": (
        [*layout("[4]", "[2]"), "--cfg.parallel_config.audio_pp_layers", "[4]"],
        ("audio_pp_layers", "Qwen2-VL"),
    ),
    "an audio size": (layout("[4]", "[2]", 1, "audio_tp_size=2"), ("audio_tp_size",)),
}


@pytest.mark.parametrize(("flags", "words"), GRIDS.values(), ids=GRIDS.keys())
def test_impossible_layouts(
    flags: list[str], words: tuple[str, ...], tied_hf: Path, out: Path
) -> None:
    done = hf_to_mm(tied_hf, out, *flags, check=None)
    refused(done, 2, *words, out=out)


RESPLIT_TOO = ("text sum too small", "a text layer before an encoder ends", "ep size 2")
RESPLIT_TOO += ("an audio list", "tp size 0", "only the text list")


@pytest.mark.parametrize("name", RESPLIT_TOO)
def test_impossible_layouts_in_resplit(name: str, tied_mm: Path, out: Path) -> None:
    flags, words = GRIDS[name]
    flags = [word.replace("cfg.parallel", "cfg.target_parallel") for word in flags]
    refused(resplit(tied_mm, out, *flags, check=None), 2, *words, out=out)


def test_the_order_rule_of_the_guides(out: Path, tmp_path: Path) -> None:
    """vit [30,2,0,0] with llm [1,10,10,7]: the first text layer comes too early."""
    hf = make_hf("qwen2.5vl-7b", tmp_path / "hf")
    flags = layout("[1,10,10,7]", "[30,2,0,0]")
    done = hf_to_mm(hf, out, *flags, converter=QWEN25VL, check=None)
    refused(done, 2, "[1,10,10,7]", "[30,2,0,0]", "stage 0", "stage 1", out=out)
    hf_to_mm(hf, out, *layout("[0,11,10,7]", "[30,2,0,0]"), converter=QWEN25VL)
    mm_to_hf(out, hf, tmp_path / "back", converter=QWEN25VL)
    same_hf(hf, tmp_path / "back")


@pytest.mark.parametrize("flag", ["audio_pp_layers", "audio_tp_size"])
@pytest.mark.parametrize("verb", ["mm_to_hf", "resplit"])
def test_flags_for_a_module_that_is_not_there(
    verb: str, flag: str, tied_hf: Path, tied_mm: Path, out: Path
) -> None:
    """Said of a checkpoint that is read, it is not what the checkpoint holds."""
    value = "[4]" if flag == "audio_pp_layers" else "2"
    if verb == "mm_to_hf":
        words = [f"--cfg.parallel_config.{flag}", value]
        done = mm_to_hf(tied_mm, tied_hf, out, *words, check=None)
    else:
        words = [f"--cfg.source_parallel_config.{flag}", value]
        done = resplit(tied_mm, out, *words, check=None)
    assert done.returncode in (2, 3), done.stdout
    refused(done, done.returncode, flag, out=out)


def test_options_that_do_not_fit_the_verb(tied_hf: Path, out: Path) -> None:
    done = hf_to_mm(tied_hf, out, "--vit-qkv", "concatenated", check=None)
    refused(done, 2, "--vit-qkv", out=out)


# ---------------------------------------------------------------------- encoders only
def test_save_vit_only(tied_hf: Path, out: Path, tmp_path: Path) -> None:
    """The encoder's tensors as in the whole checkpoint, and nothing else."""
    hf_to_mm(tied_hf, out, "--cfg.save_vit_only", "True", "--cfg.parallel_config.tp_size", "2")
    hf_to_mm(tied_hf, tmp_path / "whole", *layout("[4]", "[2]", 2))
    expected = rank_files(tmp_path / "whole")
    for rank, path in rank_files(out).items():
        tensors = torch.load(path)["model"]
        whole = torch.load(expected[rank])["model"]
        assert set(tensors) == {name for name in whole if name.startswith("image_encoder.")}
        assert all(torch.equal(tensors[name], whole[name]) for name in tensors)
    assert list(rank_files(out)) == ["mp_rank_00", "mp_rank_01"]


def test_save_vit_only_over_stages(
    tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    """From HF and by resplit the same."""
    vision = "--cfg.parallel_config.vit_pp_layers"
    hf_to_mm(tied_hf, out, "--cfg.save_vit_only", "True", vision, "[1,1]")
    assert list(rank_files(out)) == ["mp_rank_00_000", "mp_rank_00_001"]
    vision = "--cfg.target_parallel_config.vit_pp_layers"
    other = tmp_path / "other"
    resplit(tied_mm22, other, "--cfg.save_vit_only", "True", vision, "[1,1]")
    none(compare_mm(out, other))


# --------------------------------------------------------------- different tp sizes
@pytest.mark.parametrize(("tp", "vit_tp"), [(1, 2), (4, 2), (2, 1), (2, 4)], ids=lambda n: f"{n}")
def test_different_tp_sizes(tp: int, vit_tp: int, out: Path, tmp_path: Path) -> None:
    """There, back, and to other sizes; rank r of the larger group holds piece r % smaller."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", **QWEN2_SIZES, kv=4)
    hf_to_mm(hf, out, *layout("[2,2]", "[2,0]", tp, f"vit_tp_size={vit_tp}"))
    paths = rank_files(out)
    assert len(paths) == 2 * max(tp, vit_tp)
    whole = torch.cat([_rows(hf, "visual.blocks.1.mlp.fc1.weight")])
    words = _rows(hf, "model.embed_tokens.weight")
    for rank in range(max(tp, vit_tp)):
        model = torch.load(paths[f"mp_rank_{rank:02d}_000"])["model"]
        fc1 = model["image_encoder.encoder.blocks.layers.1.mlp.linear_fc1.weight"]
        assert torch.equal(fc1, whole.chunk(vit_tp)[rank % vit_tp])
        embedding = model["text_decoder.embedding.word_embeddings.weight"]
        assert torch.equal(embedding, words.chunk(tp)[rank % tp])
    mm_to_hf(out, hf, tmp_path / "back")
    same_hf(hf, tmp_path / "back")
    resplit(out, tmp_path / "other", *target("[1,3]", "[2,0]", 2))
    hf_to_mm(hf, tmp_path / "fresh", *layout("[1,3]", "[2,0]", 2))
    none(compare_mm(tmp_path / "fresh", tmp_path / "other"))


def _rows(hf: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    for path in sorted(hf.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - it is no dict
                return file.get_tensor(name)
    raise KeyError(name)


# --------------------------------------------------------------------- tied embeddings
HEAD = "text_decoder.output_layer.weight"
TIED: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "PP1 to PP2": (("[4]", "[2]"), ("[2,2]", "[2,0]")),
    "PP2 to PP1": (("[2,2]", "[2,0]"), ("[4]", "[2]")),
    "PP2 to PP4, tp 1 to 2": (("[2,2]", "[2,0]"), ("[1,1,1,1]", "[2,0,0,0]", 2)),
    "PP1 to VPP2": (("[4]", "[2]"), ("[[2],[2]]", "[[2],[0]]")),
    "VPP2 to PP1": (("[[1,1],[1,1]]", "[[2,0],[0,0]]", 2), ("[4]", "[2]")),
    "PP1 to text on one of two stages": (("[4]", "[2]"), ("[0,4]", "[1,1]")),
}


def _heads(mm: Path) -> int:
    """How many model chunks hold an output layer."""
    contents = [torch.load(path) for path in rank_files(mm).values()]
    return sum(HEAD in part for c in contents for part in c.values() if isinstance(part, dict))


@pytest.mark.parametrize(("before", "after"), TIED.values(), ids=TIED.keys())
def test_tied_embeddings(
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    tied_hf: Path,
    out: Path,
    tmp_path: Path,
) -> None:
    """resplit gives what hf_to_mm would: an output layer on a last stage of its own only.

    That the model is tied is known from the manifest, from hf_dir, or by looking.
    """
    mm, fresh = tmp_path / "mm", tmp_path / "fresh"
    hf_to_mm(tied_hf, mm, *layout(*before))
    hf_to_mm(tied_hf, fresh, *layout(*after))
    together = after[0] in ("[4]", "[0,4]")
    assert _heads(fresh) == (0 if together else after[2] if len(after) > 2 else 1)
    known = ["--cfg.hf_config.hf_dir", str(tied_hf)]
    for number, flags in enumerate([[], known, []]):
        if number == 2:
            (mm / "mmconvert.json").unlink()
        resplit(mm, out.with_name(f"out{number}"), *target(*after), *flags)
        none(compare_mm(fresh, out.with_name(f"out{number}")))


def test_an_untied_model_keeps_its_head(untied_hf: Path, untied_mm22: Path, out: Path) -> None:
    resplit(untied_mm22, out, *target("[4]", "[2]"))
    assert _heads(out) == 1
    mm_to_hf(out, untied_hf, out.with_name("back"))
    same_hf(untied_hf, out.with_name("back"))


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        ("mp_rank_01_001", "text_decoder.embedding.word_embeddings.weight"),
        ("mp_rank_00_001", "image_encoder.projector.layernorm.weight"),
        ("mp_rank_01_000", "text_decoder.decoder.final_layernorm.weight"),
    ],
)
def test_a_known_tensor_on_the_wrong_stage(
    rank: str, name: str, tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    """Whatever it holds, nothing would read it: it is not passed over in silence."""
    mm = copied(tied_mm22, tmp_path / "mm")
    edit_rank(mm, rank, lambda content: content["model"].update({name: torch.ones(36)}))
    refused(mm_to_hf(mm, tied_hf, out, check=None), 3, name, rank, "each on its stage", out=out)
    refused(resplit(mm, out, *target("[4]", "[2]"), check=None), 3, name, rank, out=out)


# ------------------------------------------------------------------------------ dry run
@pytest.mark.parametrize("verb", ["hf_to_mm", "mm_to_hf", "resplit"])
def test_a_dry_run(verb: str, tied_hf: Path, tied_mm22: Path, out: Path) -> None:
    """Reports what would be written, and makes nothing: no output, no parents, no traces."""

    def run(*flags: str) -> str:
        if verb == "hf_to_mm":
            return hf_to_mm(tied_hf, deep, *layout("[1,3]", "[2,0]", 2), *flags).stdout
        if verb == "mm_to_hf":
            return mm_to_hf(tied_mm22, tied_hf, deep, *flags).stdout
        return resplit(tied_mm22, deep, *target("[1,3]", "[2,0]", 2), *flags).stdout

    deep = out / "not" / "there"
    before = snapshot(tied_hf.parent)
    said = run("--dry-run")
    assert "would write" in said and str(deep) in said
    said += run("--dry_run", "--json")
    result = json.loads(said[said.index("{") :])
    assert result["written"] is False
    untouched(out)
    assert snapshot(tied_hf.parent) == before
    done = json.loads(run("--json"))
    assert (done["tensors"], done["bytes"]) == (result["tensors"], result["bytes"])
    assert (done["layout"], done["copies"]) == (result["layout"], result["copies"])


def test_a_dry_run_checks_everything(tied_hf: Path, out: Path) -> None:
    done = hf_to_mm(tied_hf, out, *layout("[2,1]", "[2,0]"), "--dry-run", check=None)
    refused(done, 2, "3", "4", out=out)


def test_a_dry_run_leaves_an_existing_output(tied_hf: Path, tmp_path: Path) -> None:
    """Even with --overwrite."""
    hf_to_mm(tied_hf, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    hf_to_mm(tied_hf, tmp_path / "out", *layout("[2,2]", "[2,0]"), "--dry-run", "--overwrite")
    assert snapshot(tmp_path / "out") == before
    assert litter(tmp_path / "out") == []


def test_the_number_of_threads_changes_nothing(tied_hf: Path, tied_mm22: Path, out: Path) -> None:
    hf_to_mm(tied_hf, out, *layout("[2,2]", "[2,0]", 2), "--workers", "7")
    none(compare_mm(tied_mm22, out))
