"""Names of an MM checkpoint are claimed by rows, on the stage where the row's tensor stands."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from mmconvert import converters
from mmconvert.converters.family import Variant
from mmconvert.formats.mm.instances import placements
from mmconvert.formats.mm.source import claim_mm
from mmconvert.sharding.layout import Chunk, Layout, Rank
from mmconvert.stored import StoredTensor

MODULES = converters.load("Qwen2VLConverter").modules(Variant())
DIMS = {"vit.layers": 1, "llm.layers": 2}
LAYOUT = Layout({"vit": 1, "llm": 1}, {"vit": ((1, 0),), "llm": ((1, 1),)}, decoder="llm")


def lost(stage: int, name: str) -> list[str]:
    """What is not claimed of a whole checkpoint that has one tensor more, on that stage."""
    parts: dict[Chunk, dict[str, StoredTensor]] = defaultdict(dict)
    places = [(at, known) for _, at, known, _ in placements(MODULES, LAYOUT, DIMS, every_tied=True)]
    for at, each in (*places, (stage, name)):
        parts[Chunk(Rank(0, at))][each] = StoredTensor(each, "F32", (1,), Path("a.pt"), 0)
    return claim_mm(MODULES, DIMS, LAYOUT, parts)


def test_a_name_is_claimed_on_its_stage_alone() -> None:
    norm = "text_decoder.decoder.final_layernorm.weight"
    assert lost(1, norm) == []
    assert lost(0, norm) == [f"{norm} (mp_rank_00_000)"]
    layer = "text_decoder.decoder.layers.0.input_layernorm.weight"
    assert lost(0, layer) == []


def test_an_unknown_name_is_shown_with_the_closest_one() -> None:
    (found,) = lost(0, "text_decoder.decoder.final_layernorms.weight")
    assert "closest known name text_decoder.decoder.final_layernorm.weight" in found
