"""``mm-convert inspect``: what lies where, in JSON, on the terminal and as pictures."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import edit_json, hf_to_mm, layout, rank_files, refused
from mmconvert.playground.checkpoints import make_hf

OMNI = "Qwen2_5_OmniConverter"
LAYOUT_KEYS = {
    *("tp_size", "vit_tp_size", "audio_tp_size", "pp_size", "vpp_size", "ep_size"),
    *("llm_pp_layers", "vit_pp_layers", "audio_pp_layers"),
}


def inspect(*words: str | Path) -> dict[str, Any]:
    return json.loads(run_cli("inspect", *words, "--json", check=0).stdout)


def words_of(svg: Path) -> list[str]:
    root = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    return [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture(scope="module")
def hetero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-Omni: text at tp 4, vision at 1, audio at 2, on two stages."""
    top = tmp_path_factory.mktemp("hetero")
    sizes: dict[str, Any] = {"layers": 3, "vit_layers": 2, "audio_layers": 2, "talker_layers": 1}
    hf = make_hf("qwen2.5omni-7b", top / "hf", **sizes)
    more = ("vit_tp_size=1", "audio_tp_size=2", "audio_pp_layers=[2,0]")
    hf_to_mm(hf, top / "mm", *layout("[1,2]", "[2,0]", 4, *more), converter=OMNI)
    return top / "mm"


def test_contents_are_what_the_rank_files_hold(hetero: Path) -> None:
    found = inspect(hetero)
    assert set(found["layout"]) == LAYOUT_KEYS
    assert sum(place["bytes"] for place in found["contents"]) == found["bytes"]
    assert sum(place["tensors"] for place in found["contents"]) == found["tensors"]
    files = rank_files(hetero)
    assert [place["place"] for place in found["contents"]] == sorted(files)
    prefixes = {"vit": "image_encoder.", "audio": "audio_encoder.", "llm": "text_decoder."}
    for place in found["contents"]:
        tensors = torch.load(files[place["place"]], weights_only=True)["model"]
        for held in place["holds"]:
            own = {n: t for n, t in tensors.items() if n.startswith(prefixes[held["module"]])}
            assert held["tensors"] == len(own)
            assert held["bytes"] == sum(t.nbytes for t in own.values())
        assert sum(held["tensors"] for held in place["holds"]) == len(tensors)
    last = found["contents"][-1]["holds"]
    assert [(h["module"], h["layers"], h["in"], h["out"]) for h in last] == [
        ("llm", "1-2", False, True)
    ]


def test_the_picture_of_a_layout(hetero: Path, tmp_path: Path) -> None:
    html, svg = tmp_path / "r.html", tmp_path / "r.svg"
    done = run_cli("inspect", hetero, "--html", html, "--svg", svg, check=0)
    assert "bytes of each rank file" in done.stdout
    assert f"written: {svg}" in done.stdout
    seen = Counter(words_of(svg))
    assert [seen[f"tp {tp}"] for tp in range(5)] == [2, 2, 2, 2, 0]
    assert seen["in, vision 0-1, out · 1/1"] == 4
    assert [seen[f"in, audio 0-1, out · {k}/2"] for k in (1, 2)] == [2, 2]
    assert [seen[f"text 1-2, out · {k}/4"] for k in (1, 2, 3, 4)] == [1, 1, 1, 1]
    page = html.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert re.findall('<svg class="([a-z]+)"', page) == ["narrow", "medium", "wide"]
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "mp_rank_03_001" in page
    assert "linear_qkv" not in page
    refused(run_cli("inspect", hetero, "--svg", svg), 2, "exists", "--overwrite")
    run_cli("inspect", hetero, "--svg", svg, "--html", html, "--overwrite", "--tensors", check=0)
    assert "linear_qkv" in html.read_text(encoding="utf-8")


def test_a_terminal_of_plain_characters(hetero: Path) -> None:
    for path in (hetero, hetero.with_name("hf")):
        done = run_cli("inspect", path, check=0, env={"PYTHONIOENCODING": "ascii"})
        assert done.stdout.isascii()
        assert "############ " in done.stdout


def test_a_folder_is_called_by_its_name(hetero: Path, tmp_path: Path) -> None:
    run_cli("inspect", ".", "--svg", tmp_path / "r.svg", cwd=hetero, check=0)
    assert words_of(tmp_path / "r.svg")[0].startswith("mm: MM checkpoint, Qwen2.5-Omni")


def test_the_picture_of_weight_files(hetero: Path, tmp_path: Path) -> None:
    hf = hetero.with_name("hf")
    found = inspect(hf)
    files = sorted(hf.glob("*.safetensors"))
    assert [place["place"] for place in found["contents"]] == [f.name for f in files]
    for place, file in zip(found["contents"], files, strict=True):
        tensors = load_file(file)
        talker = [n for n in tensors if n.startswith(("talker.", "token2wav."))]
        held = {h["module"]: h["tensors"] for h in place["holds"]}
        assert held.get("not converted", 0) == len(talker)
        assert sum(held.values()) == len(tensors)
        assert place["bytes"] == sum(t.nbytes for t in tensors.values())
    svg = tmp_path / "r.svg"
    done = run_cli("inspect", hf, "--svg", svg, check=0)
    assert files[0].name in words_of(svg)
    assert "weight file" in done.stdout


def test_weight_files_of_an_unknown_family(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=1, vit_layers=1, shards=1)
    edit_json(hf / "config.json", lambda config: config.update(model_type="another"))
    found = inspect(hf)
    assert found["family"] == ""
    (place,) = found["contents"]
    names = load_file(hf / "model.safetensors")
    assert {h["module"]: h["tensors"] for h in place["holds"]} == Counter(
        n.partition(".")[0] for n in names
    )


def test_one_rank_file(hetero: Path, tmp_path: Path) -> None:
    file = rank_files(hetero)["mp_rank_02_001"]
    svg = tmp_path / "r.svg"
    run_cli("inspect", file, "--svg", svg, check=0)
    title = "mp_rank_02_001/model_optim_rng.pt: MM rank file"
    assert any(w.startswith(title) for w in words_of(svg))
    found = inspect(file)
    assert [(h["module"], h["layers"], h["out"]) for h in found["contents"][0]["holds"]] == [
        ("llm", "0-1", True)
    ]
    assert found["contents"][0]["bytes"] == found["bytes"]


def test_names_that_would_steer_a_terminal(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=1, vit_layers=1, shards=1)
    evil = "\x1b[2Jx.[red]\u202e<b>"
    save_file({evil: torch.zeros(2)}, hf / "model.safetensors")
    edit_json(hf / "config.json", lambda config: config.update(model_type="another"))
    html, svg = tmp_path / "r.html", tmp_path / "r.svg"
    done = run_cli("inspect", hf, "--tensors", "--html", html, "--svg", svg, check=0)
    for text in (done.stdout, html.read_text(encoding="utf-8"), svg.read_text(encoding="utf-8")):
        assert not re.search("[\x1b\u202e]", text)
    assert r"\x1b[2Jx.[red]\u202e<b>" in done.stdout
    assert "<b>" not in html.read_text(encoding="utf-8")


def test_what_is_no_checkpoint(hetero: Path, tmp_path: Path) -> None:
    refused(run_cli("inspect", tmp_path / "none"), 3, "does not exist")
    text = tmp_path / "data.json"
    text.write_text("{}")
    refused(run_cli("inspect", text), 3, "is not a weight file", "give the checkpoint's folder")
    cut = tmp_path / "model_optim_rng.pt"
    cut.write_bytes(rank_files(hetero)["mp_rank_00_000"].read_bytes()[:-50])
    refused(run_cli("inspect", cut, "--svg", tmp_path / "r.svg"), 3, "model_optim_rng.pt")
    assert not (tmp_path / "r.svg").exists()
    same = ("--html", tmp_path / "r", "--svg", tmp_path / "r")
    refused(run_cli("inspect", hetero, *same), 2, "--html and --svg are both")
