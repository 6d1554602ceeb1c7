"""Layouts that convert both ways and that training cannot use: a warning, with one that is good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inprocess import HF, MM, SOURCE, TARGET, Done, call
from mmconvert.playground.checkpoints import make_hf
from nights import in_turns

OMNI, INTERN = "Qwen2_5_OmniConverter", "InternVLConverter"
P = "--cfg.parallel_config."


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("omni") / "hf"
    return make_hf("qwen2.5omni-7b", out, layers=6, vit_layers=4, audio_layers=4)


@pytest.fixture(scope="module")
def intern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vocabulary is odd, as that of InternLM2."""
    out = tmp_path_factory.mktemp("intern") / "hf"
    return make_hf("internvl2-2b", out, layers=2, vit_layers=2, vocab_size=33)


def converted(converter: str, hf: Path, mm: Path, *words: str, **layout: object) -> Done:
    given = [w for key, value in layout.items() for w in (P + key, str(value).replace(" ", ""))]
    return call(converter, "hf_to_mm", HF, hf, MM, mm, *given, *words)


def warned(done: Done) -> list[str]:
    return [note for note in json.loads(done.stdout)["notes"] if "raining" in note]


TEXT = {"vit_pp_layers": [4, 0, 0], "llm_pp_layers": [0, 3, 3]}
AUDIO: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "two stages": ([2, 2, 0], TEXT, "on several stages"),
    "before the text": ([4, 0, 0], TEXT, "before stage 1"),
    "beside the text": ([0, 4, 0], TEXT, ""),
    "one stage": ([4], {"vit_pp_layers": [4], "llm_pp_layers": [6]}, ""),
    "the example of the guide": ([4, 0], {"vit_pp_layers": [4, 0], "llm_pp_layers": [3, 3]}, ""),
    "virtual stages": (
        [[4, 0], [0, 0]],
        {"vit_pp_layers": [[4, 0], [0, 0]], "llm_pp_layers": [[0, 2], [2, 2]]},
        "before stage 1",
    ),
    "the second chunk": (
        [[0, 0], [4, 0]],
        {"vit_pp_layers": [[2, 2], [0, 0]], "llm_pp_layers": [[0, 0], [3, 3]]},
        "",
    ),
}


@pytest.mark.parametrize(("audio", "other", "words"), AUDIO.values(), ids=AUDIO.keys())
def test_where_the_audio_encoder_may_stand(
    audio: list[Any], other: dict[str, Any], words: str, omni: Path, tmp_path: Path
) -> None:
    """In the dry run, in the conversion, in JSON; the good layout that is named has no warning."""
    layout = {"audio_pp_layers": audio, **other}
    dry = converted(OMNI, omni, tmp_path / "mm", "--dry-run", "--json", **layout)
    done = converted(OMNI, omni, tmp_path / "mm", "--json", **layout)
    said = warned(done)
    assert warned(dry) == said
    assert done.stderr.count("warning: audio_pp_layers") == len(said) == bool(words)
    report = json.loads(call("doctor", tmp_path / "mm", "--json").stdout)
    assert [f["id"] for f in report["findings"]] == ["not-for-training"] * bool(words)
    if words:
        assert words in said[0] and said[0].startswith("warning: audio_pp_layers")
        good = said[0].split("Training can use audio_pp_layers ")[1].split(":")[0]
        other_out = converted(
            OMNI, omni, tmp_path / "good", "--json", **{**layout, "audio_pp_layers": good}
        )
        assert warned(other_out) == []
        assert good in report["findings"][0]["what"]


def test_resplit_says_so_too(omni: Path, tmp_path: Path) -> None:
    converted(OMNI, omni, tmp_path / "mm")
    flags = {"vit_pp_layers": "[4,0]", "audio_pp_layers": "[2,2]", "llm_pp_layers": "[0,6]"}
    given = [w for k, v in flags.items() for w in (f"--cfg.target_parallel_config.{k}", v)]
    words = (OMNI, "resplit", SOURCE, tmp_path / "mm", TARGET, tmp_path / "out", *given)
    assert "on several stages" in call(*words).stderr


@pytest.mark.parametrize(
    ("stages", "by"),
    in_turns([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2)], ["flops", "parameters"]),
)
def test_suggest_keeps_the_audio_encoder_beside_the_text(
    stages: tuple[int, int], by: str, omni: Path, tmp_path: Path
) -> None:
    pp, vpp = stages
    words = ("suggest", omni, "--pp", str(pp), "--vpp", str(vpp), "--by", by, "--json")
    layout = json.loads(call(*words).stdout)["parallel_config"]
    layout.pop("tp_size")
    done = converted(OMNI, omni, tmp_path / "mm", "--dry-run", "--json", **layout)
    assert warned(done) == []


@pytest.mark.parametrize(("tp", "bad"), [(1, False), (2, True)])
def test_a_vocabulary_that_tp_does_not_divide(
    tp: int, bad: bool, intern: Path, tmp_path: Path
) -> None:
    done = converted(INTERN, intern, tmp_path / "mm", "--json", tp_size=tp)
    said = warned(done)
    assert len(said) == bad
    for manifest in (True, False):
        if not manifest:  # the shapes tell it too
            (tmp_path / "mm" / "mmconvert.json").unlink()
        report = json.loads(call("doctor", tmp_path / "mm", "--json", check=None).stdout)
        found = [f for f in report["findings"] if f["id"] == "not-for-training"]
        assert len(found) == bad
    words = ("suggest", intern, "--pp", "2", "--tp", str(tp))
    if bad:
        assert "vocabulary of 33" in said[0] and "1 or 3 or 11 or 33" in said[0]
        assert "vocabulary of 33" in call(*words, check=2).stderr
    else:
        call(*words)
