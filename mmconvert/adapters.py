"""LoRA adapters in names and numbers: keys, scaling, what a training save notes of them.

Sources: PEFT 0.21 (``LoraConfig``, ``get_peft_model_state_dict``), MindSpeed-MM's LoRA training.
An adapter of ``y = W x`` makes it ``W + scale * B @ A``; A is [r, in], B is [out, r].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mmconvert.errors import CheckpointError
from mmconvert.narrow import is_array, is_object, is_sequence

A, B = "lora_A", "lora_B"
MM_A, MM_B = f".{A}.default.weight", f".{B}.default.weight"  # behind a module's name in MM format
HF_A, HF_B = f".{A}.weight", f".{B}.weight"  # and in PEFT's
WEIGHT = ".weight"
BASE_LAYER = ".base_layer."  # in the names of weights that an adapter wraps
PREFIX = "base_model.model."  # of every name that PEFT saves
CONFIG = "adapter_config.json"
# The names of weights in a file of an adapter alone, by which training keeps them.
MARK = "lora"

# ``init_lora_weights`` of adapters that belong to a changed base: the residual weights.
RESIDUAL = re.compile(r"(pissa.*|olora|corda|lora_ga|loftq)")

_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<leaf>\.weight|\.bias)?"
)


class AdapterKey(NamedTuple):
    """A key of an adapter.

    Attributes:
        module: path of the module as it stands there, prefixes included.
        kind: ``lora_A``, ``lora_B``, ``lora_embedding_A`` ...
        leaf: ``.weight``, ``.bias`` or "".
    """

    module: str
    kind: str
    leaf: str


def parse_key(name: str) -> AdapterKey | None:
    """What a key of an adapter names; None for other tensors, such as ``modules_to_save``."""
    found = _KEY.fullmatch(name)
    return (
        None if found is None else AdapterKey(found["module"], found["kind"], found["leaf"] or "")
    )


def weight_name(name: str) -> str:
    """The MM name of the weight that a matrix of an adapter changes."""
    for end in (MM_A, MM_B):
        if name.endswith(end):
            return name.removesuffix(end) + WEIGHT
    return name


def paths(module: str) -> Iterator[str]:
    """The paths in the wrapped model that a key may mean: PEFT's prefix, a part of it, or none."""
    yield module.removeprefix(PREFIX)
    if module.startswith("base_model."):
        yield module.removeprefix("base_model.")
    inner = module.removeprefix(PREFIX)
    while inner.startswith("model."):
        inner = inner.removeprefix("model.")
        yield inner


@dataclass(frozen=True)
class Settings:
    """What an adapter's matrices do not tell.

    Attributes:
        r: the rank, for modules without one of their own.
        alpha: scaling times rank; None where nothing tells it.
        dropout: of training.
        targets: what training was told to adapt.
        rslora: the scaling is alpha / sqrt(r).
        ranks, alphas: (pattern, value) for modules with a value of their own; the first that fits
            counts.
        structure: ``canonical`` or ``fused``, in MM format.
    """

    r: int
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    ranks: tuple[tuple[str, float], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    structure: str = ""

    def rank(self, module: str) -> int:
        """The rank that the configuration gives a module."""
        return int(_fitting(self.ranks, module, self.r))

    def scale(self, module: str, rank: int) -> float:
        """The factor of B @ A.

        Raises:
            CheckpointError: nothing tells alpha.
        """
        alpha = None if self.alpha is None else _fitting(self.alphas, module, self.alpha)
        if alpha is None:
            raise CheckpointError(
                "the adapter's lora_alpha is not known: there is no adapter_config.json beside "
                "it, and neither the arguments of its training nor an mmconvert.json",
                "the lora_alpha that the adapter was trained with: the scaling is alpha / r",
                "give --cfg.lora_alpha ALPHA, or add the adapter_config.json",
            )
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def as_dict(self) -> dict[str, object]:
        """As it is noted in mmconvert.json."""
        return {
            "r": self.r,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "target_modules": list(self.targets),
            "structure": self.structure,
        }


def _fitting(patterns: tuple[tuple[str, float], ...], module: str, usual: float) -> float:
    """As PEFT finds it: the first pattern that the end of the path fits."""
    for pattern, value in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return usual


# ------------------------------------------------------------------------- what tells settings


def of_config(config: Mapping[str, object], where: str) -> Settings:
    """Settings from adapter_config.json.

    Raises:
        CheckpointError: not of LoRA, or values that make no sense.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {kind!r}",
            "LORA: adapters of other methods are neither merged nor converted here",
            "merge it with PEFT (merge_and_unload), and convert the merged model",
        )
    r = _number(config, "r", where, 8)
    if r < 1 or r != int(r):
        raise CheckpointError(f"{where}: r is {r:g}", "a whole number of at least 1")
    targets = config.get("target_modules")
    words = tuple(map(str, targets)) if is_array(targets) else ()
    words = (targets,) if isinstance(targets, str) else words
    return Settings(
        int(r),
        _number(config, "lora_alpha", where, 8),
        _number(config, "lora_dropout", where, 0.0),
        words,
        config.get("use_rslora") is True,
        _patterns(config, "rank_pattern", where),
        _patterns(config, "alpha_pattern", where),
    )


def _number(values: Mapping[str, object], key: str, where: str, usual: float) -> float:
    value = values.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"{where}: {key} is {value!r:.80}", "a number")
    return value


def _patterns(config: Mapping[str, object], key: str, where: str) -> tuple[tuple[str, float], ...]:
    found = config.get(key)
    if found is None:
        return ()
    if not is_object(found):
        raise CheckpointError(f"{where}: {key} is {found!r:.80}", "an object: pattern -> number")
    return tuple((pattern, _number(found, pattern, where, 0)) for pattern in found)


def of_training(values: Mapping[str, object]) -> Settings | None:
    """Settings from the arguments of a training save, ``args``; None where they have none."""
    alpha, r = values.get("lora_alpha"), values.get("lora_r")
    if not isinstance(alpha, (int, float)) or not isinstance(r, int) or isinstance(alpha, bool):
        return None
    dropout, targets = values.get("lora_dropout"), values.get("lora_target_modules")
    words = tuple(map(str, targets)) if is_sequence(targets) else ()
    return Settings(r, alpha, dropout if isinstance(dropout, float) else 0.0, words)


def of_manifest(content: Mapping[str, object]) -> Settings | None:
    """Settings that mmconvert.json notes; None where it notes none."""
    found = content.get("lora")
    if not is_object(found) or not isinstance(found.get("r"), int):
        return None
    alpha, dropout, words = found.get("alpha"), found.get("dropout"), found.get("target_modules")
    return Settings(
        int(str(found["r"])),
        alpha if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) else None,
        dropout if isinstance(dropout, float) else 0.0,
        tuple(map(str, words)) if is_array(words) else (),
        structure=str(found.get("structure") or ""),
    )
