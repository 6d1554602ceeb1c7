"""The command ``data``: what the reference scripts write, and what they lack."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import run_cli
from inprocess import call

Item = dict[str, Any]
PREFIX = "train2014/COCO_train2014_"


def turns(*values: str) -> list[Item]:
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def item(number: int, image: str | None, *values: str, **more: Any) -> Item:
    found: Item = {"id": f"{number:012}"}
    if image is not None:
        found["image"] = image
    return found | {"conversations": turns(*values)} | more


USUAL = [
    item(0, "a.jpg", "<image>\nWhat is this?", "A dog."),
    item(1, "b.jpg", "Was ist das für ein Hund?\n<image>", "Ein Labrador. 狗"),
    item(2, "gone.jpg", "<image>\nWho?", "No one."),
    item(
        3, "a.jpg", "<image>\nOne.\n<image>", "Two.", "And\n<image>\nthree?", "Three.", more=[1.5]
    ),
    item(4, "b.jpg", "Look: <image> there", "Yes \U0001f600."),
]
TEXT = item(5, None, "Just words?", "Just words.")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images in the places of both scripts; the tests run there."""
    monkeypatch.chdir(tmp_path)
    for root, prefix in (("data/COCO2017", "train2017/"), ("coco", PREFIX), ("mine", "")):
        for name in ("a.jpg", "b.jpg"):
            path = tmp_path / root / (prefix + name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    return tmp_path


def given(folder: Path, items: object, name: str = "in.json") -> str:
    (folder / name).write_text(json.dumps(items))
    return name


# What the two scripts do, as their documentation and runs show it.
def script_mllm(items: list[Item], folder: Path) -> bytes:
    out = []
    for one in copy.deepcopy(items):
        images = []
        if one.get("image"):
            images = [os.path.join("./data/COCO2017/train2017", one["image"])]
            if not (folder / images[0]).exists():
                continue
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[t["from"]], "content": t["value"]} for t in one["conversations"]]
        out.append({"images": images, "messages": messages})
    return json.dumps(out, ensure_ascii=False).encode()


def script_qwenvl(items: list[Item], folder: Path, user: str, assistant: str) -> bytes:
    out = []
    for one in copy.deepcopy(items):
        path = PREFIX + one.pop("image")
        if not (folder / "coco" / path).exists():
            continue
        picture = f"Picture 1: <img>{path}</img>\n"
        for turn in one["conversations"]:
            turn["from"] = {"human": user, "gpt": assistant}.get(turn["from"], turn["from"])
            if "<image>\n" in turn["value"]:
                turn["value"] = turn["value"].replace("<image>\n", picture)
            elif "\n<image>" in turn["value"]:
                turn["value"] = turn["value"].replace("\n<image>", picture)
        out.append(one)
    return json.dumps(out).encode()


def test_the_lines_of_the_guides_work_with_mm_convert_for_python(folder: Path) -> None:
    given(folder, USUAL)
    given(folder, USUAL, "data/llava_instruct_150k.json")
    call("examples/qwen2vl/llava_instruct_2_mllm_demo_format.py", check=0)
    assert len(json.loads(Path("data/mllm_format_llava_instruct_data.json").read_text())) == 4
    words = ["--data_path", "in.json", "--image_location", "coco", "--output_path", "out.json"]
    roles = ["--user_role_name", "user", "--assistant_role_name", "assistant"]
    call("data_convert.py", *words, *roles, check=0)
    first = (folder / "out.json").read_bytes()
    qwenvl("in.json", "--overwrite")
    assert (folder / "out.json").read_bytes() == first


def mllm(source: str, *flags: str, check: int = 0) -> Any:
    words = ["--llava_json_path", source, "--output_json_path", "out.json", *flags]
    return call("data", "llava-to-mllm", *words, check=check)


def qwenvl(source: str, *flags: str, check: int = 0) -> Any:
    words = ["--data_path", source, "--image_location", "coco", "--output_path", "out.json"]
    return call("data", "llava-to-qwenvl", *words, *flags, check=check)


def output(folder: Path) -> Any:
    return json.loads((folder / "out.json").read_text("utf-8"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ----------------------------------------------------------------------------------- the scripts
def test_mllm_is_what_the_script_writes(folder: Path) -> None:
    """With the script's own places, its arguments left out."""
    (folder / "data" / "llava_instruct_150k.json").write_text(json.dumps([*USUAL, TEXT]))
    done = run_cli("data", "llava-to-mllm", "--compat", cwd=folder, check=0)
    written = folder / "data" / "mllm_format_llava_instruct_data.json"
    assert written.read_bytes() == script_mllm([*USUAL, TEXT], folder)
    assert mode(written) == 0o600
    assert "5 of 6 items" in done.stdout
    assert "gone.jpg does not exist" in done.stderr
    run_cli("data", "llava-to-mllm", "--compat", cwd=folder, check=2)  # as it stops, too


def test_qwenvl_is_what_the_script_writes(folder: Path) -> None:
    odd = item(6, "a.jpg", "<image>\nHi", "Ho")
    odd["conversations"].append({"from": "system", "value": "\n<image>", "loss": False})
    source = given(folder, [*USUAL, odd])
    names = ["--user_role_name", "Nutzer", "--assistant_role_name", "bot"]
    qwenvl(source, *names, "--compat")
    expected = script_qwenvl([*USUAL, odd], folder, "Nutzer", "bot")
    assert (folder / "out.json").read_bytes() == expected
    assert b"f\\u00fcr ein Hund?Picture 1: <img>" in expected
    assert mode(folder / "out.json") == 0o750
    os.chmod(folder / "out.json", 0o666)
    qwenvl(source, "--compat")
    assert (folder / "out.json").read_bytes() == script_qwenvl(
        [*USUAL, odd], folder, "user", "assistant"
    )
    assert mode(folder / "out.json") == 0o666


def test_qwenvl_compat_stops_where_the_script_does(folder: Path) -> None:
    done = qwenvl(given(folder, [USUAL[0], TEXT]), "--compat", check=3)
    assert "item 1 has no image; the reference fails here" in done.stderr
    assert not (folder / "out.json").exists()


# ------------------------------------------------------------------------------ what they lack
def test_qwenvl_keeps_questions_apart_and_text_only_items(folder: Path) -> None:
    done = qwenvl(given(folder, [*USUAL, TEXT]))
    found = output(folder)
    assert [one["id"][-1] for one in found] == ["0", "1", "3", "4", "5"]
    first = found[1]["conversations"][0]
    picture = f"Picture 1: <img>{PREFIX}b.jpg</img>\n"
    assert first == {"from": "user", "value": f"{picture}Was ist das für ein Hund?"}
    assert found[-1]["conversations"] == [
        {"from": "user", "value": "Just words?"},
        {"from": "assistant", "value": "Just words."},
    ]
    assert found[2]["more"] == [1.5]
    assert all("image" not in one for one in found)
    assert mode(folder / "out.json") == 0o640
    assert done.stdout.splitlines() == [
        "wrote out.json: 5 of 6 items",
        "4 with an image, 1 text only, 1 left out, 1 question kept apart from its image",
    ]
    assert "warning: 1 item left out because their image is missing: item 2: coco/" in done.stderr
    assert "warning: 2 items in which <image> is left as it is" in done.stderr


def test_mllm_counts_tags_that_do_not_fit(folder: Path) -> None:
    done = mllm(given(folder, [*USUAL, TEXT]), "--json")
    found = json.loads(done.stdout)
    expected = {"read": 6, "written": 5, "images": 4, "text_only": 1, "mended": 0, "missing": 1}
    expected |= {"unused": 0, "untouched": 0, "tags": 1, "roles": 0}
    expected |= {"videos": 0, "audios": 0, "media": 0, "unread": 0}
    assert {k: v for k, v in found.items() if isinstance(v, int)} == expected
    assert found["examples"]["tags"] == ["item 3: 3 <image>, 1 images"]
    assert output(folder)[0]["images"] == ["./data/COCO2017/train2017/a.jpg"]
    assert (folder / "out.json").read_bytes() == script_mllm([*USUAL, TEXT], folder)


def asked(question: str, **files: object) -> dict[str, Any]:
    """An item with files under any keys."""
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": "A"}]
    return {"id": "1", **files, "conversations": said}


def lying(folder: Path) -> None:
    """Files beside the images, below the roots of both forms."""
    for root in ("data/COCO2017", "coco"):
        (folder / root).mkdir(parents=True, exist_ok=True)
        for name in ("v.mp4", "w.mp4", "s.wav"):
            (folder / root / name).write_bytes(b"x")


TWO = "<image>\n<image>\nQ"
SEVERAL: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "a list of images": (asked(TWO, image=["a.jpg", "b.jpg"]), {"images": ["a.jpg", "b.jpg"]}),
    "images": (asked(TWO, images=["a.jpg", "b.jpg"]), {"images": ["a.jpg", "b.jpg"]}),
    "both keys, alike": (
        asked("<image>\nQ", image="a.jpg", images=["a.jpg"]),
        {"images": ["a.jpg"]},
    ),
    "a list of one": (asked("<image>\nQ", image=["a.jpg"]), {"images": ["a.jpg"]}),
    "a video": (asked("<video>\nQ", video="v.mp4"), {"videos": ["v.mp4"]}),
    "videos": (asked("<video><video>Q", videos=["v.mp4", "w.mp4"]), {"videos": ["v.mp4", "w.mp4"]}),
    "a list of videos": (asked("<video>Q", video=["v.mp4"]), {"videos": ["v.mp4"]}),
    "a sound": (asked("<audio>\nQ", audio="s.wav"), {"audios": ["s.wav"]}),
    "an image and a video": (
        asked("<image>\n<video>\nQ", image="a.jpg", video="v.mp4"),
        {"images": ["a.jpg"], "videos": ["v.mp4"]},
    ),
}


@pytest.mark.parametrize(("item", "files"), SEVERAL.values(), ids=SEVERAL.keys())
def test_mllm_has_every_file_of_an_item(
    item: dict[str, Any], files: dict[str, list[str]], folder: Path
) -> None:
    lying(folder)
    done = mllm(given(folder, [item]), "--strict")
    (one,) = output(folder)
    for kind in ("images", "videos", "audios"):
        assert [Path(path).name for path in one.get(kind, [])] == files.get(kind, [])
    assert "warning" not in done.stderr and "1 text only" not in done.stdout
    assert one["messages"][0]["content"] == item["conversations"][0]["value"]


@pytest.mark.parametrize(("item", "files"), SEVERAL.values(), ids=SEVERAL.keys())
def test_qwenvl_has_every_picture_and_names_what_it_cannot(
    item: dict[str, Any], files: dict[str, list[str]], folder: Path
) -> None:
    lying(folder)
    done = qwenvl(given(folder, [item]), "--json")
    (one,) = output(folder)
    value = one["conversations"][0]["value"]
    for number, name in enumerate(files.get("images", []), 1):
        assert value.count(f"Picture {number}: <img>{PREFIX}{name}</img>\n") == 1
    others = {k for k in ("video", "videos", "audio", "audios") if k in item}
    assert {k: one[k] for k in others} == {k: item[k] for k in others}
    assert json.loads(done.stdout)["media"] == bool(others)
    assert ("cannot name" in done.stderr) == bool(others)
    assert json.loads(done.stdout)["text_only"] == 0
    if others:
        told = qwenvl(given(folder, [item]), "--overwrite").stdout
        assert "1 with videos or sounds, which stay in the item" in told
        qwenvl(given(folder, [item]), "--strict", "--overwrite", check=3)


WRONG_FILES = {
    "a number": (asked("Q", image=5), "image is 5"),
    "a list of numbers": (asked("Q", video=["v.mp4", 5]), "video is"),
    "an empty name": (asked("Q", images=["a.jpg", ""]), "images is"),
    "an object": (asked("Q", video={"path": "v.mp4"}), "video is"),
    "two keys that differ": (asked("Q", image="a.jpg", images=["b.jpg"]), "differ"),
    "a NUL": (asked("Q", audios=["s\0.wav"]), "audios is"),
}


@pytest.mark.parametrize(("item", "words"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_files_that_make_no_sense(item: dict[str, Any], words: str, folder: Path) -> None:
    lying(folder)
    for convert in (mllm, qwenvl):
        done = convert(given(folder, [item]), check=3)
        assert words in done.stderr and "item 0" in done.stderr


def test_files_that_are_counted(folder: Path) -> None:
    """Missing ones leave the item out; too few or too many places are told."""
    lying(folder)
    items = [asked("<video>", video="no.mp4"), asked("<video>", videos=["v.mp4", "w.mp4"])]
    items += [asked(TWO, image=["a.jpg", "no.jpg"]), asked("<video>\nwithout a video")]
    done = mllm(given(folder, items), "--json")
    found = json.loads(done.stdout)
    assert (found["missing"], found["tags"], found["videos"], found["written"]) == (2, 2, 1, 2)
    assert "no.mp4 does not exist" in done.stderr and "1 <video>, 2 videos" in done.stderr


def test_compat_says_what_the_script_does_not_read(folder: Path) -> None:
    lying(folder)
    done = mllm(given(folder, [asked("<video>\nQ", video="v.mp4"), *USUAL[:1]]), "--compat")
    assert "warning: 1 item with files under keys that the reference does not read" in done.stderr
    assert output(folder)[0]["images"] == []


@pytest.mark.parametrize(
    ("flags", "stored"),
    [
        (["--coco_path", "mine", "--image_prefix", ""], "mine/a.jpg"),
        (["--coco_path", "mine", "--image_prefix", "", "--relative"], "./a.jpg"),
        (["--coco_path", "data/COCO2017", "--relative"], "./train2017/a.jpg"),
        (
            ["--coco-path=data/COCO2017/train2017/", "--image-prefix="],
            "data/COCO2017/train2017/a.jpg",
        ),
    ],
)
def test_any_root_for_mllm(folder: Path, flags: list[str], stored: str) -> None:
    mllm(given(folder, USUAL[:1]), *flags)
    assert output(folder)[0]["images"] == [stored]


def test_any_root_for_qwenvl(folder: Path) -> None:
    qwenvl(given(folder, USUAL[:1]), "--image_location", "mine", "--image_prefix", "")
    value = output(folder)[0]["conversations"][0]["value"]
    assert value == "Picture 1: <img>a.jpg</img>\nWhat is this?"
    absolute = str(folder / "mine" / "b.jpg")
    source = given(folder, [item(0, absolute, "<image>\nWhat?", "That.")])
    qwenvl(source, "--image_prefix", "", "--overwrite")
    assert absolute in output(folder)[0]["conversations"][0]["value"]


def test_missing_images(folder: Path) -> None:
    none = given(folder, [USUAL[2], USUAL[2]])
    done = mllm(none, check=3)
    assert "items with images: 2, and none of the images is there" in done.stderr
    assert not (folder / "out.json").exists()
    done = mllm(none, "--skip-missing")
    assert output(folder) == []
    some = given(folder, USUAL)
    done = mllm(some, "--strict", "--overwrite", check=3)
    assert "item 2: ./data/COCO2017/train2017/gone.jpg does not exist" in done.stderr
    assert output(folder) == []
    done = mllm(some, "--strict", "--skip-missing", check=2)
    assert "--strict and --skip-missing exclude each other" in done.stderr


@pytest.mark.parametrize(
    ("command", "one", "words"),
    [
        (mllm, USUAL[3], "item 0: 3 <image>, 1 images"),
        (mllm, item(0, None, "<image>\nWhat?", "?"), "item 0: 1 <image>, 0 images"),
        (qwenvl, USUAL[4], "item 0: 'Look: <image> there'"),
        (qwenvl, item(0, "a.jpg", "What?", "?"), "item 0: no <image> in any value"),
        (qwenvl, item(0, None, "<image>\nWhat?", "?"), r"item 0: '<image>\nWhat?'"),
        (
            qwenvl,
            {"image": "a.jpg", "conversations": [{"from": "bot", "value": "<image>\n"}]},
            "item 0: turn 0 is from 'bot'",
        ),
    ],
)
def test_what_strict_forbids(
    folder: Path, command: Callable[..., Any], one: Item, words: str
) -> None:
    source = given(folder, [one])
    assert words in command(source).stderr  # a warning
    done = command(source, "--strict", "--overwrite", check=3)
    assert words in done.stderr
    assert "leave out --strict" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file is empty"),
        ('{"id": 1}', "begins with '{'"),
        ('[{"conversations": []}, {"id": 1, ', "item 1 is not valid JSON"),
        ('[{"id": 1}]', "item 0: has no conversations"),
        ('[{"conversations": {}}]', "item 0: conversations is not a list"),
        ('[{"conversations": ["hi"]}]', "item 0, turn 0: 'hi'"),
        ('[{"conversations": [{"from": "gpt"}]}]', "item 0, turn 0: {'from': 'gpt'}"),
        ('[{"conversations": [{"from": "gpt", "value": 1}]}]', "item 0, turn 0"),
        ('[{"image": [["a.jpg"]], "conversations": []}]', "item 0: image is [['a.jpg']]"),
        ('[{"image": 0, "conversations": []}]', "item 0: image is 0"),
        ('[{"image": "a\\u0000", "conversations": []}]', r"item 0: image is 'a\x00'"),
    ],
)
@pytest.mark.parametrize("command", [mllm, qwenvl])
def test_damaged_annotations(
    folder: Path, command: Callable[..., Any], content: str, words: str
) -> None:
    (folder / "in.json").write_text(content)
    done = command("in.json", "--json", check=3)
    error = json.loads(done.stdout)
    assert words in error["what"]
    assert "in.json" in error["what"]
    assert error["error"] == "DatasetError"
    assert not (folder / "out.json").exists()
    assert not list(folder.glob(".*"))


def test_mllm_knows_two_roles(folder: Path) -> None:
    one = {"conversations": [{"from": "system", "value": "Be kind."}]}
    done = mllm(given(folder, [TEXT, one]), check=3)
    assert "item 1, turn 0: from is 'system'" in done.stderr


def test_half_a_surrogate_pair(folder: Path) -> None:
    """The ASCII form can hold it, the other cannot."""
    source = given(folder, [item(0, None, "\ud800", "?")])
    qwenvl(source)
    assert output(folder)[0]["conversations"][0]["value"] == "\ud800"
    done = mllm(source, "--overwrite", check=3)
    assert "item 0 holds half of a surrogate pair" in done.stderr


def test_names_that_would_break_the_tags(folder: Path) -> None:
    (folder / "mine" / "x<").mkdir()
    name = "x</img>.jpg"
    (folder / "mine" / name).parent.mkdir(exist_ok=True)
    (folder / "mine" / name).write_bytes(b"")
    source = given(folder, [item(0, name, "<image>\nWhat?", "?")])
    flags = ["--image_location", "mine", "--image_prefix", ""]
    done = qwenvl(source, *flags, check=3)
    assert "a name without <img>, </img> or a break" in done.stderr


def test_the_output_is_safe(folder: Path) -> None:
    source = given(folder, USUAL[:1])
    mllm(source)
    done = mllm(source, check=2)
    assert "out.json exists" in done.stderr
    mllm(source, "--overwrite", "--quiet")
    words = ["--llava_json_path", source, "--output_json_path", source, "--overwrite"]
    done = run_cli("data", "llava-to-mllm", *words, cwd=folder, check=2)
    assert "is the input" in done.stderr
    assert json.loads((folder / source).read_text()) == USUAL[:1]
    done = mllm("nothing.json", "--overwrite", check=3)
    assert "nothing.json: No such file" in done.stderr


def test_help_and_wrong_words(folder: Path) -> None:
    assert run_cli("data", cwd=folder, check=2).stdout.startswith("usage: mm-convert data")
    for name in ("llava-to-mllm", "llava-to-qwenvl"):
        assert name in run_cli("data", "-h", check=0).stdout
        shown = run_cli("data", name, "-h", check=0).stdout
        assert "default:" in shown and f"mm-convert data {name} --" in shown
    done = run_cli("data", "llava-to-lava", check=2)
    assert "there is no conversion 'llava-to-lava'" in done.stderr
    assert "--stric" in run_cli("data", "llava-to-mllm", "--stric", check=2).stderr
    assert "data" in run_cli("-h", check=0).stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells its peak there")
def test_large_files_take_little_memory(folder: Path) -> None:
    """60 MB of annotations; the whole list would take several times as much."""
    one = json.dumps(item(0, "a.jpg", "<image>\n" + "What? " * 40, "That. " * 40))
    with (folder / "in.json").open("w") as file:
        file.write("[" + ",\n".join([one] * 100_000) + "]")
    assert (folder / "in.json").stat().st_size > 50_000_000
    code = (
        "import re, sys\n"
        "from mmconvert.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "with open('/proc/self/status') as file:\n"
        "    print(re.search(r'VmHWM:\\s*(\\d+)', file.read())[1], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    (folder / "measure.py").write_text(code)
    words = ["data", "llava-to-mllm", "--llava_json_path", "in.json", "--output_json_path", "out"]
    done = subprocess.run(
        [sys.executable, "measure.py", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "100000 of 100000 items" in done.stdout
    assert int(done.stderr.split()[-1]) < 80_000  # KiB, most of it the interpreter and tyro
