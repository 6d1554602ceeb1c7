"""Opens two checkpoints of one model, of any formats, as sides of one comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.family import Family, any_family
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.formats import manifest
from mmconvert.formats.base import Opening, StoredCheckpoint
from mmconvert.formats.registry import load, recognise
from mmconvert.formats.untied import ties, untied_model
from mmconvert.narrow import is_object
from mmconvert.plan.padding import pad_vocabulary
from mmconvert.plan.plan import Side
from mmconvert.sharding.layout import Layout
from mmconvert.tools.comparison.named import open_named
from mmconvert.tools.comparison.opened import Opened


def open_pair(a: Path, b: Path, options: Options, *, untie: bool = False) -> tuple[Opened, Opened]:
    """Opens both. A Hugging Face checkpoint tells the other's sizes, and takes its structure.
    Where no family knows the names of either, a model of any kind will do: names are compared.

    Args:
        untie: where ``b`` has an output layer of its own, ``a`` is seen as if it had one too.

    Raises:
        CheckpointError: one cannot be read, or they are of two families.
        RequestError: optimizer state is asked for, where none is read.
    """
    kinds = [recognise(path) or "mm" for path in (a, b)]
    for kind, path in zip(map(load, kinds), (a, b), strict=True):
        if options.optimizer and "optimizer" not in kind.reads:
            raise RequestError(
                f"--optimizer compares optimizer state; of {kind.title} ({path}) none is read",
                "two MM checkpoints",
                "leave --optimizer out: the weights are compared",
            )
    family = _family((a, b), kinds)
    if not family.converter and "hf" in kinds:
        return open_named(a, b, (kinds[0], kinds[1]), options)
    told = Opening(family, options, claims=bool(family.converter))
    found: dict[int, StoredCheckpoint] = {}
    order = sorted((0, 1), key=lambda i: (kinds[i] != "hf", load(kinds[i]).needs_sizes))
    for number in order:
        kind, path = load(kinds[number]), (a, b)[number]
        hints = [s.model for s in found.values() if s.format == "hf" or kind.needs_sizes]
        knows = bool(hints and hints[0].modules and hints[0].dims)
        like = hints[0] if knows and kind.name != "hf" else None
        if untie and like is not None and number == 1 and _told_untied(path):
            like = untied_model(like)
        found[number] = kind.open(path, replace(told, like=like))
    if untie and ties(found[0].model) and not ties(found[1].model):
        found[0] = found[0].untied()
    canonical = any(s.model.variant.canonical for s in found.values())
    left, right = (_opened(found[number], canonical=canonical) for number in (0, 1))
    if left.model.words or right.model.words:  # one of them has rows that pad the vocabulary
        rows = max(opened.model.dims.get(family.vocabulary, 0) for opened in (left, right))
        for opened in (left, right):
            pad_vocabulary(opened.side, opened.model.modules, rows)
    return left, right


def _told_untied(path: Path) -> bool:
    """Whether mmconvert.json says that the output layer is a tensor of its own."""
    content, _ = manifest.read(path)
    said = content.get("variant") if content else None
    return is_object(said) and said.get("tied") is False


def _family(paths: tuple[Path, Path], kinds: list[str]) -> Family:
    """The one family of both; one without a table if neither is known."""
    found: list[Family | None] = []
    unknown: list[CheckpointError] = []
    for kind, path in zip(kinds, paths, strict=True):
        try:
            found.append(load(kind).family(path))
        except CheckpointError as error:
            if error.cause != "unsupported-model":
                raise
            found.append(None)
            unknown.append(error)
    known = [family for family in found if family is not None]
    if not known:
        return any_family()
    if unknown:
        raise unknown[0]
    for kind in map(load, kinds):
        for path, family in zip(paths, found, strict=True):
            if family is not None and kind.naming not in ("", "hf", family.naming):
                raise CheckpointError(
                    f"{path} belongs to a family that cannot be stored as {kind.title}",
                    "two of one family",
                )
    if known[0].converter != known[-1].converter:
        a, b = paths
        raise CheckpointError(
            f"{a} is a checkpoint of {known[0].name}, {b} of {known[-1].name}",
            "two checkpoints of one family",
            "check both paths; mm-convert inspect PATH says what a checkpoint is",
        )
    return known[0]


def _opened(stored: StoredCheckpoint, *, canonical: bool) -> Opened:
    """One of the two; Hugging Face in the structure of the other."""
    model, modules = stored.model, None
    if load(stored.format).naming == "hf" and model.modules:
        variant = replace(model.variant, canonical=canonical, encoder_qkv="interleaved")
        modules = model.family.table(variant)
        model = replace(model, variant=variant, modules=modules)
    side: Side = stored.side(modules)
    layout = stored.layout if isinstance(stored.layout, Layout) else None
    return Opened(
        *(stored.path, stored.format, model, side, layout, stored.iteration), stored.training
    )
