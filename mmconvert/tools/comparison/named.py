"""Two checkpoints of a model that no family knows, one of them Hugging Face's: names decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.family import Variant, any_family
from mmconvert.formats.model import Model, dropped_by
from mmconvert.formats.registry import load
from mmconvert.names import NO_LAYER
from mmconvert.plan.plan import Key, Side
from mmconvert.tools.comparison.opened import Opened


def open_named(a: Path, b: Path, kinds: tuple[str, str], options: Options) -> tuple[Opened, Opened]:
    """Both with their tensors under the names that stand there. Names of other formats may have a
    prefix before those of Hugging Face, as those of trainers do; it is found out and left off.

    Raises:
        CheckpointError: one cannot be read.
    """
    found = [_opened(path, kind, options) for path, kind in zip((a, b), kinds, strict=True)]
    left, right = found
    for one, other in ((left, right), (right, left)):
        if one.format != "hf":
            names = {key.mm for key in other.side.wholes}
            prefix = _prefix([key.mm for key in one.side.wholes], names)
            wholes = {
                Key(key.mm.removeprefix(prefix), NO_LAYER): whole
                for key, whole in one.side.wholes.items()
            }
            one.side.wholes.clear()
            one.side.wholes.update(wholes)
    return left, right


def _opened(path: Path, kind: str, options: Options) -> Opened:
    found = load(kind).look(path)
    wholes = {
        Key(name, NO_LAYER): whole
        for name, whole in found.wholes.items()
        if not dropped_by((name,), options.drop)
    }
    model = Model(any_family(), Variant(), (), {}, notes=tuple(found.notes))
    return Opened(path, kind, model, Side(list(found.stored), [], wholes), None, found.iteration)


def _prefix(names: Collection[str], plain: Collection[str]) -> str:
    """What stands before most names, so that the rest is a plain name."""
    counted: Counter[str] = Counter()
    for name in names:
        words = name.split(".")
        for n in range(len(words)):
            if ".".join(words[n:]) in plain:
                counted["".join(f"{word}." for word in words[:n])] += 1
    return counted.most_common(1)[0][0] if counted else ""
