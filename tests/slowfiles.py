"""A folder shown once more through FUSE, read only, where each call takes a while: as a file server
far away. The kernel's protocol is spoken as include/uapi/linux/fuse.h describes it (7.31).

As a program, ``python tests/slowfiles.py FOLDER MOUNT_POINT SECONDS`` serves until its standard
input ends, and then prints what reads it has seen, as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE = 1, 2, 3, 14, 15, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, BATCH_FORGET = 25, 26, 27, 28, 29, 42
HEADER, ANSWER = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
ATTRIBUTES, READ_IN = struct.Struct("<6Q10I"), struct.Struct("<QQII")
KEPT = 3600  # seconds for which the kernel may keep names and attributes
THREADS, MOST = 32, 1 << 20  # answers at a time; bytes of one read
ASYNC_READ, MAX_PAGES = 1 << 0, 1 << 22


class Server:
    """Answers the kernel's questions about the files of one folder."""

    def __init__(self, folder: Path, fd: int, delay: float) -> None:
        self.files = [folder, *sorted(folder.iterdir())]  # inode 1 is the folder
        self.open = [os.open(path, os.O_RDONLY) for path in self.files]
        self.fd, self.delay = fd, delay
        self.reads, self.now, self.most, self.nbytes = 0, 0, 0, 0
        self.lock = threading.Lock()

    def run(self) -> None:
        while True:
            try:
                question = os.read(self.fd, MOST + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                continue
            _, kind, unique, node = HEADER.unpack_from(question)[:4]
            if kind in (FORGET, BATCH_FORGET):
                continue
            answer = self.answer(kind, node, question[HEADER.size :])
            code, data = (-answer, b"") if isinstance(answer, int) else (0, answer)
            os.write(self.fd, ANSWER.pack(ANSWER.size + len(data), code, unique) + data)

    def answer(self, kind: int, node: int, body: bytes) -> bytes | int:
        if kind == INIT:
            flags = ASYNC_READ | MAX_PAGES
            sizes = (64, 48, MOST, 1, MOST >> 12, 0)
            return struct.pack("<IIIIHHIIHH8I", 7, 31, MOST, flags, *sizes, *[0] * 8)
        time.sleep(self.delay)
        if kind == READ:
            return self.read(node, body)
        if kind == LOOKUP:
            names = [path.name for path in self.files[1:]]
            name = os.fsdecode(body.rstrip(b"\0"))
            if name not in names:
                return errno.ENOENT
            number = names.index(name) + 2
            return struct.pack("<4Q2I", number, 0, KEPT, KEPT, 0, 0) + self.attributes(number)
        if kind == GETATTR:
            return struct.pack("<QII", KEPT, 0, 0) + self.attributes(node)
        if kind in (OPEN, OPENDIR):
            return struct.pack("<QII", 0, 0, 0)
        if kind == READDIR:
            return self.names(READ_IN.unpack_from(body)[1])
        return b"" if kind in (RELEASE, RELEASEDIR, FLUSH) else errno.ENOSYS

    def attributes(self, number: int) -> bytes:
        s = self.files[number - 1].stat()
        times = (int(s.st_atime), int(s.st_mtime), int(s.st_ctime), 0, 0, 0)
        kind = stat.S_IFDIR if number == 1 else stat.S_IFREG
        rest = (kind | 0o755, 1, os.getuid(), os.getgid(), 0, 4096, 0)
        return ATTRIBUTES.pack(number, s.st_size, s.st_blocks, *times, *rest)

    def names(self, offset: int) -> bytes:
        found = b""
        for number, path in list(enumerate(self.files, 1))[1 + offset :]:
            name = os.fsencode(path.name)
            entry = struct.pack("<QQII", number, number - 1, len(name), 8) + name
            found += entry + bytes(-len(entry) % 8)
        return found

    def read(self, node: int, body: bytes) -> bytes:
        _, offset, size, _ = READ_IN.unpack_from(body)
        with self.lock:
            self.reads, self.now, self.nbytes = self.reads + 1, self.now + 1, self.nbytes + size
            self.most = max(self.most, self.now)
        data = os.pread(self.open[node - 1], size, offset)
        time.sleep(self.delay)
        with self.lock:
            self.now -= 1
        return data


class Seen:
    """What a server has seen, known when it has ended: ``reads``, their ``nbytes``, and the
    ``most`` at a time.
    """

    def __init__(self) -> None:
        self.found: dict[str, int] = {}


@contextmanager
def slow(folder: Path, at: Path, seconds: float = 0.002) -> Iterator[Seen]:
    """`folder`, which is flat, shown at `at`, a folder that is made; for root only."""
    at.mkdir()
    words = [sys.executable, __file__, str(folder), str(at), str(seconds)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        if process.stdout.readline() != "mounted\n":
            pytest.skip(f"no FUSE here: {process.stderr.read().strip().splitlines()[-1:]}")
        seen = Seen()
        try:
            yield seen
        finally:
            process.stdin.close()
            seen.found = json.loads(process.stdout.read())


def main(folder: str, at: str, seconds: str) -> None:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"slow", os.fsencode(at), b"fuse.slow", 0, f"{options},max_read={MOST}".encode()):
        raise SystemExit(f"mount: {os.strerror(ctypes.get_errno())}")
    server = Server(Path(folder), fd, float(seconds))
    threads = [threading.Thread(target=server.run, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    print("mounted", flush=True)
    sys.stdin.read()
    libc.umount2(os.fsencode(at), 2)
    print(json.dumps({"reads": server.reads, "nbytes": server.nbytes, "most": server.most}))


if __name__ == "__main__":
    main(*sys.argv[1:])
