"""A small Qwen2-VL that the runtime can run: with a tokenizer of single bytes."""

from __future__ import annotations

from pathlib import Path

from mmconvert.playground.checkpoints import make_hf
from mmconvert.playground.weights import Json, write_json

# Special tokens and the keys of config.json that have their numbers.
SPECIALS = {
    "<|endoftext|>": "bos_token_id",
    "<|im_start|>": "",
    "<|im_end|>": "eos_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
FIRST = 256
SIDE = 56  # pixels of a picture: four by four patches


def letters() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level vocabularies, in byte order.

    Printable characters of Latin-1 stand for themselves, the others for those from U+0100 on, as
    in the byte-level BPE of GPT-2.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def make_talker(out: Path) -> Path:
    """Writes the checkpoint: 4 text and 4 vision layers, random weights."""
    ids = {word: FIRST + n for n, word in enumerate(SPECIALS)}

    def with_ids(config: Json) -> Json:
        found = {key: ids[word] for word, key in SPECIALS.items() if key}
        found.pop("bos_token_id")
        return config | found | {"bos_token_id": FIRST, "vision_token_id": FIRST}

    make_hf("qwen2vl-2b", out, 1, layers=4, vit_layers=4, vocab_size=304, edit_config=with_ids)
    added: list[Json] = [
        {"id": n, "content": word, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for word, n in ids.items()
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {letter: n for n, letter in enumerate(letters())},
            "merges": [],
        },
    }
    eos = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    processor: Json = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": SIDE * SIDE,
        "max_pixels": SIDE * SIDE,
    }
    files: dict[str, object] = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **eos},
        "preprocessor_config.json": processor,
        "generation_config.json": {"eos_token_id": ids["<|im_end|>"], "do_sample": False},
    }
    for name, content in files.items():
        write_json(out / name, content)
    for name in ("vocab.json", "merges.txt"):  # of another tokenizer
        (out / name).unlink()
    return out
