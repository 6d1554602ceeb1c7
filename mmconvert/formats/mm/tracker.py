"""Which iteration of an MM checkpoint is meant: its tracker file, and its iteration folders."""

from __future__ import annotations

import re
from pathlib import Path

from mmconvert.causes.downloads import way_to
from mmconvert.causes.folders import other_form
from mmconvert.errors import CheckpointError, FormatError, blamed
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.mm.ranks import TRACKER, has_ranks
from mmconvert.formats.reading import opened

_ITERATION = re.compile(r"iter_(\d{7,12})")


def find_weights(root: Path, faults: Faults = STRICT) -> tuple[Path, str]:
    """The folder of rank folders, and the iteration that it holds (``release`` or a number).

    ``root`` is a checkpoint with a tracker file, or itself holds rank folders.

    Args:
        faults: receives those of a tracker file that is not needed to find the newest iteration.

    Raises:
        CheckpointError: no checkpoint here; FormatError: a tracker file that makes no sense.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise CheckpointError(f"{root} {what}", "the folder of a checkpoint", way_to(root))
    there = newest(root)
    if (root / TRACKER).is_file():
        unknown: tuple[Path, str] | None = None
        found = faults.attempt(lambda: _tracked(root, there), unknown)
        if found is not None:
            return found
        if not there:
            faults.stop()
    elif has_ranks(root):
        own = root.resolve().name
        return root, tracker_word(own) if _ITERATION.fullmatch(own) else "release"
    elif there:
        fault = CheckpointError(
            f"{root} has {there}/ but no {TRACKER}",
            f"an MM checkpoint: {TRACKER} with release/ or iter_N/",
            f"give {root / there}, or write {tracker_word(there)} into a file of that name",
            cause="missing-tracker",
            path=root / TRACKER,
        )
        faults.add(fault)
    else:
        raise other_form(root, "mm") or CheckpointError(
            f"{root} has neither {TRACKER} nor mp_rank_* folders",
            f"an MM checkpoint: {TRACKER} with release/ or iter_N/",
            "it is a Hugging Face checkpoint: give it as hf_dir"
            if (root / "config.json").is_file()
            else "check the path; training writes below its --save folder",
            cause="no-checkpoint",
            path=root,
        )
    return root / there, tracker_word(there)


def iterations(root: Path) -> list[str]:
    """The names of iteration folders, the newest last, ``release`` before them."""
    found = [p.name for p in root.iterdir() if p.is_dir()]
    numbered = [name for name in found if _ITERATION.fullmatch(name)]
    numbered.sort(key=lambda name: int(tracker_word(name)))
    return ["release"] * ("release" in found) + numbered


def newest(root: Path) -> str:
    """The newest iteration folder with ranks in it, as far as names tell; "" if there is none."""
    try:
        return next((n for n in reversed(iterations(root)) if has_ranks(root / n)), "")
    except OSError:
        return ""


def tracker_word(name: str) -> str:
    """What a tracker file says of an iteration folder."""
    match = _ITERATION.fullmatch(name)
    return str(int(match[1])) if match else name


def _tracked(root: Path, there: str) -> tuple[Path, str]:
    """What the tracker file names.

    Args:
        there: the newest iteration; "" if there is none.
    """
    tracker = root / TRACKER
    fix = f"write {tracker_word(there)} into it: {there} is there" if there else ""
    with blamed("damaged-tracker", tracker, fix=fix or "write release or a number into it"):
        text = tracker_text(tracker)
    name = "release" if text == "release" else f"iter_{int(text):07d}"
    if not (root / name).is_dir():
        raise CheckpointError(
            f"{tracker} says {text!r}, but {root / name} does not exist",
            f"the folder {name} beside the tracker file",
            fix or "write the number of an iteration that exists into the tracker file",
            cause="dangling-tracker",
            path=tracker,
        )
    return root / name, text


def tracker_text(tracker: Path) -> str:
    """What a tracker file says: ``release``, or a number.

    Raises:
        FormatError: neither.
    """
    try:
        with opened(tracker) as file:
            text = file.read(64).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{tracker}: unreadable ({error})", "release, or a number") from None
    if text != "release" and not (text.isdigit() and len(text) <= 12):
        raise FormatError(f"{tracker} holds {text!r}", "release, or an iteration number")
    return text
