"""MindSpeed-MM's data.json: where the conversations are, and how they are prepared.

Keys and defaults as MindSpeed-MM 2.0.0 to 26.1.0 has them: ``huggingface`` (Qwen) in
data_utils/func_utils/convert.py and mm_plugin.py, ``multimodal`` (InternVL) in
datasets/multimodal_dataset.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from mmconvert.errors import RequestError
from mmconvert.modeljson.file import read_object
from mmconvert.runtime.prepare import Prepare, Tiling
from mmconvert.runtime.samples import AUDIO, IMAGE, KINDS, VIDEO, Columns, SampleSource, listed
from mmconvert.runtime.template import INTERN_NAMED, NAMED

# Keys without effect here: how data is loaded, and fallbacks.
IDLE_BASIC = {
    "cache_dir", "preprocessing_batch_size", "preprocessing_num_workers", "overwrite_cache",
    "tool_format", "packing", "neat_packing", "streaming", "preprocess_on_fly", "async_preprocess",
    "async_preprocess_buffer_size", "return_type", "data_storage_mode",
    "val_dataset_dir",
}  # fmt: skip
IDLE_PREPROCESS = {
    "use_fast_tokenizer", "split_special_tokens", "image_resolution", "video_resolution",
    "image_do_pan_and_scan", "crop_to_patches", "image_reader_type",
}  # fmt: skip


@dataclass(frozen=True)
class DataJson:
    """What a data.json asks for.

    Attributes:
        hf_dir: the Hugging Face folder with tokenizer and processor, if it names one.
        train: the training data.
        check: data for evaluations, if files are named.
        rate: the share of the training data that is set aside for evaluations; 0 for none.
        prepare: how samples are prepared.
        notes: what is to be said of it.
    """

    hf_dir: Path | None
    train: tuple[SampleSource, ...]
    check: tuple[SampleSource, ...] = ()
    rate: float = 0.0
    prepare: Prepare = field(default_factory=Prepare)
    notes: tuple[str, ...] = ()


def read_data_json(path: Path) -> DataJson:
    """Reads a data.json.

    Raises:
        RequestError: it is missing, no such file, or asks for what is not supported here.
    """
    param = _object(read_object(path, "data.json"), "dataset_param", path)
    form = param.get("dataset_type")
    reader = {"huggingface": _huggingface, "multimodal": _multimodal}.get(str(form))
    if reader is None:
        raise RequestError(
            f"{path}: dataset_type is {form!r}", "huggingface (Qwen) or multimodal (InternVL)"
        )
    return reader(param, path)


class _Keys:
    """The keys of one part, taken one by one; what is left is nobody's."""

    def __init__(self, content: Mapping[str, Any], where: str, path: Path) -> None:
        self._content, self._where, self._path = dict(content), where, path

    def take(self, key: str, kind: type, default: Any) -> Any:  # noqa: ANN401 - by kind
        """A value; null counts as absent.

        Raises:
            RequestError: it is of another kind.
        """
        value = self._content.pop(key, None)
        if value is None:
            return default
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise RequestError(
                f"{self._path}: {self._where}.{key} is {value!r}"[:200], f"{kind.__name__} or null"
            )
        return kind(value)

    def count(self, key: str, default: int) -> int:
        """A number of at least 0."""
        value = self.take(key, int, default)
        if value < 0:
            raise RequestError(f"{self._path}: {self._where}.{key} is {value}", "0 or more")
        return int(value)

    def left(self, idle: set[str]) -> tuple[set[str], set[str]]:
        """(keys without effect, keys that nobody knows)."""
        return set(self._content) & idle, set(self._content) - idle


def _object(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = content.get(key)
    if not isinstance(found, dict):
        raise RequestError(f"{path} has no {key}", "MindSpeed-MM's data.json")
    return cast("dict[str, Any]", found)


def _notes(path: Path, *parts: tuple[set[str], set[str]]) -> tuple[str, ...]:
    idle = set[str]().union(*(part[0] for part in parts))
    unknown = set[str]().union(*(part[1] for part in parts))
    said: list[str] = []
    if idle:
        said.append(f"note: {path}: no effect here: {', '.join(listed(idle))}")
    if unknown:
        said.append(f"warning: {path}: unknown keys: {', '.join(listed(unknown))}")
    return tuple(said)


def _huggingface(param: dict[str, Any], path: Path) -> DataJson:
    """LLaMA-Factory's form."""
    basic = _Keys(_object(param, "basic_parameters", path), "basic_parameters", path)
    pre = _Keys(_object(param, "preprocess_parameters", path), "preprocess_parameters", path)
    named = basic.take("dataset", str, "")
    folder = Path(basic.take("dataset_dir", str, "data"))
    template = _template(basic.take("template", str, ""), "template", NAMED, path)
    if basic.take("cutoff_len", int, None) is not None:
        raise RequestError(
            f"{path}: basic_parameters.cutoff_len has no effect in MindSpeed-MM",
            "the length in the script",
            "leave it out, and give --seq-length",
        )
    columns = _columns(param.get("attr"), path)
    source = SampleSource(_files(named), basic.count("max_samples", 0), (folder,), columns)
    prepare = Prepare(
        image_pixels=(pre.count("image_min_pixels", 1024), pre.count("image_max_pixels", 589824)),
        video_pixels=(pre.count("video_min_pixels", 256), pre.count("video_max_pixels", 65536)),
        video_rate=pre.take("video_fps", float, 2.0),
        video_frames=pre.count("video_maxlen", 128),
        learn_questions=basic.take("train_on_prompt", bool, False),
        learn_last=basic.take("mask_history", bool, False),
        template=template,
        thinking=basic.take("enable_thinking", bool, True),
        sound_in_video=pre.take("use_audio_in_video", bool, False),
    )
    if pre.count("audio_sampling_rate", 16000) != 16000:
        raise RequestError(
            f"{path}: audio_sampling_rate is not 16000", "16000, as the audio encoder takes it"
        )
    check = basic.take("val_dataset", str, "")
    rate, limit = basic.take("val_rate", float, 0.0), basic.count("val_max_samples", 0)
    if not named:
        raise RequestError(
            f"{path}: basic_parameters.dataset names no file", "one or more data files"
        )
    hf_dir = pre.take("model_name_or_path", str, None)
    return DataJson(
        Path(hf_dir) if hf_dir else None,
        (source,),
        (replace(source, files=_files(check), most=limit),) if check else (),
        0.0 if check else rate,
        prepare,
        _notes(path, basic.left(IDLE_BASIC), pre.left(IDLE_PREPROCESS)),
    )


def _template(name: str, key: str, known: Collection[str], path: Path) -> str:
    """The name of a template that is known; "" where data.json names none.

    Raises:
        RequestError: another.
    """
    if name and name not in known:
        raise RequestError(f"{path}: {key} is {name!r}", f"one of {', '.join(known)}")
    return name


def _files(named: str) -> tuple[Path, ...]:
    return tuple(Path(name.strip()) for name in named.split(",") if name.strip())


ATTR = {
    "messages": "conversations", "role_tag": "from", "content_tag": "value", "user_tag": "human",
    "assistant_tag": "gpt", "system_tag": "system", "system": None, "images": None,
    "videos": None, "audios": None,
}  # fmt: skip
ATTR_IDLE = {"formatting", "ranking", "chosen", "rejected", "observation_tag", "function_tag"}


def _columns(attr: object, path: Path) -> Columns:
    """The ``attr`` part: a key that is absent has its default, one that is null has none."""
    given = cast("dict[str, Any]", attr) if isinstance(attr, dict) else {}
    if given.get("formatting", "sharegpt") != "sharegpt" or given.get("ranking"):
        raise RequestError(
            f"{path}: attr asks for {given.get('formatting')!r}, ranking {given.get('ranking')!r}",
            "sharegpt conversations; preferences (DPO) are not trained here",
        )
    unknown = sorted(given.keys() - ATTR.keys() - ATTR_IDLE)
    if unknown:
        raise RequestError(f"{path}: attr has the keys {', '.join(unknown)}", ", ".join(ATTR))
    word = {key: given.get(key, default) for key, default in ATTR.items()}
    for key, value in word.items():
        if not isinstance(value, str) and value is not None:
            raise RequestError(f"{path}: attr.{key} is {value!r}"[:200], "the name of a key")
    roles = {"user": word["user_tag"], "assistant": word["assistant_tag"]}
    roles["system"] = word["system_tag"]
    for key in ("messages", "role_tag", "content_tag", "user_tag", "assistant_tag"):
        if not word[key]:
            raise RequestError(f"{path}: attr.{key} is {word[key]!r}", "the name of a key")
    return Columns(
        str(word["messages"]),
        str(word["role_tag"]),
        str(word["content_tag"]),
        {tag: role for role, tag in roles.items() if tag},
        word["system"],
        {kind: word[f"{kind}s"] for kind in KINDS},
    )


# ----------------------------------------------------------------------------------- InternVL
TOP_READ = {  # not by _Keys
    "dataset_type", "basic_parameters", "preprocess_parameters", "tokenizer_config",
    "template_name",
}  # fmt: skip
TOP_IDLE = {
    "image_size", "patch_size", "down_sample_ratio", "group_by_length", "sampling_method",
    "use_text_processer", "is_multimodal", "mm_use_im_start_end", "patch_size_t", "attr",
}  # fmt: skip


def _multimodal(param: dict[str, Any], path: Path) -> DataJson:
    """InternVL's form."""
    others = {key: value for key, value in param.items() if key not in TOP_READ}
    top = _Keys(others, "dataset_param", path)
    given = param.get("basic_parameters")
    parts = cast("list[object]", given) if isinstance(given, list) else [given]
    sources: list[SampleSource] = []
    check: list[SampleSource] = []
    rate, idle, unknown = 0.0, set[str](), set[str]()
    for part in parts:
        if not isinstance(part, dict):
            raise RequestError(f"{path} has no basic_parameters", "MindSpeed-MM's data.json")
        basic = _Keys(cast("dict[str, Any]", part), "basic_parameters", path)
        named, folder = basic.take("data_path", str, ""), basic.take("data_folder", str, "")
        if not named:
            raise RequestError(f"{path}: basic_parameters.data_path names no file", "a data file")
        share = basic.take("repeat_time", float, 1.0)
        if share <= 0 or (share > 1 and share != int(share)):
            raise RequestError(
                f"{path}: repeat_time is {share}", "a share up to 1, or a whole number above it"
            )
        columns = Columns(files={IMAGE: IMAGE, VIDEO: VIDEO, AUDIO: None}, front="\n")
        folders = (Path(folder),) if folder else ()
        sources.append(SampleSource(_files(named), 0, folders, columns, share))
        held, limit = basic.take("val_dataset", str, ""), basic.count("val_max_samples", 0)
        rate = basic.take("val_rate", float, 0.0) or rate
        if held:
            check.append(SampleSource(_files(held), limit, folders, columns))
        left = basic.left(IDLE_BASIC)
        idle, unknown = idle | left[0], unknown | left[1]
    tokenizer = param.get("tokenizer_config")
    hf_dir = cast("dict[str, Any]", tokenizer).get("from_pretrained") if tokenizer else None
    tiling = Tiling(
        dynamic=top.take("dynamic_image_size", bool, False),
        thumbnail=top.take("use_thumbnail", bool, False),
        least=top.count("min_dynamic_patch", 1),
        most=top.count("max_dynamic_patch", 6),
        square=_pads(param),
    )
    frames = (top.count("min_num_frame", 4), top.count("max_num_frame", 12))
    named = param.get("template_name", "internlm2-chat")
    template = _template(str(named), "template_name", INTERN_NAMED, path)
    return DataJson(
        Path(hf_dir) if isinstance(hf_dir, str) and hf_dir else None,
        tuple(sources),
        tuple(check),
        0.0 if check else rate,
        Prepare(tiling=tiling, video_frames=frames[1], template=template),
        _notes(path, (idle, unknown), top.left(TOP_IDLE)),
    )


def _pads(param: Mapping[str, Any]) -> bool:
    """Whether pictures are padded to squares: Pad2Square in the pipeline of pictures."""
    found: object = param
    for key in ("preprocess_parameters", "train_pipeline", "image"):
        found = cast("dict[str, object]", found).get(key) if isinstance(found, dict) else None
    steps = cast("list[object]", found) if isinstance(found, list) else []
    return any(
        isinstance(step, dict) and cast("dict[str, object]", step).get("trans_type") == "Pad2Square"
        for step in steps
    )
