"""The whole way on one machine: convert, check, fine-tune, convert back, and ask again.

A small Qwen2-VL with random weights learns to caption six pictures that this script draws. Before
the training its answers are noise; afterwards the MM checkpoint and, converted back, transformers
give the captions in the same words. Runs on a CPU in about a minute:
``python examples/tutorial.py [FOLDER]``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CAPTIONS = {
    "circle": "A red circle on a white ground.",
    "cross": "Two green lines cross each other.",
    "flag": "A flag with three stripes: black, red and gold.",
    "house": "A brown house stands on a green meadow.",
    "moon": "A yellow moon shines in the dark sky.",
    "stairs": "Blue stairs lead up to the right.",
}
SIZE = 112  # pixels of a picture, wide and high
QUESTION = "What is in this picture?"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>")  # fmt: skip
LAYOUT = {"llm_pp_layers": "[1,3]", "vit_pp_layers": "[4,0]", "tp_size": "2"}
STEPS = 100


def pictures(folder: Path) -> list[Path]:
    """Draws the pictures."""
    from PIL import Image, ImageDraw

    grounds = {"circle": "white", "cross": "white", "flag": "gold", "house": "skyblue"}
    grounds |= {"moon": "midnightblue", "stairs": "white"}
    folder.mkdir(parents=True)
    for name, ground in grounds.items():
        image = Image.new("RGB", (SIZE, SIZE), ground)
        pen = ImageDraw.Draw(image)
        if name == "circle":
            pen.ellipse((20, 20, 92, 92), fill="red")
        elif name == "cross":
            pen.line((10, 10, 102, 102), fill="green", width=14)
            pen.line((10, 102, 102, 10), fill="green", width=14)
        elif name == "flag":
            pen.rectangle((0, 0, SIZE, 37), fill="black")
            pen.rectangle((0, 38, SIZE, 74), fill="red")
        elif name == "house":
            pen.rectangle((0, 80, SIZE, SIZE), fill="green")
            pen.polygon([(26, 50), (56, 20), (86, 50), (86, 90), (26, 90)], fill="saddlebrown")
        elif name == "moon":
            pen.ellipse((60, 14, 98, 52), fill="yellow")
        else:
            for step in range(4):
                pen.rectangle((28 * step, 84 - 28 * step, SIZE, SIZE), fill=(0, 0, 255 - 50 * step))
        image.save(folder / f"{name}.png")
    return sorted(folder.glob("*.png"))


def conversations(folder: Path) -> Path:
    """The data file: one question and one caption for each picture."""
    items = [
        {
            "images": [f"pictures/{name}.png"],
            "messages": [
                {"role": "user", "content": f"<image>{QUESTION}"},
                {"role": "assistant", "content": caption},
            ],
        }
        for name, caption in CAPTIONS.items()
    ]
    path = folder / "captions.json"
    path.write_text(json.dumps(items, indent=2))
    return path


def tokenizer(folder: Path) -> dict[str, int]:
    """A small byte-level BPE trained on the captions; ids of the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=448, special_tokens=list(SPECIALS), initial_alphabet=alphabet
    )
    words = [
        *CAPTIONS.values(),
        QUESTION,
        "You are a helpful assistant.\nsystem\nuser\nassistant\n",
    ] * 4
    made.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return {word: int(made.token_to_id(word)) for word in SPECIALS} | {"vocab": 448}


def model(folder: Path) -> None:
    """A Qwen2-VL of a million parameters with random weights, and its processor."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    ids = tokenizer(folder)
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": ids["vocab"]}
    text |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    }
    text |= {"eos_token_id": ids["<|im_end|>"], "bos_token_id": ids["<|im_start|>"]}
    text |= {"max_position_embeddings": 512}
    vision = {"depth": 4, "embed_dim": 64, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(3)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessor(min_pixels=SIZE * SIZE, max_pixels=SIZE * SIZE).save_pretrained(folder)


def run(*words: str | Path, show: bool = True) -> str:
    """A command of mm-convert, shown and run; its output."""
    print(f"\n$ mm-convert {' '.join(str(w) for w in words)}", flush=True)
    command = [sys.executable, "-m", "mmconvert", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if show:
        kept = lines if len(lines) < 14 else [*lines[:3], "...", *lines[-3:]]
        print("\n".join(kept), flush=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def ask(mm: Path, hf: Path, picture: Path) -> str:
    """What the MM checkpoint says of a picture."""
    words = ("--max_new_tokens", "24", "--prompt", QUESTION)
    return run("generate", "--mm_dir", mm, "--hf_dir", hf, "--image", picture, *words).strip()


def transformers_says(hf: Path, drawn: list[Path]) -> list[str]:
    """What transformers says of the pictures, by its own model, tokenizer and processor."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    speaker: Any = AutoTokenizer.from_pretrained(hf)
    processor: Any = Qwen2VLImageProcessor.from_pretrained(hf)
    network: Any = Qwen2VLForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    answers: list[str] = []
    for path in drawn:
        with Image.open(path) as picture:
            pixels = processor(images=[picture.convert("RGB")], return_tensors="pt")
        places = "<|image_pad|>" * int(pixels["image_grid_thw"].prod() // 4)
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|>{places}<|vision_end|>{QUESTION}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        given = speaker(text, return_tensors="pt", add_special_tokens=False)
        ids = given["input_ids"]
        types = (ids == network.config.image_token_id).int()
        out = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            **pixels,
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=speaker.convert_tokens_to_ids("<|im_end|>"),
        )
        answers.append(speaker.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def main(folder: Path) -> int:
    """The tutorial; exit code 1 if the words are not those that they should be."""
    began = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    drawn = pictures(folder / "pictures")
    data = conversations(folder)
    hf, mm, trained, back = (folder / name for name in ("hf", "mm", "trained", "hf_trained"))
    model(hf)
    layout = [w for key, value in LAYOUT.items() for w in (f"--cfg.parallel_config.{key}", value)]
    run("Qwen2VLConverter", "hf_to_mm", "--cfg.hf_config.hf_dir", hf, "--cfg.mm_dir", mm, *layout)
    run("validate", "--mm_dir", mm, "--hf_dir", hf)
    moon = folder / "pictures" / "moon.png"
    before = ask(mm, hf, moon)
    words = (
        "--train_iters",
        str(STEPS),
        "--save_interval",
        "50",
        "--lr",
        "2e-3",
        "--min_lr",
        "2e-4",
    )
    batch = ("--warmup_iters", "5", "--micro_batch_size", "3", "--global_batch_size", "6")
    run(
        "finetune",
        "--mm_dir",
        mm,
        "--hf_dir",
        hf,
        "--data",
        data,
        "--save",
        trained,
        *words,
        *batch,
        "--log_tps",
    )
    after = ask(trained, hf, moon)
    run(
        "Qwen2VLConverter",
        "mm_to_hf",
        "--cfg.mm_dir",
        trained,
        "--cfg.hf_config.hf_dir",
        hf,
        "--cfg.save_hf_dir",
        back,
    )
    print("\nwhat transformers says after the training:", flush=True)
    answers = transformers_says(back, drawn)
    wanted = [CAPTIONS[picture.stem] for picture in drawn]
    for picture, answer, caption in zip(drawn, answers, wanted, strict=True):
        print(f"  {picture.name:<14} {'right' if answer == caption else 'WRONG'}  {answer}")
    same = after == answers[[p.name for p in drawn].index("moon.png")]
    print(f"\nbefore the training: {before!r}\nafter it:            {after!r}")
    print(f"the runtime and transformers say the same: {'yes' if same else 'NO'}")
    print(f"the loss curve: {trained / 'loss.svg'}\n{time.perf_counter() - began:.0f} seconds")
    return 0 if same and answers == wanted and before != after else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "tutorial-output")))
