"""Megatron's view of a converted checkpoint, from two sides that know nothing of mmconvert.

The text decoder is loaded and run by megatron-core itself. The vision encoder, whose class
megatron-core does not have, is computed here in plain torch by the rules of its SelfAttention.

Largest differences measured in fp32 (torch 2.13, transformers 5.23; the logits' standard
deviation is 0.8): logits 2.0e-6 with TP 1, with PP 1 or 2; 2.8e-6 with TP 2; vision block 1e-6.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F  # noqa: N812 - its usual name

from api import Shape, to_mm
from megatron_ranks import Case, Outcome, run
from megatron_text import WORLD
from tinymodels import CONVERTERS, TEXT_LAYERS, VIT_LAYERS, inputs, save, tiny_model

TOLERANCE = {1: 1e-5, 2: 1e-4}  # of logits, by tensor-parallel size
STAGES = [3, 1]
ONE = Shape(vit=[[VIT_LAYERS]], llm=[[TEXT_LAYERS]])
TWO = Shape(vit=[[VIT_LAYERS, 0]], llm=[STAGES])


class Plan(NamedTuple):
    """A model, a layout to convert it to, and how Megatron reads that."""

    kind: str
    tied: bool
    shape: Shape
    pp: int = 1

    @property
    def name(self) -> str:
        tied = "tied" if self.tied else "untied"
        stages = len(self.shape.llm[0])
        how = f"pp{self.pp}" if self.pp == stages else f"pp{stages} joined"
        return f"{self.kind} {tied} tp{self.shape.tp} {how}"


PLANS = [
    Plan("qwen2_vl", False, ONE),
    Plan("qwen2_vl", False, ONE._replace(tp=2)),
    Plan("qwen2_vl", False, TWO, pp=2),
    Plan("qwen2_vl", True, ONE._replace(tp=2)),
    Plan("qwen2_vl", True, TWO),
    Plan("qwen2_vl", True, TWO._replace(tp=2)),
    Plan("qwen2_5_vl", False, ONE),
    Plan("qwen2_5_vl", False, ONE._replace(tp=2)),
]
NAMES = [plan.name for plan in PLANS]


def text_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and position ids whose three dimensions differ as those of an image do."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 300, (2, 18), generator=generator)
    time, height, width = torch.arange(18), torch.arange(18), torch.arange(18)
    height[4:13] = 4 + torch.arange(9) // 3
    width[4:13] = 4 + torch.arange(9) % 3
    time[4:13] = 4
    positions = torch.stack([time, height, width])
    positions[:, 13:] -= 6
    return ids, positions[:, None].expand(3, 2, 18).contiguous()


class Oracle(NamedTuple):
    """Outcomes by plan and rank, and the logits of transformers by kind and tied."""

    outcomes: dict[str, list[Outcome]]
    expected: dict[tuple[str, bool], torch.Tensor]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed (it is in the extra dev)")
    folder = tmp_path_factory.mktemp("oracle")
    ids, positions = text_inputs()
    torch.save({"ids": ids, "positions": positions}, folder / "inputs.pt")
    expected: dict[tuple[str, bool], torch.Tensor] = {}
    cases: list[Case] = []
    text: dict[str, Any] = {}
    for number, plan in enumerate(PLANS):
        model = tiny_model(plan.kind, tied=plan.tied)
        text = model.config.text_config.to_dict()
        source = save(model, folder / f"hf{number}")
        mm = folder / f"mm{number}"
        to_mm(CONVERTERS[plan.kind], source, mm, plan.shape)
        with torch.no_grad():
            expected[plan.kind, plan.tied] = model(input_ids=ids, position_ids=positions).logits
        stages = list(plan.shape.llm[0])
        joined = plan.pp == 1 and len(stages) > 1
        tied = plan.tied and not joined  # a second stage has an output layer of its own
        cases.append(Case(plan.name, mm, plan.shape.tp, plan.pp, stages, joined, tied))
    import_module("megatron.core.models.gpt")  # once; the ranks are forked
    torch.set_num_threads(1)  # threads do not survive that
    start_processes(run, (folder, text, cases), nprocs=WORLD, start_method="fork")
    outcomes = {
        case.name: [
            Outcome(*torch.load(folder / f"{case.name}.{rank}.pt", weights_only=True))
            for rank in range(WORLD)
        ]
        for case in cases
    }
    return Oracle(outcomes, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_megatron_loads_the_text_decoder(oracle: Oracle, name: str) -> None:
    """Its names are ours, each in Megatron's shape; only states without data are missing."""
    for outcome in oracle.outcomes[name]:
        assert outcome.unexpected == []
        assert [key for key in outcome.missing if not key.endswith("._extra_state")] == []


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_megatron_gives_the_same_logits(oracle: Oracle, plan: Plan) -> None:
    want = oracle.expected[plan.kind, plan.tied]
    assert want.std() > 0.3
    found = [o.logits for o in oracle.outcomes[plan.name] if o.logits is not None]
    assert len(found) == (1 if plan.pp == 2 else WORLD)
    for logits in found:
        assert logits.shape == want.shape
        largest = (logits - want).abs().max().item()
        assert largest < TOLERANCE[plan.shape.tp], largest


# --------------------------------------------------------------------------------- vision
BLOCK = 1  # the layer that is looked at
LOCAL = f"image_encoder.encoder.blocks.layers.{BLOCK}."


class Seen(NamedTuple):
    """What the block of transformers was given and what came out."""

    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    bounds: list[int]
    out: torch.Tensor


def watched(model: Any) -> Seen:
    """The block's input and output in a run on an image."""
    seen: list[Seen] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        cos, sin = kwargs["position_embeddings"]
        hidden = args[0] if args else kwargs["hidden_states"]
        bounds = args[1] if len(args) > 1 else kwargs["cu_seqlens"]
        seen.append(Seen(hidden, cos, sin, bounds.tolist(), out))

    handle = model.model.visual.blocks[BLOCK].register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**inputs())
    handle.remove()
    (found,) = seen
    return found


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions; x is [sequence, width of a head]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def attention(
    shards: list[dict[str, torch.Tensor]], x: torch.Tensor, seen: Seen, heads: int, order: str
) -> torch.Tensor:
    """Attention as Megatron's SelfAttention reads its weights.

    Each rank has its heads' rows of linear_qkv, q, k and v of a head together, and the columns
    of linear_proj for the same heads; the ranks' products are added.

    Args:
        order: `heads` for that order, `parts` to read a rank's rows as all q, all k, all v.
    """
    scope = torch.zeros(len(x), len(x), dtype=torch.bool)
    for begin, end in zip(seen.bounds, seen.bounds[1:], strict=False):
        scope[begin:end, begin:end] = True
    mine = heads // len(shards)
    total = shards[0]["self_attention.linear_proj.bias"].clone().expand(len(x), -1)
    for shard in shards:
        rows = F.linear(
            x, shard["self_attention.linear_qkv.weight"], shard["self_attention.linear_qkv.bias"]
        )
        parts = (
            rows.view(len(x), mine, 3, -1)
            if order == "heads"
            else rows.view(len(x), 3, mine, -1).transpose(1, 2)
        )
        outputs = []
        for head in range(mine):
            q, k, v = parts[:, head].unbind(dim=1)
            q, k = rotated(q, seen.cos, seen.sin), rotated(k, seen.cos, seen.sin)
            scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~scope, float("-inf"))
            outputs.append(scores.softmax(dim=-1) @ v)
        together = torch.cat(outputs, dim=-1)
        total = total + F.linear(together, shard["self_attention.linear_proj.weight"])
    return total


def norm(shard: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm where there is a bias, RMSNorm where there is none."""
    weight, bias = shard[f"{name}.weight"], shard.get(f"{name}.bias")
    if bias is None:
        return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)


def feed_forward(
    shards: list[dict[str, torch.Tensor]], x: torch.Tensor, *, gated: bool
) -> torch.Tensor:
    """The MLP; gated, a rank's linear_fc1 holds its rows of gate above those of up."""
    total = shards[0]["mlp.linear_fc2.bias"].clone().expand(len(x), -1)
    for shard in shards:
        wide = F.linear(x, shard["mlp.linear_fc1.weight"], shard["mlp.linear_fc1.bias"])
        if gated:
            gate, up = wide.chunk(2, dim=-1)
            wide = F.silu(gate) * up
        else:
            wide = wide * torch.sigmoid(1.702 * wide)  # quick gelu
        total = total + F.linear(wide, shard["mlp.linear_fc2.weight"])
    return total


def block(
    shards: list[dict[str, torch.Tensor]], seen: Seen, heads: int, order: str, *, gated: bool
) -> torch.Tensor:
    """A vision block on the shards of all ranks."""
    x = seen.hidden
    x = x + attention(shards, norm(shards[0], "input_layernorm", x), seen, heads, order)
    return x + feed_forward(shards, norm(shards[0], "pre_mlp_layernorm", x), gated=gated)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])  # whose block is computed here
def vision(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any]:
    folder: Path = tmp_path_factory.mktemp("vision")
    model = tiny_model(request.param)
    return request.param, save(model, folder / "hf"), model


@pytest.mark.parametrize("tp", [1, 2])
def test_a_vision_block_by_megatrons_rules(
    vision: tuple[str, Path, Any], tp: int, tmp_path: Path
) -> None:
    """linear_qkv holds q, k and v of each head together: in this order the output is right."""
    kind, source, model = vision
    mm = tmp_path / "mm"
    to_mm(CONVERTERS[kind], source, mm, ONE._replace(tp=tp))
    shards: list[dict[str, torch.Tensor]] = []
    for rank in range(tp):
        path = mm / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        weights = torch.load(path, weights_only=True)["model"]
        shards.append({k.removeprefix(LOCAL): v for k, v in weights.items() if LOCAL in k})
    seen, heads = watched(model), model.config.vision_config.num_heads
    gated = kind == "qwen2_5_vl"
    got = block(shards, seen, heads, "heads", gated=gated)
    largest = (got - seen.out).abs().max().item()
    assert largest < 1e-5, largest
    # Read as the converter's reference 2.2.0 wrote it, these weights are far off.
    other = block(shards, seen, heads, "parts", gated=gated)
    assert (other - seen.out).abs().max() > 0.05
