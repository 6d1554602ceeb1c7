"""The padded vocabulary: rows of zeros below the word embedding and the output layer, in MM only.

Megatron pads the vocabulary until tensor-parallel ranks can share it; Hugging Face does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from mmconvert.converters.rows import Module, decoder_of, vocabulary_of
from mmconvert.errors import RequestError
from mmconvert.names import number
from mmconvert.plan.plan import Key, Side, UnstoredBlock


def vocabulary_keys(side: Side, modules: Sequence[Module]) -> list[Key]:
    """The wholes of a side with a row for each word."""
    words = (vocabulary_of(decoder_of(modules)),)
    rows = {r.mm for m in modules for r in m.all_rows() if r.rows == words}
    return [key for key in side.wholes if key.mm in rows]


def pad_vocabulary(side: Side, modules: Sequence[Module], rows: int) -> int:
    """Adds rows of zeros, which no tensor of this side stores, to its wholes.

    Args:
        rows: of each in all; those that have as many already stay as they are.

    Returns:
        the number of rows added to each.
    """
    added = 0
    for key in vocabulary_keys(side, modules):
        whole = side.wholes[key]
        first, *rest = whole.shape
        if first < rows:
            whole.zeros.append(UnstoredBlock(first, 0, rows - first, prod(rest)))
            whole.shape = (rows, *rest)
            added = rows - first
    return added


def padded_size(words: int, to: int, divisible_by: int, tp: int) -> int:
    """The rows that are asked for.

    Args:
        words: rows of Hugging Face.
        to: ``--cfg.pad_vocab_to``; 0 if not given.
        divisible_by: ``--cfg.make_vocab_size_divisible_by``; 0 if not given.
        tp: the tensor-parallel size, by which Megatron multiplies it.

    Raises:
        RequestError: both are given, or fewer rows than there are.
    """
    if to and divisible_by:
        raise RequestError(
            "--cfg.pad_vocab_to and --cfg.make_vocab_size_divisible_by are both given",
            "one of them",
        )
    for flag, value in (("pad_vocab_to", to), ("make_vocab_size_divisible_by", divisible_by)):
        if value < 0:
            raise RequestError(f"--cfg.{flag} is {value}", "a number of rows, from 1 on")
    if divisible_by:
        step = divisible_by * tp
        return -(-words // step) * step
    if to < words:
        raise RequestError(
            f"--cfg.pad_vocab_to {to}: the vocabulary has {words} rows", f"a number from {words} on"
        )
    return to


def in_words(keys: Sequence[Key], words: int, rows: int, done: str) -> str:
    """What is done with the rows of zeros, for a note."""
    where = " and ".join(key.mm.split(".")[-2] for key in keys)
    count = number(range(rows - words), "row")
    return f"the vocabulary of {words} is padded to {rows}: {count} of zeros {done} {where}"
