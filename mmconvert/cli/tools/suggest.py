"""The command ``suggest``: balanced layer lists for a pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import screen_events
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
class Asked:
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
    freeze: str = ""
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
    config_only: bool = False
    """Take sizes from config.json even where weight files are."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Balances, and shows."""
    asked = read_plain(Asked, freeze_joined(words), "mm-convert suggest", TEXT)
    from mmconvert.tools.suggest.suggestion import Goal, suggest
    from mmconvert.tools.suggest.workload import Workload

    expected = Goal(
        asked.pp,
        asked.vpp,
        {"llm": asked.tp, "vit": asked.vit_tp, "audio": asked.audio_tp},
        tuple(name.strip() for name in asked.freeze.split(",") if name.strip()),
        asked.by,
        Workload(asked.seq_length, asked.image_tokens, asked.images, asked.audio_tokens),
        asked.config_only,
    )
    found = suggest(asked.path, expected)
    mm_dir = Path(asked.mm_dir) if asked.mm_dir else _folder_name(asked)
    if asked.json:
        print(json.dumps(found.as_dict(asked.path, mm_dir)))
        return 0
    with screen_events(quiet=False) as events:
        for note in found.notes:
            events.note(note)
        for warning in found.warnings:
            events.note(f"warning: {warning}")
    show(found)
    print(found.command(asked.path, mm_dir))
    return 0


def freeze_joined(words: Sequence[str]) -> list[str]:
    """All ``--freeze NAME`` as one flag with commas, the others untouched."""
    names: list[str] = []
    out: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag != "--freeze":
            out.append(word)
            continue
        name = value if equals else next(rest, None)
        if name is None or name.startswith("-"):  # for tyro to refuse
            return [*out, "--freeze"]
        names.append(name)
    return [*out, "--freeze", ",".join(names)] if names else out


def _folder_name(asked: Asked) -> Path:
    """A folder here, named after model and layout."""
    name = f"{asked.path.resolve().name}-tp{asked.tp}-pp{asked.pp}"
    return Path(name + (f"-vpp{asked.vpp}" if asked.vpp > 1 else ""))


def show(found: Suggestion) -> None:
    """Prints the layout as a table by pipeline rank, and how even it is."""
    from rich.console import Console
    from rich.table import Table

    names = {m.key: m.label.partition("_")[0] for m in found.model.modules}  # image, audio, text
    table = Table(title=found.model.family.name)
    table.add_column("pp rank", justify="right")
    for key in found.balance.grids:
        table.add_column(f"{names[key]} layers", justify="right")
    for column in ("cost", "TFLOP", "parameters", "weights"):
        table.add_column(column, justify="right")
    for number, rank in enumerate(found.ranks):
        layers = [" + ".join(str(c[key]) for c in rank.chunks) for key in found.balance.grids]
        figures = [f"{rank.share:.1%}", f"{rank.tflop:.2f}", f"{rank.parameters / 1e6:,.1f} M"]
        table.add_row(str(number), *layers, *figures, amount(rank.nbytes))
    Console().print(table)
    proof = "optimal: no layout has a faster slowest rank"
    if not found.balance.optimal:
        proof = f"not proven optimal: at most {found.balance.gap:.2%} above the best"
    print(f"imbalance {found.imbalance:.2%} (slowest rank over the mean); {proof}")
    if found.expected.vpp > 1:
        print(f"the largest model chunk is {found.chunk_imbalance:.0%} above the mean chunk")
