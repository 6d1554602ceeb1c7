"""docs/json.md and the pictures of docs/diff.md: keys and samples are those that are printed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from cli import run_cli
from commands import hf_to_mm, layout
from mmconvert.playground.folder import ITEMS
from pages import ROOT

PAGE, KEYS = ROOT / "docs" / "diff.md", ROOT / "docs" / "json.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page compares."""
    folder = tmp_path_factory.mktemp("page")
    for item in ITEMS:
        if item.name in ("base", "trained"):
            item.make(folder)
    stages = layout("[[0,3],[4,5]]", "[[4,4],[0,0]]", 2)
    hf_to_mm(folder / "trained", folder / "trained_mm", *stages)
    return folder


def test_the_pictures_are_those_that_are_written(folder: Path) -> None:
    run_cli("diff", "base", "trained_mm", "--svg", "layers.svg", cwd=folder, check=1)
    run_cli("inspect", "trained_mm", "--svg", "layout.svg", cwd=folder, check=0)
    for written, kept in (("layers.svg", "diff.svg"), ("layout.svg", "layout.svg")):
        picture = ROOT / "docs" / "images" / kept
        assert (folder / written).read_text() == picture.read_text()
        assert f"(images/{kept})" in PAGE.read_text()
        assert picture.stat().st_size < 60_000


def flat(value: object, name: str) -> set[str]:
    """The keys of a JSON value as docs/json.md writes them: a.b, list[].key."""
    if isinstance(value, dict):
        return {key for k, v in value.items() for key in flat(v, f"{name}.{k}" if name else k)}
    if isinstance(value, list):
        return {key for item in value for key in flat(item, f"{name}[]")} or {f"{name}[]"}
    return {name}


def documented(section: str) -> set[str]:
    text = KEYS.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


FIGURES = {
    *("elements", "different_elements", "relative_l2", "l2_difference", "l2_a"),
    "largest_difference",
}


def test_the_keys_of_diff(folder: Path) -> None:
    """Every key that is printed is described, and the other way round."""
    done = run_cli("diff", "base", "trained_mm", "--json", cwd=folder, check=1)
    repeated = {f"{group}[].{key}" for group in ("modules", "layers", "top") for key in FIGURES}
    repeated |= {f"layers[].{key}" for key in ("module", "tensors", "changed")}
    found = flat(json.loads(done.stdout), "")
    named = documented("diff")
    assert found - repeated <= named
    # Lists that are empty here; their keys are compared in test_diff.py.
    empty = {n for n in named if n.startswith(("not_finite[]", "other_shapes[]"))}
    assert named - found - empty == {"modules[]", "layers[]", "top[]"}
    assert {"not_finite[]", "other_shapes[]"} <= found


def test_the_keys_of_inspect(folder: Path) -> None:
    done = run_cli("inspect", "trained_mm", "--json", "--tensors", cwd=folder, check=0)
    found = flat(json.loads(done.stdout), "")
    found = {re.sub(r"^listing.*", "listing[]", name) for name in found}
    named = documented("inspect")
    # Qwen2-VL has no audio encoder: null stands there.
    assert found - {"layout.audio_pp_layers"} <= named
    absent = {name for name in named - found if not name.startswith("optimizer")}  # none was saved
    assert absent == {"contents[]", "layout", "layout.audio_pp_layers[][]"}


def test_the_samples_have_the_keys_and_values_that_are_printed(folder: Path) -> None:
    commands = {
        "diff": ("diff", "base", "trained_mm", "--top", "1"),
        "inspect": ("inspect", "trained_mm"),
    }
    for section, words in commands.items():
        text = KEYS.read_text().split(f"\n## {section}\n")[1]
        sample = re.search(r"^```text\n(.*?)^```$", text, re.M | re.S)
        assert sample
        shown = json.loads(sample[1].replace(", ...]", "]"))
        got = json.loads(run_cli(*words, "--json", cwd=folder).stdout)
        assert list(shown) == list(got)
        for key, value in shown.items():
            found = got[key]
            if isinstance(value, list) and len(value) < len(found):  # shortened
                assert any(close(value[0], item) for item in found), key
            else:
                assert close(value, found), key


def close(shown: object, got: object) -> bool:
    """Whether two JSON values are equal, numbers to the six digits that the page shows."""
    if isinstance(shown, dict) and isinstance(got, dict):
        return list(shown) == list(got) and all(close(shown[key], got[key]) for key in shown)
    if isinstance(shown, list) and isinstance(got, list):
        return len(shown) == len(got) and all(map(close, shown, got))
    if isinstance(shown, float) and isinstance(got, float):
        return math.isclose(shown, got, rel_tol=1e-5)
    return type(shown) is type(got) and shown == got
