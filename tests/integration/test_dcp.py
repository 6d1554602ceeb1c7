"""DCP folders: torch's own processes write what we read and read what we write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import dcpranks
import mmconvert
from cli import run_cli
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


def test_a_missing_tensor_is_an_error(hf: Path, folder: Path, tmp_path: Path) -> None:
    state = trained(folder, hf)
    del state["model.model.language_model.norm.weight"]
    save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    words = ("--save_dir", tmp_path / "back", "--model_assets_dir", hf)
    said = refused(3, QWEN3, "dcp_to_hf", "--load_dir", tmp_path / "dcp", *words)
    assert "model.model.model.language_model.norm.weight" in said
    assert not (tmp_path / "back").exists()
