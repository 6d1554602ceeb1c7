"""adapter_config.json: written so that every version of PEFT loads it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from mmconvert.adapters import WEIGHT, Settings
from mmconvert.formats.mm.instances import experts_of, instances
from mmconvert.formats.model import Model
from mmconvert.formats.peft.target import AdaptedPaths, spelled
from mmconvert.names import NO_EXPERT


def config_text(
    settings: Settings, model: Model, adapted: AdaptedPaths, names: str, base: str
) -> bytes:
    """The configuration of an adapter of these modules.

    Args:
        model: the adapter's, whose table tells which other modules there are.
        adapted: the modules and parameters that it changes.
        names: their spelling.
        base: ``base_model_name_or_path``.
    """
    alpha = settings.alpha or 0
    universe = _universe(model, names)
    chosen, excluded = target_modules(adapted.modules, universe.modules)
    content: dict[str, object] = {
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0 if adapted.parameters else settings.dropout,  # PEFT refuses it else
        "peft_type": "LORA",
        "r": settings.r,
        "target_modules": chosen,
        "task_type": "CAUSAL_LM",
    }
    if excluded:
        content["exclude_modules"] = excluded
    if adapted.parameters:
        others = universe.parameters - adapted.parameters.keys()
        content["target_parameters"] = _ends(adapted.parameters, others)
    return (json.dumps(content, indent=2) + "\n").encode()


class Universe(NamedTuple):
    """What a model has that could be adapted.

    Attributes:
        modules: their paths, by the key of their part of the model.
        parameters: paths of those that stack experts.
    """

    modules: dict[str, list[str]]
    parameters: set[str]


def _universe(model: Model, names: str) -> Universe:
    table = model.family.table(model.variant)
    layers = {m.key: model.dims.get(f"{m.key}.layers", 1) for m in table}
    found = Universe(defaultdict(list), set())
    for item in instances(table, layers, experts_of(table, model.dims)):
        for hub, inside in item.hf_places():
            path = spelled(model.family, hub, names)
            if hub.endswith(WEIGHT):
                found.modules[item.module.key].append(path.removesuffix(WEIGHT))
            elif inside != NO_EXPERT:
                found.parameters.add(path)
    return found


def target_modules(
    paths: Collection[str], universe: Mapping[str, Collection[str]]
) -> tuple[list[str], str]:
    """The shortest ends of names that fit these modules and no others.

    Args:
        universe: all modules, by the part of the model that they are in.

    Returns:
        the ends; and an expression for a whole part of the model that would fit too and is not
        adapted, "" for none.
    """
    adapted = set(paths)
    idle = [names for names in universe.values() if names and not adapted.intersection(names)]
    others = {name for names in universe.values() for name in names} - adapted
    plain = _ends(adapted, others)
    if not idle:
        return plain, ""
    rest = others.difference(*map(set, idle))
    narrow = _ends(adapted, rest)
    prefixes = [_common(names) for names in idle]
    if len(narrow) >= len(plain) or not all(prefixes):
        return plain, ""
    return narrow, "|".join(f"{re.escape(prefix)}.*" for prefix in prefixes)


def _above(paths: Iterable[str]) -> Iterator[str]:
    """The modules that others lie in, such as a layer."""
    for path in paths:
        words = path.split(".")
        yield from (".".join(words[:i]) for i in range(1, len(words)))


def _ends(adapted: Collection[str], others: Collection[str]) -> list[str]:
    taken: set[str] = set()
    for name in {*others, *_above(others), *_above(adapted)}:
        words = name.split(".")
        taken.update(".".join(words[i:]) for i in range(len(words)))
    chosen: set[str] = set()
    for path in sorted(adapted):
        words = path.split(".")
        ends = (".".join(words[i:]) for i in range(len(words) - 1, -1, -1))
        chosen.add(next((end for end in ends if end not in taken), path))
    return sorted(chosen)


def _common(names: Collection[str]) -> str:
    """The path that all names begin with, with its last point."""
    first, last = min(names).split("."), max(names).split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return ".".join([*first[:same], ""]) if same else ""
