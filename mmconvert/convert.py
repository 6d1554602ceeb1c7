"""THE STORY: one conversion, whatever the formats. Newcomers start here.

It opens its source, makes both sides of the plan from one table, proves the plan, and only then
writes: into a staging folder that gets its final name when it is complete. ``directions`` has the
spellings of it, one for each command.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.family import Family
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.events import Events
from mmconvert.executor.apart import check_apart
from mmconvert.formats import manifest
from mmconvert.formats.base import Format, NoLayout, Opening, Placing, StoredCheckpoint
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.model import Model, idle_patterns
from mmconvert.formats.reading import watched
from mmconvert.formats.registry import load
from mmconvert.names import number, summarise
from mmconvert.plan.build import build, carry, in_dtype
from mmconvert.plan.padding import in_words, pad_vocabulary, padded_size, vocabulary_keys
from mmconvert.plan.plan import Side
from mmconvert.plan.products import ProductPlaces, merged
from mmconvert.plan.substitution import substituted
from mmconvert.request import Request, check_formats, with_given_dtype
from mmconvert.result import Result
from mmconvert.run import Conversion

# Megatron's load_checkpoint sets the iteration of a release to 0, and reads no schedule of it.
ANEW = (
    "to Megatron and MindSpeed-MM the result is a release, which starts at iteration 0 with a new "
    "schedule; mm-convert finetune goes on from iteration {}, and resplit --optimizer carries "
    "both over for all"
)


@watched
def convert(
    family: Family, asked: Request, options: Options | None = None, events: Events | None = None
) -> Result:
    """Brings a checkpoint from one format and layout to another.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    how = with_given_dtype(options or Options(), asked)
    run = Conversion(asked.command, asked.cfg or asked, asked.target.path, how, events)
    reader, writer = load(asked.source.format), load(asked.target.format)
    check_formats(family, run.options, reader, writer)
    check_apart(asked.target.path, _inputs(asked, writer))
    # Open.
    original, like = _original(family, asked, run.options, writer)
    told = Opening(
        family,
        run.options,
        layout=asked.source.layout,
        flags=asked.source.flags,
        like=like,
        claims=reader.name != writer.name or writer.claims(asked.target.layout),
        encoders_only=asked.encoders_only,
        canonical=asked.canonical,
        text_dir=asked.text_dir,
        part=asked.source.part,
    )
    source = reader.open(asked.source.path, told)
    _check_adapter(source, writer)
    if asked.untie:
        source, original = source.untied(), original and original.untied()
    # Plan.
    as_hf = writer.as_hf(family, asked.target.layout)
    src = source.side(as_hf=as_hf)
    src, means = _averaged(src, run.options, source, asked)
    places = ProductPlaces(source.model.plain_modules, src, source.model.dims, as_hf=as_hf)
    src, gone, new = substituted(src, places, asked.adapters)
    padded = _pad(src, source, asked)
    placing = Placing(
        source,
        in_dtype(src.wholes, run.cast),
        asked.target.path,
        asked.target.layout,
        asked.target.flags,
        run.options,
        run.cast,
        original,
    )
    placed = writer.place(placing)
    iteration = manifest.iteration(source.path, source.iteration)
    kept = iteration if source.format == writer.name else 0  # finetune goes on from there
    notes = [*_notes(run.options, source, original), *means, *padded, *placed.notes]
    if kept and writer.name == "mm" and not run.options.optimizer:
        notes.append(ANEW.format(kept))
    plan = build(src, placed.side, notes, run.cast)
    if asked.adapters:
        plan = replace(plan, replaced=gone, fitted=new)
        plan = merged(plan, placed.side, places, asked.adapters)
    if original is not None:
        plan = carry(plan, original.model.carried)
    # Prove.
    run.prove(plan)
    # Write.
    images = tuple(writer.lay_out(plan.targets, placed, placing))
    layout = placed.layout or source.layout or NoLayout()
    models = [source.model] if original is None else [original.model, source.model]
    result = Result(
        asked.target.path,
        False,
        plan,
        layout,
        0.0,
        images,
        {why: names for model in models for why, names in model.dropped.items()},
        carried=tuple(t.name for t in models[0].carried),
        not_copied=placed.not_copied,
    )
    about = {"kind": writer.name, **_about(source.model, result), **placed.about}
    if kept:
        about["iteration"] = kept
    inputs = [*_inputs(asked, writer), *source.inputs]
    return run.write(result, placed, about, inputs)


def _pad(src: Side, source: StoredCheckpoint, asked: Request) -> list[str]:
    """Pads the vocabulary of what is read, if that is asked for; says so in a note."""
    layout, (to, divisible_by) = asked.target.layout, asked.vocabulary
    if not (to or divisible_by):
        return []
    keys = vocabulary_keys(src, source.model.modules)
    if not keys:
        raise RequestError(
            "the vocabulary cannot be padded: no word embedding is written",
            "a model with its text decoder",
        )
    words = src.wholes[keys[0]].shape[0]
    tp = (layout.tp_size if isinstance(layout, ParallelConfig) else 1) or 1
    rows = padded_size(words, to, divisible_by, tp)
    pad_vocabulary(src, source.model.modules, rows)
    return [in_words(keys, words, rows, "below")] if rows > words else []


def _averaged(
    src: Side, options: Options, source: StoredCheckpoint, asked: Request
) -> tuple[Side, list[str]]:
    """Takes the mean of an adapter's copies that differ, if that is asked for; and a note of it."""
    if options.replicas != "mean" or asked.adapters:
        return src, []
    if source.model.adapter is None:
        raise RequestError(
            f"--replicas mean is for adapters; {source.path} is a model",
            "an adapter in MM format, whose copies may differ after training",
            "--replicas first takes the first copy of each tensor",
        )
    from mmconvert.formats.mm.means import averaged

    return averaged(src)


def _check_adapter(source: StoredCheckpoint, writer: Format) -> None:
    """Raises CheckpointError for an adapter where a model is to be written."""
    if source.model.adapter is not None and writer.name not in ("mm", "peft"):
        raise CheckpointError(
            f"{source.path} holds an adapter alone, no model",
            "the weights of a whole model",
            "lora_mm_to_hf makes a PEFT adapter of it, lora_merge adds it to its base model",
        )


def _original(
    family: Family, asked: Request, options: Options, writer: Format
) -> tuple[StoredCheckpoint | None, Model | None]:
    """The original checkpoint, where the output is made like it; and its model."""
    if writer.needs_original and asked.original is None and asked.source.format != "hf":
        raise RequestError(
            f"{asked.command} needs the original checkpoint: its files, names and tokenizer",
            "the folder of the original model",
            "give --cfg.hf_config.hf_dir",
        )
    if writer.needs_original:
        folder = asked.original or asked.source.path
        found = load("hf").open(folder, Opening(family, options))
        return found, found.model
    if asked.original is not None and asked.original != asked.source.path:
        return None, config_model(family, asked.original)
    return None, asked.like


def _inputs(asked: Request, writer: Format) -> list[Path]:
    """The files and folders that are read, so that none is written to."""
    found = [asked.source.path]
    found += [asked.original] if asked.original and writer.needs_original else []
    found += [asked.text_dir] if asked.text_dir else []
    strategies = [getattr(end.layout, "strategy", None) for end in (asked.source, asked.target)]
    return found + [path for path in strategies if path is not None]


def _notes(
    options: Options, source: StoredCheckpoint, original: StoredCheckpoint | None
) -> list[str]:
    """What is worth knowing of what is read."""
    notes = [] if original is None else list(original.model.notes)
    models = [source.model] if original is None else [original.model, source.model]
    notes += [*source.model.notes, *idle_patterns(options, *models)]
    names = [tensor.name for tensor in models[0].carried]
    if original is not None:
        what = "copied from hf_dir"
    else:
        what = "stays in hf_dir and returns" if len(names) == 1 else "stay in hf_dir and return"
        what += " from it"
    notes = list(dict.fromkeys(notes))  # the source may be the original
    return notes + ([f"{number(names, 'tensor')} {what}: {summarise(names)}"] if names else [])


def _about(model: Model, result: Result) -> dict[str, object]:
    """What a manifest says of the model; no family if none claims its tensors."""
    about: dict[str, object] = {"layout": result.layout.as_dict()}
    if model.adapter is not None:
        about["lora"] = model.adapter.settings.as_dict()
    if not model.modules:
        return about
    return about | {
        "converter": model.family.converter,
        "family": model.family.name,
        "variant": {
            "tied": model.variant.tied,
            "canonical": model.variant.canonical,
            "traits": sorted(model.variant.traits),
        },
        "save_vit_only": all(m.role == "encoder" for m in model.modules),
        "dims": model.true_dims,
    }
