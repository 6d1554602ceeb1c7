"""What a conversion did, or would do: as JSON, for whoever asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.executor.moving import Moved
from mmconvert.formats.base import Described
from mmconvert.formats.containers.image import FileImage
from mmconvert.plan.plan import Plan

if TYPE_CHECKING:
    from mmconvert.estimate import Estimate


@dataclass(frozen=True)
class Result:
    """What a conversion did, or would do.

    Attributes:
        output: the folder.
        written: False for a dry run.
        plan: the plan.
        layout: of the MM or MindSpore checkpoint that was read or written last.
        seconds: wall time.
        files: of the output.
        dropped: reason -> names of source tensors that are left out.
        carried: names of tensors that are not converted: they stay in ``hf_dir``, or are copied.
        not_copied: reason -> files and folders of ``hf_dir`` that are left out of a Hugging Face
            output.
        estimate: what it will take; for a dry run only.
        moved: what casts have lost, and what an interrupted run had done before.
    """

    output: Path
    written: bool
    plan: Plan
    layout: Described
    seconds: float
    files: tuple[FileImage, ...] = ()
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    carried: tuple[str, ...] = ()
    not_copied: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    estimate: Estimate | None = None
    moved: Moved = field(default_factory=Moved)

    @property
    def listed(self) -> list[FileImage]:
        """The files without those that do but lead to others."""
        return [file for file in self.files if not file.pointer]

    def as_dict(self) -> dict[str, object]:
        """The result as JSON; docs/json.md describes the keys."""
        plan = self.plan
        out: dict[str, object] = {
            "output": str(self.output),
            "written": self.written,
            "tensors": len(plan.targets),
            "bytes": plan.nbytes,
            "copies": len(plan.copies),
            "layout": self.layout.as_dict(),
            "notes": plan.notes,
            "seconds": round(self.seconds, 3),
            "files": [
                {"path": f.path, "bytes": f.size, "tensors": len(f.pieces)} for f in self.listed
            ],
            "dropped": {why: list(names) for why, names in self.dropped.items()},
            "carried": list(self.carried),
            "not_copied": {why: list(names) for why, names in self.not_copied.items()},
            "fills": self.fills(),
            "cast": {"dtype": plan.cast or None, **self.moved.losses.as_dict()},
            "resumed_bytes": self.moved.resumed,
        }
        if self.estimate is not None:
            out["estimate"] = self.estimate.as_dict()
            out["targets"] = self._targets()
        return out

    def fills(self) -> dict[str, int]:
        """Number of elements that are filled with zeros, by target."""
        found: dict[str, int] = defaultdict(int)
        for fill in self.plan.fills:
            found[self.plan.targets[fill.tensor].name] += fill.rows * fill.cols
        return dict(found)

    def casts(self) -> dict[tuple[str, str], int]:
        """Number of targets by the dtypes (before, after) that a cast changes."""
        pairs = {c.dst: self.plan.sources[c.src].dtype for c in self.plan.copies}
        found: dict[tuple[str, str], int] = defaultdict(int)
        for target, old in pairs.items():
            new = self.plan.targets[target].dtype
            if new != old:
                found[old, new] += 1
        return dict(found)

    def _targets(self) -> list[dict[str, object]]:
        """Every target: where it will lie, and which sources it is made of."""
        sources: dict[int, dict[str, None]] = defaultdict(dict)
        for copy in self.plan.copies:
            source = self.plan.sources[copy.src]
            sources[copy.dst][f"{source.path.parent.name}/{source.path.name}: {source.name}"] = None
        return [
            {
                "name": self.plan.targets[i].name,
                "dtype": self.plan.targets[i].dtype,
                "shape": list(self.plan.targets[i].shape),
                "file": file.path,
                "from": list(sources[i]),
            }
            for file in self.files
            for i in file.targets
        ]
