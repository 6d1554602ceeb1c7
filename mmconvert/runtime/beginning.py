"""Where a training begins: at a converted checkpoint, at an iteration, or where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.errors import CheckpointError, OutputError, RequestError
from mmconvert.formats.mm.ranks import TRACKER
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.iterations import iteration_folder
from mmconvert.runtime.launch import replicas_for
from mmconvert.runtime.mmfiles import LoadableCheckpoint, with_adapters
from mmconvert.runtime.trainplan import Start, TrainingPlan


@dataclass(frozen=True)
class Load:
    """A checkpoint to go on from, as Megatron's ``--load`` has it.

    Attributes:
        folder: with a tracker file. An iteration is gone on from; a ``release`` is begun with.
        iteration: the one to take; 0 for the tracker file's.
    """

    folder: Path
    iteration: int = 0


def beginning(
    mm_dir: Path | None,
    hf_dir: Path,
    plan: TrainingPlan,
    resume: bool,
    load: Load | None,
    optimizer: bool = True,
) -> tuple[Architecture, LoadableCheckpoint, Start]:
    """The model, the checkpoint to begin with, and whether its iteration is gone on from.

    With LoRA ``mm_dir`` is the base model, and what is gone on from are adapters.

    Args:
        optimizer: take over the optimizer of what is gone on from, and its place in the schedule.
    """
    if plan.lora is not None:
        return _with_adapters(mm_dir, hf_dir, plan, resume, load, optimizer)
    if resume and (plan.save / TRACKER).is_file():
        arch, stored = load_folder(hf_dir, plan.save)
        start = Start(resumed=True, optimizer=optimizer)
    elif load is not None:
        arch, stored = load_folder(hf_dir, _iteration_of(load))
        start = Start(resumed=stored.iteration > 0, optimizer=optimizer)
        _look_for_later(plan.save, stored)
    elif mm_dir is not None:
        arch, stored = load_folder(hf_dir, mm_dir)
        start = Start()
        _look_for_later(plan.save, None)
    else:
        raise RequestError("no checkpoint to start from is given", "--mm_dir, or --load")
    if start.resumed and stored.iteration >= plan.steps:
        raise RequestError(
            f"{stored.folder} is at iteration {stored.iteration} already",
            f"a --train_iters above {stored.iteration}",
        )
    return arch, stored, start


def _with_adapters(
    mm_dir: Path | None,
    hf_dir: Path,
    plan: TrainingPlan,
    resume: bool,
    load: Load | None,
    optimizer: bool,
) -> tuple[Architecture, LoadableCheckpoint, Start]:
    """The base model, and the adapters that are gone on from."""
    base_dir = mm_dir or (load.folder if load is not None else None)
    if base_dir is None:
        raise RequestError("no base model is given", "--mm_dir, or --load_base_model")
    arch, stored = load_folder(hf_dir, base_dir)
    begun: Path | None = None
    if resume and (plan.save / TRACKER).is_file():
        begun = plan.save
    elif load is not None and mm_dir is not None:
        begun = _iteration_of(load)
    assert plan.lora is not None  # noqa: S101 - the caller has looked
    if begun is None:
        _look_for_later(plan.save, None)
        return arch, replace(stored, lora=plan.lora, iteration=0), Start()
    found = with_adapters(stored, begun, plan.lora.alpha)
    told = found.lora or plan.lora
    if told.rank != plan.lora.rank or told.alpha != plan.lora.alpha:
        raise RequestError(
            f"{begun} has adapters of r {told.rank}, alpha {told.alpha:g}; --lora_r is "
            f"{plan.lora.rank}, --lora_alpha {plan.lora.alpha:g}",
            "the numbers that they were trained with",
        )
    if not resume:
        _look_for_later(plan.save, found)
    start = Start(resumed=found.iteration > 0, optimizer=optimizer)
    if start.resumed and found.iteration >= plan.steps:
        raise RequestError(
            f"{begun} is at iteration {found.iteration} already",
            f"a --train_iters above {found.iteration}",
        )
    return arch, replace(found, lora=plan.lora), start


def _iteration_of(load: Load) -> Path:
    """The folder to read: of one iteration, if one is asked for."""
    if not load.iteration:
        return load.folder
    folder = iteration_folder(load.folder, load.iteration)
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in load.folder.glob("iter_*"))) or "none"
        raise CheckpointError(
            f"{load.folder} has no iteration {load.iteration}", f"one that is there: {there}"
        )
    return folder


def _look_for_later(save: Path, stored: LoadableCheckpoint | None) -> None:
    """Refuses to train into a folder whose checkpoints would be replaced, or outdone.

    Args:
        stored: the checkpoint that is gone on from.

    Raises:
        OutputError: naming what is there.
    """
    number = 0 if stored is None else stored.iteration
    tracker = save / TRACKER
    here = stored is not None and save.resolve() in (
        stored.folder.resolve(), stored.folder.resolve().parent,
    )  # fmt: skip
    if tracker.is_file() and not here:
        raise OutputError(
            f"{save} holds a checkpoint already",
            "an empty folder",
            "--resume, or another --save",
        )
    later = sorted(
        p.name for p in save.glob("iter_*") if p.name > iteration_folder(save, number).name
    )
    if later:
        raise OutputError(
            f"{save} holds {later[0]}, and no {TRACKER} that names it"
            if not tracker.is_file()
            else f"{save} holds {later[0]}, later than the one to go on from",
            "an empty folder" if stored is None else "no later iterations than it",
            "another --save, or write the number of a whole iteration into that file",
        )


def fitted(plan: TrainingPlan, world: int = 1, stages: int = 1) -> TrainingPlan:
    """The plan with its numbers of replicas and micro-batches.

    Args:
        world: processes of a replica.
        stages: pipeline ranks.

    Raises:
        RequestError: the processes or the micro-batches cannot be shared by the replicas.
    """
    replicas = plan.replicas or replicas_for(world)
    count = plan.count or stages * replicas
    if count % replicas:
        raise RequestError(
            f"{count} micro-batches for {replicas} replicas",
            "a --global_batch_size that is a multiple of --micro_batch_size times the replicas",
        )
    return replace(plan, replicas=replicas, count=count)
