"""Qwen-VL of any sizes, in any layout: what comes back is what went in."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mmconvert.config import HFConfig, Options
from mmconvert.config.mindspore import DeviceConfig, HFToMS, MSResplit, MSToHF
from mmconvert.converters.qwenvl import FAMILY
from mmconvert.directions.mindspore import hf_to_ms, ms_to_hf, resplit
from mmconvert.playground.qwenvl import PlaygroundSizes
from mmconvert.tools.comparison.verification import verify
from mmread import compare_hf
from nights import examples
from qwenvl import make_qwenvl

SIZES = st.builds(
    lambda heads, head, layers, inter, vision, width, blocks, vocab: PlaygroundSizes(
        heads * head, heads, layers, 4 * inter, 8 * vocab, vision * width, vision, blocks
    ),
    st.sampled_from([4, 8]),
    st.sampled_from([2, 3, 8]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([4, 12]),
    st.sampled_from([1, 2, 5]),
    st.integers(1, 2),
    st.integers(1, 4),
)
LAYOUT = st.fixed_dictionaries(
    {
        "data_parallel": st.sampled_from([1, 2]),
        "model_parallel": st.sampled_from([1, 2, 4]),
        "vocab_emb_dp": st.booleans(),
        "optimizer_parallel": st.booleans(),
        "optimizer_threshold": st.sampled_from([0, 1]),
        "uneven": st.booleans(),
    }
)


def config(layout: dict[str, int], layers: int) -> DeviceConfig:
    """A layout; ``uneven`` gives the first text layer a pipeline stage of its own."""
    flags = dict(layout)
    grid = ((1, layers - 1),) if flags.pop("uneven") and layers > 1 else None
    return DeviceConfig(**flags, llm_pp_layers=grid)  # pyright: ignore[reportArgumentType] - of st


@examples(4, nightly=12)
@given(SIZES, LAYOUT, LAYOUT, st.sampled_from(["ckpt", "safetensors"]))
def test_there_through_two_layouts_and_back(
    sizes: PlaygroundSizes, one: dict[str, int], two: dict[str, int], suffix: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf = make_qwenvl(folder / "hf", sizes, files=1)
        full = folder / f"x.{suffix}"
        hf_to_ms(FAMILY, HFToMS(full, HFConfig(hf)))
        for source, target, layout in ((full, "a", one), (folder / "a", "b", two)):
            flags = config(layout, sizes.layers)
            cfg = MSResplit(source, folder / target, target_parallel_config=flags)
            resplit(FAMILY, cfg)
        ms_to_hf(FAMILY, MSToHF(folder / "back", folder / "b", HFConfig(hf)))
        assert not compare_hf(hf, folder / "back")
        assert verify(hf, folder / "a", Options()).equal
        resplit(FAMILY, MSResplit(folder / "b", folder / f"y.{suffix}"))
        assert (folder / f"y.{suffix}").read_bytes() == full.read_bytes()
