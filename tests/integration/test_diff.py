"""``mm-convert diff``: figures against torch, in any layouts; what is said when none can be had."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import copied, edit_rank, edit_single, hf_to_mm, layout, rank_files, refused
from mmconvert.playground.checkpoints import make_hf

QKV = [f"model.layers.2.self_attn.{x}_proj.weight" for x in "qkv"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL with 4 text and 2 vision layers in one weight file."""
    out = tmp_path_factory.mktemp("diff") / "base"
    return make_hf("qwen2vl-2b", out, layers=4, vit_layers=2, shards=1)


@pytest.fixture(scope="module")
def trained(hf: Path) -> Path:
    """Text layers 1 to 3 moved, one element of layer 2 far."""

    def train(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(3)
        for name, t in tensors.items():
            match = re.match(r"model\.layers\.([123])\..*proj\.weight", name)
            if match:
                step = torch.randn(t.shape, generator=generator) * 0.01 * int(match[1])
                tensors[name] = (t.float() + step).to(t.dtype)
        tensors[QKV[1]][5, 7] = 9.0

    out = copied(hf, hf.with_name("trained"))
    edit_single(out, train)
    return out


@pytest.fixture(scope="module")
def trained_mm(trained: Path) -> Path:
    out = trained.with_name("trained_mm")
    hf_to_mm(trained, out, *layout("[[0,1],[2,1]]", "[[1,1],[0,0]]", 2, "vit_tp_size=1"))
    return out


def diff(*words: str | Path, check: int | None = None) -> dict[str, Any]:
    return json.loads(run_cli("diff", *words, "--json", check=check).stdout)


def relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    gap = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(gap / sum(float(x.double().square().sum()) for x in a))


def test_the_figures_are_those_of_torch(hf: Path, trained: Path, trained_mm: Path) -> None:
    """HF against MM at tp 2, vit tp 1, pp 2, vpp 2: fused tensors, layers, modules, all."""
    found = diff(hf, trained_mm, "--top", "0", check=1)
    a, b = (load_file(path / "model.safetensors") for path in (hf, trained))
    tops = {t["tensor"]: t for t in found["top"]}
    assert [t["l2_difference"] for t in found["top"]] == sorted(
        (t["l2_difference"] for t in found["top"]), reverse=True
    )
    assert sum(t["share"] for t in found["top"]) == pytest.approx(1)
    for t in found["top"]:
        x, y = [a[n] for n in t["hf_names"]], [b[n] for n in t["hf_names"]]
        gaps = torch.cat(
            [(v.double() - w.double()).abs().flatten() for v, w in zip(x, y, strict=True)]
        )
        assert t["relative_l2"] == pytest.approx(relative(x, y), rel=1e-12)
        assert t["largest_difference"] == float(gaps.max())
        assert t["different_elements"] == int((gaps > 0).sum())
        assert t["elements"] == gaps.numel()
    changed = {n for n in a if not torch.equal(a[n], b[n])}
    assert {n for t in found["top"] for n in t["hf_names"]} == changed
    assert found["changed"] == len(found["top"])
    assert found["relative_l2"] == pytest.approx(relative([*a.values()], [b[n] for n in a]))
    text = [n for n in a if not n.startswith("visual.")]
    modules = {m["module"]: m for m in found["modules"]}
    assert modules["text_decoder"]["relative_l2"] == pytest.approx(
        relative([a[n] for n in text], [b[n] for n in text])
    )
    assert modules["image_encoder"]["relative_l2"] == 0
    layers = {(g["module"], g["layer"]): g["relative_l2"] for g in found["layers"]}
    assert {key for key, value in layers.items() if value} == {
        ("text_decoder", i) for i in (1, 2, 3)
    }
    two = [n for n in a if n.startswith("model.layers.2.")]
    assert layers["text_decoder", 2] == pytest.approx(
        relative([a[n] for n in two], [b[n] for n in two])
    )
    most = tops["text_decoder.decoder.layers.2.self_attention.linear_qkv.weight"]
    assert most["hf_names"] == QKV
    assert most["a"] == {
        "place": f"{QKV[1]} in model.safetensors",
        "index": [5, 7],
        "value": float(a[QKV[1]][5, 7]),
    }
    folder = most["b"]["place"].split(" in ")[1]
    part = torch.load(rank_files(trained_mm)[folder], weights_only=True)["model1"]
    tensor = part[most["b"]["place"].split(" in ")[0]]
    assert most["b"]["value"] == 9.0 == float(tensor[tuple(most["b"]["index"])])


def test_the_way_round_and_the_layouts_make_no_difference(
    hf: Path, trained: Path, trained_mm: Path
) -> None:
    keys = ("elements", "different_elements", "l2_difference", "largest_difference", "changed")
    one = diff(hf, trained, check=1)
    other = diff(trained_mm, hf, check=1)
    assert [one[k] for k in keys] == pytest.approx([other[k] for k in keys], rel=1e-12)


def test_the_number_of_threads_changes_no_digit(hf: Path, trained_mm: Path) -> None:
    found = [
        run_cli("diff", hf, trained_mm, "--json", "--workers", n, check=1).stdout for n in "13"
    ]
    assert found[0] == found[1]


def test_equal_checkpoints(hf: Path, trained: Path, trained_mm: Path) -> None:
    done = run_cli("diff", trained, trained_mm, check=0)
    assert "equal: 61 tensors" in done.stdout
    assert "first is compared" in done.stderr
    assert run_cli("diff", "--quiet", trained, trained_mm, check=0).stdout == ""


def test_the_report_on_the_terminal(hf: Path, trained: Path) -> None:
    out = run_cli("diff", hf, trained, "--top", "2", "--names", "hf", check=1).stdout
    assert "of 61 tensors differ" in out
    assert re.search(r"text_decoder layers 0-3  \.\S\S\S", out)
    assert len(re.findall(r"^ .*_proj\.weight", out, re.MULTILINE)) == 2
    assert "linear_qkv" not in out
    plain = run_cli("diff", hf, trained, check=1, env={"PYTHONIOENCODING": "ascii"})
    assert plain.stdout.isascii()


def test_a_narrow_terminal_gets_the_names_on_lines_of_their_own(hf: Path, trained: Path) -> None:
    out = run_cli("diff", hf, trained, "--top", "3", check=1, env={"COLUMNS": "60"}).stdout
    _, table = out.split("of the change")
    assert all(len(line) <= 60 for line in table.splitlines() if "decoder" not in line)
    assert len(re.findall(r"^  text_decoder\.\S+$", table, re.MULTILINE)) == 3


def test_dtypes_are_compared_as_numbers(hf: Path, tmp_path: Path) -> None:
    wide = copied(hf, tmp_path / "wide")
    edit_single(wide, lambda ts: ts.update({n: t.float() for n, t in ts.items()}))
    found = diff(hf, wide, check=0)
    assert found["equal"]
    assert any("BF16 in A and F32 in B" in note for note in found["notes"])
    edit_single(wide, lambda ts: ts["model.norm.weight"].add_(2.0**-30))
    assert [t["tensor"] for t in diff(hf, wide, check=1)["top"]] == [
        "text_decoder.decoder.final_layernorm.weight"
    ]


def test_nan_and_infinity_are_counted_and_poison_nothing(hf: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["visual.blocks.0.norm1.weight"][3] = math.nan
        tensors["visual.blocks.0.norm1.weight"][4] = -math.inf
        tensors["model.norm.weight"][0] += 1

    odd = copied(hf, tmp_path / "odd")
    edit_single(odd, change)
    found = diff(hf, odd, check=1)
    assert found["not_finite"] == [
        {
            "tensor": "image_encoder.encoder.blocks.layers.0.input_layernorm.weight",
            "nan_a": 0,
            "inf_a": 0,
            "nan_b": 1,
            "inf_b": 1,
        }
    ]
    assert found["different_elements"] == 3
    assert 0 < found["relative_l2"] < 1
    assert diff(odd, odd, check=0)["not_finite"][0]["nan_a"] == 1
    text = run_cli("diff", hf, odd, check=1)
    assert "B 1 NaN, 1 infinite" in text.stdout
    assert "warning: NaN or infinite values in 1 tensor" in text.stderr


def test_the_place_in_a_tensor_of_many_dimensions(hf: Path, tmp_path: Path) -> None:
    name, place = "visual.patch_embed.proj.weight", (3, 2, 1, 13, 5)
    other = copied(hf, tmp_path / "other")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][place] = 7.0

    edit_single(other, change)
    (top,) = diff(hf, other, check=1)["top"]
    assert (top["a"]["index"], top["b"]["index"]) == ([*place], [*place])
    assert top["b"] == {"place": f"{name} in model.safetensors", "index": [*place], "value": 7.0}


def test_a_tensor_of_zeros_has_no_relative_distance(hf: Path, tmp_path: Path) -> None:
    empty = copied(hf, tmp_path / "empty")
    edit_single(empty, lambda ts: ts["model.norm.weight"].zero_())
    found = diff(empty, hf, check=1)["top"]
    assert [(t["relative_l2"], t["l2_a"]) for t in found] == [(None, 0.0)]
    assert diff(hf, empty, check=1)["top"][0]["relative_l2"] == 1.0


def test_tensors_that_were_zero_do_not_come_first(hf: Path, tmp_path: Path) -> None:
    """A little of an infinite part of itself is less than much of a large tensor."""
    a, b = copied(hf, tmp_path / "a"), copied(hf, tmp_path / "b")
    edit_single(a, lambda ts: ts["model.norm.weight"].zero_())

    def moved(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].fill_(2.0**-20)
        tensors["model.embed_tokens.weight"] += 1

    edit_single(b, moved)
    first, second = diff(a, b, check=1)["top"][:2]
    assert first["hf_names"] == ["model.embed_tokens.weight"]
    assert first["share"] > 0.99
    assert second["relative_l2"] is None
    assert second["share"] < 1e-6


def test_tensors_of_one_side_are_listed(hf: Path, trained: Path, tmp_path: Path) -> None:
    mm = tmp_path / "vit"
    hf_to_mm(trained, mm, "--cfg.save_vit_only", "True")
    found = diff(hf, mm, check=1)
    assert found["changed"] == 0
    assert not found["equal"]
    assert all(name.startswith("text_decoder.") for name in found["only_in_a"])
    assert len(found["only_in_a"]) == 30
    assert diff(mm, hf, check=1)["only_in_b"] == found["only_in_a"]
    assert "only in A: text_decoder." in run_cli("diff", hf, mm, check=1).stdout


def test_other_shapes_are_listed(hf: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 4, "vit_layers": 2, "shards": 1, "vocab_size": 310}
    wider = make_hf("qwen2vl-2b", tmp_path / "wider", **sizes)
    found = diff(hf, wider, check=1)
    assert found["other_shapes"] == [
        {
            "tensor": "text_decoder.embedding.word_embeddings.weight",
            "a": [304, 72],
            "b": [310, 72],
        }
    ]
    assert "[304, 72] and [310, 72]" in run_cli("diff", hf, wider, check=1).stdout


def test_zeros_that_only_mm_stores(tmp_path: Path) -> None:
    """Qwen2.5-Omni's audio K has no bias in HF; where MM has one, its values count in full."""
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1, "audio_layers": 1, "talker_layers": 1}
    hf = make_hf("qwen2.5omni-7b", tmp_path / "hf", **sizes)
    mm = tmp_path / "mm"
    hf_to_mm(hf, mm, converter="Qwen2_5_OmniConverter")
    found = diff(hf, mm, check=0)
    assert any("without a place in MM format not compared" in note for note in found["notes"])
    name = "audio_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.bias"
    (rank,) = rank_files(mm)
    added: list[float] = []

    def change(content: dict) -> None:
        bias = content["model"][name]
        row = int((bias == 0).nonzero()[0])
        bias[row] = 0.5
        added.append(row)

    edit_rank(mm, rank, change)
    (mm / "mmconvert.json").unlink()
    (top,) = diff(hf, mm, check=1)["top"]
    assert (top["tensor"], top["largest_difference"], top["different_elements"]) == (name, 0.5, 1)
    assert top["a"] == {"place": "", "index": [], "value": 0.0}
    assert top["b"]["index"] == added
    assert diff(mm, hf, check=1)["top"][0]["a"]["value"] == 0.5


def test_tensors_that_are_not_converted_are_compared_between_hf_checkpoints(
    tmp_path: Path,
) -> None:
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1, "audio_layers": 1, "talker_layers": 1}
    hf = make_hf("qwen2.5omni-7b", tmp_path / "hf", shards=1, **sizes)
    other = copied(hf, tmp_path / "other")
    name = next(n for n in load_file(hf / "model.safetensors") if n.startswith("talker."))
    edit_single(other, lambda ts: ts[name].add_(1))
    (top,) = diff(hf, other, check=1)["top"]
    assert (top["tensor"], top["module"]) == (name, "not converted")


def test_a_structure_of_its_own_is_refused(hf: Path, trained: Path, tmp_path: Path) -> None:
    packed, apart = tmp_path / "packed", tmp_path / "apart"
    hf_to_mm(hf, packed)
    flag = "--cfg.common_model_config.enable_canonical_hf_struct"
    hf_to_mm(trained, apart, flag, "True")
    refused(run_cli("diff", packed, apart), 3, "q, k, v and gate, up apart", "mm_to_hf")
    assert diff(hf, apart, check=1)["changed"]


# -------------------------------------------------------------------------------- bad requests
def test_requests_that_make_no_sense(hf: Path, tmp_path: Path) -> None:
    refused(run_cli("diff", hf, hf, "--top", "-1"), 2, "--top is -1")
    refused(run_cli("diff", hf, hf, "--workers", "-1"), 2, "--workers is -1")
    refused(run_cli("diff", hf, tmp_path / "none"), 3, "does not exist")
    assert run_cli("diff", hf).returncode == 2
    assert run_cli("diff", hf, hf, "--tops", "3").returncode == 2
    assert json.loads(run_cli("diff", hf, tmp_path / "no", "--json", check=3).stdout)["what"]


def test_a_truncated_file(hf: Path, tmp_path: Path) -> None:
    cut = copied(hf, tmp_path / "cut")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(run_cli("diff", hf, cut), 3, "model.safetensors")


# ------------------------------------------------------------------------------------- reports
class Page(HTMLParser):
    """Collects the elements, their attributes and the text of a page."""

    VOID = frozenset({"meta", "br", "rect", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str] = []
        self.words = ""
        self.depth: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [f"{k}={v}" for k, v in attrs]
        if tag not in self.VOID or (tag == "rect"):
            self.depth.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def check_page(text: str) -> Page:
    """Well formed, loads nothing, runs nothing."""
    page = Page(text)
    assert page.depth == []
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not [v for v in page.values if v.startswith(("on", "href", "src", "xlink"))]
    assert "url(" not in text
    assert "@import" not in text
    return page


def test_the_page(hf: Path, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    done = run_cli("diff", hf, trained, "--top", "3", "--html", file, check=1)
    assert f"written: {file}" in done.stdout
    page = check_page(file.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 3  # for narrow, medium and wide screens
    assert "Tensors, 3 of " in page.words
    assert "text_decoder.decoder.layers.2.self_attention.linear_qkv.weight" in page.words
    assert QKV[0] in page.words
    assert "layer 2: relative L2" in page.words
    assert "no layer changed" in page.words
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_modules_share_one_scale(hf: Path, tmp_path: Path) -> None:
    """Vision moves less than text: its bars are as much lower."""

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name, t in tensors.items():
            part = 2.0**-4 if name.startswith("visual.") else 2.0**-1
            if "norm" not in name:
                tensors[name] = (t.float() * (1 + part)).to(t.dtype)

    other = copied(hf, tmp_path / "other")
    edit_single(other, move)
    svg = tmp_path / "r.svg"
    done = run_cli("diff", hf, other, "--svg", svg, check=1)
    lines = dict(re.findall(r"(\w+) layers 0-\d+  (\S)", done.stdout))
    assert int(lines["image_encoder"]) == 1
    assert int(lines["text_decoder"]) >= 6
    root = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    ticks = [t.text for t in root.iter(f"{space}text") if t.get("text-anchor") == "end"]
    assert len(ticks) % 2 == 0
    assert ticks[: len(ticks) // 2] == ticks[len(ticks) // 2 :]
    highest = {
        css: max(
            float(r.attrib["height"]) for r in root.iter(f"{space}rect") if r.get("class") == css
        )
        for css in ("m-encoder1", "m-decoder")
    }
    most: dict[str, float] = {}
    for layer in diff(hf, other, check=1)["layers"]:
        most[layer["module"]] = max(most.get(layer["module"], 0), layer["relative_l2"])
    expected = most["image_encoder"] / most["text_decoder"]
    assert expected < 0.5
    assert highest["m-encoder1"] / highest["m-decoder"] == pytest.approx(expected, abs=0.01)


def test_names_from_a_checkpoint_are_no_markup(tmp_path: Path) -> None:
    evil = "talker.</td><script>alert(1)</script>\u202e\x1b[31m\x00&amp;'\""
    sizes: dict[str, Any] = {"layers": 2, "vit_layers": 1, "audio_layers": 1, "talker_layers": 1}
    hf = make_hf("qwen2.5omni-7b", tmp_path / "hf", shards=1, **sizes)
    tensors = load_file(hf / "model.safetensors")
    for folder, value in (("a", 1.0), ("b", 2.0)):
        shutil.copytree(hf, tmp_path / folder)
        save_file(
            {**tensors, evil: torch.full((2,), value)}, tmp_path / folder / "model.safetensors"
        )
    html, svg = tmp_path / "r.html", tmp_path / "r.svg"
    words = ("diff", tmp_path / "a", tmp_path / "b", "--html", html, "--svg", svg)
    done = run_cli(*words, check=1)
    page = check_page(html.read_text(encoding="utf-8"))
    assert "<script>alert(1)</script>" in page.words
    assert not re.search("[\x00\x1b\u202e]", page.words + done.stdout + done.stderr)
    assert r"\x1b[31m" in done.stdout


def test_reports_replace_only_reports(hf: Path, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.html"
    file.write_text("<!doctype html>old")
    refused(run_cli("diff", hf, trained, "--html", file), 2, "exists", "--overwrite")
    assert file.read_text() == "<!doctype html>old"
    run_cli("diff", hf, trained, "--html", file, "--overwrite", check=1)
    assert "old" not in file.read_text()[:40]
    weights = trained / "model.safetensors"
    before = weights.read_bytes()
    refused(run_cli("diff", hf, trained, "--html", weights, "--overwrite"), 2, "is not a report")
    assert weights.read_bytes() == before
    refused(run_cli("diff", hf, trained, "--html", tmp_path), 2, "is a folder")
    refused(run_cli("diff", hf, trained, "--svg", tmp_path / "x" / "r.svg"), 2, "does not exist")
    same = ("--html", tmp_path / "s", "--svg", tmp_path / "s")
    refused(run_cli("diff", hf, trained, *same), 2, "--html and --svg are both")
