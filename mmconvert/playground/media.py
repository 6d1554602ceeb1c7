"""Data sets of a few pictures, in the forms of the guides, and their pictures."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path

from mmconvert.playground.weights import write_json

SIDE = 56  # pixels
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 200), "grey": (120,) * 3}
QUESTION = "Which colour is this?"
# A grey JPEG of 8 x 8 pixels (ITU-T T.81).
JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkz"
    "ODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/wAALCAAIAAgBAREA/8QAHwAAAQUBAQEB"
    "AQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1Fh"
    "ByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZ"
    "WmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXG"
    "x8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/9oACAEBAAA/ACv/2Q=="
)


def png(colour: tuple[int, ...]) -> bytes:
    """A square in one colour with a white stripe, as a PNG file (RFC 2083)."""
    row = b"\0" + bytes(colour) * SIDE
    stripe = b"\0" + b"\xff\xff\xff" * SIDE
    rows = row * (SIDE // 2) + stripe * 4 + row * (SIDE - SIDE // 2 - 4)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    ends = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(ends)


def make_data(out: Path) -> None:
    """``data/``: pictures, conversations of them, and ``data.json`` in MindSpeed-MM's form;
    ``llava.json`` and ``coco/`` for the tool that brings annotations into that form.
    """
    (out / "data/pictures").mkdir(parents=True)
    items: list[object] = []
    for name, colour in COLOURS.items():
        (out / f"data/pictures/{name}.png").write_bytes(png(colour))
        said = [("user", f"<image>{QUESTION}"), ("assistant", f"It is {name}.")]
        messages = [{"role": role, "content": content} for role, content in said]
        items.append({"images": [f"pictures/{name}.png"], "messages": messages})
    write_json(out / "data/train.json", items)
    write_json(out / "data.json", data_json())
    write_json(out / "llava.json", llava(out / "coco/train2014"))


def data_json() -> dict[str, object]:
    """What a guide has its reader edit: where the data lies, and which keys it has."""
    return {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": "hf_tiny",
                "image_max_pixels": SIDE * SIDE,
                "image_min_pixels": SIDE * SIDE,
            },
            "basic_parameters": {
                "template": "qwen2vl",
                "dataset_dir": "data",
                "dataset": "data/train.json",
                "cache_dir": "cache",
                "train_on_prompt": False,
            },
            "attr": {
                "images": "images",
                "messages": "messages",
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
        "dataloader_param": {"dataloader_mode": "sampler", "drop_last": True},
    }


def llava(folder: Path) -> list[object]:
    """Annotations in the form of LLaVA, with the oddities that they have, and their pictures."""
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"COCO_train2014_{name}.jpg").write_bytes(JPEG)
    values = {"a": "<image>\nWhat is this?", "b": "What is this?\n<image>", "no": "<image>\nWhat?"}
    items: list[object] = [
        {"image": f"{image}.jpg", "conversations": [{"from": "human", "value": value}]}
        for image, value in values.items()
    ]
    return [*items, {"conversations": [{"from": "human", "value": "Hello."}]}]
