"""What of a Qwen-VL learns in its third stage."""

from __future__ import annotations

from collections.abc import Sequence

from mmconvert.errors import RequestError
from mmconvert.runtime.qwenvl.model import QwenVLModel

VISUAL = "transformer.visual."
# What learns of the vision encoder with MindFormers' freeze_vision True, freeze_resampler False.
RESAMPLER = tuple(f"{VISUAL}attn_pool.{name}." for name in ("kv_proj", "attn", "ln_q", "ln_kv"))


def freeze(model: QwenVLModel, prefixes: Sequence[str]) -> list[str]:
    """Stops the vision encoder, and what the prefixes name, from learning; names of what learns.

    Raises:
        RequestError: a prefix that fits no parameter, or nothing is left to learn.
    """
    names = dict(model.named_parameters())
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise RequestError(
                f"--freeze {prefix} fits no parameter",
                "the beginning of a name on the hub, such as transformer.wte",
            )
    for name, parameter in names.items():
        frozen = name.startswith(VISUAL) and not name.startswith(RESAMPLER)
        parameter.requires_grad_(not (frozen or name.startswith(tuple(prefixes))))
    learning = [name for name, parameter in names.items() if parameter.requires_grad]
    if not learning:
        raise RequestError("everything is frozen", "something that can learn")
    return learning
