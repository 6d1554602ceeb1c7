"""Hugging Face folders: the index, config.json, and what hostile ones of them may ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmconvert import converters
from mmconvert.config import Options
from mmconvert.errors import CheckpointError, FormatError, MMConvertError
from mmconvert.formats.containers.image import create
from mmconvert.formats.hf.choice import INDEX
from mmconvert.formats.hf.folder import open_hf, read_config
from mmconvert.formats.hf.model import config_model, hf_model
from mmconvert.formats.hf.output import weight_images
from mmconvert.playground.checkpoints import make_hf, nested_config
from mmconvert.stored import Target
from nights import nightly

Json = dict[str, Any]
MODELS = {
    "qwen2vl-2b": "Qwen2VLConverter",
    "qwen2.5vl-7b": "Qwen2_5_VLConverter",
    "qwen2.5omni-7b": "Qwen2_5_OmniConverter",
    "internvl2-76b": "InternVLConverter",
}
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in two weight files."""
    return make_hf("qwen2vl-2b", tmp_path / "hf", shards=2, layers=1, vit_layers=1)


def small(model: str, out: Path, **more: Any) -> Path:
    sizes: dict[str, Any] = {"layers": 1, "vit_layers": 1}
    sizes |= {"audio_layers": 1} if "omni" in model else {}
    return make_hf(model, out, **sizes, **more)


def edited(path: Path, edit: Callable[[Json], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def wrong(folder: Path, *words: str) -> None:
    """The folder is refused with an error that says all of `words`."""
    with pytest.raises(CheckpointError) as caught:
        open_hf(folder)
    assert str(folder) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_folder_that_the_others_vary(folder: Path) -> None:
    found = open_hf(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    assert {t: p.path.name for t, p in found.tensors().items()} == index
    assert [f.path.name for f in found.files] == [FIRST, SECOND]


# ---------------------------------------------------------------------------- the index
NO_INDEX: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{weight_map: 1}",
    "a list": b"[]",
    "null": b"null",
    "text": b'"weight_map"',
    "no weight_map": b"{}",
    "a list for weight_map": b'{"weight_map": []}',
    "null for weight_map": b'{"weight_map": null}',
    "an empty weight_map": b'{"weight_map": {}}',
    "no UTF-8": b'{"weight_map": "\xff"}',
    "nested": b'{"weight_map":' * 100_000 + b"1" + b"}" * 100_000,
    "twice": b'{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}',
}


@pytest.mark.parametrize("content", NO_INDEX.values(), ids=NO_INDEX.keys())
def test_an_index_that_is_none(content: bytes, folder: Path) -> None:
    (folder / INDEX).write_bytes(content)
    wrong(folder, INDEX)


def test_an_index_that_is_a_folder(folder: Path) -> None:
    """Then there is none, and two weight files without one are not guessed about."""
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()
    wrong(folder, INDEX)


def test_a_huge_index_is_not_read(folder: Path) -> None:
    os.truncate(folder / INDEX, 1 << 40)
    wrong(folder, INDEX)


NAMES: dict[str, object] = {
    "up": "../outside.safetensors",
    "up and down": "x/../../outside.safetensors",
    "below": "sub/model.safetensors",
    "here": "./model.safetensors",
    "absolute": "/etc/passwd",
    "absolute weights": "/tmp/model.safetensors",
    "backslash": "..\\outside.safetensors",
    "drive": "C:\\outside.safetensors",
    "NUL": "outside.safetensors\0",
    "NUL within": "a\0.safetensors",
    "only dots": "..",
    "empty": "",
    "another kind of file": "config.json",
    "a pickle": "pytorch_model.bin",
    "number": 1,
    "null": None,
    "true": True,
    "list": [FIRST],
    "object": {"file": FIRST},
    "very long": "x" * 5000 + ".safetensors",
    "no such file": "model-00009-of-00009.safetensors",
    "a lone surrogate": "\ud800.safetensors",
    "a line feed": "a\nb.safetensors",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_of_files_in_the_index(name: object, folder: Path) -> None:
    """A file outside the folder is never opened, whatever it holds."""
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / FIRST).read_bytes())
    (folder / "sub").mkdir()
    (folder / "sub" / "model.safetensors").write_bytes((folder / FIRST).read_bytes())

    def edit(index: Json) -> None:
        weight_map = index["weight_map"]
        for tensor in [t for t, file in weight_map.items() if file == FIRST]:
            weight_map[tensor] = name

    edited(folder / INDEX, edit)
    wrong(folder, INDEX)


@pytest.mark.parametrize("kind", ["link to a folder", "broken link", "folder", "empty file"])
def test_weight_files_that_are_none(kind: str, folder: Path) -> None:
    path = folder / SECOND
    path.unlink()
    if kind == "link to a folder":
        path.symlink_to(folder, target_is_directory=True)
    elif kind == "broken link":
        path.symlink_to(folder / "gone")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
    wrong(folder, SECOND)


def test_a_pipe_in_place_of_a_weight_file_does_not_hang(folder: Path) -> None:
    """Opening a FIFO waits for a writer, for ever."""
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)
    wrong(folder, SECOND)


def test_an_entry_without_a_tensor(folder: Path) -> None:
    edited(folder / INDEX, lambda index: index["weight_map"].update({"ghost.weight": SECOND}))
    wrong(folder, "ghost.weight", SECOND)


def test_a_tensor_that_the_index_does_not_list(folder: Path) -> None:
    edited(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    wrong(folder, "model.norm.weight", "does not list")


def test_a_tensor_in_the_other_file(folder: Path) -> None:
    edited(folder / INDEX, lambda i: i["weight_map"].update({"model.norm.weight": FIRST}))
    wrong(folder, "model.norm.weight", FIRST)


def test_a_tensor_in_two_files(folder: Path, tmp_path: Path) -> None:
    """The index chooses none of two: it is not the index of these files."""
    (folder / SECOND).write_bytes((folder / FIRST).read_bytes())
    wrong(folder)
    other = make_hf("qwen2vl-2b", tmp_path / "other", shards=1, layers=1, vit_layers=1)
    (folder / SECOND).write_bytes((other / "model.safetensors").read_bytes())
    wrong(folder, "index")


def test_no_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    wrong(folder, "2 *.safetensors", INDEX)
    (folder / SECOND).unlink()
    assert [f.path.name for f in open_hf(folder).files] == [FIRST]


def test_no_weights(folder: Path) -> None:
    for name in (INDEX, FIRST, SECOND):
        (folder / name).unlink()
    wrong(folder, "no *.safetensors")
    (folder / "pytorch_model.bin").touch()
    wrong(folder, "pytorch_model.bin", "empty")


def test_a_single_file_wins_over_the_index(folder: Path, tmp_path: Path) -> None:
    other = make_hf("qwen2vl-2b", tmp_path / "o", shards=1, layers=1, vit_layers=1, seed="other")
    assert open_hf(folder).notes == ()
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    found = open_hf(folder)
    assert [f.path.name for f in found.files] == ["model.safetensors"]
    assert len(found.notes) == 1
    assert f"not read: {FIRST}, {SECOND}, {INDEX}" in found.notes[0]


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    folder = small("qwen2vl-2b", tmp_path / "hf", shards=1)
    names = dict.fromkeys(open_hf(folder).tensors(), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    found = open_hf(folder)
    assert found.tensors().keys() == names.keys()
    assert found.notes == ()


def test_headers_come_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    """And with one tensor less they are made anew, with an index that fits."""
    found, out = open_hf(folder), tmp_path / "out"
    targets = [Target(t.name, t.dtype, t.shape) for t in found.tensors().values()]
    out.mkdir()
    created = create(out, weight_images(found, targets), targets)
    assert (out / INDEX).read_bytes() == (folder / INDEX).read_bytes()
    for file in found.files:
        size = 8 + len(file.header)
        made = (out / file.path.name).read_bytes()
        assert made[:size] == file.path.read_bytes()[:size]
        assert len(made) == file.path.stat().st_size
    assert {t.name: t.offset for t in created} == {n: t.offset for n, t in found.tensors().items()}
    less, del_ = tmp_path / "less", "model.norm.weight"
    less.mkdir()
    kept = [target for target in targets if target.name != del_]
    create(less, weight_images(found, kept), kept)
    (less / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert open_hf(less).tensors().keys() == found.tensors().keys() - {del_}


# ------------------------------------------------------------------------------- config
NO_CONFIGS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"model_type: qwen2_vl",
    "list": b"[]",
    "null": b"null",
    "text": b'"qwen2_vl"',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "no UTF-8": b'{"model_type": "\xff"}',
    "two answers": b'{"model_type": "qwen2_vl", "model_type": "qwen2_5_vl"}',
    "binary": bytes(range(256)),
    "endless number": b'{"hidden_size": ' + b"9" * 1_000_000 + b"}",
}


@pytest.mark.parametrize("content", NO_CONFIGS.values(), ids=NO_CONFIGS.keys())
def test_a_config_that_is_none(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_config(folder)
    assert "config.json" in caught.value.what


@pytest.mark.parametrize("state", ["absent", "a folder", "huge", "a pipe"])
def test_no_config(state: str, folder: Path) -> None:
    path = folder / "config.json"
    path.unlink()
    if state == "a folder":
        path.mkdir()
    elif state == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    elif state == "a pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(folder)


def all_places(config: Json, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every entry of a config, parts included."""
    found = []
    for key, value in config.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += all_places(value, (*prefix, key))
    return found


SIZE_WORDS = ("size", "heads", "layers", "depth", "dim", "ffn", "d_model", "num_")
ABSURD: list[object] = [
    *(0, -1, -(10**12), 10**12, 2**31, 2**63, 10**100, 1.5, 4.0, True, False),
    *("4", "", "x" * 10_000, [], [4], {}, {"a": 1}, "28", None),
]


@pytest.mark.parametrize("model", nightly(MODELS, but=("qwen2.5vl-7b", "internvl2-76b")))
def test_absurd_values_anywhere_in_the_config(model: str, tmp_path: Path) -> None:
    """Each entry in turn becomes each absurd value: a plan, or an error that ends at once."""
    folder = small(model, tmp_path / "hf", shards=1)
    family = converters.load(MODELS[model])
    original = json.loads((folder / "config.json").read_text())
    tried = refused = 0
    faults: list[str] = []
    for place in all_places(original):
        sizes = any(word in place[-1] for word in SIZE_WORDS)
        for value in ABSURD if sizes else ABSURD[::4]:
            config = json.loads(json.dumps(original))
            part = config
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = value
            (folder / "config.json").write_text(json.dumps(config))
            tried += 1
            try:
                config_model(family, folder)
                hf_model(family, folder, Options())
            except MMConvertError as error:
                refused += 1
                if error.exit_code != 3:
                    faults.append(f"{'.'.join(place)} = {value!r:.40}: exit {error.exit_code}")
            except Exception as error:
                faults.append(f"{'.'.join(place)} = {value!r:.40}: {error!r:.120}")
    assert not faults, "\n".join(faults[:20])
    assert tried > 300 and refused > 60


KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "qwen2vl-2b": (
        ("num_hidden_layers",),
        ("num_attention_heads",),
        ("num_key_value_heads",),
        ("hidden_size",),
        ("vision_config", "depth"),
        ("vision_config", "num_heads"),
        ("vision_config", "embed_dim"),
    ),
    "qwen2.5omni-7b": (
        ("thinker_config", "audio_config", "encoder_layers"),
        ("thinker_config", "audio_config", "encoder_attention_heads"),
        ("thinker_config", "text_config", "num_hidden_layers"),
        ("thinker_config", "vision_config", "depth"),
    ),
    "internvl2-76b": (
        ("llm_config", "num_hidden_layers"),
        ("vision_config", "num_hidden_layers"),
        ("vision_config", "num_attention_heads"),
    ),
}


@pytest.mark.parametrize(
    ("model", "place"), [(model, place) for model, places in KEYS.items() for place in places]
)
@pytest.mark.parametrize("value", [0, -1, 10**12, 1.5, True, "4", [4]], ids=repr)
def test_sizes_that_cannot_be(
    model: str, place: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    """The error names the key and the value."""
    folder = small(model, tmp_path / "hf", shards=1)

    def edit(config: Json) -> None:
        for key in place[:-1]:
            config = config[key]
        config[place[-1]] = value

    edited(folder / "config.json", edit)
    with pytest.raises(CheckpointError) as caught:
        config_model(converters.load(MODELS[model]), folder)
    assert place[-1] in caught.value.what and repr(value) in caught.value.what


@pytest.mark.parametrize("model", ["qwen2vl-2b", "qwen2.5vl-7b"])
def test_both_forms_of_the_config_give_the_same_sizes(model: str, tmp_path: Path) -> None:
    family = converters.load(MODELS[model])
    flat = config_model(family, small(model, tmp_path / "flat"))
    nested = config_model(family, small(model, tmp_path / "nested", edit_config=nested_config))
    assert (flat.dims, flat.variant) == (nested.dims, nested.variant)


BOUNDED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from mmconvert.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("value", [4096, 4097, 10**12])
@pytest.mark.parametrize("verb", ["hf_to_mm", "resplit"])
def test_absurd_layer_counts_cost_neither_time_nor_memory(
    value: int, verb: str, folder: Path, tmp_path: Path
) -> None:
    """In a process of 1 GiB and 20 seconds of processor time at most."""
    edited(folder / "config.json", lambda config: config.update(num_hidden_layers=value))
    prefix = "--cfg.target_parallel_config." if verb == "resplit" else "--cfg.parallel_config."
    words = ["Qwen2VLConverter", verb, "--cfg.hf_config.hf_dir", str(folder)]
    if verb == "hf_to_mm":
        words += ["--cfg.mm_dir", str(tmp_path / "mm")]
    else:
        words += ["--cfg.source_dir", str(tmp_path), "--cfg.target_dir", str(tmp_path / "mm")]
    words += [f"{prefix}llm_pp_layers", f"[{value}]", f"{prefix}vit_pp_layers", "[1]"]
    command = [sys.executable, "-c", BOUNDED, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (2, 3), (done.returncode, done.stderr[-500:])
    assert "error: " in done.stderr and "Traceback" not in done.stderr
