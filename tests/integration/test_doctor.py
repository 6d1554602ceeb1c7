"""``mm-convert doctor``: each kind of damage has its finding; printed commands mend it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import (
    copied,
    edit_index,
    edit_json,
    edit_rank,
    edit_single,
    hf_to_mm,
    layout,
    rank_files,
    snapshot,
)
from mmconvert.playground.checkpoints import NEW_NAMES, make_hf, nested_config
from mmconvert.tools.doctor.mm import EXPLAINED
from mmconvert.tools.doctor.report import SEVERITY
from mmread import INDEX, TRACKER

ROOT = Path(__file__).parents[2]
RANK_FILE = "model_optim_rng.pt"
T = "text_decoder.decoder.layers"
V = "image_encoder.encoder.blocks.layers"
HEAD = "text_decoder.output_layer.weight"
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
STALE = "stale-manifest"

Json = dict[str, Any]


# ------------------------------------------------------------------------------------ asking
def doctor(path: Path, *flags: str | Path) -> Json:
    """The report; the exit code must be that of its verdict."""
    done = run_cli("doctor", path, "--json", *flags)
    assert done.returncode in (0, 3), done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] == (done.returncode == 0)
    severities = [f["severity"] for f in report["findings"]]
    assert report["healthy"] == ("error" not in severities)
    assert all(SEVERITY[f["id"]] == f["severity"] for f in report["findings"])
    return report


def ids(report: Json) -> list[str]:
    return [f["id"] for f in report["findings"]]


def mend(command: str, shim: Path, cwd: Path) -> None:
    """Run a printed command as a user does: pasted into bash."""
    env = {**os.environ, "PATH": f"{shim}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


# -------------------------------------------------------------------------------- damaging MM
def model(edit: Callable[[Json], object]) -> Callable[[Json], object]:
    """An edit of the one model chunk of a rank file."""
    return lambda content: edit(content["model"])


def both(mm: Path, pp: int, edit: Callable[[Json], object]) -> None:
    """Change both tp ranks of a stage."""
    for tp in (0, 1):
        edit_rank(mm, f"mp_rank_{tp:02d}_{pp:03d}", model(edit))


def folder(mm: Path, rank: str) -> Path:
    return mm / "release" / rank


def file(mm: Path, rank: str) -> Path:
    return folder(mm, rank) / RANK_FILE


def missing_rank(mm: Path) -> None:
    shutil.rmtree(folder(mm, "mp_rank_01_001"))


def missing_last_stage(mm: Path) -> None:
    """Nothing but the tensors tells that a stage is missing."""
    for tp in (0, 1):
        shutil.rmtree(folder(mm, f"mp_rank_{tp:02d}_001"))
    (mm / "mmconvert.json").unlink()


def missing_file(mm: Path) -> None:
    file(mm, "mp_rank_00_001").unlink()


def extra_rank(mm: Path) -> None:
    shutil.copytree(folder(mm, "mp_rank_00_000"), folder(mm, "mp_rank_07_000"))


def extra_rank_unlisted(mm: Path) -> None:
    extra_rank(mm)
    (mm / "mmconvert.json").unlink()


def mixed_layouts(mm: Path) -> None:
    shutil.copytree(folder(mm, "mp_rank_00_000"), folder(mm, "mp_rank_00"))


def two_folders_of_one_rank(mm: Path) -> None:
    shutil.copytree(folder(mm, "mp_rank_01_001"), folder(mm, "mp_rank_01_0001"))


def expert_parallel(mm: Path) -> None:
    """All folders are those of the second expert-parallel rank."""
    for path in sorted((mm / "release").iterdir()):
        path.rename(path.with_name(path.name + "_001"))


def misnamed(mm: Path) -> None:
    shutil.copytree(folder(mm, "mp_rank_00_000"), folder(mm, "mp_rank_00_000 copy"))


def no_ranks(mm: Path) -> None:
    for path in (mm / "release").iterdir():
        shutil.rmtree(path)


def dangling_tracker(mm: Path) -> None:
    (mm / "release").rename(mm / "iter_0000100")
    (mm / TRACKER).write_text("200\n")


def damaged_tracker(mm: Path) -> None:
    (mm / TRACKER).write_text("junk\x1b[31m")


def missing_tracker(mm: Path) -> None:
    (mm / TRACKER).unlink()


def truncated(mm: Path) -> None:
    path = file(mm, "mp_rank_00_001")
    os.truncate(path, path.stat().st_size - 5000)


def empty(mm: Path) -> None:
    file(mm, "mp_rank_00_001").write_bytes(b"")


def old_pickle(mm: Path) -> None:
    torch.save(
        {"model": {"a": torch.ones(2)}},
        file(mm, "mp_rank_00_001"),
        _use_new_zipfile_serialization=False,
    )


def damaged_pickle(mm: Path) -> None:
    path = file(mm, "mp_rank_00_001")
    data = bytearray(path.read_bytes())
    at = data.index(b"data.pkl") + 60
    data[at + 200 : at + 220] = b"\xff" * 20
    path.write_bytes(data)


def lfs(mm: Path) -> None:
    file(mm, "mp_rank_00_001").write_text("version https://git-lfs.github.com/spec/v1\n")


def other_object(mm: Path) -> None:
    path = file(mm, "mp_rank_01_001")
    content = torch.load(path, weights_only=True)
    content["model"]["trainer"] = Namespace(a=1)
    torch.save(content, path)


def other_chunks(mm: Path) -> None:
    def edit(content: Json) -> None:
        content["model0"] = content.pop("model")
        content["model1"] = {}

    edit_rank(mm, "mp_rank_01_001", edit)


def gap_in_chunks(mm: Path) -> None:
    edit_rank(mm, "mp_rank_01_001", lambda c: c.update(model1=c.pop("model")))


def stale(mm: Path) -> None:
    """Training has written into the folder of a conversion."""
    edit_rank(mm, "mp_rank_01_001", lambda c: c.update(iteration=100, more="x" * 5000))


def damaged_manifest(mm: Path) -> None:
    (mm / "mmconvert.json").write_text('{"files"')


def hole(mm: Path) -> None:
    both(mm, 1, lambda x: [x.pop(k) for k in list(x) if k.startswith(f"{T}.0.")])


def numbered_through(mm: Path) -> None:
    """The second stage has the numbers of the whole model."""

    def edit(tensors: Json) -> None:
        for name in list(tensors):
            if name.startswith(f"{T}."):
                number, rest = name.removeprefix(f"{T}.").split(".", 1)
                tensors[f"{T}.+{int(number) + 2}.{rest}"] = tensors.pop(name)
        for name in list(tensors):
            tensors[name.replace(".+", ".")] = tensors.pop(name)

    both(mm, 1, edit)


def one_rank_lacks(mm: Path) -> None:
    edit_rank(mm, "mp_rank_01_000", model(lambda x: x.pop(f"{T}.0.mlp.linear_fc1.weight")))


def layer_lacks(mm: Path) -> None:
    both(mm, 1, lambda x: x.pop(f"{T}.1.mlp.linear_fc1.weight"))


def no_patch_embedding(mm: Path) -> None:
    both(mm, 0, lambda x: x.pop("image_encoder.encoder.patch_embed.proj.weight"))


def no_head(mm: Path) -> None:
    both(mm, 1, lambda x: x.pop(HEAD))


def misplaced(mm: Path) -> None:
    words = {}
    for tp in (0, 1):
        edit_rank(mm, f"mp_rank_{tp:02d}_000", model(lambda x: words.update({0: x.pop(EMBEDDING)})))
        edit_rank(mm, f"mp_rank_{tp:02d}_001", model(lambda x: x.update({EMBEDDING: words[0]})))


def wrong_shape(mm: Path) -> None:
    new = torch.ones(72, 70, dtype=torch.bfloat16)
    name = f"{T}.0.mlp.linear_fc2.weight"
    edit_rank(mm, "mp_rank_01_001", model(lambda x: x.update({name: new})))


def wrong_dtype(mm: Path) -> None:
    name = f"{T}.1.mlp.linear_fc2.weight"
    edit_rank(mm, "mp_rank_01_001", model(lambda x: x.update({name: x[name].float()})))


def half_the_tp_ranks(mm: Path) -> None:
    for path in (mm / "release").glob("mp_rank_01_*"):
        shutil.rmtree(path)
    (mm / "mmconvert.json").unlink()


def drifted(mm: Path) -> None:
    edit_rank(mm, "mp_rank_01_000", model(lambda x: x[f"{T}.0.input_layernorm.weight"].add_(1)))


def unknown(mm: Path) -> None:
    both(mm, 0, lambda x: x.update({"evil\x1b[31m\u202e'*.weight": torch.ones(3)}))


def with_state(mm: Path) -> None:
    state = torch.ones(11)
    name = f"{T}.0.self_attention._extra_state"
    edit_rank(mm, "mp_rank_01_001", model(lambda x: x.update({name: state})))


def lost_layers(mm: Path) -> None:
    """Both stages are whole in themselves; config.json has one layer more."""
    both(mm, 1, lambda x: [x.pop(k) for k in list(x) if k.startswith(f"{T}.1.")])


def not_a_number(mm: Path) -> None:
    def edit(tensors: Json) -> None:
        tensors[f"{T}.0.mlp.linear_fc2.weight"][3, 5] = float("nan")
        tensors[f"{T}.0.mlp.linear_fc2.weight"][4, 0] = float("-inf")

    edit_rank(mm, "mp_rank_01_001", model(edit))


def concatenated(hf: Path, noise: float = 0) -> Callable[[Path], None]:
    """Vision q, k, v as the reference 2.2.0 to 2.3.0 wrote them: HF's rows, cut in two."""
    weights = {k: t for p in hf.glob("*.safetensors") for k, t in load_file(p).items()}

    def edit_both(mm: Path) -> None:
        for tp in (0, 1):
            edit_rank(mm, f"mp_rank_{tp:02d}_000", model(lambda x, tp=tp: edit(x, tp)))

    def edit(tensors: Json, tp: int) -> None:
        for layer in (0, 1):
            for kind in ("weight", "bias"):
                rows = weights[f"visual.blocks.{layer}.attn.qkv.{kind}"].chunk(2)[tp].float()
                rows = rows + noise * torch.randn(rows.shape, generator=generator)
                name = f"{V}.{layer}.self_attention.linear_qkv.{kind}"
                tensors[name] = rows.to(torch.bfloat16)

    generator = torch.Generator().manual_seed(1)
    return edit_both


class Case(NamedTuple):
    """A damage, all findings in order, words of the first, and flags of doctor.

    `mended`: where the healthy checkpoint is after the first finding's command; "" if it has
    none.
    """

    damage: Callable[[Path], None]
    found: tuple[str, ...]
    words: tuple[str, ...]
    flags: tuple[str, ...] = ()
    mended: str = ""


HF_DIR = ("--hf_dir", "HF")
CASES = {
    "missing rank folder": Case(
        missing_rank, ("missing-rank-folder",), ("3 of 4", "tp 2 x pp 2", "mp_rank_01_001")
    ),
    "missing last stage": Case(
        missing_last_stage, ("missing-rank-folder",), ("mp_rank_00_001", "end of the text decoder")
    ),
    "missing tp ranks": Case(
        half_the_tp_ranks, ("missing-rank-folder",), ("1 tp rank", "divided over 2"), HF_DIR
    ),
    "missing tp ranks, no hf_dir": Case(
        half_the_tp_ranks, ("wrong-shape",), ("image_encoder", "1 tp rank")
    ),
    "missing rank file": Case(
        missing_file, ("missing-rank-file",), ("mp_rank_00_001", "has no model_optim_rng.pt")
    ),
    "extra rank folder": Case(
        extra_rank, ("extra-rank-folder",), ("mp_rank_07_000", "does not list"), (), "mm"
    ),
    "extra rank folder, no list": Case(
        extra_rank_unlisted, ("extra-rank-folder",), ("mp_rank_07_000", "complete"), (), "mm"
    ),
    "mixed layouts": Case(
        mixed_layouts, ("mixed-layouts",), ("mp_rank_00 (", "mp_rank_00_000"), (), "mm"
    ),
    "duplicate": Case(
        two_folders_of_one_rank,
        ("duplicate-rank-folder",),
        ("tp 1 pp 1", "mp_rank_01_0001"),
        (),
        "mm",
    ),
    "the first ep ranks": Case(
        expert_parallel, ("missing-rank-folder",), ("4 of 8", "x ep 2", "mp_rank_00_000_000")
    ),
    "misnamed": Case(misnamed, ("misnamed-rank-folder",), ("mp_rank_00_000 copy",)),
    "no rank folders": Case(no_ranks, ("no-rank-folders",), ("release",)),
    "dangling tracker": Case(
        dangling_tracker, ("dangling-tracker",), ("'200'", "iter_0000200"), (), "mm"
    ),
    "damaged tracker": Case(damaged_tracker, ("damaged-tracker",), ("junk",), (), "mm"),
    "missing tracker": Case(missing_tracker, ("missing-tracker",), ("release",), (), "mm"),
    "truncated": Case(
        truncated, ("truncated-rank-file",), ("cut off at byte", "the last 5000 are missing")
    ),
    "empty": Case(empty, ("foreign-rank-file",), ("is empty",)),
    "old pickle": Case(old_pickle, ("foreign-rank-file",), ("before 1.6",)),
    "damaged pickle": Case(damaged_pickle, ("damaged-rank-file",), ("near byte",)),
    "git LFS pointer": Case(lfs, ("lfs-pointer",), ("mp_rank_00_001",)),
    "an object among the weights": Case(
        other_object, ("not-a-tensor",), ("'trainer'", "argparse.Namespace")
    ),
    "other chunks": Case(
        other_chunks, ("chunk-keys-differ",), ("model0, model1", "3 of 4 files hold model")
    ),
    "a gap in the chunks": Case(gap_in_chunks, ("chunk-keys",), ("holds model1",)),
    "stale manifest": Case(stale, (STALE,), ("mp_rank_01_001", "has changed"), (), "mm"),
    "damaged manifest": Case(
        damaged_manifest, ("damaged-manifest",), ("not valid JSON",), (), "mm"
    ),
    "layer hole": Case(
        hole, ("layer-hole", STALE), ("text_decoder", "pp rank 1", "layer 0 missing")
    ),
    "layers numbered through": Case(
        numbered_through, ("layer-hole", STALE), ("2 to 3", "as in the whole model")
    ),
    "one rank lacks a tensor": Case(
        one_rank_lacks,
        ("tp-names-differ", STALE),
        ("tp rank 1 of pp rank 0", f"{T}.0.mlp.linear_fc1.weight"),
    ),
    "a layer lacks a tensor": Case(
        layer_lacks,
        ("missing-tensor", STALE),
        ("layer 1 on pp rank 1 (layer 3 of the model)", "linear_fc1.weight"),
    ),
    "no patch embedding": Case(
        no_patch_embedding, ("missing-tensor", STALE), ("before its layers", "patch_embed")
    ),
    "tied head missing": Case(
        no_head, ("tied-head-missing", STALE), (HEAD, "pp rank 1"), HF_DIR, "mm_mended"
    ),
    "head missing, nobody knows": Case(
        no_head, ("output-layer-missing", STALE), (HEAD, "on any stage")
    ),
    "misplaced": Case(
        misplaced, ("misplaced-tensor", STALE), (EMBEDDING, "pp rank 1", "pp rank 0")
    ),
    "wrong shape": Case(
        wrong_shape, ("wrong-shape", STALE), ("layers.0.mlp.linear_fc2.weight", "[72, 70]"), HF_DIR
    ),
    "wrong dtype": Case(wrong_dtype, ("mixed-dtypes", STALE), ("linear_fc2", "F32", "BF16")),
    "replicas apart": Case(
        drifted,
        ("replicas-differ",),
        ("layers.0.input_layernorm.weight", "mp_rank_01_000", "72 elements"),
        (),
        "mm_mended",
    ),
    "unknown tensor": Case(
        unknown,
        ("unknown-tensor", STALE),
        ("1 tensor with no place in Qwen2-VL", r"evil\x1b[31m\u202e'*.weight"),
        (),
        "mm_mended",
    ),
    "extra state": Case(with_state, ("extra-state", STALE), ("44 bytes",)),
    "layer count": Case(lost_layers, ("layer-count", STALE), ("llm_pp_layers [2,1]", "4"), HF_DIR),
    "NaN": Case(
        not_a_number,
        ("not-finite",),
        ("linear_fc2.weight holds 1 NaN and 1 infinite values, the first at [3, 5]",),
        ("--values",),
    ),
}


@pytest.fixture
def mm(tied_mm22: Path, tmp_path: Path) -> Path:
    """A copy of a healthy checkpoint at TP 2 PP 2."""
    return copied(tied_mm22, tmp_path / "mm")


def check(case: Case, mm: Path, hf: Path, shim: Path) -> None:
    """The findings are those of the case; the command of the first mends it."""
    case.damage(mm)
    before = snapshot(mm)
    flags = [str(hf) if word == "HF" else word for word in case.flags]
    # The manifest fits or not by the sizes of files, which torch's serializer decides.
    report = doctor(mm, *flags)
    found = [i for i in ids(report) if i != STALE or STALE in case.found]
    assert tuple(found) == case.found, report
    first = report["findings"][0]
    for word in case.words:
        assert word in first["what"], first
    assert first["fix"]
    assert snapshot(mm) == before
    if not case.mended:
        return
    mend(first["command"], shim, mm.parent)
    report = doctor(mm.with_name(case.mended), *flags)
    assert report["healthy"]
    assert set(ids(report)) <= {STALE}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_damaged_mm_folder(case: Case, mm: Path, tied_hf: Path, shim: Path) -> None:
    check(case, mm, tied_hf, shim)


@pytest.mark.parametrize("noise", [0, 0.01], ids=["untouched", "trained a little"])
def test_vision_qkv_left_uninterleaved(noise: float, mm: Path, tied_hf: Path, shim: Path) -> None:
    words = ("are concatenated in", "are equal" if not noise else "much closer")
    damage = concatenated(tied_hf, noise)
    case = Case(damage, ("vit-qkv-concatenated", STALE), words, HF_DIR, "mm_mended")
    check(case, mm, tied_hf, shim)
    if not noise:
        run_cli("verify", tied_hf, mm.with_name("mm_mended"), check=0)


def test_trained_vision_qkv_in_the_right_order(mm: Path, tied_hf: Path) -> None:
    """Other values than hf_dir's are no finding."""

    def train(tensors: Json) -> None:
        for name, tensor in tensors.items():
            if "linear_qkv" in name:
                tensor.add_(0.01)

    both(mm, 0, train)
    assert set(ids(doctor(mm, "--hf_dir", tied_hf))) <= {STALE}


def test_one_command_for_all_that_resplit_mends(mm: Path, tied_hf: Path, shim: Path) -> None:
    for damage in (concatenated(tied_hf), drifted, unknown, no_head):
        damage(mm)
    report = doctor(mm, "--hf_dir", tied_hf)
    expected = {"vit-qkv-concatenated", "replicas-differ", "unknown-tensor", "tied-head-missing"}
    assert set(ids(report)) == expected | {STALE}
    commands = {f["command"] for f in report["findings"] if f["id"] in expected}
    assert len(commands) == 1
    mend(commands.pop(), shim, mm.parent)
    assert doctor(mm.with_name("mm_mended"), "--hf_dir", tied_hf)["findings"] == []


def test_no_command_where_it_would_fail(mm: Path) -> None:
    """resplit would stop at the missing tensor."""
    layer_lacks(mm)
    drifted(mm)
    report = doctor(mm)
    assert {"missing-tensor", "replicas-differ"} <= set(ids(report))
    assert [f["command"] for f in report["findings"] if f["severity"] == "error"] == [None, None]


def test_all_findings_at_once(mm: Path, tied_hf: Path) -> None:
    """Unlike a conversion, doctor does not stop at the first."""
    dangling_tracker(mm)
    (mm / "iter_0000100").rename(mm / "release")
    for damage in (extra_rank, layer_lacks, wrong_shape, unknown):
        damage(mm)
    file(mm, "mp_rank_07_000").unlink()
    found = ids(doctor(mm))
    assert found[:2] == ["dangling-tracker", "extra-rank-folder"]
    assert {"unknown-tensor", "missing-tensor", "wrong-shape"} <= set(found)


def test_a_missing_folder_is_one_finding(tied_hf: Path, tmp_path: Path) -> None:
    """Not one for each of its tensors; many damaged files are listed up to a limit."""
    mm = tmp_path / "mm"
    hf_to_mm(tied_hf, mm, *layout("[1,1,1,1]", "[2,0,0,0]", 2))
    shutil.rmtree(folder(mm, "mp_rank_00_002"))
    (mm / "mmconvert.json").unlink()
    assert ids(doctor(mm)) == ["missing-rank-folder"]
    wide = tmp_path / "wide"
    for tp in range(30):
        shutil.copytree(folder(mm, "mp_rank_00_000"), folder(wide, f"mp_rank_{tp:02d}"))
        file(wide, f"mp_rank_{tp:02d}").write_bytes(b"")
    report = doctor(wide / "release")
    assert len(report["findings"]) == 20
    assert report["more"] == {"foreign-rank-file": 10}
    assert report["errors"] == 30


def test_pp_suffix_without_pp(tied_mm: Path, tmp_path: Path, shim: Path) -> None:
    mm = copied(tied_mm, tmp_path / "my mm")
    folder(mm, "mp_rank_00").rename(folder(mm, "mp_rank_00_000"))
    report = doctor(mm)
    assert ids(report) == ["pp-suffix-without-pp"]
    mend(report["findings"][0]["command"], shim, tmp_path)
    assert doctor(mm)["findings"] == []
    assert list(rank_files(mm)) == ["mp_rank_00"]


def test_a_tied_head_beside_its_embedding(
    tied_mm: Path, tied_hf: Path, tmp_path: Path, shim: Path
) -> None:
    mm = copied(tied_mm, tmp_path / "mm")
    edit_rank(mm, "mp_rank_00", model(lambda x: x.update({HEAD: x[EMBEDDING]})))
    report = doctor(mm, "--hf_dir", tied_hf)
    assert set(ids(report)) == {"tied-head-superfluous", STALE}
    assert report["healthy"]
    mend(report["findings"][0]["command"], shim, tmp_path)
    assert doctor(tmp_path / "mm_mended", "--hf_dir", tied_hf)["findings"] == []


def test_quick_leaves_copies_out(mm: Path) -> None:
    drifted(mm)
    report = doctor(mm, "--quick")
    assert "replicas-differ" not in ids(report)
    assert any("--quick" in words for words in report["skipped"])


def test_hf_dir_of_another_model(mm: Path, tmp_path: Path) -> None:
    other = make_hf("qwen2.5vl-3b", tmp_path / "hf", layers=2, vit_layers=1)
    assert ids(doctor(mm, "--hf_dir", other)) == ["other-family"]
    report = doctor(mm, "--hf_dir", tmp_path)
    assert ids(report) == ["hf-dir-unusable"]


def test_hf_dir_with_config_alone(mm: Path, tied_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    shutil.copy(tied_hf / "config.json", tmp_path / "hf")
    report = doctor(mm, "--hf_dir", tmp_path / "hf")
    assert report["findings"] == []
    assert any("no readable weights" in words for words in report["skipped"])


# ----------------------------------------------------------------------------------- healthy
FAMILIES: dict[str, tuple[str, Json, list[str]]] = {
    "qwen2vl-7b": ("Qwen2VLConverter", {"layers": 4, "vit_layers": 2}, []),
    "qwen2.5vl-3b": ("Qwen2_5_VLConverter", {"layers": 4, "vit_layers": 2}, []),
    "qwen2.5omni-7b": (
        "Qwen2_5_OmniConverter",
        {"layers": 4, "vit_layers": 2, "audio_layers": 2},
        ["--cfg.parallel_config.audio_pp_layers", "[2,0]"],
    ),
    "internvl2-2b": ("InternVLConverter", {"layers": 4, "vit_layers": 2}, []),
    "internvl2-76b": ("InternVLConverter", {"layers": 4, "vit_layers": 2}, []),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_healthy_families(name: str, tmp_path: Path) -> None:
    converter, sizes, flags = FAMILIES[name]
    hf = make_hf(name, tmp_path / "hf", shards=2, **sizes)
    hf_to_mm(hf, tmp_path / "mm", *layout("[2,2]", "[2,0]", 2), *flags, converter=converter)
    # InternVL2's vocabulary is odd: it converts at TP 2, and training cannot use it.
    odd = ["not-for-training"] if name.startswith("internvl") else []
    assert doctor(hf, "--values")["findings"] == []
    for flags in (["--values", "--hf_dir", str(hf)], []):
        report = doctor(tmp_path / "mm", *flags)
        assert [finding["id"] for finding in report["findings"]] == odd
        assert report["family"]


def test_an_audio_bias_that_hf_does_not_store(tmp_path: Path) -> None:
    """The k part of the audio encoder's bias: mm_to_hf would lose what it holds."""
    sizes: Json = {"layers": 2, "vit_layers": 1, "audio_layers": 1}
    hf, mm = make_hf("qwen2.5omni-7b", tmp_path / "hf", **sizes), tmp_path / "mm"
    flags = ["--cfg.parallel_config.audio_pp_layers", "[1]"]
    hf_to_mm(hf, mm, *layout("[2]", "[1]"), *flags, converter="Qwen2_5_OmniConverter")
    name = "audio_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.bias"
    edit_rank(mm, "mp_rank_00", model(lambda x: x[name].add_(1)))
    report = doctor(mm, "--hf_dir", hf)
    assert set(ids(report)) - {STALE} == {"not-zero"}
    assert name in report["findings"][0]["what"]


def test_a_text_layer_before_the_encoder_ends(tied_hf: Path, out: Path) -> None:
    """Stages put together by hand: a conversion reads them, training passes data backwards."""
    hf_to_mm(tied_hf, out, *layout("[0,4]", "[2,0]"))
    first, second = (folder(out, f"mp_rank_00_00{pp}") for pp in (0, 1))
    first.rename(out / "release" / "swap")
    second.rename(first)
    (out / "release" / "swap").rename(second)
    assert "stage-order" in ids(doctor(out, "--hf_dir", tied_hf))


def test_tensors_of_nobody(out: Path) -> None:
    folder(out, "mp_rank_00").mkdir(parents=True)
    torch.save({"model": {"weight": torch.ones(2)}}, file(out, "mp_rank_00"))
    report = doctor(out / "release")
    assert (ids(report), report["family"]) == (["unknown-family"], "")


LAYOUTS = {
    "one rank": layout("[4]", "[2]"),
    "tp": layout("[4]", "[2]", 2),
    "pp": layout("[1,3]", "[2,0]"),
    "encoder on stages of its own": layout("[0,0,4]", "[1,1,0]"),
    "vpp": layout("[[0,1],[1,2]]", "[[1,1],[0,0]]", 2),
    "hetero tp": layout("[2,2]", "[2,0]", 2, "vit_tp_size=1"),
    "canonical": [
        *layout("[2,2]", "[2,0]", 2),
        *("--cfg.common_model_config.enable_canonical_hf_struct", "True"),
    ],
}


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_healthy_layouts(flags: list[str], tied_hf: Path, out: Path) -> None:
    hf_to_mm(tied_hf, out, *flags)
    report = doctor(out, "--hf_dir", tied_hf)
    assert report["findings"] == []
    (out / "mmconvert.json").unlink()
    assert doctor(out, "--hf_dir", tied_hf)["findings"] == []
    assert doctor(out / "release", "--hf_dir", tied_hf)["findings"] == []


def test_healthy_encoders_alone(tied_hf: Path, out: Path) -> None:
    hf_to_mm(tied_hf, out, "--cfg.save_vit_only", "True")
    report = doctor(out, "--hf_dir", tied_hf)
    assert ids(report) == ["encoders-only"]
    assert report["healthy"]


def test_a_healthy_training_checkpoint(mm: Path, tied_hf: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    for rank, path in rank_files(mm).items():
        content = torch.load(path, weights_only=True)
        content |= {"args": Namespace(lr=1), "iteration": 100, "optimizer": {"m": torch.ones(9)}}
        content["model"][f"{T}.0._extra_state"] = None
        (saved / "iter_0000100" / rank).mkdir(parents=True)
        torch.save(content, saved / "iter_0000100" / rank / RANK_FILE)
    (saved / TRACKER).write_text("100\n")
    found = doctor(saved, "--hf_dir", tied_hf, "--values")["findings"]
    assert [f["id"] for f in found] == [
        "optimizer-unknown"
    ]  # made up; Megatron's own are elsewhere


@pytest.mark.parametrize("shards", [1, 3])
def test_healthy_hf_folders(shards: int, tmp_path: Path) -> None:
    sizes: Json = {"layers": 2, "vit_layers": 1}
    hf = make_hf("qwen2.5vl-3b", tmp_path / "hf", shards=shards, edit_config=nested_config, **sizes)
    assert doctor(hf, "--values")["findings"] == []


# -------------------------------------------------------------------------------- damaging HF
SECOND = "model-00002-of-00002.safetensors"


def absent_file(hf: Path) -> None:
    (hf / SECOND).unlink()


def linked_nowhere(hf: Path) -> None:
    (hf / SECOND).unlink()
    (hf / SECOND).symlink_to("../blobs/gone")


def cut_off(hf: Path) -> None:
    os.truncate(hf / SECOND, (hf / SECOND).stat().st_size - 1000)


def cut_in_header(hf: Path) -> None:
    os.truncate(hf / SECOND, 300)


def pointer(hf: Path) -> None:
    (hf / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def hf_pickle(hf: Path) -> None:
    (hf / SECOND).write_bytes(b"\x80\x02}q\x00." + b"\xff" * 50)


def stray(hf: Path) -> None:
    shutil.copy(hf / SECOND, hf / "model-00002-of-00005.safetensors")


def two_checkpoints(hf: Path) -> None:
    other = make_hf("qwen2vl-2b", hf.with_name("other"), layers=5, vit_layers=2, shards=2)
    shutil.copy(other / SECOND, hf)


def index_lists_less(hf: Path) -> None:
    edit_index(hf, lambda m: m.pop("model.norm.weight"))


def bad_index(hf: Path) -> None:
    (hf / INDEX).write_text("{}")


def no_index(hf: Path) -> None:
    (hf / INDEX).unlink()


def no_config(hf: Path) -> None:
    (hf / "config.json").unlink()


def bad_config(hf: Path) -> None:
    (hf / "config.json").write_text("[1")


def no_layers_in_config(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(num_hidden_layers=-1))


def senseless_flag(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=-0.0))


def other_model(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(model_type="qwen9_vl"))


def nameless_model(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(model_type=" "))


def language_model(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(model_type="llama"))
    kept: dict[str, str] = {}
    for path in hf.glob("*.safetensors"):
        tensors = {n: t for n, t in load_file(path).items() if not n.startswith("visual.")}
        if tensors:
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            path.unlink()
        kept |= dict.fromkeys(tensors, path.name)
    edit_json(hf / INDEX, lambda index: index.update(weight_map=kept))


def more_layers(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(num_hidden_layers=5))


def fewer_layers(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(num_hidden_layers=3))


def wider(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(vocab_size=999))


def no_side_files(hf: Path) -> None:
    for name in ("vocab.json", "merges.txt", "preprocessor_config.json"):
        (hf / name).unlink()


def no_weights(hf: Path) -> None:
    for path in [*hf.glob("*.safetensors"), hf / INDEX]:
        path.unlink()
    (hf / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")  # and no index


def damaged_bin(hf: Path) -> None:
    for path in [*hf.glob("*.safetensors"), hf / INDEX]:
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(b"no archive")


HF_CASES = {
    "absent file": Case(absent_file, ("missing-weight-file",), (SECOND, "1 of 2 weight files")),
    "link to nowhere": Case(linked_nowhere, ("missing-weight-file",), ("a link to nowhere",)),
    "cut off": Case(cut_off, ("truncated-weight-file",), ("at byte", "so 1000 are missing")),
    "cut in its header": Case(cut_in_header, ("truncated-weight-file",), ("byte 300",)),
    "git LFS pointer": Case(pointer, ("lfs-pointer",), (SECOND,)),
    "no safetensors file": Case(hf_pickle, ("damaged-weight-file",), ("header length",)),
    "stray file": Case(stray, ("stray-weight-file",), ("model-00002-of-00005",), (), "hf"),
    "two checkpoints": Case(
        two_checkpoints, ("index-mismatch", "index-mismatch"), ("lacks", "that the index puts")
    ),
    "index lists less": Case(index_lists_less, ("index-mismatch",), ("model.norm.weight",)),
    "damaged index": Case(bad_index, ("damaged-index",), ("no weight_map",)),
    "no index": Case(no_index, ("missing-index",), ("2 *.safetensors files",)),
    "no config.json": Case(no_config, ("missing-config",), ("no config.json",)),
    "damaged config.json": Case(bad_config, ("damaged-config",), ("not valid JSON",)),
    "config.json without sense": Case(
        no_layers_in_config, ("damaged-config",), ("num_hidden_layers", "-1")
    ),
    "a flag that is none": Case(
        senseless_flag, ("damaged-config",), ("tie_word_embeddings", "-0.0")
    ),
    "another architecture": Case(
        other_model, ("unsupported-model",), ("'qwen9_vl'", "an encoder named as in Qwen2-VL")
    ),
    "no architecture": Case(nameless_model, ("damaged-config",), ("model_type is ' '",)),
    "a language model": Case(language_model, ("unsupported-model-type",), ("'llama'",)),
    "a missing layer": Case(
        more_layers, ("missing-tensor",), ("12 tensors missing", "(text_decoder layer 4)")
    ),
    "a layer too many": Case(fewer_layers, ("extra-layers",), ("12 tensors beyond", "llm 3")),
    "another size": Case(wider, ("wrong-shape",), ("model.embed_tokens.weight", "304 rows", "999")),
    "no tokenizer": Case(
        no_side_files, ("missing-tokenizer", "missing-preprocessor"), ("vocab.json",)
    ),
    "no safetensors": Case(no_weights, ("no-safetensors",), ("only pytorch_model-00001",)),
    "a damaged .bin": Case(damaged_bin, ("damaged-weight-file",), ("not a zip archive",)),
}


@pytest.mark.parametrize("case", HF_CASES.values(), ids=HF_CASES.keys())
def test_a_damaged_hf_folder(case: Case, tied_hf: Path, tmp_path: Path, shim: Path) -> None:
    check(case, copied(tied_hf, tmp_path / "hf"), tied_hf, shim)


def test_names_of_another_transformers_version(tmp_path: Path) -> None:
    sizes: Json = {"layers": 2, "vit_layers": 1}
    new: Json = {"rename": NEW_NAMES, "edit_config": nested_config, **sizes}
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", **new)
    report = doctor(hf)
    assert ids(report) == ["other-spelling"]
    assert report["healthy"]
    assert "4.52" in report["findings"][0]["what"] and "5.23.0" in report["findings"][0]["what"]


def test_tensors_that_do_not_belong(tmp_path: Path) -> None:
    sizes: Json = {"layers": 2, "vit_layers": 1}
    hf = make_hf("qwen2vl-2b", tmp_path / "a", shards=1, extra=[("value_head", (3, 3))], **sizes)
    assert ids(doctor(hf)) == ["unknown-tensor"]
    twice = [("model.visual.patch_embed.proj.weight", (64, 3, 2, 14, 14))]
    hf = make_hf("qwen2vl-2b", tmp_path / "b", shards=1, extra=twice, **sizes)
    assert ids(doctor(hf)) == ["duplicate-tensor", "other-spelling"]


def test_a_tied_head_of_its_own(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "a", shards=1, layers=2, vit_layers=1, tie=False)
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=True))
    assert ids(doctor(hf)) == ["replicas-differ"]
    assert doctor(hf, "--quick")["findings"] == []
    edit_single(hf, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"]}))
    assert doctor(hf)["findings"] == []


# -------------------------------------------------------------------------------- single files
def test_single_files(mm: Path, tied_hf: Path) -> None:
    rank_file, weight_file = file(mm, "mp_rank_01_001"), tied_hf / SECOND
    for path, kind in ((rank_file, "mm_rank_file"), (weight_file, "hf_weight_file")):
        report = doctor(path, "--values")
        assert (report["kind"], report["findings"]) == (kind, [])
    truncated(mm)
    assert ids(doctor(file(mm, "mp_rank_00_001"))) == ["truncated-rank-file"]
    not_a_number(mm)
    assert ids(doctor(file(mm, "mp_rank_01_001"), "--values")) == ["not-finite"]


# ------------------------------------------------------------------- what killed runs leave
KILLED = """
import os, signal, sys
from pathlib import Path
from mmconvert.executor.output import Output
target = Path(sys.argv[1])
output = Output(target, [], overwrite=True)
output.__enter__()
(output.folder / "half").write_text("x")
if sys.argv[2] == "rename":
    target.rename(output._aside)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(target: Path, when: str) -> None:
    """A process that is killed while it writes `target`."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_conversion_left(mm: Path, shim: Path) -> None:
    killed(mm, "write")
    report = doctor(mm)
    assert ids(report) == ["unfinished-output"]
    assert report["healthy"]
    mend(report["findings"][0]["command"], shim, mm.parent)
    assert doctor(mm)["findings"] == []
    assert sorted(p.name for p in mm.parent.iterdir()) == ["mm"]


def test_a_kill_between_two_renames(mm: Path, shim: Path) -> None:
    killed(mm, "rename")
    report = doctor(mm)
    assert set(ids(report)) == {"unfinished-output", "interrupted-replacement"}
    assert not report["healthy"]
    for finding in report["findings"]:
        mend(finding["command"], shim, mm.parent)
    assert doctor(mm)["findings"] == []


def test_a_running_conversion_is_left_alone(mm: Path) -> None:
    killed(mm, "write")
    staging = mm.with_name(f".{mm.name}.mmconvert-partial")
    held = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        (finding,) = doctor(mm)["findings"]
        assert finding["id"] == "running-conversion"
        assert finding["command"] is None
        assert "running-conversion" in ids(doctor(staging))
    finally:
        os.close(held)
    assert "unfinished-output" in ids(doctor(staging))


def test_the_former_checkpoint_that_was_left(mm: Path, shim: Path) -> None:
    shutil.copytree(mm, mm.with_name(f".{mm.name}.mmconvert-old"))
    report = doctor(mm)
    assert ids(report) == ["old-output"]
    mend(report["findings"][0]["command"], shim, mm.parent)
    assert doctor(mm)["findings"] == []


# ------------------------------------------------------------------------------ at the door
def test_nothing_there(tmp_path: Path) -> None:
    assert ids(doctor(tmp_path / "nothing")) == ["not-there"]
    assert ids(doctor(tmp_path)) == ["no-checkpoint"]
    (tmp_path / "link").symlink_to("nowhere")
    report = doctor(tmp_path / "link")
    assert "a link to nowhere" in report["findings"][0]["what"]


def test_a_folder_of_both_kinds(mm: Path, tied_hf: Path) -> None:
    shutil.copy(tied_hf / "config.json", mm)
    report = doctor(mm)
    assert (report["kind"], ids(report)) == ("mm", ["two-kinds"])


def test_names_never_reach_the_terminal_raw(mm: Path, tmp_path: Path, shim: Path) -> None:
    """Nor does a hostile path break out of a printed command."""
    nasty = mm.rename(tmp_path / "a'b\x1b[31m $(touch hacked)\n")
    unknown(nasty)
    done = run_cli("doctor", nasty, check=3)
    shown = done.stdout + done.stderr
    assert all(c.isprintable() or c == "\n" for c in shown), repr(shown)
    assert r"evil\x1b[31m\u202e" in shown
    (command,) = re.findall(r"command: (mm-convert .*)", shown)
    mend(command, shim, tmp_path)
    assert not (tmp_path / "hacked").exists()
    assert doctor(nasty.with_name(nasty.name + "_mended"))["findings"] == []


def test_what_is_printed(mm: Path) -> None:
    done = run_cli("doctor", mm, check=0)
    assert done.stdout.splitlines()[-1] == "healthy: 0 errors, 0 warnings"
    assert run_cli("doctor", mm, "--quiet", check=0).stdout == ""
    missing_rank(mm)
    done = run_cli("doctor", mm, check=3)
    assert done.stdout.startswith("error missing-rank-folder: ")
    assert "  to fix: copy the folder" in done.stdout
    assert done.stdout.splitlines()[-1] == "not healthy: 1 error, 0 warnings"
    assert done.stderr == ""


def test_help_and_wrong_flags(tmp_path: Path) -> None:
    shown = run_cli("doctor", "-h", check=0).stdout
    for word in ("--hf_dir", "--quick", "--values", "--json", "example:", "mm-convert doctor"):
        assert word in shown
    assert run_cli("doctor", tmp_path, "--nonsense").returncode == 2
    assert run_cli("doctor").returncode == 2
    assert run_cli("doctor", tmp_path, "--workers", "-1").returncode == 2


# ------------------------------------------------------------------------------------ pages
def test_the_page_explains_every_finding() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (error|warning) \|", text, re.MULTILINE))
    assert rows == SEVERITY
    assert set(EXPLAINED) <= set(SEVERITY)


def test_the_sample_of_json_is_real(mm: Path) -> None:
    """The keys of the page are those of a report."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = text.split("## doctor")[1].split("\n## ")[0]
    sample = json.loads(section.split("```json\n")[1].split("```")[0])
    extra_rank(mm)
    report = json.loads(run_cli("doctor", "mm", "--json", cwd=mm.parent, check=3).stdout)
    assert report == sample
    listed = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert listed == sample.keys() | sample["findings"][0].keys()
