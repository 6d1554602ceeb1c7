"""The real MindSpore, on the CPU, in an interpreter of its own, as a process that answers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

PYTHON = os.environ.get("MMCONVERT_MINDSPORE_PYTHON", "")
ORACLE = Path(__file__).parent / "with_mindspore" / "mindspore_oracle.py"
MARKS = [
    pytest.mark.mindspore,
    pytest.mark.skipif(
        not PYTHON, reason="MMCONVERT_MINDSPORE_PYTHON names no interpreter with MindSpore"
    ),
]


@functools.cache
def oracle() -> subprocess.Popen[str]:
    """A process that has MindSpore imported; it ends with ours, when its input does."""
    return subprocess.Popen(
        [os.path.abspath(PYTHON), str(ORACLE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "GLOG_v": "3"},
    )


def ask(*words: str | Path) -> dict[str, Any]:
    """An answer of the oracle."""
    process = oracle()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        head, _, answer = line.partition(" ")
        if head == "ANSWER":
            found = json.loads(answer)
            assert "error" not in found, found["error"]
            return found
    raise AssertionError(f"MindSpore ended with {process.wait()}")
