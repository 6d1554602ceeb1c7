"""AdamW over the MM tree, with a gradient norm and a schedule that do not depend on the layout."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmconvert.errors import CheckpointError
from mmconvert.formats.mm.optimizer.guesses import is_expert
from mmconvert.formats.mm.optimizer.order import registered
from mmconvert.formats.mm.optimizer.pairing import param_name
from mmconvert.runtime.engine import Engine
from mmconvert.runtime.savedstate import MASTER, Kept, as_megatron, by_name
from mmconvert.runtime.schedule import Schedule

FUSED = ("cpu", "cuda")  # devices on which torch has AdamW in one kernel


@dataclass(frozen=True)
class Recipe:
    """How to learn.

    Attributes:
        decay: weight decay of what is neither a bias nor of one dimension, as Megatron groups.
        clip: the largest gradient norm; 0 for no limit.
        sharded: whether each replica keeps a share of fp32 copies and moments alone.
    """

    schedule: Schedule
    decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip: float
    sharded: bool = False


class Optimizer:
    """Updates this process's parameters.

    Parameters in bf16 have fp32 copies, the masters, which are what is updated. A sharded
    optimizer's masters and moments are this replica's part of each parameter, in a row.
    """

    def __init__(self, run: Engine, recipe: Recipe) -> None:
        self._run, self._recipe = run, recipe
        self._parts = run.mesh.replicas if recipe.sharded else 1
        self.named: dict[str, nn.Parameter] = {}
        self._shares: dict[str, float] = {}
        self._masters: dict[str, Tensor] = {}
        copies = run.mesh.layout.tp_folders * run.mesh.layout.ep  # of what is not divided
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": recipe.decay}, {"params": [], "weight_decay": 0.0},
        ]  # fmt: skip
        for name, parameter, stage in run.parameters():
            if not parameter.requires_grad:
                continue
            key = f"{stage.number}.{name}"
            self.named[key] = parameter
            # Over all processes the squares of one parameter must add up to its own once.
            copy = run.arch.tied and parameter is run.head and run.head is not run.embedding
            self._shares[key] = 0.0 if copy else stage.shard.pieces[name] / copies
            part = self._mine(parameter.detach())
            fine = part.dtype == torch.float32
            self._masters[key] = part if fine else part.to(torch.float32, copy=True)
            groups[never_decays(name, parameter)]["params"].append(self._masters[key])
        run.sum_in_fp32()
        self._fused = run.mesh.device.type in FUSED
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]] or [{"params": [torch.zeros(1)]}],
            lr=recipe.schedule.rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            fused=self._fused,
            foreach=None if self._fused else False,  # its temporaries are as large as a model
        )

    # ------------------------------------------------------------------------------- shares
    def _step(self, count: int) -> int:
        """Elements of a replica's part of a parameter; the last one's may be fewer."""
        return -(-count // self._parts)

    def _mine(self, whole: Tensor) -> Tensor:
        """The part of this replica in a tensor of a parameter's shape."""
        if self._parts == 1:
            return whole
        step = self._step(whole.numel())
        return whole.reshape(-1)[step * self._run.mesh.replica :][:step]

    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        """All replicas' parts together; every replica calls this."""
        if self._parts == 1:
            return part
        step = self._step(shape.numel())
        padded = part.new_zeros(step)
        padded[: part.numel()] = part
        parts = [torch.empty_like(padded) for _ in range(self._parts)]
        dist.all_gather(parts, padded, group=self._run.mesh.data)
        return torch.cat(parts)[: shape.numel()].view(shape)

    # ------------------------------------------------------------------------------ updating
    def step(self, number: int, norm: float) -> float:
        """One update from the gradients that are there, of this norm; the learning rate."""
        limit = self._recipe.clip
        scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        for key, parameter in self.named.items():
            grad = self._run.gradient(parameter)
            assert grad is not None  # noqa: S101 - the engine has made them all
            part = self._mine(grad)
            self._masters[key].grad = part.mul_(scale) if scale < 1 else part
        rate = self._recipe.schedule.at(number)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        for key, parameter in self.named.items():
            master = self._masters[key]
            master.grad = parameter.grad = None
            if self._parts > 1:
                part = master.to(parameter.dtype)
                parameter.data.copy_(self._whole(part, parameter.shape))
            elif parameter.dtype != master.dtype:
                parameter.data.copy_(master)
        return rate

    def norm(self) -> float:
        """The norm of the whole model's gradient, each parameter counted once."""
        total = torch.zeros((), dtype=torch.float32, device=self._run.mesh.device)
        for key, parameter in self.named.items():
            grad = self._run.gradient(parameter)
            if grad is not None and self._shares[key]:
                total += torch.linalg.vector_norm(grad).square() * self._shares[key]
        dist.all_reduce(total, group=self._run.mesh.model)
        return float(total.sqrt())

    # -------------------------------------------------------------------------------- saving
    def state(self) -> Any:  # noqa: ANN401 - see as_megatron
        """The state for the checkpoint, as Megatron's optimizers save it; None if nothing learns.

        Tensors are the whole parameter's, however many replicas share them; every replica calls
        this.
        """
        kept: dict[str, Kept] = {}
        steps = 0
        for key, master in self._masters.items():
            name, parameter = self._name(key), self.named[key]
            held = {n: v for n, v in self._adam.state[master].items() if isinstance(v, Tensor)}
            if parameter.dtype != master.dtype:
                held[MASTER] = master
            whole = {n: self._whole(v, parameter.shape) if v.dim() else v for n, v in held.items()}
            steps = max(steps, int(held["step"]) if "step" in held else 0)
            kept[name] = Kept(
                name,
                not never_decays(name, parameter),
                self._run.mesh.layout.ep > 1 and is_expert(name),
                {n: v.cpu() for n, v in whole.items()},
            )
        recipe = self._recipe
        values = {
            "lr": self._adam.param_groups[0]["lr"],
            "betas": (recipe.beta1, recipe.beta2),
            "eps": recipe.epsilon,
            "step": steps,
            "max_lr": recipe.schedule.rate,
            "min_lr": recipe.schedule.least,
        }
        ordered = [kept[name] for name in registered(kept)]
        return as_megatron(ordered, values, recipe.decay) if ordered else None

    def _name(self, key: str) -> str:
        """The name of a parameter in the checkpoint."""
        number, _, name = key.partition(".")
        layout = self._run.mesh.layout
        virtual = int(number) // layout.pp_size
        return param_name(virtual if layout.vpp_size > 1 else None, name)

    def scheduled(self, done: int, batch: int, steps: int) -> dict[str, Any]:
        """The state of Megatron's scheduler, which counts samples.

        Args:
            done: steps of the schedule.
            batch: samples of a step.
            steps: of the whole training.
        """
        schedule, decay = self._recipe.schedule, self._recipe.decay
        return {
            "max_lr": schedule.rate,
            "lr_warmup_steps": round(schedule.warmup * batch),
            "num_steps": done * batch,
            "lr_decay_style": schedule.style,
            "lr_decay_steps": schedule.steps * batch,
            "min_lr": schedule.least,
            "start_wd": decay,
            "end_wd": decay,
            "wd_incr_style": "constant",
            "wd_incr_steps": steps * batch,
        }

    def restore(self, saved: object) -> None:
        """Takes over what :meth:`state` gave.

        Raises:
            CheckpointError: it is of other parameters.
        """
        state = {} if saved is None else by_name(saved)
        names = {self._name(key): key for key in self.named}
        if state.keys() != names.keys():
            odd = sorted(state.keys() ^ names.keys())
            raise CheckpointError(
                f"the optimizer's state does not fit the parameters that learn: {odd[0]}",
                "the same frozen parts as before",
                "give the same --freeze, or --no_load_optim, which restarts the moments",
            )
        for key, master in self._masters.items():
            held = state[self._name(key)]
            saved = held.pop(MASTER, None)
            shape = self.named[key].shape
            tensors = [v for v in (*held.values(), saved) if v is not None and v.dim()]
            if any(v.shape != shape for v in tensors):
                raise CheckpointError(
                    f"the optimizer's state of {key} has another shape", "its own"
                )
            if saved is not None:  # saved beside bf16, and finer than the weights of the file
                master.copy_(self._mine(saved))
            self._adam.state[master] = {
                name: self._restored(name, value, master) for name, value in held.items()
            }

    def _restored(self, name: str, value: Tensor, master: Tensor) -> Tensor:
        if name == "step":  # a number, on the device where the kernel reads it there
            return value.to(master.device if self._fused else "cpu", copy=True)
        return self._mine(value).to(master.device, copy=True)


def never_decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a bias or of one dimension, which do not decay."""
    return name.endswith(".bias") or parameter.dim() < 2
