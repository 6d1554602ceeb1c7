"""Shell lines that mend: safe to print and to paste, whatever the names in them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmconvert.sharding.layout import Layout, grid_flag
from mmconvert.sharding.stages import show

TARGET = "--cfg.target_parallel_config."


def quote(word: str | os.PathLike[str]) -> str:
    """A word of a bash line. What cannot be printed is written as an escape: ``$'...'``."""
    text = os.fspath(word)
    if text.isprintable():
        return shlex.quote(text)
    shown = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{shown}'"


def line(words: Iterable[str | os.PathLike[str]]) -> str:
    """One command."""
    return " ".join(quote(word) for word in words)


def operand(path: Path) -> str:
    """A path as a command's argument: one that begins with a dash would be read as a flag."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def unused(path: Path, suffix: str) -> Path:
    """A path beside ``path`` that is not there yet: name and suffix, and a number if needed."""
    base = Path(os.path.abspath(path)) if path.name in ("", "..") else path
    number = 1
    while True:
        tail = suffix if number == 1 else f"{suffix}_{number}"
        made = base.with_name(base.name + tail)
        if not os.path.lexists(made):
            return made
        number += 1


def move_aside(paths: Sequence[Path], beside: Path) -> str:
    """Moves files or folders into a new folder beside ``beside``. Nothing is deleted."""
    aside = operand(unused(beside, "_aside"))
    return f"{line(['mkdir', aside])} && {line(['mv', *map(operand, paths), aside])}"


def write_tracker(tracker: Path, iteration: str) -> str:
    """Writes a tracker file."""
    return f"printf %s {quote(iteration)} > {quote(tracker)}"


def layout_words(layout: Layout) -> list[str]:
    """The flags of resplit for a layout."""
    words: list[str] = []
    for key, grid in layout.grids.items():
        words += [
            TARGET + grid_flag(key),
            show(grid),
            TARGET + layout.tp_flag(key),
            str(layout.tp[key]),
        ]
    return words + ([f"{TARGET}ep_size", str(layout.ep)] if layout.ep > 1 else [])


def resplit(
    converter: str,
    source: Path,
    layout: Layout,
    flags: Sequence[str],
    hf_dir: Path | None,
) -> str:
    """Writes the checkpoint anew, in its own layout, beside itself."""
    words = ["mm-convert", converter, "resplit", "--cfg.source_dir", operand(source)]
    words += ["--cfg.target_dir", operand(unused(source, "_mended"))]
    if hf_dir is not None:
        words += ["--cfg.hf_config.hf_dir", operand(hf_dir)]
    if not layout.decoder:
        words += ["--cfg.save_vit_only", "True"]
    return line([*words, *layout_words(layout), *flags])


def drop_flags(names: Iterable[str]) -> tuple[str, ...]:
    """``--drop`` for these names and no others."""
    words: list[str] = []
    for name in names:
        literal = "".join(f"[{c}]" if c in "*?[" else c for c in name)
        words += ["--drop", literal]
    return tuple(words)
