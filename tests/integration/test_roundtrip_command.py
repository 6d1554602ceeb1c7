"""`mm-convert roundtrip`: the checkpoint comes back through any layout, and faults are seen."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cli import run_cli
from commands import copied, edit_single, refused, snapshot
from mmconvert.config import Options
from mmconvert.converters import load
from mmconvert.errors import MMConvertError
from mmconvert.formats.hf.model import hf_model
from mmconvert.formats.mm.samples import representative
from mmconvert.plan.joined import join_plans
from mmconvert.plan.plan import Copy, Plan
from mmconvert.playground.checkpoints import make_hf
from mmconvert.stored import StoredTensor, Target
from nights import nightly

MODELS = {
    "qwen2vl-2b": "Qwen2VLConverter",
    "qwen2.5vl-3b": "Qwen2_5_VLConverter",
    "qwen2.5omni-7b": "Qwen2_5_OmniConverter",
    "internvl2-2b": "InternVLConverter",
}


@pytest.mark.parametrize("model", nightly(MODELS, but=("qwen2.5vl-3b", "internvl2-2b")))
def test_every_family_comes_back(model: str, tmp_path: Path) -> None:
    hf = make_hf(model, tmp_path / "hf", layers=4, vit_layers=4)
    before = snapshot(tmp_path)
    done = run_cli("roundtrip", hf, "--json", check=0)
    found = json.loads(done.stdout)
    assert found["equal"] is True
    assert [one["equal"] for one in found["layouts"]] == [True] * 3
    names = hf_model(load(MODELS[model]), hf, Options()).hf_tensors
    assert all(one["tensors"] == len(names) for one in found["layouts"])
    sizes = [(one["layout"]["pp_size"], one["layout"]["vpp_size"]) for one in found["layouts"]]
    assert sizes == [(1, 1), (2, 1), (2, 2)]
    assert snapshot(tmp_path) == before


def test_layouts_of_ones_own_and_junit(tied_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "late.yaml").write_text("llm_pp_layers: [0, 4]\nvit_pp_layers: [1, 1]\n")
    (tmp_path / "whole.yaml").write_text(
        "cfg:\n  parallel_config:\n    llm_pp_layers: [[4]]\n    vit_pp_layers: [[2]]\n"
        "    tp_size: 2\n"
    )
    flags = ["--layout", tmp_path / "late.yaml", f"--layout={tmp_path / 'whole.yaml'}"]
    done = run_cli("roundtrip", tied_hf, *flags, "--junit", tmp_path / "trip.xml", check=0)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["late", "whole"]
    suite = ElementTree.parse(tmp_path / "trip.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "0", "0")
    assert [case.get("name") for case in suite] == ["late", "whole"]


def test_a_layout_that_the_model_does_not_allow(tmp_path: Path) -> None:
    """One that was given is an error; of the default ones it is named as skipped."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=2, vit_layers=2, heads=3, kv=3, head_dim=24)
    done = run_cli("roundtrip", hf, "--junit", tmp_path / "trip.xml", check=0)
    assert "skipped" in done.stdout
    assert ElementTree.parse(tmp_path / "trip.xml").getroot().get("skipped") == "1"
    (tmp_path / "own.yaml").write_text("llm_pp_layers: [2]\nvit_pp_layers: [2]\ntp_size: 2\n")
    done = run_cli("roundtrip", hf, "--layout", tmp_path / "own.yaml")
    refused(done, 2, "tp_size")


def test_a_stored_head_that_is_no_embedding(tmp_path: Path) -> None:
    """Config.json says tied, the tensors differ: what comes back is not what went in."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=1, vit_layers=1, shards=1)
    run_cli("roundtrip", hf, check=0)

    def add_head(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit_single(hf, add_head)
    done = run_cli("roundtrip", hf, "--json", "--junit", tmp_path / "trip.xml")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] is False
    assert all("lm_head.weight" in one["unequal"] for one in found["layouts"])
    assert ElementTree.parse(tmp_path / "trip.xml").getroot().get("failures") == "3"


def test_requests_that_cannot_work(tied_hf: Path, tmp_path: Path) -> None:
    refused(run_cli("roundtrip", tmp_path / "none"), 3, str(tmp_path / "none"))
    refused(run_cli("roundtrip", tied_hf, "--layout", tmp_path / "no.yaml"), 2, "no.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    refused(run_cli("roundtrip", tied_hf, "--layout", tmp_path / "list.yaml"), 2, "list.yaml")
    (tmp_path / "typo.yaml").write_text("llm_layers: [4]\n")
    refused(run_cli("roundtrip", tied_hf, "--layout", tmp_path / "typo.yaml"), 2, "llm_layers")
    out = tmp_path / "no folder" / "trip.xml"
    refused(run_cli("roundtrip", tied_hf, "--quiet", "--junit", out), 2, "trip.xml")
    damaged = copied(tied_hf, tmp_path / "damaged")
    file = sorted(damaged.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    refused(run_cli("roundtrip", damaged), 3, file.name)


# ------------------------------------------------------------------------- joining two plans
A = StoredTensor("a", "U8", (4, 2), Path("f"), 0)


def _plan(copies: list[Copy], source: StoredTensor = A) -> Plan:
    return Plan([source], [Target("b", "U8", (4, 2))], copies, [])


def test_joined_plans_follow_the_bytes() -> None:
    """Rows in turned order there, and turned back: every row is read where it is written."""
    there = _plan([Copy(0, 0, 0, 0, 2, 0, 2, 2), Copy(0, 2, 0, 0, 0, 0, 2, 2)])
    back = _plan([Copy(0, 0, 0, 0, 2, 0, 2, 2), Copy(0, 2, 0, 0, 0, 0, 2, 2)])
    joined = join_plans(there, back, [0])
    assert all(c[:3] == c[3:6] for c in joined.copies)
    wrong = _plan([Copy(0, 0, 0, 0, 0, 0, 4, 2)])  # not turned back
    assert [c[:6] for c in join_plans(there, wrong, [0]).copies] == [
        (0, 0, 0, 0, 2, 0),
        (0, 2, 0, 0, 0, 0),
    ]


def test_joined_plans_must_be_whole() -> None:
    there = _plan([Copy(0, 0, 0, 0, 0, 0, 4, 2)])
    half = _plan([Copy(0, 0, 0, 0, 0, 0, 2, 2)])
    with pytest.raises(MMConvertError, match="b is written exactly once"):
        join_plans(there, half, [0])
    with pytest.raises(MMConvertError, match="b is written exactly once"):
        join_plans(half, there, [0])


def test_default_layouts_obey_the_order_rule(tied_hf: Path) -> None:
    model = hf_model(load("Qwen2VLConverter"), tied_hf, Options())
    for _, given in representative(model):
        assert given.llm_pp_layers is not None
        assert given.vit_pp_layers is not None
        assert sum(map(sum, given.llm_pp_layers)) == 4
        assert sum(map(sum, given.vit_pp_layers)) == 2
