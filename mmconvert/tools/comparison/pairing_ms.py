"""Opens two checkpoints of a MindSpore family, Hugging Face or MindSpore, as sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmconvert import converters
from mmconvert.config import Options
from mmconvert.converters.family import Dims, Module, Variant
from mmconvert.converters.mindspore import MSFamily
from mmconvert.errors import CheckpointError
from mmconvert.formats.hf.model import hf_model
from mmconvert.formats.hf.side import hf_side
from mmconvert.formats.mindspore.folder import is_ms, open_ms
from mmconvert.formats.mindspore.model import check_complete, ms_model
from mmconvert.formats.model import Model
from mmconvert.formats.recognise import is_hf, knows_all, ms_family_of
from mmconvert.tools.comparison.opened import Opened


def is_ms_pair(a: Path, b: Path) -> bool:
    """Whether one of two checkpoints is MindSpore's, or an HF one of a MindSpore family."""
    return any(ms_family_of(path) if is_hf(path) else is_ms(path) for path in (a, b))


def open_ms_pair(a: Path, b: Path, options: Options) -> tuple[Opened, Opened]:
    """Opens both. Where neither is HF, a model of any kind will do: its names are compared.

    Raises:
        CheckpointError: one cannot be read, or they are of two families.
    """
    families: dict[Path, MSFamily] = {}
    for path in (a, b):
        if is_hf(path):
            family = ms_family_of(path)
            if family is None:
                raise CheckpointError(
                    f"{path} is of a family that has no MindSpore form here",
                    "a checkpoint of " + ", ".join(f.name for f in _known().values()),
                )
            families[path] = family
        elif not is_ms(path):
            raise CheckpointError(f"{path} is no MindSpore checkpoint", "two of one family")
    if len({family.name for family in families.values()}) > 1:
        raise CheckpointError(f"{a} and {b} are of two families", "two of one family")
    family = next(iter(families.values()), None) or _by_names(a)
    table = family.modules(Variant())
    left, right = (
        _open_hf(path, family, options) if path in families else _open(path, family, table, options)
        for path in (a, b)
    )
    return left, right


def _known() -> Mapping[str, MSFamily]:
    return converters.ms_registry()


def _by_names(path: Path) -> MSFamily:
    """The family whose table knows the tensors of a MindSpore checkpoint, or one without a table.

    Its names alone are looked at, so any rank will do.
    """
    names = [name for part in open_ms(path).parts for name in part]
    for family in _known().values():
        if knows_all(family, names):
            return family
    return _any_family()


def _any_family() -> MSFamily:
    """No table: every tensor goes by its own name."""

    def no_dims(config: Mapping[str, object]) -> Dims:
        del config
        return {}

    def no_modules(variant: Variant) -> tuple[Module, ...]:
        del variant
        return ()

    def same(config: Mapping[str, object]) -> Mapping[str, object]:
        return config

    return MSFamily(
        name="",
        converter="",
        model_types=frozenset(),
        dims=no_dims,
        modules=no_modules,
        text_config=same,
        variants=(Variant(),),
        embedding="",
        head="",
    )


def _open_hf(path: Path, family: MSFamily, options: Options) -> Opened:
    model = hf_model(family, path, options)
    side = hf_side(model.modules, model.dims, model.hf_tensors, transposed=True)
    return Opened(path, model, side, None)


def _open(path: Path, family: MSFamily, table: tuple[Module, ...], options: Options) -> Opened:
    found = ms_model(path, None, options, table or None, name=family.name)
    if table:
        check_complete((key for part in found.parts for key in part), table, {}, path)
    model = Model(
        family,
        Variant(),
        table,
        {},
        notes=tuple(found.notes),
        patterns=found.patterns,
        dropped=found.dropped,
    )
    return Opened(path, model, found.side(), None)
