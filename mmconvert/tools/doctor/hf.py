"""HF checkpoints: files, then names and shapes against config.json, then values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert import converters
from mmconvert.causes.quantised import left_over
from mmconvert.causes.tensors import how_to_get
from mmconvert.config import Options
from mmconvert.converters.family import Dims, Family, Module, Variant, hf_templates
from mmconvert.errors import CheckpointError, MMConvertError
from mmconvert.events import Events
from mmconvert.formats.containers.safetensors import WeightFile
from mmconvert.formats.hf.model import form_of, hf_model, is_tied
from mmconvert.formats.hf.side import heads, hf_side, partial_hf
from mmconvert.formats.mm.instances import Instance
from mmconvert.names import NO_LAYER, number, summarise
from mmconvert.plan.dtypes import CAST_ALL, mixed_dtypes
from mmconvert.stored import StoredTensor
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.hf_files import look_at_config, look_at_side_files, weight_files
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.values import look_at_replicas, look_for_nan

ANOTHER_CONFIG = "take config.json from the model's page"


def examine_hf(folder: Path, asked: DoctorRequest, events: Events, report: DoctorReport) -> None:
    """Everything about an HF folder."""
    report.kind = "hf"
    if asked.hf_dir is not None:
        report.skipped.append("hf_dir: it is for MM checkpoints")
    config = look_at_config(folder, report)
    files, complete = weight_files(folder, report)
    family = _family(folder, config, files, report) if config is not None else None
    look_at_side_files(folder, report, preprocessor=family is None or family.preprocessor)
    if family is not None and config is not None:
        _look_at_tensors(folder, family, config, files, complete, asked, events, report)
    else:
        report.skipped.append("names and shapes: config.json does not tell the family")
    if asked.values:
        look_for_nan([t for f in files for t in f.tensors], asked.workers, events, report)


def _family(
    folder: Path, config: Mapping[str, object], files: Sequence[WeightFile], report: DoctorReport
) -> Family | None:
    kind = config.get("model_type")
    path = folder / "config.json"
    if not isinstance(kind, str) or not kind.strip():
        what = f"{path}: model_type is {kind!r}"
        report.add("damaged-config", what, ANOTHER_CONFIG, path=path)
        return None
    for family in (*converters.registry().values(), *converters.ms_registry().values()):
        if kind in family.model_types:
            report.family = family.name
            return family
    what = f"{path} is of model_type {kind!r}, which no converter here serves"
    if similar := _with_such_encoders(files):
        what += f"; the weights hold an encoder named as in {similar}"
        fix = f"take config.json from the model's page, if it is a {similar}"
        report.add("unsupported-model", what, fix, path=path)
    else:
        fix = (
            "nothing, if it is a plain language model for llm_hf_dir; it cannot be converted alone"
        )
        report.add("unsupported-model-type", what, fix, path=path)
    return None


def _with_such_encoders(files: Sequence[WeightFile]) -> str:
    """A family whose encoders' names the weights have, "" if there is none: a language model."""
    names = [tensor.name for file in files for tensor in file.tensors]
    found: dict[str, int] = {}
    for family in converters.registry().values():
        encoders = [m for v in family.variants for m in family.modules(v) if m.key != "llm"]
        index = hf_templates(tuple(encoders))
        found[family.name] = sum(index.find(family.hub_name(name)) is not None for name in names)
    best = max(found, key=lambda name: found[name])
    return best if found[best] else ""


def _look_at_tensors(
    folder: Path,
    family: Family,
    config: Mapping[str, object],
    files: Sequence[WeightFile],
    complete: bool,
    asked: DoctorRequest,
    events: Events,
    report: DoctorReport,
) -> None:
    try:
        dims = family.dims(config)
        traits = family.traits(config)
        lists = tuple(family.lists(config).items())
        table = family.modules(Variant(traits=traits))
        is_tied(family, table, config, {})
    except CheckpointError as error:
        fix = error.fix or ANOTHER_CONFIG
        report.add_error("damaged-config", error, path=folder / "config.json", fix=fix)
        return
    named = {family.hub_name(t.name): t for file in files for t in file.tensors}
    if (fault := form_of(family, table, named, config, folder)) is not None:
        report.add_error("refused", fault, path=folder)
        report.skipped.append("names and shapes: these are no plain weights of a model")
        return
    if note := left_over(config):
        path = folder / "config.json"
        note = note.removeprefix("warning: ")
        report.add("quantization-config-left", note, "delete the key", path=path)
    tensors = _by_hub_name(family, config, files, report)
    tensors = _known(family, table, tensors, report)
    if not complete:
        report.skipped.append("missing tensors: not all weight files can be read")
    tied = is_tied(family, table, config, tensors)
    traits |= family.shape_traits(config, {name: t.shape for name, t in tensors.items()})
    modules = family.table(Variant(tied=tied, traits=traits, lists=lists))
    side, lacking, faults = partial_hf(modules, dims, tensors)
    for fault in faults:
        name = fault.what.split(" ", 1)[0].rstrip(":")
        path = next((t.path for t in tensors.values() if t.name == name), folder)
        report.add_error("wrong-shape", fault, path=path, tensor=name)
    if mixed := mixed_dtypes(side.wholes):
        report.add("mixed-dtypes", mixed, CAST_ALL, path=folder)
    if complete and not report.has(["index-mismatch"]):  # else they follow from that
        _missing(folder, lacking, tensors, heads(modules), report)
        _beyond(folder, modules, dims, tensors, report)
    if asked.quick:
        report.skipped.append("copies of tensors (--quick)")
    else:
        look_at_replicas(side, False, asked.workers, events, report)
    if report.healthy:
        _try_to_open(folder, family, report)


def _try_to_open(folder: Path, family: Family, report: DoctorReport) -> None:
    """What nothing before has seen, and a conversion would refuse."""
    try:
        model = hf_model(family, folder, Options())
        hf_side(model.modules, model.dims, model.hf_tensors)
    except MMConvertError as error:
        report.add_error("refused", error, path=folder)


def _by_hub_name(
    family: Family,
    config: Mapping[str, object],
    files: Sequence[WeightFile],
    report: DoctorReport,
) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    other: list[StoredTensor] = []
    for tensor in (t for file in files for t in file.tensors):
        name = family.hub_name(tensor.name)
        if name in found:
            report.add(
                "duplicate-tensor",
                f"{tensor.name} in {tensor.path.name} and {found[name].name} in "
                f"{found[name].path.name} are the same tensor of the model",
                "keep one of them: download the weight files from one revision of the model",
                path=tensor.path,
                tensor=tensor.name,
            )
        found[name] = tensor
        other += [] if name.endswith(tensor.name) else [tensor]  # a prefix alone is no spelling
    if other:
        version = config.get("transformers_version")
        wrote = f"; config.json says {version}" if isinstance(version, str) else ""
        report.add(
            "other-spelling",
            f"{len(other)} of {sum(len(f.tensors) for f in files)} tensors are named as "
            f"transformers 4.52 and later name them, not as on the hub: {other[0].name} for "
            f"{family.hub_name(other[0].name)}{wrote}",
            "nothing: both are read, and mm_to_hf writes the names of its hf_dir",
            path=other[0].path,
            tensor=other[0].name,
        )
    return found


def _known(
    family: Family,
    table: tuple[Module, ...],
    tensors: Mapping[str, StoredTensor],
    report: DoctorReport,
) -> dict[str, StoredTensor]:
    """The tensors that have a row; those without any reason to be there are noted."""
    index = hf_templates(table)
    kept = {name: t for name, t in tensors.items() if index.find(name)}
    lost = sorted(
        tensors[name]
        for name in tensors.keys() - kept.keys()
        if not family.why_carried(name) and not family.why_dropped(name)
    )
    if lost:
        closest = index.closest(family.hub_name(lost[0].name))
        hint = f" (closest known name: {closest})" if closest else ""
        report.add(
            "unknown-tensor",
            f"{number(lost, 'tensor')} with no place in {family.name}: "
            f"{summarise(t.name for t in lost)}{hint}",
            "leave them out of the conversion with --drop 'NAME' (a pattern; may be repeated)",
            path=lost[0].path,
            tensor=lost[0].name,
        )
    return kept


def _missing(
    folder: Path,
    lacking: Sequence[Instance],
    tensors: Mapping[str, StoredTensor],
    output: set[str],
    report: DoctorReport,
) -> None:
    """Missing tensors, a finding for each layer."""
    places: dict[tuple[str, int], list[str]] = {}
    for item in lacking:
        there = places.setdefault((item.module.label, item.layer), [])
        there += [n for n in item.hf_names() if n not in tensors and n not in there]
    for (label, layer), names in places.items():
        where = f"{label} layer {layer}" if layer != NO_LAYER else f"{label}, outside its layers,"
        report.add(
            "missing-tensor",
            f"{where} lacks {number(names, 'tensor')}: {summarise(names)}",
            how_to_get(names, output),
            path=folder,
            tensor=names[0],
        )


def _beyond(
    folder: Path,
    modules: Sequence[Module],
    dims: Dims,
    tensors: Mapping[str, StoredTensor],
    report: DoctorReport,
) -> None:
    """Layers that config.json does not count."""
    owner = {name: m for m in modules for r in m.all_rows() for name in r.hf}
    index = hf_templates(tuple(modules))
    beyond: dict[str, list[StoredTensor]] = {}
    for name, tensor in tensors.items():
        hit = index.find(name)
        if hit is None:
            continue
        module = owner[hit[0].hf[0]]
        if hit[1] != NO_LAYER and hit[1] >= dims[f"{module.key}.layers"]:
            beyond.setdefault(module.key, []).append(tensor)
    for key, found in beyond.items():
        report.add(
            "extra-layers",
            f"{number(found, 'tensor')} of {key} layers beyond the {dims[f'{key}.layers']} that "
            f"config.json counts: {summarise(t.name for t in found)}",
            "replace config.json or the weights by those that belong together",
            path=folder,
            tensor=min(found).name,
        )
