"""The ways in which Hugging Face checkpoints store experts: a tensor each, or stacked.

Names, forms and layers: MindSpeed-MM's ``moe_expert``, and transformers' classes (4.57 and 5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mmconvert.converters.configs import Dims, layer_list, need, read_dims, section
from mmconvert.converters.rows import Module, Row, row
from mmconvert.errors import CheckpointError
from mmconvert.narrow import is_array

# Forms of one layer's experts. Stacked ones are [experts, in, out] ("inputs first", as transformers
# 4 has them), or [experts, out, in] (as transformers 5 has them).
SINGLE, INPUTS_FIRST, OUTPUTS_FIRST = "single", "inputs first", "outputs first"
LAYERS = "llm.expert_layers"
EXPERT_COUNT = ("num_experts", "num_local_experts")  # the second in transformers 5, Qwen3-VL
FC1, FC2 = "layers.{}.mlp.experts.{expert}.gate_up", "layers.{}.mlp.experts.{expert}.down"


def sparse_layers(text: Mapping[str, object], where: str, count: int) -> tuple[int, ...]:
    """The layers of a Qwen3 text decoder that have experts.

    Args:
        text: its part of config.json, called ``where`` in messages.
        count: of all layers.

    Raises:
        CheckpointError: lists or numbers that make no sense.
    """
    plain = layer_list(text.get("mlp_only_layers") or [], f"{where}.mlp_only_layers", count)
    step = read_dims(text, where, {"step": ("decoder_sparse_step",)}, {"step": 1})["step"]
    return tuple(i for i in range(count) if i not in plain and (i + 1) % step == 0)


def later_layers(text: Mapping[str, object], where: str, count: int) -> tuple[int, ...]:
    """The layers of a GLM or DeepSeek text decoder that have experts: all but the first ones.

    Raises:
        CheckpointError: a number that makes no sense.
    """
    first = text.get("first_k_dense_replace", 1)
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= count:
        raise CheckpointError(
            f"config.json: {where} first_k_dense_replace is {first!r}",
            f"a number of layers up to {count}",
        )
    return tuple(range(first, count))


@dataclass(frozen=True)
class Stacks:
    """Where a model's experts are, and how MindSpeed-MM merges them.

    Attributes:
        sections: the way to the text decoder's part of config.json.
        prefix: of the experts' names in a layer.
        experts: the keys that may count them.
        layers: those that have some; of that part, its name and the number of layers.
        flat: merged experts lie one below the other in a matrix instead of a stack.
        inner: a prefix of all names but those of ``beside`` that merged checkpoints lack.
        beside: prefixes of the other parts of such a model.
    """

    sections: tuple[str, ...]
    prefix: str
    experts: tuple[str, ...] = EXPERT_COUNT
    layers: Callable[[Mapping[str, object], str, int], tuple[int, ...]] = sparse_layers
    flat: bool = True
    inner: str = ""
    beside: tuple[str, ...] = ()

    def full_name(self, name: str) -> str:
        """The name that a checkpoint with experts of their own has for a tensor."""
        return name if name.startswith((self.inner, *self.beside)) else self.inner + name

    def text(self, config: Mapping[str, object]) -> Mapping[str, object]:
        """The text decoder's part of config.json."""
        for key in self.sections:
            config = section(config, key)
        return config

    def dims(self, config: Mapping[str, object]) -> Dims:
        """Sizes from config.json.

        Raises:
            CheckpointError: one is missing or no sensible number.
        """
        keys = {
            "llm.layers": ("num_hidden_layers",),
            "llm.hidden": ("hidden_size",),
            "llm.experts": self.experts,
            "llm.expert_ffn": ("moe_intermediate_size",),
        }
        where = ".".join(self.sections)
        found = read_dims(self.text(config), where, keys)
        need(found, where, keys)
        found["llm.expert_fc1"] = 2 * found["llm.expert_ffn"]
        return found

    def module(self, config: Mapping[str, object], form: str) -> Module:
        """The table of the experts alone, in one form."""
        where, count = ".".join(self.sections), self.dims(config)["llm.layers"]
        layers = self.layers(self.text(config), where, count)
        rows = tuple(replace(r, layers=layers) for r in expert_rows(self.prefix, form))
        return Module("llm", "text_decoder", (), rows, (), role="decoder")


def expert_rows(prefix: str, form: str) -> tuple[Row, ...]:
    """Gate above up, and down, of each expert.

    Args:
        prefix: of the names in a layer.
        form: SINGLE, INPUTS_FIRST or OUTPUTS_FIRST.
    """
    w, x = "llm.hidden", "llm.expert_ffn"
    if form == SINGLE:
        gate, up, down = (f"{prefix}.{{expert}}.{n}_proj.weight" for n in ("gate", "up", "down"))
        return (
            row(FC1, gate, up, rows=f"{x} {x}", cols=w, only=LAYERS),
            row(FC2, down, rows=w, cols=x, only=LAYERS),
        )
    first, both, down = form == INPUTS_FIRST, f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
    return (
        row(FC1, both, rows="llm.expert_fc1", cols=w, transposed=first, only=LAYERS),
        row(FC2, down, rows=w, cols=x, transposed=first, only=LAYERS),
    )


def stacks_of(config: Mapping[str, object]) -> Stacks:
    """The experts of the model that config.json describes.

    Raises:
        CheckpointError: none of the models that are served.
    """
    kind = config.get("model_type")
    found = MODELS.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise CheckpointError(
            f"config.json has model_type {kind!r}",
            f"a model with experts: one of {', '.join(MODELS)}",
        )
    if kind in INTERNVL:
        key, expected = INTERNVL[kind]
        named = found.text(config).get(key)
        if (named[:1] if is_array(named) else named) != expected:
            raise CheckpointError(
                f"config.json: {found.sections[0]}.{key} is {named!r}: a text decoder without "
                "experts, or with experts of another kind",
                f"{expected!r}, as in InternVL3.5-30B-A3B and 241B-A28B",
            )
    return found


OMNI = Stacks(
    sections=("thinker_config", "text_config"),
    prefix="thinker.model.layers.{}.mlp.experts",
    flat=False,
    inner="thinker.",
    beside=("talker.", "code2wav."),
)
# What names the text decoder of an InternVL that has experts, by model_type.
INTERNVL: dict[object, tuple[str, object]] = {
    "internvl_chat": ("architectures", ["Qwen3MoeForCausalLM"]),
    "internvl": ("model_type", "qwen3_moe"),
}
# By model_type of config.json.
MODELS = {
    "internvl_chat": Stacks(("llm_config",), "language_model.model.layers.{}.mlp.experts"),
    "internvl": Stacks(("text_config",), "language_model.model.layers.{}.mlp.experts"),
    "glm4v_moe": Stacks(
        ("text_config",),
        "model.language_model.layers.{}.mlp.experts",
        experts=("n_routed_experts",),
        layers=later_layers,
    ),
    "qwen3_vl_moe": Stacks(
        ("text_config",), "model.language_model.layers.{}.mlp.experts", flat=False
    ),
    "qwen3_omni_moe": OMNI,
    "qwen3_omni_moe_thinker": replace(
        OMNI,
        sections=("text_config",),
        prefix="model.layers.{}.mlp.experts",
        inner="",
        beside=(),
    ),
}


def orientation(shapes: Mapping[str, tuple[int, ...]], hidden: int, ffn: int) -> str:
    """How stacked experts lie, by every stack whose shape tells: of gate and up, where ``hidden``
    is twice ``ffn``, only the stacks of down do. INPUTS_FIRST where no shape fits.

    Args:
        shapes: of tensors by name, those of stacks with the experts first; others are passed over.

    Raises:
        CheckpointError: two ways in one checkpoint.
    """
    first = {"gate_up_proj": (hidden, 2 * ffn), "down_proj": (ffn, hidden)}
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        expected = first.get(name.rpartition(".experts.")[2])
        if expected is None or expected == expected[::-1]:
            continue
        if shape[1:] in (expected, expected[::-1]):
            form = INPUTS_FIRST if shape[1:] == expected else OUTPUTS_FIRST
            found.setdefault(form, f"{name} {list(shape)}")
    if len(found) > 1:
        raise CheckpointError(
            f"experts are stored in two ways: {found[INPUTS_FIRST]} as on the hub, "
            f"{found[OUTPUTS_FIRST]} with the output dimension first",
            "one way for all",
            "take all weight files from one checkpoint",
        )
    return next(iter(found), INPUTS_FIRST)
