"""Which experts the tokens of a sample go to, on both sides of a validation.

Two experts of a token may be so close that rounding alone decides: then the sides compute with
other experts, and their results have nothing in common though both are right. Such a tie is taken
as the checkpoint's run has it, and counted; any other difference stays, and is found.
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmconvert.runtime.engine import Engine
from mmconvert.runtime.families import Parts
from mmconvert.runtime.parameters import gather

ROUTER = ".mlp.gate"
Choices = dict[str, Tensor]  # by the router's name in transformers: (tokens, choices) experts


@contextmanager
def listening(run: Engine) -> Generator[Choices]:
    """What the routers of all stages choose while it is open, pass by pass: a prompt, then token by
    token what is said. Filled when it closes, the same on every process.
    """
    mine: dict[str, list[Tensor]] = {}
    hooks: list[Any] = []
    for stage in run.stages:
        for point in stage.points:
            if point.hf[1].endswith(ROUTER):

                def keep(module: object, args: object, out: Any, name: str = point.hf[1]) -> None:  # noqa: ANN401 - a hook
                    mine.setdefault(name, []).append(out[2].detach().cpu())

                hooks.append(point.module.register_forward_hook(keep))
    found: Choices = {}
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for some in gather({name: torch.cat(passes) for name, passes in mine.items()}):
        found |= some


class Ties:
    """Transformers' routers, which choose as the checkpoint's run does where there is a tie.

    Args:
        parts: of transformers' model.
        prompt: tokens of the prompt, with which ``choices`` begin.
        limit: what logits may differ by, relative as the tolerances are.
    """

    def __init__(self, parts: Parts, choices: Choices, prompt: int, limit: float) -> None:
        self._limit, self._prompt = limit, prompt
        self._found: set[tuple[str, int]] = set()
        self._total = sum(len(chosen) for chosen in choices.values())
        for name, chosen in choices.items():
            router = parts.find(parts.keys.text, name)

            def settle(
                module: object,
                args: object,
                out: Any,  # noqa: ANN401 - a hook
                name: str = name,
                chosen: Tensor = chosen,
            ) -> tuple[Tensor, Tensor, Tensor]:
                return self._settled(name, chosen, *out)

            router.register_forward_hook(settle)

    def _settled(
        self, name: str, chosen: Tensor, logits: Tensor, weights: Tensor, theirs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(theirs) < self._prompt:  # a pass of transformers' own generate
            return logits, weights, theirs
        ours, theirs, weights = chosen.to(theirs.device), theirs.clone(), weights.clone()
        count = min(len(ours), len(theirs))
        both = (ours[:count].sort(-1).values, theirs[:count].sort(-1).values)
        apart = (both[0] != both[1]).any(-1).nonzero()[:, 0].tolist()
        slack = 2 * self._limit * max(1.0, float(logits.detach().abs().max()))
        for row in apart:
            values = logits.detach()[row].float()
            if float(values[theirs[row]].min() - values[ours[row]].min()) > slack:
                continue
            shares = torch.softmax(logits[row].float(), -1)[ours[row]]
            weights[row] = (shares / shares.sum()).to(weights.dtype)
            theirs[row] = ours[row]
            self._found.add((name, row))
        return logits, weights, theirs

    def note(self) -> list[str]:
        """How many ties there were, in words; nothing if there were none."""
        if not self._found:
            return []
        return [
            f"{len(self._found)} of {self._total} choices of experts are ties that rounding "
            "decides: compared as this checkpoint's run has them"
        ]
