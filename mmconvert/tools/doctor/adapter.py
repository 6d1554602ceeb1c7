"""An adapter of PEFT beside its base model: whether it fits, and which transformers loads it."""

from __future__ import annotations

from pathlib import Path

from mmconvert.adapters import parse_key
from mmconvert.errors import MMConvertError
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.peft.folder import open_peft
from mmconvert.formats.peft.names import Names, renamed
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
        names = Names(family, family.table(model.variant))
        folder = open_peft(path, names, model.dims)
    except MMConvertError as error:
        report.add_error("unknown-tensor", error, path=path)
        return
    report.files, report.tensors = 1, len(folder.file.tensors)
    keys = [(t, key) for t in folder.file.tensors if (key := parse_key(t.name))]
    first = [t for t, key in keys if key.kind in ("lora_A", "lora_embedding_A")]
    forms = {
        form: sum(renamed(t, family, names, form) == t.name for t in first)
        for form in ("new", "old")
    }
    if forms["new"] == len(first):
        return
    count = number(first, "layer")
    command = f"mm-convert rename_lora --lora_dir {path} --save_dir NEW"
    if forms["old"] == len(first):
        what = f"{path}: {count} named as in transformers before 4.52; later ones load none of them"
    else:
        what = f"{path}: {len(first) - forms['new']} of {count} have names that PEFT skips"
    report.add("adapter-names", what, f"rename them: {command}", path=folder.file.path)
