"""Compares parameters and gradients of a running checkpoint with those of transformers' model."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmconvert.runtime.engine import Engine
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.shard import Binding

LARGEST = 1 << 26  # elements that travel at a time; a gradient in a layer that has more is left out
LAYER = re.compile(r"(?:^|\.)(?:blocks|layers|layer)\.(\d+)\.")
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")  # divided by rows alone
Found = list[tuple[float, str]]
Value = Callable[[nn.Parameter], Tensor]


def compare_weights(arch: Architecture, run: Engine, model: Any, theirs: Value | None) -> Found:  # noqa: ANN401 - HF's model
    """(largest difference, MM name) of every parameter, over all processes.

    Computing uses few words of the vocabulary, and the same picture in both frames of a patch:
    what it does not touch is seen here alone. A difference is relative to the parameter's
    largest value.

    Args:
        model: transformers' model, on process 0.
        theirs: the values of its parameters, on process 0.
    """
    bindings = [b for s in run.stages for b in s.shard.bindings]
    return _compare(arch, run, model, bindings, _value, theirs or _value, None, 0.0)


def compare_gradients(arch: Architecture, run: Engine, model: Any) -> Found:  # noqa: ANN401 - as above
    """(largest difference, MM name) of sampled parameters' gradients, over all processes.

    A difference is relative to the parameter's largest gradient; to a ten-thousandth of the
    largest of all where that is more, since some gradients are nothing but rounding.

    Args:
        model: transformers' model with gradients, on process 0.
    """
    last = {key: sum(map(sum, grid)) - 1 for key, grid in run.mesh.layout.grids.items()}
    bindings = [b for s in run.stages for b in _sampled(s.shard.bindings, last)]
    return _compare(arch, run, model, bindings, _gradient, _gradient, LARGEST, 1e-4)


def sample(run: Engine) -> None:
    """Leaves gradients to the parameters that :func:`compare_gradients` looks at."""
    last = {key: sum(map(sum, grid)) - 1 for key, grid in run.mesh.layout.grids.items()}
    for stage in run.stages:
        for b in stage.shard.bindings:
            b.parameter.requires_grad_(False)
        for b in _sampled(stage.shard.bindings, last):
            b.parameter.requires_grad_(True)


def _value(parameter: nn.Parameter) -> Tensor:
    return parameter.detach()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _sampled(bindings: Sequence[Binding], last: dict[str, int]) -> list[Binding]:
    """Bindings in the first and the last layer of each module, and outside of layers."""
    out: list[Binding] = []
    for b in bindings:
        number = LAYER.search(b.hf[1])
        if number is None or int(number[1]) in (0, last[b.hf[0]]):
            out.append(b)
    return out


def _compare(
    arch: Architecture,
    run: Engine,
    model: Any,  # noqa: ANN401 - as above
    mine: Sequence[Binding],
    value: Value,
    theirs: Value,
    most: int | None,
    floor: float,
) -> Found:
    """(largest difference, name) of each binding.

    Args:
        value, theirs: what of a parameter here, and of one in the model, is compared.
        most: elements of a parameter in a layer at most; None for no limit.
        floor: the least that a difference is relative to, as a share of the largest value of all.
    """
    names = sorted({name for found in gather([b.hf for b in mine]) for name in found})
    whole: dict[tuple[str, str], nn.Parameter] = {}
    if run.mesh.lead:
        parts = arch.parts(model)
        for name in names:
            parameter = parts.find(*name)
            if most is None or parameter.numel() <= most or name[1].endswith(VOCABULARY):
                whole[name] = parameter
    told = from_lead({n: (tuple(p.shape), float(theirs(p).abs().max())) for n, p in whole.items()})
    least = max((size for _, size in told.values()), default=0.0) * floor
    found: dict[int, float] = {}
    for name, (shape, size) in told.items():
        for some in _slabs(name[1], shape):
            slab = (
                theirs(whole[name])[..., some].contiguous()
                if name in whole
                else torch.empty(_cut(shape, some), dtype=run.dtype, device=run.mesh.device)
            )
            dist.broadcast(slab, src=0)
            for i, b in enumerate(mine):
                if b.hf == name:
                    apart = _apart(b.part(value(b.parameter))[..., some], b.mine(slab))
                    relative = apart / max(size, least, 1e-30)
                    relative = relative if relative == relative else float("inf")  # NaN is no peace
                    found[i] = max(found.get(i, 0.0), relative)
    listed = [(apart, f"{mine[i].mm} ({mine[i].hf[1]})") for i, apart in found.items()]
    largest: dict[str, float] = {}  # ranks hold parts of one parameter
    for apart, name in (item for some in gather(listed) for item in some):
        largest[name] = max(apart, largest.get(name, 0.0))
    return sorted((apart, name) for name, apart in largest.items())


def _slabs(name: str, shape: tuple[int, ...]) -> Iterator[slice]:
    """Columns of a large vocabulary a part at a time; else everything."""
    if not name.endswith(VOCABULARY):
        yield slice(None)
        return
    step = max(1, LARGEST // shape[0])
    for start in range(0, shape[1], step):
        yield slice(start, start + step)


def _cut(shape: tuple[int, ...], some: slice) -> tuple[int, ...]:
    return (*shape[:-1], len(range(*some.indices(shape[-1])))) if shape else shape


def _apart(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.reshape(ours.shape)
    return float((ours.float() - theirs.float()).abs().max()) if ours.numel() else 0.0


def gather(value: Any) -> list[Any]:  # noqa: ANN401 - plain values
    """The value of each process, on all."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_lead(value: Any) -> Any:  # noqa: ANN401 - plain values
    """The value of process 0, on all."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
