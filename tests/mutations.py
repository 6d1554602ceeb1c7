"""Checkpoints damaged at random, and what the command line makes of them.

As a program, ``python mutations.py SEED COUNT FOLDER`` runs COUNT of them with bounded memory
and prints how they ended as JSON.
"""

from __future__ import annotations

import json
import os
import pickletools
import resource
import shutil
import signal
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from inprocess import BACK, HF, MM, SOURCE, TARGET, Done, call, converter_of
from mmconvert.playground.checkpoints import make_hf

MODELS = ("qwen2vl-2b", "qwen2.5vl-7b", "qwen2.5omni-7b", "internvl2-76b")
VERBS = ("hf_to_mm", "mm_to_hf", "resplit")
PREFIXES = ("image_encoder.", "text_decoder.", "audio_encoder.")
MEMORY = 1 << 30  # bytes of address space that a conversion may add
SECONDS = 20  # what no small checkpoint may take

Names = dict[str, set[str]]


class Base(NamedTuple):
    """An undamaged model: its folders, and the tensors of each direction's output."""

    model: str
    hf: Path
    mm: Path
    expected: dict[str, Names]


class Outcome(NamedTuple):
    """What was damaged, how, and what came of it."""

    model: str
    verb: str
    kind: str
    code: int
    fault: str  # empty unless the tool is at fault


# -------------------------------------------------------------------------------- bases
def layout(model: str, llm: str, vit: str, tp: int, of: str = "") -> list[str]:
    """The flags of a layout."""
    given = {"llm_pp_layers": llm, "vit_pp_layers": vit, "tp_size": str(tp)}
    if "omni" in model:
        given["audio_pp_layers"] = vit
    return [w for k, v in given.items() for w in (f"--cfg.{of}parallel_config.{k}", v)]


def make_base(model: str, folder: Path) -> Base:
    """The model with few layers, and its MM form on two stages of two tp ranks."""
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1}
    sizes |= {"audio_layers": 1} if "omni" in model else {}
    hf, mm = make_hf(model, folder / "hf", shards=2, **sizes), folder / "mm"
    call(*command(model, "hf_to_mm", hf, mm, mm))
    base = Base(model, hf, mm, {"hf_to_mm": mm_names(mm)})
    call(*command(model, "resplit", hf, mm, folder / "other"))
    base.expected["resplit"] = mm_names(folder / "other")
    return base


def command(model: str, verb: str, hf: Path, mm: Path, out: Path) -> list[str | Path]:
    """The words of one conversion; resplit is given the original model's sizes."""
    words: list[str | Path] = [converter_of(model), verb, HF, hf]
    if verb == "hf_to_mm":
        words += [MM, out, *layout(model, "[1,1]", "[1,0]", 2)]
    elif verb == "mm_to_hf":
        words += [MM, mm, BACK, out]
    else:
        words += [SOURCE, mm, TARGET, out, *layout(model, "[2]", "[1]", 1, "target_")]
    return [*words, "--workers", "1", "--debug"]


def mm_names(mm: Path) -> Names:
    """The tensors of every rank file, by the strings in its pickle."""
    found: Names = {}
    for path in sorted(mm.rglob("model_optim_rng.pt")):
        with zipfile.ZipFile(path) as archive:
            (record,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            words = [arg for _, arg, _ in pickletools.genops(archive.read(record))]
        names = {w for w in words if isinstance(w, str) and w.startswith(PREFIXES)}
        found[path.relative_to(mm).as_posix()] = names
    return found


def hf_names(hf: Path) -> Names:
    """The tensors of the weight files that count: those of the index, if there is one."""
    found: Names = {}
    index = hf / "model.safetensors.index.json"
    names = {path.name for path in hf.glob("*.safetensors")}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    for path in (hf / name for name in sorted(names)):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found[path.name] = header.keys() - {"__metadata__"}
    return found


# ---------------------------------------------------------------------------- mutations
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 10**12, 2**31, 2**53, 2**63, 2**64, 10**100),
    *(1.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "\0", "../x", "/etc/passwd"),
    *("x" * 5000, "\ud800", "{}", "28", [], [0], [-1], [[]], [2**62, 4], {}, {"a": 1}),
)


def some_place(random: Random, value: Any) -> tuple[Any, Any] | None:
    """A container within a JSON value, and one of its keys."""
    place = None
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = random.choice(keys)
        place = (value, key)
        value = value[key]
        if random.random() < 0.3:
            break
    return place


def mutate_json(random: Random, text: bytes) -> bytes:
    """Replace, remove, double or rename one value."""
    value = json.loads(text)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        place = some_place(random, value)
        if place is None:
            break
        container, key = place
        what = random.randrange(6)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[random.choice(["", "x", str(key) + "x", "__metadata__"])] = container[key]
        elif what == 2 and isinstance(container, dict):
            container[str(key)[:-1]] = container.pop(key)
        elif what == 3 and isinstance(container[key], int):
            container[key] += random.choice((-1, 1, 8, -8, 2**32))
        elif what == 4:
            other = some_place(random, value)
            container[key] = other[0][other[1]] if other and other[0] is not container else None
        else:
            container[key] = random.choice(HOSTILE)
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):  # it contains itself now
        return text[:-1]


def mutate_bytes(random: Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Change, insert, remove or repeat bytes between two places."""
    made = bytearray(data)
    last = len(made) if last is None else last
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(first, max(first + 1, min(last, len(made))))
        length = random.choice((1, 1, 2, 4, 30))
        what = random.randrange(6)
        if what == 0:
            del made[at : at + length]
        elif what == 1:
            made[at:at] = bytes(random.randrange(256) for _ in range(length))
        elif what == 2:
            made[at : at + length] = bytes([random.choice((0, 255, 127, 128))]) * length
        elif what == 3:
            made[at:at] = made[at : at + length]
        elif at < len(made):
            made[at] ^= 1 << random.randrange(8)
    return bytes(made)


def mutate_text(random: Random, text: bytes) -> bytes:
    """Another tracker file."""
    words = (b"", b"release", b"0", b"-1", b"1" * 12, b"1" * 5000, b"../..", b"/", b"\0", b"\xff")
    words += (b"release\n", b" release", b"RELEASE", b"release/..", b"1e3", b"\n" * 100, b"iter_1")
    return random.choice(words) if random.random() < 0.7 else mutate_bytes(random, text)


def replaced(path: Path, content: bytes) -> None:
    """Write a file anew; what it was linked to stays."""
    path.unlink()
    path.write_bytes(content)


def some_file(random: Random, folder: Path, pattern: str) -> Path:
    return random.choice(sorted(folder.rglob(pattern)))


def header_json(random: Random, hf: Path, mm: Path) -> None:
    path = some_file(random, hf, "*.safetensors")
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = mutate_json(random, data[8:size])
    replaced(path, len(header).to_bytes(8, "little") + header + data[size:])


def header_bytes(random: Random, hf: Path, mm: Path) -> None:
    path = some_file(random, hf, "*.safetensors")
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    replaced(path, mutate_bytes(random, data, 0, size))


def cut(random: Random, hf: Path, mm: Path) -> None:
    path = some_file(random, random.choice((hf, mm)), "*.*t*")
    if path.is_file():
        data = path.read_bytes()
        replaced(path, data[: random.randrange(len(data) + 1)])


def index_json(random: Random, hf: Path, mm: Path) -> None:
    path = some_file(random, hf, "*.index.json")
    replaced(path, mutate_json(random, path.read_bytes()))


def index_bytes(random: Random, hf: Path, mm: Path) -> None:
    path = some_file(random, hf, "*.index.json")
    replaced(path, mutate_bytes(random, path.read_bytes()))


def config_json(random: Random, hf: Path, mm: Path) -> None:
    path = hf / "config.json"
    replaced(path, mutate_json(random, path.read_bytes()))


def config_bytes(random: Random, hf: Path, mm: Path) -> None:
    path = hf / "config.json"
    replaced(path, mutate_bytes(random, path.read_bytes()))


def manifest_json(random: Random, hf: Path, mm: Path) -> None:
    path = mm / "mmconvert.json"
    replaced(path, mutate_json(random, path.read_bytes()))


def pt_directory(random: Random, hf: Path, mm: Path) -> None:
    """The directory at the end of the archive, and the end record."""
    path = some_file(random, mm, "*.pt")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    replaced(path, mutate_bytes(random, data, start))


def pt_headers(random: Random, hf: Path, mm: Path) -> None:
    """The local headers in front of the records."""
    path = some_file(random, mm, "*.pt")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = random.choice(archive.infolist())
    replaced(path, mutate_bytes(random, data, info.header_offset, info.header_offset + 64))


def record(data: bytes, info: zipfile.ZipInfo) -> bytes:
    """A stored record; its checksum is none, as a conversion writes none unless it is asked."""
    at = info.header_offset
    start = at + 30 + sum(int.from_bytes(data[at + k : at + k + 2], "little") for k in (26, 28))
    return data[start : start + info.file_size]


def pt_pickle(random: Random, hf: Path, mm: Path) -> None:
    """The pickle, in place, or of another length in a new archive."""
    path = some_file(random, mm, "*.pt")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: record(data, info) for info in archive.infolist()}
    (name,) = (n for n in records if n.endswith("/data.pkl"))
    records[name] = mutate_bytes(random, records[name])
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record_name, content in records.items():
            archive.writestr(record_name, content)


def tracker(random: Random, hf: Path, mm: Path) -> None:
    path = mm / "latest_checkpointed_iteration.txt"
    replaced(path, mutate_text(random, path.read_bytes()))


def names(random: Random, hf: Path, mm: Path) -> None:
    """Rename, remove or double a file or folder."""
    root = random.choice((hf, mm))
    path = random.choice(sorted(root.rglob("*")))
    words = ["mp_rank_00", "mp_rank_02_000", "mp_rank_00_002", "mp_rank_1_0", "mp_rank_99999_99999"]
    words += ["mp_rank_00_000_001", "iter_0000001", "x", "model.safetensors", "config.json"]
    words += ["a.safetensors", ".hidden", "model_optim_rng.pt", "mp_rank_٠٠_٠٠٠", "a\nb", "\udcff"]
    new = path.with_name(random.choice(words))
    what = random.randrange(4)
    if what == 0:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif what == 1 and path.is_file():
        path.unlink()
        path.mkdir()
    elif new.exists():
        swap = path.with_name("swap")
        path.rename(swap)
        if new.is_dir() == swap.is_dir() and random.random() < 0.5:
            new.rename(path)
            swap.rename(new)
    elif what == 2:
        shutil.copytree(path, new) if path.is_dir() else shutil.copy(path, new)
    else:
        path.rename(new)


Mutation = Callable[[Random, Path, Path], None]
OF_HF: tuple[Mutation, ...] = (header_json, header_bytes, index_json, index_bytes)
OF_CONFIG: tuple[Mutation, ...] = (config_json, config_json, config_bytes)
OF_MM: tuple[Mutation, ...] = (
    *(pt_directory, pt_headers, pt_pickle, pt_pickle, tracker, manifest_json),
)
KINDS: dict[str, tuple[Mutation, ...]] = {
    "hf_to_mm": (*OF_HF, *OF_CONFIG, cut, names),
    "mm_to_hf": (*OF_HF, *OF_CONFIG, *OF_MM, cut, names),
    "resplit": (*OF_CONFIG, *OF_MM, cut, names),
}


# ------------------------------------------------------------------------------ running
def linked(folder: Path, to: Path) -> Path:
    """A copy whose files share their data with the original until they are replaced."""
    shutil.copytree(folder, to, copy_function=os.link)
    return to


class TooSlow(Exception):  # noqa: N818 - no error, an alarm
    """One conversion took longer than any may."""


def _too_slow(signum: int, frame: object) -> None:
    raise TooSlow(f"more than {SECONDS} s")


@contextmanager
def bounded() -> Iterator[None]:
    """Bounded memory and time, for this process; time only in its main thread."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        present = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + MEMORY, limits[1]))
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def mutate(random: Random, mutations: Sequence[Mutation], hf: Path, mm: Path) -> int:
    """Apply mutations one after the other; returns how many succeeded.

    A second one reads what the first has left with Python's own readers, which may fail in any
    way: that is no finding about the tool, and what is damaged by then is tried all the same.
    """
    for number, mutation in enumerate(mutations):
        try:
            mutation(random, hf, mm)
        except Exception:
            if not number:
                raise  # a whole checkpoint is there to be damaged: this mutation is wrong
            return number
    return len(mutations)


def try_one(random: Random, bases: dict[str, Base], work: Path) -> Outcome:
    """Damage one checkpoint, convert it, and judge the outcome."""
    base = bases[random.choice(sorted(bases))]
    verb = random.choice(VERBS)
    hf, mm, out = linked(base.hf, work / "hf"), linked(base.mm, work / "mm"), work / "out"
    mutation = random.choice(KINDS[verb])
    mutate(random, [mutation] * random.choice((1, 1, 1, 2)), hf, mm)
    fault, code = "", -1
    try:
        with bounded():
            done = call(*command(base.model, verb, hf, mm, out), check=None)
        code = done.returncode
        fault = _judge(base, verb, hf, out, done)
    except AssertionError as error:
        fault = str(error)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Outcome(base.model, verb, mutation.__name__, code, fault[-4000:])


def _judge(base: Base, verb: str, hf: Path, out: Path, done: Done) -> str:
    left = [p.name for p in out.parent.iterdir() if p.name not in ("hf", "mm", "out")]
    if left:
        return f"left behind: {left}"
    if done.returncode in (2, 3):
        if "error: " not in done.stderr:
            return f"exit code {done.returncode} without an error line: {done.stderr}"
        if "out of memory" in done.stderr:
            return "out of memory"
        return "an output in spite of the error" if out.exists() else ""
    if done.returncode != 0:
        return f"exit code {done.returncode}: {done.stderr}"
    found = hf_names(out) if verb == "mm_to_hf" else mm_names(out)
    expected = hf_names(hf) if verb == "mm_to_hf" else base.expected[verb]
    count, right = (sum(map(len, x.values())) for x in (found, expected))
    if set().union(*found.values()) != set().union(*expected.values()) or count != right:
        return f"success, but {count} tensors instead of {right}"
    return ""


def many(seed: int, count: int, folder: Path) -> tuple[Counter[str], list[tuple[int, Outcome]]]:
    """Run many; how they ended, and the faults with their numbers."""
    bases = {model: make_base(model, folder / model) for model in MODELS}
    ended: Counter[str] = Counter()
    faults: list[tuple[int, Outcome]] = []
    for number in range(count):
        work = folder / "work" / str(number)
        work.mkdir(parents=True)
        outcome = try_one(Random(f"{seed} {number}"), bases, work)
        ended[f"{outcome.verb} exit {outcome.code}"] += 1
        if outcome.fault:
            faults.append((number, outcome))
    return ended, faults


if __name__ == "__main__":
    ended, faults = many(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps({"ended": ended, "faults": [[n, *o] for n, o in faults]}))
