"""The rank files of an MM checkpoint: read in full, each with its own fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mmconvert.causes.downloads import LFS, POINTER
from mmconvert.errors import CheckpointError, FormatError, FormError
from mmconvert.formats.containers.ptfile import PtFile, read_pt
from mmconvert.formats.mm.folder import EXTRA_STATE, RANK_FILE, part_names, rank_parts
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import StoredTensor
from mmconvert.tools.doctor.folder import COPY, Ranks
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import line, operand

AGAIN = "copy the file again from the machine that wrote it"
_END = b"PK\5\6"  # how the directory's last record begins; a comment of 64 KiB may follow it

Parts = dict[str, dict[str, StoredTensor]]


def read_rank_files(
    ranks: Ranks, listed: Mapping[str, int], report: DoctorReport
) -> dict[Chunk, dict[str, StoredTensor]]:
    """The tensors of every readable rank file that fits the others, by chunk."""
    files: dict[Rank, tuple[Path, Parts]] = {}
    states: dict[Path, int] = {}
    for rank, folder in ranks.paths.items():
        file = folder / RANK_FILE
        if not file.is_file():
            what = f"{folder} has no {RANK_FILE}"
            report.add("missing-rank-file", what, COPY, path=file)
            continue
        parts = read_rank_file(file, report, listed.get(folder.name, 0), states)
        if parts is not None:
            files[rank] = file, parts
            report.files += 1
    note_states(states, report)
    return _chunks(files, report)


def read_rank_file(
    file: Path, report: DoctorReport, size: int = 0, states: dict[Path, int] | None = None
) -> Parts | None:
    """The tensors of one rank file by the key of their chunk, or None.

    Args:
        size: its bytes as mmconvert.json lists them; 0 if it does not.
        states: receives the bytes of ``_extra_state`` entries.
    """
    pt = _opened(file, size, report)
    if pt is None:
        return None
    notes: dict[str, int] = {}
    try:
        parts = rank_parts(pt, notes)
    except (FormatError, FormError) as error:
        if isinstance(error, FormError) and report.has([error.cause]):  # the same in every rank
            report.more[error.cause] = report.more.get(error.cause, 0) + 1
        else:
            report.add_error("not-a-tensor", error, path=file)
        return None
    if states is not None and EXTRA_STATE in notes:
        states[file] = notes[EXTRA_STATE]
    try:
        part_names(file, parts)
    except FormatError as error:
        report.add("chunk-keys", f"{error.what}; expected: {error.expected}", AGAIN, path=file)
        return None
    report.tensors += sum(map(len, parts.values()))
    return parts


def _opened(file: Path, size: int, report: DoctorReport) -> PtFile | None:
    try:
        return read_pt(file)
    except FormatError as error:
        there = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(len(LFS))
            opened.seek(max(0, there - (1 << 16) - 22))
            ended = _END in opened.read()
        if head == LFS:
            lfs_pointer(file, report)
        elif head[:4] != b"PK\3\4":
            report.add("foreign-rank-file", error.what, error.fix or AGAIN, path=file)
        elif ended:
            report.add_error("damaged-rank-file", error, path=file)
        else:
            lack = f"mmconvert.json lists {size} bytes, so the last {size - there} are missing"
            report.add(
                "truncated-rank-file",
                f"{file} is cut off at byte {there}: "
                + (lack if size > there else "the directory that ends a .pt file is missing"),
                AGAIN,
                path=file,
            )
    except CheckpointError as error:
        report.add_error("cannot-read", error, path=file)
    return None


def lfs_pointer(file: Path, report: DoctorReport) -> None:
    """A weight file that git has not fetched."""
    report.add(
        "lfs-pointer",
        f"{file} is {POINTER}",
        "fetch the files with git LFS",
        path=file,
        command=line(["git", "-C", operand(file.parent), "lfs", "pull"]),
    )


def note_states(states: Mapping[Path, int], report: DoctorReport) -> None:
    """``_extra_state`` entries with data, by file."""
    if states:
        first, *others = states
        more = f" and {len(others)} more files" if others else ""
        report.add(
            "extra-state",
            f"{first}{more}: _extra_state entries with {sum(states.values())} bytes of data "
            "(Transformer Engine's, for FP8)",
            "nothing, if the weights are not FP8: a conversion leaves them out",
            path=first,
        )


def _chunks(
    files: Mapping[Rank, tuple[Path, Parts]], report: DoctorReport
) -> dict[Chunk, dict[str, StoredTensor]]:
    """All chunks, of the files that have the model chunks that most have."""
    keys = {rank: tuple(part_names(file, parts)) for rank, (file, parts) in files.items()}
    usual = Counter(keys.values()).most_common(1)
    chunks: dict[Chunk, dict[str, StoredTensor]] = {}
    for rank, (file, parts) in files.items():
        if keys[rank] != usual[0][0]:
            report.add(
                "chunk-keys-differ",
                f"{file} holds {', '.join(keys[rank])}; {usual[0][1]} of {len(files)} files hold "
                f"{', '.join(usual[0][0])}",
                "copy the rank files of one checkpoint here",
                path=file,
            )
            continue
        for virtual, name in enumerate(keys[rank]):
            chunks[Chunk(rank, virtual)] = parts[name]
    return chunks
