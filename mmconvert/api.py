"""The functions for Python programs; each is one command of ``mm-convert``.

    import mmconvert

    mmconvert.hf_to_mm("hf", "mm", {"llm_pp_layers": [12, 16], "vit_pp_layers": [32, 0]})
    mmconvert.mm_to_hf("mm", "hf", "back")
    mmconvert.resplit("mm", "mm2", {"tp_size": 2})
    assert mmconvert.verify("mm", "hf").equal
    mmconvert.open("mm")["text_decoder.decoder.final_layernorm.weight"]

The family is told by config.json or by the checkpoint; ``converter`` asserts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mmconvert import converters, lazy
from mmconvert.config import CommonModelConfig, HFConfig, HFToMM, MMToHF, Options, ParallelConfig
from mmconvert.config.mindspore import RankFolders
from mmconvert.convert import convert
from mmconvert.converters.family import Family
from mmconvert.directions import mm
from mmconvert.errors import LayoutError
from mmconvert.events import Events
from mmconvert.formats import recognise, registry
from mmconvert.lazy import Tensors
from mmconvert.request import End, Request
from mmconvert.result import Result
from mmconvert.sharding.stages import parse_grid
from mmconvert.tools import inspection
from mmconvert.tools.comparison import verification

if TYPE_CHECKING:
    from torch import Tensor

AnyPath = str | PathLike[str]
AnyLayout = ParallelConfig | Mapping[str, Any] | None
L = TypeVar("L")


def parallel_config(layout: AnyLayout) -> ParallelConfig:
    """A ParallelConfig from one, from a mapping with its keys, or from nothing.

    Raises:
        LayoutError: an unknown key, or a list that is no stage grid.
    """
    return layout_of(ParallelConfig, layout)


def layout_of(form: type[L], layout: L | Mapping[str, Any] | None) -> L:
    """A layout in a format's own class: from one, from a mapping with its keys, or from nothing.

    Raises:
        LayoutError: an unknown key, or a list that is no stage grid.
    """
    if isinstance(layout, form):
        return layout
    if layout is not None and not isinstance(layout, Mapping):
        raise LayoutError(f"the layout is {layout!r:.200}", f"a {form.__name__}, or a mapping")
    given = dict(cast("Mapping[str, Any]", layout or {}))
    known = getattr(form, "__dataclass_fields__", {})
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise LayoutError(f"the layout has a key {unknown[0]}", f"keys among {', '.join(known)}")
    for key, value in given.items():
        if key.endswith("_pp_layers") and value is not None:
            given[key] = parse_grid(value, key)
    if isinstance(given.get("strategy"), str):
        given["strategy"] = Path(given["strategy"])
    return form(**given)


def _family(converter: str | None, *folders: Path) -> Family:
    return converters.load(converter) if converter else recognise.family_of(*folders)


def hf_to_mm(
    hf_dir: AnyPath,
    mm_dir: AnyPath,
    layout: AnyLayout = None,
    *,
    converter: str | None = None,
    canonical: bool = False,
    save_vit_only: bool = False,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """Hugging Face -> MM. Without a layout everything stands on one rank.

    Raises:
        MMConvertError: see :mod:`mmconvert.errors`; nothing is left under the final name.
    """
    cfg = HFToMM(
        mm_dir=Path(mm_dir),
        hf_config=HFConfig(Path(hf_dir)),
        parallel_config=parallel_config(layout),
        common_model_config=CommonModelConfig(enable_canonical_hf_struct=canonical),
        save_vit_only=save_vit_only,
    )
    return mm.hf_to_mm(_family(converter, Path(hf_dir)), cfg, options, events)


def mm_to_hf(
    mm_dir: AnyPath,
    hf_dir: AnyPath,
    save_hf_dir: AnyPath,
    layout: AnyLayout = None,
    *,
    converter: str | None = None,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """MM -> Hugging Face, in the weight files and names of ``hf_dir``. A layout only asserts.

    Raises:
        MMConvertError: see :mod:`mmconvert.errors`; nothing is left under the final name.
    """
    cfg = MMToHF(
        save_hf_dir=Path(save_hf_dir),
        mm_dir=Path(mm_dir),
        hf_config=HFConfig(Path(hf_dir)),
        parallel_config=parallel_config(layout),
    )
    return mm.mm_to_hf(_family(converter, Path(hf_dir)), cfg, options, events)


def hf_to_ms(
    hf_dir: AnyPath,
    ms_path: AnyPath,
    layout: RankFolders | Mapping[str, Any] | None = None,
    *,
    converter: str | None = None,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """Hugging Face -> MindSpore: a file, or with a layout of several ranks a folder.

    Raises:
        MMConvertError: see :mod:`mmconvert.errors`; nothing is left under the final name.
    """
    return convert_to(
        "ms", hf_dir, ms_path, layout, converter=converter, options=options, events=events
    )


def ms_to_hf(
    ms_path: AnyPath,
    hf_dir: AnyPath,
    save_hf_dir: AnyPath,
    *,
    strategy: AnyPath | None = None,
    converter: str | None = None,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """MindSpore -> Hugging Face, in the weight files and names of ``hf_dir``.

    Args:
        strategy: strategy file or folder of them, if not beside the rank folders.

    Raises:
        MMConvertError: see :mod:`mmconvert.errors`; nothing is left under the final name.
    """
    given = RankFolders(strategy=None if strategy is None else Path(strategy))
    return convert_to(
        "hf",
        ms_path,
        save_hf_dir,
        hf_dir=hf_dir,
        source_layout=given,
        converter=converter,
        options=options,
        events=events,
    )


def reshard(
    source_dir: AnyPath,
    target_dir: AnyPath,
    layout: AnyLayout | RankFolders = None,
    *,
    source_layout: AnyLayout | RankFolders = None,
    hf_dir: AnyPath | None = None,
    converter: str | None = None,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """MM -> MM, or MindSpore -> MindSpore, in another layout; an MM ``source_layout`` only asserts.

    Raises:
        MMConvertError: see :mod:`mmconvert.errors`; nothing is left under the final name.
    """
    kind = registry.recognise(Path(source_dir))
    return convert_to(
        "ms" if kind == "ms" else "mm",
        source_dir,
        target_dir,
        layout,
        source_layout=source_layout,
        hf_dir=hf_dir,
        converter=converter,
        options=options,
        events=events,
    )


def convert_to(
    to: str,
    source: AnyPath,
    target: AnyPath,
    layout: object = None,
    *,
    source_layout: object = None,
    hf_dir: AnyPath | None = None,
    converter: str | None = None,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """Any format -> any format, those of other packages included.

    Args:
        to: the name of the target's format, such as ``hf``, ``mm`` or ``ms``.
        layout: what to write: the format's own layout, or a mapping with its keys.
        source_layout: what is known of the source's, in the same form.
        hf_dir: the original model: needed to write Hugging Face, else a help with sizes.

    Raises:
        MMConvertError: see :mod:`mmconvert.errors`; nothing is left under the final name.
    """
    path, original = Path(source), None if hf_dir is None else Path(hf_dir)
    start = registry.recognise(path) or "mm"
    asked = Request(
        "resplit" if start == to else f"{start}_to_{to}",
        End(start, path, layout_of(registry.load(start).Layout, source_layout)),
        End(to, Path(target), layout_of(registry.load(to).Layout, layout)),
        original=original,
    )
    if converter:
        family = converters.load(converter)
    else:
        family = recognise.family_of(*(p for p in (original, path) if p is not None), naming="")
    return convert(family, asked, options, events)


def verify(
    a: AnyPath, b: AnyPath, *, options: Options | None = None, events: Events | None = None
) -> verification.Verdict:
    """Compares two checkpoints of any formats, in any two layouts of one family.

    Raises:
        MMConvertError: a checkpoint that cannot be read, or that lacks tensors of the other.
    """
    return verification.verify(Path(a), Path(b), options, events)


def inspect(path: AnyPath) -> inspection.Inspection:
    """What a checkpoint or a weight file is; reads headers only.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return inspection.inspect(Path(path))


def open(path: AnyPath) -> Tensors:  # noqa: A001 - read as mmconvert.open
    """A lazy mapping of names to torch tensors over a checkpoint or a weight file.

    Headers are read at once, a tensor's data when it is asked for. MM tensors come whole, put
    together from their ranks, under MM names with the model's own layer numbers.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return lazy.open_checkpoint(Path(path))


def load_rank(
    hf_dir: AnyPath,
    layout: AnyLayout,
    tp_rank: int,
    pp_rank: int,
    vpp_rank: int = 0,
    *,
    ep_rank: int = 0,
    converter: str | None = None,
) -> dict[str, Tensor]:
    """One rank's MM state dict straight from an HF checkpoint; nothing is written to disk.

    Returns:
        name -> torch tensor, as ``model`` (or ``model{vpp_rank}``) of that rank file holds it.

    Raises:
        MMConvertError: see :mod:`mmconvert.errors`; ImportError: torch is not installed.
    """
    from mmconvert.loading import load_rank as load

    family = _family(converter, Path(hf_dir))
    place = (tp_rank, pp_rank, vpp_rank, ep_rank)
    return load(family, Path(hf_dir), parallel_config(layout), place)
