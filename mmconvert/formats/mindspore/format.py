"""MindSpore checkpoints, as MindFormers has them, as a format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmconvert.config import Options
from mmconvert.config.mindspore import DeviceConfig, RankFolders
from mmconvert.converters import ms_registry
from mmconvert.converters.family import Family
from mmconvert.converters.mindspore import MSFamily
from mmconvert.converters.rows import Module
from mmconvert.errors import RequestError
from mmconvert.formats import contents
from mmconvert.formats.base import (
    Described,
    Format,
    Opening,
    Placed,
    Placing,
    StoredCheckpoint,
)
from mmconvert.formats.containers.ckpt_layout import ckpt_image
from mmconvert.formats.containers.image import FileImage
from mmconvert.formats.containers.safetensors import safetensors_image
from mmconvert.formats.faults import STRICT, Collected, Faults
from mmconvert.formats.mindspore.folder import SUFFIXES, is_ms, open_ms, read_strategies
from mmconvert.formats.mindspore.layouts import (
    GivenLayout,
    by_strategy,
    device_layout,
    unchecked_heads,
)
from mmconvert.formats.mindspore.model import (
    MSModel,
    check_complete,
    family_spread,
    in_order,
    ms_model,
)
from mmconvert.formats.mindspore.output import METADATA, Destination, rank_path, strategy_images
from mmconvert.formats.mindspore.side import (
    Spread,
    device_source,
    device_target,
    whole_spread,
)
from mmconvert.formats.model import Model
from mmconvert.formats.recognise import ms_family
from mmconvert.plan.plan import Side
from mmconvert.plan.sizes import check_agreement
from mmconvert.sharding.devices import DeviceLayout
from mmconvert.stored import StoredTensor, Target


@dataclass(frozen=True, kw_only=True)
class MSStored(StoredCheckpoint):
    """A MindSpore checkpoint that was opened; ``ranks`` are its tensors and how they lie."""

    ranks: MSModel
    faults: Faults = STRICT

    def side(self, modules: tuple[Module, ...] | None = None, *, as_hf: bool = False) -> Side:
        """Its wholes; matrices as MindFormers has them, or as Hugging Face."""
        del modules
        family = self.model.family
        table = self.model.modules or family.table(family.variants[0])
        rows = [row for module in table for row in module.all_rows()]
        seen_transposed = frozenset(r.mm for r in rows if as_hf and r.transposed)
        return self.ranks.side(seen_transposed, self.faults)


@dataclass(frozen=True, kw_only=True)
class MSPlaced(Placed):
    """A MindSpore checkpoint to be written.

    Attributes:
        held: for each rank the numbers of its targets.
        spread: how they are sliced.
        form: of the files.
    """

    held: Sequence[Sequence[int]]
    spread: Spread
    form: Destination


class MindSpore(Format):
    """A ``.ckpt`` or safetensors file, or rank folders with strategy files."""

    name: ClassVar = "ms"
    title: ClassVar = "MindSpore"
    naming: ClassVar = "mindformers"
    writes: ClassVar = frozenset({"crc"})
    own_names: ClassVar = r"rank_\d{1,5}|strategy"
    Layout: ClassVar = RankFolders

    def recognise(self, path: Path) -> bool:
        """By the name of a file, or rank folders."""
        return is_ms(path)

    def owns(self, folder: Path) -> bool:
        """By the file of a rank."""
        ranks = [path for path in folder.iterdir() if re.fullmatch(r"rank_\d{1,5}", path.name)]
        files = (file for path in ranks if path.is_dir() for file in path.iterdir())
        return any(file.name.endswith(SUFFIXES) for file in files)

    def claims(self, layout: object) -> bool:
        """Parallel sizes divide by a family's table; strategy files and one file need none."""
        return isinstance(layout, DeviceConfig) and _sizes(layout) != DeviceConfig()

    def family(self, path: Path) -> Family | None:
        """By the tensors' names. Where no family knows them, names alone will do."""
        faults = Collected()  # some of the files will do
        names = [name for part in open_ms(path, faults=faults).parts for name in part]
        if not names and faults.errors:
            raise faults.errors[0]
        return ms_family(names)

    def look(self, path: Path) -> contents.Look:
        """Its file, or its ranks; its wholes put together as the strategy files say."""
        model = ms_model(path, None, Options())
        side, single = model.side(), path.is_file()
        files = model.checkpoint.parts
        found = [tensor for part in files for tensor in part.values()]
        family = ms_family(tensor.name for tensor in found)
        parts = {path.name if single else f"rank_{n}": part for n, part in enumerate(files)}
        return contents.Look(
            kind="ms_file" if single else self.name,
            title="MindSpore file" if single else "MindSpore checkpoint",
            family=family.name if family else "",
            listing=found,
            wholes={key.name(): whole for key, whole in side.wholes.items()},
            stored=side.stored,
            boxes=contents.of_rank_file(parts, ms_registry().values()),
            unit="file" if single else "rank",
            notes=model.notes,
        )

    def open(self, path: Path, told: Opening) -> MSStored:
        """By the table of a family, or of any model by the names alone."""
        family, like = told.family, told.like
        strategy = told.layout.strategy if isinstance(told.layout, RankFolders) else None
        variant = like.variant if like else family.variants[0]
        table: tuple[Module, ...] = ()
        if told.claims:
            table = like.modules if like else family.table(variant)
        found = ms_model(
            path, strategy, told.options, table or None, name=family.name, faults=told.faults
        )
        dims = like.dims if like else {}
        if table:
            keys = (key for part in found.parts for key in part)
            check_complete(keys, table, dims, path, told.faults)
        model = Model(
            family,
            variant,
            table,
            dims,
            notes=tuple(found.notes),
            patterns=found.patterns,
            dropped=found.dropped,
        )
        layout = GivenLayout(found.spread.devices, len(found.spread.stages))
        inputs = () if strategy is None else (strategy,)
        return MSStored(
            format=self.name,
            path=path,
            model=model,
            layout=layout,
            inputs=inputs,
            ranks=found,
            faults=told.faults,
        )

    def place(self, asked: Placing) -> MSPlaced:
        """Every whole sliced over devices: by the family's rules, or by strategy files."""
        given = asked.layout if isinstance(asked.layout, RankFolders) else RankFolders()
        model = asked.source.model
        family = model.family
        table = model.modules or family.table(family.variants[0])
        if isinstance(asked.source, MSStored) and isinstance(family, MSFamily):
            # The vocabulary may have been padded on MindFormers' side (enable_emb_opt).
            sizes = {dim: n for dim, n in model.dims.items() if dim != family.vocabulary}
            check_agreement(asked.wholes, table, sizes, asked.source.path)
        wholes = in_order(asked.wholes, table)
        layout: Described
        notes: list[str] = []
        if given.strategy is not None:
            if self.claims(given):
                raise RequestError(
                    "--cfg.target_strategy and --cfg.target_parallel_config both say how to slice",
                    "one of them",
                )
            spread = by_strategy(read_strategies(given.strategy), wholes, given.strategy)
            layout = GivenLayout(spread.devices, len(spread.stages))
        elif model.modules and isinstance(family, MSFamily):
            layers = check_complete(wholes, model.modules, model.dims, asked.source.path)
            devices = device_layout(given, layers[family.decoder], asked.flags)
            spread = family_spread(family, model.modules, wholes, layers, model.dims, devices)
            notes = unchecked_heads(family, model.dims, devices)
            layout = devices
        else:
            spread = whole_spread({key: whole.shape for key, whole in wholes.items()})
            layout = DeviceLayout()
        form = Destination.of(
            asked.path,
            given.format,
            spread,
            crc=asked.options.crc,
            folder=asked.source.format == self.name,
        )
        side, held = device_target(wholes, spread)
        return MSPlaced(
            side=side,
            layout=layout,
            notes=tuple(notes),
            about={"source_layout": asked.source.layout.as_dict()} if asked.source.layout else {},
            single=form.single,
            held=held,
            spread=spread,
            form=form,
        )

    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterator[FileImage]:
        """A file for each rank, and in a folder the strategy files."""
        assert isinstance(placed, MSPlaced)  # noqa: S101 - narrows the type: it is our own
        form = placed.form
        suffix = "ckpt" if form.ckpt else "safetensors"
        for rank, numbers in enumerate(placed.held):
            path = asked.path.name if form.single else rank_path(rank, suffix)
            if form.ckpt:
                yield ckpt_image(path, targets, numbers, crc=form.crc)
            else:
                yield safetensors_image(path, targets, numbers, METADATA)
        if not form.single:
            yield from strategy_images(placed.spread)

    def read_back(self, stored: Sequence[StoredTensor], placed: Placed, asked: Placing) -> Side:
        """By the names in each rank's file and the strategy."""
        del asked
        assert isinstance(placed, MSPlaced)  # noqa: S101 - narrows the type: it is our own
        keys = {key.name(): key for key in placed.side.wholes}
        parts = [{keys[stored[i].name]: stored[i] for i in held} for held in placed.held]
        return device_source(parts, placed.spread)

    def samples(self, model: Model) -> list[tuple[str, object]]:
        """One file, weights divided, weights divided by the optimizer over two stages."""
        layers = model.dims[f"{model.family.decoder}.layers"]
        return [
            ("complete", RankFolders()),
            ("mp2", RankFolders(model_parallel=2)),
            (
                "dp2 pp2 optimizer",
                RankFolders(
                    data_parallel=2,
                    llm_pp_layers=((layers - layers // 2, layers // 2),),
                    optimizer_parallel=True,
                    optimizer_threshold=0,
                ),
            ),
        ]

    def file_name(self, layout: object) -> str:
        """A file's for one rank, else a folder's."""
        return "ranks" if self.claims(layout) else "x.ckpt"


def _sizes(layout: DeviceConfig) -> DeviceConfig:
    """The parallel sizes alone."""
    return DeviceConfig(*(getattr(layout, name) for name in DeviceConfig.__dataclass_fields__))


FORMAT = MindSpore()
