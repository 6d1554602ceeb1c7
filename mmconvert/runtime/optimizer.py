"""AdamW over the MM tree, with a gradient norm and a schedule that do not depend on the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmconvert.errors import CheckpointError, RequestError
from mmconvert.runtime.engine import Engine

# One parameter under two names where the word embedding is the output layer too.
TIED = ("text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight")


@dataclass(frozen=True)
class Recipe:
    """How to learn.

    Attributes:
        warmup: steps in which the learning rate rises from 0.
        steps: all steps; the rate falls along a cosine to ``least`` at the last one.
        clip: the largest gradient norm; 0 for no limit.
    """

    rate: float
    least: float
    warmup: int
    steps: int
    decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip: float

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.least + (self.rate - self.least) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, done))
        )


class Optimizer:
    """Updates this process's parameters.

    Parameters in bf16 have fp32 copies, which are what is updated.
    """

    def __init__(self, run: Engine, recipe: Recipe) -> None:
        self._run, self._recipe = run, recipe
        self.named: dict[str, nn.Parameter] = {}
        self._shares: dict[str, float] = {}
        folders = run.mesh.layout.tp_folders
        for name, parameter, stage in run.parameters():
            if not parameter.requires_grad:
                continue
            key = f"{stage.number}.{name}"
            self.named[key] = parameter
            # Over all processes the squares of one parameter must add up to its own once.
            size = stage.shard.group_of[name].size if name in stage.shard.divided else 1
            copy = run.arch.tied and parameter is run.head and run.head is not run.embedding
            self._shares[key] = 0.0 if copy else size / folders
        self._masters = {
            key: p if p.dtype == torch.float32 else p.detach().float().clone()
            for key, p in self.named.items()
        }
        groups = [
            {
                "params": [m for m in self._masters.values() if m.dim() > 1],
                "weight_decay": recipe.decay,
            },
            {"params": [m for m in self._masters.values() if m.dim() < 2], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]] or [{"params": [torch.zeros(1)]}],
            lr=recipe.rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
        )

    def step(self, number: int, norm: float) -> float:
        """One update from the gradients that are there, of this norm; the learning rate."""
        limit = self._recipe.clip
        scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        for key, parameter in self.named.items():
            grad = parameter.grad
            if grad is None:
                grad = torch.zeros_like(parameter)
            self._masters[key].grad = grad.float() * scale
        rate = self._recipe.rate_at(number)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        for key, parameter in self.named.items():
            master = self._masters[key]
            if master is not parameter:
                parameter.data.copy_(master)
            parameter.grad = None
        return rate

    def norm(self) -> float:
        """The norm of the whole model's gradient, each parameter counted once."""
        total = torch.zeros((), dtype=torch.float32, device=self._run.mesh.device)
        for key, parameter in self.named.items():
            if parameter.grad is not None and self._shares[key]:
                total += parameter.grad.float().pow(2).sum() * self._shares[key]
        dist.all_reduce(total)
        return float(total.sqrt())

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers by stage and MM name, for the checkpoint."""
        out: dict[str, Any] = {}
        for key, master in self._masters.items():
            held = self._adam.state[master]
            out[key] = {name: value for name, value in held.items() if isinstance(value, Tensor)}
            if master is not self.named[key]:
                out[key]["master"] = master
        return out

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave.

        Raises:
            CheckpointError: it is of other parameters.
        """
        if state.keys() != self.named.keys():
            odd = sorted(state.keys() ^ self.named.keys())
            raise CheckpointError(
                f"the optimizer's state does not fit the parameters that learn: {odd[0]}",
                "the same frozen parts as before",
                "give the same --freeze, or start from the weights with --mm_dir",
            )
        for key, master in self._masters.items():
            held = dict(state[key])
            saved = held.pop("master", None)
            if saved is not None:  # saved beside bf16, and finer than the weights of the file
                master.data.copy_(saved)
            if any(v.dim() and v.shape != master.shape for v in held.values()):
                raise CheckpointError(
                    f"the optimizer's state of {key} has another shape", "its own"
                )
            self._adam.state[master] = {
                name: value.clone() if name == "step" else value.to(master.device, copy=True)
                for name, value in held.items()
            }


def freeze(run: Engine, prefixes: tuple[str, ...]) -> int:
    """Stops parameters from learning; returns how many learn, over all processes.

    Args:
        prefixes: beginnings of MM names, such as ``image_encoder`` or ``image_encoder.projector``.
            The copies of a tied word embedding stay together: naming one freezes both.

    Raises:
        RequestError: a beginning that fits no parameter, or nothing is left to learn.
    """
    fits = [0] * len(prefixes)
    learning = 0
    for name, parameter, _ in run.parameters():
        frozen = False
        names = TIED if run.arch.tied and name in TIED else (name,)
        for i, prefix in enumerate(prefixes):
            if any(n == prefix or n.startswith(prefix.rstrip(".") + ".") for n in names):
                fits[i], frozen = fits[i] + 1, True
        parameter.requires_grad_(not frozen)
        learning += not frozen
    counts = torch.tensor([*fits, learning], device=run.mesh.device)
    dist.all_reduce(counts)
    for prefix, count in zip(prefixes, counts.tolist(), strict=False):
        if not count:
            raise RequestError(
                f"--freeze {prefix} fits no parameter",
                "the beginning of an MM name, such as image_encoder or image_encoder.projector",
            )
    if not counts[-1]:
        raise RequestError("everything is frozen", "something that can learn")
    return int(counts[-1])
