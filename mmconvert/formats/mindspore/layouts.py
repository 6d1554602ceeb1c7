"""The layouts of MindSpore checkpoints: as flags ask for them, or as strategy files give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmconvert.config.mindspore import DeviceConfig
from mmconvert.converters.configs import Dims
from mmconvert.converters.mindspore import MSFamily
from mmconvert.errors import LayoutError
from mmconvert.formats.mindspore.side import Spread
from mmconvert.formats.mindspore.strategy import Strategy
from mmconvert.plan.plan import Key, Whole
from mmconvert.sharding.devices import DeviceLayout


@dataclass(frozen=True)
class GivenLayout:
    """A layout that strategy files give; ``devices`` of each stage."""

    devices: int
    stages: int

    def describe(self) -> str:
        """One line for messages."""
        if self.devices * self.stages == 1:
            return "complete"
        more = f" in each of {self.stages} pipeline stages" if self.stages > 1 else ""
        return f"{self.devices} devices{more}, by strategy files"

    def as_dict(self) -> dict[str, object]:
        """The layout as JSON."""
        return {"devices": self.devices, "pipeline_stage": self.stages}


def device_layout(given: DeviceConfig, layers: int, prefix: str) -> DeviceLayout:
    """The layout that is asked for.

    Args:
        layers: number of text layers.
        prefix: how the flags begin, for messages.

    Raises:
        LayoutError: sizes or lists that contradict each other.
    """
    stages, grid = given.pipeline_stage, given.llm_pp_layers
    if stages < 1:
        raise LayoutError(f"{prefix}pipeline_stage is {stages}", "a size of at least 1")
    if grid is not None:
        if len(grid) != 1:
            raise LayoutError(f"{prefix}llm_pp_layers has virtual stages", "one list of numbers")
        if stages not in (1, len(grid[0])):
            raise LayoutError(
                f"{prefix}llm_pp_layers names {len(grid[0])} stages, pipeline_stage is {stages}",
                "one number of layers for each stage",
            )
        dealt = grid[0]
    elif layers % stages:
        raise LayoutError(
            f"{layers} text layers cannot be dealt out evenly to {prefix}pipeline_stage {stages}",
            "a divisor, or the numbers of layers",
            f"give {prefix}llm_pp_layers, such as "
            f"[{','.join(str(layers // stages + (i < layers % stages)) for i in range(stages))}]",
        )
    else:
        dealt = (layers // stages,) * stages
    layout = DeviceLayout(
        given.data_parallel,
        given.model_parallel,
        dealt if len(dealt) > 1 else (),
        given.vocab_emb_dp,
        given.optimizer_parallel,
        given.optimizer_threshold << 10,
    )
    layout.check()
    return layout


def by_strategy(strategy: Strategy, wholes: Mapping[Key, Whole], path: Path) -> Spread:
    """The slicings of strategy files, for the tensors that there are.

    Raises:
        LayoutError: files of some pipeline stages only.
    """
    devices = strategy.devices(str(path))
    if sorted(strategy.stages) != list(range(len(strategy.stages))):
        raise LayoutError(
            f"{path} is for the pipeline stages {', '.join(map(str, sorted(strategy.stages)))}",
            "every stage from 0 on",
            "give the folder with the strategy files of all ranks, or the merged file",
        )
    names = {key.name(): key for key in wholes}
    stages = [
        {names[name]: slicing for name, slicing in strategy.stages[stage].items() if name in names}
        for stage in sorted(strategy.stages)
    ]
    return Spread(stages, devices)


def unchecked_heads(family: MSFamily, dims: Dims, layout: DeviceLayout) -> list[str]:
    """A warning where model_parallel could cut through heads whose number nobody tells."""
    unknown = [words for dim, words in family.units if dim not in dims]
    if layout.model_parallel == 1 or not unknown:
        return []
    return [
        f"warning: the numbers of {' and '.join(unknown)} are not known (no "
        f"--cfg.hf_config.hf_dir); not checked that model_parallel {layout.model_parallel} keeps "
        "heads whole"
    ]
