"""What one training sample sends through each module: positions, and pairs that attend.

Sources: the model code of transformers (Qwen2-VL, Qwen2.5-VL, Qwen2.5-Omni) and InternVL's
published model code; the class defaults of transformers' configurations. docs/suggest.md names
each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mmconvert.converters.configs import Dims, read_dims, section_or_defaults
from mmconvert.converters.rows import encoders
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.formats.model import Model
from mmconvert.narrow import is_array

WINDOWED = {"qwen2_5_vl", "qwen2_5_omni"}  # most vision layers attend within windows
TILED = {"internvl_chat"}  # images are cut into tiles; each is a sequence of its own

MOST = 1 << 24  # tokens of a sample

# Class defaults of transformers' vision and audio configurations; InternVL's for its own keys.
PATCH_KEYS = {
    "channels": ("in_channels", "in_chans", "num_channels"),
    "patch": ("patch_size", "spatial_patch_size"),
    "frames": ("temporal_patch_size",),
    "window": ("window_size",),
    "tile": ("image_size",),
}
PATCH_DEFAULTS = {"channels": 3, "patch": 14, "window": 112, "tile": 448}
FULL_LAYERS = [7, 15, 23, 31]  # fullatt_block_indexes
AUDIO_KEYS = {"mel": ("num_mel_bins",), "chunk": ("n_window",)}
AUDIO_DEFAULTS = {"mel": 128, "chunk": 100}


@dataclass(frozen=True)
class Workload:
    """One training sample.

    Attributes:
        seq_length: tokens of the text decoder, image and audio tokens included.
        image_tokens: tokens of the text decoder that come from images.
        images: number of images of equal size that they come from.
        audio_tokens: tokens of the text decoder that come from sound.
    """

    seq_length: int = 4096
    image_tokens: int = 1024
    images: int = 1
    audio_tokens: int = 750

    def check(self, sounds: bool) -> None:
        """Raises RequestError for a sample that cannot be."""
        for flag, value in vars(self).items():
            if not 1 <= value <= MOST:
                words = flag.replace("_", "-")
                raise RequestError(f"--{words} is {value}", f"a number from 1 to {MOST}")
        inside = self.image_tokens + (self.audio_tokens if sounds else 0)
        if inside > self.seq_length:
            both = "image and audio" if sounds else "image"
            raise RequestError(
                f"{inside} {both} tokens do not fit a sequence of {self.seq_length}",
                "--seq-length counts all tokens of a sample, image and audio tokens included",
                "raise --seq-length, or lower --image-tokens" + (" or --audio-tokens" * sounds),
            )
        if self.images > self.image_tokens:
            raise RequestError(
                f"--images {self.images} with --image-tokens {self.image_tokens}",
                "at least one token for each image",
            )


class Flow(NamedTuple):
    """What a module processes for one sample.

    Attributes:
        before, layer, after: positions that go through the parts of the module.
        pairs: (query, key) positions that attend to each other in a layer, the mean of all layers.
    """

    before: int
    layer: int
    after: int
    pairs: int


def patch_sizes(model: Model, config: Mapping[str, object]) -> Dims:
    """Sizes of the vision and audio inputs that no converter needs, from config.json.

    Raises:
        CheckpointError: a value that is no sensible size.
    """
    config = section_or_defaults(config, "thinker_config") or config
    found: Dims = {}
    keys = {m.medium: m.key for m in encoders(model.modules)}
    if key := keys.get("pictures"):
        vision = section_or_defaults(config, "vision_config")
        frames = {"frames": 1 if model.family.model_types & TILED else 2}
        found |= read_dims(vision, "vision_config", PATCH_KEYS, {**PATCH_DEFAULTS, **frames})
        found["full_layers"] = _full_layers(model, key, vision)
        if model.family.model_types & TILED:
            found |= read_dims(config, "config.json", {"tile": ("force_image_size",)})
    if "sounds" in keys:
        audio = section_or_defaults(config, "audio_config")
        found |= read_dims(audio, "audio_config", AUDIO_KEYS, AUDIO_DEFAULTS)
    return found


def _full_layers(model: Model, key: str, vision: Mapping[str, object]) -> int:
    """Number of vision layers in which every patch of an image attends to every other."""
    layers = model.dims[f"{key}.layers"]
    if not model.family.model_types & WINDOWED:
        return layers
    listed = vision.get("fullatt_block_indexes", FULL_LAYERS)
    if not is_array(listed) or not all(type(i) is int and i >= 0 for i in listed):
        raise CheckpointError(
            f"config.json: fullatt_block_indexes is {listed!r}", "a list of layer numbers"
        )
    return len({i for i in listed if isinstance(i, int) and i < layers})


def flows(model: Model, sizes: Dims, work: Workload) -> dict[str, Flow]:
    """What each module processes, by module key."""
    n = work.seq_length
    causal = Flow(n, n, n, n * (n + 1) // 2)  # each token sees those before it
    found = {model.family.decoder: causal}
    for module in encoders(model.modules):
        seen = module.medium == "pictures"
        found[module.key] = _vision(model, module.key, sizes, work) if seen else _audio(sizes, work)
    return found


def _vision(model: Model, key: str, sizes: Dims, work: Workload) -> Flow:
    dims = model.dims
    merged = max(
        1, dims.get(f"{key}.merged", 1) // dims.get(f"{key}.width", 1)
    )  # patches of a token
    patches = work.image_tokens * merged
    if model.family.model_types & TILED:
        tile = max(1, sizes["tile"] // sizes["patch"]) ** 2
        tiles = -(-patches // tile)
        span = tile + 1  # with the class embedding
        return Flow(tiles * tile, tiles * span, work.image_tokens, tiles * span * span)
    span = -(-patches // work.images)
    full = work.images * span * span
    layers, few = dims[f"{key}.layers"], sizes.get("full_layers", dims[f"{key}.layers"])
    window = max(1, sizes.get("window", span) // sizes.get("patch", 1)) ** 2
    within = patches * min(window, span)
    return Flow(
        patches, patches, work.image_tokens, (few * full + (layers - few) * within) // layers
    )


def _audio(sizes: Dims, work: Workload) -> Flow:
    """Two positions of the encoder become a token (average pooling); its first convolution works
    on mel frames, two for each position (the second has stride 2).
    """
    positions = 2 * work.audio_tokens
    whole, rest = divmod(positions, sizes.get("chunk", positions))
    pairs = whole * sizes.get("chunk", positions) ** 2 + rest * rest
    return Flow(2 * positions, positions, work.audio_tokens, pairs)
