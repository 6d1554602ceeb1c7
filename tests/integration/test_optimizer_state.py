"""resplit --optimizer: the state of every layout is that of the others, or is refused."""

from __future__ import annotations

import json
import os
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stopping
from cli import run_cli
from commands import (
    QWEN2VL,
    RANK_FILE,
    copied,
    hf_to_mm,
    layout,
    mm_to_hf,
    rank_files,
    refused,
    resplit,
    target,
)
from nights import examples
from optimizerstate import ITERATION, Kind, Parts, assemble, make_parts

LAYOUTS: dict[str, tuple[Any, ...]] = {
    "one rank": ("[4]", "[2]", 1),
    "tp 2": ("[4]", "[2]", 2),
    "tp 2, vit_tp 1": ("[4]", "[2]", 2, "vit_tp_size=1"),
    "pp 2": ("[1,3]", "[2,0]", 1),
    "tp 2 pp 2": ("[0,4]", "[1,1]", 2),
    "vpp 2": ("[[1,1],[1,1]]", "[[2,0],[0,0]]", 1),
    "tp 2 vpp 2": ("[[0,1],[1,2]]", "[[1,1],[0,0]]", 2),
}
States = Callable[[str, Kind], Path]


@pytest.fixture(scope="module")
def states(untied_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> States:
    """Gives the checkpoint of training in a layout, with a kind of optimizer."""
    folder = tmp_path_factory.mktemp("states")
    parts: Parts = make_parts(untied_hf, folder)
    made: dict[tuple[str, Kind], Path] = {}

    def state(name: str, kind: Kind) -> Path:
        if (name, kind) not in made:
            to = folder / f"{len(made)}"
            flags = layout(*LAYOUTS[name])
            made[name, kind] = assemble(lambda hf, mm: hf_to_mm(hf, mm, *flags), parts, to, kind)
        return made[name, kind]

    return state


def load(path: Path) -> dict[Any, Any]:
    """What a file of an output holds; nothing but plain values and tensors."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def same(a: object, b: object, where: str = "") -> None:
    """Two trees are the same to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        assert list(map(str, a)) == list(map(str, b)) or set(a) == set(b), where
        if "model" in where.rpartition("[")[2]:
            assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}[{key}]")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        assert len(a) == len(b), where
        for i, (one, two) in enumerate(zip(a, b, strict=True)):
            same(one, two, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def same_state(found: Path, expected: Path) -> None:
    """Two checkpoints have the same files with the same content, but for the arguments."""
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.pt"))
    assert sorted(path.relative_to(found) for path in found.rglob("*.pt")) == files
    for file in files:
        a = load(found / file)
        b = torch.load(expected / file, weights_only=False)
        for content in (a, b):
            content.pop("args", None)
        same(a, b, str(file))


@pytest.mark.slow
@settings(examples(3, nightly=8), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(["plain", "distributed"]),
)
def test_any_layout_to_any_other(
    states: States, tmp_path_factory: pytest.TempPathFactory, first: str, second: str, kind: Kind
) -> None:
    out = tmp_path_factory.mktemp("out")
    resplit(states(first, kind), out / "mm", *target(*LAYOUTS[second]), "--optimizer")
    same_state(out / "mm", states(second, kind))


def test_what_goes_with_it(states: States, out: Path) -> None:
    source = states("one rank", "plain")
    done = resplit(source, out, *target(*LAYOUTS["tp 2 pp 2"]), "--optimizer", "--digests")
    assert "mixed precision, iteration 7" in done.stderr
    assert (out / "latest_checkpointed_iteration.txt").read_text() == str(ITERATION)
    content = load(rank_files(out)["mp_rank_01_001"])
    assert content["opt_param_scheduler"] == {"num_steps": 56, "lr_decay_style": "cosine"}
    assert vars(content["args"]) == {"tensor_model_parallel_size": 2, "lr": 1e-5}
    assert "mm" in done.stderr  # an argument that is no plain value
    noted = json.loads((out / "mmconvert.json").read_text())
    assert noted["optimizer"] == {"kind": "plain", "iteration": ITERATION}
    assert any(name.startswith("optimizer.exp_avg.") for name in noted["digests"])
    looked = run_cli("inspect", out).stdout
    assert "optimizer" in looked


def test_without_the_flag_the_note_names_it(states: States, tmp_path: Path) -> None:
    for kind in ("plain", "distributed"):
        done = resplit(states("one rank", kind), tmp_path / kind, *target("[4]", "[2]", 2))
        assert "resplit --optimizer takes it along" in done.stderr
        size = int(done.stderr.partition("optimizer (")[2].split()[0])
        weights = sum(t.numel() for t in _weights(tmp_path / kind))
        assert size > 8 * weights / 2
        assert (tmp_path / kind / "latest_checkpointed_iteration.txt").read_text() == "release"


def _weights(mm: Path) -> list[torch.Tensor]:
    return [t for path in rank_files(mm).values() for t in load(path)["model"].values()]


def test_a_dry_run_writes_nothing(states: States, out: Path) -> None:
    done = resplit(
        states("pp 2", "distributed"), out, *target("[4]", "[2]"), "--optimizer", "--dry-run",
        "--json",
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert not out.exists()
    assert {Path(f["path"]).name for f in said["files"]} == {
        "model_optim_rng.pt",
        "distrib_optim.pt",
    }


def test_a_killed_run_goes_on(states: States, tmp_path: Path) -> None:
    source, out = states("one rank", "distributed"), tmp_path / "mm"
    words = [QWEN2VL, "resplit", "--cfg.source_dir", source, "--cfg.target_dir", out,
             *target(*LAYOUTS["tp 2 pp 2"]), "--optimizer"]  # fmt: skip
    stopping.stopped(*words, number=signal.SIGKILL, count=2)
    assert not out.exists()
    done = run_cli(*words)
    assert "an interrupted run of the same request" in done.stderr
    same_state(out, states("tp 2 pp 2", "distributed"))


# ------------------------------------------------------------------------------- refusals
FC1 = "text_decoder.decoder.layers.1.mlp.linear_fc1.weight"


def _swap(content: dict) -> None:
    """Two masters of one shape change places, as their moments do not."""
    for group in content["optimizer"]["fp32_from_fp16_params"]:
        shapes = [tuple(t.shape) for t in group]
        first = next(i for i, shape in enumerate(shapes) if shape in shapes[i + 1 :])
        other = shapes.index(shapes[first], first + 1)
        group[first], group[other] = group[other], group[first]


def _nudge(content: dict) -> None:
    master = content["optimizer"]["fp32_from_fp16_params"][0][0]
    master.view(-1)[5] *= 1.01


def _edit_weight(content: dict) -> None:
    content["model"][FC1][3, 4] += 0.5


def _shorter(content: dict) -> None:
    content["optimizer"]["fp32_from_fp16_params"][0].pop()


def _other_optimizer(content: dict) -> None:
    for kept in content["optimizer"]["optimizer"]["state"].values():
        kept["momentum_buffer"] = kept.pop("exp_avg")


def _bf16_moments(content: dict) -> None:
    state = content["optimizer"]["optimizer"]["state"]
    state[0]["exp_avg"] = state[0]["exp_avg"].bfloat16()


def _precision_aware(content: dict) -> None:
    state = content["optimizer"]["optimizer"]["state"]
    state[0]["master_param"] = state[0]["exp_avg"]


def _fp16_scaler(content: dict) -> None:
    content["optimizer"]["grad_scaler"] = {"scale": torch.ones(1)}


def _fp32(content: dict) -> None:
    content["optimizer"] = content["optimizer"]["optimizer"]


def _other_iteration(content: dict) -> None:
    content["iteration"] = 8


def _halves(content: dict) -> None:
    content["args"].reuse_fp32_param = True


def _two(content: dict) -> None:
    content["optimizer"] = [content["optimizer"], content["optimizer"]]


REFUSED: dict[str, tuple[Callable[[dict], None], int, tuple[str, ...]]] = {
    "masters swapped": (_swap, 3, ("the optimizer state is not of these weights",)),
    "a master one step off": (_nudge, 3, ("not of these weights", "master")),
    "a weight edited": (_edit_weight, 3, ("not of these weights", FC1)),
    "a master missing": (_shorter, 3, ("cannot be told", "has no master")),
    "an optimizer without moments": (_other_optimizer, 2, ("momentum_buffer", "SGD")),
    "moments in bf16": (_bf16_moments, 2, ("exp_avg in BF16",)),
    "precision-aware": (_precision_aware, 2, ("--use-precision-aware-optimizer",)),
    "fp16's scaler": (_fp16_scaler, 2, ("grad_scaler",)),
    "fp32 training": (_fp32, 2, ("fp32 training",)),
    "another iteration": (_other_iteration, 3, ("iteration 8",)),
    "an optimizer for each chunk": (_two, 2, ("--overlap-param-gather-with-optimizer-step",)),
    "masters in halves": (_halves, 2, ("--reuse-fp32-param",)),
    "no optimizer": (lambda c: c.pop("optimizer"), 3, ("no optimizer state",)),
}


@pytest.mark.parametrize(("edit", "code", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(
    edit: Callable[[dict], None], code: int, words: tuple[str, ...], states: States, out: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    mm = copied(states("one rank", "plain"), tmp_path / "mm")
    path = rank_files(mm)["mp_rank_00"]
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)
    done = resplit(mm, out, *target("[4]", "[2]", 2), "--optimizer", check=None)
    refused(done, code, *words, out=out)


def _legacy(tree: dict) -> None:
    del tree["buckets_coalesced"]


def _too_long(tree: dict) -> None:
    ((_, fields),) = tree[0].items()
    for name in ("param", "exp_avg", "exp_avg_sq"):
        fields[name] = torch.cat([fields[name], torch.zeros(64)])
    fields["numel_unpadded"] += 64


DAMAGED: dict[str, tuple[Callable[[dict], None], int, tuple[str, ...]]] = {
    "before February 2024": (_legacy, 2, ("February 2024",)),
    "another length": (_too_long, 3, ("cannot be told", "elements")),
}


@pytest.mark.parametrize(("edit", "code", "words"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_buffers(
    edit: Callable[[dict], None], code: int, words: tuple[str, ...], states: States, out: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    mm = copied(states("tp 2", "distributed"), tmp_path / "mm")
    path = rank_files(mm)["mp_rank_01"].with_name("distrib_optim.pt")
    tree = torch.load(path, weights_only=False)
    edit(tree)
    torch.save(tree, path)
    refused(
        resplit(mm, out, *target("[4]", "[2]"), "--optimizer", check=None), code, *words, out=out
    )


def test_a_missing_file_of_buffers(states: States, out: Path, tmp_path: Path) -> None:
    mm = copied(states("tp 2", "distributed"), tmp_path / "mm")
    path = rank_files(mm)["mp_rank_01"].with_name("distrib_optim.pt")
    path.unlink()
    done = resplit(mm, out, *target("[4]", "[2]"), "--optimizer", check=None)
    refused(done, 3, str(path), "is missing", out=out)


def test_half_a_file_of_buffers(states: States, out: Path, tmp_path: Path) -> None:
    mm = copied(states("tp 2", "distributed"), tmp_path / "mm")
    path = rank_files(mm)["mp_rank_01"].with_name("distrib_optim.pt")
    os.truncate(path, path.stat().st_size // 2)
    done = resplit(mm, out, *target("[4]", "[2]"), "--optimizer", check=None)
    refused(done, 3, str(path), out=out)


def test_moments_that_differ_between_ranks(states: States, out: Path, tmp_path: Path) -> None:
    """A norm stands on both ranks; --replicas first takes rank 0's moments, with a warning."""
    mm = copied(states("tp 2", "plain"), tmp_path / "mm")
    path = rank_files(mm)["mp_rank_01"]
    content = torch.load(path, weights_only=False)
    inner = content["optimizer"]["optimizer"]
    group = next(g for g in inner["param_groups"] if g["wd_mult"] == 0)
    norm = next(
        n for n in group["params"] if tuple(inner["state"][n]["exp_avg"].shape) == (144,)
        or inner["state"][n]["exp_avg"].dim() == 1
    )  # fmt: skip
    inner["state"][norm]["exp_avg"] += 1
    torch.save(content, path)
    flags = target("[4]", "[2]")
    done = resplit(mm, out, *flags, "--optimizer", check=None)
    refused(done, 3, "copies of one tensor differ: optimizer.exp_avg", "--replicas", out=out)
    done = resplit(mm, out, *flags, "--optimizer", "--replicas", "first")
    assert "warning" in done.stderr
    same_state(out, states("one rank", "plain"))


def test_flags_that_change_the_weights(states: States, out: Path, untied_hf: Path) -> None:
    source = states("one rank", "plain")
    done = resplit(source, out, "--optimizer", "--dtype", "fp32", check=None)
    refused(done, 2, "--dtype fp32", out=out)
    done = mm_to_hf(source, untied_hf, out, "--optimizer", check=None)
    refused(done, 2, "--optimizer", out=out)


def test_the_weights_are_those_of_a_resplit_alone(states: States, tmp_path: Path) -> None:
    source, flags = states("pp 2", "plain"), target(*LAYOUTS["tp 2 vpp 2"])
    resplit(source, tmp_path / "alone", *flags)
    resplit(source, tmp_path / "both", *flags, "--optimizer")
    for rank, path in rank_files(tmp_path / "alone").items():
        alone, both = load(path)["model0"], load(rank_files(tmp_path / "both")[rank])["model0"]
        assert alone.keys() == both.keys()
        same([alone[name] for name in alone], [both[name] for name in alone], rank)


# ---------------------------------------------------------------------------------- kinds
def test_another_kind_of_optimizer(states: States, tmp_path: Path) -> None:
    """What a plain optimizer saved as a distributed one would have saved it, and back."""
    cases: list[tuple[str, Kind, Kind]] = [
        ("pp 2", "plain", "distributed"),
        ("tp 2 vpp 2", "distributed", "plain"),
    ]
    for first, kind, other in cases:
        flags = (*target(*LAYOUTS["tp 2 pp 2"]), "--optimizer", "--optimizer-kind", other)
        done = resplit(states(first, kind), tmp_path / other, *flags)
        assert "optimizer state (" in done.stderr
        same_state(tmp_path / other, states("tp 2 pp 2", other))


def _step_beside(content: dict, odd: int = -1) -> None:
    """The step in a tensor of each parameter, as torch's AdamW has it; that of one may differ."""
    inner = content["optimizer"]["optimizer"]
    for group in inner["param_groups"]:
        del group["step"]
    for number, kept in inner["state"].items():
        kept["step"] = torch.tensor(float(ITERATION + (number == odd)))


def _edited(states: States, kind: Kind, tmp_path: Path, edit: Callable[[dict], None]) -> Path:
    mm = copied(states("one rank", kind), tmp_path / "mm")
    path = rank_files(mm)["mp_rank_00"]
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)
    return mm


def test_a_step_in_tensors_goes_into_the_groups(states: States, out: Path, tmp_path: Path) -> None:
    mm = _edited(states, "plain", tmp_path, _step_beside)
    flags = (*target("[4]", "[2]", 2), "--optimizer", "--optimizer-kind", "distributed")
    resplit(mm, out, *flags)
    same_state(out, states("tp 2", "distributed"))


def _of_torch(content: dict) -> None:
    for group in content["optimizer"]["optimizer"]["param_groups"]:
        group["foreach"] = None


def _no_step(content: dict) -> None:
    for group in content["optimizer"]["optimizer"]["param_groups"]:
        del group["step"]


def _no_gradient(content: dict) -> None:
    del content["optimizer"]["optimizer"]["state"][3]


OTHER_KIND: dict[str, tuple[Kind, Callable[[dict], None], int, tuple[str, ...]]] = {
    "steps apart": ("plain", lambda c: _step_beside(c, 3), 3, ("at step 7", " at 8;")),
    "torch's own": ("distributed", _of_torch, 2, ("torch's own AdamW",)),
    "no step": ("plain", _no_step, 2, ("do not tell the step",)),
    "no gradient": ("plain", _no_gradient, 2, ("has no exp_avg", "never had a gradient")),
    "fp32": ("plain", _fp32, 2, ("fp32 training",)),
}


@pytest.mark.parametrize(
    ("kind", "edit", "code", "words"), OTHER_KIND.values(), ids=OTHER_KIND.keys()
)
def test_refused_as_another_kind(
    kind: Kind, edit: Callable[[dict], None], code: int, words: tuple[str, ...], states: States,
    out: Path, tmp_path: Path,
) -> None:  # fmt: skip
    mm = _edited(states, kind, tmp_path, edit)
    other = "plain" if kind == "distributed" else "distributed"
    flags = (*target("[4]", "[2]"), "--optimizer", "--optimizer-kind", other)
    refused(resplit(mm, out, *flags, check=None), code, *words, out=out)


def test_a_kind_needs_the_state(states: States, out: Path) -> None:
    done = resplit(states("one rank", "plain"), out, "--optimizer-kind", "plain", check=None)
    refused(done, 2, "--optimizer too", out=out)


# ---------------------------------------------------------------------------------- tools
def _verified(a: Path, b: Path, *flags: str) -> dict[str, Any]:
    done = run_cli("verify", a, b, "--optimizer", "--json", *flags, check=None)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found.get("equal") else 1), done.stdout
    return found


def test_verify_compares_the_state(states: States, out: Path, tmp_path: Path) -> None:
    """In any two layouts, of either kind; without the flag a note says that it is not compared."""
    source = states("pp 2", "plain")
    weights = run_cli("verify", source, states("tp 2", "plain"))
    assert "optimizer state, which is not compared" in weights.stderr
    others: list[tuple[str, Kind]] = [("tp 2 vpp 2", "plain"), ("tp 2", "distributed")]
    for other in others:
        found = _verified(source, states(*other))
        assert found["equal"] and not found["training"]
        assert found["tensors"] > 3 * json.loads(run_cli(
            "verify", source, source, "--json").stdout)["tensors"]  # fmt: skip

    def edit(content: dict) -> None:
        content["optimizer"]["optimizer"]["state"][2]["exp_avg_sq"].view(-1)[1] += 1
        content["opt_param_scheduler"]["num_steps"] = 57
        content["optimizer"]["optimizer"]["param_groups"][0]["lr"] = 0.5

    found = _verified(source, _edited(states, "plain", tmp_path, edit))
    assert not found["equal"]
    (odd,) = found["differences"]
    assert odd["tensor"].startswith("optimizer.exp_avg_sq.")
    assert {line.partition(":")[0].rpartition(".")[2] for line in found["training"]} == {
        "num_steps", "lr",
    }  # fmt: skip


def test_digests_do_not_stand_for_the_state(states: States, tmp_path: Path) -> None:
    source, made = states("one rank", "plain"), [tmp_path / "a", tmp_path / "b"]
    for out in made:
        resplit(source, out, *target("[4]", "[2]", 2), "--optimizer", "--digests")
    done = run_cli("verify", *made, "--optimizer", "--quick")
    assert "all tensors are compared" in done.stderr
    assert "every copy included" in done.stdout


def test_verify_says_where_there_is_no_state(states: States, untied_hf: Path, out: Path) -> None:
    source = states("one rank", "plain")
    refused(run_cli("verify", source, untied_hf, "--optimizer", check=None), 2, "Hugging Face")
    resplit(source, out)
    done = run_cli("verify", source, out, "--optimizer", check=None)
    refused(done, 3, str(out), "holds no optimizer state")


def test_diff_measures_the_state(states: States, tmp_path: Path) -> None:
    def edit(content: dict) -> None:
        content["optimizer"]["optimizer"]["state"][2]["exp_avg"] *= 2

    source, other = states("tp 2", "plain"), _edited(states, "plain", tmp_path, edit)
    found = json.loads(run_cli("diff", source, other, "--optimizer", "--json", check=1).stdout)
    assert found["changed"] == 1
    assert found["relative_l2"] == 0  # of the weights
    (odd,) = found["top"]
    assert odd["tensor"].startswith("optimizer.exp_avg.")
    assert odd["module"].endswith(", exp_avg")
    assert odd["relative_l2"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["plain", "distributed"])
def test_inspect_tells_what_state_there_is(states: States, kind: Kind) -> None:
    mm = states("tp 2", kind)
    found = json.loads(run_cli("inspect", mm, "--json").stdout)
    weights = found["tensors"]
    assert found["optimizer"] == {
        "kind": kind, "step": ITERATION, "iteration": ITERATION, "bytes": 6 * found["bytes"],
        "parameters": weights, "fault": "",
    }  # fmt: skip
    assert f"step {ITERATION}, iteration {ITERATION}" in run_cli("inspect", mm).stdout


def test_inspect_says_what_it_cannot_read(states: States, tmp_path: Path) -> None:
    mm = _edited(states, "plain", tmp_path, _shorter)
    found = json.loads(run_cli("inspect", mm, "--json").stdout)["optimizer"]
    assert found["kind"] is None and "has no master" in found["fault"]
    assert "warning: optimizer state that cannot be read" in run_cli("inspect", mm).stdout


def _examined(mm: Path, *flags: str) -> dict[str, str]:
    done = run_cli("doctor", mm, "--json", *flags, check=None)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["healthy"] else 3), found
    return {finding["id"]: finding["what"] for finding in found["findings"]}


@pytest.mark.parametrize("kind", ["plain", "distributed"])
def test_doctor_finds_nothing(states: States, kind: Kind) -> None:
    done = run_cli("doctor", states("tp 2 vpp 2", kind), "--values")
    assert "checked: optimizer state: " in done.stdout
    assert "healthy: 0 errors, 0 warnings" in done.stdout


def _lost_moment(content: dict) -> None:
    del content["optimizer"]["optimizer"]["state"][2]["exp_avg_sq"]


def _wrong_size(content: dict) -> None:
    state = content["optimizer"]["optimizer"]["state"]
    state[2]["exp_avg"] = torch.cat([state[2]["exp_avg"], state[2]["exp_avg"]])


def _not_finite(content: dict) -> None:
    content["optimizer"]["optimizer"]["state"][2]["exp_avg"].view(-1)[1] = torch.nan


ILL: dict[str, tuple[Callable[[dict], None], str, str]] = {
    "another pairing": (_swap, "optimizer-other-weights", "not of these weights"),
    "a moment missing": (_lost_moment, "optimizer-damaged", "has no exp_avg_sq"),
    "another size": (_wrong_size, "optimizer-damaged", "exp_avg of "),
    "a master missing": (_shorter, "optimizer-damaged", "has no master"),
    "another step": (_other_iteration, "optimizer-damaged", "iteration 8"),
    "another optimizer": (_precision_aware, "optimizer-unknown", "precision-aware"),
    "not a number": (_not_finite, "not-finite", "1 NaN"),
}


@pytest.mark.parametrize(("edit", "finding", "words"), ILL.values(), ids=ILL.keys())
def test_doctor_names_what_is_wrong(
    edit: Callable[[dict], None], finding: str, words: str, states: States, tmp_path: Path
) -> None:
    found = _examined(_edited(states, "plain", tmp_path, edit), "--values")
    assert list(found) == [finding]
    assert words in found[finding]


def test_doctor_knows_state_of_another_layout(states: States, tmp_path: Path) -> None:
    """The optimizer of one rank beside the weights of another layout's, as a copied file has it."""
    files: dict[Kind, str] = {"plain": RANK_FILE, "distributed": "distrib_optim.pt"}
    for kind, file in files.items():
        mm = copied(states("tp 2", kind), tmp_path / kind)
        path = rank_files(mm)["mp_rank_01"].with_name(file)
        other = rank_files(states("one rank", kind))["mp_rank_00"].with_name(file)
        content = torch.load(path, weights_only=False)
        theirs = torch.load(other, weights_only=False)
        torch.save(
            {**content, "optimizer": theirs["optimizer"]} if kind == "plain" else theirs, path
        )
        found = _examined(mm)
        assert list(found) == ["optimizer-damaged"], found


def test_doctor_mends_with_the_state(states: States, tmp_path: Path) -> None:
    """Moments that differ between ranks; the command that it prints keeps the optimizer."""
    mm = copied(states("tp 2", "plain"), tmp_path / "mm")
    path = rank_files(mm)["mp_rank_01"]
    content = torch.load(path, weights_only=False)
    inner = content["optimizer"]["optimizer"]
    group = next(g for g in inner["param_groups"] if g["wd_mult"] == 0)
    inner["state"][group["params"][0]]["exp_avg"] += 1
    torch.save(content, path)
    found = json.loads(run_cli("doctor", mm, "--json", check=3).stdout)["findings"]
    assert {f["id"] for f in found} == {"replicas-differ"}
    assert "--replicas first --optimizer" in found[0]["command"]


def test_doctor_warns_of_state_in_a_release(states: States, tmp_path: Path) -> None:
    mm = copied(states("one rank", "plain"), tmp_path / "mm")
    (mm / f"iter_{ITERATION:07d}").rename(mm / "release")
    (mm / "latest_checkpointed_iteration.txt").write_text("release")
    assert list(_examined(mm)) == ["optimizer-in-release"]
