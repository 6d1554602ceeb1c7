"""YAML files that are given with a flag: small, and no larger than they look."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmconvert.errors import RequestError
from mmconvert.narrow import is_dict

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 1 << 16  # our files have twenty lines
PATIENCE = 5.0  # seconds
MOST_VALUES = 10_000  # each alias counted with all that it stands for


def read_yaml(path: Path, flag: str) -> dict[object, object]:
    """The keys of a YAML file that was given with a flag.

    Raises:
        RequestError: it cannot be read, holds no keys or a key twice, or is more than a request.
    """
    import yaml

    where = f"{flag} {path}"
    try:
        raw = _content(path, where)
        if len(raw) > MOST_BYTES:
            raise RequestError(f"{where}: more than {MOST_BYTES} bytes", "a file of flags")
        loader = yaml.SafeLoader(raw.decode("utf-8-sig"))
        node = loader.get_single_node()
        for part in _nodes(node, where):
            _check(part, where)
        plain = cast("Any", loader)  # its types say nothing of what it constructs
        content: object = plain.construct_document(node) if node else None
    except OSError as error:
        raise RequestError(f"{where}: {error.strerror}", "a readable file") from error
    except RequestError:
        raise
    except Exception as error:  # the library's own, and whatever a tag makes of a wrong value
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"{where}: not valid YAML: {reason}") from None
    if not is_dict(content):
        raise RequestError(f"{where}: no keys", "keys such as cfg:, nested as the flags")
    return content


def _content(path: Path, where: str) -> bytes:
    """The bytes of a file, a little more than are allowed at most; a pipe, as a shell's ``<(...)``
    is one, is waited for no longer than PATIENCE.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(fd, "rb", buffering=0) as file:
        pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        raw = b""
        while len(raw) <= MOST_BYTES:
            if pipe and not select.select([fd], [], [], PATIENCE)[0]:
                raise RequestError(f"{where}: nothing comes out of this pipe", "a file of flags")
            part = file.read(MOST_BYTES + 1 - len(raw))
            if not part:
                break
            raw += part
        return raw


def _nodes(node: yaml.Node | None, where: str) -> Iterator[yaml.Node]:
    """The parts of a file, those behind an alias once for each time that it is used.

    Raises:
        RequestError: too many, such as of an alias to what holds it.
    """
    import yaml

    waiting = [] if node is None else [node]
    left = MOST_VALUES
    while waiting:
        node = waiting.pop()
        yield node
        inner = list(node.value) if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in inner for part in pair]
        left -= len(inner)
        if left < 0:
            raise RequestError(
                f"{where}: too many values: more than {MOST_VALUES}, aliases counted each time",
                "keys as the flags, nested once, and no alias that contains itself",
            )
        waiting += inner


def _check(node: yaml.Node, where: str) -> None:
    """Raises RequestError for a key that occurs twice, of which YAML would take the last, and for
    text that no command line could hold.
    """
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen = set[str]()
        for key in (str(k.value) for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key in seen and key != "<<":
                raise RequestError(f"{where}: the key {key} occurs twice", "every key once")
            seen.add(key)
    elif isinstance(node, yaml.ScalarNode):
        text = str(node.value)
        try:
            good = b"\0" not in os.fsencode(text)
        except UnicodeEncodeError:
            good = False
        if not good:
            raise RequestError(f"{where}: {text!a:.80} is no text", "names and numbers")
