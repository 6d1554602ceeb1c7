"""The optimizer state of a checkpoint, in the form of Megatron's optimizers.

Their files number parameters; here the groups name them too (``param_names``, as torch spells it),
so that the state can be taken up, and brought to another layout, without knowing the order.
"""

# What comes out of a file has open types.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mmconvert.errors import CheckpointError

MASTER = "master"
MASTERS = "fp32_from_fp16_params"


class Kept(NamedTuple):
    """What the optimizer keeps of a parameter.

    Attributes:
        name: its MM name, with its model chunk where there are several.
        decays: whether its weight does.
        expert: whether expert-parallel ranks share it.
        fields: moments and step by name; :data:`MASTER` of a 16-bit parameter.
    """

    name: str
    decays: bool
    expert: bool
    fields: Mapping[str, Tensor]


def as_megatron(kept: Sequence[Kept], values: Mapping[str, Any], decay: float) -> Any:  # noqa: ANN401 - a dict, or a list of them
    """The state as Megatron's optimizer saves it; a list where experts have one of their own.

    Args:
        kept: the parameters in the order of the file.
        values: of every group: learning rate and so on.
        decay: of weights.
    """
    experts = [one for one in kept if one.expert]
    dense = _entry([one for one in kept if not one.expert], values, decay)
    return [dense, _entry(experts, values, decay)] if experts else dense


def _entry(kept: Sequence[Kept], values: Mapping[str, Any], decay: float) -> dict[str, Any]:
    """One optimizer. Its groups come in the order of their first parameters."""
    groups: list[dict[str, Any]] = []
    masters: list[list[Tensor]] = []
    state: dict[int, dict[str, Tensor]] = {}
    for decays in dict.fromkeys(one.decays for one in kept):
        mine = [one for one in kept if one.decays == decays]
        first = len(state)
        state.update(
            {first + i: {n: v for n, v in one.fields.items() if n != MASTER}
             for i, one in enumerate(mine)}
        )  # fmt: skip
        groups.append(
            {
                **values,
                "weight_decay": decay if decays else 0.0,
                "wd_mult": 1.0 if decays else 0.0,
                "lr_mult": 1.0,
                "is_expert_parallel": mine[0].expert,
                "is_decoupled_lr": False,
                "params": list(range(first, len(state))),
                "param_names": [one.name for one in mine],
            }
        )
        masters.append([one.fields[MASTER] for one in mine if MASTER in one.fields])
    inner = {"state": state, "param_groups": groups}
    return {"optimizer": inner, MASTERS: masters} if any(masters) else inner


def by_name(saved: object) -> dict[str, dict[str, Tensor]]:
    """What a saved state keeps of each parameter.

    Raises:
        CheckpointError: its groups do not name their parameters.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for entry in saved if isinstance(saved, list) else [saved]:
        found |= dict(_named(entry))
    return found


def _named(entry: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:  # noqa: ANN401 - from a file
    inner = entry.get("optimizer", entry) if isinstance(entry, dict) else {}
    groups = inner.get("param_groups", [])
    masters = entry.get(MASTERS, [[]] * len(groups)) if isinstance(entry, dict) else []
    if not groups or any("param_names" not in group for group in groups):
        raise CheckpointError(
            "the optimizer's state does not say which parameter is which",
            "groups with param_names, as finetune saves them",
            "--no-load-optim starts with new moments",
        )
    for group, fine in zip(groups, masters, strict=True):
        for i, (number, name) in enumerate(zip(group["params"], group["param_names"], strict=True)):
            held = dict(inner["state"].get(number, {}))
            yield name, held | ({MASTER: fine[i]} if fine else {})
