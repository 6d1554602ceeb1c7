"""The rank folders of an MM checkpoint: those that belong together, what is missing or too much."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import NamedTuple

from mmconvert.causes.folders import other_form
from mmconvert.errors import CheckpointError
from mmconvert.formats.faults import Faults
from mmconvert.names import number, summarise
from mmconvert.sharding.layout import Rank, parse_folder

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
DISTRIBUTED = "distrib_optim.pt"  # beside it, of a distributed optimizer
COPY = "copy the folder from the machine that wrote it; no other rank holds its weights"
Numbers = tuple[int, ...]
Size = tuple[int, int, int]  # tp, pp, ep


def is_mm(root: Path) -> bool:
    """Whether a path has the signs of an MM checkpoint: a tracker file, or rank folders."""
    if not root.is_dir():
        return False
    return (root / TRACKER).is_file() or any(parse_folder(path.name) for path in root.iterdir())


class RankFolderNames(NamedTuple):
    """The rank folders of one checkpoint.

    Attributes:
        folder: what holds them.
        paths: the folders that are there.
        size: how many there should be: tp, pp, ep.
        numbers: how many numbers their names have. A second one of two is read as ``pp``.
        listed: the bytes of each file by the name of its folder, if mmconvert.json lists them.
    """

    folder: Path
    paths: dict[Rank, Path]
    size: Size
    numbers: int
    listed: Mapping[str, int]

    @property
    def whole(self) -> bool:
        """None is missing."""
        return len(self.paths) == prod(self.size)


def has_ranks(folder: Path) -> bool:
    """Whether a folder holds any rank folder."""
    return any(parse_folder(path.name) for path in folder.iterdir())


def rank_folders(folder: Path, listed: Mapping[str, int], faults: Faults) -> RankFolderNames:
    """The rank folders that belong together.

    Args:
        listed: name of a rank folder -> bytes of its file, as mmconvert.json lists them.

    Raises:
        CheckpointError: there are none.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {error.strerror}", "a readable folder", cause="cannot-read", path=folder
        ) from error
    found = {path.name: n for path in paths if (n := _numbers(path, faults))}
    if not found:
        raise other_form(folder, "mm") or CheckpointError(
            f"{folder} has no mp_rank_* folders",
            "one folder for each rank",
            "copy the rank folders here",
            cause="no-rank-folders",
            path=folder,
        )
    found = _one_layout(folder, found, listed, faults)
    ranks = _one_for_each_rank(folder, found, faults)
    own = listed if _is_listed(folder, found, listed) else dict[str, int]()
    expected = {rank for name in own if (rank := _rank(name)) is not None}
    size, extra = _sizes(ranks, expected)
    if extra:
        whose = "mmconvert.json does not list them" if expected else "the others are complete"
        names = [ranks[rank].name for rank in extra]
        fault = CheckpointError(
            f"{folder} has {number(extra, 'rank folder')} too many: {summarise(names)}; {whose} "
            f"({_in_words(size)})",
            "the rank folders of one checkpoint",
            "move them away; they are another checkpoint's",
            cause="extra-rank-folder",
            path=ranks[extra[0]],
            aside=[ranks[rank] for rank in extra],
        )
        faults.add(fault)
    kept = {rank: path for rank, path in sorted(ranks.items()) if rank not in set(extra)}
    made = RankFolderNames(folder, kept, size, len(next(iter(found.values()))), own)
    if not made.whole:
        faults.add(_missing(made))
    return made


def _numbers(path: Path, faults: Faults) -> Numbers:
    parsed = parse_folder(path.name)
    if parsed is None:
        if path.name.startswith("mp_rank"):
            remark = CheckpointError(
                f"{path} does not have the name of a rank folder, and is not read",
                fix="give it a name such as mp_rank_00 or mp_rank_00_000, or move it away",
                cause="misnamed-rank-folder",
                path=path,
            )
            faults.remark(remark)
        return ()
    return tuple(n for n in parsed if n is not None)


FORMS = {1: "one number", 2: "two numbers", 3: "three numbers"}


def _one_layout(
    folder: Path, found: dict[str, Numbers], listed: Mapping[str, int], faults: Faults
) -> dict[str, Numbers]:
    """The folders of one form of name; those of the others are another checkpoint's."""
    forms = {n: {k: v for k, v in found.items() if len(v) == n} for n in map(len, found.values())}
    if len(forms) == 1:
        return found
    by_list = [g for g in forms.values() if _is_listed(folder, g, listed)]
    complete = [g for g in forms.values() if _is_complete(g.values())]
    decided = by_list if len(by_list) == 1 else complete
    sure = len(decided) == 1
    keep = decided[0] if sure else max(forms.values(), key=len)
    others = sorted(name for name in found if name not in keep)
    groups = [f"{summarise(forms[n])} ({FORMS[n]})" for n in sorted(forms)]
    fault = CheckpointError(
        f"{folder} mixes the rank folders of {len(forms)} layouts: {', '.join(groups)}",
        "the rank folders of one checkpoint",
        f"move {summarise(others)} away: {summarise(keep)} are the ones that belong together"
        if sure
        else "move the older ones away; mmconvert cannot tell which they are",
        cause="mixed-layouts",
        path=folder,
        aside=[folder / name for name in others] if sure else (),
    )
    faults.add(fault)
    return keep


def _one_for_each_rank(
    folder: Path, found: Mapping[str, Numbers], faults: Faults
) -> dict[Rank, Path]:
    paths: dict[Rank, Path] = {}
    for name in sorted(found, key=lambda name: (len(name), name)):
        rank = Rank(*found[name])
        if rank not in paths:
            paths[rank] = folder / name
            continue
        ep = f" ep {rank.ep}" if len(found[name]) > 2 else ""
        fault = CheckpointError(
            f"{folder} has two folders for tp {rank.tp} pp {rank.pp}{ep}: {paths[rank].name}, "
            f"{name}",
            "one folder for each rank",
            f"move one away; training reads {paths[rank].name}",
            cause="duplicate-rank-folder",
            path=folder / name,
            aside=[folder / name],
        )
        faults.add(fault)
    return paths


def _sizes(ranks: Collection[Rank], expected: Collection[Rank]) -> tuple[Size, list[Rank]]:
    """How many folders there should be, by mmconvert.json or the largest grid; those too many."""
    if expected:
        return _size(expected), sorted(set(ranks) - set(expected))
    size, inner = _size(ranks), _largest_grid(set(ranks))
    extra = sorted(rank for rank in ranks if any(n >= m for n, m in zip(rank, inner, strict=True)))
    # Few folders beyond a complete grid are leftovers; else the grid has holes.
    return (inner, extra) if len(extra) < prod(size) - len(ranks) else (size, [])


def _size(ranks: Iterable[Rank]) -> Size:
    tp, pp, ep = (max(numbers) + 1 for numbers in zip(*ranks, strict=True))
    return tp, pp, ep


def _largest_grid(ranks: Collection[Rank]) -> Size:
    """The largest complete tp x pp x ep of folders that begins at (0, 0, 0)."""
    best: Size = (0, 0, 0)
    depths: list[int] = []  # for each pp rank the ep ranks that all tp ranks so far have
    tp = 0
    while Rank(tp) in ranks:
        runs: list[int] = []
        while Rank(tp, len(runs)) in ranks and (not tp or len(runs) < len(depths)):
            runs.append(_run(ranks, tp, len(runs)))
        depths = runs if not tp else [min(pair) for pair in zip(depths, runs, strict=False)]
        tp += 1
        for pp in range(1, len(depths) + 1):
            best = max(best, (tp, pp, min(depths[:pp])), key=prod)
    return best


def _run(ranks: Collection[Rank], tp: int, pp: int) -> int:
    ep = 0
    while Rank(tp, pp, ep) in ranks:
        ep += 1
    return ep


def _missing(made: RankFolderNames) -> CheckpointError:
    total = prod(made.size)
    ranks = list(islice(_absent(made), 5))
    names = [f"{_name(made, rank)} ({_where(made, rank)})" for rank in ranks]
    count = total - len(made.paths)
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return CheckpointError(
        f"{made.folder} has {len(made.paths)} of {total} rank folders ({_in_words(made.size)}); "
        f"missing: {', '.join(names)}{more}",
        "every rank folder of the checkpoint",
        COPY,
        cause="missing-rank-folder",
        path=made.folder / _name(made, ranks[0]),
    )


def _absent(made: RankFolderNames) -> Iterator[Rank]:
    tp, pp, ep = made.size  # may be very many
    ranks = (Rank(t, p, e) for p, e, t in product(range(pp), range(ep), range(tp)))
    return (rank for rank in ranks if rank not in made.paths)


def _name(made: RankFolderNames, rank: Rank) -> str:
    _, pp, ep = made.size
    numbers = max(made.numbers, 1 + (pp > 1 or ep > 1) + (ep > 1))
    name = f"mp_rank_{rank.tp:02d}" + (f"_{rank.pp:03d}" if numbers > 1 else "")
    return name + (f"_{rank.ep:03d}" if numbers > 2 else "")


def _where(made: RankFolderNames, rank: Rank) -> str:
    return f"tp {rank.tp} pp {rank.pp}" + (f" ep {rank.ep}" if made.size[2] > 1 else "")


def _in_words(size: Size) -> str:
    tp, pp, ep = size
    return f"tp {tp} x pp {pp}" + (f" x ep {ep}" if ep > 1 else "")


def _is_complete(found: Iterable[Numbers]) -> bool:
    ranks = {Rank(*numbers) for numbers in found}
    return len(ranks) == prod(_size(ranks))


def _rank(name: str) -> Rank | None:
    numbers = parse_folder(name)
    return None if numbers is None else Rank(*(n or 0 for n in numbers))


def _is_listed(folder: Path, names: Iterable[str], listed: Mapping[str, int]) -> bool:
    """Whether mmconvert.json is of these folders: one's file has the size that it lists."""
    files = [(folder / name / RANK_FILE, listed[name]) for name in names if name in listed]
    return any(file.is_file() and file.stat().st_size == size for file, size in files)
