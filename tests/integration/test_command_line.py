"""The command line as people type it: in bash, in every spelling that is promised."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cli import run_cli
from commands import (
    QWEN2VL,
    QWEN25VL,
    Done,
    hf_to_mm,
    layout,
    mm_to_hf,
    none,
    rank_files,
    refused,
    resplit,
    same_hf,
    target,
)
from mmconvert.cli import ending
from mmconvert.errors import Interrupted
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_mm
from nights import night

VERBS = ("hf_to_mm", "mm_to_hf", "resplit")
Bash = Callable[..., Done]


@pytest.fixture
def bash(shim: Path) -> Bash:
    """Runs a text in bash, with mm-convert on the PATH."""

    def run(text: str, cwd: Path, check: int | None = 0, **env: str) -> Done:
        path = f"{shim}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=cwd,
            env={**os.environ, **env, "PATH": path},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert check in (None, done.returncode), f"{done.returncode}\n{done.stdout}{done.stderr}"
        return done

    return run


@pytest.fixture
def typed() -> Bash:
    """Runs a command that is typed into bash: what bash makes of it, in this process."""

    def run(text: str, cwd: Path, check: int | None = 0, **env: str) -> Done:
        words = subprocess.run(
            ["bash", "-c", f"mm-convert() {{ printf '%s\\0' \"$@\"; }}\n{text}"],
            cwd=cwd,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        )
        return run_cli(*words.stdout.split("\0")[:-1], cwd=cwd, check=check)

    return run


# ------------------------------------------------------------------------------ spellings
HF_TO_MM = {
    "flat lists": "--cfg.mm_dir OUT --cfg.hf_config.hf_dir HF "
    "--cfg.parallel_config.llm_pp_layers [2,2] --cfg.parallel_config.vit_pp_layers [2,0] "
    "--cfg.parallel_config.tp_size 1",
    "nested lists": "--cfg.mm_dir OUT --cfg.hf_config.hf_dir HF "
    "--cfg.parallel_config.llm_pp_layers [[2,2]] --cfg.parallel_config.vit_pp_layers [[2,0]] "
    "--cfg.parallel_config.tp_size 1",
    "one of each, no tp size": "--cfg.mm_dir OUT --cfg.hf_config.hf_dir HF "
    "--cfg.parallel_config.llm_pp_layers [2,2] --cfg.parallel_config.vit_pp_layers [[2,0]]",
    "hyphens": "--cfg.mm-dir OUT --cfg.hf-config.hf-dir HF "
    "--cfg.parallel-config.llm-pp-layers [2,2] --cfg.parallel-config.vit-pp-layers [2,0] "
    "--cfg.parallel-config.tp-size 1 --cfg.parallel_config.vit-tp_size 1",
    "equals signs": "--cfg.mm_dir=OUT --cfg.hf_config.hf_dir=HF "
    "--cfg.parallel_config.llm_pp_layers=[2,2] --cfg.parallel-config.vit-pp-layers=[[2,0]] "
    "--cfg.parallel_config.tp_size=1 --cfg.trust_remote_code=True",
    "spaces in quoted lists": "--cfg.mm_dir OUT --cfg.hf_config.hf_dir HF "
    "--cfg.parallel_config.llm_pp_layers '[2, 2]' "
    '--cfg.parallel_config.vit_pp_layers="[[ 2, 0 ]]"',
    "spaces in unquoted lists": "--cfg.mm_dir OUT --cfg.parallel_config.llm_pp_layers [2, 2] "
    "--cfg.parallel_config.vit_pp_layers [ [2, 0] ] --cfg.hf_config.hf_dir HF",
    "continued lines": "\\\n  --cfg.mm_dir OUT \\\n  --cfg.hf_config.hf_dir HF \\\n"
    "  --cfg.parallel_config.llm_pp_layers [2,2] \\\n"
    "  --cfg.parallel_config.vit_pp_layers [2,0]",
    "zeros": "--cfg.mm_dir OUT --cfg.hf_config.hf_dir HF "
    "--cfg.parallel_config.llm_pp_layers [2,2] --cfg.parallel_config.vit_pp_layers [2,0] "
    "--cfg.parallel_config.tp_size 1 --cfg.parallel_config.vit_tp_size 0 "
    "--cfg.parallel_config.audio_tp_size 0 --cfg.parallel_config.ep_size 0",
    "booleans": "--cfg.mm_dir OUT --cfg.trust_remote_code True --cfg.save_vit_only False "
    "--cfg.common_model_config.enable_canonical_hf_struct false --cfg.hf_config.hf_dir HF "
    "--cfg.parallel_config.llm_pp_layers [2,2] --cfg.parallel_config.vit_pp_layers [2,0]",
    "bare and small booleans": "--cfg.trust-remote-code --cfg.mm_dir OUT --cfg.save_vit_only=false "
    "--cfg.hf_config.hf_dir HF --cfg.parallel_config.llm_pp_layers [2,2] "
    "--cfg.parallel_config.vit_pp_layers [2,0]",
    "our flags with values": "--overwrite False --cfg.mm_dir OUT --dry-run=false --quiet true "
    "--cfg.hf_config.hf_dir HF --json=False --cfg.parallel_config.llm_pp_layers [2,2] "
    "--cfg.parallel_config.vit_pp_layers [2,0] --workers=2",
}


@pytest.fixture(scope="session")
def expected(tied_hf: Path) -> Path:
    """What all spellings of hf_to_mm are to write."""
    out = tied_hf.with_name("expected")
    hf_to_mm(tied_hf, out, *layout("[2,2]", "[2,0]"))
    return out


def spelt(text: str, **paths: Path) -> str:
    """The text with each name replaced by its path, as the shell needs it."""
    for name, path in paths.items():
        text = re.sub(rf"\b{name}\b", lambda _, p=path: shlex.quote(str(p)), text)
    return text


@pytest.mark.parametrize("text", HF_TO_MM.values(), ids=HF_TO_MM.keys())
def test_hf_to_mm_spellings(
    text: str, tied_hf: Path, expected: Path, out: Path, typed: Bash, tmp_path: Path
) -> None:
    typed(f"mm-convert {QWEN2VL} hf_to_mm {spelt(text, OUT=out, HF=tied_hf)}", tmp_path)
    none(compare_mm(expected, out))


def test_paths_with_spaces(tied_hf: Path, expected: Path, tmp_path: Path, typed: Bash) -> None:
    """Quoted, relative, and with what shells and formats find special."""
    shutil.copytree(tied_hf, tmp_path / "a model [v1]" / "hf = 'x'")
    flags = "--cfg.parallel_config.llm_pp_layers [2,2] --cfg.parallel_config.vit_pp_layers [2,0]"
    typed(
        f'mm-convert {QWEN2VL}  hf_to_mm --cfg.mm_dir "out {{}} %s/mm \u00e9" '
        f"--cfg.hf_config.hf_dir=\"a model [v1]/hf = 'x'\" {flags}",
        tmp_path,
    )
    none(compare_mm(expected, tmp_path / "out {} %s" / "mm \u00e9"))


LISTS = {
    "flat": ("[2,2]", "[2,0]"),
    "nested": ("[[2,2]]", "[[2,0]]"),
    "with spaces": ("[2, 2]", "[[2, 0]]"),
    "left out": None,
}


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS.keys())
def test_lists_in_mm_to_hf(
    lists: tuple[str, str] | None, tied_hf: Path, tied_mm22: Path, out: Path
) -> None:
    mm_to_hf(tied_mm22, tied_hf, out, *(layout(*lists, tp=2) if lists else ()))
    same_hf(tied_hf, out)


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS.keys())
def test_lists_in_resplit(
    lists: tuple[str, str] | None, tied_mm22: Path, expected: Path, out: Path
) -> None:
    """Each kind on both sides; a target without lists is one stage."""
    flags: list[str] = []
    if lists:
        flags = layout(*lists, tp=2, prefix="--cfg.source_parallel_config.") + target(*lists)
    resplit(tied_mm22, out, *flags)
    if lists:
        none(compare_mm(expected, out))
    else:
        assert list(rank_files(out)) == ["mp_rank_00"]


def test_virtual_stages_in_every_verb(tied_hf: Path, out: Path, tmp_path: Path) -> None:
    lists = ("[[1,1],[1,1]]", "[[2,0],[0,0]]")
    hf_to_mm(tied_hf, out, *layout(*lists, 2))
    keys = {frozenset(torch.load(path)) for path in rank_files(out).values()}
    assert keys == {frozenset({"model0", "model1", "checkpoint_version"})}
    mm_to_hf(out, tied_hf, tmp_path / "back", *layout(*lists, 2))
    same_hf(tied_hf, tmp_path / "back")
    source = layout(*lists, 2, prefix="--cfg.source_parallel_config.")
    resplit(out, tmp_path / "again", *source, *target(*lists, 2))
    none(compare_mm(out, tmp_path / "again"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("save_vit_only", ""),
        ("save_vit_only", " True"),
        ("save-vit-only", "=true"),
        ("common_model_config.enable_canonical_hf_struct", ""),
        ("common_model_config.enable-canonical-hf-struct", " true"),
        ("common_model_config.enable_canonical_hf_struct", "=True"),
    ],
)
def test_booleans_that_are_true(
    flag: str, value: str, tied_hf: Path, out: Path, typed: Bash, tmp_path: Path
) -> None:
    paths = spelt("--cfg.hf_config.hf_dir HF --cfg.mm_dir OUT", HF=tied_hf, OUT=out)
    typed(f"mm-convert {QWEN2VL} hf_to_mm --cfg.{flag}{value} {paths}", tmp_path)
    names = set(torch.load(rank_files(out)["mp_rank_00"])["model"])
    if "vit" in flag:
        assert any(name.startswith("image_encoder") for name in names)
        assert not any(name.startswith("text_decoder") for name in names)
    else:
        assert any("q_proj" in name for name in names)
        assert not any("text" in name and "linear_qkv" in name for name in names)


# ----------------------------------------------------------------------------- --config
CONFIG = """\
cfg:
  mm_dir: OUT
  hf_config: {hf_dir: HF}
  trust_remote_code: true
  parallel_config:
    llm_pp_layers: [2, 2]
    vit-pp-layers: [[2, 0]]
    tp_size: TP
"""


def config_file(folder: Path, text: str = CONFIG, **words: object) -> Path:
    """A YAML file in a folder whose name has a space."""
    for name, value in words.items():
        text = re.sub(rf"\b{name}\b", lambda _, v=value: json.dumps(str(v)), text)
    path = folder / "my settings" / "run 1.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace('"1"', "1").replace('"2"', "2"))
    return path


@pytest.mark.parametrize("form", ["--config", "--config="])
def test_config_file(form: str, tied_hf: Path, expected: Path, out: Path, tmp_path: Path) -> None:
    path = config_file(tmp_path, OUT=out, HF=tied_hf, TP=1)
    words = [f"{form}{path}"] if form.endswith("=") else [form, str(path)]
    run_cli(QWEN2VL, "hf_to_mm", *words, check=0)
    none(compare_mm(expected, out))


@pytest.mark.parametrize(
    ("word", "first"),
    [("--cfg.parallel_config.tp_size", True), ("--cfg.parallel-config.tp-size", False)],
)
def test_the_command_line_wins(
    word: str, first: bool, tied_hf: Path, expected: Path, out: Path, tmp_path: Path
) -> None:
    path = config_file(tmp_path, OUT=tmp_path / "not here", HF=tied_hf, TP=2)
    words = [word, "1", "--cfg.mm_dir", str(out)]
    config = ["--config", str(path)]
    run_cli(QWEN2VL, "hf_to_mm", *(words + config if first else config + words), check=0)
    none(compare_mm(expected, out))
    assert not (tmp_path / "not here").exists()


def test_our_flags_in_a_config_file(tied_hf: Path, out: Path, tmp_path: Path) -> None:
    extra = "dry_run: true\njson: yes\nquiet: false\ndrop: ['score.*', 'other.*']\nworkers: 2\n"
    path = config_file(tmp_path, CONFIG + extra, OUT=out, HF=tied_hf, TP=1)
    done = run_cli(QWEN2VL, "hf_to_mm", "--config", path, check=0)
    assert json.loads(done.stdout)["written"] is False
    assert not out.exists()


def bomb(form: str, levels: int = 9) -> str:
    """Anchors that each stand for nine of the one before."""
    lines = [f"a0: &a0 {form.format('') if '<<' not in form else '{x: 1}'}"]
    for level in range(1, levels + 1):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        if "k" in form:
            inner = ", ".join(f"k{i}: *a{level - 1}" for i in range(9))
            lines.append(f"a{level}: &a{level} {{{inner}}}")
        else:
            lines.append(f"a{level}: &a{level} {form.format(inner)}")
    return "\n".join(lines) + "\n"


BAD_CONFIGS = {
    "unknown key": (
        CONFIG.replace("mm_dir", "mm_dirr"),
        ("run 1.yaml, line 2: there is no key cfg.mm_dirr", "did you mean cfg.mm_dir?"),
    ),
    "unknown key, far below": (
        CONFIG.replace("tp_size", "tp-sizes"),
        ("run 1.yaml, line 8: there is no key cfg.parallel_config.tp_sizes", ".tp_size?"),
    ),
    "unknown top key": (CONFIG + "colour: red\n", ("line 9: there is no key colour",)),
    "not YAML": ("cfg: [", ("run 1.yaml",)),
    "a list": ("- 1\n", ("run 1.yaml",)),
    "empty": ("", ("run 1.yaml",)),
    "a bad list": (
        CONFIG.replace("[2, 2]", "[2, two]"),
        ("run 1.yaml, line 6: cfg.parallel_config.llm_pp_layers", "two"),
    ),
    "code": ("cfg: !!python/object/apply:os.system ['exit 3']\n", ("run 1.yaml",)),
    "a mapping that holds itself": ("cfg: &a\n  hf_config: *a\n", ("run 1.yaml", "too many")),
    "a list that holds itself": ("drop: &a [x, *a]\n", ("run 1.yaml", "too many")),
    "a key that holds itself": ("? &a [*a]\n: 1\n", ("run 1.yaml", "too many")),
    "a bomb of lists": (bomb("[{}]"), ("run 1.yaml", "too many")),
    "a bomb of mappings": (bomb("{{k{}}}"), ("run 1.yaml", "too many")),
    "a bomb of merges": (bomb("{{<<: [{}]}}"), ("run 1.yaml", "too many")),
    "a file of many pages": ("# x\n" * 20_000 + CONFIG, ("run 1.yaml", "bytes")),
    "a long list": (CONFIG + f"drop: {list(range(12_000))}\n", ("run 1.yaml",)),
    "a deep one": ("[" * 700, ("run 1.yaml",)),
    "a long number": (CONFIG.replace("tp_size: TP", f"tp_size: {'9' * 5000}"), ("run 1.yaml",)),
    "a date in a list": (CONFIG.replace("[2, 2]", "[2001-01-01]"), ("llm_pp_layers", "2001")),
    "no date": ("cfg: !!timestamp x\n", ("run 1.yaml",)),
    "no truth": ("overwrite: !!bool x\n", ("run 1.yaml",)),
    "a set": ("drop: !!set {a, b}\n", ()),
    "a NUL": (CONFIG.replace("mm_dir: OUT", 'mm_dir: "a\\0b"'), ("run 1.yaml", "not text")),
    "half a pair": (CONFIG.replace("mm_dir: OUT", 'mm_dir: "\\uD83D"'), ("run 1.yaml", "not text")),
    "a key twice": (CONFIG + "  mm_dir: elsewhere\n", ("run 1.yaml, line 9", "mm_dir", "twice")),
    "an octal number for a folder": (  # YAML reads 0123 as 83
        CONFIG.replace("mm_dir: OUT", "mm_dir: 0123"),
        ("run 1.yaml, line 2: --cfg.mm_dir", "83", "quotes"),
    ),
    "a list for a folder": (CONFIG.replace("mm_dir: OUT", "mm_dir: [a]"), ("--cfg.mm_dir",)),
}


@pytest.mark.parametrize(("text", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_config_files(
    text: str, words: tuple[str, ...], tied_hf: Path, out: Path, tmp_path: Path
) -> None:
    path = config_file(tmp_path, text, OUT=out, HF=tied_hf, TP=1)
    done = run_cli(QWEN2VL, "hf_to_mm", "--config", path)
    assert done.returncode in (2, 3), done.stderr
    refused(done, done.returncode, *words, out=out)


def test_a_wrong_key_of_a_tool_is_named_with_its_place(tmp_path: Path) -> None:
    path = config_file(tmp_path, "quiet: true\nwrokers: 2\n")
    done = run_cli("verify", "a", "b", "--config", path)
    refused(done, 2, "run 1.yaml, line 2: there is no key wrokers", "did you mean workers?")


@pytest.mark.parametrize("form", ["=", "file"])
def test_a_tilde_is_the_home_folder(
    form: str, tied_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a shell leaves it standing: behind a ``=``, and in files."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tied_hf, tmp_path / "home/hf")
    words = ["--cfg.hf_config.hf_dir=~/hf", "--cfg.mm_dir=~/mm"]
    if form == "file":
        text = "cfg: {hf_config: {hf_dir: ~/hf}, mm_dir: ~/mm}"
        words = ["--config", str(config_file(tmp_path, text))]
    run_cli(QWEN2VL, "hf_to_mm", *words, check=0)
    run_cli("verify", tied_hf, "~/mm", check=0)
    assert (tmp_path / "home/mm/release").is_dir() and not (tmp_path / "~").exists()


def test_a_pipe_as_config(
    tied_hf: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a shell's ``<(...)`` fills is read; one that nobody writes to is not waited for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr("mmconvert.cli.settings.PATIENCE", 0.2)
    done = run_cli(QWEN2VL, "hf_to_mm", "--config", pipe)
    refused(done, 2, "nothing comes out of this pipe", out=out)
    text = f"cfg: {{mm_dir: {out}, hf_config: {{hf_dir: {tied_hf}}}}}"
    words = f'exec "$0" -m mmconvert {QWEN2VL} hf_to_mm --config <(sleep 0.3; echo "$1")'
    command = ["bash", "-c", words, sys.executable, text]
    filled = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert filled.returncode == 0, filled.stderr
    assert (out / "release").is_dir()


@pytest.mark.parametrize("words", [["--config", "none.yaml"], ["--config"]], ids=len)
def test_no_config_file(words: list[str], tmp_path: Path) -> None:
    done = run_cli(QWEN2VL, "hf_to_mm", *words, cwd=tmp_path)
    assert done.returncode in (2, 3), done.stderr
    refused(done, done.returncode, words[-1])


# ---------------------------------------------------------------------------------- help
FLAGS = {
    "hf_to_mm": [
        *("--cfg.mm_dir PATH", "--cfg.hf_config.hf_dir PATH", "--cfg.save_vit_only"),
        *("--cfg.trust_remote_code", "--cfg.parallel_config.llm_pp_layers"),
        *("--cfg.parallel_config.vit_pp_layers", "--cfg.parallel_config.audio_pp_layers"),
        *("--cfg.parallel_config.tp_size", "--cfg.parallel_config.vit_tp_size INT"),
        *("--cfg.parallel_config.audio_tp_size INT", "--cfg.parallel_config.ep_size INT"),
        *("--cfg.common_model_config.enable_canonical_hf_struct",),
        *("--cfg.common_model_config.llm_hf_dir",),
    ],
    "mm_to_hf": [
        *("--cfg.mm_dir PATH", "--cfg.hf_config.hf_dir PATH", "--cfg.save_hf_dir PATH"),
        *("--cfg.parallel_config.llm_pp_layers", "--cfg.parallel_config.tp_size"),
    ],
    "resplit": [
        *("--cfg.source_dir PATH", "--cfg.target_dir PATH"),
        *("--cfg.source_parallel_config.llm_pp_layers", "--cfg.source_parallel_config.tp_size"),
        *("--cfg.target_parallel_config.llm_pp_layers", "--cfg.target_parallel_config.tp_size"),
    ],
}
OURS = ["--dry_run", "--overwrite", "--workers INT", "--json", "--quiet", "--debug"]
HELP_WORDS = [["-h"], [QWEN2VL, "-h"], [QWEN2VL, "resplit", "-h"], [QWEN2VL, "hf_to_mm", "--help"]]
HELP_BY_NIGHT = [[QWEN25VL, "--help"], [QWEN2VL, "hf_to_mm", "-h"], [QWEN2VL, "mm_to_hf", "-h"]]


@pytest.mark.parametrize("words", [*HELP_WORDS, *map(night, HELP_BY_NIGHT)], ids=" ".join)
def test_help(words: list[str]) -> None:
    """In English, with an example, on standard output; nothing heavy is imported for it."""
    found, done = run_timed(*words)
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    assert found & (HEAVY | {"numpy"}) == set()
    assert {m for m in found if m.startswith("mmconvert.converters.qwen")} == set()
    assert "usage: mm-convert" in done.stdout
    assert "example" in done.stdout
    assert re.search(rf"mm-convert {QWEN2VL[:4]}\w+ (hf_to_mm|mm_to_hf|resplit) --", done.stdout)
    assert not re.search("[\u3000-\u9fff\uff00-\uffef]", done.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flag with its type, a text, and its default if it has one; no boxes."""
    monkeypatch.setenv("COLUMNS", "100")
    text = run_cli(QWEN2VL, verb, "-h", check=0).stdout
    for flag in FLAGS[verb] + OURS:
        assert re.search(rf"{re.escape(flag)}\b", text), flag
    lines = text.splitlines()
    flags = [i for i, line in enumerate(lines) if line.startswith("  --")]
    assert len(flags) >= len(FLAGS[verb]) + len(OURS)
    for start, end in zip(flags, [*flags[1:], len(lines)], strict=True):
        entry = " ".join(lines[start:end]).strip()
        assert len(entry.split()) > 4, f"no explanation: {entry}"
    assert "PATH" in text and "INT" in text and "[1,10,10,7]" in text
    assert "(required)" in text and "(default: 0)" in text
    assert not re.search(r"None|[│╭╰]", text)


def test_help_lists_converters_verbs_and_exit_codes() -> None:
    text = run_cli("-h", check=0).stdout
    for word in (QWEN2VL, QWEN25VL, *VERBS, "130"):
        assert word in text


def test_help_says_the_real_spelling_works(tied_hf: Path, out: Path) -> None:
    """The example of the help text, with folders put in, is a command that can be run."""
    text = run_cli(QWEN2VL, "hf_to_mm", "-h", check=0).stdout
    line = next(line for line in text.splitlines() if line.strip().startswith("mm-convert"))
    words = line.split()[1:]
    folders = {"HF_DIR": str(tied_hf), "MM_DIR": str(out), "[12,16]": "[2,2]", "[32,0]": "[2,0]"}
    run_cli(*(folders.get(word, word) for word in words), check=0)
    assert len(rank_files(out)) == 4


def imported(done: Done) -> set[str]:
    """The modules that a run under ``-X importtime`` imported."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def run_timed(*words: str) -> tuple[set[str], Done]:
    done = run_cli(*words, env={"PYTHONPROFILEIMPORTTIME": "1"}, check=0)
    found = imported(done)
    assert "mmconvert.cli" in found, done.stderr[:500]
    return found, done


# Rooms of the tables that all families share.
SHARED = {"family", "rows", "configs", "blocks", "plugins", "adapters", "stacks"}
HEAVY = {"torch", "transformers", "safetensors", "torch_npu", "megatron"}


@pytest.mark.parametrize(
    ("model", "converter", "tables"),
    [
        night("qwen2vl-2b", QWEN2VL, {"qwen2vl"}),
        ("qwen2.5vl-3b", QWEN25VL, {"qwen2vl", "qwen2_5vl"}),
    ],
)
def test_conversions_import_little(
    model: str, converter: str, tables: set[str], tmp_path: Path
) -> None:
    """No torch; of the families only the chosen one (which may build on another)."""
    hf = make_hf(model, tmp_path / "hf", layers=1, vit_layers=1)
    mm, back, other = (str(tmp_path / name) for name in ("mm", "back", "other"))
    commands = [
        ["hf_to_mm", "--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", mm],
        [
            *("mm_to_hf", "--cfg.hf_config.hf_dir", str(hf)),
            *("--cfg.mm_dir", mm, "--cfg.save_hf_dir", back),
        ],
        ["resplit", "--cfg.source_dir", mm, "--cfg.target_dir", other],
    ]
    prefix = "mmconvert.converters."
    for words in commands:
        found, _ = run_timed(converter, *words)
        assert found & HEAVY == set(), words
        used = {m.removeprefix(prefix) for m in found if m.startswith(prefix)}
        assert used <= {*SHARED, *tables}, words


# ------------------------------------------------------------------------------ mistakes
FOLDERS = ["--cfg.mm_dir", "x", "--cfg.hf_config.hf_dir", "y"]
UNKNOWN = {
    "converter": (["Qwen2VLConvertor", "hf_to_mm"], "Qwen2VLConvertor", QWEN2VL),
    "small letters": (["qwen2vlconverter", "hf_to_mm"], "qwen2vlconverter", QWEN2VL),
    "verb": ([QWEN2VL, "hf_to_nm"], "hf_to_nm", "hf_to_mm"),
    "verb with hyphens": ([QWEN2VL, "mm-to-hf"], "mm-to-hf", "mm_to_hf"),
    "required flag": (
        [QWEN2VL, "hf_to_mm", *FOLDERS[2:], "--cfg.mm_dirr", "x"],
        "--cfg.mm_dirr",
        "did you mean --cfg.mm_dir?",
    ),
    "required flag with =": (
        [QWEN2VL, "resplit", "--cfg.source_dir=a", "--cfg.target-dirs=x"],
        "--cfg.target_dirs",
        "did you mean --cfg.target_dir?",
    ),
    "nested flag": (
        [QWEN2VL, "hf_to_mm", *FOLDERS, "--cfg.parallel_config.llm_pp_layer", "[4]"],
        "--cfg.parallel_config.llm_pp_layer",
        "--cfg.parallel_config.llm_pp_layers",
    ),
    "without its prefix": (
        [QWEN2VL, "hf_to_mm", *FOLDERS[2:], "--mm_dir", "x"],
        "--mm_dir",
        "did you mean --cfg.mm_dir?",
    ),
    "tool": (["inpsect", "x"], "command 'inpsect'", "did you mean inspect?"),
    "family": (["qwen2vl", "hf_to_mm"], "command 'qwen2vl'", "did you mean Qwen2VLConverter?"),
    "verb alone": (["hf_to_mm", *FOLDERS], "hf_to_mm", "mm-convert AutoConverter hf_to_mm"),
    "version": (["version"], "command 'version'", "did you mean --version?"),
    "part of a flag": (
        [QWEN2VL, "hf_to_mm", "--cfg.mm_dir", "x", "--cfg.hf_dir", "y"],
        "--cfg.hf_dir",
        "did you mean --cfg.hf_config.hf_dir?",
    ),
    "flag of a tool": (["verify", "a", "b", "--workrs", "3"], "--workrs", "--workers"),
    "our flag": ([QWEN2VL, "hf_to_mm", *FOLDERS, "--overwrit"], "--overwrit", "--overwrite"),
}


@pytest.mark.parametrize(("words", "wrong", "nearest"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_words(words: list[str], wrong: str, nearest: str) -> None:
    """The message has the wrong word and the nearest right one."""
    done = run_cli(*words)
    refused(done, 2, nearest)
    assert re.search(rf"{re.escape(wrong)}(?![\w.])", done.stderr), done.stderr


MISSING = {
    "hf_to_mm": ("--cfg.mm_dir x", "--cfg.hf_config.hf_dir"),
    "mm_to_hf": ("--cfg.mm_dir x --cfg.hf_config.hf_dir y", "--cfg.save_hf_dir"),
    "resplit": ("--cfg.target_dir x", "--cfg.source_dir"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_missing_flags(verb: str) -> None:
    given, missing = MISSING[verb]
    refused(run_cli(QWEN2VL, verb, *given.split()), 2, missing)


WRONG_VALUES = {
    "no number": (["verify", "a", "b", "--workers", "x"], "--workers is 'x'", "a number"),
    "no list": (
        [QWEN2VL, "hf_to_mm", *FOLDERS, "--cfg.parallel_config.llm_pp_layers", "x"],
        "x is not a list of layer counts",
        "[1,10,10,7]",
    ),
    "no choice": (["verify", "a", "b", "--vit_qkv", "x"], "--vit_qkv is 'x'", "'interleaved'"),
    "no value": (["verify", "a", "b", "--workers"], "--workers has no value", "verify -h"),
    "one too many": (["verify", "a", "b", "c"], "c is one word too many", "verify -h"),
    "one too few": (["verify", "a"], "B is missing", "verify -h"),
    "all too few": (["verify"], "A and B are missing", "a MindSpore file; B: the other checkpoint"),
}


@pytest.mark.parametrize(("words", "what", "more"), WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_values_are_told_in_three_lines(words: list[str], what: str, more: str) -> None:
    done = run_cli(*words)
    refused(done, 2, what, more)
    lines = done.stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["error", "  expected", "  to fix"]
    told = json.loads(run_cli(*words, "--json").stdout)
    assert all(told[key] for key in ("what", "expected", "fix"))


@pytest.mark.parametrize("words", [[], [QWEN2VL]], ids=len)
def test_too_few_words(words: list[str]) -> None:
    done = run_cli(*words)
    assert done.returncode == 2
    assert "usage" in done.stdout + done.stderr


BAD_VALUES = {
    "a word in a list": ["--cfg.parallel_config.llm_pp_layers", "[2,two]"],
    "no list": ["--cfg.parallel_config.llm_pp_layers", "4"],
    "an empty list": ["--cfg.parallel_config.llm_pp_layers", "[]"],
    "an open list": ["--cfg.parallel_config.vit_pp_layers", "[2"],
    "a fraction": ["--cfg.parallel_config.vit_pp_layers", "[1.5]"],
    "truth in a list": ["--cfg.parallel_config.vit_pp_layers", "[true]"],
    "deep nesting": ["--cfg.parallel_config.vit_pp_layers", "[" * 7000],
    "three levels": ["--cfg.parallel_config.vit_pp_layers", "[[[2]]]"],
    "a ragged list": ["--cfg.parallel_config.llm_pp_layers", "[[2,2],[4]]"],
    "a list without a value": ["--cfg.parallel_config.llm_pp_layers"],
    "a size in words": ["--cfg.parallel_config.tp_size", "two"],
    "a boolean": ["--cfg.trust_remote_code", "maybe"],
    "a choice": ["--replicas", "second"],
    "workers": ["--workers", "-3"],
    "a word too many": ["--overwrite", "stray"],
}


@pytest.mark.parametrize("words", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values(words: list[str], tied_hf: Path, out: Path) -> None:
    """The message names the flag or the word."""
    done = hf_to_mm(tied_hf, out, *words, check=None)
    refused(done, 2, out=out)
    assert words[0] in done.stderr.replace("-", "_").replace("__", "--") or words[-1] in done.stderr


# ------------------------------------------------------------------------ what is printed
def test_version() -> None:
    assert re.fullmatch(r"mm-convert \d+\.\d+\S*\n", run_cli("--version", check=0).stdout)


def test_a_result_in_words(tied_hf: Path, out: Path) -> None:
    done = hf_to_mm(tied_hf, out, *layout("[2,2]", "[2,0]", 2))
    assert done.stderr == ""
    for word in (str(out), "[2,2]", "[2,0]", "tp_size 2"):
        assert word in done.stdout


@pytest.mark.parametrize("words", [["--json"], ["--json", "--quiet"], ["--json=True"]], ids=str)
def test_a_result_as_json(words: list[str], tied_hf: Path, out: Path) -> None:
    done = hf_to_mm(tied_hf, out, *layout("[2,2]", "[2,0]", 2), *words)
    result = json.loads(done.stdout)
    assert result["output"] == str(out)
    assert result["written"] is True
    files = [torch.load(path)["model"] for path in rank_files(out).values()]
    assert result["tensors"] == sum(map(len, files))
    assert result["bytes"] == sum(t.nbytes for model in files for t in model.values())
    found = result["layout"]
    assert (found["tp_size"], found["pp_size"]) == (2, 2)
    assert found["llm_pp_layers"] == [[2, 2]]
    assert found["vit_pp_layers"] == [[2, 0]]


@pytest.mark.parametrize("verb", ["mm_to_hf", "resplit"])
def test_results_of_the_other_verbs_as_json(
    verb: str, tied_hf: Path, tied_mm22: Path, out: Path
) -> None:
    if verb == "mm_to_hf":
        done = mm_to_hf(tied_mm22, tied_hf, out, "--json")
        size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        assert 0 < size - json.loads(done.stdout)["bytes"] < 100_000
    else:
        done = resplit(tied_mm22, out, "--json")
        assert json.loads(done.stdout)["layout"]["tp_size"] == 1
    assert json.loads(done.stdout)["output"] == str(out)


JSON_ERRORS: dict[str, tuple[list[str], int]] = {
    "impossible": (layout("[2,1]", "[2,0]"), 2),
    "missing checkpoint": (["--cfg.hf_config.hf_dir", "nowhere"], 3),
    "unknown flag": (["--cfg.mm_dirr", "x"], 2),
    "bad value": (layout("[2,x]", "[2,0]"), 2),
    "bad config file": (["--config", "none.yaml"], 0),
}


@pytest.mark.parametrize(("words", "code"), JSON_ERRORS.values(), ids=JSON_ERRORS.keys())
def test_an_error_as_json(
    words: list[str], code: int, tied_hf: Path, out: Path, tmp_path: Path
) -> None:
    """Whatever the error is, standard output holds one object."""
    start = [] if "nowhere" in words else ["--cfg.hf_config.hf_dir", tied_hf]
    done = run_cli(
        *(QWEN2VL, "hf_to_mm", "--cfg.mm_dir", out, *start, *words, "--json"), cwd=tmp_path
    )
    assert done.returncode == code if code else done.returncode in (2, 3)
    error = json.loads(done.stdout)
    assert set(error) >= {"error", "what", "expected", "fix", "exit_code"}
    assert error["exit_code"] == done.returncode
    assert error["what"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", [["--json=True"], ["--json", "true"]], ids=" ".join)
def test_other_spellings_of_json(flag: list[str], tied_hf: Path, out: Path) -> None:
    done = hf_to_mm(tied_hf, out, *layout("[2,1]", "[2,0]"), *flag, check=2)
    assert json.loads(done.stdout)["exit_code"] == 2


def test_an_error_as_json_is_not_printed_unasked(tied_hf: Path, out: Path) -> None:
    done = hf_to_mm(tied_hf, out, *layout("[2,1]", "[2,0]"), "--json", "False", check=2)
    assert done.stdout == ""


def test_an_unknown_converter_as_json() -> None:
    error = json.loads(run_cli("NoConverter", "hf_to_mm", "--json", check=2).stdout)
    assert error["exit_code"] == 2


def test_quiet(tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path) -> None:
    done = hf_to_mm(tied_hf, out, "--quiet", "--cfg.save_vit_only")
    assert (done.stdout, done.stderr) == ("", "")
    done = mm_to_hf(tied_mm22, tied_hf, tmp_path / "back", "--quiet")
    assert (done.stdout, done.stderr) == ("", "")
    done = hf_to_mm(tied_hf, out, "--quiet", check=2)
    assert done.stdout == ""
    assert str(out) in done.stderr


@pytest.mark.parametrize("flag", ["--debug", "--debug=true"])
def test_debug(flag: str, tied_hf: Path, out: Path) -> None:
    done = hf_to_mm(tied_hf, out, *layout("[2,1]", "[2,0]"), flag, check=2)
    assert "Traceback" in done.stderr
    assert "error: " in done.stderr
    refused(hf_to_mm(tied_hf, out, *layout("[2,1]", "[2,0]"), check=2), 2, out=out)


def test_a_closed_pipe_is_no_accident(tied_hf: Path, out: Path, bash: Bash) -> None:
    words = spelt("--cfg.hf_config.hf_dir HF --cfg.mm_dir OUT", HF=tied_hf, OUT=out)
    done = bash(f"(mm-convert {QWEN2VL} hf_to_mm {words}; echo code $? >&2) | true", out.parent)
    assert "code 141" in done.stderr  # 1 would say that a comparison differs
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# -------------------------------------------------------------------------------- guides
GUIDE_QWEN2VL_TO_MM = """\
mm-convert  Qwen2VLConverter hf_to_mm \\
  --cfg.mm_dir "ckpt/mm_path/Qwen2-VL-2B-Instruct" \\
  --cfg.hf_config.hf_dir $SCOW_AI_MODEL_PATH \\
  --cfg.parallel_config.llm_pp_layers [[28]] \\
  --cfg.parallel_config.vit_pp_layers [[32]] \\
  --cfg.parallel_config.tp_size 1
"""
GUIDE_QWEN2VL_TO_HF = """\
mm-convert  Qwen2VLConverter mm_to_hf \\
  --cfg.save_hf_dir $WORK_DIR/Qwen2-VL-2B-Instruct-finetuned \\
  --cfg.mm_dir "save_dir" \\
  --cfg.hf_config.hf_dir $SCOW_AI_MODEL_PATH \\
  --cfg.parallel_config.llm_pp_layers [28] \\
  --cfg.parallel_config.vit_pp_layers [32] \\
  --cfg.parallel_config.tp_size 1
"""
GUIDE_QWEN25VL = """\
# 7b
mm-convert  Qwen2_5_VLConverter hf_to_mm \\
  --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-7B-Instruct" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-7B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [1,10,10,7] \\
  --cfg.parallel_config.vit_pp_layers [32,0,0,0] \\
  --cfg.parallel_config.tp_size 1
"""


def layers_in(paths: Iterable[Path], part: str) -> list[int]:
    """How many layers of a module each rank file holds."""
    pattern = re.compile(rf"{part}.*layers\.(\d+)\.")
    found = []
    for path in paths:
        matches = (pattern.match(name) for name in torch.load(path)["model"])
        found.append(len({m[1] for m in matches if m}))
    return found


def test_the_qwen2vl_guide(tmp_path: Path, typed: Bash) -> None:
    """There, and back from what training saved below save_dir."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hub" / "Qwen2-VL-2B-Instruct")
    work = tmp_path / "work"
    (home := tmp_path / "MindSpeed-MM").mkdir()
    env = {"SCOW_AI_MODEL_PATH": str(hf), "WORK_DIR": str(work)}
    typed(GUIDE_QWEN2VL_TO_MM, home, **env)
    mm = home / "ckpt" / "mm_path" / "Qwen2-VL-2B-Instruct"
    paths = rank_files(mm)
    assert list(paths) == ["mp_rank_00"]
    assert layers_in(paths.values(), "text_decoder") == [28]
    shutil.copytree(mm / "release", home / "save_dir" / "iter_0010000")
    (home / "save_dir" / "latest_checkpointed_iteration.txt").write_text("10000")
    typed(GUIDE_QWEN2VL_TO_HF, home, **env)
    same_hf(hf, work / "Qwen2-VL-2B-Instruct-finetuned")


def test_the_qwen25vl_guide(tmp_path: Path, typed: Bash) -> None:
    name = "Qwen2.5-VL-7B-Instruct"
    hf = make_hf("qwen2.5vl-7b", tmp_path / "ckpt" / "hf_path" / name)
    typed(GUIDE_QWEN25VL, tmp_path)
    mm = tmp_path / "ckpt" / "mm_path" / name
    paths = rank_files(mm)
    assert list(paths) == [f"mp_rank_00_{stage:03d}" for stage in range(4)]
    assert layers_in(paths.values(), "text_decoder") == [1, 10, 10, 7]
    assert layers_in(paths.values(), "image_encoder") == [32, 0, 0, 0]
    mm_to_hf(mm, hf, tmp_path / "back", converter=QWEN25VL)
    same_hf(hf, tmp_path / "back")


def test_a_tool_takes_its_flags_from_a_file(tied_hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "inspect.yaml"
    file.write_text(f"tensors: true\njson: false\nsvg: {tmp_path / 'a.svg'}\n")
    done = run_cli("inspect", tied_hf, "--config", file, check=0)
    assert (tmp_path / "a.svg").is_file()
    assert "model.embed_tokens.weight" in done.stdout
    words = ["inspect", tied_hf, f"--config={file}", "--svg", tmp_path / "b.svg"]
    run_cli(*words, check=0)
    assert (tmp_path / "b.svg").is_file()
    file.write_text("tensor: true\n")
    refused(
        run_cli("inspect", tied_hf, "--config", file),
        2,
        "line 1: there is no key tensor",
        "did you mean tensors?",
    )
    refused(run_cli("inspect", tied_hf, "--config"), 2, "--config has no file")


@pytest.mark.parametrize("width", [48, 80, 200])
def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """One flag below the other, however wide it is; no line breaks but for its width."""
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run_cli(QWEN2VL, "hf_to_mm", "-h").stdout
    flags = re.findall(r"^  (--\S+(?: \S+)?)", shown, re.MULTILINE)
    assert "--cfg.mm_dir PATH" in flags
    assert "--debug" in flags
    entries = re.split(r"^  (?=-)", shown, flags=re.MULTILINE)[1:]
    for entry in entries:
        lines = entry.rstrip().partition("\n\n")[0].split("\n")
        beside = [line.strip() for line in lines[1:]]
        room = min(width, 100) - min(24, width // 3)
        for line, following in pairwise(beside):
            assert len(line) + 1 + len(following.split()[0]) > room, entry
        assert all(len(line) <= room for line in beside if " " in line)
    assert "None}" not in shown


ANY_ERRORS: dict[str, tuple[str, ...]] = {
    "a word": ("inpsect",),
    "a flag": (QWEN2VL, "hf_to_mm", "--cfg.mm_dri", "x"),
    "a folder": ("inspect", "none"),
    "a list": (QWEN2VL, "hf_to_mm", *FOLDERS, "--cfg.parallel_config.llm_pp_layers", "[1]"),
    "a number": ("doctor", "none", "--workers", "-1"),
    "a contradiction": ("finetune", "--hf_dir", "x", "--save", "y"),
    "two models": ("verify", "x", "y"),
}


@pytest.mark.parametrize("words", ANY_ERRORS.values(), ids=ANY_ERRORS.keys())
def test_every_error_says_what_expected_and_fix(words: tuple[str, ...]) -> None:
    done = run_cli(*words, "--json")
    told = json.loads(done.stdout)
    assert told["exit_code"] == done.returncode
    assert all(told[key] for key in ("error", "what", "expected", "fix")), told


def test_an_interruption_says_what_expected_and_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "heed_no_more", lambda: None)  # pytest keeps its own handlers
    for stop in (KeyboardInterrupt(), Interrupted("x is as it was before")):
        assert ending.interrupted(stop, ["verify", "a", "b", "--json"]) == 130
        told = json.loads(capsys.readouterr().out)
        assert all(told[key] for key in ("error", "what", "expected", "fix")), told


SLOW_END = """
import atexit, os, signal, sys, time
from mmconvert.cli import ending

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(1.5)

slow = Slow()
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
ending.heed_no_more()
sys.exit(130)
"""


def test_a_signal_while_the_interpreter_ends_changes_no_exit_code() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_END], check=False, timeout=60)
    assert done.returncode == 130


@pytest.mark.parametrize("words", [["--version"], ["inspect", "nowhere"]], ids=str)
def test_a_program_that_calls_the_command_keeps_its_collector(words: list[str]) -> None:
    before = gc.get_threshold()
    gc.set_threshold(before[0] + 1, *before[1:])
    try:
        run_cli(*words)
        assert gc.get_threshold() == (before[0] + 1, *before[1:])
    finally:
        gc.set_threshold(*before)
