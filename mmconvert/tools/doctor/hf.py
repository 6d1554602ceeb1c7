"""HF checkpoints: what their reader finds, the files beside the weights, then values."""

from __future__ import annotations

from pathlib import Path

from mmconvert import converters
from mmconvert.config import Options
from mmconvert.converters.family import Family
from mmconvert.converters.rows import hf_templates
from mmconvert.errors import CheckpointError, MMConvertError
from mmconvert.events import Events
from mmconvert.formats.base import Opening
from mmconvert.formats.faults import Collected
from mmconvert.formats.hf.folder import HFCheckpoint, open_hf
from mmconvert.formats.hf.format import FORMAT
from mmconvert.plan.plan import Side
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.faults import report_faults
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.values import look_at_dtypes, look_at_replicas, look_for_nan

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken")
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def examine_hf(folder: Path, asked: DoctorRequest, events: Events, report: DoctorReport) -> None:
    """Everything about an HF folder."""
    report.kind = "hf"
    if asked.hf_dir is not None:
        report.skipped.append("hf_dir: it is for MM checkpoints")
    found, family, side = Collected(), None, Side()
    try:
        family = FORMAT.family(folder)
        report.family = family.name
        stored = FORMAT.open(folder, Opening(family, Options(), faults=found))
        checkpoint, side = stored.checkpoint, stored.side()
    except MMConvertError as error:  # from a step that cannot go on
        # A config.json that cannot be read is a fault of its reader too.
        checkpoint = open_hf(folder, Collected() if family else found)
        if family is not None or error.cause not in {e.cause for e in found.errors}:
            found.add(_unserved(error, checkpoint))
        report.skipped.append("names and shapes: these are not the weights of a known model")
    report_faults(found, folder, report)
    report.files = len(checkpoint.files)
    report.tensors = sum(len(file.tensors) for file in checkpoint.files)
    if not checkpoint.complete:
        report.skipped.append("missing tensors: not all weight files can be read")
    _look_at_side_files(folder, family, report)
    _look_at_values(checkpoint, side, asked, events, report)


def _unserved(error: MMConvertError, checkpoint: HFCheckpoint) -> MMConvertError:
    """An architecture that no family serves: it may be served under its right name."""
    if error.cause != "unsupported-model":
        return error
    what, path = f"{error.what}, which no converter here serves", error.path
    if similar := _with_such_encoders(checkpoint):
        what += f"; the weights hold an encoder named as in {similar}"
        fix = f"take config.json from the model's page, if it is a {similar}"
        return CheckpointError(what, fix=fix, cause=error.cause, path=path)
    fix = "nothing, if it is a plain language model for llm_hf_dir; it cannot be converted alone"
    return CheckpointError(what, fix=fix, cause="unsupported-model-type", path=path)


def _with_such_encoders(checkpoint: HFCheckpoint) -> str:
    """A family whose encoders' names the weights have, "" if there is none: a language model."""
    names = checkpoint.tensors()
    found: dict[str, int] = {}
    for family in converters.registry().values():
        encoders = [m for v in family.variants for m in family.modules(v) if m.role == "encoder"]
        index = hf_templates(tuple(encoders))
        found[family.name] = sum(index.find(family.hub_name(name)) is not None for name in names)
    best = max(found, key=lambda name: found[name])
    return best if found[best] else ""


def _look_at_side_files(folder: Path, family: Family | None, report: DoctorReport) -> None:
    """What a model needs beside its weights to be used."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        report.add(
            "missing-tokenizer",
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZERS)}",
            "download the tokenizer's files from the model's page; converting needs none",
            path=folder,
        )
    preprocessor = family is None or family.preprocessor
    if preprocessor and not any((folder / name).is_file() for name in PREPROCESSORS):
        report.add(
            "missing-preprocessor",
            f"{folder} has no {PREPROCESSORS[0]}: images cannot be prepared for the model",
            "download it from the model's page; converting needs none",
            path=folder,
        )


def _look_at_values(
    checkpoint: HFCheckpoint, side: Side, asked: DoctorRequest, events: Events, report: DoctorReport
) -> None:
    look_at_dtypes(side, checkpoint.folder, report)
    if asked.quick:
        report.skipped.append("copies of tensors (--quick)")
    else:
        look_at_replicas(side, False, asked.workers, events, report)
    if asked.values:
        tensors = [tensor for file in checkpoint.files for tensor in file.tensors]
        look_for_nan(tensors, asked.workers, events, report)
