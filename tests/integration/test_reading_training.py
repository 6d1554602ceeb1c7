"""MM checkpoints as training saves them, and damaged ones.

The checkpoints are written by torch.save itself, from what hf_to_mm made.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import (
    Tensors,
    copied,
    edit_rank,
    hf_to_mm,
    layout,
    mm_to_hf,
    none,
    rank_files,
    refused,
    resplit,
    same_hf,
    snapshot,
    target,
)
from mmread import TRACKER, compare_mm, read_mm

OTHER_LAYOUT = ("[1,3]", "[2,0]")
Edit = Callable[[Tensors], dict]


class Payload:
    """What a hostile file holds: unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.fixture
def alien(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class of a module that no other process can import."""
    module = types.ModuleType("trainer_of_mine.enums")
    made = type("ModelType", (), {"__module__": module.__name__})
    module.ModelType = made  # pyright: ignore[reportAttributeAccessIssue] - made up
    monkeypatch.setitem(sys.modules, "trainer_of_mine", types.ModuleType("trainer_of_mine"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def everything_else(weights: Tensors, alien: type) -> dict[str, Any]:
    """What training saves beside the weights."""
    moments = {
        i: {"exp_avg": torch.randn(t.shape), "exp_avg_sq": torch.rand(t.shape), "step": 100}
        for i, t in enumerate(weights.values())
    }
    cuda = torch.arange(16, dtype=torch.uint8)
    return {
        "args": Namespace(
            *(), tensor_model_parallel_size=2, model_type=alien(), dtype=torch.bfloat16, lr=1e-5
        ),
        "iteration": 100,
        "optimizer": {
            "optimizer": {"state": moments, "param_groups": [{"params": [0, 1], "lr": 1e-5}]},
            "fp32_from_fp16_params": [[torch.ones(3, 5), torch.zeros(2)]],
            "grad_scaler": alien(),
        },
        "opt_param_scheduler": {"max_lr": 1e-5, "num_steps": 800, "kind": alien()},
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "cuda_rng_state": cuda,
                "rng_tracker_states": {"model-parallel-rng": cuda + 1},
            }
        ],
        "num_floating_point_operations_so_far": 123456789012345678901,
        "rerun_state_machine": None,
    }


def as_training(
    mm: Path,
    out: Path,
    edit: Edit = dict,
    *,
    alien: type = Namespace,
    tracker: str = "100\n",
    **save: Any,
) -> Path:
    """Write the checkpoint `mm` as training leaves it after 100 iterations.

    Args:
        edit: makes the state dict that is saved of the plain tensors of a model chunk.
        alien: the class of the objects beside the weights.
        save: further arguments of torch.save.
    """
    for name, path in rank_files(mm).items():
        content = torch.load(path, weights_only=True)
        parts = {key: edit(value) for key, value in content.items() if key.startswith("model")}
        first = next(value for key, value in content.items() if key.startswith("model"))
        whole = {**everything_else(first, alien), **parts, "checkpoint_version": 3.0}
        file = out / "iter_0000100" / name / path.name
        file.parent.mkdir(parents=True)
        torch.save(whole, file, **save)
    (out / TRACKER).write_text(tracker)
    return out


# ----------------------------------------------------------- how weights may be stored
def ordered(tensors: Tensors) -> dict:
    made = OrderedDict(tensors)
    made._metadata = {"": {"version": 1}}  # pyright: ignore[reportAttributeAccessIssue] - as torch does
    return made


def parameters(tensors: Tensors) -> dict:
    return OrderedDict((name, torch.nn.Parameter(t)) for name, t in tensors.items())


def with_extra_state(tensors: Tensors) -> dict:
    made: dict[str, torch.Tensor | None] = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if name.endswith("linear_qkv.weight"):
            made[name.replace("weight", "_extra_state")] = None
    return made


def with_extra_data(tensors: Tensors) -> dict:
    name = "text_decoder.decoder.layers.0.self_attention._extra_state"
    return {**tensors, name: torch.ones(11, dtype=torch.uint8)}


def one_buffer(tensors: Tensors) -> dict:
    """Views of a contiguous buffer with gaps, in another order, as Megatron's buffers are."""
    size = sum(t.numel() + 64 for t in tensors.values())
    buffer = torch.full((size,), 7.0, dtype=next(iter(tensors.values())).dtype)
    made, start = {}, 5
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].numel()):
        made[name] = buffer[start : start + tensor.numel()].view(tensor.shape)
        made[name].copy_(tensor)
        start += tensor.numel() + 64
    return made


def transposed(tensors: Tensors) -> dict:
    """Matrices stored the other way round."""
    return {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in tensors.items()}


def column_blocks(tensors: Tensors) -> dict:
    """Matrices that are the middle columns of wider ones."""
    made = {}
    for name, tensor in tensors.items():
        wide = torch.cat([tensor, tensor, tensor], -1) if tensor.dim() == 2 else tensor
        made[name] = wide[:, tensor.shape[1] : 2 * tensor.shape[1]] if tensor.dim() == 2 else wide
    return made


FORMS: dict[str, Edit] = {
    "plain": dict,
    "ordered": ordered,
    "parameters": parameters,
    "extra state of None": with_extra_state,
    "views of one buffer": one_buffer,
    "transposed views": transposed,
    "column blocks": column_blocks,
}


@pytest.fixture(scope="module")
def resharded(tied_hf: Path) -> Path:
    """What resplit is to write."""
    out = tied_hf.with_name("resharded")
    hf_to_mm(tied_hf, out, *layout(*OTHER_LAYOUT, 2))
    return out


def assert_reads(mm: Path, hf: Path, resharded: Path, tmp_path: Path) -> str:
    """Both ways out of a checkpoint give the right bytes; returns what was said."""
    said = mm_to_hf(mm, hf, tmp_path / "back").stderr
    same_hf(hf, tmp_path / "back")
    said += resplit(mm, tmp_path / "resharded", *target(*OTHER_LAYOUT, 2)).stderr
    none(compare_mm(resharded, tmp_path / "resharded"))
    return said


@pytest.mark.parametrize("edit", FORMS.values(), ids=FORMS.keys())
def test_forms_of_weights(
    edit: Edit, alien: type, tied_hf: Path, tied_mm22: Path, resharded: Path, tmp_path: Path
) -> None:
    mm = as_training(tied_mm22, tmp_path / "mm", edit, alien=alien)
    said = assert_reads(mm, tied_hf, resharded, tmp_path)
    assert "optimizer" in said


@pytest.mark.parametrize("protocol", [4, 5])
def test_pickle_protocols(
    protocol: int, alien: type, tied_hf: Path, tied_mm22: Path, tmp_path: Path
) -> None:
    """The default, 2, is that of the other tests."""
    mm = as_training(tied_mm22, tmp_path / "mm", ordered, alien=alien, pickle_protocol=protocol)
    mm_to_hf(mm, tied_hf, tmp_path / "back")
    same_hf(tied_hf, tmp_path / "back")


def test_the_old_file_format_is_refused(
    tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    mm = as_training(tied_mm22, tmp_path / "mm", _use_new_zipfile_serialization=False)
    refused(mm_to_hf(mm, tied_hf, out, check=None), 3, "model_optim_rng.pt", out=out)


def test_what_is_left_out_is_said(
    alien: type, tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    """The number of bytes, for what holds tensors."""
    mm = as_training(tied_mm22, tmp_path / "mm", with_extra_data, alien=alien)
    size = 0
    for path in rank_files(mm).values():
        state = torch.load(path, weights_only=False)["optimizer"]
        groups = [*state["optimizer"]["state"].values()]
        size += sum(t.nbytes for g in groups for t in g.values() if isinstance(t, torch.Tensor))
        size += sum(t.nbytes for t in state["fp32_from_fp16_params"][0])
    done = mm_to_hf(mm, tied_hf, out)
    assert "optimizer" in done.stderr and str(size) in done.stderr, done.stderr
    assert "_extra_state" in done.stderr and "44" in done.stderr
    assert "Traceback" not in done.stderr
    same_hf(tied_hf, out)


def test_virtual_stages(alien: type, tied_hf: Path, tmp_path: Path, resharded: Path) -> None:
    lists = layout("[[1,1],[1,1]]", "[[2,0],[0,0]]", 2)
    hf_to_mm(tied_hf, tmp_path / "made", *lists)
    mm = as_training(tmp_path / "made", tmp_path / "mm", one_buffer, alien=alien)
    assert_reads(mm, tied_hf, resharded, tmp_path)


# ------------------------------------------------------------------------ hostile files
@pytest.mark.parametrize("key", ["args", "a key of its own"])
def test_payloads_beside_the_weights(
    key: str, tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    """Left out like everything there, and never run."""
    mm, marker = copied(tied_mm22, tmp_path / "mm"), tmp_path / "marker"
    payload = Payload(f"touch '{marker}'")
    for rank in rank_files(mm):
        edit_rank(mm, rank, lambda content: content.update({key: [payload, torch.ones(3)]}))
    done = mm_to_hf(mm, tied_hf, out)
    assert not marker.exists()
    assert f"{key} (48 bytes) left out" in done.stderr
    same_hf(tied_hf, out)
    resplit(mm, tmp_path / "other")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_without_tensors_is_ignored(
    protocol: int, tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    mm = as_training(tied_mm22, tmp_path / "mm", pickle_protocol=protocol)
    for path in rank_files(mm).values():
        content = torch.load(path, weights_only=False)
        content["args"] = Payload(f"touch '{marker}'")
        torch.save(content, path, pickle_protocol=protocol)
    mm_to_hf(mm, tied_hf, out)
    assert not marker.exists()
    same_hf(tied_hf, out)


HOSTILE: dict[str, Callable[[dict, Payload], object]] = {
    "in place of a tensor": lambda content, payload: content["model"].update(
        {"text_decoder.decoder.layers.0.input_layernorm.weight": payload}
    ),
    "beside the tensors": lambda content, payload: content["model"].update({"more": payload}),
    "in place of the weights": lambda content, payload: content.update({"model": payload}),
    "in a list": lambda content, payload: content["model"].update({"more": [payload]}),
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_payloads_among_the_weights(
    edit: Callable[[dict, Payload], object],
    tied_hf: Path,
    tied_mm22: Path,
    out: Path,
    tmp_path: Path,
) -> None:
    mm, marker = copied(tied_mm22, tmp_path / "mm"), tmp_path / "marker"
    edit_rank(mm, "mp_rank_01_000", lambda c: edit(c, Payload(f"touch '{marker}'")))
    refused(mm_to_hf(mm, tied_hf, out, check=None), 3, "mp_rank_01_000", out=out)
    refused(resplit(mm, out, check=None), 3, "mp_rank_01_000", out=out)
    assert not marker.exists()


# ------------------------------------------------------------------------------- paths
@pytest.mark.parametrize("form", ["root", "iteration", "relative", "slash", "link"])
def test_paths(form: str, tied_hf: Path, tied_mm22: Path, tmp_path: Path) -> None:
    mm = as_training(tied_mm22, tmp_path / "mm")
    link = tmp_path / "linked"
    link.symlink_to(mm / "iter_0000100", target_is_directory=True)
    given = {
        "root": str(mm),
        "iteration": str(mm / "iter_0000100"),
        "relative": os.path.relpath(mm, Path.cwd()),
        "slash": f"{mm}/",
        "link": str(link),
    }[form]
    mm_to_hf(Path(given) if form != "slash" else given, tied_hf, tmp_path / "back")  # pyright: ignore[reportArgumentType] - a Path would lose the slash
    same_hf(tied_hf, tmp_path / "back")


def test_the_tracker_chooses(
    tied_hf: Path, untied_mm22: Path, tied_mm22: Path, tmp_path: Path
) -> None:
    """Of several iterations the one that the tracker names is read."""
    mm = as_training(tied_mm22, tmp_path / "mm")
    shutil.copytree(untied_mm22 / "release", mm / "release")
    shutil.copytree(untied_mm22 / "release", mm / "iter_0000200")
    mm_to_hf(mm, tied_hf, tmp_path / "back")
    same_hf(tied_hf, tmp_path / "back")


@pytest.mark.parametrize("text", ["release\n", " release \r\n", "100"])
def test_trackers(text: str, tied_hf: Path, tied_mm22: Path, tmp_path: Path) -> None:
    mm = as_training(tied_mm22, tmp_path / "mm", tracker=text)
    if "release" in text:
        (mm / "iter_0000100").rename(mm / "release")
    mm_to_hf(mm, tied_hf, tmp_path / "back")
    same_hf(tied_hf, tmp_path / "back")


TRACKERS = {
    "another iteration": (b"200\n", "iter_0000200"),
    "no release": (b"release", "release"),
    "a word": (b"latest", "latest"),
    "a path": (b"../../etc", "../../etc"),
    "a float": (b"1e2", "1e2"),
    "two lines": (b"100\n200", "100"),
    "empty": (b"", "latest_checkpointed"),
    "binary": (b"\xff\x00\x01", "latest_checkpointed"),
    "other digits": ("\u0661\u0660\u0660".encode(), "latest_checkpointed"),
    "endless": (b"1" * 100_000, "latest_checkpointed"),
}


@pytest.mark.parametrize(("text", "word"), TRACKERS.values(), ids=TRACKERS.keys())
def test_bad_trackers(
    text: bytes, word: str, tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    mm = tmp_path / "mm"
    shutil.copytree(tied_mm22 / "release", mm / "iter_0000100")
    (mm / TRACKER).write_bytes(text)
    refused(mm_to_hf(mm, tied_hf, out, check=None), 3, word, TRACKER, out=out)


# ----------------------------------------------------------------------- damaged folders
def _remove(mm: Path, path: str) -> None:
    path = f"release/{path}"
    shutil.rmtree(mm / path) if (mm / path).is_dir() else (mm / path).unlink()


def _truncate(mm: Path, rank: str, size: int) -> None:
    os.truncate(rank_files(mm)[rank], size)


def _without(mm: Path, rank: str, *parts: str) -> None:
    def edit(content: dict) -> None:
        for name in [n for n in content["model"] if any(part in n for part in parts)]:
            del content["model"][name]

    edit_rank(mm, rank, edit)


def _with(mm: Path, rank: str, tensors: Tensors) -> None:
    edit_rank(mm, rank, lambda content: content["model"].update(tensors))


def _on_both(mm: Path, stage: str, *parts: str) -> None:
    for tp in ("00", "01"):
        _without(mm, f"mp_rank_{tp}_{stage}", *parts)


NORM = "text_decoder.decoder.layers.0.input_layernorm.weight"
FC2 = "text_decoder.decoder.layers.1.mlp.linear_fc2.weight"
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
HEAD = "text_decoder.output_layer.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a rank folder missing": (
        lambda mm: _remove(mm, "mp_rank_01_000"),
        ("tp 1", "pp 0"),
    ),
    "the last stage missing": (
        lambda mm: (_remove(mm, "mp_rank_00_001"), _remove(mm, "mp_rank_01_001")),
        ("mp_rank_00_001", "mp_rank_01_001"),
    ),
    "a rank file missing": (
        lambda mm: _remove(mm, "mp_rank_01_001/model_optim_rng.pt"),
        ("mp_rank_01_001", "model_optim_rng.pt"),
    ),
    "folders of two layouts": (
        lambda mm: shutil.copytree(
            mm / "release" / "mp_rank_00_000", mm / "release" / "mp_rank_00"
        ),
        ("layouts", "mp_rank_00 ("),
    ),
    "chunks of two layouts": (
        lambda mm: edit_rank(
            mm, "mp_rank_01_000", lambda c: c.update({"model0": c.pop("model"), "model1": {}})
        ),
        ("mp_rank_01_000", "model0"),
    ),
    "a chunk number skipped": (
        lambda mm: edit_rank(
            mm, "mp_rank_00_000", lambda c: c.update({"model0": c.pop("model"), "model2": {}})
        ),
        ("model2",),
    ),
    "no model": (
        lambda mm: edit_rank(mm, "mp_rank_00_000", lambda c: c.pop("model")),
        ("mp_rank_00_000", "model"),
    ),
    "a local layer missing": (
        lambda mm: _on_both(mm, "001", "decoder.layers.0."),
        ("layer 0", "text_decoder"),
    ),
    "the last layer missing": (
        lambda mm: _on_both(mm, "001", "decoder.layers.1."),
        ("3", "4", "layers"),
    ),
    "a layer missing on one tp rank": (
        lambda mm: _without(mm, "mp_rank_01_001", "decoder.layers.1."),
        ("mp_rank_01_001", "layers"),
    ),
    "a tensor missing": (lambda mm: _on_both(mm, "000", FC2), (FC2, "mp_rank_00_000")),
    "a tensor missing on one tp rank": (
        lambda mm: _without(mm, "mp_rank_01_000", FC2),
        (FC2, "mp_rank_01_000"),
    ),
    "a tensor of no family": (
        lambda mm: _with(mm, "mp_rank_00_001", {"text_decoder.mystery.weight": torch.ones(2)}),
        ("text_decoder.mystery.weight", "mp_rank_00_001"),
    ),
    "a tensor on the wrong stage": (
        lambda mm: _with(mm, "mp_rank_00_001", {EMBEDDING: torch.ones(152, 72)}),
        (EMBEDDING, "mp_rank_00_001"),
    ),
    "another shape": (
        lambda mm: _with(mm, "mp_rank_01_000", {FC2: torch.ones(72, 71).bfloat16()}),
        (FC2,),
    ),
    "another dtype": (
        lambda mm: _with(mm, "mp_rank_01_000", {FC2: torch.ones(72, 72)}),
        (FC2, "F32"),
    ),
    "half a file": (lambda mm: _truncate(mm, "mp_rank_00_001", 50_000), ("mp_rank_00_001",)),
    "an empty file": (lambda mm: _truncate(mm, "mp_rank_00_001", 0), ("mp_rank_00_001",)),
    "a text file": (
        lambda mm: rank_files(mm)["mp_rank_00_001"].write_text("version https://git-lfs"),
        ("mp_rank_00_001",),
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoints(
    damage: Callable[[Path], object],
    words: tuple[str, ...],
    tied_hf: Path,
    tied_mm22: Path,
    out: Path,
    tmp_path: Path,
) -> None:
    mm = copied(tied_mm22, tmp_path / "mm")
    damage(mm)
    refused(mm_to_hf(mm, tied_hf, out, check=None), 3, *words, out=out)


@pytest.mark.parametrize("name", ["a rank folder missing", "a local layer missing", "half a file"])
def test_damaged_checkpoints_are_not_resharded(
    name: str, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    mm = copied(tied_mm22, tmp_path / "mm")
    damage, words = DAMAGES[name]
    damage(mm)
    refused(resplit(mm, out, *target("[4]", "[2]"), check=None), 3, *words, out=out)


@pytest.mark.parametrize("state", ["absent", "empty", "a file", "hf"])
def test_no_checkpoint(state: str, tied_hf: Path, out: Path, tmp_path: Path) -> None:
    mm = tmp_path / "mm"
    if state == "empty":
        mm.mkdir()
    elif state == "a file":
        mm.write_text("x")
    elif state == "hf":
        copied(tied_hf, mm)
    refused(mm_to_hf(mm, tied_hf, out, check=None), 3, str(mm), out=out)
    if state == "absent":
        refused(resplit(mm, out, check=None), 3, str(mm), out=out)


# -------------------------------------------------------------------------------- replicas
def _change(mm: Path, rank: str, name: str, index: tuple[int, ...], value: float) -> None:
    def edit(content: dict) -> None:
        content["model"][name][index] = value

    edit_rank(mm, rank, edit)


VIT_BIAS = "image_encoder.encoder.blocks.layers.1.self_attention.linear_proj.bias"
REPLICAS = {
    "a norm": (NORM, "mp_rank_01_000", (5,), ("mp_rank_00_000", "mp_rank_01_000", "5")),
    "a bias": (VIT_BIAS, "mp_rank_01_000", (63,), ("mp_rank_00_000", "mp_rank_01_000", "63")),
    "the final norm": (
        "text_decoder.decoder.final_layernorm.weight",
        "mp_rank_01_001",
        (0,),
        ("mp_rank_00_001", "mp_rank_01_001", "0"),
    ),
    "a tied output layer": (HEAD, "mp_rank_01_001", (7, 9), ("mp_rank_01_000", "7", "9")),
}


@pytest.mark.parametrize(("name", "rank", "index", "words"), REPLICAS.values(), ids=REPLICAS.keys())
def test_replicas_that_differ(
    name: str,
    rank: str,
    index: tuple[int, ...],
    words: tuple[str, ...],
    tied_hf: Path,
    tied_mm22: Path,
    resharded: Path,
    out: Path,
    tmp_path: Path,
) -> None:
    mm = copied(tied_mm22, tmp_path / "mm")
    before = torch.load(rank_files(mm)[rank])["model"][name][index].item()
    _change(mm, rank, name, index, 96.0)
    done = mm_to_hf(mm, tied_hf, out, check=None)
    refused(done, 3, name, rank, *words, "96", f"{96 - before:g}"[:4], "--replicas", out=out)
    if name not in (NORM, HEAD):
        return
    known = ["--cfg.hf_config.hf_dir", str(tied_hf)]  # tells that the embeddings are tied
    again = resplit(mm, out, *target("[4]", "[2]"), *known, check=None)
    refused(again, 3, name, rank, "96", out=out)
    done = mm_to_hf(mm, tied_hf, out, "--replicas", "first")
    assert "warning" in done.stderr and name in done.stderr
    same_hf(tied_hf, out)
    done = resplit(
        *(mm, tmp_path / "other", *target(*OTHER_LAYOUT, 2), *known, "--replicas", "first")
    )
    assert "warning" in done.stderr
    none(compare_mm(resharded, tmp_path / "other"))


def test_the_first_replica_is_taken(
    tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path
) -> None:
    """Rank 0's change arrives, rank 1's old value does not."""
    mm = copied(tied_mm22, tmp_path / "mm")
    _change(mm, "mp_rank_00_000", NORM, (3,), 96.0)
    mm_to_hf(mm, tied_hf, out, "--replicas", "first")
    from safetensors import safe_open

    name = "model.layers.0.input_layernorm.weight"
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - it is no dict
                assert file.get_tensor(name)[3].item() == 96.0
                return
    pytest.fail(f"{name} was not written")


def test_copies_of_a_smaller_tp_size(tied_hf: Path, out: Path, tmp_path: Path) -> None:
    """The vision encoder at tp 1 stands on both text ranks; a change on one of them shows."""
    mm = tmp_path / "mm"
    hf_to_mm(tied_hf, mm, *layout("[4]", "[2]", 2, "vit_tp_size=1"))
    mm_to_hf(mm, tied_hf, tmp_path / "back")
    same_hf(tied_hf, tmp_path / "back")
    name = "image_encoder.encoder.blocks.layers.1.mlp.linear_fc1.weight"
    _change(mm, "mp_rank_01", name, (200, 11), 96.0)
    done = mm_to_hf(mm, tied_hf, out, check=None)
    refused(done, 3, name, "mp_rank_00", "mp_rank_01", "200", "11", out=out)


def test_equal_nans_are_equal(tied_hf: Path, tied_mm22: Path, out: Path, tmp_path: Path) -> None:
    """A model that diverged still converts, NaN for NaN; a NaN on one rank only is a difference."""
    mm = copied(tied_mm22, tmp_path / "mm")
    _change(mm, "mp_rank_00_000", NORM, (3,), float("nan"))
    refused(mm_to_hf(mm, tied_hf, out, check=None), 3, NORM, "nan", out=out)
    _change(mm, "mp_rank_01_000", NORM, (3,), float("nan"))
    mm_to_hf(mm, tied_hf, out)
    assert out.is_dir()


# --------------------------------------------------------------------- flags that assert
ASSERTIONS = {
    "text list": (("[1,3]", "[2,0]", 2), ("[1,3]", "[2,2]")),
    "vision list": (("[2,2]", "[1,1]", 2), ("[1,1]", "[2,0]")),
    "number of stages": (("[4]", "[2]", 2), ("says [2],", "holds [2,0]")),
    "virtual stages": (("[[1,1],[1,1]]", "[[2,0],[0,0]]", 2), ("[[2,0],[0,0]]", "holds [2,0]")),
    "tp size": (("[2,2]", "[2,0]", 1), ("tp_size", "1", "2")),
    "vision tp size": (("[2,2]", "[2,0]", 2, "vit_tp_size=1"), ("vit_tp_size", "1", "2")),
    "ep size": (("[2,2]", "[2,0]", 2, "ep_size=2"), ("ep_size", "2")),
}


@pytest.mark.parametrize(("given", "words"), ASSERTIONS.values(), ids=ASSERTIONS.keys())
def test_wrong_flags(
    given: tuple[Any, ...], words: tuple[str, ...], tied_hf: Path, tied_mm22: Path, out: Path
) -> None:
    """What the flag says and what the checkpoint holds are both printed."""
    flags = layout(*given)
    refused(mm_to_hf(tied_mm22, tied_hf, out, *flags, check=None), 3, *words, out=out)
    if words[0] not in ("[1,3]", "ep_size"):
        return
    flags = [word.replace("cfg.parallel", "cfg.source_parallel") for word in flags]
    refused(resplit(tied_mm22, out, *flags, check=None), 3, *words, out=out)


@pytest.mark.parametrize(
    "given", [("[2,2]", "[2,0]", 2), ("[[2,2]]", "[[2,0]]", 2, "vit_tp_size=2", "ep_size=1")]
)
def test_right_flags(given: tuple[Any, ...], tied_hf: Path, tied_mm22: Path, out: Path) -> None:
    mm_to_hf(tied_mm22, tied_hf, out, *layout(*given))
    same_hf(tied_hf, out)


def test_sources_are_left_alone(tied_hf: Path, tied_mm22: Path, tmp_path: Path) -> None:
    mm = as_training(tied_mm22, tmp_path / "mm", one_buffer)
    hf = copied(tied_hf, tmp_path / "hf")
    before = snapshot(mm), snapshot(hf)
    mm_to_hf(mm, hf, tmp_path / "back")
    resplit(mm, tmp_path / "other")
    assert (snapshot(mm), snapshot(hf)) == before


def test_what_training_saved_can_be_read_after_resplit(
    alien: type, tied_mm22: Path, tmp_path: Path
) -> None:
    """The output holds weights only, readable by torch.load(weights_only=True)."""
    mm = as_training(tied_mm22, tmp_path / "mm", parameters, alien=alien)
    resplit(mm, tmp_path / "other", *target("[2,2]", "[2,0]", 2))
    found, odd = read_mm(tmp_path / "other")
    assert odd == []
    assert {frozenset(file.top) for file in found.values()} == {frozenset({"checkpoint_version"})}
    none(compare_mm(tied_mm22, tmp_path / "other"))
