"""Experts of a Hugging Face checkpoint stored in another form: ``moe_expert``.

Both ends are Hugging Face, so the experts alone have a table (``converters.stacks``); every other
tensor goes by its own name. Plan, proof and output are those of all conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.causes.quantised import is_mark
from mmconvert.causes.tensors import unusable
from mmconvert.config import Options
from mmconvert.config.experts import MoEExpert
from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module, hf_templates
from mmconvert.converters.stacks import (
    INPUTS_FIRST,
    OUTPUTS_FIRST,
    SINGLE,
    Stacks,
    orientation,
    stacks_of,
)
from mmconvert.errors import FormError, RequestError, TensorError
from mmconvert.events import Events
from mmconvert.executor.apart import check_apart
from mmconvert.formats import reading
from mmconvert.formats.base import NoLayout, Placed
from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.containers.safetensors import WeightFile
from mmconvert.formats.hf import scaled
from mmconvert.formats.hf.bin import METADATA
from mmconvert.formats.hf.folder import HFCheckpoint, open_hf
from mmconvert.formats.hf.output import new_files, with_dtype
from mmconvert.formats.hf.side import hf_side, hf_target
from mmconvert.formats.hf.sides import SideFiles, side_files
from mmconvert.formats.mm.instances import Instance, instances
from mmconvert.formats.mm.source import as_stored_in_hf
from mmconvert.formats.reading import watched
from mmconvert.names import EXPERT, NO_LAYER, number, summarise
from mmconvert.plan.build import build, in_dtype
from mmconvert.plan.plan import Block, Key, Side, Whole, matrix
from mmconvert.result import Result
from mmconvert.run import Conversion
from mmconvert.stored import StoredTensor
from mmconvert.words import parse_size

DEFAULT_SIZE = "4GB"  # of a weight file, as MindSpeed-MM's moe_expert has it
CONFIG = Path("config.json")
# A float32 buffer, as the model's classes have it: in fewer bits it would choose other experts.
CORRECTION_BIAS = ".e_score_correction_bias"
STYLES = {"transformers4": INPUTS_FIRST, "transformers5": OUTPUTS_FIRST}


@dataclass(frozen=True)
class Experts:
    """The experts of a checkpoint in one form.

    Attributes:
        form: SINGLE, INPUTS_FIRST or OUTPUTS_FIRST.
        flat: stacked ones lie one below the other in a matrix.
        module: their table.
        tensors: by the names of the table; of flat ones the stacks that they stand for.
    """

    form: str
    flat: bool
    module: Module
    tensors: Mapping[str, StoredTensor]


@watched
def moe_expert(
    cfg: MoEExpert, options: Options | None = None, events: Events | None = None
) -> Result:
    """Merges, splits or transposes the experts of a Hugging Face checkpoint.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = Conversion("moe_expert", cfg, cfg.save_dir, options, events)
    check_apart(cfg.save_dir, [cfg.hf_dir])
    checkpoint = open_hf(cfg.hf_dir)
    stacks = stacks_of(checkpoint.config)
    dims = stacks.dims(checkpoint.config)
    tensors = checkpoint.tensors()
    if run.options.dequantize:
        tensors = scaled.dequantised(tensors, checkpoint.config, cfg.hf_dir)
    tensors = {stacks.full_name(name): t for name, t in tensors.items()}
    found = _found(stacks, dims, checkpoint, tensors)
    form = _asked(cfg, found)
    module = stacks.module(checkpoint.config, form)
    flat = stacks.flat and cfg.style == "merge"
    others = {name: t for name, t in tensors.items() if name not in found.tensors}

    src = _with_others(hf_side([found.module], dims, found.tensors, transposed=True), others)
    src = as_stored_in_hf(src, [module])
    expected = _expected(module, dims, found)
    names = _Names(stacks, cfg.style)
    dst = _with_others(hf_side([module], dims, expected), others)
    dst = hf_target(dst, in_dtype(src.wholes, run.cast))
    dst.targets = [
        t._replace(name=names.written(t.name), stack=() if flat else t.stack) for t in dst.targets
    ]
    order = [names.written(name) for name in [*others, *expected]]
    sides = side_files(checkpoint.folder, checkpoint.read)
    notes = [*checkpoint.notes, *scaled.note(tensors), *sides.notes(), *names.notes(tensors)]
    plan = build(src, dst, notes, run.cast)
    run.prove(plan)

    limit = parse_size(run.options.max_shard_size or DEFAULT_SIZE)
    images = new_files(_in_order(checkpoint, order), plan.targets, limit, indexed=True)
    new_config = bool(run.cast) or run.options.dequantize
    images += _side_images(checkpoint, sides, run.cast if new_config else None)
    result = Result(
        cfg.save_dir, False, plan, NoLayout(), 0.0, tuple(images), not_copied=sides.left
    )
    about = {"kind": "hf", "style": cfg.style}
    return run.write(result, Placed(side=dst), about, [cfg.hf_dir])


# ------------------------------------------------------------------------------- what is read


def _found(
    stacks: Stacks, dims: Dims, checkpoint: HFCheckpoint, tensors: Mapping[str, StoredTensor]
) -> Experts:
    """The experts as the checkpoint has them.

    Raises:
        FormError: quantised weights, an adapter and the like.
        TensorError: no experts, or in two forms; or tensors of experts that have no place.
    """
    config, folder = checkpoint.config, checkpoint.folder
    before, after = stacks.prefix.split("{}")
    mine = {n: t for n, t in tensors.items() if n.startswith(before) and f"{after}." in n}
    known = {form: hf_templates((stacks.module(config, form),)) for form in (SINGLE, INPUTS_FIRST)}
    forms = [form for form in known if any(known[form].find(name) for name in mine)]
    if fault := _unusable(known[forms[0]].find if forms else None, tensors, mine, config, folder):
        raise fault
    if len(forms) != 1:
        what = "no experts" if not forms else "experts of their own and merged ones"
        raise TensorError(
            f"{folder} holds {what} under {stacks.prefix.replace('{}', 'N')}",
            "one form for the experts of all layers",
            "take all weight files from one checkpoint",
        )
    lost = [name for name in mine if not known[forms[0]].find(name)]
    if lost:
        raise TensorError(
            f"{number(lost, 'tensor')} among the experts with no place: {summarise(lost)}",
            "gate_proj, up_proj and down_proj of each expert, or gate_up_proj and down_proj of all",
        )
    if forms == [SINGLE]:
        return Experts(SINGLE, False, stacks.module(config, SINGLE), mine)
    flat = {len(t.shape) for t in mine.values()} == {2}
    key = stacks.module(config, INPUTS_FIRST).key
    seen = {name: _as_stack(t, dims[f"{key}.experts"]) for name, t in mine.items()}
    shapes = {name: t.shape for name, t in seen.items()}
    form = orientation(shapes, dims[f"{key}.hidden"], dims[f"{key}.expert_ffn"])
    return Experts(form, flat, stacks.module(config, form), seen)


def _unusable(
    find: Callable[[str], object] | None,
    tensors: Mapping[str, StoredTensor],
    mine: Mapping[str, StoredTensor],
    config: Mapping[str, object],
    folder: Path,
) -> FormError | None:
    """Why the tensors are no plain weights; all but experts may have any name."""

    def known(name: str) -> bool:
        if name in mine:
            return find is not None and bool(find(name))
        return not is_mark(name)

    return unusable(tensors, known, config, folder)


def _as_stack(tensor: StoredTensor, experts: int) -> StoredTensor:
    """A merged tensor with a dimension for its experts; others as they are, to be refused."""
    if len(tensor.shape) != 2 or tensor.shape[0] % experts or tensor.strides is not None:
        return tensor
    rows, cols = tensor.shape
    return tensor._replace(shape=(experts, rows // experts, cols))


def _asked(cfg: MoEExpert, found: Experts) -> str:
    """The form that is asked for.

    Raises:
        RequestError: the experts have it already, or the style leads from another form.
    """
    single = found.form == SINGLE
    if cfg.style == "merge" and not single:
        raise RequestError(
            f"the experts of {cfg.hf_dir} are merged already",
            "a checkpoint with a tensor for each expert",
            "--style transformers4 or transformers5 changes how merged experts are stored",
        )
    if cfg.style != "merge" and single:
        what = "split already" if cfg.style == "split" else "not merged"
        raise RequestError(
            f"the experts of {cfg.hf_dir} are {what}: each has tensors of its own",
            "a checkpoint with merged experts",
            "--style merge merges them",
        )
    if cfg.style in STYLES and found.form == STYLES[cfg.style] and not found.flat:
        raise RequestError(
            f"the experts of {cfg.hf_dir} are stored as {cfg.style} has them already",
            "a checkpoint whose experts are stored in another way",
        )
    if cfg.style == "split":
        return SINGLE
    return STYLES.get(cfg.style, INPUTS_FIRST)


def _with_others(side: Side, others: Mapping[str, StoredTensor]) -> Side:
    """The side with all other tensors, each whole and by its own name."""
    for name, tensor in others.items():
        block = Block(len(side.stored), 0, 0, 0, 0, *matrix(tensor.shape))
        kept = name.endswith(CORRECTION_BIAS)
        whole = Whole(tensor.shape, tensor.dtype, [[block]], keeps_dtype=kept)
        side.wholes[Key(name, NO_LAYER)] = whole
        side.stored.append(tensor._replace(name=name))
    return side


# ---------------------------------------------------------------------------- what is written


class _Names:
    """Names as they are written: ``stacks`` in a ``style``."""

    def __init__(self, stacks: Stacks, style: str) -> None:
        self.stacks, self.style = stacks, style

    def written(self, name: str) -> str:
        """The name in the output for a full name."""
        return name.removeprefix(self.stacks.inner) if self.style == "merge" else name

    def notes(self, names: Iterable[str]) -> list[str]:
        """What is worth knowing of names that change."""
        inner = self.stacks.inner
        if self.style != "merge" or not any(name.startswith(inner) for name in names if inner):
            return []
        return [
            f"names lose {inner} in front, as MindSpeed-MM's merged checkpoints have them; "
            "every other style gives it back"
        ]


def _expected(module: Module, dims: Dims, found: Experts) -> dict[str, StoredTensor]:
    """The experts to be written by name, as if they were stored, in the order of their files:
    layer by layer, expert by expert, gate, up, down.
    """
    like = next(iter(found.tensors.values()))
    key = module.key
    count = dims[f"{key}.experts"]
    items = instances([module], {key: dims[f"{key}.layers"]}, {key: count})
    made: dict[str, StoredTensor] = {}
    for item in sorted(items, key=_place):
        for name, template, size in zip(item.hf_names(), item.row.hf, item.row.rows, strict=True):
            shape = (dims[size], dims[item.row.cols])
            shape = shape[::-1] if item.row.transposed else shape
            stack = () if EXPERT in template else (count,)
            made.setdefault(name, like._replace(name=name, shape=(*stack, *shape), strides=None))
    return made


def _place(item: Instance) -> tuple[int, int]:
    return item.layer, item.expert


def _in_order(checkpoint: HFCheckpoint, names: list[str]) -> HFCheckpoint:
    """A checkpoint to be written, of tensors in this order."""
    first = checkpoint.files[0]
    like = first.tensors[0]
    files = [
        WeightFile(
            first.path, b"", METADATA | first.metadata, [like._replace(name=n) for n in names]
        )
    ]
    return replace(checkpoint, files=files)


def _side_images(checkpoint: HFCheckpoint, sides: SideFiles, cast: str | None) -> list[FileImage]:
    """The files beside the weights, copied; config.json anew where the weights changed."""
    folder = checkpoint.folder
    reading.note(folder / path for path in sides.copied)
    return [
        small(str(path), with_dtype(folder / path, cast))
        if path == CONFIG and cast is not None
        else FileImage(str(path), (folder / path).stat().st_size, copied=folder / path)
        for path in sides.copied
    ]
