"""Training data: what the guides' files hold, and what strangers' files hold instead."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import talking
import tinyfamilies
from cli import run_cli
from mmconvert.errors import DatasetError, RequestError
from mmconvert.runtime import dataset
from mmconvert.runtime.batch import IGNORED, Batch
from mmconvert.runtime.border import pooled
from mmconvert.runtime.checking import BackgroundCheck, Checks, look_at_pictures
from mmconvert.runtime.conversation import Speaker
from mmconvert.runtime.dataset import Data, Feed, SampleOrder, Share, read_samples, split
from mmconvert.runtime.dialects import read_source
from mmconvert.runtime.encoding import Encoder, nbytes
from mmconvert.runtime.families import architecture
from mmconvert.runtime.samples import SampleSource


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    hf = talking.make("omni", tmp_path_factory.mktemp("omni") / "hf")
    return Speaker(architecture(hf), hf)


def animation(path: Path) -> Path:
    """A video of four frames."""
    frames = [Image.new("RGB", (talking.SIDE, talking.SIDE), c) for c in talking.COLOURS]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def mixed(folder: Path) -> Path:
    """Text, a picture, two pictures, a video, a sound, and all of them."""
    for name in talking.COLOURS:
        talking.picture(folder / f"{name}.png", name)
    animation(folder / "film.gif")
    talking.sound(folder / "low.wav", 220, 0.3)
    talking.sound(folder / "high.wav", 880, 0.42)
    items = [
        talking.talk("Hello.", "Hi."),
        talking.talk("<image>\nWhich?", "red", images=["red.png"]),
        talking.talk("<image> or <image>?", "both", images=["red.png", "blue.png"]),
        talking.talk("<video>What happens?", "Colours.", videos=["film.gif"]),
        talking.talk("<audio>Which tone?", "low", audios=["low.wav"]),
        talking.talk(
            "<audio><image><video>?", "all", audios=["high.wav"], images=["green.png"],
            videos=["film.gif"],
        ),
    ]  # fmt: skip
    path = folder / "mixed.json"
    path.write_text(json.dumps(items))
    return path


def test_every_kind_of_sample_becomes_a_batch(speaker: Speaker, tmp_path: Path) -> None:
    samples = read_samples([mixed(tmp_path)], 0)
    batches = [speaker.batch(sample, answer=False) for sample in samples]
    pictures = [len(b.grid) for b in batches]
    assert pictures == [0, 1, 2, 1, 0, 2]
    assert [len(b.lengths) for b in batches] == [0, 0, 0, 0, 1, 1]
    assert [b.image_rows for b in batches] == [0, 4, 8, 0, 0, 4]
    for sample, batch in zip(samples, batches, strict=True):
        learnt = batch.ids[batch.labels != IGNORED].tolist()
        answer = sample.messages[-1][1]
        assert speaker.words(learnt) == f"{answer}\n"  # nothing else is learnt
        assert learnt[-2] == 256 + talking.SPECIALS.index("<|im_end|>")
        rows = {tinyfamilies.IMAGE: 4, tinyfamilies.VIDEO: 8}
        for token, each in rows.items():
            count = len(sample.images if token == tinyfamilies.IMAGE else sample.videos)
            assert int((batch.ids == token).sum()) == each * count


def test_a_step_mixes_all_kinds_in_one_shape(speaker: Speaker, tmp_path: Path) -> None:
    feed = Feed(speaker, read_samples([mixed(tmp_path)], 0), 2, 3, "seed", 1)
    for number in (0, 1):
        batches = feed.step(number)
        assert len({tuple(b.ids.shape) for b in batches}) == 1
        assert len({b.patches for b in batches}) == 1
        assert len({b.sound_rows for b in batches}) == 1
        assert feed.tokens(number) < sum(b.ids.numel() for b in batches)  # padding does not count


def test_sounds_of_odd_lengths_have_one_shape(speaker: Speaker, tmp_path: Path) -> None:
    """Pooling loses a row of each odd sound: rows before and after it are to be alike."""
    items: list[dict[str, object]] = [talking.talk("Hello.", "Hi.")]
    for i, hundredths in enumerate((50, 52, 33, 20)):
        talking.sound(tmp_path / f"{i}.wav", 440, hundredths / 100)
        items.append(talking.talk("<audio>?", "a", audios=[f"{i}.wav"]))
    items.append(talking.talk("<audio><audio>?", "a", audios=["0.wav", "2.wav"]))
    (tmp_path / "data.json").write_text(json.dumps(items))
    feed = Feed(speaker, read_samples([tmp_path / "data.json"], 0), 1, len(items), "once")
    batches = feed.step(0)
    assert len({b.sound_rows for b in batches}) == 1
    assert len({pooled(b) for b in batches}) == 1


def test_a_mark_of_byte_order_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = talking.write_data(tmp_path)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(read_samples([path], 0)) == len(talking.COLOURS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("[0,4]", "[3,0]", 1),
        pytest.param(("[1,3]", "[3,0]", 1), marks=pytest.mark.nightly),
        pytest.param(
            ("[4]", "[3]", 2, "vit_tp_size=1", "audio_tp_size=1"), marks=pytest.mark.nightly
        ),
    ],
    ids=["pp 2, encoders alone", "pp 2", "tp 2, encoders at tp 1"],
)
def test_omni_learns_from_all_kinds_at_once(layout: Any, tmp_path: Path) -> None:
    hf = talking.make("omni", tmp_path / "hf")
    data = mixed(tmp_path)
    mm = tinyfamilies.convert("omni", hf, tmp_path / "mm", *layout)
    what = talking.plan(tmp_path / "save", 5, size=2, count=3)
    curve = talking.learn(mm, hf, [data], what)
    assert curve[-1][1] < 0.9 * curve[0][1]
    alone = tinyfamilies.convert("omni", hf, tmp_path / "alone", "[4]", "[3]")
    what = talking.plan(tmp_path / "save alone", 5, size=2, count=3)
    same = talking.learn(alone, hf, [data], what)
    assert [line[1] for line in curve] == pytest.approx([line[1] for line in same], rel=1e-5)


def test_several_files_and_a_limit(tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    first, second = mixed(tmp_path), talking.write_data(one)
    both = read_samples([first, second], 0)
    assert len(both) == 10
    assert both[6].images == [one / "red.png"]  # by the file's own folder
    assert [s.name for s in read_samples([first, second], 7)] == [s.name for s in both[:7]]


def test_what_the_data_command_writes_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default from the working directory; with --relative from the data's own folder."""
    image = tmp_path / "data/COCO2017/train2017/1.jpg"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(image)
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Black."}]
    items = [{"image": "1.jpg", "conversations": said}]
    (tmp_path / "data/llava_instruct_150k.json").write_text(json.dumps(items))
    run_cli("data", "llava-to-mllm", cwd=tmp_path, check=0)
    below = tmp_path / "data/COCO2017/mllm.json"
    words = ["--relative", "--output_json_path", str(below)]
    run_cli("data", "llava-to-mllm", *words, cwd=tmp_path, check=0)
    assert read_samples([below], 0)[0].images[0].samefile(image)
    written = tmp_path / "data/mllm_format_llava_instruct_data.json"
    with pytest.raises(DatasetError, match=r"1\.jpg is missing"):
        read_samples([written], 0)
    monkeypatch.chdir(tmp_path)
    assert read_samples([written], 0)[0].images[0].samefile(image)


def test_a_share_for_validation_is_drawn_once(tmp_path: Path) -> None:
    samples = read_samples([mixed(tmp_path)], 0)
    train, check = split(samples, 0.34, 3)
    assert len(check) == 2
    assert {s.name for s in train} | {s.name for s in check} == {s.name for s in samples}
    assert split(samples, 0.34, 3) == (train, check)
    with pytest.raises(RequestError, match="samples for validation"):
        split(samples, 0.01, 3)


def test_the_order_is_the_asked_one_and_every_sample_comes(
    speaker: Speaker, tmp_path: Path
) -> None:
    samples = read_samples([talking.write_data(tmp_path)], 0)

    def order(kind: SampleOrder, seed: int = 0) -> list[str]:
        feed = Feed(speaker, samples, 1, 1, kind, seed)
        steps = [feed.step(i)[0] for i in range(8)]
        return [speaker.words(b.ids[b.labels != IGNORED].tolist()).strip() for b in steps]

    colours = list(talking.COLOURS)
    assert order("file") == colours * 2
    assert order("once") == [*colours, *[""] * 4]  # an evaluation counts each once
    assert order("seed", 1) == order("seed", 1)
    assert sorted(order("seed", 1)[:4]) == sorted(order("seed", 1)[4:]) == sorted(colours)
    assert len({tuple(order("seed", seed)) for seed in range(5)}) > 1
    # MindSpeed-MM's sampler: a permutation that the number of the pass alone decides
    drawn = [torch.randperm(4, generator=torch.Generator().manual_seed(e)) for e in range(2)]
    assert order("epoch", 7) == [colours[i] for some in drawn for i in some.tolist()]


def test_replicas_share_the_micro_batches_of_a_step(speaker: Speaker, tmp_path: Path) -> None:
    samples = read_samples([talking.write_data(tmp_path)], 0)
    whole = Feed(speaker, samples, 1, 4)
    parts = [Feed(speaker, samples, 1, 4, share=Share(number, 2)) for number in range(2)]
    for step in range(3):
        dealt = [part.step(step) for part in parts]
        for number, one in enumerate(whole.step(step)):
            other = dealt[number % 2][number // 2]
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.pixels, other.pixels)


Break = Callable[[list[Any]], object]
BROKEN: dict[str, tuple[Break, str]] = {
    "no messages": (lambda items: items[17].pop("messages"), "entry 17 has no messages"),
    "messages are no list": (
        lambda items: items[17].update(messages="Hi"),
        "entry 17 has no messages",
    ),
    "an unknown role": (
        lambda items: items[17]["messages"][0].update(role="teacher"),
        "entry 17 has a message of role 'teacher'",
    ),
    "content is a number": (
        lambda items: items[17]["messages"][1].update(content=3),
        "entry 17 has a message of role 'assistant'",
    ),
    "content is a list": (
        lambda items: items[17]["messages"][0].update(content=[{"type": "text", "text": "Hi"}]),
        "entry 17 has a message of role 'user' without text",
    ),
    "no answer": (lambda items: items[17]["messages"].pop(), "entry 17 has nothing to learn"),
    "images is a number": (lambda items: items[17].update(images=3), "entry 17: images is 3"),
    "a folder's name is missing": (
        lambda items: items[17].update(images=[""]),
        "entry 17: images is",
    ),
    "a picture is missing": (
        lambda items: items[17].update(images=["gone.png"]),
        "entry 17: .*gone.png is missing",
    ),
    "an entry is a list": (lambda items: items.__setitem__(17, []), "entry 17 has no messages"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_is_named(name: str, tmp_path: Path) -> None:
    talking.write_data(tmp_path)
    spoil, expected = BROKEN[name]
    items = [talking.talk("<image>Which?", "red", images=["red.png"]) for _ in range(20)]
    spoil(items)
    (tmp_path / "data.json").write_text(json.dumps(items))
    with pytest.raises(DatasetError, match=expected):
        read_samples([tmp_path / "data.json"], 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[{}, {", "is not valid JSON"), ('{"messages": []}', "line 1 has no messages"),
     ("3", "holds no list"), ("[]", "at least one"),
     ("[" * 100000, "is not valid JSON"), ("\x00\xff", "is not valid JSON")],
    ids=["cut off", "an object", "a number", "empty", "deep", "binary"],
)  # fmt: skip
def test_a_broken_file_is_named(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DatasetError, match=expected):
        read_samples([tmp_path / "data.json"], 0)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (
            talking.talk("<image><image>?", "a", images=["red.png"]),
            "has 2 <image> in its text and 1",
        ),
        (
            talking.talk("<image>?", "a", images=["red.png", "blue.png"]),
            "and only 1 <image> in its text",
        ),
        (talking.talk("<image>?", "a", images=["data.json"]), "not a picture"),
        (talking.talk("<audio>?", "a", audios=["red.png"]), "cannot be decoded|needs a decoder"),
        (talking.talk("<video>?", "a", videos=["data.json"]), "be decoded|needs a decoder"),
        (talking.talk("word " * 200, "a"), "tokens"),
        (talking.talk("<image>?", "a", images=["wide.png"]), "a picture of 900 x 4 pixels"),
        (talking.talk("<image>?", "a", images=["deep.png"]), "8 bits for each colour"),
        (talking.talk("half \ud800", "a"), "is not valid text"),
        (talking.talk("see <IMG_CONTEXT>?", "a"), ""),
    ],
)
def test_a_sample_that_cannot_be_encoded_is_named(
    item: dict[str, object], expected: str, speaker: Speaker, tmp_path: Path
) -> None:
    talking.write_data(tmp_path)
    Image.new("RGB", (900, 4)).save(tmp_path / "wide.png")
    Image.new("I;16", (56, 56), 40000).save(tmp_path / "deep.png")  # white, if it were cut off
    (tmp_path / "data.json").write_text(json.dumps([item]))
    if not expected:  # InternVL's word means nothing to Omni
        feed = Feed(speaker, read_samples([tmp_path / "data.json"], 0), 1, 1, "once")
        assert torch.is_tensor(feed.step(0)[0].ids)
        return
    with pytest.raises(DatasetError, match=expected) as caught:
        Feed(speaker, read_samples([tmp_path / "data.json"], 0), 1, 1, "once").step(0)
    assert "entry 0" in caught.value.what


def test_a_placeholder_of_the_tokenizer_in_a_text_is_refused(tmp_path: Path) -> None:
    hf = talking.make("intern-qwen2", tmp_path / "hf")
    speaker = Speaker(architecture(hf), hf)
    item = talking.talk("see <IMG_CONTEXT>?", "a")
    (tmp_path / "data.json").write_text(json.dumps([item]))
    (sample,) = read_samples([tmp_path / "data.json"], 0)
    with pytest.raises(RequestError, match="a placeholder of the tokenizer"):
        speaker.batch(sample, answer=False)


# --------------------------------------------------------------------------------- bad samples
def spoiled(folder: Path) -> Path:
    """Eight samples: one picture cut off, one damaged inside, one missing, one place too many."""
    talking.write_data(folder)
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    noise.save(folder / "torn.png")
    raw = bytearray((folder / "torn.png").read_bytes())
    raw[200:260] = bytes(60)  # its end is that of a whole one
    (folder / "torn.png").write_bytes(raw)
    names = ["red.png", "cut.jpg", "green.png", "torn.png", "blue.png", "gone.png", "black.png"]
    items = [talking.talk("<image>?", name.partition(".")[0], images=[name]) for name in names]
    items.append(talking.talk("<image><image>?", "two", images=["red.png"]))
    path = folder / "spoiled.json"
    path.write_text(json.dumps(items))
    return path


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are too many files to decode before the first step."""
    monkeypatch.setattr(dataset, "Checks", partial(Checks, decoding=-1))


def test_bad_samples_are_counted_named_and_left_out(
    speaker: Speaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    later(monkeypatch)
    samples, _ = Data((SampleSource((spoiled(tmp_path),)),)).read(0, said.append)
    text = "\n".join(said)
    assert "2 of 8 samples are left out" in text  # before the first step: missing, and places
    assert "entry 5: " in text
    assert "gone.png is missing" in text
    assert "entry 7 has 2 <image> in its text and" in text
    assert "1 of 6 samples are left out" in text  # and the one that ends too early
    assert "cut.jpg: " in text
    said.clear()
    feed = Feed(speaker, samples, 1, 6, "file", say=said.append)
    learnt = [speaker.words(b.ids[b.labels != IGNORED].tolist()).strip() for b in feed.step(0)]
    # the turn of a bad one goes to the next that is good
    assert learnt == ["red", "green", "green", "blue", "blue", "black"]
    assert len(said) == 1  # what was named before is not named again
    assert "torn.png" in said[0]
    assert "left out, 2 so far" in said[0]
    assert len(feed.bad) == 2


def test_what_is_damaged_inside_is_found_before_the_first_step(tmp_path: Path) -> None:
    said: list[str] = []
    samples, _ = Data((SampleSource((spoiled(tmp_path),)),)).read(0, said.append)
    assert "warning: 2 of 6 samples are left out:" in said
    assert [s.fault != "" for s in samples] == [False, True, False, True, False, False]
    assert all(s.looked for s in samples)


def test_with_strict_the_first_bad_sample_is_an_error(
    speaker: Speaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spoiled(tmp_path)
    with pytest.raises(DatasetError, match=r"entry 5: .*gone\.png is missing"):
        Data((SampleSource((path,)),), strict=True).read(0, print)
    items = json.loads(path.read_text())
    path.write_text(json.dumps(items[:5]))
    with pytest.raises(DatasetError, match=r"entry 1: .*cut\.jpg"):
        Data((SampleSource((path,)),), strict=True).read(0, print)
    path.write_text(json.dumps([items[0], items[3]]))
    with pytest.raises(DatasetError, match=r"entry 1: .*torn\.png"):
        Data((SampleSource((path,)),), strict=True).read(0, print)
    later(monkeypatch)
    samples, _ = Data((SampleSource((path,)),), strict=True).read(0, print)
    with pytest.raises(DatasetError, match=r"entry 1: .*torn\.png"):
        Feed(speaker, samples, 1, 2, "file", strict=True).step(0)


def test_files_are_decoded_in_the_background_in_the_order_of_their_turns(
    tmp_path: Path,
) -> None:
    found = read_source(SampleSource((spoiled(tmp_path),))).samples
    inspection = BackgroundCheck(found, [5, 4, 3, 2, 1, 0], look_at_pictures)
    inspection.start()
    told: dict[int, str] = {}
    until = time.monotonic() + 60
    while len(told) < 2 and time.monotonic() < until:
        told |= inspection.news()
        time.sleep(0.01)
    assert list(told) == [3, 1]
    assert "spoiled.json, entry 3: " in told[3]
    assert "torn.png: " in told[3]


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_sample_is_named_once_however_it_is_found(
    strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background or at its turn, whichever comes first."""
    later(monkeypatch)
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[4]", "[3]")
    items = json.loads(spoiled(tmp_path).read_text())
    (tmp_path / "late.json").write_text(json.dumps([*[items[0]] * 8, items[3]]))
    words = ("--mm_dir", mm, "--hf_dir", hf, "--data", tmp_path / "late.json", "--order", "file")
    more = ("--save", tmp_path / "save", "--train_iters", "10", *(["--strict"] if strict else []))
    done = run_cli("finetune", *words, *more, check=3 if strict else 0)
    assert "the others are while it trains" in done.stderr
    assert done.stderr.count("torn.png: ") == 1


def test_an_evaluation_counts_no_sample_twice(speaker: Speaker, tmp_path: Path) -> None:
    samples, _ = Data((SampleSource((spoiled(tmp_path),)),)).read(0, lambda said: None)
    batches = Feed(speaker, samples, 1, 6, "once").step(0)
    counted = [bool((b.labels != IGNORED).any()) for b in batches]
    assert counted == [True, False, True, False, True, True]


def test_looking_at_files_has_an_end(tmp_path: Path) -> None:
    said: list[str] = []
    samples = read_samples([talking.write_data(tmp_path)], 0)
    assert Checks(ends=-1, decoding=-1).checked(samples, said.append) == samples
    assert said == [
        "note: pictures of 0 of 4 samples were looked at so far",
        "note: the files of 0 samples were decoded so far; the others are while it trains",
    ]


def test_encoded_samples_stay_while_there_is_room(speaker: Speaker, tmp_path: Path) -> None:
    samples = read_samples([talking.write_data(tmp_path)], 0)
    one = Encoder(speaker, samples).get(0)
    assert isinstance(one, Batch)
    room = int(2.5 * nbytes(one))
    encoder = Encoder(speaker, samples, threads=2, room=room)
    for number in (0, 1, 2, 3, 0):
        encoder.ask(range(4))
        found = encoder.get(number)
        assert isinstance(found, Batch)
        assert encoder.held <= room
    same = encoder.get(0)
    assert isinstance(same, Batch)
    assert torch.equal(same.pixels, one.pixels)


LLAVA = '[{"image": IMAGE, "conversations": [{"from": "human", "value": "<image>Q"}, ANSWER]}]'
LLAVA = LLAVA.replace("ANSWER", '{"from": "gpt", "value": "A"}')
DIALECTS: dict[str, tuple[str, str]] = {
    "mllm": ("a.json", json.dumps([talking.talk("<image>Q", "A", images=["red.png"])])),
    "JSON lines": (
        "a.jsonl",
        "\n\n".join(json.dumps(talking.talk("<image>Q", "A", images=["red.png"])) for _ in "12"),
    ),
    "LLaVA": ("a.json", LLAVA.replace("IMAGE", '"red.png", "id": "1"')),
    "LLaVA, a list": ("a.json", LLAVA.replace("IMAGE", '["red.png"]')),
    "Qwen-VL": (
        "a.json",
        '[{"id": "1", "conversations": [{"from": "user", "value": "<img>red.png</img>Q"},'
        ' {"from": "assistant", "value": "A"}]}]',
    ),
    "InternVL": ("a.jsonl", LLAVA.replace("IMAGE", '"red.png", "id": 0, "width": 5')[1:-1]),
    "ms-swift": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant",'
        ' "content": "A"}], "images": [{"path": "red.png"}]}',
    ),
    "unmarked": ("a.json", json.dumps([talking.talk("Q", "A", images=["red.png"])])),
    "a lone file": (
        "a.json",
        '[{"images": "red.png", "messages": [{"role": "user", "content": "<image>Q"},'
        ' {"role": "assistant", "content": "A"}]}]',
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_the_same_conversation(name: str, tmp_path: Path) -> None:
    talking.write_data(tmp_path)
    file, text = DIALECTS[name]
    (tmp_path / file).write_text(text)
    found = read_source(SampleSource((tmp_path / file,)))
    assert not found.faults
    for sample in found.samples:
        assert list(sample.messages) == [("user", "<image>Q"), ("assistant", "A")]
        assert sample.images == [tmp_path / "red.png"]
    assert found.unread == ({"width"} if name == "InternVL" else set())


def test_a_line_that_is_no_json_is_left_out(tmp_path: Path) -> None:
    good = json.dumps(talking.talk("Q", "A"))
    (tmp_path / "a.jsonl").write_text(f"{good}\n{good[:20]}\n{good}\n")
    found = read_source(SampleSource((tmp_path / "a.jsonl",)))
    assert len(found.samples) == 2
    assert "line 2 is not valid JSON" in found.faults[0].what
    assert found.notes()[0] == "warning: 1 of 3 samples are left out:"
