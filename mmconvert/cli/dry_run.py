"""What a dry run shows: the files that would be written, and what that would take."""

from __future__ import annotations

from mmconvert.formats.containers.image import FileImage
from mmconvert.names import number, summarise
from mmconvert.result import Result
from mmconvert.words import amount

SHOWN = 40  # files that are listed


def preview(result: Result) -> list[str]:
    """The plan in words, by line."""
    lines = ["files:"]
    width = max((len(file.path) for file in result.listed[:SHOWN]), default=0)
    for file in result.listed[:SHOWN]:
        held = _held(file)
        lines.append(f"  {file.path:<{width}}  {amount(file.size):>10}  {held}")
    if len(result.listed) > SHOWN:
        rest = result.listed[SHOWN:]
        lines.append(f"  and {len(rest)} more, {amount(sum(file.size for file in rest))}")
    lines += [f"dropped: {len(n)} ({why}): {summarise(n)}" for why, n in result.dropped.items()]
    if result.carried:
        lines.append(f"carried: {len(result.carried)}: {summarise(result.carried)}")
    fills = result.fills()
    if fills:
        lines.append(
            f"filled with zeros: {number(sum(fills.values()), 'element')} of "
            f"{number(fills, 'tensor')}: "
            f"{summarise(list(fills))}"
        )
    lines += [
        f"cast: {number(n, 'tensor')} {old} -> {new}" for (old, new), n in result.casts().items()
    ]
    return [*lines, *_cost(result)]


def _held(file: FileImage) -> str:
    if file.pieces:
        return number(file.pieces, "tensor")
    return "copied" if file.copied else "written"


def _cost(result: Result) -> list[str]:
    would = result.estimate
    if would is None:
        return []
    free = "unknown" if would.disk_free is None else amount(would.disk_free)
    took = "unknown (no probe here)" if would.seconds is None else f"about {would.seconds:.1f} s"
    return [
        f"disk: {amount(would.disk_needed)} needed, {free} free",
        f"memory: at most about {amount(would.memory)}",
        f"time: {took}",
    ]
