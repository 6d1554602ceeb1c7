"""The command ``model_json``: MindSpeed-MM's model.json out of config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from mmconvert.cli.arguments import by_module, read_plain
from mmconvert.cli.screen import say
from mmconvert.config import MaybeGrid, MaybePath
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.modeljson.file import DECODER, ModelJson
from mmconvert.modeljson.keys import model_keys
from mmconvert.modeljson.write import script_flags, with_layout, write_json
from mmconvert.sharding.layout import Layout, grid_flag
from mmconvert.words import one_line

TEXT = """MindSpeed-MM's model.json for a model: sizes from config.json, layer lists and tp sizes
from --mm_dir or from the flags (one stage if there are none). What is a choice stands as in
MindSpeed-MM's examples: encoders and projector frozen, bf16, no dropout. Beside it, the flags that
the training script needs are printed.

example:
  mm-convert model_json HF_DIR --mm_dir MM_DIR --output model.json"""


@dataclass(frozen=True)
class ModelJsonFlags:
    """What to write."""

    path: tyro.conf.Positional[Path]
    """A Hugging Face folder; its config.json is what counts."""
    output: MaybePath = None
    """The file to write; not given: it is printed."""
    mm_dir: MaybePath = None
    """An MM checkpoint whose layout to take."""
    llm_pp_layers: MaybeGrid = None
    """Text decoder layers per pipeline stage: [1,10,10,7], or one list per virtual stage."""
    vit_pp_layers: MaybeGrid = None
    """Vision encoder layers, in the same form."""
    audio_pp_layers: MaybeGrid = None
    """Audio encoder layers, in the same form."""
    tp: int = 1
    """Tensor-parallel size."""
    vit_tp: int = 0
    """Tensor-parallel size of the vision encoder; 0 means that of --tp."""
    audio_tp: int = 0
    """Tensor-parallel size of the audio encoder; 0 means that of --tp."""
    overwrite: bool = False
    """Replace the output."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Writes, and prints the script's flags."""
    asked = read_plain(ModelJsonFlags, words, "mm-convert model_json", TEXT)
    from mmconvert.formats.hf.folder import read_config
    from mmconvert.formats.recognise import family_of

    config = read_config(asked.path)
    family_of(asked.path).dims(config)  # sizes that no model has are refused as everywhere
    content = model_keys(config)
    layout = _layout(asked, content)
    layout.check()
    content = with_layout(content, layout)
    flags = script_flags(content, layout)
    if asked.output is not None:
        write_json(content, asked.output, overwrite=asked.overwrite)
    if content.get("img_context_token_id") is None:
        say("warning: img_context_token_id is the tokenizer's id of <IMG_CONTEXT>; fill it in")
    if asked.json:
        print(json.dumps({"model_json": content, "script_flags": flags}))
        return 0
    if asked.output is None:
        print(json.dumps(content, indent=2))
        say(f"in the training script: {' '.join(flags)}")
    else:
        print(one_line(f"wrote {asked.output}: {layout.describe()}"))
        print(f"in the training script: {' '.join(flags)}")
    return 0


def _layout(asked: ModelJsonFlags, content: dict[str, object]) -> Layout:
    """The layout that is asked for.

    Raises:
        CheckpointError, RequestError: --mm_dir is none, or does not go with other flags.
    """
    given = by_module(asked, grid_flag(""))
    if asked.mm_dir is not None:
        if any(given.values()):
            raise RequestError("--mm_dir and layer lists are both given", "one of them")
        from mmconvert.tools.inspection import inspect

        found = inspect(asked.mm_dir).layout
        if found is None:
            raise CheckpointError(
                f"{asked.mm_dir} is not an MM checkpoint", "an MM checkpoint for --mm_dir"
            )
        return found
    grids = ModelJson(asked.path, content).grids()
    stages = next((grid for grid in given.values() if grid is not None), None)
    if stages is not None:  # one list alone would leave the others on another pipeline
        missing = [key for key in grids if given[key] is None]
        if missing:
            raise RequestError(
                f"the layer lists of {', '.join(missing)} are missing", "one for each module"
            )
        grids = {key: given[key] for key in [*grids, *given] if given[key] is not None}
    encoders = by_module(asked, "_tp")
    sizes = {key: encoders.get(key) or asked.tp for key in grids}
    layout = Layout(sizes, grids, decoder=DECODER)
    for key, part in ModelJson(asked.path, content).modules().items():
        count = sum(map(sum, grids[key])) if key in grids else part["num_layers"]
        if count != part["num_layers"]:
            raise RequestError(
                f"{grid_flag(key)} holds {count} layers", f"{part['num_layers']}, by config.json"
            )
    return layout
