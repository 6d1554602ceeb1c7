"""Which of a model's weights the keys of an adapter mean."""

from __future__ import annotations

from mmconvert.adapters import PREFIX, WEIGHT, AdapterKey, parse_key, paths
from mmconvert.converters.adapters import linear
from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module, Row, hf_templates
from mmconvert.errors import TensorError
from mmconvert.formats.peft.stacks import Parameter
from mmconvert.formats.peft.target import spelled
from mmconvert.names import EXPERT, INDEX, TemplateIndex
from mmconvert.stored import StoredTensor


def unwrapped(module: str) -> str:
    """The path of a module without the wrappers that PEFT puts around it."""
    return module.replace(".base_layer", "")


class Names:
    """Finds the weight that a key of an adapter means, in any of the spellings.

    Args:
        table: of the family, q, k, v apart or not: the Hugging Face names are the same.
    """

    def __init__(self, family: Family, table: tuple[Module, ...]) -> None:
        self._family = family
        self._all: TemplateIndex[Row] = hf_templates(table)
        self.linear: TemplateIndex[Row] = hf_templates(linear(table))
        self.keys = {row.mm: m.key for m in table for row in m.all_rows()}
        rows = [row for m in linear(table) for row in m.all_rows() if row.of_expert]
        stacks = [name for row in rows for name in row.hf if EXPERT not in name]
        self._leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in stacks))

    def path(self, module: str, kind: str = WEIGHT) -> tuple[str, str] | None:
        """The path in the wrapped model that the family knows, and the tensor's hub name."""
        for path in paths(module):
            hub = self._family.hub_name(path + kind)
            if self._all.find(hub):
                return path, hub
        return None

    def parameters(self, module: str) -> list[Parameter]:
        """The parameters of a module that stack experts, in the order in which it has them."""
        for path in paths(module):
            found: list[Parameter] = []
            for leaf in self._leaves:
                hub = self._family.hub_name(f"{path}.{leaf}")
                if hit := self.linear.find(hub):
                    count = f"{self.keys[hit[0].mm]}.experts"
                    found.append(Parameter(f"{path}.{leaf}", hub, hit[0], count))
            if found:
                return found
        return []

    def closest(self, module: str) -> str:
        """The known name that looks most like a module's, in words; "" if none does."""
        names = [self._family.hub_name(path + WEIGHT) for path in paths(module)]
        found = next((near for name in names if (near := self.linear.closest(name))), None)
        return f" (closest known name: {found})" if found else ""

    def has(self, module: str) -> bool:
        """Whether a module has a weight, or holds stacked experts."""
        plain = unwrapped(module)
        return self.path(plain) is not None or bool(self.parameters(plain))

    def knows(self, module: str) -> bool:
        """Whether a module is a linear layer, or holds stacked experts."""
        hit = self.path(unwrapped(module))
        return self.has(module) if hit is None else self.layer(hit[1]) is not None

    def layer(self, hub: str) -> tuple[Row, int, int] | None:
        """The row of a linear layer's weight, its layer and expert."""
        found = self.linear.find(hub)
        if found is None:
            return None
        row, layer, expert = found
        if row.layers and any(INDEX in name for name in row.hf):
            layer = row.layers[layer] if layer < len(row.layers) else layer
        return row, layer, expert


def renamed(tensor: StoredTensor, family: Family, names: Names, form: str) -> str:
    """A tensor's name in another form: ``new``, ``old`` or ``fsdp2``.

    Raises:
        TensorError: a module that the family does not have.
    """
    key = parse_key(tensor.name)
    module, kind = (key.module, WEIGHT) if key else tensor.name.rsplit(".", 1)
    hit = names.path(module, kind if key else f".{kind}")
    wrapped = names.parameters(unwrapped(module)) if key and hit is None else []
    if key and wrapped:
        path = spelled(family, wrapped[0].hub, "old" if form == "old" else "new")
        inner = ".base_layer" * module.count(".base_layer")
        return _key(path.rpartition(".")[0] + inner, key, form)
    if hit is None:
        raise TensorError(
            f"{tensor.name} in {tensor.path} belongs to no module of {family.name}"
            + names.closest(module),
            f"an adapter of {family.name}",
        )
    path = spelled(family, hit[1], "old" if form == "old" else "new").removesuffix(WEIGHT)
    if key is None:
        return PREFIX + path if form != "fsdp2" else path
    return _key(path, key, form)


def _key(path: str, key: AdapterKey, form: str) -> str:
    if form == "fsdp2":
        return f"{path}.{key.kind}.default{key.leaf}"
    return f"{PREFIX}{path}.{key.kind}{key.leaf}"
