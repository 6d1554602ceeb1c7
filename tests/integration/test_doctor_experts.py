"""``mm-convert doctor`` on MM checkpoints whose experts are divided over expert-parallel ranks."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from commands import copied, edit_json, edit_rank, rank_files
from inprocess import BACK, HF, MM, SOURCE, TARGET, call
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm
from nights import in_turns

Json = dict[str, Any]
NAME = "Qwen3VLMegatronConverter"
LAYERS = "text_decoder.decoder.layers"
EP = ("--cfg.parallel_config.ep_size", "2")
RANKS = ("mp_rank_00_000", "mp_rank_00_001")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with experts."""
    out = tmp_path_factory.mktemp("hf") / "hf"
    return make_hf("qwen3vl-30b-a3b", out, layers=2, vit_layers=2, deepstack=[0])


@pytest.fixture(scope="module")
def sound(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It in MM format, at EP 2."""
    mm = tmp_path_factory.mktemp("mm") / "mm"
    words = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", mm)
    call("Qwen3VLMegatronConverter", "hf_to_mm", *words, *EP, check=0)
    return mm


def findings(mm: Path, *flags: str | Path) -> list[Json]:
    report = json.loads(call("doctor", mm, "--json", *flags, check=None).stdout)
    return [found for found in report["findings"] if found["id"] != "stale-manifest"]


def of_experts(tensors: Json, part: str = "", layer: int = 0) -> list[str]:
    return [n for n in tensors if f"{LAYERS}.{layer}.mlp.experts.local_experts.{part}" in n]


def edit_all(mm: Path, change: Callable[[Json], object]) -> None:
    for rank in RANKS:
        edit_rank(mm, rank, lambda content: change(content["model"]))


def a_folder_less(mm: Path) -> None:
    (mm / "mmconvert.json").unlink()
    edited = mm / "release" / "mp_rank_00_003"  # ranks 0, 1 and 3: 2 is missing
    shutil.copytree(mm / "release" / "mp_rank_00_001", edited)


def the_last_folder_less(mm: Path) -> None:
    """Nothing but the number of experts tells."""
    (mm / "mmconvert.json").unlink()
    shutil.rmtree(mm / "release" / RANKS[1])


def an_expert_less(mm: Path) -> None:
    """In one layer, on all ranks: as where ep does not divide the experts."""
    edit_all(mm, lambda x: [x.pop(n) for n in of_experts(x, "0.")])


def half_an_expert(mm: Path) -> None:
    edit_all(mm, lambda x: x.pop(next(n for n in of_experts(x, "1.") if "linear_fc2" in n)))


def an_expert_less_on_one_rank(mm: Path) -> None:
    edit_rank(mm, RANKS[1], lambda c: [c["model"].pop(n) for n in of_experts(c["model"], "1.")])


def the_last_expert_lost(mm: Path) -> None:
    """Of every layer and rank: what is there is whole in itself."""

    def edit(tensors: Json) -> None:
        last = max(int(n.split("local_experts.")[1].split(".")[0]) for n in of_experts(tensors))
        for layer in (0, 1):
            for name in of_experts(tensors, f"{last}.", layer):
                del tensors[name]

    (mm / "mmconvert.json").unlink()
    edit_all(mm, edit)


class Case(NamedTuple):
    damage: Callable[[Path], None]
    found: tuple[str, ...]
    words: tuple[str, ...]


CASES = {
    "a folder": Case(a_folder_less, ("missing-rank-folder",), ("3 of 4", "mp_rank_00_002")),
    "the last folder": Case(
        the_last_folder_less, ("missing-rank-folder",), ("1 ep rank", "has 16", "mp_rank_00_001")
    ),
    "an expert of a layer": Case(an_expert_less, ("expert-hole",), ("layer 0", "on each ep rank")),
    "half an expert": Case(half_an_expert, ("missing-tensor",), ("local_experts.1.linear_fc2",)),
    "an expert on one rank": Case(
        an_expert_less_on_one_rank, ("tp-names-differ",), ("ep rank 1", "mp_rank_00_001", "lacks 2")
    ),
    "an expert of all layers": Case(the_last_expert_lost, ("expert-count",), ("the model has",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_missing(case: Case, sound: Path, hf: Path, tmp_path: Path) -> None:
    mm = copied(sound, tmp_path / "mm")
    case.damage(mm)
    found = findings(mm, "--hf_dir", hf)
    assert {f["id"] for f in findings(mm)} >= set(case.found)  # the routers count them too
    assert tuple(f["id"] for f in found) == case.found
    for word in case.words:
        assert word in found[0]["what"]
    # A conversion says the same.
    words = ("--cfg.mm_dir", mm, "--cfg.save_hf_dir", tmp_path / "back")
    done = call(
        "Qwen3VLMegatronConverter",
        "mm_to_hf",
        *words,
        "--cfg.hf_config.hf_dir",
        hf,
        "--json",
        check=3,
    )
    assert json.loads(done.stdout)["what"] == found[0]["what"]


def test_experts_that_are_all_there(sound: Path, hf: Path) -> None:
    assert findings(sound) == []
    assert findings(sound, "--hf_dir", hf, "--values") == []


def blindly(hf: Path, mm: Path, tp: int) -> None:
    """Replaces all experts by what the reference's converter makes of the stacks of ``hf``."""
    stacks = {n: t for path in hf.glob("*.safetensors") for n, t in load_file(path).items()}
    for rank in rank_files(mm):
        numbers = [int(n) for n in rank.split("_")[2:]]
        local = range(numbers[1] * 8, numbers[1] * 8 + 8)  # 16 experts, ep 2

        def edit(content: Json, t: int = numbers[0], local: range = local) -> None:
            for layer in (0, 1):
                of = f"model.language_model.layers.{layer}.mlp.experts"
                for number, expert in enumerate(local):
                    name = f"{LAYERS}.{layer}.mlp.experts.local_experts.{number}"
                    halves = stacks[f"{of}.gate_up_proj"][expert].T.chunk(2)
                    one = torch.cat([half.chunk(tp)[t] for half in halves])
                    two = stacks[f"{of}.down_proj"][expert].T.chunk(tp, dim=1)[t]
                    content["model"][f"{name}.linear_fc1.weight"] = one.clone()
                    content["model"][f"{name}.linear_fc2.weight"] = two.contiguous()

        edit_rank(mm, rank, edit)


def later(hf: Path, out: Path) -> Path:
    """The model as transformers 5 saves it."""
    call("moe_expert", "--style", "transformers5", "--hf_dir", hf, "--save_dir", out, check=0)
    return out


@pytest.mark.parametrize(("tp", "sizes"), in_turns([2, 1], [{}, {"moe_inter": 24}]))
def test_experts_that_stand_blindly_transposed(tp: int, sizes: Json, tmp_path: Path) -> None:
    """As the reference makes them of stacks that are stored the other way round: told with and
    without hf_dir, refused by conversions, mended by the command that doctor prints.
    """
    small = {"layers": 2, "vit_layers": 2, "deepstack": [0], **sizes}
    hf = later(make_hf("qwen3vl-30b-a3b", tmp_path / "hub", **small), tmp_path / "hf")
    good, mm, back = tmp_path / "good", tmp_path / "mm", tmp_path / "back"
    flags = (*EP, "--cfg.parallel_config.tp_size", str(tp))
    call(NAME, "hf_to_mm", HF, hf, MM, good, *flags, check=0)
    copied(good, mm)
    (mm / "mmconvert.json").unlink()
    blindly(hf, mm, tp)
    words = (MM, mm, HF, hf, BACK, back)
    assert "--experts transposed" in call(NAME, "mm_to_hf", *words, check=3).stderr
    for more in ((), ("--hf_dir", hf)):
        (found,) = findings(mm, *more)
        assert found["id"] == "experts-transposed", found
        command = found["command"]
    call(*shlex.split(command)[1:], check=0)
    assert compare_mm(good, tmp_path / "mm_mended") == []
    call(NAME, "mm_to_hf", *words, "--experts", "transposed", check=0)
    assert compare_hf(hf, back) == []


def test_what_is_not_transposed_is_not_read_so(sound: Path, hf: Path, tmp_path: Path) -> None:
    said = ("--experts", "transposed")
    for more in ((), (HF, hf)):
        out = tmp_path / "out"
        done = call(NAME, "resplit", SOURCE, sound, TARGET, out, *more, *said, check=3)
        assert "leave the flag out" in done.stderr
    done = call(NAME, "hf_to_mm", HF, hf, MM, tmp_path / "mm", *said, check=2)
    assert "--experts" in done.stderr
    dense = make_hf("qwen2vl-2b", tmp_path / "dense", layers=1, vit_layers=1)
    call("Qwen2VLConverter", "hf_to_mm", HF, dense, MM, tmp_path / "mm", check=0)
    words = (SOURCE, tmp_path / "mm", TARGET, tmp_path / "out")
    assert (
        "leave the flag out" in call("Qwen2VLConverter", "resplit", *words, *said, check=2).stderr
    )


def test_a_rank_that_stands_under_two_names(sound: Path, hf: Path, tmp_path: Path) -> None:
    """All of its experts stand twice. Those that are alike in hf_dir too are meant so."""
    mm = copied(sound, tmp_path / "mm")
    shutil.copy(rank_files(mm)[RANKS[0]], rank_files(mm)[RANKS[1]])
    for more, sure in (((), False), (("--hf_dir", hf), True)):
        (found,) = findings(mm, *more)
        assert found["id"] == "expert-twice" and "16 of 32 experts" in found["what"]
        assert all(f"{rank}" in found["what"] for rank in RANKS)
        assert ("--hf_dir" in found["fix"]) is not sure
    assert findings(mm, "--quick") == []
    back = tmp_path / "back"
    call(NAME, "mm_to_hf", MM, mm, HF, hf, BACK, back, check=0)  # of experts that are alike
    assert findings(mm, "--hf_dir", back) == []


def test_hf_dir_of_another_model_of_the_family(sound: Path, hf: Path, tmp_path: Path) -> None:
    """With experts where the checkpoint has none, or the other way round: nothing is to be left
    out, nothing to be copied again.
    """
    sizes: Json = {"layers": 2, "vit_layers": 2, "deepstack": [0]}
    dense, mm = make_hf("qwen3vl-8b", tmp_path / "dense", **sizes), tmp_path / "mm"
    call(NAME, "hf_to_mm", HF, dense, MM, mm, check=0)
    for checkpoint, other, words in ((sound, dense, "does not tell of"), (mm, hf, "no experts")):
        (found,) = findings(checkpoint, "--hf_dir", other)
        assert found["id"] == "other-model" and words in found["what"]
        assert "hf_dir" in found["fix"]
        flags = (MM, checkpoint, HF, other, BACK, tmp_path / "out")
        said = call(NAME, "mm_to_hf", *flags, check=3).stderr
        assert "another Qwen3-VL" in said and "--drop" not in said
    edit_json(
        copied(hf, tmp_path / "hf") / "config.json", lambda c: c.update(model_type="qwen3_vl")
    )
    said = call(NAME, "hf_to_mm", HF, tmp_path / "hf", MM, tmp_path / "out", check=3).stderr
    assert "another Qwen3-VL" in said and "--drop" not in said


def test_experts_that_are_all_one_mlp_are_meant_so(sound: Path, tmp_path: Path) -> None:
    """As where a dense model becomes one with experts."""
    mm = copied(sound, tmp_path / "mm")

    def alike(tensors: Json) -> None:
        for name in [*of_experts(tensors), *of_experts(tensors, layer=1)]:
            tensors[name] = torch.arange(tensors[name].numel()).view(tensors[name].shape).bfloat16()

    edit_all(mm, alike)
    assert findings(mm) == []


def test_inspect_draws_ep_ranks_side_by_side(sound: Path, tmp_path: Path) -> None:
    """Each with the bytes of its own file."""
    picture = tmp_path / "layout.svg"
    shown = call("inspect", sound, "--svg", picture, check=0).stdout
    assert "ep_size 2" in shown
    drawn = picture.read_text(encoding="utf-8")
    assert all(f">ep {ep} tp 0<" in drawn for ep in (0, 1)) and "ep_size 2" in drawn
    sizes = {path.stat().st_size for path in sound.glob("release/*/*.pt")}
    look = json.loads(call("inspect", sound, "--json", check=0).stdout)
    assert len(sizes) == 1 and look["layout"]["ep_size"] == 2
