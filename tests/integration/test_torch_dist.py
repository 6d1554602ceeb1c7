"""torch_dist folders: Megatron-core loads ours at any TP and PP; there and back by all formats."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from torch.multiprocessing.spawn import start_processes

import mmconvert
import tinymoe
from api import Shape, to_mm
from cli import run_cli
from megatron_experts import ExpertCase
from megatron_ranks import Case
from megatron_text import WORLD
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf
from nights import in_turns, nightly
from tinymodels import CONVERTERS, TEXT_LAYERS, VIT_LAYERS, save, tiny_model
from torchdistranks import BEFORE, FUSED, run

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


EXPERT_SIZES = [(1, 1), (1, 2), (2, 1)]
NAMES = [*SHAPES, *(f"tp{tp} ep{ep}" for tp, ep in EXPERT_SIZES)]


class Made(NamedTuple):
    """A small model, and the folder with what came of it."""

    hf: Path
    folder: Path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Qwen2.5-VL."""
    check_megatron()
    folder = tmp_path_factory.mktemp("torchdist")
    model: Any = tiny_model("qwen2_5_vl", tied=False).to(torch.bfloat16)
    hf = save(model, folder / "hf")
    cases: list[Case | ExpertCase] = []
    for name, (shape, pp) in SHAPES.items():
        to_mm(CONVERTERS["qwen2_5_vl"], hf, folder / name, shape)
        cases.append(Case(name, folder / name, shape.tp, pp, list(shape.llm[0])))
    return loaded(model, Made(hf, folder), cases)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Qwen3-VL with experts."""
    check_megatron()
    folder = tmp_path_factory.mktemp("experts")
    model: Any = tinymoe.qwen3vl_moe().to(torch.bfloat16)
    hf = tinymoe.save(model, folder / "hf")
    cases: list[Case | ExpertCase] = []
    for tp, ep in EXPERT_SIZES:
        case = ExpertCase(folder / f"mm{tp}{ep}", tp, ep)
        sizes = ("--cfg.parallel_config.tp_size", tp, "--cfg.parallel_config.ep_size", ep)
        original = ("--cfg.hf_config.hf_dir", hf)
        ok("AutoConverter", "hf_to_mm", *original, "--cfg.mm_dir", case.mm, *sizes)
        cases.append(case)
    return loaded(model, Made(hf, folder), cases)


def check_megatron() -> None:
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed (it is in the extra dev)")


def loaded(model: Any, made: Made, cases: list[Case | ExpertCase]) -> Made:
    """Megatron-core has loaded and saved it, in a process for each rank."""
    dist = made.folder / "dist"
    ok("AutoConverter", "hf_to_torch_dist", "--cfg.source", made.hf, "--cfg.target", dist)
    import_module("megatron.core.models.gpt")  # once; the ranks are forked
    import_module("megatron.core.dist_checkpointing")
    torch.set_num_threads(1)
    text = model.config.text_config.to_dict()
    start_processes(run, (made.folder, text, cases), nprocs=WORLD, start_method="fork")
    return made


@pytest.fixture
def made(request: pytest.FixtureRequest, name: str) -> Made:
    return request.getfixturevalue("experts" if " ep" in name else "dense")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_megatron_loads_it(made: Made, name: str) -> None:
    """At TP 1, TP 2, PP 2 and EP 2, each rank gets the weights of its own rank file."""
    for rank in range(WORLD):
        assert torch.load(made.folder / f"{name}.{rank}.differ", weights_only=True) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), in_turns(NAMES, ("saved", "single")))
def test_a_trained_text_model_comes_back(made: Made, name: str, form: str) -> None:
    """What Megatron saves of the text decoder, in either form, beside our vision encoder."""
    ours, theirs = (mmconvert.open(made.folder / n) for n in ("dist", f"{name}.{form}"))
    text = {key: theirs[key] for key in theirs}
    whole = text | {key: ours[key] for key in ours if not key.startswith("language_model.")}
    out = made.folder / f"{name}.{form}.whole"
    rewritten(made.folder / "dist", out, whole)
    back = made.folder / f"{name}.{form}.back"
    words = ("--cfg.source", out, "--cfg.hf_config.hf_dir", made.hf, "--cfg.target", back)
    ok("AutoConverter", "torch_dist_to_hf", *words)
    assert compare_hf(made.hf, back) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_megatron_saves_is_read(made: Made, name: str) -> None:
    """Gate and up lie apart in what TP 2 saves, and the layers are divided among PP ranks."""
    ours = mmconvert.open(made.folder / "dist")
    theirs = mmconvert.open(made.folder / f"{name}.saved")
    text = [key for key in ours if key.startswith("language_model.")]
    local = {key: key.replace(BEFORE, FUSED) for key in text}
    assert sorted(theirs) == sorted(local.values())
    for key in text:
        assert torch.equal(ours[key], theirs[local[key]]), key


@pytest.mark.parametrize(
    "model",
    nightly(
        ("qwen2.5vl-7b", "qwen3vl-8b", "qwen3vl-30b-a3b"), but=("qwen2.5vl-7b", "qwen3vl-30b-a3b")
    ),
)
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


SMALL: dict[str, Any] = {"layers": 2, "vit_layers": 2}
MODELS = {"qwen2.5vl-7b": SMALL, "qwen3vl-30b-a3b": SMALL | {"deepstack": [0]}}
EXPERTS = "mlp.experts.experts."


def singletons(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron-Core's keys with ``singleton_local_shards``: a tensor for each layer and expert,
    gate and up apart.
    """
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        before, layers, after = key.partition("decoder.layers.")
        for i, layer in enumerate(tensor if layers else [tensor]):
            name = f"{before}{layers}{i}.{after}" if layers else key
            stem, experts, leaf = name.partition(EXPERTS)
            for e, one in enumerate(layer if experts else [layer]):
                each = f"{stem}{experts}{e}.{leaf}" if experts else name
                if each.endswith("mlp.linear_fc1.weight") or (experts and "fc1" in leaf):
                    found[f"{each}_w"], found[f"{each}_v"] = (t.clone() for t in one.chunk(2))
                else:
                    found[each] = one.clone()
    return found


def rewritten(folder: Path, out: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A torch_dist folder with other tensors, written by torch."""
    out.mkdir()
    save_dcp(dict(tensors), checkpoint_id=out, no_dist=True)
    (out / "common.pt").write_bytes((folder / "release/common.pt").read_bytes())
    return out


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")
@pytest.mark.parametrize("model", MODELS)
def test_other_forms_of_the_keys(model: str, tmp_path: Path) -> None:
    """Layers and experts numbered, gate and up apart; a vocabulary padded with zeros, or with
    what training made of them; a layer too many.
    """
    hf = make_hf(model, tmp_path / "hf", **MODELS[model])
    there = tmp_path / "dist"
    ok("AutoConverter", "hf_to_torch_dist", "--cfg.source", hf, "--cfg.target", there)
    opened = mmconvert.open(there)
    whole = {key: opened[key] for key in opened}
    # Of the vision encoder only Qwen3-VL's is Megatron's own, with layers in one tensor.
    text = {key: t for key, t in whole.items() if key.startswith("language_model.")}
    rest = {key: t for key, t in whole.items() if key not in text}
    apart = rewritten(there, tmp_path / "apart", singletons(text) | rest)

    def back(source: Path, out: str) -> Any:
        words = ("--cfg.source", source, "--cfg.hf_config.hf_dir", hf, "--cfg.target")
        return run_cli("AutoConverter", "torch_dist_to_hf", *words, tmp_path / out)

    assert back(apart, "back").returncode == 0
    assert compare_hf(hf, tmp_path / "back") == []

    words = [key for key in text if key.endswith(("word_embeddings.weight", "output_layer.weight"))]
    padded = whole | {k: torch.nn.functional.pad(whole[k], (0, 0, 0, 7)) for k in words}
    assert back(rewritten(there, tmp_path / "padded", padded), "unpadded").returncode == 0
    assert compare_hf(hf, tmp_path / "unpadded") == []
    padded[words[0]][-1, 0] = 1
    done = back(rewritten(there, tmp_path / "trained", padded), "no")
    assert done.returncode == 3
    assert "zero" in done.stderr

    longer = {k: torch.cat([t, t[:1]]) if ".decoder.layers." in k else t for k, t in whole.items()}
    done = back(rewritten(there, tmp_path / "longer", longer), "no")
    assert done.returncode == 3
    assert "holds 3 layers" in done.stderr
    assert not (tmp_path / "no").exists()


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


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("model", "before"),
    in_turns(("qwen3vl-8b", "qwen3vl-30b-a3b"), ("visual.", "visual.visual.")),
)
def test_the_vision_encoder_of_transformers(model: str, before: str, tmp_path: Path) -> None:
    """Qwen3-VL in a trainer that keeps the encoder of Hugging Face."""
    hf = make_hf(model, tmp_path / "hf", **MODELS["qwen3vl-30b-a3b"])
    there = tmp_path / "dist"
    ok("AutoConverter", "hf_to_torch_dist", "--cfg.source", hf, "--cfg.target", there)
    opened, original = mmconvert.open(there), mmconvert.open(hf)
    tensors = {key: opened[key] for key in opened if key.startswith("language_model.")}
    vision = [key for key in original if key.startswith("model.visual.")]
    tensors |= {before + key.removeprefix("model.visual."): original[key] for key in vision}
    theirs = rewritten(there, tmp_path / "theirs", tensors)
    words = ("--cfg.source", theirs, "--cfg.hf_config.hf_dir", hf, "--cfg.target")
    ok("AutoConverter", "torch_dist_to_hf", *words, tmp_path / "back")
    assert compare_hf(hf, tmp_path / "back") == []
    ok("AutoConverter", "torch_dist_to_mm", *words, tmp_path / "mm")
    assert mmconvert.verify(tmp_path / "mm", hf).equal
    assert mmconvert.inspect(theirs).family == "Qwen3-VL"


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
