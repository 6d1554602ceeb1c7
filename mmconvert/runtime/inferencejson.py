"""MindSpeed-MM's inference_*.json: what to ask whom, for ``generate``.

Keys as MindSpeed-MM 2.0.0 to 26.1.0 reads them (inference_vlm.py, tasks/inference/pipeline/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mmconvert.errors import RequestError
from mmconvert.modeljson.file import ModelJson, read_model_json
from mmconvert.runtime.sampling import Sampling

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
        choice: how words are chosen.
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
    choice: Sampling = field(default_factory=Sampling)
    dtype: str = ""
    frames: int = 0
    plain: bool = False


def read_inference(path: Path) -> Inference:
    """Reads an inference file.

    Raises:
        RequestError: it is missing, no such file, or asks for what is not supported here.
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
        _rank_folder(keys.get("from_pretrained"), path),
        Path(hf_dir) if isinstance(hf_dir, str) else None,
        prompt,
        images,
        videos,
        int(config.get("max_new_tokens") or LONGEST),
        _choice(config),
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


def _rank_folder(value: object, path: Path) -> Path | None:
    """The checkpoint of ``from_pretrained``: a rank file, ``mp_rank_00/model_optim_rng.pt``.

    Raises:
        RequestError: it is a file outside of its checkpoint, which alone says its layout.
    """
    if not isinstance(value, str) or not value:
        return None
    named = Path(value)
    if named.suffix != ".pt":
        return named
    if not named.parent.name.startswith("mp_rank_"):
        raise RequestError(
            f"{path}: from_pretrained is {value}, a rank file outside of its checkpoint",
            "release/mp_rank_00/model_optim_rng.pt of a checkpoint, where it was written",
            "write that, or give --load MM_DIR and leave from_pretrained out",
        )
    return named.parent.parent


def _generation(given: object, path: Path) -> Mapping[str, Any]:
    """The generation_config.

    Raises:
        RequestError: it has a number that is none.
    """
    config = cast("Mapping[str, Any]", given if isinstance(given, dict) else {})
    for key in ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"):
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise RequestError(f"{path}: generation_config.{key} is {value!r}"[:200], "a number")
    return config


def _choice(config: Mapping[str, Any]) -> Sampling:
    """Words are drawn where a temperature says so, and nothing forbids it."""
    hot = float(config.get("temperature") or 0)
    return Sampling(
        float(config.get("repetition_penalty") or 1.0),
        hot if config.get("do_sample", True) else 0.0,
        int(config.get("top_k") or 0),
        float(config.get("top_p") or 1.0),
    )
