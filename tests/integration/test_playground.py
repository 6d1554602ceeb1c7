"""The playground: every checkpoint in it is what it says, and nothing is left half made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import copied, rank_files, snapshot
from mmconvert import converters
from mmconvert.api import inspect
from mmconvert.playground.checkpoints import make_hf
from mmconvert.playground.folder import ITEMS

FIRST_MATRIX = "image_encoder.encoder.blocks.layers.0.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("playground") / "play"
    done = run_cli("playground", folder, check=0)
    _, *lines, after = done.stdout.splitlines()
    assert after == f"next: cd {folder}, then mm-convert inspect hf"
    listed = [line.split()[0] for line in lines]
    assert listed == [item.name for item in ITEMS]
    assert all((folder / name).exists() for name in listed)
    return folder


def test_there_is_a_checkpoint_of_every_family(play: Path) -> None:
    found = {inspect(path).family for path in play.glob("hf*")} - {""}  # GLM-4.5V has no MM form
    assert found == {converters.load(name).name for name in converters.BUILT_IN} | {"Qwen-VL"}


def test_training_left_two_iterations_and_an_optimizer(play: Path) -> None:
    done = run_cli("verify", "--quiet", play / "hf", play / "save_dir", check=1)
    assert done.stdout == ""
    told = run_cli("diff", play / "hf", play / "save_dir", check=1).stdout
    assert "1 of 589 tensors differ" in told
    assert FIRST_MATRIX in told
    for number in (1000, 2000):
        for path in rank_files(play / "save_dir" / f"iter_{number:07d}").values():
            content = torch.load(path, weights_only=True)
            assert content["iteration"] == number
            assert content["optimizer"]["exp_avg"].shape == (250,)
    assert len(list((play / "save_dir").glob("iter_*"))) == 2


def moved_by_torch(base: Path, out: Path) -> Path:
    """`base` with its projector and its text decoder moved; exact steps, so always the same."""
    copied(base, out)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if not (layer or "merger.mlp" in name) or "norm" in name:
                continue
            rate = 2.0**-11 * (1 + int(layer[1]) if layer else 2)
            steps = ((torch.arange(tensor.numel()) * 31) % 17 - 8).reshape(tensor.shape)
            tensors[name] = (tensor.float() + steps * rate / 4).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return out


def test_the_trained_model_is_the_base_moved_as_torch_moves_it(play: Path, tmp_path: Path) -> None:
    trained = moved_by_torch(play / "base", tmp_path / "trained")
    run_cli("verify", play / "trained", trained, check=0)


def test_the_faulty_ones_have_their_faults(play: Path) -> None:
    old = run_cli("doctor", play / "mm_2.2.0", "--hf_dir", play / "hf", check=3)
    assert "vit_qkv concatenated" in old.stdout
    drifted = run_cli("doctor", play / "mm_drifted", "--hf_dir", play / "hf", check=3)
    assert "input_layernorm" in drifted.stdout


def test_the_adapter_fits_its_base(play: Path) -> None:
    config = json.loads((play / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (play / config["base_model_name_or_path"] / "config.json").is_file()


def test_what_is_there_is_left_alone(play: Path) -> None:
    before = snapshot(play)
    done = run_cli("playground", play, check=2)
    assert "exists" in done.stderr
    assert snapshot(play) == before
    assert [p.name for p in play.parent.iterdir()] == [play.name]


def test_it_is_the_same_everywhere(play: Path, tmp_path: Path) -> None:
    make_hf("qwen2vl-2b", tmp_path / "hf")
    run_cli("verify", play / "hf", tmp_path / "hf", check=0)
