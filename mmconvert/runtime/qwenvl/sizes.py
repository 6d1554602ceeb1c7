"""The sizes of a Qwen-VL, as config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmconvert.errors import CheckpointError
from mmconvert.narrow import is_dict, is_object

Positions = Literal["hub", "mindformers"]
PATCH, QUERIES, GRID = 14, 256, 16  # fixed in both sources: 256 rows a picture, a 16 x 16 table
HEAD = 128  # channels of one head of the resampler


@dataclass(frozen=True)
class Sizes:
    """What decides the model's shape and its numbers.

    Attributes:
        inner: width of the gated MLP: half of ``intermediate_size``, which counts both halves.
        trained: ``seq_length``: beyond it the hub's code scales positions (NTK) and queries
            (logn), where ``ntk`` and ``logn`` say so.
        base: of the rotary angles.
        side: of a picture, in pixels.
        positions: whose way of stretching the picture's position tables.
    """

    vocab: int
    hidden: int
    heads: int
    layers: int
    inner: int
    width: int
    vision_heads: int
    vision_layers: int
    vision_inner: int
    side: int = 448
    trained: int = 2048
    base: float = 10000.0
    ntk: bool = False
    logn: bool = False
    positions: Positions = "hub"

    @staticmethod
    def of(config: Mapping[str, object], where: str, positions: Positions = "hub") -> Sizes:
        """From config.json of the hub.

        Args:
            where: the file, for messages.

        Raises:
            CheckpointError: a size is missing or makes no sense.
        """
        visual = config.get("visual")
        if config.get("model_type") != "qwen" or not is_object(visual):
            raise CheckpointError(
                f"{where} does not describe a Qwen-VL", "model_type qwen with a section visual"
            )
        width = _count(visual, "width", where)
        ratio = visual.get("mlp_ratio", 4.9231)
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1024:
            raise CheckpointError(f"{where}: mlp_ratio is {ratio!r}", "a number above 0")
        hub = positions == "hub"
        base = config.get("rotary_emb_base", 10000)
        found = Sizes(
            vocab=_count(config, "vocab_size", where),
            hidden=_count(config, "hidden_size", where),
            heads=_count(config, "num_attention_heads", where),
            layers=_count(config, "num_hidden_layers", where),
            inner=_count(config, "intermediate_size", where) // 2,
            width=width,
            vision_heads=_count(visual, "heads", where),
            vision_layers=_count(visual, "layers", where),
            vision_inner=int(width * ratio),
            side=_count(visual, "image_size", where, 448),
            trained=_count(config, "seq_length", where, 2048),
            base=float(base) if hub and isinstance(base, (int, float)) else 10000.0,
            ntk=hub and config.get("use_dynamic_ntk") is not False,
            logn=hub and config.get("use_logn_attn") is not False,
            positions=positions,
        )
        found.check(where)
        return found

    @staticmethod
    def of_yaml(
        content: Mapping[object, object], where: str, positions: Positions = "hub"
    ) -> Sizes:
        """From MindFormers' configuration; what is absent is as in its 9.6B model.

        Raises:
            CheckpointError: it has no section of the model, or a size makes no sense.
        """
        model = _part(_part(content, "model", where), "model_config", where)
        vision, text = (
            _part(_part(model, key, where), "model_config", where)
            for key in ("vision_model", "llm_model")
        )
        hub = positions == "hub"
        found = Sizes(
            vocab=_count(text, "vocab_size", where, 151936),
            hidden=_count(text, "hidden_size", where, 4096),
            heads=_count(text, "num_heads", where, 32),
            layers=_count(text, "num_layers", where, 32),
            inner=_count(text, "intermediate_size", where, 11008),
            width=_count(vision, "hidden_size", where, 1664),
            vision_heads=_count(vision, "num_attention_heads", where, 16),
            vision_layers=_count(vision, "num_hidden_layers", where, 48),
            vision_inner=_count(vision, "intermediate_size", where, 8192),
            side=_count(vision, "image_size", where, 448),
            trained=_count(text, "seq_length", where, 2048),
            ntk=hub,
            logn=hub,
            positions=positions,
        )
        found.check(where)
        return found

    def check(self, where: str) -> None:
        """Raises CheckpointError for heads and patches that do not divide."""
        for name, size, parts in (
            ("hidden_size", self.hidden, 2 * self.heads),
            ("hidden_size", self.hidden, HEAD),
            ("visual.width", self.width, self.vision_heads),
            ("visual.image_size", self.side, PATCH),
        ):
            if size % parts:
                raise CheckpointError(f"{where}: {name} is {size}", f"a multiple of {parts}")


def _part(content: Mapping[Any, object], key: str, where: str) -> Mapping[Any, object]:
    part = content.get(key)
    if not is_dict(part):
        raise CheckpointError(f"{where} has no section {key}", "MindFormers' yaml of a Qwen-VL")
    return part


def _count(part: Mapping[Any, object], key: str, where: str, default: int = 0) -> int:
    value = part.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
        raise CheckpointError(f"{where}: {key} is {value!r}", "a whole number above 0")
    return value
