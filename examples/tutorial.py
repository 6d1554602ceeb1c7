"""The tutorial: a checkpoint goes to MM format, is checked, learns six captions, and comes back.

A small Qwen2-VL with random weights, six photographs of scikit-image. Every step is a real run of
the command line; at the end the runtime (TP2 PP2, four processes) and transformers (the model that
was converted back) are asked about every picture, and must say the same. On a CPU with two cores
it takes about a minute: ``python examples/tutorial.py [FOLDER]``. docs/tutorial.md explains it.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")  # four processes share the cores

CAPTIONS = {
    "astronaut": "A smiling astronaut in an orange suit.",
    "camera": "A man films with a camera on a tripod.",
    "chelsea": "A close-up of a tabby cat with green eyes.",
    "coffee": "A cup of black coffee beside a spoon.",
    "coins": "Rows of old Greek coins in grey.",
    "rocket": "A white rocket on its launch pad at dusk.",
}
SIZE = 112  # pixels of a picture, wide and high
QUESTION = "What is in this picture?"
CAT = "pictures/chelsea.png"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>")  # fmt: skip
ASK = ("--image", CAT, "--prompt", QUESTION, "--max_new_tokens", "24")
# Title and words of each command, in the order of the story.
STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "2. to MM format: TP2 PP2, the vision encoder on the first stage",
        ("Qwen2VLConverter", "hf_to_mm", "--cfg.hf_config.hf_dir", "hf", "--cfg.mm_dir", "mm",
         "--cfg.parallel_config.llm_pp_layers", "[1,3]",
         "--cfg.parallel_config.vit_pp_layers", "[4,0]",
         "--cfg.parallel_config.tp_size", "2"),
    ),
    (
        "3. does it compute what transformers computes?",
        ("validate", "--mm_dir", "mm", "--hf_dir", "hf"),
    ),
    (
        "4. before the training it knows nothing",
        ("generate", "--mm_dir", "mm", "--hf_dir", "hf", *ASK),
    ),
    (
        "5. 100 steps of fine-tuning",
        ("finetune", "--mm_dir", "mm", "--hf_dir", "hf", "--data", "captions.json",
         "--save", "trained", "--train_iters", "100", "--save_interval", "50",
         "--micro_batch_size", "3", "--global_batch_size", "6",
         "--lr", "2e-3", "--min_lr", "2e-4", "--warmup_iters", "5",
         "--log_interval", "10", "--log_tps"),
    ),
    (
        "6. after it",
        ("generate", "--mm_dir", "trained", "--hf_dir", "hf", *ASK),
    ),
    (
        "7. back to Hugging Face",
        ("Qwen2VLConverter", "mm_to_hf", "--cfg.mm_dir", "trained",
         "--cfg.hf_config.hf_dir", "hf", "--cfg.save_hf_dir", "hf_trained"),
    ),
)  # fmt: skip


def shown(words: tuple[str, ...]) -> str:
    """A command as one types it, a flag a line."""
    quoted = [f'"{word}"' if " " in word else word for word in words]
    return f"mm-convert {' '.join(quoted)}".replace(" --", " \\\n    --")


def pictures(folder: Path) -> None:
    """Six photographs, cut to squares and made small."""
    try:
        from skimage import data
    except ImportError:
        sys.exit("the tutorial's pictures are those of scikit-image: pip install scikit-image")
    from PIL import Image

    folder.mkdir()
    for name in CAPTIONS:
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        square = photo.crop((left, top, left + side, top + side))
        square.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(folder / f"{name}.png")


def conversations(path: Path) -> None:
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
    path.write_text(json.dumps(items, indent=2))


def tokenizer(folder: Path) -> dict[str, int]:
    """A small byte-level BPE trained on the captions; ids of the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*CAPTIONS.values(), QUESTION, "You are a helpful assistant.\nsystem\nuser\n"]
    made.train_from_iterator(texts * 4, trainer)
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return {word: made.token_to_id(word) or 0 for word in SPECIALS}


def model(folder: Path) -> int:
    """A Qwen2-VL with random weights, its tokenizer and its processor; number of parameters."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()  # before the classes, which warn of what they do not find
    logging.disable_progress_bar()
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    ids = tokenizer(folder)
    text = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 448,
        "max_position_embeddings": 512,
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
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
    made: Any = Qwen2VLForConditionalGeneration(config)
    made.save_pretrained(folder)
    processor: Any = Qwen2VLImageProcessor(min_pixels=SIZE * SIZE, max_pixels=SIZE * SIZE)
    processor.save_pretrained(folder)
    return sum(p.numel() for p in made.parameters())


def mm_convert(work: Path, words: tuple[str, ...]) -> None:
    """Runs the command line in a folder, showing it and what it prints; stops if it fails."""
    print(f"$ {shown(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "mmconvert", *words], cwd=work, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stderr}the command ended with exit code {done.returncode}")


def runtime_says(mm: Path, hf: Path, adapter: Path | None = None) -> list[str]:
    """What an MM checkpoint says of the pictures, in its own layout: as ``generate``, in Python."""
    from mmconvert.runtime import commands
    from mmconvert.runtime.answers import How
    from mmconvert.runtime.conversation import prompt
    from mmconvert.runtime.lora import LoraFolders

    lora = None if adapter is None else LoraFolders(adapter, None)

    return [
        commands.generate(
            mm,
            hf,
            prompt(QUESTION, [hf.parent / "pictures" / f"{name}.png"], ()),
            how=How(most=24, lora=lora),
        ).text
        for name in CAPTIONS
    ]


def transformers_says(hf: Path, pictures: Path, adapter: Path | None = None) -> list[str]:
    """What transformers says of them, by its own model, tokenizer and processor, with PEFT's."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    speaker: Any = AutoTokenizer.from_pretrained(hf)
    processor: Any = Qwen2VLImageProcessor.from_pretrained(hf)
    network: Any = Qwen2VLForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, adapter).eval()
    answers: list[str] = []
    for name in CAPTIONS:
        with Image.open(pictures / f"{name}.png") as picture:
            pixels = processor(images=[picture.convert("RGB")], return_tensors="pt")
        places = "<|image_pad|>" * int(pixels["image_grid_thw"].prod() // 4)
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|>{places}<|vision_end|>{QUESTION}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = speaker(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == network.config.image_token_id).int(),
            **pixels,
            max_new_tokens=24,
            do_sample=False,
        )
        answers.append(speaker.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def compared(work: Path) -> bool:
    """Shows the answers of both sides; whether all are as they should be."""
    before = runtime_says(work / "mm", work / "hf")
    after = runtime_says(work / "trained", work / "hf")
    theirs = transformers_says(work / "hf_trained", work / "pictures")
    expected = list(CAPTIONS.values())
    print(f"{'picture':<11}{'before the training':<28}after it")
    for name, old, new in zip(CAPTIONS, before, after, strict=True):
        print(f"{name:<11}{old.replace(chr(10), ' ')[:25]:<28}{new}")
    right = sum(a == b for a, b in zip(after, expected, strict=True))
    same = sum(a == b for a, b in zip(after, theirs, strict=True))
    wrong = sum(a != b for a, b in zip(before, expected, strict=True))
    print(f"\nwrong before the training                         {wrong} of {len(expected)}")
    print(f"right after it                                    {right} of {len(expected)}")
    print(f"word for word the same in transformers            {same} of {len(expected)}")
    return wrong == right == same == len(expected)


def emptied(work: Path) -> Path:
    """The folder to work in, empty; one that this script has not made is left alone."""
    mark = work / "captions.json"
    if work.exists() and any(work.iterdir()) and not mark.is_file():
        sys.exit(f"{work} holds other things: give another folder")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    mark.touch()
    return work


def rule(title: str) -> None:
    print(f"\n--- {title} {'-' * (86 - len(title))}", flush=True)


def main(work: Path) -> int:
    """Tells the story; exit code 1 if it does not end well."""
    began = time.perf_counter()
    work = emptied(work)
    rule("1. a small Qwen2-VL with random weights, six photographs, six captions")
    pictures(work / "pictures")
    conversations(work / "captions.json")
    print(f"{model(work / 'hf'):,} parameters; pictures and captions in captions.json")
    for title, words in STEPS:
        rule(title)
        mm_convert(work, words)
    rule("8. all pictures: the runtime on four processes, and transformers")
    good = compared(work)
    print(f"\nthe loss curve: {work / 'trained' / 'loss.svg'}")
    print(
        f"The tutorial has {'passed' if good else 'FAILED'}, {time.perf_counter() - began:.0f} s."
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "tutorial-output")))
