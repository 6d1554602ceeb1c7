"""What must hold of every family's table, whatever its model: asked when a family is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from mmconvert.converters.family import Family
from mmconvert.converters.rows import ZEROS, Module, Row
from mmconvert.errors import RequestError
from mmconvert.names import EXPERT, INDEX, LAYER, number
from mmconvert.sharding.spans import Concat, Interleave, Part, Split

KEY = re.compile(r"[a-z][a-z0-9]*")


def check_family(family: Family) -> None:
    """Raises RequestError for a family whose table cannot be meant, naming the first bad row."""
    for variant in family.variants:
        for tied in (False, True):
            found = next(faults(family, family.modules(replace(variant, tied=tied))), "")
            if found:
                raise RequestError(
                    f"{family.converter}: the table of {family.name} is wrong: {found}",
                    "a table as CONTRIBUTING.md describes it",
                    "correct the family; mmconvert.testing.contract lists all that is wrong",
                )


def faults(family: Family, modules: tuple[Module, ...]) -> Iterator[str]:
    """What is wrong with a table, row by row, in words."""
    keys = [m.key for m in modules]
    if tuple(keys) != family.module_keys:
        yield f"its modules are {keys}, in another variant {list(family.module_keys)}"
    for key in keys:
        if not KEY.fullmatch(key):
            yield f"{key!r} is not a module key: small letters and digits, a letter first"
    if (count := [m.role for m in modules].count("decoder")) != 1:
        yield f"it has {count} modules with the role of a decoder; one of them must have it"
    rows = [r for m in modules for r in m.all_rows()]
    for name, count in Counter(r.mm for r in rows).items():
        if count > 1:
            yield f"{name} is in {count} rows"
    origins = {r.mm for r in rows if not r.tied_to}
    for module in modules:
        for row in module.all_rows():
            words = list(_of_row(row, family, inside=any(row is one for one in module.layer)))
            if row.tied_to and row.tied_to not in origins:
                words.append(f"it is tied to {row.tied_to}, which has no row")
            yield from (f"{row.mm}: {word}" for word in words)


def _of_row(row: Row, family: Family, *, inside: bool) -> Iterator[str]:
    """What is wrong with a row, in each of its namings."""
    if row.own != family.naming:
        yield f"its whole is named as in {row.own}, not as in {family.naming}"
    for naming in row.names:
        if naming != row.own:
            seen = row if naming == "hf" else replace(row, sources=naming, transposed=False)
            yield from (*_fields(seen, inside=inside), *_makes(seen))
    yield from _sizes(row, family)


def _fields(row: Row, *, inside: bool) -> Iterator[str]:
    """The fields of the names, and the list of layers."""
    names = (row.mm, *(name for name in row.hf if name != ZEROS))
    if len(names) < 2:
        yield "it is made of no tensor"
    for name in names:
        rest = name
        for field in (LAYER, EXPERT, INDEX):
            rest = rest.replace(field, "", 1)
        if "{" in rest or "}" in rest:
            yield f"{name} has a field that is none of {LAYER}, {EXPERT}, {INDEX}, or one twice"
        counted = LAYER in name or (INDEX in name and name != row.mm)
        if counted != inside:
            where = "of the layers" if inside else "outside the layers"
            yield f"{name} {'lacks' if inside else 'has'} {LAYER}, in a row {where}"
        if EXPERT in name and EXPERT not in row.mm:
            yield f"{name} has {EXPERT}, the MM name has not"
    if row.only and not inside:
        yield f"only={row.only!r} in a row outside the layers"
    if any(INDEX in name for name in row.hf) and not row.only:
        yield f"{INDEX} without only="


def _makes(row: Row) -> Iterator[str]:
    """How the tensor is made and divided."""
    fuse, shard = cast(object, row.fuse), cast(object, row.shard)  # a stranger's may be anything
    if not isinstance(fuse, (Concat, Interleave, Part)):
        yield f"fuse is {fuse!r}, none of Concat, Interleave, Part"
    if shard is not None and not isinstance(shard, Split):
        yield f"shard is {shard!r}, no Split"
    one = (isinstance(row.fuse, Interleave) and row.fuse.packed_qkv) or row.transposed
    if one and len(row.hf) != 1:
        yield f"it is made of {len(row.hf)} tensors; packed_qkv and transposed are for one"
    if row.transposed and row.fuse != Concat():
        yield "a transposed tensor cannot be fused"


def _sizes(row: Row, family: Family) -> Iterator[str]:
    """The names of dimensions; whether config.json gives them, a conversion sees."""
    if len(row.rows) not in (0, len(row.hf)):
        yield f"rows names {number(row.rows, 'size')} for {number(row.hf, 'tensor')}"
    groups = getattr(row.fuse, "groups", "")
    unit = getattr(row.shard, "unit", "")
    for dim in filter(None, (*row.rows, row.cols, groups, unit)):
        if dim.partition(".")[0] not in family.module_keys or not dim.partition(".")[2]:
            yield f"{dim!r} is not a dimension; it begins with one of {list(family.module_keys)}"
