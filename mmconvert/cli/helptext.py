"""Help as it is shown: tyro's text without its boxes, laid out for the terminal."""

from __future__ import annotations

import re
from textwrap import TextWrapper

FRAME = re.compile(r"^[│╭╰](─ )?|( ─+)?[│╮╯]$")  # where the terminal has such characters
RULE = re.compile(r" *[-─]{3,} *$")  # below a title, between parts
# A value that stands for "not given" is told by what the flag says of it.
NOTHING = re.compile(r" \(default: (None|none|''|)\)")
OPTIONAL = re.compile(r"\{None\}\|(\S+)")
WIDTH = 100
BLOCK = re.compile(r"^.*\n(?:^ {4,}\S.*\n)*|.+\Z", re.MULTILINE)  # a line and those below it
ENTRY = re.compile(r"  (?P<term>\S+(?: \S+)*)(?:  +(?P<about>.*))?")


def arranged(text: str, width: int) -> str:
    """A help text for a terminal of this width: flags on the left, what they do on the right.

    tyro breaks a line wherever a docstring does, and leaves what stands above the flags as it is.
    """
    width = min(WIDTH, width)
    left = min(24, width // 3)
    fill = TextWrapper(width=width, break_long_words=False, break_on_hyphens=False)
    lines: list[str] = []
    for block in BLOCK.findall(text):
        first, *rest = block.rstrip("\n").split("\n")
        entry = ENTRY.fullmatch(first)
        if entry is None or not (entry["about"] or rest):  # a title, a paragraph, an example
            long = not first.startswith((" ", "usage: "))
            lines += fill.wrap(first) if long and first else [first]
            lines += rest
            continue
        term = OPTIONAL.sub(r"\1", entry["term"])
        about = " ".join([entry["about"] or "", *rest])
        about = NOTHING.sub("", " ".join(about.split()))
        if " " not in term:  # a switch
            about = about.removesuffix(" (default: False)")
        beside = f"  {term}  ".ljust(left) if len(term) + 4 <= left else " " * left
        lines += [f"  {term}"] * (not beside.strip())
        inner = TextWrapper(width=width, break_long_words=False, break_on_hyphens=False,
                            initial_indent=beside, subsequent_indent=" " * left)  # fmt: skip
        lines += inner.wrap(about) or [f"  {term}"]
    return "\n".join(lines)


def unboxed(text: str) -> str:
    """A text of tyro's without its frames and rules: the title of each frame begins a paragraph."""
    lines: list[str] = []
    given = unframed(text)
    for line, below in zip(given, [*given[1:], ""], strict=True):
        if RULE.match(line):
            continue
        if RULE.match(below) and re.match(r" \S", line):
            lines += ["", f"{line.strip()}:"] if lines and lines[-1] else [f"{line.strip()}:"]
        else:
            lines.append(line.rstrip())
    return "\n".join(lines)


def unframed(text: str) -> list[str]:
    """The lines of a text of tyro's without its frames."""
    return [FRAME.sub("", line).rstrip() for line in text.splitlines()]
