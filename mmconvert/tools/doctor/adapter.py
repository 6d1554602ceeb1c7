"""An adapter of PEFT beside its base model: whether it fits, and which transformers loads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmconvert.adapters import CONFIG, parse_key
from mmconvert.errors import MMConvertError
from mmconvert.events import Events
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.model import Model
from mmconvert.formats.peft.folder import PEFTFolder, open_peft, untrained
from mmconvert.formats.peft.merge import check_base
from mmconvert.formats.peft.names import Names, renamed
from mmconvert.formats.recognise import hf_family
from mmconvert.names import number, summarise
from mmconvert.plan.plan import matrix
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.values import look_for_nan


def examine_adapter(
    path: Path, hf_dir: Path, asked: DoctorRequest, events: Events, report: DoctorReport
) -> None:
    """Whether the adapter's names and sizes are those of the base model, and its values numbers."""
    report.kind = "peft"
    try:
        family = hf_family(hf_dir)
        report.family = family.name
        model = config_model(family, hf_dir)
        names = Names(family, family.table(model.variant))
        folder = open_peft(path, names, model.dims)
    except MMConvertError as error:
        report.add_error("unknown-tensor", error, path=path)
        return
    report.files, report.tensors = 1, len(folder.file.tensors)
    _look_at_names(folder, model, names, report)
    if wrong := list(_wrong_sizes(folder, model, names)):
        what = f"{path} is not of this base model: {summarise(wrong, 3)}"
        report.add(
            "wrong-shape", what, f"give the adapter's own base model{_own(folder)}", path=path
        )
    _look_at_config(folder, report)
    look_for_nan(folder.file.tensors, asked.workers, events, report)


def _own(folder: PEFTFolder) -> str:
    named = folder.config.get("base_model_name_or_path")
    return f": {CONFIG} names {named}" if named else ""


def _look_at_names(folder: PEFTFolder, model: Model, names: Names, report: DoctorReport) -> None:
    """Which transformers loads it."""
    path, family = folder.path, model.family
    keys = [(t, key) for t in folder.file.tensors if (key := parse_key(t.name))]
    first = [t for t, key in keys if key.kind in ("lora_A", "lora_embedding_A")]
    forms = {
        form: sum(renamed(t, family, names, form) == t.name for t in first)
        for form in ("new", "old")
    }
    if forms["new"] == len(first):
        return
    count = number(first, "layer")
    fix = f"rename them for PEFT: mm-convert rename_lora --lora_dir {path} --save_dir NEW"
    if forms["old"] == len(first):
        what = (
            f"{path}: {count} named as in transformers before 4.52; PEFT loads none with later ones"
        )
        fix += "; conversions here read both spellings"
    else:
        what = f"{path}: {len(first) - forms['new']} of {count} have names that PEFT skips"
    report.add("adapter-names", what, fix, path=folder.file.path)


def _wrong_sizes(folder: PEFTFolder, model: Model, names: Names) -> Iterator[str]:
    """The layers that the model does not have, or has in other sizes, in words."""
    for (hub, inside), part in folder.parts.items():
        hit = names.layer(hub)
        if hit is None:
            continue
        row, layer, expert = hit
        count = model.dims.get(f"{names.keys[row.mm]}.layers", layer + 1)
        if layer >= count:
            yield f"{part.path} (the model has {number(count, 'layer')})"
            continue
        place = row.hf_names(layer, max(expert, inside)).index(hub)
        rows, cols = part.b.shape[0], matrix(part.a.shape)[1]
        expected = (
            model.dims.get(row.rows[place], rows) if row.rows else rows,
            model.dims.get(row.cols, cols),
        )
        if expected != (rows, cols):
            yield f"{part.path} (for a weight of {[rows, cols]}, the model's is {list(expected)})"


def _look_at_config(folder: PEFTFolder, report: DoctorReport) -> None:
    """Whether anything tells how it is to be scaled, and added to what; whether it was trained."""
    path = folder.file.path.parent / CONFIG
    if not folder.config:
        what = f"{path} is missing: lora_alpha is unknown, and PEFT does not load the adapter"
        fix = "copy it again; or write it: peft_type LORA, r, lora_alpha, target_modules"
        report.add("adapter-config", what, fix, path=path)
    try:
        check_base(folder.config, str(path), base_is_residual=False)
    except MMConvertError as error:
        report.add("adapter-residual", error.what, error.fix, path=path)
    for warning in untrained(folder):
        what = warning.removeprefix("warning: ")
        report.add("adapter-untrained", what, "give an adapter that was trained", path=path)
