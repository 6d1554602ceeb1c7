"""``mmconvert.json``: digests that do not depend on the layout, and when they are relied on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import QWEN2VL, copied, edit_json, edit_rank, hf_to_mm, layout, rank_files, target
from inprocess import call, to_hf, to_mm, to_other
from mmconvert.formats import manifest
from mmconvert.playground.checkpoints import make_hf
from mmread import MANIFEST, tensor_data
from nights import night

Digests = dict[str, str]
QWEN, OMNI = "qwen2vl-2b", "qwen2.5omni-7b"
SHORT = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def digests(folder: Path) -> Digests:
    """The digests of a folder, which are also what mmconvert relies on."""
    found = read(folder)["digests"]
    assert manifest.digests(folder) == (found, "")
    return found


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(QWEN, tmp_path_factory.mktemp("hf") / "hf", layers=4, vit_layers=2)


@pytest.fixture(scope="module")
def mm(hf: Path) -> Path:
    """On one rank, with digests."""
    out = hf.with_name("mm")
    to_mm(QWEN, hf, out, "--digests")
    return out


# ------------------------------------------------------------------------------- digests
def test_a_digest_is_what_it_says(mm: Path) -> None:
    """SHA-256 of dtype, shape and bytes of each tensor as torch reads it from one rank."""
    tensors = torch.load(rank_files(mm)["mp_rank_00"], weights_only=True)["model"]
    expected = {}
    for name, tensor in tensors.items():
        head = f"{SHORT[tensor.dtype]} {list(tensor.shape)}\n".encode()
        expected[name] = hashlib.sha256(head + tensor_data(tensor)).hexdigest()
    assert digests(mm) == expected
    assert len(set(expected.values())) == len(expected)
    assert "sha256" in read(mm)["digest"]


LAYOUTS = {
    "tp2": ("[4]", "[2]", 2),
    "pp2": ("[2,2]", "[2,0]", 1),
    "tp2 pp4": ("[0,1,1,2]", "[1,1,0,0]", 2),
    "vpp2": ("[[1,1],[1,1]]", "[[2,0],[0,0]]", 2),
    "vit tp4": ("[0,4]", "[1,1]", 2, "vit_tp_size=4"),
}


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_same_in_every_layout(
    shape: tuple[Any, ...], hf: Path, mm: Path, tmp_path: Path
) -> None:
    """And in Hugging Face format, in whichever files, and after a resplit."""
    to_mm(QWEN, hf, tmp_path / "mm", *layout(*shape), "--digests")
    assert digests(tmp_path / "mm") == digests(mm)
    to_hf(QWEN, tmp_path / "mm", hf, tmp_path / "hf", "--digests", "--max-shard-size", "200KB")
    assert digests(tmp_path / "hf") == digests(mm)
    to_other(QWEN, tmp_path / "mm", tmp_path / "other", *target("[1,3]", "[2,0]"), "--digests")
    assert digests(tmp_path / "other") == digests(mm)


def test_zeros_that_hf_lacks_count(tmp_path: Path) -> None:
    """A bias of which Hugging Face holds two thirds has the digest of the whole."""
    hf = make_hf(OMNI, tmp_path / "hf", layers=2, vit_layers=2, audio_layers=2)
    one, two, back = tmp_path / "one", tmp_path / "two", tmp_path / "back"
    to_mm(OMNI, hf, one, "--digests")
    flags = layout("[1,1]", "[2,0]", 2, "audio_pp_layers=[2,0]")
    to_mm(OMNI, hf, two, *flags, "--digests")
    to_hf(OMNI, two, hf, back, "--digests")
    assert digests(one) == digests(two) == digests(back)
    name = "audio_encoder.encoder.blocks.layers.1.self_attention.linear_qkv.bias"
    tensors = torch.load(rank_files(one)["mp_rank_00"], weights_only=True)["model"]
    assert name in tensors and (tensors[name] == 0).any()
    head = f"BF16 {list(tensors[name].shape)}\n".encode()
    assert digests(one)[name] == hashlib.sha256(head + tensor_data(tensors[name])).hexdigest()


def test_one_bit_changes_one_digest(hf: Path, mm: Path, tmp_path: Path) -> None:
    other = copied(hf, tmp_path / "hf")
    path = sorted(other.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = "visual.blocks.1.attn.qkv.weight"
    assert name in tensors
    tensors[name].view(torch.int16)[-1, -1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    to_mm(QWEN, other, tmp_path / "mm", *layout("[2,2]", "[2,0]", 2), "--digests")
    found, before = digests(tmp_path / "mm"), digests(mm)
    assert found.keys() == before.keys()
    changed = [key for key in found if found[key] != before[key]]
    assert changed == ["image_encoder.encoder.blocks.layers.1.self_attention.linear_qkv.weight"]


def test_digests_are_of_what_is_written(hf: Path, mm: Path, tmp_path: Path) -> None:
    """With --dtype they are those of the cast values, whenever they were cast."""
    flags = ("--dtype", "fp32", "--digests")
    to_mm(QWEN, hf, tmp_path / "first", *layout("[2,2]", "[2,0]", 2), *flags)
    to_other(QWEN, mm, tmp_path / "later", *target("[4]", "[2]"), *flags)
    to_hf(QWEN, mm, hf, tmp_path / "hf", *flags)
    assert digests(tmp_path / "first") == digests(tmp_path / "later") == digests(tmp_path / "hf")
    assert not set(digests(mm).values()) & set(digests(tmp_path / "hf").values())


def test_without_the_flag_there_are_none(hf: Path, tmp_path: Path) -> None:
    to_mm(QWEN, hf, tmp_path / "mm")
    assert "digests" not in read(tmp_path / "mm")
    found, note = manifest.digests(tmp_path / "mm")
    assert found is None and "--digests" in note


def test_the_number_of_threads_does_not_matter(hf: Path, mm: Path, tmp_path: Path) -> None:
    for workers in ("1", "64"):
        to_mm(QWEN, hf, tmp_path / workers, "--digests", "--workers", workers)
        assert digests(tmp_path / workers) == digests(mm)


# ------------------------------------------------------------------- what the manifest says
def test_what_it_says_of_files(hf: Path, mm: Path, tmp_path: Path) -> None:
    """Size and time of each weight file, in both formats."""
    to_hf(QWEN, mm, hf, tmp_path / "hf")
    for folder, kind in ((mm, "mm"), (tmp_path / "hf", "hf")):
        found = read(folder)
        files = {p for pattern in ("*.pt", "*.safetensors") for p in folder.rglob(pattern)}
        states = {
            p.relative_to(folder).as_posix(): [
                *(p.stat().st_size, p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_ino)
            ]
            for p in files
        }
        assert found["files"] == states != {}
        assert found["kind"] == kind
        assert found["converter"] == QWEN2VL
        assert found["layout"]["tp_size"] == 1
        assert found["source"] != {}
    assert read(tmp_path / "hf")["command"] == "mm_to_hf"


def test_names_that_are_no_utf8(hf: Path, tmp_path: Path) -> None:
    """The folder that a manifest names as its source."""
    odd = copied(hf, tmp_path / os.fsdecode(b"mod\xe8le"))
    hf_to_mm(odd, tmp_path / "mm")
    (tmp_path / "mm" / MANIFEST).read_bytes().decode("utf-8")
    sources = read(tmp_path / "mm")["source"]
    assert {os.fsencode(name).split(b"/")[0] for name in sources} == {b"mod\xe8le"}
    assert manifest.read(tmp_path / "mm")[0] is not None


def test_an_output_whose_name_is_no_utf8(hf: Path, tmp_path: Path) -> None:
    """It is shown with an escape, and the conversion is not said to have failed."""
    out = tmp_path / os.fsdecode(b"mod\xe8le")
    words = (QWEN2VL, "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", out)
    done = run_cli(*words, env={"PYTHONIOENCODING": "utf-8:strict"}, check=0)
    assert "wrote " in done.stdout and "mod\\udce8le" in done.stdout
    assert rank_files(out)


# ----------------------------------------------------------------------- stale or damaged
def touch(folder: Path) -> None:
    path = next(folder.rglob("*.pt"))
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def grow(folder: Path) -> None:
    path = next(folder.rglob("*.pt"))
    status = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(folder: Path) -> None:
    edit_rank(folder, "mp_rank_00", lambda content: content["model"].popitem())


def train(folder: Path) -> None:
    """Training goes on in the folder that it started from."""
    shutil.copytree(folder / "release", folder / "iter_0000100")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def flip(folder: Path) -> None:
    """One bit, and the time of modification set back."""
    path = next(folder.rglob("*.pt"))
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(folder: Path) -> None:
    """Another file of the same size and time has taken its name."""
    path = next(folder.rglob("*.pt"))
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


STALE: dict[str, Callable[[Path], object]] = {
    "another time": touch,
    "another size": grow,
    "a bit, the time set back": flip,
    "another file under its name": swap,
    "saved again": rewrite,
    "a file is gone": lambda folder: next(folder.rglob("*.pt")).unlink(),
    "training has gone on": train,
}


@pytest.mark.parametrize("change", STALE.values(), ids=STALE.keys())
def test_stale_digests_are_not_relied_on(
    change: Callable[[Path], object], hf: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mm"
    to_mm(QWEN, hf, folder, "--digests")
    assert manifest.digests(folder)[0]
    change(folder)
    found, note = manifest.digests(folder)
    assert found is None
    assert str(folder / MANIFEST) in note and "model_optim_rng.pt" in note


def test_quick_says_what_it_cannot_see(hf: Path, mm: Path, tmp_path: Path) -> None:
    """An answer by digests is in words and in JSON; a copy is compared byte by byte."""
    done = call("verify", "--quick", mm, mm)
    assert "by the digests" in done.stdout and "not seen: bytes that changed" in done.stdout
    said = json.loads(call("verify", "--quick", mm, mm, "--json").stdout)
    assert said["by_digest"] and "failing disk" in said["not_seen"]
    shutil.copytree(mm, tmp_path / "copy", copy_function=shutil.copy2)
    flip(tmp_path / "copy")
    done = call("verify", "--quick", mm, tmp_path / "copy", check=None)
    assert "all tensors are compared" in done.stderr and "not seen" not in done.stdout
    assert json.loads(call("verify", mm, mm, "--json").stdout)["not_seen"] == ""


def test_a_copy_with_new_times(hf: Path, mm: Path, tmp_path: Path) -> None:
    """It is still the same model for everything but digests."""
    folder = tmp_path / "mm"
    shutil.copytree(mm, folder, copy_function=shutil.copyfile)
    assert manifest.read(folder)[0] is not None
    found, note = manifest.digests(folder)
    assert found is None and "time" in note
    done = to_hf(QWEN, folder, hf, tmp_path / "hf")
    assert "ignored" not in done.stderr


def test_a_new_weight_file_of_hf(mm: Path, hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    to_hf(QWEN, mm, hf, out, "--digests")
    assert digests(out)
    shutil.copy2(next(out.glob("*.safetensors")), out / "model-00003-of-00003.safetensors")
    found, note = manifest.digests(out)
    assert found is None and "model-00003" in note


JUNK: dict[str, Callable[[dict], object] | bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[1, 2]",
    "no UTF-8": b"\xff\xfe{}",
    "deep": b"[" * 100_000,
    "nothing in it": b"{}",
    "files is a list": lambda m: m.update(files=["a"]),
    "files is empty": lambda m: m.update(files={}),
    "files outside": lambda m: m.update(files={"../../etc/passwd": [1, 2]}),
    "a file with NUL": lambda m: m.update(files={"a\0b": [1, 2]}),
    "sizes are text": lambda m: m.update(files={k: ["x", "y"] for k in m["files"]}),
    "sizes are nested": lambda m: m.update(files={k: [[], {}] for k in m["files"]}),
    "sizes are missing": lambda m: m.update(files=dict.fromkeys(m["files"])),
    "digests is a list": lambda m: m.update(digests=[]),
    "digests is text": lambda m: m.update(digests="abc"),
    "digests are numbers": lambda m: m.update(digests=dict.fromkeys(m["digests"], 5)),
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
def test_junk_is_ignored(
    junk: Callable[[dict], object] | bytes, hf: Path, mm: Path, tmp_path: Path
) -> None:
    """With a note; the conversion goes on from the data alone."""
    folder = tmp_path / "mm"
    shutil.copytree(mm, folder, copy_function=shutil.copy2)
    if isinstance(junk, bytes):
        (folder / MANIFEST).write_bytes(junk)
    else:
        edit_json(folder / MANIFEST, junk)
    found, note = manifest.digests(folder)
    assert found is None and str(folder / MANIFEST) in note
    to_hf(QWEN, folder, hf, tmp_path / "hf")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


ODD = (None, 10**30, float("nan"), "\0", [], "\ud800", {"tied": {}, "a": []}, [[]])
TODAY: tuple[object, ...] = ([], {"tied": {}, "a": []})
KEYS = ("converter", "family", "variant", "layout", "dims", "kind", "command", "source", "cast")
HOSTILE = {
    "dims": {"llm.layers": 10**30, "llm.heads": -1, "x": "y", "vit.heads": True},
    "layout": {"tp_size": "many"},
    "variant": {"tied": "yes", "traits": 5},
    "save_vit_only": "yes",
    "mmconvert": {"a": 1},
}


def ask(folder: Path, out: Path) -> list[tuple[str | Path, ...]]:
    """Commands that ask a manifest for something."""
    resplit = ("AutoConverter", "resplit", "--cfg.source_dir", folder, "--cfg.target_dir", out)
    return [
        (*resplit, *target("[2,2]", "[2,0]"), "--dry-run"),
        ("doctor", folder, "--json"),
        ("inspect", folder),
        ("verify", "--quick", folder, folder),
    ]


@pytest.mark.parametrize("value", [v if v in TODAY else night(v) for v in ODD], ids=repr)
def test_any_value_in_any_field(value: object, mm: Path, tmp_path: Path) -> None:
    """`"converter": []` ended every command that asks for the family with exit code 70."""
    folder = tmp_path / "mm"
    shutil.copytree(mm, folder)
    whole = read(folder)
    for changed in (dict.fromkeys(KEYS, value), {"files": value}, {"digests": value}):
        (folder / MANIFEST).write_text(json.dumps(whole | changed))
        for words in ask(folder, tmp_path / "out"):
            done = call(*words, check=None)
            assert done.returncode in (0, 2, 3), (changed, words, done.stderr)
    for key in KEYS:
        (folder / MANIFEST).write_text(json.dumps(whole | {key: value}))
        done = call(*ask(folder, tmp_path / "out")[0], check=None)
        assert done.returncode in (0, 2, 3), (key, done.stderr)


@pytest.mark.parametrize("key", HOSTILE)
def test_values_of_other_kinds(key: str, mm: Path, hf: Path, tmp_path: Path) -> None:
    """Never a traceback, never another result."""
    folder = tmp_path / "mm"
    shutil.copytree(mm, folder, copy_function=shutil.copy2)
    edit_json(folder / MANIFEST, lambda m: m.update({key: HOSTILE[key]}))
    to_hf(QWEN, folder, hf, tmp_path / "hf")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
    words = ("AutoConverter", "resplit", "--cfg.source_dir", folder, "--cfg.target_dir")
    done = call(*words, tmp_path / "other", *target("[2,2]", "[2,0]"), check=None)
    assert done.returncode in (0, 2, 3), done.stderr
