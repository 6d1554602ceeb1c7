"""What the documents say is so: commands run, outputs are those shown, files and targets exist."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from runpy import run_path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import copied, layout, rank_files
from forked import Forked
from inprocess import same_signals
from mmconvert import converters
from mmconvert.cli.commands import TOOLS
from mmconvert.converters.family import Variant
from mmconvert.version import VERSION
from nights import night
from pages import FENCE, ROOT, TIMES, Block, blocks, run_block

README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
CONTRIBUTING, DOC = ROOT / "CONTRIBUTING.md", ROOT / "docs"
FORMATS, EXTEND, GUIDES = DOC / "formats.md", DOC / "extend-family.md", DOC / "guides.md"
GENERATED = {"commands.md"}
PAGES = sorted(p for p in DOC.glob("*.md") if p.name not in GENERATED)
DOCS = [README, CHINESE, CONTRIBUTING, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *PAGES]
PLAY = "mm-convert playground play\ncd play\n"
RUN = {"bash", "console"}


# ---------------------------------------------------------------------------- pages that are run
RUNNING = [p for p in (README, *PAGES) if blocks(p, *RUN) and blocks(p, *RUN)[0].text == PLAY]


@pytest.fixture
def play(playground: Path, tmp_path: Path) -> Path:
    """A copy of what every page begins with, which it may change."""
    return copied(playground, tmp_path / "work" / "play")


# What these show is tested daily too, but for the words: test_lora*.py, test_dcp*.py,
# test_qwenvl.py, test_experts.py and test_roundtrip_command.py.
LONG = {"lora", "dcp", "qwen-vl", "experts"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [night(p) if p.stem in LONG else p for p in RUNNING], ids=lambda p: p.stem
)
def test_the_commands_of_a_page_do_what_it_shows(path: Path, play: Path) -> None:
    for block in blocks(path, *RUN)[1:]:
        run_block(block, play)


def test_every_page_with_commands_begins_with_the_playground() -> None:
    assert {p for p in (README, *PAGES) if blocks(p, *RUN)} == set(RUNNING)
    assert len(RUNNING) > 12


def test_the_manifest_has_the_keys_that_its_page_lists(playground: Path) -> None:
    manifest = json.loads((playground / "mm_drifted" / "mmconvert.json").read_text())
    section = FORMATS.read_text().split("## mmconvert.json")[1]
    named = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`[^|]*)\|", section, re.MULTILINE)))
    assert named == list(manifest)
    assert all(f"`{key}`" in section for key in manifest["variant"])


def _demo() -> int:
    os.environ |= {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    run_path(str(ROOT / "examples" / "demo.py"))["main"]()
    return 0


@pytest.mark.nightly
def test_the_demo_prints_what_is_shown() -> None:
    shown = next(
        b.text for b in blocks(DOC / "index.md", "text") if "The demo has passed." in b.text
    )
    with closing(Forked(_demo)) as demo:
        printed = demo.stdout.read()
        code, errors = demo.ends()
    assert code == 0, errors
    got = TIMES.sub("TIME", "\n".join(line.rstrip() for line in printed.splitlines()))
    for part in TIMES.sub("TIME", shown).split("...\n"):
        lines = [line.rstrip() for line in part.strip("\n").splitlines()]
        assert "\n".join(lines) in got


# ---------------------------------------------------------------------------- the runner itself
@pytest.mark.parametrize(
    "block",
    [
        Block("bash", "false\n"),
        Block("bash", "false | true\n"),
        Block("console", "$ echo one\ntwo\n"),
        Block("console", "$ echo one\none\n$ echo $?\n1\n"),
        Block("console", "$ false\n"),
        Block("console", "$ true\nsomething\n"),
        Block("bash", "mm-convert verify no_such_folder .\n"),
    ],
)
def test_a_block_that_says_something_else_is_noticed(block: Block, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with pytest.raises(AssertionError):
        run_block(block, folder)


def test_a_block_that_is_right_passes(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    run_block(Block("console", "$ echo 1.25 s, \\\n  2\n7.31 s, 2\n"), folder)
    run_block(Block("console", "$ (echo a; exit 3)\na\n$ echo $?\n3\n$ true\n"), folder)


# --------------------------------------------------------------------------------- consistency
def test_both_readmes_have_the_same_blocks() -> None:
    english, chinese = blocks(README), blocks(CHINESE)
    assert len(english) > 6
    for ours, theirs in zip(english, chinese, strict=True):
        assert theirs == ours
    texts = [path.read_text(encoding="utf-8") for path in (README, CHINESE)]
    assert "](README.zh-CN.md)" in texts[0][:100]
    assert "](README.md)" in texts[1][:100]
    headings = [re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE) for text in texts]
    assert headings[0] == headings[1]


def test_only_known_kinds_of_blocks() -> None:
    for path in DOCS:
        assert {b.language for b in blocks(path)} <= {
            *RUN,
            "sh",
            "text",
            "python",
            "toml",
            "yaml",
            "json",
            "",
        }
        assert path.read_text(encoding="utf-8").count("```") == 2 * len(blocks(path))


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tops = sorted(p.name for p in ROOT.iterdir() if p.is_dir() and p.name != ".venv")
    inside = "|".join(re.escape(top) for top in tops)
    prose = FENCE.sub("", text)
    named = set(re.findall(rf"`((?:{inside})/[\w./-]*)`", prose))
    named |= set(re.findall(rf"\b((?:{inside})/[\w/-]+\.py)\b", text))
    named |= set(re.findall(r"`([A-Z]\w+(?:[.-][\w-]+)*\.md|\w+\.toml|Makefile)`", prose))
    links = {t for t in re.findall(r"\]\(([^)#]+)\)", prose) if not t.startswith("https://")}
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in links if not (path.parent / link).exists()]
    missing = [name for name in missing if name != "benchmarks/data"]  # made by the benchmark
    assert missing == []


def test_the_map_of_the_house_is_whole() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## The house")[2].partition("## ")[0]
    named = set(re.findall(r"`(\w+(?:/|\.py))`", table))
    package = ROOT / "mmconvert"
    assert {p.parent.name + "/" for p in package.glob("*/__init__.py")} <= named
    assert [name for name in sorted(named) if not (package / name).exists()] == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"`make (\w+)`", text))
        for block in blocks(path, "sh"):
            named |= set(re.findall(r"^make (\w+)", block.text, re.MULTILINE))
        assert named <= targets
    named = {m for b in blocks(README, "sh") for m in re.findall(r"^make (\w+)", b.text, re.M)}
    assert {"demo", "test"} <= named


def test_the_workflow_calls_targets_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [s.get("run", "") for job in workflow["jobs"].values() for s in job["steps"]]
    called = {m for command in commands for m in re.findall(r"\bmake ([\w-]+)", command)}
    assert {"demo", "test", "docs", "release-check", "nightly"} <= called <= targets
    files = [m for command in commands for m in re.findall(r"\bpython (\S+\.py)", command)]
    assert files
    assert all((ROOT / name).is_file() for name in files)
    actions = [s["uses"] for job in workflow["jobs"].values() for s in job["steps"] if "uses" in s]
    assert actions and all(re.fullmatch(r"[\w-]+/[\w/-]+@v\d[\d.]*", name) for name in actions)


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == VERSION


def test_what_is_generated_is_up_to_date() -> None:
    """`python docs/generate.py` writes it again."""
    with same_signals():
        written = run_path(str(DOC / "generate.py"))["pages"]()
    for path, text in written.items():
        if path.name not in GENERATED:
            assert path.read_text(encoding="utf-8") == text, path.name
        else:
            assert all(f"### {tool}\n" in text for tool in TOOLS)
            assert "--cfg.parallel_config.tp_size" in text


def test_the_rows_of_the_guides_have_their_tests() -> None:
    rows = re.findall(r"^\| .* \| `([\w/]+\.py)` \|$", GUIDES.read_text(), re.MULTILINE)
    assert len(rows) > 10
    assert [name for name in rows if not (ROOT / "tests" / name).is_file()] == []


def test_the_navigation_has_every_page() -> None:
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted({p.name for p in PAGES} | GENERATED)


def test_the_readme_is_short() -> None:
    for path in (README, CHINESE):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_names_in_formats_are_those_of_the_tables() -> None:
    listed: set[str] = set()
    prefix = ""
    for line in FORMATS.read_text().split("## `.pt` files")[0].splitlines():
        cell = re.match(r"\| `([^`]+)` \|", line)
        if cell and cell[1].endswith("."):
            prefix = cell[1]
        elif cell:
            listed.add(prefix + cell[1])
    found: set[str] = set()
    for name in ("Qwen2VLConverter", "Qwen2_5_VLConverter"):
        for module in converters.load(name).modules(Variant()):
            found |= {re.sub(r"\.(weight|bias)$", "", r.mm) for r in module.all_rows()}
    assert listed == found


def test_nothing_private_is_said() -> None:
    for path in DOCS:
        assert not re.search(r"(?<!\w)/(tmp|root|home|mnt|data)/", path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------ the family of the page
DEPTH, TEXT_LAYERS, WIDTH, HIDDEN, FFN, VOCAB = 3, 4, 16, 32, 48, 64


def tiny_vl(out: Path) -> Path:
    """A checkpoint of the page's invented model, by hand."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision.patch.weight": (WIDTH, 3, 4, 4),
        "vision.out.weight": (HIDDEN, WIDTH),
        "language.embed_tokens.weight": (VOCAB, HIDDEN),
        "language.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(DEPTH):
        h = f"vision.blocks.{i}"
        shapes |= {f"{h}.norm1.weight": (WIDTH,), f"{h}.qkv.weight": (3 * WIDTH, WIDTH)}
        shapes |= {f"{h}.proj.weight": (WIDTH, WIDTH), f"{h}.fc1.weight": (4 * WIDTH, WIDTH)}
        shapes |= {f"{h}.fc1.bias": (4 * WIDTH,), f"{h}.fc2.weight": (WIDTH, 4 * WIDTH)}
    for i in range(TEXT_LAYERS):
        h = f"language.layers.{i}"
        shapes |= {f"{h}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        for x, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            shapes[f"{h}.self_attn.{x}_proj.weight"] = (rows, HIDDEN)
            shapes[f"{h}.self_attn.{x}_proj.bias"] = (rows,)
        shapes[f"{h}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {f"{h}.mlp.{x}_proj.weight": (FFN, HIDDEN) for x in ("gate", "up")}
        shapes[f"{h}.mlp.down_proj.weight"] = (HIDDEN, FFN)
    generator = torch.Generator().manual_seed(3)
    out.mkdir()
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    text = {"num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB}
    vision = {"depth": DEPTH, "num_heads": 4, "hidden_size": WIDTH}
    config = {"model_type": "tiny_vl", "text_config": text, "vision_config": vision}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The page's family as an installed package, by the page's entry point, here and in processes
    of the environment returned."""
    (source,) = blocks(EXTEND, "python")
    (entry,) = blocks(EXTEND, "toml")
    match = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"\n', entry.text)
    assert match
    site = tmp_path / "site"
    info = site / "tiny_vl-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "tiny_vl.py").write_text(source.text)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-vl\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{match[1]}]\n{match[2]} = {match[3]}\n")
    monkeypatch.syspath_prepend(site)
    yield {"PYTHONPATH": f"{site}:{ROOT}"}
    sys.modules.pop("tiny_vl", None)


def test_the_family_of_the_page_converts_there_and_back(
    package: dict[str, str], tmp_path: Path
) -> None:
    hf, mm, back, one = (tmp_path / name for name in ("hf", "mm", "back", "one"))
    tiny_vl(hf)
    convert = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", mm)
    flags = layout("[1,3]", "[3,0]", 2)
    run_cli("TinyVLConverter", "hf_to_mm", *convert, *flags, env=package, check=0)
    assert len(rank_files(mm)) == 4
    export = (*convert, "--cfg.save_hf_dir", back)
    run_cli("TinyVLConverter", "mm_to_hf", *export, check=0)
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    resplit = ("--cfg.source_dir", mm, "--cfg.target_dir", one)
    run_cli("TinyVLConverter", "resplit", *resplit, check=0)
    run_cli("verify", hf, one, check=0)
    run_cli("verify", "--quick", hf, back, check=0)
    run_cli("diff", mm, back, check=0)
    run_cli("doctor", mm, "--hf_dir", hf, check=0)
    run_cli("roundtrip", hf, check=0)
    assert "TinyVLConverter" in run_cli("suggest", hf, "--pp", "2", check=0).stdout
    assert "Tiny-VL" in run_cli("inspect", mm, check=0).stdout
    auto = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "auto")
    run_cli("AutoConverter", "hf_to_mm", *auto, check=0)
    run_cli("verify", hf, tmp_path / "auto", check=0)
    model = torch.load(next(iter(rank_files(one).values())), weights_only=True)["model"]
    packed = model["image_encoder.encoder.blocks.layers.2.self_attention.linear_qkv.weight"]
    qkv = load_file(hf / "model.safetensors")["vision.blocks.2.qkv.weight"]
    by_head = qkv.reshape(3, 4, WIDTH // 4, WIDTH).transpose(0, 1).reshape(3 * WIDTH, WIDTH)
    assert torch.equal(packed, by_head)


def test_the_family_of_the_page_is_one_that_must_be_complete(
    package: dict[str, str], tmp_path: Path
) -> None:
    """A row less, and the conversion names the tensor that no row claims."""
    hf, module = tiny_vl(tmp_path / "hf"), tmp_path / "site" / "tiny_vl.py"
    lines = module.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "fc1.bias" not in line]
    assert len(kept) == len(lines) - 1
    module.write_text("".join(kept))
    words = ["--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "mm"]
    done = run_cli("TinyVLConverter", "hf_to_mm", *words, check=3)
    assert "vision.blocks.0.fc1.bias" in done.stderr
