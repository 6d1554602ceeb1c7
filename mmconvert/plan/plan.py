"""The plan: a list of copies of rectangles, proven complete before a byte moves. No torch.

A *whole* is an MM tensor before it is divided. Each side of a conversion (a checkpoint that
exists, or one to be written) says which rectangle of which of its tensors is which rectangle
of which whole (:class:`Block`). A plan joins two sides in the space of wholes; that is all
that HF -> MM, MM -> HF, MM -> MM and verification are.

Tensors are matrices here: rows = the first dimension, columns = the product of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from mmconvert.names import NO_EXPERT, fill
from mmconvert.stored import StoredTensor, Target


class Key(NamedTuple):
    """A whole tensor: the template of its MM name, its layer in the model and its expert there."""

    mm: str
    layer: int
    expert: int = NO_EXPERT

    def name(self) -> str:
        """The MM name with the model's layer number and the layer's expert number."""
        return fill(self.mm, self.layer, self.expert)


class Block(NamedTuple):
    """A rectangle of a side's tensor, and the rectangle of the whole that it is."""

    tensor: int
    row: int
    col: int
    whole_row: int
    whole_col: int
    rows: int
    cols: int


def exchanged(block: Block) -> Block:
    """The same rectangle where tensor and whole are transposed."""
    tensor, row, col, whole_row, whole_col, rows, cols = block
    return Block(tensor, col, row, whole_col, whole_row, cols, rows)


class UnstoredBlock(NamedTuple):
    """A rectangle of a whole that no tensor of a side stores."""

    row: int
    col: int
    rows: int
    cols: int


@dataclass
class Whole:
    """One whole tensor as a side holds it.

    Attributes:
        shape, dtype: of the whole; the dtype may be a joint one (see ``plan.dtypes``).
        copies: complete sets of blocks. The first is the original; further ones are replicas
            (tensor-parallel ranks, tied embeddings), equal to it by meaning.
        zeros: what no tensor of this side stores: it is zero.
        mixed: which tensors have which dtype, in words, where the dtype is a joint one.
        keeps_dtype: no cast touches it.
    """

    shape: tuple[int, ...]
    dtype: str
    copies: list[list[Block]] = field(default_factory=list[list[Block]])
    zeros: list[UnstoredBlock] = field(default_factory=list[UnstoredBlock])
    mixed: str = ""
    keeps_dtype: bool = False


class Scaled(NamedTuple):
    """A stored matrix that is multiplied with a factor on its way into a whole.

    Attributes:
        key: the whole; it has zeros there.
        term: the matrix and its factor; its blocks refer to the side's tensors.
        blocks: the rectangles of the product in the whole.
    """

    key: Key
    term: Term
    blocks: list[Block]


@dataclass
class Side:
    """One checkpoint of a conversion, and the wholes that its tensors form.

    Attributes:
        stored: the tensors of a checkpoint that exists; blocks refer to them by number.
        targets: the tensors of one that is to be written; a side has the one or the other.
        stacks: shapes as they are stored of those ``stored`` that are seen as matrices here,
            whose rows are those of all experts one below the other.
        scaled: of ``stored``, what does not lie in a whole as it is.
        rounded: pairs of ``stored``, weights and fp32 values, that are equal once these are
            rounded; nothing is written unless they are.
    """

    stored: list[StoredTensor] = field(default_factory=list[StoredTensor])
    targets: list[Target] = field(default_factory=list[Target])
    wholes: dict[Key, Whole] = field(default_factory=dict[Key, Whole])
    stacks: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    scaled: list[Scaled] = field(default_factory=list[Scaled])
    rounded: list[Comparison] = field(default_factory=list["Comparison"])


class Copy(NamedTuple):
    """A rectangle of source tensor ``src`` that goes to a rectangle of target ``dst``."""

    src: int
    src_row: int
    src_col: int
    dst: int
    dst_row: int
    dst_col: int
    rows: int
    cols: int


class Comparison(NamedTuple):
    """Rectangles of two tensors that must hold the same bytes (``dst`` indexes ``others``)."""

    key: Key
    copy: Copy


class Zeros(NamedTuple):
    """A rectangle of a tensor that is filled with zeros, or must hold zeros."""

    key: Key
    tensor: int
    row: int
    col: int
    rows: int
    cols: int


class Term(NamedTuple):
    """What an adapter adds to a weight: ``scale * B @ A``, a matrix that is stored nowhere.

    Attributes:
        name: of the module, for messages.
        a, b: the rectangles of sources that form A [rank, columns] and B [rows, rank]; without
            any of A it is B alone that is scaled and added.
        rank: of the adapter.
        rows, cols: of the product.
        scale: the factor.
        transposed: the product is seen transposed.
        magnitude: the source that DoRA scales each row to; -1 for none.
    """

    name: str
    a: tuple[Block, ...]
    b: tuple[Block, ...]
    rank: int
    rows: int
    cols: int
    scale: float
    transposed: bool = False
    magnitude: int = -1

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product as it is seen."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)


@dataclass
class Plan:
    """What a conversion does.

    Attributes:
        sources: tensors that are read.
        targets: tensors that are written.
        copies: every rectangle that moves.
        replicas: rectangles of sources that must be equal; both indexes are sources.
        notes: what is left out or worth knowing, in words.
        fills: rectangles of targets that are filled with zeros.
        zeros: rectangles of sources that have no place in the targets, as they must be zero.
        cast: the dtype that floating-point tensors are cast to; "" leaves each as it is.
        kept: targets that are not cast.
        terms: what adapters add to weights.
        products: rectangles of terms (``src``) that are added to rectangles of targets.
        replaced: rectangles of sources that others stand in the place of.
        fitted: sources that take the dtype of their targets.
        rounded: rectangles of sources, weights and fp32 values that must be equal once rounded.
    """

    sources: Sequence[StoredTensor]
    targets: Sequence[Target]
    copies: list[Copy]
    replicas: list[Comparison]
    notes: list[str] = field(default_factory=list[str])
    fills: list[Zeros] = field(default_factory=list[Zeros])
    zeros: list[Zeros] = field(default_factory=list[Zeros])
    cast: str = ""
    kept: set[int] = field(default_factory=set[int])
    terms: list[Term] = field(default_factory=list[Term])
    products: list[Copy] = field(default_factory=list[Copy])
    replaced: list[Zeros] = field(default_factory=list[Zeros])
    fitted: set[int] = field(default_factory=set[int])
    rounded: list[Comparison] = field(default_factory=list[Comparison])

    @property
    def nbytes(self) -> int:
        """Bytes that will be written as tensor data."""
        return sum(t.nbytes for t in self.targets)


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor of this shape."""
    if len(shape) == 2:  # most are, and plans ask a million times
        return shape[0], shape[1]
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
