"""An invented family with all that a table can say, and its checkpoints made by plain torch.

Experts are one tensor each or slices of a stack, as MM has them or transposed; some layers are
dense, some have experts; some encoder layers have a row of their own that HF numbers by itself;
one row stands on every stage. `mm_of` cuts a model into rank files without any mmconvert code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmconvert.config import ParallelConfig
from mmconvert.converters.configs import Dims, need, read_dims
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import OUTPUT_LAYER, Module, Row, row
from mmconvert.sharding.spans import COLUMN, GATED, ROW, Interleave, heads

KINDS = ("single", "single transposed", "stacked", "stacked transposed")
KEYS = {
    "vit.layers": ("vit_layers",),
    "vit.width": ("vit_width",),
    "llm.layers": ("layers",),
    "llm.hidden": ("hidden",),
    "llm.groups": ("groups",),
    "llm.q": ("q",),
    "llm.kv": ("kv",),
    "llm.ffn": ("ffn",),
    "llm.vocab": ("vocab",),
    "llm.experts": ("experts",),
    "llm.expert_ffn": ("expert_ffn",),
}
Weights = dict[str, torch.Tensor]
Files = dict[str, dict[str, Weights]]  # folder -> model chunk -> name -> tensor
Grid = tuple[tuple[int, ...], ...]


# ------------------------------------------------------------------------------- the table
def dims(config: Mapping[str, object]) -> Dims:
    found = read_dims(config, "config", KEYS)
    need(found, "config", {key: KEYS[key] for key in ("vit.layers", "llm.layers")})
    found["llm.gate_up"] = 2 * found["llm.expert_ffn"]
    return found


def lists(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    def of(key: str) -> tuple[int, ...]:
        value = config[key]
        assert isinstance(value, list)
        return tuple(value)

    layers = config["layers"]
    assert isinstance(layers, int)
    moe = of("moe_layers")
    dense = tuple(layer for layer in range(layers) if layer not in moe)
    return {"vit.deep": of("deep_layers"), "llm.moe": moe, "llm.dense": dense}


def experts(kind: str) -> tuple[Row, ...]:
    one, two = (f"text_decoder.layers.{{}}.mlp.local_experts.{{expert}}.fc{i}" for i in (1, 2))
    hf = "model.layers.{}.mlp.experts"
    turned = "transposed" in kind
    if kind == "single":
        fc1 = row(
            one,
            f"{hf}.{{expert}}.gate",
            f"{hf}.{{expert}}.up",
            rows="llm.expert_ffn llm.expert_ffn",
            cols="llm.hidden",
            shard=GATED,
            only="llm.moe",
        )
        down = f"{hf}.{{expert}}.down"
    else:
        number = ".{expert}" if kind.startswith("single") else ""
        fc1 = row(
            one,
            f"{hf}{number}.gate_up",
            rows="llm.gate_up",
            cols="llm.hidden",
            shard=GATED,
            transposed=turned,
            only="llm.moe",
        )
        down = f"{hf}{number}.down"
    return fc1, row(
        two,
        down,
        rows="llm.hidden",
        cols="llm.expert_ffn",
        shard=ROW,
        transposed=turned,
        only="llm.moe",
    )


def modules(variant: Variant) -> tuple[Module, ...]:
    kind = next(iter(variant.traits))
    b, t, h = "image_encoder.blocks.{}", "text_decoder.layers.{}", "model.layers.{}"
    w, x = "vit.width", "llm.hidden"
    vision = Module(
        key="vit",
        label="image_encoder",
        before=(row("image_encoder.patch", "vision.patch", rows=w),),
        layer=(
            row(f"{b}.fc", "vision.blocks.{}.fc", rows=w, cols=w, shard=COLUMN),
            row(f"{b}.deep", "vision.deep.{index}.fc", rows=w, cols=w, shard=ROW, only="vit.deep"),
        ),
        after=(row("image_encoder.projector", "vision.projector", rows=x, cols=w),),
        everywhere=(row("newline", "newline", rows=x),),
    )
    text = Module(
        key="llm",
        label="text_decoder",
        role="decoder",
        before=(row("text_decoder.embedding", "model.embed", rows="llm.vocab", shard=COLUMN),),
        layer=(
            row(
                f"{t}.qkv",
                *(f"{h}.{name}" for name in "qkv"),
                rows="llm.q llm.kv llm.kv",
                cols=x,
                fuse=Interleave("llm.groups"),
                shard=heads("llm.groups"),
            ),
            row(
                f"{t}.mlp.fc1",
                f"{h}.mlp.gate",
                f"{h}.mlp.up",
                rows="llm.ffn llm.ffn",
                cols=x,
                shard=GATED,
                only="llm.dense",
            ),
            row(
                f"{t}.mlp.fc2", f"{h}.mlp.down", rows=x, cols="llm.ffn", shard=ROW, only="llm.dense"
            ),
            row(f"{t}.mlp.router", f"{h}.mlp.router", rows="llm.experts", cols=x, only="llm.moe"),
            *experts(kind),
        ),
        after=(
            row("text_decoder.norm", "model.norm", rows=x),
            row(
                OUTPUT_LAYER,
                "lm_head",
                rows="llm.vocab",
                cols=x,
                shard=COLUMN,
                tied_to="text_decoder.embedding" if variant.tied else "",
            ),
        ),
    )
    return vision, text


def traits(config: Mapping[str, object]) -> frozenset[str]:
    return frozenset({str(config["kind"])})


FAMILY = Family(
    name="Invented",
    converter="InventedConverter",
    model_types=frozenset({"invented"}),
    dims=dims,
    modules=modules,
    text_config=lambda config: config,
    traits=traits,
    lists=lists,
    variants=(Variant(traits=frozenset({KINDS[0]})),),  # MM has one form for all kinds
    canonical=False,
    plain_text=False,
)


# ------------------------------------------------------------------------------- a model
@dataclass(frozen=True)
class Sizes:
    """A model of the family."""

    kind: str
    vit_layers: int
    layers: int
    moe: tuple[int, ...]
    deep: tuple[int, ...]
    experts: int
    groups: int
    heads: int
    ffn: int
    expert_ffn: int
    hidden: int
    vit_width: int
    vocab: int
    tied: bool = False

    def config(self) -> dict[str, object]:
        return {
            "model_type": "invented",
            "kind": self.kind,
            "vit_layers": self.vit_layers,
            "layers": self.layers,
            "moe_layers": list(self.moe),
            "deep_layers": list(self.deep),
            "experts": self.experts,
            "groups": self.groups,
            "q": self.groups * self.heads,
            "kv": self.groups,
            "ffn": self.ffn,
            "expert_ffn": self.expert_ffn,
            "hidden": self.hidden,
            "vit_width": self.vit_width,
            "vocab": self.vocab,
            "tie_word_embeddings": self.tied,
        }


def hf_of(s: Sizes) -> Weights:
    """All tensors of a model, no two alike."""
    found: Weights = {}
    start = 1

    def put(name: str, *shape: int) -> None:
        nonlocal start
        count = torch.Size(shape).numel()
        found[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count

    put("newline", s.hidden)
    put("vision.patch", s.vit_width, 3)
    put("vision.projector", s.hidden, s.vit_width)
    for layer in range(s.vit_layers):
        put(f"vision.blocks.{layer}.fc", s.vit_width, s.vit_width)
    for number in range(len(s.deep)):
        put(f"vision.deep.{number}.fc", s.vit_width, s.vit_width)
    put("model.embed", s.vocab, s.hidden)
    put("model.norm", s.hidden)
    if not s.tied:
        put("lm_head", s.vocab, s.hidden)
    for layer in range(s.layers):
        h = f"model.layers.{layer}"
        for name, rows in zip("qkv", (s.groups * s.heads, s.groups, s.groups), strict=True):
            put(f"{h}.{name}", rows, s.hidden)
        if layer not in s.moe:
            put(f"{h}.mlp.gate", s.ffn, s.hidden)
            put(f"{h}.mlp.up", s.ffn, s.hidden)
            put(f"{h}.mlp.down", s.hidden, s.ffn)
            continue
        put(f"{h}.mlp.router", s.experts, s.hidden)
        up, down = (2 * s.expert_ffn, s.hidden), (s.hidden, s.expert_ffn)
        if "transposed" in s.kind:
            up, down = up[::-1], down[::-1]
        if s.kind.startswith("stacked"):
            put(f"{h}.mlp.experts.gate_up", s.experts, *up)
            put(f"{h}.mlp.experts.down", s.experts, *down)
            continue
        for expert in range(s.experts):
            if s.kind == "single":
                put(f"{h}.mlp.experts.{expert}.gate", s.expert_ffn, s.hidden)
                put(f"{h}.mlp.experts.{expert}.up", s.expert_ffn, s.hidden)
            else:
                put(f"{h}.mlp.experts.{expert}.gate_up", *up)
            put(f"{h}.mlp.experts.{expert}.down", *down)
    return found


def write_hf(s: Sizes, folder: Path) -> Path:
    """The model as a Hugging Face folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(s.config()))
    save_file(hf_of(s), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ------------------------------------------------------------------- cutting it by hand
@dataclass(frozen=True)
class Shape:
    """A layout."""

    vit: Grid
    llm: Grid
    tp: int = 1
    vit_tp: int = 1
    ep: int = 1

    def config(self) -> ParallelConfig:
        return ParallelConfig(
            vit_pp_layers=self.vit,
            llm_pp_layers=self.llm,
            tp_size=self.tp,
            vit_tp_size=self.vit_tp,
            ep_size=self.ep,
        )


def _expert(s: Sizes, hf: Weights, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate above up, and down, of one expert, as MM has them."""
    h = f"model.layers.{layer}.mlp.experts"
    if s.kind == "single":
        up = torch.cat([hf[f"{h}.{expert}.gate"], hf[f"{h}.{expert}.up"]])
        return up, hf[f"{h}.{expert}.down"]
    if s.kind.startswith("single"):
        return hf[f"{h}.{expert}.gate_up"].T, hf[f"{h}.{expert}.down"].T
    up, down = hf[f"{h}.gate_up"][expert], hf[f"{h}.down"][expert]
    return (up.T, down.T) if "transposed" in s.kind else (up, down)


def _gated(whole: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])


def mm_of(s: Sizes, shape: Shape) -> Files:
    """The rank files of a model in a layout: folder name -> part -> name -> tensor."""
    hf = hf_of(s)
    pp, vpp = len(shape.llm[0]), len(shape.llm)
    folders = max(shape.tp, shape.vit_tp)
    vit, llm = sum(shape.vit, ()), sum(shape.llm, ())
    found: Files = {}
    for t in range(folders):
        for p in range(pp):
            for e in range(shape.ep):
                name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
                name += f"_{e:03d}" if shape.ep > 1 else ""
                found[name] = {
                    ("model" if vpp == 1 else f"model{v}"): _chunk(
                        s, hf, shape, (t % shape.tp, t % shape.vit_tp, e), (vit, llm, v * pp + p)
                    )
                    for v in range(vpp)
                }
    return found


def _chunk(
    s: Sizes,
    hf: Weights,
    shape: Shape,
    ranks: tuple[int, int, int],
    place: tuple[tuple[int, ...], tuple[int, ...], int],
) -> Weights:
    tp, vit_tp, ep = ranks
    vit, llm, stage = place
    out: Weights = {"newline": hf["newline"]}
    filled = [i for i, n in enumerate(vit) if n]
    if stage == filled[0]:
        out["image_encoder.patch"] = hf["vision.patch"]
    if stage == filled[-1]:
        out["image_encoder.projector"] = hf["vision.projector"]
    for local in range(vit[stage]):
        layer = sum(vit[:stage]) + local
        b = f"image_encoder.blocks.{local}"
        out[f"{b}.fc"] = hf[f"vision.blocks.{layer}.fc"].chunk(shape.vit_tp)[vit_tp]
        if layer in s.deep:
            whole = hf[f"vision.deep.{s.deep.index(layer)}.fc"]
            out[f"{b}.deep"] = whole.chunk(shape.vit_tp, dim=1)[vit_tp]
    filled = [i for i, n in enumerate(llm) if n]
    if stage == filled[0]:
        out["text_decoder.embedding"] = hf["model.embed"].chunk(shape.tp)[tp]
    if stage == filled[-1]:
        out["text_decoder.norm"] = hf["model.norm"]
        if not s.tied or len(filled) > 1:
            head = hf["model.embed" if s.tied else "lm_head"]
            out[OUTPUT_LAYER] = head.chunk(shape.tp)[tp]
    for local in range(llm[stage]):
        layer = sum(llm[:stage]) + local
        h, t = f"model.layers.{layer}", f"text_decoder.layers.{local}"
        rows = [hf[f"{h}.{name}"].view(s.groups, -1, s.hidden) for name in "qkv"]
        out[f"{t}.qkv"] = torch.cat(rows, 1).flatten(0, 1).chunk(shape.tp)[tp]
        if layer not in s.moe:
            whole = torch.cat([hf[f"{h}.mlp.gate"], hf[f"{h}.mlp.up"]])
            out[f"{t}.mlp.fc1"] = _gated(whole, shape.tp, tp)
            out[f"{t}.mlp.fc2"] = hf[f"{h}.mlp.down"].chunk(shape.tp, dim=1)[tp]
            continue
        out[f"{t}.mlp.router"] = hf[f"{h}.mlp.router"]
        share = s.experts // shape.ep
        for local_expert in range(share):
            up, down = _expert(s, hf, layer, ep * share + local_expert)
            name = f"{t}.mlp.local_experts.{local_expert}"
            out[f"{name}.fc1"] = _gated(up, shape.tp, tp)
            out[f"{name}.fc2"] = down.chunk(shape.tp, dim=1)[tp]
    return out


def read_mm(folder: Path) -> Files:
    """The rank files that a conversion wrote, read by torch."""
    found: Files = {}
    for path in sorted((folder / "release").iterdir()):
        content = torch.load(path / "model_optim_rng.pt", weights_only=True)
        found[path.name] = {k: v for k, v in content.items() if k != "checkpoint_version"}
    return found


def differences(
    want: dict[str, dict[str, Weights]], got: dict[str, dict[str, Weights]]
) -> list[str]:
    """How two checkpoints differ; empty if they do not."""
    lines = [f"folder {name}" for name in want.keys() ^ got.keys()]
    for folder in want.keys() & got.keys():
        lines += [f"{folder} {part}" for part in want[folder].keys() ^ got[folder].keys()]
        for part in want[folder].keys() & got[folder].keys():
            one, two = want[folder][part], got[folder][part]
            lines += [f"{folder} {part} {name}" for name in one.keys() ^ two.keys()]
            lines += [
                f"{folder} {part} {name} differs"
                for name in one.keys() & two.keys()
                if one[name].shape != two[name].shape or not torch.equal(one[name], two[name])
            ]
    return lines
