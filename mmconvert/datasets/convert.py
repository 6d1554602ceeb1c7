"""Converts an annotation file, item by item, into a file that is complete or not there."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from pathlib import Path

from mmconvert.datasets.jsonlist import read_items
from mmconvert.datasets.listwriter import ListWriter
from mmconvert.datasets.llava import KINDS, MEDIA, SHOWN, Converter, ItemCounts
from mmconvert.errors import DatasetError
from mmconvert.events import Events


@dataclass(frozen=True)
class DataResult:
    """What a conversion did.

    Attributes:
        output: the file.
        read, written: number of items.
        report: what was met.
        seconds: wall time.
    """

    output: Path
    read: int
    written: int
    report: ItemCounts
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """The outcome as JSON."""
        counts = self.report.counts
        kinds = (*MEDIA, "text_only", "mended", *KINDS)
        return {
            "output": str(self.output),
            "read": self.read,
            "written": self.written,
            **{kind: counts[kind] for kind in kinds},
            "examples": self.report.examples,
            "seconds": round(self.seconds, 3),
        }


def convert_file(
    source: Path,
    writer: ListWriter,
    converter: Converter,
    events: Events,
    *,
    none_found_is_ok: bool,
) -> DataResult:
    """Converts ``source`` into the file of ``writer``.

    Args:
        none_found_is_ok: whether to go on if items have images and none of them is there.

    Raises:
        DatasetError: the source is damaged, or its images are not there.
        OutputError: the output cannot be written.
    """
    began = time.monotonic()
    try:
        size = source.stat().st_size
    except OSError as error:
        fix = "check the path: the flags name the file" if error.errno == errno.ENOENT else ""
        what = f"{source}: {error.strerror}"
        raise DatasetError(what, "the file of annotations", fix) from error
    events.start("converting items", size)
    index = -1
    report = converter.report
    with writer:
        for index, item in enumerate(read_items(source, events.advance)):
            try:
                made = converter.convert(item, index)
                if made is not None:
                    writer.add(made, index)
            except DatasetError as error:
                raise DatasetError(f"{source}: {error.what}", error.expected, error.fix) from None
        some = any(report.counts[kind] for kind in MEDIA)
        if report.counts["missing"] and not some and not none_found_is_ok:
            raise DatasetError(
                f"{source}: items with images: {report.counts['missing']}, and none of the images "
                f"is there, such as that of {report.examples['missing'][0]}",
                "images below the folder that was given",
                "check that folder, or give --skip-missing to write the items without an image",
            )
        writer.commit()
    _warn(report, events)
    return DataResult(writer.target, index + 1, writer.count, report, time.monotonic() - began)


def _warn(report: ItemCounts, events: Events) -> None:
    for kind, (words, _) in KINDS.items():
        count = report.counts[kind]
        if count:
            more = f"; and {count - SHOWN} more" if count > SHOWN else ""
            words = words.replace("s ", " ", 1) if count == 1 else words  # 1 item, 2 items
            events.note(f"warning: {count} {words}: {'; '.join(report.examples[kind])}{more}")
