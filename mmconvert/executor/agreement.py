"""What the processes of one run must agree on before anything is written."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mmconvert.formats.reading import State
from mmconvert.narrow import is_object
from mmconvert.plan.plan import Plan
from mmconvert.version import VERSION

OWN = {"workers", "ranks", "ranks_timeout"}  # options that each process may have for itself


def of_request(command: str, cfg: Any, options: Any) -> dict[str, str]:  # noqa: ANN401 - dataclasses
    """What was asked for, by the names of the flags; folders without the links on their way."""
    facts = {"the version of mmconvert": VERSION, "the command": command}
    facts |= {f"--cfg.{key}": value for key, value in _flat(asdict(cfg))}
    given = {key: value for key, value in asdict(options).items() if key not in OWN}
    return facts | {f"--{key.replace('_', '-')}": value for key, value in _flat(given)}


def _flat(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if is_object(value):
            yield from ((f"{key}.{inner}", words) for inner, words in _flat(value))
        else:
            yield key, os.path.realpath(value) if isinstance(value, Path) else str(value)


def of_plan(plan: Plan, states: Mapping[Path, State]) -> dict[str, str]:
    """What was found: sizes and headers of the files, and what is to be made of them."""
    headers: dict[Path, list[object]] = defaultdict(list)
    for tensor in plan.sources:
        headers[tensor.path].append(tensor._replace(path=Path()))
    facts = {
        f"the content of {os.path.realpath(path)}": f"{state.nbytes} bytes, headers "
        f"{_digest(headers[path])}"
        for path, state in states.items()
    }
    parts: list[object] = [
        plan.targets,
        plan.copies,
        plan.fills,
        plan.cast,
        plan.terms,
        plan.products,
    ]
    return facts | {"the plan": _digest(parts)}


def _digest(parts: list[object]) -> str:
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()
