"""``--max-shard-size``: new weight files, and an index that fits them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from commands import layout, litter, none, refused, untouched
from inprocess import call, to_hf, to_mm, to_other
from mmconvert.errors import RequestError
from mmconvert.playground.checkpoints import make_hf
from mmconvert.words import parse_size
from mmread import INDEX, compare_side_files, read_weight_file, weight_files

OMNI = layout("[1]", "[1]", 1, "audio_pp_layers=[1]")


def omni(folder: Path) -> tuple[str, Path, Path]:
    hf = make_hf("qwen2.5omni-7b", folder / "hf", layers=1, vit_layers=1, audio_layers=1)
    to_mm("qwen2.5omni-7b", hf, folder / "mm", *OMNI)
    return "qwen2.5omni-7b", hf, folder / "mm"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A model of two weight files, in both formats."""
    folder = tmp_path_factory.mktemp("source")
    hf = make_hf("qwen2vl-2b", folder / "hf", layers=2, vit_layers=2)
    to_mm("qwen2vl-2b", hf, folder / "mm")
    return "qwen2vl-2b", hf, folder / "mm"


def rows(folder: Path) -> dict[str, object]:
    """Dtype, shape and digest of every tensor, whatever file holds it; each in one only."""
    found: dict[str, object] = {}
    for name in weight_files(folder):
        tensors = read_weight_file(folder / name)[1]
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def check(hf: Path, out: Path, limit: int) -> list[str]:
    """`out` holds the tensors of `hf` in files within the limit; returns the names of these."""
    names = sorted(weight_files(out))
    assert rows(out) == rows(hf)
    none(compare_side_files(hf, out))
    assert litter(out) == []
    for name in names:
        tensors = load_file(out / name)
        data = sum(t.nbytes for t in tensors.values())
        assert data <= limit or len(tensors) == 1, f"{name} holds {data} bytes"
        assert read_weight_file(out / name)[0] == {"format": "pt"}
    if len(names) == 1:
        assert names == ["model.safetensors"]
        assert not (out / INDEX).exists()
        return names
    count = len(names)
    assert names == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((out / INDEX).read_text())
    placed = {tensor: name for name in names for tensor in read_weight_file(out / name)[1]}
    assert index["weight_map"] == placed
    assert list(index["weight_map"]) == sorted(placed)
    sizes = (t.nbytes for name in names for t in load_file(out / name).values())
    assert index["metadata"]["total_size"] == sum(sizes)
    return names


@pytest.mark.parametrize(
    ("size", "limit"),
    [("5GB", 5e9), ("1.5GiB", 1.5 * 2**30), ("200KB", 2e5), ("100 KiB", 102400), ("1", 1)],
)
def test_sizes(size: str, limit: float, source: tuple[str, Path, Path], tmp_path: Path) -> None:
    model, hf, mm = source
    out = tmp_path / "out"
    to_hf(model, mm, hf, out, "--max-shard-size", size)
    names = check(hf, out, int(limit))
    assert len(names) == {"5GB": 1, "1.5GiB": 1, "1": len(rows(hf))}.get(size, len(names))
    assert (len(names) > 2) == (limit < 1e6)


def test_files_are_filled(source: tuple[str, Path, Path], tmp_path: Path) -> None:
    """The next tensor would not have fitted; the order is that of the original."""
    model, hf, mm = source
    to_hf(model, mm, hf, tmp_path / "out", "--max-shard-size", "150KB")
    names = check(hf, tmp_path / "out", 150_000)
    held = [list(header(tmp_path / "out" / name).values()) for name in names]
    for file, following in pairwise(held):
        assert sum(file) + following[0] > 150_000
    one, many = tmp_path / "one", tmp_path / "many"
    to_hf(model, mm, hf, one, "--max-shard-size", "5GB")
    to_hf(model, mm, hf, many, "--max-shard-size", "150KB")
    files = sorted(p.name for p in many.glob("*.safetensors"))
    order = [name for file in files for name in header(many / file)]
    assert order == list(header(one / "model.safetensors"))


def header(path: Path) -> dict[str, int]:
    """The bytes of each tensor of a weight file, in the order of their data."""
    raw = path.read_bytes()
    found = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    del found["__metadata__"]
    spans = sorted((entry["data_offsets"], name) for name, entry in found.items())
    return {name: end - start for (start, end), name in spans}


def test_without_it_files_are_those_of_hf_dir(
    source: tuple[str, Path, Path], tmp_path: Path
) -> None:
    model, hf, mm = source
    for number, flags in enumerate(([], ["--max-shard-size", ""])):
        out = tmp_path / str(number)
        to_hf(model, mm, hf, out, *flags)
        for name in [*weight_files(hf), INDEX]:
            assert (out / name).read_bytes() == (hf / name).read_bytes()


def test_from_one_file_to_many(tmp_path: Path) -> None:
    """Where there was no index, there is one now."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=1, vit_layers=1, shards=1)
    to_mm("qwen2vl-2b", hf, tmp_path / "mm")
    to_hf("qwen2vl-2b", tmp_path / "mm", hf, tmp_path / "out", "--max-shard-size", "100KB")
    assert len(check(hf, tmp_path / "out", 100_000)) > 2


def test_carried_tensors_have_a_place(tmp_path: Path) -> None:
    model, hf, mm = omni(tmp_path)
    to_hf(model, mm, hf, tmp_path / "out", "--max-shard-size", "100KB")
    check(hf, tmp_path / "out", 100_000)
    assert any(name.startswith("talker.") for name in rows(tmp_path / "out"))


def test_limits_are_of_the_new_dtype(source: tuple[str, Path, Path], tmp_path: Path) -> None:
    """A cast to fp32 doubles what a file would hold."""
    model, hf, mm = source
    flags = ("--max-shard-size", "200KB")
    to_hf(model, mm, hf, tmp_path / "bf16", *flags)
    to_hf(model, mm, hf, tmp_path / "fp32", *flags, "--dtype", "fp32")
    for folder in ("bf16", "fp32"):
        for name in weight_files(tmp_path / folder):
            tensors = load_file(tmp_path / folder / name)
            assert sum(t.nbytes for t in tensors.values()) <= 200_000 or len(tensors) == 1
    counts = [len(weight_files(tmp_path / folder)) for folder in ("bf16", "fp32")]
    assert counts[0] < counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["60KB", "5GB"])
def test_transformers_loads_it(size: str, tmp_path: Path) -> None:
    import torch

    from tinymodels import CONVERTERS, save, tiny_model

    model = tiny_model("qwen2_vl", tied=True)
    source = save(model, tmp_path / "source", "5GB" if size == "60KB" else "60KB")
    words = ("--cfg.hf_config.hf_dir", source, "--cfg.mm_dir", tmp_path / "mm")
    call(CONVERTERS["qwen2_vl"], "hf_to_mm", *words)
    back = tmp_path / "back"
    words = (*words, "--cfg.save_hf_dir", back, "--max-shard-size", size)
    call(CONVERTERS["qwen2_vl"], "mm_to_hf", *words)
    assert len(weight_files(back)) == 1 or size == "60KB"
    loaded, info = type(model).from_pretrained(back, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------- the flag's words
SIZES = {
    "5GB": 5 * 10**9,
    "500MB": 500 * 10**6,
    "500mb": 500 * 10**6,
    "2GiB": 2 << 30,
    "1.5GiB": 3 << 29,
    "0.5 KB": 500,
    "7KIB": 7 << 10,
    "123": 123,
    " 1MB ": 10**6,
}


@pytest.mark.parametrize(("text", "nbytes"), SIZES.items())
def test_words_for_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


JUNK = (
    *("0", "0GB", "0.1", "-1GB", "GB", "5TB", "5G", "5 G B", "1e9", "1,5GB", "inf", "nan", "5GB5"),
    *("0x10", "..5GB", "5.GB", "five", "  ", "9" * 400, "1." + "0" * 400),
)


@pytest.mark.parametrize("text", JUNK, ids=lambda text: text[:12])
def test_junk_for_sizes(text: str) -> None:
    with pytest.raises(RequestError, match="max-shard-size"):
        parse_size(text)


def test_junk_is_refused_before_anything_is_read(
    source: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """Not after minutes of comparing copies: a folder that is not there is not even missed."""
    model, hf, _ = source
    out = tmp_path / "parent" / "out"
    flags = ("--max-shard-size", "junk", "--dry-run")
    done = to_hf(model, tmp_path / "nowhere", hf, out, *flags, check=None)
    refused(done, 2, "--max-shard-size junk", "5GB", out=out)
    assert not out.parent.exists()


def test_it_is_refused_where_no_hf_is_written(
    source: tuple[str, Path, Path], tmp_path: Path
) -> None:
    model, hf, mm = source
    out = tmp_path / "out"
    flags = ("--max-shard-size", "5GB")
    refused(to_mm(model, hf, out, *flags, check=None), 2, "--max-shard-size", "mm_to_hf")
    refused(to_other(model, mm, out, *flags, check=None), 2, "--max-shard-size", "mm_to_hf")
    untouched(out)
