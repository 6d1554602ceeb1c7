"""A format of another package: every command and function takes it, though none knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmconvert
import toyformat
from inprocess import call
from mmconvert import Options
from mmconvert.errors import CheckpointError, OutputError, RequestError
from mmconvert.executor import journal
from mmconvert.formats import registry
from mmconvert.playground.checkpoints import make_hf

AUTO, QWEN = "AutoConverter", "Qwen2VLConverter"
NPY, NORM = "npy", "text_decoder.decoder.final_layernorm.weight"


class Entry:
    """What an installed package would register."""

    def load(self) -> toyformat.Npy:
        return toyformat.FORMAT


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_third_party", lambda: {NPY: Entry()})


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf("qwen2vl-2b", tmp_path_factory.mktemp("toy") / "hf", layers=2, vit_layers=2)


@pytest.fixture
def toy(hf: Path, tmp_path: Path) -> Path:
    mmconvert.convert_to(NPY, hf, tmp_path / "npy", options=Options(digests=True))
    return tmp_path / "npy"


def test_there_and_back(hf: Path, toy: Path, tmp_path: Path) -> None:
    """From Hugging Face and to it; to MM in a layout, and from there; byte for byte."""
    mmconvert.convert_to("hf", toy, tmp_path / "back", hf_dir=hf)
    for file in sorted(hf.glob("*.safetensors")):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    layout = {"llm_pp_layers": [1, 1], "vit_pp_layers": [2, 0], "tp_size": 2}
    result = mmconvert.convert_to("mm", toy, tmp_path / "mm", layout, hf_dir=hf)
    assert result.written
    mmconvert.convert_to(NPY, tmp_path / "mm", tmp_path / "again", hf_dir=hf)
    for file in sorted(toy.glob("*.npy")):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_numpy_reads_what_was_written(hf: Path, toy: Path) -> None:
    index: dict[str, Any] = json.loads((toy / toyformat.INDEX).read_text())
    number, dtype = index["tensors"][NORM]
    found = torch.from_numpy(np.load(toy / f"{number:05d}.npy").view(np.int16))
    assert dtype == "BF16"
    assert torch.equal(found.view(torch.bfloat16), mmconvert.open(hf)["model.norm.weight"])
    assert torch.equal(mmconvert.open(toy)[NORM], mmconvert.open(hf)["model.norm.weight"])


def test_the_tools(hf: Path, toy: Path) -> None:
    found = mmconvert.inspect(toy)
    assert (found.kind, found.family) == (NPY, "Qwen2-VL")
    assert found.parameters == mmconvert.inspect(hf).parameters
    assert "NumPy folder, Qwen2-VL" in call("inspect", toy).stdout
    assert mmconvert.verify(toy, hf).equal
    assert json.loads(call("diff", hf, toy, "--json").stdout)["equal"] is True
    healthy = json.loads(call("doctor", toy, "--values", "--json").stdout)
    assert (healthy["kind"], healthy["findings"]) == (NPY, [])


def test_what_differs_and_what_is_damaged(hf: Path, toy: Path, tmp_path: Path) -> None:
    index: dict[str, Any] = json.loads((toy / toyformat.INDEX).read_text())
    path = toy / f"{index['tensors'][NORM][0]:05d}.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert not mmconvert.verify(toy, hf).equal
    assert NORM in call("verify", toy, hf, check=1).stdout
    index["tensors"]["stranger.weight"] = index["tensors"][NORM]
    index["tensors"]["another.weight"] = index["tensors"][NORM]
    (toy / toyformat.INDEX).write_text(json.dumps(index))
    ill = json.loads(call("doctor", toy, "--json", check=3).stdout)
    assert [f["id"] for f in ill["findings"]] == ["unknown-tensor"] * 2
    with pytest.raises(mmconvert.TensorError, match=r"stranger\.weight"):
        mmconvert.convert_to("hf", toy, tmp_path / "out", hf_dir=hf)
    assert not (tmp_path / "out").exists()


def test_dry_run_and_digests(hf: Path, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    would = mmconvert.convert_to(NPY, hf, out, options=Options(dry_run=True))
    assert not out.exists() and would.estimate is not None
    assert {f.path for f in would.listed} == {p.name for p in toy.glob("*.npy")}
    layout = {"llm_pp_layers": [2], "vit_pp_layers": [2]}
    mmconvert.hf_to_mm(hf, tmp_path / "mm", layout, options=Options(digests=True))
    quick = json.loads(call("verify", toy, tmp_path / "mm", "--quick", "--json").stdout)
    assert (quick["equal"], quick["by_digest"]) == (True, True)


def test_resume(hf: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run leaves what it has done to the next one."""
    out, done = tmp_path / "out", journal.Journal.add

    def stop(self: journal.Journal, *args: Any) -> None:
        done(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            mmconvert.convert_to(NPY, hf, out)
    result = mmconvert.convert_to(NPY, hf, out)
    assert result.moved.resumed > 0
    for file in sorted(toy.glob("*.npy")):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_overwrite(hf: Path, toy: Path) -> None:
    """Its folder is replaced, unless something else is in it; its new content is complete."""
    kept = (toy / toyformat.INDEX).read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        mmconvert.convert_to(NPY, hf, toy)
    (toy / toyformat.INDEX).write_text("{}")
    (toy / "thesis.tex").write_text("by hand")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        mmconvert.convert_to(NPY, hf, toy, options=Options(overwrite=True))
    (toy / "thesis.tex").unlink()
    mmconvert.convert_to(NPY, hf, toy, options=Options(overwrite=True))
    assert (toy / toyformat.INDEX).read_bytes() == kept
    (toy / toyformat.INDEX).unlink()
    with pytest.raises(OutputError, match="does not look like a checkpoint"):
        mmconvert.convert_to(NPY, hf, toy, options=Options(overwrite=True))


def test_the_command_line(hf: Path, tmp_path: Path) -> None:
    flags = ("--cfg.source", hf, "--cfg.target", tmp_path / "npy")
    assert "wrote" in call(QWEN, "hf_to_npy", *flags).stdout
    flags = ("--cfg.source", tmp_path / "npy", "--cfg.target", tmp_path / "mm")
    size = ("--cfg.target_layout.tp_size", "2", "--cfg.hf_config.hf_dir", hf)
    assert "tp_size 2" in call(AUTO, "npy_to_mm", *flags, *size).stdout
    assert mmconvert.verify(tmp_path / "mm", hf).equal
    flags = ("--cfg.source", tmp_path / "npy", "--cfg.target", tmp_path / "back")
    done = call(AUTO, "npy_to_hf", *flags, check=2)
    assert "--cfg.hf_config.hf_dir" in done.stderr


def test_what_is_refused(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no format zip"):
        mmconvert.convert_to("zip", hf, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        mmconvert.convert_to(NPY, tmp_path / "empty", tmp_path / "out")
