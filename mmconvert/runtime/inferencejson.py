"""MindSpeed-MM's inference_*.json: what to ask whom, for ``generate``.

Keys as MindSpeed-MM 2.0.0 to 26.1.0 reads them (inference_vlm.py, tasks/inference/pipeline/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmconvert.errors import RequestError
from mmconvert.modeljson.file import ModelJson, read_model_json

LONGEST = 256  # tokens of an answer where nothing is said


@dataclass(frozen=True)
class Inference:
    """A question, and whom to ask.

    Attributes:
        model: the file as a model.json: layer lists and sizes.
        mm_dir: the checkpoint, where the file names one (InternVL).
        hf_dir: the Hugging Face folder with tokenizer and processor.
        prompt, images, videos: the question.
        most: tokens of the answer at most.
        penalty: how much less probable words become that have been said; 1 for none.
        dtype: what is computed in.
        frames: of a video; 0 for the usual number.
        plain: the prompt is continued as it is, without the form of a chat.
    """

    model: ModelJson
    mm_dir: Path | None
    hf_dir: Path | None
    prompt: str
    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    most: int = LONGEST
    penalty: float = 1.0
    dtype: str = ""
    frames: int = 0
    plain: bool = False


def read_inference(path: Path) -> Inference:
    """Reads an inference file.

    Raises:
        RequestError: it is missing, no such file, or asks for what cannot be honoured.
    """
    model = read_model_json(path)
    keys = model.content
    images, videos = _file(keys, "image_path", path), _file(keys, "video_path", path)
    kind, named = keys.get("infer_data_type"), _file(keys, "file_path", path)
    if named and kind == "video":
        videos = named
    elif named:
        images = named
    prompt = keys.get("prompts")
    if isinstance(prompt, list) and len(cast("list[object]", prompt)) == 1:
        prompt = cast("list[object]", prompt)[0]
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(f"{path}: prompts is {prompt!r}"[:200], "one question, as text")
    tokenizer = cast("Mapping[str, Any]", keys.get("tokenizer") or {})
    hf_dir = tokenizer.get("from_pretrained")
    config = _generation(keys.get("generation_config"), path)
    dtype = {"bf16": "bf16", "fp32": "fp32", "float32": "fp32"}.get(str(keys.get("dtype")), "")
    return Inference(
        model,
        _rank_folder(keys.get("from_pretrained")),
        Path(hf_dir) if isinstance(hf_dir, str) else None,
        prompt,
        images,
        videos,
        int(config.get("max_new_tokens") or LONGEST),
        float(config.get("repetition_penalty") or 1.0),
        dtype,
        int(keys.get("num_segments") or 0) if kind == "video" else 0,
        not images and not videos and "infer_data_type" not in keys,
    )


def _file(keys: Mapping[str, Any], key: str, path: Path) -> tuple[Path, ...]:
    value = keys.get(key)
    if value is None or value == "":
        return ()
    if not isinstance(value, str):
        raise RequestError(f"{path}: {key} is {value!r}"[:200], "the path of a file")
    return (Path(value),)


def _rank_folder(value: object) -> Path | None:
    """The checkpoint of ``from_pretrained``: a rank file, ``mp_rank_00/model_optim_rng.pt``."""
    if not isinstance(value, str) or not value:
        return None
    named = Path(value)
    return named.parent.parent if named.suffix == ".pt" else named


def _generation(given: object, path: Path) -> Mapping[str, Any]:
    """The generation_config; answers are greedy.

    Raises:
        RequestError: it draws words, or has a number that is none.
    """
    config = cast("Mapping[str, Any]", given if isinstance(given, dict) else {})
    numbers = {key: config.get(key) for key in ("temperature", "top_k", "repetition_penalty")}
    numbers["max_new_tokens"] = config.get("max_new_tokens")
    for key, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise RequestError(f"{path}: generation_config.{key} is {value!r}"[:200], "a number")
    hot = config.get("temperature") or 0
    draws = config.get("do_sample", bool(hot))
    if draws and hot and config.get("top_k") != 1:
        raise RequestError(
            f"{path}: temperature {hot} and top_k {config.get('top_k')} draw words at random",
            "the best word each time",
            "top_k 1 or temperature 0, as the guides' own files have it",
        )
    return config
