"""The family itself: an architecture's tables and sizes. No torch, no files.

A family of another package finds all that it needs here: rows, modules and readers of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from mmconvert.converters.configs import (
    Dims,
    LayerLists,
    flag,
    layer_list,
    need,
    read_dims,
    section,
    section_or_defaults,
)
from mmconvert.converters.rows import (
    ZEROS,
    Module,
    Row,
    bound,
    decoder_of,
    row,
    vocabulary_of,
    with_experts_transposed,
)
from mmconvert.names import NameTemplate

__all__ = [
    "ZEROS",
    "Carried",
    "Dims",
    "Dropped",
    "Family",
    "LayerLists",
    "Module",
    "Row",
    "Variant",
    "any_family",
    "flag",
    "layer_list",
    "need",
    "no_lists",
    "no_shape_traits",
    "no_traits",
    "read_dims",
    "row",
    "section",
    "section_or_defaults",
]


@dataclass(frozen=True)
class Variant:
    """Choices that change a family's table.

    Attributes:
        tied: the output layer is the word embedding.
        canonical: q/k/v and gate/up stay apart (``enable_canonical_hf_struct``).
        encoder_qkv: ``interleaved`` per head, or ``concatenated`` as the reference 2.2.0 to 2.3.0
            wrote it.
        experts_transposed: the experts of stacks stand the other way round, as the reference's
            converter makes them of stacks that it takes for others.
        traits: what else of config.json changes the table; each family has its own words.
        lists: the layers that have rows of their own, by name, as far as they are known.
    """

    tied: bool = False
    canonical: bool = False
    encoder_qkv: str = "interleaved"
    experts_transposed: bool = False
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
        modules = bound(self.modules(variant), dict(variant.lists))
        return with_experts_transposed(modules) if variant.experts_transposed else modules

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
