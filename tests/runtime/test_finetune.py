"""Fine-tuning by the command: a restart changes nothing, frozen stages stay, the result converts.

Two processes, text and vision on different stages, on pictures and words of the test's own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import talking
import tinyfamilies
from cli import run_cli
from commands import mm_to_hf
from mmconvert.errors import OutputError
from mmconvert.runtime.dataset import Data
from mmconvert.runtime.samples import SampleSource

STEPS, HALF = 6, 3
pytestmark = pytest.mark.slow


class Work:
    """A model, its MM form with the vision encoder alone on stage 0, and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hf = talking.make("qwen2_vl", folder / "hf")
        self.mm = tinyfamilies.convert("qwen2_vl", self.hf, folder / "mm", "[0,4]", "[2,1]")
        self.data = talking.write_data(folder)

    def train(self, save: Path, *more: str) -> None:
        words = ("--mm_dir", self.mm, "--hf_dir", self.hf, "--data", self.data, "--save", save)
        numbers = ("--train_iters", str(STEPS), "--lr", "1e-2", "--global_batch_size", "2")
        run_cli("finetune", *words, *numbers, *more, check=0)

    def back(self, mm: Path) -> dict[str, torch.Tensor]:
        """The tensors of an MM checkpoint in HF format."""
        out = self.folder / f"back-{mm.name}"
        mm_to_hf(mm, self.hf, out)
        found: dict[str, torch.Tensor] = {}
        for file in out.glob("*.safetensors"):
            found |= load_file(file)
        return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("finetune"))


def curve(save: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(text) for text in (save / "loss.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["loss"], line["rate"], line["norm"]) for line in lines]


def test_a_restart_gives_the_curve_of_an_undisturbed_run(work: Work) -> None:
    whole, cut = work.folder / "whole", work.folder / "cut"
    work.train(whole, "--save_interval", str(HALF))
    # A run that was stopped in its fifth iteration: the checkpoint of the third, a longer journal.
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / f"iter_{STEPS:07d}")
    (cut / "latest_checkpointed_iteration.txt").write_text(str(HALF))
    lines = (cut / "loss.jsonl").read_text().splitlines(keepends=True)
    (cut / "loss.jsonl").write_text("".join(lines[: HALF + 1]))
    work.train(cut, "--save_interval", str(HALF), "--resume")
    assert len(curve(whole)) == STEPS
    assert curve(cut) == curve(whole)  # to the bit
    assert curve(whole)[-1][1] < 0.8 * curve(whole)[0][1]  # it does learn
    first, second = work.back(whole), work.back(cut)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_wholly_frozen_stage_stays_and_the_rest_learns(work: Work) -> None:
    save = work.folder / "frozen"
    work.train(save, "--freeze", "image_encoder")
    before, after = work.back(work.mm), work.back(save)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    vision = {name for name in before if name.startswith("visual.")}
    assert vision
    assert not moved & vision
    assert len(moved) > 0.9 * len(before.keys() - vision)


def test_a_folder_with_a_checkpoint_is_not_written_over(work: Work) -> None:
    save = work.folder / "taken"
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    words = ("--mm_dir", work.mm, "--hf_dir", work.hf, "--data", work.data, "--save", save)
    done = run_cli("finetune", *words, check=2)
    assert "holds a checkpoint already" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in save.iterdir()] == ["latest_checkpointed_iteration.txt"]


def test_an_iteration_that_no_tracker_names_is_not_replaced(work: Work, tmp_path: Path) -> None:
    precious = tmp_path / "iter_0000001" / "precious"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(OutputError, match="holds iter_0000001"):
        talking.learn(work.mm, work.hf, [work.data], talking.plan(tmp_path, 1), resume=True)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lr", "1e30", "--clip_grad", "0"), "iteration 2: the loss is nan"),
        (("--val_rate", "0.5"), "--val_rate is given without --eval_interval"),
    ],
    ids=["lost", "never evaluated"],
)
def test_a_training_that_cannot_end_well_is_an_error(
    flags: tuple[str, ...], said: str, work: Work, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    words = ("--mm_dir", work.mm, "--hf_dir", work.hf, "--data", work.data, "--save", save)
    done = run_cli("finetune", *words, *flags, check=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(save.glob("iter_*")) == []


def test_a_restart_says_what_has_changed(work: Work, tmp_path: Path) -> None:
    heard: list[str] = []
    save, other = tmp_path / "save", tmp_path / "other.json"
    talking.learn(work.mm, work.hf, [work.data], talking.plan(save, 1))
    other.write_text(json.dumps([talking.talk("Hello.", "Hi.")]))
    what = talking.plan(save, 2, rate=1e-3)
    talking.commands.finetune(
        work.mm, work.hf, Data((SampleSource((other,)),)), what, "bf16", True,
        lambda event: heard.append(str(event)),
    )  # fmt: skip
    warned = {line.split()[1] for line in heard if line.startswith("warning: ")}
    assert warned == {"--lr", "--train_iters", "--dtype", "the"}
    assert any("the training data was 4 samples" in line for line in heard)


def test_evaluations_several_files_and_lines_for_machines(work: Work) -> None:
    save, more = work.folder / "evaluated", work.folder / "more"
    more.mkdir()
    talking.write_data(more)
    words = ("--mm-dir", work.mm, "--hf-dir", work.hf, "--save", save, "--train-iters", "4")
    data = ("--data", f"{work.data},{more / 'data.json'}", "--max-samples", "6")
    check = ("--val-rate", "0.34", "--eval-interval", "2", "--eval-iters", "5")
    flags = ("--log-interval", "2", "--log-tps", "--no-save-optim", "--lr", "1e-2", "--json")
    done = run_cli("finetune", *words, *data, *check, *flags, check=0)
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert [line["iteration"] for line in lines] == [2, 2, 4, 4, 4]
    assert [("loss" in line, "evaluation" in line) for line in lines[:4]] == [
        (True, False),
        (False, True),
    ] * 2
    assert lines[0]["tokens"] > 0
    losses = [
        json.loads(text).get("loss") for text in (save / "loss.jsonl").read_text().split("\n")[:-1]
    ]
    each = [loss for loss in losses if loss is not None]
    assert lines[2]["loss"] == pytest.approx((each[2] + each[3]) / 2)  # since the last line
    assert lines[4] == {"iteration": 4, "loss": each[3], "save": str(save)}
    assert (save / "loss.svg").read_text().count("<polyline") == 2
    content = torch.load(next(save.rglob("model_optim_rng.pt")), weights_only=True)
    assert set(content) == {"checkpoint_version", "iteration", "model", "training"}
    assert content["iteration"] == 4
    # The moments start at zero then, and it is said.
    again = ("--data", work.data, "--train-iters", "5", "--resume")
    told = run_cli("finetune", *words[:6], *again, check=0)
    assert "the checkpoint has no optimizer state" in told.stderr
    assert told.stdout.splitlines()[-1].startswith("done: loss ")
