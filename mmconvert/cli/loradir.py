"""``--lora_dir``: adapters of PEFT or in MM format, in both forms, for what runs them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.config import MaybePath, OptionalHFConfig, Options
from mmconvert.errors import RequestError
from mmconvert.executor.ranks import TORCHRUN

if TYPE_CHECKING:
    from mmconvert.runtime.lora import LoraFolders


@contextmanager
def adapters(
    lora_dir: MaybePath, alpha: float | None, hf_dir: Path, mm_dir: Path, *, judged: bool
) -> Generator[LoraFolders | None]:
    """The adapters in MM format, for the running checkpoint, and as PEFT has them, for its judge.

    What is missing is converted into a folder that is gone afterwards.

    Args:
        judged: whether there is a judge; else adapters in MM format are taken as they are.

    Raises:
        MMConvertError: as the conversions.
    """
    if lora_dir is None:
        if alpha is not None:
            raise RequestError("--lora_alpha is given without --lora_dir", "both, or none")
        yield None
        return
    from mmconvert.config.lora import AdapterConfig, LoraHFToMM, LoraMMToHF
    from mmconvert.directions import lora
    from mmconvert.formats.mm.ranks import is_mm
    from mmconvert.formats.recognise import family_of
    from mmconvert.runtime.lora import LoraFolders

    if is_mm(lora_dir) and not judged:
        yield LoraFolders(lora_dir, None, alpha)
        return
    family = family_of(hf_dir)
    options = Options(no_sync=True)
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "adapter"
        if is_mm(lora_dir):
            like = OptionalHFConfig(hf_dir)
            lora.lora_mm_to_hf(family, LoraMMToHF(made, lora_dir, like, lora_alpha=alpha), options)
            yield LoraFolders(lora_dir, made, alpha)
            return
        if TORCHRUN in os.environ:  # processes of other machines do not see what is made here
            raise RequestError(
                f"{lora_dir} is not an MM checkpoint",
                "under torchrun, an adapter in MM format",
                "convert it with lora_hf_to_mm first, or run the command without torchrun",
            )
        asked = LoraHFToMM(made, AdapterConfig(lora_dir), base_mm_dir=mm_dir, base_hf_dir=hf_dir,
                           lora_alpha=alpha)  # fmt: skip
        lora.lora_hf_to_mm(family, asked, options)
        yield LoraFolders(made, lora_dir, None)
