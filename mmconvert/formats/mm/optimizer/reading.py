"""What a rank file holds of an optimizer, as it is stored: groups, moments, buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.errors import CheckpointError, RequestError
from mmconvert.formats.containers.pickles import Global
from mmconvert.formats.containers.ptfile import read_pt, read_tree
from mmconvert.formats.containers.torch_objects import TORCH_DTYPE
from mmconvert.formats.mm.optimizer.rankstate import ALONE, Buffer, Group, OptimizerEntry, RankState
from mmconvert.formats.mm.optimizer.state import (
    FIELDS,
    MASTER,
    MOMENTS,
    STEP,
    GroupKey,
    Kind,
)
from mmconvert.formats.mm.ranks import DISTRIBUTED
from mmconvert.narrow import is_array, is_dict, is_tuple
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import StoredTensor

MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
# Of optimizers whose state is no plain copy of Adam's, by what their state has.
OTHERS = {
    "master_param": "--use-precision-aware-optimizer keeps its masters otherwise",
    "exp_avg_scale": "a low-precision optimizer keeps its moments quantised",
    "momentum_buffer": "it belongs to SGD or Muon, not to Adam",
    "shard_main_param_res": "--reuse-fp32-param keeps its masters in halves",
}


def read_rank_state(
    rank: Rank, path: Path, chunks: Mapping[Chunk, Mapping[str, StoredTensor]]
) -> RankState:
    """The optimizers of a rank file.

    Raises:
        CheckpointError: there is none, or it is damaged.
        RequestError: it is of a kind that is not carried over.
    """
    pt = read_pt(path)
    stored = pt.content.get("optimizer")
    beside = path.with_name(DISTRIBUTED)
    tree = read_tree(beside) if beside.is_file() else None
    if stored is None and tree is None:
        return RankState(rank, pt, "plain", chunks, ())
    found = stored if is_array(stored) else [stored]
    if not found:
        return RankState(rank, pt, "plain", chunks, (), listed=True)
    kind = _kind(path, found[0])
    if kind == "distributed":
        if tree is None:
            raise CheckpointError(
                f"{path} belongs to a distributed optimizer, and {beside} is missing",
                f"{DISTRIBUTED} beside it, which the first data-parallel rank saves",
                f"copy it from the machine that wrote it, or {ALONE}",
            )
        trees = tree if is_array(tree) else [tree]
        if len(trees) != len(found):
            raise CheckpointError(
                f"{beside} holds {len(trees)} optimizers, {path} {len(found)}",
                "files of one save",
            )
        entries = [_distributed(path, e, beside, t) for e, t in zip(found, trees, strict=True)]
    else:
        entries = [_plain(path, entry, kind) for entry in found]
    _check_experts(path, entries)
    return RankState(rank, pt, kind, chunks, entries, is_array(stored))


def _check_experts(path: Path, entries: Sequence[OptimizerEntry]) -> None:
    """Raises RequestError for several optimizers that are not one and that of the experts."""
    of = [any(group.key.expert for group in entry.groups) for entry in entries]
    if len(of) > 1 and of != [False, True]:
        raise RequestError(
            f"{path} holds {len(of)} optimizers, {sum(of)} of experts, as training with "
            "--overlap-param-gather-with-optimizer-step saves them",
            "one, or one and that of the experts",
            ALONE,
        )


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the optimizer state {what}", "as Megatron's optimizers save it", ALONE
    )


def _inner(path: Path, entry: object) -> dict[object, object]:
    if not is_dict(entry):
        raise _damaged(path, f"is a {type(entry).__name__}")
    return entry


def _kind(path: Path, entry: object) -> Kind:
    """Which optimizer saved it."""
    found = _inner(path, entry)
    for name, why in OTHERS.items():
        if name in found:
            raise _other(path, name, why)
    if "param_groups" in found:
        return "fp32"
    if any(name in found for name in MASTERS):
        return "plain"
    inner = found.get("optimizer")
    if is_dict(inner) and "param_groups" in inner and "state" not in inner:
        return "distributed"
    raise RequestError(
        f"{path}: an optimizer whose state has {', '.join(map(str, found)) or 'nothing'}",
        "one of Megatron's: mixed-precision, distributed or fp32, with param_groups",
        ALONE,
    )


def _other(path: Path, name: str, why: str) -> RequestError:
    return RequestError(
        f"{path}: the optimizer state has {name}: {why}",
        f"{' and '.join(MOMENTS)} in fp32, as Adam has them, and fp32 masters",
        ALONE,
    )


# --------------------------------------------------------------------------------- groups
def _groups(path: Path, found: object) -> list[Group]:
    listed = found if is_array(found) else []
    if not listed:
        raise _damaged(path, "has no param_groups")
    groups = [_group(path, group) for group in listed]
    filled = [g.key for g in groups if g.params != ()]
    if len(set(filled)) < len(filled):
        raise _damaged(path, "has two groups of one kind")
    return groups


def _group(path: Path, found: object) -> Group:
    if not is_dict(found):
        raise _damaged(path, "has a group that is not a dict")
    values = {str(k): v for k, v in found.items() if k not in ("params", "param_names")}
    if odd := [name for name, value in values.items() if not is_plain(value)]:
        raise _damaged(path, f"has a group whose {odd[0]} is not a plain value")
    params, names = found.get("params"), found.get("param_names")
    if params is not None and not (is_array(params) and all(type(p) is int for p in params)):
        raise _damaged(path, "has a group whose params are not numbers")
    numbers = tuple(p for p in params if isinstance(p, int)) if is_array(params) else None
    own = tuple(map(str, names)) if is_array(names) else ()
    return Group(key_of(values), values, numbers, own)


def key_of(values: Mapping[str, object]) -> GroupKey:
    """What a group is told by; torch's own have a weight decay alone."""
    decay = values.get("wd_mult", values.get("pre_wd_mult", values.get("weight_decay")))
    scale = values.get("lr_mult", values.get("pre_lr_mult", 1.0))
    return GroupKey(
        decay == 0,
        scale != 1,
        values.get("is_expert_parallel") is True,
        values.get("is_decoupled_lr") is True,
    )


def is_plain(value: object) -> bool:
    """Whether a value is made of numbers, text and containers of them."""
    if is_array(value) or is_tuple(value):
        return all(map(is_plain, value))
    if is_dict(value):
        return all(isinstance(k, (str, int)) and is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


# ---------------------------------------------------------------------------------- plain
def _plain(path: Path, entry: object, kind: Kind) -> OptimizerEntry:
    found = _inner(path, entry)
    inner = found if kind == "fp32" else _inner(path, found.get("optimizer"))
    states = inner.get("state")
    if not is_dict(states):
        raise _damaged(path, "has no state")
    state = {
        number: _fields(path, number, kept) for number, kept in states.items()
        if isinstance(number, int)
    }  # fmt: skip
    masters = None
    if kind == "plain":
        masters = _masters(path, next(found[name] for name in MASTERS if name in found))
    groups = _groups(path, inner.get("param_groups"))
    return OptimizerEntry(groups, state, masters, scaler=_scaler(path, found))


def _fields(path: Path, number: int, kept: object) -> dict[str, StoredTensor]:
    """What is kept of one parameter."""
    if not is_dict(kept):
        raise _damaged(path, f"of parameter {number} is not a dict")
    fields: dict[str, StoredTensor] = {}
    for name, value in kept.items():
        if name in OTHERS:
            raise _other(path, str(name), OTHERS[str(name)])
        if name not in (*FIELDS, STEP) or not isinstance(value, StoredTensor):
            raise RequestError(
                f"{path}: of parameter {number} the optimizer state has {name}, "
                f"{'a tensor' if isinstance(value, StoredTensor) else type(value).__name__}",
                f"{', '.join((*FIELDS[1:], STEP))}: tensors, as Adam has them",
                ALONE,
            )
        fields[str(name)] = _checked(path, value, str(name))
    missing = [name for name in MOMENTS if fields and name not in fields]
    if len(missing) == 1:
        raise _damaged(path, f"of parameter {number} has no {missing[0]}")
    if missing:
        raise RequestError(
            f"{path}: of parameter {number} the optimizer state has no {missing[0]}",
            "Adam's moments",
            ALONE,
        )
    return fields


def _checked(path: Path, tensor: StoredTensor, name: str) -> StoredTensor:
    if tensor.dtype != "F32" and name != STEP:
        raise _other(path, f"{name} in {tensor.dtype}", "a low-precision optimizer's")
    return tensor


def _masters(path: Path, found: object) -> list[list[StoredTensor]]:
    groups = found if is_array(found) else []
    made = [
        [_checked(path, t, MASTER) for t in group if isinstance(t, StoredTensor)]
        for group in groups
        if is_array(group)
    ]
    if len(made) != len(groups) or any(
        len(mine) != len(group) for mine, group in zip(made, groups, strict=True) if is_array(group)
    ):
        raise _damaged(path, f"has {MASTERS[0]} that are not lists of tensors")
    return made


def _scaler(path: Path, found: Mapping[object, object]) -> object:
    """The state of a loss scaler."""
    scaler = found.get("grad_scaler")
    if not is_plain(scaler):
        raise RequestError(
            f"{path}: the optimizer state has a grad_scaler of tensors, of fp16 training",
            "bf16 training, or a constant --loss-scale",
            ALONE,
        )
    return scaler


# ---------------------------------------------------------------------------- distributed
def _distributed(path: Path, entry: object, beside: Path, tree: object) -> OptimizerEntry:
    found = _inner(path, entry)
    inner = _inner(path, found.get("optimizer"))
    buffers = None if tree is None else _buffers(beside, tree)
    groups = _groups(path, inner.get("param_groups"))
    return OptimizerEntry(groups, buffers=buffers, scaler=_scaler(path, found))


def _buffers(path: Path, tree: object) -> list[Buffer]:
    if not is_dict(tree):
        raise _damaged(path, f"is a {type(tree).__name__}")
    if tree.get("buckets_coalesced") is not True:
        raise RequestError(
            f"{path} holds buckets one by one, as Megatron saved them before February 2024",
            "buckets_coalesced",
            f"save it once with a newer Megatron, or {ALONE}",
        )
    numbers = [key for key in tree if key != "buckets_coalesced"]
    if numbers != list(range(len(numbers))):
        raise _damaged(path, f"has buffers {', '.join(map(str, numbers))}")
    return [buffer for number in numbers for buffer in _typed(path, tree[number])]


def _typed(path: Path, found: object) -> list[Buffer]:
    """A buffer by the dtypes that it is of."""
    if not is_dict(found):
        raise _damaged(path, "has a buffer that is not a dict")
    return [_buffer(path, dtypes, fields) for dtypes, fields in found.items()]


def _buffer(path: Path, dtypes: object, found: object) -> Buffer:
    names = [
        TORCH_DTYPE.get(d.name, "") for d in (dtypes if is_tuple(dtypes) else ())
        if isinstance(d, Global)
    ]  # fmt: skip
    if len(names) != 2 or "" in names or not is_dict(found):
        raise _damaged(path, "has a buffer without dtypes")
    total = found.get("numel_unpadded")
    fields: dict[str, StoredTensor] = {}
    for name, value in found.items():
        if name == "numel_unpadded":
            continue
        if str(name) in OTHERS:
            raise _other(path, str(name), OTHERS[str(name)])
        kept = MASTER if name == "param" else str(name)
        if kept not in FIELDS or not isinstance(value, StoredTensor) or value.shape != (total,):
            raise _damaged(path, f"has {name} in a buffer of {total} elements")
        fields[kept] = _checked(path, value, kept)
    if missing := [name for name in (MASTER, *MOMENTS) if name not in fields]:
        raise _damaged(path, f"has a buffer without {missing[0]}")
    assert isinstance(total, int)  # noqa: S101 - it is the shape of tensors
    return Buffer((names[0], names[1]), fields, total)
