"""Qwen-VL's third stage of training: what is learnt, its loss and its checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import qwenvlgolden as golden
from cli import run_cli
from mmconvert.errors import DatasetError, MMConvertError
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.journal import Line
from mmconvert.runtime.optimizer import Recipe
from mmconvert.runtime.qwenvl import learning, saving, training
from mmconvert.runtime.qwenvl.learning import Lesson, Teacher, template
from mmconvert.runtime.qwenvl.scaling import LossScale
from mmconvert.runtime.qwenvl.tokenizer import Tokenizer
from mmconvert.runtime.samples import Sample, SampleSource
from mmconvert.runtime.schedule import Schedule
from mmconvert.runtime.trainplan import TrainingOutcome, TrainingPlan
from nights import night
from qwenvl import QWENVL, hf_to_ms
from qwenvlgolden import recorded

PROMPTS: dict[str, Any] = json.loads((golden.FOLDER / "prompts.json").read_text())["bytes"]
PICTURE = "Picture 1: <image>\n"
MESSAGES: dict[str, list[tuple[str, str]]] = {
    "one": [("user", f"{PICTURE}What is this?"), ("assistant", "A pattern.")],
    "text": [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Bye.")],
    "two_in_one_turn": [
        ("user", f"{PICTURE}Picture 2: <image>\nSame?"), ("assistant", "No."),
    ],
    "unknown_role": [("user", "Hi"), ("tool", "42"), ("assistant", "Hello!")],
}  # fmt: skip
# Beginnings of MindFormers' names -> of the hub's, for those that tell what learns.
NAMES = {
    "vision_encoder.": "transformer.visual.", ".gamma": ".weight", ".beta": ".bias",
    "attn_pool.attn.dense1.": "attn_pool.attn.in_proj_",
    "attn_pool.attn.dense2.": "attn_pool.attn.in_proj_",
    "attn_pool.attn.dense3.": "attn_pool.attn.in_proj_",
    ".dense1.": ".in_proj.", ".dense2.": ".in_proj.", ".dense3.": ".in_proj.",
    ".projection.": ".out_proj.",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, x.ckpt, coco/train2014 with two pictures, and what data_convert.py makes."""
    made = tmp_path_factory.mktemp("qwenvl")
    golden.make(made / "hf")
    hf_to_ms(made / "hf", made / "x.ckpt", "--cfg.dtype", "fp32")
    coco = made / "coco" / "train2014"
    coco.mkdir(parents=True)
    for i in (0, 1):
        Image.fromarray(golden.arrays()[f"in_{i}"]).save(coco / f"COCO_train2014_{i}.jpg")
    items = [
        {"id": str(i), "image": f"{i}.jpg", "conversations": [
            {"from": "human", "value": "What is this?\n<image>" if i else "<image>\nSay it."},
            {"from": "gpt", "value": f"Pattern {i}."},
        ]}
        for i in (0, 1)
    ]  # fmt: skip
    (made / "detail.json").write_text(json.dumps(items))
    words = ["--data_path", made / "detail.json", "--image_location", made / "coco"]
    run_cli("data_convert.py", *words, "--output_path", made / "train.json", check=0)
    return made


@pytest.mark.parametrize("case", PROMPTS["train"])
def test_ids_and_labels_are_those_of_mindformers(case: str) -> None:
    name, _, most = case.split()
    length = int(most.removeprefix("max_length="))
    expected = PROMPTS["train"][case]
    tokenizer = Tokenizer.read(golden.FOLDER / "bytes.tiktoken", "mindformers")
    messages = learning._tagged(MESSAGES[name])
    ids, labels = template(tokenizer, messages, length)
    assert ids == expected["ids"]
    assert labels == expected["labels"]
    assert len(ids) <= expected["len"] == length + 1


def test_the_loss_is_that_of_mindformers(folder: Path) -> None:
    model = golden.load(folder / "hf", "mindformers").train()
    ids, labels = recorded("loss_ids"), recorded("loss_labels")
    labels[:, 1:].masked_fill_(ids[:, :-1] == golden.PAD, -100)
    lesson = Lesson(ids, labels, recorded("pixels")[:1], recorded("loss_pos")[0], ids != golden.PAD)
    found = training.loss_of(model, lesson, "default")
    assert found.item() == pytest.approx(float(recorded("loss")), abs=1e-5)


def test_what_learns_is_what_mindformers_lets_learn(folder: Path) -> None:
    model = golden.load(folder / "hf")
    learning = set(training.freeze(model, []))
    visual = {name for name in learning if ".visual." in name}
    for key, learns in (("trainable", True), ("frozen", False)):
        names: set[str] = set()
        for name in golden.arrays()[key]:
            for ours, hub in NAMES.items():
                name = name.replace(ours, hub)
            names.add(str(name))
        assert (names <= visual) if learns else not (names & visual)
        assert names <= dict(model.named_parameters()).keys()
        if learns:
            assert names == visual
    assert {"transformer.wte.weight", "lm_head.weight"} <= learning
    with pytest.raises(MMConvertError):
        training.freeze(model, ["image_encoder"])


def plan(save: Path, steps: int, **changes: Any) -> TrainingPlan:
    schedule = Schedule(1e-3, 1e-4, 2, 4, 0.0, "cosine")
    recipe = Recipe(schedule, 0.1, 0.9, 0.95, 1e-8, 1.0)
    settings: dict[str, Any] = {
        "save": save, "steps": steps, "save_every": 0, "evaluate_every": 2, "evaluate_steps": 1,
        "log_every": 1, "size": 1, "count": 2, "seed": 1, "frozen": (), "save_optimizer": True,
        "recipe": recipe,
    }  # fmt: skip
    return TrainingPlan(**{**settings, **changes})


def finetuned(
    folder: Path,
    save: Path,
    steps: int,
    emit: Callable[[object], None],
    *,
    resume: bool = False,
    **changes: Any,
) -> TrainingOutcome:
    source = training.QwenVLSource(
        folder / "hf", folder / "x.ckpt", folder / "hf" / "qwen.tiktoken", length=400
    )
    data = Data((SampleSource((folder / "train.json",), 0, (folder / "coco",)),))
    settings = plan(save, steps, **changes)
    return training.finetune(source, data, settings, "fp32", emit, resume=resume)


def trained(
    folder: Path, save: Path, steps: int, resume: bool = False, **changes: Any
) -> list[str]:
    """The lines of a training."""
    finetuned(folder, save, steps, lambda _: None, resume=resume, **changes)
    return (save / "loss.jsonl").read_text().splitlines()


def losses(lines: list[str]) -> list[float]:
    return [json.loads(line)["loss"] for line in lines]


def by_hand(folder: Path, steps: int) -> list[float]:
    """The same training, written down."""
    model = golden.load(folder / "hf").train()
    learning = [model.get_parameter(name) for name in training.freeze(model, [])]
    groups = [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, 0, (0.9, 0.95), 1e-8)
    tokenizer = Tokenizer.read(golden.FOLDER / "bytes.tiktoken")
    teacher = Teacher(tokenizer, model.sizes, 400)
    words = ["Picture 1: <image>\nSay it.", "Picture 1: <image>\nWhat is this?"]
    samples = [
        Sample(
            [("user", words[i]), ("assistant", f"Pattern {i}.")],
            [folder / "coco" / "train2014" / f"COCO_train2014_{i}.jpg"],
        )
        for i in (0, 1)
    ]
    found: list[float] = []
    for step in range(steps):
        total = 0.0
        for sample in samples:  # both are in each step
            one = teacher.joined([teacher.encode(sample)])
            logits = model(one.ids, one.pixels, one.slots)[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, one.labels[0, 1:]) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        for group in adam.param_groups:
            group["lr"] = Schedule(1e-3, 1e-4, 2, 4).at(step)
        adam.step()
        adam.zero_grad()
        found.append(total)
    return found


def test_the_curve_is_that_of_a_loop_by_hand_and_goes_on_after_a_stop(
    folder: Path, tmp_path: Path
) -> None:
    straight = losses(trained(folder, tmp_path / "a", 3))
    assert straight == pytest.approx(by_hand(folder, 3), rel=1e-5)
    assert straight[-1] < straight[0]
    trained(folder, tmp_path / "b", 2)
    with pytest.raises(MMConvertError):
        trained(folder, tmp_path / "b", 3)
    with pytest.raises(MMConvertError) as error:
        trained(folder, tmp_path / "b", 3, resume=True, size=2)
    assert "size" in error.value.what
    assert losses(trained(folder, tmp_path / "b", 3, resume=True)) == straight
    assert losses(trained(folder, tmp_path / "c", 2, recompute=True)) == pytest.approx(straight[:2])
    # The checkpoint is a Hugging Face folder: the encoder as it was, the resampler not.
    last = tmp_path / "a" / "iter_0000003"
    new, old = golden.load(last).state_dict(), golden.load(folder / "hf").state_dict()
    moved = {name for name in new if not torch.equal(new[name], old[name])}
    assert moved == set(training.freeze(golden.load(last), []))
    hf_to_ms(last, tmp_path / "new.ckpt", "--cfg.dtype", "fp32")
    run_cli("verify", last, tmp_path / "new.ckpt", check=0)


def test_a_sample_that_is_cut_in_a_picture_is_left_out(folder: Path) -> None:
    tokenizer = Tokenizer.read(golden.FOLDER / "bytes.tiktoken")
    sizes = golden.load(folder / "hf").sizes
    sample = Sample(MESSAGES["one"], [folder / "coco" / "train2014" / "COCO_train2014_0.jpg"])
    with pytest.raises(DatasetError):
        Teacher(tokenizer, sizes, 100).encode(sample)
    assert len(Teacher(tokenizer, sizes, 340).encode(sample).ids) == 341


def test_evaluations_are_the_loss_of_the_samples(folder: Path, tmp_path: Path) -> None:
    source = training.QwenVLSource(
        folder / "hf", folder / "hf", folder / "hf" / "qwen.tiktoken", length=400
    )
    data = SampleSource((folder / "train.json",), 0, (folder / "coco",))
    still = plan(
        tmp_path, 1, evaluate_every=1, recipe=Recipe(Schedule(0, 0, 0, 1), 0, 0.0, 0.0, 1, 0)
    )
    lines: list[Line] = []
    training.finetune(
        source, Data((data,), (data,)), still, "fp32",
        lambda e: lines.append(e) if isinstance(e, Line) else None, resume=False,
    )  # fmt: skip
    step, evaluation = lines
    assert evaluation.evaluation == pytest.approx(step.loss, rel=1e-6)


def test_sigterm_saves_and_resume_goes_on(folder: Path, tmp_path: Path) -> None:
    straight = losses(trained(folder, tmp_path / "a", 3))

    def stop(event: object) -> None:
        if isinstance(event, Line) and event.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    ended = finetuned(folder, tmp_path / "b", 3, stop)
    assert ended.stopped  # after the step in which the signal comes
    assert 1 <= ended.iteration < 3
    assert losses(trained(folder, tmp_path / "b", 3, resume=True)) == straight


def test_replicas_learn_what_one_process_learns(folder: Path, tmp_path: Path) -> None:
    """One has a sample without a picture: what it does not use has a gradient all the same."""
    data = json.loads((folder / "train.json").read_text())
    said = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello."}]
    (folder / "mixed.json").write_text(json.dumps([data[0], {"id": "9", "conversations": said}]))
    found: list[list[dict[str, float]]] = []
    for replicas in (1, 2):
        save = tmp_path / str(replicas)
        source = training.QwenVLSource(
            folder / "hf", folder / "x.ckpt", folder / "hf" / "qwen.tiktoken", length=400
        )
        sources = (SampleSource((folder / "mixed.json",), 0, (folder / "coco",)),)
        what = plan(save, 3, replicas=replicas, order="file", evaluate_every=3)
        training.finetune(source, Data(sources, sources), what, "fp32", print, resume=False)
        lines = (save / "loss.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    one, two = found
    for key in ("loss", "norm", "evaluation", "rate"):
        expected = [line[key] for line in one if key in line]
        assert expected
        assert [line[key] for line in two if key in line] == pytest.approx(expected, rel=1e-5)
    ours, theirs = (golden.load(tmp_path / n / "iter_0000003").state_dict() for n in ("1", "2"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "near"), [("bf16", 3e-2), night("fp16", 5e-3)])
def test_half_precision_learns_as_fp32_does(
    dtype: str, near: float, folder: Path, tmp_path: Path
) -> None:
    source = training.QwenVLSource(
        folder / "hf", folder / "x.ckpt", folder / "hf" / "qwen.tiktoken", length=400
    )
    data = Data((SampleSource((folder / "train.json",), 0, (folder / "coco",)),))
    curves: list[list[float]] = []
    for kind in ("fp32", dtype):
        save = tmp_path / kind
        training.finetune(source, data, plan(save, 3), kind, print, resume=False)
        curves.append(losses((save / "loss.jsonl").read_text().splitlines()))
    assert curves[1] == pytest.approx(curves[0], rel=near)
    assert curves[1] != curves[0]


def test_a_loss_scale_halves_where_gradients_overflow() -> None:
    scale = LossScale(torch.device("cpu"), enabled=True)
    weight = torch.nn.Parameter(torch.ones(2))
    scale.times(weight.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [65536.0, 65536.0]
    assert scale.learns(finite=scale.divide([weight]))
    assert weight.grad.tolist() == [1.0, 1.0]
    weight.grad[0] = torch.inf
    assert not scale.learns(finite=scale.divide([weight]))
    assert scale.state() == [32768.0, 0.0]
    other = LossScale(torch.device("cpu"), enabled=True)
    other.restore(scale.state())
    for _ in range(1000):
        assert other.learns(finite=True)
    assert other.state() == [65536.0, 0.0]
    for _ in range(16):
        other.learns(finite=False)
    with pytest.raises(MMConvertError, match="overflow in fp16"):
        other.learns(finite=False)


def test_a_fault_of_the_data_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, seen = Teacher.encode, list[str]()

    def failing(self: Teacher, sample: Sample) -> learning.Encoded:
        seen.append(sample.name)
        if len(seen) > 2:
            raise DatasetError("the disk is gone")
        return encode(self, sample)

    monkeypatch.setattr(Teacher, "encode", failing)
    with pytest.raises(DatasetError):
        finetuned(folder, tmp_path, 3, lambda _: None)
    assert (tmp_path / "iter_0000001" / "model.safetensors").is_file()


def test_a_damaged_state_is_said(tmp_path: Path) -> None:
    (tmp_path / saving.OPTIMIZER).write_bytes(b"PK\3\4 nothing")
    with pytest.raises(MMConvertError):
        saving.restored(tmp_path, {})


def test_finetune_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    words = ["finetune", "--mm_dir", folder / "x.ckpt", "--hf_dir", folder / "hf"]
    words += ["--data", folder / "train.json", "--dataset_dir", folder / "coco"]
    words += ["--save", tmp_path / "out", "--train_iters", "2", "--lr", "1e-4", "--dtype", "bf16"]
    done = run_cli(*words, "--seq_length", "400", "--json", check=0)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["iteration"] == 2
    assert last["loss"] > 0
    new = tmp_path / "out" / "iter_0000002"
    run_cli(QWENVL, "hf_to_ms", "--cfg.hf_config.hf_dir", new, "--cfg.ms_path", tmp_path / "y.ckpt")
    assert (new / "qwen.tiktoken").is_file()


YAML = """
output_dir: './output'
train_dataset: &train_dataset
  data_loader: {{type: BaseMultiModalDataLoader, annotation_file: "{data}", shuffle: True}}
  modal_to_text_transform:
    model_transform_template:
      dataset_dir: "{coco}"
      system_message: "You are a helpful assistant."
      user_prompt: ""
    max_length: 400
train_dataset_task:
  dataset_config: *train_dataset
runner_config: {{epochs: 3, batch_size: 1}}
optimizer: {{beta1: 0.9, beta2: 0.95, eps: 1.e-8, weight_decay: 0.1}}
lr_schedule: {{learning_rate: 1.e-5, lr_end: 1.e-6, warmup_lr_init: 1e-6, warmup_steps: 1}}
callbacks:
  - {{type: CheckpointMonitor, save_checkpoint_steps: 10000}}
parallel_config: {{data_parallel: 2, micro_batch_num: 1}}
recompute_config: {{recompute: True}}
model:
  model_config: {{freeze_vision: True, freeze_resampler: False, compute_dtype: "bfloat16"}}
"""


def test_the_guides_line_of_finetuning(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "finetune_qwenvl_9.6b_bf16.yaml"
    config.write_text(YAML.format(data=folder / "train.json", coco=folder / "coco"))
    words = ["run_qwenvl.py", "--config", config.name, "--run_mode", "finetune"]
    words += ["--load_checkpoint", folder / "x.ckpt", "--use_parallel", "True"]
    words += ["--auto_trans_ckpt", "True", "--vocab_file", folder / "hf" / "qwen.tiktoken"]
    done = run_cli(*words, "--hf_dir", folder / "hf", cwd=tmp_path, check=0)
    assert "--lr 1e-05" in done.stderr
    assert (tmp_path / "output" / "checkpoint" / "iter_0000003" / "config.json").is_file()
    lines = (tmp_path / "output" / "checkpoint" / "loss.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["rate"] == 1e-6
    config.write_text(config.read_text().replace('user_prompt: ""', 'user_prompt: "Q: "'))
    done = run_cli(*words, "--hf_dir", folder / "hf", cwd=tmp_path, check=2)
    assert "user_prompt" in done.stderr


@pytest.mark.nightly
def test_torchrun_trains_as_the_command_does(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "finetune_qwenvl_9.6b.yaml"
    config.write_text(YAML.format(data=folder / "train.json", coco=folder / "coco"))
    words = ["run_qwenvl.py", "--config", config, "--load_checkpoint", folder / "x.ckpt"]
    words += ["--vocab_file", folder / "hf" / "qwen.tiktoken", "--hf_dir", folder / "hf"]
    run_cli(*words, "--save", tmp_path / "one", check=0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line = [*torchrun, "--standalone", "-m", "mmconvert", *words, "--save", tmp_path / "two"]
    done = subprocess.run(
        [str(word) for word in line], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("as: mm-convert finetune") == 1  # one process speaks
    saved = [tmp_path / name / "loss.jsonl" for name in ("one", "two")]
    one, two = (losses(path.read_text().splitlines()) for path in saved)
    assert two == pytest.approx(one, rel=1e-4)
