"""Conversions of adapters: spellings of the story in ``convert``, one function for each command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmconvert.adapters import PREFIX
from mmconvert.config import Options, ParallelConfig
from mmconvert.config.lora import (
    LoraCommonConfig,
    LoraHFToMM,
    LoraMerge,
    LoraMMToHF,
    LoraResplit,
    PEFTChoices,
)
from mmconvert.convert import convert
from mmconvert.converters.family import Family
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.events import Events
from mmconvert.formats import manifest
from mmconvert.formats.adapters import open_adapter
from mmconvert.formats.base import Opening
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.mm.adapters import noted_traits
from mmconvert.formats.model import Model
from mmconvert.formats.peft.files import named_base, read_file
from mmconvert.formats.reading import watched
from mmconvert.formats.registry import load, recognise
from mmconvert.plan.products import Adapter
from mmconvert.request import PARALLEL, End, Request
from mmconvert.result import Result
from mmconvert.sharding.layout import Layout, grid_flag


def inputs(cfg: Any) -> list[Path]:  # noqa: ANN401 - one of many dataclasses
    """The folders that tell the family of a request."""
    hf_dir = getattr(getattr(cfg, "hf_config", None), "hf_dir", None)
    names = ("base_dir", "base_hf_dir", "base_mm_dir", "mm_dir", "source_dir")
    if isinstance(cfg, LoraHFToMM):
        names = ("base_hf_dir", "base_mm_dir")
    found = [*(getattr(cfg, name, None) for name in names), hf_dir]
    return [path for path in found if path is not None]


@watched
def lora_hf_to_mm(
    family: Family, cfg: LoraHFToMM, options: Options | None = None, events: Events | None = None
) -> Result:
    """PEFT adapter -> MM. Raises and returns as :func:`convert`, like all here."""
    options = options or Options()
    adapter, common = cfg.hf_config.hf_dir, cfg.common_model_config
    check_spelling(common, adapter)
    given, canonical = cfg.parallel_config, common.enable_canonical_hf_struct
    like = base_model(family, cfg.base_hf_dir or named_base(adapter))
    if cfg.base_mm_dir is not None:
        base = load("mm").open(cfg.base_mm_dir, Opening(family, options, like=like, part="base"))
        if base.model.adapter is not None:
            raise RequestError(f"{cfg.base_mm_dir} is an adapter", "the base model in MM format")
        like = base.model
        canonical = base.model.variant.canonical if canonical is None else canonical
        if given == ParallelConfig() and isinstance(base.layout, Layout):
            given = as_flags(base.layout)
    structure = {None: "", True: "canonical", False: "fused"}[canonical]
    choices = PEFTChoices(cfg.lora_alpha, structure, cfg.exact_rank, cfg.fold_scaling)  # pyright: ignore[reportArgumentType] - one of the three
    asked = Request(
        "lora_hf_to_mm",
        End("peft", adapter, choices),
        End("mm", cfg.mm_dir, given, PARALLEL),
        cfg=cfg,
        like=like,
    )
    return convert(family, asked, options, events)


@watched
def lora_mm_to_hf(
    family: Family, cfg: LoraMMToHF, options: Options | None = None, events: Events | None = None
) -> Result:
    """MM adapter -> PEFT: weights and adapter_config.json."""
    common, hf_dir = cfg.common_model_config, cfg.hf_config.hf_dir
    if common.model_prefix not in ("", PREFIX):
        raise RequestError(
            f"--cfg.common_model_config.model_prefix is {common.model_prefix}",
            f"{PREFIX}, as PEFT has it: it finds no other names",
            "leave it out",
        )
    new = common.new_transformers_weight_key
    names = cfg.names or ("old" if new is False else "new")
    if new is not None and (names == "new") != new:
        raise RequestError(
            f"--cfg.names {names} and new_transformers_weight_key {new} say two different things",
            "one of them",
        )
    base = cfg.base_model or (str(hf_dir) if hf_dir is not None else "")
    asked = Request(
        "lora_mm_to_hf",
        End("mm", cfg.mm_dir, cfg.parallel_config, PARALLEL, "adapter"),
        End("peft", cfg.save_hf_dir, PEFTChoices(cfg.lora_alpha, names=names, base_model=base)),
        canonical=common.enable_canonical_hf_struct is True,
        cfg=cfg,
        like=base_model(family, hf_dir),
    )
    return convert(family, asked, options, events)


@watched
def lora_resplit(
    family: Family, cfg: LoraResplit, options: Options | None = None, events: Events | None = None
) -> Result:
    """MM adapter -> MM adapter in another layout."""
    flags = ("--cfg.source_parallel_config.", "--cfg.target_parallel_config.")
    asked = Request(
        "lora_resplit",
        End("mm", cfg.source_dir, cfg.source_parallel_config, flags[0], "adapter"),
        End("mm", cfg.target_dir, cfg.target_parallel_config, flags[1]),
        cfg=cfg,
        like=base_model(family, cfg.hf_config.hf_dir),
    )
    return convert(family, asked, options, events)


@watched
def lora_merge(
    family: Family, cfg: LoraMerge, options: Options | None = None, events: Events | None = None
) -> Result:
    """Base model and adapters -> model: products in float32, each sum rounded once."""
    options = options or Options()
    kind = base_kind(cfg.base_dir)
    target = cfg.to or kind
    original = cfg.base_dir if kind == "hf" else cfg.hf_config.hf_dir
    like = base_model(family, original)
    if not cfg.lora_dir:
        raise RequestError("no adapter is given", "--cfg.lora_dir FOLDER")
    noted = manifest.read(cfg.base_dir)[0] or {}
    adapters = tuple(
        open_adapter(
            Path(folder),
            family,
            options,
            like,
            alpha=cfg.lora_alpha,
            factor=cfg.scale,
            base_is_residual=cfg.base_is_residual,
            traits=noted_traits(noted),
            sizes=manifest.sizes(noted),
        )
        for folder in cfg.lora_dir
    )
    for adapter in adapters:
        _check_said(adapter, cfg)
    flags = "--cfg.target_parallel_config."
    given = cfg.target_parallel_config
    source = End(
        kind, cfg.base_dir, cfg.parallel_config if kind == "mm" else None, PARALLEL, "base"
    )
    if target == "mm" and given == ParallelConfig():
        given = cfg.parallel_config if kind == "hf" else layout_of(family, cfg, options, like)
    asked = Request(
        "lora_merge",
        source,
        End(target, cfg.save_dir, given if target == "mm" else None, flags),
        original=original,
        canonical=cfg.common_model_config.enable_canonical_hf_struct and kind == "hf",
        cfg=cfg,
        adapters=adapters,
        untie=cfg.untie,
    )
    return convert(family, asked, options, events)


def _check_said(adapter: Adapter, cfg: LoraMerge) -> None:
    """Raises CheckpointError for an adapter that is not what the flags say."""
    for delta in adapter.deltas:
        term = delta.term
        if cfg.lora_r is not None and term.a and term.rank != cfg.lora_r:
            raise CheckpointError(
                f"{adapter.where}: the adapter of {term.name} has the rank {term.rank}, lora_r "
                f"says {cfg.lora_r}",
                "the rank that the matrices have",
                "leave the flag out",
            )
        ends = cfg.lora_target_modules
        name = f".{term.name}"
        if ends and not any(name.endswith(f".{end}") for end in ends):
            raise CheckpointError(
                f"{adapter.where}: {term.name} is adapted, and is none of lora_target_modules "
                f"{' '.join(ends)}: it would be lost",
                "the ends of all adapted modules, in the adapter's own names",
                "leave the flag out: all that the adapter holds is merged",
            )


def base_kind(base: Path) -> str:
    """Whether a base model is ``hf`` or ``mm``."""
    kind = recognise(base) or "mm"
    if kind not in ("hf", "mm"):
        raise CheckpointError(
            f"{base} is a {load(kind).title}",
            "a base model, Hugging Face or MM",
            "give the base model as --cfg.base_dir, the adapter as --cfg.lora_dir",
        )
    return kind


def layout_of(
    family: Family, cfg: LoraMerge, options: Options, like: Model | None
) -> ParallelConfig:
    """The layout of the base model, which the merged one keeps."""
    base = load("mm").open(cfg.base_dir, Opening(family, options, like=like, part="base"))
    return as_flags(base.layout) if isinstance(base.layout, Layout) else ParallelConfig()


def base_model(family: Family, folder: Path | None) -> Model | None:
    """The base model by its config.json alone."""
    return None if folder is None else config_model(family, folder)


def as_flags(layout: Layout) -> ParallelConfig:
    """A layout as flags."""
    words: dict[str, object] = {grid_flag(key): grid for key, grid in layout.grids.items()}
    words |= {layout.tp_flag(key): size for key, size in layout.tp.items()}
    return replace(ParallelConfig(ep_size=layout.ep), **words)  # pyright: ignore[reportArgumentType] - its own fields


def check_spelling(common: LoraCommonConfig, adapter: Path) -> None:
    """Raises CheckpointError where the flags say otherwise than an adapter's names."""
    file, _ = read_file(adapter)
    names = [tensor.name for tensor in file.tensors]
    if common.model_prefix and not names[0].startswith(common.model_prefix):
        raise CheckpointError(
            f"--cfg.common_model_config.model_prefix says {common.model_prefix}; {file.path} has "
            f"{names[0]}",
            "the prefix that the names have",
            "leave the flag out: names are recognised",
        )
    new = any(".language_model.layers." in name for name in names)
    old = any(".model.layers." in name.replace("language_model.model.", "") for name in names)
    said = common.new_transformers_weight_key
    if (said is True and old and not new) or (said is False and new):
        raise CheckpointError(
            f"--cfg.common_model_config.new_transformers_weight_key says {said}; {file.path} has "
            f"{names[0]}",
            "what the names are",
            "leave the flag out: names are recognised",
        )
