"""A model.json beside the model's config.json and beside a checkpoint's layout: what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from mmconvert.errors import LayoutError
from mmconvert.modeljson.file import LISTS, PLACES, ModelJson
from mmconvert.modeljson.keys import model_keys
from mmconvert.sharding.layout import Layout
from mmconvert.sharding.stages import show

# Keys that decide names or shapes of the checkpoint, or what is computed. The others, MindSpeed-MM
# takes from elsewhere, or they are a choice.
CHECKED = {
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "vocab_size", "untie_embeddings_and_output_weights", "gated_linear_unit",
    "add_bias_linear", "mrope_section", "rope_theta", "rotary_base", "layernorm_epsilon",
    "normalization", "activation_func", "in_channels", "patch_size", "temporal_patch_size",
    "spatial_merge_size", "window_attn_size", "fullatt_block_indexes", "input_size", "d_model",
    "num_mel_bins", "max_source_positions", "n_window", "scale_embedding", "output_dim",
    "qk_layernorm", "vit_hidden_size", "llm_hidden_size", "downsample_ratio", "select_layer",
    "ps_version",
}  # fmt: skip
# What an absent key means there.
ABSENT = {
    "layernorm_epsilon": 1e-5, "activation_func": "gelu", "gated_linear_unit": False,
    "add_bias_linear": True, "untie_embeddings_and_output_weights": True, "qk_layernorm": False,
}  # fmt: skip
FROM_FLAGS = {"normalization", "kv_channels"}  # absent: the script, or hidden_size / heads


# Of these, what decides the shapes of the checkpoint: where they differ it is another model.
SHAPES = {
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "vocab_size", "untie_embeddings_and_output_weights", "gated_linear_unit",
    "input_size", "d_model", "num_mel_bins", "output_dim", "vit_hidden_size", "llm_hidden_size",
    "in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size", "qk_layernorm",
}  # fmt: skip


class KeyDifference(NamedTuple):
    """A key of a model.json that is not as it should be."""

    key: str
    found: str
    expected: str
    absent: bool = False

    @property
    def shape(self) -> bool:
        """Whether it makes it another model's file."""
        return self.key.rpartition(".")[2] in SHAPES

    @property
    def what(self) -> str:
        """The difference in words."""
        return f"{self.key} is {self.found}, expected {self.expected}"


def against_config(model: ModelJson, config: Mapping[str, Any]) -> list[KeyDifference]:
    """What is not as config.json says.

    Raises:
        CheckpointError: config.json is of a family without a model.json.
    """
    expected = model_keys(config)
    found = list(_differences(model.content, expected, ""))
    known = {config.get(f"{kind}_token_id") for kind in ("image", "video")}
    thinker = config.get("thinker_config")
    inner = cast("Mapping[str, Any]", thinker if isinstance(thinker, Mapping) else {})
    known |= {inner.get(f"{kind}_token_{end}") for kind in ("image", "video") for end in ENDS}
    known |= {expected["img_context_token_id"]}
    token = model.content.get("img_context_token_id")
    if token not in known:
        ids = sorted(i for i in known if isinstance(i, int))
        if ids or token is None:
            found.append(KeyDifference("img_context_token_id", str(token), f"one of {ids}"))
    return found


ENDS = ("id", "index")


def _differences(found: object, expected: Mapping[str, Any], where: str) -> Iterator[KeyDifference]:
    given = cast("Mapping[str, Any]", found if isinstance(found, Mapping) else {})
    for key, value in expected.items():
        path = f"{where}.{key}" if where else key
        if isinstance(value, Mapping):
            if key in given:
                yield from _differences(given[key], cast("Mapping[str, Any]", value), path)
            else:
                yield KeyDifference(path, "missing", "a part of the model", absent=True)
        elif key in CHECKED and where:
            one = given.get(key, ABSENT.get(key))
            if one is None and key in FROM_FLAGS:
                continue
            if one != value:
                absent = "missing" + (f" (there: {one})" if one is not None else "")
                yield KeyDifference(
                    path, str(one) if key in given else absent, str(value), key not in given
                )


def against_layout(model: ModelJson, layout: Layout) -> list[KeyDifference]:
    """What is not as in a checkpoint: layer lists where there are several stages, and tp sizes.

    ``tp`` keys count with ``--hetero-parallel``; without them the script has one size for all.
    """
    found: list[KeyDifference] = []
    try:
        grids = model.grids()
    except LayoutError as error:
        return [KeyDifference(LISTS, f"no layout: {error.what}", error.expected)]
    for key, grid in layout.grids.items():
        given = grids.get(key)
        if given != grid:
            name = f"{'.'.join(PLACES[key])}.{LISTS}"
            found.append(KeyDifference(name, show(given) if given else "missing", show(grid)))
    sizes = model.tp()
    for key, size in layout.tp.items():
        if sizes and sizes.get(key) != size:
            name = f"{PLACES[key][0]}.tp"
            found.append(KeyDifference(name, str(sizes.get(key, "missing")), str(size)))
    if not sizes and len(set(layout.tp.values())) > 1:
        listed = ", ".join(f"{PLACES[key][0]}.tp {size}" for key, size in layout.tp.items())
        found.append(KeyDifference("tp", "missing", f"{listed}, with --hetero-parallel"))
    return found
