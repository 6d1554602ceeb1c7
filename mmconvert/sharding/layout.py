"""The layout of an MM checkpoint: tensor-parallel sizes, stage grids, ranks and their folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mmconvert.errors import LayoutError
from mmconvert.sharding.stages import StageGrid, check_grids, check_order, show

# The widest plausible rank number: a folder name is a stranger's text.
RANK_FOLDER = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?(?:_(\d{3,5}))?")


def grid_flag(key: str) -> str:
    """The user's name of a module's stage grid."""
    return f"{key}_pp_layers"


def tp_flag(key: str, decoder: str) -> str:
    """The user's name of a module's tensor-parallel size; the decoder's counts for all."""
    return "tp_size" if key == decoder else f"{key}_tp_size"


class Rank(NamedTuple):
    """Coordinates of a rank file."""

    tp: int
    pp: int = 0
    ep: int = 0


class Chunk(NamedTuple):
    """A place for tensors: the model chunk of one virtual stage in one rank file."""

    rank: Rank
    virtual: int = 0


@dataclass(frozen=True)
class Layout:
    """Layout of a checkpoint.

    Attributes:
        tp: tensor-parallel size by module key.
        grids: stage grid by module key; all of one size.
        ep: expert-parallel size: each rank holds its share of the experts, and all else.
        decoder: key of the module that comes after all the others; "" if it was left out.
    """

    tp: Mapping[str, int]
    grids: Mapping[str, StageGrid]
    ep: int = 1
    decoder: str = field(kw_only=True)

    @property
    def tp_folders(self) -> int:
        """Number of tensor-parallel rank folders: the largest size of any module."""
        return max(self.tp.values())

    @property
    def pp_size(self) -> int:
        """Number of pipeline ranks."""
        return len(next(iter(self.grids.values()))[0])

    @property
    def vpp_size(self) -> int:
        """Number of virtual stages (model chunks per rank)."""
        return len(next(iter(self.grids.values())))

    def ranks(self) -> Iterator[Rank]:
        """Every rank, stage by stage."""
        for pp in range(self.pp_size):
            for ep in range(self.ep):
                for tp in range(self.tp_folders):
                    yield Rank(tp, pp, ep)

    def column(self, rank: Rank) -> int:
        """The number of a rank among those of its pipeline stage: ep by ep, tp in each."""
        return rank.ep * self.tp_folders + rank.tp

    def chunk(self, tp: int, stage: int, ep: int = 0) -> Chunk:
        """Where a stage lives: stage = virtual stage * pp_size + pp rank."""
        return Chunk(Rank(tp, stage % self.pp_size, ep), stage // self.pp_size)

    def folder(self, rank: Rank) -> str:
        """Folder name of a rank; the pipeline and the expert part only where there are several."""
        name = f"mp_rank_{rank.tp:02d}" + (f"_{rank.pp:03d}" if self.pp_size > 1 else "")
        return name + (f"_{rank.ep:03d}" if self.ep > 1 else "")

    def part(self, virtual: int) -> str:
        """Key of a model chunk in its rank file."""
        return f"model{virtual}" if self.vpp_size > 1 else "model"

    def tp_flag(self, key: str) -> str:
        """The user's name of a module's tensor-parallel size."""
        return tp_flag(key, self.decoder)

    def describe(self) -> str:
        """One line for messages, in the words of the command line."""
        words = [f"{self.tp_flag(key)} {size}" for key, size in self.tp.items()]
        words += [f"ep_size {self.ep}"] if self.ep > 1 else []
        return ", ".join(words + [f"{grid_flag(k)} {show(g)}" for k, g in self.grids.items()])

    def as_dict(self) -> dict[str, object]:
        """The layout as JSON, with the converter's own keys."""
        out: dict[str, object] = {"pp_size": self.pp_size, "vpp_size": self.vpp_size}
        if self.ep > 1:
            out["ep_size"] = self.ep
        for key, grid in self.grids.items():
            out[self.tp_flag(key)] = self.tp[key]
            out[grid_flag(key)] = [list(row) for row in grid]
        return out

    def check(self, *, ordered: bool = True) -> None:
        """Sizes that fit each other, and the order rule if the modules must be ``ordered``.

        Raises:
            LayoutError: naming the numbers that do not fit.
        """
        flags = {key: grid_flag(key) for key in self.grids}
        check_grids(self.grids, flags)
        if ordered:
            self.check_order()
        if self.ep < 1:
            raise LayoutError(f"ep_size is {self.ep}", "a size of at least 1")
        for key, size in self.tp.items():
            if size < 1:
                raise LayoutError(f"{self.tp_flag(key)} is {size}", "a size of at least 1")
            if self.tp_folders % size:
                raise LayoutError(
                    f"{self.tp_flag(key)} {size} does not divide {self.tp_folders}, the largest "
                    "size",
                    f"sizes that divide {self.tp_folders}",
                )

    def check_order(self) -> None:
        """The order rule: no layer of the decoder stands before an encoder ends.

        Raises:
            LayoutError: naming both grids.
        """
        check_order(self.grids, self.decoder, {key: grid_flag(key) for key in self.grids})


def parse_folder(name: str) -> tuple[int, int | None, int | None] | None:
    """The numbers in the name of a rank folder, or None if it is no such name."""
    match = RANK_FOLDER.fullmatch(name)
    if not match:
        return None
    tp, second, third = match.groups()
    return int(tp), None if second is None else int(second), None if third is None else int(third)
