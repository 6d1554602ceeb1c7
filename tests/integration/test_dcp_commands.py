"""The commands of MindSpeed-MM's converters for FSDP2: what each makes of a model, by its rule.

The rules stand here once more, in torch, and torch.distributed.checkpoint loads what was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cli import run_cli
from commands import refused
from mmconvert.cli.dcpflags import FORMS
from mmread import compare_hf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")
Tensors = dict[str, torch.Tensor]
EXPERTS, WIDTH, FFN = 3, 6, 4


def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=some_generator).to(dtype)


some_generator = torch.Generator().manual_seed(7)


def single(stem: str) -> Tensors:
    """Experts, one by one."""
    shapes = {"gate": (FFN, WIDTH), "up": (FFN, WIDTH), "down": (WIDTH, FFN)}
    return {
        f"{stem}.mlp.experts.{e}.{leaf}_proj.weight": some(*shape)
        for e in range(EXPERTS)
        for leaf, shape in shapes.items()
    }


def text(stem: str) -> Tensors:
    """A dense layer, and what stands around it."""
    return {
        f"{stem}.embed_tokens.weight": some(10, WIDTH),
        f"{stem}.layers.0.self_attn.q_proj.weight": some(WIDTH, WIDTH),
        f"{stem}.layers.0.mlp.down_proj.weight": some(WIDTH, 8),
        f"{stem}.norm.weight": some(WIDTH),
    }


def write(folder: Path, kind: str, tensors: Tensors, files: int = 1) -> Path:
    """A Hugging Face checkpoint, and a file beside it that its index does not list."""
    folder.mkdir()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = {"total_size": sum(t.nbytes for t in tensors.values())}
    whole = {"metadata": total, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    save_file({"stray": some(2)}, folder / "consolidated.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def same(hf: Path, back: Path) -> None:
    """All came back; what the index does not list did not."""
    (hf / "consolidated.safetensors").unlink()
    assert compare_hf(hf, back) == []


def loaded(folder: Path, out: Path) -> Tensors:
    """What torch loads of a folder, flat."""
    dcp_to_torch_save(folder, out)
    found = torch.load(out, weights_only=True)
    assert found.pop("checkpoint_version", 3.0) == 3.0
    return found["model"]


def merged(tensors: Tensors, *, flat: bool) -> Tensors:
    """Gate above up of each expert, transposed, all stacked; down likewise."""
    found = {n: t for n, t in tensors.items() if ".mlp.experts." not in n}
    for stem in {n.split(".mlp.experts.")[0] for n in tensors.keys() - found.keys()}:
        at = f"{stem}.mlp.experts"
        each = [[tensors[f"{at}.{e}.{x}_proj.weight"] for x in ("gate", "up", "down")]
                for e in range(EXPERTS)]  # fmt: skip
        up = torch.stack([torch.cat([gate, up]).t() for gate, up, _ in each])
        down = torch.stack([down.t() for _, _, down in each])
        found[f"{at}.gate_up_proj"] = up.flatten(0, 1) if flat else up
        found[f"{at}.down_proj"] = down.flatten(0, 1) if flat else down
    return found


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


class Case(NamedTuple):
    """A converter, a model, and what it makes of it."""

    converter: str
    kind: str
    tensors: Callable[[], Tensors]
    rule: Callable[[Tensors], Tensors]
    data_files: int = 2


def qwen3vl() -> Tensors:
    tensors = text("model.language_model") | {"model.visual.patch_embed.proj.weight": some(4, 3)}
    tensors["model.language_model.layers.1.mlp.experts.gate_up_proj"] = some(
        EXPERTS, WIDTH, 2 * FFN
    )
    tensors["model.language_model.layers.1.mlp.experts.down_proj"] = some(EXPERTS, FFN, WIDTH)
    return tensors


def flattened(tensors: Tensors) -> Tensors:
    return {n: t.flatten(0, 1) if t.dim() == 3 else t for n, t in tensors.items()}


def mistral3() -> Tensors:
    return text("language_model.model") | {
        "language_model.lm_head.weight": some(10, WIDTH),
        "vision_tower.patch_conv.weight": some(4, 3, 2, 2),
        "multi_modal_projector.linear_1.weight": some(WIDTH, 4),
    }


def renamed(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        new = name.replace("language_model.model.", "model.language_model.")
        new = new.replace("language_model.lm_head.", "lm_head.")
        if new.startswith(("vision_tower.", "multi_modal_projector.")):
            new = f"model.{new}"
        found[new] = tensor
    return found


def glm() -> Tensors:
    stem = "model.language_model"
    gate = {f"{stem}.layers.1.mlp.gate.e_score_correction_bias": some(3, dtype=torch.float32)}
    shared = {f"{stem}.layers.1.mlp.shared_experts.down_proj.weight": some(WIDTH, FFN)}
    return text(stem) | single(f"{stem}.layers.1") | gate | shared


def omni() -> Tensors:
    talker = {"talker.model.norm.weight": some(4), "code2wav.conv.weight": some(4, 2)}
    return text("thinker.model") | single("thinker.model.layers.1") | talker


CASES = {
    "qwen3vl": Case(
        *("Qwen3VLConverter", "qwen3_vl_moe", qwen3vl),
        lambda hf: prefixed(flattened(hf), "model."),
    ),
    "mistral3": Case(
        *("Mistral3Converter", "mistral3", mistral3), lambda hf: prefixed(renamed(hf), "model.")
    ),
    "glm4.5v": Case(
        *("ExpertMergeDcpConverter", "glm4v_moe", glm),
        lambda hf: prefixed(merged(hf, flat=True), "model."),
        data_files=1,
    ),
    "qwen3omni": Case(
        *("ExpertMergeDcpConverter", "qwen3_omni_moe", omni),
        lambda hf: prefixed(
            {n.removeprefix("thinker."): t for n, t in merged(hf, flat=False).items()}, "model."
        ),
        data_files=1,
    ),
    "generic": Case(*("GenericDCPConverter", "anything", qwen3vl), dict),
    "script": Case(*("checkpoint/common/hf_to_dcp.py", "anything", qwen3vl), dict, data_files=1),
}


def there_and_back(case: Case, hf: Path, out: Path, back: Path) -> list[list[Any]]:
    """The words of both commands."""
    to, read = ["--hf_dir", hf, "--dcp_dir", out], out / "release"
    again = ["--load_dir", read, "--save_dir", back, "--model_assets_dir", hf]
    if case.converter.startswith("ExpertMerge"):
        to = ["--hf_dir", hf, "--save_dir", out]
        again = ["--hf_dir", hf, "--dcp_dir", read, "--save_dir", back]
    if case.converter.endswith(".py"):
        return [[case.converter, *to], ["merge_dcp_to_hf.py", *again]]
    return [[case.converter, "hf_to_dcp", *to], [case.converter, "dcp_to_hf", *again]]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rule(case: Case, tmp_path: Path) -> None:
    """Every tensor is where the rule says, nothing else is; and comes back."""
    tensors = case.tensors()
    hf = write(tmp_path / "hf", case.kind, tensors, files=2)
    out, back = tmp_path / "dcp", tmp_path / "back"
    to, again = there_and_back(case, hf, out, back)
    run_cli(*to, check=0)
    assert len(list(out.glob("release/*.distcp"))) == case.data_files
    found, expected = loaded(out / "release", tmp_path / "torch.pt"), case.rule(tensors)
    assert found.keys() == expected.keys()
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []
    run_cli(*again, check=0)
    same(hf, back)


def test_a_lora_base_and_a_tied_head(tmp_path: Path) -> None:
    tensors = qwen3vl()
    hf = write(tmp_path / "hf", "qwen3_vl_moe", tensors)
    words = ("--hf_dir", hf, "--dcp_dir", tmp_path / "dcp")
    flags = ("--is_lora_base", "true", "--tie_weight", "true")
    run_cli("Qwen3VLConverter", "hf_to_dcp", *words, *flags, check=0)
    found = loaded(tmp_path / "dcp/release", tmp_path / "torch.pt")
    expected = prefixed(flattened(tensors), "base_model.model.model.")
    head = expected["base_model.model.model.model.language_model.embed_tokens.weight"]
    expected["base_model.model.model.lm_head.weight"] = head
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)
    folders = ("--load_dir", tmp_path / "dcp", "--model_assets_dir", hf)
    back = ("--save_dir", tmp_path / "back")
    refused(run_cli("Qwen3VLConverter", "dcp_to_hf", *folders, *back), 3, "not in the checkpoint")
    run_cli("Qwen3VLConverter", "dcp_to_hf", *folders, *back, "--is_lora_base", "true", check=0)
    same(hf, tmp_path / "back")


def test_a_tied_head_that_training_has_pulled_apart(tmp_path: Path) -> None:
    """Neither of the two is the model's alone: refused, and named."""
    hf = write(tmp_path / "hf", "qwen3_vl", text("model.language_model"))
    words = ("--hf_dir", hf, "--dcp_dir", tmp_path / "dcp", "--tie_weight", "true")
    run_cli("Qwen3VLConverter", "hf_to_dcp", *words, check=0)
    tensors = loaded(tmp_path / "dcp/release", tmp_path / "torch.pt")
    tensors["model.lm_head.weight"][3, 2] += 1
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": tensors}, checkpoint_id=tmp_path / "apart", no_dist=True)
    words = ("--load_dir", tmp_path / "apart", "--model_assets_dir", hf)
    done = run_cli("Qwen3VLConverter", "dcp_to_hf", *words, "--save_dir", tmp_path / "back")
    refused(done, 3, "embed_tokens")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("first", [[], ["-m"]])
def test_the_trainers_own_command(first: list[str], tmp_path: Path) -> None:
    """``python -m mindspeed_mm.fsdp.tasks.checkpoint.converter``, with mm-convert for python."""
    tensors = text("model.language_model") | single("mtp.layers.0")
    at = "model.language_model.layers.1.mlp.experts"
    tensors[f"{at}.gate_up_proj"] = some(EXPERTS, 2 * FFN, WIDTH)
    hf = write(tmp_path / "hf", "qwen3_5_moe", tensors)
    command = [*first, "mindspeed_mm.fsdp.tasks.checkpoint.converter"]
    words = ("--model_id", "qwen3_5_moe", "--num_workers", 2, "--dcp_dir", tmp_path / "dcp")
    run_cli(*command, "hf_to_dcp", *map(str, words), "--hf_dir", hf, check=0)
    found = loaded(tmp_path / "dcp/release", tmp_path / "torch.pt")
    expected = merged({n: t for n, t in tensors.items() if n.startswith("mtp.")}, flat=False)
    expected |= {n: t for n, t in tensors.items() if not n.startswith("mtp.")}
    expected[f"{at}.gate_up_proj"] = expected[f"{at}.gate_up_proj"].transpose(1, 2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)
    back = ("--hf_dir", tmp_path / "back", "--origin_hf_dir", hf, "--to_bf16", "true")
    run_cli(*command, "dcp_to_hf", *map(str, words), *back, check=0)
    same(hf, tmp_path / "back")


# ----------------------------------------------------------------------------------- adapters


def adapter(folder: Path, path: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """An adapter of one layer, as PEFT saves it."""
    folder.mkdir()
    at = f"base_model.model.{path}"
    found = {
        f"{at}.lora_A.weight": some(2, WIDTH, dtype=dtype),
        f"{at}.lora_B.weight": some(WIDTH, 2, dtype=dtype),
    }
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return found


class Lora(NamedTuple):
    """A converter, its base model, the adapted module as PEFT names it and in Hugging Face."""

    converter: str
    tensors: Callable[[], Tensors]
    module: str
    weight: str


QWEN_LAYER = "model.language_model.layers.0.self_attn.q_proj"
LORAS = {
    "qwen3vl": Lora("Qwen3VLConverter", qwen3vl, QWEN_LAYER, QWEN_LAYER),
    "mistral3": Lora(
        *("Mistral3Converter", mistral3, QWEN_LAYER),
        "language_model.model.layers.0.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize("case", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_an_adapter_to_dcp_and_merged(case: Lora, ranks: int, tmp_path: Path) -> None:
    hf = write(tmp_path / "hf", "any", case.tensors())
    given = adapter(tmp_path / "adapter", case.module)
    words = ("--hf_dir", tmp_path / "adapter", "--dcp_dir", tmp_path / "lora")
    run_cli(case.converter, "lora_hf_to_dcp", *words, "--ranks", str(ranks), check=0)
    found = loaded(tmp_path / "lora/release", tmp_path / "torch.pt")
    at = f"base_model.model.model.{case.module}"
    a, b = given.values()
    assert found.keys() == {f"{at}.lora_A.default.weight", f"{at}.lora_B.default.weight"}
    assert torch.equal(found[f"{at}.lora_A.default.weight"], a)
    assert torch.equal(found[f"{at}.lora_B.default.weight"], b)

    words = ("--base_hf_dir", hf, "--lora_dcp_dir", tmp_path / "lora/release")
    words += ("--lora_target_modules", "q_proj,v_proj", "--save_merged_hf_dir", tmp_path / "out")
    verb = "merge_mm_lora_dcp_weight_to_base_hf"
    run_cli(case.converter, verb, *words, "--scaling", "2.0", check=0)
    before = load_file(hf / "model-00001-of-00001.safetensors")
    after = load_file(tmp_path / "out/model-00001-of-00001.safetensors")
    weight = f"{case.weight}.weight"
    expected = (before[weight].float() + 2 * (b @ a)).to(torch.bfloat16)
    assert torch.equal(after.pop(weight), expected)
    assert all(torch.equal(after[name], before[name]) for name in after)

    said = run_cli(case.converter, verb, *words, "--overwrite", check=0)
    assert "--scaling is not given: 1" in said.stderr
    assert "r is 2 here" in said.stderr


def test_what_is_no_adapter_of_the_base(tmp_path: Path) -> None:
    hf = write(tmp_path / "hf", "any", qwen3vl())
    adapter(tmp_path / "adapter", QWEN_LAYER.replace("layers.0", "layers.7"))
    words = ("--hf_dir", tmp_path / "adapter", "--dcp_dir", tmp_path / "lora")
    run_cli("Qwen3VLConverter", "lora_hf_to_dcp", *words, check=0)
    words = ("--base_hf_dir", hf, "--save_merged_hf_dir", tmp_path / "out")
    merge = ("Qwen3VLConverter", "merge_mm_lora_dcp_weight_to_base_hf", *words)
    refused(run_cli(*merge, "--lora_dcp_dir", tmp_path / "lora"), 3, "layers.7")
    base = ("--hf_dir", hf, "--dcp_dir", tmp_path / "dcp")
    run_cli("Qwen3VLConverter", "hf_to_dcp", *base, check=0)
    refused(run_cli(*merge, "--lora_dcp_dir", tmp_path / "dcp"), 3, "no tensor is a matrix")
    only = ("--lora_dcp_dir", tmp_path / "lora", "--lora_target_modules", "v_proj")
    refused(run_cli(*merge, *only), 3, "layers.7")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [(name, verb) if len(forms) > 1 else (name,)
              for name, forms in FORMS.items() for verb in forms]
)  # fmt: skip
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    shown = run_cli(*words, "-h", check=0).stdout
    assert f"mm-convert {' '.join(words)} [-h]" in shown
    done = run_cli(*words, "--hf_dirr", "x", check=None)
    refused(done, 2, "--hf_dirr")


# -------------------------------------------------------------------- without any table
def test_a_model_that_no_family_knows_is_compared_by_names(tmp_path: Path, tied_hf: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    tensors = {f"model.layers.{n}.proj.weight": torch.randn(8, 4) for n in range(3)}
    tensors["lm_head.weight"] = torch.randn(6, 4)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    (hf / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    words = ("GenericDCPConverter", "hf_to_dcp", "--hf_dir", hf, "--quiet", "--dcp_dir")
    run_cli(*words, tmp_path / "dcp", "--ranks", "3")
    run_cli(*words, tmp_path / "named", "--dcp_prefix", "policy.")
    for pair in (("hf", "dcp"), ("named", "hf"), ("hf", "hf")):
        done = run_cli("verify", *(tmp_path / name for name in pair), check=0)
        assert "equal: 4 tensors" in done.stdout
    tensors["lm_head.weight"][2, 1] += 1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    done = run_cli("verify", hf, tmp_path / "named", check=1)
    assert "lm_head.weight" in done.stdout
    found = json.loads(run_cli("diff", tmp_path / "dcp", hf, "--json", check=1).stdout)
    assert [odd["tensor"] for odd in found["top"]] == ["lm_head.weight"]
    done = run_cli("verify", hf, tied_hf, check=None)
    refused(done, 3, "of_nobody")
