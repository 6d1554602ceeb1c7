"""What a format is: the interface by which everything else knows it.

A format is a folder here (or a module of another package) with one object of this interface, and
a line in the registry. A conversion opens its source with one format and places its wholes with
another; neither knows the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from mmconvert.config import Options
from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module
from mmconvert.errors import RequestError
from mmconvert.formats.containers.image import FileImage
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.model import Model
from mmconvert.plan.plan import Key, Side, Whole
from mmconvert.stored import StoredTensor, Target

if TYPE_CHECKING:
    from mmconvert.formats.contents import Look


class Described(Protocol):
    """A layout, in the words of its format."""

    def describe(self) -> str:
        """One line for messages, in the words of the command line."""
        ...

    def as_dict(self) -> dict[str, object]:
        """The layout as JSON."""
        ...


@dataclass(frozen=True)
class NoLayout:
    """The layout of a format that knows but one. As flags it has none."""

    def describe(self) -> str:
        """One line for messages."""
        return "complete"

    def as_dict(self) -> dict[str, object]:
        """The layout as JSON."""
        return {}


ModelPart = Literal["", "base", "adapter"]


@dataclass(frozen=True)
class Opening:
    """What a reader is told of a checkpoint.

    Attributes:
        family: whose table its tensors have.
        options: how to do it.
        layout: what the user says of its layout, in the format's own ``Layout``; asserts only.
        flags: how the layout's flags begin, for messages.
        like: the model that it came from, if it is at hand: gives sizes and structure.
        claims: every tensor must have a row; else names alone count, where the format allows it.
        encoders_only: the text decoder is left out.
        canonical: q, k, v and gate, up are apart (``enable_canonical_hf_struct``).
        text_dir: another folder that the text decoder is taken from.
        part: which one is meant, where adapters lie beside the weights that they change.
        faults: where those go after which the reader can go on.
    """

    family: Family
    options: Options
    layout: object | None = None
    flags: str = ""
    like: Model | None = None
    claims: bool = True
    encoders_only: bool = False
    canonical: bool = False
    text_dir: Path | None = None
    part: ModelPart = ""
    faults: Faults = STRICT


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint(ABC):
    """A checkpoint that was opened: what is stored, and which model that is.

    Attributes:
        format: the name of its format.
        path: as it was given.
        model: the table that its tensors have, its sizes, what was left out.
        layout: how it is laid out; None where it holds whole tensors only.
        iteration: of training, where the checkpoint tells.
        inputs: other files and folders that were read with it.
        training: what training goes on with besides tensors, by name, where its state is read too.
    """

    format: str
    path: Path
    model: Model
    layout: Described | None = None
    iteration: str = ""
    inputs: tuple[Path, ...] = ()
    training: Mapping[str, object] = field(default_factory=dict[str, object])

    @abstractmethod
    def side(self, modules: tuple[Module, ...] | None = None, *, as_hf: bool = False) -> Side:
        """The wholes that its tensors form, as a side of a plan.

        Args:
            modules: the table whose wholes are meant, where the tensors allow a choice.
            as_hf: matrices that Hugging Face stores the other way round are seen as it does.

        Raises:
            TensorError: tensors that are missing or do not fit together.
        """

    def untied(self) -> StoredCheckpoint:
        """The checkpoint as if its output layer were a tensor of its own, not the word embedding.

        Raises:
            RequestError: the format does not allow it.
        """
        raise RequestError(
            f"the output layer of a checkpoint in the format {self.format} cannot be untied",
            "a base model in the format hf or mm",
        )


@dataclass(frozen=True)
class Placing:
    """What is to be stored.

    Attributes:
        source: what the wholes come from.
        wholes: by their names; shapes and dtypes are those to be written.
        path: of the output.
        layout: the layout that is asked for, in the format's own ``Layout``.
        flags: how its flags begin, for messages.
        options: how to do it.
        cast: safetensors spelling of the dtype that everything is cast to; "" for none.
        original: the checkpoint whose files the output is like, if the format needs one.
    """

    source: StoredCheckpoint
    wholes: Mapping[Key, Whole]
    path: Path
    layout: object
    flags: str
    options: Options
    cast: str = ""
    original: StoredCheckpoint | None = None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A checkpoint that is to be written.

    Attributes:
        side: its tensors and the wholes that they form.
        layout: how it is laid out; None where it holds whole tensors only.
        notes: what is worth knowing, in words.
        about: what its manifest says beside what all manifests say.
        not_copied: reason -> files of the original that are left out of the output.
        transposed: templates of the wholes that are stored the other way round than in MM format.
        single: the output is one file, not a folder.
    """

    side: Side
    layout: Described | None = None
    notes: tuple[str, ...] = ()
    about: Mapping[str, object] = field(default_factory=dict[str, object])
    not_copied: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    transposed: frozenset[str] = frozenset()
    single: bool = False


class Format(ABC):
    """A kind of checkpoint.

    Attributes:
        name: as in ``hf_to_mm``, and in manifests and JSON.
        title: in words.
        naming: whose names its tensors have; "" for those of the family's own table.
        reads, writes: the options that make sense only where this format is read, or written.
        needs_original: its files are made like those of an original Hugging Face checkpoint.
        needs_sizes: its checkpoints do not tell the sizes of their model.
        own_names: a regular expression of what stands at the top of its folders; ``--overwrite``
            replaces no folder that holds anything else, and none of a format without it.
        Layout: a frozen dataclass; its fields are the flags of the command line.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    naming: ClassVar[str] = ""
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset()
    needs_original: ClassVar[bool] = False
    needs_sizes: ClassVar[bool] = False
    own_names: ClassVar[str] = ""
    Layout: ClassVar[type] = NoLayout

    @abstractmethod
    def recognise(self, path: Path) -> bool:
        """Whether a path is, by its looks, a checkpoint of this format; reads no tensors."""

    @abstractmethod
    def family(self, path: Path) -> Family | None:
        """The family of a checkpoint's model; None where any names will do and none is known.

        Raises:
            CheckpointError: no family here serves it.
        """

    @abstractmethod
    def look(self, path: Path) -> Look:
        """What a checkpoint holds, in the names that stand there; no family need serve it.

        Raises:
            CheckpointError: it is damaged.
        """

    @abstractmethod
    def open(self, path: Path, told: Opening) -> StoredCheckpoint:
        """Opens a checkpoint: every tensor is claimed by a row, or named as left out.

        Raises:
            MMConvertError: files that are missing or damaged, tensors that nothing claims, or a
                layout that is not what the user says.
        """

    @abstractmethod
    def place(self, asked: Placing) -> Placed:
        """What is to be stored, and which part of which whole each tensor is.

        Raises:
            LayoutError: wholes that cannot be divided as the layout says.
            MMConvertError: a request that contradicts itself.
        """

    @abstractmethod
    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterable[FileImage]:
        """The files of a placed checkpoint; ``targets`` may have carried tensors at their end.

        Raises:
            RequestError: a tensor that the format cannot hold.
        """

    def owns(self, folder: Path) -> bool:
        """Whether a folder holds an output of this format, so that ``--overwrite`` may replace it
        if nothing else is in it.
        """
        return bool(self.own_names) and self.recognise(folder)

    def as_hf(self, family: Family, layout: object) -> bool:
        """Whether it takes matrices as Hugging Face has them, where MM format transposes them."""
        del family, layout
        return self.naming == "hf"

    def read_back(self, stored: Sequence[StoredTensor], placed: Placed, asked: Placing) -> Side:
        """A placed checkpoint as the reader will see it, for a rehearsal without any files.

        Args:
            stored: the targets of ``placed``, in their order.

        Raises:
            MMConvertError: tensors that would not be read back.
        """
        del asked
        return Side(stored=list(stored), wholes=placed.side.wholes)

    def samples(self, model: Model) -> list[tuple[str, object]]:
        """Names of a few layouts that are unlike each other, and the layouts."""
        del model
        return [("complete", self.Layout())]

    def file_name(self, layout: object) -> str:
        """A name for an output in this layout."""
        del layout
        return self.name

    def claims(self, layout: object) -> bool:
        """Whether writing this layout needs a table that knows every tensor."""
        del layout
        return True
