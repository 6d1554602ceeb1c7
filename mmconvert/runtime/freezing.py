"""What of a model does not learn."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import torch
import torch.distributed as dist

from mmconvert.errors import RequestError
from mmconvert.runtime.engine import Engine
from mmconvert.runtime.lora import is_adapter

# One parameter under two names where the word embedding is the output layer too.
TIED = ("text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight")


def freeze_base(run: Engine) -> int:
    """Lets adapters alone learn; returns how many matrices do, over all processes.

    Raises:
        RequestError: no layer is adapted.
    """
    learning = 0
    for name, parameter, _ in run.parameters():
        parameter.requires_grad_(is_adapter(name))
        learning += is_adapter(name)
    count = torch.tensor(learning, device=run.mesh.device)
    dist.all_reduce(count, group=run.mesh.model)
    if not count:
        raise RequestError(
            "--lora_target_modules fits no linear layer",
            "module names or their ends, such as linear_qkv linear_proj linear_fc1 linear_fc2",
        )
    return int(count)


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
    dist.all_reduce(counts, group=run.mesh.model)
    for prefix, count in zip(prefixes, counts.tolist(), strict=False):
        if not count:
            raise RequestError(
                f"--freeze {prefix} fits no parameter",
                "the beginning of an MM name, such as image_encoder or image_encoder.projector",
            )
    if not counts[-1]:
        raise RequestError("everything is frozen", "something that can learn")
    return int(counts[-1])
