"""What is said of optimizer state: in notes, in manifests, and to those who compare two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmconvert.formats.mm.optimizer.state import KINDS, STEP, GroupKey, Kind, OptimizerState
from mmconvert.formats.mm.ranks import DISTRIBUTED
from mmconvert.names import number, summarise
from mmconvert.narrow import is_dict
from mmconvert.words import amount

# What training goes on with, beside the optimizer: the same on all ranks.
CARRIED = (
    "iteration",
    "opt_param_scheduler",
    "num_floating_point_operations_so_far",
    "training",
)
OWN = ("optimizer", "args", *CARRIED)  # what notes need not say is left out
LEFT_BEHIND = {
    "rng_state": "random state belongs to the ranks of one layout: continue with --no-load-rng",
    "rerun_state_machine": "the rerun state machine starts afresh",
}
# Values of a group that are of one layout, or of one kind of optimizer, alone.
_OF_LAYOUT = ("is_expert_parallel",)


class StateSummary(NamedTuple):
    """Optimizer state at a glance.

    Attributes:
        kind: which of Megatron's optimizers saved it; None where it cannot be read.
        step: the optimizer's; None where each parameter notes it by itself.
        iteration: the last one that is done.
        nbytes: of masters and moments, copies included.
        parameters: stored weights that learn.
        fault: why it cannot be read, in words; all else is empty then.
    """

    kind: Kind | None
    step: object = None
    iteration: int = 0
    nbytes: int = 0
    parameters: int = 0
    fault: str = ""

    def as_dict(self) -> dict[str, object]:
        """As JSON: keys as documented in docs/json.md."""
        found = self._asdict()
        return {"bytes" if key == "nbytes" else key: value for key, value in found.items()}

    def describe(self, weights: int) -> str:
        """One line.

        Args:
            weights: stored weights in all.
        """
        if self.kind is None:
            return f"warning: optimizer state that cannot be read: {self.fault}"
        steps = "" if self.step is None else f", step {self.step}"
        return (
            f"optimizer state: {KINDS[self.kind]}{steps}, iteration {self.iteration}, "
            f"{amount(self.nbytes)} for {self.parameters} of {number(range(weights), 'weight')}"
        )


def summary_of(state: OptimizerState) -> StateSummary:
    """The state at a glance."""
    steps = {repr(values[STEP]): values[STEP] for values in state.groups.values() if STEP in values}
    step = next(iter(steps.values())) if len(steps) == 1 else None
    return StateSummary(state.kind, step, state.iteration, state.nbytes, len(state.learnt))


def notes_of(state: OptimizerState) -> list[str]:
    """What is worth knowing of what is carried over."""
    what = f"{KINDS[state.kind]}, iteration {state.iteration}, {amount(state.nbytes)}"
    notes = [f"optimizer state ({what}) is carried over with the weights"]
    notes += [f"left out: {words}" for words in state.notes]
    if state.left_out:
        notes.append(f"left out: arguments that are not plain values: {summarise(state.left_out)}")
    if state.kind == "distributed":
        size = state.buckets.size
        cut = (
            f"with --overlap-grad-reduce and buckets of {size} elements"
            if size
            else "without --overlap-grad-reduce"
        )
        notes.append(f"{DISTRIBUTED} fits a run {cut}, as the source's run")
    return notes


def notes_left(notes: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The notes of a checkpoint without those on what is carried over, or named by itself."""
    starts = tuple(f"{folder}: {name} (" for name in (*OWN, *LEFT_BEHIND))
    return tuple(note for note in notes if not note.startswith(starts))


def about_of(state: OptimizerState) -> dict[str, object]:
    """What the manifest says of it."""
    return {"kind": state.kind, "iteration": state.iteration}


def values_of(state: OptimizerState) -> dict[str, object]:
    """What training goes on with besides tensors, by name: equal where two go on alike."""
    found: dict[str, object] = {"kind": state.kind}
    for name, value in state.content.items():
        if name != "args":
            found |= _flat(name, value)
    for key, values in state.groups.items():
        group = _group_in_words(key)
        kept = {name: v for name, v in values.items() if name not in _OF_LAYOUT}
        found |= _flat(group, kept)
    return found


def _flat(name: str, value: object) -> dict[str, object]:
    if is_dict(value):
        return {f"{name}.{inner}": one for inner, one in value.items()}
    return {name: value}


def _group_in_words(key: GroupKey) -> str:
    """A group; experts of a layout without expert parallelism are in the others."""
    words = ["no weight decay" if key.no_decay else "weight decay"]
    words += ["scaled"] if key.scaled else []
    words += ["decoupled"] if key.decoupled else []
    return f"group ({', '.join(words)})"
