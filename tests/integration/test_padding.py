"""The padded vocabulary: rows of zeros in MM format that Hugging Face does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import edit_rank, layout
from inprocess import BACK, HF, MM, SOURCE, TARGET, call
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm
from nights import nightly

EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
HEAD = "text_decoder.output_layer.weight"
TO, BY = "--cfg.pad_vocab_to", "--cfg.make_vocab_size_divisible_by"
SMALL: dict[str, Any] = {"layers": 4, "vit_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2vl-2b": SMALL,
    "qwen2.5vl-7b": SMALL,
    "qwen2.5omni-7b": {**SMALL, "audio_layers": 3},
    "internvl2-2b": SMALL,
    "internvl3.5-1b": SMALL,
    "qwen3vl-4b": {**SMALL, "deepstack": [0, 2]},
    "qwen3vl-30b-a3b": {**SMALL, "deepstack": [0, 2], "vocab_size": 301},
    "glm4.1v-9b": SMALL,
    "deepseekvl2": {},
}


TODAY = ("internvl3.5-1b", "qwen2.5omni-7b")


def flags(model: str, tp: int) -> list[str]:
    deep = model == "deepseekvl2"
    llm, vit = ("[14,16]", "[27,0]") if deep else ("[1,3]", "[3,0]")
    more = ("audio_pp_layers=[3,0]",) if "omni" in model else ()
    return layout(llm, vit, tp, *more)


def ranks(mm: Path) -> list[dict[str, torch.Tensor]]:
    paths = sorted(mm.glob("release/*/model_optim_rng.pt"))
    return [torch.load(path, weights_only=True)["model"] for path in paths]


@pytest.mark.parametrize("model", nightly(FAMILIES, but=TODAY))
def test_every_family_is_padded_and_cut(model: str, tmp_path: Path) -> None:
    """Zeros below on the way there, none on the way back; the same from layout to layout."""
    hf, mm, back = (
        make_hf(model, tmp_path / "hf", **FAMILIES[model]),
        tmp_path / "mm",
        tmp_path / "b",
    )
    done = call("AutoConverter", "hf_to_mm", HF, hf, MM, mm, *flags(model, 2), BY, "64")
    assert "of zeros below word_embeddings" in done.stderr
    plain = tmp_path / "plain"
    call("AutoConverter", "hf_to_mm", HF, hf, MM, plain, *flags(model, 1))
    for name in (EMBEDDING, HEAD):
        shards = [part[name] for part in ranks(mm) if name in part]
        if not shards:
            assert name == HEAD
            continue
        words = next(part[name] for part in ranks(plain) if name in part)
        rows = torch.cat(shards[:2])
        assert rows.shape[0] % 128 == 0
        assert 0 < rows.shape[0] - words.shape[0] < 128
        assert torch.equal(rows[: words.shape[0]], words)
        assert not rows[words.shape[0] :].any()
    done = call("AutoConverter", "mm_to_hf", HF, hf, MM, mm, BACK, back)
    assert "of zeros cut from word_embeddings" in done.stderr
    assert compare_hf(hf, back) == []
    assert json.loads((mm / "mmconvert.json").read_text())["dims"]["llm.vocab"] == words.shape[0]
    one, again = tmp_path / "one", tmp_path / "again"
    target = [flag.replace("--cfg.parallel", "--cfg.target_parallel") for flag in flags(model, 1)]
    call("AutoConverter", "resplit", SOURCE, mm, TARGET, one, *target)
    call("AutoConverter", "hf_to_mm", HF, hf, MM, again, *flags(model, 1), TO, str(rows.shape[0]))
    assert compare_mm(one, again) == []
    call("verify", hf, one)
    call("verify", mm, one)
    call("diff", mm, hf)


def test_both_flags_count_as_megatron_does(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-7b", tmp_path / "hf", **SMALL, vocab_size=301)
    for number, (words, tp, rows) in enumerate(
        [((TO, "310"), 2, 310), ((BY, "16"), 4, 320), ((BY, "1"), 2, 302), ((TO, "301"), 1, 301)]
    ):
        mm = tmp_path / str(number)
        call("AutoConverter", "hf_to_mm", HF, hf, MM, mm, *flags("", tp), *words)
        first = [part[EMBEDDING] for part in ranks(mm) if EMBEDDING in part]
        assert sum(t.shape[0] for t in first) == rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((TO, "300"), "a number from 301 on"),
        ((TO, "-1"), "pad_vocab_to is -1"),
        ((TO, "302", BY, "2"), "both given"),
        ((TO, "303"), "tp size"),
        ((TO, "302", "--cfg.save_vit_only", "True"), "text decoder"),
    ],
)
def test_what_cannot_be_padded_is_refused(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    hf = make_hf("qwen2vl-7b", tmp_path / "hf", **SMALL, vocab_size=301)
    mm = tmp_path / "mm"
    done = call("AutoConverter", "hf_to_mm", HF, hf, MM, mm, *flags("", 2), *words, check=2)
    assert said in done.stderr
    assert not mm.exists()


def test_rows_that_training_changed_are_not_cut_in_silence(tmp_path: Path) -> None:
    hf = make_hf("qwen2vl-7b", tmp_path / "hf", **SMALL, vocab_size=301)
    mm, back = tmp_path / "mm", tmp_path / "back"
    call("AutoConverter", "hf_to_mm", HF, hf, MM, mm, *flags("", 2), BY, "64")

    def train(content: dict[str, Any]) -> None:
        content["model"][HEAD][-2] += 1

    edit_rank(mm, "mp_rank_01_001", train)
    said = call("AutoConverter", "mm_to_hf", HF, hf, MM, mm, BACK, back, check=3).stderr
    assert HEAD in said
    assert "not zero" in said
    assert "--replicas first" in said
    assert not back.exists()
    call("verify", hf, mm, check=1)
    words = ("--replicas", "first")
    said = call("AutoConverter", "mm_to_hf", HF, hf, MM, mm, BACK, back, *words).stderr
    assert "warning" in said
    assert compare_hf(hf, back) == []


def test_another_model_of_fewer_words_is_no_padding(tmp_path: Path) -> None:
    """Rows that hold values do not pad."""
    hf = make_hf("qwen2vl-7b", tmp_path / "hf", **SMALL, vocab_size=304)
    other = make_hf("qwen2vl-7b", tmp_path / "other", **SMALL, vocab_size=301)
    call("AutoConverter", "hf_to_mm", HF, hf, MM, tmp_path / "mm", *flags("", 2))
    back = tmp_path / "back"
    call("AutoConverter", "mm_to_hf", HF, other, MM, tmp_path / "mm", BACK, back, check=3)
    assert not back.exists()
