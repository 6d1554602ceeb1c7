"""Lines that are read without tyro mean what they mean to tyro."""

from __future__ import annotations

from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmconvert.cli import parsing, plain
from mmconvert.cli.arguments import Screen
from mmconvert.cli.commands import DCP_VERBS, LORA_VERBS, MS_VERBS, VERBS
from mmconvert.cli.spelling import flag_paths, normalise
from mmconvert.config import Options
from mmconvert.errors import RequestError
from nights import examples

ALL = VERBS | LORA_VERBS | DCP_VERBS | MS_VERBS
FORMS = sorted({form for form, _, _ in ALL.values()})
WORDS = [
    *("None", "none", "True", "False", "true", "yes", "0", "1", "007", "1_0", " 1", "٣", "1e3"),
    *("3.5", ".5", "inf", "nan", "[1]", "[[0,1],[4,4]]", "[]", "[1,[2]]", "[1.0]", "1", "x"),
    *("a b", "a=b", "~/x", ".", "keep", "bf16", "ckpt", "first", "[1", '"', "{}", "null"),
]


def class_of(form: str) -> type:
    module, _, name = form.partition(".")
    return getattr(
        import_module(f"mmconvert.config.{module}" if module != "mm" else "mmconvert.config"), name
    )


def parts_of(form: str) -> list[plain.FlagPart]:
    return [
        plain.FlagPart(class_of(form), "--cfg.", switches=False),
        plain.FlagPart(Options, "--", switches=True),
        plain.FlagPart(Screen, "--", switches=True),
    ]


def by_tyro(form: str, words: list[str]) -> list[Any]:
    return list(parsing.command([p.form for p in parts_of(form)], words, "p", "d", bare=False))


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A verb's form and flags of it, most with a word that fits their type."""
    form = draw(st.sampled_from(FORMS))
    flags: dict[str, Any] = flag_paths(class_of(form))
    own = {**flag_paths(Options, "-"), **flag_paths(Screen, "-")}
    needed = [flag for flag, kind in flags.items() if flag.endswith(("_dir", "_path"))]
    some = draw(st.lists(st.sampled_from([*flags, *own]), unique=True, max_size=5))
    words: list[str] = []
    for flag in dict.fromkeys([*needed, *some]):
        kind = {**flags, **own}[flag]
        fitting = [str(x) for x in get_args(kind) if not isinstance(x, type)]
        word = draw(st.sampled_from([*fitting, *fitting, *WORDS]))
        alone = flag in own and kind is bool and draw(st.integers(0, 9)) > 0
        words += [flag] if alone else [flag, word]
    return form, words


@examples(20, nightly=60)
@given(lines())
def test_what_is_plain_means_the_same_to_tyro(line: tuple[str, list[str]]) -> None:
    form, words = line
    try:
        normal = normalise(words, class_of(form))
    except RequestError:
        return
    found = plain.read(parts_of(form), normal)
    if found is not None:
        assert found == by_tyro(form, normal)


@pytest.mark.parametrize(("form", "example"), [(f, e) for f, _, e in ALL.values()])
def test_the_examples_of_help_are_plain(form: str, example: str) -> None:
    words = normalise([*example.split(), "--overwrite", "--drop", "a", "--drop=b"], class_of(form))
    found = plain.read(parts_of(form), words)
    assert found is not None
    assert found == by_tyro(form, words)
    assert is_dataclass(found[0]) and found[1].overwrite and found[1].drop == ("a", "b")


@pytest.mark.parametrize(
    "words",
    [
        ["--cfg.mm_dir", "a"],  # one is missing
        ["--cfg.mm_dir", "a", "--cfg.hf_config.hf_dir"],
        ["--cfg.mm_dir", "a", "b", "--cfg.hf_config.hf_dir", "c"],
        ["--cfg.mm_dir", "a", "--cfg.hf_config.hf_dir", "c", "--cfg.mm_dir", "d"],
        ["--cfg.mm_dir", "a", "--cfg.hf_config.hf_dir", "c", "--cfg.no", "d"],
        ["--cfg.mm_dir", "a", "--cfg.hf_config.hf_dir", "c", "--workers", "x"],
        ["--cfg.mm_dir", "a", "--cfg.hf_config.hf_dir", "c", "--workers", "-1"],
        ["--cfg.mm_dir", "a", "--cfg.hf_config.hf_dir", "c", "-h"],
        ["d", "--cfg.mm_dir", "a", "--cfg.hf_config.hf_dir", "c"],
    ],
)
def test_mistakes_and_questions_are_left_to_tyro(words: list[str]) -> None:
    assert plain.read(parts_of("mm.HFToMM"), words) is None
