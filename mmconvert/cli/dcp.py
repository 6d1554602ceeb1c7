"""``hf_to_dcp`` and ``dcp_to_hf`` in the spelling of MindSpeed-MM's converters for FSDP2 trainers.

Flags stand without ``cfg.`` here, and differ from converter to converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmconvert.cli.arguments import Command, read
from mmconvert.cli.commands import DCP_CONVERTERS
from mmconvert.cli.conversions import show
from mmconvert.cli.screen import screen_events
from mmconvert.config.dcp import DCPLayout
from mmconvert.errors import RequestError
from mmconvert.narrow import is_array, is_texts


@dataclass(frozen=True)
class ToDCP:
    """Hugging Face -> DCP."""

    hf_dir: Path
    """Hugging Face checkpoint."""
    dcp_dir: Path
    """Folder to write."""
    ranks: int = 1
    """Divide every tensor over so many ranks, as FSDP2 does; 1 leaves tensors whole."""
    num_workers: int = 0
    """Number of threads; 0 takes one for each core."""


@dataclass(frozen=True)
class Prefixed:
    """Names and ties of models of any kind."""

    dcp_prefix: str = ""
    """What stands before each name, or in the place of hf_prefix."""
    hf_prefix: str = ""
    """Prefix of Hugging Face names that dcp_prefix replaces; other names stay as they are."""
    tie_weight_mapping: str = ""
    """JSON, such as {"lm_head.weight": "model.language_model.embed_tokens.weight"}: tensors that
    DCP has besides, and what each repeats."""
    fused_linear_names: str = ""
    """JSON list of endings of names: these stacks of experts are flattened into one matrix."""


@dataclass(frozen=True)
class QwenToDCP(ToDCP):
    """Hugging Face -> DCP."""

    tie_weight: bool = False
    """Write the embedding once more, as lm_head."""
    is_lora_base: bool = False
    """Names of a base model for LoRA training."""


@dataclass(frozen=True)
class GenericToDCP(Prefixed, ToDCP):
    """Hugging Face -> DCP."""


@dataclass(frozen=True)
class MergeToDCP:
    """Hugging Face -> DCP, with merged experts."""

    hf_dir: Path
    """Hugging Face checkpoint."""
    save_dir: Path
    """Folder to write."""
    dcp_prefix: str = "model."
    """What stands before each name, or in the place of hf_prefix."""
    hf_prefix: str = ""
    """Prefix of Hugging Face names that dcp_prefix replaces."""
    ranks: int = 1
    """Divide every tensor over so many ranks, as FSDP2 does; 1 leaves tensors whole."""
    num_workers: int = 0
    """Number of threads; 0 takes one for each core."""


@dataclass(frozen=True)
class QwenToHF:
    """DCP -> Hugging Face."""

    load_dir: Path
    """DCP folder, or the folder with its tracker file."""
    save_dir: Path
    """Folder to write."""
    model_assets_dir: Path
    """The original Hugging Face checkpoint: names, files, tokenizer."""
    to_bf16: bool = False
    """Cast floating-point tensors to bfloat16."""
    is_lora_base: bool = False
    """Names of a base model for LoRA training."""
    num_workers: int = 0
    """Number of threads; 0 takes one for each core."""


@dataclass(frozen=True)
class GenericToHF(Prefixed):
    """DCP -> Hugging Face."""

    load_dir: Path = Path()
    """DCP folder, or the folder with its tracker file."""
    save_dir: Path = Path()
    """Folder to write."""
    model_assets_dir: Path = Path()
    """The original Hugging Face checkpoint: names, files, tokenizer."""
    to_bf16: bool = False
    """Cast floating-point tensors to bfloat16."""
    trust_remote_code: bool = False
    """Accepted for compatibility; nothing is ever run."""
    num_workers: int = 0
    """Number of threads; 0 takes one for each core."""


@dataclass(frozen=True)
class Qwen35ToHF(Prefixed):
    """DCP -> Hugging Face."""

    dcp_dir: Path = Path()
    """DCP folder, or the folder with its tracker file."""
    save_hf_dir: Path = Path()
    """Folder to write."""
    origin_hf_dir: Path = Path()
    """The original Hugging Face checkpoint: names, files, tokenizer."""
    trust_remote_code: bool = False
    """Accepted for compatibility; nothing is ever run."""
    to_bf16: bool = False
    """Cast floating-point tensors to bfloat16."""
    keep_origin_mtp_weights: bool = False
    """Take the mtp.* tensors from origin_hf_dir, and not from DCP."""
    num_workers: int = 0
    """Number of threads; 0 takes one for each core."""


@dataclass(frozen=True)
class MergeToHF:
    """DCP with merged experts -> Hugging Face."""

    hf_dir: Path
    """The original Hugging Face checkpoint: names, files, tokenizer."""
    dcp_dir: Path
    """DCP folder, or the folder with its tracker file."""
    save_dir: Path
    """Folder to write."""
    dcp_prefix: str = "model."
    """What stands before each name, or in the place of hf_prefix."""
    hf_prefix: str = ""
    """Prefix of Hugging Face names that dcp_prefix replaces."""
    to_bf16: bool = False
    """Cast floating-point tensors to bfloat16."""
    num_workers: int = 0
    """Number of threads; 0 takes one for each core."""


# Of each converter the forms of hf_to_dcp and dcp_to_hf.
FORMS: Mapping[str, tuple[type, type]] = {
    "Qwen3VLConverter": (QwenToDCP, QwenToHF),
    "Mistral3Converter": (QwenToDCP, QwenToHF),
    "Qwen35Converter": (GenericToDCP, Qwen35ToHF),
    "ExpertMergeDcpConverter": (MergeToDCP, MergeToHF),
    "GenericDCPConverter": (GenericToDCP, GenericToHF),
}
VERBS = ("hf_to_dcp", "dcp_to_hf")


def run(converter: str, words: list[str]) -> int:
    """Runs a command of one of these converters."""
    verb, flags = (words[0], words[1:]) if words else ("", [])
    if verb in ("-h", "--help", ""):
        print(
            f"mm-convert {converter} VERB [flags]   ({DCP_CONVERTERS[converter]})\n\n"
            "  hf_to_dcp   Hugging Face -> DCP: before training with FSDP2\n"
            "  dcp_to_hf   DCP -> Hugging Face: after training with FSDP2\n\n"
            f"mm-convert {converter} VERB -h shows the flags."
        )
        return 0 if verb else 2
    if verb not in VERBS:
        raise RequestError(
            f"there is no verb {verb} of {converter}", " or ".join(VERBS), "give one of them"
        )
    form = FORMS[converter][VERBS.index(verb)]
    prog = f"mm-convert {converter} {verb}"
    command = read(form, flags, prog, f"{form.__doc__}", bare=True)
    with screen_events(quiet=command.screen.quiet) as events:
        result = _convert(converter, verb, command, events)
    show(verb, result, command.screen)
    return 0


def _convert(converter: str, verb: str, command: Command, events: Any) -> Any:  # noqa: ANN401 - imported below
    from mmconvert.convert import End, Request, convert
    from mmconvert.converters.family import Carried
    from mmconvert.formats.dcp.generic import generic_family

    cfg, options = command.cfg, command.options
    hf_dir, dcp, out = _folders(cfg)
    if cfg.num_workers:
        options = replace(options, workers=cfg.num_workers)
    carried: tuple[Carried, ...] = ()
    if getattr(cfg, "keep_origin_mtp_weights", False):
        carried = (Carried("mtp.", "--keep_origin_mtp_weights: taken from origin_hf_dir"),)
    rules = RULES[converter](cfg)
    family = generic_family(converter, hf_dir, rules, drop=options.drop, carried=carried)
    if verb == "hf_to_dcp":
        ends = End("hf", hf_dir), End("dcp", out, DCPLayout(ranks=cfg.ranks), "--")
        asked = Request(verb, *ends, cfg=cfg)
    else:
        dtype = "bf16" if cfg.to_bf16 else "keep"
        asked = Request(
            verb, End("dcp", dcp), End("hf", out), original=hf_dir, dtype=dtype, cfg=cfg
        )
    return convert(family, asked, options, events)


def _folders(cfg: Any) -> tuple[Path, Path, Path]:  # noqa: ANN401 - one of the forms
    """The Hugging Face checkpoint, the DCP folder that is read, what is to be written."""
    if isinstance(cfg, ToDCP):
        return cfg.hf_dir, cfg.dcp_dir, cfg.dcp_dir
    if isinstance(cfg, MergeToDCP):
        return cfg.hf_dir, cfg.save_dir, cfg.save_dir
    names = ("model_assets_dir", "load_dir", "save_dir")
    if isinstance(cfg, Qwen35ToHF):
        names = ("origin_hf_dir", "dcp_dir", "save_hf_dir")
    elif isinstance(cfg, MergeToHF):
        names = ("hf_dir", "dcp_dir", "save_dir")
    found = [getattr(cfg, name) for name in names]
    for name, path in zip(names, found, strict=True):
        if path == Path():
            raise RequestError(f"--{name} is missing", f"--{name} FOLDER")
    return found[0], found[1], found[2]


# ------------------------------------------------------------------------------------- rules


def _naming(dcp_prefix: str, hf_prefix: str) -> Any:  # noqa: ANN401 - imported below
    from mmconvert.formats.dcp.naming import MODEL, Naming

    if hf_prefix:
        return Naming(MODEL, ((hf_prefix, dcp_prefix),))
    return Naming(MODEL + dcp_prefix)


def _qwen3vl(cfg: Any) -> Any:  # noqa: ANN401 - one of the forms
    from mmconvert.formats.dcp.naming import FUSED, Rules

    prefix = "base_model.model.model." if cfg.is_lora_base else "model."
    head = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    return Rules(_naming(prefix, ""), FUSED, ties=(head,) if _tied(cfg) else ())


def _tied(cfg: Any) -> bool:  # noqa: ANN401 - as above
    """Whether the embedding may stand there twice; what is read may have it in any case."""
    return isinstance(cfg, QwenToHF) or cfg.tie_weight


def _mistral3(cfg: Any) -> Any:  # noqa: ANN401 - one of the forms
    from mmconvert.formats.dcp.naming import MISTRAL3

    rules = _qwen3vl(cfg)
    naming = replace(rules.naming, renames=MISTRAL3)
    head = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    return replace(rules, naming=naming, ties=(head,) if rules.ties else ())


def _qwen35(cfg: Any) -> Any:  # noqa: ANN401 - one of the forms
    from mmconvert.formats.dcp.naming import FUSED

    rules = _generic(cfg)
    return replace(rules, fused=rules.fused or FUSED, transposed=True, merged=True)


def _generic(cfg: Any) -> Any:  # noqa: ANN401 - one of the forms
    from mmconvert.formats.dcp.naming import Rules

    ties = _mapping(cfg.tie_weight_mapping)
    naming = _naming(cfg.dcp_prefix, cfg.hf_prefix)
    return Rules(naming, _list(cfg.fused_linear_names), ties=tuple(ties.items()))


def _merge(cfg: Any) -> Any:  # noqa: ANN401 - one of the forms
    from mmconvert.formats.dcp.naming import MODEL, Naming, Rules
    from mmconvert.formats.hf.folder import read_config

    rules = Rules(_naming(cfg.dcp_prefix, cfg.hf_prefix), merged=True, flat=True, one_file=True)
    if read_config(cfg.hf_dir).get("model_type") != "qwen3_omni_moe":
        return rules
    # The thinker alone is trained: its tensors stand without the word, its experts in stacks.
    naming = Naming(MODEL + cfg.dcp_prefix, (("thinker.", ""),))
    return replace(rules, naming=naming if not cfg.hf_prefix else rules.naming, flat=False)


RULES: Mapping[str, Callable[[Any], Any]] = {
    "Qwen3VLConverter": _qwen3vl,
    "Mistral3Converter": _mistral3,
    "Qwen35Converter": _qwen35,
    "ExpertMergeDcpConverter": _merge,
    "GenericDCPConverter": _generic,
}


def _mapping(text: str) -> dict[str, str]:
    """A JSON object of names."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not is_texts(found):
        raise RequestError(
            f"--tie_weight_mapping is {text!r}", 'JSON: {"lm_head.weight": "NAME OF THE EMBEDDING"}'
        )
    return found


def _list(text: str) -> tuple[str, ...]:
    """A JSON list of names, or names with commas between them."""
    try:
        found: object = json.loads(text or "[]")
    except ValueError:
        found = [word.strip() for word in text.split(",")]
    if not is_array(found) or not all(isinstance(word, str) for word in found):
        raise RequestError(f"--fused_linear_names is {text!r}", 'JSON: ["gate_up_proj"]')
    return tuple(str(word) for word in found)
