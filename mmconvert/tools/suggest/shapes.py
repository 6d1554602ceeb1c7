"""Shapes of a model's tensors: from the weight files' headers, or from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Family
from mmconvert.converters.rows import Row
from mmconvert.errors import CheckpointError
from mmconvert.formats.hf.model import hf_model
from mmconvert.formats.hf.side import hf_side
from mmconvert.formats.mm.instances import experts_of, instances
from mmconvert.formats.model import Model
from mmconvert.names import NO_EXPERT, number, summarise
from mmconvert.plan.plan import Key, Whole

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# MM names of the tensors whose columns no table names -> the sizes whose product they are;
# "own." is the module's, "decoder." the text decoder's.
COLUMNS = {
    "image_encoder.encoder.patch_embed.proj.weight": ("channels", "frames", "patch", "patch"),
    "image_encoder.encoder.embeddings.patch_embedding.weight": ("channels", "patch", "patch"),
    "image_encoder.encoder.downsample.weight": ("own.merged",),
    "audio_encoder.encoder.conv1.weight": ("mel", "kernel"),
    "audio_encoder.encoder.conv2.weight": ("own.width", "kernel"),
}
# The same for tensors of which no table names any size.
SHAPES = {
    "image_encoder.encoder.embeddings.class_embedding": ("own.width",),
    "image_encoder.encoder.embeddings.position_embedding": ("positions", "own.width"),
    "image_encoder.encoder.embeddings.position_embedding.weight": ("grid", "own.width"),
    "audio_encoder.encoder.audio_bos_eos_token.weight": ("bos_eos", "decoder.hidden"),
}
KERNEL = 3  # of both audio convolutions (Whisper's encoder)


def stored_shapes(family: Family, folder: Path) -> tuple[Model, Mapping[Key, Whole]]:
    """From the headers of the weight files; every tensor is claimed and fits config.json.

    Raises:
        CheckpointError: weight files that are missing, damaged or of another model.
    """
    model = hf_model(family, folder, Options())
    side = hf_side(model.modules, model.dims, model.hf_tensors, transposed=True)
    wholes = dict(side.wholes)
    return model, wholes


def config_shapes(
    model: Model, config: Mapping[str, object], sizes: Dims
) -> tuple[Mapping[Key, Whole], list[str]]:
    """From config.json alone, the first layer of each module; and warnings of what it leaves open.

    Args:
        sizes: of the vision and audio inputs, see ``workload.patch_sizes``.

    Raises:
        CheckpointError: a size that config.json does not tell.
    """
    base = dict(model.dims) | sizes | {"kernel": KERNEL, "bos_eos": 2}
    base["decoder.hidden"] = model.dims[f"{model.family.decoder}.hidden"]
    if "tile" in sizes:
        base["grid"] = (sizes["tile"] // sizes["patch"]) ** 2
        base["positions"] = base["grid"] + 1  # and the class embedding
    dtype = _dtype(model.family, config)
    warnings: list[str] = []
    if not model.tied_known:
        warnings.append("config.json does not say tie_word_embeddings; taken as false")
    unknown: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    wholes: dict[Key, Whole] = {}
    for module in model.modules:
        known = base | {f"own.{n}": base.get(f"{module.key}.{n}", 0) for n in ("width", "merged")}
        for row in module.all_rows():
            if not row.tied_to:
                shapes[row.mm] = _shape(row, known, unknown)
                if row.only:  # the first layer may have no such row
                    expert = 0 if row.of_expert else NO_EXPERT
                    wholes[Key(row.mm, 0, expert)] = Whole(shapes[row.mm], dtype)
    experts = experts_of(model.modules, model.dims)
    for item in instances(model.modules, {m.key: 1 for m in model.modules}, experts):
        if not item.row.tied_to:
            wholes[item.key] = Whole(shapes[item.row.mm], dtype)
    if unknown:
        what = f"config.json does not tell the sizes of {number(unknown, 'tensor')}: not counted: "
        warnings.append(what + summarise(unknown, 2))
    return wholes, warnings


def _shape(row: Row, known: Dims, unknown: list[str]) -> tuple[int, ...]:
    """The shape of the whole tensor of a row."""
    if row.mm in SHAPES:
        return tuple(_size(name, row, known) for name in SHAPES[row.mm])
    rows = sum(_size(name, row, known) for name in row.rows)
    names = (row.cols,) if row.cols else COLUMNS.get(row.mm, ())
    if not rows:
        unknown.append(row.mm)
        return (0,)
    if not names:
        return (rows,)
    cols = 1
    for name in names:
        cols *= _size(name, row, known)
    return (rows, cols)


def _size(name: str, row: Row, known: Dims) -> int:
    if name not in known:
        raise CheckpointError(
            f"config.json does not tell {name}, a size of {row.mm}",
            "a config.json with every size of the model",
            "take config.json from the model's page, or download the weight files too",
        )
    return known[name]


def _dtype(family: Family, config: Mapping[str, object]) -> str:
    """The dtype that config.json names, else BF16."""
    for part in (config, family.text_config(config)):
        for key in ("torch_dtype", "dtype"):
            named = part.get(key)
            if isinstance(named, str) and named in DTYPES:
                return DTYPES[named]
    return "BF16"
