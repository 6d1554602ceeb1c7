"""Pages of the documents: their fenced blocks, and how those are run."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from cli import standing_in
from commands import install
from inprocess import run_into

ROOT = Path(__file__).parents[1]
# "0.04 s" and "231.6 MB/s", padded or not; what a dry run says of this machine
TIMES = re.compile(
    r"\b\d+\.\d+ s\b(, [\d.]+ [kMG]B/s)?|[\d.]+ [kMGT]B free|at most about [\d.]+ [MG]B"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language and text."""

    language: str
    text: str


class Step(NamedTuple):
    """A command of a console block, the output shown for it, and its exit code."""

    command: str
    output: str
    code: int


def blocks(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a document, all or those in some languages."""
    found = [Block(*match.groups()) for match in FENCE.finditer(path.read_text(encoding="utf-8"))]
    return [b for b in found if not languages or b.language in languages]


def steps(console: str) -> list[Step]:
    """The commands of a console block. ``echo $?`` gives the exit code of the one before it."""
    found: list[Step] = []
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        last = next(i for i, line in enumerate(lines) if not line.endswith("\\"))
        command = "\n".join(lines[: last + 1])
        output = "\n".join(lines[last + 1 :]).strip()
        if command == "echo $?":
            found[-1] = found[-1]._replace(code=int(output))
        else:
            found.append(Step(command, output, 0))
    return found


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, with an mm-convert and a python that have the code under test."""
    shim = folder.parent / "bin"
    if not shim.is_dir():
        install(shim)
        python = shim / "python"  # no link: a virtual environment is known by the path of its own
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{shim}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def told(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of a console block: one of mm-convert alone in this process."""
    if not command.startswith("mm-convert ") or set(command) & set("|&;<>$`*?~{}"):
        return shell(command, folder)
    words = shlex.split(command.replace("\\\n", " "))
    with pytest.MonkeyPatch.context() as patch, standing_in(folder):
        patch.setenv("COLUMNS", "100")
        screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        code = run_into(screen, screen, words[1:])
        screen.seek(0)
        return subprocess.CompletedProcess(words, code, screen.read())


def commands(bash: str) -> list[str]:
    """A bash block's commands, if each is a line of its own that changes nothing for the next."""
    lines = [line for line in re.split(r"(?<!\\)\n", bash) if line and not line.startswith("#")]
    return lines if all(re.match("(mm-convert|diff|cmp) ", line) for line in lines) else [bash]


def same_output(shown: str, got: str) -> None:
    got = "\n".join(line.rstrip() for line in got.splitlines())  # tables are padded
    assert TIMES.sub("TIME", got.strip()) == TIMES.sub("TIME", shown.strip())


def run_block(block: Block, folder: Path) -> None:
    """Runs a bash or console block; fails if it does not do what the document says."""
    if block.language == "bash":
        for command in commands(block.text):
            done = told(command, folder)
            assert done.returncode == 0, f"{command}\n{done.stdout}"
        return
    for step in steps(block.text):
        done = told(step.command, folder)
        assert done.returncode == step.code, f"{step.command}\n{done.stdout}"
        same_output(step.output, done.stdout)
