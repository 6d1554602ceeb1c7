"""The guides' finetune commands: ``mm-convert finetune`` for ``torchrun ... pretrain_vlm.py``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import guidefiles
import talking
import tinyfamilies
from cli import run_cli
from commands import rank_files
from mmconvert.runtime import dataset
from mmconvert.runtime.checking import Checks
from mmconvert.runtime.inferencejson import read_inference
from mmconvert.runtime.journal import Interval, Line


def trained(save: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (save / "loss.jsonl").read_text().splitlines()]


def changed(before: Path, after: Path) -> set[str]:
    """Beginnings of the MM names of the tensors that learnt."""
    found: set[str] = set()
    for rank, path in rank_files(after).items():
        old = torch.load(rank_files(before)[rank], weights_only=True)["model"]
        new = torch.load(path, weights_only=True)["model"]
        names = [n for n in new if isinstance(new[n], torch.Tensor)]
        found |= {
            ".".join(n.split(".")[:2])
            for n in names
            if not torch.equal(new[n], old[n].to(new[n].dtype))
        }
    return found


class Guide:
    """A folder as the tutorial leaves it: the model in both forms, data, and the edited files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hf = talking.make("qwen2_vl", folder / "hf")
        tinyfamilies.convert("qwen2_vl", self.hf, folder / "mm", "[0,4]", "[2,1]")
        talking.write_data(folder, "mllm.json")
        guidefiles.data_json(folder, "./mllm.json")
        guidefiles.model_json(folder, [2, 1], [0, 4])


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Guide:
    return Guide(tmp_path_factory.mktemp("guide"))


@pytest.mark.slow
def test_qwen2vl_trains_by_its_script(guide: Guide) -> None:
    words = guidefiles.script("--enable-dummy-optimizer", "--log-tps", pp=2, iters=6)
    done = run_cli("finetune", *words, "--lr", "1e-2", cwd=guide.folder, check=0)
    assert done.stderr.count("no effect here: --use-mcore-models") == 1
    assert "unrecognized" not in done.stderr.lower()
    lines = trained(guide.folder / "save_dir")
    assert lines[-1]["loss"] < lines[0]["loss"]
    said = [line for line in done.stdout.splitlines() if "elapsed time per iteration" in line]
    times = [float(line.split(":")[4].split("|")[0]) for line in said]  # as the script's awk does
    assert len(times) == 6
    assert min(times) > 0
    assert "consumed samples:           12 |" in said[-1]
    assert f"loss: {lines[-1]['loss']:.6E} |" in said[-1]
    tokens = [float(line.split("tokens per sample:")[1].split("|")[0]) for line in said]
    assert all(20 < each < 200 for each in tokens)
    what = {"text_decoder.decoder", "text_decoder.embedding", "text_decoder.output_layer"}
    assert changed(guide.folder / "mm", guide.folder / "save_dir") == what  # the rest is frozen


REFUSED = {
    "another tp": (["--tensor-model-parallel-size", "2"], "tp_size 2"),
    "another pp": (["--pipeline-model-parallel-size", "1"], "PP 1 and VPP 1"),
    "another ep": (["--expert-model-parallel-size", "2"], "ep_size 2"),
    "a loss of routers": (
        ["--moe-aux-loss-coeff", "0.01"],
        "--moe-aux-loss-coeff 0.01 is not supported here",
    ),
    "context parallel": (
        ["--context-parallel-size", "2"],
        "--context-parallel-size 2 is not supported here",
    ),
    "fsdp": (["--use-torch-fsdp2"], "--use-torch-fsdp2 is not supported here"),
    "lora": (["--lora-apply-modules", "linear_qkv", "linear_proj"], "--lora-apply-modules"),
    "another form": (
        ["--ckpt-format", "torch_dist"],
        "--ckpt-format torch_dist is not supported here",
    ),
    "mindspore": (
        ["--ai-framework", "mindspore"],
        "--ai-framework mindspore is not supported here",
    ),
    "a mistyped flag": (["--seq-lenght", "4"], "did you mean --seq_length?"),
    "a launcher's flag": (["--nnodes", "1"], "--nnodes belongs to torchrun"),
    "no value": (["--mm-tool"], "--mm-tool has no value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, guide: Guide) -> None:
    more, expected = REFUSED[name]
    words = [w for w in guidefiles.script(pp=2, save="refused") if w != "--distributed-backend"]
    done = run_cli("finetune", *words[:-1], *more, cwd=guide.folder, check=2)
    assert expected in done.stderr
    assert "to fix" in done.stderr or "expected" in done.stderr
    assert not (guide.folder / "refused").exists()


def test_sizes_are_the_checkpoints_without_the_guides_files_too(guide: Guide) -> None:
    words = ("--mm_dir", "mm", "--hf_dir", "hf", "--data", "mllm.json", "--save", "refused")
    more = ("--tensor-model-parallel-size", "2", "--train_iters", "1")
    done = run_cli("finetune", *words, *more, cwd=guide.folder, check=2)
    assert "tp_size 2" in done.stderr


def test_a_file_of_another_model_is_refused(guide: Guide) -> None:
    content = json.loads((guide.folder / "model_2b.json").read_text())
    content["text_decoder"] |= {"ffn_hidden_size": 11, "rope_theta": 5.0}
    (guide.folder / "big.json").write_text(json.dumps(content))
    words = guidefiles.script(pp=2, save="refused", model="big.json")
    done = run_cli("finetune", *words, cwd=guide.folder, check=2)
    assert "big.json belongs to another model: text_decoder.ffn_hidden_size is 11" in done.stderr


def test_a_model_without_ears_refuses_the_sound_of_a_video(guide: Guide) -> None:
    content = json.loads((guide.folder / "data_2b.json").read_text())
    content["dataset_param"]["preprocess_parameters"]["use_audio_in_video"] = True
    (guide.folder / "sound.json").write_text(json.dumps(content))
    words = guidefiles.script(pp=2, save="refused", data="sound.json")
    done = run_cli("finetune", *words, cwd=guide.folder, check=2)
    assert "use_audio_in_video is asked for" in done.stderr


def test_lists_that_are_not_the_checkpoints_are_refused_with_both(guide: Guide) -> None:
    guidefiles.model_json(guide.folder, [3, 0], [0, 4], name="other.json")
    words = guidefiles.script(pp=2, save="refused", model="other.json")
    done = run_cli("finetune", *words, cwd=guide.folder, check=2)
    assert "vit_pp_layers [2,1]" in done.stderr
    assert "vit_pp_layers [3,0]" in done.stderr


@pytest.mark.slow
def test_qwen2_5_vl_trains_by_its_guide(tmp_path: Path) -> None:
    """Two data files joined by a comma, the second of JSON lines; layer lists by model.json."""
    hf = talking.make("qwen2_5_vl", tmp_path / "hf")
    lists = ("--vit_pp_layers", "[2,1]", "--llm_pp_layers", "[0,4]")
    run_cli("model_json", hf, *lists, "--output", tmp_path / "model_2b.json", check=0)
    words = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "mm")
    run_cli(
        "Qwen2_5_VLConverter", "hf_to_mm", *words,
        "--cfg.model_json", tmp_path / "model_2b.json", check=0,
    )  # fmt: skip
    talking.write_data(tmp_path, "mllm.json")
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "more.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    guidefiles.data_json(tmp_path, "./mllm.json,./more.jsonl")
    script = guidefiles.script("--enable-dummy-optimizer", pp=2, gbs=5)
    done = run_cli("finetune", *script, cwd=tmp_path, check=0)
    assert len(trained(tmp_path / "save_dir")) == 2
    assert "left out" not in done.stderr
    back = ("--cfg.hf_config.hf_dir", hf, "--cfg.save_hf_dir", tmp_path / "back")
    layout = ("--cfg.model_json", tmp_path / "model_2b.json")
    words = ("--cfg.mm_dir", tmp_path / "save_dir", *back, *layout)
    run_cli("Qwen2_5_VLConverter", "mm_to_hf", *words, check=0)


@pytest.mark.slow
def test_omni_trains_with_a_tp_size_for_each_encoder(tmp_path: Path) -> None:
    """The guide's --hetero-parallel: TP 1 in the script, tp 2 of the text decoder in model.json."""
    hf = talking.make("omni", tmp_path / "hf")
    tp = ("--tp", "2", "--vit_tp", "1", "--audio_tp", "1")
    run_cli("model_json", hf, *tp, "--output", tmp_path / "model_2b.json", check=0)
    words = ("--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", tmp_path / "mm")
    layout = ("--cfg.model_json", tmp_path / "model_2b.json")
    run_cli("Qwen2_5_OmniConverter", "hf_to_mm", *words, *layout, check=0)
    talking.write_data(tmp_path, "pictures.json")
    talking.sound(tmp_path / "low.wav", 220, 0.3)
    film = tmp_path / "film"
    film.mkdir()
    for number, colour in enumerate(talking.COLOURS):
        talking.picture(film / f"{number}.png", colour)
    item = talking.talk("<video><audio>And here?", "He sings.", videos=["film"], audios=["low.wav"])
    (tmp_path / "mllm_video_audio_demo.json").write_text(json.dumps([item] * 4))
    columns = {"images": None, "videos": "videos", "audios": "audios"}
    guidefiles.data_json(tmp_path, "./mllm_video_audio_demo.json", **columns)
    script = guidefiles.script("--hetero-parallel", mbs=2, gbs=4, iters=2)
    run_cli("finetune", *script, cwd=tmp_path, check=0)
    assert len(trained(tmp_path / "save_dir")) == 2
    assert len(rank_files(tmp_path / "save_dir")) == 2
    plain = guidefiles.script(mbs=2, gbs=4, save="elsewhere")
    done = run_cli("finetune", *plain, cwd=tmp_path, check=2)
    assert "tp_size 2" in done.stderr  # without it the script asks for TP 1


@pytest.mark.slow
def test_internvl2_trains_by_its_guide(tmp_path: Path) -> None:
    """ai2d's JSON lines, with data_folder in front of their paths; the projector learns."""
    hf = talking.make("intern-internlm2", tmp_path / "hf")
    tinyfamilies.convert("intern-internlm2", hf, tmp_path / "mm", "[1,3]", "[3,0]")
    guidefiles.intern_data_json(tmp_path)
    guidefiles.model_json(tmp_path, [3, 0], [1, 3], projector=None, token=260)
    images = tmp_path / "data" / "ai2d" / "images"
    images.mkdir(parents=True)
    (tmp_path / "opensource").mkdir()
    lines: list[str] = []
    for number, colour in enumerate(talking.COLOURS):
        talking.picture(images / f"{number}.png", colour)
        said = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": colour}]
        lines.append(json.dumps({"id": number, "image": f"images/{number}.png",
                                 "conversations": said}))  # fmt: skip
    (tmp_path / "opensource/ai2d_train_12k.jsonl").write_text("\n".join(lines))
    script = guidefiles.script(pp=2, data="data_8B.json", gbs=2)
    done = run_cli("finetune", *script, cwd=tmp_path, check=0)
    assert len(trained(tmp_path / "save_dir")) == 2
    assert "unknown keys" not in done.stderr
    assert "image_encoder.projector" in changed(tmp_path / "mm", tmp_path / "save_dir")


def inference(guide: Guide, name: str, **changes: object) -> Path:
    """An inference file as the tutorial edits it."""
    content = json.loads((guide.folder / "model_2b.json").read_text())
    content |= {
        "prompts": "Which?", "image_path": "./red.png", "pipeline_class": "Qwen2VlPipeline",
        "dtype": "bf16", "device": "npu", "image_processer_path": "./hf/preprocessor_config.json",
        "tokenizer": {
            "hub_backend": "hf", "autotokenizer_name": "AutoTokenizer", "from_pretrained": "./hf",
        },
        "generation_config": {
            "temperature": 0.01, "max_new_tokens": 3, "kv_cache": True, "top_k": 1,
            "top_p": 0.001, "repetition_penalty": 1.05, "eos_token_id": [258],
        },
    }  # fmt: skip
    content |= changes
    (guide.folder / name).write_text(json.dumps(content))
    return guide.folder / name


@pytest.mark.slow
def test_an_inference_file_asks_as_the_flags_do(guide: Guide) -> None:
    inference(guide, "inference_2b.json")
    gpt = guidefiles.GPT_ARGS.format(tp=1, pp=2, mbs=1, gbs=2, iters=1, load="mm").split()
    words = [*gpt, "--mm-model", "inference_2b.json", "--log-interval", "1", "--save", "x"]
    done = run_cli("generate", *words, "--json", cwd=guide.folder, check=0)
    assert "--train-iters" in done.stderr  # accepted, and said to have no effect
    flags = ("--mm_dir", "mm", "--hf_dir", "hf", "--image", "red.png", "--prompt", "Which?")
    more = ("--max_new_tokens", "3", "--dtype", "bf16", "--json")
    same = run_cli("generate", *flags, *more, cwd=guide.folder, check=0)
    assert json.loads(done.stdout) == json.loads(same.stdout)
    words = ("--load", "mm", "--mm-model", "inference_2b.json", "--json")  # sizes left out
    assert run_cli("generate", *words, cwd=guide.folder, check=0).stdout == done.stdout


@pytest.mark.slow
def test_an_inference_file_that_draws_words_draws_as_the_flags_do(guide: Guide) -> None:
    drawn = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "max_new_tokens": 6}
    inference(guide, "hot.json", generation_config=drawn, dtype="fp32")
    words = ("--load", "mm", "--mm-model", "hot.json", "--pipeline-model-parallel-size", "2")
    done = run_cli("generate", *words, "--seed", "3", "--json", cwd=guide.folder, check=0)
    flags = ("--mm_dir", "mm", "--hf_dir", "hf", "--image", "red.png", "--prompt", "Which?")
    more = ("--max_new_tokens", "6", "--temperature", "0.7", "--top_k", "20", "--top_p", "0.9")
    same = run_cli("generate", *flags, *more, "--seed", "3", "--json", cwd=guide.folder, check=0)
    assert json.loads(done.stdout) == json.loads(same.stdout)


@pytest.mark.slow
def test_a_terminal_obeys_no_name_of_a_sample(guide: Guide) -> None:
    items = json.loads((guide.folder / "mllm.json").read_text())
    items.append(talking.talk("<image>?", "A", images=["evil\x1b[2J\nerror: \u202ella.png"]))
    (guide.folder / "evil.json").write_text(json.dumps(items))
    words = ("--mm_dir", "mm", "--hf_dir", "hf", "--data", "evil.json", "--save", "evil")
    done = run_cli("finetune", *words, "--train_iters", "1", cwd=guide.folder, check=0)
    assert "evil\\x1b[2J\\nerror: \\u202ella.png" in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines())


@pytest.mark.slow
def test_replicas_name_a_bad_sample_once(guide: Guide, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever replica meets it, and both on another pass."""
    monkeypatch.setattr(dataset, "Checks", partial(Checks, decoding=-1))
    items = json.loads((guide.folder / "mllm.json").read_text())
    raw = bytearray((guide.folder / "red.png").read_bytes())
    raw[60:66] = bytes(6)  # inside: its end is that of a whole file
    (guide.folder / "torn.png").write_bytes(raw)
    items.insert(1, talking.talk("<image>?", "A", images=["torn.png"]))
    (guide.folder / "torn.json").write_text(json.dumps(items))
    words = ("--mm_dir", "mm", "--hf_dir", "hf", "--data", "torn.json", "--save", "torn")
    more = ("--train_iters", "3", "--global_batch_size", "4", "--data_parallel_size", "2")
    done = run_cli("finetune", *words, *more, cwd=guide.folder, check=0)
    assert len(trained(guide.folder / "torn")) == 3
    assert done.stderr.count("torn.png") == 1
    assert "left out, 1 so far: torn.json, entry 1: torn.png: " in done.stderr


@pytest.mark.slow
def test_glm_trains_by_its_script(tmp_path: Path) -> None:
    """Its data.json names the template glm4.1v; layers are computed again as model.json says."""
    hf = talking.make("glm4v", tmp_path / "hf")
    tinyfamilies.convert("glm4v", hf, tmp_path / "mm", "[1,3]", "[3,0]")
    talking.write_data(tmp_path, "mllm.json")
    content = guidefiles.data_json(tmp_path, "./mllm.json")
    content["dataset_param"]["basic_parameters"]["template"] = "glm4.1v"
    (tmp_path / "data_2b.json").write_text(json.dumps(content))
    model = guidefiles.model_json(tmp_path, [3, 0], [1, 3])
    run_cli("finetune", *guidefiles.script(pp=2), cwd=tmp_path, check=0)
    model["image_encoder"]["vision_encoder"]["recompute_granularity"] = "full"
    model["text_decoder"]["recompute_granularity"] = "full"
    (tmp_path / "model_2b.json").write_text(json.dumps(model))
    done = run_cli("finetune", *guidefiles.script(pp=2, save="again"), cwd=tmp_path, check=0)
    assert "unknown" not in done.stderr
    first, again = (trained(tmp_path / name) for name in ("save_dir", "again"))
    assert [line["loss"] for line in first] == [line["loss"] for line in again]


def test_lines_stand_for_the_iterations_since_the_last() -> None:
    interval = Interval(2)
    assert interval.add(Line(1, 4.0, seconds=1.0, tokens=10.0, rate=0.1)) is None
    mean = interval.add(Line(2, 2.0, seconds=3.0, tokens=30.0, rate=0.2))
    assert mean == Line(2, 3.0, seconds=2.0, tokens=25.0, rate=0.2)
    assert Interval(0).add(Line(1, 4.0)) is None


def test_an_inference_file_of_internvl_names_a_rank_file(guide: Guide) -> None:
    """In its checkpoint; copied elsewhere, its layout is lost."""
    rank = guide.folder / "mm" / "release" / "mp_rank_00_000" / "model_optim_rng.pt"
    file = inference(guide, "rank.json", from_pretrained=str(rank))
    assert read_inference(file).mm_dir == guide.folder / "mm" / "release"
    inference(guide, "lone.json", from_pretrained="./ckpt/model_optim_rng.pt")
    done = run_cli("generate", "--mm-model", "lone.json", cwd=guide.folder, check=2)
    assert "a rank file outside of its checkpoint" in done.stderr
