"""The zip archive that a ``.pt`` file is: its records, proved to be plain bytes that lie apart.

Rules: the zip specification (PKWARE APPNOTE 4.3, 4.4, 4.5).
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

from mmconvert import positioned
from mmconvert.errors import FormatError

USUAL_EXTRA = 192  # bytes: room for the padding that torch writes behind a record name
_COPY_AGAIN = "copy the file again from where it was made"


class Record(NamedTuple):
    """The data of one record: absolute offset and bytes."""

    start: int
    size: int


class Archive:
    """An open archive: a file, or a section of one.

    Args:
        path: its name, for messages.
        file: open for reading; must stay open.
        section: where the archive begins in the file, and its bytes; None is all of it.
    """

    def __init__(self, path: Path, file: BinaryIO, section: tuple[int, int] | None = None) -> None:
        self.path = path
        self.file = file
        self.base, self.size = section or (0, os.fstat(file.fileno()).st_size)
        self.section = section is not None

    def error(self, what: str, expected: str = "", fix: str = _COPY_AGAIN) -> FormatError:
        """What is wrong with the file."""
        return FormatError(
            f"{self.path}: {what}", expected or "a .pt file as torch.save writes it", fix
        )

    def pread(self, count: int, offset: int) -> bytes:
        """Bytes at a place. Raises FormatError when the file ends before."""
        offset += self.base
        data = positioned.pread(self.file.fileno(), count, offset)
        while len(data) < count:  # Linux returns at most 2 GiB, network mounts sometimes less
            more = positioned.pread(self.file.fileno(), count - len(data), offset + len(data))
            if not more:
                raise self.error("the file became shorter while it was read")
            data += more
        return data

    def check_start(self) -> None:
        """Tell what the file is when it is not a zip archive."""
        head = positioned.pread(self.file.fileno(), min(512, self.size), self.base)
        if not head:
            raise self.error("the file is empty")
        if head[:4] in (b"PK\3\4", b"PK\5\6"):
            return
        if head[:1] == b"\x80":
            raise self.error(
                "a pickle without an archive: the format of torch before 1.6",
                expected="the zip format",
                fix="re-save it: torch.save(torch.load(f, weights_only=True), f)",
            )
        kind = "a tar archive" if head[257:262] == b"ustar" else "not a zip archive"
        raise self.error(
            f"{kind} (begins with {head[:4]!r})",
            fix="copy it again from where it was made, if torch.save wrote it; files of other "
            "kinds are not read",
        )

    def opened(self) -> IO[bytes]:
        """What zipfile reads: the file, or the end of the section, where the directory stands."""
        return cast("IO[bytes]", _Section(self)) if self.section else self.file

    def read_directory(self) -> dict[str, Record]:
        """The records by name, proved to be plain bytes that lie apart inside the file."""
        try:
            # Only the directory at the end is read here.
            with zipfile.ZipFile(self.opened()) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except (
            # How zipfile and struct report a broken directory: wrong signatures and sizes,
            # versions from the future, undecodable names, seeks to absurd positions.
            zipfile.BadZipFile,
            NotImplementedError,
            struct.error,
            ValueError,
            OverflowError,
            EOFError,
            MemoryError,
            OSError,
        ) as error:
            raise self.error(
                f"no readable zip directory at the end of its {self.size} bytes ({error}); "
                "the file may be truncated"
            ) from error
        records: dict[str, Record] = {}
        before = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            name = info.orig_filename
            if name in records:
                raise self.error(f"record {name!r} occurs twice")
            if not before <= info.header_offset <= end:
                raise self.error(f"record {name!r} overlaps another one or is outside the file")
            self._check_gap(before, info.header_offset)
            records[name] = self._check_record(info, end)
            before = sum(records[name])
        self._check_gap(before, end)
        return records

    def checksums(self) -> list[tuple[int, int]]:
        """Where the checksums of the records stand, and what torch draws at random: what may differ
        between archives of one build. Places in the archive, and bytes there.

        The directory must have been read.
        """
        with zipfile.ZipFile(self.opened()) as archive:
            infos, at = archive.infolist(), archive.start_dir
        places: list[tuple[int, int]] = []
        for info in infos:  # in the order of the directory
            places += [(info.header_offset + 14, 4), (at + 16, 4)]
            at += 46 + sum(struct.unpack("<3H", self.pread(6, at + 28)))
            record = self._check_record(info, self.size)
            if info.flag_bits & 8 and self.pread(4, sum(record)) == b"PK\7\x08":
                places.append((sum(record) + 4, 4))
            if info.orig_filename.endswith("/.data/serialization_id"):
                places.append(record)
        return places

    def _check_gap(self, start: int, end: int) -> None:
        """Between a record's data and what follows lies nothing, or a data descriptor.

        Anything else means that the local header has a wrong length: the data lie elsewhere.
        """
        if end == start:
            return
        if end - start not in (16, 24) or self.pread(4, start) != b"PK\7\x08":
            raise self.error(f"{end - start} bytes at byte {start} belong to no record")

    def _check_record(self, info: zipfile.ZipInfo, end: int) -> Record:
        """Where a record's data lies, from its local header.

        The sizes of the local header are not looked at: torch leaves them zero and writes a data
        descriptor behind the data; readers take those of the directory.
        """
        name = info.orig_filename
        if info.flag_bits & 0x2041:  # encrypted, strongly encrypted, masked headers
            raise self.error(f"record {name!r} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise self.error(f"record {name!r} is compressed", expected="stored records")
        raw = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        start = info.header_offset
        if start > end - 30 - len(raw):
            raise self.error(f"record {name!r} is outside the file")
        header = self.pread(min(30 + len(raw) + USUAL_EXTRA, end - start), start)
        signature, flags, method, name_length, extra_length = struct.unpack_from(
            "<4s2x2H16x2H", header
        )
        named = header[30 : 30 + len(raw)]
        if signature != b"PK\3\4" or name_length != len(raw) or named != raw:
            raise self.error(f"record {name!r} has no local header at byte {start}")
        if flags & 0x2041 or method != zipfile.ZIP_STORED:
            raise self.error(f"record {name!r} is compressed or encrypted, by its local header")
        record = Record(start + 30 + name_length + extra_length, info.file_size)
        if sum(record) > end:
            raise self.error(f"record {name!r} reaches past the end of the file")
        extra = header[30 + len(raw) :][:extra_length]
        if len(extra) < extra_length:
            extra = self.pread(extra_length, start + 30 + name_length)
        if not _is_tiled(extra):
            raise self.error(f"record {name!r} has a local header with a broken extra field")
        return record


class _Section(io.RawIOBase):
    """A section of a file as a file of its own."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self.at, self.archive.size)[whence]
        if start + offset < 0:
            raise OSError("a seek before the start")
        self.at = start + offset
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(self.archive.size - self.at, 0)
        data = self.archive.pread(left if size < 0 else min(size, left), self.at)
        self.at += len(data)
        return data


def _is_tiled(extra: bytes) -> bool:
    """Whether an extra field is what the zip specification wants: blocks of id, size, data.

    torch pads records with such a block, so a changed length would shift the data unseen.
    """
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)
