"""THE STORY for MindSpore: the same three directions, with MindSpore's files in place of MM's.

As in ``convert``: open, make both sides from one table, prove, and only then write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mmconvert.config import CommonOptions, Options
from mmconvert.config_ms import DeviceConfig, HFToMS, MSOptions, MSResplit, MSToHF
from mmconvert.convert import dtype_notes
from mmconvert.converters.family import Dims
from mmconvert.converters.mindspore import MSFamily
from mmconvert.errors import LayoutError, RequestError, TensorError
from mmconvert.events import Events
from mmconvert.executor.apart import check_apart
from mmconvert.formats.hf.model import config_model, hf_model
from mmconvert.formats.hf.side import hf_side, hf_target
from mmconvert.formats.mindspore.folder import read_strategies
from mmconvert.formats.mindspore.model import (
    MSModel,
    check_complete,
    family_spread,
    in_order,
    ms_model,
)
from mmconvert.formats.mindspore.side import Spread, device_target, whole_spread
from mmconvert.formats.mindspore.strategy import Strategy
from mmconvert.formats.model import check_writing_options
from mmconvert.formats.reading import watched
from mmconvert.plan.plan import Key, Side, Whole, build, in_dtype
from mmconvert.plan.sizes import check_agreement
from mmconvert.result import Described, Result
from mmconvert.run import Run
from mmconvert.run_ms import Destination, write_ms
from mmconvert.sharding.devices import DeviceLayout


@watched
def hf_to_ms(
    family: MSFamily, cfg: HFToMS, options: MSOptions | None = None, events: Events | None = None
) -> Result:
    """Hugging Face -> one MindSpore file, or a folder of ranks.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = _run("hf_to_ms", cfg, options, events)
    check_writing_options(run.options)
    check_apart(cfg.ms_path, [cfg.hf_config.hf_dir])
    source = hf_model(family, cfg.hf_config.hf_dir, run.options)
    src = hf_side(source.modules, source.dims, source.hf_tensors, transposed=True)
    wholes = in_dtype(src.wholes, run.cast)
    layout = device_layout(cfg.parallel_config, source.dims["llm.layers"], "--cfg.parallel_config.")
    layers = {module.key: source.dims[f"{module.key}.layers"] for module in source.modules}
    spread = family_spread(family, source.modules, wholes, layers, source.dims, layout)
    to = Destination.of(cfg.ms_path, cfg.format, spread, crc=_crc(options), folder=False)
    dst, held = device_target(wholes, spread)
    notes = [*source.notes, *_idle(run.options, source.patterns)]
    plan = run.prove(build(src, dst, notes, run.cast))
    about = {"converter": family.converter, "family": family.name, "dims": source.dims}
    result = Result(cfg.ms_path, False, plan, layout, 0.0, dropped=source.dropped)
    return write_ms(run, result, dst, held, spread, to, about, [cfg.hf_config.hf_dir])


@watched
def ms_to_hf(
    family: MSFamily, cfg: MSToHF, options: MSOptions | None = None, events: Events | None = None
) -> Result:
    """MindSpore -> Hugging Face: weight files, index and side files as in ``hf_dir``.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = _run("ms_to_hf", cfg, options, events)
    if _crc(options):
        raise RequestError("--crc adds a checksum to .ckpt files; none is written here")
    check_apart(cfg.save_hf_dir, [cfg.hf_config.hf_dir, cfg.ms_path])
    model = hf_model(family, cfg.hf_config.hf_dir, run.options)
    source = ms_model(cfg.ms_path, cfg.strategy, run.options, model.modules, name=family.name)
    check_complete(_keys(source), model.modules, model.dims, cfg.ms_path)
    rows = [row for module in model.modules for row in module.all_rows()]
    src = source.side(frozenset(row.mm for row in rows if row.transposed))
    headers = hf_side(model.modules, model.dims, model.hf_tensors)
    _check_shapes(src, headers, cfg)
    dst = hf_target(headers, in_dtype(src.wholes, run.cast))
    notes = [*model.notes, *source.notes, *_idle(run.options, model.patterns | source.patterns)]
    notes += [] if run.cast else dtype_notes(headers, dst, "MindSpore")
    if model.hf is not None and not model.hf.files[0].header:
        notes.append("hf_dir holds pytorch_model*.bin; safetensors are written in their place")
    plan = run.prove(build(src, dst, notes, run.cast))
    inputs = [cfg.hf_config.hf_dir, cfg.ms_path]
    result_model = replace(model, dropped={**model.dropped, **source.dropped})
    layout = _found_layout(source)
    return run.write_hf(plan, dst, result_model, result_model, layout, cfg.save_hf_dir, inputs)


@watched
def reshard_ms(
    family: MSFamily, cfg: MSResplit, options: MSOptions | None = None, events: Events | None = None
) -> Result:
    """MindSpore -> MindSpore in another layout: of the family's own, or by strategy files.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = _run("resplit", cfg, options, events)
    check_writing_options(run.options)
    check_apart(cfg.target_dir, [cfg.source_dir])
    by_family = cfg.target_parallel_config != DeviceConfig()
    if by_family and cfg.target_strategy is not None:
        raise RequestError(
            "--cfg.target_strategy and --cfg.target_parallel_config both say how to slice",
            "one of them",
        )
    table = family.modules(family.variants[0]) if by_family else None
    source = ms_model(cfg.source_dir, cfg.source_strategy, run.options, table, name=family.name)
    src = source.side()
    hf_dir = cfg.hf_config.hf_dir
    dims = config_model(family, hf_dir).dims if hf_dir else {}
    rows = family.modules(family.variants[0])
    # The vocabulary may have been padded on MindFormers' side (enable_emb_opt).
    sizes = {dim: size for dim, size in dims.items() if dim != family.vocabulary}
    check_agreement(src.wholes, rows, sizes, cfg.source_dir)
    wholes = in_order(in_dtype(src.wholes, run.cast), rows)
    notes = [*source.notes, *_idle(run.options, source.patterns)]
    layout: Described
    if table is not None:
        layers = check_complete(wholes, table, dims, cfg.source_dir)
        prefix = "--cfg.target_parallel_config."
        layout = device_layout(cfg.target_parallel_config, layers["llm"], prefix)
        spread = family_spread(family, table, wholes, layers, dims, layout)
        notes += _unchecked_heads(family, dims, layout)
    elif cfg.target_strategy is not None:
        spread = _by_strategy(read_strategies(cfg.target_strategy), wholes, cfg.target_strategy)
        layout = GivenLayout(spread.devices, len(spread.stages))
    else:
        spread = whole_spread({key: whole.shape for key, whole in wholes.items()})
        layout = DeviceLayout()
    to = Destination.of(cfg.target_dir, cfg.format, spread, crc=_crc(options), folder=True)
    dst, held = device_target(wholes, spread)
    plan = run.prove(build(src, dst, notes, run.cast))
    about: dict[str, object] = {"source_layout": _found_layout(source).as_dict()}
    if by_family:
        about |= {"converter": family.converter, "family": family.name}
    result = Result(cfg.target_dir, False, plan, layout, 0.0, dropped=source.dropped)
    inputs = [p for p in (cfg.source_dir, cfg.source_strategy, cfg.target_strategy) if p]
    return write_ms(run, result, dst, held, spread, to, about, inputs)


def _check_shapes(src: Side, headers: Side, cfg: MSToHF) -> None:
    """Raises TensorError for wholes of other shapes than ``hf_dir`` has: often a lone slice."""
    for key, whole in src.wholes.items():
        expected = headers.wholes[key].shape
        if whole.shape != expected:
            raise TensorError(
                f"{cfg.ms_path}: {key.name()} is {list(whole.shape)} in all; "
                f"{cfg.hf_config.hf_dir} makes it {list(expected)}",
                "the whole checkpoint, with its own strategy files, and the hf_dir of its model",
                "give the folder above rank_0, not the file of one rank; or the right hf_dir",
            )


# ------------------------------------------------------------------------------------- layouts


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


def _by_strategy(strategy: Strategy, wholes: Mapping[Key, Whole], path: Path) -> Spread:
    """The slicings of strategy files, for the tensors that there are."""
    devices = strategy.devices(str(path))
    if sorted(strategy.stages) != list(range(len(strategy.stages))):
        raise LayoutError(
            f"{path} speaks of the pipeline stages {', '.join(map(str, sorted(strategy.stages)))}",
            "every stage from 0 on",
            "give the folder with the strategy files of all ranks, or the merged file",
        )
    names = {key.name(): key for key in wholes}
    stages = [
        {names[name]: slicing for name, slicing in strategy.stages[stage].items() if name in names}
        for stage in sorted(strategy.stages)
    ]
    return Spread(stages, devices)


def _found_layout(source: MSModel) -> GivenLayout:
    return GivenLayout(source.spread.devices, len(source.spread.stages))


def _unchecked_heads(family: MSFamily, dims: Dims, layout: DeviceLayout) -> list[str]:
    """A warning where model_parallel could cut through heads whose number nobody tells."""
    unknown = [words for dim, words in family.units if dim not in dims]
    if layout.model_parallel == 1 or not unknown:
        return []
    return [
        f"warning: the numbers of {' and '.join(unknown)} are not known (no "
        f"--cfg.hf_config.hf_dir); not checked that model_parallel {layout.model_parallel} keeps "
        "heads whole"
    ]


# ------------------------------------------------------------------------------------- options


def _run(
    command: str,
    cfg: HFToMS | MSToHF | MSResplit,
    options: MSOptions | None,
    events: Events | None,
) -> Run:
    """A run with the options that it knows, and the dtype that either flag gives."""
    given, dtype = options or MSOptions(), cfg.dtype
    if dtype != "keep" and given.dtype not in ("keep", dtype):
        raise RequestError(f"--cfg.dtype {dtype} and --dtype {given.dtype} differ", "one of them")
    values = {f.name: getattr(given, f.name) for f in fields(CommonOptions)}
    if dtype != "keep":
        values["dtype"] = dtype
    return Run(command, cfg, Options(**values), events)


def _crc(options: MSOptions | None) -> bool:
    return options is not None and options.crc


def _idle(options: Options, used: frozenset[str]) -> list[str]:
    return [f"warning: --drop {p} fits no tensor" for p in options.drop if p not in used]


def _keys(source: MSModel) -> Sequence[Key]:
    return [key for part in source.parts for key in part]
