"""model.json and layouts agree by machine: conversions, doctor, suggest, and a file of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inprocess import HF, MM, SOURCE, TARGET, call, to_mm
from mmconvert.modeljson.keys import model_keys
from mmconvert.playground.checkpoints import make_hf

GOLDEN = Path(__file__).parents[1] / "golden" / "model_json"
TEXT = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "hidden_act": "silu",
}  # fmt: skip
NEWER = {
    "depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 44, "hidden_act": "silu",
    "in_chans": 3, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2,
}  # fmt: skip
OLDER = {
    "depth": 4, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 4, "in_chans": 3, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "hidden_size": 64,
}  # fmt: skip
AUDIO = {
    "encoder_layers": 4, "d_model": 24, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "num_mel_bins": 8, "max_source_positions": 64, "n_window": 16, "scale_embedding": False,
    "output_dim": 64,
}  # fmt: skip
IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
INTERN = {
    "model_type": "internvl_chat", "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2",
    "img_context_token_id": 300,
    "vision_config": {
        "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "image_size": 448,
        "num_attention_heads": 4, "qkv_bias": True, "qk_normalization": False, "patch_size": 14,
        "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "drop_path_rate": 0.0,
        "initializer_factor": 1.0,
    },
    "llm_config": {
        **TEXT, "architectures": ["InternLM2ForCausalLM"], "vocab_size": 320, "rope_theta": 100000,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2vl": {"model_type": "qwen2_vl", **IDS, **TEXT, "vision_config": OLDER},
    "qwen25vl": {"model_type": "qwen2_5_vl", **IDS, **TEXT, "vision_config": NEWER},
    "omni": {
        "model_type": "qwen2_5_omni",
        "thinker_config": {
            "image_token_index": 151655, "vision_start_token_id": 151652, "text_config": TEXT,
            "vision_config": NEWER, "audio_config": AUDIO,
        },
    },
    "internvl2": INTERN,
}  # fmt: skip


def without_choices(content: Any) -> Any:
    """A model.json without layer lists and tp sizes."""
    if not isinstance(content, dict):
        return content
    choices = ("pipeline_num_layers", "tp", "pp", "cp")
    return {key: without_choices(value) for key, value in content.items() if key not in choices}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_that_mindspeed_has_run_with_is_made_again(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert model_keys(CONFIGS[name]) == without_choices(golden)


def test_a_newer_config_says_the_same() -> None:
    """transformers 4.52 on: text_config; 5: rope_parameters."""
    old = CONFIGS["qwen25vl"]
    text = {k: v for k, v in TEXT.items() if k not in ("rope_theta", "rope_scaling")}
    text["rope_parameters"] = {"rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    new = {"model_type": "qwen2_5_vl", **IDS, "vision_config": NEWER, "text_config": text}
    assert model_keys(new) == model_keys(old)


@pytest.mark.parametrize("name", ["qwen25vl", "internvl2"])
def test_no_number_of_key_value_heads(name: str) -> None:
    """``null``, as transformers writes for a model with one for each head."""
    part = {"num_key_value_heads": None}
    config: dict[str, Any] = CONFIGS[name] | part
    if "llm_config" in config:
        config["llm_config"] = config["llm_config"] | part
    assert model_keys(config)["text_decoder"]["num_query_groups"] == TEXT["num_attention_heads"]


class Work:
    """A Qwen2-VL at TP 2 PP 2, and the model.json of that layout."""

    lists = ("--vit_pp_layers", "[20,12]", "--llm_pp_layers", "[0,28]")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hf = make_hf("qwen2vl-2b", folder / "hf")
        self.file, self.mm = folder / "model.json", folder / "mm"
        flags = (*self.lists, "--tp", "2", "--output", self.file)
        self.said = call("model_json", self.hf, *flags).stdout
        to_mm(
            "qwen2vl-2b", self.hf, self.mm, "--cfg.model_json", str(self.file),
            "--cfg.parallel_config.tp_size", "2",
        )  # fmt: skip

    def changed(self, name: str, *path: str, value: object) -> Path:
        """The file with another value."""
        content = json.loads(self.file.read_text())
        part = content
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        (self.folder / name).write_text(json.dumps(content))
        return self.folder / name


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("modeljson"))


def test_the_script_flags_are_printed(work: Work) -> None:
    expected = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
    assert expected + "--enable-dummy-optimizer" in work.said  # stage 0 has frozen layers alone
    content = json.loads(work.file.read_text())
    assert content["image_encoder"]["vision_encoder"]["pipeline_num_layers"] == [20, 12]
    assert content["text_decoder"]["pipeline_num_layers"] == [0, 28]


def test_a_conversion_takes_its_layout_from_the_file(work: Work) -> None:
    found = json.loads(call("inspect", work.mm, "--json").stdout)["layout"]
    assert found["vit_pp_layers"] == [[20, 12]]
    assert found["llm_pp_layers"] == [[0, 28]]
    assert found["tp_size"] == 2


@pytest.mark.parametrize("verb", ["hf_to_mm", "mm_to_hf", "resplit"])
def test_a_flag_that_says_otherwise_is_refused_with_both(verb: str, work: Work) -> None:
    out = work.folder / f"out-{verb}"
    words = {
        "hf_to_mm": (HF, work.hf, MM, out),
        "mm_to_hf": (HF, work.hf, MM, work.mm, "--cfg.save_hf_dir", out),
        "resplit": (SOURCE, work.mm, TARGET, out),
    }[verb]
    prefix = "--cfg.target_parallel_config" if verb == "resplit" else "--cfg.parallel_config"
    flags = ("--cfg.model_json", work.file, f"{prefix}.vit_pp_layers", "[32,0]")
    done = call("Qwen2VLConverter", verb, *words, *flags, check=2)
    assert f"{prefix}.vit_pp_layers is [32,0]" in done.stderr
    assert "[20,12] in image_encoder.vision_encoder" in done.stderr
    assert not out.exists()


def test_resplit_goes_to_the_layout_of_the_file(work: Work) -> None:
    hetero = json.loads(work.changed("hetero.json", "model_id", value="qwen2vl").read_text())
    hetero["image_encoder"] |= {"tp": 1, "pp": 2, "cp": 1}
    hetero["text_decoder"] |= {"tp": 2, "pp": 2, "cp": 1}
    (work.folder / "hetero.json").write_text(json.dumps(hetero))
    out = work.folder / "hetero"
    words = (SOURCE, work.mm, TARGET, out, "--cfg.model_json", work.folder / "hetero.json")
    call("Qwen2VLConverter", "resplit", *words, "--cfg.hf_config.hf_dir", work.hf)
    found = json.loads(call("inspect", out, "--json").stdout)["layout"]
    assert (found["tp_size"], found["vit_tp_size"]) == (2, 1)


FAULTS = {
    "lists": (
        ("text_decoder", "pipeline_num_layers"), [1, 27],
        "text_decoder.pipeline_num_layers is no layout",
    ),
    "another pipeline": (
        ("image_encoder", "vision_encoder", "pipeline_num_layers"), [19, 13],
        "image_encoder.vision_encoder.pipeline_num_layers is [19,13], expected [20,12]",
    ),
    "a sum": (("text_decoder", "pipeline_num_layers"), [0, 27], "27 layers in all"),
    "a size": (
        ("text_decoder", "ffn_hidden_size"), 4096, "text_decoder.ffn_hidden_size is 4096",
    ),
    "tied": (
        ("text_decoder", "untie_embeddings_and_output_weights"), True,
        "untie_embeddings_and_output_weights is True, expected False",
    ),
    "the picture's id": (("img_context_token_id",), 7, "img_context_token_id is 7"),
}  # fmt: skip


def test_doctor_finds_the_file_healthy(work: Work) -> None:
    done = call("doctor", work.mm, "--model_json", work.file, "--hf_dir", work.hf, "--quick")
    assert "model.json: layer lists and tp sizes" in done.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_doctor_says_what_differs(name: str, work: Work) -> None:
    path, value, expected = FAULTS[name]
    file = work.changed("wrong.json", *path, value=value)
    words = ("doctor", work.mm, "--model_json", file, "--hf_dir", work.hf, "--quick")
    done = call(*words, check=3)
    assert expected.replace("pipeline_num_layers is no layout", "pipeline") in done.stdout
    assert "mm-convert model_json" in done.stdout


def test_suggest_puts_its_lists_in(work: Work) -> None:
    new = work.folder / "new.json"
    words = ("suggest", work.hf, "--pp", "2", "--vpp", "2", "--model_json", work.file)
    done = call(*words, "--write", new)
    found = json.loads(call(*words, "--json").stdout)
    content = json.loads(new.read_text())
    lists = content["text_decoder"]["pipeline_num_layers"]
    assert lists == found["parallel_config"]["llm_pp_layers"]
    assert "--virtual-pipeline-model-parallel-size 2" in done.stdout
    call(*words, "--write", new, check=2)  # it is there
    out = work.folder / "suggested"
    to_mm("qwen2vl-2b", work.hf, out, "--cfg.model_json", str(new))
    call("doctor", out, "--model_json", new, "--hf_dir", work.hf, "--quick")


def test_a_family_of_whose_keys_nothing_is_known(tmp_path: Path) -> None:
    """Its lists go into a file that is there; none is made up."""
    hf = make_hf("qwen3vl-8b", tmp_path / "hf")
    for words in (("suggest", hf, "--pp", "2", "--write", tmp_path / "new.json"),
                  ("model_json", hf)):  # fmt: skip
        done = call(*words, check=2)
        assert "no model.json can be made for model_type 'qwen3_vl'" in done.stderr
        assert "FSDP2" in done.stderr and "suggest --model_json FILE" in done.stderr
    file = {"image_encoder": {"vision_encoder": {"num_layers": 27}}, "text_decoder": {}}
    (tmp_path / "own.json").write_text(json.dumps(file))
    flags = ("--model_json", tmp_path / "own.json", "--write", tmp_path / "new.json")
    call("suggest", hf, "--pp", "2", *flags)
    lists = json.loads((tmp_path / "new.json").read_text())["text_decoder"]["pipeline_num_layers"]
    assert len(lists) == 2 and sum(lists) == 36


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "is not valid JSON"), ('{"a": 1}\n{"a": 2}', "one object for each line?"),
     ("[]", "holds no JSON object"), ("{}", "has no text_decoder"),
     ('{"text_decoder": {"num_layers": 28, "pipeline_num_layers": "[28]"}}', "is '[28]'")],
)  # fmt: skip
def test_a_file_that_is_none_is_refused(text: str, expected: str, work: Work) -> None:
    (work.folder / "bad.json").write_text(text)
    out = work.folder / "out-bad"
    flags = ("--cfg.model_json", str(work.folder / "bad.json"))
    done = to_mm("qwen2vl-2b", work.hf, out, *flags, check=2)
    assert expected in done.stderr


@pytest.mark.parametrize("value", [-1, 0, True, "64", 64.0, 1 << 40])
def test_sizes_that_no_model_has_are_refused(value: object, tmp_path: Path) -> None:
    """In the words of the conversion, and with the way out."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=2, vit_layers=2)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "num_hidden_layers": value}))
    words = ("model_json", hf, "--output", tmp_path / "model.json", "--json")
    error = json.loads(call(*words, check=3).stdout)
    assert f"num_hidden_layers is {value!r}" in error["what"] and error["fix"]
    assert not (tmp_path / "model.json").exists()
    done = call("doctor", hf, "--json", check=3)
    found = [f for f in json.loads(done.stdout)["findings"] if f["severity"] == "error"]
    assert [(f["what"], f["fix"]) for f in found] == [(error["what"], error["fix"])]
