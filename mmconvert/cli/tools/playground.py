"""The command ``playground``: the small checkpoints that the pages of the documentation use."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.words import amount, one_line

TEXT = """Writes a folder of small checkpoints to try the commands on: every family, MM
checkpoints as training leaves them, faulty ones, an adapter, a data set. They have the tensors and
layers of real models, but narrow ones. It takes a few seconds, and no torch.

example:
  mm-convert playground play"""


@dataclass(frozen=True)
class PlaygroundFlags:
    """Where to."""

    path: tyro.conf.Positional[Path]
    """The folder to make."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    quiet: bool = False
    """Print nothing but errors."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Writes the playground, and says what is in it."""
    asked = read_plain(PlaygroundFlags, words, "mm-convert playground", TEXT)
    from mmconvert.playground.folder import ITEMS, make_playground

    began = time.monotonic()
    size = make_playground(asked.path)
    if asked.json:
        found = {"output": str(asked.path), "bytes": size}
        print(json.dumps(found | {"items": {i.name: i.about for i in ITEMS}}))
    elif not asked.quiet:
        print(one_line(f"wrote {asked.path}: {amount(size)} in {time.monotonic() - began:.2f} s"))
        for item in ITEMS:
            print(f"  {item.name:<12} {item.about}")
        print(one_line(f"next: cd {quote(str(asked.path))}, then mm-convert inspect hf"))
    return 0
