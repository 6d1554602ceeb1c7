"""What an adapter of PEFT adds to its base model."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.adapters import CONFIG, RESIDUAL, WEIGHT
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.formats.peft.folder import LoraPair, PEFTFolder, untrained
from mmconvert.names import NO_EXPERT
from mmconvert.plan.plan import Block, Term, matrix
from mmconvert.plan.products import Adapter, Delta
from mmconvert.stored import StoredTensor


def peft_adapter(folder: PEFTFolder, factor: float, *, base_is_residual: bool) -> Adapter:
    """An adapter of PEFT as it is merged.

    Args:
        factor: what its scaling is multiplied with.
        base_is_residual: the base model given is the changed one that it belongs to.

    Raises:
        CheckpointError: it belongs to another base, or nothing tells its alpha.
    """
    check_base(folder.config, str(folder.file.path.parent / CONFIG), base_is_residual)
    if folder.settings.alpha is None:
        folder.settings.scale("", 1)  # raises: nothing tells it
    found = Adapter(
        str(folder.file.path.parent), replaced=dict(folder.replaced), tokens=dict(folder.tokens)
    )
    found.notes += untrained(folder)
    if folder.config.get("fan_in_fan_out") is True:
        found.notes.append("fan_in_fan_out is set: it means no linear layer here, as for PEFT")
    for (hub, expert), part in folder.parts.items():
        magnitude = folder.magnitudes.get(hub)
        found.deltas.append(Delta(hub, expert, _term(found, part, factor, magnitude)))
    for hub, part in folder.embeddings.items():
        term = _term(found, part, factor, None)._replace(transposed=True)
        found.deltas.append(Delta(hub, NO_EXPERT, term))
    for hub, tensor in folder.biases.items():
        part = folder.parts[hub, NO_EXPERT]
        block = Block(len(found.stored), 0, 0, 0, 0, tensor.shape[0], 1)
        found.stored.append(tensor)
        bias = Term(part.path, (), (block,), 1, tensor.shape[0], 1, (part.scale or 0) * factor)
        found.deltas.append(Delta(hub.removesuffix(WEIGHT) + ".bias", NO_EXPERT, bias))
    return found


def _term(found: Adapter, part: LoraPair, factor: float, magnitude: StoredTensor | None) -> Term:
    number = len(found.stored)
    found.stored += [part.a, part.b]
    rank, cols = matrix(part.a.shape)
    rows = part.b.shape[0]
    scaled = -1
    if magnitude is not None:
        if factor != 1:
            raise RequestError(
                f"--cfg.scale {factor:g} has no meaning for DoRA, which scales to a magnitude",
                "--cfg.scale 1",
            )
        scaled = len(found.stored)
        found.stored.append(magnitude)
    return Term(
        part.path,
        (Block(number, 0, 0, 0, 0, rank, cols),),
        (Block(number + 1, 0, 0, 0, 0, rows, rank),),
        rank,
        rows,
        cols,
        (part.scale or 0) * factor,
        magnitude=scaled,
    )


def check_base(config: Mapping[str, object], where: str, base_is_residual: bool) -> None:
    """Raises CheckpointError for an adapter that belongs to a changed base model."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and RESIDUAL.fullmatch(start.lower()) and not base_is_residual:
        raise CheckpointError(
            f"{where}: init_lora_weights is {start!r}: the adapter started from a changed base "
            "model, its residual, and added to the original it gives a wrong model without any "
            "sign of it",
            "the residual base model, or an adapter that was converted to plain LoRA",
            "convert the adapter with PEFT (path_initial_model_for_weight_conversion), or give the "
            "residual model as base with --cfg.base_is_residual",
        )


def residual_note(folder: PEFTFolder) -> list[str]:
    """A warning where an adapter belongs to a changed base model, which is not at hand here."""
    start = folder.config.get("init_lora_weights")
    if not isinstance(start, str) or not RESIDUAL.fullmatch(start.lower()):
        return []
    return [
        f"warning: init_lora_weights is {start!r}: the adapter belongs to a changed base model, "
        "its residual, and merged into the original gives a wrong one"
    ]
