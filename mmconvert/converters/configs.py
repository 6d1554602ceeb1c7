"""Sizes, flags and lists of layers from config.json, which is not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from mmconvert.errors import CheckpointError
from mmconvert.narrow import is_object

# Sizes by name: the module's key, a dot, what it is, such as "layers"; see each family's `dims`.
Dims = dict[str, int]

# Layers by name, such as "KEY.moe": those in which rows that say ``only="KEY.moe"`` stand.
LayerLists = dict[str, tuple[int, ...]]


# No model has more; a config.json from a stranger must not make us build an endless table.
MAX_SIZE = {"layers": 4096}
MAX_ANY_SIZE = 1 << 31


def read_dims(
    config: Mapping[str, object],
    where: str,
    names: Mapping[str, tuple[str, ...]],
    defaults: Mapping[str, int] | None = None,
) -> Dims:
    """Sizes from a part of config.json.

    Args:
        config: the part.
        where: its name, for messages.
        names: dimension name -> the keys that may hold it, the first present one counts. A
            dimension whose keys are all absent has its default, or is left out.
        defaults: what transformers' configuration class takes for absent keys. Its
            ``save_pretrained`` (4.45 to 4.51) leaves out what equals these.

    Raises:
        CheckpointError: a value that is no sensible size.
    """
    dims: Dims = dict(defaults or {})
    for dim, keys in names.items():
        value = next((config[k] for k in keys if config.get(k) is not None), None)
        if value is None:
            continue
        limit = MAX_SIZE.get(dim.rpartition(".")[2], MAX_ANY_SIZE)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise CheckpointError(
                f"config.json: {where} {' or '.join(keys)} is {value!r}",
                f"a whole number from 1 to {limit}",
                "take config.json from the model's page",
            )
        dims[dim] = value
    return dims


def need(dims: Dims, where: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """Raises CheckpointError for a dimension without which nothing can be planned."""
    for dim, keys in names.items():
        if dim not in dims:
            raise CheckpointError(
                f"config.json: {where} has no {' or '.join(keys)}",
                "the model's own config.json",
                "copy it from the model's page into hf_dir",
            )


def section(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    """A nested part of config.json.

    Raises:
        CheckpointError: absent, or not an object.
    """
    value = config.get(key)
    if not is_object(value):
        found = "is missing" if value is None else "is not an object"
        raise CheckpointError(
            f"config.json: {key} {found}",
            f"an object {key} with its sizes",
            "take config.json from the model's page",
        )
    return value


def text_or_whole(config: Mapping[str, object]) -> Mapping[str, object]:
    """The text part: nested (transformers 4.52 and later), or the whole config (hub)."""
    return config if config.get("text_config") is None else section(config, "text_config")


def section_or_defaults(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    """A nested part of config.json that transformers makes of its class's defaults where it is
    absent or null: nothing of it is said then.

    Raises:
        CheckpointError: something that is not an object.
    """
    return {} if config.get(key) is None else section(config, key)


def layer_list(value: object, where: str, layers: int) -> tuple[int, ...]:
    """A list of layers from config.json, in its order.

    Args:
        where: its key, for messages.
        layers: how many there are.

    Raises:
        CheckpointError: no list of different layers.
    """
    if isinstance(value, list):
        items = cast("list[object]", value)
        numbers = [n for n in items if isinstance(n, int) and not isinstance(n, bool)]
        known = all(0 <= n < layers for n in numbers)
        if len(set(numbers)) == len(items) and known:
            return tuple(numbers)
    raise CheckpointError(
        f"config.json: {where} is {value!r}", f"a list of different layers below {layers}"
    )


def flag(configs: tuple[Mapping[str, object], ...], key: str) -> bool | None:
    """A boolean from the first config that has it.

    Raises:
        CheckpointError: a value that is not true or false.
    """
    for config in configs:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {value!r}", "true or false")
        return value
    return None
