"""Tied embeddings that are to be two tensors: the output layer begins as the word embedding is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmconvert.formats.containers.safetensors import WeightFile
from mmconvert.formats.model import Model
from mmconvert.narrow import is_object
from mmconvert.plan.plan import Key, Side

TIED = "tie_word_embeddings"


def ties(model: Model) -> dict[str, str]:
    """The tied rows of a model: MM name -> that of the row whose tensor it repeats."""
    return {r.mm: r.tied_to for m in model.modules for r in m.all_rows() if r.tied_to}


def untied_model(model: Model) -> Model:
    """The model with a table of two tensors."""
    keys = {module.key for module in model.modules}
    variant = replace(model.variant, tied=False)
    modules = tuple(m for m in model.family.table(variant) if m.key in keys)
    return replace(model, variant=variant, modules=modules)


def untied_side(side: Side, tied: Mapping[str, str]) -> Side:
    """A side in which what was tied is a whole of its own, with the values that it repeated.

    Args:
        tied: see :func:`ties`.
    """
    twins = {
        Key(head, key.layer, key.expert): replace(
            whole, copies=[list(blocks) for blocks in whole.copies], zeros=list(whole.zeros)
        )
        for head, origin in tied.items()
        for key, whole in side.wholes.items()
        if key.mm == origin
    }
    return replace(side, wholes={**side.wholes, **twins})


def untied_hf(model: Model) -> Model:
    """A Hugging Face model that is to have both tensors, in the weight file of the first."""
    hf = model.hf
    tied, found = ties(model), untied_model(model)
    if not tied or hf is None:
        return found
    names = {row.mm: row.hf[0] for module in found.modules for row in module.all_rows()}
    tensors, added = dict(model.hf_tensors), set[str]()
    files: list[WeightFile] = list(hf.files)
    for head, origin in ((names[mm], names[of]) for mm, of in tied.items()):
        if head in tensors:  # stored although tied
            continue
        old = tensors[origin]
        new = tensors[head] = old._replace(name=head)
        added.add(head)
        files = [
            file._replace(tensors=[*file.tensors, new]) if old in file.tensors else file
            for file in files
        ]
    hf = replace(hf, files=files, added=frozenset(added))
    return replace(found, hf=hf, hf_tensors=tensors)


def untied_config(config: Mapping[str, object]) -> dict[str, object]:
    """config.json that says so at the top, and wherever else it speaks of it."""
    found = {key: _said(value) for key, value in config.items()}
    return {**found, TIED: False}


def _said(value: object) -> object:
    if not is_object(value):
        return value
    return {key: False if key == TIED else _said(inner) for key, inner in value.items()}
