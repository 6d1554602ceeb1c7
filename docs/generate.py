"""Writes the parts of the documentation that follow from the program: families, command line.

``python docs/generate.py`` writes them again; a test compares them with what is there.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from mmconvert import converters
from mmconvert.cli import main
from mmconvert.cli.commands import AUTO, TOOLS, verbs_of

ROOT = Path(__file__).parents[1]
COMMANDS, FAMILIES = ROOT / "docs" / "commands.md", ROOT / "docs" / "families.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
NARROW = "80"  # columns of the help shown


def families_table() -> str:
    """Each family with its converter, its formats, and whether the runtime runs it."""
    from mmconvert.runtime.families import CLASSES

    lines = ["| family | converter | `model_type` | formats | runs |", "|---|---|---|---|---|"]
    for name in (*converters.BUILT_IN, *converters.MINDSPORE):
        family = converters.load(name)
        types = sorted(family.model_types)
        formats = "Hugging Face, MindSpore" if name in converters.MINDSPORE else "Hugging Face, MM"
        runs = name in converters.MINDSPORE or any(t in CLASSES for t in types)
        kinds = ", ".join(f"`{t}`" for t in types)
        mark = "yes" if runs else "no"
        lines.append(f"| {family.name} | `{name}` | {kinds} | {formats} | {mark} |")
    return "\n".join(lines) + "\n"


def shown(*words: str) -> str:
    """What a command prints, on a terminal of 80 columns."""
    out = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = NARROW
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main(list(words))
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    text = "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())
    return f"```text\n{text}\n```\n"


def commands_page() -> str:
    """The help of every command. Conversions of one verb have the same flags in every family."""
    parts = ["# Command line\n\nThe help of every command, as `-h` prints it.\n", shown("-h")]
    parts.append("## Conversions\n")
    seen: set[str] = set()
    for converter in ("Qwen2VLConverter", "QwenVLConverter", AUTO):
        for verb in verbs_of(converter):
            heading = f"{converter} {verb}"
            if (verb in seen and converter == AUTO) or heading in seen:
                continue
            seen |= {verb, heading}
            parts += [f"### {heading}\n", shown(converter, verb, "-h")]
    parts.append("## Tools\n")
    for tool in TOOLS:
        parts += [f"### {tool}\n", shown(tool, "-h")]
    return "\n".join(parts)


def with_table(text: str) -> str:
    """A document whose table of families is the present one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("the marks of the table are missing")
    return before + BEGIN + families_table() + END + after


def pages() -> dict[Path, str]:
    """Every generated document and what it must hold."""
    found = {COMMANDS: commands_page()}
    for path in (FAMILIES, ROOT / "README.md", ROOT / "README.zh-CN.md"):
        found[path] = with_table(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
