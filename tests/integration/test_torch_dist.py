"""torch_dist folders: Megatron-core loads ours at any TP and PP; there and back by all formats."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

import mmconvert
from api import Shape, to_mm
from cli import run_cli
from megatron_ranks import WORLD, Case
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf
from tinymodels import CONVERTERS, TEXT_LAYERS, VIT_LAYERS, save, tiny_model
from torchdistranks import run

ONE = Shape(vit=[[VIT_LAYERS]], llm=[[TEXT_LAYERS]])
SHAPES = {
    "tp1": (ONE, 1),
    "tp2": (ONE._replace(tp=2), 1),
    "pp2": (Shape(vit=[[VIT_LAYERS, 0]], llm=[[3, 1]]), 2),
}


def ok(*words: object) -> str:
    done = run_cli(*map(str, words))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Made(NamedTuple):
    """A small Qwen2.5-VL, and the folder with what came of it."""

    hf: Path
    folder: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed (it is in the extra dev)")
    folder = tmp_path_factory.mktemp("torchdist")
    model: Any = tiny_model("qwen2_5_vl", tied=False).to(torch.bfloat16)
    hf = save(model, folder / "hf")
    dist = folder / "dist"
    ok("AutoConverter", "hf_to_torch_dist", "--cfg.source", hf, "--cfg.target", dist)
    cases: list[Case] = []
    for name, (shape, pp) in SHAPES.items():
        to_mm(CONVERTERS["qwen2_5_vl"], hf, folder / name, shape)
        cases.append(Case(name, folder / name, shape.tp, pp, list(shape.llm[0])))
    import_module("megatron.core.models.gpt")  # once; the ranks are forked
    import_module("megatron.core.dist_checkpointing")
    torch.set_num_threads(1)
    text = model.config.text_config.to_dict()
    start_processes(run, (folder, text, cases), nprocs=WORLD, start_method="fork")
    return Made(hf, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_megatron_loads_it(made: Made, name: str) -> None:
    """At TP 1, TP 2 and PP 2, each rank gets the weights of its own rank file."""
    for rank in range(WORLD):
        assert torch.load(made.folder / f"{name}.{rank}.differ", weights_only=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_what_megatron_saves_is_read(made: Made, name: str) -> None:
    """Gate and up lie apart in what TP 2 saves, and the layers are divided among PP ranks."""
    ours = mmconvert.open(made.folder / "dist")
    theirs = mmconvert.open(made.folder / f"{name}.saved")
    text = [key for key in ours if key.startswith("language_model.")]
    assert sorted(theirs) == sorted(text)
    for key in text:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("model", ["qwen2.5vl-7b", "qwen3vl-8b", "qwen3vl-30b-a3b"])
def test_there_and_back(model: str, tmp_path: Path) -> None:
    """Hugging Face, torch_dist, MM and DCP, straight."""
    small: dict[str, Any] = {"layers": 2, "vit_layers": 2} | (
        {"deepstack": [0]} if "3" in model[:5] else {}
    )
    hf = make_hf(model, tmp_path / "hf", **small)
    original = ("--cfg.hf_config.hf_dir", hf)
    there, back = tmp_path / "dist", tmp_path / "back"
    ok("AutoConverter", "hf_to_torch_dist", "--cfg.source", hf, "--cfg.target", there)
    words = ("--cfg.source", there, *original)
    ok("AutoConverter", "torch_dist_to_hf", *words, "--cfg.target", back)
    assert compare_hf(hf, back) == []
    mm = ("--cfg.target", tmp_path / "mm", "--cfg.target_layout.tp_size", "2")
    ok("AutoConverter", "torch_dist_to_mm", *words, *mm)
    assert mmconvert.verify(tmp_path / "mm", hf).equal
    assert mmconvert.verify(tmp_path / "mm", there).equal
    again = ("--cfg.source", tmp_path / "mm", *original, "--cfg.target", tmp_path / "dist2")
    ok("AutoConverter", "mm_to_torch_dist", *again)
    for name in (".metadata", "__0_0.distcp", "common.pt", "metadata.json"):
        one, two = (tmp_path / d / "release" / name for d in ("dist", "dist2"))
        assert one.read_bytes() == two.read_bytes(), name
    ok("AutoConverter", "torch_dist_to_dcp", *words, "--cfg.target", tmp_path / "dcp")
    assert mmconvert.verify(tmp_path / "dcp", hf).equal
    assert "healthy" in ok("doctor", there)


def test_a_wrapper_around_the_vision_encoder(tmp_path: Path) -> None:
    """ms-swift's names: the Hugging Face encoder in a module named visual."""
    hf = make_hf("qwen2.5vl-7b", tmp_path / "hf", layers=1, vit_layers=1)
    there = tmp_path / "dist"
    ok("AutoConverter", "hf_to_torch_dist", "--cfg.source", hf, "--cfg.target", there)
    path = there / "release/.metadata"
    path.write_bytes(renamed(path.read_bytes(), b"visual.", b"visual.visual."))
    words = ("--cfg.source", there, "--cfg.hf_config.hf_dir", hf, "--cfg.target", tmp_path / "back")
    ok("AutoConverter", "torch_dist_to_hf", *words)
    assert compare_hf(hf, tmp_path / "back") == []


def renamed(pickle: bytes, old: bytes, new: bytes) -> bytes:
    """A pickle whose texts that begin with a prefix begin with another."""
    at, more = 0, len(new) - len(old)
    while (at := pickle.find(old, at)) > 0:
        size = int.from_bytes(pickle[at - 4 : at], "little") + more
        rest = pickle[at + len(old) :]
        pickle = pickle[: at - 4] + size.to_bytes(4, "little") + new + rest
        at += len(new)
    return pickle


def test_no_other_family_has_the_form(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=1, vit_layers=1)
    words = ("--cfg.source", hf, "--cfg.target", tmp_path / "dist")
    done = run_cli("AutoConverter", "hf_to_torch_dist", *map(str, words))
    assert done.returncode == 2
    assert "Qwen2-VL has no torch_dist form" in done.stderr
