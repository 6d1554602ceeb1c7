"""Qwen's tokenizer: byte-pair merges by the ranks of ``qwen.tiktoken``, in plain Python.

Source of pattern and special tokens: the hub's ``tokenization_qwen.py`` and MindFormers 1.3.1
``research/qwenvl/qwenvl_tokenizer.py``.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path

from mmconvert.errors import CheckpointError, FormatError
from mmconvert.runtime.qwenvl.sizes import Positions

MOST_BYTES, MOST_TOKENS = 64 << 20, 1 << 20  # Qwen's file has 2.5 MB and 151 643 tokens
END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, IMAGE_END, SLOT = "<img>", "</img>", "<imgpad>"
# In the order of their ids, which follow those of the ranks.
SPECIAL = (
    END, START_TURN, END_TURN, *(f"<|extra_{i}|>" for i in range(205)),
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", IMAGE, IMAGE_END, SLOT,
)  # fmt: skip

# Of a text in which all numbers are "0": there [^\W\d_] are the letters.
LETTER = r"[^\W\d_]"
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    rf"|(?:(?!{LETTER})[^\r\n0])?{LETTER}+|0| ?(?:(?![\s0]|{LETTER}).)+[\r\n]*|\s*[\r\n]+"
)
# The hub's pattern leaves the last space of a run to the word behind it. In MindFormers' a line
# break got into that part, which never fits since.
PATTERN: dict[Positions, re.Pattern[str]] = {
    "hub": re.compile(PIECES + r"|\s+(?!\S)|\s+", re.DOTALL),
    "mindformers": re.compile(PIECES + r"|\s+", re.DOTALL),
}
NOT_SPACE = "".join(map(chr, range(0x1C, 0x20)))  # spaces for Python, not for Unicode


class Tokenizer:
    """Text to ids and back.

    Attributes:
        special: special token -> id.
    """

    def __init__(self, ranks: dict[bytes, int], kind: Positions = "hub") -> None:
        self._ranks, self._pattern = ranks, PATTERN[kind]
        self._bytes = {rank: token for token, rank in ranks.items()}
        self.special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
        self._special = {number: token for token, number in self.special.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
        self._merged = lru_cache(maxsize=1 << 16)(self._merge)

    @staticmethod
    def read(path: Path, kind: Positions = "hub") -> Tokenizer:
        """From a ranks file: lines of a token in base64 and its rank.

        Raises:
            CheckpointError: it cannot be read; FormatError: it is no such file.
        """
        return Tokenizer(_ranks(path), kind)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are themselves."""
        found: list[int] = []
        for part in self._split.split(unicodedata.normalize("NFC", text)):
            if part in self.special:
                found.append(self.special[part])
                continue
            for piece in self._pieces(part):
                found += self._merged(piece.encode("utf-8", "replace"))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; one beyond the vocabulary is nothing, half a character U+FFFD."""
        parts = (self._bytes.get(i) or self._special.get(i, "").encode() for i in ids)
        return b"".join(parts).decode("utf-8", "replace")

    def _pieces(self, text: str) -> Iterator[str]:
        """The pieces in which merges stay."""
        plain = "".join(map(_plain, text))
        return (text[m.start() : m.end()] for m in self._pattern.finditer(plain))

    def _merge(self, piece: bytes) -> tuple[int, ...]:
        """Merges neighbours, the pair of the lowest rank first, the leftmost of equals.

        Raises:
            FormatError: a byte has no rank.
        """
        if (whole := self._ranks.get(piece)) is not None:
            return (whole,)
        parts: list[bytes | None] = [piece[i : i + 1] for i in range(len(piece))]
        after = [*range(1, len(parts) + 1)]
        before = [*range(-1, len(parts) - 1)]

        def candidate(i: int) -> tuple[int, int, bytes] | None:
            j = after[i]
            pair = (parts[i] or b"") + (parts[j] or b"") if i >= 0 and j < len(parts) else b""
            rank = self._ranks.get(pair)
            return None if rank is None else (rank, i, pair)

        queue = [c for i in range(len(parts)) if (c := candidate(i)) is not None]
        heapify(queue)
        while queue:
            found = heappop(queue)
            i = found[1]
            if parts[i] is None or candidate(i) != found:  # one of the two has changed since
                continue
            gone = after[i]
            parts[i], parts[gone], after[i] = found[2], None, after[gone]
            if after[i] < len(parts):
                before[after[i]] = i
            for near in (before[i], i):
                if near >= 0 and (new := candidate(near)) is not None:
                    heappush(queue, new)
        try:
            return tuple(self._ranks[part] for part in parts if part is not None)
        except KeyError as error:
            raise FormatError(
                f"the tokenizer has no token for {error.args[0]!r}",
                "all 256 bytes among its ranks",
                "copy qwen.tiktoken of the model again",
            ) from None


def _plain(char: str) -> str:
    """A character as the pattern is to see it."""
    if char in NOT_SPACE:
        return "\0"
    return "0" if unicodedata.category(char)[0] == "N" else char


def _ranks(path: Path) -> dict[bytes, int]:
    try:
        with path.open("rb") as file:
            lines = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}", "the ranks of Qwen's tokenizer",
            "download qwen.tiktoken from the model's page, and give it with --vocab_file",
        ) from None  # fmt: skip
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines.splitlines() if len(lines) <= MOST_BYTES else ()):
        words = line.split()
        try:
            token, rank = base64.b64decode(words[0], validate=True), int(words[1])
        except (IndexError, ValueError, binascii.Error):
            raise FormatError(
                f"{path}, line {number + 1}: no token and rank", "lines such as 'IQ== 0'"
            ) from None
        if token in ranks or rank != number or len(words) != 2 or number == MOST_TOKENS:
            raise FormatError(
                f"{path}, line {number + 1}: rank {rank} of {token!r:.40}",
                "each token once, ranks from 0 on",
            )
        ranks[token] = rank
    if not ranks:
        raise FormatError(f"{path} holds no ranks", "a file such as Qwen's qwen.tiktoken")
    return ranks
