"""Transformers' model of each family: its class, its config, and where its modules are."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers

from mmconvert.causes.quantised import without_method
from mmconvert.converters import BUILT_IN, load
from mmconvert.errors import CheckpointError, MMConvertError
from mmconvert.narrow import is_object
from mmconvert.runtime.internconfig import intern_config
from mmconvert.runtime.samples import AUDIO
from mmconvert.runtime.shard import params_on_meta

# InternVL as its authors publish it, and in the names of transformers' own class.
ORIGINAL = "internvl_chat"
INTERN = (ORIGINAL, "internvl")
CLASSES = {
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "qwen2_5_omni": ("Qwen2_5OmniThinkerConfig", "Qwen2_5OmniThinkerForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
    "glm4v": ("Glm4vConfig", "Glm4vForConditionalGeneration"),
    **dict.fromkeys(INTERN, ("InternVLConfig", "InternVLForConditionalGeneration")),
}
THINKER = "qwen2_5_omni_thinker"  # model_type of Omni's thinker saved alone


class ModuleKeys(NamedTuple):
    """The keys of a model's modules, which name their stage grids and tp sizes: as its family's
    table has them.

    Attributes:
        vision: of the encoder of pictures.
        sound: of the encoder of sounds; "" if there is none.
        text: of the decoder.
    """

    vision: str
    sound: str
    text: str

    @property
    def encoders(self) -> list[str]:
        """Those of the encoders, in their order."""
        return [key for key in self[:2] if key]


def module_keys(kind: str) -> ModuleKeys:
    """The keys of a family's modules.

    Args:
        kind: ``model_type`` of config.json.
    """
    family = next(f for name in BUILT_IN if kind in (f := load(name)).model_types)
    modules = family.table(family.variants[0])
    encoders = {m.medium: m.key for m in modules if m.role == "encoder"}
    text = next(m.key for m in modules if m.role == "decoder")
    return ModuleKeys(encoders["pictures"], encoders.get("sounds", ""), text)


@dataclass(frozen=True)
class Parts:
    """The modules of a model of transformers.

    Attributes:
        keys: of the modules.
        visual: vision encoder; for InternVL the model that has encoder and projector.
        audio: audio encoder, or None.
        text: text model without its output layer.
        owner: the module that has ``lm_head``.
        positions: the module that has ``get_rope_index``, or None.
    """

    keys: ModuleKeys
    visual: Any
    audio: Any
    text: Any
    owner: Any
    positions: Any

    def find(self, module: str, name: str) -> Any:  # noqa: ANN401 - a module or parameter
        """A module or parameter by the key of its module and its name there."""
        root = dict(zip(self.keys, (self.visual, self.audio, self.text), strict=True))[module]
        if module == self.keys.text and name.split(".")[0] == "lm_head":
            root = self.owner
        for word in name.split("."):
            root = getattr(root, word) if not word.isdigit() else root[int(word)]
        return root


@dataclass(frozen=True)
class Architecture:
    """A family's model, as config.json says.

    Attributes:
        kind: ``model_type`` of config.json.
        config: transformers' config of what is computed (for Omni, the thinker's).
        tied: whether the output layer is the word embedding.
        keys: of its modules.
    """

    kind: str
    config: Any
    tied: bool
    keys: ModuleKeys

    @property
    def intern(self) -> bool:
        """Whether it is InternVL."""
        return self.kind in INTERN

    @property
    def deepstack(self) -> list[int]:
        """The vision layers whose rows go to text layers of their own, in order."""
        return sorted(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))

    @property
    def experts(self) -> int:
        """Experts of a text layer; 0 if there are none."""
        return int(getattr(self.text_config, "num_experts", None) or 0)

    @property
    def timed(self) -> bool:
        """Whether the frames of a video stand apart in the text, each behind its time."""
        return self.kind in ("qwen3_vl", "qwen3_vl_moe")

    @property
    def text_config(self) -> Any:  # noqa: ANN401 - transformers' config
        """The config of the text model."""
        return self.config.text_config

    def image_token(self) -> int:
        """Id of the placeholder of one image token."""
        return int(self.config.image_token_id)

    def token(self, name: str) -> int | None:
        """Another token id of the config, or None."""
        value = getattr(self.config, name, None)
        return value if isinstance(value, int) else None

    def around(self, kind: str) -> tuple[list[int], list[int]]:
        """The tokens before and behind the placeholders of an image, a video or an audio."""
        ends = list[list[int]]()
        for end in ("start", "end"):
            names = [f"{kind}_{end}_token_id"]
            names += [f"vision_{end}_token_id"] if kind != AUDIO else []
            found = [token for name in names if (token := self.token(name)) is not None]
            ends.append([token for token in found if token < self.text_config.vocab_size][:1])
        return ends[0], ends[1]

    @property
    def places(self) -> set[int]:
        """Ids that stand for the rows of a picture, a video or a sound."""
        found = {self.image_token(), self.token("video_token_id"), self.token("audio_token_id")}
        return {token for token in found if token is not None}

    def model_class(self) -> Any:  # noqa: ANN401 - a class of transformers
        """Transformers' class of the model."""
        return getattr(transformers, CLASSES[self.kind][1])

    def skeleton(self, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers' model
        """A new model whose parameters have no data; its config is its own."""
        with params_on_meta(dtype):
            return self.model_class()(deepcopy(self.config)).eval()

    def parts(self, model: Any) -> Parts:  # noqa: ANN401 - transformers' model
        """The modules of a model made from this architecture."""
        # The thinker's modules are its own in transformers 4, in `model.model` in 5.
        inner = model.model if hasattr(model.model, "language_model") else model
        if self.intern:
            return Parts(self.keys, inner, None, inner.language_model, model, None)
        text = getattr(inner, "language_model", None) or inner.model
        where = inner if hasattr(inner, "get_rope_index") else model
        return Parts(
            self.keys, inner.visual, getattr(inner, "audio_tower", None), text, model, where
        )


def read_config(hf_dir: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = hf_dir / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}", "a Hugging Face folder with config.json", "check --hf_dir"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}", "config.json of the model"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object", "config.json of the model")
    return cast("dict[str, Any]", content)


def architecture(hf_dir: Path) -> Architecture:
    """The model that config.json describes.

    Raises:
        CheckpointError: config.json is missing, or of no family that is known here.
    """
    content = read_config(hf_dir)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = content.get("model_type")
    if kind == THINKER:  # saved alone
        kind, content = "qwen2_5_omni", {"thinker_config": content}
    if kind not in CLASSES:
        raise CheckpointError(
            f"{hf_dir / 'config.json'}: model_type is {kind!r}", f"one of {', '.join(CLASSES)}"
        )
    try:
        config = _config(str(kind), content)
        tied = bool(_tied(content, config))
        _choose_kernels(config)
    except MMConvertError:
        raise
    except Exception as error:  # transformers checks config.json in ways of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hf_dir / 'config.json'}: transformers {transformers.__version__} refuses it: "
            f"{reason}",
            "the config.json that came with the model",
        ) from None
    return Architecture(str(kind), config, tied, module_keys(str(kind)))


def _config(kind: str, content: dict[str, Any]) -> Any:  # noqa: ANN401 - transformers' config
    if kind == ORIGINAL:
        return intern_config(content)
    if kind == "qwen2_5_omni":
        content = content.get("thinker_config") or {}
    if kind == "glm4v" and content.get("text_config") is None:  # as the hub has it at first
        content = {**content, "text_config": content}
    made = getattr(transformers, CLASSES[kind][0])
    plain = without_method(content)  # from_pretrained would quantise by it
    return made.from_dict({k: v for k, v in plain.items() if k != "auto_map"})


def _tied(content: dict[str, Any], config: Any) -> object:  # noqa: ANN401 - as above
    """What config.json says at the top or of the text model, else the class's own default."""
    top = content.get("thinker_config") or content
    places = (top, top.get("text_config"), top.get("llm_config")) if is_object(top) else ()
    for place in places:
        if is_object(place) and isinstance(place.get("tie_word_embeddings"), bool):
            return place["tie_word_embeddings"]
    return config.tie_word_embeddings


def _choose_kernels(config: Any) -> None:  # noqa: ANN401 - as above
    """One way of computing for both sides, so that a difference is the checkpoint's."""
    for name in ("", "text_config", "vision_config", "audio_config"):
        place = getattr(config, name, None) if name else config
        if place is not None:
            place._attn_implementation = "sdpa"
            place._experts_implementation = "eager"  # expert by expert, each of them a tensor
