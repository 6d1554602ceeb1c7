"""The folders of an MM checkpoint: tracker file, iteration, one folder for each rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mmconvert.causes.folders import other_form
from mmconvert.errors import CheckpointError, FormatError
from mmconvert.formats.mm.folder import RANK_FILE, TRACKER, find_weights
from mmconvert.sharding.layout import Rank, parse_folder
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import move_aside, write_tracker

_ITERATION = re.compile(r"iter_(\d{7,12})")
NAMED = 5  # ranks that one message names
COPY = "copy the folder from the machine that wrote it; no other rank holds its weights"


class Ranks(NamedTuple):
    """The rank folders of one checkpoint.

    Attributes:
        folder: what holds them.
        paths: the folders that are there.
        tp, pp: how many there should be.
        whole: none is missing.
        suffix: their names have a pipeline part.
        listed: mmconvert.json is of these very files.
    """

    folder: Path
    paths: dict[Rank, Path]
    tp: int
    pp: int
    whole: bool
    suffix: bool
    listed: bool


def weights_folder(root: Path, report: DoctorReport) -> Path | None:
    """The folder of rank folders; where the tracker file is wrong, the one it should name."""
    tracker = root / TRACKER
    choices = [name for name in iterations(root) if has_ranks(root / name)]
    advised = choices[-1] if choices else ""
    expected = _tracker_word(advised)
    if not tracker.is_file():
        if has_ranks(root):
            return root
        if not advised:
            report.add(
                "no-checkpoint",
                f"{root} holds neither config.json nor {TRACKER} nor mp_rank_* folders",
                "check the path: a Hugging Face folder, or the --save folder of training",
                path=root,
            )
            return None
        report.add(
            "missing-tracker",
            f"{root} has {', '.join(choices[-NAMED:])} and no {TRACKER}",
            f"write {expected} into it",
            path=tracker,
            command=write_tracker(tracker, expected),
        )
        return root / advised
    try:
        folder, _ = find_weights(root)
    except CheckpointError as error:
        kind = "damaged-tracker" if isinstance(error, FormatError) else "dangling-tracker"
        fix = f"write {expected} into it: {advised} is there" if advised else error.fix
        command = write_tracker(tracker, expected) if advised else ""
        report.add(kind, error.what, fix, path=tracker, command=command)
        return root / advised if advised else None
    return folder


def _tracker_word(name: str) -> str:
    match = _ITERATION.fullmatch(name)
    return str(int(match[1])) if match else name


def iterations(root: Path) -> list[str]:
    """The names of iteration folders, the newest last, ``release`` before them."""
    found = [p.name for p in root.iterdir() if p.is_dir()]
    numbered = [name for name in found if _ITERATION.fullmatch(name)]
    numbered.sort(key=lambda name: int(_tracker_word(name)))
    return ["release"] * ("release" in found) + numbered


def has_ranks(folder: Path) -> bool:
    """Whether a folder holds any rank folder."""
    return any(parse_folder(path.name) for path in folder.iterdir())


def rank_folders(folder: Path, listed: Mapping[str, int], report: DoctorReport) -> Ranks | None:
    """The rank folders that belong together, and what is missing or too much.

    Args:
        listed: name of a rank folder -> bytes of its file, as mmconvert.json lists them.
    """
    found = {p.name: n for p in sorted(folder.iterdir()) if (n := _numbers(p, report))}
    if not found:
        if (fault := other_form(folder)) is not None:
            report.add_error("no-rank-folders", fault, path=folder)
            return None
        what = f"{folder} has no mp_rank_* folders"
        report.add("no-rank-folders", what, "copy the rank folders here", path=folder)
        return None
    if any(len(numbers) > 2 for numbers in found.values()):
        report.add(
            "expert-parallel",
            f"{folder} has expert-parallel ranks, such as {max(found, key=len)}",
            "only dense models are converted; mmconvert cannot read this checkpoint",
            path=folder,
        )
        return None
    found = _one_layout(folder, found, listed, report)
    paths = _one_for_each_rank(folder, found, report)
    suffix = len(next(iter(found.values()))) == 2
    known = _is_listed(folder, found, listed)
    expected = {rank for name in listed if known and (rank := _rank(name)) is not None}
    return _compared(folder, paths, expected, suffix, report)


def _numbers(path: Path, report: DoctorReport) -> tuple[int, ...]:
    parsed = parse_folder(path.name) if path.is_dir() else None
    if parsed is None:
        if path.name.startswith("mp_rank"):
            report.add(
                "misnamed-rank-folder",
                f"{path} is no rank folder by its name, and is not read",
                "give it a name such as mp_rank_00 or mp_rank_00_000, or move it away",
                path=path,
            )
        return ()
    return tuple(n for n in parsed if n is not None)


def _one_layout(
    folder: Path, found: dict[str, tuple[int, ...]], listed: Mapping[str, int], report: DoctorReport
) -> dict[str, tuple[int, ...]]:
    """The folders of one form of name; those of the other are another checkpoint's."""
    forms = {n: {k: v for k, v in found.items() if len(v) == n} for n in map(len, found.values())}
    if len(forms) == 1:
        return found
    plain, staged = forms[1], forms[2]
    by_list = [g for g in (plain, staged) if _is_listed(folder, g, listed)]
    complete = [g for g in (plain, staged) if _is_complete(g.values())]
    decided = by_list if len(by_list) == 1 else complete
    keep = decided[0] if len(decided) == 1 else max(staged, plain, key=len)
    other = plain if keep is staged else staged
    sure = len(decided) == 1
    fix = f"move {_some(other)} away: {_some(keep)} are the ones that belong together"
    report.add(
        "mixed-layouts",
        f"{folder} mixes the rank folders of two layouts: {_some(plain)} (without pipeline "
        f"stages), {_some(staged)} (with)",
        fix if sure else "move the older ones away; mmconvert cannot tell which they are",
        path=folder,
        command=move_aside([folder / name for name in other], _root(folder)) if sure else "",
    )
    return keep


def _root(folder: Path) -> Path:
    """Where set-aside folders may stand: outside the checkpoint."""
    inside = folder.name == "release" or _ITERATION.fullmatch(folder.name)
    return folder.parent if inside and folder.parent.name else folder


def _one_for_each_rank(
    folder: Path, found: dict[str, tuple[int, ...]], report: DoctorReport
) -> dict[Rank, Path]:
    paths: dict[Rank, Path] = {}
    for name in sorted(found, key=lambda name: (len(name), name)):
        rank = Rank(*found[name])
        if rank in paths:
            report.add(
                "duplicate-rank-folder",
                f"{folder} has two folders for tp {rank.tp} pp {rank.pp}: {paths[rank].name}, "
                f"{name}",
                f"move one away; training reads {paths[rank].name}",
                path=folder / name,
                command=move_aside([folder / name], _root(folder)),
            )
        else:
            paths[rank] = folder / name
    return paths


def _compared(
    folder: Path, paths: dict[Rank, Path], listed: set[Rank], suffix: bool, report: DoctorReport
) -> Ranks:
    """What is there against what should be: mmconvert.json, else the largest grid."""
    if listed:
        tp, pp = _size(listed)
        extra = sorted(paths.keys() - listed)
    else:
        tp, pp = _size(paths)
        inner_tp, inner_pp = _largest_grid(paths)
        extra = sorted(r for r in paths if r.tp >= inner_tp or r.pp >= inner_pp)
        # Few folders beyond a complete grid are leftovers; else the grid has holes.
        if len(extra) < tp * pp - len(paths):
            tp, pp = inner_tp, inner_pp
        else:
            extra = []
    if extra:
        whose = "mmconvert.json does not list them" if listed else "the others are complete"
        report.add(
            "extra-rank-folder",
            f"{folder} has {len(extra)} rank folders too many: "
            f"{_some(paths[r].name for r in extra)}; {whose} (tp {tp} x pp {pp})",
            "move them away; they are another checkpoint's",
            path=paths[extra[0]],
            command=move_aside([paths[r] for r in extra], _root(folder)),
        )
    kept = {rank: path for rank, path in sorted(paths.items()) if rank not in set(extra)}
    missing = tp * pp - len(kept)
    if missing:
        names = list(islice(_absent(kept, tp, pp, suffix or pp > 1), NAMED))
        more = f" and {missing - len(names)} more" if missing > len(names) else ""
        report.add(
            "missing-rank-folder",
            f"{folder} has {len(kept)} of {tp * pp} rank folders (tp {tp} x pp {pp}); missing: "
            f"{', '.join(names)}{more}",
            COPY,
            path=folder / names[0],
        )
    return Ranks(folder, kept, tp, pp, not missing, suffix, bool(listed))


def _absent(paths: Mapping[Rank, Path], tp: int, pp: int, suffix: bool) -> Iterator[str]:
    for p in range(pp):
        for t in range(tp):
            if Rank(t, p) not in paths:
                yield f"mp_rank_{t:02d}" + (f"_{p:03d}" if suffix else "")


def _size(ranks: Iterable[Rank]) -> tuple[int, int]:
    listed = list(ranks)
    return max(r.tp for r in listed) + 1, max(r.pp for r in listed) + 1


def _largest_grid(ranks: Mapping[Rank, Path]) -> tuple[int, int]:
    """The largest complete tp x pp of folders that begins at (0, 0)."""
    best, depth, tp = (0, 0), len(ranks), 0
    while Rank(tp, 0) in ranks:
        pp = 0
        while Rank(tp, pp) in ranks:
            pp += 1
        tp, depth = tp + 1, min(depth, pp)
        best = max(best, (tp, depth), key=lambda size: size[0] * size[1])
    return best


def _is_complete(found: Iterable[tuple[int, ...]]) -> bool:
    ranks = {Rank(*numbers) for numbers in found}
    tp, pp = _size(ranks)
    return len(ranks) == tp * pp


def _rank(name: str) -> Rank | None:
    numbers = parse_folder(name)
    return None if numbers is None else Rank(*(n or 0 for n in numbers))


def _is_listed(folder: Path, names: Iterable[str], listed: Mapping[str, int]) -> bool:
    """Whether mmconvert.json is of these folders: one's file has the size that it lists."""
    files = [(folder / name / RANK_FILE, listed[name]) for name in names if name in listed]
    return any(file.is_file() and file.stat().st_size == size for file, size in files)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more
