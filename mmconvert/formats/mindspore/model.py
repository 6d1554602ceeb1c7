"""Opens MindSpore checkpoints: every tensor claimed by a table, or taken by its name alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.configs import MAX_SIZE, Dims
from mmconvert.converters.mindspore import MSFamily
from mmconvert.converters.rows import Module, mm_index
from mmconvert.errors import LEAVE_OUT, LayoutError, RequestError, TensorError
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.mindspore.folder import MSCheckpoint, is_training, open_ms
from mmconvert.formats.mindspore.side import Spread, device_source
from mmconvert.formats.mindspore.strategy import Strategy
from mmconvert.formats.mm.instances import instances
from mmconvert.formats.model import dropped_by
from mmconvert.names import NO_LAYER, number, summarise
from mmconvert.plan.plan import Key, Side, Whole
from mmconvert.sharding.devices import DeviceLayout
from mmconvert.sharding.layout import grid_flag
from mmconvert.sharding.slices import Slicing
from mmconvert.stored import ITEM_SIZE, StoredTensor

KeyOf = Callable[[str], Key | None]  # the whole that a tensor's name stands for


@dataclass
class MSModel:
    """A MindSpore checkpoint, ready to be a side of a plan.

    Attributes:
        checkpoint: its headers.
        parts: for each rank its tensors by key.
        spread: how they are sliced.
        notes: what is worth knowing, in words.
        dropped: names of tensors that are left out, by the reason.
        patterns: the --drop patterns that fit a tensor.
    """

    checkpoint: MSCheckpoint
    parts: list[dict[Key, StoredTensor]]
    spread: Spread
    notes: list[str] = field(default_factory=list[str])
    dropped: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    patterns: frozenset[str] = frozenset()

    def side(self, transposed: frozenset[str] = frozenset(), faults: Faults = STRICT) -> Side:
        """Its wholes; see :func:`mmconvert.formats.mindspore.side.device_source`."""
        return device_source(self.parts, self.spread, transposed, faults)


def ms_model(
    path: Path,
    strategy: Path | None,
    options: Options,
    table: Sequence[Module] | None = None,
    *,
    name: str = "",
    faults: Faults = STRICT,
) -> MSModel:
    """Opens a MindSpore checkpoint.

    Args:
        strategy: a strategy file or folder; None looks beside the rank folders.
        table: the modules whose rows must claim every tensor; None takes any name.
        name: of the table's family, for messages.
        faults: where those go after which reading goes on.

    Raises:
        CheckpointError: files that are missing, damaged or no such checkpoint; TensorError:
            tensors that no row claims.
    """
    found = open_ms(path, strategy, faults)
    model = MSModel(found, [], Spread([]), list(found.notes))
    key_of = _table_keys(table) if table is not None else _plain_key
    lost: dict[str, None] = {}
    dropped: dict[str, dict[str, None]] = {pattern: {} for pattern in options.drop}
    for part in found.parts:
        mine: dict[Key, StoredTensor] = {}
        for tensor in part.values():
            key = key_of(tensor.name)
            pattern = dropped_by((tensor.name,), options.drop)
            if pattern is not None:
                if table is not None and key is not None:
                    raise RequestError(
                        f"--drop {pattern} fits {tensor.name}, which the model needs",
                        "a pattern for tensors that have no place in the model",
                        "narrow the pattern",
                    )
                dropped[pattern][tensor.name] = None
            elif key is None:
                lost[tensor.name] = None
            else:
                mine[key] = tensor
        model.parts.append(mine)
    if lost:
        faults.add(_unknown(path, lost, table or (), name))
    for pattern, names in dropped.items():
        if names:
            why = f"--drop {pattern}"
            model.dropped[why] = tuple(names)
            model.notes.append(f"{number(names, 'tensor')} left out ({why}): {summarise(names)}")
    model.patterns = frozenset(pattern for pattern, names in dropped.items() if names)
    model.spread = _spread(model, found.strategy, key_of, options)
    return model


def _plain_key(name: str) -> Key | None:
    return Key(name, NO_LAYER)


def _table_keys(table: Sequence[Module]) -> KeyOf:
    index = mm_index(tuple(table))

    def key_of(name: str) -> Key | None:
        hit = index.find(name)
        return None if hit is None else Key(hit[0][1].mm, hit[1])

    return key_of


def _unknown(path: Path, lost: Iterable[str], table: Sequence[Module], family: str) -> TensorError:
    names = sorted(lost)
    closest = mm_index(tuple(table)).closest(names[0])
    hint = f" (closest known name: {closest})" if closest else ""
    return TensorError(
        f"{path}: {number(names, 'tensor')} with no place in {family}: {summarise(names)}{hint}",
        f"only tensors of {family}, in MindFormers' names",
        LEAVE_OUT,
    )


def _spread(model: MSModel, strategy: Strategy | None, key_of: KeyOf, options: Options) -> Spread:
    """How the tensors are sliced: as the strategy says; one that it does not name is whole."""
    if strategy is None:
        return Spread([{k: Slicing((1,), ((),) * len(t.shape)) for k, t in model.parts[0].items()}])
    devices = strategy.devices()
    stages: list[dict[Key, Slicing]] = []
    unnamed: dict[str, None] = {}
    absent: dict[str, None] = {}
    for i, stage in enumerate(sorted(strategy.stages)):
        parts = model.parts[i * devices : (i + 1) * devices]
        known, without = _named_slicings(strategy.stages[stage], parts, key_of)
        for name in without:
            if not is_training(name) and dropped_by((name,), options.drop) is None:
                absent[name] = None
        for key, tensor in ((key, t) for part in parts for key, t in part.items()):
            if key not in known:
                known[key] = Slicing((devices,), ((),) * len(tensor.shape))
                unnamed[tensor.name] = None
        stages.append(known)
    if unnamed:
        model.notes.append(
            f"{number(unnamed, 'tensor')} not in the strategy: taken to be whole on each rank, "
            f"which is compared: {summarise(unnamed)}"
        )
    if absent:
        model.notes.append(
            f"warning: {number(absent, 'tensor')} of the strategy on no rank: {summarise(absent)}"
        )
    return Spread(stages, devices)


def _named_slicings(
    stage: Mapping[str, Slicing], parts: Sequence[Mapping[Key, StoredTensor]], key_of: KeyOf
) -> tuple[dict[Key, Slicing], list[str]]:
    """What the strategy says of a stage's tensors, and its names that none of them has."""
    held = {key for part in parts for key in part}
    known: dict[Key, Slicing] = {}
    without: list[str] = []
    for name, slicing in stage.items():
        key = key_of(name)
        if key is not None and key in held:
            known[key] = slicing
        else:
            without.append(name)
    return known, without


# --------------------------------------------------------------------------------- the target


def check_complete(
    keys: Iterable[Key],
    table: Sequence[Module],
    dims: Dims,
    path: Path,
    faults: Faults = STRICT,
) -> dict[str, int]:
    """The numbers of layers, by module key.

    Raises:
        TensorError: a row without its tensor, or other numbers of layers than ``dims`` has.
    """
    found = set(keys)
    layers: dict[str, int] = {}
    for module in table:
        rows = {r.mm for r in module.layer}
        layers[module.key] = 1 + max((k.layer for k in found if k.mm in rows), default=-1)
    layers = {key: max(n, dims.get(f"{key}.layers", 0)) for key, n in layers.items()}
    for key, count in layers.items():
        expected = dims.get(f"{key}.layers", count)
        if count != expected or count > MAX_SIZE["layers"]:
            raise TensorError(
                f"{path} has {count} {key} layers; config.json says {expected}"
                if count != expected
                else f"{path} has a tensor of {key} layer {count - 1}",
                "a checkpoint and a config.json of one model",
                "give the hf_dir that belongs to this checkpoint",
            )
    missing = [
        Key(item.row.mm, item.layer).name()
        for item in instances(table, layers)
        if Key(item.row.mm, item.layer) not in found
    ]
    if missing:
        fault = TensorError(
            f"{path}: {number(missing, 'tensor')} missing: {summarise(missing)}",
            "every tensor of the model",
            "copy the checkpoint again, with all its rank folders",
        )
        faults.add(fault)
    return layers


def in_order(wholes: Mapping[Key, Whole], table: Sequence[Module]) -> dict[Key, Whole]:
    """The wholes in the order of a table, those that it does not know behind them: the ranks of
    pipeline stages hold them in another order than a complete file.
    """
    index = mm_index(tuple(table))
    sections = [rows for m in table for rows in (m.before, m.layer, m.after)]
    section = {row.mm: i for i, rows in enumerate(sections) for row in rows}
    place = {row.mm: i for rows in sections for i, row in enumerate(rows)}

    def position(key: Key) -> tuple[int, int, int]:
        hit = index.find(key.name())
        if hit is None:
            return len(sections), 0, 0
        (_, row), layer, _ = hit
        return section[row.mm], layer, place[row.mm]

    return {key: wholes[key] for key in sorted(wholes, key=position)}


def family_spread(
    family: MSFamily,
    table: Sequence[Module],
    wholes: Mapping[Key, Whole],
    layers: Mapping[str, int],
    dims: Dims,
    layout: DeviceLayout,
) -> Spread:
    """How a family's tensors lie in a layout.

    Args:
        layers: numbers of layers, by module key.
        dims: sizes as far as they are known.

    Raises:
        LayoutError: sizes that the model does not allow.
    """
    layout.check()
    check_units(family, dims, layout)
    count = layers[family.decoder]
    if layout.stages > 1 and sum(layout.layers) != count:
        raise LayoutError(
            f"{grid_flag(family.decoder)} {list(layout.layers)} adds up to {sum(layout.layers)} "
            f"layers; the model has {count}",
            f"numbers of layers that add up to {count}",
        )
    stages: list[dict[Key, Slicing]] = [{} for _ in range(layout.stages)]
    for item in instances(table, layers):
        whole = wholes[item.key]
        after = item.row in item.module.after
        stage = family.stage(item.module, after, item.layer, layout)
        slicing = family.slicing(item.row, layout, whole.shape, ITEM_SIZE[whole.dtype])
        stages[stage][item.key] = slicing
    return Spread(stages, layout.devices)


def check_units(family: MSFamily, dims: Dims, layout: DeviceLayout) -> None:
    """Raises LayoutError for a model_parallel that does not divide heads, where known."""
    for dim, words in family.units:
        if dims.get(dim, 0) % layout.model_parallel:
            raise LayoutError(
                f"model_parallel is {layout.model_parallel}; the model has {dims[dim]} {words}",
                f"a size that divides {dims[dim]}",
            )
