"""Which process of how many this is: by ``--ranks``, or as a launcher's variables say."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from mmconvert.errors import RequestError

# Set by torchrun for every process that it starts.
TORCHRUN, RANK, WORLD_SIZE = "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"

# Rank and number of processes, as Open MPI, and MPICH and its kin, set them for what they start.
MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


class Ranks(NamedTuple):
    """A process among others.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        certain: the others have been asked for the same; else they may be doing something else.
    """

    rank: int = 0
    size: int = 1
    certain: bool = True


ALONE = Ranks()


def of_flag(text: str) -> Ranks:
    """What ``--ranks`` says.

    Raises:
        RequestError: it is no such thing as 0/4.
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    ranks = Ranks(int(found[1]), int(found[2])) if found else ALONE
    if not found or ranks.rank >= ranks.size:
        raise RequestError(
            f"--ranks is {text!r}", "I/N: process I of N, counted from 0, such as 0/4 to 3/4"
        )
    return ranks


def of_environment(variables: Mapping[str, str] = os.environ, *, launched: bool) -> Ranks:
    """What the variables of a launcher say.

    Those of MPI and Slurm are inherited by whatever their tasks start, so the other processes may
    never come: they are not certain.

    Args:
        launched: whether torchrun's variables may be meant for this process: a program that it
            has started may well call the command ``mm-convert``, which then is on its own.

    Raises:
        RequestError: variables of torchrun's that make no sense.
    """
    if TORCHRUN in variables:
        return of_torchrun(variables) if launched else ALONE
    for own, all_ in (*MPI, *_slurm(variables)):
        rank, size = variables.get(own, ""), variables.get(all_, "")
        if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
            return Ranks(int(rank), int(size), certain=False) if int(size) > 1 else ALONE
    return ALONE


def of_torchrun(variables: Mapping[str, str] = os.environ) -> Ranks:
    """What torchrun's variables say.

    Raises:
        RequestError: they make no sense.
    """
    said = f"{variables.get(RANK, '0')}/{variables.get(WORLD_SIZE, '1')}"
    try:
        return of_flag(said)
    except RequestError:
        raise RequestError(
            f"torchrun's variables say that this is process {said}",
            f"{RANK} and {WORLD_SIZE}, as torchrun sets them",
            f"start it by torchrun, or unset {TORCHRUN}",
        ) from None


def _slurm(variables: Mapping[str, str]) -> list[tuple[str, str]]:
    """The names of Slurm's variables. The script of a job, and a shell in an allocation, have those
    of the job, but they are no step of several tasks.
    """
    if "SLURM_JOB_ID" in variables and "SLURM_STEP_ID" not in variables:
        return []
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    return [("SLURM_PROCID", size)]
