"""Reads an adapter of PEFT: which of a model's tensors it changes, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mmconvert.adapters import CONFIG, AdapterKey, Settings, of_config, parse_key
from mmconvert.converters.configs import Dims
from mmconvert.errors import CheckpointError, TensorError
from mmconvert.executor.compare import is_zero
from mmconvert.formats.containers.safetensors import WeightFile
from mmconvert.formats.peft.files import read_file
from mmconvert.formats.peft.names import Names, unwrapped
from mmconvert.formats.peft.stacks import Wrapped, experts, matched
from mmconvert.formats.peft.tokens import TOKENS, token_numbers
from mmconvert.names import NO_EXPERT, number, summarise
from mmconvert.plan.plan import matrix
from mmconvert.plan.products import TrainedTokens
from mmconvert.stored import StoredTensor

PartKey = tuple[str, int]  # the name of a weight; which of the experts in it, or NO_EXPERT


class LoraPair(NamedTuple):
    """A and B of one linear layer of the model.

    Attributes:
        path: of the module in the wrapped model.
        a, b: the matrices.
        scale: the factor of ``B @ A``; None where nothing tells alpha.
    """

    path: str
    a: StoredTensor
    b: StoredTensor
    scale: float | None

    @property
    def rank(self) -> int:
        """The rank of the product."""
        return matrix(self.a.shape)[0]


@dataclass
class PEFTFolder:
    """An adapter of PEFT.

    Attributes:
        path: the folder, or the file.
        file: its weight file.
        config: adapter_config.json; empty where there is none.
        settings: what that says.
        parts: A and B by the name of the weight, in hub spelling, and its expert, where it
            stacks them.
        magnitudes: of DoRA, by the name of the weight.
        biases: of B (``lora_bias``), by the name of the weight.
        embeddings: names of the weights that embedding matrices change.
        replaced: whole tensors that stand in the place of the model's, by hub name.
        tokens: rows of an embedding that do, by hub name.
        spelling: the prefix that the first name has before the model's own path.
    """

    path: Path
    file: WeightFile
    config: Mapping[str, object]
    settings: Settings
    parts: dict[PartKey, LoraPair] = field(default_factory=dict[PartKey, LoraPair])
    magnitudes: dict[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    biases: dict[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    embeddings: dict[str, LoraPair] = field(default_factory=dict[str, LoraPair])
    replaced: dict[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    tokens: dict[str, TrainedTokens] = field(default_factory=dict[str, TrainedTokens])


def open_peft(path: Path, names: Names, dims: Dims, alpha: float | None = None) -> PEFTFolder:
    """Reads an adapter.

    Args:
        dims: the sizes of the base model, as far as they are known.
        alpha: what the user says of lora_alpha; counts where no configuration says it.

    Raises:
        CheckpointError: no adapter, or not of LoRA; TensorError: names that the family does not
            know, A without B, shapes that do not fit each other.
    """
    file, config = read_file(path)
    settings = of_config(config, str(file.path.parent / CONFIG)) if config else Settings(0, alpha)
    if alpha is not None and config and settings.alpha != alpha:
        raise CheckpointError(
            f"--cfg.lora_alpha says {alpha:g}, {file.path.parent / CONFIG} {settings.alpha:g}",
            "one alpha",
            "leave the flag out",
        )
    found = PEFTFolder(path, file, config, settings)
    halves: dict[str, dict[str, StoredTensor]] = {}
    wrapped: dict[str, dict[str, StoredTensor]] = {}
    unknown: list[str] = []
    nearest = ""
    for tensor in file.tensors:
        key = parse_key(tensor.name)
        if key is None:
            _other(found, names, tensor, unknown)
            continue
        hit = names.path(unwrapped(key.module))
        if hit is None and names.parameters(unwrapped(key.module)):
            _once(found, wrapped.setdefault(key.module, {}), key.kind, tensor)
        elif hit is None:
            nearest = nearest or names.closest(key.module)
            unknown.append(tensor.name)
        else:
            _sort(found, halves, key, hit, tensor)
    if unknown:
        raise TensorError(
            f"{file.path}: {number(unknown, 'tensor')} for modules that the model does not have: "
            f"{summarise(unknown, 3)}{nearest}",
            "an adapter of this model, in the names of transformers before or since 4.52",
            "use the converter of the adapter's own base model"
            + (f", {base}" if (base := config.get("base_model_name_or_path")) else ""),
        )
    _pair(found, halves)
    _unstack(found, names, wrapped, dims)
    if not found.config and found.parts:
        ranks = {part.rank for part in found.parts.values()}
        found.settings = Settings(max(ranks), found.settings.alpha)
    return found


def _other(found: PEFTFolder, names: Names, tensor: StoredTensor, unknown: list[str]) -> None:
    """A tensor that is no matrix of an adapter: a bias, or one of ``modules_to_save``."""
    plain = tensor.name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    module, dot, kind = plain.rpartition(".")
    token = tensor.name.removesuffix(TOKENS) if tensor.name.endswith(TOKENS) else ""
    hit = names.path(token) if token else names.path(module, dot + kind)
    if hit is None:
        unknown.append(tensor.name)
    elif token:
        found.tokens[hit[1]] = TrainedTokens(
            tensor, token_numbers(found.config, f"{found.file.path.parent / CONFIG}", token)
        )
    else:
        found.replaced[hit[1]] = tensor


def _sort(
    found: PEFTFolder,
    halves: dict[str, dict[str, StoredTensor]],
    key: AdapterKey,
    hit: tuple[str, str],
    tensor: StoredTensor,
) -> None:
    """Puts a tensor where its kind belongs."""
    path, hub = hit
    if key.leaf == ".bias":
        found.biases[hub] = tensor
    elif key.kind == "lora_magnitude_vector":
        found.magnitudes[hub] = tensor
    else:
        known = halves.setdefault(hub, {})
        _once(found, known, key.kind.replace("embedding_", ""), tensor)
        known["path"] = tensor._replace(name=path)
        if "embedding" in key.kind:
            known["embedding"] = tensor


def _once(
    found: PEFTFolder, known: dict[str, StoredTensor], kind: str, tensor: StoredTensor
) -> None:
    if kind in known:
        raise TensorError(
            f"{found.file.path}: {tensor.name} and {known[kind].name} are the same matrix",
            "one spelling of each name",
        )
    known[kind] = tensor


def _both(file: Path, name: str, known: Mapping[str, StoredTensor]) -> tuple[StoredTensor, ...]:
    """A and B of one module, which fit each other."""
    a, b = known.get("lora_A"), known.get("lora_B")
    if a is None or b is None:
        there, lacks = (b, "lora_A") if a is None else (a, "lora_B")
        raise TensorError(
            f"{file}: {there.name if there else name} is unpaired: there is no {lacks} of that "
            "module",
            "A and B of every module that is adapted",
            "copy the adapter again",
        )
    rank = matrix(a.shape)[0]
    if len(b.shape) < 2 or b.shape[1] != rank:
        raise TensorError(
            f"{file}: {a.name} has the rank {rank}, {b.name} {list(b.shape)} another",
            "B with as many columns as A has rows",
            "copy the adapter again",
        )
    return a, b


def _unstack(
    found: PEFTFolder,
    names: Names,
    wrapped: Mapping[str, Mapping[str, StoredTensor]],
    dims: Dims,
) -> None:
    """Puts A and B of stacked experts in their places, expert by expert."""
    modules: dict[str, list[Wrapped]] = {}
    for name, known in wrapped.items():
        pair = Wrapped(*_both(found.file.path, name, known))
        modules.setdefault(unwrapped(name), []).append(pair)
    for module, pairs in modules.items():
        for match in matched(names.parameters(module), pairs, dims):
            parameter = match.parameter
            for expert, (a, b) in enumerate(experts(match, found.settings, dims)):
                place = parameter.hub, expert
                found.parts[place] = _made(found, parameter.path, a, b)


def _made(found: PEFTFolder, path: str, a: StoredTensor, b: StoredTensor) -> LoraPair:
    """A pair with its scaling.

    Raises:
        TensorError: the configuration gives it another rank.
    """
    rank, said = matrix(a.shape)[0], found.settings.rank(path)
    if found.config and said != rank:
        config = found.file.path.parent / CONFIG
        raise TensorError(
            f"{found.file.path}: {a.name} is {list(a.shape)}; {CONFIG} gives it the rank {said}",
            "r, or rank_pattern, as the matrices have it",
            f"correct r or rank_pattern in {config}",
        )
    known_alpha = found.settings.alpha is not None
    return LoraPair(path, a, b, found.settings.scale(path, rank) if known_alpha else None)


def _pair(found: PEFTFolder, halves: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    """Puts A and B together."""
    for hub, known in halves.items():
        a, b = _both(found.file.path, hub, known)
        part = _made(found, known["path"].name, a, b)
        if "embedding" in known:
            found.embeddings[hub] = part
        else:
            found.parts[hub, NO_EXPERT] = part


def untrained(folder: PEFTFolder) -> list[str]:
    """A warning where every B is zero, as before training."""
    pairs = [*folder.parts.values(), *folder.embeddings.values()]
    if not pairs or not all(is_zero(pair.b) for pair in pairs):
        return []
    what = "every B is zero: the adapter was never trained, and changes nothing"
    return [f"warning: {folder.path}: {what}"]
