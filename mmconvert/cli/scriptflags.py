"""Command lines of MindSpeed-MM's scripts, read under their own names.

What has a meaning here means the same, what has no effect here is accepted with one note, and what
is not supported here is refused by name: :mod:`mmconvert.cli.scripttable`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmconvert.cli.scripttable import (
    CHOICES,
    NO_EFFECT,
    OF_THE_LAUNCHER,
    REFUSED,
    RENAMED,
    SIZES,
    STANDS_FOR,
)  # fmt: skip
from mmconvert.errors import LayoutError, RequestError
from mmconvert.modeljson.compare import against_config
from mmconvert.modeljson.file import ModelJson
from mmconvert.modeljson.keys import derivable
from mmconvert.sharding.layout import Layout


@dataclass
class Script:
    """A script's command line, read.

    Attributes:
        words: what is left, in our own flags.
        model, data: model.json and data.json, if they are given.
        sizes: tp, pp, vpp, ep that the script names.
        hetero: whether each module has the tp size that model.json gives it.
        idle: flags without effect here, by the reason.
    """

    words: list[str] = field(default_factory=list[str])
    model: Path | None = None
    data: Path | None = None
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    hetero: bool = False
    idle: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def given(self) -> bool:
        """Whether this is the command line of a script, and not one of ours."""
        return self.model is not None or self.data is not None

    def notes(self) -> list[str]:
        """One line on all flags without effect."""
        if not self.idle:
            return []
        listed = [f"{', '.join(flags)} ({why})" for why, flags in self.idle.items()]
        return [f"note: no effect here: {'; '.join(listed)}"]

    def fill(self, defaults: dict[str, str]) -> None:
        """Adds defaults of flags that are not given."""
        for name, value in defaults.items():
            if f"--{name}" not in self.words:
                self.words += [f"--{name}", value]


def read_script(
    words: Sequence[str], own: Sequence[str], training: Sequence[Field[Any]] = ()
) -> Script:
    """Takes the flags of a script out of a command line.

    Args:
        own: names of our own flags, which pass.
        training: flags of training, which have no effect on an answer.

    Raises:
        RequestError: a flag that is not supported here, or that nobody knows, with what to do.
    """
    script = Script()
    idle = NO_EFFECT | {
        f.name: (0 if f.type == "bool" else 1, "an answer, and no training")
        for f in training
        if f.name not in RENAMED
    }
    rest = _Words(words)
    for flag, value in rest:
        name = flag[2:].replace("-", "_")
        if name in ("mm_model", "mm_data"):
            path = rest.value(flag, value)
            setattr(script, name[3:], Path(path))
            script.words += [f"--{name}", path]
        elif name in SIZES:
            script.sizes[SIZES[name]] = _number(flag, rest.value(flag, value))
        elif name == "hetero_parallel":
            script.hetero = True
        elif name in STANDS_FOR:
            ours, meaning = STANDS_FOR[name]
            script.words += [f"--{ours}", meaning]
        elif name in idle and name not in own:
            count, why = idle[name]
            if count:
                rest.value(flag, value)
            script.idle.setdefault(why, []).append(flag)
        elif name in CHOICES and name not in own:
            _choose(flag, rest.value(flag, value), *CHOICES[name])
        elif name not in (*own, *RENAMED, "help"):
            _refuse(flag, name, [*own, *RENAMED])
        else:
            ours = name if name in own else RENAMED.get(name, name)
            script.words += [f"--{ours}", *([] if value is None else [value])]
            script.words += rest.values()
    return script


class _Words:
    """The words of a command line, flag by flag."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._at = list(words), 0

    def __iter__(self) -> Iterator[tuple[str, str | None]]:
        """Each flag, and what stands behind its ``=``."""
        while self._at < len(self._words):
            word = self._words[self._at]
            self._at += 1
            if word == "-h":
                yield "--help", None
                continue
            if not word.startswith("--"):
                raise RequestError(f"{word!r} is not a flag", "flags, each followed by its values")
            name, equals, value = word.partition("=")
            yield name, value if equals else None

    def value(self, flag: str, given: str | None) -> str:
        """The one value of a flag."""
        if given is not None:
            return given
        if self._at == len(self._words) or self._words[self._at].startswith("--"):
            raise RequestError(f"{flag} has no value", f"{flag} VALUE")
        self._at += 1
        return self._words[self._at - 1]

    def values(self) -> list[str]:
        """All words up to the next flag."""
        found: list[str] = []
        while self._at < len(self._words) and not self._words[self._at].startswith("--"):
            found.append(self._words[self._at])
            self._at += 1
        return found


def _number(flag: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 16:
        raise RequestError(f"{flag} is {text!r}", "a number of at least 1")
    return int(text)


def _choose(flag: str, value: str, known: tuple[str, ...], fix: str) -> None:
    if value not in known:
        raise RequestError(f"{flag} {value} is not supported here", f"{flag} {known[0]}", fix)


def _refuse(flag: str, name: str, own: Sequence[str]) -> None:
    """Says why a flag is not taken."""
    if name in REFUSED:
        _, expected, fix = REFUSED[name]
        raise RequestError(f"{flag} is not supported here", expected, fix)
    if name in OF_THE_LAUNCHER:
        raise RequestError(
            f"{flag} belongs to torchrun",
            "torchrun's flags before the program",
            f"torchrun {flag} ... -m mmconvert finetune ..., or leave it out",
        )
    known = {*own, *NO_EFFECT, *SIZES, *STANDS_FOR, *CHOICES, "mm_model", "mm_data"}
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    raise RequestError(
        f"there is no flag {flag}",
        "a flag of mm-convert finetune, or of MindSpeed-MM's scripts",
        f"did you mean --{near[0]}?" if near else "mm-convert finetune -h shows the flags",
    )


def check_layout(layout: Layout, model: ModelJson | None, script: Script) -> None:
    """The layout of the checkpoint is the one that the script and model.json name.

    A size that the script does not give is the checkpoint's.

    Raises:
        LayoutError: it is another; both are printed.
    """
    given = script.sizes
    tp = dict.fromkeys(layout.tp, given["tp"]) if "tp" in given else dict(layout.tp)
    if script.hetero and model is not None:
        tp |= {key: n for key, n in model.tp().items() if key in tp}
    grids = dict(layout.grids)
    staged = "pp" in given or "vpp" in given
    pp = given.get("pp", 1) if staged else layout.pp_size
    vpp = given.get("vpp", 1) if staged else layout.vpp_size
    if pp * vpp > 1 and model is not None:
        grids |= {key: grid for key, grid in model.grids().items() if key in grids}
    expected = Layout(tp, grids, given.get("ep", layout.ep), decoder=layout.decoder)
    if (expected.pp_size, expected.vpp_size) != (pp, vpp):
        source = script.model or "the checkpoint"
        virtual = f" --virtual-pipeline-model-parallel-size {expected.vpp_size}"
        virtual = virtual if expected.vpp_size > 1 else ""
        raise LayoutError(
            f"the script has PP {pp} and VPP {vpp}, {source} has PP {expected.pp_size} and VPP "
            f"{expected.vpp_size}",
            "the same sizes in the script, in model.json and in the checkpoint",
            f"give --pipeline-model-parallel-size {expected.pp_size}{virtual}",
        )
    if expected != layout:
        raise LayoutError(
            f"the checkpoint's layout is {layout.describe()}; the script and model.json say "
            f"{expected.describe()}",
            "one layout",
            "give the checkpoint's sizes (--tensor-model-parallel-size ...), or resplit it",
        )


def check_sizes(model: ModelJson, config: Mapping[str, Any]) -> list[str]:
    """Notes on values of model.json that config.json, which counts here, has otherwise.

    Raises:
        RequestError: sizes differ: it is another model's file.
    """
    if not derivable(config):
        return [f"note: {model.path}: config.json decides; the sizes of both are not compared"]
    found = [d for d in against_config(model, config) if not d.absent]
    apart = [d for d in found if d.shape]
    if apart:
        more = f", and {len(apart) - 3} more" if len(apart) > 3 else ""
        raise RequestError(
            f"{model.path} belongs to another model: {'; '.join(d.what for d in apart[:3])}{more}",
            "the sizes of config.json",
            "mm-convert doctor --model_json lists what differs",
        )
    own = [d.what for d in found if d.key != "img_context_token_id"]
    return (
        [f"note: {model.path}: config.json decides, not this file: {'; '.join(own)}"] if own else []
    )


def needed(value: Path | None, flag: str, tool: str) -> Path:
    """A folder that must be given.

    Raises:
        RequestError: it is not.
    """
    if value is None:
        raise RequestError(
            f"{flag} is missing", f"{flag} FOLDER", f"mm-convert {tool} -h shows the flags"
        )
    return value


def check_only_qwenvl(vocab: Path | None, like: str, dtype: str = "") -> None:
    """Raises RequestError where flags of Qwen-VL alone are given for another family."""
    if dtype == "fp16":
        raise RequestError("--dtype fp16 is for Qwen-VL only", "--dtype bf16, or fp32")
    if vocab is not None or like != "hub":
        flag = "--vocab_file" if vocab is not None else "--like"
        raise RequestError(f"{flag} is for Qwen-VL only", f"no {flag} with this model")
