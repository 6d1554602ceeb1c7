"""Adapters under other names: those of transformers before or since 4.52, or of FSDP2 training."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mmconvert.adapters import CONFIG
from mmconvert.config import Options
from mmconvert.config.lora import RenameLora
from mmconvert.converters.family import Family
from mmconvert.errors import CheckpointError
from mmconvert.events import Events
from mmconvert.executor.apart import check_apart
from mmconvert.formats.base import NoLayout, Placed
from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.containers.safetensors import safetensors_image
from mmconvert.formats.peft.files import SAFETENSORS, read_file
from mmconvert.formats.peft.format import variant_of_keys
from mmconvert.formats.peft.names import Names, renamed
from mmconvert.formats.reading import watched
from mmconvert.formats.recognise import family_by_hf_names
from mmconvert.formats.wholes import verbatim
from mmconvert.narrow import is_array
from mmconvert.plan.build import build
from mmconvert.plan.plan import Side
from mmconvert.result import Result
from mmconvert.run import Conversion

FSDP2_FILE = "lora_adapter.safetensors"


@watched
def rename_lora(
    cfg: RenameLora, options: Options | None = None, events: Events | None = None
) -> Result:
    """Writes an adapter under other names; every tensor keeps its bytes.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = Conversion("rename_lora", cfg, cfg.save_dir, options, events)
    check_apart(cfg.save_dir, [cfg.lora_dir])
    file, config = read_file(cfg.lora_dir)
    family = family_by_hf_names([tensor.name for tensor in file.tensors])
    if family is None:
        raise CheckpointError(
            f"{file.path}: no family here knows these modules, such as {file.tensors[0].name}",
            "an adapter of a family of mm-convert",
        )
    names = Names(family, family.table(variant_of_keys(family, cfg.lora_dir)))
    new = ((renamed(tensor, family, names, cfg.names), tensor) for tensor in file.tensors)
    src, dst = verbatim(new, file.path)
    plan = run.prove(build(src, dst))
    images = list(_images(dst, config, family, cfg.names))
    result = Result(cfg.save_dir, False, plan, NoLayout(), 0.0, tuple(images))
    return run.write(result, Placed(side=dst), {"kind": "peft"}, [cfg.lora_dir])


def _images(dst: Side, config: Mapping[str, object], family: Family, form: str) -> list[FileImage]:
    numbers = sorted(range(len(dst.targets)), key=lambda number: dst.targets[number].name)
    name = FSDP2_FILE if form == "fsdp2" else SAFETENSORS
    images = [safetensors_image(name, dst.targets, numbers, {"format": "pt"})]
    if config:
        content = dict(config)
        for key in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            if content.get(key) is not None:
                content[key] = _words(content[key], family, form)
        images.append(small(CONFIG, (json.dumps(content, indent=2) + "\n").encode()))
    return images


def _words(value: object, family: Family, form: str) -> object:
    """Names of modules, or an expression of them, in the other spelling."""
    if is_array(value):
        return [_words(item, family, form) for item in value]
    if not isinstance(value, str):
        return value
    for new, hub in family.spellings:
        pairs = ((new, hub) if form == "old" else (hub, new),)
        for old, other in pairs:
            if value.startswith(old) and not value.startswith(other):
                return other + value[len(old) :]
            escaped, others = old.replace(".", r"\."), other.replace(".", r"\.")
            if value.startswith(escaped) and not value.startswith(others):
                return others + value[len(escaped) :]
    return value
