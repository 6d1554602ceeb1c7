"""The keys of modules stand in the families' tables alone; all else asks a module for its role,
its medium or its flags.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmconvert.converters import BUILT_IN, MINDSPORE

PACKAGE = Path(__file__).parents[2] / "mmconvert"
TABLES = {f"{name.partition('.')[2].replace('.', '/')}.py" for name in BUILT_IN.values()}
TABLES |= {f"{name.partition('.')[2].replace('.', '/')}.py" for name in MINDSPORE.values()}
TABLES |= {"converters/blocks.py", "converters/stacks.py"}  # rows that tables share

# As words, and as parts of names. "audio" is a medium too: as a key it stands in quotes.
KEY = re.compile(r"(?<![A-Za-z])(?:vit|llm)(?![A-Za-z])|[\"']audio[\"']", re.IGNORECASE)

# Spellings of the reference's and our own flags, and keys of config.json and model.json.
SPELLINGS = re.compile(
    r"(?:llm|vit)_pp_layers"
    r"|vit_tp(?:_size)?\b"
    r"|save_vit_only"
    r"|llm_hf_dir"
    r"|--?vit[-_](?:qkv|tp)|vit_qkv|vit-qkv-concatenated"
    r"|llm_config|llm_model|(?:llm|vit)_hidden_size|qwen2vit"
)

# file or folder -> why the words may stand there
ALLOWED = {
    "playground/": "makes checkpoints as other programs do, with sizes by their words",
    "modeljson/file.py": "where MindSpeed-MM's own file has which flag's list",
    "cli/tools/answering.py": "files of pictures and sounds that a question is about",
    "cli/tools/generate.py": "as before",
    "runtime/samples.py": "the marks of files in conversations, and the keys of data files",
}


def found(package: Path) -> list[str]:
    """Where a key stands that should not."""
    out: list[str] = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name in TABLES or name.startswith(tuple(ALLOWED)):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if KEY.search(SPELLINGS.sub("", line)):
                out.append(f"{name}:{number}: {line.strip()}")
    return out


def test_no_key_of_a_module_outside_the_tables() -> None:
    assert found(PACKAGE) == []


@pytest.mark.parametrize("name", ALLOWED)
def test_no_exception_is_left_over(name: str) -> None:
    place = PACKAGE / name
    files = place.rglob("*.py") if place.is_dir() else [place]
    assert any(KEY.search(SPELLINGS.sub("", f.read_text(encoding="utf-8"))) for f in files)


@pytest.mark.parametrize(
    "line",
    ['grids["llm"]', "if key != 'audio':", "vit_only: bool", "# the ViT's", "x = llm.layers"],
)
def test_a_key_is_seen(line: str, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(line)
    assert found(tmp_path) == [f"one.py:1: {line}"]


def test_a_flag_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("--cfg.parallel_config.llm_pp_layers, --vit-qkv, <audio>")
    assert found(tmp_path) == []
