"""What an examination is asked for, and the HF checkpoint that it may compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.rows import encoders
from mmconvert.errors import MMConvertError
from mmconvert.formats.hf.folder import read_config
from mmconvert.formats.hf.model import config_model, hf_model
from mmconvert.formats.hf.side import hf_side
from mmconvert.formats.model import Model
from mmconvert.formats.recognise import family_of
from mmconvert.plan.plan import Side
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import line, operand


@dataclass(frozen=True)
class Original:
    """The HF checkpoint that an MM checkpoint was made from.

    Attributes:
        model: its sizes; its tensors too if its weights can be read.
    """

    model: Model

    def side(self, canonical: bool, encoders_only: bool) -> Side | None:
        """Its weights in the structure of an MM checkpoint; None if they are not all there."""
        if self.model.hf is None:
            return None
        variant = replace(self.model.variant, canonical=canonical, encoder_qkv="interleaved")
        modules = self.model.family.table(variant)
        full = hf_side(modules, self.model.dims, self.model.hf_tensors, transposed=True)
        if not encoders_only:
            return full
        kept = {r.mm for m in encoders(modules) for r in m.all_rows()}
        return replace(full, wholes={k: w for k, w in full.wholes.items() if k.mm in kept})


@dataclass(frozen=True)
class DoctorRequest:
    """What an examination is asked for.

    Attributes:
        hf_dir: the HF checkpoint that an MM checkpoint was made from, if it is at hand.
        quick: copies of tensors are not compared.
        values: all data is read, and searched for NaN and infinity.
        workers: number of threads.
        model_json: MindSpeed-MM's file that is to fit.
    """

    hf_dir: Path | None
    quick: bool
    values: bool
    workers: int
    model_json: Path | None = None

    def original(self, report: DoctorReport) -> Original | None:
        """Opens hf_dir. Its weights may be absent or damaged: config.json gives the sizes."""
        folder = self.hf_dir
        if folder is None:
            return None
        model: Model | None = None
        try:
            read_config(folder)
            family = family_of(folder, naming="")
            model = config_model(family, folder)
            if any(folder.glob("*.safetensors")):
                full = hf_model(family, folder, Options())
                hf_side(full.modules, full.dims, full.hf_tensors)
                model = full
        except MMConvertError as error:
            report.add(
                "hf-dir-unusable",
                error.what,
                "give the folder of the original model, undamaged; the command examines it",
                path=folder,
                command=line(["mm-convert", "doctor", operand(folder)]),
            )
        return None if model is None else Original(model)
