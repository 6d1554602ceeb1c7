"""Converted checkpoints compute what transformers computes: every family and kind of layout.

Real gloo process groups, forked from this process; the checkpoints are converted by the command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import tinyfamilies as models
from mmconvert.errors import FormError
from mmconvert.runtime import commands, validation
from mmconvert.runtime.verdict import ValidationReport
from nights import night, nightly


class Case(NamedTuple):
    """A family at a layout, and what is special about it."""

    kind: str
    llm: str
    vit: str
    tp: int = 1
    more: tuple[str, ...] = ()
    tied: bool = False
    options: tuple[tuple[str, int], ...] = ()
    dtype: str = "fp32"


UNEVEN = (("heads", 3), ("vocab", 321))  # 3 vision heads and 321 words on two ranks
SIX_B = (*UNEVEN, ("six_b", 1))
VPP_AUDIO = ("audio_pp_layers=[[1,2],[0,0]]",)
EP_2 = ("ep_size=2",)
ENCODERS_TP_1 = ("vit_tp_size=1", "audio_tp_size=1")
CASES = {
    "one process": Case("qwen2_vl", "[4]", "[3]"),
    "vit on one stage": Case("qwen2_vl", "[1,3]", "[3,0]"),
    "vit on three stages, text on the last two": Case("qwen2_vl", "[0,0,1,3]", "[1,1,1,0]"),
    "windows across a border": Case("qwen2_5_vl", "[0,4]", "[2,1]"),
    "vpp 3": Case("qwen2_5_vl", "[[0,0],[1,1],[1,1]]", "[[2,1],[0,0],[0,0]]"),
    "vpp 2 in one process": Case("qwen2_vl", "[[2],[2]]", "[[3],[0]]", tied=True),
    "tp 2": Case("qwen2_vl", "[4]", "[3]", 2),
    "tp 2 pp 2 vpp 2": Case("qwen2_vl", "[[0,1],[1,2]]", "[[2,1],[0,0]]", 2),
    "tied over two stages": Case("qwen2_5_vl", "[2,2]", "[3,0]", 2, tied=True),
    "vit tp 1": Case("qwen2_5_vl", "[4]", "[3]", 2, ("vit_tp_size=1",)),
    "bf16, one rank": Case("qwen2_vl", "[1,3]", "[3,0]", dtype="bf16"),
    "bf16, two ranks": Case("qwen2_5_vl", "[4]", "[3]", 2, dtype="bf16"),
    "omni": Case("omni", "[0,4]", "[2,1]", 1, ("audio_pp_layers=[1,2]",)),
    "omni vpp 2": Case("omni", "[[0,1],[1,2]]", "[[2,1],[0,0]]", 1, VPP_AUDIO),
    "omni tp 2 with encoders at tp 1": Case("omni", "[4]", "[3]", 2, ENCODERS_TP_1),
    "internvl qwen2, uneven": Case("intern-qwen2", "[1,3]", "[3,0]", 2, options=UNEVEN),
    "internvl qwen2, tied": Case("intern-qwen2", "[2,2]", "[3,0]", tied=True),
    "internvl llama, norms, uneven": Case("intern-llama", "[0,4]", "[2,1]", 2, options=SIX_B),
    "internvl internlm2, tp 2": Case("intern-internlm2", "[1,3]", "[3,0]", 2),
    "qwen3": Case("qwen3_vl", "[4]", "[3]"),
    "qwen3 over stages": Case("qwen3_vl", "[0,1,1,2]", "[1,2,0,0]"),
    "qwen3 tp 2": Case("qwen3_vl", "[4]", "[3]", 2, tied=True),
    "qwen3 tp 2 pp 2 vpp 2": Case("qwen3_vl", "[[0,1],[1,2]]", "[[2,1],[0,0]]", 2),
    "experts": Case("qwen3_vl_moe", "[4]", "[3]"),
    "experts ep 2": Case("qwen3_vl_moe", "[4]", "[3]", 1, EP_2),
    "experts tp 2 ep 2": Case("qwen3_vl_moe", "[4]", "[3]", 2, EP_2),
    "experts ep 2, bf16": Case("qwen3_vl_moe", "[4]", "[3]", 1, EP_2, dtype="bf16"),
    "experts pp 2 vpp 2": Case("qwen3_vl_moe", "[[0,1],[1,2]]", "[[2,1],[0,0]]"),
    "experts pp 2 ep 4": Case("qwen3_vl_moe", "[1,3]", "[3,0]", 1, ("ep_size=4",)),
    "experts tp 2, vit tp 1, ep 2": Case("qwen3_vl_moe", "[4]", "[3]", 2, ("vit_tp_size=1", *EP_2)),
    "glm": Case("glm4v", "[4]", "[3]"),
    "glm over stages": Case("glm4v", "[0,1,3]", "[1,2,0]"),
    "glm tp 2": Case("glm4v", "[4]", "[3]", 2),
    "glm tp 2 pp 2 vpp 2": Case("glm4v", "[[0,1],[1,2]]", "[[2,1],[0,0]]", 2),
    "internvl qwen3": Case("intern-qwen3", "[1,3]", "[3,0]"),
    "internvl qwen3, tp 2 pp 2": Case("intern-qwen3", "[0,4]", "[2,1]", 2),
    "internvl qwen3, vpp 2": Case("intern-qwen3", "[[0,1],[1,2]]", "[[2,1],[0,0]]"),
    "omni tp 2 pp 2": Case("omni", "[0,4]", "[2,1]", 2, ("audio_pp_layers=[1,2]",)),
    "internvl internlm2": Case("intern-internlm2", "[[0,1],[1,2]]", "[[2,1],[0,0]]"),
}  # fmt: skip
# Every family, and each kind of parallelism, once; the others nightly.
TODAY = (
    *("windows across a border", "vpp 2 in one process", "tied over two stages"),
    *("bf16, two ranks", "omni tp 2 with encoders at tp 1", "internvl llama, norms, uneven"),
    *("internvl internlm2", "qwen3", "experts tp 2 ep 2", "experts pp 2 vpp 2"),
    *("glm over stages", "omni"),
)


def checked(case: Case, folder: Path) -> ValidationReport:
    """The checkpoint of a case, validated."""
    hf = models.make(case.kind, folder / "hf", tied=case.tied, **dict(case.options))
    mm = models.convert(case.kind, hf, folder / "mm", case.llm, case.vit, case.tp, *case.more)
    return commands.validate(mm, hf, "", (), (), case.dtype, 0.0, lambda event: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(CASES, but=TODAY))
def test_a_converted_checkpoint_computes_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    report = checked(case, tmp_path)
    assert report.passed, report.as_dict()
    logits, loss, tokens, gradients = report.checks[:4]
    assert tokens.note == f"{validation.GREEDY} of {validation.GREEDY} equal"
    shared = case.tp > 1 or any("ep_size" in word for word in case.more)
    if not shared:  # one rank adds in transformers' order: equal to the bit
        assert (logits.found, gradients.found) == (0.0, 0.0)
        assert loss.found < 1e-7
    else:
        assert logits.found > 0  # another order of adding: had both run the same code, it were 0


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, night(2)])
def test_the_canonical_structure_computes_the_same(tp: int, tmp_path: Path) -> None:
    hf = models.make("qwen2_5_vl", tmp_path / "hf")
    flags = ("common_model_config.enable_canonical_hf_struct=True",)
    mm = models.convert_flags("qwen2_5_vl", hf, tmp_path / "mm", "[4]", "[3]", tp, flags)
    report = commands.validate(mm, hf, "", (), (), "fp32", 0.0, lambda event: None)
    assert report.passed, report.as_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "pp", "tp"),
    [night(True, 2, 1), (False, 1, 2), night(False, 2, 2)],
    ids=["tied", "tp 2", "tp 2 pp 2"],
)
def test_a_padded_vocabulary_computes_the_same(
    tied: bool, pp: int, tp: int, tmp_path: Path
) -> None:
    """The rows of zeros give no logits and get no gradients."""
    hf = models.make("qwen2_vl", tmp_path / "hf", tied=tied)
    flags = ("make_vocab_size_divisible_by=256",)
    layers = ("[4]", "[3]") if pp == 1 else ("[1,3]", "[3,0]")
    mm = models.convert_flags("qwen2_vl", hf, tmp_path / "mm", *layers, tp, flags)
    report = commands.validate(mm, hf, "", (), (), "fp32", 0.0, lambda event: None)
    assert report.passed, report.as_dict()


@pytest.mark.nightly
def test_hetero_tp_of_four_ranks(tmp_path: Path) -> None:
    """Text at tp 4, encoders at tp 1, as the Omni guide has it."""
    case = Case("omni4", "[4]", "[3]", 4, ENCODERS_TP_1)
    assert checked(case, tmp_path).passed


def test_internvl_in_the_names_of_transformers_own_class(tmp_path: Path) -> None:
    hf, kind = tmp_path / "hf", "intern-qwen3"
    models.native_intern(kind).save_pretrained(hf)
    mm = models.convert(kind, hf, tmp_path / "mm", "[1,3]", "[3,0]")
    report = commands.validate(mm, hf, "", (), (), "fp32", 0.0, lambda event: None)
    assert report.passed, report.as_dict()
    assert report.checks[0].found == 0.0


LEFT = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@pytest.mark.parametrize(("kind", "where"), [night("qwen2_vl", ""), ("qwen2_5_vl", "text_config")])
def test_a_quantization_config_over_plain_weights(kind: str, where: str, tmp_path: Path) -> None:
    """What a merged QLoRA leaves in config.json: noted, and transformers does not quantise."""
    hf = models.make(kind, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (config.setdefault(where, {}) if where else config).update(LEFT)
    (hf / "config.json").write_text(json.dumps(config))
    mm = models.convert(kind, hf, tmp_path / "mm", "[4]", "[3]")
    notes: list[str] = []
    report = commands.validate(mm, hf, "", (), (), "fp32", 0, lambda word: notes.append(str(word)))
    assert report.passed
    assert any("quantization_config (bitsandbytes, 4 bit)" in note for note in notes)


def test_quantised_weights_are_not_compared(tmp_path: Path) -> None:
    hf = models.make("qwen2_vl", tmp_path / "hf")
    mm = models.convert("qwen2_vl", hf, tmp_path / "mm", "[4]", "[3]")
    file = sorted(hf.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = next(name for name, t in tensors.items() if t.ndim == 2)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file, metadata={"format": "pt"})
    with pytest.raises(FormError, match="1 tensor of a quantised checkpoint"):
        commands.validate(mm, hf, "", (), (), "fp32", 0, print)
