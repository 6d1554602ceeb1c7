"""Is a MindSpore checkpoint of Qwen-VL the model of a Hugging Face folder?

Both sides are computed here, one after the other, so that one model is in memory at a time; that
these computations are MindFormers' and the hub's is what the tests hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.errors import RequestError
from mmconvert.names import number, summarise
from mmconvert.runtime.device import device
from mmconvert.runtime.pictures import drawn_picture
from mmconvert.runtime.processes import Emit
from mmconvert.runtime.qwenvl import prompts, weights
from mmconvert.runtime.qwenvl.answer import DTYPES, RANKS, generate
from mmconvert.runtime.qwenvl.model import QwenVLModel
from mmconvert.runtime.qwenvl.prompts import Prompt
from mmconvert.runtime.qwenvl.sizes import QUERIES, Positions, Sizes
from mmconvert.runtime.qwenvl.tokenizer import Tokenizer
from mmconvert.runtime.verdict import TOLERANCE, Check, Parting, ValidationReport

PROMPT = "What is in this picture?"
GREEDY = 20  # tokens that are generated on both sides


def validate(
    checkpoint: Path,
    hf_dir: Path,
    vocab: Path | None,
    words: str,
    pictures: Sequence[Path],
    dtype: str,
    tolerance: float,
    like: Positions,
    note: Emit,
) -> ValidationReport:
    """Runs a MindSpore checkpoint and a Hugging Face folder on the same inputs.

    Raises:
        MMConvertError: a checkpoint is missing or damaged, or the inputs do not fit the model.
    """
    if not 0 <= tolerance < 1:
        raise RequestError(f"--tolerance is {tolerance}", "a number from 0 to 1")
    sizes = weights.sizes_of(hf_dir, like)
    asked, about = _question(sizes, vocab or hf_dir / RANKS, words, pictures, note)
    stored, differing = _compare(sizes, checkpoint, hf_dir, note)
    where, kind = device(), DTYPES[dtype]
    asked = asked.rows(1, where)
    ours = _outputs(weights.load(sizes, checkpoint, kind, where), asked)
    theirs = _outputs(weights.load(sizes, hf_dir, kind, where, stored=stored), asked)
    limit = tolerance or TOLERANCE[dtype, False]
    checks = [
        Check("weights", float(len(differing)), 0.0, summarise(differing) if differing else "")
    ]
    checks += [_check(name, ours[name], theirs[name], limit) for name in ("vision", "logits")]
    checks += [
        _check("loss", ours["loss"], theirs["loss"], limit),
        Check("greedy tokens", float((ours["greedy"] != theirs["greedy"]).sum()), 0.0),
    ]
    parting = None
    if not all(check.passed for check in checks):
        parting = _parting(ours, theirs, limit)
    narrow = {str(kind).removeprefix("torch.") for kind in stored.values()}
    notes = [f"weights of the Hugging Face folder as {', '.join(sorted(narrow))}, as stored here"]
    return ValidationReport("complete, in one process", about, dtype, checks, parting, notes)


def _compare(
    sizes: Sizes, checkpoint: Path, hf_dir: Path, note: Emit
) -> tuple[dict[str, torch.dtype], list[str]]:
    """The checkpoint's dtypes, and the names of tensors whose values differ, rounded to these."""
    empty = weights.skeleton(sizes, torch.float32)
    both = zip(
        weights.tensors(empty, checkpoint, note), weights.tensors(empty, hf_dir, note), strict=True
    )
    stored: dict[str, torch.dtype] = {}
    differing: list[str] = []
    for (name, one), (_, other) in both:
        stored[name] = one.dtype
        if not torch.equal(one, other.to(one.dtype)):
            differing.append(name)
    return stored, differing


def _question(
    sizes: Sizes, vocab: Path, words: str, pictures: Sequence[Path], note: Emit
) -> tuple[Prompt, str]:
    """What to compute on, and in words what it is."""
    asked: list[prompts.PictureOrFile] = [*pictures] or [drawn_picture()]
    what = number(pictures, "picture") if pictures else "a built-in picture"
    try:
        text = prompts.written(words or PROMPT, len(asked))
        found = prompts.prompt(Tokenizer.read(vocab, sizes.positions), sizes, text, asked)
    except RequestError:
        raise
    except Exception as error:  # the folder has no tokenizer, or another one
        if words or pictures:
            raise
        note(f"{getattr(error, 'what', error)}; computing on made-up ids")
        ids = torch.arange(QUERIES + 40)[None] * 7919 % sizes.vocab
        slots = torch.stack((torch.zeros(QUERIES).long(), torch.arange(10, QUERIES + 10)), -1)
        pixels = prompts.pixels_of(drawn_picture(), sizes)[None]
        return Prompt(ids, pixels, slots[None]), "made-up ids and a built-in picture"
    return found, f"{found.ids.shape[1]} tokens: {what}, {words or PROMPT!r}"


@torch.no_grad()
def _outputs(model: QwenVLModel, asked: Prompt) -> dict[str, Tensor]:
    """What the model makes of a prompt: each layer's output, then the results."""
    found: dict[str, Tensor] = {}

    def keep(label: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            found[label] = out.float().cpu()

        hooks.append(module.register_forward_hook(hook))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    visual = model.transformer.visual
    for n, block in enumerate(visual.transformer.resblocks):
        keep(f"vision layer {n}", block)
    keep("resampler", visual.attn_pool)
    keep("vision", visual)
    for n, layer in enumerate(model.transformer.h):
        keep(f"text layer {n}", layer)
    logits = model(asked.ids, asked.pixels, asked.slots)
    for handle in hooks:
        handle.remove()
    found["logits"] = logits.cpu()
    found["loss"] = F.cross_entropy(logits[0, :-1], asked.ids[0, 1:]).cpu()
    tokens = generate(model, asked, GREEDY, set(), lambda _: None)
    return {**found, "greedy": torch.tensor(tokens)}


def _check(name: str, one: Tensor, other: Tensor, limit: float) -> Check:
    return Check(name, _relative(one, other), limit)


def _relative(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


def _parting(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float) -> Parting | None:
    for label, one in ours.items():
        if label not in ("loss", "greedy") and not _relative(one, theirs[label]) <= limit:
            difference = float((one - theirs[label]).abs().max())
            return Parting(label, difference, float(theirs[label].abs().max()), [0])
    return None
