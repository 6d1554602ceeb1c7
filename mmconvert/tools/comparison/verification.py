"""Are two checkpoints the same model? Compared through the plan, streaming, nothing written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.config import Options
from mmconvert.errors import DifferenceError, MMConvertError
from mmconvert.events import Events
from mmconvert.executor import compare
from mmconvert.executor.differences import TensorDifference
from mmconvert.formats import manifest
from mmconvert.formats.adapters import holds_adapter
from mmconvert.formats.reading import steady
from mmconvert.names import number, summarise
from mmconvert.plan.build import build_comparison
from mmconvert.plan.plan import Key, Side
from mmconvert.tools.comparison.pairing import open_pair
from mmconvert.tools.comparison.states import differing, leave_out_steps


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison.

    Attributes:
        tensors: number of whole tensors compared.
        nbytes: bytes of each side that were compared, replicas included.
        differences: at most one for each pair of stored tensors; empty if the models are equal.
        unequal: names of whole tensors whose digests differ, where only these were compared.
        by_digest: whether only the digests of both manifests were compared.
        training: in what training would go on otherwise, in words, where optimizer state was
            compared.
    """

    tensors: int
    nbytes: int
    differences: list[TensorDifference]
    unequal: tuple[str, ...] = ()
    by_digest: bool = False
    training: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether the two are the same model."""
        return not self.differences and not self.unequal and not self.training


# What a comparison of digests takes on trust, in words.
UNSEEN = (
    "bytes that changed while size, times and inode stayed, such as by a failing disk; "
    "verify without --quick reads every byte"
)


def verify_quickly(
    a: Path, b: Path, options: Options | None = None, events: Events | None = None
) -> Verdict:
    """Compares the digests in both manifests; the tensors where that is not possible.

    Raises:
        MMConvertError: as :func:`verify`.
    """
    events = events or Events()
    if options is not None and options.optimizer:
        events.note("groups and schedule of an optimizer have no digests: all tensors are compared")
        return verify(a, b, options, events)
    found: list[dict[str, str]] = []
    for folder in (a, b):
        digests, why_not = manifest.digests(folder)
        if digests is None:
            events.note(f"{why_not}: all tensors are compared")
            return verify(a, b, options, events)
        found.append(digests)
    left, right = found
    if left.keys() != right.keys():
        events.note("the manifests describe different forms of the model: all tensors are compared")
        return verify(a, b, options, events)
    unequal = tuple(name for name in left if left[name] != right[name])
    return Verdict(len(left), 0, [], unequal, by_digest=True)


@steady
def verify(
    a: Path, b: Path, options: Options | None = None, events: Events | None = None
) -> Verdict:
    """Compares every tensor of two checkpoints, HF or MM, in any layouts of one family.

    Raises:
        DifferenceError: tensors that are missing, or of another shape or dtype, in one of them.
        MMConvertError: a checkpoint that cannot be read.
    """
    options, events = options or Options(), events or Events()
    if holds_adapter(a) and holds_adapter(b):
        from mmconvert.tools.comparison.adapters import verify_adapters

        return verify_adapters(a, b, options, events)
    first, second = open_pair(a, b, options)
    leave_out_steps(first, second)
    left, right = first.side, second.side
    if all("--optimizer" in " ".join(one.model.notes) for one in (first, second)):
        events.note("both hold optimizer state, which is not compared: verify --optimizer does")
    _leave_out_text(left, right, events)
    _check_alike(a, b, left, right)
    pairs = build_comparison(left, right)
    nbytes = compare.comparison_bytes(pairs.equal, left.stored)
    events.start("comparing", nbytes)
    found = compare.compare(pairs.equal, left.stored, right.stored, options.workers, events.advance)
    found += compare.not_zero(pairs.zeros_a, left.stored)
    found += compare.not_zero(pairs.zeros_b, right.stored)
    otherwise = tuple(differing(first.training, second.training))
    return Verdict(len(left.wholes), nbytes, found, training=otherwise)


def _leave_out_text(left: Side, right: Side, events: Events) -> None:
    """Compares the encoders alone where one checkpoint was written with save_vit_only."""

    def text(side: Side) -> list[Key]:
        return [key for key in side.wholes if key.mm.startswith("text_decoder.")]

    if bool(text(left)) == bool(text(right)):
        return
    events.note("one checkpoint holds the encoders only (save_vit_only): only they are compared")
    for side in (left, right):
        for key in text(side):
            del side.wholes[key]


def _check_alike(a: Path, b: Path, left: Side, right: Side) -> None:
    """Raises DifferenceError where names, shapes or dtypes tell that the models differ."""
    for one, wholes, other, others in (
        (a, left.wholes, b, right.wholes),
        (b, right.wholes, a, left.wholes),
    ):
        absent = [key.name() for key in wholes if key not in others]
        if absent:
            raise DifferenceError(
                f"{number(absent, 'tensor')} of {one} not in {other}: {summarise(absent)}",
                "the same tensors in both",
            )
    odd = [
        (key.name(), one, other)
        for key, one in left.wholes.items()
        if ((other := right.wholes[key]).shape, other.dtype) != (one.shape, one.dtype)
    ]
    if odd:
        name, one, other = odd[0]
        raise DifferenceError(
            f"{number(odd, 'tensor')} of another shape or dtype, such as {name}: "
            f"{one.dtype} {list(one.shape)} in {a}, {other.dtype} {list(other.shape)} in {b}",
            "the same shapes and dtypes in both",
            f"mm-convert diff {a} {b} compares values across dtypes",
        )


def hint(a: Path, b: Path, verdict: Verdict, options: Options) -> str:
    """What else would make two checkpoints equal: vision q, k, v left uninterleaved."""
    keys = {d.key.mm for d in verdict.differences}
    if not keys or not all("image_encoder" in k and "linear_qkv" in k for k in keys):
        return ""
    order = "interleaved" if options.vit_qkv == "concatenated" else "concatenated"
    try:
        if verify(a, b, replace(options, vit_qkv=order)).differences:
            return ""
    except MMConvertError:  # the number of heads is not known
        return ""
    return (
        f"equal with --vit_qkv {order}: one of them leaves the vision encoder's q, k and v "
        "uninterleaved, as the reference tool 2.2.0 to 2.3.0 wrote them; "
        "fix it with resplit --vit_qkv concatenated"
    )
