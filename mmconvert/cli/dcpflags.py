"""The flags of MindSpeed-MM's converters for FSDP2 trainers: one table.

The same folder has another name in each of them. A command's form is made of the names it has
there and of the flags that it shares with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmconvert.config import MaybeFloat

# Flag -> type, default, help.
FLAGS: Mapping[str, tuple[Any, object, str]] = {
    "ranks": (
        int,
        1,
        "Divide every tensor over so many ranks, as FSDP2 does; 1 leaves tensors whole.",
    ),
    "num_workers": (int, 0, "Number of threads; 0 takes one for each core."),
    "tie_weight": (bool, False, "Write the embedding once more, as lm_head."),
    "is_lora_base": (bool, False, "Names of a base model for LoRA training."),
    "to_bf16": (bool, False, "Cast floating-point tensors to bfloat16."),
    "dcp_prefix": (str, "", "The prefix of each name, in place of hf_prefix if that is given."),
    "hf_prefix": (
        str,
        "",
        "Prefix of Hugging Face names that dcp_prefix replaces; other names stay as they are.",
    ),
    "prefix": (str, "", "The prefix of each name."),
    "sharded": (bool, False, "One data file for each weight file, not one for all."),
    "tie_weight_mapping": (
        str,
        "",
        'JSON, such as {"lm_head.weight": "model.language_model.embed_tokens.weight"}: tensors '
        "that DCP has besides, and what each repeats.",
    ),
    "fused_linear_names": (
        str,
        "",
        "JSON list of endings of names: these stacks of experts are flattened into one matrix; "
        "of Qwen3.5 transposed.",
    ),
    "trust_remote_code": (bool, False, "Accepted for compatibility; nothing is ever run."),
    "keep_origin_mtp_weights": (
        bool,
        False,
        "Take the mtp.* tensors from the original, and not from DCP.",
    ),
    "model_id": (Literal["qwen3_5", "qwen3_5_moe"], "qwen3_5_moe", "The model."),
    "lora_target_modules": (
        str,
        "",
        "Ends of the names of all adapted modules, with commas; not given: those that are there.",
    ),
    "scaling": (
        MaybeFloat,
        None,
        "Factor of B A: lora_alpha / r of training; not given: 1, as in MindSpeed-MM.",
    ),
}


class FlagNames(NamedTuple):
    """A command: what its flags are called.

    Attributes:
        hf: the Hugging Face checkpoint that is read, or whose files the output is like.
        dcp: the DCP folder.
        out: what is written; the same as ``dcp`` where that is it.
        flags: the others.
        defaults: of flags, where they are not those of the table.
        about: what the command does.
    """

    hf: str
    dcp: str
    out: str
    flags: tuple[str, ...]
    defaults: Mapping[str, object] = {}
    about: str = ""

    @property
    def text(self) -> str:
        """What the command does."""
        to, back = "Hugging Face -> DCP.", "DCP -> Hugging Face."
        return self.about or (to if self.dcp == self.out else back)

    def make(self) -> type:
        """The dataclass of its flags."""
        folders = {self.hf: "Hugging Face checkpoint.", self.out: "Folder to write."}
        if self.dcp != self.out:
            folders[self.hf] = "The original Hugging Face checkpoint: names, files, tokenizer."
            folders[self.dcp] = "DCP folder, or the folder with its tracker file."
        fields: list[tuple[str, Any, Any]] = [(name, Path, field()) for name in folders]
        for name in self.flags:
            kind, default, _ = FLAGS[name]
            fields.append((name, kind, field(default=self.defaults.get(name, default))))
        texts = folders | {name: FLAGS[name][2] for name in self.flags}
        lines = [f"    {name}: {text}" for name, text in texts.items()]
        told = "\n".join([self.text, "", "Attributes:", *lines])  # where help is read from
        return make_dataclass("Conversion", fields, frozen=True, namespace={"__doc__": told})


_TO = ("ranks", "num_workers")
_NAMES = ("dcp_prefix", "hf_prefix")
_ANY = (*_NAMES, "tie_weight_mapping", "fused_linear_names")
_QWEN3_VL = {
    "hf_to_dcp": FlagNames("hf_dir", "dcp_dir", "dcp_dir", ("tie_weight", "is_lora_base", *_TO)),
    "dcp_to_hf": FlagNames(
        *("model_assets_dir", "load_dir", "save_dir"), ("to_bf16", "is_lora_base", "num_workers")
    ),
    "lora_hf_to_dcp": FlagNames(
        *("hf_dir", "dcp_dir", "dcp_dir"), _TO, about="PEFT adapter -> DCP, to train on."
    ),
    "merge_mm_lora_dcp_weight_to_base_hf": FlagNames(
        *("base_hf_dir", "lora_dcp_dir", "save_merged_hf_dir"),
        ("lora_target_modules", "scaling", "num_workers"),
        about="Base model + adapter of FSDP2 training -> Hugging Face.",
    ),
}
_BF16 = ("to_bf16", "num_workers")
# The forms of each converter, by verb. A script of the trainer has one, and no verb.
FORMS: Mapping[str, Mapping[str, FlagNames]] = {
    "Qwen3VLConverter": _QWEN3_VL,
    "Mistral3Converter": _QWEN3_VL,
    "Qwen35Converter": {
        "hf_to_dcp": FlagNames("hf_dir", "dcp_dir", "dcp_dir", (*_ANY, *_TO)),
        "dcp_to_hf": FlagNames(
            *("origin_hf_dir", "dcp_dir", "save_hf_dir"),
            (*_ANY, "trust_remote_code", "keep_origin_mtp_weights", *_BF16),
        ),
    },
    "ExpertMergeDcpConverter": {
        "hf_to_dcp": FlagNames(
            *("hf_dir", "save_dir", "save_dir"), (*_NAMES, *_TO), {"dcp_prefix": "model."}
        ),
        "dcp_to_hf": FlagNames(
            *("hf_dir", "dcp_dir", "save_dir"), (*_NAMES, *_BF16), {"dcp_prefix": "model."}
        ),
    },
    "GenericDCPConverter": {
        "hf_to_dcp": FlagNames("hf_dir", "dcp_dir", "dcp_dir", (*_ANY, *_TO)),
        "dcp_to_hf": FlagNames(
            *("model_assets_dir", "load_dir", "save_dir"), (*_ANY, "trust_remote_code", *_BF16)
        ),
    },
    "mindspeed_mm.fsdp.tasks.checkpoint.converter": {
        "hf_to_dcp": FlagNames("hf_dir", "dcp_dir", "dcp_dir", ("model_id", *_TO)),
        "dcp_to_hf": FlagNames("origin_hf_dir", "dcp_dir", "hf_dir", ("model_id", *_BF16)),
    },
    "hf_to_dcp.py": {
        "hf_to_dcp": FlagNames("hf_dir", "dcp_dir", "dcp_dir", ("prefix", "sharded", *_TO))
    },
    "merge_dcp_to_hf.py": {
        "dcp_to_hf": FlagNames("model_assets_dir", "load_dir", "save_dir", ("prefix", *_BF16))
    },
}
