"""How the tensors of a DCP folder are named, and how experts lie in it.

A flat name is ``model.``, a prefix of the trainer, and the Hugging Face name, in which prefixes may
be replaced. Experts are flattened, transposed or merged by some trainers. Source: the converters of
MindSpeed-MM (``checkpoint/vlm_model/converters``), 26.1 and master.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MODEL = "model."  # the trainer's dict under which all weights stand
# A fused stack of experts, and an expert's own weights.
_FUSED = re.compile(r"(?P<stem>.+)\.(?P<layer>0|[1-9]\d*)\.(?P<rest>.+)")
_SINGLE = re.compile(
    r"(?P<stem>.+?)\.(?P<layer>0|[1-9]\d*)\.(?P<rest>(?:.+\.)?experts)\.(?P<expert>0|[1-9]\d*)\."
    r"(?P<leaf>gate_proj|up_proj|down_proj)\.weight"
)


@dataclass(frozen=True)
class Naming:
    """Names in DCP, from those in Hugging Face.

    Attributes:
        prefix: before every name, ``model.`` included.
        renames: (prefix of a Hugging Face name, what stands in its place); the first that fits.
    """

    prefix: str = MODEL
    renames: tuple[tuple[str, str], ...] = ()

    def dcp(self, name: str) -> str:
        """The flat name of a Hugging Face tensor."""
        for old, new in self.renames:
            if name.startswith(old):
                return self.prefix + new + name[len(old) :]
        return self.prefix + name


@dataclass(frozen=True)
class Rules:
    """What a trainer's converter does to a Hugging Face checkpoint.

    Attributes:
        naming: of all tensors.
        fused: endings of the names of stacks of experts that are changed, where they have three
            dimensions.
        transposed: they are stored with both matrix dimensions exchanged; else flattened.
        merged: weights of single experts are put together into such stacks.
        flat: merged stacks are flattened into one matrix.
        ties: (name, name of the tensor that it repeats) of those that are written beside it.
        one_file: the output has one data file; else one for each weight file.
    """

    naming: Naming = field(default_factory=Naming)
    fused: tuple[str, ...] = ()
    transposed: bool = False
    merged: bool = False
    flat: bool = False
    ties: tuple[tuple[str, str], ...] = ()
    one_file: bool = False


class ExpertSlot(NamedTuple):
    """Where an expert's matrix lies in a tensor of DCP.

    Attributes:
        name: template of the tensor's flat name.
        column, columns: which of how many that lie beside each other.
        flat: the tensor is one matrix, with the experts one below the other; else a stack.
        merged: Hugging Face has a tensor for each expert.
    """

    name: str
    column: int = 0
    columns: int = 1
    flat: bool = False
    merged: bool = False


class Expert(NamedTuple):
    """Experts' tensors of one kind, as the rules see them.

    Attributes:
        stem: template of the name up to the layers, for grouping.
        hf: template of the Hugging Face name.
        layer: number.
        slot: where they lie.
        experts: their number, where they are stacked; else the number of this one.
    """

    stem: str
    hf: str
    layer: int
    slot: ExpertSlot
    experts: int


def expert_of_rules(rules: Rules, name: str, shape: tuple[int, ...]) -> Expert | None:
    """What the rules make of a tensor of experts; None for any other."""
    if rules.merged and (hit := _SINGLE.fullmatch(name)):
        gated = hit["leaf"] != "down_proj"
        at = f"{hit['stem']}.{{layer}}.{hit['rest']}"
        slot = ExpertSlot(
            rules.naming.dcp(f"{at}.gate_up_proj" if gated else f"{at}.down_proj"),
            int(hit["leaf"] == "up_proj"),
            2 if gated else 1,
            rules.flat,
            merged=True,
        )
        hf = f"{at}.{{expert}}.{hit['leaf']}.weight"
        return Expert(hit["stem"], hf, int(hit["layer"]), slot, int(hit["expert"]))
    if len(shape) != 3 or not any(ending in name for ending in rules.fused):
        return None
    hit = _FUSED.fullmatch(name)
    if hit is None:
        return None
    hf = f"{hit['stem']}.{{layer}}.{hit['rest']}"
    slot = ExpertSlot(rules.naming.dcp(hf), flat=not rules.transposed)
    return Expert(hit["stem"], hf, int(hit["layer"]), slot, shape[0])


FUSED = ("gate_up_proj", "down_proj")
MISTRAL3 = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
# What the trainer of a family has behind ``model.``, where that is something.
PREFIXES: Mapping[str, str] = {"Qwen3VLMegatronConverter": MODEL}
# Longest first: what may stand before Hugging Face names.
KNOWN_PREFIXES = (
    f"{MODEL}base_model.model.model.",
    f"{MODEL}{MODEL}",
    MODEL,
    "",
)
