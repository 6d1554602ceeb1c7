"""Qwen-VL and MindSpore on the command line: every spelling, and what must be refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import mmconvert
import mscodec
from cli import run_cli
from commands import edit_json, litter, none, refused
from mmconvert import converters
from mmconvert.converters import qwenvl as qwenvl_table
from mmconvert.converters.family import Family
from mmconvert.formats.containers.ckpt import read_ckpt
from mmconvert.formats.mindspore.strategy import read_strategy
from mmconvert.playground.checkpoints import make_hf
from mmconvert.playground.qwenvl import PlaygroundSizes
from mmread import compare_hf, compare_side_files
from qwenvl import Tensors, devices, hf_to_ms, make_qwenvl, ms_to_hf, resplit_ms
from stopping import noted, stopped

HEAVY = {"overflow": 70000.0, "underflow": 1e-9}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwenvl(tmp_path_factory.mktemp("qwenvl") / "hf")


@pytest.fixture(scope="module")
def ckpt(hf: Path) -> Path:
    """The whole model in bfloat16, as in the source."""
    hf_to_ms(hf, hf.parent / "x.ckpt")
    return hf.parent / "x.ckpt"


@pytest.fixture(scope="module")
def ranks(ckpt: Path) -> Path:
    """Data parallel 2, model parallel 2."""
    resplit_ms(ckpt, ckpt.parent / "ranks", *devices(data_parallel=2, model_parallel=2))
    return ckpt.parent / "ranks"


def same(want: Path, got: Path) -> None:
    none(compare_hf(want, got) + compare_side_files(want, got))


# ------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_there_and_back_is_bit_for_bit(dtype: str, suffix: str, hf: Path, tmp_path: Path) -> None:
    hf_to_ms(hf, tmp_path / f"x.{suffix}", "--cfg.dtype", dtype)
    ms_to_hf(tmp_path / f"x.{suffix}", hf, tmp_path / "back", "--cfg.dtype", "bf16")
    same(hf, tmp_path / "back")


def test_the_guides_own_spelling(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    words = ["convert_weight", "--model", "qwenvl"]
    there = ["--input_path", hf, "--output_path", tmp_path / "x.ckpt", "--dtype", "fp16"]
    run_cli(*words, *there, check=0)
    hf_to_ms(hf, tmp_path / "y.ckpt", "--cfg.dtype", "fp16")
    assert (tmp_path / "x.ckpt").read_bytes() == (tmp_path / "y.ckpt").read_bytes()
    lines = ["convert_weight.py", "--model", "qwenvl", "--input_path", hf, "--dtype", "fp16"]
    run_cli(*lines, "--output_path", tmp_path / "z.ckpt", check=0)  # mm-convert for python
    assert (tmp_path / "z.ckpt").read_bytes() == (tmp_path / "y.ckpt").read_bytes()
    back = ["--reversed", "--input_path", ckpt, "--output_path", tmp_path / "back", "--hf_dir", hf]
    run_cli(*words, *back, check=0)
    same(hf, tmp_path / "back")


def test_flags_in_every_spelling(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text(
        f"cfg:\n  ms_path: {tmp_path / 'a.ckpt'}\n  hf_config:\n    hf_dir: {hf}\n"
    )
    run_cli("QwenVLConverter", "hf_to_ms", "--config", tmp_path / "flags.yaml", check=0)
    flags = [f"--cfg.ms-path={tmp_path / 'b.ckpt'}", f"--cfg.hf-config.hf-dir={hf}"]
    run_cli("QwenVLConverter", "hf_to_ms", *flags, "--dry-run", "False", check=0)
    for name in ("a.ckpt", "b.ckpt"):
        assert (tmp_path / name).read_bytes() == ckpt.read_bytes()


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("hf_to_ms", "--cfg.ms_path"),
        ("ms_to_hf", "--cfg.strategy"),
        ("resplit", "--cfg.target_parallel_config.vocab_emb_dp"),
    ],
)
def test_help(verb: str, words: str) -> None:
    done = run_cli("QwenVLConverter", verb, "-h", check=0)
    assert words in done.stdout and "example:" in done.stdout
    assert verb in run_cli("QwenVLConverter", "-h", check=0).stdout
    assert "--reversed" in run_cli("convert_weight", "-h", check=0).stdout


def test_modes_and_litter(hf: Path, ckpt: Path, ranks: Path) -> None:
    assert ckpt.stat().st_mode & 0o777 == 0o640
    assert not (ckpt.parent / "mmconvert.json").exists()
    assert json.loads((ranks / "mmconvert.json").read_text())["kind"] == "ms"
    assert litter(ckpt) == []


def test_the_checksum(ckpt: Path, hf: Path, tmp_path: Path) -> None:
    hf_to_ms(hf, tmp_path / "x.ckpt", "--crc")
    assert (tmp_path / "x.ckpt").read_bytes() == mscodec.with_crc(ckpt.read_bytes())
    damaged = bytearray((tmp_path / "x.ckpt").read_bytes())
    damaged[100_000] ^= 1
    (tmp_path / "y.ckpt").write_bytes(damaged)
    done = ms_to_hf(tmp_path / "y.ckpt", hf, tmp_path / "back", check=None)
    refused(done, 3, "CRC-32", out=tmp_path / "back")
    assert zlib.crc32(ckpt.read_bytes()) == read_ckpt(tmp_path / "x.ckpt").crc


# ------------------------------------------------------------------------------------- layouts
LAYOUTS = {
    "mp4": {"model_parallel": 4},
    "dp2 mp2 vocab_emb_dp": {"data_parallel": 2, "model_parallel": 2, "vocab_emb_dp": "True"},
    "optimizer": {
        "data_parallel": 2,
        "model_parallel": 2,
        "optimizer_parallel": "True",
        "optimizer_threshold": 0,
    },
    "pp3": {"pipeline_stage": 3, "model_parallel": 2},
    "uneven stages": {"llm_pp_layers": "[2,1]", "data_parallel": 2},
    "one rank": {"data_parallel": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, hf: Path, ckpt: Path, tmp_path: Path) -> None:
    resplit_ms(ckpt, tmp_path / "r", *devices(**LAYOUTS[layout]))
    run_cli("verify", hf, tmp_path / "r", check=0)
    resplit_ms(tmp_path / "r", tmp_path / "full.ckpt")
    assert (tmp_path / "full.ckpt").read_bytes() == ckpt.read_bytes()
    ms_to_hf(tmp_path / "r", hf, tmp_path / "back")
    same(hf, tmp_path / "back")


def test_from_hf_straight_to_ranks(hf: Path, ranks: Path, tmp_path: Path) -> None:
    prefix = "--cfg.parallel_config."
    flags = [f"{prefix}data_parallel", "2", f"{prefix}model_parallel", "2"]
    hf_to_ms(hf, tmp_path / "r", *flags)
    for path in sorted(ranks.rglob("*.ckpt")):
        assert (tmp_path / "r" / path.relative_to(ranks)).read_bytes() == path.read_bytes()


def test_strategies_that_users_bring(ckpt: Path, ranks: Path, tmp_path: Path) -> None:
    """Another strategy for the target, and one beside or apart from the source."""
    mp4 = tmp_path / "mp4"
    resplit_ms(ckpt, mp4, *devices(model_parallel=4))
    (mp4 / "strategy").rename(tmp_path / "elsewhere")
    given = ["--cfg.source_strategy", str(tmp_path / "elsewhere")]
    done = resplit_ms(mp4, tmp_path / "full.ckpt", check=None)
    refused(done, 3, "no strategy folder", "--cfg.source_strategy", out=tmp_path / "full.ckpt")
    target = ["--cfg.target_strategy", str(ranks / "strategy")]
    resplit_ms(mp4, tmp_path / "again", *given, *target)
    for path in sorted(ranks.rglob("checkpoint_*.ckpt")):
        assert (tmp_path / "again" / path.relative_to(ranks)).read_bytes() == path.read_bytes()
    (tmp_path / "elsewhere").rename(tmp_path / "strategy")  # beside the folder, as MindFormers
    resplit_ms(mp4, tmp_path / "full.ckpt")
    assert (tmp_path / "full.ckpt").read_bytes() == ckpt.read_bytes()


def test_any_model_by_its_strategy(tmp_path: Path, ranks: Path) -> None:
    """Names and slices come from the files alone."""
    tensors = [
        mscodec.tensor("backbone.dense.weight", "Float32", (8, 6)),
        mscodec.tensor("backbone.dense.bias", "Float16", (8,)),
        mscodec.tensor("global_step", "Int64", (1,)),
    ]
    (tmp_path / "x.ckpt").write_bytes(mscodec.ckpt(tensors))
    strategy = tmp_path / "s.json"
    layout = {"dev_matrix": [2], "tensor_map": [0, -1], "field": 0, "opt_weight_shard_step": 0}
    bias = {**layout, "tensor_map": [0]}
    strategy.write_text(
        json.dumps(
            {
                "current_stage": 1,
                "parallel_strategy_item": {"a": {"stage": 0, "parallel_strategy": []}},
                "parallel_layout_item": {
                    "backbone.dense.weight": layout,
                    "backbone.dense.bias": bias,
                },
            }
        )
    )
    done = resplit_ms(tmp_path / "x.ckpt", tmp_path / "r", "--cfg.target_strategy", str(strategy))
    assert "1 record of training left out" in done.stderr
    (part,) = [t for t in read_ckpt(tmp_path / "r/rank_1/checkpoint_1.ckpt").tensors if t.shape[1:]]
    content = part.path.read_bytes()[part.offset : part.offset + part.nbytes]
    assert content == tensors[0].data[len(tensors[0].data) // 2 :]
    resplit_ms(tmp_path / "r", tmp_path / "back.ckpt")
    assert (tmp_path / "back.ckpt").read_bytes() == mscodec.ckpt(tensors[:2])
    done = resplit_ms(tmp_path / "x.ckpt", tmp_path / "q", *devices(model_parallel=2), check=None)
    refused(done, 3, "backbone.dense", "no place in Qwen-VL", out=tmp_path / "q")


def test_the_merged_strategy_alone(ckpt: Path, tmp_path: Path) -> None:
    resplit_ms(ckpt, tmp_path / "r", *devices(pipeline_stage=3, data_parallel=2))
    merged = tmp_path / "merged.ckpt"
    (tmp_path / "r/strategy/merged_ckpt_strategy.ckpt").rename(merged)
    assert sorted(read_strategy(merged).stages) == [0, 1, 2]
    for path in (tmp_path / "r" / "strategy").iterdir():
        path.unlink()
    (tmp_path / "r" / "strategy").rmdir()
    resplit_ms(tmp_path / "r", tmp_path / "x.ckpt", "--cfg.source_strategy", str(merged))
    assert (tmp_path / "x.ckpt").read_bytes() == ckpt.read_bytes()


# ------------------------------------------------------------------------------ after training
def test_records_of_training_are_left_out(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    more = [
        mscodec.tensor("adam_m.llm_model.lm_head.weight", "Float32", (4, 2)),
        mscodec.tensor("adam_v.llm_model.lm_head.weight", "Float32", (4, 2)),
        mscodec.tensor("epoch_num", "Int64", (1,)),
        mscodec.tensor("loss_scale", "Float32", ()),
    ]
    (tmp_path / "x.ckpt").write_bytes(ckpt.read_bytes() + mscodec.ckpt(more))
    done = ms_to_hf(tmp_path / "x.ckpt", hf, tmp_path / "back")
    assert "4 records of training left out" in done.stderr
    same(hf, tmp_path / "back")


def test_differing_copies(ckpt: Path, ranks: Path, hf: Path, tmp_path: Path) -> None:
    """A norm that is not the same on all ranks."""
    run = ["cp", "-r", str(ranks), str(tmp_path / "r")]
    assert os.spawnvp(os.P_WAIT, "cp", run) == 0
    path = tmp_path / "r/rank_3/checkpoint_3.ckpt"
    (norm,) = [t for t in read_ckpt(path).tensors if t.name.endswith("ln_f.weight")]
    content = bytearray(path.read_bytes())
    content[norm.offset + 1] ^= 0x40
    path.chmod(0o600)
    path.write_bytes(content)
    done = ms_to_hf(tmp_path / "r", hf, tmp_path / "back", check=None)
    refused(done, 3, "ln_f.weight", "checkpoint_3.ckpt", out=tmp_path / "back")
    ms_to_hf(tmp_path / "r", hf, tmp_path / "back", "--replicas", "first")
    same(hf, tmp_path / "back")
    assert run_cli("verify", ckpt, tmp_path / "r").returncode == 1


# -------------------------------------------------------------------------------------- casting
def test_fp16_says_what_it_cost(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["transformer.ln_f.weight"][3] = HEAVY["overflow"]
        tensors["transformer.visual.transformer.resblocks.0.attn.out_proj.weight"][2, 5] = HEAVY[
            "underflow"
        ]

    hf = make_qwenvl(tmp_path / "hf", edit=edit)
    done = hf_to_ms(hf, tmp_path / "x.ckpt", "--cfg.dtype", "fp16", "--json")
    result = json.loads(done.stdout)
    (over,) = result["cast"]["overflowed"].values()
    (under,) = result["cast"]["underflowed"].values()
    assert (over, under) == (1, 1)
    assert "1 value overflowed to infinity" in done.stderr
    assert "1 value became zero" in done.stderr and "out_proj" in done.stderr


def test_a_dry_run_writes_nothing(hf: Path, tmp_path: Path) -> None:
    done = hf_to_ms(hf, tmp_path / "x.ckpt", "--dry-run", "--json")
    result = json.loads(done.stdout)
    assert result["written"] is False and len(result["targets"]) == result["tensors"] == 93
    assert list(tmp_path.iterdir()) == []
    done = hf_to_ms(hf, tmp_path / "x.ckpt", "--dry-run", "--cfg.dtype", "fp16")
    assert "cast: 93 tensors BF16 -> F16" in done.stdout


# -------------------------------------------------------------------------------------- sources
def test_bin_files_are_read_without_running_them(hf: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    evil = make_qwenvl(tmp_path / "evil", files=1, pickled=True)
    content: dict[str, object] = dict(torch.load(evil / "pytorch_model.bin"))
    torch.save({**content, "x": Evil()}, evil / "pytorch_model.bin")
    done = hf_to_ms(evil, tmp_path / "x.ckpt", check=None)
    refused(done, 3, "pytorch_model.bin", "'x'", out=tmp_path / "x.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_from_bin_and_back_to_safetensors(tmp_path: Path) -> None:
    hf = make_qwenvl(tmp_path / "hf", pickled=True)
    hf_to_ms(hf, tmp_path / "x.ckpt")
    done = ms_to_hf(tmp_path / "x.ckpt", hf, tmp_path / "back")
    assert "safetensors are written in their place" in done.stderr
    want = [torch.load(path) for path in sorted(hf.glob("*.bin"))]
    got = [load_file(path) for path in sorted((tmp_path / "back").glob("*.safetensors"))]
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == "model-00002-of-00002.safetensors"


def test_safetensors_win(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    both = make_qwenvl(tmp_path / "hf")
    make_qwenvl(both, pickled=True, edit=lambda tensors: tensors["lm_head.weight"].zero_())
    done = hf_to_ms(both, tmp_path / "x.ckpt")
    assert "are not read: pytorch_model-00001-of-00002.bin" in done.stderr
    assert (tmp_path / "x.ckpt").read_bytes() == ckpt.read_bytes()


def test_other_families_read_bin_too(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=2, vit_layers=2, shards=1)
    tensors = load_file(hf / "model.safetensors")
    flags = ["--cfg.parallel_config.tp_size", "2"]
    words = ["Qwen2VLConverter", "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir"]
    run_cli(*words, tmp_path / "a", *flags, check=0)
    (hf / "model.safetensors").unlink()
    torch.save(tensors, hf / "pytorch_model.bin")
    run_cli(*words, tmp_path / "b", *flags, check=0)
    run_cli("verify", tmp_path / "a", tmp_path / "b", check=0)


def test_buffers_are_left_out(ckpt: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["transformer.rotary_emb.inv_freq"] = torch.ones(4)

    done = hf_to_ms(make_qwenvl(tmp_path / "hf", edit=edit), tmp_path / "x.ckpt")
    assert "2 tensors left out (a buffer that the model computes)" in done.stderr
    assert (tmp_path / "x.ckpt").read_bytes() == ckpt.read_bytes()


# --------------------------------------------------------------------------------------- refused
def test_quantised_checkpoints(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for kind in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"transformer.h.0.attn.c_attn.{kind}"] = torch.zeros(2, dtype=torch.int32)

    hf = make_qwenvl(tmp_path / "hf", edit=edit)
    done = hf_to_ms(hf, tmp_path / "x.ckpt", check=None)
    refused(done, 3, "4 tensors of a quantised checkpoint", "qweight", out=tmp_path / "x.ckpt")


def test_text_only_qwen(tmp_path: Path) -> None:
    hf = make_qwenvl(tmp_path / "hf")
    text = json.loads((hf / "config.json").read_text())
    del text["visual"]
    (hf / "config.json").write_text(json.dumps(text))
    refused(hf_to_ms(hf, tmp_path / "x.ckpt", check=None), 3, "visual")


def test_unknown_and_missing_tensors(tmp_path: Path) -> None:
    more = make_qwenvl(tmp_path / "more", edit=lambda t: t.update({"value_head": torch.ones(2)}))
    done = hf_to_ms(more, tmp_path / "x.ckpt", check=None)
    refused(done, 3, "value_head", "--drop", out=tmp_path / "x.ckpt")
    hf_to_ms(more, tmp_path / "x.ckpt", "--drop", "value_*")
    less = make_qwenvl(tmp_path / "less", edit=lambda t: t.pop("transformer.h.1.ln_2.weight"))
    refused(hf_to_ms(less, tmp_path / "y.ckpt", check=None), 3, "transformer.h.1.ln_2.weight")
    bent = make_qwenvl(tmp_path / "bent", settings={"visual": {"heads": 3, "layers": 2}})
    refused(hf_to_ms(bent, tmp_path / "y.ckpt", check=None), 3, "visual has no width")


def test_impossible_outputs(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, list[str], str]] = [
        (tmp_path / "x", [], "does not end in .ckpt"),
        (tmp_path / "x.ckpt", ["--cfg.format", "safetensors"], "ends in .ckpt"),
        (tmp_path / "x.safetensors", ["--crc"], "safetensors have none"),
        (tmp_path / "x.ckpt", ["--cfg.parallel_config.model_parallel", "2"], "has 2 ranks"),
        (tmp_path / "x", ["--cfg.parallel_config.model_parallel", "8"], "4 attention heads"),
        (tmp_path / "x", ["--cfg.parallel_config.pipeline_stage", "2"], "llm_pp_layers"),
        (tmp_path / "x", ["--cfg.parallel_config.data_parallel", "0"], "data_parallel is 0"),
        (hf / "x.ckpt", [], "is inside the input"),
        (ckpt, [], "exists"),
        (hf, ["--cfg.format", "ckpt"], "is the input"),
        (tmp_path / "x.ckpt", ["--max-shard-size", "1GB"], "--max-shard-size"),
        (tmp_path / "x.ckpt", ["--cfg.dtype", "fp16", "--dtype", "bf16"], "differ"),
    ]
    for path, flags, words in cases:
        refused(hf_to_ms(hf, path, *flags, check=None), 2, words)
    (tmp_path / "folder.ckpt").mkdir()
    done = hf_to_ms(hf, tmp_path / "folder.ckpt", "--overwrite", check=None)
    refused(done, 2, "is a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.ckpt"]


def test_overwriting(hf: Path, ckpt: Path, ranks: Path, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"old")
    hf_to_ms(hf, tmp_path / "x.ckpt", "--overwrite")
    assert (tmp_path / "x.ckpt").read_bytes() == ckpt.read_bytes()
    for size in (4, 2):
        resplit_ms(ckpt, tmp_path / "r", *devices(model_parallel=size), "--overwrite")
    assert sorted(path.name for path in (tmp_path / "r").glob("rank_*")) == ["rank_0", "rank_1"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done = resplit_ms(ckpt, tmp_path / "mine", "--overwrite", check=None)
    refused(done, 2, "does not look like a checkpoint")


def _cut(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1000])


def _second(path: Path) -> None:
    (path.parent / "other.ckpt").write_bytes(path.read_bytes())


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "cut": (lambda r: _cut(r / "rank_1/checkpoint_1.ckpt"), ("rank_1", "at byte")),
    "no rank 2": (lambda r: (r / "rank_2").rename(r / "old"), ("rank_2",)),
    "no last rank": (lambda r: (r / "rank_3").rename(r / "old"), ("3 ranks", "4")),
    "two files": (lambda r: _second(r / "rank_0/checkpoint_0.ckpt"), ("2 weight files",)),
    "no file": (lambda r: (r / "rank_0/checkpoint_0.ckpt").unlink(), ("0 weight files",)),
    "a damaged strategy": (
        lambda r: _cut_strategy(r / "strategy/ckpt_strategy_rank_0.ckpt"),
        ("ckpt_strategy_rank_0.ckpt",),
    ),
}


def _cut_strategy(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ranks(damage: str, ranks: Path, hf: Path, tmp_path: Path) -> None:
    run = ["cp", "-r", str(ranks), str(tmp_path / "r")]
    assert os.spawnvp(os.P_WAIT, "cp", run) == 0
    spoil, words = DAMAGES[damage]
    spoil(tmp_path / "r")
    done = ms_to_hf(tmp_path / "r", hf, tmp_path / "back", check=None)
    assert done.returncode in (2, 3)
    refused(done, done.returncode, *words, out=tmp_path / "back")


def test_a_lone_slice_is_no_checkpoint(ranks: Path, hf: Path, tmp_path: Path) -> None:
    one = ranks / "rank_0" / "checkpoint_0.ckpt"
    done = ms_to_hf(one, hf, tmp_path / "back", check=None)
    refused(done, 3, "[128, 128]", "[256, 128]", "folder above rank_0", out=tmp_path / "back")
    (tmp_path / "r").mkdir()
    for name in ("rank_0", "strategy"):
        (tmp_path / "r" / name).symlink_to(ranks / name)
    done = resplit_ms(tmp_path / "r", tmp_path / "x.ckpt", check=None)
    refused(done, 2, "1 ranks", "4", out=tmp_path / "x.ckpt")


@pytest.mark.parametrize("given", [{}, {"model_parallel": 2}], ids=["file", "ranks"])
def test_slices_by_another_layouts_strategy(
    given: dict[str, int], ckpt: Path, ranks: Path, hf: Path, tmp_path: Path
) -> None:
    """As many ranks, slices that fit each other, and wholes that are too large."""
    plain, four = tmp_path / "plain", tmp_path / "four"
    resplit_ms(ckpt, plain, *devices(data_parallel=4))
    resplit_ms(ckpt, four, *devices(model_parallel=4))
    out = tmp_path / ("x" if given else "x.ckpt")
    for source, strategy in ((ranks, four), (plain, four), (plain, ranks)):
        words = ["--cfg.source_strategy", str(strategy / "strategy"), *devices(**given)]
        for more in ([], ["--cfg.hf_config.hf_dir", str(hf)]):
            done = resplit_ms(source, out, *words, *more, check=None)
            refused(done, 3, "as a whole", "its own strategy files", out=out)
    one = ranks / "rank_0" / "checkpoint_0.ckpt"
    refused(resplit_ms(one, out, *devices(**given), check=None), 3, "the file of one rank", out=out)


def test_a_padded_vocabulary(ckpt: Path, hf: Path, tmp_path: Path) -> None:
    """MindFormers can pad embedding and output layer: config.json does not know of it."""
    padded = make_qwenvl(tmp_path / "hf", PlaygroundSizes(vocab=512))
    hf_to_ms(padded, tmp_path / "x.ckpt")
    words = ["--cfg.hf_config.hf_dir", str(hf), *devices(model_parallel=2)]
    resplit_ms(tmp_path / "x.ckpt", tmp_path / "r", *words)


def test_roundtrip(hf: Path, tmp_path: Path) -> None:
    """Three usual layouts, and one that is given."""
    found = json.loads(run_cli("roundtrip", hf, "--json", check=0).stdout)
    assert [layout["name"] for layout in found["layouts"]] == [
        "complete",
        "mp2",
        "dp2 pp2 optimizer",
    ]
    assert all(layout["equal"] for layout in found["layouts"])
    (tmp_path / "two.yaml").write_text("model_parallel: 2\ndata_parallel: 2\n")
    found = json.loads(run_cli("roundtrip", hf, "--layout", tmp_path / "two.yaml", "--json").stdout)
    (only,) = found["layouts"]
    assert only["equal"] and only["layout"]["data_parallel"] == 2


def test_the_python_api(hf: Path, tmp_path: Path) -> None:
    layout = {"model_parallel": 2, "data_parallel": 2}
    mmconvert.hf_to_ms(hf, tmp_path / "ranks", layout, options=mmconvert.Options(digests=True))
    mmconvert.reshard(tmp_path / "ranks", tmp_path / "x.ckpt")
    mmconvert.reshard(
        tmp_path / "x.ckpt", tmp_path / "two", layout, options=mmconvert.Options(digests=True)
    )
    mmconvert.ms_to_hf(
        tmp_path / "ranks", hf, tmp_path / "back", options=mmconvert.Options(digests=True)
    )
    same(hf, tmp_path / "back")
    assert mmconvert.verify(tmp_path / "two", hf).equal
    for other in ("two", "back"):
        quick = run_cli("verify", tmp_path / "ranks", tmp_path / other, "--quick", "--json")
        found = json.loads(quick.stdout)
        assert (found["equal"], found["by_digest"]) == (True, True), other
    whole, ranks = mmconvert.open(tmp_path / "x.ckpt"), mmconvert.open(tmp_path / "ranks")
    assert whole.keys() == ranks.keys()
    for name in whole:
        assert torch.equal(whole[name], ranks[name]), name


def test_auto_converter(hf: Path, ranks: Path, tmp_path: Path) -> None:
    """The family is told by the checkpoint, and the flags of resplit by the source."""
    out = ("--cfg.ms_path", tmp_path / "x.ckpt")
    run_cli("AutoConverter", "hf_to_ms", "--cfg.hf_config.hf_dir", hf, *out, check=0)
    flags = ("--cfg.source_dir", ranks, "--cfg.target_dir", tmp_path / "y.ckpt")
    run_cli("AutoConverter", "resplit", *flags, check=0)
    assert (tmp_path / "x.ckpt").read_bytes() == (tmp_path / "y.ckpt").read_bytes()
    back = ("--cfg.save_hf_dir", tmp_path / "back", "--cfg.hf_config.hf_dir", hf)
    run_cli("AutoConverter", "ms_to_hf", "--cfg.ms_path", ranks, *back, check=0)
    same(hf, tmp_path / "back")


def test_flags_of_resplit_fit_the_source(ranks: Path) -> None:
    """Help shows those that will be taken, and how to see the others."""
    plain = run_cli("AutoConverter", "resplit", "-h", check=0).stdout
    assert "source_parallel_config" in plain
    words = " ".join(plain.split())  # lines of a terminal
    assert "--cfg.source_dir X.ckpt -h shows the flags for MindSpore" in words
    for source in ("X.ckpt", ranks):
        shown = run_cli("AutoConverter", "resplit", "--cfg.source_dir", source, "-h", check=0)
        assert "--cfg.target_strategy" in shown.stdout
        assert "source_parallel_config" not in shown.stdout


def test_a_family_of_another_package(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose names are MindFormers' goes the MindSpore way, whatever its class."""
    parts = {field.name: getattr(qwenvl_table.FAMILY, field.name) for field in fields(Family)}
    own = {"name": "Mine", "converter": "MineConverter", "model_types": frozenset({"mine"})}
    entry = SimpleNamespace(value="mine", load=lambda: Family(**parts | own))
    monkeypatch.setattr(converters, "third_party", lambda: {"MineConverter": entry})
    mine = tmp_path / "hf"
    shutil.copytree(hf, mine)
    edit_json(mine / "config.json", lambda config: config.update(model_type="mine"))
    out, source = tmp_path / "x.ckpt", ("--cfg.hf_config.hf_dir", mine)
    run_cli("AutoConverter", "hf_to_ms", *source, "--cfg.ms_path", out, check=0)
    back = ("--cfg.ms_path", out, *source, "--cfg.save_hf_dir", tmp_path / "back")
    run_cli("MineConverter", "ms_to_hf", *back, check=0)
    same(mine, tmp_path / "back")
    assert "checkpoint of Mine" in run_cli("doctor", mine).stdout


def test_digests_of_one_file_have_no_place(hf: Path, tmp_path: Path) -> None:
    words = ("--cfg.hf_config.hf_dir", hf, "--cfg.ms_path", tmp_path / "x.ckpt", "--digests")
    refused(run_cli("QwenVLConverter", "hf_to_ms", *words), 2, "--digests", "mmconvert.json")


def test_doctor_tells_the_family(hf: Path) -> None:
    assert "Qwen-VL" in run_cli("doctor", hf).stdout


@pytest.mark.parametrize("files", [1, 2])
def test_doctor_reads_bin_files(files: int, tmp_path: Path) -> None:
    """As the hub has Qwen-VL: no safetensors, no configuration of an image processor."""
    sound = make_qwenvl(tmp_path / "hf", files=files, pickled=True)
    report = json.loads(run_cli("doctor", sound, "--values", "--json", check=0).stdout)
    assert (report["findings"], report["tensors"], report["files"]) == ([], 69, files)
    name = "pytorch_model-00002-of-00002.bin" if files > 1 else "pytorch_model.bin"
    os.truncate(sound / name, 5000)
    report = json.loads(run_cli("doctor", sound, "--json", check=3).stdout)
    assert [f["id"] for f in report["findings"]] == ["truncated-weight-file"]


def test_doctor_examines_mindspore(hf: Path, ckpt: Path, ranks: Path, tmp_path: Path) -> None:
    """By the reader of conversions, whose faults are all collected."""
    for path in (ckpt, ranks):
        found = json.loads(run_cli("doctor", path, "--values", "--json", check=0).stdout)
        assert (found["kind"], found["family"], found["findings"]) == ("ms", "Qwen-VL", [])
    assert "healthy" in run_cli("doctor", ranks, "--hf_dir", hf).stdout
    shutil.copytree(ranks, tmp_path / "ill")
    for rank in (1, 2):
        path = tmp_path / "ill" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"
        path.write_bytes(path.read_bytes()[:-100])
    found = json.loads(run_cli("doctor", tmp_path / "ill", "--json", check=3).stdout)
    whats = [finding["what"] for finding in found["findings"]]
    assert all(any(f"checkpoint_{rank}.ckpt" in what for what in whats) for rank in (1, 2))


def test_a_ckpt_of_lightning(tmp_path: Path) -> None:
    """The ending is MindSpore's, the file is not: doctor says so, and so does a conversion."""
    path = tmp_path / "epoch.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "pytorch-lightning_version": "2.0"}, path)
    found = json.loads(run_cli("doctor", path, "--json", check=3).stdout)
    assert found["kind"] == "mm_rank_file"
    assert "pytorch-lightning_version" in found["findings"][0]["what"]
    words = ("--cfg.source_dir", path, "--cfg.target_dir", tmp_path / "x.ckpt")
    refused(run_cli("QwenVLConverter", "resplit", *words), 3, "zip archive", "Lightning")


def test_what_is_no_such_checkpoint(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    torch_file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, torch_file)
    (tmp_path / "torch.ckpt").write_bytes(torch_file.getvalue())
    for name, words in [
        ("text.ckpt", "text.ckpt"),
        ("torch.ckpt", "torch.save"),
        ("empty", "rank_R"),
        ("absent.ckpt", "does not exist"),
        ("hf", ""),
    ]:
        path = hf if name == "hf" else tmp_path / name
        done = ms_to_hf(path, hf, tmp_path / "back", check=None)
        refused(done, 3, words, out=tmp_path / "back")


def test_another_models_checkpoint(ckpt: Path, tmp_path: Path) -> None:
    other = make_qwenvl(tmp_path / "hf", PlaygroundSizes(layers=2))
    done = ms_to_hf(ckpt, other, tmp_path / "back", check=None)
    refused(done, 3, "3 llm layers", "2", out=tmp_path / "back")
    wide = make_qwenvl(tmp_path / "wide", PlaygroundSizes(vocab=512))
    done = ms_to_hf(ckpt, wide, tmp_path / "back", check=None)
    refused(done, 3, "[256, 128]", "[512, 128]", out=tmp_path / "back")


def test_models_and_verbs_that_are_not_there(hf: Path, tmp_path: Path) -> None:
    words = ["--input_path", hf, "--output_path", tmp_path / "x.ckpt"]
    refused(run_cli("convert_weight", "--model", "llama", *words), 2, "llama", "qwenvl")
    refused(run_cli("convert_weight", "--model", "qwenvl", "--reversed", *words), 2, "--hf_dir")
    done = run_cli("convert_weight", "--model", "qwenvl", "--hf_dir", hf, *words)
    refused(done, 2, "--reversed")
    refused(run_cli("QwenVLConverter", "hf_to_mm"), 2, "hf_to_ms")
    done = run_cli(
        "Qwen2VLConverter", "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", "x"
    )
    refused(done, 3, "use QwenVLConverter")


# ------------------------------------------------------------------------------------- stopping
def test_killed_and_run_again(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """Nothing under the final name; the next run goes on, and writes the same bytes."""
    words = ["QwenVLConverter", "hf_to_ms", "--cfg.hf_config.hf_dir", hf, "--workers", "1"]
    words += ["--cfg.ms_path", tmp_path / "x.ckpt"]
    stopped(*words)
    assert not (tmp_path / "x.ckpt").exists()
    assert noted(tmp_path / "x.ckpt") == 1
    done = run_cli(*words, check=0)
    assert "interrupted run" in done.stderr
    assert (tmp_path / "x.ckpt").read_bytes() == ckpt.read_bytes()
    assert litter(tmp_path / "x.ckpt") == []


# --------------------------------------------------------------------------- looking at checkpoints
def test_verify_and_diff(hf: Path, ckpt: Path, ranks: Path, tmp_path: Path) -> None:
    for a, b in [(hf, ckpt), (ckpt, ranks), (ranks, hf), (hf, hf)]:
        assert "equal: 93 tensors" in run_cli("verify", a, b, check=0).stdout
        run_cli("diff", a, b, check=0)
    other = make_qwenvl(tmp_path / "hf", edit=lambda t: t["lm_head.weight"].mul_(2))
    done = run_cli("verify", other, ranks, check=1)
    assert "llm_model.lm_head.weight" in done.stdout
    done = run_cli("verify", make_hf("qwen2vl-2b", tmp_path / "q", layers=1), ckpt)
    refused(done, 3, "cannot be stored as MindSpore")


def test_inspect(hf: Path, ckpt: Path, ranks: Path) -> None:
    for path, kind, count in [(ckpt, "ms_file", 93), (ranks, "ms", 4 * 93), (hf, "hf", 69)]:
        found = json.loads(run_cli("inspect", path, "--json", check=0).stdout)
        assert (found["kind"], found["family"], found["tensors"]) == (kind, "Qwen-VL", count)
        assert found["parameters"] == 643_584
    assert "text 0-2" in run_cli("inspect", ranks, check=0).stdout
