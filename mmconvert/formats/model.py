"""A checkpoint's model, and the layout that is asked for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from mmconvert.adapters import Settings
from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.adapters import derived, like
from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module, decoder_of
from mmconvert.errors import LayoutError, RequestError
from mmconvert.formats.hf.folder import HFCheckpoint
from mmconvert.formats.mm.instances import experts_of
from mmconvert.names import number, summarise
from mmconvert.sharding.layout import Layout, grid_flag, tp_flag
from mmconvert.sharding.spans import divisors
from mmconvert.sharding.stages import show, total
from mmconvert.stored import StoredTensor


class Notes:
    """What is worth knowing of a checkpoint that is opened.

    Attributes:
        words: for people.
        dropped: names of tensors that are left out, by the reason.
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        self.words = list(words)
        self.dropped: dict[str, tuple[str, ...]] = {}

    def drop(self, why: str, names: Iterable[str]) -> None:
        """Tensors are left out."""
        self.dropped[why] = tuple(names)
        count = number(self.dropped[why], "tensor")
        self.words.append(f"{count} left out ({why}): {summarise(self.dropped[why])}")


@dataclass(frozen=True)
class Model:
    """A checkpoint's model: the family's table in the variant that fits, and its sizes.

    Attributes:
        modules: the table; without the text decoder if only the encoders are expected.
        dims: sizes as far as they are known.
        hf: the HF checkpoint, if it is one.
        hf_tensors: its tensors that have a row, by name in hub spelling.
        notes: what was left out, in words.
        carried: tensors of ``hf`` that are not converted and return from it.
        patterns: the --drop patterns that fit a tensor.
        tied_known: whether config.json or the tensors tell if the output layer is tied.
        dropped: names of tensors that are left out, by the reason.
        adapter: what it changes, if it is an adapter; ``modules`` are the rows of its matrices.
        words: rows of the vocabulary in Hugging Face, where the checkpoint has more; else 0.
    """

    family: Family
    variant: Variant
    modules: tuple[Module, ...]
    dims: Dims
    hf: HFCheckpoint | None = None
    hf_tensors: Mapping[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    notes: tuple[str, ...] = ()
    carried: tuple[StoredTensor, ...] = ()
    patterns: frozenset[str] = frozenset()
    tied_known: bool = True
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    adapter: AdapterModel | None = None
    words: int = 0

    @property
    def true_dims(self) -> Dims:
        """The sizes of the model itself, whose vocabulary is not padded."""
        return {**self.dims, self.family.vocabulary: self.words} if self.words else self.dims

    @property
    def plain_modules(self) -> tuple[Module, ...]:
        """The table of what we write: vision q, k and v interleaved."""
        plain = self.family.table(
            replace(self.variant, encoder_qkv="interleaved", experts_transposed=False)
        )
        if self.adapter is not None:
            return derived(like(plain, self.adapter.base))
        keys = {m.key for m in self.modules}
        return tuple(m for m in plain if m.key in keys)


@dataclass(frozen=True)
class AdapterModel:
    """Which of a model's layers an adapter changes.

    Attributes:
        settings: of the adapter.
        base: the rows of the weights that it changes, each in the layers that it changes; the
            table of the adapter is derived from them.
    """

    settings: Settings
    base: tuple[Module, ...]


def dropped_by(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first ``--drop`` pattern that one of the names fits."""
    names = tuple(names)
    return next((p for p in patterns if any(fnmatchcase(n, p) for n in names)), None)


def drops_too_much(pattern: str, name: str) -> RequestError:
    """The error for a --drop pattern that fits a tensor which the model needs."""
    return RequestError(
        f"--drop {pattern} fits {name}, which the model needs",
        "a pattern for tensors that have no place in the model",
        "narrow the pattern",
    )


def idle_patterns(options: Options, *models: Model) -> list[str]:
    """Warnings for --drop patterns that fit nothing: they may be misspelled."""
    return [
        f"warning: --drop {pattern} fits no tensor"
        for pattern in options.drop
        if not any(pattern in model.patterns for model in models)
    ]


def target_layout(model: Model, given: ParallelConfig, prefix: str) -> Layout:
    """The layout to write, checked against the model's layer counts.

    Without any list everything stands on one stage.

    Raises:
        LayoutError: lists or sizes that are missing, too many, or do not fit.
    """
    _check_ep(model, given.ep_size, prefix)
    grids = given.grids()
    keys, decoder = model.family.module_keys, model.family.decoder
    extra = [key for key in grids if key not in keys]
    if extra:
        raise LayoutError(
            f"{prefix}{grid_flag(extra[0])} is given, but {model.family.name} has no such module",
            "lists for " + ", ".join(grid_flag(key) for key in keys),
        )
    expected = [key for key in keys if any(m.key == key for m in model.modules)]
    if not grids:
        grids = {key: ((model.dims[f"{key}.layers"],),) for key in expected}
    absent = [grid_flag(key) for key in expected if key not in grids]
    if absent:
        raise LayoutError(
            f"{prefix}{absent[0]} is missing",
            "a list for each of " + ", ".join(grid_flag(key) for key in expected),
        )
    sizes = given.tp(decoder)
    for key, size in sizes.items():
        if key not in keys:
            raise LayoutError(
                f"{prefix}{tp_flag(key, decoder)} is given, but {model.family.name} has no such "
                "module",
                "sizes for " + ", ".join(tp_flag(key, decoder) for key in keys),
            )
        if size < 1:
            raise LayoutError(f"{prefix}{tp_flag(key, decoder)} is {size}", "a size of at least 1")
    if given.tp_size == 0:
        raise LayoutError(f"{prefix}tp_size is 0", "a size of at least 1")
    grids = {key: grids[key] for key in keys if key in grids}
    layout = Layout(
        {key: sizes.get(key, sizes.get(decoder, 1)) for key in grids},
        grids,
        given.ep_size or 1,
        decoder=decoder if decoder in grids else "",
    )
    layout.check(ordered=model.family.ordered)
    for key, grid in grids.items():
        want = model.dims.get(f"{key}.layers", total(grid))
        if total(grid) != want:
            raise LayoutError(
                f"{prefix}{grid_flag(key)} {show(grid)} adds up to {total(grid)} layers; the "
                f"model has {want}",
                f"layer counts that add up to {want}",
                "correct the list, or give the folder of the model that it is for",
            )
    return layout


def _check_ep(model: Model, size: int, prefix: str) -> None:
    """Raises LayoutError for an expert-parallel size that does not divide the experts."""
    counts = [n for n in experts_of(model.modules, model.dims).values() if n]
    if size in (0, 1) or (model.adapter is not None and not counts):
        return  # an adapter of other layers is the same on all expert-parallel ranks
    if not counts:
        of = "the encoders have" if not decoder_of(model.modules) else f"{model.family.name} has"
        raise LayoutError(f"{prefix}ep_size is {size}; {of} no experts", "1", "leave the flag out")
    for count in counts:
        if size < 0 or count % size:
            raise LayoutError(
                f"{prefix}ep_size is {size}; {model.family.name} has {count} experts in a layer",
                f"a size that divides {count}: one of {divisors(count)}",
                "choose such a size: each rank holds as many experts as the others",
            )


def unchecked_units(model: Model, found: Layout | None, expected: Layout) -> list[str]:
    """Warnings where a tp size could cut through heads whose number nobody tells."""
    notes: list[str] = []
    for module in model.modules:
        units = {r.shard.unit for r in module.all_rows() if r.shard and r.shard.unit}
        unknown = sorted(unit for unit in units if unit not in model.dims)
        size = found.tp[module.key] if found else 1
        if unknown and size % expected.tp[module.key]:
            notes.append(
                f"warning: {module.label}: the numbers {', '.join(unknown)} are not known (no "
                "mmconvert.json, no --cfg.hf_config.hf_dir); not checked that tp size "
                f"{expected.tp[module.key]} keeps heads whole"
            )
    return notes
