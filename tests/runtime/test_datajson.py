"""data.json: what it asks for, what is named, what is refused; and how long samples are cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import guidefiles
import talking
from mmconvert.errors import RequestError
from mmconvert.runtime.batch import IGNORED
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.datajson import read_data_json
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.families import architecture
from mmconvert.runtime.prepare import Prepare, Tiling
from mmconvert.runtime.samples import Sample
from mmconvert.runtime.template import shares

Json = dict[str, Any]


def qwen(folder: Path, change: Callable[[Json], object]) -> Path:
    """The Qwen guides' file with a change to its dataset_param."""
    content = guidefiles.data_json(folder, "./mllm.json")
    change(content["dataset_param"])
    (folder / "data.json").write_text(json.dumps(content))
    return folder / "data.json"


def intern(folder: Path, change: Callable[[Json], object]) -> Path:
    content = guidefiles.intern_data_json(folder)
    change(content["dataset_param"])
    (folder / "data.json").write_text(json.dumps(content))
    return folder / "data.json"


def test_the_limits_and_places_of_the_guides_file(tmp_path: Path) -> None:
    found = read_data_json(qwen(tmp_path, lambda param: None))
    assert found.hf_dir == tmp_path / "hf"
    assert found.prepare == Prepare(
        image_pixels=(0, 262144),
        video_pixels=(0, 16384),
        video_rate=2.0,
        video_frames=64,
        template="qwen2vl",
    )
    (source,) = found.train
    assert source.folders == (tmp_path,)
    assert source.files == (Path("mllm.json"),)
    assert len(found.notes) == 1
    assert "no effect here: cache_dir" in found.notes[0]


def test_what_is_absent_has_the_defaults_of_mindspeed(tmp_path: Path) -> None:
    def bare(param: Json) -> None:
        param["preprocess_parameters"] = {"model_name_or_path": "hf"}
        param["basic_parameters"] = {"dataset": "a.json", "template": "qwen2vl"}
        param["attr"] = {"images": "images"}

    found = read_data_json(qwen(tmp_path, bare))
    assert found.prepare.image_pixels == (1024, 589824)
    assert found.prepare.video_frames == 128
    columns = found.train[0].columns
    assert columns is not None
    assert (columns.messages, columns.role, columns.content) == ("conversations", "from", "value")
    assert columns.roles == {"human": "user", "gpt": "assistant", "system": "system"}
    assert dict(columns.files) == {"image": "images", "video": None, "audio": None}
    assert found.train[0].folders == (Path("data"),)


def test_data_for_evaluations(tmp_path: Path) -> None:
    held = {"val_dataset": "v.json,w.json", "val_max_samples": 3, "max_samples": 9, "val_rate": 0.5}
    found = read_data_json(qwen(tmp_path, lambda param: param["basic_parameters"].update(held)))
    assert found.check[0].files == (Path("v.json"), Path("w.json"))
    assert (found.check[0].most, found.train[0].most, found.rate) == (3, 9, 0.0)
    found = read_data_json(
        qwen(tmp_path, lambda param: param["basic_parameters"].update(val_rate=0.1))
    )
    assert (found.check, found.rate) == ((), 0.1)


REFUSED: dict[str, tuple[Callable[[Json], object], str]] = {
    "another type": (lambda p: p.update(dataset_type="t2v"), "dataset_type is 't2v'"),
    "cutoff_len": (lambda p: p["basic_parameters"].update(cutoff_len=5), "--seq-length"),
    "a template": (lambda p: p["basic_parameters"].update(template="llama"), "template is 'llama'"),
    "no file": (lambda p: p["basic_parameters"].update(dataset=None), "names no file"),
    "text for a number": (
        lambda p: p["basic_parameters"].update(max_samples="9"), "max_samples is '9'",
    ),
    "ranking": (lambda p: p["attr"].update(ranking=True), "preferences"),
    "alpaca": (lambda p: p["attr"].update(formatting="alpaca"), "'alpaca'"),
    "another column": (lambda p: p["attr"].update(image="x"), "attr has the keys image"),
    "no parameters": (lambda p: p.pop("basic_parameters"), "has no basic_parameters"),
    "another rate": (
        lambda p: p["preprocess_parameters"].update(audio_sampling_rate=8000), "16000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name: str, tmp_path: Path) -> None:
    change, expected = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        read_data_json(qwen(tmp_path, change))
    assert expected in str(caught.value)


def test_a_key_that_nobody_knows_is_named_once(tmp_path: Path) -> None:
    found = read_data_json(
        qwen(tmp_path, lambda param: param["basic_parameters"].update(mix_strategy="concat"))
    )
    assert [note for note in found.notes if "mix_strategy" in note] == [
        f"warning: {tmp_path / 'data.json'}: unknown keys: mix_strategy"
    ]


def test_internvl_has_tiles_and_several_data_sets(tmp_path: Path) -> None:
    def several(param: Json) -> None:
        one = param["basic_parameters"]
        param["basic_parameters"] = [one, {"data_path": "b.jsonl", "repeat_time": 2}]

    found = read_data_json(intern(tmp_path, several))
    assert found.prepare.tiling == Tiling(True, True, 1, 6, square=True)
    assert found.prepare.template == "internlm2-chat"
    assert [source.share for source in found.train] == [1.0, 2.0]
    idle = "down_sample_ratio, group_by_length, image_size, patch_size, use_text_processer"
    assert found.notes == (f"note: {tmp_path / 'data.json'}: no effect here: {idle}",)
    assert found.train[0].folders == (Path("data/ai2d"),)
    with pytest.raises(RequestError, match=r"repeat_time is 1\.5"):
        read_data_json(
            intern(tmp_path, lambda param: param["basic_parameters"].update(repeat_time=1.5))
        )


def test_a_share_of_a_data_set_and_a_repeated_one(tmp_path: Path) -> None:
    lines = [{"conversations": [{"from": "human", "value": str(i)}, {"from": "gpt", "value": "A"}]}
             for i in range(10)]  # fmt: skip
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for share, count in ((0.3, 3), (2, 20)):
        basic = {"data_path": str(tmp_path / "b.jsonl"), "repeat_time": share}
        found = read_data_json(intern(tmp_path, lambda p, b=basic: p.update(basic_parameters=b)))
        samples, _ = Data(found.train).read(0, lambda said: None)
        assert len(samples) == count


def test_roles_that_do_not_take_turns_are_left_out_where_attr_says_how(tmp_path: Path) -> None:
    talking.write_data(tmp_path, "mllm.json")
    items = json.loads((tmp_path / "mllm.json").read_text())
    items.append({"images": [], "messages": [{"role": "assistant", "content": "Hi"}]})
    items.append({"images": [], "messages": [{"role": "system", "content": "Hi"}]})
    (tmp_path / "mllm.json").write_text(json.dumps(items))
    path = qwen(
        tmp_path, lambda p: p["basic_parameters"].update(dataset=str(tmp_path / "mllm.json"))
    )
    said: list[str] = []
    samples, _ = Data(read_data_json(path).train).read(0, said.append)
    assert len(samples) == 4
    assert said[0] == "warning: 2 of 6 samples are left out:"
    assert "in turn" not in said[1]
    assert "its messages are of assistant" in said[1]


# ------------------------------------------------------------------------------------- lengths
@pytest.mark.parametrize(
    ("asked", "answer", "room", "expected"),
    [(100, 20, 60, (40, 20)), (20, 100, 60, (20, 40)), (100, 100, 60, (30, 30)),
     (5, 6, 60, (5, 6))],
)  # fmt: skip
def test_a_turn_is_cut_as_mindspeed_cuts_it(
    asked: int, answer: int, room: int, expected: tuple[int, int]
) -> None:
    """Numbers that its own code gave."""
    assert shares(asked, answer, room) == expected


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.make("qwen2_vl", tmp_path_factory.mktemp("datajson") / "hf")


TWO = Sample([("user", "Hi"), ("assistant", "Yes."), ("user", "So?"), ("assistant", "No.")])


def learnt(hf: Path, prepare: Prepare, sample: Sample = TWO) -> str:
    speaker = Speaker(architecture(hf), hf, prepare)
    batch = speaker.batch(sample, answer=False)
    return str(speaker.tokenizer.decode(batch.ids[0][batch.labels[0] != IGNORED]))


def test_what_is_learnt(hf: Path) -> None:
    assert learnt(hf, Prepare()) == "Yes.<|im_end|>\nNo.<|im_end|>\n"
    assert learnt(hf, Prepare(learn_last=True)) == "No.<|im_end|>\n"
    everything = learnt(hf, Prepare(learn_questions=True))
    assert everything.startswith("<|im_start|>system\nYou are")
    assert everything.endswith("So?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n")


def test_a_long_conversation_loses_its_later_turns(hf: Path) -> None:
    whole = Speaker(architecture(hf), hf).batch(TWO, answer=False).ids.shape[1]
    first = Speaker(architecture(hf), hf).batch(
        Sample(TWO.messages[:2]), answer=False
    ).ids.shape[1]  # fmt: skip
    assert learnt(hf, Prepare(length=whole)) == learnt(hf, Prepare())
    assert learnt(hf, Prepare(length=first)) == "Yes.<|im_end|>\n"


def test_a_picture_is_not_cut_through(hf: Path, tmp_path: Path) -> None:
    image = talking.picture(tmp_path / "a.png", "red")
    sample = Sample([("user", "<image>Q" + "x" * 50), ("assistant", "A")], [image])
    whole = Speaker(architecture(hf), hf).batch(sample, answer=False).ids.shape[1]
    assert learnt(hf, Prepare(length=whole - 20), sample) == "A<|im_end|>\n"
    with pytest.raises(RequestError, match="would be cut off in the middle"):
        learnt(hf, Prepare(length=whole - 67), sample)
