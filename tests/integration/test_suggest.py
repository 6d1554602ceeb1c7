"""mm-convert suggest, as a user runs it: the printed command converts, the figures are true."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import run_cli
from commands import edit_json, install, rank_files, refused
from mmconvert.playground.checkpoints import make_hf
from mmconvert.sharding.stages import check_grids, parse_grid
from nights import night

LAYERS = {
    "qwen2vl-2b": {"vit": 32, "llm": 28},
    "qwen2.5vl-7b": {"vit": 32, "llm": 28},
    "qwen2.5omni-7b": {"vit": 32, "audio": 32, "llm": 28},
    "internvl2-76b": {"vit": 45, "llm": 80},
}
CASES = [
    ("qwen2vl-2b", ["--pp", "4", "--tp", "2"]),
    night("qwen2vl-2b", ["--pp", "2", "--vpp", "2", "--freeze", "image_encoder"]),
    ("qwen2.5vl-7b", ["--pp", "4", "--vpp", "3", "--by", "parameters"]),
    night("qwen2.5omni-7b", ["--pp", "4", "--tp", "4", "--audio-tp", "1"]),
    ("qwen2.5omni-7b", ["--pp", "2", "--vpp", "2", "--freeze=image_encoder,audio_encoder"]),
    night("internvl2-76b", ["--pp", "8", "--vpp", "2"]),
]


def suggest(folder: Path, *flags: str) -> dict[str, Any]:
    return json.loads(run_cli("suggest", folder, *flags, "--json", check=0).stdout)


@pytest.fixture(scope="module")
def hf_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints by model, each made once."""
    made: dict[str, Path] = {}

    def get(model: str) -> Path:
        if model not in made:
            made[model] = make_hf(model, tmp_path_factory.mktemp("hf") / "a model")
        return made[model]

    return get


def pickled(hf: Path, to: Path) -> Path:
    """The folder with its tensors in one pytorch_model.bin."""
    config_only(hf, to)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(hf.glob("*.safetensors")):
        tensors |= load_file(file)
    torch.save(tensors, to / "pytorch_model.bin")
    return to


def config_only(folder: Path, to: Path) -> Path:
    to.mkdir()
    shutil.copy(folder / "config.json", to)
    return to


# ------------------------------------------------------------------------------ the command
@pytest.mark.parametrize(("model", "flags"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_the_printed_command_converts(
    model: str, flags: list[str], hf_of: Any, tmp_path: Path
) -> None:
    """It runs in a shell, and each rank holds the parameters that were promised."""
    hf = hf_of(model)
    found = suggest(hf, *flags, "--mm-dir", str(tmp_path / "an mm"))
    path = f"{install(tmp_path / 'bin')}:{os.environ['PATH']}"
    done = subprocess.run(
        found["command"],
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tp = found["parallel_config"]["tp_size"]
    held = [0] * len(found["ranks"])
    size = [0] * len(found["ranks"])
    for name, file in rank_files(tmp_path / "an mm").items():
        _, _, tp_rank, pp_rank = name.split("_")
        if int(tp_rank) == 0:
            content = torch.load(file, weights_only=True)
            for key, part in content.items():
                if key.startswith("model"):
                    held[int(pp_rank)] += sum(t.numel() for t in part.values())
                    size[int(pp_rank)] += sum(t.nbytes for t in part.values())
    assert len(rank_files(tmp_path / "an mm")) == tp * len(held)
    assert [rank["parameters"] for rank in found["ranks"]] == held
    assert [rank["bytes"] for rank in found["ranks"]] == size


def test_the_text_says_what_the_json_says(hf_of: Any, tmp_path: Path) -> None:
    hf = hf_of("qwen2vl-2b")
    flags = ["--pp", "4", "--freeze", "image_encoder"]
    want = suggest(hf, *flags)
    done = run_cli("suggest", hf, *flags, cwd=tmp_path, check=0)
    assert done.stdout.splitlines()[-1] == want["command"]
    assert f"imbalance {want['imbalance']:.2%}" in done.stdout
    assert "optimal" in done.stdout and want["optimal"]
    assert done.stderr == "".join(f"warning: {warning}\n" for warning in want["warnings"])
    assert list(tmp_path.iterdir()) == []  # it only says; it writes nothing
    for number, rank in enumerate(want["ranks"]):
        row = next(
            line for line in done.stdout.splitlines() if line.startswith(f"│       {number}")
        )
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1:3] == [str(rank["model_chunks"][0][key]) for key in ("vit", "llm")]
        assert cells[3] == f"{rank['cost_share']:.1%}"


# ------------------------------------------------------------------------------- the layout
@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("flags", [["--pp", "4"], ["--pp", "2", "--vpp", "3"]], ids=" ".join)
def test_layouts_are_whole_and_in_order(model: str, flags: list[str], hf_of: Any) -> None:
    found = suggest(hf_of(model), *flags)
    grids = {
        key: parse_grid(found["parallel_config"][f"{key}_pp_layers"], key) for key in LAYERS[model]
    }
    assert {key: sum(map(sum, grid)) for key, grid in grids.items()} == LAYERS[model]
    check_grids(grids, {key: key for key in grids})
    for virtual in range(len(grids["llm"])):
        for pp, rank in enumerate(found["ranks"]):
            chunk = rank["model_chunks"][virtual]
            assert chunk == {key: grid[virtual][pp] for key, grid in grids.items()}
            assert any(chunk.values())
    shares = [rank["cost_share"] for rank in found["ranks"]]
    assert sum(shares) == pytest.approx(1)
    assert found["imbalance"] == pytest.approx(max(shares) * len(shares) - 1)
    assert found["optimal"] == (found["gap"] == 0)
    assert found["chunk_imbalance"] >= found["imbalance"]


@pytest.mark.parametrize("model", LAYERS)
def test_config_json_is_enough(model: str, hf_of: Any, tmp_path: Path) -> None:
    """A folder without weights gives the same, and says that it read none."""
    hf = hf_of(model)
    bare = config_only(hf, tmp_path / "bare")
    whole = suggest(hf, "--pp", "4")
    for folder, more in ((bare, []), (hf, ["--config-only"])):
        found = suggest(folder, "--pp", "4", *more)
        assert "config.json" in found["notes"][0]
        for key in ("parallel_config", "ranks", "imbalance", "converter"):
            assert found[key] == whole[key], key
    assert whole["notes"] == []


def test_weights_in_pickles_are_read(hf_of: Any, tmp_path: Path) -> None:
    """As those of safetensors are; an adapter alone is no model's weights."""
    hf = hf_of("qwen2vl-2b")
    found = suggest(pickled(hf, tmp_path / "pickled"), "--pp", "4")
    assert found["notes"] == []
    assert found["parallel_config"] == suggest(hf, "--pp", "4")["parallel_config"]
    bare = config_only(hf, tmp_path / "bare")
    save_file({"lora_A": torch.zeros(1)}, bare / "adapter_model.safetensors")
    assert "config.json" in suggest(bare, "--pp", "4")["notes"][0]


def test_a_tied_head_that_no_copy_needs_is_counted_once(tmp_path: Path, hf_of: Any) -> None:
    """All text on the last stage: Qwen2-VL-2B's one text layer left."""
    hf = config_only(hf_of("qwen2vl-2b"), tmp_path / "hf")
    edit_json(hf / "config.json", lambda c: c.update(num_hidden_layers=1))
    config = json.loads((hf / "config.json").read_text())
    embedding = config["vocab_size"] * config["hidden_size"]
    tied = suggest(hf, "--pp", "2")["ranks"][1]["parameters"]
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=False))
    assert suggest(hf, "--pp", "2")["ranks"][1]["parameters"] == tied + embedding


def test_more_image_tokens_move_text_away_from_the_encoder(hf_of: Any) -> None:
    hf = hf_of("qwen2vl-2b")
    few, many = (
        suggest(hf, "--pp", "2", "--image-tokens", n)["parallel_config"] for n in ("16", "4000")
    )
    assert sum(few["vit_pp_layers"]) == sum(many["vit_pp_layers"])
    assert few["llm_pp_layers"][0] > many["llm_pp_layers"][0]


def test_a_frozen_encoder_leaves_room_for_text(hf_of: Any) -> None:
    hf = hf_of("qwen2vl-2b")
    trained = suggest(hf, "--pp", "2")
    frozen = suggest(hf, "--pp", "2", "--freeze", "image_encoder")
    assert (
        frozen["parallel_config"]["llm_pp_layers"][0]
        >= trained["parallel_config"]["llm_pp_layers"][0]
    )
    tflop = [sum(rank["tflop"] for rank in found["ranks"]) for found in (trained, frozen)]
    assert tflop[0] > tflop[1]


@pytest.mark.parametrize(
    ("flags", "rank", "chunk"),
    [
        (["--pp", "16"], True, False),
        (["--pp", "4", "--vpp", "3"], False, True),
        (["--pp", "1"], False, False),
    ],
)
def test_stages_with_frozen_weights_only_are_named(
    flags: list[str], rank: bool, chunk: bool, hf_of: Any
) -> None:
    hf = hf_of("qwen2.5vl-7b")
    found = suggest(hf, *flags, "--freeze", "image_encoder", "--image-tokens", "4000")
    text = " ".join(found["warnings"])
    assert ("only frozen weights: training needs" in text) == rank, text
    assert ("0 of pipeline rank 0" in text) == chunk, text
    assert ("--enable-dummy-optimizer" in text) == (rank or chunk)
    assert suggest(hf, *flags, "--image-tokens", "4000")["warnings"] == []


# ------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pp", "0"], ["--pp is 0"]),
        (["--pp", "2", "--vpp", "-1"], ["--vpp is -1"]),
        (["--pp", "61"], ["61 stages", "60 layers", "smaller --pp"]),
        (["--pp", "2", "--tp", "4"], ["4", "llm query groups", "[1, 2]"]),
        (["--pp", "2", "--tp", "2000"], ["--tp is 2000", "1024"]),
        (["--pp", "2", "--tp", "2", "--vit-tp", "-2"], ["--vit-tp is -2"]),
        (["--pp", "2", "--audio-tp", "2"], ["--audio-tp", "no such module"]),
        (["--pp", "2", "--freeze", "image_encodr"], ["did you mean image_encoder?"]),
        (["--pp", "2", "--freeze", "image_encoder", "--freeze", "text_decoder"], ["nothing"]),
        (["--pp", "2", "--seq-length", "10"], ["1024 image tokens", "--seq-length"]),
        (["--pp", "2", "--image-tokens", "0"], ["--image-tokens is 0"]),
        (["--pp", "2", "--images", "2000"], ["--images 2000"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0].startswith("--p") else "",
)
def test_impossible_requests_are_refused(flags: list[str], words: list[str], hf_of: Any) -> None:
    refused(run_cli("suggest", hf_of("qwen2vl-2b"), *flags), 2, *words)


@pytest.mark.parametrize("flags", [[], ["--pp"], ["--pp", "x"], ["--pp", "2", "--freez", "a"]])
def test_flags_that_make_no_sense(flags: list[str], hf_of: Any) -> None:
    done = run_cli("suggest", hf_of("qwen2vl-2b"), *flags)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_folders_that_are_no_checkpoint(tmp_path: Path, hf_of: Any) -> None:
    refused(run_cli("suggest", tmp_path / "none", "--pp", "2"), 3, "does not exist")
    refused(run_cli("suggest", tmp_path, "--pp", "2"), 3, "has no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(run_cli("suggest", tmp_path, "--pp", "2"), 3, "gpt2")
    (tmp_path / "config.json").write_text("{")
    refused(run_cli("suggest", tmp_path, "--pp", "2"), 3, "not valid JSON")


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("vision_config", {"fullatt_block_indexes": 7}, ["fullatt_block_indexes is 7"]),
        ("vision_config", {"window_size": "112"}, ["window_size", "112"]),
        ("vision_config", {"patch_size": -1}, ["patch_size", "-1"]),
        (None, {"vocab_size": None}, ["llm.vocab"]),
        (None, {"num_hidden_layers": 10**9}, ["num_hidden_layers", "4096"]),
    ],
)
def test_a_config_with_wrong_sizes(
    part: str | None, change: dict[str, Any], words: list[str], hf_of: Any, tmp_path: Path
) -> None:
    hf = config_only(hf_of("qwen2.5vl-7b"), tmp_path / "hf")
    edit_json(hf / "config.json", lambda c: (c[part] if part else c).update(change))
    refused(run_cli("suggest", hf, "--pp", "2"), 3, *words)


def test_a_truncated_weight_file_is_named(hf_of: Any, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(hf_of("qwen2vl-2b"), hf)
    file = next(hf.glob("model-00001*"))
    file.write_bytes(file.read_bytes()[:100])
    refused(run_cli("suggest", hf, "--pp", "2"), 3, file.name)
    file.unlink()
    refused(run_cli("suggest", hf, "--pp", "2"), 3, file.name)


def test_help_names_every_flag() -> None:
    text = run_cli("suggest", "-h", check=0).stdout
    for flag in ("--pp", "--vpp", "--freeze", "--seq_length", "--image_tokens", "--json", "HF_DIR"):
        assert flag in text.replace("-length", "_length").replace("-tokens", "_tokens"), flag
    assert "suggest" in run_cli("--help", check=0).stdout


def shape_of(value: Any) -> Any:
    """Keys and types, without values; of a list, its first item."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value[:1]]
    return type(value).__name__


def test_the_documented_json_is_what_is_printed(hf_of: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    section = text.split("## suggest\n", 1)[1].split("\n## ", 1)[0]
    sample = json.loads(section.split("```json\n", 1)[1].split("```", 1)[0])
    got = suggest(
        *(hf_of("qwen2vl-2b"), "--config-only", "--pp", "8", "--freeze", "image_encoder"),
        *("--image-tokens", "4000"),
    )
    assert got["notes"] and got["warnings"]
    assert shape_of(sample) == shape_of(got)
    for key in got:
        assert f"`{key}`" in section, key
