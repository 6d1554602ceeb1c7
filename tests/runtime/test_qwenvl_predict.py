"""MindFormers' line of prediction, word for word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import qwenvlgolden as golden
from cli import run_cli
from mmconvert.errors import CheckpointError
from mmconvert.runtime.qwenvl import answer
from mmconvert.runtime.qwenvl.sizes import Sizes
from qwenvl import hf_to_ms

YAML = """
run_mode: 'finetune'
model:
  model_config:
    type: QwenVLConfig
    compute_dtype: "float16"
    vision_model:
      arch: {type: QwenVLVisionModel}
      model_config:
        {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}
    llm_model:
      arch: {type: QwenForCausalLM}
      model_config:
        {seq_length: 290, hidden_size: 256, num_layers: 3, num_heads: 4, vocab_size: 482,
         intermediate_size: 176}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("predict")
    golden.make(made / "hf")
    hf_to_ms(made / "hf", made / "x.ckpt", "--cfg.dtype", "fp16")
    Image.fromarray(golden.arrays()["in_0"]).save(made / "a.png")
    (made / "predict_qwenvl.yaml").write_text(YAML)
    (made / "qwen.tiktoken").write_bytes((golden.FOLDER / "bytes.tiktoken").read_bytes())
    return made


def test_the_guides_line(folder: Path) -> None:
    words = ["predict", "single", "predict_qwenvl.yaml", "x.ckpt", "qwen.tiktoken", "a.png"]
    done = run_cli(*words, "Describe:", "2", "--predict_length", "1", cwd=folder, check=0)
    sizes = Sizes.of_yaml(golden.yaml_of(YAML), "yaml", "mindformers")
    asked = answer.Question(
        sizes, folder / "x.ckpt", folder / "qwen.tiktoken", "Describe:", [folder / "a.png"],
        290, "plain", 290,
    )  # fmt: skip
    (expected,) = answer.ask(asked, "fp32", lambda _: None, print)
    assert expected.text
    line = f"Picture 1: <img>a.png</img>\nDescribe:{expected.text}\n"
    assert done.stdout == line * 2


def test_parallel_and_json_and_a_folder_of_the_hub(folder: Path) -> None:
    words = ["run_qwenvl_predict.sh", "parallel", "hf", "hf", "hf/qwen.tiktoken", "a.png", "Hi"]
    short = golden.make(folder / "hf", seq_length=280)
    done = run_cli(*words, "1", "2", "--predict_length", "1", "--json", cwd=folder, check=0)
    assert "one device" in done.stderr
    assert json.loads(done.stdout)[0]["prompt"] == "Picture 1: <img>a.png</img>\nHi"
    assert short.is_dir()


def test_what_cannot_be_done_is_said(folder: Path) -> None:
    words = ["predict", "single", "predict_qwenvl.yaml", "x.ckpt", "qwen.tiktoken"]
    done = run_cli(*words, "https://example.org/a.jpeg", "Hi", cwd=folder, check=2)
    assert "nothing is downloaded" in done.stderr
    with pytest.raises(CheckpointError):
        Sizes.of_yaml({"model": {"model_config": {}}}, "x.yaml")
    with pytest.raises(CheckpointError):
        Sizes.of_yaml(golden.yaml_of(YAML.replace("num_heads: 4", "num_heads: 3")), "x.yaml")
