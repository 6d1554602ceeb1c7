"""The command ``suggest``: balanced layer lists for a pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from mmconvert.cli.arguments import by_module, read_plain
from mmconvert.cli.screen import screen_events
from mmconvert.cli.spelling import path_of
from mmconvert.config import NO_PATTERNS, MaybePath, Patterns
from mmconvert.words import amount

if TYPE_CHECKING:
    from mmconvert.tools.suggest.suggestion import Suggestion

TEXT = """Balanced *_pp_layers for a model: the layout whose slowest pipeline rank has the least to
do; says whether that is proven. Cost: floating-point operations of a training step, from the
tensors' shapes (headers only; without weight files from config.json alone). No text layer stands
before the last layer of an encoder, and every stage holds a layer.

example:
  mm-convert suggest HF_DIR --pp 4 --tp 2 --freeze image_encoder"""


@dataclass(frozen=True)
class SuggestFlags:
    """What to balance."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="HF_DIR")]
    """A Hugging Face checkpoint, or a folder with its config.json alone."""
    pp: int
    """Number of pipeline ranks."""
    vpp: int = 1
    """Number of virtual stages: model chunks on each rank."""
    tp: int = 1
    """Tensor-parallel size."""
    vit_tp: int = 0
    """Tensor-parallel size of the vision encoder; 0 means that of --tp."""
    audio_tp: int = 0
    """Tensor-parallel size of the audio encoder; 0 means that of --tp."""
    ep: int = 0
    """Expert-parallel size, for models with experts; 0 proposes one."""
    device_memory: float = 64
    """GB of a device's memory, for that proposal."""
    freeze: Annotated[Patterns, tyro.conf.arg(metavar="NAME")] = NO_PATTERNS
    """Not trained: image_encoder, audio_encoder, text_decoder; commas between, or repeated."""
    by: Literal["flops", "parameters"] = "flops"
    """What to balance: operations of a step, or parameters."""
    seq_length: int = 4096
    """Tokens of a sample, image and audio tokens included."""
    image_tokens: int = 1024
    """Tokens of a sample that come from images, as the text decoder sees them."""
    images: int = 1
    """Images of equal size that they come from."""
    audio_tokens: int = 750
    """Tokens of a sample that come from sound, for models with an audio encoder: 25 a second."""
    mm_dir: str = ""
    """Folder for the MM checkpoint in the printed command; not given: named after the layout."""
    model_json: MaybePath = None
    """MindSpeed-MM's model.json to put the lists in; the flags of its script are printed."""
    write: MaybePath = None
    """Where to write the model.json with the lists; without --model_json, a new one."""
    overwrite: bool = False
    """Replace that file."""
    config_only: bool = False
    """Take sizes from config.json even where weight files are."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Balances, and shows."""
    asked = read_plain(SuggestFlags, words, "mm-convert suggest", TEXT, {"--freeze"})
    from mmconvert.tools.suggest.balanced import suggest
    from mmconvert.tools.suggest.suggestion import Goal
    from mmconvert.tools.suggest.workload import Workload

    expected = Goal(
        asked.pp,
        asked.vpp,
        asked.tp,
        by_module(asked, "_tp"),
        _frozen(asked),
        asked.by,
        Workload(asked.seq_length, asked.image_tokens, asked.images, asked.audio_tokens),
        asked.config_only,
        asked.ep,
        asked.device_memory * 1e9,
    )
    found = suggest(asked.path, expected)
    mm_dir = path_of(asked.mm_dir) if asked.mm_dir else _folder_name(asked, found.ep)
    made = _model_json(asked, found) if asked.model_json or asked.write else None
    if asked.json:
        more = {} if made is None else {"model_json": made.content, "script_flags": made.flags}
        print(json.dumps(found.as_dict(asked.path, mm_dir) | more))
        return 0
    with screen_events(quiet=False) as events:
        for note in found.notes:
            events.note(note)
        for warning in found.warnings:
            events.note(f"warning: {warning}")
    show(found)
    print(found.command(asked.path, mm_dir))
    if made is not None:
        print(f"in the training script: {' '.join(made.flags)}")
    return 0


def _frozen(asked: SuggestFlags) -> tuple[str, ...]:
    """What does not learn: as asked for, else the modules that model.json freezes as a whole."""
    if asked.freeze or asked.model_json is None:
        names = (name.strip() for text in asked.freeze for name in text.split(","))
        return tuple(name for name in names if name)
    from mmconvert.modeljson.file import read_model_json

    names = read_model_json(asked.model_json).frozen()
    parts = {"image_encoder.encoder", "image_encoder.projector"}
    whole = ("image_encoder",) if parts <= set(names) else ()
    return (*whole, *(name for name in names if "." not in name))


class Made(NamedTuple):
    """A model.json with the lists, and the flags of the script that goes with it."""

    content: dict[str, Any]
    flags: list[str]


def _model_json(asked: SuggestFlags, found: Suggestion) -> Made:
    """Puts the lists into a model.json, and writes it if that is asked for."""
    from mmconvert.formats.hf.folder import read_config
    from mmconvert.modeljson.file import read_model_json
    from mmconvert.modeljson.keys import model_keys
    from mmconvert.modeljson.write import script_flags, with_layout, write_json
    from mmconvert.sharding.layout import Layout

    grids = found.balance.grids
    decoder = found.model.family.decoder
    sizes = {key: found.tp.get(key, found.tp[decoder]) for key in grids}
    layout = Layout(sizes, grids, found.ep or 1, decoder=decoder)
    file = asked.model_json
    old = read_model_json(file).content if file else model_keys(read_config(asked.path))
    content = with_layout(old, layout)
    if asked.write is not None:
        write_json(content, asked.write, overwrite=asked.overwrite)
    return Made(content, script_flags(content, layout))


def _folder_name(asked: SuggestFlags, ep: int) -> Path:
    """A folder here, named after model and layout."""
    name = f"{asked.path.resolve().name}-tp{asked.tp}-pp{asked.pp}"
    name += f"-vpp{asked.vpp}" if asked.vpp > 1 else ""
    return Path(name + (f"-ep{ep}" if ep > 1 else ""))


def show(found: Suggestion) -> None:
    """Prints the layout as a table by pipeline rank, and how even it is."""
    from rich.console import Console
    from rich.table import Table

    names = {m.key: m.label.partition("_")[0] for m in found.model.modules}  # image, audio, text
    console = Console()
    heads = ["pp rank", *(f"{names[key]} layers" for key in found.balance.grids)]
    heads += ["cost", "TFLOP", "parameters", "weights"]
    table = Table(title=found.model.family.name)
    if console.width < 80:  # without lines there is room for whole words
        table.box, table.pad_edge = None, False
        heads = [head.replace(" ", "\n") for head in heads]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for number, rank in enumerate(found.ranks):
        layers = [" + ".join(str(c[key]) for c in rank.chunks) for key in found.balance.grids]
        figures = [f"{rank.share:.1%}", f"{rank.tflop:.2f}", f"{rank.parameters / 1e6:,.1f} M"]
        table.add_row(str(number), *layers, *figures, amount(rank.nbytes))
    console.print(table)
    every, active = found.parameters
    if active < every:
        whole, part = (
            f"{count / 1e9:,.2f} B" if every >= 1e9 else f"{count / 1e6:,.2f} M"
            for count in (every, active)
        )
        print(f"ep {found.ep}; {whole} parameters, of which {part} work on each token")
    proof = "optimal: no other layout has a faster slowest rank"
    if not found.balance.optimal:
        proof = f"not proven optimal: at most {found.balance.gap:.2%} above the best"
    print(f"imbalance {found.imbalance:.2%} (slowest rank over the mean); {proof}")
    if found.expected.vpp > 1:
        print(f"the largest model chunk is {found.chunk_imbalance:.0%} above the mean chunk")
