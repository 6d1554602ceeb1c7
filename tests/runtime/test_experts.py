"""Experts over processes: what they learn has no part in the layout; faults in them are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import talking
import tinyfamilies
from cli import run_cli
from commands import (
    copied,
    edit_json,
    edit_rank,
    edit_single,
    mm_to_hf,
    rank_files,
    resplit,
    target,
)
from mmconvert.errors import TensorError
from mmconvert.runtime import commands
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.dataset import Data, read_samples
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.launch import launch
from mmconvert.runtime.samples import SampleSource
from mmconvert.runtime.validation import Validation
from mmconvert.runtime.verdict import ValidationReport
from nights import night, nightly

pytestmark = pytest.mark.slow
KIND, CONVERTER = "qwen3_vl_moe", "Qwen3VLMegatronConverter"
Shard = dict[str, torch.Tensor]
Layout = tuple[str, str, int, int]  # text, vision, tp, ep
ONE: Layout = ("[4]", "[3]", 1, 1)
EP_2: Layout = ("[4]", "[3]", 1, 2)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of 8 experts, and one without; deepstack layers 0 and 2."""
    return talking.make(KIND, tmp_path_factory.mktemp("experts") / "hf")


@pytest.fixture(scope="module")
def data(hf: Path) -> Path:
    """Text alone, a picture, two pictures, and a film."""
    film, path = hf.parent / "film", hf.parent / "data.json"
    film.mkdir()
    for i, colour in enumerate(talking.COLOURS):
        talking.picture(film / f"{i}.png", colour)
    items = [
        talking.talk("Hello.", "Hi."),
        talking.talk("<image>Which?", "red", images=["film/0.png"]),
        talking.talk("<image> or <image>?", "both", images=["film/1.png", "film/2.png"]),
        talking.talk("<image><video>?", "all", images=["film/3.png"], videos=["film"]),
    ]
    path.write_text(json.dumps(items))
    return path


def mm(hf: Path, layout: Layout) -> Path:
    llm, vit, tp, ep = layout
    out = hf.parent / f"mm {llm} {vit} {tp} {ep}"
    more = (f"ep_size={ep}",)
    return out if out.exists() else tinyfamilies.convert(KIND, hf, out, llm, vit, tp, *more)


def validated(mm: Path, hf: Path) -> ValidationReport:
    return commands.validate(mm, hf, "", (), (), "fp32", 0.0, lambda event: None)


# --------------------------------------------------------------------------------- training
LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "ep 2": (EP_2, {}),
    "ep 2, two replicas, optimizer divided": (EP_2, {"replicas": 2, "sharded": True}),
    "tp 2 ep 2": (("[4]", "[3]", 2, 2), {}),
    "pp 2 ep 2": (("[1,3]", "[3,0]", 1, 2), {}),
    "vpp 2 ep 2, recomputed": (("[[0,1],[1,2]]", "[[2,1],[0,0]]", 1, 2), {"recompute": True}),
}
TODAY = ("ep 2, two replicas, optimizer divided",)


@pytest.fixture(scope="module")
def alone(hf: Path, data: Path) -> talking.Curve:
    what = talking.plan(hf.parent / "alone", 3, count=4, loss="per_token")
    return talking.learn(mm(hf, ONE), hf, [data], what)


@pytest.mark.parametrize("name", nightly(LAYOUTS, but=TODAY))
def test_the_layout_has_no_part_in_what_is_learnt(
    name: str, hf: Path, data: Path, alone: talking.Curve, tmp_path: Path
) -> None:
    layout, more = LAYOUTS[name]
    what = talking.plan(tmp_path / "save", 3, count=4, loss="per_token", **more)
    curve = talking.learn(mm(hf, layout), hf, [data], what)
    assert [line[1] for line in curve] == pytest.approx([line[1] for line in alone], rel=1e-6)
    assert [line[3] for line in curve] == pytest.approx([line[3] for line in alone], rel=1e-5)


@pytest.mark.parametrize("asked", [False, True])
def test_what_routers_learn_from_is_said(asked: bool, hf: Path, data: Path, tmp_path: Path) -> None:
    mine = copied(hf, tmp_path / "hf")
    edit_json(mine / "config.json", lambda c: c["text_config"].update(output_router_logits=asked))
    heard: list[str] = []
    commands.finetune(
        mm(hf, ONE), mine, Data((SampleSource((data,)),)), talking.plan(tmp_path / "save", 1),
        "fp32", False, lambda event: heard.append(str(event)),
    )  # fmt: skip
    (said,) = (line for line in heard if "auxiliary loss" in line)
    assert ("transformers would add 0.001 of it" in said) == asked


@pytest.mark.parametrize("ep", [1, night(4)])
def test_a_restart_goes_on_to_the_bit_and_converts(
    ep: int, hf: Path, data: Path, tmp_path: Path
) -> None:
    start, whole, cut = mm(hf, EP_2), tmp_path / "whole", tmp_path / "cut"
    all_of_it = talking.learn(start, hf, [data], talking.plan(whole, 4, save_every=2))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "iter_0000004")
    (cut / "latest_checkpointed_iteration.txt").write_text("2")
    again = talking.plan(cut, 4, save_every=2)
    assert talking.learn(start, hf, [data], again, resume=True) == all_of_it[2:]
    for rank, path in rank_files(whole / "iter_0000004").items():
        one, two = (
            torch.load(p, weights_only=True)["model"]
            for p in (path, rank_files(cut / "iter_0000004")[rank])
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one if one[name] is not None)
    back, other = tmp_path / "back", tmp_path / "other"
    mm_to_hf(whole, hf, back, converter=CONVERTER)
    run_cli("verify", back, whole, check=0)
    resplit(whole, other, *target("[4]", "[3]", 1, f"ep_size={ep}"), converter=CONVERTER)
    report = validated(other, back)
    assert report.passed, report.as_dict()


def test_pictures_and_a_film_in_one_sample(hf: Path, data: Path) -> None:
    """Rows of deepstack layers, too, stand where the tokens of each are."""
    arch, stored = load_folder(hf, mm(hf, ("[1,3]", "[3,0]", 1, 2)))
    batch = Speaker(arch, hf).batch(read_samples([data], 0)[-1], answer=False)
    job = Validation(arch, stored, hf, batch, "a picture and a film", "fp32", 0.0)
    report = launch(job, stored.world, lambda event: None)
    assert isinstance(report, ValidationReport)
    assert report.passed, report.as_dict()


def test_ties_of_routers_are_counted(hf: Path, tmp_path: Path) -> None:
    """Two experts that are one ten-millionth apart, the other way round in the checkpoint."""
    near, name = copied(hf, tmp_path / "hf"), "layers.0.mlp.{}.weight"

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        gate = tensors[f"model.language_model.{name.format('gate')}"]
        gate[1] = gate[0] * (1 + 5e-7)

    edit_single(near, tie)
    other = tinyfamilies.convert(KIND, near, tmp_path / "mm", *ONE[:3])

    def turn(content: dict[str, Shard]) -> None:
        content["model"][f"text_decoder.decoder.{name.format('router')}"][0] *= 1 + 1e-6

    edit_rank(other, "mp_rank_00", turn)
    report = validated(other, near)
    assert report.passed, report.as_dict()
    assert any("choices of experts are ties" in note for note in report.notes)


# ----------------------------------------------------------------------------------- faults
LAYERS, VIT = "text_decoder.decoder.layers", "image_encoder.encoder.blocks.layers"
BOTH = ("mp_rank_00_000", "mp_rank_00_001")  # two expert-parallel ranks


def swapped(*pairs: tuple[str, str]) -> Callable[[Shard], None]:
    """Tensors exchanged, by the ends of their names."""

    def mutate(shard: Shard) -> None:
        for one, two in pairs:
            for name in [n for n in shard if one in n]:
                other = name.replace(one, two)
                shard[name], shard[other] = shard[other], shard[name]

    return mutate


def router_rows(shard: Shard) -> None:
    name = f"{LAYERS}.2.mlp.router.weight"
    shard[name] = shard[name][[1, 0, *range(2, 8)]]


def halves(shard: Shard) -> None:
    name = f"{LAYERS}.3.mlp.experts.local_experts.2.linear_fc1.weight"
    gate, up = shard[name].chunk(2)
    shard[name] = torch.cat([up, gate])


class Mutation(NamedTuple):
    """What is done to which ranks, and where it must be found."""

    mutate: Callable[[Shard], None]
    where: str
    ranks: tuple[str, ...] = BOTH


E0 = f"{LAYERS}.0.mlp.experts.local_experts"
MUTATIONS = {
    "two experts swapped": Mutation(
        swapped((f"{E0}.0.", f"{E0}.1.")), "text_decoder layer 0, mlp.experts", BOTH[1:]
    ),
    "router rows swapped": Mutation(router_rows, "text_decoder layer 2, mlp.router"),
    "gate and up of one expert swapped": Mutation(
        halves, "text_decoder layer 3, mlp.experts", BOTH[:1]
    ),
    "norms of q and k swapped": Mutation(
        swapped((f"{LAYERS}.1.self_attention.q_", f"{LAYERS}.1.self_attention.k_")),
        "text_decoder layer 1, self_attention",
    ),
    "deepstack mergers swapped": Mutation(
        swapped((f"{VIT}.0.deepstack_layer", f"{VIT}.2.deepstack_layer")),
        "image_encoder layer 0, deepstack_layer",
    ),
}


SEEN_TODAY = ("two experts swapped", "deepstack mergers swapped")


@pytest.mark.parametrize("name", nightly(MUTATIONS, but=SEEN_TODAY))
def test_a_mutation_fails_at_its_layer(name: str, hf: Path, tmp_path: Path) -> None:
    broken, mutation = copied(mm(hf, EP_2), tmp_path / "mm"), MUTATIONS[name]
    for rank in mutation.ranks:
        edit_rank(broken, rank, lambda content: mutation.mutate(content["model"]))
    report = validated(broken, hf)
    assert not report.checks[0].passed
    assert report.parting is not None
    assert report.parting.label == mutation.where


def test_a_deepstack_merger_at_another_layer_is_named(hf: Path, tmp_path: Path) -> None:
    broken = copied(mm(hf, EP_2), tmp_path / "mm")
    old, new = f"{VIT}.0.deepstack_layer", f"{VIT}.1.deepstack_layer"

    def move(content: dict[str, Shard]) -> None:
        content["model"] = {n.replace(old, new): t for n, t in content["model"].items()}

    for rank in BOTH:
        edit_rank(broken, rank, move)
    with pytest.raises(TensorError, match=rf"model: {old}\.layernorm\.weight is missing"):
        validated(broken, hf)
