"""An adapter of PEFT beside its base model: whether it fits, and which transformers loads it."""

from __future__ import annotations

from pathlib import Path

from mmconvert.adapters import HF_A, PREFIX, WEIGHT, parse_key
from mmconvert.errors import MMConvertError
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.peft.folder import Names, open_peft
from mmconvert.formats.peft.target import spelled
from mmconvert.formats.recognise import hf_family
from mmconvert.names import number
from mmconvert.tools.doctor.report import DoctorReport


def examine_adapter(path: Path, hf_dir: Path, report: DoctorReport) -> None:
    """Whether the adapter's names are of the base model, and of which spelling."""
    report.kind = "peft"
    try:
        family = hf_family(hf_dir)
        report.family = family.name
        model = config_model(family, hf_dir)
        folder = open_peft(path, Names(family, family.table(model.variant)))
    except MMConvertError as error:
        report.add_error("unknown-tensor", error, path=path)
        return
    report.files, report.tensors = 1, len(folder.file.tensors)
    stored = {t.name for t in folder.file.tensors if parse_key(t.name)}
    forms = {
        form: sum(
            f"{PREFIX}{spelled(family, hub, form).removesuffix(WEIGHT)}{HF_A}" in stored
            for hub in folder.parts
        )
        for form in ("new", "old")
    }
    count = number(folder.parts, "layer")
    if forms["new"] == len(folder.parts):
        return
    command = f"mm-convert rename_lora --lora_dir {path} --save_dir NEW"
    if forms["old"] == len(folder.parts):
        what = f"{path}: {count} named as in transformers before 4.52; later ones load none of them"
    else:
        what = f"{path}: {len(folder.parts) - forms['new']} of {count} have names that PEFT skips"
    report.add("adapter-names", what, f"rename them: {command}", path=folder.file.path)
