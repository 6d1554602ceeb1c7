"""One weight file by itself: whose it is, and the tensors in it.

A file's name does not tell: MindSpore and Hugging Face both write safetensors, torch.save writes
rank files and ``pytorch_model.bin``. Its metadata and the names of its tensors do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from mmconvert import converters
from mmconvert.converters.family import Family
from mmconvert.converters.rows import hf_templates
from mmconvert.errors import CheckpointError, MMConvertError, cannot_read
from mmconvert.formats import contents
from mmconvert.formats.containers.ckpt import read_ckpt
from mmconvert.formats.containers.ptfile import read_pt
from mmconvert.formats.containers.safetensors import WeightFile, read_weight_file
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.hf.choice import ADAPTER, SAFETENSORS
from mmconvert.formats.hf.folder import HFCheckpoint, read_config
from mmconvert.formats.jsonfile import read_json_file
from mmconvert.formats.mm.rankfiles import part_names, rank_parts
from mmconvert.formats.recognise import family_of, ms_family
from mmconvert.formats.registry import load, recognise
from mmconvert.formats.wholes import plain
from mmconvert.names import number, summarise
from mmconvert.stored import StoredTensor

HF_FILE, ADAPTER_FILE = "hf_weight_file", "adapter_file"
MS_FILE, RANK_FILE = "ms_file", "mm_rank_file"
TITLES = {
    HF_FILE: "Hugging Face weight file",
    ADAPTER_FILE: "adapter",
    RANK_FILE: "MM rank file",
}
ADAPTER_CONFIG = "adapter_config.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Names that PEFT gives: base_model.model.MODULE.lora_A.weight, and others for its other methods.
_LEARNED = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.*)\."
    r"(lora_\w+|ia3_l|vera_lambda_\w+|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|fourierft_\w+|hra_u)"
    r"(\.\w+)?(\.weight)?"
)


class WeightParts(NamedTuple):
    """The tensors of one file.

    Attributes:
        kind: HF_FILE, ADAPTER_FILE, MS_FILE or RANK_FILE.
        parts: tensors by name; of a rank file by model chunk, else under "".
        notes: what else there is to say of the file.
    """

    kind: str
    parts: dict[str, dict[str, StoredTensor]]
    notes: tuple[str, ...] = ()

    def tensors(self) -> dict[str, StoredTensor]:
        """By name, ``model0/...`` where a rank file holds several model chunks."""
        prefix = len(self.parts) > 1
        return {
            f"{key}/{name}" if prefix else name: tensor
            for key, part in self.parts.items()
            for name, tensor in part.items()
        }


def open_file(path: Path) -> WeightParts:
    """Reads the headers of a weight file of any kind.

    Raises:
        FormatError: a damaged file, or one of no kind; CheckpointError: it cannot be read.
    """
    if path.name.endswith(SAFETENSORS):
        file = read_weight_file(path)
        found = {tensor.name: tensor for tensor in file.tensors}
        is_ms = file.metadata.get("format") == "ms" or (
            "format" not in file.metadata and _of_mindspore(found)
        )
        written = file.metadata.get("format")
        notes = ("a safetensors file" + (f", metadata: format {written}" if written else ""),)
        return WeightParts(MS_FILE, {"": found}, notes) if is_ms else _plain(path, found, notes)
    if path.name.endswith(".ckpt") and not is_zip(path):
        return WeightParts(MS_FILE, {"": {t.name: t for t in read_ckpt(path).tensors}})
    if path.suffix not in SUFFIXES and not is_zip(path):
        raise CheckpointError(
            f"{path} is not a weight file",
            f"a file of one of the kinds {' '.join(SUFFIXES)}, or a checkpoint's folder",
            "give the checkpoint's folder",
        )
    file = read_pt(path)
    if any(isinstance(value, StoredTensor) for value in file.content.values()):
        return _plain(path, {tensor.name: tensor for tensor in hf_bin.read_bin(path).tensors})
    parts = rank_parts(file, {})
    return WeightParts(RANK_FILE, {name: parts[name] for name in part_names(path, parts)})


def look(path: Path) -> contents.Look:
    """Looks at one file.

    Raises:
        FormatError: a damaged file, or one of no kind; CheckpointError: it cannot be read.
    """
    file = open_file(path)
    if file.kind == MS_FILE:
        return load("ms").look(path)
    found, wholes = file.tensors(), plain(file.tensors().items())
    if file.kind == RANK_FILE:
        others = [key for key in read_pt(path).content if not str(key).startswith("model")]
        notes = (f"beside the weights: {', '.join(map(str, others))}",) if others else ()
        boxes = contents.of_rank_file(file.parts, converters.registry().values())
        name, unit = "", "model chunk"
    else:
        family = family_of_file(path, found) if file.kind == HF_FILE else None
        in_hf = family is not None and recognise(path.parent) == "hf"
        config = read_config(path.parent) if in_hf else {}
        weights = WeightFile(path, b"", {}, list(found.values()))
        boxes = contents.of_hf(HFCheckpoint(path.parent, config, [weights], None), family)
        notes, name, unit = file.notes, family.name if family else "", "file"
    return contents.Look(
        kind=file.kind,
        title=TITLES[file.kind],
        family=name,
        listing=list(found.values()),
        wholes=wholes[0],
        stored=wholes[1],
        boxes=boxes,
        unit=unit,
        notes=notes,
    )


def adapter_of(folder: Path) -> Path | None:
    """The weight file of a folder that holds an adapter and no model; None for any other."""
    if recognise(folder) == "hf" or not (folder / ADAPTER_CONFIG).is_file():
        return None
    found = (
        p for p in sorted(folder.glob("adapter_model.*")) if p.suffix in (".safetensors", ".bin")
    )
    return next(found, None)


def family_of_file(path: Path, names: Collection[str]) -> Family | None:
    """The family of a Hugging Face weight file: by the config.json beside it, else by its names
    if only one family knows them all; None if neither tells.
    """
    if recognise(path.parent) == "hf":
        try:
            return family_of(path.parent, naming="")
        except MMConvertError:
            return None
    fitting = [f for f in converters.registry().values() if names and _knows(f, names)]
    return fitting[0] if len(fitting) == 1 else None


def _knows(family: Family, names: Iterable[str]) -> bool:
    tables = [hf_templates(family.modules(variant)) for variant in family.variants]
    hub = [family.hub_name(name) for name in names]
    return any(
        all(t.find(n) or family.why_dropped(n) or family.why_carried(n) for n in hub)
        for t in tables
    )


def _plain(path: Path, found: dict[str, StoredTensor], notes: tuple[str, ...] = ()) -> WeightParts:
    learned = [hit for name in found if (hit := _LEARNED.fullmatch(name))]
    if not learned and not (found and ADAPTER.fullmatch(path.name)):
        return WeightParts(HF_FILE, {"": found}, notes)
    modules = {hit["module"].rpartition(".")[2] for hit in learned}
    words = f"an adapter, no model by itself: {number(found, 'tensor')}"
    words += f" for {summarise(modules)}" if modules else ""
    return WeightParts(ADAPTER_FILE, {"": found}, (*notes, words + _base(path.parent)))


def _base(folder: Path) -> str:
    """What the adapter's own config says of it."""
    try:
        config = read_json_file(folder / ADAPTER_CONFIG)
    except CheckpointError:
        return ""
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    words = [f"{kind}"] if isinstance(kind, str) else []
    words += [f"rank {config['r']}"] if isinstance(config.get("r"), int) else []
    words += [f"of the base model {base}"] if isinstance(base, str) else []
    return f" ({', '.join(words)}, says {ADAPTER_CONFIG})" if words else ""


def _of_mindspore(names: Iterable[str]) -> bool:
    """Whether a family that MindSpore has knows these names, as MindSpore spells them."""
    return ms_family(names) is not None


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive, as torch.save makes them (Lightning calls them .ckpt)."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\3\4"
    except OSError as error:
        raise cannot_read(path, error) from error
