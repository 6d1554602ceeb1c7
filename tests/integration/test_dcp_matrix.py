"""Every format to every other, with the commands of the table in docs/dcp.md; all tools on DCP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import mmconvert
from cli import run_cli
from commands import refused, snapshot
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm
from nights import in_turns, night
from qwenvl import make_qwenvl
from stopping import noted, staging, stopped

FORMATS = {"Hugging Face": "hf", "MM": "mm", "DCP": "dcp", "torch_dist": "torch_dist"}
FORMATS["MindSpore"] = "ms"
# Of the verbs that have flags of their own: the source's, the target's, the target layout's.
OWN = {
    "hf_to_mm": ("hf_config.hf_dir", "mm_dir", "parallel_config"),
    "mm_to_hf": ("mm_dir", "save_hf_dir", ""),
    "resplit": ("source_dir", "target_dir", "target_parallel_config"),
    "hf_to_dcp": ("hf_config.hf_dir", "dcp_dir", "dcp_config"),
    "dcp_to_hf": ("dcp_dir", "save_hf_dir", ""),
    "mm_to_dcp": ("mm_dir", "dcp_dir", "dcp_config"),
    "dcp_to_mm": ("dcp_dir", "mm_dir", "parallel_config"),
    "hf_to_ms": ("hf_config.hf_dir", "ms_path", ""),
    "ms_to_hf": ("ms_path", "save_hf_dir", ""),
}
LAYOUTS = {
    "mm": {"tp_size": "2", "llm_pp_layers": "[1,1]", "vit_pp_layers": "[2,0]"},
    "dcp": {"ranks": "3"},
}


def table() -> Iterator[tuple[str, str, str]]:
    """(source format, target format, verb) of the cells of the table."""
    lines = Path(mmconvert.__file__).parents[1].joinpath("docs/dcp.md").read_text().splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    first = next(n for n, row in enumerate(rows) if row[0] == "from, to")
    heads = rows[first][1:]
    for row in rows[first + 2 :]:
        if row[0] not in FORMATS:
            return
        for head, cell in zip(heads, row[1:], strict=True):
            if cell != "–" and cell != "`moe_expert`":
                yield FORMATS[row[0]], FORMATS[head], cell.strip("`")


CELLS = list(table())
MM_CELLS = [cell for cell in CELLS if "ms" not in cell[:2]]
MS_CELLS = [cell for cell in CELLS if {*cell[:2]} <= {"hf", "ms", "dcp"}]


def words_of(cell: tuple[str, str, str], source: Path, target: Path, hf: Path) -> list[str]:
    """The command of a cell."""
    kind, to, verb = cell
    sizes = LAYOUTS.get(to, {}) if kind != "ms" else {}
    read, write, layout = OWN.get(verb, ("source", "target", "target_layout"))
    found = ["AutoConverter", verb, f"--cfg.{read}", str(source), f"--cfg.{write}", str(target)]
    if "hf_dir" not in read:
        found += ["--cfg.hf_config.hf_dir", str(hf)]
    for key, value in sizes.items() if layout else ():
        found += [f"--cfg.{layout}.{key}", value]
    return found


class Made(NamedTuple):
    """A model, and one checkpoint of it in each format, made of the Hugging Face one."""

    hf: Path
    by_format: dict[str, Path]


def made(hf: Path, formats: list[str]) -> Made:
    found = {"hf": hf}
    for to in formats:
        path = hf.parent / (f"{to}.ckpt" if to == "ms" else to)
        verb = next(cell[2] for cell in CELLS if cell[:2] == ("hf", to))
        run_cli(*words_of(("hf", to, verb), hf, path, hf), check=0)
        found[to] = path
    return Made(hf, found)


SMALL: dict[str, Any] = {"layers": 2, "vit_layers": 2}
MODELS = {"qwen2.5vl-7b": SMALL, "qwen3vl-30b-a3b": SMALL | {"deepstack": [0]}}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("matrix")
    hf = make_hf(request.param, folder / "hf", **MODELS[request.param])
    return made(hf, ["mm", "dcp", "torch_dist"])


# For what does not depend on the model: the one with experts, which has all kinds of tensors.
one_model = pytest.mark.parametrize("model", ["qwen3vl-30b-a3b"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def qwenvl(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model that MindSpore has."""
    return made(make_qwenvl(tmp_path_factory.mktemp("qwenvl") / "hf"), ["ms", "dcp"])


def same_files(a: Path, b: Path) -> None:
    """All but the manifest, which has times."""
    one, two = (
        {
            p.relative_to(folder): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file() and p.name != "mmconvert.json"
        }
        for folder in (a, b)
    )
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.parametrize(
    ("cell", "model"),
    in_turns(MM_CELLS, [*MODELS]),
    indirect=["model"],
    ids=lambda v: v[2] if isinstance(v, tuple) else v,
    scope="module",
)
def test_every_cell(cell: tuple[str, str, str], model: Made, tmp_path: Path) -> None:
    """What a format gives is, byte for byte, what Hugging Face gives."""
    kind, to, _ = cell
    out = tmp_path / "out"
    run_cli(*words_of(cell, model.by_format[kind], out, model.hf), check=0)
    if to == "hf":
        assert compare_hf(model.hf, out) == []
    same_files(out, model.by_format[to])


def test_the_table_is_all_there() -> None:
    """16 cells of four formats: all but from Hugging Face to itself, and torch_dist to itself."""
    assert len(MM_CELLS) == 14
    assert len(MS_CELLS) == 8


@pytest.mark.parametrize("cell", MS_CELLS, ids=lambda cell: cell[2])
def test_every_cell_of_mindspore(cell: tuple[str, str, str], qwenvl: Made, tmp_path: Path) -> None:
    have = qwenvl
    kind, to, _ = cell
    out = tmp_path / ("out.ckpt" if to == "ms" else "out")
    run_cli(*words_of(cell, have.by_format[kind], out, have.hf), check=0)
    assert mmconvert.verify(out, have.by_format["ms"]).equal
    assert mmconvert.verify(out, have.by_format["dcp"]).equal
    if to == "ms":
        assert out.read_bytes() == have.by_format["ms"].read_bytes()


@one_model
def test_from_python(model: Made, tmp_path: Path) -> None:
    """convert_to, open and inspect, by what stands in the folders."""
    layout = {"tp_size": 2, "llm_pp_layers": [1, 1], "vit_pp_layers": [2, 0]}
    source = model.by_format["torch_dist"]
    mmconvert.convert_to("mm", source, tmp_path / "mm", layout, hf_dir=model.hf)
    assert compare_mm(tmp_path / "mm", model.by_format["mm"]) == []
    opened = mmconvert.open(source)
    norm = mmconvert.open(model.by_format["mm"])["text_decoder.decoder.final_layernorm.weight"]
    assert torch.equal(opened["language_model.decoder.final_layernorm.weight"], norm)
    for kind in ("dcp", "torch_dist"):
        seen = mmconvert.inspect(model.by_format[kind])
        assert seen.kind == kind
        assert seen.family in ("Qwen2.5-VL", "Qwen3-VL")


two_kinds = pytest.mark.parametrize(
    ("kind", "model"),
    in_turns(["dcp", "torch_dist"], [*MODELS]),
    indirect=["model"],
    scope="module",
)


@two_kinds
def test_tools(kind: str, model: Made, tmp_path: Path) -> None:
    """Each says the same of the folder, of the one in it, and of one without our manifest."""
    folder = model.by_format[kind]
    alone = tmp_path / "alone"
    alone.symlink_to(folder / "release")
    for path in (folder, folder / "release", alone):
        said = json.loads(run_cli("inspect", path, "--json", check=0).stdout)
        assert said["kind"] == kind
        assert said["family"] in ("Qwen2.5-VL", "Qwen3-VL")
        words = ("doctor", path, "--hf_dir", model.hf, "--values")
        assert "healthy" in run_cli(*words, check=0).stdout
        run_cli("verify", path, model.hf, check=0)
        run_cli("diff", model.hf, path, check=0)
        trips = json.loads(
            run_cli("roundtrip", path, "--hf_dir", model.hf, "--json", check=0).stdout
        )
        assert [one["equal"] for one in trips["layouts"]] == [True] * 3
    refused(run_cli("roundtrip", folder), 2, "--hf_dir")
    refused(run_cli("roundtrip", folder, "--through", kind), 2, f"the format {kind} itself")
    back = json.loads(run_cli("roundtrip", model.hf, "--through", kind, "--json", check=0).stdout)
    assert back["equal"] is True
    assert len(back["layouts"]) == (2 if kind == "dcp" else 1)


@two_kinds
def test_a_changed_value_is_seen(kind: str, model: Made, tmp_path: Path) -> None:
    """verify and diff end with 1, and name the tensor."""
    out = tmp_path / kind
    run_cli(*words_of(("hf", kind, f"hf_to_{kind}"), model.hf, out, model.hf), check=0)
    found = mmconvert.open(out)
    name = next(
        name for name in found if name.endswith(("final_layernorm.weight", "l.norm.weight"))
    )
    raw = found[name].contiguous().view(torch.uint8).numpy().tobytes()[:32]
    for path in out.glob("release/*.distcp"):
        data = bytearray(path.read_bytes())
        if (at := data.find(raw)) > 0:
            data[at] ^= 1
            path.write_bytes(data)
    done = run_cli("verify", out, model.hf, check=1)
    assert "final_layernorm" in done.stdout
    assert "final_layernorm" in run_cli("diff", out, model.hf, check=1).stdout


@one_model
@pytest.mark.parametrize("verb", ["hf_to_dcp", "dcp_to_torch_dist", "torch_dist_to_dcp"])
def test_dry_run(verb: str, model: Made, tmp_path: Path) -> None:
    """It says the files and their sizes, all of which come true, and writes none."""
    cell = next(cell for cell in CELLS if cell[2] == verb)
    words = words_of(cell, model.by_format[cell[0]], tmp_path / "out", model.hf)
    before = snapshot(tmp_path)
    said = json.loads(run_cli(*words, "--dry-run", "--json", check=0).stdout)
    assert snapshot(tmp_path) == before
    run_cli(*words, check=0)
    listed = {one["path"]: one["bytes"] for one in said["files"]}
    made = {
        p.relative_to(tmp_path / "out").as_posix(): p.stat().st_size
        for p in (tmp_path / "out").rglob("*.distcp")
    }
    assert made.items() <= listed.items()


@one_model
@pytest.mark.parametrize("verb", ["hf_to_dcp", "mm_to_torch_dist", "dcp_to_hf"])
def test_it_goes_on_after_a_kill(verb: str, model: Made, tmp_path: Path) -> None:
    cell = next(cell for cell in CELLS if cell[2] == verb)
    out = tmp_path / "out"
    words = words_of(cell, model.by_format[cell[0]], out, model.hf)
    stopped(*words)
    assert not out.exists()
    assert noted(out) == 1
    said = json.loads(run_cli(*words, "--json", check=0).stdout)
    assert said["resumed_bytes"] > 0
    assert not staging(out).exists()
    same_files(out, model.by_format[cell[1]])


@one_model
def test_digests(model: Made, tmp_path: Path) -> None:
    """verify --quick compares DCP, torch_dist and MM by their digests alone."""
    for kind in ("mm", "dcp", "torch_dist"):
        verb = f"hf_to_{kind}"
        words = words_of(("hf", kind, verb), model.hf, tmp_path / kind, model.hf)
        run_cli(*words, "--digests", check=0)
    for a, b in (("mm", "dcp"), ("dcp", "torch_dist"), ("torch_dist", "mm")):
        said = run_cli("verify", "--quick", tmp_path / a, tmp_path / b, "--json", check=0)
        assert json.loads(said.stdout)["by_digest"] is True


@one_model
def test_an_existing_folder_is_kept(model: Made, tmp_path: Path) -> None:
    """--overwrite replaces an output, and no folder that holds anything else."""
    for kind in ("dcp", "torch_dist"):
        cell = ("hf", kind, f"hf_to_{kind}")
        words = words_of(cell, model.hf, tmp_path / kind, model.hf)
        run_cli(*words, check=0)
        before = (tmp_path / kind / "release/__0_0.distcp").stat()
        refused(run_cli(*words), 2, "--overwrite")
        (tmp_path / kind / "notes.txt").write_text("mine")
        refused(run_cli(*words, "--overwrite"), 2, "notes.txt")
        (tmp_path / kind / "notes.txt").unlink()
        assert (tmp_path / kind / "release/__0_0.distcp").stat().st_ino == before.st_ino
        run_cli(*words, "--overwrite", check=0)
        assert (tmp_path / kind / "release/__0_0.distcp").stat().st_mtime_ns > before.st_mtime_ns


DEEPSEEK = night("deepseekvl2")


@pytest.mark.parametrize("name", ["internvl2-8b", "glm4.1v-9b", DEEPSEEK])
def test_other_families(name: str, tmp_path: Path) -> None:
    """Their variants are told by our manifest, and what inspect shows is by module."""
    hf = make_hf(name, tmp_path / "hf", **({} if name == "deepseekvl2" else SMALL))
    out = tmp_path / "dcp"
    words = words_of(("hf", "dcp", "hf_to_dcp"), hf, out, hf)
    run_cli(*words, check=0)
    holds = {
        one["module"]
        for place in json.loads(run_cli("inspect", out, "--json", check=0).stdout)["contents"]
        for one in place["holds"]
    }
    assert {"vit", "llm"} <= holds
    assert mmconvert.verify(out, hf).equal
    assert "healthy" in run_cli("doctor", out, check=0).stdout
