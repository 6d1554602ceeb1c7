"""MindSpeed-MM's converters for FSDP2 trainers: their verbs, and what each does to a checkpoint.

Flags stand without ``cfg.`` here, and differ from converter to converter: ``dcpflags``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mmconvert.cli.arguments import Command, read
from mmconvert.cli.commands import DCP_CONVERTERS
from mmconvert.cli.conversions import show
from mmconvert.cli.dcpflags import FORMS, FlagNames
from mmconvert.cli.screen import screen_events
from mmconvert.config.dcp import DCPLayout
from mmconvert.errors import RequestError
from mmconvert.narrow import is_array, is_texts

FlagValues = Mapping[str, Any]  # the flags of a command, by name


def run(converter: str, words: list[str]) -> int:
    """Runs a command of one of these converters."""
    forms = FORMS[converter]
    if len(forms) == 1:  # a script
        verb, flags, prog = next(iter(forms)), words, f"mm-convert {converter}"
    else:
        verb, flags = (words[0], words[1:]) if words else ("", [])
        prog = f"mm-convert {converter} {verb}"
    if verb in ("-h", "--help", ""):
        print(_help(converter, forms))
        return 0 if verb else 2
    if verb not in forms:
        raise RequestError(
            f"there is no verb {verb} of {converter}", " or ".join(forms), "give one of them"
        )
    command = read(forms[verb].make(), flags, prog, forms[verb].text, bare=True)
    with screen_events(quiet=command.screen.quiet) as events:
        result = _convert(converter, verb, command, events)
    show(verb, result, command.screen)
    return 0


def _help(converter: str, forms: Mapping[str, FlagNames]) -> str:
    width = max(map(len, forms))
    lines = [f"  {verb:<{width}}  {form.text}" for verb, form in forms.items()]
    of = f"   ({DCP_CONVERTERS[converter]})" if converter in DCP_CONVERTERS else ""
    first = f"mm-convert {converter} VERB [flags]{of}"
    last = f"mm-convert {converter} VERB -h shows the flags."
    return "\n".join([first, "", *lines, "", last])


def _convert(converter: str, verb: str, command: Command, events: Any) -> Any:  # noqa: ANN401 - imported below
    from mmconvert.convert import convert
    from mmconvert.converters.family import Carried
    from mmconvert.directions import dcplora
    from mmconvert.formats.dcp.generic import generic_family
    from mmconvert.request import End, Request

    form, options = FORMS[converter][verb], command.options
    given = cast("dict[str, Any]", vars(command.cfg))
    hf, dcp, out = (Path(given[flag]) for flag in (form.hf, form.dcp, form.out))
    if given["num_workers"]:
        options = replace(options, workers=given["num_workers"])
    if verb == "merge_mm_lora_dcp_weight_to_base_hf":
        words = tuple(word for word in given["lora_target_modules"].split(",") if word)
        asked = dcplora.MergeDCP(hf, dcp, out, words, given["scaling"])
        naming = RULES[converter]({"is_lora_base": True}).naming
        return dcplora.merge(converter, asked, naming, options, events)
    if verb == "lora_hf_to_dcp":
        naming = RULES[converter]({"is_lora_base": True}).naming
        adapter = dcplora.AdapterToDCP(hf, out, naming, given["ranks"])
        return dcplora.to_dcp(adapter, options, events)
    carried: tuple[Carried, ...] = ()
    if given.get("keep_origin_mtp_weights"):
        carried = (Carried("mtp.", f"--keep_origin_mtp_weights: taken from {form.hf}"),)
    rules = RULES[converter]({**given, "hf_dir": hf, "back": dcp != out})
    family = generic_family(converter, hf, rules, drop=options.drop, carried=carried)
    if dcp == out:
        ends = End("hf", hf), End("dcp", out, DCPLayout(ranks=given["ranks"]), "--")
        return convert(family, Request(verb, *ends, cfg=command.cfg), options, events)
    dtype = "bf16" if given["to_bf16"] else "keep"
    ends = End("dcp", dcp), End("hf", out)
    request = Request(verb, *ends, original=hf, dtype=dtype, cfg=command.cfg)
    return convert(family, request, options, events)


# ------------------------------------------------------------------------------------- rules


def _naming(dcp_prefix: str, hf_prefix: str) -> Any:  # noqa: ANN401 - imported below
    from mmconvert.formats.dcp.naming import MODEL, Naming

    if hf_prefix:
        return Naming(MODEL, ((hf_prefix, dcp_prefix),))
    return Naming(MODEL + dcp_prefix)


def _qwen3vl(given: FlagValues) -> Any:  # noqa: ANN401 - as above
    from mmconvert.formats.dcp.naming import FUSED, Rules

    prefix = "base_model.model.model." if given["is_lora_base"] else "model."
    head = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    # What is read may have the embedding twice in any case.
    tied = given.get("back") or given.get("tie_weight")
    return Rules(_naming(prefix, ""), FUSED, ties=(head,) if tied else ())


def _mistral3(given: FlagValues) -> Any:  # noqa: ANN401 - as above
    from mmconvert.formats.dcp.naming import MISTRAL3

    rules = _qwen3vl(given)
    naming = replace(rules.naming, renames=MISTRAL3)
    head = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    return replace(rules, naming=naming, ties=(head,) if rules.ties else ())


def _qwen35(given: FlagValues) -> Any:  # noqa: ANN401 - as above
    from mmconvert.formats.dcp.naming import FUSED

    rules = _generic(given)
    return replace(rules, fused=rules.fused or FUSED, transposed=True, merged=True)


def _generic(given: FlagValues) -> Any:  # noqa: ANN401 - as above
    from mmconvert.formats.dcp.naming import Rules

    naming = _naming(given.get("dcp_prefix", ""), given.get("hf_prefix", ""))
    fused = _list(given.get("fused_linear_names", ""))
    ties = _mapping(given.get("tie_weight_mapping", ""))
    return Rules(naming, fused, ties=tuple(ties.items()))


def _merge(given: FlagValues) -> Any:  # noqa: ANN401 - as above
    from mmconvert.formats.dcp.naming import MODEL, Naming, Rules
    from mmconvert.formats.hf.folder import read_config

    prefix, replaced = given["dcp_prefix"], given["hf_prefix"]
    rules = Rules(_naming(prefix, replaced), merged=True, flat=True, one_file=True)
    if read_config(given["hf_dir"]).get("model_type") != "qwen3_omni_moe":
        return rules
    # The thinker alone is trained: its tensors stand without the word, its experts in stacks.
    naming = Naming(MODEL + prefix, (("thinker.", ""),))
    return replace(rules, naming=naming if not replaced else rules.naming, flat=False)


def _script(given: FlagValues) -> Any:  # noqa: ANN401 - as above
    from mmconvert.formats.dcp.naming import Rules

    return Rules(_naming(given["prefix"], ""), one_file=not given.get("sharded"))


RULES: Mapping[str, Callable[[FlagValues], Any]] = {
    "Qwen3VLConverter": _qwen3vl,
    "Mistral3Converter": _mistral3,
    "Qwen35Converter": _qwen35,
    "ExpertMergeDcpConverter": _merge,
    "GenericDCPConverter": _generic,
    "mindspeed_mm.fsdp.tasks.checkpoint.converter": _qwen35,
    "hf_to_dcp.py": _script,
    "merge_dcp_to_hf.py": _script,
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
