"""DCP folders: torch's own processes write what we read and read what we write."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as meta
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import dcpranks
import mmconvert
from cli import run_cli
from mmconvert.formats.dcp.metadata import read_metadata
from mmconvert.formats.reading import current, watched
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")
QWEN3 = "Qwen3VLConverter"


def ok(*words: object) -> str:
    done = run_cli(*map(str, words))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def refused(code: int, *words: object) -> str:
    done = run_cli(*map(str, words))
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts, several weight files, a tied head."""
    out = tmp_path_factory.mktemp("dcp") / "hf"
    return make_hf("qwen3vl-30b-a3b", out, layers=2, vit_layers=2, deepstack=[0])


@pytest.fixture(scope="module")
def folder(hf: Path) -> Path:
    """The same in DCP."""
    out = hf.parent / "dcp"
    ok(QWEN3, "hf_to_dcp", "--hf_dir", hf, "--dcp_dir", out)
    return out


def weights(hf: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in sorted(hf.glob("*.safetensors")) for k, v in load_file(p).items()}


def trained(folder: Path, hf: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model as its FSDP2 trainer names them."""
    return {
        f"model.{name}": t.flatten(0, 1) if t.dim() == 3 and ".experts." in name else t
        for name, t in weights(hf).items()
    }


def test_torch_loads_all_of_it_or_some(folder: Path, hf: Path) -> None:
    want = trained(folder, hf)
    state = {name: torch.zeros_like(t) for name, t in want.items()}
    load({"model": state}, checkpoint_id=folder / "release", no_dist=True)
    assert all(torch.equal(state[name], want[name]) for name in want)
    some = {name: torch.zeros_like(want[name]) for name in list(want)[5:9]}
    load({"model": some}, checkpoint_id=folder / "release", no_dist=True)
    assert all(torch.equal(some[name], want[name]) for name in some)


@pytest.mark.parametrize("ranks", [1, 3])
def test_torch_loads_it_by_rank(ranks: int, hf: Path, tmp_path: Path) -> None:
    """Written whole and over 3 ranks, loaded on 2 and on 4 by rows and columns."""
    out, source = tmp_path / "dcp", tmp_path / "source.pt"
    ok(QWEN3, "hf_to_dcp", "--hf_dir", hf, "--dcp_dir", out, "--ranks", ranks)
    torch.save(trained(out, hf), source)
    if ranks == 3:
        assert len(list((out / "release").glob("__*_0.distcp"))) == 3
        dcpranks.run(4, dcpranks.load, out / "release", source, "both")
    else:
        dcpranks.run(2, dcpranks.load, out / "release", source, "rows")
    back = tmp_path / "back"
    words = ("--load_dir", out, "--save_dir", back, "--model_assets_dir", hf)
    ok(QWEN3, "dcp_to_hf", *words)
    assert compare_hf(hf, back) == []


@pytest.mark.parametrize(
    ("ranks", "how", "threads"), [(1, "rows", 1), (2, "rows", 4), (4, "both", 2)]
)
def test_what_torch_writes_is_read(
    ranks: int, how: str, threads: int, hf: Path, tmp_path: Path
) -> None:
    """DTensors over 1, 2 and 4 ranks, rows that do not divide evenly among them."""
    source, run, back = tmp_path / "source.pt", tmp_path / "run", tmp_path / "back"
    out = run / "iter_0000007"
    run.mkdir()
    torch.save(trained(out, hf), source)
    dcpranks.run(ranks, dcpranks.save, out, source, how, threads)
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    words = ("--load_dir", run, "--save_dir", back, "--model_assets_dir", hf)
    ok(QWEN3, "dcp_to_hf", *words)
    assert compare_hf(hf, back) == []
    assert "DCP folder" in ok("inspect", out)


def test_plain_and_transposed_tensors(hf: Path, tmp_path: Path) -> None:
    """torch keeps a transposed tensor's strides; it is a plain tensor to .metadata."""
    state = {
        name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in trained(hf, hf).items()
    }
    out, back = tmp_path / "dcp", tmp_path / "back"
    save({"model": state}, checkpoint_id=out, no_dist=True)
    words = ("--load_dir", out, "--save_dir", back, "--model_assets_dir", hf)
    ok(QWEN3, "dcp_to_hf", *words)
    assert compare_hf(hf, back) == []


def test_straight_between_mm_and_dcp(hf: Path, folder: Path, tmp_path: Path) -> None:
    """MM, DCP and Hugging Face: every way round gives the same bytes."""
    layout = ("--cfg.parallel_config.llm_pp_layers", "[1,1]", "--cfg.parallel_config.ep_size", "2")
    layout += ("--cfg.parallel_config.vit_pp_layers", "[2,0]", "--cfg.parallel_config.tp_size", "2")
    a, b, again = tmp_path / "mm", tmp_path / "mm2", tmp_path / "dcp2"
    original = ("--cfg.hf_config.hf_dir", hf)
    ok("AutoConverter", "hf_to_mm", "--cfg.mm_dir", a, *original, *layout)
    ok("AutoConverter", "dcp_to_mm", "--cfg.dcp_dir", folder, "--cfg.mm_dir", b, *original, *layout)
    assert [p.read_bytes() for p in sorted(a.rglob("*.pt"))] == [
        p.read_bytes() for p in sorted(b.rglob("*.pt"))
    ]
    ok("AutoConverter", "mm_to_dcp", "--cfg.mm_dir", a, "--cfg.dcp_dir", again, *original)
    for name in ("release/.metadata", "release/__0_0.distcp"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert mmconvert.verify(a, folder).equal
    assert mmconvert.verify(folder, hf).equal


def test_tools_take_it(hf: Path, folder: Path, tmp_path: Path) -> None:
    assert "DCP folder" in ok("inspect", folder)
    assert "equal" in ok("verify", folder, hf)
    assert "healthy" in ok("doctor", folder)
    assert "healthy" in ok("doctor", folder, "--hf_dir", hf, "--values")
    ok("diff", folder, hf)
    opened = mmconvert.open(folder)
    name = "model.model.model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(opened[name], weights(hf)[name.removeprefix("model.model.")])


def test_metadata_is_watched_though_it_is_read_once(hf: Path, folder: Path, tmp_path: Path) -> None:
    """It is among the files that a conversion has read, whoever has read it before; and what has
    changed is read again.
    """

    @watched
    def states() -> Mapping[Path, object]:
        read_metadata(out / "release")
        return current().states

    out = tmp_path / "dcp"
    shutil.copytree(folder, out)
    ok("inspect", out)
    assert out / "release/.metadata" in states()
    words = ("--load_dir", out, "--save_dir", tmp_path / "back", "--model_assets_dir", hf)
    ok(QWEN3, "dcp_to_hf", *words)
    data = (out / "release/.metadata").read_bytes()
    (out / "release/.metadata").write_bytes(data.replace(b"q_proj", b"x_proj"))
    assert "not in the checkpoint" in refused(3, QWEN3, "dcp_to_hf", *words, "--overwrite")


def test_a_missing_tensor_is_an_error(hf: Path, folder: Path, tmp_path: Path) -> None:
    state = trained(folder, hf)
    del state["model.model.language_model.norm.weight"]
    save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    words = ("--save_dir", tmp_path / "back", "--model_assets_dir", hf)
    said = refused(3, QWEN3, "dcp_to_hf", "--load_dir", tmp_path / "dcp", *words)
    assert "model.model.model.language_model.norm.weight" in said
    assert not (tmp_path / "back").exists()


# ------------------------------------------------------------------------- a trainer's rules


def qwen35(folder: Path) -> Path:
    """Qwen3.5 in small: fused experts with their outputs first, MTP experts one by one."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    text, mtp = "model.language_model.layers", "mtp.layers.0.mlp.experts"
    tensors = {"model.language_model.embed_tokens.weight": some(10, 6)}
    for i in range(2):
        tensors[f"{text}.{i}.mlp.experts.gate_up_proj"] = some(3, 8, 6)
        tensors[f"{text}.{i}.mlp.experts.down_proj"] = some(3, 6, 4)
        tensors[f"{text}.{i}.linear_attn.A_log"] = some(4, dtype=torch.float32)
    for e in range(3):
        for leaf, shape in (("gate", (4, 6)), ("up", (4, 6)), ("down", (6, 4))):
            tensors[f"{mtp}.{e}.{leaf}_proj.weight"] = some(*shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "qwen3_5_moe", "text_config": {}}')
    return folder


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    names = mmconvert.open(folder)
    return {name.removeprefix("model."): names[name] for name in names}


@pytest.mark.parametrize("prefix", ["", "x."])
def test_qwen35_swaps_experts_and_merges_those_of_mtp(prefix: str, tmp_path: Path) -> None:
    """The way back knows them behind a prefix too."""
    hf, out, back = qwen35(tmp_path / "hf"), tmp_path / "dcp", tmp_path / "back"
    ties = '{"lm_head.weight": "model.language_model.embed_tokens.weight"}'
    words = ("--dcp_prefix", prefix, "--tie_weight_mapping", ties, "--num_workers", 0)
    ok("Qwen35Converter", "hf_to_dcp", "--hf_dir", hf, "--dcp_dir", out, *words)
    assert (out / "release/__100_0.distcp").is_file()
    source, found = weights(hf), read_model(out)
    fused = "model.language_model.layers.1.mlp.experts"
    assert torch.equal(
        found[f"{prefix}{fused}.gate_up_proj"], source[f"{fused}.gate_up_proj"].transpose(1, 2)
    )
    mtp = "mtp.layers.0.mlp.experts"
    one = torch.cat([source[f"{mtp}.2.{x}_proj.weight"] for x in ("gate", "up")]).t()
    assert torch.equal(found[f"{prefix}{mtp}.gate_up_proj"][2], one)
    embedding = source["model.language_model.embed_tokens.weight"]
    assert torch.equal(found[f"{prefix}lm_head.weight"], embedding)
    folders = ("--dcp_dir", out, "--origin_hf_dir", hf, "--save_hf_dir", back)
    ok("Qwen35Converter", "dcp_to_hf", *folders, *words)
    assert compare_hf(hf, back) == []


def test_mtp_is_kept_from_the_original_or_dropped_by_name(tmp_path: Path) -> None:
    hf, out, back = qwen35(tmp_path / "hf"), tmp_path / "dcp", tmp_path / "back"
    said = ok("Qwen35Converter", "hf_to_dcp", "--hf_dir", hf, "--dcp_dir", out, "--drop", "mtp.*")
    assert "--drop mtp.*" in said
    folders = ("--dcp_dir", out, "--origin_hf_dir", hf, "--save_hf_dir", back)
    assert "mtp.layers.0" in refused(3, "Qwen35Converter", "dcp_to_hf", *folders)
    ok("Qwen35Converter", "dcp_to_hf", *folders, "--drop", "mtp.*")
    assert not any(name.startswith("mtp.") for name in weights(back))
    words = ("--keep_origin_mtp_weights", "true", "--overwrite")
    ok("Qwen35Converter", "dcp_to_hf", *folders, *words)
    assert compare_hf(hf, back) == []


def test_masters_are_cast_and_what_must_stay_float32_does(tmp_path: Path) -> None:
    hf, out, back = qwen35(tmp_path / "hf"), tmp_path / "dcp", tmp_path / "back"
    ok("Qwen35Converter", "hf_to_dcp", "--hf_dir", hf, "--dcp_dir", out)
    masters = {name: t.float() for name, t in read_model(out).items()}
    save({"model": masters}, checkpoint_id=tmp_path / "masters", no_dist=True)
    folders = ("--dcp_dir", tmp_path / "masters", "--origin_hf_dir", hf, "--save_hf_dir", back)
    assert "written as F32" in ok("Qwen35Converter", "dcp_to_hf", *folders)
    ok("Qwen35Converter", "dcp_to_hf", *folders, "--to_bf16", "true", "--overwrite")
    assert compare_hf(hf, back) == []


def test_generic_prefixes(tmp_path: Path) -> None:
    hf, out, back = qwen35(tmp_path / "hf"), tmp_path / "dcp", tmp_path / "back"
    words = ("--hf_prefix", "model.", "--dcp_prefix", "net.", "--fused_linear_names")
    words += ('["gate_up_proj"]',)
    ok("GenericDCPConverter", "hf_to_dcp", "--hf_dir", hf, "--dcp_dir", out, *words)
    found = read_model(out)
    assert found["net.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (24, 6)
    assert found["net.language_model.layers.0.mlp.experts.down_proj"].shape == (3, 6, 4)
    folders = ("--load_dir", out, "--model_assets_dir", hf, "--save_dir", back)
    said = refused(3, "GenericDCPConverter", "dcp_to_hf", *folders)
    assert "not in the checkpoint" in said
    ok("GenericDCPConverter", "dcp_to_hf", *folders, *words)
    assert compare_hf(hf, back) == []


# --------------------------------------------------------------------------------- strangers


def rewritten(folder: Path, out: Path, change: Callable[[Any], None]) -> Path:
    """A folder whose .metadata is torch's own, changed."""
    shutil.copytree(folder / "release", out)
    with (out / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    with (out / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    return out


def outside(metadata: Any) -> None:
    info = next(iter(metadata.storage_data.values()))
    info.relative_path = "../../etc/passwd"


def beyond(metadata: Any) -> None:
    info = list(metadata.storage_data.values())[-1]
    info.offset += 1 << 40


def moved(metadata: Any) -> None:
    info = list(metadata.storage_data.values())[3]
    info.offset += 1


def gap(metadata: Any) -> None:
    entry = list(metadata.state_dict_metadata.values())[-1]
    entry.size = torch.Size([n + 1 for n in entry.size])


def compressed(metadata: Any) -> None:
    info = list(metadata.storage_data.values())[-1]
    info.transform_descriptors = ["stream.zstd/1"]


def foreign(metadata: Any) -> None:
    name = list(metadata.state_dict_metadata)[-1]
    metadata.state_dict_metadata[name] = Path("/")


def shared(metadata: Any) -> None:
    one, two = list(metadata.storage_data)[-2:]
    metadata.storage_data[one] = metadata.storage_data[two]


def negative(metadata: Any) -> None:
    list(metadata.storage_data.values())[-1].offset = -5


def endless(metadata: Any) -> None:
    list(metadata.storage_data.values())[-1].length = 1 << 62


def overlapping(metadata: Any) -> None:
    """Two chunks of one tensor hold the same rows."""
    name = next(
        n for n, e in metadata.state_dict_metadata.items() if len(getattr(e, "size", ())) == 2
    )
    entry = metadata.state_dict_metadata[name]
    rows, cols = entry.size
    entry.chunks = [
        meta.ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((rows - 1, cols)))
        for at in (0, 1)
    ]
    index = next(index for index in metadata.storage_data if index.fqn == name)
    info = metadata.storage_data.pop(index)
    for at in (0, 1):
        where = _StorageInfo(info.relative_path, info.offset + at, 1)
        metadata.storage_data[meta.MetadataIndex(name, torch.Size((at, 0)), at)] = where


CHANGES = {
    "../../etc/passwd": outside,
    "ends at byte": beyond,
    "zip": moved,
    "do not fill": gap,
    "stream.zstd/1": compressed,
    "pathlib": foreign,
    "overlaps": shared,
    "is at -5": negative,
    "4611686018427387904 bytes": endless,
    "exactly once": overlapping,
}


@pytest.mark.parametrize("words", CHANGES)
def test_damaged_metadata_is_refused(words: str, folder: Path, tmp_path: Path) -> None:
    out = rewritten(folder, tmp_path / "dcp", CHANGES[words])
    said = refused(3, "inspect", out)
    assert words in said
    assert "Traceback" not in said


def test_a_tensor_larger_than_its_item_is_refused(tmp_path: Path) -> None:
    """Strides of 0 make terabytes of one number."""
    save({"model": {"a": torch.zeros(4, 4)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    file, size = next((tmp_path / "dcp").glob("*.distcp")), torch.Size((10**6, 10**6))
    start = file.stat().st_size
    with file.open("ab") as stream:
        torch.save(torch.zeros(1).expand(size), stream)
    length = file.stat().st_size - start

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["model.a"]
        entry.size = size
        entry.chunks = [meta.ChunkStorageMetadata(torch.Size((0, 0)), size)]
        index = next(iter(metadata.storage_data))
        where = _StorageInfo(file.name, start, length)
        metadata.storage_data[index] = where

    (tmp_path / "dcp").rename(tmp_path / "release")
    out = rewritten(tmp_path, tmp_path / "changed", change)
    assert "4000000000000 bytes in an item" in refused(3, "inspect", out)


@pytest.mark.parametrize("at", ["stride", "dtype"])
def test_an_item_that_is_like_another_but_for_a_word(at: str, tmp_path: Path) -> None:
    """Items are compared with those that were read, and taken apart where anything but a checksum
    differs.
    """
    tensors = {f"t{n}": torch.arange(12.0).add(n).reshape(3, 4) for n in range(4)}
    tensors["t2"] = tensors["t2"].t().contiguous().t() if at == "stride" else tensors["t2"]
    if at == "dtype":
        tensors["t2"] = tensors["t2"].to(torch.int32)
    save({"model": tensors}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    opened = mmconvert.open(tmp_path / "dcp")
    for name, tensor in tensors.items():
        assert torch.equal(opened[f"model.{name}"], tensor)
        assert opened[f"model.{name}"].dtype == tensor.dtype


def test_nothing_of_a_pickle_is_run(folder: Path, tmp_path: Path) -> None:
    out, mark = tmp_path / "dcp", tmp_path / "mark"
    shutil.copytree(folder / "release", out)
    (out / ".metadata").write_bytes(f"cos\nsystem\n(Vtouch {mark}\ntR.".encode())
    assert "os.system" in refused(3, "inspect", out)
    assert not mark.exists()


def test_an_unfinished_save_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "dcp"
    shutil.copytree(folder / "release", out)
    (out / ".metadata").rename(out / ".metadata.tmp")
    assert "interrupted" in refused(3, "inspect", out)
    (out / ".metadata.tmp").unlink()
    assert "begins with a dot" in refused(3, "inspect", out)
    shutil.copy(folder / "release/.metadata", out)
    (out / "__0_0.distcp").unlink()
    assert "__0_0.distcp" in refused(3, "inspect", out)


@pytest.mark.nightly
def test_large_metadata_pass(tmp_path: Path) -> None:
    """The weights and both moments of 729 tensors on 64 ranks; memory alone is measured."""
    chunks: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for number in range(3 * 729):
        name, found = f"model.layers.{number}.weight", list[Any]()
        for rank in range(64):
            offset, size = torch.Size((rank * 64, 0)), torch.Size((64, 4096))
            found.append(meta.ChunkStorageMetadata(offset, size))
            where = _StorageInfo(f"__{rank}_0.distcp", number << 20, 525_000)
            stored[meta.MetadataIndex(name, offset, rank)] = where
        properties = meta.TensorProperties(torch.bfloat16)
        chunks[name] = meta.TensorStorageMetadata(properties, torch.Size((4096, 4096)), found)
    with (tmp_path / ".metadata").open("wb") as file:
        pickle.dump(meta.Metadata(chunks, None, stored), file)
    del chunks, stored
    code = (
        "import re, sys; from pathlib import Path\n"
        "from mmconvert.formats.dcp.metadata import read_metadata\n"
        "print(len(read_metadata(Path(sys.argv[1])).tensors))\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) >> 10)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    tensors, mebibytes = map(int, done.stdout.split())
    assert tensors == 3 * 729
    assert mebibytes < 500
