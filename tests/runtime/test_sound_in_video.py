"""The sound of a video between its frames: transformers' processor and model are the judges."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5OmniProcessor

import guidefiles
import talking
import tinyfamilies
from cli import run_cli
from filming import film
from mmconvert.errors import RequestError
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.dataset import read_samples
from mmconvert.runtime.engine import load_folder
from mmconvert.runtime.families import architecture
from mmconvert.runtime.inputs import assemble
from mmconvert.runtime.launch import launch
from mmconvert.runtime.prepare import Prepare
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.validation import Validation
from mmconvert.runtime.verdict import ValidationReport
from mmconvert.runtime.weaving import chunks, woven

RATE, SECONDS = 10, 1  # positions of a second and seconds of a chunk, of the tiny model here


def theirs(grid: tuple[int, int, int], seconds: float, heard: int, rate: int, chunk: int) -> str:
    """What transformers' own processor puts in the place of a video: V and A."""
    made = object.__new__(Qwen2_5OmniProcessor)
    made.video_processor = SimpleNamespace(merge_size=2)
    made.video_token, made.audio_token = "V", "A"
    made.audio_bos_token = made.audio_eos_token = ""
    videos = {"video_grid_thw": torch.tensor([grid]), "video_second_per_grid": [seconds]}
    sounds = {"num_audio_tokens": [heard]}
    more = {"position_id_per_seconds": rate, "seconds_per_chunk": chunk}
    return made.replace_video_with_audio_token(videos, 0, sounds, 0, **more)


def test_chunks_are_those_of_transformers() -> None:
    drawn = random.Random(3)
    for _ in range(60):
        grid = (drawn.randint(1, 12), 2 * drawn.randint(1, 3), 2 * drawn.randint(1, 3))
        seconds, heard = drawn.choice((0.4, 1.0, 1.3, 2.5, 5.0)), drawn.randint(1, 160)
        rate, chunk = drawn.choice(((25, 2), (10, 1), (25, 1)))
        each = grid[1] * grid[2] // 4
        moments = [t * seconds * rate for t in range(grid[0]) for _ in range(each)]
        ours = woven(chunks(moments, rate * chunk), chunks(range(heard), rate * chunk))
        said = "".join("VA"[which] for which in ours)
        assert said == theirs(grid, seconds, heard, rate, chunk)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Omni whose chunks are short, beside a film with a sound and one without."""
    made = talking.make("omni", tmp_path_factory.mktemp("sound") / "hf")
    config = json.loads((made / "config.json").read_text())
    config["thinker_config"] |= {"position_id_per_seconds": RATE, "seconds_per_chunk": SECONDS}
    (made / "config.json").write_text(json.dumps(config))
    film(made.parent / "a.mp4", [20 * i for i in range(10)], rate=4, pitch=440)
    film(made.parent / "silent.mp4", [200] * 8, rate=4)
    talking.sound(made.parent / "other.wav", 300, 0.6)
    return made


def speaker(hf: Path) -> Speaker:
    return Speaker(architecture(hf), hf, Prepare(video_frames=64, sound_in_video=True))


def asked(text: str, videos: list[Path], sounds: list[Path] | None = None) -> Sample:
    return Sample([("user", text), ("assistant", "A")], videos=videos, audios=sounds or [])


def middle(batch: Batch) -> str:
    """V for each token of a frame and A for each of the sound, in their order."""
    words = {tinyfamilies.VIDEO: "V", tinyfamilies.AUDIO: "A"}
    return "".join(words.get(i, "") for i in batch.ids[0].tolist())


def test_the_sound_of_a_video_is_its_own_or_the_one_that_is_named(hf: Path) -> None:
    own = speaker(hf).batch(asked("<video>?", [hf.parent / "a.mp4"]), answer=False)
    assert own.seconds is not None
    grid: Any = tuple(own.grid[0].tolist())
    heard = int((own.ids == tinyfamilies.AUDIO).sum())
    assert middle(own) == theirs(grid, float(own.seconds[0]), heard, RATE, SECONDS)
    assert "AV" in middle(own)  # more than one chunk
    around = [tinyfamilies.START, tinyfamilies.AUDIO_START, tinyfamilies.VIDEO]
    ids = own.ids[0].tolist()
    assert ids[ids.index(tinyfamilies.START) :][:3] == around
    named = asked("<video><audio>?", [hf.parent / "a.mp4"], [hf.parent / "other.wav"])
    other = speaker(hf).batch(named, answer=False)
    assert middle(other).count("V") == middle(own).count("V")
    assert 0 < middle(other).count("A") < heard
    apart = Speaker(architecture(hf), hf).batch(named, answer=False)
    assert middle(apart) == "V" * middle(other).count("V") + "A" * middle(other).count("A")


def test_a_silent_video_has_its_frames_alone(hf: Path) -> None:
    silent = [hf.parent / "silent.mp4"]
    with_flag = speaker(hf).batch(asked("<video>?", silent), answer=False)
    without = Speaker(architecture(hf), hf, Prepare(video_frames=64))
    assert torch.equal(with_flag.ids, without.batch(asked("<video>?", silent), answer=False).ids)


@pytest.mark.parametrize(
    ("text", "videos", "sounds", "what"),
    [
        ("<audio><video>?", ["a.mp4"], ["other.wav"], "is followed by an <audio>"),
        ("<video><video><audio>?", ["a.mp4"] * 2, ["other.wav"], "is followed by an <audio>"),
        ("<video><video>?", ["a.mp4", "silent.mp4"], [], "silent.mp4 has no sound"),
    ],
)
def test_sounds_that_are_not_one_for_each_video_are_named(
    text: str, videos: list[str], sounds: list[str], what: str, hf: Path
) -> None:
    files = ([hf.parent / name for name in some] for some in (videos, sounds))
    with pytest.raises(RequestError) as caught:
        speaker(hf).batch(asked(text, *files), answer=False)
    assert what in caught.value.what


@pytest.mark.slow
def test_the_model_computes_what_transformers_computes(hf: Path, tmp_path: Path) -> None:
    """Positions too: transformers finds its own, by use_audio_in_video."""
    mm = tinyfamilies.convert("omni", hf, tmp_path / "mm", "[1,3]", "[3,0]", 1)
    arch, stored = load_folder(hf, mm)
    made = speaker(hf).batch(asked("<video>What?", [hf.parent / "a.mp4"]), answer=True)
    files = (made.pixels, made.grid, 0, made.features, made.lengths, made.seconds, made.woven)
    batch = assemble(arch, made.ids, made.ids.clone(), *files)
    assert made.woven
    report = launch(Validation(arch, stored, hf, batch, "a film", "fp32", 0), stored.world, print)
    assert isinstance(report, ValidationReport)
    assert report.passed, report.checks


@pytest.mark.slow
def test_it_trains_and_answers_by_the_guides_files(hf: Path, tmp_path: Path) -> None:
    tinyfamilies.convert("omni", hf, hf.parent / "mm", "[4]", "[3]")
    item = talking.talk("<video><audio>?", "A", videos=["a.mp4"], audios=["a.mp4"])
    (hf.parent / "film.json").write_text(json.dumps([item] * 2))
    columns = {"images": None, "videos": "videos", "audios": "audios"}
    content = guidefiles.data_json(hf.parent, "./film.json", **columns)
    content["dataset_param"]["preprocess_parameters"]["use_audio_in_video"] = True
    (hf.parent / "data_2b.json").write_text(json.dumps(content))
    guidefiles.model_json(hf.parent, [3], [4], [3])
    done = run_cli("finetune", *guidefiles.script(save=tmp_path), cwd=hf.parent, check=0)
    assert "left out" not in done.stderr
    words = ("--mm_dir", "mm", "--hf_dir", "hf", "--video", "a.mp4", "--prompt", "?", "--json")
    plain = run_cli("generate", *words, cwd=hf.parent, check=0)
    heard = run_cli("generate", *words, "--use_audio_in_video", cwd=hf.parent, check=0)
    more = [json.loads(one.stdout)["prompt_tokens"] for one in (plain, heard)]
    assert more[1] - more[0] == len(read_samples([hf.parent / "film.json"], 0)[0].audios) * 27


def test_models_that_do_not_hear_refuse_it(tmp_path: Path) -> None:
    deaf = talking.make("qwen2_vl", tmp_path / "hf")
    with pytest.raises(RequestError, match="use_audio_in_video"):
        speaker(deaf)
