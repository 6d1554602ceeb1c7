"""Qwen's tokenizer and prompts against those that MindFormers recorded."""

from __future__ import annotations

import base64
import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import qwenvlgolden as golden
from mmconvert.errors import FormatError
from mmconvert.runtime.qwenvl import prompts
from mmconvert.runtime.qwenvl.sizes import Sizes
from mmconvert.runtime.qwenvl.tokenizer import SPECIAL, Tokenizer

PROMPTS: dict[str, Any] = json.loads((golden.FOLDER / "prompts.json").read_text())["bytes"]
RANKS = golden.FOLDER / "bytes.tiktoken"
SMALL = Sizes(482, 256, 4, 3, 176, 64, 4, 2, 128, side=56)


def test_special_tokens_have_their_ids() -> None:
    found = Tokenizer.read(RANKS).special
    assert len(SPECIAL) + 256 == PROMPTS["n"]
    assert {token: found[token] for token in PROMPTS["special"]} == PROMPTS["special"]
    assert found["<|endoftext|>"] == PROMPTS["pad_token_id"]


@pytest.mark.parametrize("text", PROMPTS["text"])
def test_texts_as_mindformers_reads_them(text: str) -> None:
    tokenizer = Tokenizer.read(RANKS, "mindformers")
    assert tokenizer.encode(text) == PROMPTS["text"][text]
    assert tokenizer.decode(PROMPTS["text"][text]) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("name", PROMPTS["predict"])
def test_prompts_as_mindformers_makes_them(name: str) -> None:
    recorded = PROMPTS["predict"][name]
    found = prompts.encode(Tokenizer.read(RANKS, "mindformers"), recorded["text"])
    assert found == recorded["ids"]
    pos = prompts.slots_of(torch.tensor([found]), Tokenizer.read(RANKS).special["<imgpad>"])
    assert pos[0, 0].tolist() == recorded["img_pos_first_last"][0][:2]


def naive(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """Merges as they are defined: look at all pairs, join the best, begin again."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=2, max_size=5), max_size=12, unique=True),
    st.text("ab", min_size=1, max_size=24),
)
def test_merges_are_those_of_the_definition(merges: list[str], text: str) -> None:
    tokens = [bytes([i]) for i in range(256)] + [word.encode() for word in merges]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if text.encode() in ranks:
        assert Tokenizer(ranks).encode(text) == [ranks[text.encode()]]
    else:
        assert Tokenizer(ranks).encode(text) == naive(ranks, text.encode())


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab'sStTlL12²½ⅷ \n\r\t\x1c_.,-é中文\u0301\u00a0\u1680ªſ\u200b\U0001f600", max_size=12)
)
def test_pieces_are_those_of_the_hubs_pattern(text: str) -> None:
    regex = pytest.importorskip("regex")  # comes with transformers
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer.read(RANKS)
    assert list(tokenizer._pieces(text)) == regex.findall(pattern, text)
    assert "".join(tokenizer._pieces(text)) == text


@pytest.mark.parametrize(
    "lines", ["", "IQ==", "IQ== x", "I! 0", "IQ== 1", "IQ== 0\nIQ== 1", "IQ== 0\nIg== 0"]
)
def test_files_that_hold_no_ranks(lines: str, tmp_path: Path) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_text(lines)
    with pytest.raises(FormatError) as error:
        Tokenizer.read(path)
    assert str(path) in error.value.what


def test_a_byte_without_a_rank_is_an_error() -> None:
    ranks = {base64.b64decode("IQ=="): 0}
    assert Tokenizer(ranks).encode("!") == [0]
    with pytest.raises(FormatError):
        Tokenizer(ranks).encode("?")


def test_pictures_are_prepared_as_mindformers_does() -> None:
    for number in (0, 1):
        picture = Image.fromarray(golden.arrays()[f"in_{number}"])
        found = prompts.pixels_of(picture, SMALL)
        expected = torch.from_numpy(golden.arrays()[f"predict_{number}"])
        assert float((found - expected).abs().max()) < 1e-6


def test_pictures_stand_where_the_words_put_them() -> None:
    tags = "Picture {}: <img></img>\n"
    assert prompts.written("Same?", 2) == tags.format(1) + tags.format(2) + "Same?"
    assert prompts.written("This <image>\nor <image>?", 2) == (
        f"This {tags.format(1)}or {tags.format(2)}?"
    )
