"""What the documents say is so: commands run, outputs are those shown, files and targets exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import edit_rank, install, layout, rank_files, same_hf
from mmconvert import converters
from mmconvert.converters.family import Variant
from mmconvert.playground.checkpoints import make_hf
from mmconvert.version import VERSION
from qwenvl import make_qwenvl

ROOT = Path(__file__).parents[2]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
CONTRIBUTING, FORMATS = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "formats.md"
QWENVL = ROOT / "docs" / "qwen-vl.md"
EXPERTS = ROOT / "docs" / "experts.md"
DOCS = [README, CHINESE, CONTRIBUTING, FORMATS, ROOT / "CHANGELOG.md", QWENVL, EXPERTS]
DOCS += [ROOT / "docs" / name for name in ("data.md", "runtime.md", "tutorial.md")]
# "0.04 s" and "231.6 MB/s", padded or not; what a dry run says of this machine
TIMES = re.compile(
    r"\b\d+\.\d+ s\b(, [\d.]+ [kMG]B/s)?|[\d.]+ [kMGT]B free|at most about [\d.]+ MB"
)
RUN = {"bash", "console"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language and text."""

    language: str
    text: str


class Step(NamedTuple):
    """A command of a console block, the output shown for it, and its exit code."""

    command: str
    output: str
    code: int


def blocks(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a document, all or those in some languages."""
    found = [Block(*match.groups()) for match in FENCE.finditer(path.read_text(encoding="utf-8"))]
    return [b for b in found if not languages or b.language in languages]


def steps(console: str) -> list[Step]:
    """The commands of a console block. ``echo $?`` gives the exit code of the one before it."""
    found: list[Step] = []
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        last = next(i for i, line in enumerate(lines) if not line.endswith("\\"))
        command = "\n".join(lines[: last + 1])
        output = "\n".join(lines[last + 1 :]).strip()
        if command == "echo $?":
            found[-1] = found[-1]._replace(code=int(output))
        else:
            found.append(Step(command, output, 0))
    return found


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, with an mm-convert and a python that have the code under test."""
    shim = folder.parent / "bin"
    if not shim.is_dir():
        install(shim)
        python = shim / "python"  # no link: a virtual environment is known by the path of its own
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{shim}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def same_output(shown: str, got: str) -> None:
    got = "\n".join(line.rstrip() for line in got.splitlines())  # tables are padded
    assert TIMES.sub("TIME", got.strip()) == TIMES.sub("TIME", shown.strip())


def run_block(block: Block, folder: Path) -> None:
    """Runs a bash or console block; fails if it does not do what the document says."""
    if block.language == "bash":
        done = shell(block.text, folder)
        assert done.returncode == 0, f"{block.text}\n{done.stdout}"
        return
    for step in steps(block.text):
        done = shell(step.command, folder)
        assert done.returncode == step.code, f"{step.command}\n{done.stdout}"
        same_output(step.output, done.stdout)


# ------------------------------------------------------------------------- the README's folder
def to_mm(folder: Path, name: str, *flags: str) -> Path:
    hf, mm = folder / "hf", folder / name
    words = ["--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", mm, *flags]
    run_cli("Qwen2VLConverter", "hf_to_mm", *words, check=0)
    return mm


def trained(folder: Path) -> None:
    """`save_dir`: two iterations with other weights, and what training saves beside them."""
    mm = to_mm(folder, "save_dir", *layout("[12,16]", "[32,0]", 2))
    (mm / "mmconvert.json").unlink()

    def change(content: dict) -> None:
        content["model"]["image_encoder.encoder.blocks.layers.0.mlp.linear_fc1.weight"] += 1
        content["iteration"] = 1000
        content["optimizer"] = {"exp_avg": torch.zeros(1000)}

    edit_rank(mm, "mp_rank_01_000", change)
    (mm / "release").rename(mm / "iter_0001000")
    shutil.copytree(mm / "iter_0001000", mm / "iter_0002000")
    (mm / "latest_checkpointed_iteration.txt").write_text("2000")


def drifted(folder: Path) -> None:
    """`mm_drifted`: a norm that differs between two tensor-parallel ranks."""
    mm = to_mm(folder, "mm_drifted", *layout("[1,10,10,7]", "[32,0,0,0]", 2))

    def change(content: dict) -> None:
        content["model"]["text_decoder.decoder.layers.0.input_layernorm.weight"] += 1

    edit_rank(mm, "mp_rank_01_002", change)


def old(folder: Path) -> None:
    """`mm_2.2.0`: the vision encoder's q, k and v below each other, as Hugging Face has them."""
    mm = to_mm(folder, "mm_2.2.0")
    (mm / "mmconvert.json").unlink()

    def change(content: dict) -> None:
        for name, tensor in content["model"].items():
            if name.startswith("image_encoder.") and ".linear_qkv." in name:
                heads = tensor.reshape(16, 3, -1)
                content["model"][name] = heads.transpose(0, 1).reshape(tensor.shape).contiguous()

    (rank,) = rank_files(mm)
    edit_rank(mm, rank, change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme") / "work"
    make_hf("qwen2vl-2b", folder / "hf")
    make_hf("qwen2.5vl-7b", folder / "hf25")
    make_hf("qwen2.5omni-7b", folder / "hf_omni")
    make_hf("internvl2-8b", folder / "hf_internvl")
    make_qwenvl(folder / "hf_qwenvl")
    make_hf("qwen2vl-2b", folder / "hf_extra", extra=[("value_head.weight", (1, 72))])
    trained(folder)
    drifted(folder)
    old(folder)
    return folder


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(folder: Path) -> None:
    listed = blocks(README, *RUN)
    assert {b.language for b in listed} == RUN
    for block in listed:
        run_block(block, folder)
    same_hf(folder / "hf", folder / "back")
    keys = json.loads((folder / "mm" / "mmconvert.json").read_text()).keys()
    section = FORMATS.read_text().split("## mmconvert.json")[1]
    named = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`[^|]*)\|", section, re.MULTILINE)))
    assert named == list(keys)
    variant = json.loads((folder / "mm" / "mmconvert.json").read_text())["variant"]
    assert all(f"`{key}`" in section for key in variant)


def test_the_commands_of_the_page_on_experts_run_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    make_hf("glm4.5v", folder / "hf_glm45v")
    small = {"layers": 4, "vit_layers": 3, "deepstack": [0, 1, 2]}
    make_hf("qwen3vl-30b-a3b", folder / "hf_qwen3vl", **small)
    for block in blocks(EXPERTS, *RUN):
        run_block(block, folder)


@pytest.mark.slow
def test_the_demo_prints_what_the_readme_shows() -> None:
    shown = next(b.text for b in blocks(README, "text") if "The demo has passed." in b.text)
    demo = [sys.executable, str(ROOT / "examples" / "demo.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(demo, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    got = TIMES.sub("TIME", "\n".join(line.rstrip() for line in done.stdout.splitlines()))
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
    assert len(english) > 20
    for ours, theirs in zip(english, chinese, strict=True):
        assert theirs == ours
    texts = [path.read_text(encoding="utf-8") for path in (README, CHINESE)]
    assert "](README.zh-CN.md)" in texts[0][:100]
    assert "](README.md)" in texts[1][:100]
    headings = [re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE) for text in texts]
    assert headings[0] == headings[1]


def test_only_known_kinds_of_blocks() -> None:
    for path in DOCS:
        assert {b.language for b in blocks(path)} <= {*RUN, "sh", "text", "python", "toml"}
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
    assert path == ROOT / "CHANGELOG.md" or named | links
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
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"`make (\w+)`", text))
        for block in blocks(path, "sh"):
            named |= set(re.findall(r"^make (\w+)", block.text, re.MULTILINE))
        assert named <= targets
    named = {m for b in blocks(README, "sh") for m in re.findall(r"^make (\w+)", b.text, re.M)}
    assert {"demo", "test"} <= named


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == VERSION


@pytest.mark.parametrize("path", [README, CHINESE], ids=lambda p: p.name)
def test_the_table_of_families_is_that_of_the_registry(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| (`[^|]+`) \|$", text, re.MULTILINE)
    listed = {converter: set(re.findall(r"`(\w+)`", types)) for converter, types in rows}
    known = {name: set(converters.load(name).model_types) for name in converters.BUILT_IN}
    assert listed == known


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
    """A checkpoint of CONTRIBUTING.md's invented model, by hand."""
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
def package(tmp_path: Path) -> dict[str, str]:
    """The page's family as an installed package, by the page's entry point; its environment."""
    (source,) = blocks(CONTRIBUTING, "python")
    (entry,) = blocks(CONTRIBUTING, "toml")
    match = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"\n', entry.text)
    assert match
    site = tmp_path / "site"
    info = site / "tiny_vl-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "tiny_vl.py").write_text(source.text)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-vl\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{match[1]}]\n{match[2]} = {match[3]}\n")
    return {"PYTHONPATH": f"{site}:{ROOT}"}


def test_the_family_of_contributing_converts_there_and_back(
    package: dict[str, str], tmp_path: Path
) -> None:
    hf, mm, back, one = (tmp_path / name for name in ("hf", "mm", "back", "one"))
    tiny_vl(hf)
    convert = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", mm)
    flags = layout("[1,3]", "[3,0]", 2)
    run_cli("TinyVLConverter", "hf_to_mm", *convert, *flags, env=package, check=0)
    assert len(rank_files(mm)) == 4
    export = (*convert, "--cfg.save_hf_dir", back)
    run_cli("TinyVLConverter", "mm_to_hf", *export, env=package, check=0)
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    resplit = ("--cfg.source_dir", mm, "--cfg.target_dir", one)
    run_cli("TinyVLConverter", "resplit", *resplit, env=package, check=0)
    run_cli("verify", hf, one, env=package, check=0)
    run_cli("verify", "--quick", hf, back, env=package, check=0)
    run_cli("diff", mm, back, env=package, check=0)
    run_cli("doctor", mm, "--hf_dir", hf, env=package, check=0)
    run_cli("roundtrip", hf, env=package, check=0)
    assert "TinyVLConverter" in run_cli("suggest", hf, "--pp", "2", env=package, check=0).stdout
    assert "Tiny-VL" in run_cli("inspect", mm, env=package, check=0).stdout
    auto = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "auto")
    run_cli("AutoConverter", "hf_to_mm", *auto, env=package, check=0)
    run_cli("verify", hf, tmp_path / "auto", env=package, check=0)
    model = torch.load(next(iter(rank_files(one).values())), weights_only=True)["model"]
    packed = model["image_encoder.encoder.blocks.layers.2.self_attention.linear_qkv.weight"]
    qkv = load_file(hf / "model.safetensors")["vision.blocks.2.qkv.weight"]
    by_head = qkv.reshape(3, 4, WIDTH // 4, WIDTH).transpose(0, 1).reshape(3 * WIDTH, WIDTH)
    assert torch.equal(packed, by_head)


def test_the_family_of_contributing_is_one_that_must_be_complete(
    package: dict[str, str], tmp_path: Path
) -> None:
    """A row less, and the conversion names the tensor that no row claims."""
    hf, module = tiny_vl(tmp_path / "hf"), tmp_path / "site" / "tiny_vl.py"
    lines = module.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "fc1.bias" not in line]
    assert len(kept) == len(lines) - 1
    module.write_text("".join(kept))
    words = ["--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "mm"]
    done = run_cli("TinyVLConverter", "hf_to_mm", *words, env=package, check=3)
    assert "vision.blocks.0.fc1.bias" in done.stderr


def test_the_commands_on_qwenvl_print_what_is_shown(tmp_path: Path) -> None:
    work = tmp_path / "work"
    make_qwenvl(work / "hf_qwenvl")
    for block in blocks(QWENVL, *RUN):
        run_block(block, work)


def test_the_commands_on_datasets_print_what_is_shown(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name in ("a", "b"):
        path = work / f"coco/train2014/COCO_train2014_{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    values = {"a": "<image>\nWhat is this?", "b": "What is this?\n<image>", "no": "<image>\nWhat?"}
    items: list[dict[str, object]] = [
        {"image": f"{image}.jpg", "conversations": [{"from": "human", "value": value}]}
        for image, value in values.items()
    ]
    items.append({"conversations": [{"from": "human", "value": "Hello."}]})
    (work / "llava.json").write_text(json.dumps(items))
    (console,) = blocks(ROOT / "docs" / "data.md", "console")
    run_block(console, work)
    written = json.loads((work / "qwenvl.json").read_text())
    questions = [item["conversations"][0]["value"].split("\n")[1:] for item in written]
    assert questions == [["What is this?"], ["What is this?"], []]
