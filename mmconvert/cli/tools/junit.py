"""JUnit files: the form of test results that CI systems show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from mmconvert.durable import replace_file
from mmconvert.errors import cannot_write


class Case(NamedTuple):
    """One test case.

    Attributes:
        name: of the case.
        seconds: wall time.
        failure: what went wrong; "" if nothing did.
        skipped: why it did not run; "" if it did.
    """

    name: str
    seconds: float
    failure: str = ""
    skipped: str = ""


def write_junit(path: Path, suite: str, cases: Sequence[Case]) -> None:
    """Writes the cases as one suite; the file is complete or not there.

    Raises:
        OutputError: it cannot be written.
    """
    root = ElementTree.Element(
        "testsuite",
        name=_plain(suite),
        tests=str(len(cases)),
        failures=str(sum(bool(case.failure) for case in cases)),
        skipped=str(sum(bool(case.skipped) for case in cases)),
        errors="0",
        time=f"{sum(case.seconds for case in cases):.3f}",
    )
    for case in cases:
        node = ElementTree.SubElement(
            root,
            "testcase",
            classname=_plain(suite),
            name=_plain(case.name),
            time=f"{case.seconds:.3f}",
        )
        if case.failure:
            first = case.failure.splitlines()[0]
            failure = ElementTree.SubElement(node, "failure", message=_plain(first))
            failure.text = _plain(case.failure)
        if case.skipped:
            ElementTree.SubElement(node, "skipped", message=_plain(case.skipped))
    try:
        replace_file(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
    except OSError as error:
        raise cannot_write(path, error) from error


_UNUSUAL = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, Char


def _plain(text: str) -> str:
    """Text without what XML cannot hold, such as control characters in a tensor's name."""
    return _UNUSUAL.sub("?", text)
