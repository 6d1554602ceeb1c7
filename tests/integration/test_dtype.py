"""``--dtype``: every tensor is what torch makes of the one that is written without it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import Tensors, edit_rank, layout, litter, rank_files, target
from inprocess import Done, call, converter_of, to_hf, to_mm, to_other
from mmconvert.playground.checkpoints import make_hf, nested_config
from mmread import tensor_data
from nights import in_turns

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EVERY = pytest.mark.parametrize("dtype", DTYPES)

LARGE, SMALL = 1e30, 1e-30  # past what float16 holds, on both sides; bfloat16 holds both
SPOILED = {  # tensor -> its elements that float16 cannot hold
    "model.embed_tokens.weight": {(0, 0): LARGE, (-1, -1): -LARGE},  # rows divided; tied
    "model.norm.weight": {(0,): LARGE, (1,): -SMALL},  # the same on all ranks
    "model.layers.1.mlp.down_proj.weight": {(0, 0): SMALL, (-1, -1): -LARGE},  # columns divided
    "model.layers.0.self_attn.q_proj.weight": {(2, 3): LARGE},  # one of a packed three
    "visual.blocks.1.attn.qkv.weight": {(5, 0): SMALL},  # interleaved
    "visual.merger.mlp.2.bias": {(0,): LARGE},
}
OVERFLOWED = {"embed_tokens": 2, "norm": 1, "down_proj": 1, "q_proj": 1, "merger.mlp.2.bias": 1}
UNDERFLOWED = {"norm": 1, "down_proj": 1, "attn.qkv": 1}


class Source(NamedTuple):
    """A model in both formats."""

    model: str
    hf: Path
    mm: Path


def spoil(hf: Path) -> Path:
    """Put values that float16 cannot hold among all kinds of tensors."""
    for path in hf.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & SPOILED.keys():
            for index, value in SPOILED[name].items():
                tensors[name][index] = value
        save_file(tensors, path, metadata={"format": "pt"})
    return hf


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Qwen2-VL in bf16, with tied embeddings, and values that float16 cannot hold."""
    folder = tmp_path_factory.mktemp("qwen")
    hf = spoil(make_hf("qwen2vl-2b", folder / "hf", layers=4, vit_layers=2))
    to_mm("qwen2vl-2b", hf, folder / "mm", *layout("[2,2]", "[2,0]", 2))
    return Source("qwen2vl-2b", hf, folder / "mm")


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Qwen2.5-Omni: MM has biases of zeros that HF lacks; speech parts are carried."""
    folder = tmp_path_factory.mktemp("omni")
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 2, "audio_layers": 2}
    hf = make_hf("qwen2.5omni-7b", folder / "hf", shards=2, **sizes)
    flags = layout("[1,1]", "[2,0]", 2, "audio_pp_layers=[2,0]")
    to_mm("qwen2.5omni-7b", hf, folder / "mm", *flags)
    return Source("qwen2.5omni-7b", hf, folder / "mm")


def weights(folder: Path) -> dict[str, Tensors]:
    """All tensors of a checkpoint in either format, by file."""
    if (folder / "config.json").is_file():
        return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    found: dict[str, Tensors] = {}
    for rank, path in rank_files(folder).items():
        for part, tensors in torch.load(path, weights_only=True).items():
            if isinstance(tensors, dict):
                found[f"{rank}/{part}"] = tensors
    return found


def check_cast(plain: Path, cast: Path, dtype: torch.dtype) -> int:
    """`cast` holds the tensors of `plain` as torch casts them; returns how many changed."""
    before, found = weights(plain), weights(cast)
    assert found.keys() == before.keys()
    changed = 0
    for file, tensors in before.items():
        assert found[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            kind = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            expected = tensor.to(dtype) if kind else tensor
            got = found[file][name]
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
            assert tensor_data(got) == tensor_data(expected), name
            changed += expected.dtype != tensor.dtype
    assert litter(cast) == []
    return changed


# ---------------------------------------------------------------------- three directions
QWEN_LAYOUTS = {
    "tp1": ("[4]", "[2]", 1),
    "tp2 pp2": ("[2,2]", "[2,0]", 2),
    "vpp2": ("[[1,1],[1,1]]", "[[2,0],[0,0]]", 2),
    "vit tp1": ("[0,4]", "[1,1]", 2, "vit_tp_size=1"),
}


@pytest.mark.parametrize(("dtype", "shape"), in_turns([*DTYPES], [*QWEN_LAYOUTS]))
def test_to_mm(shape: str, dtype: str, qwen: Source, tmp_path: Path) -> None:
    plain, cast = tmp_path / "plain", tmp_path / "cast"
    to_mm(qwen.model, qwen.hf, plain, *layout(*QWEN_LAYOUTS[shape]))
    to_mm(qwen.model, qwen.hf, cast, *layout(*QWEN_LAYOUTS[shape]), "--dtype", dtype)
    assert (check_cast(plain, cast, DTYPES[dtype]) == 0) == (dtype == "bf16")


@pytest.mark.parametrize(("shape", "dtype"), in_turns([*QWEN_LAYOUTS], [*reversed(DTYPES)]))
def test_to_another_layout(shape: str, dtype: str, qwen: Source, tmp_path: Path) -> None:
    plain, cast = tmp_path / "plain", tmp_path / "cast"
    to_other(qwen.model, qwen.mm, plain, *target(*QWEN_LAYOUTS[shape]))
    to_other(qwen.model, qwen.mm, cast, *target(*QWEN_LAYOUTS[shape]), "--dtype", dtype)
    assert (check_cast(plain, cast, DTYPES[dtype]) == 0) == (dtype == "bf16")


@EVERY
def test_to_hf(dtype: str, qwen: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    to_hf(qwen.model, qwen.mm, qwen.hf, out, "--dtype", dtype)
    assert (check_cast(qwen.hf, out, DTYPES[dtype]) == 0) == (dtype == "bf16")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    old = json.loads((qwen.hf / "model.safetensors.index.json").read_text())
    total = sum(t.nbytes for tensors in weights(out).values() for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == old["weight_map"]


@EVERY
def test_omni(dtype: str, omni: Source, tmp_path: Path) -> None:
    """Zeros that are filled in stay zeros, and carried tensors are cast like the others."""
    flags = layout("[2]", "[2]", 2, "audio_pp_layers=[2]")
    plain, cast, back = tmp_path / "plain", tmp_path / "cast", tmp_path / "back"
    to_mm(omni.model, omni.hf, plain, *flags)
    to_mm(omni.model, omni.hf, cast, *flags, "--dtype", dtype)
    check_cast(plain, cast, DTYPES[dtype])
    to_hf(omni.model, omni.mm, omni.hf, back, "--dtype", dtype)
    check_cast(omni.hf, back, DTYPES[dtype])


def test_there_and_back_through_fp32(qwen: Source, tmp_path: Path) -> None:
    """A cast that loses nothing can be undone."""
    wide, back = tmp_path / "wide", tmp_path / "back"
    to_mm(qwen.model, qwen.hf, wide, *layout("[2,2]", "[2,0]", 2), "--dtype", "fp32")
    done = to_hf(qwen.model, wide, qwen.hf, back, "--dtype", "bf16")
    check_cast(qwen.hf, back, torch.bfloat16)
    for path in qwen.hf.rglob("*"):  # headers, index and config.json too
        if path.is_file():
            assert (back / path.relative_to(qwen.hf)).read_bytes() == path.read_bytes(), path
    assert "warning" not in done.stderr


def test_views_are_cast(qwen: Source, tmp_path: Path) -> None:
    """Of a tensor that lies column by column in its file."""
    mm = tmp_path / "mm"
    to_mm(qwen.model, qwen.hf, mm, *layout("[4]", "[2]"))
    plain, cast = tmp_path / "plain", tmp_path / "cast"
    to_other(qwen.model, mm, plain, *target("[4]", "[2]", 2))

    def turn(content: dict) -> None:
        for name, tensor in content["model"].items():
            if tensor.ndim == 2:
                content["model"][name] = tensor.t().contiguous().t()

    edit_rank(mm, "mp_rank_00", turn)
    to_other(qwen.model, mm, cast, *target("[4]", "[2]", 2), "--dtype", "fp16")
    assert check_cast(plain, cast, torch.float16)


# ------------------------------------------------------------------------ what was lost
def losses(done: Done) -> dict[str, dict[str, int]]:
    """The report of ``--json``, by tensor, summed over the places that hold parts of it."""
    report = json.loads(done.stdout)["cast"]
    found: dict[str, dict[str, int]] = {}
    for kind in ("overflowed", "underflowed"):
        found[kind] = {}
        for place, count in report[kind].items():
            name = place.split(" in ")[0]
            found[kind][name] = found[kind].get(name, 0) + count
    return found


def matches(found: dict[str, int], expected: dict[str, int]) -> bool:
    """Each expected part of a name stands in one tensor's, with its count."""
    counts = {
        part: sum(count for name, count in found.items() if name.endswith((part, part + ".weight")))
        for part in expected
    }
    return counts == expected and sum(found.values()) == sum(expected.values())


@pytest.mark.parametrize("shape", QWEN_LAYOUTS.values(), ids=QWEN_LAYOUTS.keys())
def test_the_report(shape: tuple[Any, ...], qwen: Source, tmp_path: Path) -> None:
    """A value counts once, however many ranks and stages it is written to."""
    flags = [*layout(*shape), "--dtype", "fp16"]
    done = to_mm(qwen.model, qwen.hf, tmp_path / "json", *flags, "--json")
    found = losses(done)
    assert matches(found["overflowed"], OVERFLOWED), found
    assert matches(found["underflowed"], UNDERFLOWED), found
    assert json.loads(done.stdout)["cast"]["dtype"] == "F16"
    over, under = (line for line in done.stderr.splitlines() if "cast" in line)
    assert over.startswith("warning: ") and "6 values overflowed to infinity" in over
    assert "in 5 tensors" in over and "model.embed_tokens.weight" in over and "(2)" in over
    assert under.startswith("warning: ") and "3 values became zero" in under
    manifest = json.loads((tmp_path / "json" / "mmconvert.json").read_text())
    assert manifest["cast"] == json.loads(done.stdout)["cast"]


def test_the_report_of_other_directions(qwen: Source, tmp_path: Path) -> None:
    hf = to_hf(qwen.model, qwen.mm, qwen.hf, tmp_path / "hf", "--dtype", "fp16", "--json")
    flags = [*target("[1,1,1,1]", "[2,0,0,0]"), "--dtype", "fp16", "--json"]
    mm = to_other(qwen.model, qwen.mm, tmp_path / "mm", *flags)
    for done in (hf, mm):
        found = losses(done)
        assert sum(found["overflowed"].values()) == sum(OVERFLOWED.values()), found
        assert sum(found["underflowed"].values()) == sum(UNDERFLOWED.values()), found


def test_no_loss_no_report(qwen: Source, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        done = to_mm(qwen.model, qwen.hf, tmp_path / dtype, "--dtype", dtype, "--json")
        report = {"dtype": "F32" if dtype == "fp32" else "BF16"}
        assert json.loads(done.stdout)["cast"] == {**report, "overflowed": {}, "underflowed": {}}
        assert "warning" not in done.stderr
    done = to_mm(qwen.model, qwen.hf, tmp_path / "keep", "--json", "--dtype", "keep")
    assert json.loads(done.stdout)["cast"]["dtype"] is None


def test_quiet_keeps_the_json(qwen: Source, tmp_path: Path) -> None:
    done = to_mm(qwen.model, qwen.hf, tmp_path / "mm", "--dtype", "fp16", "--quiet", "--json")
    assert done.stderr == ""
    assert sum(losses(done)["overflowed"].values()) == 6


def test_many_threads_count_alike(qwen: Source, tmp_path: Path) -> None:
    flags = [*layout("[2,2]", "[2,0]", 2), "--dtype", "fp16", "--json", "--workers"]
    one = to_mm(qwen.model, qwen.hf, tmp_path / "one", *flags, "1")
    many = to_mm(qwen.model, qwen.hf, tmp_path / "many", *flags, "64")
    assert losses(one) == losses(many)
    for rank, path in rank_files(tmp_path / "one").items():
        assert rank_files(tmp_path / "many")[rank].read_bytes() == path.read_bytes()


# ------------------------------------------------------------------------- config.json
def dtype_entries(value: Any, path: str = "") -> dict[str, str]:
    """Every dtype that a config names, at any depth."""
    if not isinstance(value, dict):
        return {}
    found = {f"{path}{k}": v for k, v in value.items() if k in ("torch_dtype", "dtype")}
    for key, inner in value.items():
        found |= dtype_entries(inner, f"{path}{key}.")
    return found


def without_dtypes(value: Any) -> Any:
    if isinstance(value, dict):
        names = ("torch_dtype", "dtype")
        return {k: without_dtypes(v) for k, v in value.items() if k not in names}
    return value


CONFIGS: dict[str, tuple[str, dict[str, Any], int]] = {
    # model, how it is made, number of dtypes that its config names
    "flat": ("qwen2vl-2b", {}, 1),
    "nested": ("qwen2.5vl-7b", {"edit_config": nested_config}, 2),
    "omni": ("qwen2.5omni-7b", {"audio_layers": 1}, 3),
    "internvl": ("internvl2-1b", {}, 3),
}


@pytest.mark.parametrize(("model", "made", "number"), CONFIGS.values(), ids=CONFIGS.keys())
def test_config_follows(model: str, made: dict[str, Any], number: int, tmp_path: Path) -> None:
    hf = make_hf(model, tmp_path / "hf", layers=1, vit_layers=1, shards=1, **made)
    audio = ["--cfg.parallel_config.audio_pp_layers", "[1]"] if "omni" in model else []
    to_mm(model, hf, tmp_path / "mm", *layout("[1]", "[1]"), *audio)
    old = json.loads((hf / "config.json").read_text())
    assert len(dtype_entries(old)) == number
    for dtype, name in TORCH_NAMES.items():
        out = tmp_path / dtype
        to_hf(model, tmp_path / "mm", hf, out, "--dtype", dtype)
        new = json.loads((out / "config.json").read_text())
        assert dtype_entries(new) == dict.fromkeys(dtype_entries(old), name)
        assert without_dtypes(new) == without_dtypes(old)
    to_hf(model, tmp_path / "mm", hf, tmp_path / "keep")
    assert (tmp_path / "keep" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_transformers_loads_it_in_that_dtype(dtype: str, tmp_path: Path) -> None:
    from tinymodels import CONVERTERS, save, tiny_model

    kind = "qwen2_vl"
    model = tiny_model(kind, dtype=torch.bfloat16)
    source = save(model, tmp_path / "source")
    words = ("--cfg.hf_config.hf_dir", source, "--cfg.mm_dir", tmp_path / "mm")
    call(CONVERTERS[kind], "hf_to_mm", *words, *layout("[2,2]", "[3,0]", 2))
    back = tmp_path / "back"
    call(CONVERTERS[kind], "mm_to_hf", *words, "--cfg.save_hf_dir", back, "--dtype", dtype)
    loaded, info = type(model).from_pretrained(back, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert loaded.dtype == DTYPES[dtype]
    before = model.state_dict()
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == DTYPES[dtype], name
        assert torch.equal(after[name], tensor.to(DTYPES[dtype])), name


# -------------------------------------------------------------------- odd tensors, odd words
ODD: Tensors = {
    "talker.position": torch.arange(5),
    "talker.mask": torch.tensor([[True, False]]),
    "talker.scale": torch.tensor(1e30, dtype=torch.float32),  # no dimensions
    "talker.none": torch.zeros(0, 3, dtype=torch.float32),
    "talker.bytes": torch.arange(7, dtype=torch.uint8),
    "talker.f8": torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "talker.double": torch.tensor([1 + 2**-8 + 2**-45, 1e-300, 5.0], dtype=torch.float64),
    "talker.half": torch.tensor([65504.0, 6e-8], dtype=torch.float16),
}


def odd_omni(omni: Source, folder: Path) -> Path:
    """The checkpoint with tensors of all kinds among those that are carried."""
    hf = Path(shutil.copytree(omni.hf, folder))
    path = sorted(hf.glob("*.safetensors"))[0]
    save_file({**load_file(path), **ODD}, path, metadata={"format": "pt"})
    index_path = hf / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] |= dict.fromkeys(ODD, path.name)
    index_path.write_text(json.dumps(index))
    return hf


@EVERY
def test_odd_tensors(dtype: str, omni: Source, tmp_path: Path) -> None:
    """No dimensions, no elements, integers, 8-bit floats, doubles: what is no float is kept."""
    hf, out = odd_omni(omni, tmp_path / "hf"), tmp_path / "out"
    done = to_hf(omni.model, omni.mm, hf, out, "--dtype", dtype, "--json")
    found = {name: t for tensors in weights(out).values() for name, t in tensors.items()}
    kind = DTYPES[dtype]
    for name, old in ODD.items():
        floats = name.rpartition(".")[2] in ("scale", "none", "double", "half")
        assert found[name].dtype == (kind if floats else old.dtype), name
        assert found[name].shape == old.shape, name
        if not floats:
            assert tensor_data(found[name]) == tensor_data(old), name
    lost = losses(done)
    assert ("talker.scale" in lost["overflowed"]) == (dtype == "fp16")
    assert lost["underflowed"]["talker.double"] == 1
    rounded = {"bf16": 1 + 2**-7, "fp16": 1 + 2**-8, "fp32": 1 + 2**-8}[dtype]
    assert found["talker.double"].tolist() == [rounded, 0.0, 5.0]


def test_a_source_in_f64(qwen: Source, tmp_path: Path) -> None:
    """Rounded once on its way through both formats, also where ranks take column blocks."""
    hf, name = tmp_path / "hf", "model.layers.0.mlp.down_proj.weight"
    hf.mkdir()
    for path in qwen.hf.iterdir():
        if path.suffix == ".safetensors":
            tensors = {n: t.double() for n, t in load_file(path).items()}
            if name in tensors:
                tensors[name][:] = 1 + 2**-8 + 2**-45
            save_file(tensors, hf / path.name, metadata={"format": "pt"})
        elif path.is_file():
            (hf / path.name).write_bytes(path.read_bytes())
    flags = layout("[2,2]", "[2,0]", 2)
    for kind in ("bf16", "fp32", "keep"):
        to_mm(qwen.model, hf, tmp_path / kind, *flags, "--dtype", kind)
    found = weights(tmp_path / "bf16")["mp_rank_01_000/model"]
    assert (found["text_decoder.decoder.layers.0.mlp.linear_fc2.weight"] == 1 + 2**-7).all()
    check_cast(tmp_path / "keep", tmp_path / "fp32", torch.float32)


def test_an_mm_checkpoint_in_fp32_to_hf(qwen: Source, tmp_path: Path) -> None:
    """Training in fp32: without --dtype a warning names config.json, with it there is no need."""
    wide = tmp_path / "wide"
    to_other(qwen.model, qwen.mm, wide, *target("[4]", "[2]"), "--dtype", "fp32")
    done = to_hf(qwen.model, wide, qwen.hf, tmp_path / "keep")
    assert "config.json still names its own dtype" in done.stderr
    done = to_hf(qwen.model, wide, qwen.hf, tmp_path / "cast", "--dtype", "fp32")
    assert done.stderr == ""
    entries = dtype_entries(json.loads((tmp_path / "cast" / "config.json").read_text()))
    assert entries == {"torch_dtype": "float32"}


@pytest.mark.parametrize("word", ["int8", "BF16", "fp8", "float16", "", "bf16,fp16"])
def test_other_words_are_refused(word: str, qwen: Source, tmp_path: Path) -> None:
    done = to_mm(qwen.model, qwen.hf, tmp_path / "mm", "--dtype", word, check=2)
    assert "dtype" in done.stderr and "bf16" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_requests(qwen: Source, tmp_path: Path) -> None:
    """``dtype`` stands in a --config file as on the command line."""
    config = tmp_path / "request.yaml"
    config.write_text(f"cfg:\n  mm_dir: {tmp_path / 'mm'}\ndtype: fp32\n")
    words = ("--config", config, "--cfg.hf_config.hf_dir", qwen.hf)
    call(converter_of(qwen.model), "hf_to_mm", *words)
    kinds = {t.dtype for tensors in weights(tmp_path / "mm").values() for t in tensors.values()}
    assert kinds == {torch.float32}


def test_nan_and_infinity_pass(tmp_path: Path) -> None:
    """They are values, and no losses."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=1, vit_layers=1, shards=1)
    patterns = struct.pack("<6H", 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x8000)
    raw = (hf / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    raw = raw[:start] + patterns + raw[start + len(patterns) :]
    (hf / "model.safetensors").write_bytes(raw)
    plain, cast = tmp_path / "plain", tmp_path / "cast"
    to_mm("qwen2vl-2b", hf, plain)
    done = to_mm("qwen2vl-2b", hf, cast, "--dtype", "fp16", "--json")
    assert losses(done) == {"overflowed": {}, "underflowed": {}}
    special = 0
    for tensors, others in zip(weights(plain).values(), weights(cast).values(), strict=True):
        for name, tensor in tensors.items():
            expected = tensor.half()
            assert torch.equal(others[name].isnan(), expected.isnan())
            assert torch.equal(others[name].nan_to_num(), expected.nan_to_num())
            special += int((~expected.isfinite()).sum())
    assert special == 5
