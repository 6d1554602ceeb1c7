"""What lies beside the weights: each file is copied, or named with the reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import layout, refused
from inprocess import call, to_hf, to_mm
from mmconvert.formats.hf.sides import side_files
from mmconvert.playground.checkpoints import make_hf
from mmread import INDEX, MANIFEST, files_in

MODEL = "qwen2vl-2b"
Edit = Callable[[Path], object]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_hf(MODEL, tmp_path / "hf", shards=1, layers=1, vit_layers=1)


def put(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def back(hf: Path, *flags: str) -> tuple[Path, str]:
    """To MM and back: the folder, and what was said (the second time), as one line."""
    mm, out = hf.with_name("mm"), hf.with_name("back")
    to_mm(MODEL, hf, mm)
    done = to_hf(MODEL, mm, hf, out, *flags)
    return out, " ".join(done.stderr.split())


def missing(want: set[str], got: Path) -> set[str]:
    return want - files_in(got)


# ---------------------------------------------------------------------------------- leftovers
LEFT: dict[str, tuple[str, ...]] = {
    "what downloads leave behind": (
        *(".msc", ".mdl", ".mv", "._____temp/tokenizer.json", "vocab.json.incomplete"),
        *(".cache/huggingface/.gitignore", "merges.txt.aria2", ".hfd/repo_metadata.json"),
        *("tokenizer.json.lock", "README.md.crdownload", ".DS_Store", "._config.json"),
    ),
    "what training leaves behind": (
        *("checkpoint-500/config.json", "checkpoint-500/model.safetensors", "trainer_state.json"),
        *("runs/Nov26/events.out.tfevents.1.host.0", "optimizer.pt", "scheduler.pt", "latest"),
        *("rng_state_0.pth", "training_args.bin", "zero_to_fp32.py", "nohup.out", "train.log"),
        *("global_step12/mp_rank_00_model_states.pt", "wandb/run-1/files/config.yaml"),
        *("optimizer.bin", "random_states_0.pkl", "train_results.json", "scaler.pt"),
        *("pytorch_model_fsdp_0/__0_0.distcp", "trainer_log.jsonl", "training_loss.png"),
    ),
    "an adapter, which is not applied": ("adapter_config.json", "adapter_model.safetensors"),
    "other weights, which are not read": (
        *("pytorch_model.bin", "consolidated.00.pth", "tf_model.h5", "model-q4.gguf"),
        "pytorch_model.bin.index.json",
    ),
    "folders with weights of their own": ("onnx/config.json", "onnx/model.onnx", "lora/a.json"),
    "version control and caches": (".git/config", "code.pyc", "__pycache__/x.pyc"),
}
KEPT = (
    *("spk_dict.pt", "voices/chelsie.pt", "assets/logo.bin", "chat_template.jinja", "latest.md"),
    *(".gitattributes", "modeling_tiny.py", "checkpoint.md", "runs.json", "model_card/README.md"),
)


@pytest.mark.parametrize("why", LEFT)
def test_leftovers_are_named_and_not_copied(why: str, hf: Path) -> None:
    want = files_in(hf) | {*KEPT}
    put(hf, *KEPT, *LEFT[why])
    if "lora/a.json" in LEFT[why]:
        put(hf, "lora/adapter_model.bin")
    out, said = back(hf, "--json")
    assert files_in(out) - {MANIFEST} == want
    assert f"not copied ({why}): " in said


def test_json_names_them_all(hf: Path) -> None:
    names = [f"trainer-{i}.log" for i in range(12)]
    put(hf, *names, "runs/a", ".msc")
    to_mm(MODEL, hf, hf.with_name("mm"))
    done = to_hf(MODEL, hf.with_name("mm"), hf, hf.with_name("back"), "--json", "--dry-run")
    assert json.loads(done.stdout)["not_copied"] == {
        "what downloads leave behind": [".msc"],
        "what training leaves behind": [*sorted(names), "runs/"],
    }
    assert sum("not copied" in note for note in json.loads(done.stdout)["notes"]) == 2


def test_each_leftover_has_its_reason(hf: Path) -> None:
    for why, names in LEFT.items():
        for name in (name for name in names if "/" not in name):
            put(hf, name)
            assert side_files(hf, {"model.safetensors"}).left == {why: [name]}
            (hf / name).unlink()


def test_the_speakers_of_omni_come_back(tmp_path: Path) -> None:
    """transformers' Qwen2_5OmniForConditionalGeneration refuses a folder without them."""
    model = "qwen2.5omni-7b"
    hf = make_hf(model, tmp_path / "hf", layers=1, vit_layers=1, audio_layers=1)
    torch.save({"Chelsie": {"bos_token": 1, "cond": torch.ones(1, 4)}}, hf / "spk_dict.pt")
    to_mm(model, hf, tmp_path / "mm", *layout("[1]", "[1]", 1, "audio_pp_layers=[1]"))
    to_hf(model, tmp_path / "mm", hf, tmp_path / "back")
    assert (tmp_path / "back/spk_dict.pt").read_bytes() == (hf / "spk_dict.pt").read_bytes()


# -------------------------------------------------------------------------------------- links
def outside(hf: Path) -> Path:
    """A folder that is none of the model's business."""
    folder = hf.with_name("home")
    put(folder, "id_rsa", "keys/a", "keys/deep/b", "config.json", text='{"auths": {}}')
    return folder


LINKS: dict[str, Edit] = {
    "folder": lambda hf: (hf / "assets").symlink_to("../home/keys"),
    "absolute folder": lambda hf: (hf / "assets").symlink_to((hf / "../home").resolve()),
    "parent": lambda hf: (hf / "assets").symlink_to(".."),
    "root": lambda hf: (hf / "assets").symlink_to("/"),
    "folder in a folder": lambda hf: (
        (hf / "examples/assets").symlink_to("../../home"),
        (hf / "assets").symlink_to("examples/assets"),
    ),
    "file": lambda hf: (hf / "tokenizer.json").symlink_to("../home/id_rsa"),
    "file of that name": lambda hf: (hf / "id_rsa").symlink_to("../home/id_rsa"),
    "file by way of a folder": lambda hf: (
        (hf / "examples/id").symlink_to("../../home/id_rsa"),
        (hf / "id").symlink_to("examples/id"),
    ),
}


@pytest.mark.parametrize("link", LINKS)
def test_links_out_of_the_folder_are_not_followed(link: str, hf: Path) -> None:
    want = files_in(hf)
    outside(hf)
    LINKS[link](hf)
    out, said = back(hf)
    assert files_in(out) - {MANIFEST} == want
    assert "not copied (links that leave the folder)" in said


def test_links_within_the_folder_are_followed(hf: Path) -> None:
    put(hf, "assets/a.txt", text="a")
    (hf / "b.txt").symlink_to("assets/a.txt")
    (hf / "linked").symlink_to("examples")  # the same files again: once is enough
    (hf / "assets/circle").symlink_to("..")
    out, said = back(hf)
    assert (out / "b.txt").read_text() == "a" and not (out / "b.txt").is_symlink()
    assert (out / "assets/a.txt").is_file()
    assert "links that leave" not in said


def test_a_tokenizer_shared_by_a_link(hf: Path) -> None:
    """To the file of the same name in another model's folder; config.json itself in any way."""
    other = hf.with_name("base")
    shutil.copytree(hf, other)
    for name in ("vocab.json", "config.json"):
        (hf / name).unlink()
        (hf / name).symlink_to(Path("..", "base", name))
    out, said = back(hf)
    for name in ("vocab.json", "config.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes()
    assert "links that leave" not in said


def test_what_is_no_file_is_named(hf: Path) -> None:
    (hf / "gone.json").symlink_to("nowhere")
    (hf / "loop").symlink_to("loop")
    os.mkfifo(hf / "pipe")
    _, said = back(hf)
    assert "3 entries of hf_dir not copied (links to nowhere, pipes and devices): " in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed(hf: Path) -> None:
    put(hf, "assets/a")
    to_mm(MODEL, hf, hf.with_name("mm"))
    (hf / "assets").chmod(0)
    out = hf.with_name("back")
    refused(to_hf(MODEL, hf.with_name("mm"), hf, out, check=None), 3, "assets", out=out)
    (hf / "assets").chmod(0o755)


def test_deep_folders(hf: Path) -> None:
    deep = "/".join("d" * 700)
    put(hf, f"{deep}/x.txt")
    out, _ = back(hf)
    assert (out / deep / "x.txt").is_file()


# ----------------------------------------------------------------------- the order of weights
def other_weights(hf: Path) -> dict[str, torch.Tensor]:
    return {name: t + 1 for name, t in load_file(hf / "model.safetensors").items()}


def adapter(folder: Path) -> None:
    """An adapter's two files."""
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 72)}
    save_file(lora, folder / "adapter_model.safetensors", {"format": "pt"})
    put(folder, "adapter_config.json", text='{"base_model_name_or_path": "Org/Base"}')


def as_bin(hf: Path) -> None:
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()


def sharded(hf: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, hf / name, {"format": "pt"})
    weight_map = {t: n for n, half in zip(names, halves, strict=True) for t in half}
    (hf / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


ORDER: dict[str, Edit] = {
    "an index with other files": lambda hf: sharded(hf, other_weights(hf)),
    "an index without files": lambda hf: put(hf, INDEX, text='{"weight_map": {"a": "b.json"}}'),
    "a pickle": lambda hf: torch.save(other_weights(hf), hf / "pytorch_model.bin"),
    "another name": lambda hf: save_file(other_weights(hf), hf / "extra.safetensors"),
    "the same of another variant": lambda hf: save_file(
        other_weights(hf), hf / "model.fp16.safetensors"
    ),
    "an index of a variant": lambda hf: put(hf, "model.safetensors.index.fp16.json"),
    "an adapter": adapter,
}


@pytest.mark.parametrize("beside", ORDER)
def test_model_safetensors_wins(beside: str, hf: Path) -> None:
    """As transformers chooses; what else lies there is named, and does not return."""
    plain = hf.with_name("plain")
    to_mm(MODEL, hf, plain)
    want = (hf / "model.safetensors").read_bytes()
    ORDER[beside](hf)
    done = to_mm(MODEL, hf, hf.with_name("mm"))
    call("verify", plain, hf.with_name("mm"))
    to_hf(MODEL, hf.with_name("mm"), hf, hf.with_name("back"))
    out = hf.with_name("back")
    assert (out / "model.safetensors").read_bytes() == want
    assert [p.name for p in out.iterdir() if "adapter" in p.name or "safetensors" in p.name] == [
        "model.safetensors"
    ]
    words = "is not applied" if beside == "an adapter" else "are not read"
    assert words in done.stderr


def test_a_part_of_the_model_is_not_taken_for_it(hf: Path) -> None:
    """transformers would start the rest from random numbers; the files of the index are whole."""
    tensors = load_file(hf / "model.safetensors")
    sharded(hf, tensors)
    some = {name: t for name, t in tensors.items() if name.startswith("visual.")}
    save_file(some, hf / "model.safetensors", {"format": "pt"})
    out = hf.with_name("mm")
    words = (f"holds {len(some)} of the {len(tensors)} tensors", "move", "model.safetensors away")
    refused(to_mm(MODEL, hf, out, check=None), 3, *words, out=out)
    found = json.loads(call("doctor", hf, "--json", check=3).stdout)
    assert found["findings"]
    (hf / "model.safetensors").unlink()
    to_mm(MODEL, hf, out)


def test_an_adapter_beside_the_text_model_is_named(hf: Path, tmp_path: Path) -> None:
    """llm_hf_dir too."""
    text = tmp_path / "text"
    text.mkdir()
    config = json.loads((hf / "config.json").read_text())
    part = {k: v for k, v in config.items() if k != "vision_config"}
    put(text, "config.json", text=json.dumps({**part, "model_type": "qwen2"}))
    tensors = load_file(hf / "model.safetensors")
    own = {name: t for name, t in tensors.items() if name.startswith("model.")}
    save_file(own, text / "model.safetensors", {"format": "pt"})
    adapter(text)
    flags = ("--cfg.common_model_config.llm_hf_dir", str(text))
    done = to_mm(MODEL, hf, tmp_path / "mm", *flags)
    assert f"an adapter in {text} is not applied" in " ".join(done.stderr.split())


def test_an_adapter_beside_a_pickle_is_not_the_model(hf: Path) -> None:
    to_mm(MODEL, hf, hf.with_name("plain"))
    as_bin(hf)
    adapter(hf)
    done = to_mm(MODEL, hf, hf.with_name("mm"))
    assert "an adapter in" in done.stderr
    call("verify", hf.with_name("plain"), hf.with_name("mm"))


def test_a_stray_file_beside_a_pickle_is_not_the_model(hf: Path) -> None:
    """transformers does not look for other names before it takes the pickle."""
    to_mm(MODEL, hf, hf.with_name("plain"))
    save_file(other_weights(hf), hf / "extra.safetensors")
    as_bin(hf)
    done = to_mm(MODEL, hf, hf.with_name("mm"))
    assert "are not read: extra.safetensors" in done.stderr
    call("verify", hf.with_name("plain"), hf.with_name("mm"))


def test_a_whole_pickle_wins_over_an_index_of_pickles(hf: Path) -> None:
    to_mm(MODEL, hf, hf.with_name("plain"))
    torch.save(other_weights(hf), hf / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(
        load_file(hf / "model.safetensors"), "pytorch_model-00001-of-00001.bin"
    )
    put(hf, "pytorch_model.bin.index.json", text=json.dumps({"weight_map": weight_map}))
    as_bin(hf)
    to_mm(MODEL, hf, hf.with_name("mm"))
    call("verify", hf.with_name("plain"), hf.with_name("mm"))


def test_weights_that_the_config_names(hf: Path) -> None:
    """transformers_weights: a name that we do not know is refused, not passed over."""
    config = json.loads((hf / "config.json").read_text())
    put(hf, "config.json", text=json.dumps({**config, "transformers_weights": "x.safetensors"}))
    save_file(other_weights(hf), hf / "x.safetensors")
    out = hf.with_name("mm")
    refused(to_mm(MODEL, hf, out, check=None), 3, "transformers_weights", "x.safetensors", out=out)


def test_doctor_says_that_an_adapter_is_not_applied(hf: Path) -> None:
    adapter(hf)
    done = call("doctor", hf, "--json")
    found = json.loads(done.stdout)["findings"]
    assert [f["id"] for f in found if f["id"] == "adapter-not-applied"] == ["adapter-not-applied"]
    assert "stray-weight-file" not in {f["id"] for f in found}
