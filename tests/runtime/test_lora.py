"""Adapters that the runtime trains: in every layout the same, and what PEFT makes of them."""

from __future__ import annotations

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

import talking
import tinyfamilies
from cli import run_cli
from commands import rank_files, refused
from lora import randomised
from mmconvert.errors import RequestError
from mmconvert.runtime import reference
from mmconvert.runtime.beginning import Load, beginning
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.dataset import Feed, read_samples
from mmconvert.runtime.families import architecture
from mmconvert.runtime.lora import LoraPlan
from nights import night

pytestmark = pytest.mark.slow
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
CONVERTER = "Qwen2VLConverter"
R, ALPHA, STEPS = 4, 8, 4
LAYOUTS = {"tp1": ("[4]", "[3]", 1), "tp2 pp2": ("[1,3]", "[3,0]", 2)}
Curve = list[tuple[int, float, float, float]]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.make("qwen2_vl", tmp_path_factory.mktemp("lora") / "hf")


@pytest.fixture(scope="module")
def data(hf: Path) -> Path:
    return talking.write_data(hf.parent)


def base(hf: Path, layout: str, kind: str = "qwen2_vl") -> Path:
    out = hf.parent / f"mm {layout}"
    llm, vit, tp = LAYOUTS[layout]
    return out if out.exists() else tinyfamilies.convert(kind, hf, out, llm, vit, tp)


def lora(**other: Any) -> LoraPlan:
    return LoraPlan(**{"rank": R, "alpha": ALPHA, "targets": TARGETS, "seed": 5, **other})


def train(mm: Path, hf: Path, data: Path, save: Path, steps: int = STEPS, **other: Any) -> Curve:
    resume = other.pop("resume", False)
    other.setdefault("lora", lora())
    return talking.learn(mm, hf, [data], talking.plan(save, steps, **other), resume=resume)


def peft_folder(hf: Path, save: Path, out: Path) -> Path:
    words = ("--cfg.mm_dir", save, "--cfg.save_hf_dir", out, "--cfg.hf_config.hf_dir", hf)
    run_cli(CONVERTER, "lora_mm_to_hf", *words, check=0)
    return out


def products(folder: Path) -> dict[str, torch.Tensor]:
    """B @ A of every adapted layer."""
    held = load_file(folder / "adapter_model.safetensors")
    return {
        name: held[name.replace("lora_A", "lora_B")].double() @ held[name].double()
        for name in held
        if ".lora_A." in name
    }


@pytest.fixture(scope="module")
def trained(hf: Path, data: Path) -> dict[str, tuple[Path, Curve]]:
    found = {}
    for layout in LAYOUTS:
        save = hf.parent / f"save {layout}"
        found[layout] = save, train(base(hf, layout), hf, data, save)
    return found


def test_all_layouts_learn_the_same(
    trained: dict[str, tuple[Path, Curve]], hf: Path, tmp_path: Path
) -> None:
    (one, first), (two, second) = trained.values()
    for ours, theirs in zip(first, second, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    assert first[-1][1] < first[0][1]
    a, b = (peft_folder(hf, save, tmp_path / save.name) for save in (one, two))
    left, right = products(a), products(b)
    assert left.keys() == right.keys()
    for name, product in left.items():
        assert torch.allclose(product, right[name], atol=1e-5 * float(product.abs().max()) + 1e-9)


def test_a_save_holds_adapters_alone(trained: dict[str, tuple[Path, Curve]]) -> None:
    for save, _ in trained.values():
        for path in rank_files(save).values():
            with torch.serialization.safe_globals([Namespace]):
                content = torch.load(path, weights_only=True)
            assert all(".lora_" in name and ".default.weight" in name for name in content["model"])
            args = content["args"]
            assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (R, ALPHA, 0.0)
            assert args.lora_target_modules == list(TARGETS)
            adapted = {name.rpartition(".lora_")[0] for name in content["model"]}
            assert set(args.lora_trainable_target_modules) == adapted


def test_alpha_is_that_of_training(
    hf: Path, trained: dict[str, tuple[Path, Curve]], tmp_path: Path
) -> None:
    """The args of a save tell it; args of another rank are an error that says both."""
    save = tmp_path / "save"
    shutil.copytree(trained["tp2 pp2"][0], save)
    config = json.loads((peft_folder(hf, save, tmp_path / "a") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (R, ALPHA)
    for path in rank_files(save).values():
        content = torch.load(path, weights_only=False)
        content["args"].lora_r = R + 3
        torch.save(content, path)
    out = tmp_path / "b"
    words = ("--cfg.mm_dir", save, "--cfg.save_hf_dir", out, "--cfg.hf_config.hf_dir", hf)
    done = run_cli(CONVERTER, "lora_mm_to_hf", *words, check=3)
    refused(done, 3, "args", f"the rank {R}", f"r {R + 3}", out=out)


@pytest.mark.parametrize("layout", ["tp1", night("tp2 pp2")])
def test_the_losses_are_those_of_a_loop_with_peft(
    layout: str, hf: Path, data: Path, tmp_path: Path
) -> None:
    """From the same first matrices, with PEFT's layers and torch's AdamW; q, k, v are apart, as one
    A for the three of them learns otherwise than three.
    """
    flags = ("common_model_config.enable_canonical_hf_struct=True",)
    mm = tinyfamilies.convert_flags("qwen2_vl", hf, tmp_path / "mm", *LAYOUTS[layout], flags)
    apart = lora(targets=(*TARGETS, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    curve = train(mm, hf, data, tmp_path / "save", lora=apart)
    first = tmp_path / "first"
    train(mm, hf, data, first, steps=1, rate=0.0, lora=apart)  # nothing moves
    adapter = peft_folder(hf, first, tmp_path / "adapter")
    arch = architecture(hf)
    model = arch.model_class().from_pretrained(hf, config=arch.config, dtype=torch.float32).eval()
    peft: Any = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    feed = Feed(Speaker(arch, hf), read_samples([data], 0), 1, 2)
    learning = [p for p in peft.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == sum(
        t.numel() for t in load_file(adapter / "adapter_model.safetensors").values()
    )
    adam = torch.optim.AdamW(learning, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for step, (_, loss, rate, norm) in enumerate(curve):
        batches = feed.step(step)
        means = [_mean(reference.forward(arch, model, batch), batch.labels) for batch in batches]
        total = torch.stack(means).mean()
        adam.zero_grad()
        total.backward()
        found = float(torch.nn.utils.clip_grad_norm_(learning, 1.0))
        assert (float(total.detach()), found) == pytest.approx((loss, norm), rel=1e-4)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()


def _mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    learnt = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][learnt].float(), labels[:, 1:][learnt])


@pytest.mark.parametrize("layout", ["tp1", night("tp2 pp2")])
def test_peft_says_the_same(
    layout: str, hf: Path, trained: dict[str, tuple[Path, Curve]], tmp_path: Path
) -> None:
    """No key is missing, and its logits are those that `validate` compares with.

    Args:
        layout: in which the runtime takes PEFT's folder.
    """
    save, _ = trained["tp2 pp2"]
    adapter = peft_folder(hf, save, tmp_path / "adapter")
    for given, place in ((save, "tp2 pp2"), (adapter, layout)):
        words = ("--mm_dir", base(hf, place), "--hf_dir", hf, "--lora_dir", given)
        assert "equal" in run_cli("validate", *words, check=0).stdout
    arch = architecture(hf)
    plain = arch.model_class().from_pretrained(hf, config=arch.config, dtype=torch.float32).eval()
    feed = Feed(Speaker(arch, hf), read_samples([hf.parent / "data.json"], 0), 1, 1)
    (batch,) = feed.step(0)
    with torch.no_grad():
        before = reference.forward(arch, plain, batch)
        PeftModel.from_pretrained(plain, adapter)  # a missing key is a warning, thus an error
        after = reference.forward(arch, plain, batch)
        judge, _ = reference.load_reference(arch, hf, torch.float32, torch.device("cpu"), adapter)
        told = reference.forward(arch, judge, batch)
    assert float((after - before).abs().max()) > 1e-3
    assert float((after - told).abs().max()) < 1e-5 * max(1.0, float(after.abs().max()))


def test_an_adapter_that_is_not_used_is_noticed(
    hf: Path, trained: dict[str, tuple[Path, Curve]], tmp_path: Path
) -> None:
    """The merged model is what runs with the adapter; the base model alone is not."""
    save, _ = trained["tp1"]
    adapter = peft_folder(hf, save, tmp_path / "adapter")
    merged = tmp_path / "merged"
    words = ("--cfg.base_dir", hf, "--cfg.lora_dir", adapter, "--cfg.save_dir", merged)
    run_cli(CONVERTER, "lora_merge", *words, check=0)
    mm = base(hf, "tp1")
    run_cli("validate", "--mm_dir", mm, "--hf_dir", merged, "--quiet", check=1)
    asked = ("generate", "--hf_dir", hf, "--prompt", "Which?", "--max_new_tokens", "8")
    alone = run_cli(*asked, "--mm_dir", mm, "--lora_dir", save, check=0).stdout
    whole = tinyfamilies.convert("qwen2_vl", merged, tmp_path / "mm", *LAYOUTS["tp1"])
    assert run_cli(*asked, "--mm_dir", whole, check=0).stdout == alone


def test_a_restart_goes_on_along_the_same_curve(
    hf: Path, data: Path, trained: dict[str, tuple[Path, Curve]], tmp_path: Path
) -> None:
    mm, save = base(hf, "tp1"), tmp_path / "save"
    train(mm, hf, data, save, steps=STEPS, save_every=2)
    expected = rank_files(save / "iter_0000004")["mp_rank_00"]
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    kept = torch.load(expected, weights_only=False)["model"]
    rest = train(mm, hf, data, save, steps=STEPS, save_every=2, resume=True)
    assert [line[0] for line in rest] == [3, 4]
    assert rest == trained["tp1"][1][2:]
    again = torch.load(expected, weights_only=False)["model"]
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_wrong_requests_are_named(
    hf: Path, data: Path, trained: dict[str, tuple[Path, Curve]], tmp_path: Path
) -> None:
    mm = base(hf, "tp1")
    with pytest.raises(RequestError, match="fits no linear layer"):
        train(mm, hf, data, tmp_path / "a", lora=lora(targets=("q_proj",)))
    other = talking.plan(tmp_path / "b", 9, lora=lora(rank=8))
    with pytest.raises(RequestError, match="lora_r is 8"):
        beginning(mm, hf, other, resume=False, load=Load(trained["tp1"][0]))
    words = ["finetune", "--mm_dir", mm, "--hf_dir", hf, "--data", data, "--save", tmp_path / "c"]
    words += ["--lora-target-modules", "linear_qkv", "linear_proj"]
    assert "--lora_dropout" in run_cli(*words, "--lora-dropout", "0.1", check=2).stderr
    assert "--lora_r is 0" in run_cli(*words, "--lora-r", "0", check=2).stderr
    asked = ("validate", "--mm_dir", mm, "--hf_dir", hf, "--lora_dir", trained["tp2 pp2"][0])
    assert "lora_resplit" in run_cli(*asked, check=3).stderr


def test_frozen_parts_have_no_adapters(hf: Path, data: Path, tmp_path: Path) -> None:
    plan = lora(frozen=("image_encoder",))
    train(base(hf, "tp1"), hf, data, tmp_path / "save", steps=1, lora=plan)
    (path,) = rank_files(tmp_path / "save").values()
    names = torch.load(path, weights_only=False)["model"]
    assert names
    assert all(name.startswith("text_decoder.") for name in names)


@pytest.mark.parametrize(("tp", "ep"), [night(1, 2), (2, 2)])
def test_experts_have_adapters_of_their_own(tp: int, ep: int, tmp_path: Path) -> None:
    """Expert- and tensor-parallel ranks learn what one process learns."""
    hf = talking.make("qwen3_vl_moe", tmp_path / "hf")
    data = talking.write_data(tmp_path)
    curves: list[Curve] = []
    for name, sizes in {"one": (1, 1), "divided": (tp, ep)}.items():
        kind, place = "qwen3_vl_moe", tmp_path / name
        mm = tinyfamilies.convert(kind, hf, place, "[4]", "[3]", sizes[0], f"ep_size={sizes[1]}")
        what = lora(targets=("linear_fc1", "linear_fc2"))
        curves.append(train(mm, hf, data, tmp_path / f"save {name}", steps=2, lora=what))
    for ours, theirs in zip(*curves, strict=True):
        assert math.isclose(ours[1], theirs[1], rel_tol=1e-4)
        assert math.isclose(ours[3], theirs[3], rel_tol=1e-3)


@pytest.mark.parametrize("hub", [night(False), True])
def test_adapters_of_stacked_experts(hub: bool, tmp_path: Path) -> None:
    """PEFT's ``target_parameters``, whichever way round the base has its stacks."""
    hf = talking.make("qwen3_vl_moe", tmp_path / "hf")
    arch = architecture(hf)
    plain = arch.model_class().from_pretrained(hf, config=arch.config, dtype=torch.float32).eval()
    feed = Feed(Speaker(arch, hf), read_samples([talking.write_data(tmp_path)], 0), 1, 1)
    (batch,) = feed.step(0)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    asked = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["o_proj"], target_parameters=stacks)
    with torch.no_grad():
        before = reference.forward(arch, plain, batch)
        made = randomised(get_peft_model(plain, asked))
        after = reference.forward(arch, plain, batch)
    made.save_pretrained(tmp_path / "adapter")
    if hub:  # inputs first, as the hub has them
        path = hf / "model.safetensors"
        stored = load_file(path)
        for name in [
            n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))
        ]:
            stored[name] = stored[name].transpose(1, 2).contiguous()
        save_file(stored, path, metadata={"format": "pt"})
    mm = tinyfamilies.convert("qwen3_vl_moe", hf, tmp_path / "mm", "[4]", "[3]", 1, "ep_size=2")
    words = ("--mm_dir", mm, "--hf_dir", hf, "--lora_dir", tmp_path / "adapter")
    assert "equal" in run_cli("validate", *words, check=0).stdout
    judge, _ = reference.load_reference(
        arch, hf, torch.float32, torch.device("cpu"), tmp_path / "adapter"
    )
    with torch.no_grad():
        told = reference.forward(arch, judge, batch)
    assert float((after - before).abs().max()) > 1e-2
    assert float((after - told).abs().max()) < 1e-5 * max(1.0, float(after.abs().max()))
