"""Faults that a converter can have: each fails validation, and is named at its layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import talking
import tinyfamilies as models
from commands import copied, edit_rank
from mmconvert.errors import TensorError
from mmconvert.runtime import commands
from mmconvert.runtime.verdict import ValidationReport
from nights import nightly

Shard = dict[str, torch.Tensor]
VIT, TEXT = "image_encoder.encoder.blocks.layers", "text_decoder.decoder.layers"
HEADS, GROUPS = 2, 1  # of the vision encoder and of the text decoder, on each of two tp ranks


def concatenated(name: str, heads: int) -> Callable[[Shard], None]:
    """Rows q of all heads, k of all heads, v of all heads, instead of head by head."""

    def mutate(shard: Shard) -> None:
        for kind in ("weight", "bias"):
            t = shard[f"{name}.{kind}"]
            rows = t.view(heads, 3, -1, *t.shape[1:])
            shard[f"{name}.{kind}"] = rows.transpose(0, 1).reshape(t.shape).clone()

    return mutate


def ungrouped(shard: Shard) -> None:
    """v before k in a query group of four queries."""
    name = f"{TEXT}.1.self_attention.linear_qkv.weight"
    rows = shard[name].view(GROUPS, 6, -1, shard[name].shape[1])
    shard[name] = rows[:, [0, 1, 2, 3, 5, 4]].reshape(shard[name].shape).clone()


def swapped_halves(shard: Shard) -> None:
    name = f"{TEXT}.2.mlp.linear_fc1.weight"
    gate, up = shard[name].chunk(2)
    shard[name] = torch.cat([up, gate])


def zero_bias(shard: Shard) -> None:
    shard[f"{VIT}.1.mlp.linear_fc1.bias"].zero_()


def swapped_norms(shard: Shard) -> None:
    one, two = (f"{TEXT}.0.{n}_layernorm.weight" for n in ("input", "pre_mlp"))
    shard[one], shard[two] = shard[two], shard[one]


def stale(name: str) -> Callable[[Shard], None]:
    """A copy that one rank did not update."""

    def mutate(shard: Shard) -> None:
        shard[name] = shard[name] * 1.01

    return mutate


class Mutation(NamedTuple):
    """What is done to which ranks, and where it must be found."""

    mutate: Callable[[Shard], None]
    stage: int
    where: str
    tps: tuple[int, ...] = (0, 1)
    found_on: tuple[int, ...] = (0, 1)


MUTATIONS = {
    "vision qkv not interleaved": Mutation(
        concatenated(f"{VIT}.0.self_attention.linear_qkv", HEADS),
        0,
        "image_encoder layer 0, self_attention",
    ),
    "text v before k": Mutation(ungrouped, 1, "text_decoder layer 2, self_attention"),
    "gate and up swapped": Mutation(swapped_halves, 1, "text_decoder layer 3, mlp"),
    "bias zeroed": Mutation(zero_bias, 0, "image_encoder layer 1, mlp"),
    "norms swapped": Mutation(swapped_norms, 1, "text_decoder layer 1, input_layernorm"),
    "stale norm on one rank": Mutation(
        stale(f"{TEXT}.0.pre_mlp_layernorm.weight"),
        1,
        "text_decoder layer 1, pre_mlp_layernorm",
        (1,),
        (1,),
    ),
    "stale tied output layer": Mutation(
        stale("text_decoder.output_layer.weight"), 1, "text_decoder output_layer", (1,)
    ),
    "stale embedding": Mutation(
        stale("text_decoder.embedding.word_embeddings.weight"), 0, "text_decoder embedding", (0,)
    ),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tied Qwen2-VL at tp 2 pp 2: text layer 0 on the first stage, 1 to 3 on the second."""
    folder = tmp_path_factory.mktemp("mutations")
    hf = models.make("qwen2_vl", folder / "hf", tied=True)
    return hf, models.convert("qwen2_vl", hf, folder / "mm", "[1,3]", "[3,0]", 2)


def validated(mm: Path, hf: Path) -> ValidationReport:
    return commands.validate(mm, hf, "", (), (), "fp32", 0.0, lambda event: None)


# Encoder and decoder, inside a layer and beside the layers, all ranks and one; the rest nightly.
TODAY = ("vision qkv not interleaved", "stale norm on one rank", "stale tied output layer")


@pytest.mark.parametrize("name", nightly(MUTATIONS, but=TODAY))
def test_a_mutation_fails_at_its_layer(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    hf, whole = pair
    mm, mutation = copied(whole, tmp_path / "mm"), MUTATIONS[name]
    for tp in mutation.tps:
        rank = f"mp_rank_{tp:02d}_{mutation.stage:03d}"
        edit_rank(mm, rank, lambda content: mutation.mutate(content["model"]))
    report = validated(mm, hf)
    assert not report.passed
    assert not report.checks[0].passed
    assert report.parting is not None
    assert report.parting.label == mutation.where
    assert report.parting.ranks == list(mutation.found_on)


def one_word(shard: Shard) -> None:
    """A word that no built-in question has."""
    name = "text_decoder.embedding.word_embeddings.weight"
    shard[name] = shard[name].clone()
    shard[name][90] = 0


def frames_swapped(shard: Shard) -> None:
    """A picture is the same in both frames of a patch, so that nothing computed changes."""
    name = "image_encoder.encoder.patch_embed.proj.weight"
    shard[name] = shard[name].flip(2).contiguous()


UNSEEN = {
    "one word of the second rank": (one_word, (1,), "embed_tokens.weight"),
    "frames of a patch swapped": (frames_swapped, (0, 1), "patch_embed.proj.weight"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_inputs_do_not_touch_is_compared_too(name: str, tmp_path: Path) -> None:
    hf = talking.make("qwen2_vl", tmp_path / "hf")  # made-up pixels would differ in each frame
    mm = models.convert("qwen2_vl", hf, tmp_path / "mm", "[4]", "[3]", 2)
    mutate, tps, where = UNSEEN[name]
    for tp in tps:
        edit_rank(mm, f"mp_rank_{tp:02d}", lambda content: mutate(content["model"]))
    report = validated(mm, hf)
    wrong = [c for c in report.checks if not c.passed]
    assert [c.name for c in wrong] == ["weights"]
    assert where in wrong[0].note


def test_the_audio_encoder_is_run_without_a_sound_of_the_users(tmp_path: Path) -> None:
    hf = talking.make("omni", tmp_path / "hf")
    mm = models.convert("omni", hf, tmp_path / "mm", "[4]", "[3]")

    def shift(content: dict) -> None:
        name = "audio_encoder.encoder.blocks.layers.1.mlp.linear_fc1.bias"
        content["model"][name] = content["model"][name] + 1

    edit_rank(mm, "mp_rank_00", shift)
    report = validated(mm, hf)
    assert "a built-in sound" in report.inputs
    assert report.parting is not None
    assert report.parting.label == "audio_encoder layer 1, mlp"


def test_a_missing_tensor_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    hf, whole = pair
    mm, name = copied(whole, tmp_path / "mm"), f"{TEXT}.1.self_attention.linear_qkv.bias"
    for tp in (0, 1):
        edit_rank(mm, f"mp_rank_{tp:02d}_001", lambda content: content["model"].pop(name))
    with pytest.raises(TensorError) as caught:
        validated(mm, hf)
    assert f"mp_rank_00_001 model: {name} is missing" in str(caught.value) or (
        f"mp_rank_01_001 model: {name} is missing" in str(caught.value)
    )


def test_a_surplus_tensor_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    hf, whole = pair
    mm = copied(whole, tmp_path / "mm")

    def add(content: dict) -> None:
        content["model"]["text_decoder.mystery.weight"] = torch.ones(2)

    edit_rank(mm, "mp_rank_01_000", add)
    with pytest.raises(TensorError) as caught:
        validated(mm, hf)
    assert "mp_rank_01_000 model: 1 tensor has no place in the model" in str(caught.value)
    assert "text_decoder.mystery.weight" in str(caught.value)


def test_an_audio_k_bias_is_reported(tmp_path: Path) -> None:
    """MM format has a k bias that transformers has not; it changes nothing, and would be lost."""
    hf = models.make("omni", tmp_path / "hf")
    mm = models.convert("omni", hf, tmp_path / "mm", "[4]", "[3]")

    def add(content: dict) -> None:
        name = "audio_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.bias"
        content["model"][name].view(4, 3, -1)[:, 1] = 0.5

    edit_rank(mm, "mp_rank_00", add)
    report = validated(mm, hf)
    assert [c.name for c in report.checks if not c.passed] == ["k biases that are zero"]
