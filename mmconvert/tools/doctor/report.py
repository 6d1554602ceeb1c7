"""What an examination found: findings with stable ids, and what was and was not looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmconvert.errors import MMConvertError

ERROR, WARNING = "error", "warning"

# Every finding there is. An error: converting or training fails, or gives wrong weights.
# A warning: worth knowing; the checkpoint can be used. docs/doctor.md explains each.
SEVERITY: dict[str, str] = {
    # any checkpoint
    "not-there": ERROR,
    "no-checkpoint": ERROR,
    "two-kinds": WARNING,
    "unfinished-output": WARNING,
    "running-conversion": WARNING,
    "old-output": WARNING,
    "interrupted-replacement": ERROR,
    "cannot-read": ERROR,
    "unknown-tensor": ERROR,
    "missing-tensor": ERROR,
    "wrong-shape": ERROR,
    "replicas-differ": ERROR,
    "not-finite": ERROR,
    "lfs-pointer": ERROR,
    "refused": ERROR,
    # the form of any checkpoint: see mmconvert.causes
    "quantised": ERROR,
    "quantization-config-left": WARNING,
    "unmerged-adapter": ERROR,
    "empty-tensors": ERROR,
    "wrapped-names": ERROR,
    "grouped-experts": ERROR,
    "nested-weights": ERROR,
    "distributed-checkpoint": ERROR,
    "fsdp-checkpoint": ERROR,
    "deepspeed-checkpoint": ERROR,
    "unified-safetensors": ERROR,
    "one-level-high": ERROR,
    "one-level-low": ERROR,
    # folders of an MM checkpoint
    "missing-tracker": ERROR,
    "damaged-tracker": ERROR,
    "dangling-tracker": ERROR,
    "no-rank-folders": ERROR,
    "mixed-layouts": ERROR,
    "misnamed-rank-folder": WARNING,
    "duplicate-rank-folder": ERROR,
    "missing-rank-folder": ERROR,
    "extra-rank-folder": ERROR,
    "pp-suffix-without-pp": ERROR,
    "damaged-manifest": WARNING,
    "stale-manifest": WARNING,
    # its files
    "missing-rank-file": ERROR,
    "truncated-rank-file": ERROR,
    "damaged-rank-file": ERROR,
    "foreign-rank-file": ERROR,
    "not-a-tensor": ERROR,
    "chunk-keys": ERROR,
    "chunk-keys-differ": ERROR,
    "extra-state": WARNING,
    # its tensors
    "unknown-family": ERROR,
    "other-family": ERROR,
    "other-model": ERROR,
    "encoders-only": WARNING,
    "tp-names-differ": ERROR,
    "layer-hole": ERROR,
    "expert-hole": ERROR,
    "expert-count": ERROR,
    "experts-transposed": ERROR,
    "expert-twice": ERROR,
    "misplaced-tensor": ERROR,
    "tied-head-missing": ERROR,
    "tied-head-superfluous": WARNING,
    "output-layer-missing": ERROR,
    "layer-count": ERROR,
    "stage-order": WARNING,
    "not-for-training": WARNING,
    "vit-qkv-concatenated": ERROR,
    "not-zero": ERROR,
    "hf-dir-unusable": ERROR,
    # the state of its optimizer
    "optimizer-damaged": ERROR,
    "optimizer-other-weights": ERROR,
    "optimizer-in-release": WARNING,
    "optimizer-unknown": WARNING,
    # HF checkpoints
    "missing-config": ERROR,
    "damaged-config": ERROR,
    "unsupported-model": ERROR,
    "unsupported-model-type": WARNING,
    "missing-tokenizer": WARNING,
    "missing-preprocessor": WARNING,
    "missing-index": ERROR,
    "damaged-index": ERROR,
    "stale-index": ERROR,
    "partial-weight-file": ERROR,
    "index-not-read": WARNING,
    "no-safetensors": ERROR,
    "missing-weight-file": ERROR,
    "truncated-weight-file": ERROR,
    "damaged-weight-file": ERROR,
    "stray-weight-file": WARNING,
    "adapter-not-applied": WARNING,
    "adapter-names": ERROR,
    "adapter-config": ERROR,
    "adapter-residual": WARNING,
    "adapter-untrained": WARNING,
    "index-mismatch": ERROR,
    "other-spelling": WARNING,
    "duplicate-tensor": ERROR,
    "extra-layers": ERROR,
    "mixed-dtypes": ERROR,
    # MindSpeed-MM's model.json beside it
    "model-json": ERROR,
    "model-json-layout": ERROR,
    "model-json-sizes": ERROR,
}

MOST_EACH = 20  # findings of one id that are listed; the others are counted
LONGEST = 500  # characters of a text; names in a checkpoint are a stranger's


def plain(text: str) -> str:
    """Text that is safe on a terminal: bounded, one line, nothing but printable characters."""
    shown = "".join(c if c.isprintable() else _escaped(c) for c in text[:LONGEST])
    return shown if len(text) <= LONGEST else f"{shown}... ({len(text)} characters)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        id: a key of :data:`SEVERITY`.
        what: what is wrong, one line.
        path: the file or folder at fault.
        tensor: the tensor at fault, the first of several; "" if none is.
        fix: what to do, in words.
        command: a shell line that mends it; "" if none can.
        flags: for findings that resplit mends: the flags that it needs for this one.
    """

    id: str
    what: str
    path: Path
    tensor: str = ""
    fix: str = ""
    command: str = ""
    flags: tuple[str, ...] | None = None

    @property
    def severity(self) -> str:
        """``error`` or ``warning``."""
        return SEVERITY[self.id]

    def as_dict(self) -> dict[str, object]:
        """The finding as JSON."""
        return {
            "id": self.id,
            "severity": self.severity,
            "what": self.what,
            "path": str(self.path),
            "tensor": self.tensor,
            "fix": self.fix,
            "command": self.command or None,
        }


@dataclass
class DoctorReport:
    """The outcome of an examination.

    Attributes:
        path: what was examined.
        kind: ``hf``, ``mm``, ``mm_rank_file``, ``hf_weight_file``, or "" if it is neither.
        family: the family's name; "" if it is not known.
        findings: at most :data:`MOST_EACH` of each id.
        more: id -> number of further findings.
        checked, skipped: in words, what was and what was not looked at.
        files, tensors: numbers of weight files and of stored tensors that were read.
    """

    path: Path
    kind: str = ""
    family: str = ""
    findings: list[Finding] = field(default_factory=list[Finding])
    more: dict[str, int] = field(default_factory=dict[str, int])
    checked: list[str] = field(default_factory=list[str])
    skipped: list[str] = field(default_factory=list[str])
    files: int = 0
    tensors: int = 0

    def add(
        self,
        id: str,  # noqa: A002 - the word that the report's readers see
        what: str,
        fix: str = "",
        *,
        path: Path,
        tensor: str = "",
        command: str = "",
        flags: tuple[str, ...] | None = None,
    ) -> None:
        """Notes a finding."""
        if sum(f.id == id for f in self.findings) >= MOST_EACH:
            self.more[id] = self.more.get(id, 0) + 1
            return
        found = Finding(id, plain(what), path, tensor[:LONGEST], plain(fix), command, flags)
        self.findings.append(found)

    def add_error(
        self,
        id: str,  # noqa: A002 - as above
        error: MMConvertError,
        *,
        path: Path,
        command: str = "",
        flags: tuple[str, ...] | None = None,
    ) -> None:
        """Notes what a function of the converter refused.

        Args:
            id: where the error names no cause.
            path: where it names no place.
        """
        alone = error.expected and not error.fix
        what = f"{error.what}; expected: {error.expected}" if alone else error.what
        self.add(
            error.cause if error.cause in SEVERITY else id,
            what,
            error.fix,
            path=error.path or path,
            tensor=error.tensors[0] if error.tensors else "",
            command=command,
            flags=flags,
        )

    def has(self, ids: Iterable[str]) -> bool:
        """Whether there is a finding of one of these ids."""
        return any(f.id in set(ids) for f in self.findings)

    def errors(self) -> list[Finding]:
        """The findings that make the checkpoint unhealthy."""
        return [f for f in self.findings if f.severity == ERROR]

    def warnings(self) -> list[Finding]:
        """The others."""
        return [f for f in self.findings if f.severity == WARNING]

    def count(self, severity: str) -> int:
        """The number of findings of a severity, those that are only counted included."""
        unlisted = sum(n for id, n in self.more.items() if SEVERITY[id] == severity)  # noqa: A001 - as above
        return unlisted + sum(f.severity == severity for f in self.findings)

    @property
    def healthy(self) -> bool:
        """No error; warnings do not count."""
        return not self.errors()

    def command_all(self, command: str) -> None:
        """Gives every finding that resplit mends its command."""
        self.findings = [
            replace(f, command=command) if f.flags is not None and not f.command else f
            for f in self.findings
        ]

    def as_dict(self) -> dict[str, object]:
        """The JSON form: keys as documented in docs/json.md."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "family": self.family,
            "healthy": self.healthy,
            "errors": self.count(ERROR),
            "warnings": self.count(WARNING),
            "findings": [f.as_dict() for f in self.findings],
            "more": self.more,
            "files": self.files,
            "tensors": self.tensors,
            "checked": self.checked,
            "skipped": self.skipped,
        }
