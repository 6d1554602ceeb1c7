"""YAML files that are given with a flag: small, and no larger than they look."""

from __future__ import annotations

import errno
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
EXPECTED = "a YAML file with the flags as keys, such as cfg: {parallel_config: {tp_size: 2}}"
MOST_VALUES = 10_000  # each alias counted with all that it stands for


def read_yaml(path: Path, flag: str) -> dict[object, object]:
    """The keys of a YAML file that was given with a flag: see :func:`read_settings`."""
    return read_settings(path, flag)[0]


def read_settings(path: Path, flag: str) -> tuple[dict[object, object], dict[str, int]]:
    """The keys of a YAML file that was given with a flag, and the line of each, joined with dots.

    Raises:
        RequestError: it cannot be read, holds no keys or a key twice, or is more than a request.
    """
    import yaml

    where = f"{flag} {path}"
    try:
        raw = _content(path, where)
        if len(raw) > MOST_BYTES:
            raise RequestError(f"{where}: more than {MOST_BYTES} bytes", EXPECTED)
        loader = yaml.SafeLoader(raw.decode("utf-8-sig"))
        node = loader.get_single_node()
        for part in _nodes(node, where):
            _check(part, where)
        plain = cast("Any", loader)  # its types say nothing of what it constructs
        content: object = plain.construct_document(node) if node else None
    except OSError as error:
        fix = "check the path" if error.errno == errno.ENOENT else ""
        raise RequestError(f"{where}: {error.strerror}", "a YAML file of flags", fix) from error
    except RequestError:
        raise
    except Exception as error:  # the library's own, and whatever a tag makes of a wrong value
        reason = " ".join(str(error).split())[:200]
        reason = reason.replace('"<unicode string>"', "the file")
        raise RequestError(f"{where}: not valid YAML: {reason}", EXPECTED) from None
    if not is_dict(content):
        raise RequestError(f"{where}: no keys", EXPECTED)
    return content, dict(_lines(node, "")) if node else {}


def _lines(node: yaml.Node, above: str) -> Iterator[tuple[str, int]]:
    """The key of each value, with those above it, and its line."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = f"{above}{key.value}"
                yield name, key.start_mark.line + 1
                yield from _lines(value, f"{name}.")


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
                raise RequestError(f"{where}: nothing comes out of this pipe", EXPECTED)
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
        for part in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            key, line = str(part.value), part.start_mark.line + 1
            if key in seen and key != "<<":
                what = f"{where}, line {line}: the key {key} occurs twice"
                raise RequestError(what, "every key once", "take one of them out")
            seen.add(key)
    elif isinstance(node, yaml.ScalarNode):
        text = str(node.value)
        try:
            good = b"\0" not in os.fsencode(text)
        except UnicodeEncodeError:
            good = False
        if not good:
            raise RequestError(f"{where}: {text!a:.80} is not text", "names and numbers")
