"""A table with three namings, each of which makes its tensors otherwise: between each two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmconvert
import toyformat
from mmconvert.config import ParallelConfig
from mmconvert.convert import convert
from mmconvert.converters.checks import faults
from mmconvert.converters.configs import Dims, read_dims
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module, in_naming, row
from mmconvert.errors import RequestError
from mmconvert.formats import registry
from mmconvert.formats.base import NoLayout, Opening, Placed, Placing
from mmconvert.formats.jsonfile import read_json_file
from mmconvert.formats.model import Model
from mmconvert.formats.naming import side_in, target_in
from mmconvert.request import End, Request
from mmconvert.sharding.spans import COLUMN, GATED, ROW, Interleave, heads
from mmconvert.testing import contract

LAYERS, HEADS, WIDTH, FFN, VOCAB = 4, 2, 8, 6, 10
KEYS = {
    "see.layers": ("see_layers",),
    "say.layers": ("layers",),
    "say.heads": ("heads",),
    "say.width": ("width",),
    "say.ffn": ("ffn",),
    "say.vocab": ("vocab",),
}
M, H, T = "text_decoder.layers.{}", "model.layers.{}", "decoder.{}"


def dims(config: Mapping[str, object]) -> Dims:
    return read_dims(config, "config", KEYS)


def modules(variant: Variant) -> tuple[Module, ...]:
    del variant
    w = "say.width"
    see = Module(
        key="see",
        label="image_encoder",
        before=(),
        layer=(row("image_encoder.{}.fc", "eye.{}.fc", shard=COLUMN, names={"trio": "see.{}.w"}),),
        after=(),
    )
    say = Module(
        key="say",
        label="text_decoder",
        role="decoder",
        before=(
            row("text_decoder.embedding", "model.embed", rows="say.vocab", cols=w, shard=COLUMN,
                names={"trio": "embed.tokens"}),
        ),
        layer=(
            row(
                f"{M}.qkv",
                *(f"{H}.{x}" for x in "qkv"),
                rows=f"{w} {w} {w}",
                cols=w,
                fuse=Interleave("say.heads"),
                shard=heads("say.heads"),
                names={"trio": f"{T}.in_proj"},
                fuses={"trio": Interleave("say.heads", packed_qkv=True)},
                cuts={"trio": ROW},
            ),
            row(f"{M}.fc1", f"{H}.gate", f"{H}.up", rows="say.ffn say.ffn", cols=w, shard=GATED,
                names={"trio": (f"{T}.w1", f"{T}.w3")}),
            row(f"{M}.fc2", f"{H}.down", rows=w, cols="say.ffn", shard=ROW,
                names={"trio": f"{T}.w2"}),
        ),
        after=(),
    )  # fmt: skip
    return see, say


FAMILY = Family(
    name="Trio",
    converter="TrioConverter",
    model_types=frozenset({"trio"}),
    dims=dims,
    modules=modules,
    text_config=lambda config: config,
    variants=(Variant(),),
    canonical=False,
    preprocessor=False,
)


class Trio(toyformat.Npy):
    """A folder of .npy files in the third naming."""

    name: ClassVar = "trio"
    naming: ClassVar = "trio"

    def open(self, path: Path, told: Opening) -> toyformat.NpyStored:
        index: Any = read_json_file(path / toyformat.INDEX)
        table, sizes = told.family.table(Variant()), dict(index["dims"])
        own = side_in(self.naming, table, sizes, toyformat.tensors_of(path), told.faults)
        model = Model(told.family, Variant(), table, sizes)
        return toyformat.NpyStored(format=self.name, path=path, model=model, own=own)

    def place(self, asked: Placing) -> Placed:
        model = asked.source.model
        return Placed(side=target_in(self.naming, model.modules, model.dims, asked.wholes))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> Trio:
            return Trio()

    monkeypatch.setattr(registry, "_third_party", lambda: {"trio": Entry()})


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder, made = tmp_path / "hf", torch.Generator().manual_seed(0)
    folder.mkdir()
    shapes = {"model.embed": (VOCAB, WIDTH)}
    shapes |= {f"eye.{i}.fc": (WIDTH, WIDTH) for i in range(2)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{x}": (WIDTH, WIDTH) for x in "qkv"}
        shapes |= {f"model.layers.{i}.{x}": (FFN, WIDTH) for x in ("gate", "up")}
        shapes[f"model.layers.{i}.down"] = (WIDTH, FFN)
    weights = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "trio", "see_layers": 2, "layers": LAYERS, "heads": HEADS}
    config |= {"width": WIDTH, "ffn": FFN, "vocab": VOCAB, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LAYOUT = ParallelConfig(tp_size=2)


def between(source: tuple[str, Path], target: tuple[str, Path], hf: Path) -> None:
    layouts = {"mm": LAYOUT, "trio": NoLayout()}
    end = End(*target, layouts.get(target[0]))
    assert convert(FAMILY, Request("test", End(*source), end, original=hf)).written


def same(a: Path, b: Path) -> bool:
    files = [p.relative_to(a) for p in sorted(a.rglob("*")) if p.suffix in (".npy", ".pt")]
    assert files
    return all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


def test_between_each_two(hf: Path, tmp_path: Path) -> None:
    """All six ways; two ways to one naming give the same bytes, and none is the identity."""
    between(("hf", hf), ("mm", tmp_path / "mm"), hf)
    between(("hf", hf), ("trio", tmp_path / "trio"), hf)
    between(("mm", tmp_path / "mm"), ("trio", tmp_path / "trio of mm"), hf)
    between(("trio", tmp_path / "trio"), ("mm", tmp_path / "mm of trio"), hf)
    assert same(tmp_path / "trio", tmp_path / "trio of mm")
    assert same(tmp_path / "mm", tmp_path / "mm of trio")
    for name in ("mm", "trio"):
        between((name, tmp_path / name), ("hf", tmp_path / f"hf of {name}"), hf)
        back = tmp_path / f"hf of {name}" / "model.safetensors"
        assert back.read_bytes() == (hf / "model.safetensors").read_bytes()


def test_the_third_naming_says_how_its_tensors_are_made(hf: Path, tmp_path: Path) -> None:
    between(("hf", hf), ("trio", tmp_path / "trio"), hf)
    weights = load_file(hf / "model.safetensors")
    found = {
        name: torch.from_numpy(tensor.numpy().copy())
        for name, tensor in ((n, read(tmp_path / "trio", n)) for n in names(tmp_path / "trio"))
    }
    for i in range(LAYERS):
        qkv = torch.cat([weights[f"model.layers.{i}.{x}"] for x in "qkv"])
        assert torch.equal(found[f"decoder.{i}.in_proj"], qkv)
        assert torch.equal(found[f"decoder.{i}.w3"], weights[f"model.layers.{i}.up"])
    assert len(found) == 1 + 2 + 4 * LAYERS


def names(folder: Path) -> list[str]:
    index: Any = read_json_file(folder / toyformat.INDEX)
    return list(index["tensors"])


def read(folder: Path, name: str) -> torch.Tensor:
    import numpy as np

    index: Any = read_json_file(folder / toyformat.INDEX)
    number, _ = index["tensors"][name]
    return torch.from_numpy(np.load(folder / f"{number:05d}.npy"))


def test_the_table_is_right_in_every_naming() -> None:
    assert list(faults(FAMILY, modules(Variant()))) == []
    assert FAMILY.namings == {"hf", "mm", "trio"}
    rows = {r.mm: r for m in modules(Variant()) for r in m.all_rows()}
    qkv = rows["text_decoder.layers.{layer}.qkv"]
    assert qkv.cuts["trio"] == ROW
    assert qkv.shard == heads("say.heads")
    seen = {r.mm: r.hf for m in in_naming(modules(Variant()), "trio") for r in m.all_rows()}
    assert seen[qkv.mm] == ("decoder.{layer}.in_proj",)


def test_the_contract_holds_with_keys_of_its_own(hf: Path) -> None:
    contract(FAMILY, hf)


def test_a_naming_that_the_table_has_not(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no name in the naming dist"):
        in_naming(modules(Variant()), "dist")
    family = mmconvert.converters.load("Qwen2VLConverter")
    with pytest.raises(RequestError, match="cannot be stored as"):
        convert(family, Request("t", End("hf", hf), End("trio", tmp_path / "x"), original=hf))
