"""MindSpeed-MM's model.json beside a checkpoint: layer lists, tp sizes, and sizes of the model."""

from __future__ import annotations

from pathlib import Path

from mmconvert.errors import MMConvertError
from mmconvert.formats.hf.folder import read_config
from mmconvert.modeljson.compare import against_config, against_layout
from mmconvert.modeljson.file import read_model_json
from mmconvert.modeljson.keys import derivable
from mmconvert.sharding.layout import Layout
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import line, operand

MAKE = ("mm-convert", "model_json")


def look_at_model_json(
    path: Path, layout: Layout | None, asked: DoctorRequest, report: DoctorReport
) -> None:
    """Adds what a model.json says otherwise than the checkpoint and its config.json.

    Args:
        path: the checkpoint.
        layout: of an MM checkpoint.
    """
    file = asked.model_json
    if file is None:
        return
    hf_dir = asked.hf_dir if layout is not None else path
    try:
        model = read_model_json(file)
        apart = against_layout(model, layout) if layout is not None else []
        config = read_config(hf_dir) if hf_dir is not None else {}
        known = derivable(config)
        sizes = against_config(model, config) if known else []
    except MMConvertError as error:
        report.add_error("model-json", error, path=file)
        return
    words = [*MAKE, operand(hf_dir), "--output", "NEW.json"] if hf_dir and known else []
    if words and layout is not None:
        words += ["--mm_dir", operand(path)]
    command = line(words) if words else ""
    for name, found in (("model-json-layout", apart), ("model-json-sizes", sizes)):
        for difference in found:
            what = f"{file}: {difference.what}"
            fix = "change the file, or resplit the checkpoint with --cfg.model_json"
            if name == "model-json-sizes":
                fix = "change the file to what config.json says"
            report.add(name, what, fix, path=file, command=command)
    report.checked.append(f"{file}: layer lists and tp sizes" if layout else f"{file}: sizes")
    if hf_dir is None:
        report.skipped.append(f"sizes in {file}: needs --hf_dir")
    elif not known:
        report.skipped.append(f"sizes in {file}: not compared for {config.get('model_type')}")
