"""The numbers of a training: losses by a loop made by hand, replicas, recompute, sums in fp32."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

import talking
import tinyfamilies
from mmconvert.runtime import engine as engines
from mmconvert.runtime import reference
from mmconvert.runtime.batch import IGNORED, Batch
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.dataset import Feed, read_samples
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.families import Architecture, architecture
from mmconvert.runtime.launch import Emit, launch
from mmconvert.runtime.mmfiles import LoadableCheckpoint
from nights import nightly

pytestmark = pytest.mark.slow
STEPS, SIZE, COUNT = 4, 2, 2
WORDS = ("a", "a long answer", "of", "something else")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.make("qwen2_vl", tmp_path_factory.mktemp("numbers") / "hf", tied=True)


@pytest.fixture(scope="module")
def data(hf: Path) -> Path:
    """Samples whose answers have different lengths: the averages differ."""
    path = talking.write_data(hf.parent)
    text = path.read_text()
    for colour, words in zip(talking.COLOURS, WORDS, strict=True):
        text = text.replace(f'"content": "{colour}"', f'"content": "{words}"')
    path.write_text(text)
    return path


def mm(hf: Path, llm: str, vit: str, tp: int) -> Path:
    out = hf.parent / f"mm {llm} {vit} {tp}"
    return out if out.exists() else tinyfamilies.convert("qwen2_vl", hf, out, llm, vit, tp)


# ----------------------------------------------------------------------- a loop made by hand
def cross_entropies(logits: Tensor, batch: Batch) -> list[Tensor]:
    """For each sample, the cross entropies of its learnt tokens."""
    found: list[Tensor] = []
    for line, labels in zip(logits, batch.labels, strict=True):
        learnt = labels[1:] != IGNORED
        rows, expected = line[:-1][learnt].float(), labels[1:][learnt]
        found.append(F.cross_entropy(rows, expected, reduction="none"))
    return found


def average(kind: str, micro_batches: Sequence[list[Tensor]]) -> Tensor:
    """The three averages, as they are defined."""
    if kind == "per_token":
        return torch.cat([z for each in micro_batches for z in each]).mean()
    if kind == "per_sample":
        means = [torch.stack([z.mean() for z in each]).mean() for each in micro_batches]
        return torch.stack(means).mean()
    return torch.stack([torch.cat(each).mean() for each in micro_batches]).mean()


def by_hand(hf: Path, data: Path, kind: str) -> list[tuple[float, float, float]]:
    """(loss, rate, gradient norm) of each step, with transformers' model and torch's AdamW."""
    arch = architecture(hf)
    model = arch.model_class().from_pretrained(hf, config=arch.config, dtype=torch.float32).eval()
    feed = Feed(Speaker(arch, hf), read_samples([data], 0), SIZE, COUNT)
    named = list(model.named_parameters())
    plain = {name for name, p in named if p.dim() == 1 or name.endswith(".bias")}
    groups = [
        {"params": [p for name, p in named if name not in plain], "weight_decay": 0.01},
        {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    found: list[tuple[float, float, float]] = []
    for step in range(STEPS):
        batches = feed.step(step)
        logits = [reference.forward(arch, model, batch) for batch in batches]
        loss = average(kind, [cross_entropies(*both) for both in zip(logits, batches, strict=True)])
        model.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        # two steps of warm-up from 0, then a cosine that ends after the last step
        rate = 3e-3 * (step / 2 if step <= 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 2)))
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        found.append((float(loss.detach()), rate, norm))
    return found


@pytest.mark.parametrize("kind", ["default", "per_sample", "per_token"])
def test_losses_are_those_of_a_loop_made_by_hand(
    kind: str, hf: Path, data: Path, tmp_path: Path
) -> None:
    what = talking.plan(tmp_path / "save", STEPS, size=SIZE, count=COUNT, loss=kind)
    curve = talking.learn(mm(hf, "[4]", "[3]", 1), hf, [data], what)
    expected = by_hand(hf, data, kind)
    assert [line[1] for line in curve] == pytest.approx([e[0] for e in expected], rel=1e-6)
    assert [line[2] for line in curve] == pytest.approx([e[1] for e in expected], rel=1e-9)
    assert [line[3] for line in curve] == pytest.approx([e[2] for e in expected], rel=1e-5)


# --------------------------------------------------------------------------------- replicas
DP = {
    "DP2": (("[4]", "[3]", 1), {}),
    "DP2, optimizer divided": (("[4]", "[3]", 1), {"sharded": True}),
    "DP2 TP2, optimizer divided": (("[4]", "[3]", 2), {"sharded": True}),
    "DP2 PP2": (("[1,3]", "[3,0]", 1), {}),
    "DP2 PP2, recomputed": (("[1,3]", "[3,0]", 1), {"recompute": True}),
}
DP_TODAY = ("DP2, optimizer divided", "DP2 PP2, recomputed")


@pytest.fixture(scope="module")
def alone(hf: Path, data: Path) -> talking.Curve:
    what = talking.plan(hf.parent / "alone", 3, count=4, loss="per_token")
    return talking.learn(mm(hf, "[4]", "[3]", 1), hf, [data], what)


@pytest.mark.parametrize("name", nightly(DP, but=DP_TODAY))
def test_replicas_have_no_part_in_what_is_learnt(
    name: str, hf: Path, data: Path, alone: talking.Curve, tmp_path: Path
) -> None:
    layout, more = DP[name]
    what = talking.plan(tmp_path / "save", 3, count=4, loss="per_token", replicas=2, **more)
    curve = talking.learn(mm(hf, *layout), hf, [data], what)
    assert [line[1] for line in curve] == pytest.approx([line[1] for line in alone], rel=1e-6)
    assert [line[3] for line in curve] == pytest.approx([line[3] for line in alone], rel=1e-5)


def test_a_divided_optimizer_goes_on_with_any_number_of_replicas(
    hf: Path, data: Path, tmp_path: Path
) -> None:
    """Saved by three replicas whose parts of a parameter are uneven, taken up by one."""
    start, save = mm(hf, "[4]", "[3]", 1), tmp_path / "save"
    given: dict[str, Any] = {"count": 3, "save_every": 2}
    what = talking.plan(save, 3, **given, replicas=3, sharded=True)
    whole = talking.learn(start, hf, [data], what)
    shutil.rmtree(save / "iter_0000003")
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    rest = talking.learn(start, hf, [data], talking.plan(save, 3, **given), resume=True)
    assert [line[1] for line in rest] == pytest.approx([line[1] for line in whole[2:]], rel=1e-6)
    content = torch.load(next(save.glob("iter_0000002/*/*.pt")), weights_only=True)
    shapes = {n: p.shape for n, p in content["model"].items() if p is not None}
    for group in content["optimizer"]["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            assert content["optimizer"]["state"][number]["exp_avg"].shape == shapes[name]


# ------------------------------------------------------------------------- recompute, bf16
def test_recomputed_layers_give_the_same_curve(tmp_path: Path) -> None:
    """Omni, whose audio encoder hands its states over between layers at a border of stages."""
    hf = talking.make("omni", tmp_path / "hf")
    data = tmp_path / "data.json"
    talking.sound(tmp_path / "a.wav", 300)
    talking.write_data(tmp_path)
    items = [talking.talk("<image><audio>?", "yes", images=["red.png"], audios=["a.wav"])]
    data.write_text(json.dumps(items))
    start = tinyfamilies.convert("omni", hf, tmp_path / "mm", "[0,4]", "[2,1]")
    curves = [
        talking.learn(start, hf, [data], talking.plan(tmp_path / str(again), 2, recompute=again))
        for again in (False, True)
    ]
    assert curves[0] == curves[1]  # to the bit


@dataclass(frozen=True)
class Summed:
    """The job: one step of many micro-batches in bf16, and the same micro-batches one by one."""

    arch: Architecture
    stored: LoadableCheckpoint
    hf: Path
    data: Path

    def __call__(self, device: torch.device, emit: Emit) -> float:
        run = engines.load(self.arch, self.stored, device, torch.bfloat16)
        feed = Feed(Speaker(self.arch, self.hf), read_samples([self.data], 0), 1, 16)
        batches = feed.step(0)
        named = [(n, p) for n, p, _ in run.parameters()]
        sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named}
        for batch in batches:
            run.train([batch], "default")
            for n, p in named:
                assert p.grad is not None
                sums[n] += p.grad.double() / len(batches)
        run.sum_in_fp32()
        run.train(batches, "default")
        apart = 0.0
        for n, p in named:
            found = run.gradient(p)
            assert found is not None
            assert found.dtype == torch.float32
            assert p.grad is None
            apart = max(apart, float((found - sums[n]).norm() / sums[n].norm().clamp(min=1e-9)))
        return apart


def test_bf16_gradients_are_added_in_fp32(hf: Path, data: Path) -> None:
    arch, stored = load_folder(hf, mm(hf, "[4]", "[3]", 1))
    apart = launch(Summed(arch, stored, hf, data), 1, lambda event: None)
    assert isinstance(apart, float)
    assert apart < 1e-6  # added in bf16: 5e-3
