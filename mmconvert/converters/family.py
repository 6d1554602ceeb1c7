"""What a family table is made of: rows, modules, and the family itself. No torch, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, cast

from mmconvert.errors import CheckpointError, RequestError
from mmconvert.names import EXPERT, NO_EXPERT, NameTemplate, TemplateIndex, fields, fill
from mmconvert.narrow import is_object
from mmconvert.sharding.layout import tp_flag
from mmconvert.sharding.spans import Concat, Interleave, Part, Split

# Sizes by name: the module's key, a dot, what it is, such as "layers"; see each family's `dims`.
Dims = dict[str, int]

# Layers by name, such as "KEY.moe": those in which rows that say ``only="KEY.moe"`` stand.
LayerLists = dict[str, tuple[int, ...]]

Fuse = Concat | Interleave | Part
Role = Literal["encoder", "decoder", "head"]
Medium = Literal["pictures", "sounds"]

ZEROS = ""  # in a row's HF names: as many zeros as the first source has, kept by no HF tensor
CONCAT = Concat()
OUTPUT_LAYER = "text_decoder.output_layer.weight"


@dataclass(frozen=True)
class Row:
    """One line of a table: a whole tensor, and what each naming calls it or makes it of.

    Attributes:
        names: naming -> templates of its names, in the order in which they are fused. Its
            ``own`` naming has one, that of the whole; ``{layer}`` is the local number in a
            checkpoint, ``{expert}`` that on its expert-parallel rank. In others, ZEROS among them
            is a part that only the whole has. A name without ``{expert}`` in the row of an expert
            is of a tensor that stacks the experts along its first dimension. ``{index}`` is the
            place of the layer among those of ``only``.
        own: the naming of the whole.
        fuses: naming -> how its tensors form the whole; absent: one below the other.
        cuts: naming -> how the whole is divided over tp ranks; None copies it to every rank.
        sources: the naming that the row is looked at from; see :func:`in_naming`.
        rows: names of the dimensions that give the rows of each HF tensor, as the whole has them;
            () leaves them unchecked.
        cols: name of the dimension that gives the columns; "" leaves them unchecked.
        tied_to: MM name of the row whose tensor this one repeats (tied embeddings). Such a row
            stands only on another model chunk than its original's, and may be absent in HF.
        transposed: the one HF tensor, a matrix or a stack of them, is stored the other way round.
        only: name of the list of layers that have this row; "" is all of them.
        layers: that list, where it is known; None is all layers.
        keeps_dtype: no ``--dtype`` casts it.
    """

    names: Mapping[str, tuple[str, ...]] = field(hash=False)
    own: str = "mm"
    fuses: Mapping[str, Fuse] = field(default_factory=dict[str, Fuse], hash=False)
    cuts: Mapping[str, Split | None] = field(default_factory=dict[str, Split | None], hash=False)
    sources: str = "hf"
    rows: tuple[str, ...] = ()
    cols: str = ""
    tied_to: str = ""
    transposed: bool = False
    only: str = ""
    layers: tuple[int, ...] | None = None
    keeps_dtype: bool = False

    @property
    def mm(self) -> str:
        """The template of the whole's name: the MM name, in a table that leads to MM format."""
        return self.names[self.own][0]

    @property
    def hf(self) -> tuple[str, ...]:
        """The templates of what it is made of: the HF names, unless it is looked at otherwise."""
        return self.names[self.sources]

    @property
    def fuse(self) -> Fuse:
        """How these form the whole."""
        return self.fuses.get(self.sources, CONCAT)

    @property
    def shard(self) -> Split | None:
        """How the whole is divided over tp ranks in its own naming."""
        return self.cuts.get(self.own)

    @property
    def of_expert(self) -> bool:
        """Whether there is one such tensor for each expert."""
        return EXPERT in self.mm

    def hf_names(self, layer: int, expert: int = NO_EXPERT) -> list[str]:
        """The HF tensors that make it, in hub spelling; of stacked experts that of all."""
        index = self.layers.index(layer) if self.layers and layer in self.layers else layer
        return [fill(name, layer, expert, index) for name in self.hf if name != ZEROS]


def row(
    mm: str,
    *hf: str,
    rows: str = "",
    cols: str = "",
    fuse: Fuse = CONCAT,
    shard: Split | None = None,
    tied_to: str = "",
    transposed: bool = False,
    only: str = "",
    own: str = "mm",
    names: Mapping[str, str | tuple[str, ...]] | None = None,
    fuses: Mapping[str, Fuse] | None = None,
    cuts: Mapping[str, Split | None] | None = None,
) -> Row:
    """A :class:`Row`, with ``rows`` as words: ``rows="KEY.q KEY.kv KEY.kv"``, and ``{}`` in a
    name for ``{layer}``.

    Args:
        mm: the name of the whole, in the naming ``own``; ``shard`` is how that cuts it.
        hf: the names of the HF tensors that ``fuse`` makes it of.
        names, fuses, cuts: the same in further namings.
    """
    given: dict[str, str | tuple[str, ...]] = {"hf": hf, own: mm, **(names or {})}
    listed = {k: (found,) if isinstance(found, str) else found for k, found in given.items()}
    return Row(
        {naming: tuple(map(fields, templates)) for naming, templates in listed.items()},
        own,
        {"hf": fuse, **(fuses or {})},
        {own: shard, **(cuts or {})},
        rows=tuple(rows.split()),
        cols=cols,
        tied_to=tied_to,
        transposed=transposed,
        only=only,
    )


@dataclass(frozen=True)
class Module:
    """An encoder or decoder of a family: rows before its layers, in each layer, after them.

    Attributes:
        key: names its stage grid, tp size and sizes: ``KEY_pp_layers``, ``KEY_tp_size``,
            ``KEY.layers``.
        label: the module's MM name, for people.
        role: an encoder hands features to the decoder, and stands before it in the pipeline;
            a head is an output layer that is a module of its own.
        word: what it is called in pictures; not given: the first word of its label.
        medium: what an encoder takes in.
        beside_text: whether training can use it only as a whole, on the first stage of the text.
        everywhere: rows outside the layers whose tensors stand on every pipeline stage.
    """

    key: str
    label: str
    before: tuple[Row, ...]
    layer: tuple[Row, ...]
    after: tuple[Row, ...]
    role: Role = "encoder"
    word: str = ""
    medium: Medium = "pictures"
    beside_text: bool = False
    everywhere: tuple[Row, ...] = ()

    def all_rows(self) -> tuple[Row, ...]:
        """Every row, in model order."""
        return self.everywhere + self.before + self.layer + self.after

    @property
    def tp_flag(self) -> str:
        """The user's name of its tensor-parallel size."""
        return tp_flag(self.key, self.key if self.role == "decoder" else "")

    @property
    def name(self) -> str:
        """What it is called in pictures."""
        return self.word or self.label.partition("_")[0]

    @property
    def has_experts(self) -> bool:
        """Whether some of its tensors are an expert's."""
        return any(r.of_expert for r in self.layer)


@dataclass(frozen=True)
class Variant:
    """Choices that change a family's table.

    Attributes:
        tied: the output layer is the word embedding.
        canonical: q/k/v and gate/up stay apart (``enable_canonical_hf_struct``).
        encoder_qkv: ``interleaved`` per head, or ``concatenated`` as the reference 2.2.0 to 2.3.0
            wrote it.
        traits: what else of config.json changes the table; each family has its own words.
        lists: the layers that have rows of their own, by name, as far as they are known.
    """

    tied: bool = False
    canonical: bool = False
    encoder_qkv: str = "interleaved"
    traits: frozenset[str] = frozenset()
    lists: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Dropped:
    """Tensors of an HF checkpoint that have no place in MM format, and why."""

    template: NameTemplate
    why: str


@dataclass(frozen=True)
class Carried:
    """Tensors of an HF checkpoint that are not converted: they stay in ``hf_dir``, and return
    from it.
    """

    prefix: str
    why: str


def no_traits(config: Mapping[str, object]) -> frozenset[str]:
    """For families with one table."""
    del config
    return frozenset()


def no_shape_traits(
    config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    """For families whose table does not depend on shapes."""
    del config, shapes
    return frozenset()


def no_lists(config: Mapping[str, object]) -> LayerLists:
    """For families whose layers all have the same rows."""
    del config
    return {}


@dataclass(frozen=True)
class Family:
    """A model architecture: one table for all three directions.

    Attributes:
        name: the architecture's name.
        converter: the name of its command.
        model_types: values of ``model_type`` in config.json that it serves.
        dims: sizes from config.json.
        modules: the table, encoders first (their order is the order of the pipeline); every
            variant has the same modules.
        spellings: (prefix, prefix on the hub): other spellings of HF names.
        dropped: tensors that are left out knowingly, in hub spelling.
        carried: tensors that stay in ``hf_dir``, in hub spelling.
        text_config: the part of config.json that describes the text decoder.
        traits: of config.json.
        shape_traits: further ones that only the shapes tell; of config.json and the shapes of the
            HF tensors by name in hub spelling.
        lists: layers with rows of their own, from config.json.
        variants: what an MM checkpoint's names can tell apart.
        canonical: whether ``enable_canonical_hf_struct`` is possible.
        plain_text: whether ``llm_hf_dir`` is possible: the text decoder's names are those of a
            plain language model, and its part of config.json is ``text_config``.
        form: the format that its table leads to, for messages.
        naming: whose names those are; a format of another naming has no place for its tensors.
        preprocessor: whether its models come with a configuration of their image processor.
        ordered: whether a text layer before the end of an encoder is refused; else a warning, as
            its checkpoints are written so elsewhere.
    """

    name: str
    converter: str
    model_types: frozenset[str]
    dims: Callable[[Mapping[str, object]], Dims]
    modules: Callable[[Variant], tuple[Module, ...]]
    text_config: Callable[[Mapping[str, object]], Mapping[str, object]]
    spellings: tuple[tuple[str, str], ...] = ()
    dropped: tuple[Dropped, ...] = ()
    carried: tuple[Carried, ...] = ()
    traits: Callable[[Mapping[str, object]], frozenset[str]] = no_traits
    shape_traits: Callable[
        [Mapping[str, object], Mapping[str, tuple[int, ...]]], frozenset[str]
    ] = no_shape_traits
    lists: Callable[[Mapping[str, object]], LayerLists] = no_lists
    variants: tuple[Variant, ...] = (Variant(), Variant(canonical=True))
    canonical: bool = True
    plain_text: bool = True
    form: str = "MM format"
    naming: str = "mm"
    preprocessor: bool = True
    ordered: bool = True

    @cached_property
    def module_keys(self) -> tuple[str, ...]:
        """The keys of the modules, in their order."""
        return tuple(m.key for m in self.modules(self.variants[0]))

    @cached_property
    def decoder(self) -> str:
        """The key of the module that comes after all encoders."""
        return decoder_of(self.modules(self.variants[0]))

    @cached_property
    def namings(self) -> frozenset[str]:
        """The namings in which every tensor of a model has a name."""
        rows = [r for m in self.modules(self.variants[0]) for r in m.all_rows()]
        return frozenset({"hf", self.naming}).union(
            name for name in (rows[0].names if rows else ()) if all(name in r.names for r in rows)
        )

    @property
    def vocabulary(self) -> str:
        """The dimension that counts the words."""
        return vocabulary_of(self.decoder)

    def table(self, variant: Variant) -> tuple[Module, ...]:
        """The table, whose rows know the layers that have them as far as ``variant`` does."""
        return bound(self.modules(variant), dict(variant.lists))

    def hub_name(self, name: str) -> str:
        """The hub's spelling of an HF tensor name."""
        for prefix, hub in self.spellings:
            if name.startswith(prefix):
                return hub + name[len(prefix) :]
        return name

    def why_carried(self, hub_name: str) -> str | None:
        """Why a tensor stays in ``hf_dir``, or None if it is converted."""
        return next((c.why for c in self.carried if hub_name.startswith(c.prefix)), None)

    def why_dropped(self, hub_name: str) -> str | None:
        """Why a tensor has no place in MM format, or None if it has."""
        for left in self.dropped:
            if left.template.match(hub_name) is not None:
                return left.why
        return None


def bound(modules: tuple[Module, ...], lists: Mapping[str, tuple[int, ...]]) -> tuple[Module, ...]:
    """The table with the lists of layers that its rows name."""
    return tuple(
        replace(
            m, layer=tuple(replace(r, layers=lists.get(r.only)) if r.only else r for r in m.layer)
        )
        for m in modules
    )


def decoder_of(modules: Sequence[Module]) -> str:
    """The key of the module that comes after all encoders; "" if it is not there."""
    return next((m.key for m in modules if m.role == "decoder"), "")


def vocabulary_of(decoder: str) -> str:
    """The dimension that counts a decoder's words."""
    return f"{decoder}.vocab"


def encoders(modules: tuple[Module, ...]) -> tuple[Module, ...]:
    """The table without what follows the encoders."""
    return tuple(m for m in modules if m.role == "encoder")


def in_naming(modules: tuple[Module, ...], naming: str) -> tuple[Module, ...]:
    """The table as a format of another naming than Hugging Face's sees it: ``row.hf`` are its
    names, and ``row.fuse`` is how its tensors form the whole.

    Raises:
        RequestError: a row has no name there.
    """

    def seen(r: Row) -> Row:
        if naming not in r.names:
            raise RequestError(
                f"{r.mm} has no name in the naming {naming}",
                f"one of {', '.join(sorted(r.names))}",
                "complete the family's table",
            )
        if naming == r.sources:
            return r
        alone = len(r.names[naming]) != len(r.rows)
        rows = () if alone else r.rows
        return replace(r, sources=naming, rows=rows, transposed=False)

    return tuple(
        replace(
            m,
            before=tuple(map(seen, m.before)),
            layer=tuple(map(seen, m.layer)),
            after=tuple(map(seen, m.after)),
            everywhere=tuple(map(seen, m.everywhere)),
        )
        for m in modules
    )


def any_family() -> Family:
    """No table: every tensor goes by its own name."""

    def nothing(config: Mapping[str, object]) -> Dims:
        del config
        return {}

    def no_modules(variant: Variant) -> tuple[Module, ...]:
        del variant
        return ()

    def same(config: Mapping[str, object]) -> Mapping[str, object]:
        return config

    return Family(
        name="",
        converter="",
        model_types=frozenset(),
        dims=nothing,
        modules=no_modules,
        text_config=same,
        variants=(Variant(),),
    )


def mm_index(modules: tuple[Module, ...]) -> TemplateIndex[tuple[Module, Row]]:
    """Finds the row of an MM name."""
    return TemplateIndex((r.mm, (m, r)) for m in modules for r in m.all_rows())


def hf_templates(modules: tuple[Module, ...]) -> TemplateIndex[Row]:
    """Finds the row of an HF name in hub spelling."""
    found: dict[str, Row] = {}
    for module in modules:
        for r in module.all_rows():
            for name in r.hf:
                if name != ZEROS:
                    found.setdefault(name, r)
    return TemplateIndex(found.items())


# No model has more; a config.json from a stranger must not make us build an endless table.
MAX_SIZE = {"layers": 4096}
MAX_ANY_SIZE = 1 << 31


def read_dims(
    config: Mapping[str, object],
    where: str,
    names: Mapping[str, tuple[str, ...]],
    defaults: Mapping[str, int] | None = None,
) -> Dims:
    """Sizes from a part of config.json.

    Args:
        config: the part.
        where: its name, for messages.
        names: dimension name -> the keys that may hold it, the first present one counts. A
            dimension whose keys are all absent has its default, or is left out.
        defaults: what transformers' configuration class takes for absent keys. Its
            ``save_pretrained`` (4.45 to 4.51) leaves out what equals these.

    Raises:
        CheckpointError: a value that is no sensible size.
    """
    dims: Dims = dict(defaults or {})
    for dim, keys in names.items():
        value = next((config[k] for k in keys if config.get(k) is not None), None)
        if value is None:
            continue
        limit = MAX_SIZE.get(dim.rpartition(".")[2], MAX_ANY_SIZE)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise CheckpointError(
                f"config.json: {where} {' or '.join(keys)} is {value!r}",
                f"a whole number from 1 to {limit}",
                "take config.json from the model's page",
            )
        dims[dim] = value
    return dims


def need(dims: Dims, where: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """Raises CheckpointError for a dimension without which nothing can be planned."""
    for dim, keys in names.items():
        if dim not in dims:
            raise CheckpointError(
                f"config.json: {where} has no {' or '.join(keys)}",
                "the model's own config.json",
                "copy it from the model's page into hf_dir",
            )


def section(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    """A nested part of config.json.

    Raises:
        CheckpointError: absent, or not an object.
    """
    value = config.get(key)
    if not is_object(value):
        found = "is missing" if value is None else "is not an object"
        raise CheckpointError(
            f"config.json: {key} {found}",
            f"an object {key} with its sizes",
            "take config.json from the model's page",
        )
    return value


def section_or_defaults(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    """A nested part of config.json that transformers makes of its class's defaults where it is
    absent or null: nothing of it is said then.

    Raises:
        CheckpointError: something that is not an object.
    """
    return {} if config.get(key) is None else section(config, key)


def layer_list(value: object, where: str, layers: int) -> tuple[int, ...]:
    """A list of layers from config.json, in its order.

    Args:
        where: its key, for messages.
        layers: how many there are.

    Raises:
        CheckpointError: no list of different layers.
    """
    if isinstance(value, list):
        items = cast("list[object]", value)
        numbers = [n for n in items if isinstance(n, int) and not isinstance(n, bool)]
        known = all(0 <= n < layers for n in numbers)
        if len(set(numbers)) == len(items) and known:
            return tuple(numbers)
    raise CheckpointError(
        f"config.json: {where} is {value!r}", f"a list of different layers below {layers}"
    )


def flag(configs: tuple[Mapping[str, object], ...], key: str) -> bool | None:
    """A boolean from the first config that has it.

    Raises:
        CheckpointError: a value that is not true or false.
    """
    for config in configs:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {value!r}", "true or false")
        return value
    return None
