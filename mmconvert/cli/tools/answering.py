"""Answers on the screen: of one question, of many, or in a conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.errors import MMConvertError, RequestError

if TYPE_CHECKING:
    from mmconvert.runtime.answers import How, Reply
    from mmconvert.runtime.samples import Sample

HINT = (
    "Each line is a question. /image FILE, /video FILE and /audio FILE add to the next one; "
    "/new begins another conversation; Ctrl-D ends."
)
MediaFiles = tuple[Sequence[Path], Sequence[Path], Sequence[Path]]  # pictures, sounds, videos


@dataclass(frozen=True)
class AnswerScreen:
    """Where answers go: words on stdout as they come, or JSON when they are whole.

    Attributes:
        speaks: whether this process is the one that prints.
    """

    speaks: bool
    json: bool

    def say(self, words: str) -> None:
        """Some words of an answer."""
        if self.speaks and not self.json:
            print(words, end="", flush=True)

    def note(self, text: object) -> None:
        """A note, beside the answer."""
        if self.speaks:
            print(text, file=sys.stderr, flush=True)

    def end(self, reply: Reply, **more: object) -> None:
        """A whole answer, the words of which have been said."""
        if self.speaks:
            print(json.dumps(more | reply.as_dict()) if self.json else "", flush=True)


def one(
    mm_dir: Path, hf_dir: Path, how: How, screen: AnswerScreen, words: str, files: MediaFiles
) -> int:
    """Answers one question."""
    from mmconvert.runtime import commands
    from mmconvert.runtime.conversation import prompt

    screen.end(commands.generate(mm_dir, hf_dir, prompt(words, *files), screen.say, how))
    return 0


def several(mm_dir: Path, hf_dir: Path, how: How, screen: AnswerScreen, path: Path) -> int:
    """Answers the prompts of a file, in its order."""
    from mmconvert.runtime import commands
    from mmconvert.runtime.promptfile import read_prompts

    prompts, notes = read_prompts(path)
    for note in notes:
        screen.note(note)

    def hear(number: int, reply: Reply) -> None:
        asked = prompts[number].messages[-1][1]
        screen.say(f"{number + 1}. {asked}\n{reply.text}")
        screen.end(reply, number=number + 1, prompt=asked)

    commands.generate_all(mm_dir, hf_dir, prompts, hear, lambda words: None, how)
    return 0


def chat(
    mm_dir: Path, hf_dir: Path, how: How, screen: AnswerScreen, words: str, files: MediaFiles
) -> int:
    """A conversation on the terminal; ``words`` are the first question, if there are any."""
    from mmconvert.runtime import commands

    lines = _Lines(screen, words, files)
    commands.chat(mm_dir, hf_dir, lines.read, screen.say, screen.end, lines.tell, how)
    return 0


class _Lines:
    """Questions from the terminal, or from a pipe."""

    def __init__(self, screen: AnswerScreen, words: str, files: MediaFiles) -> None:
        self._screen, self._first = screen, words
        self._files: dict[str, list[Path]] = dict(
            zip(("image", "audio", "video"), map(list, files), strict=True)
        )
        self._anew = True
        self._terminal = sys.stdin.isatty()
        if self._terminal:
            with suppress(ImportError):
                import readline as _  # noqa: F401 - input() edits lines with it, where it is there
            screen.note(HINT)

    def read(self) -> tuple[Sample, bool] | None:
        """The next question and whether it begins a conversation; None is the end."""
        from mmconvert.runtime.conversation import prompt

        while (line := self._line()) is not None:
            word, _, rest = line.partition(" ")
            if word == "/new":
                self._anew = True
            elif word[1:] in self._files and word.startswith("/"):
                self._take(word[1:], rest.strip())
            elif line:
                found = prompt(line, *self._files.values()), self._anew
                self._files = {kind: [] for kind in self._files}
                self._anew = False
                return found
        return None

    def tell(self, error: MMConvertError) -> None:
        """What is wrong with the last question."""
        self._screen.note(f"error: {error.what}")

    def _take(self, kind: str, name: str) -> None:
        if Path(name).exists() and name:
            self._files[kind].append(Path(name))
        else:
            self.tell(RequestError(f"{name or 'nothing'} is not a file"))

    def _line(self) -> str | None:
        if self._first:
            line, self._first = self._first, ""
            return line
        try:
            return input("> " if self._terminal and not self._screen.json else "").strip()
        except EOFError:
            self._screen.say("\n" if self._terminal else "")
            return None
