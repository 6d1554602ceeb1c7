"""Examines a checkpoint: unlike a conversion, it does not stop at the first fault."""

from __future__ import annotations

import os
from pathlib import Path

from mmconvert.causes.downloads import way_to
from mmconvert.causes.folders import other_form
from mmconvert.errors import MMConvertError
from mmconvert.events import Events
from mmconvert.formats.hf.choice import INDEX
from mmconvert.formats.hf.folder import has_weights
from mmconvert.formats.mm.ranks import TRACKER, has_ranks
from mmconvert.formats.mm.tracker import iterations
from mmconvert.formats.registry import load, recognise
from mmconvert.formats.single import MS_FILE, is_zip, open_file
from mmconvert.tools.doctor.adapter import examine_adapter
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.hf import examine_hf
from mmconvert.tools.doctor.leftovers import is_locked, look_beside, staged_for
from mmconvert.tools.doctor.mm import examine_mm
from mmconvert.tools.doctor.modelfile import look_at_model_json
from mmconvert.tools.doctor.others import examine_other
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.single import examine_file


def examine(path: Path, asked: DoctorRequest, events: Events) -> DoctorReport:
    """Everything that is wrong with an HF folder, an MM folder or a single weight file.

    Reads headers, and the data of tensors that have copies (not if ``quick``) and of vision q, k,
    v (if there is an ``hf_dir``); all data if ``values``. Writes nothing.
    """
    report = DoctorReport(path)
    look_beside(path, report)
    try:
        _dispatch(path, asked, events, report)
    except MMConvertError as error:  # from a step that cannot go on
        report.add_error("refused", error, path=path)
    except OSError as error:  # a folder that may not be listed, or that vanishes meanwhile
        where = error.filename or path
        what = f"{where}: {error.strerror or error}"
        report.add(
            "cannot-read",
            what,
            "change its permissions, or ask its owner to",
            path=Path(os.fsdecode(where)),
        )
    return report


def _other(path: Path) -> str:
    """The name of the format, where neither Hugging Face nor MM; "" if it is one of these."""
    if path.is_file():
        try:
            return "ms" if open_file(path).kind == MS_FILE else ""
        except (MMConvertError, OSError):
            return "ms" if path.name.endswith(".ckpt") and not is_zip(path) else ""
    name = recognise(path)
    hf, mm = _signs(path)
    if mm == TRACKER and not any(has_ranks(path / folder) for folder in iterations(path)):
        mm = ""  # other formats have a tracker file too
    return name if name not in ("hf", "mm", "peft") and not (hf or mm) else ""


def _dispatch(path: Path, asked: DoctorRequest, events: Events, report: DoctorReport) -> None:
    if asked.hf_dir is not None and recognise(path) == "peft":
        examine_adapter(path, asked.hf_dir, asked, events, report)
        return
    if path.exists() and (name := _other(path)):
        examine_other(load(name), path, asked, events, report)
        return
    if path.is_file():
        examine_file(path, asked, events, report)
        return
    if not path.is_dir():
        link = ": it is a link to nowhere" if path.is_symlink() else ""
        if not report.has(["interrupted-replacement"]):
            what = f"{path} does not exist{link}"
            report.add("not-there", what, way_to(path), path=path)
        return
    _staging(path, report)
    ranks = has_ranks(path) or any(has_ranks(path / name) for name in iterations(path))
    if not ranks and not has_weights(path) and (fault := other_form(path)) is not None:
        report.add_error("no-checkpoint", fault, path=path)
        return
    hf, mm = _signs(path)
    if hf and mm:
        read = "Hugging Face" if (path / "config.json").is_file() else "MM"
        report.add(
            "two-kinds",
            f"{path} holds signs of two checkpoints: {hf} and {mm}",
            f"move one of them away; commands that ask for any checkpoint take it for {read}",
            path=path,
        )
    if hf and (has_weights(path) or not mm):
        examine_hf(path, asked, events, report)
        look_at_model_json(path, None, asked, report)
    else:
        examine_mm(path, asked, events, report)


def _signs(path: Path) -> tuple[str, str]:
    """What speaks for an HF checkpoint, and what for an MM one; "" if nothing does."""
    hf = next((n for n in ("config.json", INDEX) if (path / n).is_file()), "")
    hf = hf or next((p.name for p in sorted(path.glob("*.safetensors"))), "")
    mm = TRACKER if (path / TRACKER).is_file() else ""
    inner = [name for name in iterations(path) if has_ranks(path / name)]
    return hf, mm or ("mp_rank_* folders" if has_ranks(path) else inner[0] if inner else "")


def _staging(path: Path, report: DoctorReport) -> None:
    """PATH itself may be what a killed or running conversion works in."""
    final = staged_for(path)
    if final is None:
        return
    if is_locked(path):
        what = f"{path} belongs to a running conversion into {final}"
        report.add("running-conversion", what, "wait until it has ended", path=path)
    else:
        what = f"{path} is what a killed conversion into {final} left; it may be incomplete"
        report.add("unfinished-output", what, f"run the conversion again: {final}", path=path)
